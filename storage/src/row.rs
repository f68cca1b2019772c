//! Rows: the plain encoding under batches' bodies and the rows of `state.redb`. Pure.
//!
//! A row is a run of fields: numbers as LEB128 variable-length integers, bytes with their length in
//! front. Reading never panics and never passes the end.

use std::ops::Range;

use bytes::Bytes;
use bytestring::ByteString;

/// The bytes of a row or batch do not say what they should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Corrupt;

/// Appends a number: 7 bits a byte, low bits first, the top bit says that more follow.
pub(crate) fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends bytes with their length in front.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Builds a row that carries a checksum of its own.
pub(crate) struct Row(Vec<u8>);

const CRC_BYTES: usize = 4;

impl Row {
    pub(crate) fn new() -> Self {
        Self(vec![0; CRC_BYTES])
    }

    pub(crate) fn number(&mut self, number: u64) -> &mut Self {
        put_number(&mut self.0, number);
        self
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        put_bytes(&mut self.0, bytes);
        self
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        let crc = crc32c::crc32c(&self.0[CRC_BYTES..]);
        self.0[..CRC_BYTES].copy_from_slice(&crc.to_le_bytes());
        self.0
    }
}

/// Reads fields from front to back. What it gives shares the bytes.
pub(crate) struct Reader {
    bytes: Bytes,
    at: usize,
    end: usize,
}

impl Reader {
    /// Reads a part of something whose checksum was checked.
    ///
    /// # Panics
    /// If the range does not lie within the bytes.
    pub(crate) fn new(bytes: &Bytes, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= bytes.len());
        Self { bytes: bytes.clone(), at: range.start, end: range.end }
    }

    /// Reads what [`Row`] built.
    pub(crate) fn checked(row: Bytes) -> Result<Self, Corrupt> {
        let (crc, fields) = row.split_first_chunk::<CRC_BYTES>().ok_or(Corrupt)?;
        if u32::from_le_bytes(*crc) != crc32c::crc32c(fields) {
            return Err(Corrupt);
        }
        let end = row.len();
        Ok(Self { bytes: row, at: CRC_BYTES, end })
    }

    /// Whether every field was read.
    pub(crate) fn is_empty(&self) -> bool {
        self.at >= self.end
    }

    pub(crate) fn byte(&mut self) -> Result<u8, Corrupt> {
        if self.at >= self.end {
            return Err(Corrupt);
        }
        let byte = self.bytes[self.at];
        self.at += 1;
        Ok(byte)
    }

    pub(crate) fn number(&mut self) -> Result<u64, Corrupt> {
        let mut number = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(Corrupt);
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Corrupt)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Corrupt> {
        u16::try_from(self.number()?).map_err(|_| Corrupt)
    }

    /// Skips bytes with their length in front; where they are.
    pub(crate) fn range(&mut self) -> Result<Range<usize>, Corrupt> {
        let len = usize::try_from(self.number()?).map_err(|_| Corrupt)?;
        let start = self.at;
        let end = start.checked_add(len).filter(|&end| end <= self.end).ok_or(Corrupt)?;
        self.at = end;
        Ok(start..end)
    }

    pub(crate) fn bytes(&mut self) -> Result<Bytes, Corrupt> {
        let range = self.range()?;
        Ok(self.slice(range))
    }

    /// The bytes at a range that [`Reader::range`] gave.
    pub(crate) fn slice(&self, range: Range<usize>) -> Bytes {
        self.bytes.slice(range)
    }

    pub(crate) fn string(&mut self) -> Result<ByteString, Corrupt> {
        ByteString::try_from(self.bytes()?).map_err(|_| Corrupt)
    }
}
