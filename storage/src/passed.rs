//! What a sink has passed beside its cursor: what it did not want, and what it got ahead of its turn.
//!
//! Owns: [`Passed`] and its stored form, a control record that rides in the same commit as the
//! cursor, so that the two never tell of different moments.
//! Invariant: nothing here moves the cursor, which alone decides what may be trimmed.
//! Deliberately absent: why a sink filters or runs ahead (the bridge).

use std::ops::Range;

use bytes::Bytes;

use crate::control::Control;
use crate::event::Lane;
use crate::ranges::Ranges;
use crate::row::{Corrupt, Reader, Row};

/// Namespace of the key-value projection; the key is the sink's name. Those from `0xFF00` on are
/// the store's own.
pub const NAMESPACE: u16 = 0xFF00;

/// More ranges than any sink runs ahead in; a record that claims more is none.
const AHEAD_MAX: u64 = 64;

/// How far a sink is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SinkProgress {
    /// Next offset that it needs.
    pub cursor: u64,
    /// What it has passed beside that.
    pub passed: Passed,
}

impl From<u64> for SinkProgress {
    /// A sink that wants everything, in order.
    fn from(cursor: u64) -> Self {
        Self { cursor, passed: Passed::default() }
    }
}

/// What a sink has passed beside its cursor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Events that it did not want, of all that are done.
    pub filtered: u64,
    /// What is done from its cursor on.
    pub ahead: Vec<Ahead>,
    /// What it has sent of a monthly budget.
    pub spent: Spent,
}

/// A range of which every event in some lanes is done: delivered, filtered or a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// The lanes.
    pub lanes: Lanes,
    /// Offsets, end-exclusive.
    pub offsets: Range<u64>,
}

/// What was sent in one month.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Months since January 1970, UTC.
    pub month: u32,
    /// Event bytes sent in it.
    pub size_bytes: u64,
}

/// A set of lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lanes(u8);

impl Lanes {
    /// Every lane.
    pub const ALL: Self = Self((1 << Lane::ALL.len()) - 1);
    /// No lane.
    pub const NONE: Self = Self(0);

    /// Whether a lane is in it.
    pub fn contains(self, lane: Lane) -> bool {
        self.0 & 1 << lane as u8 != 0
    }

    /// The set and one lane more.
    #[must_use]
    pub fn with(self, lane: Lane) -> Self {
        Self(self.0 | 1 << lane as u8)
    }

    /// The set but for some lanes.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether every lane of another set is in it.
    pub fn covers(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }
}

impl Passed {
    /// What sets it, for the commit that moves the cursor.
    pub fn control(&self, sink: &str) -> Control {
        Control::Put {
            namespace: NAMESPACE,
            key: Bytes::copy_from_slice(sink.as_bytes()),
            value: self.encode().into(),
        }
    }

    /// What of some lanes is still to be done, from a cursor on, in order; the last range has no end
    /// and ends at `u64::MAX`.
    pub fn gaps(&self, lanes: Lanes, cursor: u64) -> Vec<Range<u64>> {
        let gaps = Ranges::from(cursor..u64::MAX).without(&self.done(lanes));
        gaps.iter().cloned().collect()
    }

    /// What is done ahead of the cursor, of all events in `lanes`.
    pub(crate) fn done(&self, lanes: Lanes) -> Ranges {
        let covering = self.ahead.iter().filter(|ahead| ahead.lanes.covers(lanes));
        covering.map(|ahead| ahead.offsets.clone()).collect()
    }

    fn encode(&self) -> Vec<u8> {
        let mut row = Row::new();
        row.number(self.filtered);
        row.number(self.spent.month.into()).number(self.spent.size_bytes);
        row.number(self.ahead.len() as u64);
        for Ahead { lanes, offsets } in &self.ahead {
            row.number(lanes.0.into()).number(offsets.start).number(offsets.end);
        }
        row.finish()
    }

    pub(crate) fn decode(row: Bytes) -> Result<Self, Corrupt> {
        let mut row = Reader::checked(row)?;
        let filtered = row.number()?;
        let month = u32::try_from(row.number()?).map_err(|_| Corrupt)?;
        let spent = Spent { month, size_bytes: row.number()? };
        let count = row.number()?;
        if count > AHEAD_MAX {
            return Err(Corrupt);
        }
        let mut ahead = || -> Result<Ahead, Corrupt> {
            let lanes = u8::try_from(row.number()?).map_err(|_| Corrupt)?;
            Ok(Ahead { lanes: Lanes(lanes), offsets: row.number()?..row.number()? })
        };
        let ahead = (0..count).map(|_| ahead()).collect::<Result<_, _>>()?;
        Ok(Self { filtered, ahead, spent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_passed_round_trips_and_damage_is_found() {
        let alarm = Lanes::NONE.with(Lane::Alarm);
        let passed = Passed {
            filtered: 1 << 40,
            ahead: vec![
                Ahead { lanes: Lanes::ALL, offsets: 7..9 },
                Ahead { lanes: alarm, offsets: 0..u64::MAX },
            ],
            spent: Spent { month: 670, size_bytes: 12 },
        };
        let Control::Put { value, .. } = passed.control("cloud") else { panic!("a Put") };
        assert_eq!(Passed::decode(value.clone()), Ok(passed.clone()));
        for at in 0..value.len() {
            let mut bad = value.to_vec();
            bad[at] ^= 1;
            assert_eq!(Passed::decode(bad.into()), Err(Corrupt), "byte {at}");
        }
        assert_eq!(passed.done(Lanes::ALL), (7..9).into());
        assert_eq!(passed.done(alarm), (0..u64::MAX).into());
        assert_eq!(passed.gaps(Lanes::ALL, 3), [3..7, 9..u64::MAX]);
        assert_eq!(passed.gaps(Lanes::ALL, 10).first(), Some(&(10..u64::MAX)));
    }

    #[test]
    fn lanes_are_a_set() {
        let rest = Lanes::ALL.without(Lanes::NONE.with(Lane::Alarm));
        assert!(!rest.contains(Lane::Alarm) && rest.contains(Lane::Live));
        assert!(Lanes::ALL.covers(rest) && !rest.covers(Lanes::ALL));
        assert_eq!(rest.with(Lane::Alarm), Lanes::ALL);
    }
}
