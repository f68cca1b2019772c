//! A disk that is only looked at: a store that is opened on it finds what `run` would find, and
//! changes nothing.
//!
//! Invariant: nothing reaches the disk below. What redb or the store would write, the repair after
//! a crash included, stays in memory for as long as the handle that wrote it.
//! Deliberately absent: files that are read back under another handle than the one that wrote them.
//! Nobody appends to a store on this disk, so there are none.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use redb::StorageBackend;
use redb::backends::InMemoryBackend;

use crate::disk::{Disk, Overlay, SharedDisk};

#[derive(Debug)]
pub(crate) struct Frozen(pub(crate) SharedDisk);

impl Disk for Frozen {
    fn open(&self, name: &str) -> io::Result<Box<dyn StorageBackend>> {
        Ok(Box::new(Overlay::new(self.0.open(name)?)?))
    }

    fn create(&self, _name: &str) -> io::Result<Box<dyn StorageBackend>> {
        Ok(Box::new(InMemoryBackend::new()))
    }

    fn rename(&self, _from: &str, _to: &str) -> io::Result<()> {
        Ok(())
    }

    fn remove(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.0.list(folder)
    }

    fn reserve(&self, _name: &str, _range: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.0.free_bytes()
    }

    fn used_bytes(&self, name: &str) -> u64 {
        self.0.used_bytes(name)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }
}
