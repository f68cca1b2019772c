//! Streams against a log that grows, an upstream that fails, and restarts.

mod kept_upstream;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use storage::{Ahead, Attribute, Attributes, Event, Lane, StoredEvent};

use super::splitting::BACKLOGS_MAX;
use super::*;
use crate::fake;
use crate::filter::{Filter, TopicFilter};
use crate::shaper::Shaping;
use crate::sink::{Failed, Failure, Which};

const MIN: Duration = Duration::from_millis(100);
const MAX: Duration = Duration::from_secs(2);
const AFTER: Duration = Duration::from_secs(5);

fn start() -> Moment {
    Moment { at: Instant::now(), unix_us: 1_700_000_000_000_000 }
}

fn later(now: Moment, by: Duration) -> Moment {
    Moment { at: now.at + by, unix_us: now.unix_us + by.as_micros() as u64 }
}

fn plan() -> Plan {
    Plan {
        filter: Filter::default(),
        event_type: "T".into(),
        lanes: Lanes::NONE,
        live_first: Some(AFTER),
        backlog_share: 0.5,
        shaping: Shaping::default(),
        parks: false,
    }
}

fn window(requests_max: usize) -> Window {
    Window { requests_max, events_max: 1_000, bytes_max: 1 << 20 }
}

fn streams(plan: Plan, window: Window, progress: &SinkProgress) -> Streams {
    let limits = Limits::new(10, 1 << 20, window);
    Streams::new("sink".into(), plan, limits, window, Backoff::new(MIN, MAX), progress)
}

/// A log in memory.
#[derive(Default)]
struct Log {
    events: BTreeMap<u64, StoredEvent>,
    end: u64,
}

impl Log {
    fn append(&mut self, count: u64, lane: Lane, now: Moment) {
        for _ in 0..count {
            let device = format!("dev-{}", self.end % 3);
            let attributes = Attributes::encode([Attribute::Lane(lane)]);
            let event = Event { received_us: now.unix_us, attributes, ..fake::event(&device, "1") };
            self.put(event);
        }
    }

    fn put(&mut self, event: Event) {
        let stored = StoredEvent { offset: self.end, seq: self.end, event, stamp: None };
        self.events.insert(self.end, stored);
        self.end += 1;
    }

    fn read(&self, order: ReadOrder) -> Read {
        let events: Vec<_> = self
            .events
            .range(order.from..)
            .take(order.events_max)
            .map(|(_, e)| e.clone())
            .collect();
        let next = events.last().map_or(self.end, |last| last.offset + 1);
        Read { events, next, missing: Vec::new() }
    }

    /// Reads until nothing more is wanted.
    fn feed(&self, streams: &mut Streams, now: Moment) {
        streams.look(self.end, now);
        while let Some(order) = streams.next_read(now) {
            assert!(streams.push(order, self.read(order)));
        }
    }
}

fn offsets(request: &Request) -> Vec<u64> {
    request.events.iter().map(|e| e.offset).collect()
}

/// Sends one request after the other, `count` of them at most.
fn send(
    streams: &mut Streams,
    log: &Log,
    count: usize,
    now: Moment,
) -> Vec<(Option<Mark>, Vec<u64>)> {
    let mut sent = Vec::new();
    while sent.len() < count {
        log.feed(streams, now);
        let Some(request) = streams.next_request(now) else { break };
        sent.push((request.stream, offsets(&request)));
        streams.answer(request.id, &Answer::delivered(), now, 0.5);
    }
    log.feed(streams, now);
    sent
}

#[test]
fn after_an_outage_live_events_share_with_the_backlog_until_it_has_drained() {
    let (mut log, mut now) = (Log::default(), start());
    let mut streams = streams(plan(), window(1), &0.into());
    log.append(500, Lane::Live, now);
    log.feed(&mut streams, now);
    assert!(streams.status().is_empty(), "nothing has waited yet");
    now = later(now, AFTER + MIN);
    log.append(100, Lane::Live, now);
    log.feed(&mut streams, now);
    // What was there at the split is backlog; what comes now goes first.
    let names = |streams: &Streams| -> Vec<_> { streams.status().iter().map(|s| s.name).collect() };
    assert_eq!(names(&streams), ["backlog", "live"]);
    log.append(100, Lane::Live, now);
    let sent = send(&mut streams, &log, 10, now);
    let live: Vec<u64> = sent
        .iter()
        .filter(|(mark, _)| *mark == Some(Mark::Live))
        .flat_map(|s| s.1.clone())
        .collect();
    assert_eq!(live, (600..650).collect::<Vec<_>>(), "half of the requests, in order");
    assert_eq!(sent[0].0, Some(Mark::Live), "and first");
    assert_eq!(streams.cursor(), 50);
    let ahead = streams.progress().passed.ahead;
    assert_eq!(ahead, [Ahead { lanes: Lanes::ALL, offsets: 600..650 }]);
    let sent = send(&mut streams, &log, 1_000, now);
    let late: Vec<u64> = sent
        .iter()
        .filter(|(mark, _)| *mark == Some(Mark::Backfill))
        .flat_map(|s| s.1.clone())
        .collect();
    assert_eq!(late, (50..600).collect::<Vec<_>>());
    assert_eq!((streams.progress(), streams.status()), (700.into(), vec![]), "one stream again");
    assert_eq!(streams.counts().delivered_events, 700);
}

#[test]
fn a_restart_goes_on_with_both_streams() {
    let (mut log, mut now) = (Log::default(), start());
    let mut before = streams(plan(), window(1), &0.into());
    log.append(100, Lane::Live, now);
    log.feed(&mut before, now);
    now = later(now, AFTER + MIN);
    log.append(1, Lane::Live, now);
    log.feed(&mut before, now);
    log.append(60, Lane::Live, now);
    send(&mut before, &log, 6, now);
    let progress = before.progress();
    assert_eq!(progress.cursor, 30);
    let mut after = streams(plan(), window(1), &progress);
    let sent = send(&mut after, &log, 1_000, now);
    let of = |mark| -> Vec<u64> {
        sent.iter().filter(|s| s.0 == Some(mark)).flat_map(|s| s.1.clone()).collect()
    };
    assert_eq!(of(Mark::Backfill), (30..101).collect::<Vec<_>>());
    assert_eq!(of(Mark::Live), (131..161).collect::<Vec<_>>());
}

#[test]
fn an_outage_in_which_nothing_goes_ahead_makes_one_backlog() {
    let (mut log, mut now) = (Log::default(), start());
    let mut streams = streams(plan(), window(1), &0.into());
    for _ in 0..20 {
        log.append(50, Lane::Live, now);
        log.feed(&mut streams, now);
        now = later(now, AFTER + MIN);
        log.feed(&mut streams, now);
    }
    let ends: Vec<_> = streams.status().iter().map(|s| (s.cursor, s.end)).collect();
    assert_eq!(ends, [(0, Some(1_000)), (1_000, None)]);
}

#[test]
fn there_are_at_most_so_many_backlogs() {
    let (mut log, mut now) = (Log::default(), start());
    let mut streams = streams(plan(), window(1), &0.into());
    for _ in 0..20 {
        log.append(300, Lane::Live, now);
        send(&mut streams, &log, 2, now);
        now = later(now, AFTER + MIN);
    }
    assert_eq!(streams.status().len(), BACKLOGS_MAX + 1);
    let sent = send(&mut streams, &log, 10_000, now);
    let late = sent.iter().filter(|s| s.0 == Some(Mark::Backfill)).flat_map(|s| s.1.clone());
    assert!(late.collect::<Vec<_>>().is_sorted(), "the oldest backlog first");
    assert_eq!(streams.progress(), log.end.into());
}

#[test]
fn alarms_go_before_live_events_and_those_before_backfill() {
    let (mut log, now) = (Log::default(), start());
    let lanes = Lanes::NONE.with(Lane::Alarm).with(Lane::Backfill);
    let plan = Plan { lanes, live_first: None, ..plan() };
    let mut streams = streams(plan, window(1), &0.into());
    log.append(20, Lane::Backfill, now);
    log.append(20, Lane::Live, now);
    log.append(20, Lane::Alarm, now);
    let sent: Vec<u64> = send(&mut streams, &log, 3, now).into_iter().flat_map(|s| s.1).collect();
    assert_eq!(sent, (40..60).chain(20..30).collect::<Vec<_>>());
    let progress = streams.progress();
    let alarm = Ahead { lanes: Lanes::NONE.with(Lane::Alarm), offsets: 0..60 };
    let live = Ahead { lanes: Lanes::NONE.with(Lane::Live), offsets: 0..30 };
    assert_eq!((progress.cursor, progress.passed.ahead), (0, vec![alarm, live]));
    send(&mut streams, &log, 10, now);
    assert_eq!(streams.progress(), 60.into());
}

#[test]
fn while_live_events_wait_a_backlog_has_its_share_of_the_window_at_most() {
    let (mut log, mut now) = (Log::default(), start());
    let plan = Plan { backlog_share: 0.25, ..plan() };
    let mut streams = streams(plan, window(8), &0.into());
    log.append(500, Lane::Live, now);
    log.feed(&mut streams, now);
    now = later(now, AFTER + MIN);
    log.append(500, Lane::Live, now);
    log.feed(&mut streams, now);
    let begin = |streams: &mut Streams, log: &Log| {
        let mut marks = Vec::new();
        loop {
            log.feed(streams, now);
            let Some(request) = streams.next_request(now) else { return marks };
            marks.push(request.stream);
        }
    };
    assert_eq!(begin(&mut streams, &log), [Some(Mark::Backfill); 2], "room is left for others");
    log.append(500, Lane::Live, now);
    assert_eq!(begin(&mut streams, &log), [Some(Mark::Live); 6]);
}

#[test]
fn a_failure_of_one_stream_is_the_upstreams_and_stops_all() {
    let (mut log, mut now) = (Log::default(), start());
    let lanes = Lanes::NONE.with(Lane::Alarm);
    let plan = Plan { lanes, live_first: None, ..plan() };
    let mut streams = streams(plan, window(8), &0.into());
    log.append(20, Lane::Live, now);
    log.append(20, Lane::Alarm, now);
    let all: Vec<_> = std::iter::from_fn(|| {
        log.feed(&mut streams, now);
        streams.next_request(now)
    })
    .collect();
    assert_eq!(all.len(), 4);
    let place = all.iter().position(|r| offsets(r)[0] == 0).expect("the first live request");
    let (live, rest) = (&all[place], all.iter().filter(|r| offsets(r)[0] != 0));
    streams.answer(live.id, &Answer::failed(Failure::Retry { after: None }, "down"), now, 1.0);
    now = later(now, MAX);
    assert!(streams.next_request(now).is_none(), "three are in flight");
    for request in rest {
        streams.answer(request.id, &Answer::delivered(), now, 1.0);
    }
    log.append(20, Lane::Alarm, now);
    log.feed(&mut streams, now);
    let probe = streams.next_request(now).expect("the pause is over");
    assert_eq!(offsets(&probe)[0], 0, "who failed shows whether the upstream is back");
    assert!(streams.next_request(now).is_none(), "alone");
    streams.answer(probe.id, &Answer::delivered(), now, 1.0);
    assert_eq!(streams.next_request(now).map(|r| offsets(&r)[0]), Some(40));
}

/// Lanes that were configured between two runs, while a split's backlog had not drained.
#[test]
fn what_was_held_up_comes_late_and_in_order_in_lanes_that_are_new() {
    let (mut log, mut now) = (Log::default(), start());
    let mut before = streams(plan(), window(1), &0.into());
    log.append(40, Lane::Alarm, now);
    log.append(40, Lane::Live, now);
    log.feed(&mut before, now);
    now = later(now, AFTER + MIN);
    log.append(20, Lane::Live, now);
    log.feed(&mut before, now);
    log.append(20, Lane::Alarm, now);
    send(&mut before, &log, 3, now);
    let progress = before.progress();
    let ahead = Ahead { lanes: Lanes::ALL, offsets: 100..120 };
    assert_eq!((progress.cursor, &progress.passed.ahead[..]), (10, &[ahead][..]));
    log.append(20, Lane::Alarm, now);
    let lanes = Lanes::NONE.with(Lane::Alarm);
    let mut after = streams(Plan { lanes, live_first: None, ..plan() }, window(8), &progress);
    let mut begun = Vec::new();
    log.feed(&mut after, now);
    while let Some(request) = after.next_request(now) {
        begun.push((request.stream, offsets(&request)));
        log.feed(&mut after, now);
    }
    let alarms: Vec<_> = begun.iter().filter(|(_, o)| o[0] < 40 || o[0] >= 100).collect();
    assert_eq!(
        alarms.iter().flat_map(|a| a.1.clone()).collect::<Vec<_>>(),
        (10..40).collect::<Vec<_>>()
    );
    assert!(alarms.iter().all(|(mark, _)| *mark == Some(Mark::Backfill)), "late ones say so");
}

/// Lanes that are no longer told apart: what the one had got ahead of the other is done.
#[test]
fn nothing_is_sent_again_when_lanes_are_put_together() {
    let (mut log, now) = (Log::default(), start());
    let lanes = Lanes::NONE.with(Lane::Alarm);
    let in_order = Plan { live_first: None, ..plan() };
    let mut before = streams(Plan { lanes, ..in_order.clone() }, window(1), &0.into());
    log.append(20, Lane::Live, now);
    log.append(20, Lane::Alarm, now);
    log.append(20, Lane::Live, now);
    send(&mut before, &log, 2, now);
    let mut after = streams(in_order, window(1), &before.progress());
    assert_eq!(after.progress(), before.progress());
    let sent: Vec<u64> = send(&mut after, &log, 10, now).into_iter().flat_map(|s| s.1).collect();
    assert_eq!(sent, (0..20).chain(40..60).collect::<Vec<_>>());
    assert_eq!((after.progress(), after.status()), (60.into(), vec![]), "one stream again");
}

/// What was sent in the moments before a kill is not known to the store: nor, then, what went ahead.
#[test]
fn what_is_stored_at_a_restart_is_late_in_every_lane_where_later_events_may_go_ahead() {
    let (mut log, now) = (Log::default(), start());
    log.append(20, Lane::Alarm, now);
    let lanes = Lanes::NONE.with(Lane::Alarm);
    let mut streams = streams(Plan { lanes, ..plan() }, window(1), &0.into()).restarted();
    log.feed(&mut streams, now);
    log.append(10, Lane::Alarm, now);
    let sent = send(&mut streams, &log, 10, now);
    let expected = [(Mark::Backfill, 0..10), (Mark::Backfill, 10..20), (Mark::Live, 20..30)];
    assert_eq!(sent, expected.map(|(mark, offsets)| (Some(mark), offsets.collect::<Vec<_>>())));
}

/// Outside of its windows a sink keeps everything but alarms, and wakes when they open.
#[test]
fn what_shapes_a_sink_stops_all_but_alarms() {
    let (mut log, now) = (Log::default(), start());
    // It is 22:13 UTC.
    let windows = vec![crate::shaper::DayWindow::parse("22:14-22:15").unwrap()];
    let plan = Plan {
        lanes: Lanes::NONE.with(Lane::Alarm),
        shaping: Shaping { windows, budget_bytes_month: 1 << 20, ..Shaping::default() },
        ..plan()
    };
    let mut streams = streams(plan, window(1), &0.into());
    log.append(20, Lane::Live, now);
    log.append(10, Lane::Alarm, now);
    let sent: Vec<u64> = send(&mut streams, &log, 10, now).into_iter().flat_map(|s| s.1).collect();
    assert_eq!(sent, (20..30).collect::<Vec<_>>());
    assert!(streams.waits_for(now).is_some());
    let spent = streams.progress().passed.spent.size_bytes;
    assert!(spent > 0, "alarms are paid for, too");
    let opens = streams.resumes_at(now).expect("it waits for a time");
    let now = later(now, opens - now.at);
    assert_eq!((send(&mut streams, &log, 10, now).len(), streams.waits_for(now)), (2, None));
    assert!(streams.progress().passed.spent.size_bytes > spent);
}

#[test]
fn a_replay_runs_beside_the_others_and_counts_for_nothing_but_itself() {
    let (mut log, now) = (Log::default(), start());
    let mut streams = streams(Plan { live_first: None, ..plan() }, window(1), &0.into());
    log.append(90, Lane::Live, now);
    send(&mut streams, &log, 100, now);
    let before = (streams.progress(), streams.counts());
    let device = Some("dev-1".to_owned());
    streams.replay(Again { offsets: 30..75, device, rate_bytes_per_second: 0 });
    let sent = send(&mut streams, &log, 1, now);
    log.append(30, Lane::Live, now);
    let mixed = send(&mut streams, &log, 100, now);
    assert_eq!(mixed.iter().filter(|s| s.0.is_none()).flat_map(|s| s.1.clone()).count(), 30);
    let replayed = sent.iter().chain(&mixed).filter(|s| s.0 == Some(Mark::Replay));
    let replayed: Vec<u64> = replayed.flat_map(|s| s.1.clone()).collect();
    assert_eq!(replayed, (30..75).filter(|n| n % 3 == 1).collect::<Vec<_>>());
    assert_eq!(streams.replay_progress(), None, "it has ended");
    let end = streams.take_replay_end().expect("nobody has asked yet");
    assert_eq!((end.delivered_events, end.ended), (15, true));
    assert_eq!(streams.progress().cursor, before.0.cursor + 30);
    assert_eq!(streams.counts().delivered_events, before.1.delivered_events + 30);
}

#[test]
fn a_replay_keeps_its_rate_survives_failures_and_can_be_cancelled() {
    let (mut log, mut now) = (Log::default(), start());
    let mut streams = streams(Plan { live_first: None, ..plan() }, window(1), &0.into());
    log.append(100, Lane::Live, now);
    send(&mut streams, &log, 100, now);
    let again = Again { offsets: 0..100, device: None, rate_bytes_per_second: 100 };
    streams.replay(again);
    log.feed(&mut streams, now);
    let request = streams.next_request(now).expect("the first goes at once");
    streams.answer(request.id, &Answer::failed(Failure::Retry { after: None }, "down"), now, 1.0);
    assert_eq!(streams.replay_progress().unwrap().error.as_deref(), Some("down"));
    assert!(streams.next_request(later(now, MIN)).is_none(), "what failed is paid for, too");
    now = later(now, Duration::from_mins(1));
    let request = streams.next_request(now).expect("again");
    assert_eq!(offsets(&request)[0], 0);
    streams.answer(request.id, &Answer::failed(Failure::Suspect, "bad"), now, 1.0);
    now = later(now, Duration::from_mins(1));
    let request = streams.next_request(now).expect("the half of it");
    assert_eq!(offsets(&request), [0, 1, 2, 3, 4]);
    streams.cancel_replay();
    log.feed(&mut streams, now);
    assert!(streams.next_request(now).is_none());
    assert!(!streams.replay_progress().unwrap().ended, "one is in flight");
    streams.answer(request.id, &Answer::delivered(), now, 1.0);
    assert!(streams.replay_progress().is_none_or(|progress| progress.ended));
    log.feed(&mut streams, now);
    assert_eq!((streams.replay_progress(), streams.progress()), (None, 100.into()));
}

/// What the upstream refuses of a replay is counted, and in no dead letters.
#[test]
fn a_replay_writes_no_dead_letters() {
    let (mut log, now) = (Log::default(), start());
    let mut streams = streams(Plan { live_first: None, ..plan() }, window(1), &0.into());
    log.append(5, Lane::Live, now);
    send(&mut streams, &log, 100, now);
    streams.replay(Again { offsets: 4..5, device: None, rate_bytes_per_second: 0 });
    log.feed(&mut streams, now);
    let request = streams.next_request(now).expect("the one");
    streams.answer(request.id, &Answer::failed(Failure::Suspect, "bad"), now, 1.0);
    assert!(streams.letters(now).is_none());
    let progress = streams.replay_progress().expect("not looked at yet");
    assert_eq!((progress.refused_events, progress.ended), (1, true));
    assert_eq!(streams.counts().dead_lettered_events, 0);
}

#[test]
fn what_a_policy_drops_is_passed_in_every_stream_and_not_called_filtered() {
    let (mut log, now) = (Log::default(), start());
    let filter =
        Filter { topics: vec![TopicFilter::parse("nothing").unwrap()], ..Filter::default() };
    let lanes = Lanes::NONE.with(Lane::Alarm);
    let mut streams = streams(Plan { filter, lanes, ..plan() }, window(1), &0.into());
    log.append(30, Lane::Live, now);
    assert_eq!(streams.pass(12), [0..12, 0..12]);
    assert_eq!(streams.pass(12), []);
    log.feed(&mut streams, now);
    let progress = streams.progress();
    assert_eq!((progress.cursor, progress.passed.filtered), (30, 18));
}

/// Takes requests in the order in which they were begun; after one that it did not take as a whole,
/// nothing of what was in flight beside it.
#[derive(Default)]
struct Upstream {
    flight: Vec<(Request, Option<Answer>, bool)>,
    /// Offset and stream, in order of arrival.
    arrived: Vec<(u64, Option<Mark>)>,
    seen: BTreeSet<u64>,
    poison: BTreeSet<u64>,
    failures: bool,
}

impl Upstream {
    fn begin(&mut self, request: Request) {
        let doomed = self.flight.iter().any(|(_, answer, _)| answer.as_ref().is_some_and(breaks));
        self.flight.push((request, None, doomed));
    }

    fn answer_one(&mut self, rng: &mut fastrand::Rng) -> (RequestId, Answer) {
        let place = rng.usize(..self.flight.len());
        for at in 0..=place {
            if self.flight[at].1.is_some() {
                continue;
            }
            let (request, doomed) = (self.flight[at].0.clone(), self.flight[at].2);
            let answer = if doomed { down(Which::All) } else { self.take(&request, rng) };
            if breaks(&answer) {
                self.flight[at + 1..].iter_mut().for_each(|sent| sent.2 = true);
            }
            self.flight[at].1 = Some(answer);
        }
        let (request, answer, _) = self.flight.remove(place);
        (request.id, answer.expect("just decided"))
    }

    fn take(&mut self, request: &Request, rng: &mut fastrand::Rng) -> Answer {
        let offsets = offsets(request);
        let arrives = |offsets: &[u64]| -> Vec<_> {
            offsets.iter().map(|&offset| (offset, request.stream)).collect()
        };
        let luck = if self.failures { rng.u8(..100) } else { 100 };
        if offsets.iter().any(|offset| self.poison.contains(offset)) {
            return Answer::failed(Failure::Suspect, "bad");
        }
        let taken = match luck {
            0..8 => 0,
            8..12 => return Answer::failed(Failure::Hold, "who are you"),
            12..20 => rng.usize(..=offsets.len()),
            _ => offsets.len(),
        };
        self.arrived.extend(arrives(&offsets[..taken]));
        self.seen.extend(&offsets[..taken]);
        match luck {
            // Taken, perhaps all of it, but the answer is lost.
            12..16 => down(Which::All),
            _ if taken == offsets.len() => Answer::delivered(),
            _ => down(Which::These((taken..offsets.len()).collect())),
        }
    }
}

fn down(which: Which) -> Answer {
    let failure = Failure::Retry { after: None };
    Answer { failed: vec![Failed { which, failure, reason: "down".into() }] }
}

fn breaks(answer: &Answer) -> bool {
    answer.failed.iter().any(|failed| failed.failure != Failure::Reject)
}

/// Whether a progress says that an event is done.
fn is_done(progress: &SinkProgress, stored: &StoredEvent) -> bool {
    let lane = stored.event.attributes.lane();
    let covers = |a: &Ahead| a.lanes.contains(lane) && a.offsets.contains(&stored.offset);
    stored.offset < progress.cursor || progress.passed.ahead.iter().any(covers)
}

/// Plans that differ in what has a stream of its own, and whether later events may go ahead.
fn any_plan(rng: &mut fastrand::Rng, filter: &Filter) -> Plan {
    let own = |lanes: Lanes, lane| if rng.bool() { lanes.with(lane) } else { lanes };
    let lanes = [Lane::Alarm, Lane::Backfill].into_iter().fold(Lanes::NONE, own);
    let live_first = rng.bool().then_some(AFTER);
    Plan { filter: filter.clone(), lanes, live_first, ..plan() }
}

/// What arrived first is in order per device, lane and stream; and, while the same plan holds, also
/// across lanes that share a stream. `plans`: from which arrival on which lanes had their own.
fn arrived_in_order(
    log: &Log,
    arrived: &[(u64, Option<Mark>)],
    plans: &[(usize, Lanes)],
) -> Result<(), TestCaseError> {
    let mut seen = BTreeSet::new();
    let (mut by_lane, mut by_stream) = (BTreeMap::new(), BTreeMap::new());
    for (index, &(offset, mark)) in arrived.iter().enumerate() {
        if !seen.insert(offset) {
            continue;
        }
        let event = &log.events[&offset].event;
        let (device, lane) = (event.device_key.clone(), event.attributes.lane());
        let plan = plans.partition_point(|&(from, _)| from <= index);
        let own = plans[plan - 1].1.contains(lane);
        let mark = mark.map(Mark::name);
        let before = by_lane.insert((device.clone(), lane, mark), offset);
        prop_assert!(before < Some(offset), "{offset} arrived after {before:?} of its lane");
        let shared = if own { lane } else { Lane::Live };
        let before = by_stream.insert((device, shared, mark, plan), offset);
        prop_assert!(before < Some(offset), "{offset} arrived after {before:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Whatever fails, whenever it is restarted and with whatever lanes: what is called done is delivered, a dead letter
    /// or unwanted; the count of the unwanted is right; and order holds per device, lane and stream.
    #[test]
    fn nothing_is_lost_and_every_stream_is_in_order(
        seed: u64,
        requests_max in 1_usize..6,
        request_events_max in 1_usize..20,
        filtered: bool,
        poison_percent in prop_oneof![Just(0), Just(5)],
        failures: bool,
        restarts: bool,
        changes: bool,
    ) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let unwanted = Filter { topics: vec![TopicFilter::parse("+/+/yes").unwrap()], ..Filter::default() };
        let filter = if filtered { unwanted } else { Filter::default() };
        let mut plan = any_plan(&mut rng, &filter);
        let window = Window { requests_max, events_max: 50, bytes_max: 1 << 20 };
        let limits = Limits::new(request_events_max, 1 << 20, window);
        let begin = |plan: &Plan, progress: &SinkProgress| {
            Streams::new("s".into(), plan.clone(), limits, window, Backoff::new(MIN, MAX), progress)
        };
        let wants = |stored: &StoredEvent| filter.wants(&stored.event, "T");

        let mut log = Log::default();
        let mut upstream = Upstream { failures, ..Upstream::default() };
        let (mut durable, mut checked) = (SinkProgress::from(0), SinkProgress::from(0));
        let mut plans = vec![(0, plan.lanes)];
        let mut streams = begin(&plan, &durable);
        let mut now = start();
        let mut letters = BTreeSet::new();
        let mut reading: Option<ReadOrder> = None;
        let mut steps = 0;
        loop {
            steps += 1;
            prop_assert!(steps < 100_000, "stuck: {:?} of {}", streams.progress(), log.end);
            let growing = steps < 160;
            if !growing && streams.progress() == (SinkProgress {
                cursor: log.end,
                passed: Passed { filtered: streams.progress().passed.filtered, ..Passed::default() },
            }) {
                break;
            }
            match rng.u8(..12) {
                0..2 if growing => for _ in 0..rng.usize(..30) {
                    let lane = Lane::ALL[rng.usize(..3)];
                    let topic = if rng.u8(..3) == 0 { "a/b/no" } else { "a/b/yes" };
                    // Now and then a range is missing.
                    log.end += if rng.u8(..20) == 0 { rng.u64(1..9) } else { 0 };
                    if rng.u8(..100) < poison_percent {
                        upstream.poison.insert(log.end);
                    }
                    log.put(Event {
                        received_us: now.unix_us,
                        topic: topic.into(),
                        attributes: Attributes::encode([Attribute::Lane(lane)]),
                        ..fake::event(&format!("dev-{}", rng.u8(..3)), "1")
                    });
                },
                2..4 => match reading.take() {
                    None => {
                        streams.look(log.end, now);
                        reading = streams.next_read(now);
                    }
                    Some(order) => {
                        let mut read = log.read(order);
                        read.events.truncate(rng.usize(1..=order.events_max));
                        read.next = read.events.last().map_or(log.end, |last| last.offset + 1);
                        prop_assert!(streams.push(order, read));
                    }
                },
                4..7 => while let Some(request) = streams.next_request(now) {
                    prop_assert!(request.events.iter().all(&wants));
                    upstream.begin(request);
                    let flight = || upstream.flight.iter().flat_map(|sent| sent.0.events.iter());
                    prop_assert!(upstream.flight.len() <= requests_max && flight().count() <= 50);
                    prop_assert_eq!(streams.in_flight(), upstream.flight.len());
                },
                7..9 if !upstream.flight.is_empty() => {
                    let (id, answer) = upstream.answer_one(&mut rng);
                    streams.answer(id, &answer, now, rng.f64());
                }
                9 => if let Some((key, owed)) = streams.letters(now) {
                    if rng.u8(..4) == 0 {
                        streams.store_failed(key, "disk".into(), now, rng.f64());
                    } else {
                        let count = rng.usize(1..=owed.len());
                        letters.extend(owed[..count].iter().map(|letter| letter.event.offset));
                        streams.letters_written(key, count);
                    }
                },
                10 if restarts && growing && rng.u8(..8) == 0 => {
                    // A kill: requests in flight may or may not have arrived.
                    while !upstream.flight.is_empty() && rng.bool() {
                        upstream.answer_one(&mut rng);
                    }
                    upstream.flight.clear();
                    reading = None;
                    streams = begin(&plan, &durable).restarted();
                }
                11 if changes && growing && rng.u8(..8) == 0 => {
                    // It is stopped, and started with other lanes.
                    while !upstream.flight.is_empty() {
                        let (id, answer) = upstream.answer_one(&mut rng);
                        streams.answer(id, &answer, now, rng.f64());
                    }
                    durable = streams.progress();
                    reading = None;
                    plan = any_plan(&mut rng, &filter);
                    plans.push((upstream.arrived.len(), plan.lanes));
                    streams = begin(&plan, &durable).restarted();
                }
                _ => now = later(now, Duration::from_millis(rng.u64(..3_000))),
            }
            let progress = streams.progress();
            if progress == checked {
                continue;
            }
            checked = progress.clone();
            prop_assert!(progress.cursor >= durable.cursor, "a cursor never goes back");
            for stored in log.events.values() {
                let offset = stored.offset;
                let resolved = || !wants(stored)
                    || letters.contains(&offset)
                    || upstream.seen.contains(&offset);
                prop_assert!(!is_done(&progress, stored) || is_done(&durable, stored) || resolved(),
                    "{offset} is called done in {progress:?}");
                prop_assert!(!is_done(&durable, stored) || is_done(&progress, stored),
                    "{offset} was done in {durable:?} and is not in {progress:?}");
            }
            let unwanted = log.events.values().filter(|e| !wants(e) && is_done(&progress, e)).count();
            prop_assert_eq!(progress.passed.filtered, unwanted as u64, "{:?}", progress);
            // The committer carries it now and then.
            if rng.u8(..4) == 0 {
                durable = progress;
            }
        }
        arrived_in_order(&log, &upstream.arrived, &plans)?;
        let seen: BTreeSet<u64> = upstream.arrived.iter().map(|&(offset, _)| offset).collect();
        let sent = log.events.values().filter(|stored| wants(stored)).map(|stored| stored.offset);
        let (dead, sent): (BTreeSet<u64>, _) = sent.partition(|offset| upstream.poison.contains(offset));
        prop_assert_eq!(seen, sent);
        prop_assert_eq!(letters, dead);
        if !failures && !restarts && !changes {
            prop_assert_eq!(upstream.seen.len(), upstream.arrived.len(), "no failure, no duplicate");
        }
    }
}
