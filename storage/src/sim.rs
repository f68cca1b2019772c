//! A disk in memory for tests: it loses what was not synced when its power is cut, fails on
//! demand and fills up.
//!
//! Unsynced writes stay readable until the cut, as the page cache keeps them. A cut keeps any
//! version that a page had since the last sync, or tears several of them at 512-byte sectors. A
//! failed sync leaves its pages readable and clean: no later sync writes them. The length is not a
//! page: file systems keep it in their journal.
//!
//! Names are as volatile as pages: a file that was created, renamed or removed is so after a cut only if
//! its folder was synced since. Of what was not, a cut keeps a part from the beginning, in each folder by
//! itself. A rename whose folder could not be synced is seen all the same, until a cut takes it back.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

use crate::disk::Disk;

const PAGE_BYTES: usize = 4096;
const SECTOR_BYTES: usize = 512;

type Page = Arc<[u8; PAGE_BYTES]>;

/// Handles to the same disk share it.
#[derive(Clone, Debug)]
pub(crate) struct SimDisk(Arc<Mutex<Sim>>);

#[derive(Clone, Debug)]
struct Sim {
    rng: fastrand::Rng,
    /// Name to index in `files`.
    names: Names,
    /// As they are on the disk.
    durable_names: Names,
    /// What has become of names since their folder was synced.
    renamings: Vec<Renaming>,
    files: Vec<SimFile>,
    faults: Faults,
    cut: Option<Cut>,
    failed_syncs: u64,
}

/// What the power has failed: the first operation that did not happen for want of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) operation: Operation,
    /// Of the file, at that moment; of a renamed one, what it was called before.
    pub(crate) name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Create,
    Write,
    SetLen,
    Sync,
    Rename,
    Remove,
    Reserve,
}

type Names = BTreeMap<String, usize>;

/// A change of a folder.
#[derive(Clone, Debug)]
struct Renaming {
    from: Option<String>,
    to: Option<(String, usize)>,
}

impl Renaming {
    fn apply(&self, names: &mut Names) {
        if let Some(from) = &self.from {
            names.remove(from);
        }
        if let Some((to, file)) = &self.to {
            names.insert(to.clone(), *file);
        }
    }

    fn folder(&self) -> &str {
        let name = self.to.as_ref().map(|(name, _)| name).or(self.from.as_ref());
        folder(name.expect("a name of some file"))
    }
}

fn folder(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// The power goes after this many more writing operations; the last may half happen.
    pub(crate) power_left: Option<u64>,
    /// Syncs of these files say that they worked and did nothing.
    pub(crate) sync_lies: Lies,
    /// This many syncs work, then one fails.
    pub(crate) fail_sync_after: Option<u64>,
    /// No more pages than this fit, over all files.
    pub(crate) pages_max: Option<usize>,
}

/// Whose syncs lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Lies {
    #[default]
    Nobodys,
    /// Those of the files in one folder. The folder itself is synced.
    FilesIn(&'static str),
    /// Those of all files and folders.
    Everybodys,
}

#[derive(Clone, Debug, Default)]
struct SimFile {
    /// Pages that room was taken for, and that were not written yet.
    reserved: BTreeSet<u64>,
    len: u64,
    pages: BTreeMap<u64, Page>,
    durable_len: u64,
    durable: BTreeMap<u64, Page>,
    unsynced: Vec<Change>,
    /// Pages that cannot be read until they are written.
    bad: BTreeSet<u64>,
    /// Whether a sync of it has failed.
    failed: bool,
}

#[derive(Clone, Debug)]
enum Change {
    Len(u64),
    Page(u64, Page),
}

impl SimDisk {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Sim {
            rng: fastrand::Rng::with_seed(seed),
            names: Names::new(),
            durable_names: Names::new(),
            renamings: Vec::new(),
            files: Vec::new(),
            faults: Faults::default(),
            cut: None,
            failed_syncs: 0,
        })))
    }

    fn sim(&self) -> MutexGuard<'_, Sim> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.sim().faults);
    }

    /// What the power failed, if it is gone.
    pub(crate) fn cut(&self) -> Option<Cut> {
        self.sim().cut.clone()
    }

    /// How many syncs have failed since the last crash.
    pub(crate) fn failed_syncs(&self) -> u64 {
        self.sim().failed_syncs
    }

    /// Whether there is such a file, and a sync of it has ever failed.
    pub(crate) fn has_failed(&self, name: &str) -> bool {
        let sim = self.sim();
        sim.names.get(name).is_some_and(|&file| sim.files[file].failed)
    }

    /// Pages in use.
    pub(crate) fn pages(&self) -> usize {
        self.sim().pages()
    }

    /// What the next process finds when this one is killed: everything that was written. What this
    /// one still does goes to the old disk.
    pub(crate) fn after_kill(&self) -> Self {
        let mut sim = self.sim().clone();
        sim.faults = Faults { sync_lies: sim.faults.sync_lies, ..Faults::default() };
        (sim.cut, sim.failed_syncs) = (None, 0);
        Self(Arc::new(Mutex::new(sim)))
    }

    /// What the next process finds when the power is cut: what was synced, and of the rest
    /// whatever happened to be written.
    pub(crate) fn after_cut(&self) -> Self {
        let next = self.after_kill();
        {
            let sim = &mut *next.sim();
            let mut ended: Vec<String> = Vec::new();
            for renaming in std::mem::take(&mut sim.renamings) {
                let folder = renaming.folder();
                if ended.iter().any(|ended| ended == folder) {
                    continue;
                }
                if sim.rng.bool() {
                    renaming.apply(&mut sim.durable_names);
                } else {
                    ended.push(folder.to_owned());
                }
            }
            sim.names = sim.durable_names.clone();
            for file in &mut sim.files {
                file.cut(&mut sim.rng);
            }
        }
        next
    }

    /// Flips one bit of a file; says whether the file has that byte.
    pub(crate) fn flip(&self, name: &str, at: u64, bit: u8) -> bool {
        let mut sim = self.sim();
        let file = sim.names[name];
        let file = &mut sim.files[file];
        let (page, within) = (at / PAGE_BYTES as u64, (at % PAGE_BYTES as u64) as usize);
        let there = file.pages.get_mut(&page).map(|page| Arc::make_mut(page)[within] ^= 1 << bit);
        if let Some(durable) = file.durable.get_mut(&page) {
            Arc::make_mut(durable)[within] ^= 1 << bit;
        }
        there.is_some()
    }

    /// Makes the page at a place of a file a bad sector: reading it fails until it is written.
    pub(crate) fn spoil(&self, name: &str, at: u64) {
        let mut sim = self.sim();
        let file = sim.names[name];
        sim.files[file].bad.insert(at / PAGE_BYTES as u64);
    }

    /// Places of the pages of a file that hold anything.
    pub(crate) fn page_offsets(&self, name: &str) -> Vec<u64> {
        let sim = self.sim();
        sim.files[sim.names[name]].pages.keys().map(|page| page * PAGE_BYTES as u64).collect()
    }
}

impl Sim {
    fn pages(&self) -> usize {
        self.names.values().map(|&file| self.files[file].used_pages()).sum()
    }

    /// Counts a writing operation; fails it if the power is off.
    fn operate(&mut self, operation: Operation, name: &str) -> io::Result<()> {
        match &mut self.faults.power_left {
            None => Ok(()),
            Some(0) => {
                self.cut.get_or_insert_with(|| Cut { operation, name: name.to_owned() });
                Err(io::Error::other("the power is off"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    /// As [`Sim::operate`], on a file that is open.
    fn operate_on(&mut self, operation: Operation, file: usize) -> io::Result<()> {
        let name = self.name_of(file);
        self.operate(operation, &name)
    }

    fn name_of(&self, file: usize) -> String {
        let named = self.names.iter().find(|(_, named)| **named == file);
        named.map_or_else(|| "a file without a name".to_owned(), |(name, _)| name.clone())
    }

    /// Whether the next sync works, and whether it does anything: of this file, or of a folder.
    fn sync_works(&mut self, file: Option<usize>) -> io::Result<bool> {
        let lies = match (self.faults.sync_lies, file) {
            (Lies::Nobodys, _) | (Lies::FilesIn(_), None) => false,
            (Lies::FilesIn(of), Some(file)) => folder(&self.name_of(file)) == of,
            (Lies::Everybodys, _) => true,
        };
        if lies {
            return Ok(false);
        }
        match &mut self.faults.fail_sync_after {
            Some(0) => {
                self.faults.fail_sync_after = None;
                self.failed_syncs += 1;
                return Err(rustix::io::Errno::IO.into());
            }
            Some(after) => *after -= 1,
            None => {}
        }
        Ok(true)
    }

    /// Changes a folder, and syncs it.
    fn rename(&mut self, renaming: Renaming) -> io::Result<()> {
        let operation = if renaming.to.is_some() { Operation::Rename } else { Operation::Remove };
        let name = renaming.from.clone().unwrap_or_default();
        self.operate(operation, &name)?;
        renaming.apply(&mut self.names);
        let folder = renaming.folder().to_owned();
        self.renamings.push(renaming);
        // The sync of the folder.
        self.operate(operation, &name)?;
        if self.sync_works(None)? {
            for renaming in self.renamings.extract_if(.., |r| r.folder() == folder) {
                renaming.apply(&mut self.durable_names);
            }
        }
        Ok(())
    }
}

impl SimFile {
    fn used_pages(&self) -> usize {
        self.pages.len() + self.reserved.len()
    }

    fn cut(&mut self, rng: &mut fastrand::Rng) {
        let unsynced = std::mem::take(&mut self.unsynced);
        let mut lens = vec![self.durable_len];
        let mut versions: BTreeMap<u64, Vec<Option<Page>>> = BTreeMap::new();
        for change in unsynced {
            match change {
                Change::Len(len) => lens.push(len),
                Change::Page(at, page) => {
                    let before = || vec![self.durable.get(&at).cloned()];
                    versions.entry(at).or_insert_with(before).push(Some(page));
                }
            }
        }
        let drop_all = rng.u8(..4) == 0;
        let tear = rng.bool();
        if !drop_all {
            self.durable_len = lens[rng.usize(..lens.len())];
            for (at, versions) in versions {
                let pick = |rng: &mut fastrand::Rng| versions[rng.usize(..versions.len())].clone();
                let mut page = pick(rng);
                if tear {
                    let mut torn = [0; PAGE_BYTES];
                    for sector in torn.chunks_mut(SECTOR_BYTES).enumerate() {
                        let from = sector.0 * SECTOR_BYTES;
                        if let Some(version) = pick(rng) {
                            sector.1.copy_from_slice(&version[from..from + SECTOR_BYTES]);
                        }
                    }
                    page = Some(Arc::new(torn));
                }
                if let Some(page) = page {
                    self.durable.insert(at, page);
                }
            }
        }
        self.durable.retain(|&page, _| page * (PAGE_BYTES as u64) < self.durable_len);
        self.pages = self.durable.clone();
        self.len = self.durable_len;
    }

    fn set_len(&mut self, len: u64) {
        self.pages.split_off(&len.div_ceil(PAGE_BYTES as u64));
        self.len = len;
        self.unsynced.push(Change::Len(len));
    }

    fn sync(&mut self) {
        for change in std::mem::take(&mut self.unsynced) {
            match change {
                Change::Len(len) => {
                    self.durable.split_off(&len.div_ceil(PAGE_BYTES as u64));
                    self.durable_len = len;
                }
                Change::Page(at, page) => {
                    self.durable.insert(at, page);
                }
            }
        }
    }
}

#[derive(Debug)]
struct SimBackend {
    disk: SimDisk,
    file: usize,
}

impl StorageBackend for SimBackend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.sim().files[self.file].len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let sim = self.disk.sim();
        let file = &sim.files[self.file];
        if offset + out.len() as u64 > file.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let pages =
            offset / PAGE_BYTES as u64..(offset + out.len() as u64).div_ceil(PAGE_BYTES as u64);
        if file.bad.range(pages).next().is_some() {
            return Err(rustix::io::Errno::IO.into());
        }
        let mut at = offset;
        for chunk in pieces(offset, out.len()) {
            let out = &mut out[(at - offset) as usize..][..chunk];
            let within = (at % PAGE_BYTES as u64) as usize;
            match file.pages.get(&(at / PAGE_BYTES as u64)) {
                Some(page) => out.copy_from_slice(&page[within..within + chunk]),
                None => out.fill(0),
            }
            at += chunk as u64;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut sim = self.disk.sim();
        sim.operate_on(Operation::SetLen, self.file)?;
        sim.files[self.file].set_len(len);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut sim = self.disk.sim();
        sim.operate_on(Operation::Sync, self.file)?;
        let works = sim.sync_works(Some(self.file));
        let file = &mut sim.files[self.file];
        match works {
            Ok(true) => file.sync(),
            Ok(false) => {}
            // No later sync writes these pages.
            Err(_) => {
                file.unsynced.retain(|change| matches!(change, Change::Len(_)));
                file.failed = true;
            }
        }
        works.map(drop)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut sim = self.disk.sim();
        sim.operate_on(Operation::Write, self.file)?;
        let used = sim.pages();
        let pages_max = sim.faults.pages_max.unwrap_or(usize::MAX);
        let file = &mut sim.files[self.file];
        let mut new = 0;
        let mut at = offset;
        for chunk in pieces(offset, data.len()) {
            let page_at = at / PAGE_BYTES as u64;
            if !file.reserved.remove(&page_at) && !file.pages.contains_key(&page_at) {
                new += 1;
                if used + new > pages_max {
                    return Err(io::ErrorKind::StorageFull.into());
                }
            }
            file.bad.remove(&page_at);
            let page = file.pages.entry(page_at).or_insert_with(|| Arc::new([0; PAGE_BYTES]));
            let within = (at % PAGE_BYTES as u64) as usize;
            Arc::make_mut(page)[within..within + chunk]
                .copy_from_slice(&data[(at - offset) as usize..][..chunk]);
            let version = page.clone();
            file.unsynced.push(Change::Page(page_at, version));
            at += chunk as u64;
        }
        Ok(())
    }
}

/// Lengths of the parts of a range that lie in one page each.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = usize> {
    let (mut at, end) = (offset, offset + len as u64);
    std::iter::from_fn(move || {
        let page_end = (at / PAGE_BYTES as u64 + 1) * PAGE_BYTES as u64;
        let piece = page_end.min(end).saturating_sub(at);
        at += piece;
        (piece > 0).then_some(piece as usize)
    })
}

impl Disk for SimDisk {
    fn open(&self, name: &str) -> io::Result<Box<dyn StorageBackend>> {
        let file = self.sim().names.get(name).copied().ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(SimBackend { disk: self.clone(), file }))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn StorageBackend>> {
        let mut sim = self.sim();
        sim.operate(Operation::Create, name)?;
        let file = sim.files.len();
        sim.files.push(SimFile::default());
        let created = Renaming { from: None, to: Some((name.to_owned(), file)) };
        created.apply(&mut sim.names);
        sim.renamings.push(created);
        Ok(Box::new(SimBackend { disk: self.clone(), file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut sim = self.sim();
        let file = *sim.names.get(from).ok_or(io::ErrorKind::NotFound)?;
        sim.rename(Renaming { from: Some(from.to_owned()), to: Some((to.to_owned(), file)) })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut sim = self.sim();
        if !sim.names.contains_key(name) {
            return Ok(());
        }
        sim.rename(Renaming { from: Some(name.to_owned()), to: None })
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let sim = self.sim();
        let names =
            sim.names.keys().filter_map(|name| name.strip_prefix(folder)?.strip_prefix('/'));
        Ok(names.map(str::to_owned).collect())
    }

    fn reserve(&self, name: &str, range: Range<u64>) -> io::Result<()> {
        let mut sim = self.sim();
        sim.operate(Operation::Reserve, name)?;
        let file = *sim.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        let pages = range.start / PAGE_BYTES as u64..range.end.div_ceil(PAGE_BYTES as u64);
        let new: Vec<u64> =
            pages.filter(|page| !sim.files[file].pages.contains_key(page)).collect();
        let taken = new.iter().filter(|page| sim.files[file].reserved.contains(page)).count();
        if sim.pages() + new.len() - taken > sim.faults.pages_max.unwrap_or(usize::MAX) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        sim.files[file].reserved.extend(new);
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let sim = self.sim();
        let free =
            sim.faults.pages_max.unwrap_or(usize::MAX / PAGE_BYTES).saturating_sub(sim.pages());
        Ok((free * PAGE_BYTES) as u64)
    }

    fn used_bytes(&self, name: &str) -> u64 {
        let sim = self.sim();
        let pages = sim.names.get(name).map_or(0, |&file| sim.files[file].used_pages());
        (pages * PAGE_BYTES) as u64
    }

    fn path(&self, name: &str) -> PathBuf {
        name.into()
    }
}
