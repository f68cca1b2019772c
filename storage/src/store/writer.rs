//! The one writer: numbers events, commits them, rolls files and writes checkpoints.
//!
//! Invariant: what comes after a failed commit takes its numbers, in a new file.
//! Deliberately absent: what is durable (see `progress`); what has to go to make room (see `room`).

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::progress::Ahead;
use super::{Committed, Mark, Shared};
use crate::ballast::Ballast;
use crate::batch::Encoder;
use crate::clock::Clock;
use crate::cursor::Cursors;
use crate::head::{FORMAT, Head, Tail};
use crate::log::LogError;
use crate::state::{Checkpoint, State};
use crate::{CommitError, Control, Event, Loss, StateError};

/// A checkpoint is written after this many bytes of log, which bounds what the next open replays,
/// or this many bytes of changes, which bounds what they take in memory.
const CHECKPOINT_LOG_BYTES: u64 = 16 << 20;
const CHECKPOINT_CHANGE_BYTES: usize = 4 << 20;
/// While checkpoints fail, commits with control records are refused from this many bytes on.
const CHANGE_BYTES_MAX: usize = 8 * CHECKPOINT_CHANGE_BYTES;

/// The one writer. Belongs to the committer thread.
pub struct Writer {
    pub(super) ballast: Ballast,
    pub(super) shared: Arc<Shared>,
    encoder: Encoder,
    /// What gives the times of the events.
    pub(super) clock: Option<Clock>,
    /// See [`Writer::keep_from`].
    pub(super) kept_from: u64,
    pub(super) file_bytes_max: u64,
    /// Where the next batch goes; what came before is committed.
    pub(super) tail: Tail,
    commit: u64,
    /// What made the commits void that ran ahead, until the caller knows.
    pub(super) void: Option<CommitError>,
    /// Bytes appended since the checkpoint.
    unsaved_bytes: u64,
}

impl Writer {
    /// Goes on behind `tail`.
    pub(super) fn new(shared: Arc<Shared>, ballast: Ballast, tail: Tail) -> Self {
        let options = &shared.options;
        Self {
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
            shared,
        }
    }

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
    /// one perhaps later (see [`commits_ahead_max`](super::StoreOptions::commits_ahead_max)), but at the
    /// latest with the sync that follows the one under way.
    ///
    /// # Errors
    /// See [`CommitError`]. After one, nothing of this commit may be acked, and nothing of it was
    /// or will be readable: the next commit takes its numbers, in a new file. After
    /// [`CommitError::Io`] that is true also of all commits that no mark has covered.
    ///
    /// # Panics
    /// If an event's partition is not below the store's number of
    /// [`partitions`](super::StoreOptions::partitions), or a cursor passes the end of the log.
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
    pub(super) fn failed(&mut self, error: LogError) -> CommitError {
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
            self.make_room(now_us)?;
        }
        if events.is_empty() && control.is_empty() {
            return Ok(0);
        }
        self.append(events, control)
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
    pub(super) fn roll(&mut self) -> Result<(), CommitError> {
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

    pub(super) fn state_failed(&self, error: StateError) -> CommitError {
        let path = State::path(&self.shared.disk);
        if error.disk_full {
            CommitError::DiskFull { path }
        } else {
            CommitError::Io { path, reason: error.reason }
        }
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
    pub(super) fn checkpoint(&mut self, losses: &[Loss]) -> Result<(), StateError> {
        let start = self.shared.progress.projection().start;
        self.save(start, losses)
    }

    /// Writes a checkpoint of a log that starts at `start`, with what its sinks lose by that.
    /// Nothing has changed if it fails.
    pub(super) fn save(&mut self, start: u64, losses: &[Loss]) -> Result<(), StateError> {
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

impl From<LogError> for CommitError {
    fn from(error: LogError) -> Self {
        if error.is_full() {
            Self::DiskFull { path: error.path }
        } else {
            Self::Io { path: error.path, reason: error.error.to_string() }
        }
    }
}
