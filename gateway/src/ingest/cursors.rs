//! Cursor moves that wait for a commit to ride in: coalesced, one per sink.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytestring::ByteString;
use storage::{Control, Passed, SinkProgress};

/// The newest known cursor of each sink, and whether a commit has carried it. Bounded by the number
/// of sinks.
#[derive(Debug, Default)]
pub(super) struct Cursors(Mutex<Moves>);

#[derive(Debug, Default)]
struct Moves {
    sinks: Vec<Cursor>,
    /// When the oldest move that waits was made.
    waiting_since: Option<Instant>,
}

#[derive(Debug)]
struct Cursor {
    sink: ByteString,
    progress: SinkProgress,
    waits: bool,
}

impl Cursors {
    /// A sink is so far; a step back of its cursor is ignored. `true` if no move waited before, so
    /// that the committer must learn that one does.
    pub(super) fn advance(&self, sink: &str, progress: &SinkProgress, now: Instant) -> bool {
        let mut moves = self.lock();
        match moves.sinks.iter_mut().find(|cursor| cursor.sink == sink) {
            Some(Cursor { progress: known, .. })
                if known.cursor > progress.cursor || known == progress =>
            {
                return false;
            }
            Some(cursor) => {
                cursor.progress = progress.clone();
                cursor.waits = true;
            }
            None => {
                let progress = progress.clone();
                moves.sinks.push(Cursor { sink: sink.into(), progress, waits: true });
            }
        }
        let first = moves.waiting_since.is_none();
        moves.waiting_since.get_or_insert(now);
        first
    }

    /// When the oldest move that waits was made.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.lock().waiting_since
    }

    /// Takes the moves that wait.
    pub(super) fn take(&self) -> Vec<Control> {
        let mut moves = self.lock();
        if moves.waiting_since.take().is_none() {
            return Vec::new();
        }
        let mut controls = Vec::new();
        for cursor in moves.sinks.iter_mut().filter(|cursor| cursor.waits) {
            cursor.waits = false;
            let SinkProgress { cursor: offset, passed } = &cursor.progress;
            controls.push(Control::Cursor { sink: cursor.sink.clone(), offset: *offset });
            // A sink that has everything in order says nothing more, and what it said before is
            // below its cursor.
            if *passed != Passed::default() {
                controls.push(passed.control(&cursor.sink));
            }
        }
        controls
    }

    /// Commits that carried moves may be gone: every cursor is to be carried again. One that is
    /// durable already is no harm, as the store ignores what is not a step forward.
    pub(super) fn carry_again(&self, now: Instant) {
        let mut moves = self.lock();
        moves.sinks.iter_mut().for_each(|cursor| cursor.waits = true);
        if !moves.sinks.is_empty() {
            moves.waiting_since.get_or_insert(now);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Moves> {
        // Every change is a single step, so a panic elsewhere leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use storage::{Ahead, Lanes};

    use super::*;

    fn cursor(sink: &'static str, offset: u64) -> Control {
        Control::Cursor { sink: sink.into(), offset }
    }

    #[test]
    fn moves_coalesce_and_go_forward_only() {
        let (cursors, now) = (Cursors::default(), Instant::now());
        assert!(cursors.advance("a", &5.into(), now));
        assert!(!cursors.advance("b", &3.into(), now));
        assert!(!cursors.advance("a", &9.into(), now));
        assert!(!cursors.advance("a", &7.into(), now));
        assert_eq!(cursors.take(), [cursor("a", 9), cursor("b", 3)]);
        assert_eq!(cursors.take(), []);
        assert!(!cursors.advance("a", &9.into(), now), "nothing new");
        assert_eq!(cursors.waiting_since(), None);
        assert!(cursors.advance("b", &4.into(), now));
        assert_eq!(cursors.take(), [cursor("b", 4)]);
    }

    #[test]
    fn what_was_passed_rides_with_the_cursor_also_when_that_stands() {
        let (cursors, now) = (Cursors::default(), Instant::now());
        let ahead = |end: u64| SinkProgress {
            cursor: 5,
            passed: Passed {
                ahead: vec![Ahead { lanes: Lanes::ALL, offsets: 9..end }],
                ..Passed::default()
            },
        };
        assert!(cursors.advance("a", &ahead(12), now));
        assert!(!cursors.advance("a", &ahead(15), now));
        assert_eq!(cursors.take(), [cursor("a", 5), ahead(15).passed.control("a")]);
        assert!(!cursors.advance("a", &ahead(15), now), "nothing new");
        assert!(!cursors.advance("a", &4.into(), now), "a step back");
        assert!(cursors.advance("a", &20.into(), now));
        assert_eq!(cursors.take(), [cursor("a", 20)]);
    }

    #[test]
    fn after_a_failure_every_cursor_is_carried_again() {
        let (cursors, now) = (Cursors::default(), Instant::now());
        cursors.carry_again(now);
        assert_eq!(cursors.waiting_since(), None, "there is none yet");
        cursors.advance("a", &5.into(), now);
        cursors.take();
        cursors.advance("b", &3.into(), now);
        cursors.take();
        cursors.carry_again(now);
        assert_eq!(cursors.waiting_since(), Some(now));
        assert_eq!(cursors.take(), [cursor("a", 5), cursor("b", 3)]);
    }
}
