//! How the committer tells a connection what became durable: one wake-up per connection and commit.
//!
//! Owns: [`Ticket`], the right to one completion, and [`AckMailbox`], where completions lie until
//! their connection collects them. A mailbox needs no bound of its own: a number is in it only
//! while its publish waits in the connection's ack ledger, which is bounded.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The right to one completion: consumed by the committer when the event is durable.
#[derive(Debug)]
pub struct Ticket {
    /// The connection's mailbox.
    pub mailbox: Arc<AckMailbox>,
    /// The connection's own number for this publish, rising by one.
    pub number: u64,
}

/// Per connection: numbers that became durable and were not collected yet. One connection collects,
/// any thread completes.
#[derive(Debug, Default)]
pub struct AckMailbox {
    durable: Mutex<Vec<u64>>,
    failed: AtomicBool,
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

    /// Committer: the commit that held some of this connection's events failed; they are not
    /// stored, and the connection must close so that the device sends them again.
    pub fn fail(&self) {
        if !self.failed.swap(true, Ordering::AcqRel) {
            self.wake();
        }
    }

    /// Whether [`AckMailbox::fail`] was called: from then on no event of this connection may be
    /// stored, or the events sent again after it would come behind those that followed them.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Connection: moves what became durable into `into`. `false` after [`AckMailbox::fail`].
    pub fn collect(&self, into: &mut Vec<u64>) -> bool {
        let mut durable = self.durable();
        if into.is_empty() {
            // The usual case costs no copy, and the two buffers take turns.
            std::mem::swap(&mut *durable, into);
        } else {
            into.append(&mut durable);
        }
        !self.is_failed()
    }

    /// Connection: resolves when there is something to collect. Cancel safe.
    pub async fn changed(&self) {
        // A wake-up that comes before the wait is kept by `Notify`, so none is lost; one left over
        // from what was collected in the meantime makes the loop look once more.
        while !self.is_failed() && self.durable().is_empty() {
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
        assert!(mailbox.collect(&mut numbers));
        assert_eq!(numbers, [3, 1, 2]);
        mailbox.complete(&[4]);
        assert!(mailbox.collect(&mut numbers));
        assert_eq!(numbers, [3, 1, 2, 4]);
        numbers.clear();
        assert!(mailbox.collect(&mut numbers));
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
        mailbox.collect(&mut Vec::new());

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
    fn failure_stays() {
        let mailbox = AckMailbox::default();
        let mut changed = pin!(mailbox.changed());
        assert!(!poll(changed.as_mut()));
        mailbox.fail();
        assert!(poll(changed.as_mut()));
        let mut numbers = Vec::new();
        mailbox.complete(&[7]);
        assert!(!mailbox.collect(&mut numbers));
        assert_eq!(numbers, [7], "what was durable before the failure may still be acked");
        assert!(!mailbox.collect(&mut numbers));
    }
}
