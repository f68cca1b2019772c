//! How far the log is durable, and the state as of there.
//!
//! Owns: the [`Mark`], the tail at the mark, and the [`Projection`] that the control records up to
//! it have made. Commits enter in their order and wait here until the log has them on disk, which it
//! says by a place (see `journal`).
//! Invariant: nothing of a commit is seen before it is durable, and then all of it at once.
//! Lock order: what is durable, then the projection; neither is held while the log is asked.

use std::collections::VecDeque;
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};

use bytes::Bytes;

use super::Mark;
use crate::Control;
use crate::clock::{self, Boots};
use crate::cursor::Cursors;
use crate::head::Tail;
use crate::state::Changes;

/// See the module.
#[derive(Default)]
pub(super) struct Progress {
    durable: Mutex<Durable>,
    projection: RwLock<Projection>,
    pub(super) on_durable: OnceLock<Box<dyn Fn(Mark) + Send + Sync>>,
    pub(super) on_failure: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// What is durable, and what is about to be.
#[derive(Default)]
pub(super) struct Durable {
    pub(super) mark: Mark,
    pub(super) tail: Tail,
    /// How far the log has said that it is durable.
    place: u64,
    pub(super) ahead: VecDeque<Ahead>,
}

/// A commit that the log has taken.
pub(super) struct Ahead {
    /// Durable once the log is, up to here.
    pub(super) place: u64,
    pub(super) mark: Mark,
    pub(super) tail: Tail,
    pub(super) control: Vec<Control>,
}

/// State as of the last durable commit: the checkpoint, and what came after it.
#[derive(Default)]
pub(super) struct Projection {
    /// First stored offset.
    pub(super) start: u64,
    pub(super) cursors: Cursors,
    /// What is known of the clocks.
    pub(super) boots: Boots,
    /// What changed since the checkpoint.
    changes: Changes,
    pub(super) change_bytes: usize,
    /// What the checkpoint that is being written takes over.
    saving: Arc<Changes>,
}

impl Projection {
    pub(super) fn apply(&mut self, control: Control) {
        let (namespace, key, value) = match control {
            Control::Cursor { sink, offset } => return self.cursors.advance(&sink, offset),
            Control::Put { namespace, key, value } => (namespace, key, Some(value)),
            Control::Delete { namespace, key } => (namespace, key, None),
        };
        if namespace == clock::NAMESPACE {
            self.boots.apply(&key, value.as_ref());
        }
        self.change_bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
        self.changes.insert((namespace, key), value);
    }

    /// What has become of a key since the checkpoint; nothing if that is as it was.
    pub(super) fn changed(&self, namespace: u16, key: &[u8]) -> Option<&Option<Bytes>> {
        let key = (namespace, Bytes::copy_from_slice(key));
        self.changes.get(&key).or_else(|| self.saving.get(&key))
    }

    /// Every key of a namespace that has changed since the checkpoint, with what became of it.
    pub(super) fn changes_in(
        &self,
        namespace: u16,
    ) -> impl Iterator<Item = (&Bytes, &Option<Bytes>)> {
        // The later ones come last: they win.
        let both = self.saving.iter().chain(&self.changes);
        both.filter(move |((of, _), _)| *of == namespace).map(|((_, key), value)| (key, value))
    }
}

impl Progress {
    /// Where the log ends when it was opened.
    pub(super) fn begin(&self, tail: Tail) {
        let mut durable = self.durable();
        durable.mark.watermark = tail.position.offset;
        durable.tail = tail;
    }

    /// How far the log is durable. A copy: whoever held on to what is durable while waiting for the
    /// log would keep the journal from telling it more, and the log may be waiting for that.
    pub(super) fn mark(&self) -> Mark {
        self.durable().mark
    }

    /// The tail as of there; a copy for the same reason.
    pub(super) fn tail(&self) -> Tail {
        self.reached().1
    }

    /// Both, as of the same moment.
    pub(super) fn reached(&self) -> (Mark, Tail) {
        let durable = self.durable();
        (durable.mark, durable.tail.clone())
    }

    /// Commits that are not durable yet.
    #[cfg(test)]
    pub(super) fn ahead(&self) -> usize {
        self.durable().ahead.len()
    }

    fn durable(&self) -> MutexGuard<'_, Durable> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn projection(&self) -> RwLockReadGuard<'_, Projection> {
        self.projection.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn projection_mut(&self) -> RwLockWriteGuard<'_, Projection> {
        self.projection.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log has taken a commit, which may be durable already.
    pub(super) fn committed(&self, ahead: Ahead) {
        self.release(|durable| durable.ahead.push_back(ahead));
    }

    /// The log is durable up to a place.
    pub(super) fn advance(&self, place: u64) {
        self.release(|durable| durable.place = place);
    }

    /// The log has given up what is not durable: gives the tail to go on from. No
    /// [`Progress::advance`] may follow for a place before that.
    pub(super) fn void_ahead(&self) -> Tail {
        let mut durable = self.durable();
        durable.ahead.clear();
        durable.tail.clone()
    }

    fn release(&self, change: impl FnOnce(&mut Durable)) {
        let risen = {
            let mut durable = self.durable();
            change(&mut durable);
            let before = durable.mark;
            let place = durable.place;
            while let Some(ahead) = durable.ahead.pop_front_if(|ahead| ahead.place <= place) {
                if !ahead.control.is_empty() {
                    let mut projection = self.projection_mut();
                    ahead.control.into_iter().for_each(|control| projection.apply(control));
                }
                (durable.mark, durable.tail) = (ahead.mark, ahead.tail);
            }
            (durable.mark != before).then_some(durable.mark)
        };
        if let (Some(mark), Some(callback)) = (risen, self.on_durable.get()) {
            callback(mark);
        }
    }

    /// What a checkpoint of a log that starts at `start` has to say. End with [`Progress::saved`].
    pub(super) fn save(&self) -> (Tail, Cursors, Arc<Changes>) {
        let durable = self.durable();
        let mut projection = self.projection_mut();
        // A checkpoint that failed has left its changes here; the later ones win.
        let mut changes = Arc::unwrap_or_clone(std::mem::take(&mut projection.saving));
        changes.extend(std::mem::take(&mut projection.changes));
        projection.saving = Arc::new(changes);
        (durable.tail.clone(), projection.cursors.clone(), projection.saving.clone())
    }

    /// The checkpoint is durable; what was trimmed by it starts at `start`, and `pass` moves the
    /// cursors over what their sinks have lost.
    pub(super) fn saved(&self, start: u64, pass: impl FnOnce(&mut Cursors)) {
        let mut projection = self.projection_mut();
        projection.start = start;
        pass(&mut projection.cursors);
        projection.saving = Arc::default();
        projection.change_bytes = projection
            .changes
            .iter()
            .map(|((_, key), value)| key.len() + value.as_ref().map_or(0, Bytes::len))
            .sum();
    }
}
