//! The device's binary frame: one sample on the wire, little-endian, checksummed.
//!
//! Owns: [`Sample`] and [`Frame`]. Invariant: [`Frame::parse`] of arbitrary bytes gives a sample or
//! an error, never a panic, and only bytes that [`Frame::encode`] could have written are accepted.
//! Deliberately absent: topics, MQTT, text forms of a sample.
//!
//! | at | size | field |
//! | --- | --- | --- |
//! | 0 | 2 | magic, `0xED 0x6E` |
//! | 2 | 1 | version, 1 |
//! | 3 | 1 | kind of sensor, see [`Kind`] |
//! | 4 | 1 | flags: bit 0 set when the time is wall time, the others zero |
//! | 5 | 1 | number of readings, 0 to [`READINGS_MAX`] |
//! | 6 | 2 | reserved, zero |
//! | 8 | 4 | device number |
//! | 12 | 4 | boot id |
//! | 16 | 8 | device sequence number |
//! | 24 | 8 | time in microseconds |
//! | 32 | 4 × n | readings, IEEE 754 single precision |
//! | 32 + 4 × n | 4 | CRC-32 (IEEE 802.3) of all bytes before it |

use core::fmt;

use heapless::Vec;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{F32, U32, U64},
};

use crate::sensor::Kind;

/// Readings in one sample, at most.
pub const READINGS_MAX: usize = 4;
/// Length of the longest frame in bytes.
pub const FRAME_BYTES_MAX: usize =
    size_of::<Header>() + READINGS_MAX * size_of::<F32>() + CRC_BYTES;

const MAGIC: [u8; 2] = [0xED, 0x6E];
const VERSION: u8 = 1;
const FLAG_WALL: u8 = 1;
const CRC_BYTES: usize = 4;

/// The values of one sample, in the order of [`Kind::reading_names`].
pub type Readings = Vec<f32, READINGS_MAX, u8>;

/// Number of a device in its fleet; shown as `dev-000123`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u32);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dev-{:06}", self.0)
    }
}

/// What a device's time counts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Microseconds since this boot: the device does not know the time of day.
    Boot,
    /// Microseconds since the Unix epoch.
    Wall,
}

/// What a device measured at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Rises by one with every sample that the device keeps, from 1 at boot.
    pub seq: u64,
    /// When it was taken, in microseconds by `clock`.
    pub time_us: u64,
    /// What `time_us` counts from.
    pub clock: Clock,
    /// Which sensor.
    pub kind: Kind,
    /// The values.
    pub readings: Readings,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 2],
    version: u8,
    kind: u8,
    flags: u8,
    readings: u8,
    reserved: [u8; 2],
    device: U32,
    boot: U32,
    seq: U64,
    time_us: U64,
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// They do not begin as a frame does: something else, not a damaged frame.
    NotAFrame,
    /// A frame of a version that this build does not know.
    Version(u8),
    /// The length does not match the number of readings.
    Length,
    /// The checksum does not match: the frame was damaged.
    Checksum,
    /// The checksum holds, but a field has a value that no device writes.
    Field,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAFrame => f.write_str("not a frame"),
            Self::Version(version) => write!(f, "frame of unknown version {version}"),
            Self::Length => f.write_str("frame of a wrong length"),
            Self::Checksum => f.write_str("frame with a wrong checksum"),
            Self::Field => f.write_str("frame with an impossible field"),
        }
    }
}

impl core::error::Error for FrameError {}

/// A sample with its origin, as it travels.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// Which device.
    pub device: DeviceId,
    /// Which life of that device; sequence numbers start again with each.
    pub boot: u32,
    /// What it measured.
    pub sample: Sample,
}

impl Frame {
    /// The bytes to send.
    ///
    /// # Panics
    /// Never: the buffer holds the longest frame.
    pub fn encode(&self) -> Vec<u8, FRAME_BYTES_MAX> {
        let Sample { seq, time_us, clock, kind, ref readings } = self.sample;
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            kind: kind as u8,
            flags: if clock == Clock::Wall { FLAG_WALL } else { 0 },
            readings: readings.len() as u8,
            reserved: [0; 2],
            device: U32::new(self.device.0),
            boot: U32::new(self.boot),
            seq: U64::new(seq),
            time_us: U64::new(time_us),
        };
        let mut out = Vec::new();
        let mut put = |bytes: &[u8]| {
            out.extend_from_slice(bytes).expect("fits the longest frame");
        };
        put(header.as_bytes());
        for reading in readings {
            put(&reading.to_le_bytes());
        }
        let crc = crc32(&out);
        out.extend_from_slice(&crc.to_le_bytes()).expect("fits the longest frame");
        out
    }

    /// Reads a frame from untrusted bytes.
    ///
    /// # Errors
    /// See [`FrameError`]. Bytes after the frame are an error too.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        let Ok((header, rest)) = Header::ref_from_prefix(bytes) else {
            return Err(if bytes.starts_with(&MAGIC) {
                FrameError::Length
            } else {
                FrameError::NotAFrame
            });
        };
        if header.magic != MAGIC {
            return Err(FrameError::NotAFrame);
        }
        if header.version != VERSION {
            return Err(FrameError::Version(header.version));
        }
        let (values, crc) = rest.split_last_chunk::<CRC_BYTES>().ok_or(FrameError::Length)?;
        let values = <[F32]>::ref_from_bytes(values).map_err(|_| FrameError::Length)?;
        if values.len() != usize::from(header.readings) {
            return Err(FrameError::Length);
        }
        if crc32(&bytes[..bytes.len() - CRC_BYTES]) != u32::from_le_bytes(*crc) {
            return Err(FrameError::Checksum);
        }
        if header.flags & !FLAG_WALL != 0 || header.reserved != [0; 2] {
            return Err(FrameError::Field);
        }
        let kind = Kind::from_u8(header.kind).ok_or(FrameError::Field)?;
        let mut readings = Readings::new();
        for value in values {
            readings.push(value.get()).map_err(|_| FrameError::Field)?;
        }
        Ok(Self {
            device: DeviceId(header.device.get()),
            boot: header.boot.get(),
            sample: Sample {
                seq: header.seq.get(),
                time_us: header.time_us.get(),
                clock: if header.flags & FLAG_WALL == 0 { Clock::Boot } else { Clock::Wall },
                kind,
                readings,
            },
        })
    }
}

/// CRC-32 as Ethernet and zip have it, four bits at a time: 64 bytes of table suit a small flash.
fn crc32(bytes: &[u8]) -> u32 {
    const NIBBLES: [u32; 16] = {
        let mut table = [0; 16];
        let mut n = 0;
        while n < 16 {
            let mut crc = n as u32;
            let mut bit = 0;
            while bit < 4 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
                bit += 1;
            }
            table[n] = crc;
            n += 1;
        }
        table
    };
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        crc = (crc >> 4) ^ NIBBLES[(crc & 15) as usize];
        crc = (crc >> 4) ^ NIBBLES[(crc & 15) as usize];
    }
    !crc
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn a_frame() -> impl Strategy<Value = Frame> {
        (
            (any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<bool>()),
            (0..Kind::ALL.len(), proptest::collection::vec(-1e6_f32..1e6, 0..=READINGS_MAX)),
        )
            .prop_map(|((device, boot, seq, time_us, wall), (kind, values))| Frame {
                device: DeviceId(device),
                boot,
                sample: Sample {
                    seq,
                    time_us,
                    clock: if wall { Clock::Wall } else { Clock::Boot },
                    kind: Kind::ALL[kind],
                    readings: Readings::from_slice(&values).unwrap(),
                },
            })
    }

    proptest! {
        #[test]
        fn a_frame_round_trips(frame in a_frame()) {
            prop_assert_eq!(Frame::parse(&frame.encode()), Ok(frame));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Frame::parse(&bytes);
        }

        /// With the checksum made to fit, so that the checks behind it are reached too.
        #[test]
        fn what_is_accepted_is_what_a_device_writes(
            frame in a_frame(),
            at in 0..FRAME_BYTES_MAX,
            value in any::<u8>(),
        ) {
            let mut bytes = frame.encode();
            let at = at % (bytes.len() - CRC_BYTES);
            bytes[at] = value;
            let end = bytes.len() - CRC_BYTES;
            let crc = crc32(&bytes[..end]).to_le_bytes();
            bytes[end..].copy_from_slice(&crc);
            if let Ok(parsed) = Frame::parse(&bytes) {
                prop_assert_eq!(parsed.encode(), bytes);
            }
        }

        #[test]
        fn damage_is_found(frame in a_frame(), at in 0..FRAME_BYTES_MAX, flip in 1..=u8::MAX) {
            let mut bytes = frame.encode();
            let at = at % bytes.len();
            bytes[at] ^= flip;
            prop_assert!(Frame::parse(&bytes).is_err());
        }

        #[test]
        fn a_cut_or_longer_frame_is_an_error(frame in a_frame(), cut in 1..FRAME_BYTES_MAX) {
            let bytes = frame.encode();
            let kept = bytes.len().saturating_sub(cut);
            prop_assert!(Frame::parse(&bytes[..kept]).is_err());
            let longer: std::vec::Vec<u8> = bytes.iter().copied().chain([0]).collect();
            prop_assert!(Frame::parse(&longer).is_err());
        }
    }

    #[test]
    fn the_checksum_is_the_well_known_one() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn the_layout_is_pinned() {
        let frame = Frame {
            device: DeviceId(0x0102_0304),
            boot: 0x0506_0708,
            sample: Sample {
                seq: 9,
                time_us: 10,
                clock: Clock::Wall,
                kind: Kind::Temperature,
                readings: Readings::from_slice(&[1.0]).unwrap(),
            },
        };
        let expected: &[u8] = &[
            0xED, 0x6E, 1, 1, 1, 1, 0, 0, 4, 3, 2, 1, 8, 7, 6, 5, 9, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0x80, 0x3F,
        ];
        let bytes = frame.encode();
        assert_eq!(&bytes[..36], expected);
        assert_eq!(bytes.len(), 40);
    }
}
