//! The state database, `state.redb`: what is not in the log, or no longer.
//!
//! Owns: the checkpoint (head row, cursors, key-value projection as of one position of the log),
//! where the log starts, the dead letters and the loss ledger.
//!
//! Invariants:
//! - every change is one synced transaction;
//! - a file that was not closed cleanly, or to which a write failed, is never written again: its
//!   content is copied to a new file that takes its name. A failed sync leaves pages that read
//!   well and are not on the disk; the copy writes every one of them anew;
//! - the file has its name only once it is whole;
//! - it is not believed before every page of it has been checked: a cursor has no checksum of its own,
//!   and one that moved by itself would lose events without a word.
//!
//! Deliberately absent: what changed since the checkpoint (see `store`), and what the keys mean.

mod inspect;
mod letters;
mod losses;
mod rebuild;

pub(crate) use inspect::Letters;
use letters::Counts;
pub(crate) use rebuild::rebuild;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use redb::{ReadTransaction, ReadableTable, TableDefinition, TableError, WriteTransaction};

use crate::cursor::Cursor;
use crate::disk::{self, OpenFile, SharedDisk};
use crate::error::StateError;
use crate::head::{self, BadHead, Head, Tail};
use crate::loss_ledger::{Loss, LossKey};

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// Sink to origin and cursor.
const CURSORS: TableDefinition<'_, &str, (u64, u64)> = TableDefinition::new("cursors");
const PROJECTION: TableDefinition<'_, (u16, &[u8]), &[u8]> = TableDefinition::new("projection");
const DEAD_LETTERS: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("dead_letters");
/// Dead letters that are to be delivered again, and since when (microseconds since the Unix epoch):
/// beside the letters, so that marking one does not write it anew.
const REQUEUED: TableDefinition<'_, (&str, u64), u64> = TableDefinition::new("requeued");
const LOSSES: TableDefinition<'_, LossKey<'static>, &[u8]> = TableDefinition::new("losses");

/// Rows of `META`.
const META_HEAD: &str = "head";
const META_START: &str = "start";

pub(crate) const NAME: &str = "state.redb";
/// What the file is called until it is whole.
const UNFINISHED: &str = "state.new";

/// Its tables are small and most of its reads are at start.
const CACHE_BYTES: usize = 1 << 20;

/// Changes of the key-value projection; nothing for a deleted key.
pub(crate) type Changes = HashMap<(u16, Bytes), Option<Bytes>>;

/// What a checkpoint says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    /// Format of the version that wrote it.
    pub(crate) format: u32,
    pub(crate) head: Head,
    /// Offsets below were trimmed.
    pub(crate) start: u64,
    pub(crate) cursors: BTreeMap<String, Cursor>,
}

/// Why the state database could not be opened.
#[derive(Debug)]
pub(crate) enum StateOpenError {
    Head(BadHead),
    /// It cannot be read.
    Database(redb::Error),
    /// It reads well, and the disk does not take what is written to open it.
    Disk(io::Error),
}

impl StateOpenError {
    /// Of what comes after every page has been read.
    fn of_writing(error: redb::Error) -> Self {
        match error {
            redb::Error::Io(error) => Self::Disk(error),
            error => Self::Database(error),
        }
    }
}

impl From<redb::Error> for StateOpenError {
    fn from(error: redb::Error) -> Self {
        Self::Database(error)
    }
}

pub(crate) struct State {
    disk: SharedDisk,
    open: Mutex<Open>,
    /// Bytes that the file takes: whoever commits asks for it each time.
    size_bytes: AtomicU64,
    /// What the dead letters of each sink come to, once it was asked for.
    dead_letters: Mutex<Option<Counts>>,
}

enum Open {
    Yes(Arc<OpenFile>),
    /// A write failed: the next write copies what the file holds to a new one. Until then it is
    /// read over an overlay.
    Suspect(Option<Arc<OpenFile>>),
    Closed,
}

impl State {
    pub(crate) fn path(disk: &SharedDisk) -> PathBuf {
        disk.path(NAME)
    }

    /// Opens the state database, or creates it with a new epoch.
    pub(crate) fn open(
        disk: SharedDisk,
        partitions: u16,
        epoch: impl FnOnce() -> u64,
    ) -> Result<(Self, Checkpoint), StateOpenError> {
        check(&disk)?;
        disk.remove(UNFINISHED).map_err(StateOpenError::Disk)?;
        let opened = match OpenFile::clean(&*disk, NAME, CACHE_BYTES) {
            Ok(Some(database)) => Ok(database),
            Ok(None) => rewrite(&disk),
            Err(redb::Error::Io(e)) if e.kind() == io::ErrorKind::NotFound => {
                let head = Head { epoch: epoch(), tail: Tail::new(partitions) };
                create(&disk, |transaction| {
                    transaction.open_table(META)?.insert(META_HEAD, head.encode().as_slice())?;
                    Ok(())
                })
            }
            Err(error) => Err(error),
        };
        let database = opened.map_err(StateOpenError::of_writing)?;
        let checkpoint = read_checkpoint(&database)?;
        Ok((
            Self {
                size_bytes: disk.used_bytes(NAME).into(),
                disk,
                open: Mutex::new(Open::Yes(Arc::new(database))),
                dead_letters: Mutex::new(None),
            },
            checkpoint,
        ))
    }

    /// Writes a checkpoint with the changes of the projection since the last one, and the losses
    /// that it makes, in one transaction.
    pub(crate) fn checkpoint(
        &self,
        checkpoint: &Checkpoint,
        changes: &Changes,
        losses: &[Loss],
    ) -> Result<(), StateError> {
        self.write(|transaction| {
            let mut meta = transaction.open_table(META)?;
            meta.insert(META_HEAD, checkpoint.head.encode().as_slice())?;
            meta.insert(META_START, checkpoint.start.to_le_bytes().as_slice())?;
            // A table is open once at a time, and the loss ledger may want to look into this one.
            drop(meta);
            let mut cursors = transaction.open_table(CURSORS)?;
            for (sink, cursor) in &checkpoint.cursors {
                cursors.insert(sink.as_str(), (cursor.origin, cursor.offset))?;
            }
            if !changes.is_empty() {
                let mut projection = transaction.open_table(PROJECTION)?;
                for ((namespace, key), value) in changes {
                    match value {
                        Some(value) => {
                            projection.insert((*namespace, &key[..]), &value[..])?;
                        }
                        None => {
                            projection.remove((*namespace, &key[..]))?;
                        }
                    }
                }
            }
            losses::put(transaction, losses)
        })
    }

    /// A value of the projection as of the checkpoint.
    pub(crate) fn get(&self, namespace: u16, key: &[u8]) -> Result<Option<Bytes>, StateError> {
        self.read(|transaction| {
            let Some(table) = table(transaction.open_table(PROJECTION))? else {
                return Ok(None);
            };
            let value = table.get((namespace, key))?;
            Ok(value.map(|value| Bytes::copy_from_slice(value.value())))
        })
    }

    /// All values of a namespace as of the checkpoint, by key.
    pub(crate) fn scan(&self, namespace: u16) -> Result<BTreeMap<Bytes, Bytes>, StateError> {
        let mut rows = BTreeMap::new();
        self.read(|transaction| {
            let Some(table) = table(transaction.open_table(PROJECTION))? else {
                return Ok(());
            };
            for row in table.range((namespace, &[][..])..)? {
                let (key, value) = row?;
                let (of, key) = key.value();
                if of != namespace {
                    break;
                }
                rows.insert(Bytes::copy_from_slice(key), Bytes::copy_from_slice(value.value()));
            }
            Ok(())
        })?;
        Ok(rows)
    }

    /// Bytes that the file takes.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// Closes the file cleanly. Later calls fail.
    pub(crate) fn close(&self) {
        *self.lock() = Open::Closed;
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StateError> {
        let file = {
            let mut open = self.lock();
            match &*open {
                Open::Yes(file) => file.clone(),
                Open::Suspect(_) => {
                    let file = rewrite(&self.disk).map_err(|e| state_error(&e))?;
                    let file = Arc::new(file);
                    *open = Open::Yes(file.clone());
                    file
                }
                Open::Closed => return Err(closed()),
            }
        };
        let written = file.write(change).map_err(|error| self.suspect(&file, &error));
        self.size_bytes.store(self.disk.used_bytes(NAME), Ordering::Relaxed);
        written
    }

    fn read<T>(
        &self,
        look: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StateError> {
        let file = {
            let mut open = self.lock();
            match &mut *open {
                Open::Yes(file) | Open::Suspect(Some(file)) => file.clone(),
                Open::Suspect(overlaid) => {
                    let file = OpenFile::overlaid(&*self.disk, NAME, CACHE_BYTES);
                    let file = Arc::new(file.map_err(|e| state_error(&e))?);
                    overlaid.insert(file).clone()
                }
                Open::Closed => return Err(closed()),
            }
        };
        file.read(look).map_err(|error| self.suspect(&file, &error))
    }

    /// Gives a file up on which something failed, unless another thread did already.
    fn suspect(&self, failed: &Arc<OpenFile>, error: &redb::Error) -> StateError {
        let mut open = self.lock();
        if let Open::Yes(file) | Open::Suspect(Some(file)) = &*open
            && Arc::ptr_eq(file, failed)
        {
            *open = Open::Suspect(None);
        }
        state_error(error)
    }
}

/// Refuses a damaged file, and that of a later version, before anything is written to it: opening it
/// to write marks it as in use.
fn check(disk: &SharedDisk) -> Result<(), StateOpenError> {
    let mut file = match OpenFile::overlaid(&**disk, NAME, CACHE_BYTES) {
        Err(redb::Error::Io(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    file.check()?;
    read_checkpoint(&file).map(drop)
}

fn closed() -> StateError {
    StateError { disk_full: false, reason: "the store is closed".into() }
}

fn state_error(error: &redb::Error) -> StateError {
    StateError {
        disk_full: matches!(error, redb::Error::Io(error) if disk::is_full(error)),
        reason: error.to_string(),
    }
}

/// A table that nothing was written to yet is not there.
fn table<T>(opened: Result<T, TableError>) -> Result<Option<T>, redb::Error> {
    match opened {
        Ok(table) => Ok(Some(table)),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read_checkpoint(database: &OpenFile) -> Result<Checkpoint, StateOpenError> {
    let (format, head, start, cursors) = database.read(|transaction| {
        let meta = transaction.open_table(META)?;
        let head = meta.get(META_HEAD)?;
        let format = head.as_ref().map_or(0, |row| head::format(row.value()));
        let head = head.map_or(Err(BadHead::Corrupt), |row| Head::decode(row.value()));
        let start = meta.get(META_START)?.and_then(|row| row.value().try_into().ok());
        let mut cursors = BTreeMap::new();
        if let Some(table) = table(transaction.open_table(CURSORS))? {
            for row in table.iter()? {
                let (sink, cursor) = row?;
                let (origin, offset) = cursor.value();
                cursors.insert(sink.value().to_owned(), Cursor { origin, offset });
            }
        }
        Ok((format, head, start, cursors))
    })?;
    Ok(Checkpoint {
        format,
        head: head.map_err(StateOpenError::Head)?,
        start: start.map_or(0, u64::from_le_bytes),
        cursors,
    })
}

/// Creates the file with a first transaction, in place of one that was there.
fn create(
    disk: &SharedDisk,
    fill: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
) -> Result<OpenFile, redb::Error> {
    let database = OpenFile::create(&**disk, UNFINISHED, CACHE_BYTES)?;
    database.write(fill)?;
    disk.rename(UNFINISHED, NAME).map_err(redb::Error::Io)?;
    Ok(database)
}

/// Copies what the file holds to a new one that takes its place.
fn rewrite(disk: &SharedDisk) -> Result<OpenFile, redb::Error> {
    let old = OpenFile::overlaid(&**disk, NAME, CACHE_BYTES)?;
    old.read(|old| {
        create(disk, |new| {
            copy(old, new, META)?;
            copy(old, new, CURSORS)?;
            copy(old, new, PROJECTION)?;
            copy(old, new, DEAD_LETTERS)?;
            copy(old, new, REQUEUED)?;
            copy(old, new, LOSSES)
        })
    })
}

fn copy<K: redb::Key + 'static, V: redb::Value + 'static>(
    old: &ReadTransaction,
    new: &WriteTransaction,
    definition: TableDefinition<'_, K, V>,
) -> Result<(), redb::Error> {
    let Some(old) = table(old.open_table(definition))? else {
        return Ok(());
    };
    let mut new = new.open_table(definition)?;
    for row in old.iter()? {
        let (key, value) = row?;
        new.insert(key.value(), value.value())?;
    }
    Ok(())
}
