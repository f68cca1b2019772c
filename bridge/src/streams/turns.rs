//! Whose turn it is among those who share a sink's requests, and what fits beside what is in flight.
//!
//! Deliberately absent: who has something to send, and in which order within a party (`streams`).

use crate::delivery::Load;
use crate::sink::Window;

/// Between whom requests are shared by bytes.
#[derive(Clone, Copy)]
pub(super) enum Party {
    /// Live events.
    Live,
    /// Backlog, and the lane `backfill`.
    CanWait,
    /// What is sent again.
    Replay,
}

/// Start-time fair queueing: who has had less for its weight begins next.
#[derive(Debug, Default)]
pub(super) struct Turns {
    now: f64,
    /// When the last request of each party ends, on that clock.
    ends: [f64; 3],
}

impl Turns {
    /// When its next request begins: whose is the earliest goes next.
    pub(super) fn start(&self, party: Party) -> f64 {
        self.now.max(self.ends[party as usize])
    }

    /// It has begun a request.
    pub(super) fn took(&mut self, party: Party, size_bytes: usize, weight: f64) {
        self.now = self.start(party);
        self.ends[party as usize] = self.now + size_bytes as f64 / weight;
    }
}

/// Whether a request fits beside what is in flight: the first always does.
pub(super) fn fits(flight: Load, request: Load, window: Window) -> bool {
    let sum = flight + request;
    flight.requests == 0
        || sum.requests <= window.requests_max
            && sum.events <= window.events_max
            && sum.size_bytes <= window.bytes_max
}
