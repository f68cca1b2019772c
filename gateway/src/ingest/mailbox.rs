//! How the committer tells a connection what became durable: one wake-up per connection and commit.
//!
//! Owns: [`Ticket`], the right to one completion, and [`AckMailbox`], where completions lie until
//! their connection collects them. A mailbox needs no bound of its own: a number is in it only
//! while its publish waits in the connection's ack ledger, which is bounded.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::Notify;

/// The right to one completion: consumed by the committer when the event is durable.
#[derive(Debug)]
pub struct Ticket {
    /// The connection's mailbox.
    pub mailbox: Arc<AckMailbox>,
    /// The connection's own number for this publish, rising by one.
    pub number: u64,
}

/// Why events of a connection were given up after they had been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivenUp {
    /// The commit that held them failed.
    Failed,
    /// The store is full, and whoever comes then is to be refused.
    Refused,
}

/// Per connection: numbers that became durable and were not collected yet. One connection collects,
/// any thread completes.
#[derive(Debug, Default)]
pub struct AckMailbox {
    durable: Mutex<Vec<u64>>,
    given_up: OnceLock<GivenUp>,
    wake: Notify,
}

impl AckMailbox {
    /// Committer: these numbers are durable. Wakes the connection once.
    pub fn complete(&self, numbers: &[u64]) {
        if self.put(numbers) {
            self.wake();
        }
    }

    /// Puts numbers in without waking anybody. `true` if the connection must be woken: nothing lay
    /// there before, so no earlier wake-up will find these.
    pub(super) fn put(&self, numbers: &[u64]) -> bool {
        let mut durable = self.durable();
        let was_empty = durable.is_empty();
        durable.extend_from_slice(numbers);
        was_empty && !numbers.is_empty()
    }

    /// Wakes the connection.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Committer: some of this connection's events are not stored, and the connection must close so
    /// that the device sends them again. The first reason stays.
    pub fn give_up(&self, why: GivenUp) {
        if self.given_up.set(why).is_ok() {
            self.wake();
        }
    }

    /// Whether [`AckMailbox::give_up`] was called: from then on no event of this connection may be
    /// stored, or the events sent again after it would come behind those that followed them.
    pub fn is_given_up(&self) -> bool {
        self.given_up.get().is_some()
    }

    /// Connection: moves what became durable into `into`.
    ///
    /// # Errors
    /// After [`AckMailbox::give_up`], with the reason.
    pub fn collect(&self, into: &mut Vec<u64>) -> Result<(), GivenUp> {
        let mut durable = self.durable();
        if into.is_empty() {
            // The usual case costs no copy, and the two buffers take turns.
            std::mem::swap(&mut *durable, into);
        } else {
            into.append(&mut durable);
        }
        self.given_up.get().map_or(Ok(()), |why| Err(*why))
    }

    /// Connection: resolves when there is something to collect. Cancel safe.
    pub async fn changed(&self) {
        // A wake-up that comes before the wait is kept by `Notify`, so none is lost; one left over
        // from what was collected in the meantime makes the loop look once more.
        while !self.is_given_up() && self.durable().is_empty() {
            self.wake.notified().await;
        }
    }

    fn durable(&self) -> MutexGuard<'_, Vec<u64>> {
        // Nothing in here can leave the list half changed.
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll(future: std::pin::Pin<&mut impl Future>) -> bool {
        matches!(future.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(_))
    }

    #[test]
    fn collects_what_is_durable_and_nothing_twice() {
        let mailbox = AckMailbox::default();
        let mut numbers = Vec::new();
        mailbox.complete(&[3, 1]);
        mailbox.complete(&[2]);
        assert_eq!(mailbox.collect(&mut numbers), Ok(()));
        assert_eq!(numbers, [3, 1, 2]);
        mailbox.complete(&[4]);
        assert_eq!(mailbox.collect(&mut numbers), Ok(()));
        assert_eq!(numbers, [3, 1, 2, 4]);
        numbers.clear();
        assert_eq!(mailbox.collect(&mut numbers), Ok(()));
        assert!(numbers.is_empty());
    }

    #[test]
    fn wakes_once_for_what_is_there() {
        let mailbox = AckMailbox::default();
        assert!(!mailbox.put(&[]));
        assert!(mailbox.put(&[1]));
        assert!(!mailbox.put(&[2]), "the first wake-up finds both");

        let mut changed = pin!(mailbox.changed());
        assert!(poll(changed.as_mut()), "what is there already needs no wake-up");
    }

    #[test]
    fn changed_waits_and_is_not_fooled_by_an_old_wake_up() {
        let mailbox = AckMailbox::default();
        mailbox.complete(&[1]);
        assert_eq!(mailbox.collect(&mut Vec::new()), Ok(()));

        let mut changed = pin!(mailbox.changed());
        assert!(!poll(changed.as_mut()), "the wake-up for number 1 is stale");
        mailbox.complete(&[2]);
        assert!(poll(changed.as_mut()));
    }

    #[test]
    fn a_cancelled_wait_loses_nothing() {
        let mailbox = AckMailbox::default();
        {
            let mut changed = pin!(mailbox.changed());
            assert!(!poll(changed.as_mut()));
        }
        mailbox.complete(&[1]);
        let mut changed = pin!(mailbox.changed());
        assert!(poll(changed.as_mut()));
    }

    #[test]
    fn giving_up_stays() {
        let mailbox = AckMailbox::default();
        let mut changed = pin!(mailbox.changed());
        assert!(!poll(changed.as_mut()));
        mailbox.give_up(GivenUp::Refused);
        assert!(poll(changed.as_mut()));
        let mut numbers = Vec::new();
        mailbox.complete(&[7]);
        assert_eq!(mailbox.collect(&mut numbers), Err(GivenUp::Refused));
        assert_eq!(numbers, [7], "what was durable before that may still be acked");
        mailbox.give_up(GivenUp::Failed);
        assert_eq!(mailbox.collect(&mut numbers), Err(GivenUp::Refused));
    }
}
