//! The sequence rule: how a receiver that wants to sees each event once.
//!
//! A gateway sends the events of a partition in the order of their sequence numbers, and after a lost
//! answer sends them again from where it does not know. So a receiver that keeps, with its data, the
//! last sequence number per gateway, epoch and partition, and passes over what is not above it, has
//! each event once. Gaps are no reason to wait: what the gateway gave up is in its dead letters or its
//! loss ledger.
//!
//! Owns: the last numbers. Whoever records moves them together with its rows.
//! Deliberately absent: events that stand outside the order (requeued, replayed): they come below the
//! last number, and a receiver that wants them once must remember their ids.

use std::collections::HashMap;

use crate::ledger::Place;

/// Last sequence number by what is before it in an id: `gateway/epoch/partition`.
#[derive(Clone, Debug, Default)]
pub(super) struct SequenceRule(HashMap<String, u64>);

impl SequenceRule {
    /// Whether an event is new, and moves the last number to it if so. An event that no gateway
    /// numbered is always new.
    pub(super) fn admit(&mut self, id: &str, place: Option<Place>) -> bool {
        let (Some(Place { seq, .. }), Some((partition, _))) = (place, id.rsplit_once('/')) else {
            return true;
        };
        match self.0.get_mut(partition) {
            Some(last) if seq <= *last => return false,
            Some(last) => *last = seq,
            None => drop(self.0.insert(partition.to_owned(), seq)),
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
        rule.admit(id, place(id))
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
