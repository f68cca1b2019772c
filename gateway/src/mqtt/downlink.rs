//! From the durable log to the subscribers: the follower, the local bus, and each connection's inbox.
//!
//! Owns: the table of subscriptions and streams, and the place up to which the log has been served.
//! Invariant: only what is durable is served, each client's messages in log order; a message that a
//! subscriber misses because it does not keep up is counted, never silent.
//! Deliberately absent: packet ids and windows: the connection sees to them.
//!
//! The table says who gets what, and how (`subscriptions`); sessions that are kept take theirs into
//! their queues at once, connections get theirs over the bus (`bus`), each on a topic of its own. All
//! that a client gets comes in one row, whatever it subscribes to and whenever: so that no order can be
//! lost between its filters, nor a message come once for each. The bus never waits for a link, and
//! forgets what a slow one has not read; so the follower stops short of that, for
//! [`follower::PATIENCE`] at most, for every subscriber that keeps up.

mod bus;
pub mod follower;
mod inbox;
mod streams;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytestring::ByteString;
use tokio::sync::{Notify, Semaphore, watch};

use super::sessions::Kept;
use super::subscriptions::{Full, Options, Reader, Subscriptions};
pub use bus::Interrupted;
use bus::{Connect, spawn_router};
pub use inbox::{Inbox, SUBSCRIPTIONS_MAX};
use streams::Streams;
pub use streams::Turn;

/// Connections that the router is asked for at a time. Each blocks a thread, and the router answers
/// one by one: in a storm of subscribers the others wait without one.
const ROUTER_CALLS_MAX: usize = 8;

/// Counters of the downlink.
#[derive(Debug, Default)]
pub struct DownlinkStats {
    /// Messages handed to the router.
    pub published: AtomicU64,
    /// Messages that subscribers missed because they did not keep up.
    pub missed: AtomicU64,
    /// Times that the router was replaced.
    pub respawns: AtomicU64,
}

/// The connections' side of the downlink. Cheap to clone.
#[derive(Clone)]
pub struct Downlink(Arc<Shared>);

struct Shared {
    table: Mutex<Table>,
    /// See [`Subscriptions::changes`].
    changes: Arc<AtomicU64>,
    connect: Mutex<Connect>,
    watermark: watch::Receiver<u64>,
    /// Somebody has subscribed to the first filter.
    subscribed: Notify,
    /// A subscriber has taken messages.
    taken: Notify,
    /// See [`ROUTER_CALLS_MAX`].
    calls: Semaphore,
    links_max: usize,
    stats: DownlinkStats,
}

#[derive(Default)]
struct Table {
    subscriptions: Subscriptions,
    streams: Streams,
    /// Next offset to serve; means something only while anybody subscribes.
    next: u64,
}

/// The guarded data stays sound at every step: a panic elsewhere is no reason to stop serving.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Downlink {
    /// A downlink for at most `links_max` subscribing connections, behind a log whose watermark
    /// `watermark` tells. [`Downlink::follow`] makes it run.
    pub fn new(watermark: watch::Receiver<u64>, links_max: usize) -> Self {
        let table = Table::default();
        Self(Arc::new(Shared {
            changes: table.subscriptions.changes(),
            table: Mutex::new(table),
            connect: Mutex::new(spawn_router(links_max)),
            watermark,
            subscribed: Notify::new(),
            taken: Notify::new(),
            calls: Semaphore::new(ROUTER_CALLS_MAX),
            links_max,
            stats: DownlinkStats::default(),
        }))
    }

    /// Counters.
    pub fn stats(&self) -> &DownlinkStats {
        &self.0.stats
    }

    /// Moves whenever filters have come or gone: until then [`Downlink::has_subscriber`] says the same
    /// of a topic.
    pub fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::Relaxed)
    }

    /// Whether anybody subscribes to a topic.
    pub fn has_subscriber(&self, topic: &str) -> bool {
        lock(&self.0.table).subscriptions.has_any(topic)
    }

    /// The inbox of one connection of this client.
    pub fn inbox(&self, client_id: &ByteString) -> Inbox {
        Inbox::new(self.clone(), client_id.clone())
    }

    /// Adds a session to a filter, or changes what it asked for. What stands before offset `from` is
    /// not for it; gives that offset, which stays that of the first time.
    ///
    /// # Errors
    /// [`Full`].
    pub fn watch(
        &self,
        text: &str,
        kept: &Arc<Kept>,
        options: Options,
        from: u64,
    ) -> Result<u64, Full> {
        self.enter(text, &Reader::Session(kept.clone()), options, from)
    }

    /// Takes a session off a filter.
    pub fn unwatch(&self, text: &str, kept: &Arc<Kept>) {
        self.leave(text, &Reader::Session(kept.clone()));
    }

    fn enter(&self, text: &str, reader: &Reader, options: Options, from: u64) -> Result<u64, Full> {
        let mut table = lock(&self.0.table);
        let first = table.subscriptions.is_empty();
        let from = table.subscriptions.subscribe(text, reader, options, from)?;
        if first {
            table.next = table.next.max(self.watermark());
            self.0.subscribed.notify_one();
        }
        Ok(from)
    }

    fn leave(&self, text: &str, reader: &Reader) {
        lock(&self.0.table).subscriptions.unsubscribe(text, reader);
    }

    /// After a restart, before anything is served: the log is to be read from this offset on.
    pub fn serve_from(&self, offset: u64) {
        lock(&self.0.table).next = offset;
    }

    /// The durable end of the log now: where a subscription begins.
    pub fn watermark(&self) -> u64 {
        *self.0.watermark.borrow()
    }
}

#[cfg(test)]
mod tests;
