//! The loss ledger: a durable row for everything dropped by policy, written before the data goes.
//!
//! Owns: [`Loss`] and its stored form, and how rows are merged when there are too many (`merge`).
//! Keyed by sink, first offset and reason in `state.redb`, so that writing one again, after a crash
//! between the row and the drop, is writing it once.
//!
//! The ledger is bounded: beyond `ROWS_MAX` rows, neighbours of one sink and reason become one row,
//! the oldest first. Where they touch nothing is forgotten; where they do not, the row keeps their
//! number of events and bytes, and the range that holds them all. No event is ever dropped from it.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;

use crate::row::{Corrupt, Reader, Row};

/// Rows that the ledger holds, about; beyond them rows are merged.
pub(crate) const ROWS_MAX: usize = 4_096;

/// Why data that a sink still needed, or that cannot be read, went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LossReason {
    /// `storage.at_quota = "drop_oldest"`.
    Quota,
    /// Retention of a store without sinks.
    Expired,
    /// The sink was absent from the configuration while its data was trimmed.
    SinkAbsent,
    /// The batch fails its checksum.
    Corrupt,
    /// The sink's `lag_bytes_max`.
    Lag,
    /// `storage.dead_letter_bytes_max`: the sink's oldest dead letters.
    DeadLetterLimit,
    /// Somebody dropped the dead letter.
    DroppedByHand,
}

impl LossReason {
    pub(crate) const ALL: [Self; 7] = [
        Self::Quota,
        Self::Expired,
        Self::SinkAbsent,
        Self::Corrupt,
        Self::Lag,
        Self::DeadLetterLimit,
        Self::DroppedByHand,
    ];

    fn code(self) -> u8 {
        match self {
            Self::Quota => 1,
            Self::Expired => 2,
            Self::SinkAbsent => 3,
            Self::Corrupt => 4,
            Self::Lag => 5,
            Self::DeadLetterLimit => 6,
            Self::DroppedByHand => 7,
        }
    }
}

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The sink that lost it; `None` where there was no sink at all.
    pub sink: Option<String>,
    /// Offsets lost, end-exclusive.
    pub offsets: Range<u64>,
    /// How many of the offsets were lost: all of them, unless rows were merged that did not touch.
    pub events: u64,
    /// Event bytes lost, 0 where unknown.
    pub size_bytes: u64,
    /// Why.
    pub reason: LossReason,
    /// When the row was written, microseconds since the Unix epoch; of merged rows, the last.
    pub at_us: u64,
    /// When the first of the merged rows was written.
    pub since_us: u64,
}

/// Key of a row: sink (empty for none), first offset, reason.
pub(crate) type LossKey<'a> = (&'a str, u64, u8);

impl Loss {
    /// The loss of a whole range.
    pub fn new(
        sink: Option<String>,
        offsets: Range<u64>,
        size_bytes: u64,
        reason: LossReason,
        at_us: u64,
    ) -> Self {
        let events = offsets.end.saturating_sub(offsets.start);
        Self { sink, offsets, events, size_bytes, reason, at_us, since_us: at_us }
    }

    /// Whether every offset of the range was lost.
    pub fn is_exact(&self) -> bool {
        self.events == self.offsets.end.saturating_sub(self.offsets.start)
    }

    pub(crate) fn key(&self) -> LossKey<'_> {
        (self.sink.as_deref().unwrap_or_default(), self.offsets.start, self.reason.code())
    }

    /// Whether this row, which is stored, says already what one of the same key says. What retention
    /// drops it decides anew when it failed to write it down, so the later row is right; a dead letter
    /// that comes back after it was dropped takes nothing from those that went with it.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        match self.reason {
            LossReason::DeadLetterLimit | LossReason::DroppedByHand => {
                self.offsets.end >= other.offsets.end
            }
            _ => !self.is_exact() || self.offsets == other.offsets,
        }
    }

    /// The stored row beside its key.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut row = Row::new();
        row.number(self.offsets.end).number(self.size_bytes).number(self.at_us);
        row.number(self.events).number(self.since_us);
        row.finish()
    }

    /// Reads a stored row.
    pub(crate) fn decode((sink, start, code): LossKey<'_>, row: &[u8]) -> Result<Self, Corrupt> {
        let mut row = Reader::checked(Bytes::copy_from_slice(row))?;
        let reason = LossReason::ALL.into_iter().find(|reason| reason.code() == code);
        let sink = (!sink.is_empty()).then(|| sink.to_owned());
        let (end, size_bytes, at_us) = (row.number()?, row.number()?, row.number()?);
        let loss = Self::new(sink, start..end, size_bytes, reason.ok_or(Corrupt)?, at_us);
        if row.is_empty() {
            // Written before rows were merged.
            return Ok(loss);
        }
        Ok(Self { events: row.number()?, since_us: row.number()?, ..loss })
    }

    /// Both rows as one; `other` begins no earlier.
    fn and(self, other: &Self) -> Self {
        let end = self.offsets.end.max(other.offsets.end);
        let touch = self.is_exact() && other.is_exact() && other.offsets.start <= self.offsets.end;
        Self {
            events: if touch {
                end - self.offsets.start
            } else {
                self.events.saturating_add(other.events)
            },
            offsets: self.offsets.start..end,
            size_bytes: self.size_bytes.saturating_add(other.size_bytes),
            at_us: self.at_us.max(other.at_us),
            since_us: self.since_us.min(other.since_us),
            ..self
        }
    }
}

/// Merges rows: those that touch, and where that is not enough the older half of each sink's and
/// reason's, two by two. `start` is the first offset that is stored: what is damaged from there on is
/// still walked, and its rows stay exact; there are no more of them than batches. Pure.
pub(crate) fn merge(rows: Vec<Loss>, start: u64) -> Vec<Loss> {
    let mut groups: BTreeMap<(Option<String>, LossReason), Vec<Loss>> = BTreeMap::new();
    for row in rows {
        groups.entry((row.sink.clone(), row.reason)).or_default().push(row);
    }
    for rows in groups.values_mut() {
        rows.sort_by_key(|row| row.offsets.start);
        *rows = joined(std::mem::take(rows), usize::MAX, |before, row| {
            before.is_exact() && row.is_exact() && row.offsets.start <= before.offsets.end
        });
    }
    let left: usize = groups.values().map(Vec::len).sum();
    if left > ROWS_MAX / 4 * 3 {
        for rows in groups.values_mut() {
            let mut pair = false;
            let older = rows.len() / 2;
            *rows = joined(std::mem::take(rows), older, |_, row| {
                let walked = row.reason == LossReason::Corrupt && row.offsets.end > start;
                pair = !pair && !walked;
                pair
            });
        }
    }
    groups.into_values().flatten().collect()
}

/// Joins a row to the one before it where `joins` says so, among the first `among`.
fn joined(rows: Vec<Loss>, among: usize, mut joins: impl FnMut(&Loss, &Loss) -> bool) -> Vec<Loss> {
    let mut out: Vec<Loss> = Vec::with_capacity(rows.len());
    for (place, row) in rows.into_iter().enumerate() {
        match out.pop() {
            Some(before) if place < among && joins(&before, &row) => out.push(before.and(&row)),
            before => out.extend(before.into_iter().chain([row])),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_loss_round_trips() {
        for (reason, sink) in LossReason::ALL.into_iter().zip([None, Some("cloud".to_owned())]) {
            let loss = Loss::new(sink, 5..900, 1 << 40, reason, 17);
            let merged = Loss { events: 80, since_us: 3, ..loss.clone() };
            for loss in [loss, merged] {
                assert_eq!(Loss::decode(loss.key(), &loss.encode()), Ok(loss));
            }
        }
    }

    #[test]
    fn a_row_of_the_first_format_is_exact() {
        let loss = Loss::new(Some("cloud".into()), 5..9, 40, LossReason::Lag, 17);
        let mut row = Row::new();
        row.number(9).number(40).number(17);
        assert_eq!(Loss::decode(loss.key(), &row.finish()), Ok(loss));
    }

    #[test]
    fn rows_that_touch_become_one_and_nothing_is_forgotten() {
        let row = |from, to| Loss::new(Some("a".into()), from..to, 10, LossReason::Quota, from);
        let merged = merge(vec![row(0, 10), row(20, 30), row(10, 20), row(40, 50)], 0);
        let [first, second] = &merged[..] else { panic!("{merged:?}") };
        assert_eq!((first.offsets.clone(), first.events, first.size_bytes), (0..30, 30, 30));
        assert_eq!((first.since_us, first.at_us), (0, 20));
        assert_eq!((second.offsets.clone(), second.is_exact()), (40..50, true));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        #[test]
        fn no_event_is_merged_away(gaps in vec((1_u64..4, 1_u64..4, 0_usize..3), ROWS_MAX..=ROWS_MAX + 64)) {
            let reasons = [LossReason::Quota, LossReason::Corrupt, LossReason::DroppedByHand];
            let mut at = 0;
            let rows: Vec<Loss> = gaps.iter().map(|&(gap, len, reason)| {
                let from = at + gap;
                at = from + len;
                Loss::new(Some("a".into()), from..at, len * 7, reasons[reason], from)
            }).collect();
            let start = at / 2;
            let merged = merge(rows.clone(), start);
            prop_assert!(merged.len() <= ROWS_MAX);
            for reason in reasons {
                let sums = |rows: &[Loss]| rows.iter().filter(|row| row.reason == reason)
                    .fold((0, 0), |(events, bytes), row| (events + row.events, bytes + row.size_bytes));
                prop_assert_eq!(sums(&merged), sums(&rows));
            }
            for row in &merged {
                let held = rows.iter().filter(|r| r.reason == row.reason
                    && r.offsets.start >= row.offsets.start && r.offsets.end <= row.offsets.end);
                prop_assert_eq!(held.map(|r| r.events).sum::<u64>(), row.events, "one range each");
                prop_assert!(
                    row.is_exact() || row.reason != LossReason::Corrupt || row.offsets.end <= start
                );
            }
        }
    }
}
