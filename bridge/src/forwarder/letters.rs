//! The dead letters of a sink, from the forwarder's side: made durable, looked through, settled.
//!
//! Owns: when to ask the store for what, one job of each kind at a time on the blocking pool, and what
//! its answers mean for `streams` and `requeue`.
//! Deliberately absent: what becomes a dead letter (`delivery`), and what is delivered again (`requeue`).

use std::time::{Duration, Instant};

use storage::{KeptLetter, Loss, StateError, Store};

use super::Task;
use crate::delivery::{Moment, Trouble};
use crate::parked::Found;
use crate::requeue::Settlement;
use crate::sink::Sink;
use crate::streams::Key;

/// Dead letters that are looked at at once.
const SEARCH_LETTERS: usize = 1_000;
/// Pause after a look that failed.
const SEARCH_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// When to look through the dead letters for what is parked: at the start, and whenever they may have
/// changed by other hands.
#[derive(Debug)]
pub(super) struct Search {
    /// As soon as the store may be asked.
    pub(super) is_due: bool,
    /// Not before: the store has failed.
    pub(super) not_before: Option<Instant>,
}

impl Default for Search {
    fn default() -> Self {
        Self { is_due: true, not_before: None }
    }
}

/// What became of dead letters that were to be written: what their bound has dropped for them.
pub(super) type Written = Result<Vec<Loss>, StateError>;

impl<S: Sink> Task<S> {
    /// Reads the marked letters of the next pass, if one is wanted.
    pub(super) fn look_for_requeued(&mut self, now: Moment) {
        if self.looking.is_some() || self.settling.is_some() || !self.requeue.wants_letters(now) {
            return;
        }
        let (store, sink) = (self.store.clone(), self.name.clone());
        let (events_max, bytes_max) = (self.limits.read_events_max(), self.limits.read_bytes_max());
        self.requeue.looking();
        self.looking =
            Some(tokio::task::spawn_blocking(move || store.requeued(&sink, events_max, bytes_max)));
    }

    /// The marked letters of a pass were read.
    pub(super) fn has_looked(&mut self, letters: Result<Vec<KeptLetter>, StateError>) {
        match letters {
            Ok(letters) => self.requeue.push(letters),
            Err(error) => self.requeue_failed(error.to_string()),
        }
    }

    /// Looks for what is parked, if that is due.
    pub(super) fn look_for_parked(&mut self, now: Moment) {
        let Some(parked) = self.streams.parked() else { return };
        let may = self.search.not_before.is_none_or(|at| now.at >= at);
        if !self.search.is_due || self.searching.is_some() || !may {
            return;
        }
        parked.looking();
        self.search = Search { is_due: false, not_before: None };
        let (store, sink) = (self.store.clone(), self.name.clone());
        self.searching = Some(tokio::task::spawn_blocking(move || search(&store, &sink, now)));
    }

    /// All dead letters were looked through.
    pub(super) fn has_searched(&mut self, found: Result<Found, StateError>) {
        match found {
            Ok(found) => {
                self.streams.looked(&found);
                self.requeue.wake();
            }
            Err(error) => {
                let now = Moment::now();
                self.report.complain(&Trouble::Store(error.to_string()), now);
                self.search =
                    Search { is_due: true, not_before: Some(now.at + SEARCH_AGAIN_AFTER) };
            }
        }
    }

    /// Writes down what has come of requeued letters, if something has.
    pub(super) fn settle_requeued(&mut self, now: Moment) {
        if self.settling.is_some() {
            return;
        }
        let Some(settlement) = self.requeue.settlement(now) else { return };
        let (store, sink) = (self.store.clone(), self.name.clone());
        self.settling = Some(tokio::task::spawn_blocking(move || {
            let Settlement { delivered, refused } = &settlement;
            let result = store.settle_requeued(&sink, delivered, refused);
            (settlement, result)
        }));
    }

    /// That was written, or not.
    pub(super) fn has_settled(&mut self, settlement: &Settlement, result: Result<(), StateError>) {
        match result {
            Ok(()) => {
                self.report.settled(settlement, Moment::now());
                self.requeue.settled(settlement);
                self.search.is_due = true;
            }
            Err(error) => self.requeue_failed(error.to_string()),
        }
    }

    fn requeue_failed(&mut self, reason: String) {
        let now = Moment::now();
        self.report.complain(&Trouble::Store(reason.clone()), now);
        self.requeue.store_failed(reason, now, fastrand::f64());
    }

    /// Writes the dead letters that a stream has now, if one has.
    pub(super) fn write_letters(&mut self, now: Moment) {
        if self.writing.is_some() {
            return;
        }
        let Some((key, letters)) = self.streams.letters(now) else { return };
        self.report.dead_letters(letters, now);
        let (store, letters) = (self.store.clone(), letters.to_vec());
        self.writing = Some(tokio::task::spawn_blocking(move || {
            (key, letters.len(), store.put_dead_letters(&letters))
        }));
    }

    /// They were written, or not.
    pub(super) fn has_written(&mut self, key: Key, count: usize, result: Written) {
        match result {
            Ok(dropped) => {
                self.report.dropped_letters(&dropped, Moment::now());
                self.streams.letters_written(key, count);
                // What is held back behind nothing any more is to go, too.
                self.search.is_due |= !dropped.is_empty() || self.streams.waits_for_parked();
            }
            Err(error) => self.store_failed(key, error.to_string()),
        }
    }
}

/// Looks through the dead letters of a sink, and marks what is held back behind nothing any more to be
/// delivered.
fn search(store: &Store, sink: &str, now: Moment) -> Result<Found, StateError> {
    let (mut found, mut from) = (Found::default(), 0);
    loop {
        let letters = store.dead_letters(sink, from, SEARCH_LETTERS)?;
        found.add(&letters);
        match letters.last() {
            Some(last) if letters.len() == SEARCH_LETTERS => from = last.letter.event.offset + 1,
            _ => break,
        }
    }
    let mut from = found.frees_some().then_some(0);
    while let Some(at) = from {
        from = store.requeue(sink, at, &|letter| found.frees(letter), now.unix_us)?.next;
    }
    Ok(found)
}
