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

mod decoder;
mod encoder;
mod interned;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(crate) use self::decoder::Batch;
pub(crate) use self::encoder::Encoder;
use crate::clock::{Stamp, TimeQuality};
use crate::head::{Position, Tail};
use crate::row::Corrupt;

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

/// Reference number of a value that is written out here.
const DEFINE: u64 = 0;

const CONTROL_CURSOR: u8 = 1;
const CONTROL_PUT: u8 = 2;
const CONTROL_DELETE: u8 = 3;

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

#[cfg(test)]
mod tests;
