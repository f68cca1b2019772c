//! When an event came, and how well that is known.
//!
//! Owns: [`Clock`] (what a machine says of its clock), [`Stamp`] (what a stored event says of its time)
//! and the offsets of the boots whose clock was set, control records in a namespace of the store's own.
//! A machine without a battery for its clock does not know the time when it comes up; but it knows how
//! long it is up. So a batch carries the boot and the uptime beside the time, and once the clock of that
//! boot is set the times before are known as well: they are corrected on the way out, never in the log.
//!
//! Invariant: the offset of a boot is written once. What was told of an event's time once it was
//! corrected stays so, however often the clock is set afterwards.
//! Deliberately absent: reading any clock.

use std::collections::HashMap;

use bytes::Bytes;

use crate::control::Control;
use crate::event::StoredEvent;
use crate::row::{Corrupt, Reader, Row};

/// Namespace of the key-value projection; the key is the boot, 8 bytes big-endian.
pub(crate) const NAMESPACE: u16 = 0xFF01;

/// Boots whose offset is kept; the one that came up first goes first. What is left in the log of a
/// boot that went keeps the times that its clock gave.
const BOOTS_MAX: usize = 1024;

/// What a machine says of its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Which boot: a random number, not 0.
    pub boot: u64,
    /// What the time was when the machine came up, by its clock as it stands: the time less the
    /// uptime, in microseconds since the Unix epoch.
    pub offset_us: i64,
    /// Whether the clock was set from a source that knows the time.
    pub synchronised: bool,
}

impl Clock {
    /// Uptime at a time of this clock, in microseconds.
    pub fn uptime_us(&self, time_us: u64) -> u64 {
        u64::try_from(i128::from(time_us) - i128::from(self.offset_us)).unwrap_or(0)
    }
}

/// When an event came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The boot of the machine that it came in.
    pub boot: u64,
    /// How long the machine was up, in microseconds. Rises with the offset within a boot, if the times
    /// of the events do with which they were committed.
    pub uptime_us: u64,
    /// The time as well as it is known, in microseconds since the Unix epoch. Unlike
    /// [`crate::Event::received_us`] it may go back from one event to the next, where the clock was
    /// set back.
    pub received_us: u64,
    /// How well that is.
    pub quality: TimeQuality,
}

/// How well the time of an event is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeQuality {
    /// The clock was set when the event came.
    Synchronised,
    /// The clock was not set, and nothing since has told what the time was.
    Unsynchronised,
    /// The clock was not set, but it was later in the same boot: the time is the one that the uptime
    /// came to by then.
    Corrected,
}

impl TimeQuality {
    /// In the order of their numbers in stored rows.
    pub(crate) const ALL: [Self; 3] = [Self::Synchronised, Self::Unsynchronised, Self::Corrected];
}

/// What every boot says of its clock, as far as it was set.
#[derive(Clone, Debug, Default)]
pub(crate) struct Boots(HashMap<u64, i64>);

impl Boots {
    /// Takes in rows of the projection, or what became of one. A damaged row is none: its events keep
    /// the times that their clock gave.
    pub(crate) fn apply(&mut self, key: &[u8], value: Option<&Bytes>) {
        let Ok(boot) = key.try_into().map(u64::from_be_bytes) else {
            return;
        };
        match value.map(|value| decode(value.clone())) {
            Some(Ok(offset_us)) => drop(self.0.insert(boot, offset_us)),
            Some(Err(Corrupt)) | None => drop(self.0.remove(&boot)),
        }
    }

    /// What is to be committed now that a clock says this: nothing unless it is set, and was not
    /// before in this boot.
    pub(crate) fn learn(&self, clock: &Clock) -> Vec<Control> {
        if !clock.synchronised || self.0.contains_key(&clock.boot) {
            return Vec::new();
        }
        let mut kept: Vec<(i64, u64)> =
            self.0.iter().map(|(&boot, &offset_us)| (offset_us, boot)).collect();
        kept.sort_unstable();
        let surplus = (kept.len() + 1).saturating_sub(BOOTS_MAX);
        let key = |boot: u64| Bytes::copy_from_slice(&boot.to_be_bytes());
        let goes =
            |&(_, boot): &(i64, u64)| Control::Delete { namespace: NAMESPACE, key: key(boot) };
        let mut row = Row::new();
        row.number(clock.offset_us.cast_unsigned());
        let value = row.finish().into();
        let put = Control::Put { namespace: NAMESPACE, key: key(clock.boot), value };
        kept[..surplus].iter().map(goes).chain([put]).collect()
    }

    /// Corrects the time of an event, where it is known by now.
    pub(crate) fn correct(&self, stored: &mut StoredEvent) {
        if let Some(stamp) = &mut stored.stamp
            && stamp.quality == TimeQuality::Unsynchronised
            && let Some(&offset_us) = self.0.get(&stamp.boot)
        {
            stamp.received_us = stamp.uptime_us.saturating_add_signed(offset_us);
            stamp.quality = TimeQuality::Corrected;
        }
    }

    /// How long ago an event came that was corrected, at the time `now_us` of `clock`; not more than
    /// is certain, for what is old may be dropped. Within a boot the uptime tells, whatever was done to
    /// the clock. Between boots the times do, if the clock was set in both; if not, it is not less than
    /// the uptime. A clock that is set again does not count: it may have gone wrong.
    pub(crate) fn age_us(&self, event: &StoredEvent, clock: Option<&Clock>, now_us: u64) -> u64 {
        let Some(clock) = clock else {
            return now_us.saturating_sub(event.received_us());
        };
        let uptime_us = clock.uptime_us(now_us);
        let known = self.0.get(&clock.boot);
        let since = |received_us| {
            let now_us = uptime_us.saturating_add_signed(*known?);
            Some(now_us.saturating_sub(received_us))
        };
        match event.stamp {
            Some(stamp) if stamp.boot == clock.boot => uptime_us.saturating_sub(stamp.uptime_us),
            Some(stamp) if stamp.quality == TimeQuality::Unsynchronised => uptime_us,
            Some(stamp) => since(stamp.received_us).unwrap_or(0).max(uptime_us),
            // An older version stored it, perhaps in this boot.
            None => since(event.event.received_us).unwrap_or(0),
        }
    }
}

fn decode(row: Bytes) -> Result<i64, Corrupt> {
    Ok(Reader::checked(row)?.number()?.cast_signed())
}

#[cfg(test)]
mod tests {
    use TimeQuality::{Corrected, Unsynchronised};

    use super::*;
    use crate::event::Event;

    const HOUR_US: u64 = 3_600_000_000;

    fn boots(clocks: impl IntoIterator<Item = Clock>) -> Boots {
        let mut boots = Boots::default();
        for clock in clocks {
            for control in boots.learn(&clock) {
                match control {
                    Control::Put { key, value, .. } => boots.apply(&key, Some(&value)),
                    Control::Delete { key, .. } => boots.apply(&key, None),
                    Control::Cursor { .. } => panic!("no cursor"),
                }
            }
        }
        boots
    }

    fn clock(boot: u64, offset_us: i64) -> Clock {
        Clock { boot, offset_us, synchronised: true }
    }

    fn stored(stamp: Option<Stamp>, received_us: u64) -> StoredEvent {
        let event = Event {
            partition: 0,
            received_us,
            device_key: "d".into(),
            topic: "t".into(),
            attributes: crate::Attributes::default(),
            payload: Bytes::new(),
        };
        StoredEvent { offset: 0, seq: 0, event, stamp }
    }

    fn unsynchronised(boot: u64, uptime_us: u64) -> StoredEvent {
        let quality = TimeQuality::Unsynchronised;
        stored(Some(Stamp { boot, uptime_us, received_us: 7, quality }), 7)
    }

    #[test]
    fn the_first_word_on_a_boot_stands() {
        assert!(boots([]).learn(&Clock { synchronised: false, ..clock(1, 5) }).is_empty());
        let boots = boots([clock(1, -1000), clock(1, 9_000), clock(2, 50)]);
        let corrected = |mut event| {
            boots.correct(&mut event);
            event.stamp.map(|stamp| (stamp.received_us, stamp.quality))
        };
        assert_eq!(corrected(unsynchronised(1, 3_000)), Some((2_000, Corrected)));
        assert_eq!(corrected(unsynchronised(2, 3)), Some((53, Corrected)));
        assert_eq!(corrected(unsynchronised(3, 3)), Some((7, Unsynchronised)));
        assert_eq!(corrected(stored(None, 3)), None);
    }

    #[test]
    fn the_boots_are_bounded_and_the_first_goes_first() {
        let many = 1..=BOOTS_MAX as u64 + 3;
        let boots = boots(many.map(|boot| clock(boot, 10 * boot.cast_signed())));
        assert_eq!(boots.0.len(), BOOTS_MAX);
        assert!(!boots.0.contains_key(&3) && boots.0.contains_key(&4));
    }

    #[test]
    fn a_damaged_row_corrects_nothing() {
        let [Control::Put { key, value, .. }] = &Boots::default().learn(&clock(1, 5))[..] else {
            panic!("one row")
        };
        let mut bad = value.to_vec();
        bad[1] ^= 1;
        let mut boots = boots([]);
        boots.apply(key, Some(&bad.into()));
        boots.apply(b"no boot", Some(value));
        assert!(boots.0.is_empty());
    }

    /// The clock of an event's boot may have been anything: only what is certain counts.
    #[test]
    fn an_age_is_never_more_than_is_certain() {
        let start_us = 1_700_000_000_000_000_u64;
        let (then, now) =
            (clock(1, start_us.cast_signed()), clock(2, (start_us + HOUR_US).cast_signed()));
        let synchronised = stored(
            Some(Stamp {
                boot: 1,
                uptime_us: 5,
                received_us: start_us + 5,
                quality: TimeQuality::Synchronised,
            }),
            start_us + 5,
        );
        let age = |boots: &Boots, event: &StoredEvent, clock: &Clock, uptime_us: u64| {
            let now_us = uptime_us.saturating_add_signed(clock.offset_us);
            let mut event = event.clone();
            boots.correct(&mut event);
            boots.age_us(&event, Some(clock), now_us)
        };
        let both = boots([then, now]);
        assert_eq!(age(&both, &synchronised, &now, 100), HOUR_US + 95);
        assert_eq!(age(&both, &unsynchronised(1, 5), &now, 100), HOUR_US + 95, "corrected");
        // The clock leaps fifty years ahead: nothing is older for that.
        let leapt = clock(2, now.offset_us + (50 * 365 * 24 * HOUR_US).cast_signed());
        assert_eq!(age(&both, &synchronised, &leapt, 100), HOUR_US + 95);
        assert_eq!(age(&both, &unsynchronised(2, 40), &leapt, 100), 60);
        // It stands at its beginning: certain is only how long the machine is up.
        let unset = Clock { boot: 3, offset_us: 0, synchronised: false };
        assert_eq!(age(&both, &synchronised, &unset, 100), 100);
        assert_eq!(age(&both, &stored(None, 5), &unset, 100), 0);
        assert_eq!(age(&both, &stored(None, start_us), &now, 100), HOUR_US + 100);
        // Nobody told of a clock: the times stand for themselves.
        assert_eq!(both.age_us(&synchronised, None, start_us + 100), 95);
    }
}
