//! Reads events from an offset on, over the ends of files and over what is damaged.
//!
//! Invariant: every offset below the watermark is among the events or among what is corrupt, exactly.

use std::ops::{ControlFlow, Range};

use bytes::Bytes;

use super::sealed::{floor, rows};
use super::{Log, LogError};
use crate::batch::{Batch, BatchHead};
use crate::event::StoredEvent;
use crate::head::Position;

/// What a read found.
#[derive(Default)]
pub(crate) struct Found {
    pub(crate) events: Vec<StoredEvent>,
    /// Everything before this offset was read or is in `corrupt`.
    pub(crate) next: u64,
    /// Offsets that should be there and cannot be read.
    pub(crate) corrupt: Vec<Range<u64>>,
    /// Where the file that is read ends.
    end: u64,
    events_max: usize,
    size_bytes: usize,
    size_bytes_max: usize,
    /// The next event would pass a limit.
    full: bool,
}

impl Log {
    /// Events from `from` on, below the watermark: at least one if there is any, else at most
    /// `events_max` and about `size_bytes_max` event bytes.
    pub(crate) fn read(
        &self,
        from: u64,
        watermark: u64,
        events_max: usize,
        size_bytes_max: usize,
    ) -> Result<Found, LogError> {
        let mut found = Found { next: from, events_max, size_bytes_max, ..Found::default() };
        while !found.full && found.next < watermark {
            let (offset, before) = (found.next, found.mark());
            let read = self.with_file(offset, |source, file_end| {
                found.end = file_end.min(watermark);
                let (start, end) = (floor(source, found.next)?, Position::at(found.end));
                rows(source, start, end, |_, row| found.row(row))
            });
            match read {
                Err(error) if !error.is_damage() => return Err(error),
                _ => {}
            }
            if !found.full {
                found.skip_to(self.file_end(offset).min(watermark));
            }
            // What the tree does not show may be there all the same.
            if found.corrupt.len() > before.corrupt && self.distrust(offset)? {
                found.back_to(&before);
            }
        }
        Ok(found)
    }

    /// The batch that holds the event at `offset` or, if that one is gone, the next readable one
    /// below the watermark.
    pub(crate) fn batch_at(&self, offset: u64, watermark: u64) -> Result<Option<Bytes>, LogError> {
        let mut from = offset;
        while from < watermark {
            let mut batch = None;
            let read = self.with_file(from, |source, file_end| {
                let end = Position::at(file_end.min(watermark));
                rows(source, floor(source, from)?, end, |_, row| {
                    if BatchHead::decode(row).is_ok_and(|head| head.end() > from) {
                        batch = Some(Bytes::copy_from_slice(row));
                        return ControlFlow::Break(());
                    }
                    ControlFlow::Continue(())
                })
            });
            match read {
                Err(error) if !error.is_damage() => return Err(error),
                _ if batch.is_some() => return Ok(batch),
                _ => from = self.file_end(from),
            }
        }
        Ok(None)
    }
}

/// How far a read was, see [`Found::back_to`].
struct FoundMark {
    events: usize,
    next: u64,
    corrupt: usize,
    size_bytes: usize,
}

impl Found {
    /// Takes a stored batch in, by what its checked head says rather than by its key.
    fn row(&mut self, row: &[u8]) -> ControlFlow<()> {
        // Of a batch without a sound head, the one after it shows what was lost.
        let Ok(head) = BatchHead::decode(row) else {
            return ControlFlow::Continue(());
        };
        if head.end() <= self.next || head.end() > self.end {
            return ControlFlow::Continue(());
        }
        // Batches are dense: what is missing in front of this one could not be read.
        self.skip_to(head.position().offset);
        let Ok(batch) = Batch::decode(Bytes::copy_from_slice(row)) else {
            self.skip_to(head.end());
            return ControlFlow::Continue(());
        };
        for event in batch.events(self.next) {
            let Ok(event) = event else { break };
            let size_bytes = event.event.size_bytes();
            let fits = self.events.len() < self.events_max
                && self.size_bytes.saturating_add(size_bytes) <= self.size_bytes_max;
            if !fits && !self.events.is_empty() {
                self.full = true;
                return ControlFlow::Break(());
            }
            self.size_bytes += size_bytes;
            self.next = event.offset + 1;
            self.events.push(event);
        }
        self.skip_to(head.end());
        ControlFlow::Continue(())
    }

    fn mark(&self) -> FoundMark {
        FoundMark {
            events: self.events.len(),
            next: self.next,
            corrupt: self.corrupt.len(),
            size_bytes: self.size_bytes,
        }
    }

    /// Forgets what was found since.
    fn back_to(&mut self, mark: &FoundMark) {
        self.events.truncate(mark.events);
        self.corrupt.truncate(mark.corrupt);
        (self.next, self.size_bytes, self.full) = (mark.next, mark.size_bytes, false);
    }

    /// Notes everything before `offset` that was not read as lost.
    fn skip_to(&mut self, offset: u64) {
        if self.next < offset {
            self.corrupt.push(self.next..offset);
            self.next = offset;
        }
    }
}
