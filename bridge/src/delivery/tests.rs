//! Delivery against a model upstream that keeps the contract of `Sink`, with random outcomes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use storage::{Attributes, Event};

use super::*;
use crate::sink::{Failed, Which};

const MIN: Duration = Duration::from_millis(100);
const MAX: Duration = Duration::from_secs(10);

fn stored(offset: u64, device: u8, payload_bytes: usize) -> StoredEvent {
    StoredEvent {
        offset,
        seq: offset,
        event: Event {
            partition: 0,
            received_us: offset,
            device_key: format!("dev-{device}").into(),
            topic: "t".into(),
            attributes: Attributes::default(),
            payload: vec![0; payload_bytes].into(),
        },
        stamp: None,
    }
}

/// `count` small events from offset 0 on, three devices in turn.
fn read_of(count: u64) -> Read {
    let events = (0..count).map(|offset| stored(offset, (offset % 3) as u8, 10)).collect();
    Read { events, next: count, missing: Vec::new() }
}

fn window(requests_max: usize) -> Window {
    Window { requests_max, events_max: 1000, bytes_max: 1_000_000 }
}

fn delivery(request_events_max: usize, window: Window) -> Delivery {
    let limits = Limits::new(request_events_max, 100_000, window);
    Delivery::new("sink".into(), limits, Backoff::new(MIN, MAX), 0)
}

fn start() -> Moment {
    Moment { at: Instant::now(), unix_us: 1_000 }
}

fn later(now: Moment, by: Duration) -> Moment {
    Moment { at: now.at + by, unix_us: now.unix_us + by.as_micros() as u64 }
}

fn offsets(request: &Request) -> Vec<u64> {
    request.events.iter().map(|e| e.offset).collect()
}

fn retry() -> Answer {
    Answer::failed(Failure::Retry { after: None }, "down")
}

#[test]
fn a_rejected_request_is_bisected_until_the_poison_is_alone_and_the_rest_goes_on_in_order() {
    let now = start();
    let mut delivery = delivery(100, window(1));
    delivery.push(read_of(16));
    let mut arrived = Vec::new();
    while !delivery.is_idle() {
        let written = delivery.letters().len();
        delivery.letters_written(written);
        let Some(request) = delivery.next_request(now) else {
            continue;
        };
        let answer = if offsets(&request).contains(&6) {
            Answer::failed(Failure::Suspect, "bad request")
        } else {
            arrived.extend(offsets(&request));
            Answer::delivered()
        };
        let alone = offsets(&request) == [6];
        delivery.answer(request.id, &answer, now, 0.5);
        if alone {
            assert_eq!(delivery.cursor(), 6, "not past a dead letter that is not durable");
            let letter = &delivery.letters()[0];
            assert_eq!((letter.event.offset, letter.attempts), (6, 5));
            assert_eq!(letter.reason, "bad request");
        }
    }
    assert_eq!(arrived, [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    assert_eq!(delivery.cursor(), 16);
    assert_eq!(delivery.counts().dead_lettered_events, 1);
    assert_eq!(delivery.counts().delivered_events, 15);
    assert_eq!(delivery.counts().retries, 0);
}

/// One event in a hundred is bad, and the upstream refuses requests as a whole: halving requests of
/// a thousand would send each event six times.
#[test]
fn where_refusals_are_frequent_requests_get_smaller_and_grow_again_after_them() {
    let now = start();
    let mut delivery = delivery(1_000, window(1));
    let (mut requests, mut sent, mut largest, mut letters) = (0, 0, 0, 0);
    while delivery.cursor() < 40_000 {
        if delivery.wants_events(true, now) && delivery.read_to() < 40_000 {
            let from = delivery.read_to();
            let events = (from..from + 1_000).map(|offset| stored(offset, 0, 10)).collect();
            delivery.push(Read { events, next: from + 1_000, missing: Vec::new() });
        }
        let request = delivery.next_request(now).expect("nothing in the way");
        let offsets = offsets(&request);
        requests += 1;
        sent += offsets.len();
        let bad = offsets.iter().any(|offset| *offset < 30_000 && offset.is_multiple_of(100));
        if offsets[0] >= 38_000 {
            largest = largest.max(offsets.len());
        }
        let answer = Answer::failed(Failure::Suspect, "bad");
        let answer = if bad { answer } else { Answer::delivered() };
        delivery.answer(request.id, &answer, now, 0.5);
        letters += delivery.letters().len();
        delivery.letters_written(delivery.letters().len());
    }
    println!("{requests} requests, {sent} events were sent for 40,000");
    assert_eq!(letters, 300);
    assert!(requests < 16 * letters, "{requests} requests");
    assert!(sent < 3 * 40_000, "{sent} events were sent for 40,000");
    assert_eq!(largest, 1_000, "clean again, they are as large as they may be");
}

/// What is refused costs the rest no wait for the disk; but where a sink keeps a cursor, or too much
/// has come together, letters go first.
#[test]
fn requests_go_on_while_a_few_dead_letters_are_written() {
    let now = start();
    let reject = |count: usize| {
        let which = Which::These((0..count).collect());
        let failed = vec![Failed { which, failure: Failure::Reject, reason: "bad".into() }];
        Answer { failed }
    };
    for (count, letters_first, goes_on) in [(3, false, true), (10, false, false), (1, true, false)]
    {
        let limits = Limits::new(10, 100_000, window(1)).letters_first(letters_first);
        let mut delivery = Delivery::new("s".into(), limits, Backoff::new(MIN, MAX), 0);
        delivery.push(read_of(20));
        let request = delivery.next_request(now).expect("nothing in the way");
        delivery.answer(request.id, &reject(count), now, 0.5);
        assert_eq!(delivery.cursor(), 0, "not past a letter that is not durable");
        assert_eq!(delivery.next_load(now).is_some(), goes_on, "{count} {letters_first}");
        delivery.letters_written(count);
        assert_eq!(delivery.cursor(), 10);
        assert!(delivery.next_request(now).is_some());
    }
}

#[test]
fn a_small_request_waits_for_more_events_but_not_for_long() {
    const LINGER: Duration = Duration::from_millis(50);
    let mut now = start();
    let limits = Limits::new(10, 100_000, window(2)).lingering(LINGER);
    let mut delivery = Delivery::new("s".into(), limits, Backoff::new(MIN, MAX), 0);
    let read = |from: u64, to: u64| {
        let events = (from..to).map(|offset| stored(offset, 0, 10)).collect();
        Read { events, next: to, missing: Vec::new() }
    };
    delivery.push(read(0, 3));
    assert!(delivery.next_request(now).is_none());
    assert_eq!(delivery.lingers_until(), Some(now.at + LINGER));
    now = later(now, LINGER / 2);
    assert!(delivery.wants_events(false, now), "it waits for more");
    delivery.push(read(3, 5));
    assert!(delivery.next_request(now).is_none());
    assert_eq!(delivery.lingers_until(), Some(now.at + LINGER / 2), "from its first event on");
    now = later(now, LINGER / 2);
    let small = delivery.next_request(now).expect("it has waited");
    assert_eq!((offsets(&small), delivery.lingers_until()), ((0..5).collect(), None));
    // What fills a request does not wait, the rest does.
    delivery.push(read(5, 18));
    let full = delivery.next_request(now).expect("it is full");
    assert_eq!(offsets(&full), (5..15).collect::<Vec<_>>());
    delivery.answer(small.id, &Answer::delivered(), now, 0.5);
    assert!(delivery.next_request(now).is_none());
    // One that is tried again waits for nothing but its pause.
    delivery.answer(full.id, &retry(), now, 0.5);
    now = later(now, MAX);
    assert_eq!(offsets(&delivery.next_request(now).expect("again")), (5..15).collect::<Vec<_>>());
}

#[test]
fn a_window_is_filled_and_the_cursor_follows_the_contiguous_prefix() {
    let now = start();
    let mut delivery = delivery(10, window(3));
    delivery.push(read_of(50));
    let requests: Vec<_> = std::iter::from_fn(|| delivery.next_request(now)).collect();
    assert_eq!(requests.len(), 3);
    delivery.answer(requests[1].id, &Answer::delivered(), now, 0.5);
    assert_eq!(delivery.cursor(), 0);
    delivery.answer(requests[0].id, &Answer::delivered(), now, 0.5);
    assert_eq!(delivery.cursor(), 20);
}

#[test]
fn after_a_failure_the_oldest_goes_first_and_alone() {
    let now = start();
    let mut delivery = delivery(10, window(4));
    delivery.push(read_of(50));
    let requests: Vec<_> = std::iter::from_fn(|| delivery.next_request(now)).collect();
    delivery.answer(requests[0].id, &retry(), now, 0.5);
    let now = later(now, MAX);
    assert!(delivery.next_request(now).is_none(), "three are still in flight");
    for request in &requests[1..] {
        delivery.answer(request.id, &retry(), now, 0.5);
    }
    let now = later(now, MAX);
    let probe = delivery.next_request(now).expect("the pause is over");
    assert_eq!(offsets(&probe), (0..10).collect::<Vec<_>>());
    assert!(delivery.next_request(now).is_none(), "one until one has come through");
    delivery.answer(probe.id, &Answer::delivered(), now, 0.5);
    assert_eq!(delivery.trouble(), None);
    assert_eq!(std::iter::from_fn(|| delivery.next_request(now)).count(), 4);
}

#[test]
fn a_whole_window_that_fails_is_one_failure_to_the_backoff() {
    let now = start();
    let mut delivery = delivery(10, window(4));
    delivery.push(read_of(40));
    let requests: Vec<_> = std::iter::from_fn(|| delivery.next_request(now)).collect();
    for request in &requests {
        delivery.answer(request.id, &retry(), now, 1.0);
    }
    assert_eq!(delivery.resumes_at(), Some(now.at + MIN));
    assert_eq!(delivery.counts().retries, 4);
}

#[test]
fn the_upstream_may_ask_for_a_longer_pause_but_not_for_days() {
    let now = start();
    let mut delivery = delivery(10, window(1));
    delivery.push(read_of(1));
    for (asked, pause) in [(5, 5), (86_400, RETRY_AFTER_MAX.as_secs())] {
        let now = later(now, Duration::from_secs(asked));
        let request = delivery.next_request(now).expect("the pause is over");
        let after = Some(Duration::from_secs(asked));
        let answer = Answer::failed(Failure::Retry { after }, "429");
        delivery.answer(request.id, &answer, now, 0.0);
        assert_eq!(delivery.resumes_at(), Some(now.at + Duration::from_secs(pause)));
    }
}

#[test]
fn a_hold_drops_nothing_and_tries_again_slowly() {
    let now = start();
    let mut delivery = delivery(10, window(1));
    delivery.push(read_of(5));
    let request = delivery.next_request(now).expect("nothing in the way");
    delivery.answer(request.id, &Answer::failed(Failure::Hold, "401"), now, 0.0);
    assert_eq!(delivery.trouble(), Some(&Trouble::Held("401".into())));
    assert_eq!(delivery.resumes_at(), Some(now.at + MAX));
    assert_eq!((delivery.cursor(), delivery.letters().len()), (0, 0));
}

#[test]
fn requests_respect_both_limits_and_a_larger_event_goes_alone() {
    let now = start();
    let mut delivery =
        Delivery::new("sink".into(), Limits::new(3, 100, window(9)), Backoff::new(MIN, MAX), 0);
    let sizes = [10, 10, 10, 10, 500, 40, 60, 10];
    let events = sizes.iter().zip(0..).map(|(&size, offset)| stored(offset, 0, size)).collect();
    delivery.push(Read { events, next: 8, missing: Vec::new() });
    let requests: Vec<_> =
        std::iter::from_fn(|| delivery.next_request(now)).map(|r| offsets(&r)).collect();
    assert_eq!(requests, [vec![0, 1, 2], vec![3], vec![4], vec![5], vec![6, 7]]);
}

#[test]
fn without_a_backlog_only_what_can_begin_is_read() {
    let now = start();
    let mut delivery = delivery(10, window(1));
    assert!(delivery.wants_events(false, now));
    delivery.push(Read { next: 3, ..read_of(3) });
    assert!(!delivery.wants_events(false, now));
    let _request = delivery.next_request(now);
    assert!(!delivery.wants_events(false, now), "the window is full");
    assert!(delivery.wants_events(true, now), "but a backlog is read ahead of it");
}

#[test]
fn a_failing_store_stops_reading_until_it_works_again() {
    let now = start();
    let mut delivery = delivery(10, window(1));
    delivery.store_failed("read error".into(), now, 1.0);
    assert!(!delivery.wants_events(true, now));
    let now = later(now, MIN);
    assert!(delivery.wants_events(true, now));
    delivery.push(read_of(1));
    assert_eq!(delivery.trouble(), None);
}

/// A request in flight, and what the model upstream says about it once it has decided.
struct Sent {
    request: Request,
    answer: Option<Answer>,
    /// An older one in flight beside it was not taken, so it will not be either.
    doomed: bool,
}

/// An upstream that keeps the contract: it takes requests in order, and after one that it did not
/// take as a whole, nothing of what was in flight beside it.
#[derive(Default)]
struct Upstream {
    flight: Vec<Sent>,
    /// Offsets in order of arrival.
    arrived: Vec<u64>,
    poison: BTreeSet<u64>,
    /// It names bad events instead of refusing the request.
    names_events: bool,
    failures: bool,
}

impl Upstream {
    fn begin(&mut self, request: Request) {
        let doomed = self.flight.iter().any(|sent| sent.answer.as_ref().is_some_and(breaks));
        self.flight.push(Sent { request, answer: None, doomed });
    }

    /// Answers one of the requests in flight.
    fn answer_one(&mut self, rng: &mut fastrand::Rng) -> (RequestId, Answer) {
        let place = rng.usize(..self.flight.len());
        for at in 0..=place {
            if self.flight[at].answer.is_some() {
                continue;
            }
            let answer = if self.flight[at].doomed {
                retry()
            } else {
                let request = self.flight[at].request.clone();
                self.take(&request, rng)
            };
            if breaks(&answer) {
                self.flight[at + 1..].iter_mut().for_each(|sent| sent.doomed = true);
            }
            self.flight[at].answer = Some(answer);
        }
        let sent = self.flight.remove(place);
        (sent.request.id, sent.answer.expect("just decided"))
    }

    fn take(&mut self, request: &Request, rng: &mut fastrand::Rng) -> Answer {
        let offsets = offsets(request);
        let down = |which| Failed {
            which,
            failure: Failure::Retry { after: None },
            reason: "down".into(),
        };
        let bad: Vec<usize> =
            (0..offsets.len()).filter(|&i| self.poison.contains(&offsets[i])).collect();
        let luck = if self.failures { rng.u8(..100) } else { 100 };
        match luck {
            0..10 => retry(),
            10..15 => Answer::failed(Failure::Hold, "who are you"),
            // Taken, but the answer is lost.
            15..20 if bad.is_empty() => {
                self.arrived.extend(&offsets);
                retry()
            }
            // Part of it was taken.
            20..30 if bad.is_empty() && offsets.len() > 1 => {
                let taken = rng.usize(1..offsets.len());
                self.arrived.extend(&offsets[..taken]);
                Answer { failed: vec![down(Which::These((taken..offsets.len()).collect()))] }
            }
            _ if bad.is_empty() => {
                self.arrived.extend(&offsets);
                Answer::delivered()
            }
            _ if self.names_events => {
                self.arrived.extend(offsets.iter().filter(|o| !self.poison.contains(o)));
                let (which, failure) = (Which::These(bad), Failure::Reject);
                Answer { failed: vec![Failed { which, failure, reason: "bad".into() }] }
            }
            // What comes before the refused batch was taken.
            30..60 => {
                self.arrived.extend(&offsets[..bad[0]]);
                let which = Which::These((bad[0]..offsets.len()).collect());
                Answer {
                    failed: vec![Failed { which, failure: Failure::Suspect, reason: "bad".into() }],
                }
            }
            _ => Answer::failed(Failure::Suspect, "bad"),
        }
    }
}

/// Whether some of the request was neither taken nor refused for good.
fn breaks(answer: &Answer) -> bool {
    answer.failed.iter().any(|failed| failed.failure != Failure::Reject)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_event_is_delivered_or_dead_lettered_in_the_order_of_its_device(
        seed: u64,
        events in 1_u64..300,
        devices in 1_u8..6,
        request_events_max in 1_usize..40,
        requests_max in 1_usize..6,
        poison_percent in prop_oneof![Just(0), Just(3), Just(30), Just(100)],
        names_events: bool,
        failures: bool,
    ) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut log: BTreeMap<u64, StoredEvent> = BTreeMap::new();
        let mut end = 0;
        for _ in 0..events {
            // Now and then a range is missing.
            end += if rng.u8(..20) == 0 { rng.u64(2..9) } else { 1 };
            log.insert(end, stored(end, rng.u8(..devices), rng.usize(..200)));
        }
        end += 1;
        let mut upstream = Upstream { names_events, failures, ..Upstream::default() };
        upstream.poison = log.keys().copied().filter(|_| rng.u8(..100) < poison_percent).collect();

        let window = Window { requests_max, events_max: 60, bytes_max: 4_000 };
        let limits = Limits::new(request_events_max, 2_000, window);
        let mut delivery = Delivery::new("s".into(), limits, Backoff::new(MIN, MAX), 0);
        let mut now = start();
        let mut letters: Vec<DeadLetter> = Vec::new();
        let mut cursor = 0;
        let mut steps = 0;
        while delivery.cursor() < end {
            steps += 1;
            prop_assert!(steps < 200_000, "stuck at {}", delivery.cursor());
            match rng.u8(..10) {
                0..3 => {
                    let from = delivery.read_to();
                    if from < end && delivery.wants_events(rng.bool(), now) {
                        let read: Vec<_> = log.range(from..).map(|(_, e)| e.clone())
                            .take(rng.usize(1..=limits.read_events_max())).collect();
                        let next = read.last().map_or(end, |e| e.offset + 1);
                        delivery.push(Read { events: read, next, missing: Vec::new() });
                    }
                }
                3..6 => while let Some(request) = delivery.next_request(now) {
                    let size: usize = request.events.iter().map(|e| e.event.size_bytes()).sum();
                    prop_assert!(request.events.len() <= request_events_max);
                    prop_assert!(size <= 2_000 || request.events.len() == 1);
                    prop_assert!(request.events.is_sorted_by(|a, b| a.offset < b.offset));
                    let newest = upstream.flight.iter().flat_map(|s| offsets(&s.request)).max();
                    prop_assert!(newest < Some(request.events[0].offset), "begun out of order");
                    upstream.begin(request);
                    let judged = delivery.parts.iter().any(|p| p.suspect && p.in_flight.is_some());
                    prop_assert!(!judged || upstream.flight.len() == 1, "a suspect goes alone");
                    let flight = || upstream.flight.iter().flat_map(|s| s.request.events.iter());
                    prop_assert!(upstream.flight.len() <= requests_max);
                    prop_assert!(flight().count() <= 60);
                    let size: usize = flight().map(|e| e.event.size_bytes()).sum();
                    prop_assert!(size <= 4_000 || upstream.flight.len() == 1);
                },
                6..8 if !upstream.flight.is_empty() => {
                    let (id, answer) = upstream.answer_one(&mut rng);
                    delivery.answer(id, &answer, now, rng.f64());
                }
                8 if !delivery.letters().is_empty() => if rng.u8(..4) == 0 {
                    delivery.store_failed("disk".into(), now, rng.f64());
                } else {
                    let count = rng.usize(1..=delivery.letters().len());
                    letters.extend_from_slice(&delivery.letters()[..count]);
                    delivery.letters_written(count);
                },
                _ => now = later(now, Duration::from_millis(rng.u64(..3_000))),
            }

            // Two requests' worth ahead, and the window.
            let held: usize = delivery.parts.iter().map(|part| part.events.len()).sum();
            prop_assert!(held <= 60 + 2 * request_events_max);
            prop_assert!(delivery.cursor() >= cursor, "a cursor never goes back");
            let passed = cursor..delivery.cursor();
            cursor = passed.end;
            for offset in log.range(passed).map(|(&offset, _)| offset) {
                prop_assert!(
                    if upstream.poison.contains(&offset) {
                        letters.iter().any(|letter| letter.event.offset == offset)
                    } else {
                        upstream.arrived.contains(&offset)
                    },
                    "the cursor passed {offset}, which is unresolved"
                );
            }
        }

        prop_assert!(delivery.is_idle());
        let dead: Vec<u64> = letters.iter().map(|letter| letter.event.offset).collect();
        prop_assert_eq!(dead.iter().copied().collect::<BTreeSet<_>>(), upstream.poison.clone());
        prop_assert_eq!(dead.len(), upstream.poison.len(), "each dead letter once");
        for letter in &letters {
            prop_assert!(letter.attempts > 0 && letter.first_us <= letter.last_us);
            prop_assert_eq!(&letter.reason, "bad");
        }
        let counts = delivery.counts();
        prop_assert_eq!(counts.dead_lettered_events, dead.len() as u64);
        prop_assert_eq!(counts.delivered_events, events - dead.len() as u64);

        let mut last = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for offset in &upstream.arrived {
            if seen.insert(offset) {
                let before = last.insert(&log[offset].event.device_key, offset);
                prop_assert!(before < Some(offset), "{offset} arrived after {before:?}");
            }
        }
        if !failures {
            prop_assert_eq!(seen.len(), upstream.arrived.len(), "no failure, no duplicate");
        }
    }
}
