//! The events that one request carries, and what is known of them.
//!
//! Owns: a [`Part`], which is never empty, and how a rest of it is made: what was tried of its events
//! goes with them.
//! Deliberately absent: when it goes, and what becomes of it (`delivery`).

use std::sync::Arc;
use std::time::Instant;

use storage::StoredEvent;

use crate::sink::RequestId;

/// What one request carries. See [`Delivery`](super::Delivery).
#[derive(Debug)]
pub(super) struct Part {
    pub(super) events: Arc<Vec<StoredEvent>>,
    pub(super) size_bytes: usize,
    /// The request that carries it.
    pub(super) in_flight: Option<RequestId>,
    /// It comes from a request that was refused as a whole, and goes alone: a sink that packs
    /// requests together (Kafka) could not tell whose fault the next refusal is.
    pub(super) suspect: bool,
    /// Requests that carried its events so far.
    pub(super) attempts: u32,
    pub(super) first_us: u64,
    pub(super) last_us: u64,
    /// Since when it waits for more events, if it does.
    pub(super) lingers_from: Option<Instant>,
}

impl Part {
    /// Events that wait for the first time.
    pub(super) fn new(events: Vec<StoredEvent>) -> Self {
        let size_bytes = events.iter().map(|e| e.event.size_bytes()).sum();
        Self {
            events: Arc::new(events),
            size_bytes,
            in_flight: None,
            suspect: false,
            attempts: 0,
            first_us: 0,
            last_us: 0,
            lingers_from: None,
        }
    }

    /// What its request takes of a window.
    pub(super) fn load(&self) -> Load {
        Load { requests: 1, events: self.events.len(), size_bytes: self.size_bytes }
    }

    /// What of it is still to be delivered once everything below an offset is given up.
    pub(super) fn from(self, offset: u64) -> Option<Self> {
        if self.in_flight.is_some() || self.events[0].offset >= offset {
            return Some(self);
        }
        let rest: Vec<_> = self.events.iter().filter(|e| e.offset >= offset).cloned().collect();
        (!rest.is_empty()).then(|| self.rest(rest, self.suspect))
    }

    /// Some of its events, which wait again.
    pub(super) fn rest(&self, events: Vec<StoredEvent>, suspect: bool) -> Self {
        let Self { attempts, first_us, last_us, .. } = *self;
        Self { suspect, attempts, first_us, last_us, ..Self::new(events) }
    }
}

/// A number of requests and what is in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) requests: usize,
    pub(crate) events: usize,
    pub(crate) size_bytes: usize,
}

impl std::ops::Add for Load {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            events: self.events + other.events,
            size_bytes: self.size_bytes + other.size_bytes,
        }
    }
}
