//! The sequence rule: how a receiver that wants to sees each event once.
//!
//! A gateway sends the events of a partition in the order of their sequence numbers, and after a lost
//! answer sends them again from where it does not know. So a receiver that keeps, with its data, the
//! last sequence number per gateway, epoch and partition, and passes over what is not above it, has
//! each event once. Gaps are no reason to wait: what the gateway gave up is in its dead letters or its
//! loss ledger. Where a sink has lanes or sends live events ahead of a backlog, its events say so
//! (`lane`, `stream`), and each of these rows has numbers of its own.
//!
//! Owns: the last numbers. Whoever records moves them together with its rows.
//! Deliberately absent: events that stand outside the order (`requeued`, or of the stream `replay`):
//! they come below the last number and are always new here. A receiver that wants them once must
//! remember their ids.

use std::collections::HashMap;

use crate::ledger::Place;

/// The row of its partition's events in which one comes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Row {
    /// The only one.
    #[default]
    Plain,
    /// That of this lane and stream.
    Of(String),
    /// None: it is sent again for somebody who asked.
    Outside,
}

impl Row {
    /// What an event says with these extensions, empty where it does not have them.
    pub(super) fn of(lane: &str, stream: &str, requeued: bool) -> Self {
        match (lane, stream) {
            _ if requeued || stream == "replay" => Self::Outside,
            ("", "") => Self::Plain,
            (lane, stream) => Self::Of(format!("{lane}/{stream}")),
        }
    }
}

/// Last sequence number by what is before it in an id, `gateway/epoch/partition`, and by row.
#[derive(Clone, Debug, Default)]
pub(super) struct SequenceRule(HashMap<String, u64>);

impl SequenceRule {
    /// Whether an event is new, and moves the last number to it if so. An event that no gateway
    /// numbered is always new.
    pub(super) fn admit(&mut self, id: &str, place: Option<Place>, row: &Row) -> bool {
        let (Some(Place { seq, .. }), Some((partition, _))) = (place, id.rsplit_once('/')) else {
            return true;
        };
        let key = match row {
            Row::Plain => partition.to_owned(),
            Row::Of(row) => format!("{partition}/{row}"),
            Row::Outside => return true,
        };
        match self.0.get_mut(&key) {
            Some(last) if seq <= *last => return false,
            Some(last) => *last = seq,
            None => drop(self.0.insert(key, seq)),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::collect::cloudevents::place;

    fn admit(rule: &mut SequenceRule, id: &str) -> bool {
        rule.admit(id, place(id), &Row::Plain)
    }

    #[test]
    fn lanes_and_streams_have_numbers_of_their_own_and_what_is_asked_for_again_has_none() {
        let mut rule = SequenceRule::default();
        let alarm = Row::of("alarm", "", false);
        let backfill = Row::of("", "backfill", false);
        for (id, row, is_new) in [
            ("edge/aa/0/9", &alarm, true),
            ("edge/aa/0/5", &Row::of("", "", false), true),
            ("edge/aa/0/2", &backfill, true),
            ("edge/aa/0/2", &backfill, false),
            ("edge/aa/0/8", &alarm, false),
            ("edge/aa/0/6", &Row::Plain, true),
            ("edge/aa/0/1", &Row::of("", "", true), true),
            ("edge/aa/0/1", &Row::of("alarm", "replay", false), true),
        ] {
            assert_eq!(rule.admit(id, place(id), row), is_new, "{id} {row:?}");
        }
    }

    #[test]
    fn each_partition_of_each_store_has_its_own_last_number() {
        let mut rule = SequenceRule::default();
        for id in ["edge/aa/0/0", "edge/aa/0/7", "edge/aa/1/3", "edge/bb/0/1", "other/aa/0/1"] {
            assert!(admit(&mut rule, id), "{id}");
            assert!(!admit(&mut rule, id), "{id} again");
        }
        assert!(!admit(&mut rule, "edge/aa/0/6"));
        assert!(admit(&mut rule, "edge/aa/0/8"));
        for foreign in ["x", "x", ""] {
            assert!(admit(&mut rule, foreign));
        }
    }

    proptest! {
        /// However a sender goes back after lost answers, the receiver has every event once, in order.
        #[test]
        fn going_back_gives_nothing_twice_and_loses_nothing(
            steps in proptest::collection::vec((0..2_u8, 1..20_u64, 0..20_u64), 0..40),
        ) {
            let (mut rule, mut taken) = (SequenceRule::default(), Vec::new());
            let mut next = [0_u64; 2];
            for (partition, forward, back) in steps {
                let cursor = &mut next[usize::from(partition)];
                for seq in *cursor..*cursor + forward {
                    let id = format!("edge/aa/{partition}/{seq}");
                    if admit(&mut rule, &id) {
                        taken.push((partition, seq));
                    }
                }
                *cursor = (*cursor + forward).saturating_sub(back);
            }
            let unique: HashSet<_> = taken.iter().copied().collect();
            prop_assert_eq!(unique.len(), taken.len());
            for partition in 0..2 {
                let seqs: Vec<_> = taken.iter().filter(|e| e.0 == partition).map(|e| e.1).collect();
                prop_assert!(seqs.iter().copied().eq(0..seqs.len() as u64));
            }
        }
    }
}
