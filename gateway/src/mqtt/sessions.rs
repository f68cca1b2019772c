//! Sessions that outlive their connections: what is kept of them, for how long, and their wills.
//!
//! Owns: every session with an expiry, by client id; its subscriptions, receipts and waiting
//! messages, in memory and as rows of the store; the wills of all clients.
//! Invariant: what a client was told about its session is durable: a restart finds its subscriptions,
//! the receipts of its QoS 2 publishes, the messages that wait for it, and its will. A session has at
//! most one connection (see `clients`).
//! Deliberately absent: the protocol (`session`), who gets what (`downlink`).
//!
//! # Why messages are kept as copies
//! A reference into the log would cost nothing while a device sleeps, but pins the log for it, and
//! reading it back means to read everything that came meanwhile, of which a device wants a few
//! commands. A copy is bounded by what waits, and it outlives the log's retention.
//!
//! # Time
//! While the process runs, expiry and will delay count on the monotonic clock. Over a restart only
//! the wall clock is there, and it is not believed where it stands before [`SET_US`] or has gone
//! back; whatever it says, a client gets [`GRACE`] to come back, so that nothing ends by mistake.

mod queue;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use bytestring::ByteString;
use storage::{Control, Event, StateError, Store};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::downlink::Downlink;
use super::retained::Retained;
use super::rows::{self, Message, Queued, SessionRow, StoredWill};
use super::session::{Inbound, NEVER_S};
use super::subscriptions::Options;
use crate::access::Access;
use crate::config::SessionsConfig;
use crate::ingest::clock::SET_US;
use crate::ingest::{AckMailbox, Ingest, Pending, Ticket};
pub use queue::{Next, Queue, QueueLimits};

/// What every session and will gets after a restart before it ends.
pub const GRACE: Duration = Duration::from_secs(10);

/// How often the keeper looks for what has expired.
const KEEP_EVERY: Duration = Duration::from_secs(1);

/// QoS 0 messages that wait for a client that is connected, at most; more are dropped.
const PASSING_MAX: usize = 256;

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

/// Bounds that all sessions share.
#[derive(Debug)]
struct Bounds {
    queue: QueueLimits,
    queued_bytes_max: usize,
    stats: SessionsStats,
}

/// One session, kept. Its connection and the follower of the log share it.
#[derive(Debug)]
pub struct Kept {
    client_id: ByteString,
    /// The user whose it is; `None`: an anonymous client's.
    user: Option<ByteString>,
    number: u64,
    bounds: Arc<Bounds>,
    inner: Mutex<Inner>,
    /// There is something to send.
    wake: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    queue: Queue,
    /// QoS 0 messages for the connection that is there.
    passing: VecDeque<Queued>,
    subscriptions: HashMap<ByteString, Options>,
    /// Here while no connection has it.
    inbound: Option<Inbound>,
    mailbox: Arc<AckMailbox>,
    online: bool,
    expiry_s: u32,
    /// When it ends, while no connection holds it; `None`: never.
    ends_at: Option<Instant>,
    /// It has ended: nothing more is kept for it.
    ended: bool,
}

impl Kept {
    /// Whose session it is.
    pub fn client_id(&self) -> &ByteString {
        &self.client_id
    }

    /// Its number in the keys of its rows.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether a connection has it.
    pub fn is_online(&self) -> bool {
        self.lock().online
    }

    /// Where completions for its publishes arrive: also those of earlier connections.
    pub fn mailbox(&self) -> Arc<AckMailbox> {
        self.lock().mailbox.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change is whole before anything can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message for the client, with the QoS that its subscription gives it; what is to be made
    /// durable is appended to `controls`. Gives its place in the queue, for [`Kept::settled`].
    pub fn offer(&self, queued: Queued, controls: &mut Vec<Control>) -> Option<u64> {
        let stats = &self.bounds.stats;
        let mut inner = self.lock();
        if inner.ended {
            return None;
        }
        if queued.manner.qos == 0 {
            if inner.online && inner.passing.len() < PASSING_MAX {
                inner.passing.push_back(queued);
                self.wake.notify_one();
            } else if inner.online {
                stats.dropped.fetch_add(1, Ordering::Relaxed);
            }
            return None;
        }
        let size_bytes = queued.message.as_ref().map_or(0, Message::size_bytes);
        if stats.queued_bytes.load(Ordering::Relaxed) + size_bytes > self.bounds.queued_bytes_max {
            stats.dropped.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let mut dropped = Vec::new();
        let pushed =
            self.change(&mut inner, |queue| queue.push(queued, &self.bounds.queue, &mut dropped));
        let lost = dropped.len() as u64 + u64::from(pushed.is_none());
        stats.dropped.fetch_add(lost, Ordering::Relaxed);
        controls.extend(dropped.into_iter().map(|place| self.delete(place)));
        let (place, queued) = pushed?;
        controls.push(rows::put(rows::QUEUES, self.queue_key(place), queued.encode()));
        Some(place)
    }

    /// Changes the queue, and keeps the sum over all queues.
    fn change<T>(&self, inner: &mut Inner, change: impl FnOnce(&mut Queue) -> T) -> T {
        let before = inner.queue.size_bytes();
        let result = change(&mut inner.queue);
        let after = inner.queue.size_bytes();
        let sum = &self.bounds.stats.queued_bytes;
        sum.fetch_add(after, Ordering::Relaxed);
        sum.fetch_sub(before, Ordering::Relaxed);
        result
    }

    /// Messages of which nobody has said yet that they are durable: their places and rows.
    pub fn unsettled(&self) -> (Vec<u64>, Vec<Control>) {
        let inner = self.lock();
        let row = |(place, queued): (u64, &Queued)| {
            (place, rows::put(rows::QUEUES, self.queue_key(place), queued.encode()))
        };
        inner.queue.unsettled().map(row).unzip()
    }

    /// The message at this place is durable.
    pub fn settled(&self, place: u64) {
        self.lock().queue.durable(place);
        self.wake.notify_one();
    }

    /// Resolves when there may be something to send. Cancel safe.
    pub async fn changed(&self) {
        self.wake.notified().await;
    }

    /// Messages for which the queue has room.
    pub fn room(&self) -> usize {
        self.bounds.queue.messages_max.saturating_sub(self.lock().queue.len())
    }

    /// The next QoS 0 message.
    pub fn next_passing(&self) -> Option<Queued> {
        self.lock().passing.pop_front()
    }

    /// The next message of QoS 1 or 2.
    pub fn next(&self) -> Option<Next> {
        self.lock().queue.next()
    }

    /// The message at this place was sent.
    pub fn sent(&self, place: u64) {
        self.lock().queue.sent(place);
    }

    /// Gives up the message at this place: it has expired, or the client does not take it.
    pub fn drop_at(&self, place: u64) -> Control {
        self.change(&mut self.lock(), |queue| queue.drop_at(place));
        self.delete(place)
    }

    /// The client has acknowledged this message for good.
    pub fn acked(&self, packet_id: u16) -> Option<Control> {
        let place = self.change(&mut self.lock(), |queue| queue.acked(packet_id))?;
        Some(self.delete(place))
    }

    /// The client has this QoS 2 message.
    pub fn received(&self, packet_id: u16) -> Option<Control> {
        let (place, left) = self.change(&mut self.lock(), |queue| queue.received(packet_id))?;
        Some(rows::put(rows::QUEUES, self.queue_key(place), left.encode()))
    }

    /// Row of a receipt that is to be durable with its event.
    pub fn receipt(&self, packet_id: u16) -> Control {
        rows::put(rows::RECEIPTS, self.receipt_key(packet_id), Bytes::new())
    }

    /// End of a receipt.
    pub fn release(&self, packet_id: u16) -> Control {
        rows::delete(rows::RECEIPTS, self.receipt_key(packet_id))
    }

    /// What the session subscribes to.
    pub fn subscription(&self, filter: &str) -> Option<Options> {
        self.lock().subscriptions.get(filter).copied()
    }

    /// The filters of its subscriptions.
    pub fn filters(&self) -> Vec<ByteString> {
        self.lock().subscriptions.keys().cloned().collect()
    }

    /// Number of its subscriptions.
    pub fn subscriptions(&self) -> usize {
        self.lock().subscriptions.len()
    }

    /// Whether any subscription asks not to get what its client published.
    pub fn has_no_local(&self) -> bool {
        self.lock().subscriptions.values().any(|options| options.no_local)
    }

    /// Enters a subscription that begins at offset `from`; gives its row.
    pub fn subscribe(&self, filter: &ByteString, options: Options, from: u64) -> Control {
        self.lock().subscriptions.insert(filter.clone(), options);
        let key = rows::session_key(self.number, filter.as_bytes());
        rows::put(rows::SUBSCRIPTIONS, key, rows::encode_subscription(options, from))
    }

    /// Ends a subscription; gives the end of its row, if it was there.
    pub fn unsubscribe(&self, filter: &str) -> Option<Control> {
        self.lock().subscriptions.remove(filter)?;
        let key = rows::session_key(self.number, filter.as_bytes());
        Some(rows::delete(rows::SUBSCRIPTIONS, key))
    }

    fn queue_key(&self, place: u64) -> Bytes {
        rows::session_key(self.number, &place.to_be_bytes())
    }

    fn receipt_key(&self, packet_id: u16) -> Bytes {
        rows::session_key(self.number, &packet_id.to_be_bytes())
    }

    fn delete(&self, place: u64) -> Control {
        rows::delete(rows::QUEUES, self.queue_key(place))
    }

    fn row(&self, expiry_s: u32, ended_us: u64) -> Control {
        let user = self.user.clone();
        let row = SessionRow { number: self.number, expiry_s, ended_us, user };
        rows::put(rows::SESSIONS, rows::name_key(&self.client_id), row.encode())
    }
}

/// A will that waits for its delay.
#[derive(Debug)]
struct Will {
    stored: StoredWill,
    due: Instant,
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

    /// Takes what the store has of sessions and wills. Before the first connection. Reads the disk.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn load(&self, store: &Store, now: Instant, now_us: u64) -> Result<(), StateError> {
        let shared = &*self.0;
        let mut by_number: HashMap<u64, (Arc<Kept>, Vec<u16>)> = HashMap::new();
        for (client_id, row) in store.states(rows::SESSIONS)? {
            let (Some(client_id), Some(row)) = (rows::text(&client_id), SessionRow::decode(row))
            else {
                tracing::error!("the row of a session is damaged: left out");
                continue;
            };
            let kept = self.kept(client_id, row.user, row.number, row.expiry_s);
            kept.lock().ends_at = left(row.expiry_s, row.ended_us, now_us).map(|left| now + left);
            by_number.insert(row.number, (kept, Vec::new()));
        }
        let mut orphans = Vec::new();
        let mut owned = |namespace| -> Result<Vec<_>, StateError> {
            let mut rows = Vec::new();
            for (key, value) in store.states(namespace)? {
                match rows::split_key(&key) {
                    Some((number, rest)) if by_number.contains_key(&number) => {
                        rows.push((number, rest, value));
                    }
                    _ => orphans.push(rows::delete(namespace, key)),
                }
            }
            Ok(rows)
        };
        let (receipts, subscriptions, queues) =
            (owned(rows::RECEIPTS)?, owned(rows::SUBSCRIPTIONS)?, owned(rows::QUEUES)?);
        for (number, rest, _) in receipts {
            if let (Some((_, ids)), Some(id)) = (by_number.get_mut(&number), rest.first_chunk()) {
                ids.push(u16::from_be_bytes(*id));
            }
        }
        let mut serve_from = u64::MAX;
        for (number, rest, value) in subscriptions {
            let (filter, row) = (rows::text(&rest), rows::decode_subscription(value));
            if let (Some((kept, _)), Some(filter), Some((options, from))) =
                (by_number.get(&number), filter, row)
                && shared.downlink.watch(&filter, kept, options, from).is_ok()
            {
                kept.lock().subscriptions.insert(filter, options);
                serve_from = serve_from.min(from);
            }
        }
        for (number, rest, value) in queues {
            if let (Some((kept, _)), Some(place), Some(queued)) =
                (by_number.get(&number), rest.first_chunk(), Queued::decode(value))
            {
                let place = u64::from_be_bytes(*place);
                kept.change(&mut kept.lock(), |queue| queue.restore(place, queued));
            }
        }
        let served = store.state(rows::SERVED, b"")?;
        let served = served.as_ref().and_then(|served| served.first_chunk());
        let served = served.map_or(0, |served| u64::from_le_bytes(*served));
        if serve_from < u64::MAX {
            shared.downlink.serve_from(serve_from.max(served));
        }
        shared.last_number.store(by_number.keys().copied().max().unwrap_or(0), Ordering::Relaxed);
        let mut by_client = lock(&shared.by_client);
        for (kept, receipts) in by_number.into_values() {
            kept.lock().inbound = Some(Inbound::restored(receipts));
            by_client.insert(kept.client_id.clone(), kept);
        }
        drop(by_client);
        self.load_wills(store, now)?;
        if !orphans.is_empty() {
            shared.ingest.submit(orphans, None);
        }
        Ok(())
    }

    /// Their connections ended with the process.
    fn load_wills(&self, store: &Store, now: Instant) -> Result<(), StateError> {
        let mut wills = lock(&self.0.wills);
        for (client_id, row) in store.states(rows::WILLS)? {
            let (Some(client_id), Some(stored)) = (rows::text(&client_id), rows::decode_will(row))
            else {
                tracing::error!("the row of a will is damaged: left out");
                continue;
            };
            let delay = Duration::from_secs(stored.delay_s.into()).max(GRACE);
            wills.insert(client_id, Will { stored, due: now + delay });
        }
        Ok(())
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
            let sound = inner.mailbox.collect(&mut durable);
            for number in durable {
                inbound.complete(number);
            }
            if !sound {
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

    /// A client that has connected leaves a will: from here on a restart publishes it.
    pub fn leave_will(&self, client_id: &ByteString, will: &StoredWill) {
        let row = rows::encode_will(will);
        let row = rows::put(rows::WILLS, rows::name_key(client_id), row);
        self.0.ingest.submit(vec![row], None);
    }

    /// The will of a client is void.
    pub fn cancel_will(&self, client_id: &ByteString) {
        self.0.ingest.submit(vec![no_will(client_id)], None);
    }

    /// A client that left a will has gone without a goodbye: it is due then, unless it comes back.
    pub fn will_due(&self, client_id: &ByteString, stored: StoredWill, due: Instant) {
        lock(&self.0.wills).insert(client_id.clone(), Will { stored, due });
    }

    /// Whether the rules of now, which may not be those under which it was left, allow a will. If not,
    /// it is void.
    pub fn allows_will(&self, client_id: &ByteString, will: &StoredWill) -> bool {
        let (user, topic) = (will.user.as_deref(), &will.event.topic);
        let allowed = self.0.access.may_publish(client_id, user, topic);
        if !allowed {
            self.stats().wills_denied.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(client = %client_id, %topic, "a will is not allowed any more: dropped");
            self.cancel_will(client_id);
        }
        allowed
    }

    /// What has to be durable with the event that a will becomes: that there is no will any more, and
    /// what it retains.
    pub fn riders_of_will(&self, client_id: &ByteString, event: &Event) -> Option<Box<[Control]>> {
        let gone = no_will(client_id);
        Some([gone].into_iter().chain(self.0.retained.rider(event)).collect())
    }

    /// Publishes a will, or tries again soon: its event and the end of its row are one.
    fn publish_will(&self, client_id: &ByteString, will: Will) {
        if !self.allows_will(client_id, &will.stored) {
            return;
        }
        let StoredWill { mut event, delay_s, user } = will.stored;
        event.received_us = self.0.ingest.received_us();
        let riders = self.riders_of_will(client_id, &event);
        let (read_at, ticket, identity) = (Instant::now(), None, None);
        let pending = Pending { event, read_at, ticket, riders, identity };
        if let Err(Pending { event, .. }) = self.0.ingest.try_push(pending) {
            let will = Will { stored: StoredWill { event, delay_s, user }, due: will.due };
            lock(&self.0.wills).insert(client_id.clone(), will);
        }
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

fn no_will(client_id: &ByteString) -> Control {
    rows::delete(rows::WILLS, rows::name_key(client_id))
}

fn lasting(expiry_s: u32) -> Option<Duration> {
    (expiry_s != NEVER_S).then(|| Duration::from_secs(expiry_s.into()))
}

/// What is left of a session's time after a restart: see "Time" above. `None`: it never ends.
fn left(expiry_s: u32, ended_us: u64, now_us: u64) -> Option<Duration> {
    let expiry = lasting(expiry_s)?;
    let told = ended_us >= SET_US && now_us >= ended_us;
    // It was connected when the process ended, or nobody knows how long ago that was.
    let passed = if told { Duration::from_micros(now_us - ended_us) } else { Duration::ZERO };
    Some(expiry.saturating_sub(passed).max(GRACE.min(expiry)))
}

/// A ticket of its own, for who has no connection: the follower.
pub(crate) async fn durable(ingest: &Ingest, controls: Vec<Control>) -> bool {
    let mailbox: Arc<AckMailbox> = Arc::default();
    ingest.submit(controls, Some(Ticket { mailbox: mailbox.clone(), number: 0 }));
    mailbox.changed().await;
    mailbox.collect(&mut Vec::new())
}

#[cfg(test)]
mod tests;
