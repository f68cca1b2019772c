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
//! - There are at most [`BACKLOGS_MAX`] backlogs: an outage beyond that is not split any more until
//!   one of them has drained. Only what an earlier process has split comes on top, up to
//!   [`BACKLOGS_FOUND_MAX`].
//!
//! Deliberately absent: reading, writing, time (the forwarder), and what makes a cursor durable.

mod pieces;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use storage::{DeadLetter, Lane, Lanes, Passed, Read, SinkProgress, Spent, StoredEvent};

use self::pieces::Piece;
use crate::delivery::{Counts, Delivery, Limits, Load, Moment, Trouble};
use crate::filter::Filter;
use crate::parked::{Found, Parked};
use crate::reach::Reach;
use crate::retry::Backoff;
use crate::shaper::{Shaper, Shaping};
use crate::sink::{Answer, Mark, OUTSIDE_ORDER, Request, RequestId, Window};

/// Backlogs that may be owed at once.
const BACKLOGS_MAX: usize = 4;
/// The same where an earlier process has split: one more with each start whose store knows less than
/// the upstream. What was found beyond that splits nothing.
const BACKLOGS_FOUND_MAX: usize = 2 * BACKLOGS_MAX;
/// What a replay gets of the requests, by bytes, beside the weights of live events and of what can
/// wait, which are 1 together.
const REPLAY_WEIGHT: f64 = 0.1;
/// First request of a replay: it stands outside the order, apart from requeued dead letters.
const REPLAY_IDS: RequestId = OUTSIDE_ORDER | 1 << 62;

/// What a sink is to have, and in which order.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// What it is to have.
    pub(crate) filter: Filter,
    /// CloudEvents type of events whose route names none.
    pub(crate) event_type: String,
    /// Lanes besides `live` that get a stream of their own.
    pub(crate) lanes: Lanes,
    /// Later events go ahead of one that has waited for so long.
    pub(crate) live_first: Option<Duration>,
    /// Share of the requests, by bytes, that what can wait gets beside live events: 0.0 to 1.0,
    /// both excluded.
    pub(crate) backlog_share: f64,
    /// When it may send, and how much.
    pub(crate) shaping: Shaping,
    /// An event that is refused for good parks its device.
    pub(crate) parks: bool,
}

impl Plan {
    /// Lanes that share a stream, in order of priority.
    fn groups(&self) -> Vec<(Class, Lanes)> {
        let alone = |lane| Lanes::NONE.with(lane);
        let mut groups = Vec::new();
        if self.lanes.contains(Lane::Alarm) {
            groups.push((Class::Alarm, alone(Lane::Alarm)));
        }
        let own = groups.iter().fold(Lanes::ALL, |rest, (_, lanes)| rest.without(*lanes));
        if self.lanes.contains(Lane::Backfill) {
            groups.push((Class::Live, own.without(alone(Lane::Backfill))));
            groups.push((Class::Backfill, alone(Lane::Backfill)));
        } else {
            groups.push((Class::Live, own));
        }
        groups
    }
}

/// Why a stream has its priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// The lane `alarm`.
    Alarm,
    /// From some offset on.
    Live,
    /// Up to where another stream begins.
    Backlog,
    /// The lane `backfill`.
    Backfill,
    /// Again.
    Replay,
}

impl Class {
    fn can_wait(self) -> bool {
        matches!(self, Self::Backlog | Self::Backfill | Self::Replay)
    }
}

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
struct Replay {
    key: Key,
    device: Option<String>,
    pace: Shaper,
    cancelled: bool,
}

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

#[derive(Debug)]
struct Stream {
    key: Key,
    class: Class,
    lanes: Lanes,
    /// What it is to have: to `u64::MAX` if it has no end.
    offsets: Range<u64>,
    delivery: Delivery,
    /// Read and not wanted, in offset order, from its cursor on.
    unwanted: VecDeque<Range<u64>>,
    /// Not wanted, and passed by its cursor.
    filtered: u64,
    /// Later events of its lanes go ahead of it, or have.
    is_late: bool,
    /// The last read left something behind.
    backlog: bool,
}

impl Stream {
    /// Whether everything that it is to have of a log up to `watermark` has been read.
    fn is_read(&self, watermark: u64) -> bool {
        self.delivery.read_to() >= watermark.min(self.offsets.end)
    }

    fn mark(&self) -> Mark {
        match self.class {
            Class::Replay => Mark::Replay,
            _ if self.is_late => Mark::Backfill,
            _ => Mark::Live,
        }
    }

    fn is_done(&self) -> bool {
        self.delivery.cursor() >= self.offsets.end && self.delivery.is_idle()
    }

    fn take(&mut self, read: Read, plan: &Plan, device: Option<&str>, watermark: u64) {
        let end = self.offsets.end;
        let mut events = read.events;
        let kept = events.partition_point(|stored| stored.offset < end);
        events.truncate(kept);
        if self.class == Class::Replay {
            events.retain(|stored| {
                device.is_none_or(|key| stored.event.device_key == key)
                    && plan.filter.wants(&stored.event, &plan.event_type)
            });
        } else if self.lanes != Lanes::ALL || !plan.filter.is_open() {
            events.retain(|stored| self.keeps(stored, plan));
        }
        let next = read.next.min(end);
        self.backlog = next < watermark.min(end);
        self.delivery.push(Read { events, next, missing: Vec::new() });
        self.settle();
    }

    /// Whether an event is to be sent by this stream; what is its own and not wanted is noted.
    fn keeps(&mut self, stored: &StoredEvent, plan: &Plan) -> bool {
        let lane = stored.event.attributes.lane();
        if !self.lanes.contains(lane) {
            return false;
        }
        if plan.filter.wants(&stored.event, &plan.event_type) {
            return true;
        }
        match self.unwanted.back_mut() {
            Some(last) if last.end == stored.offset => last.end += 1,
            _ => self.unwanted.push_back(stored.offset..stored.offset + 1),
        }
        false
    }

    /// Counts what its cursor has passed of the unwanted.
    fn settle(&mut self) {
        let cursor = self.delivery.cursor();
        self.unwanted_below(cursor, |filtered, passed| *filtered += passed);
    }

    fn unwanted_below(&mut self, cursor: u64, count: impl Fn(&mut u64, u64)) {
        while let Some(first) = self.unwanted.front_mut() {
            let end = first.end.min(cursor);
            if end <= first.start {
                break;
            }
            count(&mut self.filtered, end - first.start);
            first.start = end;
            if first.is_empty() {
                self.unwanted.pop_front();
            }
        }
    }

    /// See [`Delivery::pass`]: what a policy has dropped counts as dropped, also what was unwanted.
    fn pass(&mut self, cursor: u64) -> Option<Range<u64>> {
        let passed = self.delivery.pass(cursor);
        self.unwanted_below(cursor, |_, _| {});
        self.settle();
        passed
    }
}

/// Between whom requests are shared by bytes.
#[derive(Clone, Copy)]
enum Party {
    Live,
    CanWait,
    Replay,
}

impl Class {
    /// Alarms are nobody's party: they go first.
    fn party(self) -> Option<Party> {
        match self {
            Self::Alarm => None,
            Self::Live => Some(Party::Live),
            Self::Backlog | Self::Backfill => Some(Party::CanWait),
            Self::Replay => Some(Party::Replay),
        }
    }
}

/// Start-time fair queueing: who has had less for its weight begins next.
#[derive(Debug, Default)]
struct Turns {
    now: f64,
    /// When the last request of each party ends, on that clock.
    ends: [f64; 3],
}

impl Turns {
    fn start(&self, party: Party) -> f64 {
        self.now.max(self.ends[party as usize])
    }

    fn took(&mut self, party: Party, size_bytes: usize, weight: f64) {
        self.now = self.start(party);
        self.ends[party as usize] = self.now + size_bytes as f64 / weight;
    }
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

/// What has happened since streams were split last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Splitting {
    /// The process began: what is stored by then is backlog, where later events may go ahead.
    Restarted,
    /// Something was answered.
    Moved,
    /// Nothing: splitting off another backlog would gain nothing.
    Still,
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

    /// Makes the streams anew, from where a sink has stopped; `found` may split them further.
    fn lay_out(&mut self, progress: &SinkProgress, found: &Reach) {
        let SinkProgress { cursor, passed } = progress;
        for (class, lanes) in self.plan.groups() {
            let mut pieces = pieces::owed(lanes, *cursor, passed, None);
            // Backlogs go one after the other, however they are split: of what was found only the
            // last split matters, with which events go ahead of all of them.
            if pieces.len() <= BACKLOGS_FOUND_MAX {
                pieces = pieces::owed(lanes, *cursor, passed, found.splits(lanes).max());
            }
            let mut start = *cursor;
            for Piece { lanes, offsets, is_late } in pieces {
                self.marked |= is_late;
                let class = if is_late && class == Class::Live { Class::Backlog } else { class };
                // What lies between it and the piece before is its own, and done.
                let stream = self.stream(class, lanes, start..offsets.end, offsets.start);
                start = offsets.end;
                self.all.push(Stream { is_late, ..stream });
            }
        }
    }

    /// An earlier process has split where `found` says: so do these, before anything else begins, for
    /// an event must not change streams. Where they go on does not change: the sink knows what not to
    /// send again.
    pub(crate) fn split_as(&mut self, found: Reach) {
        self.found = Some(found);
    }

    /// Splits as was found, once nothing is in flight or has to be written down.
    fn split_found(&mut self) {
        let is_quiet = |stream: &Stream| {
            stream.delivery.in_flight() == 0 && stream.delivery.letters().is_empty()
        };
        if let Some(found) = self.found.take_if(|_| self.all.iter().all(is_quiet)) {
            let (progress, counts) = (self.progress(), self.counts());
            let replay = self.all.split_off(self.owed_count());
            self.all.clear();
            self.ended = counts;
            self.lay_out(&progress, &found);
            self.all.extend(replay);
        }
    }

    /// The same after a start of the process: where later events may go ahead, what is stored by then is
    /// late at once, whatever its lane. A split that was not durable yet when the process was killed may
    /// have let them go ahead before, and what is behind them must not come as live events after them.
    pub(crate) fn restarted(self) -> Self {
        Self { splitting: Splitting::Restarted, ..self }
    }

    fn stream(&mut self, class: Class, lanes: Lanes, offsets: Range<u64>, cursor: u64) -> Stream {
        let key = Key(self.next_key);
        self.next_key += 1;
        Stream {
            key,
            class,
            lanes,
            offsets,
            delivery: Delivery::new(self.sink.clone(), self.limits, self.backoff.clone(), cursor),
            unwanted: VecDeque::new(),
            filtered: 0,
            is_late: false,
            backlog: false,
        }
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
        if let Some(replay) = &self.replay {
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

    /// What is stored for streams that are never split is late. See [`Streams::restarted`]: their lanes
    /// may have shared a stream with live events until then.
    fn cut_late(&mut self, class: Class) {
        let watermark = self.watermark;
        let of_class = |stream: &Stream| stream.class == class;
        let Some(place) = self.all.iter().rposition(of_class) else { return };
        if self.all[place].is_read(watermark) {
            return;
        }
        self.all.iter_mut().filter(|s| of_class(s)).for_each(|stream| stream.is_late = true);
        self.all[place].offsets.end = watermark;
        let lanes = self.all[place].lanes;
        let next = self.stream(class, lanes, watermark..u64::MAX, watermark);
        self.all.insert(place + 1, next);
    }

    /// Lets later events go ahead.
    fn split(&mut self, now: Moment) {
        let Some(after) = self.plan.live_first else { return };
        let watermark = self.watermark;
        let restarted = self.splitting == Splitting::Restarted;
        if restarted {
            self.splitting = Splitting::Moved;
            self.cut_late(Class::Alarm);
            self.cut_late(Class::Backfill);
        }
        let mut places = (0..self.all.len()).filter(|&place| self.all[place].class == Class::Live);
        let first = places.next().expect("one never ends");
        // The last one has no end; those before it are what its lanes owe apart from each other.
        let place = places.next_back().unwrap_or(first);
        let live = &self.all[place];
        let waited = self.all[first].delivery.oldest_us().map(|us| now.unix_us.saturating_sub(us));
        let too_long = waited.is_some_and(|us| u128::from(us) > after.as_micros()) || restarted;
        if !too_long || live.is_read(watermark) || self.trouble().is_some() {
            return;
        }
        let lanes = live.lanes;
        let untouched = first == place
            && live.delivery.cursor() == live.offsets.start
            && live.delivery.in_flight() == 0
            && live.delivery.letters().is_empty();
        let start = live.offsets.start;
        let before = place.checked_sub(1).map(|place| &mut self.all[place]);
        let joins =
            |s: &&mut Stream| (s.class, s.lanes, s.offsets.end) == (Class::Backlog, lanes, start);
        let place = match before.filter(joins) {
            // Nothing has gone ahead yet: it all waits together.
            Some(before) if untouched => {
                before.offsets.end = watermark;
                let ended = self.all.remove(place);
                self.ended = self.ended + ended.counts();
                place
            }
            _ => {
                let backlogs = self.all.iter().filter(|s| s.class == Class::Backlog).count();
                if backlogs >= BACKLOGS_MAX || backlogs > 0 && self.splitting == Splitting::Still {
                    return;
                }
                for live in &mut self.all[first..=place] {
                    (live.class, live.is_late) = (Class::Backlog, true);
                }
                self.all[place].offsets.end = watermark;
                place + 1
            }
        };
        self.splitting = Splitting::Still;
        let live = self.stream(Class::Live, lanes, watermark..u64::MAX, watermark);
        self.all.insert(place, live);
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
    fn paced(&self, now: Moment) -> Option<Instant> {
        Some(self.replay.as_ref()?.pace.gate(now).closed()?.until)
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

impl Stream {
    fn counts(&self) -> Counts {
        Counts { filtered_events: self.filtered, ..self.delivery.counts() }
    }

    /// Whether an upstream that failed it is to be left alone: it is the same for all streams.
    fn waits_for_upstream(&self, now: Moment) -> bool {
        self.delivery.is_paused(now) && !matches!(self.delivery.trouble(), Some(Trouble::Store(_)))
    }
}

/// Whether a request fits beside what is in flight: the first always does.
fn fits(flight: Load, request: Load, window: Window) -> bool {
    let sum = flight + request;
    flight.requests == 0
        || sum.requests <= window.requests_max
            && sum.events <= window.events_max
            && sum.size_bytes <= window.bytes_max
}

#[cfg(test)]
mod tests;
