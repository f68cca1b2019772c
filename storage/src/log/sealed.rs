//! Files that are read and not appended to: a few handles, and what is done where one is damaged.
//!
//! Invariant: a file whose tree has once been found wanting is searched without it from then on (see
//! `salvage`); the active one is given up first.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use redb::ReadableTableMetadata;

use super::salvage::Salvaged;
use super::{BATCHES, FOLDER, HEAD, Log, LogError, name};
use crate::disk::{OpenFile, Overlay};
use crate::head::{BadHead, Head, Position};
use crate::journal;

/// Handles kept for reading files that are not appended to.
pub(super) const HANDLES_MAX: usize = 3;
/// A file open for reading; opened by the first who needs it, while others wait.
pub(super) struct Handle {
    pub(super) first: u64,
    file: Mutex<Option<Sealed>>,
}

/// A file that is not appended to.
#[derive(Clone)]
pub(super) enum Sealed {
    Whole(Arc<OpenFile>),
    Damaged(Arc<Salvaged>),
}

impl Sealed {
    pub(super) fn source(&self) -> Source<'_> {
        match self {
            Self::Whole(file) => Source::Tree(file),
            Self::Damaged(file) => Source::Salvage(file),
        }
    }
}

/// Where the rows of a file come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Tree(&'a OpenFile),
    Salvage(&'a Salvaged),
}

impl Source<'_> {
    pub(super) fn is_tree(self) -> bool {
        matches!(self, Self::Tree(_))
    }
}

impl Log {
    /// End of the file that holds `offset`, end-exclusive; no end if it is the last.
    pub(super) fn file_end(&self, offset: u64) -> u64 {
        let files = self.files();
        files.list.iter().map(|file| file.first).find(|&first| first > offset).unwrap_or(u64::MAX)
    }

    /// Runs `f` on the file that holds `offset`, with the offset at which the next one starts. Once
    /// more if its tree turns out to be damaged, then on what was salvaged.
    pub(super) fn with_file<T>(
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

    /// As [`Log::with_file`], for a file that is not appended to. Nothing is written over its blocks until
    /// this is done.
    pub(super) fn with_sealed<T>(
        &self,
        first: u64,
        mut f: impl FnMut(Source<'_>) -> Result<T, redb::Error>,
    ) -> Result<T, LogError> {
        let _reading = self.reader(first)?;
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

    /// What a reader of a file has to hold.
    fn reader(&self, first: u64) -> Result<Arc<()>, LogError> {
        let files = self.files();
        match files.list.binary_search_by_key(&first, |file| file.first) {
            Ok(at) => Ok(files.list[at].readers.clone()),
            Err(_) => Err(self.error(first, redb::Error::Io(io::ErrorKind::NotFound.into()))),
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
    pub(super) fn note_damage(&self, first: u64, reason: &str) -> bool {
        let new = self.distrusted().insert(first);
        if new {
            tracing::error!(path = %self.disk.path(&name(first)).display(), reason,
                "a log file is damaged: it is searched for what can still be read");
        }
        new
    }

    pub(super) fn is_distrusted(&self, first: u64) -> bool {
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
    pub(super) fn open_sealed(&self, first: u64) -> Result<Sealed, redb::Error> {
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

    pub(super) fn forget(&self, first: u64) {
        self.handles().retain(|handle| handle.first != first);
    }
}

/// Calls `f` with every row from `start` to before `end`, in order, until it breaks off.
pub(super) fn rows(
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
pub(super) fn floor(source: Source<'_>, offset: u64) -> Result<Position, redb::Error> {
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

pub(super) fn head_row(source: Source<'_>) -> Result<Result<Head, BadHead>, redb::Error> {
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
pub(super) fn batches(source: Source<'_>) -> Result<u64, redb::Error> {
    match source {
        Source::Tree(file) => {
            file.read(|transaction| Ok(transaction.open_table(BATCHES)?.len()?))
        }
        Source::Salvage(file) => Ok(file.batches()),
    }
}
