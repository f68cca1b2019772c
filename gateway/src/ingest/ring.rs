//! The volatile queue in front of the log: one ring per partition, one byte budget over all.
//!
//! Owns: who may push (a free slot in the partition's ring, and room in the budget), how the
//! committer sleeps when there is nothing to do, and how connections wait when there is no room.
//! Invariant: within a partition events leave in the order in which they came. No wake-up is lost:
//! an event that was announced keeps the committer awake, and whoever failed to push is told of every drain
//! that comes after.
//! Deliberately absent: what a connection does with an event that finds no room (see `mqtt`).

use std::pin::pin;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::thread::{self, Thread};
use std::time::Duration;

use crossbeam::queue::ArrayQueue;
use crossbeam::utils::CachePadded;
use tokio::sync::Notify;

use super::Pending;

/// The rings. Any thread pushes; one thread, the committer, drains and sleeps.
#[derive(Debug)]
pub(super) struct Rings {
    by_partition: Box<[ArrayQueue<Pending>]>,
    /// Event bytes in all rings; written by every push, hence alone on its cache line.
    size_bytes: CachePadded<AtomicUsize>,
    size_bytes_max: usize,
    /// The committer is asleep, or about to: whoever pushes wakes it.
    asleep: AtomicBool,
    committer: OnceLock<Thread>,
    /// A push failed since the last drain: whoever waits for room has missed none.
    starved: AtomicBool,
    /// Connections in [`Rings::room`].
    waiters: AtomicUsize,
    room: Notify,
}

impl Rings {
    pub(super) fn new(partitions: u16, events_max: usize, size_bytes_max: usize) -> Self {
        Self {
            by_partition: (0..partitions).map(|_| ArrayQueue::new(events_max)).collect(),
            size_bytes: CachePadded::new(AtomicUsize::new(0)),
            size_bytes_max,
            asleep: AtomicBool::new(false),
            committer: OnceLock::new(),
            starved: AtomicBool::new(false),
            waiters: AtomicUsize::new(0),
            room: Notify::new(),
        }
    }

    /// Names the thread that drains. Once, before the first push.
    pub(super) fn set_committer(&self, thread: Thread) {
        let first = self.committer.set(thread).is_ok();
        assert!(first, "the rings have one committer");
    }

    /// Puts an event into its partition's ring; the committer may sleep on until
    /// [`Rings::announce`]. An event larger than the whole budget is taken when nothing else is
    /// there, so that it can pass.
    ///
    /// # Errors
    /// Gives the event back when there is no room.
    #[expect(clippy::result_large_err, reason = "the event goes back to its connection")]
    pub(super) fn try_push(&self, pending: Pending) -> Result<(), Pending> {
        let Err(pending) = self.push(pending) else {
            return Ok(());
        };
        // Room may have come between the failure and this flag, and with it the wake-up: hence
        // another try behind the flag. The committer may be lingering, or sleep because nobody has
        // told it of what fills the ring: then it is time to drain.
        if !self.starved.swap(true, Ordering::SeqCst) {
            self.wake_committer();
        }
        self.push(pending)
    }

    #[expect(clippy::result_large_err, reason = "the event goes back to its connection")]
    fn push(&self, pending: Pending) -> Result<(), Pending> {
        let size_bytes = pending.event.size_bytes();
        let before = self.size_bytes.fetch_add(size_bytes, Ordering::Relaxed);
        let fits = before == 0 || before.saturating_add(size_bytes) <= self.size_bytes_max;
        let pushed = if fits {
            self.by_partition[usize::from(pending.event.partition)].push(pending)
        } else {
            Err(pending)
        };
        if pushed.is_err() {
            self.size_bytes.fetch_sub(size_bytes, Ordering::Relaxed);
        }
        pushed
    }

    /// Wakes the committer if it sleeps: what was pushed before is drained. Once for a run of
    /// pushes, so that it finds all of them and is not woken for each.
    pub(super) fn announce(&self) {
        // Pairs with the fence in `sleep`: either the committer sees the events, or this sees that
        // it sleeps.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            self.wake_committer();
        }
    }

    /// Resolves when a push that failed is worth another try: after a drain. May resolve early.
    /// Cancel safe.
    ///
    /// A drain wakes at most as many connections as it freed slots, the longest waiting first; when
    /// the rings are empty all are woken.
    pub(super) async fn room(&self) {
        let _waiter = Waiter::enter(&self.waiters);
        let mut drained = pin!(self.room.notified());
        drained.as_mut().enable();
        // Registered first, looked second: a drain in between is not missed.
        if self.starved.load(Ordering::SeqCst) {
            drained.await;
        }
    }

    /// Committer: takes events, in turns from all rings beginning with `first_ring`, until
    /// `events_max` were taken, `size_bytes_max` is reached (the last event may pass it), or all
    /// rings are empty.
    pub(super) fn drain(
        &self,
        first_ring: usize,
        events_max: usize,
        size_bytes_max: usize,
        mut take: impl FnMut(Pending),
    ) {
        // In an even load one turn takes everything; in an uneven one nobody waits for more than a
        // turn of the others.
        let turn_max = events_max.div_ceil(self.by_partition.len());
        let (mut events, mut size_bytes) = (0, 0);
        'full: loop {
            let before = events;
            for index in 0..self.by_partition.len() {
                let ring = &self.by_partition[(first_ring + index) % self.by_partition.len()];
                for _ in 0..turn_max {
                    if events == events_max || size_bytes >= size_bytes_max {
                        break 'full;
                    }
                    let Some(pending) = ring.pop() else { break };
                    events += 1;
                    size_bytes += pending.event.size_bytes();
                    take(pending);
                }
            }
            if events == before {
                break;
            }
        }
        if events > 0 {
            self.size_bytes.fetch_sub(size_bytes, Ordering::Relaxed);
            self.starved.store(false, Ordering::SeqCst);
            for _ in 0..self.waiters.load(Ordering::SeqCst).min(events) {
                self.room.notify_one();
            }
        }
    }

    /// Committer: sleeps until there is an event, somebody calls [`Rings::wake_committer`], or the
    /// time is over. May return early.
    pub(super) fn sleep(&self, time_max: Duration) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.is_empty() {
            // Those woken by the last drain may have gone away without a push, and with them the
            // drain that would have woken the next.
            if self.waiters.load(Ordering::SeqCst) > 0 {
                self.room.notify_waiters();
            }
            thread::park_timeout(time_max);
        }
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Committer: lets events lie until the time is over, a push finds no room, or somebody calls
    /// [`Rings::wake_committer`]. May return early.
    pub(super) fn pause(time_max: Duration) {
        thread::park_timeout(time_max);
    }

    /// Wakes the committer for another reason than an event. One that is awake returns from its
    /// next sleep at once.
    pub(super) fn wake_committer(&self) {
        if let Some(thread) = self.committer.get() {
            thread.unpark();
        }
    }

    /// Number of rings.
    pub(super) fn partitions(&self) -> u16 {
        self.by_partition.len() as u16
    }

    /// Events in each ring, by partition.
    pub(super) fn depths(&self) -> Vec<usize> {
        self.by_partition.iter().map(ArrayQueue::len).collect()
    }

    /// Events a ring holds, at most.
    pub(super) fn events_max(&self) -> usize {
        self.by_partition[0].capacity()
    }

    /// Event bytes in all rings, at most.
    pub(super) fn size_bytes_max(&self) -> usize {
        self.size_bytes_max
    }

    /// Event bytes in all rings.
    pub(super) fn size_bytes(&self) -> usize {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// Connections that wait for room.
    pub(super) fn waiters(&self) -> usize {
        self.waiters.load(Ordering::Relaxed)
    }

    fn is_empty(&self) -> bool {
        self.by_partition.iter().all(ArrayQueue::is_empty)
    }
}

/// One connection in [`Rings::room`]; counted out also when it is cancelled.
struct Waiter<'a>(&'a AtomicUsize);

impl<'a> Waiter<'a> {
    fn enter(waiters: &'a AtomicUsize) -> Self {
        waiters.fetch_add(1, Ordering::SeqCst);
        Self(waiters)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::task::{Context, Poll, Waker};
    use std::time::Instant;

    use storage::{Attributes, Event};

    use super::*;

    fn pending(partition: u16, number: u64, payload_bytes: usize) -> Pending {
        let event = Event {
            partition,
            received_us: number,
            device_key: "".into(),
            topic: "".into(),
            attributes: Attributes::default(),
            payload: vec![0; payload_bytes].into(),
        };
        Pending { event, read_at: Instant::now(), ticket: None, riders: None, identity: None }
    }

    fn numbers(rings: &Rings, first_ring: usize, events_max: usize) -> Vec<(u16, u64)> {
        let mut taken = Vec::new();
        rings.drain(first_ring, events_max, usize::MAX, |p| {
            taken.push((p.event.partition, p.event.received_us));
        });
        taken
    }

    fn is_ready(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(())
    }

    #[test]
    fn a_full_ring_gives_the_event_back_and_leaves_the_others_open() {
        let rings = Rings::new(2, 1, 1000);
        rings.try_push(pending(0, 1, 10)).expect("room");
        let back = rings.try_push(pending(0, 2, 10)).expect_err("full");
        assert_eq!(back.event.received_us, 2);
        rings.try_push(pending(1, 3, 10)).expect("another ring");
        assert_eq!((rings.size_bytes(), rings.depths()), (20, vec![1, 1]));
    }

    #[test]
    fn the_byte_budget_spans_all_rings() {
        let rings = Rings::new(2, 10, 100);
        rings.try_push(pending(0, 1, 60)).expect("room");
        rings.try_push(pending(1, 2, 41)).expect_err("over the budget");
        rings.try_push(pending(1, 2, 40)).expect("exactly the budget");
        assert_eq!(numbers(&rings, 0, 1), [(0, 1)]);
        assert_eq!(rings.size_bytes(), 40);
        rings.try_push(pending(0, 3, 60)).expect("room again");
    }

    #[test]
    fn an_event_larger_than_the_budget_passes_alone() {
        let rings = Rings::new(1, 10, 100);
        rings.try_push(pending(0, 1, 500)).expect("alone");
        rings.try_push(pending(0, 2, 1)).expect_err("not beside it");
        assert_eq!(numbers(&rings, 0, 10), [(0, 1)]);
        rings.try_push(pending(0, 2, 1)).expect("room");
        rings.try_push(pending(0, 3, 500)).expect_err("not alone");
    }

    #[test]
    fn a_drain_is_fair_across_rings_and_ordered_within_one() {
        let rings = Rings::new(3, 100, usize::MAX);
        for number in 0..50 {
            rings.try_push(pending(0, number, 1)).expect("room");
        }
        for number in 0..2 {
            rings.try_push(pending(1, number, 1)).expect("room");
            rings.try_push(pending(2, number, 1)).expect("room");
        }
        assert_eq!(
            numbers(&rings, 1, 9),
            [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1), (0, 2), (0, 3), (0, 4)],
            "begins with ring 1, three from each in a turn, then what is left"
        );
        assert_eq!(numbers(&rings, 0, 100), (5..50).map(|n| (0, n)).collect::<Vec<_>>());
    }

    #[test]
    fn a_drain_stops_at_its_bytes() {
        let rings = Rings::new(1, 100, usize::MAX);
        for number in 0..10 {
            rings.try_push(pending(0, number, 40)).expect("room");
        }
        let mut taken = 0;
        rings.drain(0, 100, 100, |_| taken += 1);
        assert_eq!(taken, 3, "the third one passes 100 bytes");
        assert_eq!(rings.size_bytes(), 7 * 40);
    }

    #[test]
    fn room_resolves_after_a_drain_whether_it_comes_before_or_after_the_wait() {
        let rings = Rings::new(1, 1, usize::MAX);
        rings.try_push(pending(0, 1, 1)).expect("room");

        rings.try_push(pending(0, 2, 1)).expect_err("full");
        let mut waits = pin!(rings.room());
        assert!(!is_ready(waits.as_mut()));
        numbers(&rings, 0, 1);
        assert!(is_ready(waits.as_mut()), "drained during the wait");

        rings.try_push(pending(0, 2, 1)).expect("room");
        rings.try_push(pending(0, 3, 1)).expect_err("full");
        numbers(&rings, 0, 1);
        let mut waits = pin!(rings.room());
        assert!(is_ready(waits.as_mut()), "drained between the failure and the wait");
    }

    #[test]
    fn a_drain_wakes_no_more_connections_than_it_freed_slots() {
        let rings = Rings::new(1, 1, usize::MAX);
        rings.try_push(pending(0, 1, 1)).expect("room");
        rings.try_push(pending(0, 2, 1)).expect_err("full");
        let (mut first, mut second) = (Box::pin(rings.room()), Box::pin(rings.room()));
        assert!(!is_ready(first.as_mut()));
        assert!(!is_ready(second.as_mut()));
        assert_eq!(rings.waiters(), 2);

        numbers(&rings, 0, 1);
        assert!(!is_ready(second.as_mut()), "one slot, and the first was there earlier");
        // The woken connection goes away without a push: the next in line gets its turn.
        drop(first);
        assert!(is_ready(second.as_mut()));
        drop(second);
        assert_eq!(rings.waiters(), 0);
    }

    #[test]
    fn an_idle_committer_leaves_nobody_waiting() {
        let rings = Rings::new(1, 1, usize::MAX);
        rings.try_push(pending(0, 1, 1)).expect("room");
        rings.try_push(pending(0, 2, 1)).expect_err("full");
        let (mut first, mut second) = (Box::pin(rings.room()), Box::pin(rings.room()));
        assert!(!is_ready(first.as_mut()));
        assert!(!is_ready(second.as_mut()));
        numbers(&rings, 0, 1);
        assert!(is_ready(first.as_mut()), "woken, but has nothing to push any more");
        rings.sleep(Duration::ZERO);
        assert!(is_ready(second.as_mut()));
    }

    /// Producers that wait for room and a committer that sleeps: every event must arrive, in the
    /// order of its producer. A lost wake-up on either side shows as a test that never ends.
    #[test]
    fn no_wake_up_is_lost_between_threads() {
        const EVENTS: u64 = 5_000;
        const PRODUCERS: u16 = 3;
        let rings = Arc::new(Rings::new(2, 4, 64));
        let consumer = {
            let rings = Arc::clone(&rings);
            let (start, started) = std::sync::mpsc::sync_channel::<()>(1);
            let thread = thread::spawn(move || {
                started.recv().expect("the test starts it");
                let mut next = [0; PRODUCERS as usize];
                let mut left = EVENTS * u64::from(PRODUCERS);
                let mut first_ring = 0;
                while left > 0 {
                    rings.sleep(Duration::from_hours(1));
                    rings.drain(first_ring, 3, usize::MAX, |p| {
                        let producer = p.event.payload.len() - 1;
                        assert_eq!(p.event.received_us, next[producer]);
                        next[producer] += 1;
                        left -= 1;
                    });
                    first_ring += 1;
                }
            });
            (thread, start)
        };
        rings.set_committer(consumer.0.thread().clone());
        consumer.1.send(()).expect("it waits");

        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .build()
            .expect("a runtime");
        let mut producers = tokio::task::JoinSet::new();
        for producer in 0..PRODUCERS {
            let rings = Arc::clone(&rings);
            producers.spawn_on(
                async move {
                    for number in 0..EVENTS {
                        // Producers 0 and 2 share a ring; the payload's length names the producer.
                        let mut next = pending(producer % 2, number, usize::from(producer) + 1);
                        while let Err(back) = rings.try_push(next) {
                            next = back;
                            rings.announce();
                            rings.room().await;
                        }
                        if number % 3 == 0 || number + 1 == EVENTS {
                            rings.announce();
                        }
                    }
                },
                runtime.handle(),
            );
        }
        runtime.block_on(producers.join_all());
        consumer.0.join().expect("every event arrived in order");
        assert_eq!(rings.size_bytes(), 0);
    }
}
