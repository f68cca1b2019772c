//! One session that outlives its connections: what waits for its client, what it subscribes to.
//!
//! Invariant: what changes here comes with the rows that make it durable; who changes it submits them.
//! Deliberately absent: when a session begins and ends.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use bytestring::ByteString;
use storage::Control;
use tokio::sync::Notify;

use super::super::rows::{self, Message, Queued, SessionRow};
use super::super::session::Inbound;
use super::super::subscriptions::Options;
use super::SessionsStats;
use super::queue::{Next, Queue, QueueLimits};
use crate::ingest::AckMailbox;

/// QoS 0 messages that wait for a client that is connected, at most; more are dropped.
const PASSING_MAX: usize = 256;

/// Bounds that all sessions share.
#[derive(Debug)]
pub(super) struct Bounds {
    pub(super) queue: QueueLimits,
    pub(super) queued_bytes_max: usize,
    pub(super) stats: SessionsStats,
}

/// One session, kept. Its connection and the follower of the log share it.
#[derive(Debug)]
pub struct Kept {
    pub(super) client_id: ByteString,
    /// The user whose it is; `None`: an anonymous client's.
    pub(super) user: Option<ByteString>,
    pub(super) number: u64,
    pub(super) bounds: Arc<Bounds>,
    pub(super) inner: Mutex<Inner>,
    /// There is something to send.
    pub(super) wake: Notify,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) queue: Queue,
    /// QoS 0 messages for the connection that is there.
    pub(super) passing: VecDeque<Queued>,
    pub(super) subscriptions: HashMap<ByteString, Options>,
    /// Here while no connection has it.
    pub(super) inbound: Option<Inbound>,
    pub(super) mailbox: Arc<AckMailbox>,
    pub(super) online: bool,
    pub(super) expiry_s: u32,
    /// When it ends, while no connection holds it; `None`: never.
    pub(super) ends_at: Option<Instant>,
    /// It has ended: nothing more is kept for it.
    pub(super) ended: bool,
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

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
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
    pub(super) fn change<T>(&self, inner: &mut Inner, change: impl FnOnce(&mut Queue) -> T) -> T {
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

    pub(super) fn delete(&self, place: u64) -> Control {
        rows::delete(rows::QUEUES, self.queue_key(place))
    }

    pub(super) fn row(&self, expiry_s: u32, ended_us: u64) -> Control {
        let user = self.user.clone();
        let row = SessionRow { number: self.number, expiry_s, ended_us, user };
        rows::put(rows::SESSIONS, rows::name_key(&self.client_id), row.encode())
    }
}
