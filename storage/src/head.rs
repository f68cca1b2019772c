//! The head row: what a log file, or a checkpoint, takes over from what came before it.
//!
//! Owns: [`Position`] (where a batch stands), [`Tail`] (all that the next batch needs to know) and
//! [`Head`], the row that carries them with the store's identity. Every log file opens with one, so
//! that offsets, sequence numbers and receive times go on even when the log itself is empty; the
//! checkpoint in `state.redb` is the same row.
//! Invariant: a row either decodes to exactly what was encoded, or not at all.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Format of everything in the data folder. A store with a higher number is refused; one with a lower
/// number is taken over: its files are read as they are, and its checkpoint is written anew at once.
///
/// 3: batches may carry stamps. 2: batches may be compressed. 1: the first.
pub(crate) const FORMAT: u32 = 3;

/// First bytes of every head row.
pub(crate) const MAGIC: [u8; 4] = *b"EGhd";
/// The longest head row, of as many partitions as a store can have.
pub(crate) const ROW_BYTES_MAX: usize = size_of::<Fixed>() + 1024 * 8;

/// Where a batch stands. Batches without events share the offset of the next one and are told
/// apart by their ordinal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    /// Offset of its first event, or of the next one to come if it has none.
    pub(crate) offset: u64,
    /// Number of batches before it with the same offset.
    pub(crate) ordinal: u32,
}

impl Position {
    /// The first position at an offset.
    pub(crate) fn at(offset: u64) -> Self {
        Self { offset, ordinal: 0 }
    }

    /// The position after a batch of `count` events here.
    pub(crate) fn after(self, count: u32) -> Self {
        match count {
            0 => Self { offset: self.offset, ordinal: self.ordinal + 1 },
            _ => Self::at(self.offset + u64::from(count)),
        }
    }

    /// As the key of the log's table.
    pub(crate) fn key(self) -> (u64, u32) {
        (self.offset, self.ordinal)
    }
}

/// All that the next batch needs to know about those before it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tail {
    /// Where the next batch goes.
    pub(crate) position: Position,
    /// Receive time of the last event, which later ones never fall below.
    pub(crate) received_us: u64,
    /// Event bytes appended in the store's life.
    pub(crate) event_bytes: u64,
    /// Next sequence number per partition.
    pub(crate) next_seq: Vec<u64>,
}

impl Tail {
    /// The tail of a new store.
    pub(crate) fn new(partitions: u16) -> Self {
        Self {
            position: Position::default(),
            received_us: 0,
            event_bytes: 0,
            next_seq: vec![0; usize::from(partitions)],
        }
    }
}

/// A head row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Random id of the store's life.
    pub(crate) epoch: u64,
    /// What the file or checkpoint takes over.
    pub(crate) tail: Tail,
}

/// Why a head row was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BadHead {
    /// It fails its check.
    Corrupt,
    /// A later version wrote it.
    Newer(u32),
}

/// Magic, checksum and format stay where they are in every format to come.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Fixed {
    magic: U32,
    /// Of everything after this field.
    crc: U32,
    format: U32,
    partitions: U16,
    epoch: U64,
    offset: U64,
    ordinal: U32,
    received_us: U64,
    event_bytes: U64,
}

const CRC_END: usize = 8;

/// Format of a stored row that decodes.
pub(crate) fn format(row: &[u8]) -> u32 {
    Fixed::ref_from_prefix(row).map_or(0, |(fixed, _)| fixed.format.get())
}

impl Head {
    /// The stored row.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let tail = &self.tail;
        let fixed = Fixed {
            magic: u32::from_le_bytes(MAGIC).into(),
            crc: 0.into(),
            format: FORMAT.into(),
            partitions: (tail.next_seq.len() as u16).into(),
            epoch: self.epoch.into(),
            offset: tail.position.offset.into(),
            ordinal: tail.position.ordinal.into(),
            received_us: tail.received_us.into(),
            event_bytes: tail.event_bytes.into(),
        };
        let mut row = Vec::with_capacity(size_of::<Fixed>() + tail.next_seq.len() * 8);
        row.extend_from_slice(fixed.as_bytes());
        row.extend(tail.next_seq.iter().flat_map(|seq| seq.to_le_bytes()));
        let crc = crc32c::crc32c(&row[CRC_END..]);
        row[4..CRC_END].copy_from_slice(&crc.to_le_bytes());
        row
    }

    /// Reads a row that `bytes` begin with.
    pub(crate) fn decode_front(bytes: &[u8]) -> Result<Self, BadHead> {
        let (fixed, _) = Fixed::ref_from_prefix(bytes).map_err(|_| BadHead::Corrupt)?;
        let row_bytes = size_of::<Fixed>() + usize::from(fixed.partitions.get()) * 8;
        bytes.get(..row_bytes).map_or(Err(BadHead::Corrupt), Self::decode)
    }

    /// Reads a stored row.
    pub(crate) fn decode(row: &[u8]) -> Result<Self, BadHead> {
        let (fixed, seqs) = Fixed::ref_from_prefix(row).map_err(|_| BadHead::Corrupt)?;
        if fixed.magic.get().to_le_bytes() != MAGIC
            || fixed.crc.get() != crc32c::crc32c(&row[CRC_END..])
        {
            return Err(BadHead::Corrupt);
        }
        if fixed.format.get() > FORMAT {
            return Err(BadHead::Newer(fixed.format.get()));
        }
        let seqs = <[U64]>::ref_from_bytes_with_elems(seqs, usize::from(fixed.partitions.get()))
            .map_err(|_| BadHead::Corrupt)?;
        Ok(Self {
            epoch: fixed.epoch.get(),
            tail: Tail {
                position: Position { offset: fixed.offset.get(), ordinal: fixed.ordinal.get() },
                received_us: fixed.received_us.get(),
                event_bytes: fixed.event_bytes.get(),
                next_seq: seqs.iter().map(|seq| seq.get()).collect(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        Head {
            epoch: 0x0123_4567_89ab_cdef,
            tail: Tail {
                position: Position { offset: 77, ordinal: 3 },
                received_us: 1_700_000_000_000_000,
                event_bytes: 9_999,
                next_seq: vec![1, 0, u64::MAX, 40],
            },
        }
    }

    #[test]
    fn a_head_row_round_trips() {
        assert_eq!(Head::decode(&head().encode()), Ok(head()));
    }

    #[test]
    fn every_flipped_bit_of_a_head_row_is_found() {
        let row = head().encode();
        for bit in 0..row.len() * 8 {
            let mut bad = row.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Head::decode(&bad), Err(BadHead::Corrupt), "bit {bit}");
        }
        for len in 0..row.len() {
            assert_eq!(Head::decode(&row[..len]), Err(BadHead::Corrupt), "length {len}");
        }
    }

    #[test]
    fn a_later_format_is_named() {
        let mut row = head().encode();
        row[CRC_END..CRC_END + 4].copy_from_slice(&(FORMAT + 1).to_le_bytes());
        let crc = crc32c::crc32c(&row[CRC_END..]);
        row[4..CRC_END].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Head::decode(&row), Err(BadHead::Newer(FORMAT + 1)));
    }

    #[test]
    fn positions_stay_apart() {
        let start = Position::at(5);
        assert_eq!(start.after(0), Position { offset: 5, ordinal: 1 });
        assert_eq!(start.after(0).after(2), Position::at(7));
        assert!(start < start.after(0) && start.after(0) < start.after(1));
    }
}
