//! From a sequence number or a time to the offset to read on from.
//!
//! Invariant: offsets, a partition's sequence numbers and receive times all rise together, so that
//! each place has one answer; where it was trimmed, the answer is the first stored event after it.

use super::{ReadError, Store};
use crate::StoredEvent;
use crate::batch::{Batch, BatchHead};
use crate::head::Position;

/// A place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// This offset.
    Offset(u64),
    /// The first event that was received at or after this time, microseconds since the Unix epoch.
    Received(u64),
    /// The first event of this partition with this sequence number or a later one.
    Seq {
        /// Partition.
        partition: u16,
        /// Sequence number.
        seq: u64,
    },
}

impl Store {
    /// The offset of a place: of the event there or, if that was trimmed or is damaged, of the next
    /// one that fits; the watermark if there is none yet.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn seek(&self, place: Place) -> Result<u64, ReadError> {
        let watermark = self.mark().watermark;
        let start = self.shared.progress.projection().start;
        match place {
            Place::Offset(offset) => Ok(offset.clamp(start, watermark)),
            Place::Received(us) => self.seek_received(us, start, watermark),
            Place::Seq { partition, seq } => self.seek_seq(partition, seq, watermark),
        }
    }

    /// Halves the log: each step reads one batch. Where the clock was set, the times as they are known
    /// by now and those that the log holds differ, and the first place of the two is the answer: rather
    /// events of before than one that is missing.
    fn seek_received(&self, us: u64, start: u64, watermark: u64) -> Result<u64, ReadError> {
        let halve = |mut high, time_us: &dyn Fn(&StoredEvent) -> u64| {
            let mut low = start;
            while low < high {
                let middle = low + (high - low) / 2;
                // Nothing readable at or after the middle: what is wanted can only be before it.
                let event = self.shared.event_at(middle)?;
                if event.is_some_and(|event| time_us(&event) < us) {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            Ok::<_, ReadError>(low)
        };
        let stored = halve(watermark, &|event| event.event.received_us)?;
        halve(stored, &StoredEvent::received_us)
    }

    /// Finds the file by the head rows, then walks the heads of its batches.
    fn seek_seq(&self, partition: u16, seq: u64, watermark: u64) -> Result<u64, ReadError> {
        let log = &self.shared.log;
        let spans = log.spans(watermark);
        let at = usize::from(partition);
        let mut from = 0;
        for (place, span) in spans.iter().enumerate().rev() {
            let head = log.summary(span.offsets.start).ok().and_then(|summary| summary.head.ok());
            let before = head.and_then(|head| head.tail.next_seq.get(at).copied());
            if before.is_some_and(|before| before <= seq) {
                from = place;
                break;
            }
        }
        for span in &spans[from..] {
            let mut found = None;
            let mut next = Some(Position::at(span.offsets.start));
            while let (Some(position), None) = (next, found) {
                let walked = log.walk(position..Position::at(span.offsets.end), |_, row| {
                    found = found.or_else(|| first_seq(row, partition, seq));
                });
                next = match walked {
                    Ok(next) => next,
                    Err(error) if error.is_damage() => None,
                    Err(error) => return Err(error.into()),
                };
            }
            if let Some(offset) = found {
                return Ok(offset);
            }
        }
        Ok(watermark)
    }
}

/// Offset of the first event of the partition in this batch that has at least this number.
fn first_seq(row: &[u8], partition: u16, seq: u64) -> Option<u64> {
    let head = BatchHead::decode(row).ok()?;
    let (_, base, count) = head.partitions().find(|(p, ..)| *p == partition)?;
    if base + u64::from(count) <= seq {
        return None;
    }
    let batch = Batch::decode(row.to_vec().into()).ok()?;
    let fits = |event: &crate::StoredEvent| event.event.partition == partition && event.seq >= seq;
    batch.events(0).map_while(Result::ok).find(fits).map(|event| event.offset)
}
