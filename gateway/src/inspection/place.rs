//! Places in the log as people write them: an offset, a time, or the name of an event.
//!
//! Owns: reading [`Bound`] and times of RFC 3339 in UTC, and writing the latter.

use std::fmt;
use std::str::FromStr;

use storage::Place;

/// A place that `--from` and `--to` can name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bound {
    /// `1234`: an offset.
    Offset(u64),
    /// `2026-01-31T12:00:00Z`: the first event received then or later.
    Time(u64),
    /// `3/42`: partition and sequence number; or the whole id of an event.
    Seq {
        /// Gateway and epoch, if the whole id was given.
        store: Option<(String, u64)>,
        /// Partition.
        partition: u16,
        /// Sequence number.
        seq: u64,
    },
}

/// Why a bound is none in this store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BoundError {
    /// The id of another store's event.
    #[error("the event that was named is another store's: gateway or epoch differ from this one's")]
    Foreign,
}

/// What a bound may look like, for messages.
pub const FORM: &str = "an offset such as 1234, a time such as 2026-01-31T12:00:00Z, or partition \
                        and sequence number such as 3/42 (or the whole id of an event)";

impl Bound {
    /// The place in a store.
    ///
    /// # Errors
    /// [`BoundError`].
    pub fn place(&self, gateway: &str, epoch: u64) -> Result<Place, BoundError> {
        match self {
            Self::Offset(offset) => Ok(Place::Offset(*offset)),
            Self::Time(us) => Ok(Place::Received(*us)),
            Self::Seq { store: Some((id, of)), .. } if id != gateway || *of != epoch => {
                Err(BoundError::Foreign)
            }
            Self::Seq { partition, seq, .. } => Ok(Place::Seq { partition: *partition, seq: *seq }),
        }
    }
}

impl FromStr for Bound {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("must be {FORM}, not {text:?}");
        if let Ok(offset) = text.parse() {
            return Ok(Self::Offset(offset));
        }
        let parts: Vec<&str> = text.split('/').collect();
        let (store, partition, seq) = match parts[..] {
            [partition, seq] => (None, partition, seq),
            [gateway, epoch, partition, seq] => {
                let epoch = u64::from_str_radix(epoch, 16).map_err(|_| wrong())?;
                (Some((gateway.to_owned(), epoch)), partition, seq)
            }
            _ => return parse_time(text).map(Self::Time).ok_or_else(wrong),
        };
        let (Ok(partition), Ok(seq)) = (partition.parse(), seq.parse()) else {
            return Err(wrong());
        };
        Ok(Self::Seq { store, partition, seq })
    }
}

impl fmt::Display for Bound {
    /// What reads back as the same place; a time to the microsecond.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Offset(offset) => write!(f, "{offset}"),
            Self::Time(us) => {
                let seconds = time(*us);
                write!(f, "{}.{:06}Z", seconds.trim_end_matches('Z'), us % 1_000_000)
            }
            Self::Seq { store: None, partition, seq } => write!(f, "{partition}/{seq}"),
            Self::Seq { store: Some((gateway, epoch)), partition, seq } => {
                write!(f, "{gateway}/{epoch:016x}/{partition}/{seq}")
            }
        }
    }
}

const DAY_SECONDS: u64 = 86_400;

/// Reads `2026-01-31T12:00:00.25Z`, or the date alone, as microseconds since the Unix epoch.
fn parse_time(text: &str) -> Option<u64> {
    let number = |range: std::ops::Range<usize>| -> Option<u64> {
        let digits = text.get(range)?;
        digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
    };
    let is = |at: usize, wanted: u8| text.as_bytes().get(at) == Some(&wanted);
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let valid = is(4, b'-') && is(7, b'-') && year >= 1970 && (1..=12).contains(&month);
    if !valid || !(1..=days_in(year, month)).contains(&day) {
        return None;
    }
    let leap_days = |year: u64| year / 4 - year / 100 + year / 400;
    let before: u64 = (1..month).map(|m| days_in(year, m)).sum();
    let days = (year - 1970) * 365 + leap_days(year - 1) - leap_days(1969) + before + day - 1;
    let mut us = days * DAY_SECONDS * 1_000_000;
    if text.len() == 10 {
        return Some(us);
    }
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    let valid = is(10, b'T') && is(13, b':') && is(16, b':') && text.ends_with('Z');
    if !valid || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    us += (hour * 3_600 + minute * 60 + second) * 1_000_000;
    let fraction = text.get(19..text.len() - 1)?;
    if !fraction.is_empty() {
        let digits = fraction.strip_prefix('.')?;
        let valid = (1..=9).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
        us += valid.then(|| format!("{digits:0<6}")[..6].parse::<u64>().ok())??;
    }
    Some(us)
}

fn days_in(year: u64, month: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Writes a time to the second, in UTC.
pub fn time(us: u64) -> String {
    let seconds = us / 1_000_000;
    let (mut days, of_day) = (seconds / DAY_SECONDS, seconds % DAY_SECONDS);
    let (mut year, mut month) = (1970, 1);
    let year_days = |year| if days_in(year, 2) == 29 { 366 } else { 365 };
    while days >= year_days(year) && year < 9999 {
        days -= year_days(year);
        year += 1;
    }
    while month < 12 && days >= days_in(year, month) {
        days -= days_in(year, month);
        month += 1;
    }
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", days + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn places_read_as_people_write_them() {
        let seq = |store, partition, seq| Ok(Bound::Seq { store, partition, seq });
        assert_eq!("1234".parse(), Ok(Bound::Offset(1234)));
        assert_eq!("3/42".parse(), seq(None, 3, 42));
        let store = Some(("edge-01".to_owned(), 0xab));
        assert_eq!("edge-01/00000000000000ab/3/42".parse(), seq(store, 3, 42));
        assert_eq!("2000-02-29".parse(), Ok(Bound::Time(951_782_400_000_000)));
        assert_eq!("2023-11-14T22:13:20.5Z".parse(), Ok(Bound::Time(1_700_000_000_500_000)));
        for wrong in [
            "",
            "-1",
            "noon",
            "3/",
            "a/b",
            "1/2/3",
            "99999/1",
            "2023-02-29",
            "2023-13-01",
            "2023-11-14T22:13:20",
            "2023-11-14T24:00:00Z",
            "2023-11-14T22:13:20.Z",
            "1969-12-31",
            "2023-11-14T22:13:2\u{e9}Z",
        ] {
            assert!(wrong.parse::<Bound>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_event_of_another_store_is_no_place_in_this_one() {
        let bound: Bound = "edge-01/00000000000000ab/3/42".parse().unwrap();
        assert_eq!(bound.place("edge-01", 0xab), Ok(Place::Seq { partition: 3, seq: 42 }));
        assert_eq!(bound.place("edge-01", 0xac), Err(BoundError::Foreign));
        assert_eq!(bound.place("edge-02", 0xab), Err(BoundError::Foreign));
    }

    proptest! {
        #[test]
        fn a_written_time_reads_back(seconds in 0..253_402_300_799_u64) {
            let us = seconds * 1_000_000;
            prop_assert_eq!(parse_time(&time(us)), Some(us));
        }

        #[test]
        fn a_written_place_reads_back(
            us in 0..253_402_300_799_000_000_u64, epoch: u64, partition: u16, seq: u64, whole: bool,
        ) {
            let store = whole.then(|| ("edge-01".to_owned(), epoch));
            for bound in [Bound::Offset(seq), Bound::Time(us), Bound::Seq { store, partition, seq }] {
                prop_assert_eq!(bound.to_string().parse(), Ok(bound));
            }
        }
    }
}
