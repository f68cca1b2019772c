//! Sessions that outlive their connections: what is kept of them, for how long, and their wills.
//!
//! Owns: every session with an expiry, by client id; its subscriptions, receipts and waiting
//! messages, in memory and as rows of the store; the wills of all clients.
//! Invariant: what a client was told about its session is durable: a restart finds its subscriptions,
//! the receipts of its QoS 2 publishes, the messages that wait for it, and its will. A session has at
//! most one connection (see `clients`).
//! Deliberately absent: the protocol (`session`), who gets what (`subscriptions`).
//!
//! # Why messages are kept as copies
//! A reference into the log would cost nothing while a device sleeps, but pins the log for it, and
//! reading it back means to read everything that came meanwhile, of which a device wants a few
//! commands. A copy is bounded by what waits, and it outlives the log's retention.

mod kept;
mod queue;
mod restore;
mod wills;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytestring::ByteString;
use storage::Control;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::downlink::Downlink;
use super::retained::Retained;
use super::rows;
use super::session::{Inbound, NEVER_S};
use crate::access::Access;
use crate::config::SessionsConfig;
use crate::ingest::{AckMailbox, Ingest, Ticket};
pub use kept::Kept;
use kept::{Bounds, Inner};
pub use queue::{Next, Queue, QueueLimits};
pub use restore::GRACE;
use wills::Will;

/// How often the keeper looks for what has expired.
const KEEP_EVERY: Duration = Duration::from_secs(1);

/// Counters of the sessions.
#[derive(Debug, Default)]
pub struct SessionsStats {
    /// Messages that were not kept for a session, or made room for others.
    pub dropped: AtomicU64,
    /// Wills that the rules did not allow when they were due.
    pub wills_denied: AtomicU64,
    /// Bytes of the messages that wait.
    pub queued_bytes: AtomicUsize,
}

/// What a connection gets of its client's session.
#[derive(Debug)]
pub struct Attached {
    /// The session, if it outlives the connection.
    pub kept: Option<Arc<Kept>>,
    /// What it has from before, if there was one.
    pub before: Option<Inbound>,
    /// Seconds that it outlives the connection.
    pub expiry_s: u32,
}

/// Why a client gets no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unattached {
    /// It asks for one that is kept, and there are as many as may be.
    TooMany,
    /// There is one with its client id, and it belongs to another user.
    Anothers,
}

/// All sessions and wills. Cheap to clone.
#[derive(Clone)]
pub struct Sessions(Arc<Shared>);

struct Shared {
    by_client: Mutex<HashMap<ByteString, Arc<Kept>>>,
    wills: Mutex<HashMap<ByteString, Will>>,
    last_number: AtomicU64,
    bounds: Arc<Bounds>,
    sessions_max: usize,
    expiry_s_max: u32,
    downlink: Downlink,
    retained: Retained,
    ingest: Ingest,
    access: Arc<Access>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sessions {
    /// No sessions yet.
    pub fn new(
        config: &SessionsConfig,
        downlink: Downlink,
        retained: Retained,
        ingest: Ingest,
        access: Arc<Access>,
    ) -> Self {
        let queue = QueueLimits {
            messages_max: config.queue_messages_max,
            bytes_max: config.queue_bytes_max,
            drops_oldest: config.queue_drops_oldest,
        };
        let bounds = Bounds {
            queue,
            queued_bytes_max: config.queued_bytes_max,
            stats: SessionsStats::default(),
        };
        Self(Arc::new(Shared {
            by_client: Mutex::default(),
            wills: Mutex::default(),
            last_number: AtomicU64::new(0),
            bounds: Arc::new(bounds),
            sessions_max: config.sessions_max,
            expiry_s_max: u32::try_from(config.expiry_max.as_secs()).unwrap_or(NEVER_S),
            downlink,
            retained,
            ingest,
            access,
        }))
    }

    /// Counters.
    pub fn stats(&self) -> &SessionsStats {
        &self.0.bounds.stats
    }

    /// Number of sessions that are kept.
    pub fn len(&self) -> usize {
        lock(&self.0.by_client).len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn kept(
        &self,
        client_id: ByteString,
        user: Option<ByteString>,
        number: u64,
        expiry_s: u32,
    ) -> Arc<Kept> {
        Arc::new(Kept {
            client_id,
            user,
            number,
            bounds: self.0.bounds.clone(),
            inner: Mutex::new(Inner { expiry_s, ..Inner::default() }),
            wake: Notify::new(),
        })
    }

    /// Whether the session of this client id belongs to a user, and not to this one. Asked before the
    /// client id's connection is closed for a new one; [`Sessions::attach`] decides.
    pub fn is_anothers(&self, client_id: &ByteString, user: Option<&ByteString>) -> bool {
        lock(&self.0.by_client).get(client_id).is_some_and(|kept| is_anothers(kept, user))
    }

    /// A client connects, and no other connection of it is there any more. What an anonymous client
    /// has left is ended, not taken over, by a user.
    ///
    /// # Errors
    /// See [`Unattached`].
    pub fn attach(
        &self,
        client_id: &ByteString,
        user: Option<&ByteString>,
        clean_start: bool,
        expiry_asked_s: u32,
    ) -> Result<Attached, Unattached> {
        let shared = &*self.0;
        let mut by_client = lock(&shared.by_client);
        let mut controls = Vec::new();
        let before = by_client.get(client_id);
        if before.is_some_and(|before| is_anothers(before, user)) {
            return Err(Unattached::Anothers);
        }
        let goes_on = |before: &&Arc<Kept>| !clean_start && before.user.as_ref() == user;
        let before = before.filter(goes_on).cloned();
        if before.is_none()
            && let Some(old) = by_client.remove(client_id)
        {
            self.end(&old, &mut controls);
        }
        let mut will = lock(&shared.wills).remove(client_id);
        if let Some(will) = will.take_if(|_| before.is_none()) {
            // Its session has ended, which is when it is due at the latest.
            self.publish_will(client_id, will);
        } else if will.is_some() {
            // [MQTT-3.1.3-9]
            controls.push(rows::delete(rows::WILLS, rows::name_key(client_id)));
        }
        let expiry_s = expiry_asked_s.min(shared.expiry_s_max);
        let full = by_client.len() >= shared.sessions_max;
        if before.is_none() && (expiry_s == 0 || full) {
            drop(by_client);
            shared.submit(controls);
            let attached = Attached { kept: None, before: None, expiry_s: 0 };
            return if expiry_s == 0 { Ok(attached) } else { Err(Unattached::TooMany) };
        }
        let present = before.is_some();
        let kept = before.unwrap_or_else(|| {
            let number = shared.last_number.fetch_add(1, Ordering::Relaxed) + 1;
            let kept = self.kept(client_id.clone(), user.cloned(), number, expiry_s);
            by_client.insert(client_id.clone(), kept.clone());
            kept
        });
        drop(by_client);
        let inbound = {
            let mut inner = kept.lock();
            inner.online = true;
            inner.ends_at = None;
            inner.expiry_s = expiry_s;
            inner.queue.connected();
            let mut inbound = inner.inbound.take().unwrap_or_default();
            // What became durable, or failed, after the last connection had gone.
            let mut durable = Vec::new();
            let collected = inner.mailbox.collect(&mut durable);
            for number in durable {
                inbound.complete(number);
            }
            if collected.is_err() {
                inbound.fail();
                inner.mailbox = Arc::default();
            }
            inbound
        };
        kept.wake.notify_one();
        controls.push(kept.row(expiry_s, 0));
        shared.submit(controls);
        // With an expiry of 0 it is kept until the end of this connection: it had one before.
        Ok(Attached { kept: Some(kept), before: present.then_some(inbound), expiry_s })
    }

    /// The connection of a session has ended. It is kept for `expiry_s` from now on.
    pub fn detach(&self, kept: &Arc<Kept>, inbound: Inbound, expiry_s: u32, now: Instant) {
        let shared = &*self.0;
        let expiry_s = expiry_s.min(shared.expiry_s_max);
        let mut controls = Vec::new();
        if expiry_s == 0 {
            kept.lock().inbound = Some(inbound);
            let mut by_client = lock(&shared.by_client);
            if by_client.get(&kept.client_id).is_some_and(|there| Arc::ptr_eq(there, kept)) {
                by_client.remove(&kept.client_id);
            }
            self.end(kept, &mut controls);
        } else {
            let mut inner = kept.lock();
            inner.online = false;
            inner.passing.clear();
            inner.expiry_s = expiry_s;
            inner.ends_at = lasting(expiry_s).map(|expiry| now + expiry);
            inner.inbound = Some(inbound);
            controls.push(kept.row(expiry_s, shared.ingest.now_us().max(1)));
        }
        shared.submit(controls);
    }

    /// Ends a session, and everything that is kept of it.
    fn end(&self, kept: &Arc<Kept>, controls: &mut Vec<Control>) {
        let mut inner = kept.lock();
        inner.ended = true;
        let places: Vec<u64> = inner.queue.places().collect();
        kept.change(&mut inner, |queue| *queue = Queue::default());
        let subscriptions = std::mem::take(&mut inner.subscriptions);
        let receipts = inner.inbound.take().unwrap_or_default();
        drop(inner);
        controls.extend(places.into_iter().map(|place| kept.delete(place)));
        controls.extend(receipts.ids().map(|id| kept.release(id)));
        for filter in subscriptions.into_keys() {
            self.0.downlink.unwatch(&filter, kept);
            let key = rows::session_key(kept.number, filter.as_bytes());
            controls.push(rows::delete(rows::SUBSCRIPTIONS, key));
        }
        controls.push(rows::delete(rows::SESSIONS, rows::name_key(&kept.client_id)));
    }

    /// Ends what has expired and publishes the wills that are due, until `stop`.
    pub async fn keep(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(KEEP_EVERY);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.look(Instant::now());
        }
    }

    fn look(&self, now: Instant) {
        let shared = &*self.0;
        let due: Vec<ByteString> = {
            let wills = lock(&shared.wills);
            wills.iter().filter(|(_, will)| will.due <= now).map(|(id, _)| id.clone()).collect()
        };
        for client_id in due {
            let will = lock(&shared.wills).remove(&client_id);
            if let Some(will) = will {
                self.publish_will(&client_id, will);
            }
        }
        let mut controls = Vec::new();
        {
            let mut by_client = lock(&shared.by_client);
            by_client.retain(|_, kept| {
                let expired = kept.lock().ends_at.is_some_and(|end| end <= now);
                if expired {
                    self.end(kept, &mut controls);
                    tracing::debug!(client = %kept.client_id, "its session has expired");
                }
                !expired
            });
        }
        shared.submit(controls);
    }
}

impl Shared {
    fn submit(&self, controls: Vec<Control>) {
        if !controls.is_empty() {
            self.ingest.submit(controls, None);
        }
    }
}

/// Whether a session belongs to a user, and not to this one.
fn is_anothers(kept: &Kept, user: Option<&ByteString>) -> bool {
    kept.user.is_some() && kept.user.as_ref() != user
}

fn lasting(expiry_s: u32) -> Option<Duration> {
    (expiry_s != NEVER_S).then(|| Duration::from_secs(expiry_s.into()))
}

/// A ticket of its own, for who has no connection: the follower.
pub(crate) async fn durable(ingest: &Ingest, controls: Vec<Control>) -> bool {
    let mailbox: Arc<AckMailbox> = Arc::default();
    ingest.submit(controls, Some(Ticket { mailbox: mailbox.clone(), number: 0 }));
    mailbox.changed().await;
    mailbox.collect(&mut Vec::new()).is_ok()
}
