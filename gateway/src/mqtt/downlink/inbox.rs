//! What one connection subscribes to, and what arrives for it.
//!
//! Invariant: a connection has its place on the bus before it is in the table, and is out of the table
//! before it gives the place back. What a subscriber misses is counted.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use bytestring::ByteString;
use rumqttd::Notification;
use tokio::task::spawn_blocking;

use super::Downlink;
use super::bus::{Interrupted, Link};
use crate::mqtt::envelope::Envelope;
use crate::mqtt::rows::Message;
use crate::mqtt::subscriptions::{Manner, Options, Reader};
use crate::mqtt::{reason, topic};

/// Filters of one connection, at most.
pub const SUBSCRIPTIONS_MAX: usize = 256;

/// See the module.
pub struct Inbox {
    downlink: Downlink,
    client_id: ByteString,
    link: Option<Link>,
    filters: HashMap<ByteString, Options>,
    /// Messages that were handed out to it so far, as far as it knows.
    seq: u64,
}

impl Inbox {
    pub(super) fn new(downlink: Downlink, client_id: ByteString) -> Self {
        Self { downlink, client_id, link: None, filters: HashMap::new(), seq: 0 }
    }

    /// Whether there is a subscription to this filter.
    pub fn has(&self, filter: &str) -> bool {
        self.filters.contains_key(filter)
    }

    /// Whether any subscription asks not to get what its client published.
    pub fn has_no_local(&self) -> bool {
        self.filters.values().any(|options| options.no_local)
    }

    /// Subscribes to filters, valid ones, and gives the SUBACK code of each. What is published after
    /// this returns will be delivered.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub async fn subscribe(
        &mut self,
        filters: &[(ByteString, Options)],
    ) -> Result<Vec<u8>, Interrupted> {
        let reader = self.reader().await?;
        Ok(filters.iter().map(|(text, options)| self.enter(text, *options, &reader)).collect())
    }

    fn enter(&mut self, text: &ByteString, options: Options, reader: &Reader) -> u8 {
        if topic::is_shared(text) && topic::shared(text).is_none() {
            return reason::FILTER_INVALID;
        }
        // [MQTT-3.8.4-3]: one to the same filter replaces the one before.
        if !self.has(text) && self.filters.len() >= SUBSCRIPTIONS_MAX {
            return reason::QUOTA_EXCEEDED;
        }
        // Who joins a group gets its turn at all that the group has not had.
        let from = if topic::is_shared(text) { 0 } else { self.downlink.watermark() };
        if self.downlink.enter(text, reader, options, from).is_err() {
            return reason::QUOTA_EXCEEDED;
        }
        // A copy: the filter lives longer than the read buffer that it came in.
        self.filters.insert(ByteString::from(&**text), options);
        options.qos
    }

    /// Unsubscribes, and gives the UNSUBACK code of each filter. What was handed out before is still
    /// delivered, as [MQTT-3.10.4-2] allows: some of it may be for another subscription as well.
    pub fn unsubscribe(&mut self, filters: &[ByteString]) -> Vec<u8> {
        let reader = self.link.as_ref().map(|link| reader_of(link, &self.client_id));
        let mut code = |text: &ByteString| match (self.filters.remove(text), &reader) {
            (Some(_), Some(reader)) => {
                self.downlink.leave(text, reader);
                reason::SUCCESS
            }
            _ => reason::NO_SUBSCRIPTION_EXISTED,
        };
        filters.iter().map(&mut code).collect()
    }

    /// Itself in the table, with its place on the bus, which is opened at the first time.
    async fn reader(&mut self) -> Result<Reader, Interrupted> {
        let link = match self.link.take() {
            Some(link) => link,
            None => {
                let _call = self.downlink.0.calls.acquire().await.map_err(|_| Interrupted)?;
                let mut link = self.downlink.open_link().await?;
                let subscribed = spawn_blocking(move || link.subscribe().map(|()| link));
                subscribed.await.map_err(|_| Interrupted)??
            }
        };
        Ok(reader_of(self.link.insert(link), &self.client_id))
    }

    /// The next message for this connection. Waits for ever without a subscription. Cancel safe.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub async fn next(&mut self) -> Result<(Message, Manner), Interrupted> {
        loop {
            let Some(link) = &mut self.link else {
                return std::future::pending().await;
            };
            match link.next().await? {
                Notification::Forward(forward) => {
                    let label = forward.properties.and_then(|own| own.correlation_data);
                    let envelope =
                        label.and_then(|label| Envelope::open(label, forward.publish.payload));
                    if let Some(message) = envelope.and_then(|envelope| self.take(envelope)) {
                        return Ok(message);
                    }
                }
                Notification::Disconnect(..) => return Err(Interrupted),
                _ => {}
            }
        }
    }

    /// The next message, if there is one at hand.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub fn try_next(&mut self) -> Option<Result<(Message, Manner), Interrupted>> {
        match pin!(self.next()).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(message) => Some(message),
            Poll::Pending => None,
        }
    }

    /// Says how far this subscriber is, and counts what it missed. `None` for what was on its way to
    /// the one that had the place before.
    fn take(&mut self, envelope: Envelope) -> Option<(Message, Manner)> {
        let entry = self.link.as_ref()?.entry();
        if envelope.number != entry.number {
            return None;
        }
        let missed = envelope.seq.saturating_sub(self.seq);
        self.downlink.0.stats.missed.fetch_add(missed, Ordering::Relaxed);
        self.seq = envelope.seq + 1;
        entry.progress.set(envelope.end);
        self.downlink.0.taken.notify_one();
        Some((envelope.message, envelope.manner))
    }
}

fn reader_of(link: &Link, client_id: &ByteString) -> Reader {
    let entry = link.entry();
    Reader::Connection { number: entry.number, slot: entry.slot, client_id: client_id.clone() }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            let reader = reader_of(link, &self.client_id);
            for text in self.filters.keys() {
                self.downlink.leave(text, &reader);
            }
        }
    }
}
