//! How the events of a request are spread over requests to the upstream, and how the answers come
//! together again. Pure.
//!
//! Owns: [`Track`], a row of pieces that are sent one after the other. Tracks are sent beside each
//! other.
//! Invariants:
//! - A partition is in one track, in offset order: so is each of its devices.
//! - Once an event of a track is to be sent again, nothing behind it in that track is sent any more.

use std::collections::{BTreeMap, VecDeque};

use storage::StoredEvent;

use crate::sink::{Answer, Failed, Failure, Which};

/// Bounds of a piece.
#[derive(Clone, Copy, Debug)]
pub(super) struct PieceLimits {
    pub(super) events_max: usize,
    /// A single larger event still goes, alone.
    pub(super) bytes_max: usize,
}

/// Pieces, each a list of places in the request, that are sent one after the other.
#[derive(Debug, Default)]
pub(super) struct Track {
    pieces: VecDeque<Vec<usize>>,
    failed: Vec<Failed>,
}

/// Spreads events over at most so many tracks, about evenly.
pub(super) fn split(events: &[StoredEvent], tracks_max: usize, limits: PieceLimits) -> Vec<Track> {
    let mut partitions: BTreeMap<u16, Vec<usize>> = BTreeMap::new();
    for (place, stored) in events.iter().enumerate() {
        let partition = if tracks_max == 1 { 0 } else { stored.event.partition };
        partitions.entry(partition).or_default().push(place);
    }
    // The longest first, each to where there is least so far.
    let mut partitions: Vec<_> = partitions.into_values().collect();
    partitions.sort_by_key(|places| std::cmp::Reverse(places.len()));
    let mut tracks = vec![Vec::new(); tracks_max.min(partitions.len())];
    for places in partitions {
        let shortest = tracks.iter_mut().min_by_key(|track| track.len());
        shortest.expect("a partition has events").extend(places);
    }
    tracks
        .into_iter()
        .map(|mut places| {
            places.sort_unstable();
            Track { pieces: cut(events, &places, limits), failed: Vec::new() }
        })
        .collect()
}

fn cut(events: &[StoredEvent], places: &[usize], limits: PieceLimits) -> VecDeque<Vec<usize>> {
    let mut pieces: VecDeque<Vec<usize>> = VecDeque::new();
    let mut size_bytes = 0;
    for &place in places {
        let event_bytes = events[place].event.size_bytes();
        match pieces.back_mut() {
            Some(piece)
                if piece.len() < limits.events_max
                    && size_bytes + event_bytes <= limits.bytes_max =>
            {
                piece.push(place);
                size_bytes += event_bytes;
            }
            _ => {
                pieces.push_back(vec![place]);
                size_bytes = event_bytes;
            }
        }
    }
    pieces
}

impl Track {
    /// The next piece to send.
    pub(super) fn next(&mut self) -> Option<Vec<usize>> {
        self.pieces.pop_front()
    }

    /// Takes the answer to a piece; its indexes are places in the piece.
    pub(super) fn answered(&mut self, piece: &[usize], answer: Answer) {
        for Failed { which, failure, reason } in answer.failed {
            let mut places = match which {
                Which::All => piece.to_vec(),
                Which::These(indexes) => indexes.into_iter().map(|index| piece[index]).collect(),
            };
            let is_open = match failure {
                Failure::Suspect => places.len() > 1,
                Failure::Again | Failure::Retry { .. } | Failure::Hold => true,
                Failure::Reject => false,
            };
            if is_open {
                // What is behind it shares its fate: of a suspect, that one of them is bad.
                places.extend(self.pieces.drain(..).flatten());
            }
            self.failed.push(Failed { which: Which::These(places), failure, reason });
        }
    }

    /// What was not delivered.
    pub(super) fn into_failed(self) -> Vec<Failed> {
        self.failed
    }
}

/// The answer of all tracks together to a request of so many events.
pub(super) fn merge(events: usize, mut failed: Vec<Failed>) -> Answer {
    if let [Failed { which, .. }] = &mut *failed
        && matches!(which, Which::These(places) if places.len() == events)
    {
        *which = Which::All;
    }
    Answer { failed }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake;

    const RETRY: Failure = Failure::Retry { after: None };

    fn events(partitions: &[u16]) -> Vec<StoredEvent> {
        let event = |(offset, &partition)| {
            let mut stored = fake::stored(offset, "dev", "x");
            stored.event.partition = partition;
            stored
        };
        (0..).zip(partitions).map(event).collect()
    }

    fn track(pieces: &[&[usize]]) -> Track {
        Track { pieces: pieces.iter().map(|piece| piece.to_vec()).collect(), failed: Vec::new() }
    }

    #[test]
    fn nothing_behind_what_is_sent_again_is_sent() {
        for failure in [RETRY, Failure::Hold, Failure::Suspect] {
            let mut track = track(&[&[0, 3], &[5], &[8, 9]]);
            let piece = track.next().expect("a piece");
            track.answered(&piece, Answer::failed(failure, "why"));
            assert_eq!(track.next(), None);
            let which = Which::These(vec![0, 3, 5, 8, 9]);
            assert_eq!(track.into_failed(), [Failed { which, failure, reason: "why".into() }]);
        }
    }

    #[test]
    fn what_is_known_to_be_bad_stops_nobody() {
        // Alone in its piece it is guilty.
        for (pieces, failure) in
            [(&[&[4][..], &[5]][..], Failure::Suspect), (&[&[3, 4], &[5]], Failure::Reject)]
        {
            let mut track = track(pieces);
            let piece = track.next().expect("a piece");
            let which = Which::These(vec![piece.len() - 1]);
            let failed = vec![Failed { which, failure, reason: String::new() }];
            track.answered(&piece, Answer { failed });
            assert_eq!(track.next(), Some(vec![5]));
            let which = Which::These(vec![4]);
            assert_eq!(track.into_failed(), [Failed { which, failure, reason: String::new() }]);
        }
    }

    proptest! {
        #[test]
        fn every_event_is_in_one_piece_and_a_partition_in_one_track_in_order(
            partitions in proptest::collection::vec(0..12_u16, 1..200),
            tracks_max in 1..9_usize, events_max in 1..20_usize, bytes_max in 1..300_usize,
        ) {
            let events = events(&partitions);
            let size = events[0].event.size_bytes();
            let limits = PieceLimits { events_max, bytes_max };
            let mut home: BTreeMap<u16, usize> = BTreeMap::new();
            let mut seen = Vec::new();
            let tracks = split(&events, tracks_max, limits);
            prop_assert!(tracks.len() <= tracks_max);
            for (number, mut track) in tracks.into_iter().enumerate() {
                let mut places = Vec::new();
                while let Some(piece) = track.next() {
                    prop_assert!(!piece.is_empty() && piece.len() <= events_max);
                    prop_assert!(piece.len() == 1 || piece.len() * size <= bytes_max);
                    places.extend(piece);
                }
                prop_assert!(places.is_sorted());
                for &place in &places {
                    prop_assert_eq!(*home.entry(partitions[place]).or_insert(number), number);
                }
                seen.extend(places);
            }
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..events.len()));
        }
    }
}
