//! Packs events and control records into batches that fill their pages.
//!
//! Owns: where a batch is cut, and the buffers that are kept from one batch to the next.
//! Invariant: what is packed decodes to a prefix of what was given, and says how long that is.

use zerocopy::{FromBytes, IntoBytes};

use super::interned::Interned;
use super::{
    BATCH_BYTES_MAX, CONTROL_CURSOR, CONTROL_DELETE, CONTROL_PUT, GROUP_BYTES, Group, HEAD_CRC_END,
    HEADER_BYTES, Header, MAGIC, PAGE_BYTES, PLAIN, PLAIN_BYTES_MAX, ROW_OVERHEAD_BYTES, STAMPED,
    STAMPS_BYTES, Stamps,
};
use crate::clock::Clock;
use crate::codec::Compression;
use crate::control::Control;
use crate::event::Event;
use crate::head::{Position, Tail};
use crate::row::{put_bytes, put_number};

/// From this many bytes on, a batch that leaves a quarter of its pages empty is cut in two. Below,
/// the second batch would need as many pages as it saves.
const CUT_BYTES_MIN: usize = 2 * PAGE_BYTES;

/// Packs events and control records into batches. Keeps its buffers from one batch to the next.
pub(crate) struct Encoder {
    head: Vec<u8>,
    body: Vec<u8>,
    /// Partitions in the order in which they occur in the batch.
    groups: Vec<u16>,
    /// Place of each partition in `groups`.
    group_of: Vec<u16>,
    keys: Interned,
    topics: Interned,
    attributes: Interned,
    /// Body length and number of groups after each record: where the batch could be cut.
    marks: Vec<(usize, usize)>,
    /// Bytes of the last plain batch, and of the events in it.
    before: (usize, usize),
    /// What gave the times of the events.
    clock: Option<Clock>,
    /// Bytes of the head of the batch at work before its groups.
    fixed_bytes: usize,
    /// What filled the last compressed batch.
    learnt_bytes_max: usize,
}

const NO_GROUP: u16 = u16::MAX;

/// Where to cut a batch that would take a row of so many bytes and leave a quarter of its pages empty.
fn cut_bytes(row_bytes: usize) -> Option<usize> {
    let pages_bytes = row_bytes.next_power_of_two();
    let cut = row_bytes <= BATCH_BYTES_MAX
        && row_bytes > CUT_BYTES_MIN
        && row_bytes <= pages_bytes / 4 * 3;
    cut.then(|| pages_bytes / 2 - ROW_OVERHEAD_BYTES)
}

/// One batch, ready to be stored: head, then body.
pub(crate) struct Packed<'a> {
    pub(crate) position: Position,
    pub(crate) head: &'a [u8],
    pub(crate) body: &'a [u8],
    /// How many events of the slice it took.
    pub(crate) events: usize,
    /// How many control records of the slice it took.
    pub(crate) controls: usize,
}

impl Encoder {
    pub(crate) fn new(partitions: u16) -> Self {
        Self {
            head: Vec::new(),
            body: Vec::with_capacity(BATCH_BYTES_MAX),
            groups: Vec::new(),
            group_of: vec![NO_GROUP; usize::from(partitions)],
            keys: Interned::default(),
            topics: Interned::default(),
            attributes: Interned::default(),
            marks: Vec::new(),
            before: (0, 0),
            clock: None,
            fixed_bytes: HEADER_BYTES,
            learnt_bytes_max: BATCH_BYTES_MAX,
        }
    }

    /// What gives the times of the events from here on.
    pub(crate) fn set_clock(&mut self, clock: Option<Clock>) {
        self.clock = clock;
    }

    /// Packs the next batch from the front of `events` and, once those are used up, of `controls`,
    /// and moves the tail past it. At least one of the two must hold something.
    ///
    /// # Panics
    /// If an event's partition is not below the store's number of partitions.
    pub(crate) fn pack(
        &mut self,
        events: &[Event],
        controls: &[Control],
        tail: &mut Tail,
    ) -> Packed<'_> {
        let bytes_max = self.foreseen_bytes_max(events);
        let (position, events, controls) = self.gather(events, controls, bytes_max, true, tail);
        self.seal(Compression::None);
        Packed { position, head: &self.head, body: &self.body, events, controls }
    }

    /// As [`Encoder::pack`], compressed where that makes it smaller.
    pub(crate) fn pack_compressed(
        &mut self,
        events: &[Event],
        compression: Compression,
        tail: &mut Tail,
    ) -> Packed<'_> {
        if compression == Compression::None {
            return self.pack(events, &[], tail);
        }
        let mut plain_bytes_max = self.learnt_bytes_max;
        loop {
            let mut moved = tail.clone();
            let (position, taken, _) = self.gather(events, &[], plain_bytes_max, false, &mut moved);
            let plain_bytes = self.body.len();
            let packed = compression.pack(&self.body).filter(|packed| packed.len() < plain_bytes);
            let stored_bytes = self.head.len() + packed.as_ref().map_or(plain_bytes, Vec::len);
            if stored_bytes > BATCH_BYTES_MAX && taken > 1 {
                plain_bytes_max = plain_bytes.min(plain_bytes_max) / 8 * 7;
                continue;
            }
            match packed {
                Some(packed) => {
                    // The next one is much like this one; a little less, so that it seldom takes two
                    // tries.
                    let fills =
                        plain_bytes * (BATCH_BYTES_MAX - self.head.len()) / packed.len().max(1);
                    plain_bytes_max = (fills / 32 * 31).clamp(BATCH_BYTES_MAX, PLAIN_BYTES_MAX);
                    self.body.clear();
                    self.body.extend_from_slice(&packed);
                    self.seal(compression);
                }
                None => self.seal(Compression::None),
            }
            *tail = moved;
            self.learnt_bytes_max = plain_bytes_max;
            return Packed {
                position,
                head: &self.head,
                body: &self.body,
                events: taken,
                controls: 0,
            };
        }
    }

    /// Says in the head how the body is stored, and signs it.
    fn seal(&mut self, compression: Compression) {
        let (header, _) = Header::mut_from_prefix(&mut self.head).expect("a head was written");
        header.codec = compression.number();
        header.body_bytes = (self.body.len() as u32).into();
        header.body_crc = crc32c::crc32c(&self.body).into();
        let head_crc = crc32c::crc32c(&self.head[HEAD_CRC_END..]);
        self.head[4..HEAD_CRC_END].copy_from_slice(&head_crc.to_le_bytes());
    }

    /// The most that a plain batch of these events may take. If they are like those before, they are
    /// cut where [`Encoder::cut`] would cut them, before the rest is encoded for nothing.
    fn foreseen_bytes_max(&self, events: &[Event]) -> usize {
        let (row_bytes, event_bytes) = self.before;
        if event_bytes == 0 {
            return BATCH_BYTES_MAX;
        }
        let mut left_bytes = BATCH_BYTES_MAX * event_bytes / row_bytes;
        for event in events {
            match left_bytes.checked_sub(event.size_bytes()) {
                Some(left) => left_bytes = left,
                // It will be full.
                None => return BATCH_BYTES_MAX,
            }
        }
        let foreseen = BATCH_BYTES_MAX - left_bytes * row_bytes / event_bytes;
        cut_bytes(foreseen + ROW_OVERHEAD_BYTES).unwrap_or(BATCH_BYTES_MAX)
    }

    /// Encodes the next batch into `body`, and all but the checksums into `head`. Gives its position
    /// and how many events and control records it took.
    fn gather(
        &mut self,
        events: &[Event],
        controls: &[Control],
        bytes_max: usize,
        plain: bool,
        tail: &mut Tail,
    ) -> (Position, usize, usize) {
        assert!(!events.is_empty() || !controls.is_empty(), "an empty batch");
        self.clear();
        let first_us = events.first().map_or(0, |e| e.received_us);
        let received_min_us = if events.is_empty() { 0 } else { first_us.max(tail.received_us) };
        let stamps = self.clock.filter(|_| !events.is_empty()).map(|clock| Stamps {
            boot: clock.boot.into(),
            uptime_us: clock.uptime_us(first_us).into(),
            time_us: first_us.into(),
            synchronised: clock.synchronised.into(),
        });
        self.fixed_bytes = HEADER_BYTES + if stamps.is_some() { STAMPS_BYTES } else { 0 };
        // The time of the clock, or the receive time where there is none.
        let mut received_us = if stamps.is_some() { first_us } else { received_min_us };
        for event in events {
            received_us = self.record(event, received_us);
            let size_bytes = self.size_bytes();
            if size_bytes > bytes_max && !self.marks.is_empty() {
                break;
            }
            self.marks.push((self.body.len(), self.groups.len()));
        }
        let taken = self.cut(plain && self.marks.len() == events.len());
        let taken_events = &events[..taken];
        let (mut event_bytes, mut received_max_us) = (0, received_min_us);
        let mut counts = vec![0_u32; self.groups.len()];
        for event in taken_events {
            event_bytes += event.size_bytes() as u64;
            received_max_us = received_max_us.max(event.received_us);
            counts[usize::from(self.group_of[usize::from(event.partition)])] += 1;
        }
        let records_bytes = self.body.len();
        if plain && taken > 0 {
            self.before = (self.size_bytes(), event_bytes as usize);
        }
        let controls_taken = if taken == events.len() { self.controls(controls) } else { 0 };

        let position = tail.position;
        let header = Header {
            magic: u32::from_le_bytes(MAGIC).into(),
            head_crc: 0.into(),
            version: if stamps.is_some() { STAMPED } else { PLAIN },
            codec: Compression::None.number(),
            groups: (self.groups.len() as u16).into(),
            count: (taken as u32).into(),
            offset: position.offset.into(),
            ordinal: position.ordinal.into(),
            received_min_us: received_min_us.into(),
            received_max_us: received_max_us.into(),
            event_bytes_before: tail.event_bytes.into(),
            event_bytes: event_bytes.into(),
            controls: (controls_taken as u32).into(),
            records_bytes: (records_bytes as u32).into(),
            body_bytes: 0.into(),
            body_crc: 0.into(),
        };
        self.head.extend_from_slice(header.as_bytes());
        if let Some(stamps) = &stamps {
            self.head.extend_from_slice(stamps.as_bytes());
        }
        for (&partition, &count) in self.groups.iter().zip(&counts) {
            let next_seq = &mut tail.next_seq[usize::from(partition)];
            let group = Group {
                partition: partition.into(),
                count: count.into(),
                base_seq: (*next_seq).into(),
            };
            *next_seq += u64::from(count);
            self.head.extend_from_slice(group.as_bytes());
        }

        tail.position = position.after(taken as u32);
        tail.event_bytes += event_bytes;
        if taken > 0 {
            tail.received_us = received_max_us;
        }
        (position, taken, controls_taken)
    }

    fn clear(&mut self) {
        self.head.clear();
        self.body.clear();
        for partition in self.groups.drain(..) {
            self.group_of[usize::from(partition)] = NO_GROUP;
        }
        self.keys.clear();
        self.topics.clear();
        self.attributes.clear();
        self.marks.clear();
    }

    fn size_bytes(&self) -> usize {
        self.fixed_bytes + self.groups.len() * GROUP_BYTES + self.body.len()
    }

    /// Appends one record; returns its time, which is not below that of the one before.
    fn record(&mut self, event: &Event, before_us: u64) -> u64 {
        let received_us = event.received_us.max(before_us);
        put_number(&mut self.body, received_us - before_us);

        let group = self.group(event.partition);
        self.keys.put(&mut self.body, event.device_key.as_bytes(), Some(group));
        self.topics.put(&mut self.body, event.topic.as_bytes(), None);
        self.attributes.put(&mut self.body, event.attributes.as_bytes(), None);
        put_bytes(&mut self.body, &event.payload);
        received_us
    }

    fn group(&mut self, partition: u16) -> u16 {
        let group = &mut self.group_of[usize::from(partition)];
        if *group == NO_GROUP {
            *group = self.groups.len() as u16;
            self.groups.push(partition);
        }
        *group
    }

    /// Drops what does not belong into this batch, and its end where two batches fill their pages
    /// better. Returns how many records stay.
    fn cut(&mut self, in_two: bool) -> usize {
        let Some(&(body_bytes, groups)) = self.marks.last() else {
            return 0;
        };
        let mut keep = self.marks.len();
        let row_bytes = self.fixed_bytes + groups * GROUP_BYTES + body_bytes + ROW_OVERHEAD_BYTES;
        if in_two && let Some(half) = cut_bytes(row_bytes) {
            keep = self.marks.partition_point(|&(body_bytes, groups)| {
                self.fixed_bytes + groups * GROUP_BYTES + body_bytes <= half
            });
            keep = if keep == 0 { self.marks.len() } else { keep };
        }
        let (body_bytes, groups) = self.marks[keep - 1];
        self.body.truncate(body_bytes);
        for partition in self.groups.drain(groups..) {
            self.group_of[usize::from(partition)] = NO_GROUP;
        }
        keep
    }

    /// Appends control records while they fit, at least one if there is nothing else.
    fn controls(&mut self, controls: &[Control]) -> usize {
        for (taken, control) in controls.iter().enumerate() {
            let before = self.body.len();
            put_control(&mut self.body, control);
            if self.size_bytes() > BATCH_BYTES_MAX && before > 0 {
                self.body.truncate(before);
                return taken;
            }
        }
        controls.len()
    }
}

fn put_control(out: &mut Vec<u8>, control: &Control) {
    match control {
        Control::Cursor { sink, offset } => {
            out.push(CONTROL_CURSOR);
            put_bytes(out, sink.as_bytes());
            put_number(out, *offset);
        }
        Control::Put { namespace, key, value } => {
            out.push(CONTROL_PUT);
            put_number(out, u64::from(*namespace));
            put_bytes(out, key);
            put_bytes(out, value);
        }
        Control::Delete { namespace, key } => {
            out.push(CONTROL_DELETE);
            put_number(out, u64::from(*namespace));
            put_bytes(out, key);
        }
    }
}
