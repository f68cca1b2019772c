//! The rings of a store: which there are, and what they still owe to the log files.
//!
//! Owns: `log/journal-<number>.ring`. One of them is in use; others are there after a failure only,
//! as long as they may hold what a log file lacks.
//! Invariant: a ring is given up only once what it holds is synced in its home files.

use std::collections::HashMap;
use std::io;

use redb::StorageBackend;

use super::record::{BLOCK_BYTES, DATA_START, Mark, Record};
use super::{Journal, OnProgress, Options, pays};
use crate::disk::SharedDisk;
use crate::log;

const PREFIX: &str = "journal-";
const SUFFIX: &str = ".ring";
/// What a ring is called until its first mark is durable.
const UNFINISHED: &str = "log/journal.new";

fn name(number: u64) -> String {
    format!("{}/{PREFIX}{number:06}{SUFFIX}", log::FOLDER)
}

/// The rings of a store.
pub(crate) struct Rings {
    disk: SharedDisk,
    /// A ring that holds nothing any more, whose blocks can be used again.
    idle: Option<String>,
    /// Rings of journals that failed, which may hold what a log file lacks.
    kept: Vec<String>,
    next_number: u64,
    /// Where the places of the next journal begin.
    next_place: u64,
}

/// Replays whatever rings are there into the log files, and syncs those.
///
/// # Errors
/// Something could not be read or written; nothing is lost, and it can be tried again. The name is
/// that of the file.
pub(crate) fn recover(disk: &SharedDisk) -> Result<Rings, (String, io::Error)> {
    let with = |name: &str| {
        let name = name.to_owned();
        |error| (name, error)
    };
    disk.remove(UNFINISHED).map_err(with(UNFINISHED))?;
    let mut numbers: Vec<u64> = disk
        .list(log::FOLDER)
        .map_err(with(log::FOLDER))?
        .iter()
        .filter_map(|file| file.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok())
        .collect();
    numbers.sort_unstable();
    let next_number = numbers.last().map_or(0, |last| last + 1);
    let idle = numbers.last().map(|&last| name(last));
    for &number in &numbers {
        let ring = name(number);
        replay(disk, &ring).map_err(with(&ring))?;
        if idle.as_ref() != Some(&ring) {
            disk.remove(&ring).map_err(with(&ring))?;
        }
    }
    Ok(Rings { disk: disk.clone(), idle, kept: Vec::new(), next_number, next_place: 0 })
}

impl Rings {
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
        if let Some(name) = &self.idle {
            let ring = self.disk.open(name)?;
            let journal = Journal::begin(ring, name.clone(), epoch, place, options, on_progress)?;
            self.idle = None;
            return Ok(journal);
        }
        let name = name(self.next_number);
        let ring = self.disk.create(UNFINISHED)?;
        let journal = Journal::begin(ring, name.clone(), epoch, place, options, on_progress)?;
        self.disk.rename(UNFINISHED, &name)?;
        self.next_number += 1;
        Ok(journal)
    }

    /// Gives up a journal that has failed. Its ring goes if the home files have all that it holds.
    pub(crate) fn retire(&mut self, journal: &Journal) {
        journal.halt();
        self.next_place = journal.queued();
        let name = journal.name().to_owned();
        if !journal.is_home() {
            tracing::error!(path = %self.disk.path(&name).display(),
                "a log file could not be synced; the journal is kept, the next start replays it");
            self.kept.push(name);
        } else if let Err(error) = self.disk.remove(&name) {
            tracing::warn!(path = %self.disk.path(&name).display(), %error,
                "cannot remove a journal that is no longer needed; the next start does it");
        }
    }

    /// Removes the ring that holds nothing, where no journal is wanted.
    pub(crate) fn remove_idle(&mut self) -> io::Result<()> {
        self.idle.take().map_or(Ok(()), |name| self.disk.remove(&name))
    }

    /// Writes what kept rings hold of a log file over it: a failed sync leaves pages that read well
    /// until the page cache lets go of them.
    pub(crate) fn complete(&self, first: u64, file: &dyn StorageBackend) -> io::Result<()> {
        for name in &self.kept {
            visit(&*self.disk.open(name)?, |record| {
                if record.file == first { bring(record, file) } else { Ok(()) }
            })?;
        }
        Ok(())
    }
}

fn replay(disk: &SharedDisk, ring: &str) -> io::Result<()> {
    let mut homes: HashMap<u64, Option<Box<dyn StorageBackend>>> = HashMap::new();
    visit(&*disk.open(ring)?, |record| {
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
        let len = match Record::ring_bytes(&block, mark.epoch, place) {
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
