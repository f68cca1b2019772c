//! Sets of offsets as ranges. Pure.
//!
//! Invariant: ranges are in order, not empty, and neither overlap nor touch, so that a set takes
//! room for its gaps and not for what is in it.

use std::ops::Range;

/// A set of offsets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// Adds a range; what was there already stays.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let from = self.0.partition_point(|r| r.end < range.start);
        let to = self.0.partition_point(|r| r.start <= range.end);
        let mut merged = range;
        if let (Some(first), Some(last)) = (self.0[from..to].first(), self.0[from..to].last()) {
            merged = merged.start.min(first.start)..merged.end.max(last.end);
        }
        self.0.splice(from..to, [merged]);
    }

    /// The part of the set that lies in a range.
    pub(crate) fn within(&self, range: &Range<u64>) -> Self {
        let parts = self.0.iter().map(|r| r.start.max(range.start)..r.end.min(range.end));
        Self(parts.filter(|part| !part.is_empty()).collect())
    }

    /// The part of the set that is not in another.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut left = Vec::new();
        let mut cuts = other.0.iter().peekable();
        for range in &self.0 {
            let mut start = range.start;
            while let Some(cut) = cuts.peek().filter(|cut| cut.start < range.end) {
                left.push(start..cut.start.max(start));
                start = start.max(cut.end);
                if cut.end > range.end {
                    break;
                }
                cuts.next();
            }
            left.push(start..range.end.max(start));
        }
        left.retain(|range| !range.is_empty());
        Self(left)
    }

    /// Number of offsets in the set.
    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Range<u64>> {
        self.0.iter()
    }
}

impl From<Range<u64>> for Ranges {
    fn from(range: Range<u64>) -> Self {
        let mut ranges = Self::default();
        ranges.insert(range);
        ranges
    }
}

impl FromIterator<Range<u64>> for Ranges {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Self::default();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        vec((0..60_u64, 0..12_u64).prop_map(|(start, len)| start..start + len), 0..12)
    }

    fn set(ranges: &[Range<u64>]) -> BTreeSet<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    fn members(ranges: &Ranges) -> BTreeSet<u64> {
        for pair in ranges.0.windows(2) {
            assert!(pair[0].end < pair[1].start, "{ranges:?}");
        }
        assert!(ranges.0.iter().all(|range| !range.is_empty()), "{ranges:?}");
        let members = set(&ranges.0);
        assert_eq!(members.len() as u64, ranges.count());
        members
    }

    proptest! {
        #[test]
        fn ranges_are_the_set_of_their_offsets(a in ranges(), b in ranges(), cut in (0..70_u64, 0..70_u64)) {
            let (left, right): (Ranges, Ranges) =
                (a.iter().cloned().collect(), b.iter().cloned().collect());
            let (a, b) = (set(&a), set(&b));
            prop_assert_eq!(members(&left), a.clone());
            prop_assert_eq!(members(&left.without(&right)), a.difference(&b).copied().collect());
            let cut = cut.0..cut.1;
            let within = a.iter().copied().filter(|offset| cut.contains(offset)).collect();
            prop_assert_eq!(members(&left.within(&cut)), within);
        }
    }
}
