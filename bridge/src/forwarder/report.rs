//! What a forwarder tells: its status, its cursor, and the log.
//!
//! Owns: when something is worth telling. A change of state is told at once, sums at most every
//! [`PUBLISH_INTERVAL`], a repeated complaint once per [`REPEAT_INTERVAL`] with the number of those
//! kept back: nothing here costs per event.

use std::ops::Range;
use std::time::{Duration, Instant};

use storage::{DeadLetter, Loss, SinkProgress};
use tokio::sync::watch;

use super::{MoveCursor, SinkState, SinkStatus};
use crate::breaker::{Breaker, Circuit};
use crate::delivery::{Counts, Moment, Trouble};
use crate::requeue::{Requeue, Settlement};
use crate::streams::Streams;

const PUBLISH_INTERVAL: Duration = Duration::from_millis(100);
const REPEAT_INTERVAL: Duration = Duration::from_secs(10);

pub(super) struct Report {
    name: String,
    status: watch::Sender<SinkStatus>,
    move_cursor: MoveCursor,
    progress: SinkProgress,
    counts: Counts,
    breaker: Breaker,
    published_at: Option<Instant>,
    /// The upstream has answered once.
    connected: bool,
    troubles: Repeats,
    /// A trouble was logged and its end was not.
    complained: bool,
    refusals: Repeats,
    drops: Repeats,
    settlements: Repeats,
}

impl Report {
    pub(super) fn new(
        name: &str,
        kind: &'static str,
        progress: SinkProgress,
        move_cursor: MoveCursor,
    ) -> Self {
        let status = SinkStatus {
            name: name.to_owned(),
            kind,
            state: SinkState::Starting,
            cursor: progress.cursor,
            streams: Vec::new(),
            delivered_events: 0,
            delivered_bytes: 0,
            dead_lettered_events: 0,
            filtered_events: 0,
            parked_devices: 0,
            requeued_events: 0,
            retries: 0,
            circuit: Circuit::default(),
            circuit_opened: 0,
            last_delivered_us: None,
        };
        Self {
            name: name.to_owned(),
            status: watch::Sender::new(status),
            move_cursor,
            progress,
            counts: Counts::default(),
            breaker: Breaker::default(),
            published_at: None,
            connected: false,
            troubles: Repeats::default(),
            complained: false,
            refusals: Repeats::default(),
            drops: Repeats::default(),
            settlements: Repeats::default(),
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<SinkStatus> {
        self.status.subscribe()
    }

    /// Tells what has changed since the last call.
    pub(super) fn update(
        &mut self,
        streams: &Streams,
        requeue: &Requeue,
        caught_up: bool,
        now: Moment,
    ) {
        let progress = streams.progress();
        if progress != self.progress {
            self.progress = progress;
            (self.move_cursor)(&self.name, &self.progress);
        }
        let counts = streams.counts();
        let counts = Counts { retries: counts.retries + requeue.retries(), ..counts };
        let (trouble, resumes_at) = match streams.trouble() {
            None => (requeue.trouble(), requeue.resumes_at()),
            trouble => (trouble, streams.troubled_until()),
        };
        self.breaker.update(trouble, resumes_at, now);
        let delivered = counts.delivered_events != self.counts.delivered_events;
        let failed = counts.retries != self.counts.retries;
        self.connected |= counts != self.counts;
        self.counts = counts;
        match trouble {
            Some(trouble) if failed => self.complain(trouble, now),
            None if self.complained => {
                self.complained = false;
                tracing::info!(sink = self.name, retries = counts.retries, "the sink works again");
            }
            _ => {}
        }

        let state = match trouble {
            Some(Trouble::Held(error)) => SinkState::Held { error: error.clone() },
            Some(Trouble::Upstream(error) | Trouble::Store(error)) => {
                SinkState::Retrying { error: error.clone() }
            }
            None if streams.is_idle() && requeue.is_idle() && caught_up => SinkState::Idle,
            None if let Some(reason) = streams.waits_for(now) => SinkState::Waiting { reason },
            None if self.connected => SinkState::Sending,
            None => SinkState::Starting,
        };
        let due = self.published_at.is_none_or(|at| now.at - at >= PUBLISH_INTERVAL);
        self.status.send_if_modified(|status| {
            // The sums are written in any case; who waits is woken only for what is worth it.
            let changed = status.state != state || status.circuit_opened != self.breaker.opened();
            if delivered {
                status.last_delivered_us = Some(now.unix_us);
            }
            status.state = state;
            status.cursor = self.progress.cursor;
            status.streams = streams.status();
            status.delivered_events = counts.delivered_events;
            status.delivered_bytes = counts.delivered_bytes;
            status.dead_lettered_events = counts.dead_lettered_events;
            status.filtered_events = counts.filtered_events;
            status.parked_devices = streams.parked_devices() as u64;
            status.requeued_events = requeue.delivered_events();
            status.retries = counts.retries;
            status.circuit = self.breaker.circuit();
            status.circuit_opened = self.breaker.opened();
            if changed || due {
                self.published_at = Some(now.at);
            }
            changed || due
        });
    }

    /// Logs a failure, if it was not logged a moment ago.
    pub(super) fn complain(&mut self, trouble: &Trouble, now: Moment) {
        let sink = &*self.name;
        let Some(kept_back) = self.troubles.pass(now.at) else {
            return;
        };
        self.complained = true;
        match trouble {
            Trouble::Upstream(error) => {
                tracing::warn!(sink, error, kept_back, "the upstream failed; trying again");
            }
            Trouble::Store(error) => {
                tracing::error!(sink, error, kept_back, "the store failed; trying again");
            }
            Trouble::Held(error) => tracing::error!(
                sink,
                error,
                kept_back,
                "the sink is held: nothing is dropped, but somebody must act"
            ),
        }
    }

    /// Ranges that the log no longer has.
    pub(super) fn missing(&self, ranges: &[Range<u64>]) {
        for range in ranges {
            tracing::warn!(
                sink = self.name,
                from = range.start,
                to = range.end,
                "passing over offsets that are no longer in the log; see the loss ledger"
            );
        }
    }

    /// Events that are about to be written down as dead letters.
    pub(super) fn dead_letters(&mut self, letters: &[DeadLetter], now: Moment) {
        let Some(first) = letters.first() else { return };
        if let Some(kept_back) = self.refusals.pass(now.at) {
            tracing::warn!(
                sink = self.name,
                events = letters.len(),
                offset = first.event.offset,
                reason = first.reason,
                kept_back,
                "the upstream refuses events for good; they go to the dead letters"
            );
        }
    }

    /// What the bound of the dead letters has cost.
    pub(super) fn dropped_letters(&mut self, losses: &[Loss], now: Moment) {
        let events: u64 = losses.iter().map(|loss| loss.events).sum();
        if events > 0
            && let Some(kept_back) = self.drops.pass(now.at)
        {
            tracing::warn!(
                sink = self.name,
                events,
                kept_back,
                "storage.dead_letter_bytes_max is reached: the oldest dead letters were dropped; \
                 they stand in the loss ledger"
            );
        }
    }

    /// Requeued dead letters whose fate is durable.
    pub(super) fn settled(&mut self, settlement: &Settlement, now: Moment) {
        if let Some(kept_back) = self.settlements.pass(now.at) {
            tracing::info!(
                sink = self.name,
                delivered = settlement.delivered.len(),
                refused = settlement.refused.len(),
                kept_back,
                "dead letters were offered again"
            );
        }
    }

    /// The last word.
    pub(super) fn stopped(self) {
        self.status.send_modify(|status| status.state = SinkState::Stopped);
    }
}

/// Lets the first of many through, and then one per [`REPEAT_INTERVAL`].
#[derive(Debug, Default)]
struct Repeats {
    passed_at: Option<Instant>,
    kept_back: u64,
}

impl Repeats {
    /// `Some` number of those kept back since the last that passed, if this one may pass.
    fn pass(&mut self, now: Instant) -> Option<u64> {
        if self.passed_at.is_some_and(|at| now - at < REPEAT_INTERVAL) {
            self.kept_back += 1;
            return None;
        }
        self.passed_at = Some(now);
        Some(std::mem::take(&mut self.kept_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_counted_and_told_now_and_then() {
        let start = Instant::now();
        let mut repeats = Repeats::default();
        assert_eq!(repeats.pass(start), Some(0));
        for second in 1..10 {
            assert_eq!(repeats.pass(start + Duration::from_secs(second)), None);
        }
        assert_eq!(repeats.pass(start + REPEAT_INTERVAL), Some(9));
        assert_eq!(repeats.pass(start + REPEAT_INTERVAL), None);
    }
}
