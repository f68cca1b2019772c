//! The store as its users see it: [`Store`] to read and share, [`Writer`] to append.
//!
//! Committed and durable are two words: [`Writer::commit`] numbers and commits, and the
//! [`Mark`] given to the durability callback says what is on disk. Acks, readers and cursors follow
//! the mark only.

pub mod balance;
pub mod compact;
pub mod inspect;
mod letters;
pub mod packer;
mod progress;
pub mod repair;
pub mod seek;
pub mod verify;

use std::fs::{File, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use self::progress::{Ahead, Progress};
use crate::ballast::Ballast;
use crate::batch::{Batch, BatchHead, Encoder};
use crate::clock::{self, Clock};
use crate::cursor::Cursors;
use crate::disk::{FileDisk, SharedDisk, is_full};
use crate::head::{BadHead, FORMAT, Head, Tail};
use crate::journal;
use crate::log::{self, Journaled, Journaling, Log, LogError, LogOpenError, Span};
use crate::passed::{self, Lanes, Passed};
use crate::ranges::Ranges;
use crate::retention::{self, Rules};
use crate::state::{Checkpoint, State, StateOpenError};
use crate::{
    CommitError, Compression, Control, DeadLetterStats, Event, Loss, LossReason, OpenError,
    ReadError, StateError, StoredEvent,
};

/// A checkpoint is written after this many bytes of log, which bounds what the next open replays,
/// or this many bytes of changes, which bounds what they take in memory.
const CHECKPOINT_LOG_BYTES: u64 = 16 << 20;
const CHECKPOINT_CHANGE_BYTES: usize = 4 << 20;
/// While checkpoints fail, commits with control records are refused from this many bytes on.
const CHANGE_BYTES_MAX: usize = 8 * CHECKPOINT_CHANGE_BYTES;

/// Files that one call of [`Writer::retain`] removes: it runs where commits wait for it.
const RETAIN_FILES_MAX: usize = 2;

/// A fully delivered active file is worth replacing from this part of a full one on.
const WORTH_ROLLING: u64 = 8;

/// What happens when the quota is reached and every stored byte is still needed by a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtQuota {
    /// Commits fail with [`CommitError::Quota`] until there is room; the front holds its devices.
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
    /// Bytes given back to the file system.
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
    /// Bytes they take on disk.
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

/// What a store is opened for.
#[derive(Clone, Copy)]
enum Opening {
    ToWrite(journal::Pump),
    /// Nothing is written: the disk is a frozen one.
    ToLook,
}

const TO_WRITE: Opening = Opening::ToWrite(journal::Pump::Threads);

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
    /// Opens or creates the store and takes its lock. `now_us` is microseconds since the Unix epoch.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(options: StoreOptions, now_us: u64) -> Result<(Store, Writer), OpenError> {
        let folder = |source| OpenError::Folder { path: options.dir.clone(), source };
        let disk = FileDisk::prepare(options.dir.clone(), log::FOLDER).map_err(folder)?;
        let lock = take_lock(&options.dir)?;
        Self::open_with(Arc::new(disk), Some(lock), TO_WRITE, options, now_us)
    }

    /// As [`Store::open`], on any disk and without a lock: the seam for injecting faults and for
    /// measuring. The caller sees to it that the disk is opened once.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_on(
        disk: SharedDisk,
        options: StoreOptions,
        now_us: u64,
    ) -> Result<(Store, Writer), OpenError> {
        Self::open_with(disk, None, TO_WRITE, options, now_us)
    }

    fn open_with(
        disk: SharedDisk,
        lock: Option<File>,
        opening: Opening,
        options: StoreOptions,
        now_us: u64,
    ) -> Result<(Store, Writer), OpenError> {
        let mut ballast = Ballast::find(disk.clone());
        let (state, checkpoint) = open_state(&disk, &options, &mut ballast)?;
        let stored = checkpoint.head.tail.next_seq.len() as u16;
        if stored != options.partitions {
            return Err(OpenError::Partitions {
                path: options.dir,
                stored,
                configured: options.partitions,
            });
        }
        let Head { epoch, mut tail } = checkpoint.head;
        let checkpoint_offset = tail.position.offset;
        let progress = Arc::new(Progress::default());
        let mut projection = progress.projection_mut();
        projection.cursors = Cursors::new(checkpoint.cursors);
        let boots = state.scan(clock::NAMESPACE).map_err(|error| OpenError::Database {
            path: State::path(&disk),
            reason: error.reason,
        })?;
        for (boot, row) in &boots {
            projection.boots.apply(boot, Some(row));
        }
        let log = Log::open(
            disk.clone(),
            options.cache_bytes,
            journaling(&options, opening, &progress),
            checkpoint.start,
            epoch,
            &mut tail,
            &mut |control| projection.apply(control),
        )
        .map_err(|error| match error {
            LogOpenError::Newer(found) => newer_format(&options, found),
            LogOpenError::Foreign(path) => OpenError::Database {
                path,
                reason: "it belongs to another store; move it out of the folder".into(),
            },
            LogOpenError::Log(error) => database_error(error.path, &error.error),
        })?;

        projection.start = checkpoint.start.max(log.first_offset().unwrap_or(tail.position.offset));
        let sinks = options.sinks.iter().map(|sink| sink.name.clone());
        let cursors = projection.cursors.all().clone();
        let start = projection.start;
        let missed = projection.cursors.configure(sinks, start);
        // A sink is known from the day it was configured, also if it never acknowledges anything.
        let configured = *projection.cursors.all() != cursors;
        let losses: Vec<Loss> = missed
            .into_iter()
            .map(|(sink, offsets)| {
                Loss::new(Some(sink), offsets, 0, LossReason::SinkAbsent, now_us)
            })
            .collect();

        drop(projection);
        progress.begin(tail.clone());
        let shared = Arc::new(Shared {
            epoch,
            log,
            state,
            progress,
            quarantined: Mutex::default(),
            now_us: now_us.into(),
            covered: checkpoint_offset.into(),
            lock: Mutex::new(lock),
            disk,
            options,
        });
        let options = &shared.options;
        let mut writer = Writer {
            ballast,
            clock: None,
            kept_from: u64::MAX,
            encoder: Encoder::new(options.partitions),
            // At least four files within the quota, so that trimming one makes room.
            file_bytes_max: options.file_bytes_max.min(options.quota_bytes / 4).max(1),
            tail,
            commit: 0,
            void: None,
            unsaved_bytes: 0,
            shared: shared.clone(),
        };
        // After a crash, what was replayed is saved at once: it may come from a page cache that
        // outlived the process and not from the disk.
        // A store of an older format is one of this format from here on: the versions before refuse it.
        if configured || checkpoint.format < FORMAT || !writer.shared.log.has_active() {
            writer
                .checkpoint(&losses)
                .or_else(|error| {
                    if !error.disk_full {
                        return Err(error);
                    }
                    writer.ballast.release();
                    writer.checkpoint(&losses)
                })
                .map_err(|error| OpenError::Database {
                    path: State::path(&writer.shared.disk),
                    reason: error.reason,
                })?;
        }
        Ok((Store { shared }, writer))
    }

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
        let free_bytes = shared.disk.free_bytes().unwrap_or(u64::MAX);
        StoreStats {
            files: shared.log.spans(mark.watermark).len() as u32,
            log_bytes,
            room_bytes: quota_bytes
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

impl From<LogError> for CommitError {
    fn from(error: LogError) -> Self {
        if error.is_full() {
            Self::DiskFull { path: error.path }
        } else {
            Self::Io { path: error.path, reason: error.error.to_string() }
        }
    }
}

/// The lock of a data folder, held as long as the file is open.
fn take_lock(dir: &Path) -> Result<File, OpenError> {
    let folder = |source| OpenError::Folder { path: dir.to_owned(), source };
    let lock = File::create(dir.join("lock")).map_err(folder)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse { path: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(folder(source)),
    }
}

fn open_state(
    disk: &SharedDisk,
    options: &StoreOptions,
    ballast: &mut Ballast,
) -> Result<(State, Checkpoint), OpenError> {
    let open = || State::open(disk.clone(), options.partitions, random);
    let opened = match open() {
        // A state that was not closed cleanly is copied: that is what the ballast has room for.
        Err(StateOpenError::Database(redb::Error::Io(error))) if is_full(&error) => {
            ballast.release();
            open()
        }
        opened => opened,
    };
    opened.map_err(|error| match error {
        StateOpenError::Head(BadHead::Newer(found)) => newer_format(options, found),
        StateOpenError::Head(BadHead::Corrupt) => OpenError::DamagedState {
            path: State::path(disk),
            reason: "its head row fails its checksum".into(),
        },
        StateOpenError::Database(error) => {
            let (path, reason) = (State::path(disk), error.to_string());
            if (LogError { path: path.clone(), error }).is_damage() {
                OpenError::DamagedState { path, reason }
            } else {
                OpenError::Database { path, reason }
            }
        }
    })
}

fn newer_format(options: &StoreOptions, found: u32) -> OpenError {
    OpenError::NewerFormat { path: options.dir.clone(), found, supported: FORMAT }
}

fn database_error(path: PathBuf, error: &redb::Error) -> OpenError {
    OpenError::Database { path, reason: error.to_string() }
}

/// How the log is to make commits durable, and whom it tells.
fn journaling(
    options: &StoreOptions,
    opening: Opening,
    progress: &Arc<Progress>,
) -> (Journaled, Journaling) {
    let (journaled, pump) = match (opening, options.journal) {
        (Opening::ToLook, _) => (Journaled::LookedAt, journal::Pump::Threads),
        (Opening::ToWrite(pump), JournalMode::Auto) => (Journaled::IfItPays, pump),
        (Opening::ToWrite(pump), JournalMode::On) => (Journaled::Always, pump),
        (Opening::ToWrite(pump), JournalMode::Off) => (Journaled::Never, pump),
    };
    let progress = progress.clone();
    let on_progress = move |told| match told {
        journal::Progress::Durable(place) => progress.advance(place),
        journal::Progress::Failed => {
            if let Some(callback) = progress.on_failure.get() {
                callback();
            }
        }
    };
    let (ring_bytes, ahead_max) = (options.journal_bytes, options.commits_ahead_max);
    let journal = journal::Options { ring_bytes, ahead_max, pump };
    (journaled, Journaling { options: journal, on_progress: Arc::new(on_progress) })
}

/// A random number from the keys that the standard library takes from the system.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// The one writer. Belongs to the committer thread.
pub struct Writer {
    ballast: Ballast,
    shared: Arc<Shared>,
    encoder: Encoder,
    /// What gives the times of the events.
    clock: Option<Clock>,
    /// See [`Writer::keep_from`].
    kept_from: u64,
    file_bytes_max: u64,
    /// Where the next batch goes; what came before is committed.
    tail: Tail,
    commit: u64,
    /// What made the commits void that ran ahead, until the caller knows.
    void: Option<CommitError>,
    /// Bytes appended since the checkpoint.
    unsaved_bytes: u64,
}

impl Writer {
    /// Called with every new [`Mark`], from whichever thread made it durable. Set it before the
    /// first commit.
    ///
    /// # Panics
    /// The second time.
    pub fn on_durable(&mut self, callback: impl Fn(Mark) + Send + Sync + 'static) {
        let first = self.shared.progress.on_durable.set(Box::new(callback)).is_ok();
        assert!(first, "the marks go to one listener");
    }

    /// Called when commits that have returned will not become durable, or when the file that they go
    /// to cannot be read, from whichever thread found out: then [`Writer::check`] does what is to be
    /// done, and says why. Set it before the first commit.
    ///
    /// # Panics
    /// The second time.
    pub fn on_failure(&mut self, callback: impl Fn() + Send + Sync + 'static) {
        let first = self.shared.progress.on_failure.set(Box::new(callback)).is_ok();
        assert!(first, "failures go to one listener");
    }

    /// What gives the times of the events and of the calls from here on; until it is told, the times
    /// stand for themselves, and events get no [`Stamp`](crate::Stamp). Returns what is to be committed
    /// at the caller's next opportunity, with which the times of earlier events of this boot are known:
    /// nothing but when the clock of a boot is synchronised for the first time.
    #[must_use]
    pub fn set_clock(&mut self, clock: Clock) -> Vec<Control> {
        self.clock = Some(clock);
        self.encoder.set_clock(self.clock);
        self.shared.progress.projection().boots.learn(&clock)
    }

    /// Nothing from this offset on is trimmed until a later one is told, whatever sinks, wishes and the
    /// quota say: the caller reads it again when it is started anew. `u64::MAX`, which is how it begins:
    /// the caller needs nothing.
    pub fn keep_from(&mut self, offset: u64) {
        self.kept_from = offset;
    }

    /// Numbers the events in slice order and commits them with the control records in one
    /// transaction. They are durable when a [`Mark`] says so: without a journal before it returns; with
    /// one perhaps later, see [`StoreOptions::commits_ahead_max`], but at the latest with the sync that
    /// follows the one under way.
    ///
    /// # Errors
    /// See [`CommitError`]. After one, nothing of this commit may be acked, and nothing of it was
    /// or will be readable: the next commit takes its numbers, in a new file. After
    /// [`CommitError::Io`] that is true also of all commits that no mark has covered.
    ///
    /// # Panics
    /// If an event's partition is not below [`StoreOptions::partitions`], or a cursor passes the
    /// end of the log.
    pub fn commit(
        &mut self,
        events: &[Event],
        control: &[Control],
        now_us: u64,
    ) -> Result<Committed, CommitError> {
        self.shared.now_us.store(now_us, Ordering::Relaxed);
        self.check()?;
        let partitions = self.shared.options.partitions;
        assert!(events.iter().all(|e| e.partition < partitions), "an unknown partition");
        let end = self.tail.position.offset + events.len() as u64;
        let past = |c: &Control| matches!(c, Control::Cursor { offset, .. } if *offset > end);
        assert!(!control.iter().any(past), "a cursor past the end of the log");
        let place = self.write(events, control, now_us).map_err(|error| {
            if matches!(error, CommitError::DiskFull { .. }) {
                self.ballast.release();
            }
            self.void.take().unwrap_or(error)
        })?;
        self.commit += 1;
        let watermark = self.tail.position.offset;
        let mark = Mark { commit: self.commit, watermark };
        let (tail, control) = (self.tail.clone(), control.to_vec());
        self.shared.progress.committed(Ahead { place, mark, tail, control });
        self.checkpoint_if_due();
        Ok(Committed { commit: mark.commit, offsets: watermark - events.len() as u64..watermark })
    }

    /// Whether the commits that have returned still stand. Gives up a log file that cannot be read.
    ///
    /// # Errors
    /// [`CommitError::Io`], once, if those that no mark has covered are void.
    pub fn check(&mut self) -> Result<(), CommitError> {
        let log = &self.shared.log;
        if let Some(error) = log.journal_failure().or_else(|| log.take_unreadable()) {
            self.failed(error);
        }
        self.void.take().map_or(Ok(()), Err)
    }

    /// Goes back to what is durable after the log has failed, so that the next commit begins a new
    /// file there.
    fn failed(&mut self, error: LogError) -> CommitError {
        let log = &self.shared.log;
        // What ran ahead of this failure becomes durable all the same, unless it is the journal's.
        let stands = log.settle().is_ok();
        log.fail();
        self.tail = self.shared.progress.void_ahead();
        if !stands {
            if error.is_full() {
                self.ballast.release();
            }
            let (path, reason) = (error.path.clone(), error.error.to_string());
            self.void = Some(CommitError::Io { path, reason });
        }
        error.into()
    }

    fn write(
        &mut self,
        events: &[Event],
        control: &[Control],
        now_us: u64,
    ) -> Result<u64, CommitError> {
        if !events.is_empty() {
            self.hold_ballast(now_us)?;
            self.make_room(now_us)?;
        }
        if events.is_empty() && control.is_empty() {
            return Ok(0);
        }
        self.append(events, control)
    }

    /// Sees to it that the ballast is held: on a disk that was full, events wait for that.
    fn hold_ballast(&mut self, now_us: u64) -> Result<(), CommitError> {
        let drop_oldest = self.shared.options.at_quota == AtQuota::DropOldest;
        let mut report = RetentionReport::default();
        while let Err(error) = self.ballast.hold(self.shared.state.used_bytes()) {
            let path = self.ballast.path();
            if !is_full(&error) {
                let reason = error.to_string();
                return Err(CommitError::Io { path, reason });
            }
            // As at the quota: what only a wish keeps goes first.
            let removed = report.files;
            self.trim(now_us, true, &mut report)?;
            if report.files == removed && !(drop_oldest && self.drop_oldest(now_us, &mut report)?) {
                return Err(CommitError::DiskFull { path });
            }
        }
        Ok(())
    }

    /// Gives the place of the journal from which on it is durable.
    fn append(&mut self, events: &[Event], control: &[Control]) -> Result<u64, CommitError> {
        let change_bytes = self.shared.progress.projection().change_bytes;
        if !control.is_empty() && change_bytes > CHANGE_BYTES_MAX {
            self.checkpoint(&[]).map_err(|error| self.state_failed(error))?;
        }
        let log = &self.shared.log;
        let full = log.has_active() && log.active_bytes() >= self.file_bytes_max;
        if !log.has_active() {
            self.roll()?;
        } else if full && let Err(error) = self.roll() {
            if !self.shared.log.has_active() {
                return Err(error);
            }
            // The full file still takes commits; the next one tries again.
            tracing::warn!(%error, "cannot start a new log file");
        }
        let log = &self.shared.log;
        match log.append(&mut self.encoder, events, control, &mut self.tail) {
            Ok(appended) => {
                self.unsaved_bytes += appended.size_bytes;
                Ok(appended.durable_at.unwrap_or(0))
            }
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Goes on in a new file.
    fn roll(&mut self) -> Result<(), CommitError> {
        self.shared.log.settle().map_err(|error| self.failed(error))?;
        if self.shared.log.last_first_offset() == Some(self.tail.position.offset) {
            // The new file replaces one without events: its control records go to the checkpoint.
            self.checkpoint(&[]).map_err(|error| self.state_failed(error))?;
        }
        let head = Head { epoch: self.shared.epoch, tail: self.tail.clone() };
        self.shared.log.roll(&head).map_err(|error| {
            if self.shared.log.journal_failure().is_some() {
                self.failed(error)
            } else {
                error.into()
            }
        })
    }

    fn state_failed(&self, error: StateError) -> CommitError {
        let path = State::path(&self.shared.disk);
        if error.disk_full {
            CommitError::DiskFull { path }
        } else {
            CommitError::Io { path, reason: error.reason }
        }
    }

    /// Sees to it that the log is below its quota, and that enough of the disk is free.
    fn make_room(&mut self, now_us: u64) -> Result<(), CommitError> {
        let drop_oldest = self.shared.options.at_quota == AtQuota::DropOldest;
        let mut report = RetentionReport::default();
        while let Err(error) = self.has_room() {
            // What only a wish keeps goes first, and no more of it than is needed.
            let removed = report.files;
            self.trim(now_us, true, &mut report)?;
            if report.files == removed && !(drop_oldest && self.drop_oldest(now_us, &mut report)?) {
                return Err(error);
            }
        }
        Ok(())
    }

    fn has_room(&self) -> Result<(), CommitError> {
        let StoreOptions { quota_bytes, free_bytes_min, .. } = self.shared.options;
        let used_bytes = self.shared.log.used_bytes();
        if used_bytes >= quota_bytes {
            return Err(CommitError::Quota { used_bytes, quota_bytes });
        }
        // What cannot be asked is no reason to stand still.
        if free_bytes_min > 0
            && let Ok(free_bytes) = self.shared.disk.free_bytes()
            && free_bytes < free_bytes_min
        {
            let path = self.shared.disk.path(log::FOLDER);
            return Err(CommitError::LittleSpace { path, free_bytes, free_bytes_min });
        }
        Ok(())
    }

    /// Applies retention: trims behind the slowest cursor, and by policy. Removes a few files at most
    /// and says whether there are more, so that commits do not wait for long.
    ///
    /// # Errors
    /// [`StateError`] if the loss ledger could not be written; then nothing was removed.
    pub fn retain(&mut self, now_us: u64) -> Result<RetentionReport, StateError> {
        self.shared.now_us.store(now_us, Ordering::Relaxed);
        let mut report = RetentionReport::default();
        let limited = self.limit_lags(now_us, &mut report);
        let limited = limited.map_err(|error| self.state_failed(error));
        match limited.and_then(|()| self.trim(now_us, false, &mut report)) {
            Ok(()) => Ok(report),
            Err(error) => {
                let disk_full = matches!(error, CommitError::DiskFull { .. });
                if disk_full {
                    self.ballast.release();
                }
                Err(StateError { disk_full, reason: error.to_string() })
            }
        }
    }

    /// Moves sinks that lag too far over what they can no longer have.
    fn limit_lags(&mut self, now_us: u64, report: &mut RetentionReport) -> Result<(), StateError> {
        let tail = self.shared.progress.tail();
        let losses: Vec<Loss> = self
            .shared
            .options
            .sinks
            .iter()
            .filter(|sink| sink.lag_bytes_max > 0)
            .flat_map(|sink| {
                let cursor = self.shared.progress.projection().cursors.get(&sink.name);
                let offsets = cursor.and_then(|cursor| {
                    Some(cursor..self.within_lag(cursor, sink.lag_bytes_max, &tail)?)
                });
                let owed = offsets.map(|offsets| self.owed(&sink.name, offsets));
                self.losses(&sink.name, &owed.unwrap_or_default(), LossReason::Lag, now_us)
            })
            .collect();
        if !losses.is_empty() {
            let start = self.shared.progress.projection().start;
            self.save(start, &losses)?;
            report.losses.extend(losses);
        }
        Ok(())
    }

    /// Where a cursor that lags by more than the limit has to go: to a little less than the limit,
    /// so that it is not moved, and written down, a few events at a time.
    fn within_lag(&self, cursor: u64, lag_bytes_max: u64, tail: &Tail) -> Option<u64> {
        let lag_bytes = |from| {
            let before = self.shared.event_bytes_before(from, tail).ok()?;
            Some(tail.event_bytes.saturating_sub(before))
        };
        if lag_bytes(cursor)? <= lag_bytes_max {
            return None;
        }
        let target_bytes = lag_bytes_max - lag_bytes_max / 16;
        let (mut low, mut high) = (cursor, tail.position.offset);
        while low < high {
            let middle = low.midpoint(high);
            if lag_bytes(middle)? > target_bytes {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Some(low)
    }

    /// Removes a few files that no sink needs and no wish keeps; at the quota wishes do not count.
    fn trim(
        &mut self,
        now_us: u64,
        at_quota: bool,
        report: &mut RetentionReport,
    ) -> Result<(), CommitError> {
        let options = &self.shared.options;
        let floor = self.shared.progress.projection().cursors.floor();
        let mut rules = Rules {
            sinks: floor.is_some(),
            retain_bytes: options.retain_bytes,
            retain_age_us: options.retain_age_us,
        };
        if at_quota && rules.sinks {
            (rules.retain_bytes, rules.retain_age_us) = (0, 0);
        }
        let watermark = self.tail.position.offset;
        let floor = floor.unwrap_or(watermark).min(self.kept_from);
        let mut spans = self.shared.log.spans(watermark);
        let age_us = |span: &Span| {
            let end = span.offsets.end;
            // What is not durable yet has only just come.
            if end > self.shared.progress.mark().watermark {
                return 0;
            }
            // For a last event that is damaged the one after it speaks, which is not older.
            let event = [end.saturating_sub(1), end]
                .into_iter()
                .find_map(|offset| self.shared.event_at(offset).ok().flatten());
            let boots = &self.shared.progress.projection().boots;
            event.map_or(0, |event| boots.age_us(&event, self.clock.as_ref(), now_us))
        };
        let mut count = retention::expendable(&spans, floor, rules, RETAIN_FILES_MAX, age_us);
        if let Some(active) = spans.last()
            && count + 1 == spans.len()
            && !active.offsets.is_empty()
            && active.offsets.end <= floor
            && (at_quota || active.size_bytes >= self.file_bytes_max / WORTH_ROLLING)
            && !rules.keeps(0, || age_us(active))
        {
            self.roll()?;
            spans = self.shared.log.spans(watermark);
            count = spans.len() - 1;
        }
        if count == 0 {
            return Ok(());
        }
        report.more = count == RETAIN_FILES_MAX;
        let mut losses = Vec::new();
        if !rules.sinks {
            let offsets = spans[0].offsets.start..spans[count - 1].offsets.end;
            losses.extend(self.loss(None, offsets, LossReason::Expired, now_us));
        }
        self.remove(&spans[..count], losses, report).map_err(|error| self.state_failed(error))
    }

    /// Drops the oldest file, whoever still needs it. Says whether there was one.
    fn drop_oldest(
        &mut self,
        now_us: u64,
        report: &mut RetentionReport,
    ) -> Result<bool, CommitError> {
        let watermark = self.tail.position.offset;
        let mut spans = self.shared.log.spans(watermark);
        if spans.len() < 2 {
            if spans.first().is_none_or(|active| active.offsets.is_empty()) {
                return Ok(false);
            }
            self.roll()?;
            spans = self.shared.log.spans(watermark);
        }
        let end = spans[0].offsets.end;
        if end > self.kept_from {
            return Ok(false);
        }
        let (start, cursors): (u64, Vec<(String, u64)>) = {
            let projection = self.shared.progress.projection();
            let configured = projection.cursors.configured();
            let cursors = configured.map(|(sink, cursor)| (sink.to_owned(), cursor.offset));
            (projection.start, cursors.collect())
        };
        let losses = if cursors.is_empty() {
            self.loss(None, start..end, LossReason::Quota, now_us).into_iter().collect()
        } else {
            let of = |(sink, cursor): (String, u64)| {
                self.losses(&sink, &self.owed(&sink, cursor..end), LossReason::Quota, now_us)
            };
            cursors.into_iter().flat_map(of).collect()
        };
        self.remove(&spans[..1], losses, report).map_err(|error| self.state_failed(error))?;
        Ok(true)
    }

    fn loss(
        &self,
        sink: Option<String>,
        offsets: Range<u64>,
        reason: LossReason,
        at_us: u64,
    ) -> Option<Loss> {
        if offsets.is_empty() {
            return None;
        }
        let size_bytes = self.shared.event_bytes_in(&offsets);
        Some(Loss::new(sink, offsets, size_bytes, reason, at_us))
    }

    fn losses(&self, sink: &str, owed: &Ranges, reason: LossReason, at_us: u64) -> Vec<Loss> {
        let of =
            |range: &Range<u64>| self.loss(Some(sink.to_owned()), range.clone(), reason, at_us);
        owed.iter().filter_map(of).collect()
    }

    /// What of a range from its cursor on a sink still is to have: not what it got ahead of its turn.
    fn owed(&self, sink: &str, offsets: Range<u64>) -> Ranges {
        let owed = Ranges::from(offsets);
        match self.shared.passed(sink) {
            Ok(passed) => owed.without(&passed.done(Lanes::ALL)),
            // Then more is called lost than is.
            Err(_) => owed,
        }
    }

    /// Removes the first files, after the ledger and the checkpoint say so.
    fn remove(
        &mut self,
        spans: &[Span],
        losses: Vec<Loss>,
        report: &mut RetentionReport,
    ) -> Result<(), StateError> {
        let Some(last) = spans.last() else {
            return Ok(());
        };
        self.save(last.offsets.end, &losses)?;
        self.shared.log.remove_first(spans.len());
        report.files += spans.len() as u32;
        report.size_bytes += spans.iter().map(|span| span.size_bytes).sum::<u64>();
        report.losses.extend(losses);
        Ok(())
    }

    fn checkpoint_if_due(&mut self) {
        let change_bytes = self.shared.progress.projection().change_bytes;
        if self.unsaved_bytes < CHECKPOINT_LOG_BYTES && change_bytes < CHECKPOINT_CHANGE_BYTES {
            return;
        }
        if let Err(error) = self.checkpoint(&[]) {
            tracing::warn!(%error, "cannot write the checkpoint; the next commit tries again");
        }
    }

    /// Writes the state as of the last commit, which is durable.
    fn checkpoint(&mut self, losses: &[Loss]) -> Result<(), StateError> {
        let start = self.shared.progress.projection().start;
        self.save(start, losses)
    }

    /// Writes a checkpoint of a log that starts at `start`, with what its sinks lose by that.
    /// Nothing has changed if it fails.
    fn save(&mut self, start: u64, losses: &[Loss]) -> Result<(), StateError> {
        let progress = &self.shared.progress;
        let (tail, mut cursors, changes) = progress.save();
        let pass = |cursors: &mut Cursors| {
            for loss in losses {
                if let Some(sink) = &loss.sink {
                    cursors.advance(sink, loss.offsets.end);
                }
            }
            cursors.raise(start);
        };
        pass(&mut cursors);
        let covered = tail.position.offset;
        let head = Head { epoch: self.shared.epoch, tail };
        let checkpoint = Checkpoint { format: FORMAT, head, start, cursors: cursors.all().clone() };
        self.shared.state.checkpoint(&checkpoint, &changes, losses)?;
        self.shared.covered.store(covered, Ordering::Release);
        progress.saved(start, pass);
        self.unsaved_bytes = 0;
        Ok(())
    }

    /// Writes the checkpoint, closes the files cleanly and releases the lock.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn close(mut self) -> Result<(), StateError> {
        let settled = self.shared.log.settle().map_err(|error| StateError {
            disk_full: error.is_full(),
            reason: error.error.to_string(),
        });
        let saved = settled.and(self.checkpoint(&[]));
        self.shared.log.close();
        self.shared.state.close();
        *self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
        saved
    }
}

#[cfg(test)]
mod tests;
