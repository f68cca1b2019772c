//! Wills: left, void, due, published.
//!
//! Invariant: a will is a row of the store from the moment its client is connected; the event that it
//! becomes and the end of the row are one.

use std::sync::atomic::Ordering;
use std::time::Instant;

use bytestring::ByteString;
use storage::{Control, Event};

use super::super::rows::{self, StoredWill};
use super::{Sessions, lock};
use crate::ingest::Pending;

/// A will that waits for its delay.
#[derive(Debug)]
pub(super) struct Will {
    pub(super) stored: StoredWill,
    pub(super) due: Instant,
}

impl Sessions {
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
    pub(super) fn publish_will(&self, client_id: &ByteString, will: Will) {
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
}

fn no_will(client_id: &ByteString) -> Control {
    rows::delete(rows::WILLS, rows::name_key(client_id))
}
