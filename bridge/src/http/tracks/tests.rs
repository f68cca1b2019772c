use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::fake;

const FOUND_MAX: usize = 64;
const RETRY: Failure = Failure::Retry { after: None };

fn stored(offset: u64, partition: u16, device: &str) -> StoredEvent {
    let mut stored = fake::stored(offset, device, "x");
    stored.event.partition = partition;
    stored
}

/// Events of these partitions, each of a device of its own, in one request.
fn request(id: RequestId, first: u64, partitions: &[u16]) -> Request {
    let event = |(offset, &partition)| stored(offset, partition, &format!("dev-{offset}"));
    let events = (first..).zip(partitions).map(event).collect();
    Request { id, stream: None, events: Arc::new(events) }
}

fn tracks(posts_max: usize, events_max: usize) -> Tracks {
    Tracks::new(posts_max, PieceLimits { events_max, bytes_max: 1 << 20 }, FOUND_MAX)
}

fn offsets(piece: &Piece) -> Vec<u64> {
    piece.events().map(|stored| stored.offset).collect()
}

/// The next piece, and its offsets.
fn next(tracks: &mut Tracks) -> Option<(PieceId, Vec<u64>)> {
    tracks.next_piece().map(|(id, piece)| (id, offsets(&piece)))
}

fn refused() -> Answer {
    Answer::failed(Failure::Suspect, "bad")
}

#[test]
fn what_arrives_while_a_post_is_in_flight_goes_together() {
    let mut tracks = tracks(1, 10);
    tracks.begin(request(0, 0, &[0]));
    let (id, first) = next(&mut tracks).expect("one");
    assert_eq!(first, [0]);
    (1..4).for_each(|n| tracks.begin(request(n, n, &[0])));
    assert_eq!(next(&mut tracks), None, "one POST at a time");
    tracks.posted(id, &Answer::delivered());
    assert_eq!(tracks.take_answer(), Some((0, Answer::delivered())));
    let (id, piece) = next(&mut tracks).expect("the rest");
    assert_eq!(piece, [1, 2, 3]);
    tracks.posted(id, &Answer::delivered());
    let answered: Vec<_> = std::iter::from_fn(|| tracks.take_answer()).collect();
    assert_eq!(answered.len(), 3);
}

#[test]
fn streams_are_not_mixed() {
    let mut tracks = tracks(1, 10);
    for (id, stream) in [(0, Mark::Live), (1, Mark::Backfill), (2, Mark::Live)] {
        tracks.begin(Request { stream: Some(stream), ..request(id, id, &[id as u16]) });
    }
    let mut pieces = Vec::new();
    while let Some((id, piece)) = tracks.next_piece() {
        pieces.push((piece.stream(), offsets(&piece)));
        tracks.posted(id, &Answer::delivered());
    }
    assert_eq!(pieces, [(Some(Mark::Live), vec![0, 2]), (Some(Mark::Backfill), vec![1])]);
}

#[test]
fn one_bad_event_is_found_while_its_neighbours_go_on() {
    let mut tracks = tracks(2, 8);
    tracks.begin(request(0, 0, &[0, 1, 0, 1]));
    tracks.begin(request(1, 4, &[0, 1]));
    let (a, even) = next(&mut tracks).expect("partition 0");
    let (b, odd) = next(&mut tracks).expect("partition 1");
    assert_eq!((&even[..], &odd[..]), (&[0, 2, 4][..], &[1, 3, 5][..]));
    tracks.posted(a, &refused());
    let (a, half) = next(&mut tracks).expect("half of it");
    assert_eq!(half, [0, 2]);
    tracks.posted(b, &Answer::delivered());
    tracks.begin(request(2, 6, &[0, 1]));
    // Partition 0 is on trial.
    let (b, other) = next(&mut tracks).expect("the neighbour");
    assert_eq!(other, [7]);
    tracks.posted(b, &Answer::delivered());
    assert_eq!(next(&mut tracks), None);
    tracks.posted(a, &refused());
    let (a, half) = next(&mut tracks).expect("half of that");
    assert_eq!(half, [0]);
    tracks.posted(a, &Answer::delivered());
    // Both others were behind: 2 is the one, and 4 is free again after it.
    let (a, alone) = next(&mut tracks).expect("the bad one");
    assert_eq!(alone, [2]);
    tracks.posted(a, &refused());
    let which = Which::These(vec![2]);
    let failed = vec![Failed { which, failure: Failure::Reject, reason: "bad".into() }];
    assert_eq!(tracks.take_answer(), Some((0, Answer { failed })));
    let (_, rest) = next(&mut tracks).expect("the rest");
    assert_eq!(rest, [4, 6]);
}

#[test]
fn a_device_that_sends_what_is_refused_is_tried_alone() {
    let mut tracks = tracks(1, 100);
    let bad = |offset: u64| offset % 10 == 3;
    let events: Vec<_> =
        (0..1_000).map(|o| stored(o, 0, if bad(o) { "bad" } else { "good" })).collect();
    let mut posts = 0;
    for (id, chunk) in (0..).zip(events.chunks(100)) {
        tracks.begin(Request { id, stream: None, events: Arc::new(chunk.to_vec()) });
        posts = 0;
        while let Some((id, piece)) = tracks.next_piece() {
            posts += 1;
            let refuses = offsets(&piece).into_iter().any(bad);
            tracks.posted(id, &if refuses { refused() } else { Answer::delivered() });
        }
        let (_, answer) = tracks.take_answer().expect("it is done");
        assert_eq!(answer.failed.len(), 1);
    }
    assert!(posts <= 21, "{posts} POSTs for ten bad events that were to be expected");
    // It has learned.
    tracks.begin(request(99, 1_000, &[0; 100]));
    for offset in 0..70 {
        let event = stored(2_000 + offset, 0, "bad");
        tracks.begin(Request { id: 100 + offset, stream: None, events: Arc::new(vec![event]) });
    }
    let mut pieces = 0;
    while let Some((id, _)) = tracks.next_piece() {
        tracks.posted(id, &Answer::delivered());
        pieces += 1;
    }
    assert!((32..=66).contains(&pieces), "{pieces}: some alone, then together again");
    assert!(tracks.doubted.is_empty());
}

#[test]
fn what_is_found_is_handed_on_before_too_much_of_it_comes_together() {
    let mut tracks = tracks(1, 500);
    tracks.begin(request(0, 0, &[0; 500]));
    while let Some((id, _)) = tracks.next_piece() {
        tracks.posted(id, &refused());
    }
    let (_, answer) = tracks.take_answer().expect("it is answered");
    let found = |failure| {
        let groups = answer.failed.iter().filter(|failed| failed.failure == failure);
        groups.map(|f| if let Which::These(which) = &f.which { which.len() } else { 0 }).sum()
    };
    assert_eq!((found(Failure::Reject), found(Failure::Again)), (FOUND_MAX, 500 - FOUND_MAX));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_event_is_judged_once_and_partitions_arrive_in_order(
        seed: u64, requests in 1..8_u64, partitions in 1..9_u16, posts_max in 1..6_usize,
        events_max in 1..20_usize, poison_percent in prop_oneof![Just(0), Just(5), Just(60)],
        failures: bool,
    ) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let size = fake::stored(0, "dev-0", "x").event.size_bytes();
        let bytes_max = size * rng.usize(1..30);
        let mut tracks = Tracks::new(posts_max, PieceLimits { events_max, bytes_max }, 10_000);
        let (mut begun, mut end) = (0, 0);
        let mut sent: BTreeMap<RequestId, Request> = BTreeMap::new();
        let mut flight: Vec<(PieceId, Arc<Piece>)> = Vec::new();
        let (mut arrived, mut poison) = (Vec::new(), BTreeSet::new());
        let mut home: BTreeMap<u64, u16> = BTreeMap::new();
        // Of a request that was not delivered and of those beside it, nothing is begun behind it.
        let (mut answered, mut broken) = (0, false);
        while answered < requests {
            match rng.u8(..4) {
                0 if begun < requests && !broken => {
                    let events: Vec<_> = (0..rng.u64(1..40)).map(|_| {
                        end += 1;
                        let partition = rng.u16(..partitions);
                        home.insert(end, partition);
                        if rng.u8(..100) < poison_percent {
                            poison.insert(end);
                        }
                        stored(end, partition, &format!("dev-{}", rng.u8(..9)))
                    }).collect();
                    let request = Request { id: begun, stream: None, events: Arc::new(events) };
                    sent.insert(begun, request.clone());
                    tracks.begin(request);
                    begun += 1;
                }
                1 => while let Some((id, piece)) = tracks.next_piece() {
                    prop_assert!(piece.len() <= events_max);
                    prop_assert!(piece.len() == 1 || piece.len() * size <= bytes_max);
                    let of = |piece: &Piece| -> BTreeSet<u16> {
                        piece.events().map(|stored| stored.event.partition).collect()
                    };
                    let own = of(&piece);
                    prop_assert!(flight.iter().all(|(_, other)| of(other).is_disjoint(&own)));
                    flight.push((id, piece));
                    prop_assert!(flight.len() <= posts_max);
                },
                2 if !flight.is_empty() => {
                    let (id, piece) = flight.swap_remove(rng.usize(..flight.len()));
                    let offsets = offsets(&piece);
                    let bad: Vec<_> =
                        (0..offsets.len()).filter(|&i| poison.contains(&offsets[i])).collect();
                    let answer = if failures && rng.u8(..20) == 0 {
                        Answer::failed(RETRY, "down")
                    } else if bad.is_empty() {
                        arrived.extend(offsets);
                        Answer::delivered()
                    } else if rng.u8(..5) == 0 {
                        arrived.extend(offsets.iter().filter(|o| !poison.contains(o)));
                        let (which, failure) = (Which::These(bad), Failure::Reject);
                        Answer { failed: vec![Failed { which, failure, reason: "bad".into() }] }
                    } else {
                        refused()
                    };
                    tracks.posted(id, &answer);
                }
                _ => while let Some((id, answer)) = tracks.take_answer() {
                    answered += 1;
                    let request = sent.remove(&id).expect("each is answered once");
                    let mut fates = vec![None; request.events.len()];
                    for Failed { which, failure, .. } in answer.failed {
                        let all: Vec<_> = (0..fates.len()).collect();
                        let which = if let Which::These(these) = which { these } else { all };
                        for index in which {
                            prop_assert_eq!(fates[index].replace(failure), None, "one fate");
                        }
                    }
                    for (fate, event) in fates.into_iter().zip(&*request.events) {
                        let offset = event.offset;
                        match fate {
                            None => prop_assert!(arrived.contains(&offset)),
                            Some(Failure::Reject) => prop_assert!(poison.contains(&offset)),
                            Some(failure) => {
                                prop_assert!(failures && [RETRY, Failure::Again].contains(&failure));
                                prop_assert!(!arrived.contains(&offset));
                                broken = true;
                            }
                        }
                    }
                    if broken && sent.is_empty() {
                        // Who begins requests learns of it with the last answer, and sends all of it
                        // again; here that is not done, so it is as if nothing more came.
                        begun = requests;
                        answered = requests;
                    }
                },
            }
        }
        prop_assert!(sent.is_empty());
        let mut last = BTreeMap::new();
        for offset in arrived {
            let before = last.insert(home[&offset], offset);
            prop_assert!(before < Some(offset), "{offset} after {before:?}, and not twice");
        }
    }
}
