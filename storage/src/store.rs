//! The store as its users see it: [`Store`] to read and share, [`Writer`] to append.
//!
//! Committed and durable are two words: [`Writer::commit`] numbers and commits, and the
//! [`Mark`] given to the durability callback says what is on disk. Acks, readers and cursors follow
//! the mark only.

pub mod balance;
pub mod compact;
pub mod inspect;
mod letters;
mod open;
pub mod packer;
mod progress;
pub mod repair;
mod room;
pub mod seek;
pub mod verify;
mod writer;

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

pub(crate) use self::open::random;
use self::progress::Progress;
pub use self::writer::Writer;
use crate::batch::{Batch, BatchHead};
use crate::disk::SharedDisk;
use crate::head::Tail;
use crate::log::{Log, LogError};
use crate::passed::{self, Passed};
use crate::ranges::Ranges;
use crate::state::State;
use crate::{Compression, DeadLetterStats, Loss, LossReason, ReadError, StateError, StoredEvent};

/// What happens when the quota is reached and every stored byte is still needed by a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtQuota {
    /// Commits fail with [`CommitError::Quota`](crate::CommitError::Quota) until there is room; the
    /// front holds its devices.
    Hold,
    /// As `Hold`; the front refuses publishes with a reason instead of holding them.
    Refuse,
    /// The oldest file goes, after the loss ledger has its rows.
    DropOldest,
}

/// A sink as retention sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkRetention {
    /// Name of the sink.
    pub name: String,
    /// Event bytes that are kept for it at most; 0 for no limit but the quota. Beyond it, its oldest
    /// are dropped for it, after the loss ledger has the row, so that an upstream that is down for
    /// long does not fill the disk for the others.
    pub lag_bytes_max: u64,
}

impl SinkRetention {
    /// A sink without a limit of its own.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), lag_bytes_max: 0 }
    }
}

/// Whether commits go through the pipelined journal, which turns redb's wait for the disk into one
/// shared sync of blocks that are used again and again. Whatever a journal has left behind is
/// replayed in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalMode {
    /// If the disk is one that gains by it; it is measured when the store is opened.
    Auto,
    /// Always.
    On,
    /// Never: redb syncs each commit by itself.
    Off,
}

/// How to open a store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Data folder; created if its parent exists.
    pub dir: PathBuf,
    /// Number of partitions, 1 to 1024. Fixed at creation.
    pub partitions: u16,
    /// Sinks whose cursors hold data back. A new one starts at the oldest stored event.
    pub sinks: Vec<SinkRetention>,
    /// A log file is sealed when it reaches this size in bytes.
    pub file_bytes_max: u64,
    /// redb's cache for all open files together, in bytes.
    pub cache_bytes: usize,
    /// Bytes that log files may take together.
    pub quota_bytes: u64,
    /// Bytes of the file system that are left free: with less, the disk counts as full.
    pub free_bytes_min: u64,
    /// What happens at the quota.
    pub at_quota: AtQuota,
    /// Keep at least this many bytes of delivered data, quota allowing. 0: trim as soon as possible.
    pub retain_bytes: u64,
    /// Keep delivered data at least this long in microseconds, quota allowing.
    pub retain_age_us: u64,
    /// Bytes of dead letters that are kept for one sink. Beyond them its oldest are dropped, after
    /// the loss ledger has them.
    pub dead_letter_bytes_max: u64,
    /// Whether there is a journal.
    pub journal: JournalMode,
    /// Bytes of the journal's file, at least 128 KiB.
    pub journal_bytes: u64,
    /// How sealed files that have to stay are written, see [`packer`].
    pub compression: Compression,
    /// With a journal, commits that may be queued when [`Writer::commit`] returns, behind those that
    /// are being synced, which are one more at most.
    pub commits_ahead_max: usize,
}

/// What one commit got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Number of this commit, rising by one, from 1 in each life of the process.
    pub commit: u64,
    /// Offsets given to its events, in the order of the slice that was passed.
    pub offsets: Range<u64>,
}

/// How far the log is on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// Every commit up to and with this number is durable.
    pub commit: u64,
    /// End-exclusive durable offset: the watermark.
    pub watermark: u64,
}

/// A piece of the log.
#[derive(Clone, Debug, Default)]
pub struct Read {
    /// Events in offset order.
    pub events: Vec<StoredEvent>,
    /// Where to read on: past the events, and past anything that is gone or quarantined.
    pub next: u64,
    /// Ranges between `from` and `next` that are not in `events`: trimmed or quarantined. They are
    /// in the loss ledger.
    pub missing: Vec<Range<u64>>,
}

/// What [`Writer::retain`] did.
#[derive(Clone, Debug, Default)]
pub struct RetentionReport {
    /// Files removed.
    pub files: u32,
    /// Bytes that they took: given back to the file system, or to be written over.
    pub size_bytes: u64,
    /// Rows written to the loss ledger before.
    pub losses: Vec<Loss>,
    /// Whether another call would go on at once.
    pub more: bool,
}

/// A look at the store.
#[derive(Clone, Debug, Default)]
pub struct StoreStats {
    /// Number of log files.
    pub files: u32,
    /// Bytes they take on disk, with a trimmed one whose blocks the next is to be written over.
    pub log_bytes: u64,
    /// Bytes of the state database.
    pub state_bytes: u64,
    /// Configured quota in bytes.
    pub quota_bytes: u64,
    /// Bytes that the log may still grow by: to its quota, and to what is left free of the disk.
    pub room_bytes: u64,
    /// First stored offset.
    pub first_offset: u64,
    /// End-exclusive durable offset.
    pub watermark: u64,
    /// Next sequence number per partition.
    pub next_seq: Vec<u64>,
    /// Event bytes ever appended.
    pub event_bytes: u64,
    /// Cursor per sink, also of sinks that are no longer configured.
    pub cursors: Vec<(String, u64)>,
    /// First offset that was ever the sink's, per sink as in `cursors`: what it was to have is
    /// from there to the watermark.
    pub origins: Vec<(String, u64)>,
    /// Dead letters per sink that has any.
    pub dead_letters: Vec<(String, DeadLetterStats)>,
    /// Rows in the loss ledger.
    pub losses: u64,
    /// Events that were found unreadable since the store was opened: their batches are damaged, and
    /// their exact ranges are in the loss ledger.
    pub quarantined_events: u64,
}

/// Shared handle: reads, dead letters, loss ledger, statistics. Cheap to clone, safe to use from
/// any thread; every call may block on the disk.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    options: StoreOptions,
    disk: SharedDisk,
    epoch: u64,
    log: Log,
    state: State,
    progress: Arc<Progress>,
    /// What turned out to be damaged in this life of the process, once the loss ledger has it.
    quarantined: Mutex<Ranges>,
    /// The last time that anyone told.
    now_us: AtomicU64,
    /// Offset of the checkpoint.
    covered: AtomicU64,
    /// Held as long as the store is open.
    lock: Mutex<Option<File>>,
}

impl Shared {
    /// Event bytes appended before `offset`, exact where a batch starts, else in proportion.
    fn event_bytes_before(&self, offset: u64, tail: &Tail) -> Result<u64, LogError> {
        let Some(batch) = self.log.batch_at(offset, tail.position.offset)? else {
            return Ok(tail.event_bytes);
        };
        let Ok(head) = BatchHead::decode(&batch) else {
            return Ok(tail.event_bytes);
        };
        let into = u128::from(offset.saturating_sub(head.position().offset));
        let part = into * u128::from(head.event_bytes()) / u128::from(head.count().max(1));
        Ok(head.event_bytes_before() + part as u64)
    }

    /// See [`Store::state`].
    fn state(&self, namespace: u16, key: &[u8]) -> Result<Option<Bytes>, StateError> {
        // Held while the database is read, so that a checkpoint does not move a value between.
        let projection = self.progress.projection();
        match projection.changed(namespace, key) {
            Some(value) => Ok(value.clone()),
            None => self.state.get(namespace, key),
        }
    }

    /// See [`Store::passed`].
    fn passed(&self, sink: &str) -> Result<Passed, StateError> {
        let Some(row) = self.state(passed::NAMESPACE, sink.as_bytes())? else {
            return Ok(Passed::default());
        };
        Passed::decode(row).map_err(|_| StateError {
            disk_full: false,
            reason: format!("the record of what sink {sink:?} has passed is damaged"),
        })
    }

    fn quarantined(&self) -> MutexGuard<'_, Ranges> {
        self.quarantined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first event at or after an offset, its time corrected where it is known by now.
    fn event_at(&self, from: u64) -> Result<Option<StoredEvent>, LogError> {
        let watermark = self.progress.mark().watermark;
        let from = from.max(self.progress.projection().start);
        let batch = self.log.batch_at(from, watermark)?;
        let batch = batch.and_then(|batch| Batch::decode(batch).ok());
        let mut event = batch.and_then(|batch| batch.events(from).next()?.ok());
        if let Some(event) = &mut event {
            self.progress.projection().boots.correct(event);
        }
        Ok(event)
    }

    /// Event bytes in a range of offsets, 0 where they cannot be told.
    fn event_bytes_in(&self, offsets: &Range<u64>) -> u64 {
        let tail = self.progress.tail();
        let before = |offset| self.event_bytes_before(offset, &tail);
        match (before(offsets.start), before(offsets.end)) {
            (Ok(start), Ok(end)) => end.saturating_sub(start),
            _ => 0,
        }
    }
}

impl Store {
    /// Random id of this store's life.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch
    }

    /// What is durable now.
    pub fn mark(&self) -> Mark {
        self.shared.progress.mark()
    }

    /// Durable cursor of a configured sink: the next offset that it needs.
    pub fn cursor(&self, sink: &str) -> Option<u64> {
        self.shared.progress.projection().cursors.get(sink)
    }

    /// What a sink has passed beside its cursor, as of the last durable commit.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be read.
    pub fn passed(&self, sink: &str) -> Result<Passed, StateError> {
        self.shared.passed(sink)
    }

    /// Events from `from` on, at least one if there is any below the watermark, else at most
    /// `events_max` events and about `size_bytes_max` event bytes.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn read(
        &self,
        from: u64,
        events_max: usize,
        size_bytes_max: usize,
    ) -> Result<Read, ReadError> {
        let (read, corrupt) = self.find(from, events_max, size_bytes_max)?;
        for offsets in &corrupt {
            self.report(offsets)?;
        }
        Ok(read)
    }

    /// Events from `from` on, and which of the missing ones are damaged rather than trimmed.
    fn find(
        &self,
        from: u64,
        events_max: usize,
        size_bytes_max: usize,
    ) -> Result<(Read, Vec<Range<u64>>), ReadError> {
        let shared = &*self.shared;
        let watermark = self.mark().watermark;
        let start = shared.progress.projection().start.max(from);
        let mut found = shared.log.read(start, watermark, events_max, size_bytes_max)?;
        {
            let projection = shared.progress.projection();
            found.events.iter_mut().for_each(|event| projection.boots.correct(event));
        }
        let next = found.next.max(from);
        // What was trimmed while this was reading is not damage.
        let start = shared.progress.projection().start;
        let corrupt = found.corrupt.into_iter().map(|range| range.start.max(start)..range.end);
        let corrupt: Vec<Range<u64>> = corrupt.filter(|range| !range.is_empty()).collect();
        let trimmed = from..start.min(next);
        let missing = Some(trimmed).filter(|range| !range.is_empty());
        let missing = missing.into_iter().chain(corrupt.iter().cloned()).collect();
        Ok((Read { events: found.events, next, missing }, corrupt))
    }

    /// Writes the loss of a range that cannot be read, once.
    fn report(&self, offsets: &Range<u64>) -> Result<(), ReadError> {
        let shared = &*self.shared;
        let mut quarantined = shared.quarantined();
        if quarantined.within(offsets).count() == offsets.end - offsets.start {
            return Ok(());
        }
        tracing::error!(?offsets, "events cannot be read: their batch is damaged");
        let now_us = shared.now_us.load(Ordering::Relaxed);
        let loss = |sink: Option<&str>, from: u64| {
            let lost = from.max(offsets.start)..offsets.end;
            Loss::new(sink.map(str::to_owned), lost, 0, LossReason::Corrupt, now_us)
        };
        let losses: Vec<Loss> = {
            let projection = shared.progress.projection();
            let sinks = projection.cursors.configured();
            match projection.cursors.floor() {
                None => vec![loss(None, offsets.start)],
                Some(_) => sinks
                    .filter(|(_, cursor)| cursor.offset < offsets.end)
                    .map(|(sink, cursor)| loss(Some(sink), cursor.offset))
                    .collect(),
            }
        };
        shared.state.put_losses(&losses).map_err(|error| ReadError::Io {
            path: State::path(&shared.disk),
            reason: error.reason,
        })?;
        quarantined.insert(offsets.clone());
        Ok(())
    }

    /// Event bytes between `from` and the watermark, from file and batch heads, exact to one batch.
    pub fn lag_bytes(&self, from: u64) -> u64 {
        let tail = self.shared.progress.tail();
        let from = from.max(self.shared.progress.projection().start);
        match self.shared.event_bytes_before(from, &tail) {
            Ok(before) => tail.event_bytes.saturating_sub(before),
            Err(error) => {
                tracing::warn!(path = %error.path.display(), error = %error.error,
                    "cannot tell a lag in bytes");
                0
            }
        }
    }

    /// Receive time of the first event at or after `from`, if there is one, as well as it is known.
    pub fn received_us(&self, from: u64) -> Option<u64> {
        Some(self.shared.event_at(from).ok()??.received_us())
    }

    /// Rows of the loss ledger, oldest first.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn losses(&self) -> Result<Vec<Loss>, StateError> {
        self.shared.state.losses()
    }

    /// A value of the key-value projection as of the last durable commit.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn state(&self, namespace: u16, key: &[u8]) -> Result<Option<Bytes>, StateError> {
        self.shared.state(namespace, key)
    }

    /// Every key of a namespace of the projection with its value, in the order of the keys, as of the
    /// last durable commit. All of it is in memory at once: its owner bounds its namespace.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn states(&self, namespace: u16) -> Result<Vec<(Bytes, Bytes)>, StateError> {
        let projection = self.shared.progress.projection();
        let mut rows = self.shared.state.scan(namespace)?;
        for (key, value) in projection.changes_in(namespace) {
            match value {
                Some(value) => drop(rows.insert(key.clone(), value.clone())),
                None => drop(rows.remove(key)),
            }
        }
        Ok(rows.into_iter().collect())
    }

    /// A look at the store. What cannot be read counts as 0.
    pub fn stats(&self) -> StoreStats {
        let shared = &*self.shared;
        let (mark, tail) = shared.progress.reached();
        let (first_offset, sinks) = {
            let projection = shared.progress.projection();
            (projection.start, projection.cursors.all().clone())
        };
        let StoreOptions { quota_bytes, free_bytes_min, .. } = shared.options;
        let log_bytes = shared.log.used_bytes();
        let spare_bytes = shared.log.spare_bytes();
        let free_bytes = shared.disk.free_bytes().unwrap_or(u64::MAX).saturating_add(spare_bytes);
        StoreStats {
            files: shared.log.spans(mark.watermark).len() as u32,
            log_bytes,
            room_bytes: quota_bytes
                .saturating_add(spare_bytes)
                .saturating_sub(log_bytes)
                .min(free_bytes.saturating_sub(free_bytes_min)),
            state_bytes: shared.state.used_bytes(),
            quota_bytes,
            first_offset,
            watermark: mark.watermark,
            next_seq: tail.next_seq,
            event_bytes: tail.event_bytes,
            cursors: sinks.iter().map(|(sink, c)| (sink.clone(), c.offset)).collect(),
            origins: sinks.iter().map(|(sink, c)| (sink.clone(), c.origin)).collect(),
            dead_letters: shared.state.count_dead_letters().unwrap_or_default(),
            losses: shared.state.count_losses().unwrap_or_default(),
            quarantined_events: shared.quarantined().count(),
        }
    }
}

impl From<LogError> for ReadError {
    fn from(error: LogError) -> Self {
        Self::Io { path: error.path, reason: error.error.to_string() }
    }
}

#[cfg(test)]
mod tests;
