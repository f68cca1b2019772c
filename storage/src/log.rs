//! The log: rolling redb files of batches, `log/<first offset, 20 digits>.redb`.
//!
//! Owns: the list of files, the one that is appended to, and a few handles to those that are read.
//! Each file has a table of batches keyed by [`Position`] and a head row.
//!
//! Invariants:
//! - a file holds the offsets from its name to the next file's name; what it may hold beyond, from
//!   a commit that failed, is void for ever;
//! - a file has its final name only once its head row is durable;
//! - only the process that created a file, or found it closed cleanly, appends to it, and no more
//!   after the first failed write: what a failed sync covered may be lost even if it reads back
//!   well, so the log goes on in a new file. Every other file is opened over an overlay and never
//!   written, but by the replay of a journal;
//! - a file joins the journal once it has its name, and the next one begins only when all that this
//!   one holds is durable and home;
//! - a batch is lost only where its own bytes are: of a file whose tree is damaged everything else is
//!   read all the same (see `salvage`). The active file is given up first, because what is searched
//!   must not change.
//!
//! Deliberately absent: what is durable (the caller passes the watermark), what may go (see
//! `retention`), and redb's caches beyond their sizes.

mod pack_anew;
mod salvage;
mod walk;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use redb::{ReadableTableMetadata, TableDefinition};

pub(crate) use self::pack_anew::Packing;
use self::salvage::Salvaged;
use crate::batch::{Batch, BatchHead, Encoder, events_max};
use crate::control::Control;
use crate::disk::{OpenFile, Overlay, SharedDisk, is_bad_sector, is_full};
use crate::event::{Event, StoredEvent};
use crate::head::{BadHead, Head, Position, Tail};
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

/// Handles kept for reading files that are not appended to.
const HANDLES_MAX: usize = 3;

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

/// What a read found.
#[derive(Default)]
pub(crate) struct Found {
    pub(crate) events: Vec<StoredEvent>,
    /// Everything before this offset was read or is in `corrupt`.
    pub(crate) next: u64,
    /// Offsets that should be there and cannot be read.
    pub(crate) corrupt: Vec<Range<u64>>,
    /// Where the file that is read ends.
    end: u64,
    events_max: usize,
    size_bytes: usize,
    size_bytes_max: usize,
    /// The next event would pass a limit.
    full: bool,
}

/// Why the log could not be opened.
#[derive(Debug)]
pub(crate) enum LogOpenError {
    Log(LogError),
    /// A file of another store.
    Foreign(PathBuf),
    /// A file of a later format.
    Newer(u32),
}

impl From<LogError> for LogOpenError {
    fn from(error: LogError) -> Self {
        Self::Log(error)
    }
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
    /// Bytes that it takes on the device: as it was last asked, and what was appended since.
    size_bytes: AtomicU64,
    /// Bytes that were appended since it was asked.
    unasked_bytes: AtomicU64,
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
    fn grow(&self, appended_bytes: u64, disk: &SharedDisk) {
        // A commit takes whole pages.
        let appended_bytes = appended_bytes.next_multiple_of(4096);
        let size_bytes = self.size_bytes() + appended_bytes;
        let unasked_bytes = self.unasked_bytes.load(Ordering::Relaxed) + appended_bytes;
        let ask = unasked_bytes >= ASK_BYTES_MAX.min(size_bytes / 8);
        let size_bytes = if ask { disk.used_bytes(&self.name()) } else { size_bytes };
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

/// A file open for reading; opened by the first who needs it, while others wait.
struct Handle {
    first: u64,
    file: Mutex<Option<Sealed>>,
}

/// A file that is not appended to.
#[derive(Clone)]
enum Sealed {
    Whole(Arc<OpenFile>),
    Damaged(Arc<Salvaged>),
}

impl Sealed {
    fn source(&self) -> Source<'_> {
        match self {
            Self::Whole(file) => Source::Tree(file),
            Self::Damaged(file) => Source::Salvage(file),
        }
    }
}

/// Where the rows of a file come from.
#[derive(Clone, Copy)]
enum Source<'a> {
    Tree(&'a OpenFile),
    Salvage(&'a Salvaged),
}

impl Source<'_> {
    fn is_tree(self) -> bool {
        matches!(self, Self::Tree(_))
    }
}

impl Log {
    /// Replays the journal, finds the files, finishes what was cut short, and replays what came
    /// after the checkpoint `tail`, which is moved to the end of the log. Offsets below `start` were
    /// trimmed.
    pub(crate) fn open(
        disk: SharedDisk,
        cache_bytes: usize,
        (journaled, journaling): (Journaled, Journaling),
        start: u64,
        epoch: u64,
        tail: &mut Tail,
        replay: &mut dyn FnMut(Control),
    ) -> Result<Self, LogOpenError> {
        let io =
            |name: &str, error| LogError { path: disk.path(name), error: redb::Error::Io(error) };
        // Whatever was left behind comes first, also where no journal is wanted any more.
        let rings = match journaled {
            Journaled::LookedAt => Rings::look(&disk),
            _ => {
                finish_takeover(&disk).map_err(|error| io(UNFINISHED, error))?;
                journal::recover(&disk)
            }
        };
        let mut rings = rings.map_err(|(name, error)| io(&name, error))?;
        let pays = match journaled {
            Journaled::Always => true,
            Journaled::Never | Journaled::LookedAt => false,
            // A disk on which it cannot be tried now, perhaps a full one, is not known to gain.
            Journaled::IfItPays => rings.pay().unwrap_or(false),
        };
        if !pays {
            rings.remove_idle().map_err(|error| io(FOLDER, error))?;
        }
        let files = Files { list: VecDeque::new(), active: None, journal: None, closed: false };
        let on_progress = journaling.on_progress.clone();
        let log = Self {
            active_cache_bytes: cache_bytes / 2,
            sealed_cache_bytes: cache_bytes / 2 / HANDLES_MAX,
            journaling: pays.then_some(journaling),
            rings: Mutex::new(rings),
            files: RwLock::new(files),
            handles: Mutex::new(Vec::new()),
            distrusted: Mutex::default(),
            unclean: Mutex::default(),
            packed: Mutex::default(),
            unreadable: Mutex::default(),
            on_progress,
            disk,
        };
        log.list(start)?;
        log.replay(epoch, tail, replay)?;
        if journaled != Journaled::LookedAt {
            log.open_last(tail)?;
        }
        Ok(log)
    }

    fn list(&self, start: u64) -> Result<(), LogOpenError> {
        let io = |file: &str, error: io::Error| LogError {
            path: self.disk.path(file),
            error: redb::Error::Io(error),
        };
        let mut firsts = Vec::new();
        for file in self.disk.list(FOLDER).map_err(|e| io(FOLDER, e))? {
            firsts.extend(parse(&file));
        }
        for unfinished in [UNFINISHED, pack_anew::UNFINISHED] {
            self.disk.remove(unfinished).map_err(|e| io(unfinished, e))?;
        }
        firsts.sort_unstable();
        // An unlink that was cut short: everything below `start` was given up before.
        let trimmed = firsts.windows(2).take_while(|pair| pair[1] <= start).count();
        for first in firsts.drain(..trimmed) {
            self.disk.remove(&name(first)).map_err(|e| io(&name(first), e))?;
        }
        self.files_mut().list = firsts.into_iter().map(|first| self.log_file(first)).collect();
        Ok(())
    }

    fn log_file(&self, first: u64) -> LogFile {
        let size_bytes = self.disk.used_bytes(&name(first)).into();
        LogFile { first, size_bytes, unasked_bytes: 0.into() }
    }

    /// Moves the tail over every batch at or after it.
    fn replay(
        &self,
        epoch: u64,
        tail: &mut Tail,
        apply: &mut dyn FnMut(Control),
    ) -> Result<(), LogOpenError> {
        let firsts: Vec<u64> = self.files().list.iter().map(|file| file.first).collect();
        let checkpoint = tail.position;
        let from = firsts.partition_point(|&first| first < tail.position.offset).saturating_sub(1);
        for (at, &first) in firsts.iter().enumerate().skip(from) {
            if let Some(head) = self.head(first, epoch)?
                && head.tail.position > checkpoint
            {
                // What was damaged before it was passed over by too little or too much: the head
                // knows where this file starts.
                *tail = head.tail;
            }
            tail.position = tail.position.max(Position::at(first));
            let end = match firsts.get(at + 1) {
                Some(&next) => {
                    self.head(next, epoch)?.map_or(Position::at(next), |head| head.tail.position)
                }
                None => Position { offset: u64::MAX, ordinal: u32::MAX },
            };
            if end <= tail.position {
                // The checkpoint has all of it: what may be damaged there changes no number.
                continue;
            }
            let (mut from, last) = (tail.position, at + 1 == firsts.len());
            let replayed = self.with_sealed(first, |source| {
                let mut dense = true;
                rows(source, from, end, |position, row| {
                    let follows = position == tail.position && sound_head(position, row).is_some();
                    if !follows && source.is_tree() {
                        dense = false;
                        return ControlFlow::Break(());
                    }
                    replay_batch(position, row, tail, apply);
                    from = position.after(0);
                    ControlFlow::Continue(())
                })?;
                // What the tree does not show may be there all the same.
                if source.is_tree() && (!dense || !last && tail.position < end) {
                    return Err(redb::Error::Corrupted("batches are missing".into()));
                }
                Ok(())
            });
            match replayed {
                Ok(()) if !self.is_distrusted(first) => {}
                Err(error) if !error.is_damage() => return Err(error.into()),
                _ => {
                    // What is lost behind the last batch that was found may have held more. More than
                    // the file can have held, so that no number is ever given twice.
                    skip(tail, events_max(self.disk.used_bytes(&name(first)) as usize));
                }
            }
        }
        Ok(())
    }

    /// Makes the last file the active one if it was closed cleanly.
    fn open_last(&self, tail: &Tail) -> Result<(), LogOpenError> {
        let mut files = self.files_mut();
        let Some(first) = files.list.back().map(|file| file.first) else {
            return Ok(());
        };
        if first > tail.position.offset {
            return Ok(());
        }
        match OpenFile::clean(&*self.disk, &name(first), self.active_cache_bytes) {
            Ok(Some(active)) => {
                // The overlaid handle would not see what is appended.
                self.forget(first);
                let joined = self.journal(&mut files).and_then(|journal| {
                    journal.map_or(Ok(()), |journal| self.join(&journal, first, &active))
                });
                match joined {
                    Ok(()) => files.active = Some(active),
                    // Perhaps the disk is full; the first commit tries again, in a new file.
                    Err(error) => tracing::warn!(path = %error.path.display(),
                        error = %error.error, "cannot begin a journal"),
                }
            }
            Ok(None) => {}
            Err(error) => {
                let error = self.error(first, error);
                if !error.is_damage() {
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    fn head(&self, first: u64, epoch: u64) -> Result<Option<Head>, LogOpenError> {
        match self.with_sealed(first, head_row) {
            Ok(Ok(head)) if head.epoch == epoch => Ok(Some(head)),
            Ok(Ok(_)) => Err(LogOpenError::Foreign(self.disk.path(&name(first)))),
            Ok(Err(BadHead::Newer(format))) => Err(LogOpenError::Newer(format)),
            Ok(Err(BadHead::Corrupt)) => Ok(None),
            Err(error) if error.is_damage() => Ok(None),
            Err(error) => Err(error.into()),
        }
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
        file.grow(size_bytes, &self.disk);
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
        let active = self.create(head, first).inspect_err(|_| {
            // Best effort: else it goes when the next one is made, or at the next open.
            let _ = self.disk.remove(UNFINISHED);
        })?;
        if replaces {
            // The new file has the old one's name: none of its records may be replayed into it. The old
            // one may be worth nothing without them, so the new one is whole by now: from here on
            // `finish_takeover` gives it its name.
            self.rings().replace(first).map_err(|error| self.journal_error(None, error))?;
        }
        self.disk.rename(UNFINISHED, &name(first)).map_err(|error| {
            // It may have its name all the same, also after a crash: then the file before it ends
            // here, and nothing may be added to that.
            self.files_mut().active = None;
            self.error(first, redb::Error::Io(error))
        })?;
        let mut files = self.files_mut();
        // Dropping its handle closes the old file. The lock keeps readers off until it is closed.
        files.active = None;
        if let Some(before) = files.list.pop_back() {
            self.forget(before.first);
            if before.first != first {
                files.list.push_back(self.log_file(before.first));
            }
        }
        files.list.push_back(self.log_file(first));
        if let Some(journal) = journal {
            // From now on the old file is read as it lies on the disk.
            journal.drain().map_err(|error| self.journal_error(Some(&journal), error))?;
            self.join(&journal, first, &active)?;
        }
        files.active = Some(active);
        Ok(())
    }

    /// A file that begins with `head`, synced. It has no name yet.
    fn create(&self, head: &Head, first: u64) -> Result<OpenFile, LogError> {
        let created = OpenFile::create(&*self.disk, UNFINISHED, self.active_cache_bytes);
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

    /// Bytes that all files take.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.files().list.iter().map(LogFile::size_bytes).sum()
    }

    /// Bytes that the last file takes.
    pub(crate) fn active_bytes(&self) -> u64 {
        self.files().list.back().map_or(0, LogFile::size_bytes)
    }

    /// Takes the first `count` files out of the list, never the active one, and unlinks them. One
    /// that cannot be unlinked is left for the next open.
    pub(crate) fn remove_first(&self, count: usize) {
        let removed: Vec<LogFile> = {
            let mut files = self.files_mut();
            let sealed = files.list.len() - usize::from(files.active.is_some());
            files.list.drain(..count.min(sealed)).collect()
        };
        for file in removed {
            self.forget(file.first);
            if let Err(error) = self.disk.remove(&file.name()) {
                tracing::warn!(path = %self.disk.path(&file.name()).display(), %error,
                    "cannot remove a log file that is no longer needed; the next start tries again");
            }
        }
    }

    /// Events from `from` on, below the watermark: at least one if there is any, else at most
    /// `events_max` and about `size_bytes_max` event bytes.
    pub(crate) fn read(
        &self,
        from: u64,
        watermark: u64,
        events_max: usize,
        size_bytes_max: usize,
    ) -> Result<Found, LogError> {
        let mut found = Found { next: from, events_max, size_bytes_max, ..Found::default() };
        while !found.full && found.next < watermark {
            let (offset, before) = (found.next, found.mark());
            let read = self.with_file(offset, |source, file_end| {
                found.end = file_end.min(watermark);
                let (start, end) = (floor(source, found.next)?, Position::at(found.end));
                rows(source, start, end, |_, row| found.row(row))
            });
            match read {
                Err(error) if !error.is_damage() => return Err(error),
                _ => {}
            }
            if !found.full {
                found.skip_to(self.file_end(offset).min(watermark));
            }
            // What the tree does not show may be there all the same.
            if found.corrupt.len() > before.corrupt && self.distrust(offset)? {
                found.back_to(&before);
            }
        }
        Ok(found)
    }

    /// The batch that holds the event at `offset` or, if that one is gone, the next readable one
    /// below the watermark.
    pub(crate) fn batch_at(&self, offset: u64, watermark: u64) -> Result<Option<Bytes>, LogError> {
        let mut from = offset;
        while from < watermark {
            let mut batch = None;
            let read = self.with_file(from, |source, file_end| {
                let end = Position::at(file_end.min(watermark));
                rows(source, floor(source, from)?, end, |_, row| {
                    if BatchHead::decode(row).is_ok_and(|head| head.end() > from) {
                        batch = Some(Bytes::copy_from_slice(row));
                        return ControlFlow::Break(());
                    }
                    ControlFlow::Continue(())
                })
            });
            match read {
                Err(error) if !error.is_damage() => return Err(error),
                _ if batch.is_some() => return Ok(batch),
                _ => from = self.file_end(from),
            }
        }
        Ok(None)
    }

    /// Closes every file; nothing is left to replay, unless something failed. Nothing can be read or
    /// appended after that.
    pub(crate) fn close(&self) {
        let mut files = self.files_mut();
        files.active = None;
        files.closed = true;
        self.handles().clear();
        if let Some(journal) = files.journal.take() {
            if let Err(error) = journal.checkpoint() {
                tracing::warn!(path = %self.disk.path(&journal.path()).display(), %error,
                    "the journal was not emptied; the next start replays it");
            }
            journal.halt();
        }
    }

    /// End of the file that holds `offset`, end-exclusive; no end if it is the last.
    fn file_end(&self, offset: u64) -> u64 {
        let files = self.files();
        files.list.iter().map(|file| file.first).find(|&first| first > offset).unwrap_or(u64::MAX)
    }

    /// Runs `f` on the file that holds `offset`, with the offset at which the next one starts. Once
    /// more if its tree turns out to be damaged, then on what was salvaged.
    fn with_file<T>(
        &self,
        offset: u64,
        mut f: impl FnMut(Source<'_>, u64) -> Result<T, redb::Error>,
    ) -> Result<T, LogError> {
        let files = self.files();
        if files.closed {
            let path = self.disk.path(FOLDER);
            return Err(LogError { path, error: redb::Error::DatabaseClosed });
        }
        let next = files.list.partition_point(|file| file.first <= offset);
        let end = files.list.get(next).map_or(u64::MAX, |file| file.first);
        let Some(file) = next.checked_sub(1).and_then(|at| files.list.get(at)) else {
            let path = self.disk.path(&name(offset));
            return Err(LogError { path, error: redb::Error::Corrupted("no such file".into()) });
        };
        let first = file.first;
        match &files.active {
            Some(active) if next == files.list.len() => f(Source::Tree(active), end)
                .map_err(|error| self.give_up_active(first, &error.to_string())),
            _ => {
                drop(files);
                self.with_sealed(first, |source| f(source, end))
            }
        }
    }

    /// As [`Log::with_file`], for a file that is not appended to.
    fn with_sealed<T>(
        &self,
        first: u64,
        mut f: impl FnMut(Source<'_>) -> Result<T, redb::Error>,
    ) -> Result<T, LogError> {
        loop {
            let result = self.open_sealed(first).and_then(|sealed| f(sealed.source()));
            let error = match result {
                Ok(done) => return Ok(done),
                Err(error) => self.error(first, error),
            };
            self.forget(first);
            let gone = matches!(&error.error, redb::Error::Io(e)
                if e.kind() == io::ErrorKind::NotFound);
            if gone || !error.is_damage() || !self.note_damage(first, &error.error.to_string()) {
                return Err(error);
            }
        }
    }

    /// From now on the file that holds `offset` is searched for what its tree does not show, because
    /// something is missing there. `false` if that was done already.
    ///
    /// # Errors
    /// It is the active one, which has to be given up first.
    pub(crate) fn distrust(&self, offset: u64) -> Result<bool, LogError> {
        const MISSING: &str = "events are missing";
        let first = {
            let files = self.files();
            let next = files.list.partition_point(|file| file.first <= offset);
            let Some(file) = next.checked_sub(1).and_then(|at| files.list.get(at)) else {
                return Ok(false);
            };
            if next == files.list.len() && files.active.is_some() {
                return Err(self.give_up_active(file.first, MISSING));
            }
            file.first
        };
        let there = self.disk.used_bytes(&name(first)) > 0;
        let new = there && self.note_damage(first, MISSING);
        if new {
            self.forget(first);
        }
        Ok(new)
    }

    /// Says whether that is new.
    fn note_damage(&self, first: u64, reason: &str) -> bool {
        let new = self.distrusted().insert(first);
        if new {
            tracing::error!(path = %self.disk.path(&name(first)).display(), reason,
                "a log file is damaged: it is searched for what can still be read");
        }
        new
    }

    fn is_distrusted(&self, first: u64) -> bool {
        self.distrusted().contains(&first)
    }

    /// Has the writer go on in a new file, so that this one can be searched. Whoever reads tries
    /// again.
    fn give_up_active(&self, first: u64, reason: &str) -> LogError {
        let new = {
            let mut unreadable = self.unreadable();
            let new = unreadable.as_ref().is_none_or(|(before, _)| *before != first);
            unreadable.get_or_insert_with(|| (first, reason.to_owned())).0 = first;
            new
        };
        if new {
            tracing::error!(path = %self.path_of(first).display(), reason,
                "the active log file cannot be read: the log goes on in a new one");
            (self.on_progress)(journal::Progress::Failed);
        }
        self.unreadable_error(first, reason)
    }

    /// Why the active file has to be given up, once.
    pub(crate) fn take_unreadable(&self) -> Option<LogError> {
        let (first, reason) = self.unreadable().take()?;
        let is_active = self.has_active() && self.last_first_offset() == Some(first);
        is_active.then(|| self.unreadable_error(first, &reason))
    }

    fn unreadable_error(&self, first: u64, reason: &str) -> LogError {
        let error = format!("{reason}; the log goes on in a new file, try again");
        self.error(first, redb::Error::Io(io::Error::other(error)))
    }

    /// A handle to a file that is not appended to, from the few that are kept.
    fn open_sealed(&self, first: u64) -> Result<Sealed, redb::Error> {
        let handle = {
            let mut handles = self.handles();
            let handle = match handles.iter().position(|handle| handle.first == first) {
                Some(at) => handles.remove(at),
                None => Arc::new(Handle { first, file: Mutex::new(None) }),
            };
            handles.truncate(HANDLES_MAX - 1);
            handles.insert(0, handle.clone());
            handle
        };
        let mut file = handle.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &*file {
            return Ok(file.clone());
        }
        let overlay = Overlay::around_bad_sectors(self.disk.open(&name(first))?)?;
        self.rings().complete(first, &overlay)?;
        let opened = if self.is_distrusted(first) {
            Sealed::Damaged(Arc::new(Salvaged::search(overlay, first)?))
        } else {
            let opened = OpenFile::over(overlay, self.sealed_cache_bytes)?;
            if opened.was_repaired() {
                self.unclean().insert(first);
            }
            Sealed::Whole(Arc::new(opened))
        };
        Ok(file.insert(opened).clone())
    }

    fn forget(&self, first: u64) {
        self.handles().retain(|handle| handle.first != first);
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

/// The head row of the first log file, of a store that is not open.
pub(crate) fn first_head(disk: &SharedDisk) -> Result<Head, LogError> {
    let at = |path, error| LogError { path, error };
    let files = disk.list(FOLDER).map_err(|e| at(disk.path(FOLDER), redb::Error::Io(e)))?;
    let Some(first) = files.iter().filter_map(|file| parse(file)).min() else {
        let reason = "there is no log file to make the state database from";
        return Err(at(disk.path(FOLDER), redb::Error::Corrupted(reason.into())));
    };
    let searched = || {
        let overlay = Overlay::around_bad_sectors(disk.open(&name(first))?)?;
        Salvaged::search(overlay, first)
    };
    let path = disk.path(&name(first));
    let head = searched().map(|file| file.head()).map_err(|error| at(path.clone(), error))?;
    head.map_err(|_| at(path, redb::Error::Corrupted("its head row cannot be read".into())))
}

/// Calls `f` with every row from `start` to before `end`, in order, until it breaks off.
fn rows(
    source: Source<'_>,
    start: Position,
    end: Position,
    mut f: impl FnMut(Position, &[u8]) -> ControlFlow<()>,
) -> Result<(), redb::Error> {
    if start >= end {
        return Ok(());
    }
    let file = match source {
        Source::Tree(file) => file,
        Source::Salvage(file) => return file.rows(start, end, f),
    };
    file.read(|transaction| {
        for row in transaction.open_table(BATCHES)?.range(start.key()..end.key())? {
            let (key, value) = row?;
            let (offset, ordinal) = key.value();
            if f(Position { offset, ordinal }, value.value()).is_break() {
                break;
            }
        }
        Ok(())
    })
}

/// Where the last batch at or before `offset` stands, which is the one that holds its event.
fn floor(source: Source<'_>, offset: u64) -> Result<Position, redb::Error> {
    let file = match source {
        Source::Tree(file) => file,
        Source::Salvage(file) => return Ok(file.floor(offset)),
    };
    file.read(|transaction| {
        let mut before = transaction.open_table(BATCHES)?.range(..=(offset, u32::MAX))?;
        let last = before.next_back().transpose()?;
        Ok(last.map_or(Position::at(offset), |(key, _)| {
            let (offset, ordinal) = key.value();
            Position { offset, ordinal }
        }))
    })
}

/// Ends what was cut short between the two renames of a file that takes over from one of its name, see
/// [`Log::roll`].
fn finish_takeover(disk: &SharedDisk) -> io::Result<()> {
    const CACHE_BYTES: usize = 1 << 20;
    let Some(first) = journal::replaced(disk)? else {
        return Ok(());
    };
    let head = OpenFile::overlaid(&**disk, UNFINISHED, CACHE_BYTES)
        .and_then(|new| head_row(Source::Tree(&new)));
    if matches!(head, Ok(Ok(head)) if head.tail.position.offset == first) {
        // Perhaps it was a later try that is there, and not yet synced.
        disk.open(UNFINISHED)?.sync_data()?;
        disk.rename(UNFINISHED, &name(first))?;
    }
    Ok(())
}

fn head_row(source: Source<'_>) -> Result<Result<Head, BadHead>, redb::Error> {
    let file = match source {
        Source::Tree(file) => file,
        Source::Salvage(file) => return Ok(file.head()),
    };
    file.read(|transaction| {
        let row = transaction.open_table(HEAD)?.get(())?;
        Ok(row.map_or(Err(BadHead::Corrupt), |row| Head::decode(row.value())))
    })
}

/// How many batches there are.
fn batches(source: Source<'_>) -> Result<u64, redb::Error> {
    match source {
        Source::Tree(file) => {
            file.read(|transaction| Ok(transaction.open_table(BATCHES)?.len()?))
        }
        Source::Salvage(file) => Ok(file.batches()),
    }
}

/// How far a read was, see [`Found::back_to`].
struct FoundMark {
    events: usize,
    next: u64,
    corrupt: usize,
    size_bytes: usize,
}

impl Found {
    /// Takes a stored batch in, by what its checked head says rather than by its key.
    fn row(&mut self, row: &[u8]) -> ControlFlow<()> {
        // Of a batch without a sound head, the one after it shows what was lost.
        let Ok(head) = BatchHead::decode(row) else {
            return ControlFlow::Continue(());
        };
        if head.end() <= self.next || head.end() > self.end {
            return ControlFlow::Continue(());
        }
        // Batches are dense: what is missing in front of this one could not be read.
        self.skip_to(head.position().offset);
        let Ok(batch) = Batch::decode(Bytes::copy_from_slice(row)) else {
            self.skip_to(head.end());
            return ControlFlow::Continue(());
        };
        for event in batch.events(self.next) {
            let Ok(event) = event else { break };
            let size_bytes = event.event.size_bytes();
            let fits = self.events.len() < self.events_max
                && self.size_bytes.saturating_add(size_bytes) <= self.size_bytes_max;
            if !fits && !self.events.is_empty() {
                self.full = true;
                return ControlFlow::Break(());
            }
            self.size_bytes += size_bytes;
            self.next = event.offset + 1;
            self.events.push(event);
        }
        self.skip_to(head.end());
        ControlFlow::Continue(())
    }

    fn mark(&self) -> FoundMark {
        FoundMark {
            events: self.events.len(),
            next: self.next,
            corrupt: self.corrupt.len(),
            size_bytes: self.size_bytes,
        }
    }

    /// Forgets what was found since.
    fn back_to(&mut self, mark: &FoundMark) {
        self.events.truncate(mark.events);
        self.corrupt.truncate(mark.corrupt);
        (self.next, self.size_bytes, self.full) = (mark.next, mark.size_bytes, false);
    }

    /// Notes everything before `offset` that was not read as lost.
    fn skip_to(&mut self, offset: u64) {
        if self.next < offset {
            self.corrupt.push(self.next..offset);
            self.next = offset;
        }
    }
}

fn sound_head(position: Position, row: &[u8]) -> Option<BatchHead<'_>> {
    BatchHead::decode(row).ok().filter(|head| head.position() == position)
}

/// Moves the tail over one batch and hands out its control records.
fn replay_batch(position: Position, row: &[u8], tail: &mut Tail, apply: &mut dyn FnMut(Control)) {
    let Some(head) = sound_head(position, row) else {
        tracing::error!(offset = position.offset, "a batch is damaged and cannot be replayed");
        tail.position = position;
        skip(tail, events_max(row.len()));
        return;
    };
    head.advance(tail);
    match Batch::decode(Bytes::copy_from_slice(row)).and_then(|batch| batch.controls()) {
        Ok(controls) => controls.into_iter().for_each(apply),
        Err(_) => {
            tracing::error!(
                offset = position.offset,
                "the control records of a damaged batch are lost; what they confirmed may be \
                 delivered again"
            );
        }
    }
}

/// Leaves out `count` offsets and sequence numbers that may have been given to what cannot be
/// read, so that none is ever given twice.
fn skip(tail: &mut Tail, count: u64) {
    tail.position = Position::at(tail.position.offset + count.max(1));
    for seq in &mut tail.next_seq {
        *seq += count;
    }
}
