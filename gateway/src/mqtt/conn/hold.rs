//! The publishes that wait for room in their ring, and the bytes of all of them together.
//!
//! Invariant: [`Held::bytes`] is the sum over all connections: what leaves a hold, or goes with it, is
//! taken off.
//! Deliberately absent: when something may leave (`publish`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::ingest::Pending;

/// Bytes of the publishes held back over all connections.
#[derive(Debug)]
pub struct Held {
    pub(super) bytes: AtomicUsize,
    pub(super) bytes_max: usize,
}

impl Held {
    /// Event bytes held now.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// One connection's publishes that wait for room in their ring, in order.
pub(super) struct Hold {
    pub(super) queue: VecDeque<Pending>,
    pub(super) budget: Arc<Held>,
}

impl Hold {
    pub(super) fn push_back(&mut self, pending: Pending) {
        self.budget.bytes.fetch_add(pending.event.size_bytes(), Ordering::Relaxed);
        self.queue.push_back(pending);
    }

    pub(super) fn pop_front(&mut self) -> Option<Pending> {
        let pending = self.queue.pop_front()?;
        self.budget.bytes.fetch_sub(pending.event.size_bytes(), Ordering::Relaxed);
        Some(pending)
    }

    pub(super) fn push_front(&mut self, pending: Pending) {
        self.budget.bytes.fetch_add(pending.event.size_bytes(), Ordering::Relaxed);
        self.queue.push_front(pending);
    }

    /// Whether one more may be decoded. Who holds nothing may always: it is one event over at most.
    pub(super) fn has_room(&self, events_max: usize) -> bool {
        self.queue.is_empty()
            || (self.queue.len() < events_max && self.budget.bytes() < self.budget.bytes_max)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        while self.pop_front().is_some() {}
    }
}
