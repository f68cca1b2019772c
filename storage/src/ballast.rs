//! A file that only takes room, so that there is some left when the disk is full.
//!
//! redb writes copies, so even moving a cursor or trimming a file needs room first: without any, a
//! full disk would stay full for ever. At the first sign of a full disk the ballast goes. In its
//! room cursors move, the checkpoint is written and files are trimmed; events are taken again once
//! the ballast is back.
//!
//! Invariant: while the ballast is not held, nothing is written but what helps to make room.

use std::io;
use std::path::PathBuf;

use crate::disk::SharedDisk;

const NAME: &str = "ballast";

/// What the ballast takes at least: room for a new log file, some cursor moves and a checkpoint.
const SIZE_BYTES_MIN: u64 = 4 << 20;

/// Written at once. Not zeros: a file system must not compress the ballast away.
const PIECE_BYTES: usize = 256 << 10;

/// The ballast of a store.
pub(crate) struct Ballast {
    disk: SharedDisk,
    /// What is held, 0 for nothing.
    size_bytes: u64,
}

impl Ballast {
    /// The ballast of a store that is being opened: an earlier one is taken as it is.
    pub(crate) fn find(disk: SharedDisk) -> Self {
        let size_bytes = disk.used_bytes(NAME);
        Self { disk, size_bytes }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> PathBuf {
        self.disk.path(NAME)
    }

    /// Sees to it that the ballast is there, with room for a copy of `state_bytes` as well: a state
    /// database to which a write failed is copied before it takes another.
    ///
    /// # Errors
    /// There is no room for it, and none of it is left.
    pub(crate) fn hold(&mut self, state_bytes: u64) -> io::Result<()> {
        let wanted_bytes = SIZE_BYTES_MIN + state_bytes;
        if self.size_bytes < wanted_bytes {
            let written = self.write(self.size_bytes, wanted_bytes);
            self.size_bytes = written.inspect_err(|_| self.release())?;
        }
        Ok(())
    }

    /// Gives its room back.
    pub(crate) fn release(&mut self) {
        self.size_bytes = 0;
        if let Err(error) = self.disk.remove(NAME) {
            tracing::warn!(path = %self.path().display(), %error, "cannot remove the ballast");
        }
    }

    /// Goes on from one length to at least another. Returns what it came to.
    fn write(&self, from_bytes: u64, to_bytes: u64) -> io::Result<u64> {
        let mut random = fastrand::Rng::with_seed(0);
        let mut piece = vec![0; PIECE_BYTES];
        random.fill(&mut piece);
        let file = match from_bytes {
            0 => self.disk.create(NAME)?,
            _ => self.disk.open(NAME)?,
        };
        let mut len_bytes = from_bytes;
        while len_bytes < to_bytes {
            file.write(len_bytes, &piece)?;
            len_bytes += PIECE_BYTES as u64;
        }
        file.sync_data()?;
        file.close()?;
        Ok(len_bytes)
    }
}
