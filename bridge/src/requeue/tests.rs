//! Passes over a model of the store's marks, and an upstream of luck.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::fake;
use crate::sink::Failure;

const MIN: Duration = Duration::from_millis(100);
const MAX: Duration = Duration::from_secs(5);

fn limits(request_events_max: usize) -> Limits {
    Limits::new(
        request_events_max,
        1 << 20,
        Window { requests_max: 9, events_max: 100, bytes_max: 1 << 20 },
    )
}

fn start() -> Moment {
    Moment { at: Instant::now(), unix_us: 1_000_000 }
}

fn later(now: Moment, by: Duration) -> Moment {
    Moment { at: now.at + by, unix_us: now.unix_us + by.as_micros() as u64 }
}

fn letter(offset: u64) -> KeptLetter {
    let letter = DeadLetter {
        sink: "s".into(),
        event: fake::stored(offset, "dev", "{}"),
        reason: "bad".into(),
        attempts: 3,
        first_us: 1,
        last_us: 2,
    };
    KeptLetter { letter, requeued_us: Some(7) }
}

fn offsets(request: &Request) -> Vec<u64> {
    request.events.iter().map(|event| event.offset).collect()
}

#[test]
fn a_letter_that_is_marked_during_a_look_is_looked_for_again() {
    let (mut requeue, now) =
        (Requeue::new("s".into(), limits(10), Backoff::new(MIN, MAX)), start());
    assert!(requeue.wants_letters(now), "a restart may have left some");
    requeue.looking();
    requeue.wake();
    requeue.push(Vec::new());
    assert!(requeue.wants_letters(now));
    requeue.looking();
    requeue.push(Vec::new());
    assert!(!requeue.wants_letters(now) && requeue.is_idle());
}

#[test]
fn beside_live_events_it_takes_its_time() {
    let (mut requeue, now) = (Requeue::new("s".into(), limits(2), Backoff::new(MIN, MAX)), start());
    requeue.push((0..4).map(letter).collect());
    let first = requeue.next_request(now).expect("nothing in the way");
    assert!(
        first.events.iter().all(|e| e.event.attributes.iter().any(|a| a == Attribute::Requeued))
    );
    assert_eq!((offsets(&first), first.id), (vec![0, 1], OUTSIDE_ORDER));
    assert!(requeue.next_request(now).is_none(), "one at a time");
    requeue.answer(first.id, &Answer::delivered(), true, now, 0.5);
    assert!(!requeue.is_waiting(now));
    assert_eq!(requeue.resumes_at(), Some(now.at + SHARE_PAUSE));
    let now = later(now, SHARE_PAUSE);
    assert!(requeue.is_waiting(now));
    let second = requeue.next_request(now).expect("its turn");
    requeue.answer(second.id, &Answer::delivered(), false, now, 0.5);
    assert_eq!(requeue.resumes_at(), None, "alone it does not wait");
    let settlement = requeue.settlement(now).expect("all of it");
    assert_eq!(settlement.delivered.len(), 4);
    requeue.settled(&settlement);
    assert!(requeue.is_idle() && requeue.settlement(now).is_none());
    assert_eq!(requeue.delivered_events(), 4);
}

/// A service that hangs over an event keeps its request until it times out, again and again: the
/// events of the log have the sink to themselves for most of the time all the same.
#[test]
fn an_upstream_that_hangs_over_requeued_events_leaves_most_of_the_time_to_live_ones() {
    let (mut requeue, begun) =
        (Requeue::new("s".into(), limits(2), Backoff::new(MIN, MAX)), start());
    requeue.push((0..4).map(letter).collect());
    let timeout = Duration::from_secs(30);
    let (mut now, mut hung) = (begun, Duration::ZERO);
    for _ in 0..10 {
        let request = requeue.next_request(now).expect("its turn");
        now = later(now, timeout);
        hung += timeout;
        let answer = Answer::failed(Failure::Retry { after: None }, "timed out");
        requeue.answer(request.id, &answer, true, now, 0.5);
        assert!(!requeue.is_waiting(now));
        now.at = requeue.resumes_at().expect("it waits for its turn");
    }
    assert!(hung * TIME_SHARE <= now.at - begun.at, "{hung:?} of {:?}", now.at - begun.at);
    // Nothing of it is given up, and where nobody else waits it has no share to keep.
    let request = requeue.next_request(now).expect("its turn");
    assert_eq!(offsets(&request), [0, 1]);
    now = later(now, timeout);
    requeue.answer(request.id, &Answer::delivered(), false, now, 0.5);
    assert!(requeue.is_waiting(now));
}

#[test]
fn a_store_that_fails_is_tried_again_and_nothing_is_settled_meanwhile() {
    let (mut requeue, now) = (Requeue::new("s".into(), limits(9), Backoff::new(MIN, MAX)), start());
    requeue.looking();
    requeue.store_failed("disk".into(), now, 1.0);
    assert!(!requeue.wants_letters(now) && requeue.wants_letters(later(now, MAX)));
    let now = later(now, MAX);
    requeue.push(vec![letter(5)]);
    let request = requeue.next_request(now).expect("nothing in the way");
    requeue.answer(request.id, &Answer::delivered(), false, now, 0.5);
    requeue.store_failed("disk".into(), now, 1.0);
    assert_eq!(requeue.settlement(now), None);
    let settlement = requeue.settlement(later(now, MIN)).expect("tried again");
    requeue.settled(&settlement);
    assert!(requeue.is_idle());
}

proptest! {
    /// Kills at any moment, an upstream that fails, loses answers and refuses some for good: every
    /// marked letter is delivered or refused again, none leaves before it arrived, and without a
    /// kill or a lost answer none arrives twice.
    #[test]
    fn every_marked_letter_is_delivered_or_refused_again(
        seed: u64,
        count in 1_u64..60,
        request_events_max in 1_usize..20,
        poison_percent in prop_oneof![Just(0_u8), Just(20), Just(100)],
        failures: bool,
    ) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut marks: BTreeMap<u64, KeptLetter> = BTreeMap::new();
        for n in 0..count {
            let offset = n * 3 + rng.u64(..3);
            marks.insert(offset, letter(offset));
        }
        let poison: Vec<u64> =
            marks.keys().copied().filter(|_| rng.u8(..100) < poison_percent).collect();
        let (total, mut arrived, mut refused) = (marks.len(), Vec::new(), Vec::new());
        let fresh = || Requeue::new("s".into(), limits(request_events_max), Backoff::new(MIN, MAX));
        let (mut requeue, mut now, mut flight) = (fresh(), start(), None::<Request>);
        let mut steps = 0;
        while !marks.is_empty() {
            steps += 1;
            prop_assert!(steps < 100_000, "stuck with {}", marks.len());
            if failures && rng.u8(..50) == 0 {
                (requeue, flight) = (fresh(), None);
            }
            if requeue.wants_letters(now) {
                requeue.looking();
                let max = limits(request_events_max).read_events_max();
                requeue.push(marks.values().take(max).cloned().collect());
            }
            if let Some(request) = flight.take() {
                let bad = request.events.iter().any(|event| poison.contains(&event.offset));
                let answer = match if failures { rng.u8(..10) } else { 9 } {
                    0 => Answer::failed(Failure::Retry { after: None }, "down"),
                    1 => Answer::failed(Failure::Hold, "who are you"),
                    2 if !bad => {
                        arrived.extend(offsets(&request));
                        Answer::failed(Failure::Retry { after: None }, "the answer is lost")
                    }
                    _ if bad => Answer::failed(Failure::Suspect, "still bad"),
                    _ => {
                        arrived.extend(offsets(&request));
                        Answer::delivered()
                    }
                };
                requeue.answer(request.id, &answer, rng.bool(), now, rng.f64());
            } else if rng.bool() {
                flight = requeue.next_request(now);
                prop_assert_eq!(flight.is_some(), requeue.is_in_flight());
            }
            if let Some(settlement) = requeue.settlement(now) {
                if failures && rng.u8(..5) == 0 {
                    requeue.store_failed("disk".into(), now, rng.f64());
                } else {
                    for kept in &settlement.delivered {
                        let offset = kept.letter.event.offset;
                        prop_assert!(arrived.contains(&offset), "{offset} left before it arrived");
                        prop_assert!(marks.remove(&offset).is_some());
                    }
                    for letter in &settlement.refused {
                        prop_assert_eq!(&letter.reason, "still bad");
                        prop_assert!(letter.attempts > 0);
                        refused.push(letter.event.offset);
                        prop_assert!(marks.remove(&letter.event.offset).is_some());
                    }
                    requeue.settled(&settlement);
                }
            }
            now = later(now, Duration::from_millis(rng.u64(..300)));
        }
        refused.sort_unstable();
        prop_assert_eq!(refused, poison.clone(), "those that are bad, each once");
        let before = arrived.len();
        arrived.sort_unstable();
        arrived.dedup();
        prop_assert_eq!(arrived.len() + poison.len(), total);
        prop_assert!(failures || before == arrived.len(), "no failure, no duplicate");
    }
}
