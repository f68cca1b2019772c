//! The replay of a sink: a stream beside all others, with a range and a rate of its own.
//!
//! Owns: what is asked for, how far it is, and its end. There is one at a time, and its stream is the
//! last one.
//! Deliberately absent: who asks, and who is told (`crate::replay`).

use std::ops::Range;
use std::time::Instant;

use storage::{Lanes, Spent};

use super::plan::Class;
use super::{Key, Streams};
use crate::delivery::{Moment, Trouble};
use crate::shaper::{Shaper, Shaping};
use crate::sink::{OUTSIDE_ORDER, RequestId};

/// What a replay gets of the requests, by bytes, beside the weights of live events and of what can
/// wait, which are 1 together.
pub(super) const REPLAY_WEIGHT: f64 = 0.1;
/// First request of a replay: it stands outside the order, apart from requeued dead letters.
pub(super) const REPLAY_IDS: RequestId = OUTSIDE_ORDER | 1 << 62;

/// What is to be sent again.
#[derive(Clone, Debug)]
pub(crate) struct Again {
    /// Offsets, end-exclusive.
    pub(crate) offsets: Range<u64>,
    /// Of this device key only.
    pub(crate) device: Option<String>,
    /// Event bytes a second on average; 0 for no limit but its share.
    pub(crate) rate_bytes_per_second: u64,
}

/// How far a replay is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplayProgress {
    /// Next offset that it needs.
    pub cursor: u64,
    /// Events delivered.
    pub delivered_events: u64,
    /// Events that the upstream refused for good; they are in no dead letters for that.
    pub refused_events: u64,
    /// Requests that were tried again.
    pub retries: u64,
    /// What stands in the way now, if something does.
    pub error: Option<String>,
    /// Nothing more comes: it is done, or it was told to stop.
    pub ended: bool,
}

/// The replay under way.
#[derive(Debug)]
pub(super) struct Replay {
    pub(super) key: Key,
    pub(super) device: Option<String>,
    pub(super) pace: Shaper,
    cancelled: bool,
}

impl Streams {
    /// Begins a replay: its key.
    ///
    /// # Panics
    /// While there is another one.
    pub(crate) fn replay(&mut self, again: Again) -> Key {
        assert!(self.replay.is_none(), "one replay at a time");
        let shaping =
            Shaping { rate_bytes_per_second: again.rate_bytes_per_second, ..Shaping::default() };
        let start = again.offsets.start;
        let stream = self.stream(Class::Replay, Lanes::ALL, again.offsets, start);
        let key = stream.key;
        let pace = Shaper::new(shaping, Spent::default());
        self.replay = Some(Replay { key, device: again.device, pace, cancelled: false });
        self.all.push(stream);
        key
    }

    /// Nothing more of the replay begins.
    pub(crate) fn cancel_replay(&mut self) {
        if let Some(replay) = &mut self.replay {
            replay.cancelled = true;
        }
    }

    /// How far the replay is, while there is one.
    pub(crate) fn replay_progress(&self) -> Option<ReplayProgress> {
        let stream =
            self.all.iter().find(|s| self.replay.as_ref().is_some_and(|r| r.key == s.key))?;
        let counts = stream.delivery.counts();
        Some(ReplayProgress {
            cursor: stream.delivery.cursor(),
            delivered_events: counts.delivered_events,
            refused_events: counts.dead_lettered_events,
            retries: counts.retries,
            error: stream.delivery.trouble().map(|trouble| match trouble {
                Trouble::Upstream(error) | Trouble::Held(error) | Trouble::Store(error) => {
                    error.clone()
                }
            }),
            ended: stream.is_done(),
        })
    }

    /// What a replay has come to, once.
    pub(crate) fn take_replay_end(&mut self) -> Option<ReplayProgress> {
        self.replay_end.take()
    }

    /// Until when the replay's own rate holds it.
    pub(super) fn paced(&self, now: Moment) -> Option<Instant> {
        Some(self.replay.as_ref()?.pace.gate(now).closed()?.until)
    }

    /// Ends it once it is done.
    pub(super) fn retire_replay(&mut self) {
        let Some(replay) = &self.replay else { return };
        let stream = self.all.last_mut().expect("never empty");
        if replay.cancelled {
            // What is in flight may still arrive.
            stream.delivery.pass(stream.offsets.end);
        }
        if stream.is_done() {
            self.replay_end = self.replay_progress();
            self.all.pop();
            self.replay = None;
        }
    }
}
