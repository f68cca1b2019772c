//! The files under the store, as one seam.
//!
//! Owns: [`Disk`], the few operations on files that the store needs, [`FileDisk`], which is a
//! folder, and the two rules of writing under redb:
//! - `Fenced`: after the first failure nothing more is written to a file, not even by redb when
//!   its handle is dropped, because what a failed sync covered cannot be trusted;
//! - `Overlay`: a file that this process does not append to is never written at all. redb opens
//!   it over memory that keeps what it would have written (its mark that the file is in use, and
//!   the whole repair of a file that was not closed).
//!
//! `OpenFile` is a file under redb whose damage is an error, not a panic. A test puts another
//! [`Disk`] here to fail, to fill up or to cut the power, and a bench one around [`FileDisk`] to
//! count and to be as slow as a card: see [`Store::open_on`](crate::Store::open_on).
//!
//! Deliberately absent: what the files hold.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::{Bound, Range};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use redb::backends::FileBackend;
use redb::{
    BackendError, Builder, Database, DatabaseError, ReadTransaction, ReadableDatabase,
    StorageBackend, WriteTransaction,
};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::journal::{HomeBackend, HomeFile};

/// The operations on files that the store needs. Names are relative to the data folder. Whoever
/// wraps a file hands on its locks as well: redb refuses a file that it has open already.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Opens a file that is there.
    ///
    /// # Errors
    /// The file is not there, or cannot be opened.
    fn open(&self, name: &str) -> io::Result<Box<dyn StorageBackend>>;
    /// Creates a file, empty even if it was there.
    ///
    /// # Errors
    /// The file cannot be created.
    fn create(&self, name: &str) -> io::Result<Box<dyn StorageBackend>>;
    /// Gives a file another name, in place of whatever had it; durable on return.
    ///
    /// # Errors
    /// The file is not there, or its new name is not durable.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file; durable on return. One that is not there is no error.
    ///
    /// # Errors
    /// The file is there and cannot be removed.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Names of the files in a folder, without the folder.
    ///
    /// # Errors
    /// The folder cannot be read.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;
    /// Takes room on the device for a range of a file, so that writing there later cannot fail for
    /// lack of it. The length stays. What cannot do that says that it did.
    ///
    /// # Errors
    /// The file is not there, or there is no room.
    fn reserve(&self, name: &str, range: Range<u64>) -> io::Result<()>;
    /// Bytes of the file system that are free to take.
    ///
    /// # Errors
    /// The system does not say.
    fn free_bytes(&self) -> io::Result<u64>;
    /// Bytes that a file takes on the device; 0 if it is not there.
    fn used_bytes(&self, name: &str) -> u64;
    /// A name as the user knows it.
    fn path(&self, name: &str) -> PathBuf;
}

/// A folder of a file system.
#[derive(Debug)]
pub struct FileDisk {
    dir: PathBuf,
    /// Whether its files may be written: a file system that is mounted read-only can be looked at.
    writable: bool,
}

impl FileDisk {
    /// Creates the data folder and the one for the log in it (`log`), where they are missing; the
    /// parent of the data folder must be there.
    ///
    /// # Errors
    /// A folder that cannot be created.
    pub fn prepare(dir: PathBuf, folder: &str) -> io::Result<Self> {
        for path in [dir.clone(), dir.join(folder)] {
            match fs::create_dir(&path) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
                Ok(()) => File::open(path.parent().unwrap_or(&path))?.sync_all()?,
            }
        }
        Ok(Self { dir, writable: true })
    }

    /// A folder that is there, to look at.
    pub(crate) fn look_at(dir: PathBuf) -> Self {
        Self { dir, writable: false }
    }

    fn backend(file: File) -> io::Result<Box<dyn StorageBackend>> {
        match FileBackend::new(file) {
            Ok(backend) => Ok(Box::new(backend)),
            Err(DatabaseError::Storage(redb::StorageError::Io(e))) => Err(e),
            Err(e) => Err(io::Error::other(e)),
        }
    }

    fn sync_folder_of(&self, name: &str) -> io::Result<()> {
        let path = self.dir.join(name);
        File::open(path.parent().unwrap_or(&self.dir))?.sync_all()
    }
}

impl Disk for FileDisk {
    fn open(&self, name: &str) -> io::Result<Box<dyn StorageBackend>> {
        Self::backend(OpenOptions::new().read(true).write(self.writable).open(self.dir.join(name))?)
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn StorageBackend>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        Self::backend(options.open(self.dir.join(name))?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.dir.join(from), self.dir.join(to))?;
        self.sync_folder_of(to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.dir.join(name)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
            Ok(()) => self.sync_folder_of(name),
        }
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.dir.join(folder))? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn reserve(&self, name: &str, range: Range<u64>) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.dir.join(name))?;
        let len = range.end - range.start;
        match rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, range.start, len) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            result => Ok(result?),
        }
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let system = rustix::fs::statvfs(&self.dir)?;
        Ok(system.f_bavail.saturating_mul(system.f_frsize))
    }

    fn used_bytes(&self, name: &str) -> u64 {
        const BLOCK_BYTES: u64 = 512; // the unit of st_blocks, whatever the file system
        fs::metadata(self.dir.join(name)).map_or(0, |m| m.blocks() * BLOCK_BYTES)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// Whether an error says that the file system has no room.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A file that redb has open. redb trusts what a file that was closed cleanly says and panics on
/// some damage: here that is an error like any other.
pub(crate) struct OpenFile {
    database: Option<Database>,
    /// What it is written through; none for a file that never is.
    home: Option<Arc<HomeFile>>,
    /// Whether it was made by this process.
    created: bool,
    /// Whether it had to be repaired in memory, because it was not closed cleanly.
    repaired: bool,
}

impl OpenFile {
    /// Opens a file to write to it, or nothing if anything was committed since it was last closed
    /// cleanly: then it must be left as it is, see [`OpenFile::overlaid`]. If the very first commit
    /// after a clean close failed, the file still counts as clean; all that its failed sync may
    /// have cost is the header, which the next commit writes anew.
    pub(crate) fn clean(
        disk: &dyn Disk,
        name: &str,
        cache_bytes: usize,
    ) -> Result<Option<Self>, redb::Error> {
        let home = Arc::new(HomeFile::new(disk.open(name)?));
        let backend = HomeBackend(home.clone());
        let mut builder = Builder::new();
        builder.set_cache_size(cache_bytes).set_repair_callback(redb::RepairSession::abort);
        match caught(|| Ok(builder.create_with_backend(backend)?)) {
            Ok(database) => {
                let (database, home) = (Some(database), Some(home));
                Ok(Some(Self { database, home, created: false, repaired: false }))
            }
            Err(redb::Error::RepairAborted) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates a file, in place of whatever had the name.
    pub(crate) fn create(
        disk: &dyn Disk,
        name: &str,
        cache_bytes: usize,
    ) -> Result<Self, redb::Error> {
        Self::begin(HomeFile::new(disk.create(name)?), cache_bytes)
    }

    /// As [`OpenFile::create`], over the blocks of a file that has the name and means nothing any more.
    pub(crate) fn create_over(
        disk: &dyn Disk,
        name: &str,
        cache_bytes: usize,
    ) -> Result<Self, redb::Error> {
        Self::begin(HomeFile::over_blocks_of(disk.open(name)?), cache_bytes)
    }

    fn begin(home: HomeFile, cache_bytes: usize) -> Result<Self, redb::Error> {
        let home = Arc::new(home);
        let (database, _) = build(HomeBackend(home.clone()), cache_bytes)?;
        Ok(Self { database: Some(database), home: Some(home), created: true, repaired: false })
    }

    /// Opens a file without ever writing to it; repairs it in memory if it was not closed cleanly.
    pub(crate) fn overlaid(
        disk: &dyn Disk,
        name: &str,
        cache_bytes: usize,
    ) -> Result<Self, redb::Error> {
        Self::over(Overlay::new(disk.open(name)?)?, cache_bytes)
    }

    /// As [`OpenFile::overlaid`], over an overlay that is there.
    pub(crate) fn over(overlay: Overlay, cache_bytes: usize) -> Result<Self, redb::Error> {
        if overlay.len()? == 0 {
            return Err(redb::Error::Corrupted("the file is empty".into()));
        }
        let (database, repaired) = build(overlay, cache_bytes)?;
        Ok(Self { database: Some(database), home: None, created: false, repaired })
    }

    /// Whether it had to be repaired in memory, as it will be each time that it is opened.
    pub(crate) fn was_repaired(&self) -> bool {
        self.repaired
    }

    /// What it is written through.
    ///
    /// # Panics
    /// If it is never written.
    pub(crate) fn home(&self) -> &Arc<HomeFile> {
        self.home.as_ref().expect("a file that is appended to")
    }

    /// Bytes that it has taken of another's blocks, if it is written over some.
    pub(crate) fn reused_bytes(&self) -> Option<u64> {
        self.home.as_ref()?.reused_bytes()
    }

    /// Closes it. If this process made it, another may be written over its blocks for as long as what this
    /// gives is sound.
    pub(crate) fn close_reusable(self) -> Option<Soundness> {
        let home = self.home.clone().filter(|_| self.created);
        drop(self);
        Some(home?.soundness())
    }

    /// Checks every page. Changes nothing in a file that is whole.
    pub(crate) fn check(&mut self) -> Result<(), redb::Error> {
        let database = self.database.as_mut().expect("open until it is dropped");
        if caught(|| Ok(database.check_integrity()?))? {
            return Ok(());
        }
        Err(redb::Error::Corrupted("pages of it fail their checksums".into()))
    }

    /// Looks at the last commit.
    pub(crate) fn read<T>(
        &self,
        look: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        caught(|| look(&self.database().begin_read()?))
    }

    /// Changes something in one transaction, synced on return.
    pub(crate) fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        caught(|| {
            let transaction = self.database().begin_write()?;
            let result = change(&transaction)?;
            // Held over the commit, so that redb frees what this one gave up in the next one. Else it
            // changes its tables of freed pages a second time, in pages that the next one has to write.
            let _before = self.database().begin_read()?;
            transaction.commit()?;
            Ok(result)
        })
    }

    fn database(&self) -> &Database {
        self.database.as_ref().expect("open until it is dropped")
    }
}

impl Drop for OpenFile {
    /// Closes the file cleanly, unless something failed before.
    fn drop(&mut self) {
        let database = self.database.take();
        if self.home.is_none() {
            give_up(database.as_ref());
        }
        let close = || {
            drop(database);
            Ok(())
        };
        if let Err(error) = caught(close) {
            tracing::warn!(%error, "a file could not be closed");
        }
    }
}

/// Sees to it that closing writes nothing, where there is nothing to keep. redb would walk trees for
/// it that may be damaged, and a panic there, in the middle of its own closing, ends the process. What
/// it leaves alone is a database in which a panic has ended a transaction.
fn give_up(database: Option<&Database>) {
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let _transaction = database.map(Database::begin_write);
        resume_unwind(Box::new(()));
    }));
    debug_assert!(ended.is_err(), "it always ends in a panic");
}

/// Also says whether the file had to be repaired.
fn build(
    backend: impl StorageBackend,
    cache_bytes: usize,
) -> Result<(Database, bool), redb::Error> {
    let repaired = Arc::new(AtomicBool::new(false));
    let seen = repaired.clone();
    let mut builder = Builder::new();
    builder
        .set_cache_size(cache_bytes)
        .set_repair_callback(move |_| seen.store(true, Ordering::Relaxed));
    let database = caught(|| Ok(builder.create_with_backend(backend)?))?;
    Ok((database, repaired.load(Ordering::Relaxed)))
}

fn caught<T>(f: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, redb::Error> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let reason = panic.downcast_ref::<String>().map_or("a panic", String::as_str);
        Err(redb::Error::Corrupted(format!("redb gave up on it: {reason}")))
    })
}

/// Whether nothing that was done to a file has failed. Outlives the file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Soundness {
    /// What the first failure was: redb may only hand on a later one.
    failed: Arc<OnceLock<io::ErrorKind>>,
}

impl Soundness {
    pub(crate) fn is_sound(&self) -> bool {
        self.failed.get().is_none()
    }
}

/// A file that takes no write any more after the first failure.
#[derive(Debug)]
pub(crate) struct Fenced {
    file: Box<dyn StorageBackend>,
    soundness: Soundness,
}

impl Fenced {
    pub(crate) fn new(file: Box<dyn StorageBackend>) -> Self {
        Self { file, soundness: Soundness::default() }
    }

    pub(crate) fn soundness(&self) -> Soundness {
        self.soundness.clone()
    }

    fn guarded(&self, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if let Some(&kind) = self.soundness.failed.get() {
            return Err(io::Error::new(kind, "an earlier write to this file failed"));
        }
        write().inspect_err(|error| {
            let _ = self.soundness.failed.set(error.kind());
        })
    }
}

impl StorageBackend for Fenced {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.guarded(|| self.file.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.guarded(|| self.file.sync_data())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.guarded(|| self.file.write(offset, data))
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

const PAGE_BYTES: u64 = 4096;

/// A file under a layer of memory that keeps every write. It takes no lock either: the store has
/// one for the whole folder, and a process may open a file twice this way.
#[derive(Debug)]
pub(crate) struct Overlay {
    file: Box<dyn StorageBackend>,
    /// Whether what the device does not give is read as zeros.
    around_bad_sectors: bool,
    written: RwLock<Written>,
}

/// A sector is read so often before it counts as bad.
const READ_TRIES: usize = 3;

/// Whether the device says that it has lost what was to be read there.
pub(crate) fn is_bad_sector(error: &io::Error) -> bool {
    let bad = [Errno::IO, Errno::BADMSG, Errno::NODATA, Errno::ILSEQ];
    error.raw_os_error().is_some_and(|code| bad.iter().any(|bad| bad.raw_os_error() == code))
}

#[derive(Debug)]
struct Written {
    len: u64,
    /// What the file itself still shows; below its length once it was cut short.
    file_len: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Overlay {
    pub(crate) fn new(file: Box<dyn StorageBackend>) -> io::Result<Self> {
        let len = file.len()?;
        let written = Written { len, file_len: len, pages: BTreeMap::new() };
        Ok(Self { file, around_bad_sectors: false, written: RwLock::new(written) })
    }

    /// An overlay that shows zeros where the device has a bad sector, so that what is around it can be
    /// read. Only for what is under checksums that zeros do not fit.
    pub(crate) fn around_bad_sectors(file: Box<dyn StorageBackend>) -> io::Result<Self> {
        Ok(Self { around_bad_sectors: true, ..Self::new(file)? })
    }

    /// Copies what the file shows of `out.len()` bytes at `offset`, zeros past its end.
    fn read_file(&self, file_len: u64, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let there = file_len.saturating_sub(offset).min(out.len() as u64) as usize;
        let (there, beyond) = out.split_at_mut(there);
        beyond.fill(0);
        if there.is_empty() {
            return Ok(());
        }
        match self.file.read(offset, there) {
            Err(error) if self.around_bad_sectors && is_bad_sector(&error) => {
                self.read_around(offset, there)
            }
            result => result,
        }
    }

    /// Reads page by page, so that a bad sector costs its own page only.
    fn read_around(&self, mut offset: u64, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            let page_end = (offset / PAGE_BYTES + 1) * PAGE_BYTES;
            let (page, rest) = out.split_at_mut(out.len().min((page_end - offset) as usize));
            let mut result = self.file.read(offset, page);
            for _ in 1..READ_TRIES {
                if result.as_ref().is_err_and(is_bad_sector) {
                    result = self.file.read(offset, page);
                }
            }
            match result {
                Err(error) if is_bad_sector(&error) => {
                    tracing::error!(offset, %error, "a sector cannot be read");
                    page.fill(0);
                }
                result => result?,
            }
            (offset, out) = (page_end, rest);
        }
        Ok(())
    }
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written.read().unwrap_or_else(PoisonError::into_inner).len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.written.read().unwrap_or_else(PoisonError::into_inner);
        let end = offset + out.len() as u64;
        // A power cut may take back the length of a file and leave its header, by which there is more.
        // Zeros fit no checksum: redb goes back to the commit before.
        self.read_file(written.file_len, offset, out)?;
        for (&page, bytes) in written.pages.range(offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES)) {
            let page_start = page * PAGE_BYTES;
            let (from, to) = (offset.max(page_start), end.min(page_start + PAGE_BYTES));
            out[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&bytes[(from - page_start) as usize..(to - page_start) as usize]);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut written = self.written.write().unwrap_or_else(PoisonError::into_inner);
        if len < written.len {
            let keep = len / PAGE_BYTES;
            let mut cut = written.pages.split_off(&keep);
            if let Some(mut page) = cut.remove(&keep) {
                page[(len % PAGE_BYTES) as usize..].fill(0);
                written.pages.insert(keep, page);
            }
            written.file_len = written.file_len.min(len);
        }
        written.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.written.write().unwrap_or_else(PoisonError::into_inner);
        let end = offset + data.len() as u64;
        if end > written.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for page in offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES) {
            let page_start = page * PAGE_BYTES;
            let (from, to) = (offset.max(page_start), end.min(page_start + PAGE_BYTES));
            let mut bytes = vec![0; PAGE_BYTES as usize].into_boxed_slice();
            if let Some(kept) = written.pages.remove(&page) {
                bytes = kept;
            } else {
                self.read_file(written.file_len, page_start, &mut bytes)?;
            }
            bytes[(from - page_start) as usize..(to - page_start) as usize]
                .copy_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
            written.pages.insert(page, bytes);
        }
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

/// A disk to share.
pub type SharedDisk = Arc<dyn Disk>;
