//! Dead letters on their way to their sink again, as a pure state machine.
//!
//! Owns: one *pass* at a time, which is a request's worth of marked letters in a [`Delivery`] of its
//! own: retried, held and bisected like anything else. What came of them is settled in the store, and
//! then the next pass is taken from there: the store's marks are the queue, so that a kill at any
//! moment loses nothing and at most delivers a pass again.
//!
//! A requeued event keeps its identity, is marked ([`Attribute::Requeued`]) and stands outside the
//! order. So that it needs no more of a sink than the log does, its requests go alone: nothing else
//! is in flight beside one. While the log has events to deliver, there is a pause after each, of
//! [`SHARE_PAUSE`] or, where the upstream took long over it, so long that requeued events have
//! [`TIME_SHARE`] of the sink's time at most: a large requeue takes its time, and the live events
//! theirs, also where the upstream hangs over what was requeued until the request times out.
//!
//! Deliberately absent: reading and writing the store (`forwarder`).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use storage::{Attribute, DeadLetter, Event, KeptLetter, Read, StoredEvent};

use crate::delivery::{Delivery, Limits, Moment, Trouble};
use crate::retry::Backoff;
use crate::sink::{Answer, OUTSIDE_ORDER, Request, RequestId, Window};

/// Between two requests while the log has events for the sink.
const SHARE_PAUSE: Duration = Duration::from_millis(100);
/// Of the sink's time one part in so many at most, while the log has events for it.
const TIME_SHARE: u32 = 10;

/// What came of letters, on its way into the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settlement {
    /// Taken by the upstream.
    pub(crate) delivered: Vec<KeptLetter>,
    /// Refused again; the attempts are those of this pass.
    pub(crate) refused: Vec<DeadLetter>,
}

/// The letters that are under way.
#[derive(Debug)]
struct Pass {
    delivery: Delivery,
    /// By offset; those that are not settled yet.
    letters: BTreeMap<u64, KeptLetter>,
}

/// Dead letters of one sink that are to be delivered again.
#[derive(Debug)]
pub(crate) struct Requeue {
    sink: String,
    limits: Limits,
    backoff: Backoff,
    pass: Option<Pass>,
    /// The store may have marked letters that are not in the pass.
    more: bool,
    next_id: RequestId,
    /// When its last request began.
    begun_at: Option<Instant>,
    /// Nothing begins before.
    due_at: Option<Instant>,
    delivered_events: u64,
    /// Of passes that are over.
    retries: u64,
}

impl Requeue {
    /// A restart may have left marked letters behind: it begins with a look.
    pub(crate) fn new(sink: String, limits: Limits, backoff: Backoff) -> Self {
        Self {
            sink,
            limits: limits.one_at_a_time(),
            backoff,
            pass: None,
            more: true,
            next_id: OUTSIDE_ORDER,
            begun_at: None,
            due_at: None,
            delivered_events: 0,
            retries: 0,
        }
    }

    /// Somebody has marked letters.
    pub(crate) fn wake(&mut self) {
        self.more = true;
    }

    /// Whether a pass is to be read from the store, with [`Limits::read_events_max`] and
    /// [`Limits::read_bytes_max`].
    pub(crate) fn wants_letters(&self, now: Moment) -> bool {
        self.pass.is_none() && self.more && self.is_due(now)
    }

    /// The store is being read: what is marked from here on may not be in the pass.
    pub(crate) fn looking(&mut self) {
        self.more = false;
    }

    /// Takes the oldest marked letters, in offset order.
    pub(crate) fn push(&mut self, letters: Vec<KeptLetter>) {
        let Some(last) = letters.last() else { return };
        self.more = true;
        let next = last.letter.event.offset + 1;
        let events = letters.iter().map(|kept| marked(&kept.letter.event)).collect();
        let backoff = self.backoff.clone();
        let mut delivery =
            Delivery::new(self.sink.clone(), self.limits, backoff, 0).numbered_from(self.next_id);
        delivery.push(Read { events, next, missing: Vec::new() });
        let letters = letters.into_iter().map(|kept| (kept.letter.event.offset, kept)).collect();
        self.pass = Some(Pass { delivery, letters });
    }

    /// The next request to begin, once nothing else is in flight.
    pub(crate) fn next_request(&mut self, now: Moment) -> Option<Request> {
        if !self.is_due(now) {
            return None;
        }
        let request = self.pass.as_mut()?.delivery.next_request(now)?;
        self.begun_at = Some(now.at);
        Some(request)
    }

    /// Whether a request waits only for what else is in flight.
    pub(crate) fn is_waiting(&self, now: Moment) -> bool {
        self.is_due(now) && self.pass.as_ref().is_some_and(|pass| pass.delivery.is_waiting(now))
    }

    fn is_due(&self, now: Moment) -> bool {
        self.due_at.is_none_or(|at| now.at >= at)
    }

    /// When there may be something to do that nothing else tells.
    pub(crate) fn resumes_at(&self) -> Option<Instant> {
        let paused = self.pass.as_ref().and_then(|pass| pass.delivery.resumes_at());
        paused.max(self.due_at)
    }

    /// Whether a request is in flight.
    pub(crate) fn is_in_flight(&self) -> bool {
        self.pass.as_ref().is_some_and(|pass| pass.delivery.in_flight() > 0)
    }

    /// Whether no letter is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.pass.is_none()
    }

    /// What stands in the way, if something does.
    pub(crate) fn trouble(&self) -> Option<&Trouble> {
        self.pass.as_ref()?.delivery.trouble()
    }

    /// Letters that were delivered after all, and are settled.
    pub(crate) fn delivered_events(&self) -> u64 {
        self.delivered_events
    }

    /// Requests that failed and were tried again.
    pub(crate) fn retries(&self) -> u64 {
        self.retries + self.pass.as_ref().map_or(0, |pass| pass.delivery.counts().retries)
    }

    /// Takes the answer to its request. `busy`: the log has events for the sink. `random` as in
    /// [`Delivery::answer`].
    pub(crate) fn answer(
        &mut self,
        id: RequestId,
        answer: &Answer,
        busy: bool,
        now: Moment,
        random: f64,
    ) {
        let pass = self.pass.as_mut().expect("an answer belongs to a pass");
        pass.delivery.answer(id, answer, now, random);
        let took = self.begun_at.map_or(Duration::ZERO, |begun| now.at - begun);
        self.due_at = busy.then(|| now.at + (took * (TIME_SHARE - 1)).max(SHARE_PAUSE));
    }

    /// What has come of letters and is not in the store yet, if that may be written now.
    pub(crate) fn settlement(&self, now: Moment) -> Option<Settlement> {
        let pass = self.pass.as_ref()?;
        if matches!(self.trouble(), Some(Trouble::Store(_))) && pass.delivery.is_paused(now) {
            return None;
        }
        let settlement = Settlement {
            delivered: pass
                .letters
                .range(..pass.delivery.cursor())
                .map(|(_, l)| l.clone())
                .collect(),
            refused: pass.delivery.letters().to_vec(),
        };
        (!settlement.delivered.is_empty() || !settlement.refused.is_empty()).then_some(settlement)
    }

    /// The store has it.
    pub(crate) fn settled(&mut self, settlement: &Settlement) {
        let pass = self.pass.as_mut().expect("a pass lasts until it is settled");
        let delivered = settlement.delivered.iter().map(|kept| kept.letter.event.offset);
        let refused = settlement.refused.iter().map(|letter| letter.event.offset);
        delivered.chain(refused).for_each(|offset| {
            pass.letters.remove(&offset);
        });
        self.delivered_events += settlement.delivered.len() as u64;
        pass.delivery.letters_written(settlement.refused.len());
        if pass.delivery.is_idle() && pass.letters.is_empty() {
            self.retries += pass.delivery.counts().retries;
            self.next_id = pass.delivery.next_id();
            self.pass = None;
        }
    }

    /// The store failed us. `random` as in [`Delivery::answer`].
    pub(crate) fn store_failed(&mut self, reason: String, now: Moment, random: f64) {
        match &mut self.pass {
            Some(pass) => pass.delivery.store_failed(reason, now, random),
            None => {
                self.more = true;
                self.due_at = Some(now.at + self.backoff.pause_max());
            }
        }
    }
}

impl Limits {
    /// The same for requests that go alone.
    fn one_at_a_time(self) -> Self {
        self.within(|window| Window { requests_max: 1, ..window }).lingering(Duration::ZERO)
    }
}

/// The event with its mark.
fn marked(stored: &StoredEvent) -> StoredEvent {
    let attributes = stored.event.attributes.with(Attribute::Requeued);
    StoredEvent { event: Event { attributes, ..stored.event.clone() }, ..*stored }
}

#[cfg(test)]
mod tests;
