//! What lies in a ring: marks and records. Pure.
//!
//! A ring is a file of fixed size: two mark slots of a block each, and behind them a stream of
//! records that goes round. A place in the stream is a byte count since the ring began, so it only
//! rises; [`DATA_START`]` + place % capacity` is where it lies. Records begin at block boundaries,
//! so that writing one never has to read a block first.
//!
//! Invariant: a record decodes only as what was written, whole, at the place where it is expected,
//! in the same life of the ring. Whatever a power cut leaves of an unsynced one does not.

use std::ops::Range;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Unit of place in a ring.
pub(super) const BLOCK_BYTES: u64 = 4096;
/// Where the stream begins, behind the two mark slots.
pub(super) const DATA_START: u64 = 2 * BLOCK_BYTES;

const MARK_MAGIC: u32 = u32::from_le_bytes(*b"EGjm");
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"EGjr");

/// From where a ring has to be replayed: everything before is synced in its home file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// Random id of this life of the ring: older records do not match it.
    pub(super) epoch: u64,
    /// Rises with every mark: the higher of the two slots counts.
    pub(super) number: u64,
    /// First place that is still needed.
    pub(super) place: u64,
    /// Bytes of the stream before it goes round.
    pub(super) capacity: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct StoredMark {
    magic: U32,
    /// Of everything after this field.
    crc: U32,
    epoch: U64,
    number: U64,
    place: U64,
    capacity: U64,
}

const CRC_END: usize = 8;

impl Mark {
    /// Bytes of a stored mark.
    pub(super) const LEN: usize = size_of::<StoredMark>();

    /// Offset of the slot that this mark goes to: never the one of the mark before it.
    pub(super) fn slot(&self) -> u64 {
        self.number % 2 * BLOCK_BYTES
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut stored = StoredMark {
            magic: MARK_MAGIC.into(),
            crc: 0.into(),
            epoch: self.epoch.into(),
            number: self.number.into(),
            place: self.place.into(),
            capacity: self.capacity.into(),
        };
        stored.crc = crc32c::crc32c(&stored.as_bytes()[CRC_END..]).into();
        stored.as_bytes().to_vec()
    }

    pub(super) fn decode(slot: &[u8]) -> Option<Self> {
        let (stored, _) = StoredMark::ref_from_prefix(slot).ok()?;
        let sound = stored.magic.get() == MARK_MAGIC
            && stored.crc.get() == crc32c::crc32c(&stored.as_bytes()[CRC_END..]);
        let mark = Self {
            epoch: stored.epoch.get(),
            number: stored.number.get(),
            place: stored.place.get(),
            capacity: stored.capacity.get(),
        };
        let fits = mark.capacity >= BLOCK_BYTES
            && mark.capacity.is_multiple_of(BLOCK_BYTES)
            && mark.place.is_multiple_of(BLOCK_BYTES);
        (sound && fits).then_some(mark)
    }
}

/// One write to a home file, as it lies in the bytes of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// Where in the home file.
    pub(super) offset: u64,
    /// Where in the record.
    pub(super) data: Range<usize>,
}

impl Extent {
    fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }

    fn overlaps(&self, range: &Range<u64>) -> bool {
        self.offset < range.end && range.start < self.end()
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct StoredHeader {
    magic: U32,
    /// Of everything after this field, in this header.
    crc: U32,
    body_crc: U32,
    body_len: U32,
    epoch: U64,
    place: U64,
    file: U64,
    file_len: U64,
}

const HEADER_BYTES: usize = size_of::<StoredHeader>();

/// In front of the data of each extent in the body.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct StoredExtent {
    offset: U64,
    len: U32,
}

/// The writes of one transaction on their way into a record: its bytes as they will lie in the
/// ring, so that nothing is copied twice.
#[derive(Debug)]
pub(super) struct Draft {
    bytes: Vec<u8>,
    extents: Vec<Extent>,
}

impl Draft {
    /// An empty one; takes over the room of bytes that are no longer needed.
    pub(super) fn new(mut spare: Vec<u8>) -> Self {
        spare.clear();
        spare.resize(HEADER_BYTES, 0);
        Self { bytes: spare, extents: Vec::new() }
    }

    /// Whether nothing was written.
    pub(super) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Bytes that the record will take in the ring.
    pub(super) fn ring_bytes(&self) -> u64 {
        (self.bytes.len() as u64).next_multiple_of(BLOCK_BYTES)
    }

    /// Takes a write to the home file.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let range = offset..offset + data.len() as u64;
        // redb writes its header twice in a commit: the second is the one that counts.
        if let Some(last) = self.extents.iter().rev().find(|extent| extent.overlaps(&range))
            && (last.offset, last.end()) == (range.start, range.end)
        {
            self.bytes[last.data.clone()].copy_from_slice(data);
            return;
        }
        let stored = StoredExtent { offset: offset.into(), len: (data.len() as u32).into() };
        self.bytes.extend_from_slice(stored.as_bytes());
        let start = self.bytes.len();
        self.bytes.extend_from_slice(data);
        self.extents.push(Extent { offset, data: start..self.bytes.len() });
    }

    /// See [`Record::look`].
    pub(super) fn look(&self, offset: u64, out: &mut [u8]) -> Look {
        look(&self.bytes, &self.extents, offset, out)
    }

    /// See [`Record::apply`].
    pub(super) fn apply(&self, offset: u64, out: &mut [u8]) {
        apply(&self.bytes, &self.extents, offset, out);
    }

    /// The record of these writes, for a place and a life of the ring that are not known yet.
    pub(super) fn finish(mut self, file: u64, file_len: u64) -> Record {
        let header = StoredHeader {
            magic: RECORD_MAGIC.into(),
            crc: 0.into(),
            body_crc: crc32c::crc32c(&self.bytes[HEADER_BYTES..]).into(),
            body_len: ((self.bytes.len() - HEADER_BYTES) as u32).into(),
            epoch: 0.into(),
            place: 0.into(),
            file: file.into(),
            file_len: file_len.into(),
        };
        self.bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        self.bytes.resize(self.ring_bytes() as usize, 0);
        let (bytes, extents) = (self.bytes, self.extents);
        Record { place: 0, through: false, file, file_len, bytes, extents }
    }
}

/// What a transaction has written to one home file.
#[derive(Debug)]
pub(super) struct Record {
    /// Where it begins in the stream.
    pub(super) place: u64,
    /// It goes home by itself and has no bytes in the ring.
    pub(super) through: bool,
    /// The home file: its first offset.
    pub(super) file: u64,
    /// Length of the home file after it.
    pub(super) file_len: u64,
    /// As they lie in the ring, filled up to a whole block.
    bytes: Vec<u8>,
    extents: Vec<Extent>,
}

/// What some writes say of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Nothing.
    Nothing,
    /// All of it, which was copied.
    Whole,
    /// A part of it.
    Part,
}

impl Record {
    /// Gives it its place.
    pub(super) fn place_at(&mut self, epoch: u64, place: u64) {
        self.place = place;
        let (header, _) =
            StoredHeader::mut_from_prefix(&mut self.bytes).expect("a record has a header");
        (header.epoch, header.place) = (epoch.into(), place.into());
        header.crc = crc32c::crc32c(&header.as_bytes()[CRC_END..]).into();
    }

    /// Bytes of its place.
    pub(super) fn ring_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// End of its place.
    pub(super) fn end(&self) -> u64 {
        self.place + self.ring_bytes()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Gives the bytes back, to be used again.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Its writes, in order.
    pub(super) fn writes(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.extents.iter().map(|extent| (extent.offset, &self.bytes[extent.data.clone()]))
    }

    /// Copies what its last write to this range says, if that covers all of it.
    pub(super) fn look(&self, offset: u64, out: &mut [u8]) -> Look {
        look(&self.bytes, &self.extents, offset, out)
    }

    /// Puts what it says of a range over what came before.
    pub(super) fn apply(&self, offset: u64, out: &mut [u8]) {
        apply(&self.bytes, &self.extents, offset, out);
    }

    /// Bytes that the record at the front of `block` takes in the ring, if one of this life begins
    /// at this place.
    pub(super) fn stored_bytes(block: &[u8], epoch: u64, place: u64) -> Option<u64> {
        let header = header(block, epoch, place)?;
        let len = HEADER_BYTES as u64 + u64::from(header.body_len.get());
        Some(len.next_multiple_of(BLOCK_BYTES))
    }

    /// Reads a stored record.
    pub(super) fn decode(bytes: Vec<u8>, epoch: u64, place: u64) -> Option<Self> {
        let header = header(&bytes, epoch, place)?;
        let (file, file_len) = (header.file.get(), header.file_len.get());
        let end = HEADER_BYTES.checked_add(header.body_len.get() as usize)?;
        if crc32c::crc32c(bytes.get(HEADER_BYTES..end)?) != header.body_crc.get() {
            return None;
        }
        let (mut at, mut extents) = (HEADER_BYTES, Vec::new());
        while at < end {
            let (stored, _) = StoredExtent::ref_from_prefix(&bytes[at..end]).ok()?;
            let start = at + size_of::<StoredExtent>();
            at = start.checked_add(stored.len.get() as usize).filter(|&at| at <= end)?;
            extents.push(Extent { offset: stored.offset.get(), data: start..at });
        }
        Some(Self { place, through: false, file, file_len, bytes, extents })
    }
}

fn header(bytes: &[u8], epoch: u64, place: u64) -> Option<&StoredHeader> {
    let (header, _) = StoredHeader::ref_from_prefix(bytes).ok()?;
    let sound = header.magic.get() == RECORD_MAGIC
        && header.crc.get() == crc32c::crc32c(&header.as_bytes()[CRC_END..])
        && header.epoch.get() == epoch
        && header.place.get() == place;
    sound.then_some(header)
}

fn look(bytes: &[u8], extents: &[Extent], offset: u64, out: &mut [u8]) -> Look {
    let range = offset..offset + out.len() as u64;
    match extents.iter().rev().find(|extent| extent.overlaps(&range)) {
        None => Look::Nothing,
        Some(last) if last.offset <= range.start && range.end <= last.end() => {
            let start = last.data.start + (range.start - last.offset) as usize;
            out.copy_from_slice(&bytes[start..start + out.len()]);
            Look::Whole
        }
        Some(_) => Look::Part,
    }
}

fn apply(bytes: &[u8], extents: &[Extent], offset: u64, out: &mut [u8]) {
    let range = offset..offset + out.len() as u64;
    for extent in extents.iter().filter(|extent| extent.overlaps(&range)) {
        let (from, to) = (extent.offset.max(range.start), extent.end().min(range.end));
        let data = &bytes[extent.data.clone()];
        out[(from - range.start) as usize..(to - range.start) as usize]
            .copy_from_slice(&data[(from - extent.offset) as usize..(to - extent.offset) as usize]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: u64 = 0xfeed;
    const PLACE: u64 = 7 * BLOCK_BYTES;

    fn record() -> Record {
        let mut draft = Draft::new(vec![9; 10]);
        draft.write(0, b"header");
        draft.write(4096, &[1; 5000]);
        draft.write(0, b"HEADER");
        draft.write(8192, &[2; 4096]);
        let mut record = draft.finish(77, 65_536);
        record.place_at(EPOCH, PLACE);
        record
    }

    #[test]
    fn a_record_round_trips() {
        let record = record();
        let bytes = record.bytes().to_vec();
        assert_eq!(bytes.len() as u64 % BLOCK_BYTES, 0);
        assert_eq!(Record::stored_bytes(&bytes[..4096], EPOCH, PLACE), Some(bytes.len() as u64));
        let read = Record::decode(bytes, EPOCH, PLACE).unwrap();
        assert_eq!((read.file, read.file_len, read.end()), (77, 65_536, record.end()));
        assert!(read.writes().eq(record.writes()));
        let writes: Vec<_> = read.writes().map(|(offset, data)| (offset, data.len())).collect();
        assert_eq!(writes, [(0, 6), (4096, 5000), (8192, 4096)]);
        assert_eq!(read.writes().next().unwrap().1, b"HEADER");
    }

    #[test]
    fn of_writes_that_overlap_the_last_counts() {
        let record = record();
        let mut out = [0; 3];
        assert_eq!(record.look(1, &mut out), Look::Whole);
        assert_eq!(&out, b"EAD");
        assert_eq!(record.look(100, &mut out), Look::Nothing);
        let mut out = [0; 2000];
        assert_eq!(record.look(7192, &mut out), Look::Part);
        record.apply(7192, &mut out);
        assert!(out[..1000] == [1; 1000] && out[1000..] == [2; 1000]);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let record = record();
        // Beyond the body there is only what fills the last block.
        let body = HEADER_BYTES + record.extents.last().unwrap().data.end - HEADER_BYTES;
        for bit in (0..body * 8).step_by(7) {
            let mut bytes = record.bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Record::decode(bytes, EPOCH, PLACE).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn a_record_of_another_life_or_place_is_none() {
        let bytes = record().into_bytes();
        assert!(Record::decode(bytes.clone(), EPOCH + 1, PLACE).is_none());
        assert!(Record::decode(bytes.clone(), EPOCH, PLACE + BLOCK_BYTES).is_none());
        assert!(Record::decode(bytes[..4096].to_vec(), EPOCH, PLACE).is_none());
        assert!(Record::decode(Vec::new(), EPOCH, PLACE).is_none());
    }

    #[test]
    fn marks_take_turns_and_fail_their_check_when_torn() {
        let mark = Mark { epoch: EPOCH, number: 3, place: PLACE, capacity: 1 << 20 };
        let stored = mark.encode();
        assert_eq!(stored.len(), Mark::LEN);
        assert_eq!(Mark::decode(&stored), Some(mark));
        assert_ne!(mark.slot(), Mark { number: 4, ..mark }.slot());
        for bit in 0..stored.len() * 8 {
            let mut torn = stored.clone();
            torn[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Mark::decode(&torn), None, "bit {bit}");
        }
    }
}
