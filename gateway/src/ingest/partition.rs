//! Which partition a device key lands in.
//!
//! This is a contract with every store on every disk: the partition of a key decides which
//! sequence numbers its events get, so it must be the same on every build and every architecture,
//! for ever. It is xxHash64 with seed 0 over the key's UTF-8 bytes, reduced by remainder; the
//! vectors below pin it, taken from an implementation of their own.

use twox_hash::XxHash64;

const SEED: u64 = 0;

/// Partition of a device key, below `partitions`.
///
/// # Panics
/// If `partitions` is 0; the configuration allows 1 to 1024.
pub fn of(device_key: &str, partitions: u16) -> u16 {
    let hash = XxHash64::oneshot(SEED, device_key.as_bytes());
    // The remainder is below `partitions`, so it fits.
    (hash % u64::from(partitions)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Key, xxHash64, partition of 16, partition of 1000. The last key is longer than the 32 bytes
    /// from which the hash works in stripes.
    const VECTORS: [(&str, u64, u16, u16); 7] = [
        ("", 0xef46_db37_51d8_e999, 9, 921),
        ("a", 0xd24e_c4f1_a98c_6e5b, 11, 955),
        ("abc", 0x44bc_2cf5_ad77_0999, 9, 249),
        ("dev-000123", 0xba9a_41af_1cd6_cd71, 1, 705),
        ("sensor-7", 0xcae1_0696_f70f_5e95, 5, 333),
        ("Ünïté-4/é", 0x3ca3_2a3c_89c0_6807, 7, 575),
        ("0123456789abcdef0123456789abcdef0123", 0xc425_5ba3_d1af_5461, 1, 137),
    ];

    #[test]
    fn vectors_are_pinned() {
        for (key, hash, of_16, of_1000) in VECTORS {
            assert_eq!(XxHash64::oneshot(SEED, key.as_bytes()), hash, "hash of {key:?}");
            assert_eq!(of(key, 16), of_16, "{key:?} of 16");
            assert_eq!(of(key, 1000), of_1000, "{key:?} of 1000");
            assert_eq!(of(key, 1), 0, "{key:?} of 1");
        }
    }

    #[test]
    fn a_fleet_spreads_over_all_partitions() {
        let mut counts = [0_u32; 16];
        for device in 0..16_000 {
            counts[usize::from(of(&format!("dev-{device:06}"), 16))] += 1;
        }
        assert!(counts.iter().all(|n| (800..1200).contains(n)), "{counts:?}");
    }
}
