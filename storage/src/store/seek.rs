//! From a sequence number or a time to the offset to read on from.
//!
//! Invariant: offsets, a partition's sequence numbers and receive times all rise together, so that
//! each place has one answer; where it was trimmed, the answer is the first stored event after it.

use bytes::Bytes;

use super::{ReadError, Store, StoredEvent};
use crate::batch::{Batch, BatchHead};
use crate::log::Span;

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
    /// one that fits; the watermark if there is none yet. An offset that is stored is taken as it is.
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

    /// Halves the log: each step reads one event. Where the clock was set, the times as they are known
    /// by now and those that the log holds differ, and the first place of the two is the answer: rather
    /// events of before than one that is missing.
    fn seek_received(&self, us: u64, start: u64, watermark: u64) -> Result<u64, ReadError> {
        let halve = |end, time_us: &dyn Fn(&StoredEvent) -> u64| {
            let (mut low, mut high, mut found) = (start, end, end);
            while low < high {
                let middle = low.midpoint(high);
                let (read, _) = self.find(middle, 1, 1)?;
                match read.events.first().filter(|event| event.offset < watermark) {
                    Some(event) if time_us(event) < us => low = event.offset + 1,
                    // Nothing readable at or after the middle: what is wanted can only be before it.
                    event => {
                        found = event.map_or(found, |event| event.offset);
                        high = middle;
                    }
                }
            }
            Ok::<_, ReadError>(found)
        };
        let stored = halve(watermark, &|event| event.event.received_us)?;
        halve(stored, &StoredEvent::received_us)
    }

    /// Finds the file by the head rows, then asks for one batch after the other. By its offset, not
    /// by where it lies: the file may be packed anew meanwhile, or trimmed.
    fn seek_seq(&self, partition: u16, seq: u64, watermark: u64) -> Result<u64, ReadError> {
        let log = &self.shared.log;
        let spans = log.spans(watermark);
        let at = usize::from(partition);
        let begins_at_or_before = |span: &&Span| {
            let head = log.summary(span.offsets.start).ok().and_then(|summary| summary.head.ok());
            let before = head.and_then(|head| head.tail.next_seq.get(at).copied());
            before.is_some_and(|before| before <= seq)
        };
        let span = spans.iter().rev().find(begins_at_or_before).or(spans.first());
        let mut from = span.map_or(watermark, |span| span.offsets.start);
        while from < watermark {
            let batch = log.batch_at(from, watermark)?;
            let head = batch.as_deref().and_then(|batch| BatchHead::decode(batch).ok());
            let (first, end) =
                head.map_or((watermark, watermark), |h| (h.position().offset, h.end()));
            // What the tree does not show may be there all the same.
            if first > from && log.distrust(from)? {
                continue;
            }
            if let Some(offset) = batch.and_then(|batch| first_seq(batch, partition, seq)) {
                return Ok(offset);
            }
            from = end;
        }
        Ok(watermark)
    }
}

/// Offset of the first event of the partition in this batch that has at least this number.
fn first_seq(batch: Bytes, partition: u16, seq: u64) -> Option<u64> {
    let head = BatchHead::decode(&batch).ok()?;
    let (_, base, count) = head.partitions().find(|(p, ..)| *p == partition)?;
    if base + u64::from(count) <= seq {
        return None;
    }
    let fits = |event: &StoredEvent| event.event.partition == partition && event.seq >= seq;
    let batch = Batch::decode(batch).ok()?;
    batch.events(0).map_while(Result::ok).find(fits).map(|event| event.offset)
}
