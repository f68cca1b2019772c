//! Opens a store: its lock, its state, its log, and what the log says beyond the state's checkpoint.
//!
//! Invariant: nothing is written to a store of a newer format, of another number of partitions, or that
//! another process has.

use std::fs::{File, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::progress::Progress;
use super::{JournalMode, Shared, Store, StoreOptions, Writer};
use crate::ballast::Ballast;
use crate::clock;
use crate::cursor::Cursors;
use crate::disk::{FileDisk, SharedDisk, is_full};
use crate::head::{BadHead, FORMAT, Head};
use crate::journal;
use crate::log::{self, Journaled, Journaling, Log, LogError, LogOpenError};
use crate::state::{Checkpoint, State, StateOpenError};
use crate::{Loss, LossReason, OpenError};

/// What a store is opened for.
#[derive(Clone, Copy)]
pub(super) enum Opening {
    ToWrite(journal::Pump),
    /// Nothing is written: the disk is a frozen one.
    ToLook,
}

const TO_WRITE: Opening = Opening::ToWrite(journal::Pump::Threads);

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

    pub(super) fn open_with(
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
        let mut writer = Writer::new(shared.clone(), ballast, tail);
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
}

/// The lock of a data folder, held as long as the file is open.
pub(super) fn take_lock(dir: &Path) -> Result<File, OpenError> {
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
        Err(StateOpenError::Disk(error)) if is_full(&error) => {
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
        StateOpenError::Disk(error) => database_error(State::path(disk), &redb::Error::Io(error)),
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

pub(super) fn database_error(path: PathBuf, error: &redb::Error) -> OpenError {
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
