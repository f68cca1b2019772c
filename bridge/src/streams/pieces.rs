//! What lanes still owe of the log, as pieces: some of the lanes, over some offsets.
//!
//! Owns: how what is done (a cursor, and ranges ahead of it that may stem from other lanes than
//! today's) is cut into pieces, and how pieces are put together to what is done again. Pure.
//!
//! Invariants:
//! - An event that is not done is in exactly one piece, and one that is done is in none: so nothing
//!   is sent or counted twice because lanes were told apart or put together between two runs.
//! - Pieces are in offset order, and the last one has all of the lanes and no end.
//! - A piece is *late* if later events of one of its lanes have gone ahead of it, or may have.
//!
//! Deliberately absent: when pieces are sent, and beside what (`streams`).

use std::ops::Range;

use storage::{Ahead, Lane, Lanes, Passed};

use crate::reach::Reach;

/// Some lanes over some offsets, of which nothing is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// The lanes.
    pub(super) lanes: Lanes,
    /// Offsets; to `u64::MAX` if it has no end.
    pub(super) offsets: Range<u64>,
    /// Its events come behind later ones of their lanes.
    pub(super) is_late: bool,
}

/// What `lanes` owe. `split_at`: what is before it is late, beside what `passed` shows to be so.
pub(super) fn owed(
    lanes: Lanes,
    cursor: u64,
    passed: &Passed,
    split_at: Option<u64>,
) -> Vec<Piece> {
    let own = || Lane::ALL.into_iter().filter(|&lane| lanes.contains(lane));
    let gaps: Vec<_> =
        own().map(|lane| (lane, passed.gaps(Lanes::NONE.with(lane), cursor))).collect();
    let known = Reach { cursor, ahead: passed.ahead.clone() };
    let late_to = known.splits(lanes).max().max(split_at).unwrap_or(cursor).max(cursor);
    let bounds = gaps.iter().flat_map(|(_, gaps)| gaps.iter().flat_map(|gap| [gap.start, gap.end]));
    let mut cuts: Vec<_> = bounds.chain([cursor, late_to]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let mut pieces: Vec<Piece> = Vec::new();
    for cut in cuts.windows(2) {
        let offsets = cut[0]..cut[1];
        let owe = gaps.iter().filter(|(_, gaps)| gaps.iter().any(|gap| gap.contains(&cut[0])));
        let lanes = owe.fold(Lanes::NONE, |lanes, (lane, _)| lanes.with(*lane));
        let is_late = offsets.start < late_to;
        match pieces.last_mut() {
            _ if lanes == Lanes::NONE => {}
            // It was cut for another piece's sake.
            Some(last)
                if (last.lanes, last.is_late, last.offsets.end)
                    == (lanes, is_late, offsets.start) =>
            {
                last.offsets.end = offsets.end;
            }
            _ => pieces.push(Piece { lanes, offsets, is_late }),
        }
    }
    pieces
}

/// What is done from `cursor` on where this much is `open`: lanes over offsets, in offset order for
/// each lane, its last without end.
pub(super) fn done(cursor: u64, open: &[(Lanes, Range<u64>)]) -> Vec<Ahead> {
    let has = |lane: Lane| move |piece: &&(Lanes, Range<u64>)| piece.0.contains(lane);
    // Lanes that are in the same pieces have the same done: no need to say it for each.
    let kin = |lane: Lane| {
        let alike = |&other: &Lane| open.iter().all(|p| has(lane)(&p) == has(other)(&p));
        Lane::ALL.into_iter().filter(alike).fold(Lanes::NONE, Lanes::with)
    };
    let mut ahead = Vec::new();
    let mut told = Lanes::NONE;
    for lane in Lane::ALL {
        if told.contains(lane) {
            continue;
        }
        let lanes = kin(lane);
        told = Lane::ALL.into_iter().filter(|&l| lanes.contains(l)).fold(told, Lanes::with);
        let mut done_to = cursor;
        for (_, offsets) in open.iter().filter(has(lane)).filter(|(_, o)| !o.is_empty()) {
            if done_to < offsets.start {
                ahead.push(Ahead { lanes, offsets: done_to..offsets.start });
            }
            done_to = offsets.end;
        }
    }
    ahead
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lanes(bits: u8) -> Lanes {
        let named = |&lane: &Lane| bits & 1 << lane as u8 != 0;
        Lane::ALL.into_iter().filter(named).fold(Lanes::NONE, Lanes::with)
    }

    fn any_ahead() -> impl Strategy<Value = Vec<Ahead>> {
        let one = (1_u8..8, 0_u64..40, 1_u64..10).prop_map(|(bits, start, len)| Ahead {
            lanes: lanes(bits),
            offsets: start..start + len,
        });
        prop::collection::vec(one, 0..6)
    }

    #[test]
    fn lanes_that_are_put_together_owe_what_each_of_them_owed() {
        let alarm = lanes(1 << Lane::Alarm as u8);
        let ahead = vec![Ahead { lanes: alarm, offsets: 10..60 }];
        let passed = Passed { ahead, ..Passed::default() };
        let rest = Lanes::ALL.without(alarm);
        let piece = |lanes, offsets| Piece { lanes, offsets, is_late: false };
        // The alarms came in their order: nothing is late.
        let pieces = [piece(rest, 10..60), piece(Lanes::ALL, 60..u64::MAX)];
        assert_eq!(owed(Lanes::ALL, 10, &passed, None), pieces);
    }

    #[test]
    fn lanes_that_are_told_apart_are_late_where_they_were_together() {
        let ahead = vec![Ahead { lanes: Lanes::ALL, offsets: 600..650 }];
        let passed = Passed { ahead, ..Passed::default() };
        let alarm = lanes(1 << Lane::Alarm as u8);
        let piece = |offsets, is_late| Piece { lanes: alarm, offsets, is_late };
        let pieces = [piece(50..600, true), piece(650..u64::MAX, false)];
        assert_eq!(owed(alarm, 50, &passed, None), pieces);
    }

    proptest! {
        /// Every event that is not done is in one piece, and what is done comes out as it went in,
        /// however the lanes are put together.
        #[test]
        fn pieces_hold_what_is_not_done_and_nothing_else(
            cursor in 0_u64..20,
            ahead in any_ahead(),
            group in 1_u8..8,
            split_at in prop::option::of(0_u64..50),
        ) {
            let passed = Passed { ahead, ..Passed::default() };
            let groups = [lanes(group), lanes(!group & 7)];
            let pieces: Vec<Vec<_>> = groups
                .into_iter()
                .filter(|&lanes| lanes != Lanes::NONE)
                .map(|lanes| owed(lanes, cursor, &passed, split_at))
                .collect();
            for pieces in &pieces {
                prop_assert!(pieces.windows(2).all(|p| p[0].offsets.end <= p[1].offsets.start));
                prop_assert!(pieces.windows(2).all(|p| p[0].is_late >= p[1].is_late));
                prop_assert_eq!(pieces.last().unwrap().offsets.end, u64::MAX);
                let late = split_at.unwrap_or(0);
                prop_assert!(pieces.iter().all(|p| p.is_late || p.offsets.start >= late));
            }
            let open: Vec<_> =
                pieces.iter().flatten().map(|p| (p.lanes, p.offsets.clone())).collect();
            let reach = |ahead| Reach { cursor, ahead };
            let (before, after) = (reach(passed.ahead.clone()), reach(done(cursor, &open)));
            for offset in 0..60 {
                for lane in Lane::ALL {
                    let holding = |(lanes, offsets): &&(Lanes, Range<u64>)| {
                        lanes.contains(lane) && offsets.contains(&offset)
                    };
                    let owing = open.iter().filter(holding).count();
                    prop_assert_eq!(owing, usize::from(!before.holds(offset, lane)));
                    prop_assert_eq!(after.holds(offset, lane), before.holds(offset, lane));
                }
            }
        }
    }
}
