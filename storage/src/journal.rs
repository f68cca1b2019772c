//! The pipelined journal: commits that do not wait for their sync.
//!
//! redb syncs its file at the end of every commit, and waits. Here the active log file of the store
//! lies over a [`HomeFile`] whose sync does not: it packs what the transaction wrote into one
//! checksummed record, queues it and lets redb go on. One thread (`flush`) appends whatever is
//! queued to the *ring*, a file whose blocks are written over and over, with **one** sync, and tells
//! who waits that this much is durable. Only after that it writes the pages to the home file, without
//! a sync, and those of some commits together. Another thread (`checkpoint`) syncs the home files when
//! half of the ring is in use, and has a *mark* written that frees it. So a commit costs one write to
//! blocks that exist and a share of a sync; no ack waits for a checkpoint.
//!
//! # Why it is safe
//!
//! Say that records 0 to *d* are durable: a sync of the ring has covered them. Acks, readers and
//! cursors follow *d*, never redb's own idea of what it has committed.
//!
//! 1. *A home file holds nothing of a record beyond d*: it is written home after its sync. (For large
//!    transactions see below.)
//! 2. *The ring holds every record that a home file may lack*: a record's blocks are written anew
//!    only after a mark behind it is durable, and that mark is written after a sync of every home
//!    file that had been written before.
//! 3. *Replaying from the mark gives the state after a whole record*: what a power cut made of the
//!    pages that were on their way home is overwritten, as by (1) each of them is in a record at or
//!    behind the mark; what comes behind the last whole record was never home.
//! 4. Records are told from what lay in the ring before by their place, the ring's epoch and a
//!    checksum. They are whole or they are not there: replay ends at the first that is not, which
//!    is at or beyond *d*, as a sync covers all that was appended before it.
//!
//! So after any cut the home file is what some commit at or beyond *d* left: nothing that was acked
//! is missing, and nothing is there by half. Replay can be cut short and begun again, as it only
//! writes what is in the ring, which it leaves alone until the home files are synced.
//!
//! # Large transactions
//!
//! What is large goes home by itself (`write_through`): a second copy would cost more than it saves. The
//! thread that flushes does it in the record's turn, once nothing is left to replay: everything before is
//! home and synced, and a mark says so. The record has its place in the stream and no bytes in the ring.
//! Until its own sync has come back it is not durable, and a power cut leaves its pages at home in part:
//! redb wrote them where the state before has none, and makes a commit atomic by checksums of its own; and
//! what the transaction cuts off the file stays until after that sync. As the ring has nothing behind that mark, a cut replays nothing over it. What follows in the ring
//! comes with a mark that says where it begins, under the same sync: before that, there is nothing
//! behind the old mark that a replay could find.
//!
//! # When something fails
//!
//! After a failed sync of the ring, what it covered may be lost even if it reads back well; after a
//! failed sync of a home file, the ring has the only sure copy. Either way this journal stops for
//! good: nothing more is written to it or to its home files, and the log goes on in a new file over
//! a new ring (see `log`). The old ring is kept until its home files are known to be synced.
//!
//! # Bounds
//!
//! The ring has a fixed size. At most [`Options::ahead_max`] commits are queued when a commit returns,
//! behind those that a sync has taken, which are one more at most: so a commit is durable with the
//! sync after the one under way. Memory: the records that are not home yet, which are all those and
//! 256 KB that wait to be written home, and 2 MB of room for the next ones.
//! Of large transactions, the first in a row goes through the ring, unless it would fill a quarter of it:
//! a single one is not worth the wait until nothing is left to replay.
//!
//! # Code map
//! - `home`: a log file under redb, and `homeward`, what of it is written home together.
//! - `record`: what is in the ring. `ring`: the ring, and who waits for whom; `state`: how far it has
//!   come, and what is next; `work`: the two threads that do it.
//! - `replay`: what a start finds.
//!
//! Deliberately absent: what the pages mean.

mod home;
mod homeward;
mod record;
mod replay;
mod ring;
mod state;
mod work;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use redb::StorageBackend;

pub(crate) use self::home::{HomeBackend, HomeFile};
use self::record::{BLOCK_BYTES, DATA_START, Mark};
pub(crate) use self::replay::{Rings, recover, replaced};
use self::ring::Ring;
use self::state::{Failure, Joined, State};
use crate::disk::SharedDisk;

/// The smallest ring: it must take a small transaction in a quarter.
const RING_BYTES_MIN: u64 = 128 << 10;

/// A disk that syncs one block faster than this does not gain by a journal: what it saves is less
/// than the second copy costs. Memory and controllers with a battery are like that.
const WORTH_SYNC: Duration = Duration::from_micros(20);

/// How a journal works.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Bytes of the ring.
    pub(crate) ring_bytes: u64,
    /// Commits that may be queued when a commit returns, behind those that are being synced.
    pub(crate) ahead_max: usize,
    /// Who does the work.
    pub(crate) pump: Pump,
}

/// Who flushes and checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pump {
    /// Two threads of the journal's own.
    Threads,
    /// Whoever waits, and tests that choose the moment.
    #[cfg(test)]
    ByHand,
}

/// What a journal tells, from any of its threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Everything before this place is durable.
    Durable(u64),
    /// It has failed for good; nothing more becomes durable.
    Failed,
}

/// Hears what a journal tells.
pub(crate) type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// A journal over one ring.
pub(crate) struct Journal {
    ring: Arc<Ring>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Journal {
    /// Begins a journal in a new ring, or in one whose records are all replayed. Places go on from
    /// `place`, so that those of one process never go back.
    pub(crate) fn begin(
        file: Box<dyn StorageBackend>,
        number: u64,
        epoch: u64,
        place: u64,
        options: Options,
        on_progress: OnProgress,
    ) -> io::Result<Self> {
        let capacity = options.ring_bytes.max(RING_BYTES_MIN).next_multiple_of(BLOCK_BYTES);
        let before = replay::last_mark(&*file)?;
        let mark =
            Mark { epoch, number: before.map_or(0, |mark| mark.number + 1), place, capacity };
        let mut ring_len = file.len()?;
        if ring_len < DATA_START || ring_len > DATA_START + capacity {
            ring_len = ring_len.clamp(DATA_START, DATA_START + capacity);
            file.set_len(ring_len)?;
        }
        file.write(mark.slot(), &mark.encode())?;
        file.sync_data()?;
        let state = State::new(&mark, ring_len);
        let ring = Arc::new(Ring::new(file, number, &mark, options, on_progress, state));
        let threads = match options.pump {
            Pump::Threads => vec![
                ring.spawn("journal", Ring::flush_on)?,
                ring.spawn("journal-home", Ring::checkpoint_on)?,
            ],
            #[cfg(test)]
            Pump::ByHand => Vec::new(),
        };
        Ok(Self { ring, threads: Mutex::new(threads) })
    }

    /// Number of its ring.
    fn number(&self) -> u64 {
        self.ring.number
    }

    /// The ring's file.
    pub(crate) fn path(&self) -> String {
        replay::path(self.ring.number)
    }

    /// Writes of this home file go through the journal from now on, under its first offset.
    pub(crate) fn join(
        &self,
        disk: &SharedDisk,
        first: u64,
        home: &Arc<HomeFile>,
    ) -> io::Result<()> {
        home.join(disk.clone(), first, self.ring.clone())?;
        let mut state = self.ring.lock();
        let joined = Joined { home: home.clone(), end: state.queued, closed: false };
        let before = state.files.insert(first, joined);
        assert!(before.is_none_or(|before| before.closed), "a home file is open once");
        Ok(())
    }

    /// End of what was queued: durable once [`Progress::Durable`] has come so far.
    pub(crate) fn queued(&self) -> u64 {
        self.ring.lock().queued
    }

    /// Whether nothing of a home file that was closed is left in the ring.
    pub(crate) fn has_let_go(&self, first: u64) -> bool {
        let state = self.ring.lock();
        !state.files.contains_key(&first) && state.tail == state.marked
    }

    /// Why it has failed, if it has.
    pub(crate) fn failure(&self) -> Option<io::Error> {
        self.ring.lock().failed.as_ref().map(Failure::error)
    }

    /// Waits until everything that was queued is durable and home.
    pub(crate) fn drain(&self) -> io::Result<()> {
        self.ring.drain()
    }

    /// As [`Journal::drain`], and until it is synced there: nothing is left to replay.
    pub(crate) fn checkpoint(&self) -> io::Result<()> {
        self.ring.settle()
    }

    /// Ends the threads, once they have done what is queued. No progress is told after it.
    pub(crate) fn halt(&self) {
        self.ring.lock().stopping = true;
        self.ring.wake_all();
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // One that panicked has marked the journal as failed.
            let _ = thread.join();
        }
    }

    /// After a failure and [`Journal::halt`]: syncs the home files, and says whether they now hold
    /// everything that is durable, so that the ring may go.
    pub(crate) fn is_home(&self) -> bool {
        let homes: Vec<Arc<HomeFile>> = {
            let state = self.ring.lock();
            if state.failed.as_ref().is_some_and(|failure| failure.home)
                || state.homed != state.durable
            {
                return false;
            }
            state.files.values().map(|joined| joined.home.clone()).collect()
        };
        homes.iter().all(|home| home.sync().is_ok())
    }

    /// Does one of the journal's jobs at a moment that a test chose.
    #[cfg(test)]
    pub(crate) fn step(&self, checkpoint: bool) -> io::Result<()> {
        if checkpoint {
            self.ring.checkpoint()
        } else if !self.ring.flush()? {
            self.ring.bring_home().map(drop)
        } else {
            Ok(())
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if self.ring.pump == Pump::Threads {
            self.halt();
        }
        // The files know the ring, and the ring the files.
        self.ring.lock().files.clear();
    }
}

/// Whether a journal would gain on this disk: times the sync of one block that exists.
pub(crate) fn pays(file: &dyn StorageBackend) -> io::Result<bool> {
    const ROUNDS: usize = 9;
    file.set_len(DATA_START + BLOCK_BYTES)?;
    let block = [0; BLOCK_BYTES as usize];
    let mut times = Vec::new();
    for _ in 0..=ROUNDS {
        let began = Instant::now();
        file.write(DATA_START, &block)?;
        file.sync_data()?;
        times.push(began.elapsed());
    }
    // The first has made the block.
    let times = &mut times[1..];
    times.sort_unstable();
    Ok(times[ROUNDS / 2] >= WORTH_SYNC)
}
