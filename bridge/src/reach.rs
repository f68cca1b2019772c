//! How far a sink is, lane by lane: for a sink that keeps its cursor upstream, beside the data.
//!
//! Owns: [`Reach`], a cursor and what is done ahead of it, and how two of them are joined. Pure.
//! Invariant: a reach that others join only grows: what it has once held stays in it.
//! Deliberately absent: what is kept in the store (`storage::SinkProgress`, which counts as well).

use storage::{Ahead, Lanes};

/// A set of events: all below an offset, and some beyond it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Every event below is in it.
    pub(crate) cursor: u64,
    /// So are these. None ends at or below the cursor.
    pub(crate) ahead: Vec<Ahead>,
}

impl From<u64> for Reach {
    fn from(cursor: u64) -> Self {
        Self { cursor, ahead: Vec::new() }
    }
}

impl Reach {
    /// Where streams of any of these lanes begin that run ahead of others.
    pub(crate) fn splits(&self, lanes: Lanes) -> impl Iterator<Item = u64> {
        let after = self.cursor;
        let begun = move |ahead: &&Ahead| {
            lanes.without(ahead.lanes) != lanes && ahead.offsets.start > after
        };
        self.ahead.iter().filter(begun).map(|ahead| ahead.offsets.start)
    }
}

/// What a sink does with it that keeps its cursor upstream: Kafka's alone.
#[cfg(any(feature = "kafka", test))]
impl Reach {
    /// Whether an event is in it.
    pub(crate) fn has(&self, stored: &storage::StoredEvent) -> bool {
        stored.offset < self.cursor
            || !self.ahead.is_empty() && self.holds(stored.offset, stored.event.attributes.lane())
    }

    /// Whether an event of this lane is in it.
    pub(crate) fn holds(&self, offset: u64, lane: storage::Lane) -> bool {
        let holds = |a: &Ahead| a.lanes.contains(lane) && a.offsets.contains(&offset);
        offset < self.cursor || self.ahead.iter().any(holds)
    }

    /// Leaves what is below an offset.
    pub(crate) fn cut(&mut self, end: u64) {
        self.cursor = self.cursor.min(end);
        for ahead in &mut self.ahead {
            ahead.offsets.end = ahead.offsets.end.min(end);
        }
        self.ahead.retain(|ahead| ahead.offsets.end > self.cursor && !ahead.offsets.is_empty());
    }

    /// Takes in another.
    pub(crate) fn join(&mut self, other: Self) {
        self.cursor = self.cursor.max(other.cursor);
        for mut ahead in other.ahead {
            // What it overlaps or touches becomes one with it.
            self.ahead.retain(|held| {
                let apart = held.offsets.end < ahead.offsets.start
                    || ahead.offsets.end < held.offsets.start
                    || held.lanes != ahead.lanes;
                if !apart {
                    ahead.offsets.start = ahead.offsets.start.min(held.offsets.start);
                    ahead.offsets.end = ahead.offsets.end.max(held.offsets.end);
                }
                apart
            });
            self.ahead.push(ahead);
        }
        self.ahead.retain(|ahead| ahead.offsets.end > self.cursor);
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;
    use storage::{Attribute, Attributes, Event, Lane, Lanes, StoredEvent};

    use super::*;
    use crate::fake;

    fn stored(offset: u64, lane: Lane) -> StoredEvent {
        let attributes = Attributes::encode([Attribute::Lane(lane)]);
        let event = Event { attributes, ..fake::event("dev", "1") };
        StoredEvent { offset, seq: offset, event, stamp: None }
    }

    fn ahead(lanes: Lanes, offsets: Range<u64>) -> Ahead {
        Ahead { lanes, offsets }
    }

    #[test]
    fn what_is_ahead_is_so_in_its_lanes_alone() {
        let alarm = Lanes::NONE.with(Lane::Alarm);
        let reach = Reach { cursor: 10, ahead: vec![ahead(alarm, 15..20)] };
        for (offset, lane, has) in [
            (9, Lane::Live, true),
            (10, Lane::Alarm, false),
            (15, Lane::Alarm, true),
            (15, Lane::Live, false),
            (20, Lane::Alarm, false),
        ] {
            assert_eq!(reach.has(&stored(offset, lane)), has, "{offset} {lane:?}");
        }
    }

    #[test]
    fn ranges_that_meet_are_one_and_what_the_cursor_passes_is_gone() {
        let mut reach = Reach { cursor: 10, ahead: vec![ahead(Lanes::ALL, 50..60)] };
        reach.join(Reach { cursor: 5, ahead: vec![ahead(Lanes::ALL, 60..70)] });
        assert_eq!(reach, Reach { cursor: 10, ahead: vec![ahead(Lanes::ALL, 50..70)] });
        reach.join(Reach { cursor: 70, ahead: vec![ahead(Lanes::ALL, 80..81)] });
        assert_eq!(reach, Reach { cursor: 70, ahead: vec![ahead(Lanes::ALL, 80..81)] });
    }

    fn any_reach() -> impl Strategy<Value = Reach> {
        let lanes = prop_oneof![
            Just(Lanes::ALL),
            Just(Lanes::NONE.with(Lane::Alarm)),
            Just(Lanes::ALL.without(Lanes::NONE.with(Lane::Alarm))),
        ];
        let one = (lanes, 0_u64..30, 1_u64..10)
            .prop_map(|(lanes, start, length)| ahead(lanes, start..start + length));
        (0_u64..20, prop::collection::vec(one, 0..5)).prop_map(|(cursor, all)| {
            let mut reach = Reach::from(cursor);
            reach.join(Reach { cursor, ahead: all });
            reach
        })
    }

    proptest! {
        #[test]
        fn a_cut_leaves_what_is_below(mut reach in any_reach(), end in 0_u64..45) {
            let before = reach.clone();
            reach.cut(end);
            for offset in 0..45 {
                for lane in Lane::ALL {
                    let event = stored(offset, lane);
                    let kept = offset < end && before.has(&event);
                    prop_assert_eq!(reach.has(&event), kept, "{} {:?} in {:?}", offset, lane, reach);
                }
            }
            prop_assert!(reach.ahead.iter().all(|ahead| ahead.offsets.end > reach.cursor));
        }

        #[test]
        fn two_together_hold_what_either_held(mut a in any_reach(), b in any_reach()) {
            let (before, other) = (a.clone(), b.clone());
            a.join(b);
            for offset in 0..45 {
                for lane in Lane::ALL {
                    let event = stored(offset, lane);
                    let either = before.has(&event) || other.has(&event);
                    prop_assert_eq!(a.has(&event), either, "{} {:?} in {:?}", offset, lane, a);
                }
            }
            prop_assert!(a.ahead.iter().all(|ahead| ahead.offsets.end > a.cursor));
        }
    }
}
