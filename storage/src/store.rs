//! The store as its users see it: [`Store`] to read and share, [`Writer`] to append.
//!
//! Committed and durable are two words: [`Writer::commit`] numbers and commits, and the
//! [`Mark`] given to the durability callback says what is on disk. Acks, readers and cursors follow
//! the mark only.

pub mod balance;
pub mod compact;
pub mod inspect;
mod repair;
pub mod seek;
pub mod verify;

use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use crate::ballast::Ballast;
use crate::batch::{Batch, BatchHead, Encoder};
use crate::cursor::Cursors;
use crate::disk::{FileDisk, SharedDisk, is_full};
use crate::head::{BadHead, FORMAT, Head, Tail};
use crate::log::{self, Log, LogError, LogOpenError, Span};
use crate::retention::{self, Rules};
use crate::state::{Changes, Checkpoint, State, StateOpenError};
use crate::{
    CommitError, Control, DeadLetter, Event, Loss, LossReason, OpenError, ReadError, StateError,
    StoredEvent,
};

/// A checkpoint is written after this many bytes of log, which bounds what the next open replays,
/// or this many bytes of changes, which bounds what they take in memory.
const CHECKPOINT_LOG_BYTES: u64 = 16 << 20;
const CHECKPOINT_CHANGE_BYTES: usize = 4 << 20;
/// While checkpoints fail, commits with control records are refused from this many bytes on.
const CHANGE_BYTES_MAX: usize = 8 * CHECKPOINT_CHANGE_BYTES;

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
    /// What happens at the quota.
    pub at_quota: AtQuota,
    /// Keep at least this many bytes of delivered data, quota allowing. 0: trim as soon as possible.
    pub retain_bytes: u64,
    /// Keep delivered data at least this long in microseconds, quota allowing.
    pub retain_age_us: u64,
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
    /// Dead letters per sink.
    pub dead_letters: Vec<(String, u64)>,
    /// Rows in the loss ledger.
    pub losses: u64,
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
    durable: Mutex<Durable>,
    projection: RwLock<Projection>,
    /// First offsets of the corrupt ranges that are in the loss ledger.
    reported: Mutex<HashSet<u64>>,
    /// The last time that anyone told.
    now_us: AtomicU64,
    /// Held as long as the store is open.
    lock: Mutex<Option<File>>,
}

#[derive(Clone, Default)]
struct Durable {
    mark: Mark,
    event_bytes: u64,
    next_seq: Vec<u64>,
}

/// State as of the last durable commit: the checkpoint, and what came after it.
#[derive(Default)]
struct Projection {
    /// First stored offset.
    start: u64,
    cursors: Cursors,
    /// What changed since the checkpoint.
    changes: Changes,
    change_bytes: usize,
}

impl Projection {
    fn apply(&mut self, control: Control) {
        let (namespace, key, value) = match control {
            Control::Cursor { sink, offset } => return self.cursors.advance(&sink, offset),
            Control::Put { namespace, key, value } => (namespace, key, Some(value)),
            Control::Delete { namespace, key } => (namespace, key, None),
        };
        self.change_bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
        self.changes.insert((namespace, key), value);
    }
}

impl Shared {
    fn durable(&self) -> MutexGuard<'_, Durable> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn projection(&self) -> RwLockReadGuard<'_, Projection> {
        self.projection.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn projection_mut(&self) -> RwLockWriteGuard<'_, Projection> {
        self.projection.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Event bytes appended before `offset`, exact where a batch starts, else in proportion.
    fn event_bytes_before(&self, offset: u64, durable: &Durable) -> Result<u64, LogError> {
        let Some(batch) = self.log.batch_at(offset, durable.mark.watermark)? else {
            return Ok(durable.event_bytes);
        };
        let Ok(head) = BatchHead::decode(&batch) else {
            return Ok(durable.event_bytes);
        };
        let into = u128::from(offset.saturating_sub(head.position().offset));
        let part = into * u128::from(head.event_bytes()) / u128::from(head.count().max(1));
        Ok(head.event_bytes_before() + part as u64)
    }

    /// Event bytes in a range of offsets, 0 where they cannot be told.
    fn event_bytes_in(&self, offsets: &Range<u64>) -> u64 {
        let durable = self.durable().clone();
        let before = |offset| self.event_bytes_before(offset, &durable);
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
        let lock = File::create(options.dir.join("lock")).map_err(folder)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse { path: options.dir }),
            Err(TryLockError::Error(source)) => return Err(folder(source)),
        }
        Self::open_on(Arc::new(disk), Some(lock), options, now_us)
    }

    /// As [`Store::open`], on any disk.
    pub(crate) fn open_on(
        disk: SharedDisk,
        lock: Option<File>,
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
        let mut projection =
            Projection { cursors: Cursors::new(checkpoint.cursors), ..Projection::default() };
        let log = Log::open(
            disk.clone(),
            options.cache_bytes,
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
        let missed = projection.cursors.configure(sinks, projection.start);
        // A sink is known from the day it was configured, also if it never acknowledges anything.
        let configured = *projection.cursors.all() != cursors;
        let losses: Vec<Loss> = missed
            .into_iter()
            .map(|(sink, offsets)| Loss {
                sink: Some(sink),
                offsets,
                size_bytes: 0,
                reason: LossReason::SinkAbsent,
                at_us: now_us,
            })
            .collect();

        let durable = Durable {
            mark: Mark { commit: 0, watermark: tail.position.offset },
            event_bytes: tail.event_bytes,
            next_seq: tail.next_seq.clone(),
        };
        let shared = Arc::new(Shared {
            epoch,
            log,
            state,
            durable: Mutex::new(durable),
            projection: RwLock::new(projection),
            reported: Mutex::new(HashSet::new()),
            now_us: now_us.into(),
            lock: Mutex::new(lock),
            disk,
            options,
        });
        let options = &shared.options;
        let mut writer = Writer {
            ballast,
            encoder: Encoder::new(options.partitions),
            // At least four files within the quota, so that trimming one makes room.
            file_bytes_max: options.file_bytes_max.min(options.quota_bytes / 4).max(1),
            on_durable: None,
            tail,
            commit: 0,
            unsaved_bytes: 0,
            shared: shared.clone(),
        };
        // After a crash, what was replayed is saved at once: it may come from a page cache that
        // outlived the process and not from the disk.
        if configured || !writer.shared.log.has_active() {
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
        self.shared.durable().mark
    }

    /// Durable cursor of a configured sink: the next offset that it needs.
    pub fn cursor(&self, sink: &str) -> Option<u64> {
        self.shared.projection().cursors.get(sink)
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
        let shared = &*self.shared;
        let watermark = self.mark().watermark;
        let start = shared.projection().start.max(from);
        let found = shared.log.read(start, watermark, events_max, size_bytes_max)?;
        let mut read = Read { events: found.events, next: found.next.max(from), missing: vec![] };
        // What was trimmed while this was reading is not damage.
        let start = shared.projection().start;
        if from < start.min(read.next) {
            read.missing.push(from..start.min(read.next));
        }
        for corrupt in found.corrupt {
            let corrupt = corrupt.start.max(start)..corrupt.end;
            if !corrupt.is_empty() {
                self.report(&corrupt)?;
                read.missing.push(corrupt);
            }
        }
        Ok(read)
    }

    /// Writes the loss of a range that cannot be read, once.
    fn report(&self, offsets: &Range<u64>) -> Result<(), ReadError> {
        let shared = &*self.shared;
        let mut reported = shared.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.contains(&offsets.start) {
            return Ok(());
        }
        tracing::error!(?offsets, "events cannot be read: their batch is damaged");
        let loss = |sink: Option<&str>, from: u64| Loss {
            sink: sink.map(str::to_owned),
            offsets: from.max(offsets.start)..offsets.end,
            size_bytes: 0,
            reason: LossReason::Corrupt,
            at_us: shared.now_us.load(Ordering::Relaxed),
        };
        let losses: Vec<Loss> = {
            let projection = shared.projection();
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
        reported.insert(offsets.start);
        Ok(())
    }

    /// Event bytes between `from` and the watermark, from file and batch heads, exact to one batch.
    pub fn lag_bytes(&self, from: u64) -> u64 {
        let durable = self.shared.durable().clone();
        let from = from.max(self.shared.projection().start);
        match self.shared.event_bytes_before(from, &durable) {
            Ok(before) => durable.event_bytes.saturating_sub(before),
            Err(error) => {
                tracing::warn!(path = %error.path.display(), error = %error.error,
                    "cannot tell a lag in bytes");
                0
            }
        }
    }

    /// Receive time of the first event at or after `from`, if there is one.
    pub fn received_us(&self, from: u64) -> Option<u64> {
        let watermark = self.mark().watermark;
        let from = from.max(self.shared.projection().start);
        let batch = self.shared.log.batch_at(from, watermark).ok()??;
        let first = Batch::decode(batch).ok()?.events(from).next()?.ok()?;
        Some(first.event.received_us)
    }

    /// Writes dead letters, durable on return. Call it before the cursor passes them.
    ///
    /// # Errors
    /// [`StateError`] if they could not be made durable.
    pub fn put_dead_letters(&self, letters: &[DeadLetter]) -> Result<(), StateError> {
        self.shared.state.put_dead_letters(letters)
    }

    /// Dead letters of a sink from an offset on.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn dead_letters(
        &self,
        sink: &str,
        from: u64,
        max: usize,
    ) -> Result<Vec<DeadLetter>, StateError> {
        self.shared.state.dead_letters(sink, from, max)
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
        // Held while the database is read, so that a checkpoint does not move a value between.
        let projection = self.shared.projection();
        match projection.changes.get(&(namespace, Bytes::copy_from_slice(key))) {
            Some(value) => Ok(value.clone()),
            None => self.shared.state.get(namespace, key),
        }
    }

    /// A look at the store. What cannot be read counts as 0.
    pub fn stats(&self) -> StoreStats {
        let shared = &*self.shared;
        let durable = shared.durable().clone();
        let projection = shared.projection();
        let sinks = projection.cursors.all();
        StoreStats {
            files: shared.log.spans(durable.mark.watermark).len() as u32,
            log_bytes: shared.log.used_bytes(),
            state_bytes: shared.state.used_bytes(),
            quota_bytes: shared.options.quota_bytes,
            first_offset: projection.start,
            watermark: durable.mark.watermark,
            next_seq: durable.next_seq,
            event_bytes: durable.event_bytes,
            cursors: sinks.iter().map(|(sink, c)| (sink.clone(), c.offset)).collect(),
            origins: sinks.iter().map(|(sink, c)| (sink.clone(), c.origin)).collect(),
            dead_letters: shared.state.count_dead_letters().unwrap_or_default(),
            losses: shared.state.count_losses().unwrap_or_default(),
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
        StateOpenError::Head(BadHead::Corrupt) => OpenError::Database {
            path: State::path(disk),
            reason: "its head row is damaged".into(),
        },
        StateOpenError::Database(error) => database_error(State::path(disk), &error),
    })
}

fn newer_format(options: &StoreOptions, found: u32) -> OpenError {
    OpenError::NewerFormat { path: options.dir.clone(), found, supported: FORMAT }
}

fn database_error(path: PathBuf, error: &redb::Error) -> OpenError {
    OpenError::Database { path, reason: error.to_string() }
}

/// A random number from the keys that the standard library takes from the system.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// The one writer. Belongs to the committer thread.
pub struct Writer {
    ballast: Ballast,
    shared: Arc<Shared>,
    encoder: Encoder,
    file_bytes_max: u64,
    on_durable: Option<Box<dyn Fn(Mark) + Send + Sync>>,
    /// Where the next batch goes; what came before is durable.
    tail: Tail,
    commit: u64,
    /// Bytes appended since the checkpoint.
    unsaved_bytes: u64,
}

impl Writer {
    /// Called with every new [`Mark`], from whichever thread made it durable. Set it before the
    /// first commit.
    pub fn on_durable(&mut self, callback: impl Fn(Mark) + Send + Sync + 'static) {
        self.on_durable = Some(Box::new(callback));
    }

    /// Numbers the events in slice order and commits them with the control records in one
    /// transaction. With the plain backend it returns once they are durable, after the callback.
    ///
    /// # Errors
    /// See [`CommitError`]. After one, nothing of this commit may be acked, and nothing of it was
    /// or will be readable: the next commit takes its numbers, in a new file.
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
        let first = self.tail.position.offset;
        let end = first + events.len() as u64;
        let partitions = self.shared.options.partitions;
        assert!(events.iter().all(|e| e.partition < partitions), "an unknown partition");
        let past = |c: &Control| matches!(c, Control::Cursor { offset, .. } if *offset > end);
        assert!(!control.iter().any(past), "a cursor past the end of the log");
        self.write(events, control, now_us).inspect_err(|error| {
            if matches!(error, CommitError::DiskFull { .. }) {
                self.ballast.release();
            }
        })?;
        self.commit += 1;
        let offsets = first..self.tail.position.offset;
        let mark = Mark { commit: self.commit, watermark: offsets.end };
        if !control.is_empty() {
            let mut projection = self.shared.projection_mut();
            control.iter().cloned().for_each(|control| projection.apply(control));
        }
        {
            let mut durable = self.shared.durable();
            durable.mark = mark;
            durable.event_bytes = self.tail.event_bytes;
            durable.next_seq.copy_from_slice(&self.tail.next_seq);
        }
        if let Some(callback) = &self.on_durable {
            callback(mark);
        }
        self.checkpoint_if_due();
        Ok(Committed { commit: mark.commit, offsets })
    }

    fn write(
        &mut self,
        events: &[Event],
        control: &[Control],
        now_us: u64,
    ) -> Result<(), CommitError> {
        if !events.is_empty() {
            self.hold_ballast(now_us)?;
            self.make_room(now_us)?;
        }
        if events.is_empty() && control.is_empty() {
            return Ok(());
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

    fn append(&mut self, events: &[Event], control: &[Control]) -> Result<(), CommitError> {
        let change_bytes = self.shared.projection().change_bytes;
        if !control.is_empty() && change_bytes > CHANGE_BYTES_MAX {
            self.checkpoint(&[]).map_err(|error| self.state_failed(error))?;
        }
        let log = &self.shared.log;
        let full = log.has_active() && log.active_bytes() >= self.file_bytes_max;
        if !log.has_active() {
            self.roll()?;
        } else if full && let Err(error) = self.roll() {
            // The full file still takes commits; the next one tries again.
            tracing::warn!(%error, "cannot start a new log file");
        }
        let log = &self.shared.log;
        match log.append(&mut self.encoder, events, control, &mut self.tail) {
            Ok(size_bytes) => {
                self.unsaved_bytes += size_bytes;
                Ok(())
            }
            Err(error) => {
                log.fail();
                Err(error.into())
            }
        }
    }

    /// Goes on in a new file.
    fn roll(&mut self) -> Result<(), CommitError> {
        if self.shared.log.last_first_offset() == Some(self.tail.position.offset) {
            // The new file replaces one without events: its control records go to the checkpoint.
            self.checkpoint(&[]).map_err(|error| self.state_failed(error))?;
        }
        let head = Head { epoch: self.shared.epoch, tail: self.tail.clone() };
        Ok(self.shared.log.roll(&head)?)
    }

    fn state_failed(&self, error: StateError) -> CommitError {
        let path = State::path(&self.shared.disk);
        if error.disk_full {
            CommitError::DiskFull { path }
        } else {
            CommitError::Io { path, reason: error.reason }
        }
    }

    /// Sees to it that the log is below its quota.
    fn make_room(&mut self, now_us: u64) -> Result<(), CommitError> {
        let quota_bytes = self.shared.options.quota_bytes;
        if self.shared.log.used_bytes() < quota_bytes {
            return Ok(());
        }
        let mut report = RetentionReport::default();
        self.trim(now_us, true, &mut report)?;
        let drop_oldest = self.shared.options.at_quota == AtQuota::DropOldest;
        while drop_oldest
            && self.shared.log.used_bytes() >= quota_bytes
            && self.drop_oldest(now_us, &mut report)?
        {}
        match self.shared.log.used_bytes() {
            used_bytes if used_bytes >= quota_bytes => {
                Err(CommitError::Quota { used_bytes, quota_bytes })
            }
            _ => Ok(()),
        }
    }

    /// Applies retention: trims behind the slowest cursor, and by policy.
    ///
    /// # Errors
    /// [`StateError`] if the loss ledger could not be written; then nothing was removed.
    pub fn retain(&mut self, now_us: u64) -> Result<RetentionReport, StateError> {
        self.shared.now_us.store(now_us, Ordering::Relaxed);
        let mut report = RetentionReport::default();
        match self.trim(now_us, false, &mut report) {
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

    /// Removes what no sink needs and no wish keeps; at the quota wishes do not count.
    fn trim(
        &mut self,
        now_us: u64,
        at_quota: bool,
        report: &mut RetentionReport,
    ) -> Result<(), CommitError> {
        let options = &self.shared.options;
        let floor = self.shared.projection().cursors.floor();
        let mut rules = Rules {
            sinks: floor.is_some(),
            retain_bytes: options.retain_bytes,
            retain_age_us: options.retain_age_us,
        };
        if at_quota && rules.sinks {
            (rules.retain_bytes, rules.retain_age_us) = (0, 0);
        }
        let watermark = self.tail.position.offset;
        let floor = floor.unwrap_or(watermark);
        let mut spans = self.shared.log.spans(watermark);
        let age_us = |span: &Span| {
            let last_us = if span.offsets.end == watermark {
                Some(self.tail.received_us)
            } else {
                self.shared.log.received_before(span.offsets.end)
            };
            now_us.saturating_sub(last_us.unwrap_or(now_us))
        };
        let mut count = retention::expendable(&spans, floor, rules, age_us);
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
        let needed: Vec<(Option<String>, Range<u64>)> = {
            let projection = self.shared.projection();
            let start = projection.start;
            match projection.cursors.floor() {
                None => vec![(None, start..end)],
                Some(_) => projection
                    .cursors
                    .configured()
                    .map(|(sink, cursor)| (Some(sink.to_owned()), cursor.offset..end))
                    .collect(),
            }
        };
        let losses = needed
            .into_iter()
            .filter_map(|(sink, offsets)| self.loss(sink, offsets, LossReason::Quota, now_us))
            .collect();
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
        Some(Loss { sink, offsets, size_bytes, reason, at_us })
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
        let change_bytes = self.shared.projection().change_bytes;
        if self.unsaved_bytes < CHECKPOINT_LOG_BYTES && change_bytes < CHECKPOINT_CHANGE_BYTES {
            return;
        }
        if let Err(error) = self.checkpoint(&[]) {
            tracing::warn!(%error, "cannot write the checkpoint; the next commit tries again");
        }
    }

    /// Writes the state as of the last commit, which is durable.
    fn checkpoint(&mut self, losses: &[Loss]) -> Result<(), StateError> {
        let start = self.shared.projection().start;
        self.save(start, losses)
    }

    /// Writes a checkpoint of a log that starts at `start`, with what its sinks lose by that.
    /// Nothing has changed if it fails.
    fn save(&mut self, start: u64, losses: &[Loss]) -> Result<(), StateError> {
        let (mut cursors, changes) = {
            let projection = self.shared.projection();
            (projection.cursors.clone(), projection.changes.clone())
        };
        for loss in losses {
            if let Some(sink) = &loss.sink {
                cursors.advance(sink, loss.offsets.end);
            }
        }
        let head = Head { epoch: self.shared.epoch, tail: self.tail.clone() };
        let checkpoint = Checkpoint { head, start, cursors: cursors.all().clone() };
        self.shared.state.checkpoint(&checkpoint, &changes, losses)?;
        let mut projection = self.shared.projection_mut();
        *projection = Projection { start, cursors, ..Projection::default() };
        self.unsaved_bytes = 0;
        Ok(())
    }

    /// Writes the checkpoint, closes the files cleanly and releases the lock.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn close(mut self) -> Result<(), StateError> {
        let saved = self.checkpoint(&[]);
        self.shared.log.close();
        self.shared.state.close();
        *self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
        saved
    }
}

#[cfg(test)]
mod tests;
