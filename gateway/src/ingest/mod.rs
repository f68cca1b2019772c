//! From an accepted publish to a durable event: device key, partition, ring, committer, ack.
//!
//! Invariant: a [`Ticket`] is completed only after the mark that covers its event is durable.
//!
//! Two queues only stand between a device and its ack: the rings here (volatile, before the ack)
//! and the log (durable, after it).
//!
//! # Code map
//! - [`device_key`], [`partition`]: whose event it is, and which ring it takes; [`event_id`]: by which
//!   id it is told from a resend.
//! - `ring`: the rings, their byte budget, and who waits for whom.
//! - [`committer`]: the thread that drains them into the log; `cursors`, `changes`: what rides along;
//!   [`dedup`]: which events are stored already.
//! - `in_flight`: tickets between commit and durability; [`mailbox`], [`ack_ledger`]: from there to
//!   the connection, and in order to its client.
//! - [`stats`], `latency`: what the operator sees. [`clock`]: this machine's clocks.

pub mod ack_ledger;
mod changes;
pub mod clock;
pub mod committer;
mod cursors;
pub mod dedup;
pub mod device_key;
pub mod event_id;
mod in_flight;
mod latency;
pub mod mailbox;
pub mod partition;
mod ring;
pub mod stats;

pub use ack_ledger::AckLedger;
pub use committer::{Append, CommitterError, Health};
pub use device_key::Routes;
pub use latency::LatencyStats;
pub use mailbox::{AckMailbox, GivenUp, Ticket};
pub use stats::IngestStats;

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bridge::forwarder::MoveCursor;
use storage::{AtQuota, Control};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::IngestConfig;
use changes::Changes;
use clock::MachineClock;
use committer::{Committer, Pace};
use cursors::Cursors;
use dedup::Dedup;
use in_flight::InFlight;
use ring::Rings;
use stats::Counters;

/// An event on its way to the log.
#[derive(Debug)]
pub struct Pending {
    /// The event.
    pub event: storage::Event,
    /// When the gateway had read it, for the ack latency.
    pub read_at: Instant,
    /// Whom to tell when it is durable; `None` for QoS 0.
    pub ticket: Option<Ticket>,
    /// Changes of state that are durable with the event, or not at all.
    pub riders: Option<Box<[Control]>>,
    /// By what a resend of it is recognised; `None`: by nothing, it is stored.
    pub identity: Option<Identity>,
}

/// What tells an event from its resends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Hash of its id.
    pub id: u128,
    /// Of the riders, so many are due for a resend, too: they are the connection's, which is acked
    /// either way. The others change what the event changes, and that is done.
    pub riders: usize,
}

/// What ingest knows of before it starts.
#[derive(Debug)]
pub struct Known {
    /// What the events' times come from.
    pub clock: MachineClock,
    /// Which events were seen; `None`: resends are stored as any other.
    pub dedup: Option<Dedup>,
}

impl Default for Known {
    fn default() -> Self {
        Self { clock: MachineClock::new(None), dedup: None }
    }
}

/// Whether new publishes are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Yes.
    Open,
    /// The store stands still and the policy is to hold: keep publishes unacked.
    Hold,
    /// The store stands still and the policy is to refuse: v5 answers 0x97, v3 closes.
    Refuse,
}

/// The connections' side of ingest. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ingest(Arc<Shared>);

/// What the committer shares with everybody else.
#[derive(Debug)]
struct Shared {
    rings: Rings,
    cursors: Cursors,
    changes: Changes,
    in_flight: InFlight,
    status: Mutex<(Health, Admission)>,
    /// Whether `status` admits publishes: what the connections look at for each of them.
    open: AtomicBool,
    counters: Mutex<Counters>,
    stopping: AtomicBool,
    /// The committer has ended.
    ended: CancellationToken,
    /// Highest durable commit.
    durable: AtomicU64,
    clock: MachineClock,
    /// Last time given out, in microseconds since the Unix epoch.
    clock_us: AtomicU64,
}

impl Ingest {
    /// Starts the committer over a log whose durable end is `watermark`, with the clocks of this machine
    /// and without looking for resends.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start<A: Append>(
        log: A,
        watermark: u64,
        config: &IngestConfig,
        at_quota: AtQuota,
        failing_max: Duration,
    ) -> std::io::Result<(Self, CommitterHandle)> {
        Self::start_with(log, watermark, config, at_quota, failing_max, Known::default())
    }

    /// As [`Ingest::start`], with what is known.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start_with<A: Append>(
        log: A,
        watermark: u64,
        config: &IngestConfig,
        at_quota: AtQuota,
        failing_max: Duration,
        known: Known,
    ) -> std::io::Result<(Self, CommitterHandle)> {
        let pace = Pace { failing_max, ..Pace::default() };
        Self::start_paced(log, watermark, config, at_quota, pace, known)
    }

    fn start_paced<A: Append>(
        log: A,
        watermark: u64,
        config: &IngestConfig,
        at_quota: AtQuota,
        pace: Pace,
        known: Known,
    ) -> std::io::Result<(Self, CommitterHandle)> {
        let shared = Arc::new(Shared::new(watermark, config, known.clock));
        let log_of = Arc::clone(&shared);
        let committer = Committer::new(log, log_of, config, at_quota, pace, known.dedup);
        let on_end = shared.ended.clone().drop_guard();
        let thread = thread::Builder::new().name("committer".to_owned()).spawn(move || {
            // Dropped also by a panic, so that nobody waits for a committer that is gone.
            let _on_end = on_end;
            committer.run()
        })?;
        shared.rings.set_committer(thread.thread().clone());
        let handle = CommitterHandle { shared: Arc::clone(&shared), thread };
        Ok((Self(shared), handle))
    }

    /// Puts an event into its partition's ring and wakes the committer.
    ///
    /// # Errors
    /// Gives the event back when the ring or the byte budget is full.
    #[expect(clippy::result_large_err, reason = "the event goes back to its connection")]
    pub fn try_push(&self, pending: Pending) -> Result<(), Pending> {
        self.0.rings.try_push(pending).inspect(|()| self.0.rings.announce())
    }

    /// As [`Ingest::try_push`], for one of a run: the committer may sleep on until
    /// [`Ingest::announce`], which must follow before anybody waits.
    ///
    /// # Errors
    /// As [`Ingest::try_push`].
    #[expect(clippy::result_large_err, reason = "the event goes back to its connection")]
    pub fn push_unannounced(&self, pending: Pending) -> Result<(), Pending> {
        self.0.rings.try_push(pending)
    }

    /// Wakes the committer for what was pushed unannounced.
    pub fn announce(&self) {
        self.0.rings.announce();
    }

    /// Makes changes of state durable, in the order in which they are submitted; the ticket is
    /// completed when they are. They pass at the quota, which is one of events. When a commit fails,
    /// a change with a ticket is given up with it, and one without is tried again.
    pub fn submit(&self, controls: Vec<Control>, ticket: Option<Ticket>) {
        if self.0.changes.submit(controls, ticket, Instant::now()) {
            self.0.rings.wake_committer();
        }
    }

    /// Resolves when a push that failed is worth another try. May resolve early. Cancel safe.
    pub async fn room(&self) {
        self.0.rings.room().await;
    }

    /// Resolves when the committer has ended: nothing more will be durable. Cancel safe.
    pub async fn ended(&self) {
        self.0.ended.cancelled().await;
    }

    /// Whether new publishes are taken.
    pub fn admission(&self) -> Admission {
        if self.0.open.load(Ordering::Relaxed) { Admission::Open } else { self.0.status().1 }
    }

    /// How the log takes events.
    pub fn health(&self) -> Health {
        self.0.status().0
    }

    /// Number of partitions.
    pub fn partitions(&self) -> u16 {
        self.0.rings.partitions()
    }

    /// The receive time of events read now, in microseconds since the Unix epoch; see [`clock`].
    pub fn received_us(&self) -> u64 {
        self.0.clock.received_us()
    }

    /// Now, in microseconds since the Unix epoch. Follows the system's clock, but never goes back.
    pub fn now_us(&self) -> u64 {
        self.0.now_us()
    }

    /// The durable end of the log, now and whenever it rises.
    pub fn watermark(&self) -> watch::Receiver<u64> {
        self.0.in_flight.watermark()
    }

    /// What the forwarders report their progress to.
    pub fn move_cursor(&self) -> MoveCursor {
        let shared = Arc::clone(&self.0);
        Arc::new(move |sink, progress| {
            if shared.cursors.advance(sink, progress, Instant::now()) {
                // The committer may sleep without knowing that a move waits.
                shared.rings.wake_committer();
            }
        })
    }

    /// A look at ingest.
    pub fn stats(&self) -> IngestStats {
        let shared = &self.0;
        let (durable, commit_latency, ack_latency) = shared.in_flight.stats(Instant::now());
        let (health, admission) = shared.status();
        IngestStats {
            health,
            admission,
            watermark: *shared.in_flight.watermark().borrow(),
            ring_events: shared.rings.depths(),
            ring_events_max: shared.rings.events_max(),
            ring_bytes: shared.rings.size_bytes(),
            ring_bytes_max: shared.rings.size_bytes_max(),
            waiting_connections: shared.rings.waiters(),
            durable,
            counters: *shared.counters.lock().unwrap_or_else(PoisonError::into_inner),
            commit_latency,
            ack_latency,
        }
    }
}

impl Shared {
    fn new(watermark: u64, config: &IngestConfig, clock: MachineClock) -> Self {
        let IngestConfig { partitions, ring_events_max, ring_bytes_max, .. } = *config;
        Self {
            rings: Rings::new(partitions, ring_events_max, ring_bytes_max),
            cursors: Cursors::default(),
            changes: Changes::default(),
            in_flight: InFlight::new(watermark, Instant::now()),
            status: Mutex::new((Health::Storing, Admission::Open)),
            open: AtomicBool::new(true),
            counters: Mutex::new(Counters::default()),
            stopping: AtomicBool::new(false),
            ended: CancellationToken::new(),
            durable: AtomicU64::new(0),
            clock,
            clock_us: AtomicU64::new(0),
        }
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn status(&self) -> (Health, Admission) {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `true` if this is another kind of health than before.
    fn set_health(&self, health: Health, admission: Admission) -> bool {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = std::mem::discriminant(&status.0) != std::mem::discriminant(&health);
        *status = (health, admission);
        self.open.store(admission == Admission::Open, Ordering::Relaxed);
        changed
    }

    fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.counters.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn now_us(&self) -> u64 {
        let now_us = clock::now_us();
        self.clock_us.fetch_max(now_us, Ordering::Relaxed).max(now_us)
    }
}

/// The committer's thread, as its owner sees it.
#[derive(Debug)]
#[must_use = "the committer must be stopped, and its end be noticed"]
pub struct CommitterHandle {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<(), CommitterError>>,
}

impl CommitterHandle {
    /// Resolves when the committer has ended. If nobody asked it to, the disk failed for good or it
    /// panicked: nothing can be acked any more, and the process must end;
    /// [`CommitterHandle::stop`] says why. Cancel safe.
    pub async fn ended(&self) {
        self.shared.ended.cancelled().await;
    }

    /// Lets the committer store what is in the rings, with the cursors, and close the log. Stop
    /// those who push before.
    ///
    /// # Errors
    /// See [`CommitterError`].
    pub async fn stop(self) -> Result<(), CommitterError> {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.rings.wake_committer();
        self.ended().await;
        self.thread
            .join()
            .unwrap_or_else(|panic| Err(CommitterError::Panicked { message: message(&*panic) }))
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}
