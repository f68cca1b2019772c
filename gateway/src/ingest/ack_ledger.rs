//! What a connection owes its client: acks in the order in which the publishes came.
//!
//! Pure: no I/O, no clock. Publishes become durable in any order, because their partitions commit
//! independently of each other; [`AckLedger::release`] lets go of the contiguous durable prefix
//! only, as MQTT asks for acks in the order of the publishes [MQTT-4.6.0-2].

use std::collections::VecDeque;

/// Publishes of one connection that wait for their ack, oldest first. `T` is what the ack needs:
/// a packet identifier, say. The caller bounds its length before it enters another one.
#[derive(Debug)]
pub struct AckLedger<T> {
    /// Number of the first entry of `waiting`.
    first: u64,
    waiting: VecDeque<Entry<T>>,
}

#[derive(Debug)]
struct Entry<T> {
    ack: T,
    durable: bool,
}

impl<T> Default for AckLedger<T> {
    fn default() -> Self {
        Self { first: 0, waiting: VecDeque::new() }
    }
}

impl<T> AckLedger<T> {
    /// An empty ledger, whose first number is 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next publish and gives it its number, one above the last.
    pub fn enter(&mut self, ack: T) -> u64 {
        self.waiting.push_back(Entry { ack, durable: false });
        self.first + self.waiting.len() as u64 - 1
    }

    /// The publish with this number is durable.
    ///
    /// # Panics
    /// If the number was never given out, or is completed twice: a ticket is consumed once.
    pub fn complete(&mut self, number: u64) {
        let entry = number
            .checked_sub(self.first)
            .and_then(|index| self.waiting.get_mut(usize::try_from(index).ok()?))
            .filter(|entry| !entry.durable);
        let Some(entry) = entry else {
            panic!("publish {number} was completed, but does not wait")
        };
        entry.durable = true;
    }

    /// The next ack that may leave: the oldest publish, once it is durable.
    pub fn release(&mut self) -> Option<T> {
        let entry = self.waiting.pop_front_if(|entry| entry.durable)?;
        self.first += 1;
        Some(entry.ack)
    }

    /// The ack of a publish that waits.
    pub fn get(&self, number: u64) -> Option<&T> {
        let index = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.waiting.get(index).map(|entry| &entry.ack)
    }

    /// The ack of a publish that waits, to be changed.
    pub fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        let index = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.waiting.get_mut(index).map(|entry| &mut entry.ack)
    }

    /// Changes every ack that waits.
    pub fn for_each_mut(&mut self, change: impl FnMut(&mut T)) {
        self.waiting.iter_mut().map(|entry| &mut entry.ack).for_each(change);
    }

    /// Gives up all that wait, oldest first: each ack, and whether its publish is durable.
    pub fn drain(&mut self) -> impl Iterator<Item = (T, bool)> {
        self.first += self.waiting.len() as u64;
        self.waiting.drain(..).map(|entry| (entry.ack, entry.durable))
    }

    /// Publishes that wait for their ack, durable or not.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no publish waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_gap_holds_back_what_came_after_it() {
        let mut ledger = AckLedger::new();
        let numbers: Vec<u64> = ["a", "b", "c"].into_iter().map(|id| ledger.enter(id)).collect();
        assert_eq!(numbers, [0, 1, 2]);

        ledger.complete(1);
        assert_eq!(ledger.release(), None);
        ledger.complete(0);
        assert_eq!(ledger.release(), Some("a"));
        assert_eq!(ledger.release(), Some("b"));
        assert_eq!(ledger.release(), None);
        assert_eq!(ledger.len(), 1);
        assert_eq!(ledger.enter("d"), 3);
    }

    #[test]
    #[should_panic(expected = "publish 0 was completed")]
    fn completing_twice_is_a_bug() {
        let mut ledger = AckLedger::new();
        ledger.enter(());
        ledger.complete(0);
        ledger.complete(0);
    }

    #[test]
    #[should_panic(expected = "publish 1 was completed")]
    fn completing_what_never_entered_is_a_bug() {
        let mut ledger = AckLedger::new();
        ledger.enter(());
        ledger.complete(1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Enter,
        /// Completes the n-th of those that are not durable yet.
        Complete(prop::sample::Index),
        Release,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Enter),
            3 => any::<prop::sample::Index>().prop_map(Step::Complete),
            2 => Just(Step::Release),
        ]
    }

    proptest! {
        /// Against the naive model: everything that ever entered, and a flag for each.
        #[test]
        fn acks_leave_in_order_under_random_completion(
            steps in prop::collection::vec(step(), 0..400),
        ) {
            let mut ledger = AckLedger::new();
            let mut durable: Vec<bool> = Vec::new();
            let mut released = 0;

            for step in steps {
                match step {
                    Step::Enter => {
                        let number = ledger.enter(durable.len());
                        prop_assert_eq!(number, durable.len() as u64);
                        durable.push(false);
                    }
                    Step::Complete(which) => {
                        let open: Vec<usize> =
                            (0..durable.len()).filter(|n| !durable[*n]).collect();
                        if !open.is_empty() {
                            let number = *which.get(&open);
                            durable[number] = true;
                            ledger.complete(number as u64);
                        }
                    }
                    Step::Release => {
                        let expected =
                            durable.get(released).is_some_and(|done| *done).then_some(released);
                        prop_assert_eq!(ledger.release(), expected);
                        released += usize::from(expected.is_some());
                    }
                }
                prop_assert_eq!(ledger.len(), durable.len() - released);
                prop_assert_eq!(ledger.is_empty(), durable.len() == released);
            }
        }
    }
}
