//! Streams over an upstream that keeps their cursors beside the data, as Kafka does in a transaction:
//! what was begun is committed as a prefix, all streams at once, or not at all; whoever starts again
//! finds what was committed, whatever its own store has kept.

use std::collections::VecDeque;

use super::*;

/// Takes what is begun, and commits it now and then.
#[derive(Default)]
struct Kept {
    /// What was committed: it survives everything.
    done: Reach,
    /// Offset and stream of what was committed, in order.
    arrived: Vec<(u64, Option<Mark>)>,
    waiting: VecDeque<(Request, Reach)>,
    /// Streams as this process found them, until it was asked.
    found: Option<Reach>,
    started: bool,
}

impl Kept {
    /// The process is gone, and so is what was not committed.
    fn crash(&mut self) {
        (self.waiting, self.started) = (VecDeque::new(), false);
    }

    /// As a sink that has just connected: what was begun before it knew of the streams is taken back.
    fn start(&mut self) -> Vec<(RequestId, Answer)> {
        if std::mem::replace(&mut self.started, true) || self.done.ahead.is_empty() {
            return Vec::new();
        }
        self.found = Some(self.done.clone());
        self.fail(self.waiting.len(), Failure::Again)
    }

    fn commit(&mut self, requests: usize) -> Vec<(RequestId, Answer)> {
        let committed: Vec<_> = self.waiting.drain(..requests).collect();
        let before = self.done.clone();
        let mut answers = Vec::new();
        for (request, reach) in committed {
            let new = request.events.iter().filter(|stored| !before.has(stored));
            self.arrived.extend(new.map(|stored| (stored.offset, request.stream)));
            self.done.join(reach);
            answers.push((request.id, Answer::delivered()));
        }
        answers
    }

    /// The last so many requests are not taken.
    fn fail(&mut self, requests: usize, failure: Failure) -> Vec<(RequestId, Answer)> {
        let kept = self.waiting.len() - requests;
        let failed = self.waiting.drain(kept..);
        failed.map(|(request, _)| (request.id, Answer::failed(failure, "no"))).collect()
    }
}

#[test]
fn streams_are_split_as_they_were_found_and_nothing_changes_streams() {
    let (mut log, now) = (Log::default(), start());
    log.append(100, Lane::Live, now);
    let found = Reach { cursor: 20, ahead: vec![Ahead { lanes: Lanes::ALL, offsets: 60..75 }] };
    // The store knows of no split, and not how far the upstream is.
    let mut streams = streams(plan(), window(4), &10.into());
    log.feed(&mut streams, now);
    let early = streams.next_request(now).expect("nothing is known yet");
    streams.split_as(found);
    log.feed(&mut streams, now);
    assert!(streams.next_request(now).is_none(), "one of another stream is in flight");
    streams.answer(early.id, &Answer::failed(Failure::Again, "no"), now, 0.5);
    let progress = streams.progress();
    let sent = send(&mut streams, &log, 100, now);
    assert_eq!(progress, 10.into(), "where it goes on does not change");
    for (mark, offsets) in [(Mark::Backfill, 10..60), (Mark::Live, 60..100)] {
        let of = sent.iter().filter(|s| s.0 == Some(mark)).flat_map(|s| s.1.clone());
        assert_eq!(of.collect::<Vec<_>>(), offsets.collect::<Vec<_>>());
    }
    assert_eq!(streams.progress(), 100.into());
    assert_eq!(streams.counts().delivered_events, 90);
}

#[test]
fn what_is_done_stays_done_however_many_splits_are_found() {
    let (mut log, now) = (Log::default(), start());
    log.append(1_000, Lane::Live, now);
    let done = |offsets| Ahead { lanes: Lanes::ALL, offsets };
    // As many backlogs as are made, some done between each and the next, the first all delivered
    // upstream; and where it has split after that, the store knows nothing of.
    let before = SinkProgress {
        cursor: 10,
        passed: Passed {
            filtered: 7,
            ahead: [100..120, 200..210, 300..301, 400..450].map(done).into(),
            ..Passed::default()
        },
    };
    let ahead = [200..230, 250..260, 300..320, 400..550, 600..620, 700..720].map(done);
    let found = Reach { cursor: 150, ahead: ahead.into() };
    let mut streams = streams(plan(), window(4), &before);
    streams.split_as(found);
    streams.look(log.end, now);
    assert_eq!(streams.progress(), before);
    let ends: Vec<_> = streams.status().iter().map(|s| (s.cursor, s.end)).collect();
    let backlogs = [(10, 100), (120, 200), (210, 300), (301, 400), (450, 700)];
    let backlogs = backlogs.map(|(cursor, end)| (cursor, Some(end)));
    assert_eq!(ends, [&backlogs[..], &[(700, None)]].concat());
    let sent = send(&mut streams, &log, 1_000, now);
    let of = |mark| -> Vec<u64> {
        sent.iter().filter(|s| s.0 == Some(mark)).flat_map(|s| s.1.clone()).collect()
    };
    let owed = [10..100, 120..200, 210..300, 301..400, 450..700].into_iter().flatten();
    assert_eq!(of(Mark::Backfill), owed.collect::<Vec<_>>());
    assert_eq!(of(Mark::Live), (700..1_000).collect::<Vec<_>>());
}

/// One run of the property below.
#[derive(Clone, Copy, Debug)]
struct Run {
    seed: u64,
    requests_max: usize,
    request_events_max: usize,
    changes: bool,
    filtered: bool,
    failures: bool,
}

/// However often it dies, and however old what its store knows is: every event arrives once, and in
/// the order of its device, lane and stream; and what was filtered counts once.
fn every_event_is_committed(run: Run) -> Result<(), TestCaseError> {
    let Run { seed, requests_max, request_events_max, changes, filtered, failures } = run;
    let mut rng = fastrand::Rng::with_seed(seed);
    let unwanted =
        Filter { topics: vec![TopicFilter::parse("+/+/yes").unwrap()], ..Filter::default() };
    let filter = if filtered { unwanted } else { Filter::default() };
    let mut plan = any_plan(&mut rng, &filter);
    let window = Window { requests_max, events_max: 200, bytes_max: 1 << 20 };
    let limits = Limits::new(request_events_max, 1 << 20, window);
    let begin = |plan: &Plan, progress: &SinkProgress| {
        Streams::new("s".into(), plan.clone(), limits, window, Backoff::new(MIN, MAX), progress)
    };
    let mut log = Log::default();
    let mut upstream = Kept::default();
    let mut durable = SinkProgress::from(0);
    let mut now = start();
    let mut plans = vec![(0, plan.lanes)];
    let mut streams = begin(&plan, &durable);
    // Where it is not there, events wait for too long, and later ones go ahead.
    let mut away = false;
    let mut steps = 0;
    while steps < 400 || streams.progress().cursor < log.end {
        steps += 1;
        prop_assert!(steps < 100_000, "stuck: {:?} of {}", streams.progress(), log.end);
        let growing = steps < 400;
        let answers = match rng.u8(..12) {
            0..2 if growing => {
                for _ in 0..rng.usize(..30) {
                    let lane = Lane::ALL[rng.usize(..3)];
                    let topic = if rng.u8(..3) == 0 { "a/b/no" } else { "a/b/yes" };
                    log.put(Event {
                        received_us: now.unix_us,
                        topic: topic.into(),
                        attributes: Attributes::encode([Attribute::Lane(lane)]),
                        ..fake::event(&format!("dev-{}", rng.u8(..3)), "1")
                    });
                }
                Vec::new()
            }
            2..5 => {
                streams.look(log.end, now);
                if let Some(order) = streams.next_read(now) {
                    prop_assert!(streams.push(order, log.read(order)));
                }
                Vec::new()
            }
            5..8 => {
                while let Some(request) = streams.next_request(now) {
                    upstream.waiting.push_back((request, streams.reach()));
                }
                Vec::new()
            }
            8 if !(upstream.waiting.is_empty() || away && growing) => {
                let mut answers = upstream.start();
                if !upstream.waiting.is_empty() {
                    answers = upstream.commit(rng.usize(1..=upstream.waiting.len()));
                    let lost = failures && rng.u8(..3) == 0;
                    if lost {
                        // It is committed and nobody knows: a new session finds it.
                        let failure = Failure::Retry { after: None };
                        for (_, answer) in &mut answers {
                            *answer = Answer::failed(failure, "lost");
                        }
                        answers.extend(upstream.fail(upstream.waiting.len(), failure));
                    }
                }
                answers
            }
            9 if failures && upstream.started => {
                upstream.fail(upstream.waiting.len(), Failure::Retry { after: None })
            }
            10 if growing && rng.u8(..4) == 0 => {
                upstream.crash();
                if changes && rng.bool() {
                    plan = any_plan(&mut rng, &filter);
                    plans.push((upstream.arrived.len(), plan.lanes));
                }
                streams = begin(&plan, &durable);
                Vec::new()
            }
            _ => {
                away = rng.u8(..3) == 0 || away && rng.u8(..4) != 0;
                now = later(now, Duration::from_millis(rng.u64(..3_000)));
                Vec::new()
            }
        };
        for (id, answer) in answers {
            streams.answer(id, &answer, now, rng.f64());
            if let Some(found) = upstream.found.take() {
                streams.split_as(found);
            }
        }
        // Its own store knows only now and then, and an old state may come back.
        if rng.u8(..30) == 0 {
            durable = streams.progress();
        }
    }
    arrived_in_order(&log, &upstream.arrived, &plans)?;
    arrived_once(&filter, &log, &upstream, streams.progress().passed.filtered)
}

fn arrived_once(
    filter: &Filter,
    log: &Log,
    upstream: &Kept,
    filtered: u64,
) -> Result<(), TestCaseError> {
    let mut seen = BTreeSet::new();
    for &(offset, _) in &upstream.arrived {
        prop_assert!(seen.insert(offset), "{offset} arrived twice");
    }
    let wanted = |stored: &&StoredEvent| filter.wants(&stored.event, "T");
    let sent: BTreeSet<u64> = log.events.values().filter(wanted).map(|s| s.offset).collect();
    let unwanted = (log.events.len() - sent.len()) as u64;
    prop_assert_eq!(seen, sent);
    prop_assert_eq!(filtered, unwanted);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn every_event_is_committed_once_and_in_order(
        seed: u64,
        requests_max in 1_usize..6,
        request_events_max in 5_usize..200,
        changes: bool,
        filtered: bool,
        failures: bool,
    ) {
        every_event_is_committed(Run {
            seed,
            requests_max,
            request_events_max,
            changes,
            filtered,
            failures,
        })?;
    }
}
