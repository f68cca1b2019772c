//! Changes of state that ride in the next commit, whether it carries events or not.
//!
//! Invariant: changes are committed in the order in which they were submitted; a ticket is completed
//! only once the change that it came with is durable. When commits that ran ahead are void, who waits
//! for a change is told, and the others' changes are committed again, in their order.
//! Bound: none of its own. Whoever submits waits: a connection for its acks, of which it may owe so
//! many only; the downlink's follower for each of its submissions; the keeper of the sessions does
//! one round at a time.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use storage::Control;

use super::in_flight::Waiting;
use super::{GivenUp, Ticket};

/// Submitted, and not yet handed to the log.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Whether there are any: what the committer looks at in every turn.
    any: AtomicBool,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    changes: Vec<Change>,
    waiting_since: Option<Instant>,
    /// Changes for which nobody waits, by the number of a commit that is not durable yet. Bounded as
    /// those commits are.
    ahead: VecDeque<(u64, Change)>,
    /// Highest durable commit.
    durable: u64,
}

/// What belongs together, and whom to tell.
#[derive(Debug)]
pub(super) struct Change {
    controls: Vec<Control>,
    ticket: Option<Waiting>,
}

impl Changes {
    /// Takes a change. `true` if none waited before, so that the committer must learn that one does.
    pub(super) fn submit(
        &self,
        controls: Vec<Control>,
        ticket: Option<Ticket>,
        now: Instant,
    ) -> bool {
        let ticket = ticket.map(|ticket| Waiting { ticket, read_at: now });
        let mut queue = self.lock();
        queue.changes.push(Change { controls, ticket });
        let first = queue.waiting_since.is_none();
        queue.waiting_since.get_or_insert(now);
        self.any.store(true, Ordering::Release);
        first
    }

    /// Whether any change waits.
    pub(super) fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// When the oldest change that waits was submitted.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        if self.any() { self.lock().waiting_since } else { None }
    }

    /// Takes all that wait, for one commit, and appends their control records.
    pub(super) fn take(&self, controls: &mut Vec<Control>) -> Vec<Change> {
        if !self.any() {
            return Vec::new();
        }
        let mut queue = self.lock();
        queue.waiting_since = None;
        self.any.store(false, Ordering::Release);
        let changes = std::mem::take(&mut queue.changes);
        controls.extend(changes.iter().flat_map(|change| &change.controls).cloned());
        changes
    }

    /// They were handed to the log in this commit: gives the tickets.
    pub(super) fn committed(&self, commit: u64, changes: Vec<Change>, tickets: &mut Vec<Waiting>) {
        if changes.is_empty() {
            return;
        }
        let mut queue = self.lock();
        for mut change in changes {
            match change.ticket.take() {
                Some(ticket) => tickets.push(ticket),
                // The mark may have risen before the commit returned.
                None if commit > queue.durable => queue.ahead.push_back((commit, change)),
                None => {}
            }
        }
    }

    /// Commits up to this one are durable.
    pub(super) fn durable(&self, commit: u64) {
        let mut queue = self.lock();
        queue.durable = queue.durable.max(commit);
        let durable = queue.durable;
        while queue.ahead.pop_front_if(|(commit, _)| *commit <= durable).is_some() {}
    }

    /// A commit failed, and with it what ran ahead: these were in it. Those that nobody waits for come
    /// first in the next commit.
    pub(super) fn failed(&self, changes: Vec<Change>, now: Instant) {
        let ahead = std::mem::take(&mut self.lock().ahead);
        let void = ahead.into_iter().map(|(_, change)| change).chain(changes);
        let again = void.filter(|change| match &change.ticket {
            Some(waiting) => {
                waiting.ticket.mailbox.give_up(GivenUp::Failed);
                false
            }
            None => true,
        });
        self.put_back(again.collect(), now);
    }

    /// They were not committed: they come first in the next commit.
    pub(super) fn put_back(&self, mut changes: Vec<Change>, now: Instant) {
        if changes.is_empty() {
            return;
        }
        let mut queue = self.lock();
        changes.append(&mut queue.changes);
        queue.changes = changes;
        queue.waiting_since.get_or_insert(now);
        self.any.store(true, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Every change is a single step, so a panic elsewhere leaves nothing half done.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
