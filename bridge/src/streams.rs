//! The streams of one sink, and whose turn it is. Pure, as `delivery`.
//!
//! Owns: several [`Delivery`] cores over one sink, each with a cursor of its own; what each is to
//! have of the log (a range, some lanes, what the sink's filter lets through); and the sink's
//! cursor, which is the least of theirs.
//!
//! A sink begins with one stream for each group of lanes that has a priority of its own. What an
//! earlier process has done with other lanes is not done again: until all lanes of a group are as far
//! as each other, the group has a stream for each piece in which they owe the same (`pieces`).
//!
//! Where the configuration says `live_first` and the oldest event has waited for too long, the stream
//! is split at the watermark: what is before it becomes backlog, and what comes after it goes ahead. A
//! split backlog ends, and its stream with it, when its cursor has reached the split.
//!
//! A replay is a stream beside all others, with a range and a rate of its own: nothing of it counts
//! for the cursor, the balance or the dead letters.
//!
//! A sink that keeps its cursor upstream is told with each request how far all streams are then
//! ([`Streams::reach`]); what it finds there when it starts tells where an earlier process has split
//! ([`Streams::split_as`]).
//!
//! Invariants:
//! - Every event belongs to exactly one stream, from the sink's cursor on; none but the one that it
//!   belongs to passes it.
//! - Of the streams of one class the oldest goes first, alone: later events of a lane go ahead of
//!   older ones only where a split lets live events go ahead of backlog, and then the older ones are
//!   marked.
//! - Alarms begin before all else. Between live events and what can wait (backlog, the lane
//!   `backfill`) requests are shared by bytes, the latter by the share that is configured; what the
//!   one does not use, the other may. While both have events, what can wait has no more in flight
//!   than its share of the window. A replay can wait, too, with a share of its own
//!   ([`REPLAY_WEIGHT`]).
//! - After a failure in any stream nothing begins in any other until everything in flight has ended;
//!   then one request goes alone, from a stream that failed. A request that is suspected of holding
//!   poison goes alone, too. So the contract of [`Sink`](crate::sink::Sink) holds per stream.
//!
//! Deliberately absent: where streams begin and end (`splitting`), reading, writing, time (the
//! forwarder), and what makes a cursor durable.

mod pieces;
mod plan;
mod replay;
mod splitting;
mod stream;
mod turns;

use std::ops::Range;
use std::time::Instant;

use storage::{DeadLetter, Lanes, Passed, Read, SinkProgress};

use self::plan::Class;
pub(crate) use self::plan::Plan;
pub(crate) use self::replay::Again;
pub use self::replay::ReplayProgress;
use self::replay::{REPLAY_IDS, REPLAY_WEIGHT, Replay};
use self::splitting::Splitting;
use self::stream::Stream;
use self::turns::{Turns, fits};
use crate::delivery::{Counts, Delivery, Limits, Load, Moment, Trouble};
use crate::parked::{Found, Parked};
use crate::reach::Reach;
use crate::retry::Backoff;
use crate::shaper::Shaper;
use crate::sink::{Answer, Mark, Request, RequestId, Window};

/// Names a stream for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key(u32);

/// What of the log was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Everything.
    pub(crate) all_read: bool,
    /// Everything that some stream is to have so far, so that it wants to know when there is more.
    pub(crate) waits_for_more: bool,
}

/// A read of the log to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReadOrder {
    /// Whose it is.
    pub(crate) key: Key,
    /// From where.
    pub(crate) from: u64,
    /// Events at most.
    pub(crate) events_max: usize,
    /// Event bytes, about.
    pub(crate) bytes_max: usize,
}

/// A look at one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamStatus {
    /// `live`, `backlog`, `alarm`, `backfill` or `replay`.
    pub name: &'static str,
    /// Next offset that it needs.
    pub cursor: u64,
    /// Where it ends, if it does.
    pub end: Option<u64>,
}

/// The streams of one sink. See the module.
#[derive(Debug)]
pub(crate) struct Streams {
    sink: String,
    plan: Plan,
    limits: Limits,
    backoff: Backoff,
    window: Window,
    /// By lanes, and then in offset order. Never empty.
    all: Vec<Stream>,
    turns: Turns,
    shaper: Shaper,
    /// The devices that wait behind a refused event, where the plan parks them.
    parked: Option<Parked>,
    /// Its stream is the last one.
    replay: Option<Replay>,
    /// What the last one came to, until somebody has asked.
    replay_end: Option<ReplayProgress>,
    /// Events say which stream they come in.
    marked: bool,
    next_id: RequestId,
    next_replay_id: RequestId,
    /// Events were taken back: nothing begins until everything in flight has ended.
    taken_back: bool,
    /// Where an earlier process has split: to be done before anything else begins.
    found: Option<Reach>,
    next_key: u32,
    /// Whose read was ordered last.
    last_read: Option<Key>,
    /// Filtered before this process began.
    filtered_before: u64,
    /// Of streams that have ended.
    ended: Counts,
    watermark: u64,
    splitting: Splitting,
}

impl Streams {
    /// Goes on where a sink has stopped.
    pub(crate) fn new(
        sink: String,
        plan: Plan,
        limits: Limits,
        window: Window,
        backoff: Backoff,
        progress: &SinkProgress,
    ) -> Self {
        let mut streams = Self {
            sink,
            marked: plan.live_first.is_some(),
            shaper: Shaper::new(plan.shaping.clone(), progress.passed.spent),
            parked: plan.parks.then(Parked::default),
            replay: None,
            replay_end: None,
            plan,
            limits,
            backoff,
            window,
            all: Vec::new(),
            turns: Turns::default(),
            next_id: 0,
            next_replay_id: REPLAY_IDS,
            taken_back: false,
            found: None,
            next_key: 0,
            last_read: None,
            filtered_before: progress.passed.filtered,
            ended: Counts::default(),
            watermark: progress.cursor,
            splitting: Splitting::Moved,
        };
        streams.lay_out(progress, &Reach::default());
        streams
    }

    fn stream(&mut self, class: Class, lanes: Lanes, offsets: Range<u64>, cursor: u64) -> Stream {
        let key = Key(self.next_key);
        self.next_key += 1;
        let delivery = Delivery::new(self.sink.clone(), self.limits, self.backoff.clone(), cursor);
        Stream::new(key, class, lanes, offsets, delivery)
    }

    /// Next offset that the sink needs.
    pub(crate) fn cursor(&self) -> u64 {
        self.owed().iter().map(|s| s.delivery.cursor()).min().expect("never empty")
    }

    /// The streams that the cursor is made of: all but a replay.
    fn owed(&self) -> &[Stream] {
        &self.all[..self.owed_count()]
    }

    fn owed_count(&self) -> usize {
        self.all.len() - usize::from(self.replay.is_some())
    }

    /// How far the sink is, for the store.
    pub(crate) fn progress(&self) -> SinkProgress {
        let Reach { cursor, ahead } = self.reach_with(Delivery::cursor);
        let filtered = self.filtered_before + self.counts().filtered_events;
        SinkProgress { cursor, passed: Passed { filtered, ahead, spent: self.shaper.spent() } }
    }

    /// How far the sink is once everything in flight is delivered.
    pub(crate) fn reach(&self) -> Reach {
        self.reach_with(Delivery::begun_to)
    }

    /// The streams taken together, each of them as far as `reached` says.
    fn reach_with(&self, reached: impl Fn(&Delivery) -> u64) -> Reach {
        let open = |s: &Stream| (s.lanes, reached(&s.delivery)..s.offsets.end);
        let open: Vec<_> = self.owed().iter().map(open).collect();
        let cursor = open.iter().map(|(_, offsets)| offsets.start).min().expect("never empty");
        Reach { cursor, ahead: pieces::done(cursor, &open) }
    }

    /// Sums since the start of the process.
    pub(crate) fn counts(&self) -> Counts {
        let streams = self.owed().iter();
        streams.fold(self.ended, |sum, stream| sum + stream.counts())
    }

    /// What stands in the way, if something does: what somebody must act on first.
    pub(crate) fn trouble(&self) -> Option<&Trouble> {
        let mut troubles = self.all.iter().filter_map(|stream| stream.delivery.trouble());
        let first = troubles.next()?;
        if matches!(first, Trouble::Held(_)) {
            return Some(first);
        }
        Some(troubles.find(|trouble| matches!(trouble, Trouble::Held(_))).unwrap_or(first))
    }

    /// Whether any event is owed that was read.
    pub(crate) fn is_idle(&self) -> bool {
        self.all.iter().all(|stream| stream.delivery.is_idle())
    }

    /// Whether a request in flight is one of theirs.
    pub(crate) fn carries(&self, id: RequestId) -> bool {
        self.all.iter().any(|stream| stream.delivery.carries(id))
    }

    /// Number of requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.flight(|_| true).requests
    }

    /// A look at each stream, where there is more than one.
    pub(crate) fn status(&self) -> Vec<StreamStatus> {
        if self.all.len() == 1 {
            return Vec::new();
        }
        let status = |stream: &Stream| StreamStatus {
            name: match stream.class {
                Class::Alarm => "alarm",
                Class::Live => "live",
                Class::Backlog => "backlog",
                Class::Backfill => "backfill",
                Class::Replay => "replay",
            },
            cursor: stream.delivery.cursor(),
            end: (stream.offsets.end < u64::MAX).then_some(stream.offsets.end),
        };
        self.all.iter().map(status).collect()
    }

    fn flight(&self, which: impl Fn(&Stream) -> bool) -> Load {
        let streams = self.all.iter().filter(|stream| which(stream));
        streams.fold(Load::default(), |sum, stream| sum + stream.delivery.flight())
    }

    /// The log is durable up to here: splits what has waited for too long, and ends what is done.
    pub(crate) fn look(&mut self, watermark: u64, now: Moment) -> Seen {
        self.watermark = watermark;
        self.retire();
        self.split_found();
        self.split(now);
        let read = |stream: &Stream| stream.is_read(watermark);
        let goes_on = |stream: &&Stream| stream.offsets.end == u64::MAX;
        Seen {
            all_read: self.all.iter().all(read),
            waits_for_more: self.all.iter().filter(goes_on).any(read),
        }
    }

    fn retire(&mut self) {
        self.retire_replay();
        let mut ended = self.ended;
        self.all.retain(|stream| {
            let done = stream.class != Class::Replay && stream.is_done();
            if done {
                ended = ended + stream.counts();
            }
            !done
        });
        self.ended = ended;
    }

    /// Whether a stream may go on: of those of a class, the oldest first.
    fn has_turn(&self, place: usize) -> bool {
        let class = self.all[place].class;
        !self.all[..place].iter().any(|stream| stream.class == class)
    }

    /// The next read to make, if one is wanted: the streams take turns.
    pub(crate) fn next_read(&mut self, now: Moment) -> Option<ReadOrder> {
        let count = self.all.len();
        let last = self.all.iter().position(|s| Some(s.key) == self.last_read).unwrap_or(0);
        let place = (last + 1..=last + count).map(|place| place % count).find(|&place| {
            let stream = &self.all[place];
            self.has_turn(place)
                && !stream.is_read(self.watermark)
                && stream.delivery.wants_events(stream.backlog, now)
        })?;
        let stream = &self.all[place];
        self.last_read = Some(stream.key);
        let from = stream.delivery.read_to();
        let left = usize::try_from(stream.offsets.end - from).unwrap_or(usize::MAX);
        Some(ReadOrder {
            key: stream.key,
            from,
            events_max: self.limits.read_events_max().min(left),
            bytes_max: self.limits.read_bytes_max(),
        })
    }

    /// Takes what was read as [`Streams::next_read`] had it. `false` if that brought it no further.
    pub(crate) fn push(&mut self, order: ReadOrder, read: Read) -> bool {
        // One that has ended, or was passed meanwhile, has no use for it.
        let Some(stream) = self.all.iter_mut().find(|stream| stream.key == order.key) else {
            return true;
        };
        if stream.delivery.read_to() != order.from {
            return true;
        }
        if read.next <= order.from {
            return false;
        }
        let device = self.replay.as_ref().and_then(|replay| replay.device.as_deref());
        stream.take(read, &self.plan, device, self.watermark);
        self.hold_back();
        true
    }

    /// What waits of parked devices goes to the dead letters.
    fn hold_back(&mut self) {
        let owed = self.owed_count();
        let Some(parked) = &mut self.parked else { return };
        for stream in &mut self.all[..owed] {
            let known = stream.delivery.letters().len();
            stream.delivery.park(|stored| parked.behind(stored));
            stream.delivery.letters()[known..].iter().for_each(|l| parked.park(&l.event));
        }
    }

    /// The devices that wait behind a refused event, where the plan parks them.
    pub(crate) fn parked(&mut self) -> Option<&mut Parked> {
        self.parked.as_mut()
    }

    /// How many devices wait behind a refused event.
    pub(crate) fn parked_devices(&self) -> usize {
        self.parked.as_ref().map_or(0, Parked::len)
    }

    /// The dead letters were looked through. See [`Parked::looked`].
    pub(crate) fn looked(&mut self, found: &Found) {
        let unwritten = self.all.iter().flat_map(|stream| stream.delivery.letters());
        if let Some(parked) = &mut self.parked {
            parked.looked(found, unwritten);
        }
    }

    /// Whether nothing may begin because of parked devices.
    pub(crate) fn waits_for_parked(&self) -> bool {
        self.parked.as_ref().is_some_and(|parked| !parked.lets_begin())
    }

    /// The sink is no longer to have what is below `cursor`. See [`Delivery::pass`].
    pub(crate) fn pass(&mut self, cursor: u64) -> Vec<Range<u64>> {
        if cursor <= self.cursor() {
            return Vec::new();
        }
        let owed = self.owed_count();
        self.all[..owed].iter_mut().filter_map(|stream| stream.pass(cursor)).collect()
    }

    /// The next request to begin now, if one may.
    pub(crate) fn next_request(&mut self, now: Moment) -> Option<Request> {
        if self.all.iter().any(|stream| stream.waits_for_upstream(now)) {
            return None;
        }
        let flight = self.flight(|_| true);
        if self.taken_back && flight.requests > 0 {
            return None;
        }
        self.taken_back = false;
        if self.found.is_some() {
            return None;
        }
        let alone = self.all.iter().any(|stream| stream.delivery.wants_alone());
        if alone && flight.requests > 0 && self.all.len() > 1 {
            return None;
        }
        let gate = self.shaper.gate(now);
        let shares = self.all.iter().any(|stream| stream.class.can_wait());
        let late = self.flight(|stream| stream.class.can_wait());
        let late_window = self.late_window();
        let loads: Vec<_> =
            self.all.iter_mut().map(|stream| stream.delivery.next_load(now)).collect();
        let place = (0..self.all.len())
            .filter(|&place| self.has_turn(place))
            .filter_map(|place| {
                let stream = &self.all[place];
                if !gate.lets(stream.class == Class::Alarm)
                    || stream.class == Class::Replay && self.paced(now).is_some()
                {
                    return None;
                }
                let size = loads[place]?;
                let can_wait = stream.class.can_wait();
                (fits(flight, size, self.window)
                    && (!shares || !can_wait || fits(late, size, late_window)))
                .then_some(place)
            })
            .min_by(|&a, &b| {
                let rank = |place: usize| {
                    let stream = &self.all[place];
                    // Who failed shows whether the upstream is back.
                    let probe = alone && !stream.delivery.wants_alone();
                    let party = stream.class.party();
                    let start = party.map_or(f64::NEG_INFINITY, |party| self.turns.start(party));
                    (probe, start)
                };
                let ((a_probe, a_start), (b_probe, b_start)) = (rank(a), rank(b));
                a_probe.cmp(&b_probe).then(a_start.total_cmp(&b_start)).then_with(|| {
                    let waits = |place: usize| self.all[place].class.can_wait();
                    waits(a).cmp(&waits(b)).then(a.cmp(&b))
                })
            })?;
        let stream = &mut self.all[place];
        let next_id = match stream.class {
            Class::Replay => &mut self.next_replay_id,
            _ => &mut self.next_id,
        };
        stream.delivery.number_from(*next_id);
        let request = stream.delivery.next_request(now)?;
        *next_id = request.id + 1;
        let size_bytes = request.events.iter().map(|e| e.event.size_bytes()).sum();
        self.shaper.sent(size_bytes, now);
        let weight = match stream.class {
            Class::Live => 1.0 - self.plan.backlog_share,
            Class::Replay => REPLAY_WEIGHT,
            Class::Alarm | Class::Backlog | Class::Backfill => self.plan.backlog_share,
        };
        if let Some(party) = stream.class.party() {
            self.turns.took(party, size_bytes, weight);
        }
        let mark = stream.mark();
        if let (Class::Replay, Some(replay)) = (stream.class, &mut self.replay) {
            replay.pace.sent(size_bytes, now);
        }
        let marked = self.marked || mark == Mark::Replay;
        Some(Request { stream: marked.then_some(mark), ..request })
    }

    /// Whether requests outside of every stream may go now; what they take counts as any other.
    pub(crate) fn lets_others(&self, now: Moment) -> bool {
        self.shaper.gate(now).lets(false)
    }

    /// A request outside of every stream was begun.
    pub(crate) fn others_sent(&mut self, size_bytes: usize, now: Moment) {
        self.shaper.sent(size_bytes, now);
    }

    /// What may be in flight of what can wait.
    fn late_window(&self) -> Window {
        let share = |bound: usize| (bound as f64 * self.plan.backlog_share) as usize;
        Window {
            requests_max: share(self.window.requests_max),
            events_max: share(self.window.events_max),
            bytes_max: share(self.window.bytes_max),
        }
    }

    /// When the last of the pauses after a failure ends.
    pub(crate) fn troubled_until(&self) -> Option<Instant> {
        self.all.iter().filter_map(|stream| stream.delivery.resumes_at()).max()
    }

    /// When the next pause ends, if there is one.
    pub(crate) fn resumes_at(&self, now: Moment) -> Option<Instant> {
        let deliveries = || self.all.iter().map(|stream| &stream.delivery);
        let pauses = deliveries().filter_map(Delivery::resumes_at);
        let pauses = pauses.chain(deliveries().filter_map(Delivery::lingers_until));
        let closed = self.shaper.gate(now).closed().map(|closed| closed.until);
        pauses.chain(closed).chain(self.paced(now)).filter(|&at| at > now.at).min()
    }

    /// What keeps some of it from being sent, if its rate, windows or budget do.
    pub(crate) fn waits_for(&self, now: Moment) -> Option<&'static str> {
        self.shaper.gate(now).closed()?.reason
    }

    /// Takes the answer to a request in flight. See [`Delivery::answer`].
    pub(crate) fn answer(&mut self, id: RequestId, answer: &Answer, now: Moment, random: f64) {
        let stream = self
            .all
            .iter_mut()
            .find(|stream| stream.delivery.carries(id))
            .expect("an answer belongs to a request in flight");
        let known = stream.delivery.letters().len();
        stream.delivery.answer(id, answer, now, random);
        stream.settle();
        self.taken_back |= answer.was_taken_back();
        if self.splitting == Splitting::Still {
            self.splitting = Splitting::Moved;
        }
        if stream.class == Class::Replay {
            // It was delivered once, or stands in the dead letters already.
            let refused = stream.delivery.letters().len();
            stream.delivery.letters_written(refused);
        } else if let Some(parked) = &mut self.parked {
            stream.delivery.letters()[known..].iter().for_each(|l| parked.park(&l.event));
            self.hold_back();
        }
    }

    /// The store failed a stream: it waits. See [`Delivery::store_failed`].
    pub(crate) fn store_failed(&mut self, key: Key, reason: String, now: Moment, random: f64) {
        if let Some(stream) = self.all.iter_mut().find(|stream| stream.key == key) {
            stream.delivery.store_failed(reason, now, random);
        }
    }

    /// Dead letters to make durable before anything else of their stream begins, if there are any
    /// that the store may be asked to take now.
    pub(crate) fn letters(&self, now: Moment) -> Option<(Key, &[DeadLetter])> {
        let stream = self.all.iter().find(|stream| {
            let delivery = &stream.delivery;
            let failing = matches!(delivery.trouble(), Some(Trouble::Store(_)));
            let may_write = !failing || !delivery.is_paused(now);
            may_write && !delivery.letters().is_empty()
        })?;
        Some((stream.key, stream.delivery.letters()))
    }

    /// The first `count` of a stream's [`Streams::letters`] are durable.
    pub(crate) fn letters_written(&mut self, key: Key, count: usize) {
        let stream = self.all.iter_mut().find(|stream| stream.key == key);
        let stream = stream.expect("a stream with dead letters is not done");
        if let Some(parked) = &mut self.parked {
            stream.delivery.letters()[..count].iter().for_each(|l| parked.park(&l.event));
        }
        stream.delivery.letters_written(count);
        stream.settle();
    }
}

#[cfg(test)]
mod tests;
