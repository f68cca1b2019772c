//! What a sink still owes, as a pure state machine: no I/O, no clock, no randomness of its own.
//!
//! Owns: the events between the cursor and the end of what was read, cut into *parts* in offset
//! order. A part is what one request carries. It waits, is in flight, and leaves when its last
//! event is delivered or stands in the dead letters; a refused part is replaced by its halves,
//! until the poison event is alone.
//!
//! Invariants:
//! - The cursor never passes an event that is neither delivered nor a durable dead letter.
//! - Requests begin in offset order. After a failure nothing new begins until everything in flight
//!   has ended; then the oldest part goes first, alone, until one request has come through. So, with
//!   the contract of [`Sink`](crate::sink::Sink), no event overtakes an older one of its device.
//! - What is held is at most the window, two requests' worth read ahead, one read, and as many dead
//!   letters as a window and a request hold.
//!
//! A refusal of a whole request is dear: what was good in it is sent again with every halving. So
//! requests get smaller where refusals are frequent: each refusal halves the next ones, and each
//! request that comes through whole doubles them again. Where one event in a hundred is bad that ends
//! near seventy events, and an event is sent less than three times instead of six.
//!
//! Deliberately absent: how an upstream's answers are sorted (each sink), when to read (forwarder).

mod fates;
mod part;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use storage::{DeadLetter, Read, StoredEvent};

use self::fates::{Fate, Fates};
pub(crate) use self::part::Load;
use self::part::Part;
use crate::retry::{Backoff, RETRY_AFTER_MAX};
use crate::sink::{Answer, Failure, Request, RequestId, Window};

/// Now, on both clocks that delivery needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    /// For pauses.
    pub(crate) at: Instant,
    /// For dead letters: microseconds since the Unix epoch.
    pub(crate) unix_us: u64,
}

impl Moment {
    /// Reads both clocks.
    pub(crate) fn now() -> Self {
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { at: Instant::now(), unix_us: unix.as_micros() as u64 }
    }
}

/// Bounds of requests and of what is in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Events in one request at most.
    request_events_max: usize,
    /// Event bytes in one request at most; a single larger event still goes, alone.
    request_bytes_max: usize,
    /// Over all requests.
    window: Window,
    /// How long a request waits for more events.
    linger_max: Duration,
    /// Nothing begins while dead letters are not durable.
    letters_first: bool,
}

impl Limits {
    /// No request is larger than the window.
    pub(crate) fn new(request_events_max: usize, request_bytes_max: usize, window: Window) -> Self {
        Self {
            request_events_max: request_events_max.min(window.events_max),
            request_bytes_max: request_bytes_max.min(window.bytes_max),
            window,
            linger_max: Duration::ZERO,
            letters_first: false,
        }
    }
    /// The same, and a request that is not as large as it may be waits so long for more events.
    pub(crate) fn lingering(self, linger_max: Duration) -> Self {
        Self { linger_max, ..self }
    }
    /// The same for a sink that keeps a cursor, which must not pass a letter that is not durable.
    pub(crate) fn letters_first(self, letters_first: bool) -> Self {
        Self { letters_first, ..self }
    }
    /// The same with another window.
    pub(crate) fn within(self, change: impl FnOnce(Window) -> Window) -> Self {
        Self { window: change(self.window), ..self }
    }
    /// Events that one read should bring at most.
    pub(crate) fn read_events_max(&self) -> usize {
        self.request_events_max
    }
    /// Event bytes that one read should bring at most.
    pub(crate) fn read_bytes_max(&self) -> usize {
        self.request_bytes_max
    }
}

/// Sums since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Events delivered, each once.
    pub(crate) delivered_events: u64,
    /// Their event bytes.
    pub(crate) delivered_bytes: u64,
    /// Events that stand in the dead letters.
    pub(crate) dead_lettered_events: u64,
    /// Events that the sink was not to have.
    pub(crate) filtered_events: u64,
    /// Requests that failed and are tried again.
    pub(crate) retries: u64,
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            delivered_events: self.delivered_events + other.delivered_events,
            delivered_bytes: self.delivered_bytes + other.delivered_bytes,
            dead_lettered_events: self.dead_lettered_events + other.dead_lettered_events,
            filtered_events: self.filtered_events + other.filtered_events,
            retries: self.retries + other.retries,
        }
    }
}

/// What stands in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The upstream, for a while.
    Upstream(String),
    /// The upstream, until somebody acts.
    Held(String),
    /// The store on this side.
    Store(String),
}

/// After a failure: nothing begins before `until`, and one request at a time after it.
#[derive(Debug)]
struct Setback {
    trouble: Trouble,
    until: Instant,
    /// Requests from this one on were begun after the failure: the first that comes through ends it.
    first_after: RequestId,
}

/// What a sink still owes.
#[derive(Debug)]
pub(crate) struct Delivery {
    sink: String,
    limits: Limits,
    /// Events that the next request takes: fewer than the limit after refusals.
    request_events: usize,
    backoff: Backoff,
    /// In offset order; none is empty.
    parts: VecDeque<Part>,
    /// Dead letters that are not durable yet.
    letters: Vec<DeadLetter>,
    read_to: u64,
    next_id: RequestId,
    setback: Option<Setback>,
    counts: Counts,
}

impl Delivery {
    /// Starts at the durable cursor of a sink.
    pub(crate) fn new(sink: String, limits: Limits, backoff: Backoff, cursor: u64) -> Self {
        Self {
            sink,
            limits,
            request_events: limits.request_events_max,
            backoff,
            parts: VecDeque::new(),
            letters: Vec::new(),
            read_to: cursor,
            next_id: 0,
            setback: None,
            counts: Counts::default(),
        }
    }

    /// Numbers its requests from here on.
    pub(crate) fn numbered_from(self, next_id: RequestId) -> Self {
        Self { next_id, ..self }
    }

    /// The number of its next request.
    pub(crate) fn next_id(&self) -> RequestId {
        self.next_id
    }

    /// Where to read on.
    pub(crate) fn read_to(&self) -> u64 {
        self.read_to
    }

    /// Next offset that the sink needs: everything below is delivered, a durable dead letter, or
    /// missing from the log.
    pub(crate) fn cursor(&self) -> u64 {
        let open = self.parts.front().map_or(self.read_to, |part| part.events[0].offset);
        self.letters.iter().map(|letter| letter.event.offset).fold(open, u64::min)
    }

    /// Where the cursor is once everything in flight is delivered.
    pub(crate) fn begun_to(&self) -> u64 {
        let waiting = self.parts.iter().find(|part| part.in_flight.is_none());
        let open = waiting.map_or(self.read_to, |part| part.events[0].offset);
        self.letters.iter().map(|letter| letter.event.offset).fold(open, u64::min)
    }

    /// Sums since the start.
    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// What stands in the way, if something does.
    pub(crate) fn trouble(&self) -> Option<&Trouble> {
        self.setback.as_ref().map(|setback| &setback.trouble)
    }

    /// Whether any event is owed.
    pub(crate) fn is_idle(&self) -> bool {
        self.parts.is_empty() && self.letters.is_empty()
    }

    /// Whether a request may begin now.
    pub(crate) fn is_waiting(&self, now: Moment) -> bool {
        self.in_flight() == 0
            && self
                .parts
                .front()
                .is_some_and(|p| self.may_begin(0, p.events.len(), p.size_bytes, now))
    }

    /// Number of requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.parts.iter().filter(|part| part.in_flight.is_some()).count()
    }

    /// Whether a request in flight is one of these.
    pub(crate) fn carries(&self, id: RequestId) -> bool {
        self.parts.iter().any(|part| part.in_flight == Some(id))
    }

    /// What is in flight.
    pub(crate) fn flight(&self) -> Load {
        let flying = self.parts.iter().filter(|part| part.in_flight.is_some());
        flying.fold(Load::default(), |sum, part| sum + part.load())
    }

    /// When the oldest event that is held was received, microseconds since the Unix epoch.
    pub(crate) fn oldest_us(&self) -> Option<u64> {
        Some(self.parts.front()?.events[0].received_us())
    }

    /// Whether nothing else may be in flight beside it: after a failure one request goes first, and
    /// a part that is suspected of holding poison goes alone.
    pub(crate) fn wants_alone(&self) -> bool {
        self.setback.is_some() || self.parts.iter().any(|part| part.suspect)
    }

    /// Its next request gets at least this number.
    pub(crate) fn number_from(&mut self, id: RequestId) {
        self.next_id = self.next_id.max(id);
    }

    /// Whether to read on. While the log holds more than the last read could bring (`backlog`), one
    /// request's worth is kept ready; else only what can begin at once, so that requests grow with
    /// the load instead of going out as crumbs.
    pub(crate) fn wants_events(&self, backlog: bool, now: Moment) -> bool {
        if self.is_paused(now) && matches!(self.trouble(), Some(Trouble::Store(_))) {
            return false;
        }
        if self.letters_are_in_the_way() {
            return false;
        }
        let waiting = || self.parts.iter().filter(|part| part.in_flight.is_none());
        if backlog {
            let events: usize = waiting().map(|part| part.events.len()).sum();
            let bytes: usize = waiting().map(|part| part.size_bytes).sum();
            events < self.limits.request_events_max && bytes < self.limits.request_bytes_max
        } else {
            let lingering = usize::from(self.lingering().is_some());
            waiting().count() == lingering
                && self.may_begin(self.parts.len() - lingering, 1, 1, now)
        }
    }

    /// The last part, if it waits for more events or would have to.
    fn lingering(&self) -> Option<&Part> {
        let Limits { request_bytes_max, linger_max, .. } = self.limits;
        self.parts.back().filter(|part| {
            !linger_max.is_zero()
                && part.in_flight.is_none()
                && part.attempts == 0
                && !part.suspect
                && part.events.len() < self.request_events
                && part.size_bytes < request_bytes_max
        })
    }

    /// When the wait for more events ends, if there is one.
    pub(crate) fn lingers_until(&self) -> Option<Instant> {
        Some(self.lingering()?.lingers_from? + self.limits.linger_max)
    }

    /// Takes what was read at [`Delivery::read_to`].
    pub(crate) fn push(&mut self, read: Read) {
        assert!(read.next >= self.read_to, "reading never goes back");
        if matches!(self.trouble(), Some(Trouble::Store(_))) {
            self.recover();
        }
        let mut rest = read.events;
        let mut lingers_from = None;
        if !rest.is_empty() && self.lingering().is_some() {
            let Part { events, lingers_from: from, .. } =
                self.parts.pop_back().expect("it lingers");
            lingers_from = from;
            rest.splice(..0, events.iter().cloned());
        }
        while !rest.is_empty() {
            let after = rest.split_off(self.cut(&rest));
            let part = Part::new(std::mem::replace(&mut rest, after));
            self.parts.push_back(Part { lingers_from: lingers_from.take(), ..part });
        }
        self.read_to = read.next;
    }

    /// The sink is no longer to have what is below `cursor`: a policy has dropped it, and it stands
    /// in the loss ledger. Nothing of it begins any more; what is in flight may still arrive. Gives
    /// what is passed over.
    pub(crate) fn pass(&mut self, cursor: u64) -> Option<Range<u64>> {
        let passed = self.cursor()..cursor;
        let waits = |part: &Part| part.in_flight.is_none() && part.events[0].offset < cursor;
        if passed.is_empty() || self.read_to >= cursor && !self.parts.iter().any(waits) {
            return None;
        }
        let parts = std::mem::take(&mut self.parts);
        self.parts = parts.into_iter().filter_map(|part| part.from(cursor)).collect();
        self.read_to = self.read_to.max(cursor);
        Some(passed)
    }

    /// Gives up what waits and is `behind` an event of its device that was refused: it becomes a dead
    /// letter that was never offered.
    pub(crate) fn park(&mut self, behind: impl Fn(&StoredEvent) -> Option<u64>) {
        let parts = std::mem::take(&mut self.parts);
        for part in parts {
            if part.in_flight.is_some() || part.events.iter().all(|e| behind(e).is_none()) {
                self.parts.push_back(part);
                continue;
            }
            let mut rest = Vec::new();
            for stored in part.events.iter() {
                let Some(offset) = behind(stored) else {
                    rest.push(stored.clone());
                    continue;
                };
                self.letters.push(DeadLetter {
                    sink: self.sink.clone(),
                    event: stored.clone(),
                    reason: format!("held back: its device is parked behind offset {offset}"),
                    attempts: 0,
                    first_us: stored.event.received_us,
                    last_us: stored.event.received_us,
                });
            }
            if !rest.is_empty() {
                self.parts.push_back(part.rest(rest, part.suspect));
            }
        }
    }

    /// How many of these events the first request takes: at least one.
    fn cut(&self, events: &[StoredEvent]) -> usize {
        let mut size_bytes = 0;
        let fit = events
            .iter()
            .take(self.limits.request_events_max)
            .take_while(|e| {
                size_bytes += e.event.size_bytes();
                size_bytes <= self.limits.request_bytes_max
            })
            .count();
        fit.max(1)
    }

    /// The part that may begin now, if one may.
    fn next_part(&mut self, now: Moment) -> Option<usize> {
        let place = self.parts.iter().position(|part| part.in_flight.is_none())?;
        // A part that failed waits for whatever was in flight behind it.
        if self.parts.iter().skip(place).any(|part| part.in_flight.is_some()) {
            return None;
        }
        self.shorten(place);
        if self.lingers(now) {
            return None;
        }
        let part = &self.parts[place];
        self.may_begin(place, part.events.len(), part.size_bytes, now).then_some(place)
    }

    /// Whether the first part to begin waits for more events.
    fn lingers(&mut self, now: Moment) -> bool {
        if self.lingering().is_none()
            || self.parts.iter().filter(|p| p.in_flight.is_none()).count() > 1
        {
            return false;
        }
        let linger_max = self.limits.linger_max;
        let last = self.parts.back_mut().expect("it lingers");
        now.at < *last.lingers_from.get_or_insert(now.at) + linger_max
    }

    /// What the next request to begin now carries, if one may.
    pub(crate) fn next_load(&mut self, now: Moment) -> Option<Load> {
        self.next_part(now).map(|place| self.parts[place].load())
    }

    /// The next request to begin now, if one may.
    pub(crate) fn next_request(&mut self, now: Moment) -> Option<Request> {
        let place = self.next_part(now)?;
        let id = self.next_id;
        self.next_id += 1;
        let part = &mut self.parts[place];
        part.in_flight = Some(id);
        part.attempts += 1;
        part.last_us = now.unix_us;
        if part.attempts == 1 {
            part.first_us = now.unix_us;
        }
        Some(Request { id, stream: None, events: Arc::clone(&part.events) })
    }

    /// Leaves no more of a part than the next request takes; the rest waits behind it.
    fn shorten(&mut self, place: usize) {
        let part = &self.parts[place];
        if part.suspect || part.events.len() <= self.request_events {
            return;
        }
        let (first, rest) = part.events.split_at(self.request_events);
        let (first, rest) = (part.rest(first.to_vec(), false), part.rest(rest.to_vec(), false));
        self.parts[place] = first;
        self.parts.insert(place + 1, rest);
    }

    /// Whether a request of this size may begin while the parts before `place` are in flight.
    fn may_begin(&self, place: usize, events: usize, bytes: usize, now: Moment) -> bool {
        if self.letters_are_in_the_way() || self.is_paused(now) {
            return false;
        }
        let Window { requests_max, events_max, bytes_max } = self.limits.window;
        let ahead = || self.parts.iter().take(place);
        let alone =
            self.setback.is_some() || self.parts.iter().take(place + 1).any(|part| part.suspect);
        place == 0
            || !alone
                && place < requests_max
                && ahead().map(|part| part.events.len()).sum::<usize>() + events <= events_max
                && ahead().map(|part| part.size_bytes).sum::<usize>() + bytes <= bytes_max
    }

    /// What cannot be written down must not pile up: no more than a request of it.
    fn letters_are_in_the_way(&self) -> bool {
        let Limits { request_events_max, request_bytes_max, letters_first, .. } = self.limits;
        let size_bytes = || self.letters.iter().map(|l| l.event.event.size_bytes()).sum::<usize>();
        !self.letters.is_empty()
            && (letters_first
                || self.letters.len() >= request_events_max
                || size_bytes() >= request_bytes_max)
    }

    /// Whether a failure still asks for patience.
    pub(crate) fn is_paused(&self, now: Moment) -> bool {
        self.resumes_at().is_some_and(|at| now.at < at)
    }

    /// When the pause after the last failure ends, if there is one.
    pub(crate) fn resumes_at(&self) -> Option<Instant> {
        self.setback.as_ref().map(|setback| setback.until)
    }

    /// Takes the answer to a request in flight. `random` is drawn evenly from `0.0..1.0`.
    pub(crate) fn answer(&mut self, id: RequestId, answer: &Answer, now: Moment, random: f64) {
        let place = self
            .parts
            .iter()
            .position(|part| part.in_flight == Some(id))
            .expect("an answer belongs to a request in flight");
        let mut part = self.parts.remove(place).expect("the place was just found");
        if answer.failed.is_empty() {
            self.counts.delivered_events += part.events.len() as u64;
            self.counts.delivered_bytes += part.size_bytes as u64;
            if !part.suspect {
                let doubled = self.request_events.saturating_mul(2);
                self.request_events = doubled.min(self.limits.request_events_max);
            }
        } else {
            self.take_apart(place, &mut part, answer);
        }
        self.settle(id, answer, now, random);
    }

    /// Sorts the events of a request that was not delivered as a whole; what is still open waits at
    /// its place again.
    fn take_apart(&mut self, place: usize, part: &mut Part, answer: &Answer) {
        let fates = Fates::sort(part.events.len(), answer);
        for (index, stored) in part.events.iter().enumerate() {
            match fates.of[index] {
                Fate::Delivered => {
                    self.counts.delivered_events += 1;
                    self.counts.delivered_bytes += stored.event.size_bytes() as u64;
                }
                Fate::Bad(group) => self.letters.push(DeadLetter {
                    sink: self.sink.clone(),
                    event: stored.clone(),
                    reason: answer.failed[group].reason.clone(),
                    attempts: part.attempts,
                    first_us: part.first_us,
                    last_us: part.last_us,
                }),
                Fate::Open | Fate::Suspect => {}
            }
        }
        if answer.was_taken_back() {
            // For these it was no attempt.
            part.attempts -= 1;
        }
        let open = |range: Range<usize>| -> Vec<StoredEvent> {
            range.filter(|&i| fates.is_open(i)).map(|i| part.events[i].clone()).collect()
        };
        if fates.halfway.is_some() && !part.suspect {
            self.request_events = (self.request_events.min(part.events.len()) / 2).max(1);
        }
        let suspect = part.suspect || fates.halfway.is_some();
        let halfway = fates.halfway.unwrap_or(0);
        for events in [open(halfway..part.events.len()), open(0..halfway)] {
            if !events.is_empty() {
                self.parts.insert(place, part.rest(events, suspect));
            }
        }
    }

    /// Begins, prolongs or ends the setback.
    fn settle(&mut self, id: RequestId, answer: &Answer, now: Moment, random: f64) {
        let fresh = self.setback.as_ref().is_none_or(|setback| id >= setback.first_after);
        let mut failures = answer.failed.iter().filter_map(|failed| match failed.failure {
            Failure::Retry { after } => Some((Trouble::Upstream(failed.reason.clone()), after)),
            Failure::Hold => Some((Trouble::Held(failed.reason.clone()), None)),
            Failure::Again | Failure::Suspect | Failure::Reject => None,
        });
        let Some((mut trouble, mut after)) = failures.next() else {
            // What was taken back says nothing of the upstream.
            if fresh && !answer.was_taken_back() {
                self.recover();
            }
            return;
        };
        for (other, other_after) in failures {
            if matches!(other, Trouble::Held(_)) {
                trouble = other;
            }
            after = after.max(other_after);
        }
        self.counts.retries += 1;
        let mut until = now.at + after.unwrap_or_default().min(RETRY_AFTER_MAX);
        // What was in flight beside the first failure fails with it: that is one failure, not many.
        if fresh {
            until = until.max(now.at + self.backoff.pause(random));
        }
        if matches!(trouble, Trouble::Held(_)) {
            until = until.max(now.at + self.backoff.pause_max());
        }
        match &mut self.setback {
            Some(setback) if !fresh => {
                setback.until = setback.until.max(until);
                if matches!(trouble, Trouble::Held(_)) {
                    setback.trouble = trouble;
                }
            }
            setback => {
                let first_after = self.next_id;
                *setback = Some(Setback { trouble, until, first_after });
            }
        }
    }

    /// The store failed us: everything waits. `random` as in [`Delivery::answer`].
    pub(crate) fn store_failed(&mut self, reason: String, now: Moment, random: f64) {
        self.setback = Some(Setback {
            trouble: Trouble::Store(reason),
            until: now.at + self.backoff.pause(random),
            first_after: self.next_id,
        });
    }

    fn recover(&mut self) {
        self.setback = None;
        self.backoff.reset();
    }

    /// Dead letters to make durable before anything else begins.
    pub(crate) fn letters(&self) -> &[DeadLetter] {
        &self.letters
    }

    /// The first `count` of [`Delivery::letters`] are durable.
    pub(crate) fn letters_written(&mut self, count: usize) {
        self.letters.drain(..count);
        self.counts.dead_lettered_events += count as u64;
        if matches!(self.trouble(), Some(Trouble::Store(_))) {
            self.recover();
        }
    }
}

#[cfg(test)]
mod tests;
