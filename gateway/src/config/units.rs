//! Sizes and times with units, as people write them: `"8GiB"`, `"250ms"`.
//!
//! Owns: reading and writing these two notations. Bare numbers are bytes and milliseconds.

use std::time::Duration;

const SIZES: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

const TIMES_MS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// What a size may look like, for messages.
pub(crate) const SIZE_FORM: &str = "a size such as \"512MiB\", \"8GB\" or a number of bytes";
/// What a time may look like, for messages.
pub(super) const TIME_FORM: &str =
    "a time such as \"250ms\", \"30s\", \"5m\", \"1h\", \"7d\" or a number of milliseconds";

/// Reads a size in bytes. `None` if it is no size, or does not fit.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    scaled(text, &SIZES, 1)
}

/// Reads a time. `None` if it is none, or does not fit.
pub(super) fn parse_time(text: &str) -> Option<Duration> {
    scaled(text, &TIMES_MS, 1).map(Duration::from_millis)
}

/// `number unit`, the number a decimal integer, the unit one of the table; without one `bare`.
fn scaled(text: &str, units: &[(&str, u64)], bare: u64) -> Option<u64> {
    let text = text.trim();
    let digits = text.bytes().take_while(|b| b.is_ascii_digit() || *b == b'_').count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.replace('_', "").parse().ok()?;
    let unit = unit.trim();
    let factor = if unit.is_empty() {
        bare
    } else {
        units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?.1
    };
    number.checked_mul(factor)
}

/// Writes a size with the largest binary unit that leaves no remainder.
pub(super) fn size(bytes: u64) -> String {
    for (name, factor) in &SIZES[..4] {
        if bytes >= *factor && bytes.is_multiple_of(*factor) {
            return format!("{}{name}", bytes / factor);
        }
    }
    format!("{bytes}B")
}

/// Writes a time with the largest unit that leaves no remainder.
pub(super) fn time(time: Duration) -> String {
    let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    for (name, factor) in TIMES_MS.iter().rev() {
        if ms >= *factor && ms.is_multiple_of(*factor) {
            return format!("{}{name}", ms / factor);
        }
    }
    format!("{ms}ms")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_and_times_read_as_people_write_them() {
        assert_eq!(parse_size("8GiB"), Some(8 << 30));
        assert_eq!(parse_size("512 mb"), Some(512_000_000));
        assert_eq!(parse_size("4096"), Some(4096));
        assert_eq!(parse_size("1_024"), Some(1024));
        assert_eq!(parse_time("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(parse_time("7d"), Some(Duration::from_hours(7 * 24)));
        assert_eq!(parse_time("30"), Some(Duration::from_millis(30)));
        for wrong in ["", "GiB", "-1", "1.5GiB", "8 gigs", "99999999999TiB", "0x10"] {
            assert_eq!(parse_size(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(n in any::<u64>(), ms in 0..u64::MAX / 86_400_000) {
            prop_assert_eq!(parse_size(&size(n)), Some(n));
            let t = Duration::from_millis(ms);
            prop_assert_eq!(parse_time(&time(t)), Some(t));
        }
    }
}
