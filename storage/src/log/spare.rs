//! The spare: a trimmed file whose blocks the next one is written over.
//!
//! A file that grows has the file system journal every block that it gives out, with the sync that a
//! commit waits for. Over blocks that are there and were written before, a sync writes the pages of the
//! commit and nothing else. So a trimmed file may become the spare (`log/spare`), of which there is one
//! at most, and the next file begins as the spare: its length starts at nothing and grows as redb asks,
//! over blocks that it finds there, and when it is sealed what it has not taken is cut off.
//! The spare counts as used, and goes first when room is needed; but against the quota of a log that drops
//! its oldest it does not count (see `store::room`).
//!
//! Why nothing of the old file is ever taken for the new one's:
//! - *The name.* Nothing reads a file called `log/spare`, and an open removes it. A new file gets its own
//!   name only once its head row is synced; redb writes a header without its magic number before the one
//!   with it, a sync each, so by then the old header is gone. Its commits are acked only once that name is
//!   synced too, and with it, as both lie in one folder, the loss of the old one. Until then a power cut
//!   may leave the blocks under either of the names that they had before. Under the old file's that does
//!   no harm: the checkpoint said before that the log starts behind it, and the open removes such a file
//!   without a look at it.
//! - *The tree.* After a crash redb believes a page only if the checksum in the page above it fits, up
//!   to the root in its commit slot. An old page in the place of one that was not written fits only if
//!   it is the same byte by byte. redb asks nothing else of a page that it has not written: it takes up
//!   pages again that it has freed.
//! - *The length.* A file that a crash leaves is longer than redb grew it to. redb then lays it out anew
//!   by its length, and what its trees do not reach is free: it expects that of a crash between growing
//!   or cutting a file and the commit for which it did so. What it cannot bear is a file shorter than its
//!   header says: this one only shrinks when it is closed, to the length that redb left it at.
//! - *Salvage* believes every sound batch in the file, and passes over those below its first offset
//!   (see `salvage`). Those of the old file all are: it was made by this process and nothing of it has
//!   failed, so that it never held more than the events up to where the next one began, perhaps with
//!   control records behind them, over what was below its own first offset; and the new file does not
//!   start there either, as long as it does not take over from a file without events. One that does is not
//!   written over the spare. What an earlier process has left in its files it knows not: those are unlinked.
//! - *Readers.* Whoever reads a sealed file counts as its reader until done. A file that is being read is
//!   unlinked, and stays there for its reader; from one that is out of the list nobody begins to read.
//! - *The journal* has let go of the old file: the ring holds nothing of it, and its last sync has come
//!   back, so that it is known whether anything has failed. A record of the new file says how long that is,
//!   and a replay makes it so; where the ring has none of it, its length is as above.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Log, LogFile};
use crate::disk::Soundness;
use crate::ranges::Ranges;

/// What the spare is called.
pub(super) const NAME: &str = "log/spare";

const PAGE_BYTES: u64 = 4096;

/// What a file that is written over another's blocks has of its own.
#[derive(Debug, Default)]
pub(crate) struct Reused {
    /// As redb knows it. The file is not shorter.
    len: AtomicU64,
    /// Pages that were written.
    written: Mutex<Ranges>,
}

impl Reused {
    pub(crate) fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    pub(crate) fn set_len(&self, len: u64) {
        self.len.store(len, Ordering::Relaxed);
    }

    pub(crate) fn note_written(&self, offset: u64, len: usize) {
        let pages = offset / PAGE_BYTES..(offset + len as u64).div_ceil(PAGE_BYTES);
        self.written.lock().unwrap_or_else(PoisonError::into_inner).insert(pages);
    }

    /// Bytes of the pages that were written: what the file would take on the device by itself.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.written.lock().unwrap_or_else(PoisonError::into_inner).count() * PAGE_BYTES
    }
}

impl Log {
    /// Whether a file that is out of the list can become the spare.
    fn may_be_spare(&self, file: &LogFile) -> bool {
        file.reusable.as_ref().is_some_and(Soundness::is_sound)
            && self.is_settled(file.first)
            && self.spare_bytes() == 0
            && !self.is_distrusted(file.first)
            && Arc::strong_count(&file.readers) == 1
    }

    /// Sees to it that a file that is out of the list is gone: it becomes the spare, or is unlinked.
    pub(super) fn remove(&self, file: &LogFile) -> io::Result<()> {
        let may_be_spare = self.may_be_spare(file);
        self.forget(file.first);
        if !may_be_spare {
            return self.disk.remove(&file.name());
        }
        self.disk.rename(&file.name(), NAME)?;
        self.spare_bytes.store(self.disk.used_bytes(NAME), Ordering::Relaxed);
        Ok(())
    }

    /// Bytes that the spare takes on the device; 0 if there is none.
    pub(crate) fn spare_bytes(&self) -> u64 {
        self.spare_bytes.load(Ordering::Relaxed)
    }

    /// Says whether there is a spare, which from here on is the caller's.
    pub(super) fn take_spare(&self) -> bool {
        self.spare_bytes.swap(0, Ordering::Relaxed) > 0
    }

    /// Whether the active file is written over another's blocks.
    #[cfg(test)]
    pub(crate) fn is_over_spare(&self) -> bool {
        self.files().active.as_ref().is_some_and(|active| active.reused_bytes().is_some())
    }

    /// Removes the spare, because its room is needed. Says whether there was one.
    pub(crate) fn remove_spare(&self) -> bool {
        let there = self.take_spare();
        if there && let Err(error) = self.disk.remove(NAME) {
            tracing::warn!(path = %self.disk.path(NAME).display(), %error,
                "cannot remove a log file that is no longer needed; the next start tries again");
        }
        there
    }
}
