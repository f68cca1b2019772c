//! A log file under redb, whose writes go through the journal once it has joined one.
//!
//! It may be written over another's blocks: then its length is what redb grows it to, and the rest is cut
//! off when it is closed and home (see `log::spare`).
//!
//! Before that, and without a journal, it is the file itself. Afterwards the file has a layer over it
//! that reads see first: the writes of the transaction at work (the draft), then the records that
//! are not home yet, the newest first, then the file.
//!
//! Invariants: the file itself is written by the journal only; a length is a promise of the record
//! that carries it, so the file grows and shrinks only when that record comes home; the room for
//! what is written is taken before the commit, because later there is nobody to refuse.

use std::collections::BTreeSet;
use std::io;
use std::ops::{Bound, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use redb::{BackendError, StorageBackend};

use super::homeward::Homeward;
use super::record::{Draft, Look, Record};
use super::ring::Ring;
use crate::disk::{Fenced, SharedDisk, Soundness};
use crate::log::{self, Reused};

/// Room is taken in pieces of this size.
const RESERVE_BYTES: u64 = 1 << 20;

/// See the module.
#[derive(Debug)]
pub(crate) struct HomeFile {
    file: Fenced,
    /// If it is written over another's blocks.
    reused: Option<Reused>,
    joined: OnceLock<Joined>,
}

struct Joined {
    ring: Arc<Ring>,
    disk: SharedDisk,
    /// Its first offset, which names it.
    first: u64,
    /// As redb knows it.
    len: AtomicU64,
    /// As the file has it.
    home_len: AtomicU64,
    /// Pieces that room was taken for.
    reserved: Mutex<BTreeSet<u64>>,
    draft: Mutex<Draft>,
}

impl std::fmt::Debug for Joined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Joined({})", self.first)
    }
}

impl Joined {
    fn draft(&self) -> MutexGuard<'_, Draft> {
        self.draft.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes room for the pieces that a range of the file lies in, and for none between: redb puts single
    /// pages at the far end of a file that it has just doubled.
    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        for piece in range.start / RESERVE_BYTES..range.end.div_ceil(RESERVE_BYTES) {
            if !reserved.contains(&piece) {
                let start = piece * RESERVE_BYTES;
                self.disk.reserve(&log::name(self.first), start..start + RESERVE_BYTES)?;
                reserved.insert(piece);
            }
        }
        Ok(())
    }
}

impl HomeFile {
    pub(crate) fn new(file: Box<dyn StorageBackend>) -> Self {
        Self { file: Fenced::new(file), reused: None, joined: OnceLock::new() }
    }

    /// An empty file, over the blocks of one that means nothing any more.
    pub(crate) fn over_blocks_of(file: Box<dyn StorageBackend>) -> Self {
        Self { reused: Some(Reused::default()), ..Self::new(file) }
    }

    /// Bytes that it has taken of another's blocks, if it is written over some.
    pub(crate) fn reused_bytes(&self) -> Option<u64> {
        self.reused.as_ref().map(Reused::used_bytes)
    }

    pub(crate) fn soundness(&self) -> Soundness {
        self.file.soundness()
    }

    /// From now on writes go through the journal.
    pub(super) fn join(&self, disk: SharedDisk, first: u64, ring: Arc<Ring>) -> io::Result<()> {
        let (len, home_len) = (self.len()?, self.file.len()?);
        let joined = Joined {
            draft: Mutex::new(Draft::new(ring.spare())),
            ring,
            disk,
            first,
            len: len.into(),
            home_len: home_len.into(),
            reserved: Mutex::default(),
        };
        assert!(self.joined.set(joined).is_ok(), "a file joins one journal, once");
        Ok(())
    }

    /// Writes what durable records leave of it.
    pub(super) fn bring_home(&self, homeward: &Homeward<'_>) -> io::Result<()> {
        self.shrink(homeward.len_min)?;
        self.grow_and_write(homeward)
    }

    /// Makes a record durable here: see "Large transactions" in the journal. What it cuts off the file
    /// is needed by the state before it, until the sync has come back.
    pub(super) fn write_through(&self, record: &Arc<Record>) -> io::Result<()> {
        self.grow_and_write(&Homeward::of(std::slice::from_ref(record)))?;
        self.sync()?;
        self.shrink(record.file_len)
    }

    fn grow_and_write(&self, homeward: &Homeward<'_>) -> io::Result<()> {
        let joined = self.joined();
        if joined.home_len.load(Ordering::Acquire) < homeward.len {
            self.file.set_len(homeward.len)?;
            joined.home_len.store(homeward.len, Ordering::Release);
        }
        homeward.writes().try_for_each(|(offset, data)| self.write_file(offset, data))
    }

    fn shrink(&self, len: u64) -> io::Result<()> {
        let joined = self.joined();
        // Blocks of another's are kept until it is closed.
        if self.reused.is_none() && len < joined.home_len.load(Ordering::Acquire) {
            joined.home_len.store(len, Ordering::Release);
            self.file.set_len(len)?;
        }
        Ok(())
    }

    fn joined(&self) -> &Joined {
        self.joined.get().expect("its records come from the journal")
    }

    /// Syncs what is home.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Reads the file itself, zeros past its end.
    fn read_home(&self, joined: &Joined, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let home_len = joined.home_len.load(Ordering::Acquire);
        let there = home_len.saturating_sub(offset).min(out.len() as u64) as usize;
        let (there, beyond) = out.split_at_mut(there);
        beyond.fill(0);
        if there.is_empty() { Ok(()) } else { self.file.read(offset, there) }
    }

    fn len(&self) -> io::Result<u64> {
        match (self.joined.get(), &self.reused) {
            (Some(joined), _) => Ok(joined.len.load(Ordering::Relaxed)),
            (None, Some(reused)) => Ok(reused.len()),
            (None, None) => self.file.len(),
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let Some(joined) = self.joined.get() else {
            return self.file.read(offset, out);
        };
        if offset + out.len() as u64 > joined.len.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Held over both looks: in between, a draft could become a record and be missed.
        let draft = joined.draft();
        let look = match draft.look(offset, out) {
            Look::Nothing => joined.ring.look(joined.first, offset, out),
            look => look,
        };
        match look {
            Look::Whole => Ok(()),
            Look::Nothing => {
                // What comes home meanwhile is no page that anybody reads: redb writes to none that
                // a reader can see.
                drop(draft);
                self.read_home(joined, offset, out)
            }
            Look::Part => {
                let read_home = |out: &mut [u8]| self.read_home(joined, offset, out);
                joined.ring.merge(joined.first, offset, out, read_home)?;
                draft.apply(offset, out);
                Ok(())
            }
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match (self.joined.get(), &self.reused) {
            (Some(joined), _) => joined.len.store(len, Ordering::Relaxed),
            (None, Some(reused)) => {
                if self.file.len()? < len {
                    self.file.set_len(len)?;
                }
                reused.set_len(len);
            }
            (None, None) => self.file.set_len(len)?,
        }
        Ok(())
    }

    /// Gives back what it has not taken of another's blocks. All of it must be home.
    pub(crate) fn cut_rest(&self) -> io::Result<()> {
        let len = self.len()?;
        if self.reused.is_some() && len < self.file.len()? {
            self.file.set_len(len)
        } else {
            Ok(())
        }
    }

    fn write_file(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)?;
        if let Some(reused) = &self.reused {
            reused.note_written(offset, data.len());
        }
        Ok(())
    }

    /// The end of a transaction: hands its writes to the journal, or syncs the file.
    fn commit(&self) -> io::Result<()> {
        let Some(joined) = self.joined.get() else {
            return self.file.sync_data();
        };
        {
            // Held until the record can be seen: a reader finds the writes in one of the two.
            let mut open = joined.draft();
            if open.is_empty() {
                return Ok(());
            }
            let draft = std::mem::replace(&mut *open, Draft::new(joined.ring.spare()));
            let len = joined.len.load(Ordering::Relaxed);
            joined.ring.enqueue(draft.finish(joined.first, len))?;
        }
        joined.ring.wait_for_room()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let Some(joined) = self.joined.get() else {
            return self.write_file(offset, data);
        };
        joined.reserve(offset..offset + data.len() as u64)?;
        joined.draft().write(offset, data);
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        match self.joined.get() {
            None => {
                let cut = self.cut_rest();
                self.file.close().and(cut)
            }
            Some(joined) => {
                joined.ring.closed(joined.first);
                Ok(())
            }
        }
    }
}

/// A home file as redb's backend.
#[derive(Debug)]
pub(crate) struct HomeBackend(pub(crate) Arc<HomeFile>);

impl StorageBackend for HomeBackend {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.commit()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.0.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.file.query_lock_range(start, end)
    }
}
