//! A disk that is as slow as an SD card: the real one underneath, counted, and asleep in every sync
//! for as long as a card would take.
//!
//! The card does one thing at a time: a write operation takes 2 ms and its bytes at 15 MB/s, a flush
//! takes 4 ms. It is modelled from the side of the file system:
//!
//! - What is written stays in the page cache (4 KB pages, a page written twice counts once) until
//!   its file is synced. Nothing is written back earlier, and a read costs nothing.
//! - A sync writes the dirty pages of its file: a run of adjacent pages is one operation, of 512 KB
//!   at most, as a block layer merges them. A flush follows, also if nothing was dirty.
//! - If the file's length changed since its last sync, or a page is written for the first time since
//!   the file was created or cut short, the file system's own journal has to be written as well: one
//!   more operation, of 16 KB, and a second flush. Overwriting blocks that exist does without.
//! - Renaming and removing a file are durable on return: one such journal write each.
//! - Syncs of several files take turns, operation by operation, in the order in which they come.
//!
//! A sync lasts as long as the model says, or as the real disk took if that was longer. Left out:
//! the card's own housekeeping (it would pause now and then, and wear), where on the card a write
//! goes, and discards.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::{Bound, Range};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use redb::{BackendError, StorageBackend};
use storage::disk::{Disk, SharedDisk};

const FLUSH: Duration = Duration::from_millis(4);
const OPERATION: Duration = Duration::from_millis(2);
const BYTES_PER_S: f64 = 15e6;
const OPERATION_PAGES_MAX: u64 = 128;
const PAGE_BYTES: u64 = 4096;
const JOURNAL_PAGES: u64 = 4;

/// The card under a file system, and what it was asked to do.
#[derive(Debug)]
pub(crate) struct Card {
    /// Off while a bench sets itself up: then it counts nothing and does not sleep.
    on: AtomicBool,
    free_at: Mutex<Instant>,
    syncs: AtomicUsize,
    operations: AtomicU64,
    flushes: AtomicU64,
    written_bytes: AtomicU64,
}

/// What a card did.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    pub(crate) operations: u64,
    pub(crate) flushes: u64,
    pub(crate) written_bytes: u64,
}

impl Card {
    pub(crate) fn new() -> Self {
        Self {
            on: AtomicBool::new(false),
            free_at: Mutex::new(Instant::now()),
            syncs: AtomicUsize::new(0),
            operations: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
        }
    }

    pub(crate) fn turn_on(&self) {
        self.on.store(true, Ordering::Relaxed);
    }

    pub(crate) fn work(&self) -> Work {
        Work {
            operations: self.operations.load(Ordering::Relaxed),
            flushes: self.flushes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
        }
    }

    /// Waits until nobody syncs.
    pub(crate) fn wait_idle(&self) {
        while self.syncs.load(Ordering::Acquire) > 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Does something that has to be durable, and takes as long for it as the card.
    fn durably<T>(
        &self,
        runs: &[u64],
        journal: bool,
        really: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        if !self.on.load(Ordering::Relaxed) {
            return really();
        }
        let _busy = Busy::new(self);
        let began = Instant::now();
        let done = really()?;
        let mut at = began;
        for &run in runs {
            let mut pages = run;
            while pages > 0 {
                let now = pages.min(OPERATION_PAGES_MAX);
                at = self.write(at, now);
                pages -= now;
            }
        }
        // The journal alone, as a rename needs it, is flushed once.
        if !(runs.is_empty() && journal) {
            at = self.flush(at);
        }
        if journal {
            at = self.write(at, JOURNAL_PAGES);
            self.flush(at);
        }
        Ok(done)
    }

    fn write(&self, at: Instant, pages: u64) -> Instant {
        let bytes = pages * PAGE_BYTES;
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.take(at, OPERATION + Duration::from_secs_f64(bytes as f64 / BYTES_PER_S))
    }

    fn flush(&self, at: Instant) -> Instant {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.take(at, FLUSH)
    }

    /// Sleeps until the card has done something that was asked of it at `at`. What a sleep is too
    /// long does not add up: the next piece of work is counted from when the card was free.
    fn take(&self, at: Instant, cost: Duration) -> Instant {
        let done_at = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = at.max(*free_at) + cost;
            *free_at
        };
        thread::sleep(done_at.saturating_duration_since(Instant::now()));
        done_at
    }
}

/// Counts as a sync until it is dropped.
struct Busy<'a>(&'a Card);

impl<'a> Busy<'a> {
    fn new(card: &'a Card) -> Self {
        card.syncs.fetch_add(1, Ordering::AcqRel);
        Self(card)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.syncs.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What the file system knows of a file.
#[derive(Debug, Default)]
struct Pages {
    /// Pages that have blocks.
    written: BTreeSet<u64>,
    dirty: BTreeSet<u64>,
    /// The journal has to be written: there are new blocks, or another length.
    changed: bool,
}

impl Pages {
    fn write(&mut self, offset: u64, len: usize) {
        let end = (offset + len as u64).div_ceil(PAGE_BYTES);
        for page in offset / PAGE_BYTES..end {
            self.changed |= self.written.insert(page);
            self.dirty.insert(page);
        }
    }

    fn set_len(&mut self, before: u64, len: u64) {
        self.changed |= len != before;
        let end = len.div_ceil(PAGE_BYTES);
        self.written.split_off(&end);
        self.dirty.split_off(&end);
    }

    /// Lengths of the runs of adjacent dirty pages, and whether the journal is due. All is clean
    /// afterwards.
    fn sync(&mut self) -> (Vec<u64>, bool) {
        let mut runs = Vec::new();
        let mut next = None;
        for page in std::mem::take(&mut self.dirty) {
            match runs.last_mut() {
                Some(run) if next == Some(page) => *run += 1,
                _ => runs.push(1),
            }
            next = Some(page + 1);
        }
        (runs, std::mem::take(&mut self.changed))
    }
}

/// A disk on a card.
#[derive(Debug)]
pub(crate) struct CardDisk {
    disk: SharedDisk,
    card: Arc<Card>,
    files: Mutex<BTreeMap<String, Arc<Mutex<Pages>>>>,
}

impl CardDisk {
    /// An empty disk: what is on it already counts as not written.
    pub(crate) fn new(disk: SharedDisk, card: Arc<Card>) -> Self {
        Self { disk, card, files: Mutex::default() }
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Mutex<Pages>>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, name: &str, file: Box<dyn StorageBackend>) -> Box<dyn StorageBackend> {
        let pages = self.files().entry(name.to_owned()).or_default().clone();
        Box::new(CardFile { file, card: self.card.clone(), pages })
    }
}

impl Disk for CardDisk {
    fn open(&self, name: &str) -> io::Result<Box<dyn StorageBackend>> {
        Ok(self.file(name, self.disk.open(name)?))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn StorageBackend>> {
        let file = self.disk.create(name)?;
        let pages = Pages { changed: true, ..Pages::default() };
        self.files().insert(name.to_owned(), Arc::new(Mutex::new(pages)));
        Ok(self.file(name, file))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.card.durably(&[], true, || self.disk.rename(from, to))?;
        let mut files = self.files();
        if let Some(pages) = files.remove(from) {
            files.insert(to.to_owned(), pages);
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        if self.files().remove(name).is_none() {
            return self.disk.remove(name);
        }
        self.card.durably(&[], true, || self.disk.remove(name))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.disk.list(folder)
    }

    fn reserve(&self, name: &str, range: Range<u64>) -> io::Result<()> {
        self.disk.reserve(name, range)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.disk.free_bytes()
    }

    fn used_bytes(&self, name: &str) -> u64 {
        self.disk.used_bytes(name)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.disk.path(name)
    }
}

/// A file on a card.
#[derive(Debug)]
struct CardFile {
    file: Box<dyn StorageBackend>,
    card: Arc<Card>,
    pages: Arc<Mutex<Pages>>,
}

impl CardFile {
    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StorageBackend for CardFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let before = self.file.len()?;
        self.file.set_len(len)?;
        self.pages().set_len(before, len);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let (runs, journal) = self.pages().sync();
        self.card.durably(&runs, journal, || self.file.sync_data())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)?;
        self.pages().write(offset, data.len());
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
