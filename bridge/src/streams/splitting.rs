//! Where streams of a sink begin and end: at the start, where an earlier process has split them, and
//! where later events may go ahead.
//!
//! Invariants:
//! - An event never changes streams once anything of them is in flight, and what later events have gone
//!   ahead of, or may have, is late from then on.
//! - There are at most [`BACKLOGS_MAX`] backlogs: an outage beyond that is not split any more until
//!   one of them has drained. Only what an earlier process has split comes on top, up to
//!   [`BACKLOGS_FOUND_MAX`], and what it has left in pieces under other lanes.
//!
//! Deliberately absent: what is owed under other lanes (`pieces`), and what goes first (`streams`).

use storage::SinkProgress;

use super::Streams;
use super::pieces::{self, Piece};
use super::plan::Class;
use super::stream::Stream;
use crate::delivery::Moment;
use crate::reach::Reach;

/// Backlogs that may be owed at once.
pub(super) const BACKLOGS_MAX: usize = 4;
/// The same where an earlier process has split: one more with each start whose store knows less than
/// the upstream. What was found beyond that splits nothing.
const BACKLOGS_FOUND_MAX: usize = 2 * BACKLOGS_MAX;

/// What has happened since streams were split last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Splitting {
    /// The process began: what is stored by then is backlog, where later events may go ahead.
    Restarted,
    /// Something was answered.
    Moved,
    /// Nothing: splitting off another backlog would gain nothing.
    Still,
}

impl Streams {
    /// Makes the streams anew, from where a sink has stopped; `found` may split them further.
    pub(super) fn lay_out(&mut self, progress: &SinkProgress, found: &Reach) {
        let SinkProgress { cursor, passed } = progress;
        for (class, lanes) in self.plan.groups() {
            let mut pieces = pieces::owed(lanes, *cursor, passed, None);
            // Backlogs go one after the other, however they are split: of what was found only the
            // last split matters, with which events go ahead of all of them.
            if pieces.len() <= BACKLOGS_FOUND_MAX {
                pieces = pieces::owed(lanes, *cursor, passed, found.splits(lanes).max());
            }
            let mut start = *cursor;
            for Piece { lanes, offsets, is_late } in pieces {
                self.marked |= is_late;
                let class = if is_late && class == Class::Live { Class::Backlog } else { class };
                // What lies between it and the piece before is its own, and done.
                let mut stream = self.stream(class, lanes, start..offsets.end, offsets.start);
                stream.is_late = is_late;
                start = offsets.end;
                self.all.push(stream);
            }
        }
    }

    /// An earlier process has split where `found` says: so do these, before anything else begins, for
    /// an event must not change streams. Where they go on does not change: the sink knows what not to
    /// send again.
    pub(crate) fn split_as(&mut self, found: Reach) {
        self.found = Some(found);
    }

    /// Splits as was found, once nothing is in flight or has to be written down.
    pub(super) fn split_found(&mut self) {
        let is_quiet = |stream: &Stream| {
            stream.delivery.in_flight() == 0 && stream.delivery.letters().is_empty()
        };
        if let Some(found) = self.found.take_if(|_| self.all.iter().all(is_quiet)) {
            let (progress, counts) = (self.progress(), self.counts());
            let replay = self.all.split_off(self.owed_count());
            self.all.clear();
            self.ended = counts;
            self.lay_out(&progress, &found);
            self.all.extend(replay);
        }
    }

    /// The same after a start of the process: where later events may go ahead, what is stored by then is
    /// late at once, whatever its lane. A split that was not durable yet when the process was killed may
    /// have let them go ahead before, and what is behind them must not come as live events after them.
    pub(crate) fn restarted(self) -> Self {
        Self { splitting: Splitting::Restarted, ..self }
    }

    /// What is stored for streams that are never split is late. See [`Streams::restarted`]: their lanes
    /// may have shared a stream with live events until then.
    fn cut_late(&mut self, class: Class) {
        let watermark = self.watermark;
        let of_class = |stream: &Stream| stream.class == class;
        let Some(place) = self.all.iter().rposition(of_class) else { return };
        if self.all[place].is_read(watermark) {
            return;
        }
        self.all.iter_mut().filter(|s| of_class(s)).for_each(|stream| stream.is_late = true);
        self.all[place].offsets.end = watermark;
        let lanes = self.all[place].lanes;
        let next = self.stream(class, lanes, watermark..u64::MAX, watermark);
        self.all.insert(place + 1, next);
    }

    /// Lets later events go ahead.
    pub(super) fn split(&mut self, now: Moment) {
        let Some(after) = self.plan.live_first else { return };
        let watermark = self.watermark;
        let restarted = self.splitting == Splitting::Restarted;
        if restarted {
            self.splitting = Splitting::Moved;
            self.cut_late(Class::Alarm);
            self.cut_late(Class::Backfill);
        }
        let mut places = (0..self.all.len()).filter(|&place| self.all[place].class == Class::Live);
        let first = places.next().expect("one never ends");
        // The last one has no end; those before it are what its lanes owe apart from each other.
        let place = places.next_back().unwrap_or(first);
        let live = &self.all[place];
        let waited = self.all[first].delivery.oldest_us().map(|us| now.unix_us.saturating_sub(us));
        let too_long = waited.is_some_and(|us| u128::from(us) > after.as_micros()) || restarted;
        if !too_long || live.is_read(watermark) || self.trouble().is_some() {
            return;
        }
        let lanes = live.lanes;
        let untouched = first == place
            && live.delivery.cursor() == live.offsets.start
            && live.delivery.in_flight() == 0
            && live.delivery.letters().is_empty();
        let start = live.offsets.start;
        let before = place.checked_sub(1).map(|place| &mut self.all[place]);
        let joins =
            |s: &&mut Stream| (s.class, s.lanes, s.offsets.end) == (Class::Backlog, lanes, start);
        let place = match before.filter(joins) {
            // Nothing has gone ahead yet: it all waits together.
            Some(before) if untouched => {
                before.offsets.end = watermark;
                let ended = self.all.remove(place);
                self.ended = self.ended + ended.counts();
                place
            }
            _ => {
                let backlogs = self.all.iter().filter(|s| s.class == Class::Backlog).count();
                if backlogs >= BACKLOGS_MAX || backlogs > 0 && self.splitting == Splitting::Still {
                    return;
                }
                for live in &mut self.all[first..=place] {
                    (live.class, live.is_late) = (Class::Backlog, true);
                }
                self.all[place].offsets.end = watermark;
                place + 1
            }
        };
        self.splitting = Splitting::Still;
        let live = self.stream(Class::Live, lanes, watermark..u64::MAX, watermark);
        self.all.insert(place, live);
    }
}
