//! A look at a store that changes nothing in it.
//!
//! Owns: opening a store only to look ([`Store::open_to_look`]), what each file holds, and a read
//! that leaves the loss ledger alone.
//! Deliberately absent: checking what the batches hold (see `verify`).

use std::fs::{File, TryLockError};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::open::Opening;
use super::{Mark, Read, Store, StoreOptions};
use crate::disk::{FileDisk, SharedDisk};
use crate::frozen::Frozen;
use crate::head::Tail;
use crate::state;
use crate::{OpenError, ReadError};

/// What one log file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStats {
    /// The file.
    pub path: PathBuf,
    /// Offsets of its events, end-exclusive.
    pub offsets: Range<u64>,
    /// Bytes that it takes on the device.
    pub size_bytes: u64,
    /// Rows of its table of batches, also those that a failed commit left behind.
    pub batches: u64,
    /// Event bytes of its events; nothing where head rows do not tell.
    pub event_bytes: Option<u64>,
    /// What its head row says of the events before it; nothing if the row is damaged.
    pub before: Option<Before>,
}

/// What a log file takes over from those before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Before {
    /// First sequence number of the file, per partition.
    pub next_seq: Vec<u64>,
    /// Event bytes that were ever appended before it.
    pub event_bytes: u64,
    /// Receive time of the last event before it, microseconds since the Unix epoch; 0 if none.
    pub received_us: u64,
}

impl Store {
    /// Opens the store that is in `options.dir` to look at it: nothing in the folder is changed,
    /// and the file system may be read-only. Several may look at once, but not while one writes.
    /// A crash before is repaired in memory.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_to_look(options: StoreOptions, now_us: u64) -> Result<Store, OpenError> {
        let folder = |source| OpenError::Folder { path: options.dir.clone(), source };
        let disk = FileDisk::look_at(options.dir.clone());
        let lock = match File::open(options.dir.join("lock")) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A copy of the folder may have come without it.
                return Self::look_on(Arc::new(disk), None, options, now_us);
            }
            Err(error) => return Err(folder(error)),
        };
        match lock.try_lock_shared() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse { path: options.dir }),
            Err(TryLockError::Error(source)) => return Err(folder(source)),
        }
        Self::look_on(Arc::new(disk), Some(lock), options, now_us)
    }

    /// As [`Store::open_to_look`], on any disk.
    pub(crate) fn look_on(
        disk: SharedDisk,
        lock: Option<File>,
        options: StoreOptions,
        now_us: u64,
    ) -> Result<Store, OpenError> {
        match disk.open(state::NAME) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(OpenError::Missing { path: options.dir });
            }
            Err(source) => return Err(OpenError::Folder { path: options.dir, source }),
        }
        let disk = Arc::new(Frozen(disk));
        let (store, _nobody_writes) =
            Self::open_with(disk, lock, Opening::ToLook, options, now_us)?;
        Ok(store)
    }

    /// What each log file holds, oldest first. Reads a head row a file.
    ///
    /// # Errors
    /// [`ReadError`] if a file cannot be read for another reason than that it is damaged.
    pub fn files(&self) -> Result<Vec<FileStats>, ReadError> {
        let log = &self.shared.log;
        let (Mark { watermark, .. }, Tail { event_bytes: end_bytes, .. }) =
            self.shared.progress.reached();
        let mut files: Vec<FileStats> = Vec::new();
        for span in log.spans(watermark) {
            let first = span.offsets.start;
            let (batches, before) = match log.summary(first) {
                Ok(summary) => (summary.batches, summary.head.ok()),
                // One that was trimmed meanwhile, too.
                Err(error) if error.is_damage() => (0, None),
                Err(error) => return Err(error.into()),
            };
            let before = before.map(|head| Before {
                next_seq: head.tail.next_seq,
                event_bytes: head.tail.event_bytes,
                received_us: head.tail.received_us,
            });
            files.push(FileStats {
                path: log.path_of(first),
                offsets: span.offsets,
                size_bytes: span.size_bytes,
                batches,
                event_bytes: None,
                before,
            });
        }
        let mut end = Some(end_bytes);
        for file in files.iter_mut().rev() {
            let start = file.before.as_ref().map(|before| before.event_bytes);
            file.event_bytes = start.zip(end).map(|(start, end)| end.saturating_sub(start));
            end = start;
        }
        Ok(files)
    }

    /// As [`Store::read`], without a row in the loss ledger for what is damaged: who only looks
    /// changes nothing.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn look(
        &self,
        from: u64,
        events_max: usize,
        size_bytes_max: usize,
    ) -> Result<Read, ReadError> {
        self.find(from, events_max, size_bytes_max).map(|(read, _)| read)
    }
}
