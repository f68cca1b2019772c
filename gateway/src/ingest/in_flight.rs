//! Commits that are numbered but not yet durable, and the tickets that ride in them.
//!
//! Invariant: a ticket is completed only once the durable [`Mark`] covers its commit, whoever
//! raises the mark and whenever: before `commit` returns, as a backend that waits for its sync
//! does, or after it, from a thread of the backend's own. Nothing here knows which it is.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use storage::Mark;
use tokio::sync::watch;

use super::latency::{Latency, LatencyStats};
use super::stats::Durable;
use super::{AckMailbox, GivenUp, Ticket};

/// A ticket on its way, and since when its client waits.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) ticket: Ticket,
    pub(super) read_at: Instant,
}

/// One commit that was handed to the log.
#[derive(Debug)]
pub(super) struct Commit {
    /// Its number.
    pub(super) number: u64,
    /// Events in it.
    pub(super) events: u64,
    /// Event bytes in it.
    pub(super) size_bytes: u64,
    /// When it was handed over.
    pub(super) began: Instant,
}

/// Bounded by the log: it lets only so many commits run ahead of the mark.
#[derive(Debug)]
pub(super) struct InFlight {
    state: Mutex<State>,
    watermark: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    /// Highest durable commit.
    durable: u64,
    /// Commits beyond it with the number of their tickets, oldest first.
    commits: VecDeque<(Commit, usize)>,
    /// Their tickets, in the order of the commits.
    waiting: VecDeque<Waiting>,
    /// Buffers that are kept to save the allocations.
    numbers: Vec<u64>,
    to_wake: Vec<Arc<AckMailbox>>,
    totals: Durable,
    commit_latency: Latency,
    ack_latency: Latency,
}

impl InFlight {
    /// `watermark` is the durable end of the log now.
    pub(super) fn new(watermark: u64, now: Instant) -> Self {
        Self {
            state: Mutex::new(State {
                durable: 0,
                commits: VecDeque::new(),
                waiting: VecDeque::new(),
                numbers: Vec::new(),
                to_wake: Vec::new(),
                totals: Durable::default(),
                commit_latency: Latency::new(now),
                ack_latency: Latency::new(now),
            }),
            watermark: watch::Sender::new(watermark),
        }
    }

    /// The durable end of the log, now and whenever it rises.
    pub(super) fn watermark(&self) -> watch::Receiver<u64> {
        self.watermark.subscribe()
    }

    /// A commit was handed to the log. Takes its tickets out of `waiting`.
    pub(super) fn committed(&self, commit: Commit, waiting: &mut Vec<Waiting>, now: Instant) {
        let mut state = self.lock();
        state.commits.push_back((commit, waiting.len()));
        state.waiting.extend(waiting.drain(..));
        state.release(now);
    }

    /// The mark rose: publishes the watermark, and completes the tickets of the commits that it
    /// covers, with one wake-up per connection. In this order: who has its ack finds its event.
    pub(super) fn durable(&self, mark: Mark, now: Instant) {
        self.watermark.send_if_modified(|watermark| {
            let rises = mark.watermark > *watermark;
            *watermark = mark.watermark.max(*watermark);
            rises
        });
        let mut state = self.lock();
        state.durable = state.durable.max(mark.commit);
        state.release(now);
    }

    /// The log has given up everything beyond the mark: those connections must close.
    pub(super) fn fail(&self) {
        let mut state = self.lock();
        state.commits.clear();
        state.waiting.drain(..).for_each(|waiting| waiting.ticket.mailbox.give_up(GivenUp::Failed));
    }

    /// What became durable, and how long commits and acks took.
    pub(super) fn stats(&self, now: Instant) -> (Durable, LatencyStats, LatencyStats) {
        let mut state = self.lock();
        (state.totals, state.commit_latency.stats(now), state.ack_latency.stats(now))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Only a broken invariant panics in here, on the committer's thread, and that ends the
        // process; until then the state may still be looked at.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn release(&mut self, now: Instant) {
        while let Some((commit, tickets)) =
            self.commits.pop_front_if(|(commit, _)| commit.number <= self.durable)
        {
            self.totals.commits += 1;
            self.totals.events += commit.events;
            self.totals.size_bytes += commit.size_bytes;
            self.commit_latency.record(now.saturating_duration_since(commit.began), 1, now);
            self.put(tickets, now);
        }
        // Woken last, so that a connection finds everything that became durable at once.
        self.to_wake.drain(..).for_each(|mailbox| mailbox.wake());
    }

    /// Puts the oldest tickets into their mailboxes, a run of one connection at a time.
    fn put(&mut self, tickets: usize, now: Instant) {
        let mut tickets = self.waiting.drain(..tickets);
        let Some(Waiting { ticket, read_at }) = tickets.next() else {
            return;
        };
        let mut mailbox = ticket.mailbox;
        self.numbers.push(ticket.number);
        // Publishes that came in one read share its time.
        let mut same_read = (read_at, 1);
        let mut record = |(read_at, count): (Instant, u64)| {
            let latency: Duration = now.saturating_duration_since(read_at);
            self.ack_latency.record(latency, count, now);
        };
        for Waiting { ticket, read_at } in tickets {
            if read_at == same_read.0 {
                same_read.1 += 1;
            } else {
                record(std::mem::replace(&mut same_read, (read_at, 1)));
            }
            if !Arc::ptr_eq(&ticket.mailbox, &mailbox) {
                let before = std::mem::replace(&mut mailbox, ticket.mailbox);
                if before.put(&self.numbers) {
                    self.to_wake.push(before);
                }
                self.numbers.clear();
            }
            self.numbers.push(ticket.number);
        }
        record(same_read);
        if mailbox.put(&self.numbers) {
            self.to_wake.push(mailbox);
        }
        self.numbers.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn commit(number: u64) -> Commit {
        Commit { number, events: 1, size_bytes: 10, began: Instant::now() }
    }

    fn tickets(mailbox: &Arc<AckMailbox>, numbers: &[u64]) -> Vec<Waiting> {
        let ticket = |number: &u64| Ticket { mailbox: Arc::clone(mailbox), number: *number };
        numbers.iter().map(|n| Waiting { ticket: ticket(n), read_at: Instant::now() }).collect()
    }

    fn collected(mailbox: &AckMailbox) -> Vec<u64> {
        let mut numbers = Vec::new();
        assert_eq!(mailbox.collect(&mut numbers), Ok(()));
        numbers
    }

    fn mark(commit: u64, watermark: u64) -> Mark {
        Mark { commit, watermark }
    }

    #[test]
    fn tickets_wait_for_the_mark_whether_it_rises_before_or_after_the_commit_returns() {
        let now = Instant::now();
        let in_flight = InFlight::new(100, now);
        let watermark = in_flight.watermark();
        let mailbox = Arc::new(AckMailbox::default());

        // A backend that waits: the mark first.
        in_flight.durable(mark(1, 102), now);
        in_flight.committed(commit(1), &mut tickets(&mailbox, &[0, 1]), now);
        assert_eq!(collected(&mailbox), [0, 1]);

        // A backend that runs ahead: two commits, then their marks, the first partial.
        in_flight.committed(commit(2), &mut tickets(&mailbox, &[2]), now);
        in_flight.committed(commit(3), &mut tickets(&mailbox, &[3]), now);
        assert!(collected(&mailbox).is_empty());
        in_flight.durable(mark(2, 103), now);
        assert_eq!(collected(&mailbox), [2]);
        assert_eq!(*watermark.borrow(), 103);
        in_flight.durable(mark(3, 104), now);
        assert_eq!(collected(&mailbox), [3]);

        let (totals, commits, acks) = in_flight.stats(now);
        assert_eq!(totals, Durable { commits: 3, events: 3, size_bytes: 30 });
        assert_eq!((commits.count, acks.count), (3, 4));
    }

    #[test]
    fn failure_reaches_what_is_not_durable_and_nothing_else() {
        let now = Instant::now();
        let in_flight = InFlight::new(0, now);
        let [safe, lost] = [(); 2].map(|()| Arc::new(AckMailbox::default()));
        in_flight.committed(commit(1), &mut tickets(&safe, &[0]), now);
        in_flight.committed(commit(2), &mut tickets(&lost, &[0]), now);
        in_flight.durable(mark(1, 1), now);
        in_flight.fail();
        in_flight.durable(mark(3, 5), now);
        assert_eq!(collected(&safe), [0]);
        let mut numbers = Vec::new();
        assert_eq!(lost.collect(&mut numbers), Err(GivenUp::Failed));
        assert!(numbers.is_empty());
    }

    #[test]
    fn the_watermark_never_falls() {
        let now = Instant::now();
        let in_flight = InFlight::new(7, now);
        in_flight.durable(mark(1, 3), now);
        assert_eq!(*in_flight.watermark().borrow(), 7);
    }

    proptest! {
        /// Tickets of a few connections in random commits and marks: each connection gets exactly
        /// what the mark covers, in its order.
        #[test]
        fn exactly_what_the_mark_covers_is_completed(
            commits in prop::collection::vec((prop::collection::vec(0..3_usize, 0..12), 0..3_u64), 1..30),
        ) {
            let now = Instant::now();
            let in_flight = InFlight::new(0, now);
            let mailboxes = [(); 3].map(|()| Arc::new(AckMailbox::default()));
            let mut entered = [0_u64; 3];
            // Per commit, how much each connection had entered by then.
            let mut history = vec![entered];
            let mut received: [Vec<u64>; 3] = Default::default();
            for (index, (connections, behind)) in commits.into_iter().enumerate() {
                let number = index as u64 + 1;
                let mut waiting = Vec::new();
                for connection in connections {
                    waiting.extend(tickets(&mailboxes[connection], &[entered[connection]]));
                    entered[connection] += 1;
                }
                history.push(entered);
                in_flight.committed(commit(number), &mut waiting, now);
                prop_assert!(waiting.is_empty());
                let durable = number.saturating_sub(behind);
                in_flight.durable(mark(durable, durable), now);

                // Marks never fall: an earlier one may have covered more.
                let covered = *in_flight.watermark().borrow() as usize;
                for connection in 0..3 {
                    let open = mailboxes[connection].collect(&mut received[connection]);
                    prop_assert!(open.is_ok());
                    let expected: Vec<u64> = (0..history[covered][connection]).collect();
                    prop_assert_eq!(&received[connection], &expected);
                }
            }
        }
    }
}
