//! Cursors: the next offset that each sink needs. Pure.
//!
//! Invariant: a cursor only moves forward, so that replaying a move is harmless, and only the
//! configured sinks hold data back.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Where a sink stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// First offset that was ever the sink's.
    pub(crate) origin: u64,
    /// Next offset that it needs.
    pub(crate) offset: u64,
}

/// The cursors of all sinks that the store knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cursors {
    sinks: BTreeMap<String, Cursor>,
    configured: BTreeSet<String>,
}

impl Cursors {
    pub(crate) fn new(sinks: BTreeMap<String, Cursor>) -> Self {
        Self { sinks, configured: BTreeSet::new() }
    }

    /// Configures the sinks. A new one starts at `start`, the first stored offset; one that was
    /// absent while data was trimmed is moved there. Returns what each of those missed.
    pub(crate) fn configure(
        &mut self,
        sinks: impl IntoIterator<Item = String>,
        start: u64,
    ) -> Vec<(String, Range<u64>)> {
        let mut missed = Vec::new();
        for sink in sinks {
            let new = Cursor { origin: start, offset: start };
            let cursor = self.sinks.entry(sink.clone()).or_insert(new);
            if cursor.offset < start {
                missed.push((sink.clone(), cursor.offset..start));
                cursor.offset = start;
            }
            self.configured.insert(sink);
        }
        missed
    }

    /// Moves a cursor forward; a lower offset than the stored one is ignored.
    pub(crate) fn advance(&mut self, sink: &str, offset: u64) {
        match self.sinks.get_mut(sink) {
            Some(cursor) => cursor.offset = cursor.offset.max(offset),
            None => {
                self.sinks.insert(sink.to_owned(), Cursor { origin: offset, offset });
            }
        }
    }

    /// Nothing before `start` is stored any more: no configured sink needs it.
    pub(crate) fn raise(&mut self, start: u64) {
        for sink in &self.configured {
            if let Some(cursor) = self.sinks.get_mut(sink) {
                cursor.offset = cursor.offset.max(start);
            }
        }
    }

    /// The cursor of a configured sink.
    pub(crate) fn get(&self, sink: &str) -> Option<u64> {
        self.configured.contains(sink).then(|| self.sinks.get(sink).map(|c| c.offset))?
    }

    /// The offset below which no configured sink needs anything; nothing without sinks.
    pub(crate) fn floor(&self) -> Option<u64> {
        self.configured().map(|(_, cursor)| cursor.offset).min()
    }

    /// The configured sinks.
    pub(crate) fn configured(&self) -> impl Iterator<Item = (&str, Cursor)> {
        self.configured.iter().filter_map(|sink| Some((sink.as_str(), *self.sinks.get(sink)?)))
    }

    /// All sinks, also those that are no longer configured.
    pub(crate) fn all(&self) -> &BTreeMap<String, Cursor> {
        &self.sinks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(sinks: &[&str]) -> Vec<String> {
        sinks.iter().map(|&sink| sink.to_owned()).collect()
    }

    #[test]
    fn a_cursor_never_goes_back() {
        let mut cursors = Cursors::default();
        assert!(cursors.configure(names(&["a", "b"]), 10).is_empty());
        cursors.advance("a", 30);
        cursors.advance("a", 20);
        assert_eq!((cursors.get("a"), cursors.get("b")), (Some(30), Some(10)));
        assert_eq!(cursors.floor(), Some(10));
    }

    #[test]
    fn an_absent_sink_holds_nothing_back_and_learns_what_it_missed() {
        let mut cursors = Cursors::default();
        cursors.configure(names(&["a", "b"]), 0);
        let mut cursors = Cursors::new(cursors.all().clone());
        cursors.configure(names(&["a"]), 0);
        cursors.advance("a", 50);
        assert_eq!((cursors.floor(), cursors.get("b")), (Some(50), None));

        let mut cursors = Cursors::new(cursors.all().clone());
        assert_eq!(cursors.configure(names(&["a", "b"]), 40), [("b".to_owned(), 0..40)]);
        assert_eq!(cursors.all()["b"], Cursor { origin: 0, offset: 40 });
    }

    #[test]
    fn without_sinks_there_is_no_floor() {
        assert_eq!(Cursors::default().floor(), None);
    }
}
