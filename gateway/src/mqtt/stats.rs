//! What the front counts, and how often it may speak of it in the log.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Counters of all listeners together. Reading them costs the connections nothing.
#[derive(Debug, Default)]
pub struct FrontStats {
    /// Connections open now.
    pub connections: AtomicU64,
    /// Connections accepted.
    pub connections_total: AtomicU64,
    /// Connections turned away: too many, no CONNECT in time, or refused in CONNACK.
    pub connections_refused: AtomicU64,
    /// Publishes, subscriptions and messages that waited which the rules do not allow.
    pub denied: AtomicU64,
    /// Times that a client was not read for a while because it was over its rate.
    pub paced: AtomicU64,
    /// Connections closed for a violation of the protocol.
    pub protocol_errors: AtomicU64,
    /// Connections that ended in a panic: a bug, which ended that connection only.
    pub panics: AtomicU64,
    /// PUBLISH packets read, by QoS.
    pub publishes: [AtomicU64; 3],
    /// Publishes refused: no route, reserved topic, or the store stands still.
    pub publishes_refused: AtomicU64,
    /// Publishes without the id that their route looks for: their resends are not recognised.
    pub publishes_without_id: AtomicU64,
    /// QoS 0 publishes and wills that were dropped at the end of a connection for want of room.
    pub publishes_dropped: AtomicU64,
    /// Bytes read from clients.
    pub received_bytes: AtomicU64,
    /// Bytes written to clients.
    pub sent_bytes: AtomicU64,
    /// Messages written to subscribers.
    pub deliveries: AtomicU64,
    /// Messages that a subscriber did not get: expired, or larger than it takes.
    pub deliveries_dropped: AtomicU64,
    /// Times that accepting a connection failed.
    pub accept_errors: AtomicU64,
}

impl FrontStats {
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// Lets a few log lines a second through and counts the others: clients decide how often they come.
#[derive(Debug)]
pub struct LogLimit {
    began: Instant,
    /// Second in the upper half, lines of that second in the lower.
    state: AtomicU64,
}

const LINES_PER_SECOND: u64 = 10;

impl Default for LogLimit {
    fn default() -> Self {
        Self { began: Instant::now(), state: AtomicU64::new(0) }
    }
}

impl LogLimit {
    /// Whether a line may be written at `now`, and how many were not since the last one that was
    /// the first of its second.
    pub fn allows(&self, now: Instant) -> Option<u64> {
        let second = now.saturating_duration_since(self.began).as_secs() & 0xffff_ffff;
        let step = |state: u64| {
            let lines = state & 0xffff_ffff;
            Some(if state >> 32 == second {
                (second << 32) | (lines + 1).min(0xffff_ffff)
            } else {
                (second << 32) | 1
            })
        };
        let before = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step);
        let (before, lines) = before.map_or((0, 0), |b| (b >> 32, b & 0xffff_ffff));
        if before == second {
            (lines < LINES_PER_SECOND).then_some(0)
        } else {
            Some(lines.saturating_sub(LINES_PER_SECOND))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn lines_past_the_limit_are_counted_and_told_of() {
        let limit = LogLimit::default();
        let now = limit.began + Duration::from_secs(5);
        let lines: Vec<_> = (0..15).filter_map(|_| limit.allows(now)).collect();
        assert_eq!(lines, [0; 10]);
        assert_eq!(limit.allows(now + Duration::from_secs(1)), Some(5));
        assert_eq!(limit.allows(now + Duration::from_secs(1)), Some(0));
    }
}
