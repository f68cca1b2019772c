//! The log: rolling redb files of batches, `log/<first offset, 20 digits>.redb`.
//!
//! Owns: the list of files, the one that is appended to, and a few handles to those that are read.
//! Each file has a table of batches keyed by [`Position`](crate::head::Position) and a head row.
//!
//! Invariants:
//! - a file holds the offsets from its name to the next file's name; what it may hold beyond, from
//!   a commit that failed, is void for ever;
//! - a file has its final name only once its head row is durable;
//! - only the process that created a file, or found it closed cleanly, appends to it, and no more
//!   after the first failed write: what a failed sync covered may be lost even if it reads back
//!   well, so the log goes on in a new file. Every other file is opened over an overlay and never
//!   written, but by the replay of a journal;
//! - a trimmed file is unlinked, or the next one is written over its blocks (see `spare`);
//! - a file joins the journal once it has its name, and the next one begins only when all that this
//!   one holds is durable and home;
//! - a batch is lost only where its own bytes are: of a file whose tree is damaged everything else is
//!   read all the same (see `salvage`). The active file is given up first, because what is searched
//!   must not change.
//!
//! Deliberately absent: what is durable (the caller passes the watermark), what may go (see
//! `retention`), and redb's caches beyond their sizes.

mod pack_anew;
mod reading;
mod recovery;
mod salvage;
mod sealed;
mod spare;
mod walk;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use redb::TableDefinition;

pub(crate) use self::pack_anew::Packing;
pub(crate) use self::recovery::{LogOpenError, first_head};
use self::sealed::Handle;
pub(crate) use self::spare::Reused;
use crate::batch::Encoder;
use crate::control::Control;
use crate::disk::{OpenFile, SharedDisk, Soundness, is_bad_sector, is_full};
use crate::event::Event;
use crate::head::{Head, Tail};
use crate::journal::{self, Journal, OnProgress, Rings};
use crate::store::random;

const BATCHES: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("batches");
const HEAD: TableDefinition<'_, (), &[u8]> = TableDefinition::new("head");

/// The folder of the log files, in the data folder.
pub(crate) const FOLDER: &str = "log";
const EXTENSION: &str = ".redb";
/// With what a file was packed anew; not in one that was not.
const PACKED: TableDefinition<'_, (), u8> = TableDefinition::new("packed");
/// What a file is called until its head row is durable.
const UNFINISHED: &str = "log/new";

/// The file system is asked for the size of the active file after so many appended bytes, or after an
/// eighth of it.
const ASK_BYTES_MAX: u64 = 256 << 10;

/// Something went wrong with a file.
#[derive(Debug)]
pub(crate) struct LogError {
    pub(crate) path: PathBuf,
    pub(crate) error: redb::Error,
}

impl LogError {
    /// Whether the file system has no room.
    pub(crate) fn is_full(&self) -> bool {
        matches!(&self.error, redb::Error::Io(error) if is_full(error))
    }

    /// Whether the file itself is damaged, so that trying again would not help.
    pub(crate) fn is_damage(&self) -> bool {
        use io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
        use redb::Error::{
            Corrupted, TableDoesNotExist, TableIsMultimap, TableTypeMismatch,
            TypeDefinitionChanged, UpgradeRequired,
        };
        match &self.error {
            Corrupted(_)
            | UpgradeRequired(_)
            | TableDoesNotExist(_)
            | TableIsMultimap(_)
            | TableTypeMismatch { .. }
            | TypeDefinitionChanged { .. } => true,
            redb::Error::Io(e) => {
                matches!(e.kind(), NotFound | UnexpectedEof | InvalidData) || is_bad_sector(e)
            }
            _ => false,
        }
    }
}

/// A log file as retention sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Offsets that it holds.
    pub(crate) offsets: Range<u64>,
    /// Bytes that it takes on the device.
    pub(crate) size_bytes: u64,
}

pub(crate) struct Log {
    disk: SharedDisk,
    active_cache_bytes: usize,
    sealed_cache_bytes: usize,
    /// How commits are made durable; by redb's own syncs where there is none.
    journaling: Option<Journaling>,
    rings: Mutex<Rings>,
    files: RwLock<Files>,
    handles: Mutex<Vec<Arc<Handle>>>,
    /// See [`Log::spare_bytes`].
    spare_bytes: AtomicU64,
    /// First offsets of the files whose tree is not to be believed.
    distrusted: Mutex<BTreeSet<u64>>,
    /// First offsets of the files that are repaired in memory whenever they are opened.
    unclean: Mutex<BTreeSet<u64>>,
    /// Files that were packed anew. Held while one is.
    packed: Mutex<u64>,
    /// First offset of the active file, if it cannot be read, and why; until the writer has given it
    /// up.
    unreadable: Mutex<Option<(u64, String)>>,
    /// Wakes the writer.
    on_progress: OnProgress,
}

/// What every journal of a log gets.
pub(crate) struct Journaling {
    pub(crate) options: journal::Options,
    pub(crate) on_progress: OnProgress,
}

/// Whether a log has a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Journaled {
    Always,
    Never,
    /// If it gains on this disk.
    IfItPays,
    /// Nobody writes: what a journal has left behind is laid over the files that are read.
    LookedAt,
}

struct Files {
    /// In offset order; the active one, if there is one, is the last.
    list: VecDeque<LogFile>,
    active: Option<OpenFile>,
    /// What the active one has joined.
    journal: Option<Arc<Journal>>,
    closed: bool,
}

/// What an append has written.
pub(crate) struct Appended {
    /// Bytes of its batches.
    pub(crate) size_bytes: u64,
    /// Place of the journal from which on it is durable; nothing if it is already.
    pub(crate) durable_at: Option<u64>,
}

struct LogFile {
    first: u64,
    /// Bytes that it takes on the device: as it was last asked, and what was appended since. Of one that
    /// is written over another's blocks, until it is sealed, those that it has taken of them.
    size_bytes: AtomicU64,
    /// Bytes that were appended since it was asked.
    unasked_bytes: AtomicU64,
    /// Held by whoever reads it after it was sealed.
    readers: Arc<()>,
    /// Whether another may be written over its blocks: this process made and sealed it, and as long as
    /// nothing has failed.
    reusable: Option<Soundness>,
}

impl LogFile {
    fn name(&self) -> String {
        name(self.first)
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// Counts what was appended, and asks the file system only now and then: whoever asks for a
    /// file's status between two writes has it write the inode with every sync.
    fn grow(&self, appended_bytes: u64, used_bytes: impl FnOnce() -> u64) {
        // A commit takes whole pages.
        let appended_bytes = appended_bytes.next_multiple_of(4096);
        let size_bytes = self.size_bytes() + appended_bytes;
        let unasked_bytes = self.unasked_bytes.load(Ordering::Relaxed) + appended_bytes;
        let ask = unasked_bytes >= ASK_BYTES_MAX.min(size_bytes / 8);
        let size_bytes = if ask { used_bytes() } else { size_bytes };
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
        self.unasked_bytes.store(if ask { 0 } else { unasked_bytes }, Ordering::Relaxed);
    }
}

pub(crate) fn name(first: u64) -> String {
    format!("{FOLDER}/{first:020}{EXTENSION}")
}

fn parse(file: &str) -> Option<u64> {
    let digits = file.strip_suffix(EXTENSION)?;
    (digits.len() == 20).then(|| digits.parse().ok())?
}

impl Log {
    fn log_file(&self, first: u64) -> LogFile {
        let size_bytes = self.disk.used_bytes(&name(first)).into();
        let readers = Arc::default();
        LogFile { first, size_bytes, unasked_bytes: 0.into(), readers, reusable: None }
    }

    /// Whether commits have a file to go to.
    pub(crate) fn has_active(&self) -> bool {
        self.files().active.is_some()
    }

    /// Offset of the first file; nothing if there is none.
    pub(crate) fn first_offset(&self) -> Option<u64> {
        self.files().list.front().map(|file| file.first)
    }

    /// First offset of the last file, where a new one would collide with it.
    pub(crate) fn last_first_offset(&self) -> Option<u64> {
        self.files().list.back().map(|file| file.first)
    }

    /// The journal at work, or a new one if there is none, and nothing if none is wanted.
    fn journal(&self, files: &mut Files) -> Result<Option<Arc<Journal>>, LogError> {
        let Some(journaling) = &self.journaling else {
            return Ok(None);
        };
        if files.journal.is_none() {
            let begun =
                self.rings().begin(random(), journaling.options, journaling.on_progress.clone());
            let begun = begun.map_err(|error| self.journal_error(None, error))?;
            files.journal = Some(Arc::new(begun));
        }
        Ok(files.journal.clone())
    }

    fn join(&self, journal: &Journal, first: u64, file: &OpenFile) -> Result<(), LogError> {
        journal
            .join(&self.disk, first, file.home())
            .map_err(|error| self.error(first, redb::Error::Io(error)))
    }

    fn journal_error(&self, journal: Option<&Journal>, error: io::Error) -> LogError {
        let path = self.disk.path(&journal.map_or(FOLDER.to_owned(), Journal::path));
        LogError { path, error: redb::Error::Io(error) }
    }

    /// What has befallen the journal, if it has failed.
    pub(crate) fn journal_failure(&self) -> Option<LogError> {
        let journal = self.files().journal.clone()?;
        Some(self.journal_error(Some(&journal), journal.failure()?))
    }

    /// Waits until everything that was appended is durable and in the log files.
    pub(crate) fn settle(&self) -> Result<(), LogError> {
        let Some(journal) = self.files().journal.clone() else {
            return Ok(());
        };
        journal.drain().map_err(|error| self.journal_error(Some(&journal), error))
    }

    /// As [`Log::settle`], and until nothing is left that a crash would replay.
    pub(crate) fn empty_journal(&self) -> Result<(), LogError> {
        let Some(journal) = self.files().journal.clone() else {
            return Ok(());
        };
        journal.checkpoint().map_err(|error| self.journal_error(Some(&journal), error))
    }

    /// Does one of the journal's jobs at a moment that a test chose.
    #[cfg(test)]
    pub(crate) fn step(&self, checkpoint: bool) {
        let journal = self.files().journal.clone();
        // A failure shows at the next commit.
        let _ = journal.map(|journal| journal.step(checkpoint));
    }

    /// Appends events and control records in one transaction and moves the tail past them. On an
    /// error the tail is as it was, and the file takes no more: see [`Log::fail`].
    pub(crate) fn append(
        &self,
        encoder: &mut Encoder,
        mut events: &[Event],
        mut controls: &[Control],
        tail: &mut Tail,
    ) -> Result<Appended, LogError> {
        let files = self.files();
        let file = files.list.back().expect("the active file is in the list");
        let active = files.active.as_ref().expect("the caller rolled to an active file");
        let mut moved = tail.clone();
        let appended = active.write(|transaction| {
            let mut size_bytes = 0;
            let mut table = transaction.open_table(BATCHES)?;
            while !events.is_empty() || !controls.is_empty() {
                let packed = encoder.pack(events, controls, &mut moved);
                let len = packed.head.len() + packed.body.len();
                let mut row = table.insert_reserve(packed.position.key(), len)?;
                let (head, body) = row.as_mut().split_at_mut(packed.head.len());
                head.copy_from_slice(packed.head);
                body.copy_from_slice(packed.body);
                size_bytes += len as u64;
                events = &events[packed.events..];
                controls = &controls[packed.controls..];
            }
            Ok(size_bytes)
        });
        let size_bytes = appended.map_err(|error| self.error(file.first, error))?;
        file.grow(size_bytes, || self.active_used_bytes(active, file.first));
        *tail = moved;
        let durable_at = files.journal.as_ref().map(|journal| journal.queued());
        Ok(Appended { size_bytes, durable_at })
    }

    /// Gives up the active file after a failed append, and a journal that has failed: after this
    /// nothing more becomes durable. What the file holds below the next one's offset stays readable.
    pub(crate) fn fail(&self) {
        let mut files = self.files_mut();
        files.active = None;
        if let Some(journal) = files.journal.take_if(|journal| journal.failure().is_some()) {
            self.rings().retire(&journal);
        }
    }

    /// Starts a new file that takes over at `head`, and seals the one before. A file that starts
    /// at the same offset holds no event and is replaced: the caller has its control records in
    /// the checkpoint. Everything that was appended must be durable, see [`Log::settle`].
    pub(crate) fn roll(&self, head: &Head) -> Result<(), LogError> {
        let first = head.tail.position.offset;
        let (journal, replaces) = {
            let mut files = self.files_mut();
            let journal = self.journal(&mut files)?;
            let replaces = files.list.back().is_some_and(|last| last.first == first);
            if replaces {
                files.active = None;
                if let Some(journal) = &journal {
                    journal
                        .checkpoint()
                        .map_err(|error| self.journal_error(Some(journal), error))?;
                }
            }
            (journal, replaces)
        };
        let unfinished = if !replaces && self.take_spare() { spare::NAME } else { UNFINISHED };
        let active = self.create(head, first, unfinished).inspect_err(|_| {
            // Best effort: else it goes when the next one is made, or at the next open.
            let _ = self.disk.remove(unfinished);
        })?;
        if replaces {
            // The new file has the old one's name: none of its records may be replayed into it. The old
            // one may be worth nothing without them, so the new one is whole by now: from here on
            // `finish_takeover` gives it its name.
            self.rings().replace(first).map_err(|error| self.journal_error(None, error))?;
        }
        self.disk.rename(unfinished, &name(first)).map_err(|error| {
            // It may have its name all the same, also after a crash: then the file before it ends
            // here, and nothing may be added to that.
            self.files_mut().active = None;
            self.error(first, redb::Error::Io(error))
        })?;
        let mut files = self.files_mut();
        // The lock keeps readers off the old file until it is closed.
        let sealed =
            files.active.take().map(|active| (active.home().clone(), active.close_reusable()));
        let (home, reusable) = sealed.unzip();
        let reusable = reusable.flatten();
        if let Some(before) = files.list.pop_back() {
            self.forget(before.first);
            if before.first != first {
                files.list.push_back(LogFile { reusable, ..self.log_file(before.first) });
            }
        }
        let size_bytes = self.active_used_bytes(&active, first).into();
        files.list.push_back(LogFile { size_bytes, ..self.log_file(first) });
        if let Some(journal) = journal {
            // From now on the old file is read as it lies on the disk.
            journal.drain().map_err(|error| self.journal_error(Some(&journal), error))?;
            if let Some(home) = home {
                // If it fails, the file is not sound, and the journal stops at its next sync.
                let _ = home.cut_rest();
            }
            self.join(&journal, first, &active)?;
        }
        files.active = Some(active);
        Ok(())
    }

    /// A file that begins with `head`, synced. It has no name of its own yet.
    fn create(&self, head: &Head, first: u64, unfinished: &str) -> Result<OpenFile, LogError> {
        let create =
            if unfinished == spare::NAME { OpenFile::create_over } else { OpenFile::create };
        let created = create(&*self.disk, unfinished, self.active_cache_bytes);
        let active = created.map_err(|error| self.error(first, error))?;
        let written = active.write(|transaction| {
            transaction.open_table(HEAD)?.insert((), head.encode().as_slice())?;
            transaction.open_table(BATCHES)?;
            Ok(())
        });
        written.map_err(|error| self.error(first, error))?;
        Ok(active)
    }

    /// The files, each with the offsets it holds below the watermark.
    pub(crate) fn spans(&self, watermark: u64) -> Vec<Span> {
        let files = self.files();
        let ends = files.list.iter().skip(1).map(|next| next.first).chain([watermark]);
        let spans = files.list.iter().zip(ends);
        spans
            .map(|(file, end)| Span {
                offsets: file.first..end.max(file.first),
                size_bytes: file.size_bytes(),
            })
            .collect()
    }

    /// Bytes that all files take, with the spare. What an active file that was the spare has not taken of
    /// its blocks does not count a second time: while it was the spare there was room for it.
    pub(crate) fn used_bytes(&self) -> u64 {
        let files_bytes: u64 = self.files().list.iter().map(LogFile::size_bytes).sum();
        files_bytes + self.spare_bytes()
    }

    /// Bytes that the active file takes.
    fn active_used_bytes(&self, active: &OpenFile, first: u64) -> u64 {
        active.reused_bytes().unwrap_or_else(|| self.disk.used_bytes(&name(first)))
    }

    /// Bytes that the last file takes.
    pub(crate) fn active_bytes(&self) -> u64 {
        self.files().list.back().map_or(0, LogFile::size_bytes)
    }

    /// Takes the first `count` files out of the list, never the active one, and removes them. One
    /// that cannot be removed is left for the next open.
    pub(crate) fn remove_first(&self, count: usize) {
        let removed: Vec<LogFile> = {
            let mut files = self.files_mut();
            let sealed = files.list.len() - usize::from(files.active.is_some());
            files.list.drain(..count.min(sealed)).collect()
        };
        for file in removed {
            if let Err(error) = self.remove(&file) {
                tracing::warn!(path = %self.disk.path(&file.name()).display(), %error,
                    "cannot remove a log file that is no longer needed; the next start tries again");
            }
        }
    }

    /// Closes every file; nothing is left to replay, unless something failed. Nothing can be read or
    /// appended after that.
    pub(crate) fn close(&self) {
        let mut files = self.files_mut();
        let home = files.active.take().map(|active| active.home().clone());
        files.closed = true;
        self.handles().clear();
        self.remove_spare();
        if let Some(journal) = files.journal.take() {
            let emptied = journal.checkpoint().and_then(|()| match home {
                Some(home) => home.cut_rest(),
                None => Ok(()),
            });
            if let Err(error) = emptied {
                tracing::warn!(path = %self.disk.path(&journal.path()).display(), %error,
                    "the journal was not emptied; the next start replays it");
            }
            journal.halt();
        }
    }

    fn error(&self, first: u64, error: impl Into<redb::Error>) -> LogError {
        LogError { path: self.disk.path(&name(first)), error: error.into() }
    }

    fn files(&self) -> RwLockReadGuard<'_, Files> {
        self.files.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn files_mut(&self) -> RwLockWriteGuard<'_, Files> {
        self.files.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unreadable(&self) -> MutexGuard<'_, Option<(u64, String)>> {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unclean(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.unclean.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn distrusted(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.distrusted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handles(&self) -> MutexGuard<'_, Vec<Arc<Handle>>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
