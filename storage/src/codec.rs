//! How the body of a batch lies on the disk: as it is, or compressed.
//!
//! Only sealed files are compressed, in the background (see `store::packer`): what a commit writes is
//! always plain, and a sink that keeps up costs no compression at all.
//! Invariant: what is compressed comes back byte for byte or not at all; no claim about its length
//! makes it take more memory than the head of the batch has vouched for.

use crate::row::Corrupt;

/// How sealed files are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// As they are.
    #[default]
    None,
    /// Fast: about half of the room for JSON.
    Lz4,
    /// Twice the work, a third of the room.
    Zstd,
}

/// Its first level is the one that is worth its time on a small processor.
const ZSTD_LEVEL: i32 = 1;

impl Compression {
    /// Its number in the head of a batch.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    pub(crate) fn of(number: u8) -> Option<Self> {
        [Self::None, Self::Lz4, Self::Zstd].into_iter().find(|codec| codec.number() == number)
    }

    /// Nothing where it cannot be done.
    pub(crate) fn pack(self, plain: &[u8]) -> Option<Vec<u8>> {
        match self {
            Self::None => None,
            Self::Lz4 => Some(lz4_flex::block::compress(plain)),
            Self::Zstd => zstd::bulk::compress(plain, ZSTD_LEVEL).ok(),
        }
    }

    /// Bytes that come to exactly `plain_bytes`.
    pub(crate) fn unpack(self, packed: &[u8], plain_bytes: usize) -> Result<Vec<u8>, Corrupt> {
        let plain = match self {
            Self::None => packed.to_vec(),
            Self::Lz4 => lz4_flex::block::decompress(packed, plain_bytes).map_err(|_| Corrupt)?,
            Self::Zstd => zstd::bulk::decompress(packed, plain_bytes).map_err(|_| Corrupt)?,
        };
        if plain.len() == plain_bytes { Ok(plain) } else { Err(Corrupt) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_packed_comes_back(piece in vec(any::<u8>(), 0..400), times in 1..20_usize) {
            let plain = piece.repeat(times);
            for codec in [Compression::Lz4, Compression::Zstd] {
                let packed = codec.pack(&plain).unwrap();
                prop_assert_eq!(codec.unpack(&packed, plain.len()), Ok(plain.clone()));
                prop_assert_eq!(codec.unpack(&packed, plain.len() + 1), Err(Corrupt));
                if !plain.is_empty() {
                    prop_assert_eq!(codec.unpack(&packed, plain.len() - 1), Err(Corrupt));
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(packed in vec(any::<u8>(), 0..300), plain_bytes in 0..1000_usize) {
            for codec in [Compression::Lz4, Compression::Zstd] {
                let _ = codec.unpack(&packed, plain_bytes);
            }
        }
    }
}
