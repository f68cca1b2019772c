//! Opens the log: what a crash has cut short is finished, and what came after the checkpoint is replayed.
//!
//! Invariants: the journal comes first; no number is ever given twice, also where what had it cannot be
//! read any more.

use std::collections::VecDeque;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Mutex, RwLock};

use bytes::Bytes;

use super::salvage::Salvaged;
use super::sealed::{HANDLES_MAX, Source, head_row, rows};
use super::{
    FOLDER, Files, Journaled, Journaling, Log, LogError, UNFINISHED, name, pack_anew, parse, spare,
};
use crate::batch::{Batch, BatchHead, events_max};
use crate::control::Control;
use crate::disk::{OpenFile, Overlay, SharedDisk};
use crate::head::{BadHead, Head, Position, Tail};
use crate::journal::{self, Rings};

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
            spare_bytes: 0.into(),
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
        for left in [UNFINISHED, pack_anew::UNFINISHED, spare::NAME] {
            self.disk.remove(left).map_err(|e| io(left, e))?;
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
