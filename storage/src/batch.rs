//! The batch: the packed, checksummed unit of append, one row of the log. Pure.
//!
//! ```text
//! head  = fixed header, then the stamps if there are any, then one group per partition that occurs:
//!         its base sequence number, count
//! body  = records in offset order, then control records
//! record = time since the record before · device key · topic · attributes · payload
//! ```
//!
//! Numbers in the body are LEB128 variable-length integers. A device key, a topic or a run of
//! attributes is written out where it first occurs and referred to by number after that; a key
//! carries its partition with it, so that a record spends no byte on either. A prefix of the
//! records is thus itself a valid run of records, and a batch can be cut after any of them.
//!
//! Invariants:
//! - offset order = slice order, and a partition's sequence numbers rise with it;
//! - receive times never go backwards, within a batch or from one to the next; the times of a stamped
//!   batch are those of one clock, which says in the stamps where it stood, and where those before are
//!   later its receive times are raised to them;
//! - the head has a checksum of its own, so that a damaged body still says exactly which offsets
//!   and sequence numbers it held; every byte is under one of the two checksums;
//! - decoding never panics, whatever the bytes.
//!
//! redb gives a row larger than a page 2^k pages, so batches are cut where they fill them. A compressed
//! one (see `codec`) has records only and takes as many as fill them then; both checksums are of what is
//! stored.
//! Deliberately absent: where a batch is stored.

use std::hash::{BuildHasher, Hasher};
use std::ops::Range;

use bytes::Bytes;
use bytestring::ByteString;
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::clock::{Clock, Stamp, TimeQuality};
use crate::codec::Compression;
use crate::control::Control;
use crate::event::{Attributes, Event, StoredEvent};
use crate::head::{Position, Tail};
use crate::row::{Corrupt, Reader, put_bytes, put_number};

/// First bytes of every batch.
pub(crate) const MAGIC: [u8; 4] = *b"EGba";
/// A batch without stamps, which is all that the first format knew.
const PLAIN: u8 = 1;
/// A batch with stamps.
const STAMPED: u8 = 2;

const PAGE_BYTES: usize = 4096;
/// What redb adds to a row that has its pages for itself: page header, key, length of the value.
const ROW_OVERHEAD_BYTES: usize = 24;
/// Largest batch, unless a single event or control record is larger.
const BATCH_BYTES_MAX: usize = 16 * PAGE_BYTES - ROW_OVERHEAD_BYTES;
/// Most that is compressed into one batch, so that reading one event takes little memory.
const PLAIN_BYTES_MAX: usize = 8 * BATCH_BYTES_MAX;
/// From this many bytes on, a batch that leaves a quarter of its pages empty is cut in two. Below,
/// the second batch would need as many pages as it saves.
const CUT_BYTES_MIN: usize = 2 * PAGE_BYTES;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: U32,
    /// Of the head after this field.
    head_crc: U32,
    version: u8,
    codec: u8,
    groups: U16,
    count: U32,
    offset: U64,
    ordinal: U32,
    received_min_us: U64,
    received_max_us: U64,
    event_bytes_before: U64,
    event_bytes: U64,
    controls: U32,
    records_bytes: U32,
    body_bytes: U32,
    body_crc: U32,
}

const HEAD_CRC_END: usize = 8;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Group {
    partition: U16,
    count: U32,
    base_seq: U64,
}

/// Where the clock stood that gave the times.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct Stamps {
    boot: U64,
    /// Uptime at the first event.
    uptime_us: U64,
    /// Time of the first event. Its receive time is in the header, and may be later.
    time_us: U64,
    synchronised: u8,
}

const HEADER_BYTES: usize = size_of::<Header>();
const STAMPS_BYTES: usize = size_of::<Stamps>();
const GROUP_BYTES: usize = size_of::<Group>();
/// The longest head, with every partition that a store can have.
pub(crate) const HEAD_BYTES_MAX: usize = HEADER_BYTES + STAMPS_BYTES + 1024 * GROUP_BYTES;

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

/// Reference number of a value that is written out here.
const DEFINE: u64 = 0;

/// Values that occurred in the batch, numbered from 1. They are not copied: a value is found by
/// where it was written out.
#[derive(Default)]
struct Interned {
    values: HashTable<Defined>,
    /// The one that was put last: a run of the same costs no search.
    last: Option<Defined>,
    defined: u64,
    /// Seeded, because devices choose what is hashed.
    hasher: RandomState,
}

/// A value that is written out in the body.
#[derive(Clone)]
struct Defined {
    hash: u64,
    number: u64,
    group: Option<u16>,
    place: Range<usize>,
}

impl Defined {
    fn is(&self, body: &[u8], value: &[u8], group: Option<u16>) -> bool {
        self.group == group && &body[self.place.clone()] == value
    }
}

impl Interned {
    /// Appends the number of a value that occurred, with the same group; else the value itself.
    fn put(&mut self, body: &mut Vec<u8>, value: &[u8], group: Option<u16>) {
        if let Some(last) = &self.last
            && last.is(body, value, group)
        {
            return put_number(body, last.number);
        }
        let mut hasher = self.hasher.build_hasher();
        hasher.write(value);
        let hash = hasher.finish();
        if let Some(known) = self.values.find(hash, |known| known.is(body, value, group)) {
            self.last = Some(known.clone());
            return put_number(body, known.number);
        }
        self.defined += 1;
        put_number(body, DEFINE);
        if let Some(group) = group {
            put_number(body, u64::from(group));
        }
        put_bytes(body, value);
        let place = body.len() - value.len()..body.len();
        let defined = Defined { hash, number: self.defined, group, place };
        self.last = Some(defined.clone());
        self.values.insert_unique(hash, defined, |known| known.hash);
    }

    fn clear(&mut self) {
        self.values.clear();
        self.last = None;
        self.defined = 0;
    }
}

const CONTROL_CURSOR: u8 = 1;
const CONTROL_PUT: u8 = 2;
const CONTROL_DELETE: u8 = 3;

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

/// The head of a batch: what it holds, without what its body says.
#[derive(Clone, Copy)]
pub(crate) struct BatchHead<'a> {
    header: &'a Header,
    stamps: Option<&'a Stamps>,
    groups: &'a [Group],
}

impl<'a> BatchHead<'a> {
    /// Reads and checks the head of a stored batch.
    pub(crate) fn decode(batch: &'a [u8]) -> Result<Self, Corrupt> {
        let (header, rest) = Header::ref_from_prefix(batch).map_err(|_| Corrupt)?;
        if header.magic.get().to_le_bytes() != MAGIC {
            return Err(Corrupt);
        }
        let groups = usize::from(header.groups.get());
        let (stamps, rest) = match header.version {
            PLAIN => (None, rest),
            STAMPED => {
                let (stamps, rest) = Stamps::ref_from_prefix(rest).map_err(|_| Corrupt)?;
                (Some(stamps), rest)
            }
            _ => return Err(Corrupt),
        };
        let (groups, _) =
            <[Group]>::ref_from_prefix_with_elems(rest, groups).map_err(|_| Corrupt)?;
        let decoded = Self { header, stamps, groups };
        let head = &batch[HEAD_CRC_END..decoded.head_bytes()];
        if header.head_crc.get() != crc32c::crc32c(head) {
            return Err(Corrupt);
        }
        Ok(decoded)
    }

    /// Bytes of the head: where the body begins.
    fn head_bytes(&self) -> usize {
        let stamps_bytes = if self.stamps.is_some() { STAMPS_BYTES } else { 0 };
        HEADER_BYTES + stamps_bytes + self.groups.len() * GROUP_BYTES
    }

    /// Where it stands.
    pub(crate) fn position(&self) -> Position {
        Position { offset: self.header.offset.get(), ordinal: self.header.ordinal.get() }
    }

    /// Number of events.
    pub(crate) fn count(&self) -> u32 {
        self.header.count.get()
    }

    /// End-exclusive offset.
    pub(crate) fn end(&self) -> u64 {
        self.position().offset.saturating_add(u64::from(self.count()))
    }

    /// Bytes of the whole batch, head and body.
    pub(crate) fn row_bytes(&self) -> usize {
        self.head_bytes() + self.header.body_bytes.get() as usize
    }

    /// Checksum of the head, which covers that of the body.
    pub(crate) fn crc(&self) -> u32 {
        self.header.head_crc.get()
    }

    /// Event bytes appended in the store's life before this batch.
    pub(crate) fn event_bytes_before(&self) -> u64 {
        self.header.event_bytes_before.get()
    }

    /// Event bytes in this batch.
    pub(crate) fn event_bytes(&self) -> u64 {
        self.header.event_bytes.get()
    }

    /// Receive times of its first and last event.
    pub(crate) fn received_us(&self) -> (u64, u64) {
        (self.header.received_min_us.get(), self.header.received_max_us.get())
    }

    /// Partition, first sequence number and number of events of each partition that occurs.
    pub(crate) fn partitions(&self) -> impl Iterator<Item = (u16, u64, u32)> {
        self.groups.iter().map(|g| (g.partition.get(), g.base_seq.get(), g.count.get()))
    }

    /// Moves the tail past this batch. Sequence numbers never go back.
    pub(crate) fn advance(&self, tail: &mut Tail) {
        tail.position = self.position().after(self.count());
        tail.event_bytes = self.event_bytes_before().saturating_add(self.event_bytes());
        if self.count() > 0 {
            tail.received_us = tail.received_us.max(self.header.received_max_us.get());
        }
        for group in self.groups {
            if let Some(next_seq) = tail.next_seq.get_mut(usize::from(group.partition.get())) {
                let end = group.base_seq.get().saturating_add(u64::from(group.count.get()));
                *next_seq = end.max(*next_seq);
            }
        }
    }
}

/// A bound on the number of events in a batch whose head cannot be trusted, so that it may be
/// compressed: a record takes at least one byte for each of its five parts.
pub(crate) fn events_max(batch_bytes: usize) -> u64 {
    batch_bytes.max(PLAIN_BYTES_MAX) as u64 / 5
}

/// A whole batch, checked.
pub(crate) struct Batch {
    bytes: Bytes,
    body_start: usize,
}

impl Batch {
    /// Checks a stored batch. Everything decoded from it shares `bytes`.
    pub(crate) fn decode(bytes: Bytes) -> Result<Self, Corrupt> {
        let head = BatchHead::decode(&bytes)?;
        let body_start = head.head_bytes();
        let body = &bytes[body_start..];
        let header = head.header;
        if body.len() != header.body_bytes.get() as usize
            || header.body_crc.get() != crc32c::crc32c(body)
        {
            return Err(Corrupt);
        }
        let records_bytes = header.records_bytes.get() as usize;
        match Compression::of(header.codec).ok_or(Corrupt)? {
            Compression::None if records_bytes <= body.len() => Ok(Self { bytes, body_start }),
            Compression::None => Err(Corrupt),
            compression => {
                if header.controls.get() != 0 {
                    return Err(Corrupt);
                }
                let plain = compression.unpack(body, records_bytes)?;
                let bytes = [&bytes[..body_start], &plain].concat().into();
                Ok(Self { bytes, body_start })
            }
        }
    }

    /// Its head.
    pub(crate) fn head(&self) -> BatchHead<'_> {
        const CHECKED: &str = "the head was checked when it was decoded";
        let (header, rest) = Header::ref_from_prefix(&self.bytes).expect(CHECKED);
        let (stamps, rest) = if header.version == STAMPED {
            let (stamps, rest) = Stamps::ref_from_prefix(rest).expect(CHECKED);
            (Some(stamps), rest)
        } else {
            (None, rest)
        };
        let groups = usize::from(header.groups.get());
        let (groups, _) = <[Group]>::ref_from_prefix_with_elems(rest, groups).expect(CHECKED);
        BatchHead { header, stamps, groups }
    }

    /// What gave the times of its events.
    pub(crate) fn clock(&self) -> Option<Clock> {
        let stamps = self.head().stamps?;
        let (time_us, uptime_us) = (stamps.time_us.get(), stamps.uptime_us.get());
        Some(Clock {
            boot: stamps.boot.get(),
            offset_us: time_us.cast_signed().wrapping_sub(uptime_us.cast_signed()),
            synchronised: stamps.synchronised != 0,
        })
    }

    /// Its events at or after the offset `from`, in offset order. Ends early with an error if the
    /// records do not add up, which a matching checksum rules out but for a forged batch.
    pub(crate) fn events(&self, from: u64) -> Events {
        let head = self.head();
        let records_end = self.body_start + head.header.records_bytes.get() as usize;
        Events {
            reader: Reader::new(&self.bytes, self.body_start..records_end),
            from,
            offset: head.position().offset,
            left: head.count(),
            received_min_us: head.header.received_min_us.get(),
            time_us: head
                .stamps
                .map_or(head.header.received_min_us.get(), |stamps| stamps.time_us.get()),
            stamps: head.stamps.copied(),
            partitions: head
                .groups
                .iter()
                .map(|group| (group.partition.get(), group.base_seq.get()))
                .collect(),
            keys: Vec::new(),
            topics: Vec::new(),
            attributes: Vec::new(),
        }
    }

    /// Its control records, in order.
    pub(crate) fn controls(&self) -> Result<Vec<Control>, Corrupt> {
        let header = self.head().header;
        let start = self.body_start + header.records_bytes.get() as usize;
        let mut reader = Reader::new(&self.bytes, start..self.bytes.len());
        (0..header.controls.get()).map(|_| control(&mut reader)).collect()
    }
}

impl Stamps {
    /// Of an event at this time of the clock.
    fn stamp(&self, time_us: u64) -> Stamp {
        let since_us = time_us.saturating_sub(self.time_us.get());
        let quality = match self.synchronised {
            0 => TimeQuality::Unsynchronised,
            _ => TimeQuality::Synchronised,
        };
        Stamp {
            boot: self.boot.get(),
            uptime_us: self.uptime_us.get().saturating_add(since_us),
            received_us: time_us,
            quality,
        }
    }
}

/// The events of a batch.
pub(crate) struct Events {
    reader: Reader,
    from: u64,
    offset: u64,
    left: u32,
    /// Receive time that none is below.
    received_min_us: u64,
    /// Time of the last record.
    time_us: u64,
    stamps: Option<Stamps>,
    /// Partition and next sequence number of each group.
    partitions: Vec<(u16, u64)>,
    /// Device keys seen, each with its group.
    keys: Vec<(ByteString, usize)>,
    topics: Vec<ByteString>,
    attributes: Vec<Bytes>,
}

impl Iterator for Events {
    type Item = Result<StoredEvent, Corrupt>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            self.left -= 1;
            match self.record() {
                Ok(Some(event)) => return Some(Ok(event)),
                Ok(None) => {}
                Err(corrupt) => {
                    self.left = 0;
                    return Some(Err(corrupt));
                }
            }
        }
        None
    }
}

impl Events {
    /// The next record, or nothing if it lies before `from`.
    fn record(&mut self) -> Result<Option<StoredEvent>, Corrupt> {
        let reader = &mut self.reader;
        self.time_us = self.time_us.checked_add(reader.number()?).ok_or(Corrupt)?;
        let key = match reader.number()? {
            DEFINE => {
                let group = usize::try_from(reader.number()?).map_err(|_| Corrupt)?;
                self.keys.push((reader.string()?, group));
                self.keys.len() - 1
            }
            reference => index(reference)?,
        };
        let topic = match reader.number()? {
            DEFINE => {
                self.topics.push(reader.string()?);
                self.topics.len() - 1
            }
            reference => index(reference)?,
        };
        let attributes = match reader.number()? {
            DEFINE => {
                self.attributes.push(reader.bytes()?);
                self.attributes.len() - 1
            }
            reference => index(reference)?,
        };
        let payload = reader.range()?;

        let (device_key, group) = self.keys.get(key).ok_or(Corrupt)?;
        let (partition, next_seq) = self.partitions.get_mut(*group).ok_or(Corrupt)?;
        let seq = *next_seq;
        *next_seq = seq.checked_add(1).ok_or(Corrupt)?;
        let offset = self.offset;
        self.offset = offset.checked_add(1).ok_or(Corrupt)?;
        if offset < self.from {
            return Ok(None);
        }
        Ok(Some(StoredEvent {
            offset,
            seq,
            event: Event {
                partition: *partition,
                received_us: self.received_min_us.max(self.time_us),
                device_key: device_key.clone(),
                topic: self.topics.get(topic).ok_or(Corrupt)?.clone(),
                attributes: Attributes::from_bytes(
                    self.attributes.get(attributes).ok_or(Corrupt)?.clone(),
                ),
                payload: reader.slice(payload),
            },
            stamp: self.stamps.map(|stamps| stamps.stamp(self.time_us)),
        }))
    }
}

fn index(reference: u64) -> Result<usize, Corrupt> {
    usize::try_from(reference - 1).map_err(|_| Corrupt)
}

fn control(reader: &mut Reader) -> Result<Control, Corrupt> {
    match reader.byte()? {
        CONTROL_CURSOR => Ok(Control::Cursor { sink: reader.string()?, offset: reader.number()? }),
        CONTROL_PUT => Ok(Control::Put {
            namespace: reader.u16()?,
            key: reader.bytes()?,
            value: reader.bytes()?,
        }),
        CONTROL_DELETE => Ok(Control::Delete { namespace: reader.u16()?, key: reader.bytes()? }),
        _ => Err(Corrupt),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::event::Attribute;

    const PARTITIONS: u16 = 8;
    const START_US: u64 = 1_700_000_000_000_000;

    fn start() -> Tail {
        Tail {
            position: Position { offset: 1000, ordinal: 2 },
            received_us: START_US,
            event_bytes: 5,
            next_seq: (0..u64::from(PARTITIONS)).map(|p| p * 100).collect(),
        }
    }

    /// Up for ten seconds, of which it makes 1.7 billion.
    fn clock(synchronised: bool) -> Clock {
        Clock { boot: 77, offset_us: START_US.cast_signed() - 10_000_000, synchronised }
    }

    fn clocks() -> impl Strategy<Value = Option<Clock>> {
        proptest::option::of(any::<bool>().prop_map(clock))
    }

    /// Everything as batches, each head and body in one.
    fn pack_all(events: &[Event], controls: &[Control], tail: &mut Tail) -> Vec<Bytes> {
        pack_stamped(None, events, controls, tail)
    }

    fn pack_stamped(
        clock: Option<Clock>,
        mut events: &[Event],
        mut controls: &[Control],
        tail: &mut Tail,
    ) -> Vec<Bytes> {
        let mut encoder = Encoder::new(PARTITIONS);
        encoder.set_clock(clock);
        let mut batches = Vec::new();
        while !events.is_empty() || !controls.is_empty() {
            let packed = encoder.pack(events, controls, tail);
            batches.push(Bytes::from([packed.head, packed.body].concat()));
            events = &events[packed.events..];
            controls = &controls[packed.controls..];
        }
        batches
    }

    fn event_of(
        (partition, key, topic): (u16, u8, u8),
        (received, attribute, payload): (u64, u8, Vec<u8>),
    ) -> Event {
        Event {
            partition,
            received_us: START_US - 500 + received,
            device_key: format!("dev-{key}").into(),
            topic: format!("devices/dev-{key}/{topic}").into(),
            attributes: Attributes::encode([Attribute::QoS(attribute)]),
            payload: payload.into(),
        }
    }

    fn events(max: usize, payload_max: usize) -> impl Strategy<Value = Vec<Event>> {
        let place = (0..PARTITIONS, 0..6_u8, 0..3_u8);
        let rest = (0..1000_u64, 0..3_u8, vec(any::<u8>(), 0..payload_max));
        vec((place, rest).prop_map(|(place, rest)| event_of(place, rest)), 0..max)
    }

    fn controls(max: usize, value_max: usize) -> impl Strategy<Value = Vec<Control>> {
        let bytes = |max| vec(any::<u8>(), 0..max).prop_map(Bytes::from);
        let control = prop_oneof![
            ("[a-z]{0,8}", any::<u64>())
                .prop_map(|(sink, offset)| Control::Cursor { sink: sink.into(), offset }),
            (any::<u16>(), bytes(20), bytes(value_max))
                .prop_map(|(namespace, key, value)| { Control::Put { namespace, key, value } }),
            (any::<u16>(), bytes(20))
                .prop_map(|(namespace, key)| Control::Delete { namespace, key }),
        ];
        vec(control, 0..max)
    }

    /// What must come out: dense offsets, dense sequence numbers, receive times raised.
    fn expected(events: &[Event], tail: &Tail) -> Vec<StoredEvent> {
        expected_of(None, events, tail)
    }

    /// As [`expected`]; the times of the clock may be below those before the batch.
    fn expected_of(clock: Option<Clock>, events: &[Event], tail: &Tail) -> Vec<StoredEvent> {
        let mut time_us = 0;
        let (mut next_seq, mut received_us) = (tail.next_seq.clone(), tail.received_us);
        (tail.position.offset..)
            .zip(events)
            .map(|(offset, event)| {
                received_us = received_us.max(event.received_us);
                let seq = &mut next_seq[usize::from(event.partition)];
                *seq += 1;
                time_us = time_us.max(event.received_us);
                let stamp = clock.map(|clock| Stamp {
                    boot: 77,
                    uptime_us: 10_000_000 + time_us - START_US,
                    received_us: time_us,
                    quality: TimeQuality::ALL[usize::from(!clock.synchronised)],
                });
                let event = Event { received_us, ..event.clone() };
                StoredEvent { offset, seq: *seq - 1, event, stamp }
            })
            .collect()
    }

    fn decode_all(batches: &[Bytes]) -> (Vec<StoredEvent>, Vec<Control>) {
        let mut all = (Vec::new(), Vec::new());
        for batch in batches {
            let batch = Batch::decode(batch.clone()).unwrap();
            all.0.extend(batch.events(0).map(Result::unwrap));
            all.1.extend(batch.controls().unwrap());
        }
        all
    }

    proptest! {
        #[test]
        fn what_is_packed_comes_back(
            clock in clocks(),
            mut events in events(300, 600),
            controls in controls(40, 4000),
        ) {
            if clock.is_some() {
                // A clock does not go back; the times of several may.
                events.sort_by_key(|event| event.received_us);
            }
            let (before, mut tail) = (start(), start());
            let batches = pack_stamped(clock, &events, &controls, &mut tail);
            let (got_events, got_controls) = decode_all(&batches);
            prop_assert_eq!(got_events, expected_of(clock, &events, &before));
            prop_assert_eq!(got_controls, controls);

            // Heads alone lead to the same tail, and each batch knows where it stands.
            let mut replayed = before.clone();
            for batch in &batches {
                let head = BatchHead::decode(batch).unwrap();
                prop_assert_eq!(head.position(), replayed.position);
                prop_assert_eq!(head.event_bytes_before(), replayed.event_bytes);
                prop_assert!(u64::from(head.count()) <= events_max(batch.len()));
                prop_assert!(batch.len() <= BATCH_BYTES_MAX);
                head.advance(&mut replayed);
            }
            prop_assert_eq!(&replayed, &tail);
            let event_bytes: usize = events.iter().map(Event::size_bytes).sum();
            prop_assert_eq!(tail.event_bytes - before.event_bytes, event_bytes as u64);
        }

        #[test]
        fn reading_may_start_at_any_offset(events in events(60, 40), skip in 0..80_u64) {
            let mut tail = start();
            let from = tail.position.offset + skip;
            let expected = expected(&events, &tail);
            let mut got = Vec::new();
            for batch in pack_all(&events, &[], &mut tail) {
                got.extend(Batch::decode(batch).unwrap().events(from).map(Result::unwrap));
            }
            prop_assert_eq!(got, expected.into_iter().filter(|e| e.offset >= from).collect::<Vec<_>>());
        }

        /// The checksums are made to match, so that the bytes get as far as the fields.
        #[test]
        fn forged_bytes_never_panic(
            clock in clocks(),
            events in events(20, 30),
            controls in controls(5, 20),
            forged in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
        ) {
            for batch in pack_stamped(clock, &events, &controls, &mut start()) {
                let mut bytes = batch.to_vec();
                for (at, byte) in &forged {
                    let at = at.index(bytes.len());
                    bytes[at] = *byte;
                }
                bytes.truncate(bytes.len() - cut.index(bytes.len().min(9)));
                for reseal in [false, true] {
                    if reseal {
                        seal(&mut bytes);
                    }
                    if let Ok(batch) = Batch::decode(Bytes::from(bytes.clone())) {
                        let _ = batch.events(0).count();
                        let _ = batch.controls();
                        batch.head().advance(&mut start());
                    }
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..300)) {
            prop_assert!(Batch::decode(Bytes::from(bytes)).is_err());
        }
    }

    /// Makes both checksums match whatever the bytes say.
    fn seal(bytes: &mut [u8]) {
        let Ok((header, _)) = Header::mut_from_prefix(bytes) else {
            return;
        };
        let groups = usize::from(header.groups.get());
        let stamps_bytes = if header.version == STAMPED { STAMPS_BYTES } else { 0 };
        let body_start = HEADER_BYTES + stamps_bytes + groups * GROUP_BYTES;
        let Some(body) = bytes.get(body_start..) else {
            return;
        };
        let (body_bytes, body_crc) = (body.len() as u32, crc32c::crc32c(body));
        let Ok((header, _)) = Header::mut_from_prefix(bytes) else {
            return;
        };
        header.magic = u32::from_le_bytes(MAGIC).into();
        if stamps_bytes == 0 {
            header.version = PLAIN;
        }
        header.codec = Compression::None.number();
        header.body_bytes = body_bytes.into();
        header.body_crc = body_crc.into();
        let head_crc = crc32c::crc32c(&bytes[HEAD_CRC_END..body_start]);
        bytes[4..HEAD_CRC_END].copy_from_slice(&head_crc.to_le_bytes());
    }

    fn telemetry(count: usize, payload_bytes: usize) -> Vec<Event> {
        (0..count)
            .map(|i| Event {
                partition: (i % usize::from(PARTITIONS)) as u16,
                received_us: START_US + i as u64,
                device_key: format!("dev-{:06}", i % 200).into(),
                topic: format!("devices/dev-{:06}/telemetry", i % 200).into(),
                attributes: Attributes::encode([Attribute::QoS(1)]),
                payload: vec![7; payload_bytes].into(),
            })
            .collect()
    }

    #[test]
    fn every_flipped_bit_is_found_and_leaves_the_other_half_readable() {
        for clock in [None, Some(clock(true))] {
            let control = Control::Cursor { sink: "cloud".into(), offset: 1 };
            let batches = pack_stamped(clock, &telemetry(3, 20), &[control], &mut start());
            let [batch] = &batches[..] else { panic!("{} batches", batches.len()) };
            every_flipped_bit_is_found(batch);
        }
    }

    fn every_flipped_bit_is_found(batch: &Bytes) {
        let head_bytes = Batch::decode(batch.clone()).unwrap().body_start;
        for bit in 0..batch.len() * 8 {
            let mut bad = batch.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            let body_is_bad = bit / 8 >= head_bytes;
            assert_eq!(BatchHead::decode(&bad).is_ok(), body_is_bad, "bit {bit}");
            assert!(Batch::decode(bad.into()).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_cut_is_found() {
        for clock in [None, Some(clock(true))] {
            let batches = pack_stamped(clock, &telemetry(3, 20), &[], &mut start());
            let [batch] = &batches[..] else { panic!() };
            for len in 0..batch.len() {
                assert!(Batch::decode(batch.slice(..len)).is_err(), "length {len}");
            }
        }
    }

    /// What the boot, the uptime and the word on the clock cost: of a batch, not of an event.
    #[test]
    fn stamps_cost_nothing_an_event() {
        let events = telemetry(100, 100);
        let bytes = |clock| -> usize {
            let batches = pack_stamped(clock, &events, &[], &mut start());
            batches.iter().map(|batch| batch.len() - head_stamps_bytes(batch)).sum()
        };
        assert_eq!(STAMPS_BYTES, 25);
        assert_eq!(bytes(Some(clock(false))), bytes(None));
    }

    fn head_stamps_bytes(batch: &[u8]) -> usize {
        BatchHead::decode(batch).unwrap().stamps.map_or(0, |_| STAMPS_BYTES)
    }

    /// What redb writes for a row, and what a commit of these events could do with at the least.
    #[test]
    fn batches_fill_their_pages() {
        for (count, payload_bytes) in [(256, 128), (256, 1024), (4096, 128), (100, 128), (40, 200)]
        {
            let batches = pack_all(&telemetry(count, payload_bytes), &[], &mut start());
            let used: usize = batches.iter().map(Bytes::len).sum();
            let pages: usize = batches
                .iter()
                .map(|batch| (batch.len() + ROW_OVERHEAD_BYTES).next_power_of_two())
                .map(|row_bytes| row_bytes.max(PAGE_BYTES))
                .sum();
            assert!(
                pages <= used + used / 4 + PAGE_BYTES,
                "{count} × {payload_bytes}: {used} in {pages}"
            );
        }
    }

    fn pack_compressed(events: &[Event], compression: Compression, tail: &mut Tail) -> Vec<Bytes> {
        let (mut encoder, mut batches, mut left) = (Encoder::new(PARTITIONS), Vec::new(), events);
        while !left.is_empty() {
            let packed = encoder.pack_compressed(left, compression, tail);
            batches.push(Bytes::from([packed.head, packed.body].concat()));
            left = &left[packed.events..];
        }
        batches
    }

    /// JSON that repeats itself as telemetry does, and numbers that do not.
    fn readings(count: usize, random_bytes: usize) -> Vec<Event> {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut events = telemetry(count, 0);
        for (at, event) in events.iter_mut().enumerate() {
            let noise: String =
                std::iter::repeat_with(|| rng.alphanumeric()).take(random_bytes).collect();
            let text = format!(r#"{{"temperature":21.{at},"unit":"celsius","noise":"{noise}"}}"#);
            event.payload = text.into_bytes().into();
        }
        events
    }

    #[test]
    fn compressed_batches_come_back_and_fill_their_pages() {
        for compression in [Compression::Lz4, Compression::Zstd, Compression::None] {
            for random_bytes in [0, 16, 400] {
                let (events, mut tail) = (readings(6_000, random_bytes), start());
                let batches = pack_compressed(&events, compression, &mut tail);
                assert_eq!(decode_all(&batches).0, expected(&events, &start()));
                let mut replayed = start();
                for batch in &batches {
                    let head = BatchHead::decode(batch).unwrap();
                    assert_eq!(head.position(), replayed.position);
                    head.advance(&mut replayed);
                    assert!(batch.len() <= BATCH_BYTES_MAX);
                }
                assert_eq!(replayed, tail);
                // But for the first, which has learnt nothing, and the last.
                if compression != Compression::None && batches.len() > 3 {
                    for batch in &batches[1..batches.len() - 1] {
                        assert!(
                            batch.len() > BATCH_BYTES_MAX / 8 * 6,
                            "{} {compression:?}",
                            batch.len()
                        );
                    }
                }
                let plain: usize =
                    pack_all(&events, &[], &mut start()).iter().map(Bytes::len).sum();
                let packed: usize = batches.iter().map(Bytes::len).sum();
                assert!(packed <= plain + plain / 64, "{compression:?} {random_bytes}");
                if compression != Compression::None && random_bytes == 0 {
                    assert!(packed * 2 < plain, "{compression:?}: {packed} of {plain}");
                }
            }
        }
    }

    #[test]
    fn every_flipped_bit_of_a_compressed_batch_is_found() {
        let batches = pack_compressed(&readings(40, 0), Compression::Zstd, &mut start());
        let [batch] = &batches[..] else { panic!("{} batches", batches.len()) };
        for bit in 0..batch.len() * 8 {
            let mut bad = batch.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Batch::decode(bad.into()).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_single_larger_event_is_a_batch_of_its_own() {
        let mut events = telemetry(3, 100);
        events[1].payload = vec![1; 200_000].into();
        let batches = pack_all(&events, &[], &mut start());
        let counts: Vec<u32> =
            batches.iter().map(|batch| BatchHead::decode(batch).unwrap().count()).collect();
        assert_eq!(counts, [1, 1, 1]);
        assert_eq!(decode_all(&batches).0, expected(&events, &start()));
    }

    #[test]
    fn events_share_what_they_have_in_common() {
        let [batch] = &pack_all(&telemetry(2, 20), &[], &mut start())[..] else { panic!() };
        let one = batch.len();
        let mut events = telemetry(2, 20);
        events[1] = Event { payload: events[1].payload.clone(), ..events[0].clone() };
        let [batch] = &pack_all(&events, &[], &mut start())[..] else { panic!() };
        assert!(one - batch.len() > 40, "{one} and {}", batch.len());
        let got = decode_all(std::slice::from_ref(batch)).0;
        assert_eq!(got[0].event.topic.as_ptr(), got[1].event.topic.as_ptr());
    }
}
