//! What can still be read of a log file whose tree is damaged.
//!
//! A flipped byte in a page of redb's tree can hide everything below it, and a file that was not
//! closed cleanly is not even opened then. But each batch says by itself where it stands and what it
//! holds, under checksums of its own. So the file is read from end to end without redb, and every
//! batch whose head is sound is taken from where it lies: what is lost is exactly what is damaged.
//!
//! Invariants:
//! - nothing is taken that no checksum vouches for;
//! - copies of a batch in pages that redb has given up are the batch itself; where two batches claim
//!   the same offset and differ (one of a commit that failed and left no other trace), neither is
//!   believed;
//! - memory is a few words a batch, none for what they hold.
//!
//! Deliberately absent: commits. Of the last transaction before a crash some batches may be there
//! and others not; none of it was acked.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::ControlFlow;

use bytes::Bytes;
use redb::StorageBackend;

use crate::batch::{self, Batch, BatchHead};
use crate::disk::Overlay;
use crate::head::{self, BadHead, Head, Position};

/// Searched at once.
const WINDOW_BYTES: usize = 1 << 20;
/// What has to be at hand behind a magic number to read the head that it begins.
const HEAD_BYTES_MAX: usize = if batch::HEAD_BYTES_MAX > head::ROW_BYTES_MAX {
    batch::HEAD_BYTES_MAX
} else {
    head::ROW_BYTES_MAX
};

/// How both magic numbers begin.
const MAGIC_START: &[u8] = b"EG";

/// See the module.
pub(crate) struct Salvaged {
    file: Overlay,
    head: Result<Head, BadHead>,
    batches: BTreeMap<Position, Place>,
}

/// Where a batch lies.
#[derive(Clone, Copy)]
struct Place {
    at: u64,
    row_bytes: usize,
    /// End-exclusive offset of its events.
    end: u64,
    /// Tells copies from contradictions: it covers the checksum of the body.
    head_crc: u32,
    /// Whether the body fits its checksum.
    sound: bool,
    contradicted: bool,
}

impl Salvaged {
    /// Searches the file that starts at the offset `first`.
    pub(crate) fn search(file: Overlay, first: u64) -> Result<Self, redb::Error> {
        let mut found = Self { file, head: Err(BadHead::Corrupt), batches: BTreeMap::new() };
        let len = found.file.len()?;
        let mut start = 0;
        let mut window = Vec::new();
        while start < len {
            let in_window = (len - start).min((WINDOW_BYTES + HEAD_BYTES_MAX) as u64) as usize;
            window.resize(in_window, 0);
            found.file.read(start, &mut window)?;
            for at in memchr::memmem::find_iter(&window, MAGIC_START) {
                let bytes = &window[at..];
                if at >= WINDOW_BYTES {
                    break;
                } else if bytes.starts_with(&batch::MAGIC) {
                    found.batch(start + at as u64, bytes, first)?;
                } else if bytes.starts_with(&head::MAGIC) {
                    found.head_row(bytes, first);
                }
            }
            start += WINDOW_BYTES as u64;
        }
        found.resolve();
        Ok(found)
    }

    fn head_row(&mut self, bytes: &[u8], first: u64) {
        match Head::decode_front(bytes) {
            Ok(head) if head.tail.position.offset == first => self.head = Ok(head),
            Err(BadHead::Newer(format)) => self.head = Err(BadHead::Newer(format)),
            _ => {}
        }
    }

    /// Takes a batch in, if there is one at this place of the file.
    fn batch(&mut self, at: u64, bytes: &[u8], first: u64) -> Result<(), redb::Error> {
        let Ok(head) = BatchHead::decode(bytes) else {
            return Ok(());
        };
        let (position, row_bytes) = (head.position(), head.row_bytes());
        if position.offset < first || self.file.len()? < at + row_bytes as u64 {
            return Ok(());
        }
        let row = match bytes.get(..row_bytes) {
            Some(row) => Bytes::copy_from_slice(row),
            None => self.row(at, row_bytes)?.into(),
        };
        let (end, head_crc) = (head.end(), head.crc());
        let sound = Batch::decode(row).is_ok();
        let place = Place { at, row_bytes, end, head_crc, sound, contradicted: false };
        match self.batches.entry(position) {
            Entry::Vacant(free) => {
                free.insert(place);
            }
            Entry::Occupied(mut taken) => {
                let taken = taken.get_mut();
                if taken.head_crc != head_crc {
                    taken.contradicted = true;
                    taken.end = taken.end.max(end);
                } else if !taken.sound {
                    *taken = Place { contradicted: taken.contradicted, ..place };
                }
            }
        }
        Ok(())
    }

    /// Drops what another batch contradicts: the offsets of sound ones do not overlap.
    fn resolve(&mut self) {
        let mut before: Option<(Position, u64)> = None;
        let mut contradicted = Vec::new();
        for (&position, place) in &self.batches {
            if place.contradicted {
                contradicted.push(position);
            }
            if let Some((other, end)) = before
                && position.offset < end
            {
                contradicted.extend([other, position]);
            }
            if before.is_none_or(|(_, end)| end < place.end) {
                before = Some((position, place.end));
            }
        }
        for position in contradicted {
            self.batches.remove(&position);
        }
    }

    fn row(&self, at: u64, row_bytes: usize) -> Result<Vec<u8>, redb::Error> {
        let mut row = vec![0; row_bytes];
        self.file.read(at, &mut row)?;
        Ok(row)
    }

    pub(super) fn head(&self) -> Result<Head, BadHead> {
        self.head.clone()
    }

    /// Number of batches that were found.
    pub(super) fn batches(&self) -> u64 {
        self.batches.len() as u64
    }

    /// As [`super::sealed::rows`].
    pub(super) fn rows(
        &self,
        start: Position,
        end: Position,
        mut f: impl FnMut(Position, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), redb::Error> {
        for (&position, place) in self.batches.range(start..end) {
            if f(position, &self.row(place.at, place.row_bytes)?).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// As [`super::sealed::floor`].
    pub(super) fn floor(&self, offset: u64) -> Position {
        let last = Position { offset, ordinal: u32::MAX };
        let before = self.batches.range(..=last).next_back();
        before.map_or(Position::at(offset), |(&position, _)| position)
    }
}
