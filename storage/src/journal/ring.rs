//! What the threads of a journal and those who commit share: the ring, and who waits for whom.
//!
//! Invariant: nobody sleeps over something that has been done, or is to be done.
//! Deliberately absent: what is done when (`state`), and doing it (`work`).

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use redb::StorageBackend;

use super::record::{Look, Mark, Record};
use super::state::{Failure, State};
use super::{OnProgress, Options, Progress, Pump};

/// From so many bytes on a transaction is large.
const LARGE_BYTES: u64 = 512 << 10;

/// See the module.
pub(super) struct Ring {
    pub(super) number: u64,
    pub(super) file: Box<dyn StorageBackend>,
    pub(super) epoch: u64,
    pub(super) capacity: u64,
    ahead_max: usize,
    pub(super) pump: Pump,
    pub(super) on_progress: OnProgress,
    state: Mutex<State>,
    /// There is something to flush. One condition each, so that nobody is woken for nothing: a
    /// thread that only looks and sleeps again costs more than the commit that woke it.
    pub(super) queued: Condvar,
    /// A checkpoint is due.
    pub(super) due: Condvar,
    /// Something has become durable, home or free.
    done: Condvar,
}

impl Ring {
    pub(super) fn new(
        file: Box<dyn StorageBackend>,
        number: u64,
        mark: &Mark,
        options: Options,
        on_progress: OnProgress,
        state: State,
    ) -> Self {
        Self {
            number,
            file,
            epoch: mark.epoch,
            capacity: mark.capacity,
            ahead_max: options.ahead_max,
            pump: options.pump,
            on_progress,
            state: Mutex::new(state),
            queued: Condvar::new(),
            due: Condvar::new(),
            done: Condvar::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake_all(&self) {
        self.queued.notify_all();
        self.due.notify_all();
        self.done.notify_all();
    }

    /// Something has become durable, home or free.
    pub(super) fn done(&self, state: MutexGuard<'_, State>) {
        let somebody_waits = state.waiting.others > 0;
        drop(state);
        if somebody_waits {
            self.done.notify_all();
        }
    }

    pub(super) fn spawn(
        self: &Arc<Self>,
        name: &str,
        run: fn(&Self),
    ) -> io::Result<JoinHandle<()>> {
        let ring = self.clone();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Whoever waits must hear of a panic.
            let guard = FailOnPanic(&ring);
            run(&ring);
            drop(guard);
        })
    }

    /// Gives a transaction's writes their place. Does not wait.
    pub(super) fn enqueue(&self, mut record: Record) -> io::Result<()> {
        let mut state = self.lock();
        state.check()?;
        let bytes = record.ring_bytes();
        record.through = bytes.min(state.last_bytes) > LARGE_BYTES || bytes > self.capacity / 4;
        state.last_bytes = bytes;
        record.place_at(self.epoch, state.queued);
        let Some(joined) = state.files.get_mut(&record.file) else {
            return Err(io::Error::other("the journal of this file has ended"));
        };
        joined.end = record.end();
        state.queued = record.end();
        state.records.push_back(Arc::new(record));
        let flusher_waits = std::mem::take(&mut state.waiting.flusher);
        drop(state);
        if flusher_waits {
            self.queued.notify_one();
        }
        Ok(())
    }

    /// Waits until no more than the permitted number of commits wait for a sync to take them.
    pub(super) fn wait_for_room(&self) -> io::Result<()> {
        self.until(|state| state.ahead() <= self.ahead_max)
    }

    pub(super) fn drain(&self) -> io::Result<()> {
        self.until(|state| {
            state.home_wanted = state.homed != state.queued;
            !state.home_wanted
        })
    }

    pub(super) fn settle(&self) -> io::Result<()> {
        self.drain()?;
        self.until(|state| {
            state.checkpoint_wanted = state.tail != state.homed;
            !state.checkpoint_wanted
        })
    }

    /// Waits for a condition; does the work itself where there are no threads.
    fn until(&self, mut reached: impl FnMut(&mut State) -> bool) -> io::Result<()> {
        let mut state = self.lock();
        loop {
            state.check()?;
            if reached(&mut state) {
                return Ok(());
            }
            match self.pump {
                Pump::Threads => {
                    if state.home_wanted {
                        self.queued.notify_one();
                    }
                    if state.checkpoint_due(self.capacity) {
                        self.due.notify_one();
                    }
                    state.waiting.others += 1;
                    state = wait(&self.done, state);
                    state.waiting.others -= 1;
                }
                #[cfg(test)]
                Pump::ByHand => {
                    drop(state);
                    if !self.flush()? && !self.bring_home()? {
                        self.checkpoint()?;
                    }
                    state = self.lock();
                }
            }
        }
    }

    /// A home file was closed, after its last record.
    pub(super) fn closed(&self, first: u64) {
        if let Some(joined) = self.lock().files.get_mut(&first) {
            joined.closed = true;
        }
    }

    /// What the records on their way home say of a range of a file, the last first.
    pub(super) fn look(&self, file: u64, offset: u64, out: &mut [u8]) -> Look {
        let state = self.lock();
        let records = state.records.iter().rev().filter(|record| record.file == file);
        records
            .map(|record| record.look(offset, out))
            .find(|look| *look != Look::Nothing)
            .unwrap_or(Look::Nothing)
    }

    /// Reads a range from the home file and puts over it what is on its way there.
    pub(super) fn merge(
        &self,
        file: u64,
        offset: u64,
        out: &mut [u8],
        read_home: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        // Held while it reads: what is home a moment later is not in the records any more.
        let state = self.lock();
        read_home(out)?;
        let records = state.records.iter().filter(|record| record.file == file);
        records.for_each(|record| record.apply(offset, out));
        Ok(())
    }

    pub(super) fn spare(&self) -> Vec<u8> {
        self.lock().spare.pop().unwrap_or_default()
    }

    /// Stops for good.
    pub(super) fn fail(&self, what: &str, error: &io::Error, home: bool) -> io::Error {
        let failure = Failure { kind: error.kind(), reason: format!("{what}: {error}"), home };
        {
            let mut state = self.lock();
            match &mut state.failed {
                Some(failed) => failed.home |= home,
                failed => *failed = Some(failure.clone()),
            }
        }
        self.wake_all();
        (self.on_progress)(Progress::Failed);
        failure.error()
    }
}

pub(super) fn wait<'a>(condition: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condition.wait(state).unwrap_or_else(PoisonError::into_inner)
}

struct FailOnPanic<'a>(&'a Ring);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail("the journal's thread panicked", &io::Error::other("a bug"), true);
        }
    }
}
