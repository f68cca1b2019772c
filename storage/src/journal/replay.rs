//! The rings of a store: which there are, and what they still owe to the log files.
//!
//! Owns: `log/journal-<number>.ring`. One of them is in use; others are there after a failure only,
//! as long as they may hold what a log file lacks. A log file whose journal failed before it had an
//! event is replaced by one of the same name: then that ring's name ends in `-without-<file>` once the
//! new file is whole and before it gets its name, so that nothing of the old one is replayed into it.
//! Invariant: a ring is given up only once what it holds is synced in its home files.

use std::collections::HashMap;
use std::io;

use redb::StorageBackend;

use super::record::{BLOCK_BYTES, DATA_START, Mark, Record};
use super::{Journal, OnProgress, Options, pays};
use crate::disk::SharedDisk;
use crate::log;

const PREFIX: &str = "journal-";
const WITHOUT: &str = "-without-";
const SUFFIX: &str = ".ring";
/// What a ring is called until its first mark is durable.
const UNFINISHED: &str = "log/journal.new";

/// A ring's file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct RingName {
    number: u64,
    /// First offset of a log file that its records are not for any more.
    without: Option<u64>,
}

impl RingName {
    fn parse(file: &str) -> Option<Self> {
        let middle = file.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
        let (number, without) = match middle.split_once(WITHOUT) {
            None => (middle, None),
            Some((number, without)) => (number, Some(without.parse().ok()?)),
        };
        Some(Self { number: number.parse().ok()?, without })
    }

    fn path(&self) -> String {
        let Self { number, without } = self;
        let without = without.map_or(String::new(), |first| format!("{WITHOUT}{first:020}"));
        format!("{}/{PREFIX}{number:06}{without}{SUFFIX}", log::FOLDER)
    }
}

/// The rings of a store.
pub(crate) struct Rings {
    disk: SharedDisk,
    /// A ring that holds nothing any more, whose blocks can be used again.
    idle: Option<RingName>,
    /// Rings of journals that failed, which may hold what a log file lacks.
    kept: Vec<RingName>,
    next_number: u64,
    /// Where the places of the next journal begin.
    next_place: u64,
}

fn with(name: &str) -> impl FnOnce(io::Error) -> (String, io::Error) {
    let name = name.to_owned();
    |error| (name, error)
}

/// The rings that are there, in the order of their lives.
fn list(disk: &SharedDisk) -> Result<Vec<RingName>, (String, io::Error)> {
    let files = disk.list(log::FOLDER).map_err(with(log::FOLDER))?;
    let mut rings: Vec<RingName> = files.iter().filter_map(|file| RingName::parse(file)).collect();
    rings.sort_unstable();
    Ok(rings)
}

/// The log file that another one was about to take the place of, by the name of a ring. A ring that was
/// begun for the other one holds nothing of that name yet; one that does is of a file that has had its
/// name, and stays.
pub(crate) fn replaced(disk: &SharedDisk) -> io::Result<Option<u64>> {
    let mut replaced = None;
    for ring in list(disk).map_err(|(_, error)| error)? {
        if ring.without.is_some() {
            replaced = ring.without;
        } else if let Some(first) = replaced {
            visit(&*disk.open(&ring.path())?, |record| {
                if record.file == first {
                    replaced = None;
                }
                Ok(())
            })?;
        }
    }
    Ok(replaced)
}

/// Replays whatever rings are there into the log files, and syncs those.
///
/// # Errors
/// Something could not be read or written; nothing is lost, and it can be tried again. The name is
/// that of the file.
pub(crate) fn recover(disk: &SharedDisk) -> Result<Rings, (String, io::Error)> {
    disk.remove(UNFINISHED).map_err(with(UNFINISHED))?;
    let rings = list(disk)?;
    let next_number = rings.last().map_or(0, |last| last.number + 1);
    // One that was kept is not used again: its name says something of what was in it.
    let idle = rings.last().filter(|last| last.without.is_none()).cloned();
    for ring in &rings {
        let path = ring.path();
        replay(disk, ring).map_err(with(&path))?;
        if idle.as_ref() != Some(ring) {
            disk.remove(&path).map_err(with(&path))?;
        }
    }
    Ok(Rings { disk: disk.clone(), idle, kept: Vec::new(), next_number, next_place: 0 })
}

impl Rings {
    /// The rings of a store that nobody writes to: what they hold is laid over the log files.
    pub(crate) fn look(disk: &SharedDisk) -> Result<Self, (String, io::Error)> {
        let kept = list(disk)?;
        Ok(Self { disk: disk.clone(), idle: None, kept, next_number: 0, next_place: 0 })
    }

    /// Whether a journal gains on this disk.
    pub(crate) fn pay(&mut self) -> io::Result<bool> {
        let ring = self.disk.create(UNFINISHED)?;
        let pays = pays(&*ring);
        drop(ring);
        self.disk.remove(UNFINISHED)?;
        pays
    }

    /// Begins a journal in an idle ring or a new one.
    pub(crate) fn begin(
        &mut self,
        epoch: u64,
        options: Options,
        on_progress: OnProgress,
    ) -> io::Result<Journal> {
        let place = self.next_place;
        if let Some(idle) = &self.idle {
            let (ring, number) = (self.disk.open(&idle.path())?, idle.number);
            let journal = Journal::begin(ring, number, epoch, place, options, on_progress)?;
            self.idle = None;
            return Ok(journal);
        }
        let ring = self.disk.create(UNFINISHED)?;
        let number = self.next_number;
        let journal = Journal::begin(ring, number, epoch, place, options, on_progress)?;
        self.disk.rename(UNFINISHED, &path(number))?;
        self.next_number += 1;
        Ok(journal)
    }

    /// Whether what a journal that failed has left may be laid over log files.
    pub(crate) fn hold_something(&self) -> bool {
        !self.kept.is_empty()
    }

    /// A log file is about to be replaced by another one of its name.
    pub(crate) fn replace(&mut self, first: u64) -> io::Result<()> {
        for ring in self.kept.iter_mut().filter(|ring| ring.without.is_none()) {
            // The file was the last one of its ring; in another ring it does not occur.
            let renamed = RingName { without: Some(first), ..ring.clone() };
            // A try that failed may have renamed it all the same.
            let there = self.disk.open(&ring.path()).is_ok();
            let from = if there { ring.path() } else { renamed.path() };
            self.disk.rename(&from, &renamed.path())?;
            *ring = renamed;
        }
        Ok(())
    }

    /// Gives up a journal that has failed. Its ring goes if the home files have all that it holds.
    pub(crate) fn retire(&mut self, journal: &Journal) {
        journal.halt();
        self.next_place = journal.queued();
        let ring = RingName { number: journal.number(), without: None };
        let path = ring.path();
        if !journal.is_home() {
            tracing::error!(path = %self.disk.path(&path).display(),
                "a log file could not be synced; the journal is kept, the next start replays it");
            self.kept.push(ring);
        } else if let Err(error) = self.disk.remove(&path) {
            tracing::warn!(path = %self.disk.path(&path).display(), %error,
                "cannot remove a journal that is no longer needed; the next start does it");
        }
    }

    /// Removes the ring that holds nothing, where no journal is wanted.
    pub(crate) fn remove_idle(&mut self) -> io::Result<()> {
        self.idle.take().map_or(Ok(()), |ring| self.disk.remove(&ring.path()))
    }

    /// Writes what kept rings hold of a log file over it: a failed sync leaves pages that read well
    /// until the page cache lets go of them.
    pub(crate) fn complete(&self, first: u64, file: &dyn StorageBackend) -> io::Result<()> {
        for ring in self.kept.iter().filter(|ring| ring.without != Some(first)) {
            visit(&*self.disk.open(&ring.path())?, |record| {
                if record.file == first { bring(record, file) } else { Ok(()) }
            })?;
        }
        Ok(())
    }
}

/// Path of the ring that is in use.
pub(super) fn path(number: u64) -> String {
    RingName { number, without: None }.path()
}

fn replay(disk: &SharedDisk, ring: &RingName) -> io::Result<()> {
    let mut homes: HashMap<u64, Option<Box<dyn StorageBackend>>> = HashMap::new();
    visit(&*disk.open(&ring.path())?, |record| {
        if ring.without == Some(record.file) {
            return Ok(());
        }
        let home = match homes.entry(record.file) {
            std::collections::hash_map::Entry::Occupied(home) => home.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(match disk.open(&log::name(record.file)) {
                    Ok(home) => Some(home),
                    // It was trimmed.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                    Err(error) => return Err(error),
                })
            }
        };
        home.as_ref().map_or(Ok(()), |home| bring(record, &**home))
    })?;
    homes.values().flatten().try_for_each(|home| home.sync_data())
}

fn bring(record: &Record, home: &dyn StorageBackend) -> io::Result<()> {
    if home.len()? != record.file_len {
        home.set_len(record.file_len)?;
    }
    record.writes().try_for_each(|(offset, data)| home.write(offset, data))
}

/// The mark that counts; none in a ring that was never begun.
pub(super) fn last_mark(ring: &dyn StorageBackend) -> io::Result<Option<Mark>> {
    let len = ring.len()?;
    let mut last: Option<Mark> = None;
    for slot in [0, BLOCK_BYTES] {
        let mut stored = [0; Mark::LEN];
        if slot + stored.len() as u64 <= len {
            ring.read(slot, &mut stored)?;
            let mark = Mark::decode(&stored);
            last = last.into_iter().chain(mark).max_by_key(|mark| mark.number);
        }
    }
    Ok(last)
}

/// Calls `f` with every whole record from the mark on, in order.
fn visit(
    ring: &dyn StorageBackend,
    mut f: impl FnMut(&Record) -> io::Result<()>,
) -> io::Result<()> {
    let Some(mark) = last_mark(ring)? else {
        return Ok(());
    };
    let mut place = mark.place;
    loop {
        let mut block = vec![0; BLOCK_BYTES as usize];
        if !read_round(ring, mark.capacity, place, &mut block)? {
            return Ok(());
        }
        let len = match Record::stored_bytes(&block, mark.epoch, place) {
            Some(len) if len <= mark.capacity => len as usize,
            _ => return Ok(()),
        };
        let mut bytes = block;
        bytes.resize(len, 0);
        if !read_round(ring, mark.capacity, place, &mut bytes)? {
            return Ok(());
        }
        let Some(record) = Record::decode(bytes, mark.epoch, place) else {
            return Ok(());
        };
        f(&record)?;
        place = record.end();
    }
}

/// Reads from a place of the stream; `false` if the file ends before.
fn read_round(
    ring: &dyn StorageBackend,
    capacity: u64,
    place: u64,
    mut out: &mut [u8],
) -> io::Result<bool> {
    let (len, mut place) = (ring.len()?, place);
    while !out.is_empty() {
        let at = place % capacity;
        let now = out.len().min((capacity - at) as usize);
        if DATA_START + at + now as u64 > len {
            return Ok(false);
        }
        let (part, rest) = out.split_at_mut(now);
        ring.read(DATA_START + at, part)?;
        place += now as u64;
        out = rest;
    }
    Ok(true)
}
