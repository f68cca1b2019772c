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
//! Deliberately absent: what the pages mean.

mod home;
mod homeward;
mod record;
mod replay;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use redb::StorageBackend;

pub(crate) use self::home::{HomeBackend, HomeFile};
use self::homeward::Homeward;
use self::record::{BLOCK_BYTES, DATA_START, Look, Mark, Record};
pub(crate) use self::replay::{Rings, recover, replaced};
use crate::disk::SharedDisk;

/// The smallest ring: it must take a small transaction in a quarter.
const RING_BYTES_MIN: u64 = 128 << 10;

/// So much that is durable may wait to be written home: it goes together, see `homeward`. More would
/// save little, and the next sync waits for it.
const HOMEWARD_BYTES_MAX: u64 = 256 << 10;

/// From so many bytes on a transaction is large.
const LARGE_BYTES: u64 = 512 << 10;

/// So much room of records that are done is kept for the next ones: memory that is given back and taken
/// again costs more than what is written to it.
const SPARE_BYTES_MAX: usize = 2 << 20;

/// When nothing is queued for so long, it does not wait for more.
const HOMEWARD_IDLE: Duration = Duration::from_millis(2);

/// The ring's file grows by so much at a time while it goes round for the first time.
const GROWTH_BYTES: u64 = 1 << 20;

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

/// What the threads share.
struct Ring {
    number: u64,
    file: Box<dyn StorageBackend>,
    epoch: u64,
    capacity: u64,
    ahead_max: usize,
    pump: Pump,
    on_progress: OnProgress,
    state: Mutex<State>,
    /// There is something to flush. One condition each, so that nobody is woken for nothing: a
    /// thread that only looks and sleeps again costs more than the commit that woke it.
    queued: Condvar,
    /// A checkpoint is due.
    due: Condvar,
    /// Something has become durable, home or free.
    done: Condvar,
}

/// Places in the stream of records rise: `tail <= marked <= homed <= durable <= taken <= queued`.
struct State {
    /// What is before has no room in the ring any more.
    tail: u64,
    /// What is before is home and synced; a mark says so, or is about to.
    marked: u64,
    /// What is before is home.
    homed: u64,
    /// What is before is in the ring and synced.
    durable: u64,
    /// What is before is in the ring, or is being written there.
    taken: u64,
    queued: u64,
    /// From `homed` to `queued`.
    records: VecDeque<Arc<Record>>,
    /// Home files that have not been synced since they were last written, by first offset.
    files: BTreeMap<u64, Joined>,
    /// To be written by the next flush.
    mark: Option<Mark>,
    marks: u64,
    /// What the last mark says, in the ring or about to be.
    said: u64,
    /// Bytes of the last record.
    last_bytes: u64,
    /// Length of the ring's file.
    ring_len: u64,
    /// Somebody waits for everything to be home.
    home_wanted: bool,
    /// Somebody waits for everything to be home and synced.
    checkpoint_wanted: bool,
    stopping: bool,
    waiting: Waiting,
    failed: Option<Failure>,
    /// Room of records that are done, to be used again.
    spare: Vec<Vec<u8>>,
}

/// Who has to be woken: waking nobody costs a call of the system all the same.
#[derive(Default)]
struct Waiting {
    /// The thread that flushes has nothing to do.
    flusher: bool,
    /// Threads that wait for something to be done.
    others: usize,
}

struct Joined {
    home: Arc<HomeFile>,
    /// End of its last record.
    end: u64,
    closed: bool,
}

#[derive(Clone, Debug)]
struct Failure {
    kind: io::ErrorKind,
    reason: String,
    /// A home file may lack what the ring has.
    home: bool,
}

impl Failure {
    fn error(&self) -> io::Error {
        io::Error::new(self.kind, self.reason.clone())
    }
}

impl State {
    fn check(&self) -> io::Result<()> {
        self.failed.as_ref().map_or(Ok(()), |failure| Err(failure.error()))
    }

    /// How many records are durable and not home yet: the first ones.
    fn homeward(&self) -> usize {
        self.records.partition_point(|record| record.place < self.durable)
    }

    /// Records that no sync has taken.
    fn ahead(&self) -> usize {
        self.records.len() - self.records.partition_point(|record| record.place < self.taken)
    }

    /// What the next flush can take: the records that are not durable and fit into the ring, up to one
    /// that goes through.
    fn to_flush(&self, capacity: u64) -> Range<usize> {
        let first = self.homeward();
        let fits = |record: &&Arc<Record>| !record.through && record.end() - self.tail <= capacity;
        first..first + self.records.range(first..).take_while(fits).count()
    }

    /// The next record, if that is one that goes through.
    fn through(&self) -> Option<&Arc<Record>> {
        self.records.get(self.homeward()).filter(|record| record.through)
    }

    /// The same, if its time has come: nothing before it is left to replay.
    fn to_write_through(&self) -> Option<&Arc<Record>> {
        self.through().filter(|record| record.place == self.tail)
    }

    fn can_flush(&self, capacity: u64) -> bool {
        self.mark.is_some()
            || !self.to_flush(capacity).is_empty()
            || self.to_write_through().is_some()
    }

    /// Has the next flush write a mark that says where the tail is going to be.
    fn mark(&mut self, epoch: u64, capacity: u64, place: u64) {
        self.marks += 1;
        self.said = place;
        self.mark = Some(Mark { epoch, number: self.marks, place, capacity });
    }

    /// Whether what is durable has to go home before anything else is done.
    fn home_due(&self, capacity: u64) -> bool {
        let waiting_bytes = self.durable - self.homed;
        let bytes_max = HOMEWARD_BYTES_MAX.min(capacity / 8);
        waiting_bytes > bytes_max || self.home_wanted && waiting_bytes > 0
    }

    fn checkpoint_due(&self, capacity: u64) -> bool {
        let due = self.homed - self.marked > capacity / 2;
        let wanted = self.checkpoint_wanted || self.through().is_some();
        due || wanted && self.homed > self.marked
    }
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
        let state = State {
            tail: place,
            marked: place,
            homed: place,
            durable: place,
            taken: place,
            queued: place,
            records: VecDeque::new(),
            files: BTreeMap::new(),
            mark: None,
            marks: mark.number,
            said: place,
            last_bytes: 0,
            ring_len,
            home_wanted: false,
            checkpoint_wanted: false,
            stopping: false,
            waiting: Waiting::default(),
            failed: None,
            spare: Vec::new(),
        };
        let ring = Arc::new(Ring {
            number,
            file,
            epoch,
            capacity,
            ahead_max: options.ahead_max,
            pump: options.pump,
            on_progress,
            state: Mutex::new(state),
            queued: Condvar::new(),
            due: Condvar::new(),
            done: Condvar::new(),
        });
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

impl Ring {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_all(&self) {
        self.queued.notify_all();
        self.due.notify_all();
        self.done.notify_all();
    }

    /// Something has become durable, home or free.
    fn done(&self, state: MutexGuard<'_, State>) {
        let somebody_waits = state.waiting.others > 0;
        drop(state);
        if somebody_waits {
            self.done.notify_all();
        }
    }

    fn spawn(self: &Arc<Self>, name: &str, run: fn(&Self)) -> io::Result<JoinHandle<()>> {
        let ring = self.clone();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Whoever waits must hear of a panic.
            let guard = FailOnPanic(&ring);
            run(&ring);
            drop(guard);
        })
    }

    /// Gives a transaction's writes their place. Does not wait.
    fn enqueue(&self, mut record: Record) -> io::Result<()> {
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
    fn wait_for_room(&self) -> io::Result<()> {
        self.until(|state| state.ahead() <= self.ahead_max)
    }

    fn drain(&self) -> io::Result<()> {
        self.until(|state| {
            state.home_wanted = state.homed != state.queued;
            !state.home_wanted
        })
    }

    fn settle(&self) -> io::Result<()> {
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

    /// The thread that writes the ring, and home what is durable if there is nothing else to do.
    fn flush_on(&self) {
        let mut idle = false;
        loop {
            let mut state = self.lock();
            let homeward = state.durable > state.homed;
            let done = if state.failed.is_some() {
                return;
            } else if state.home_due(self.capacity) {
                drop(state);
                self.bring_home()
            } else if state.can_flush(self.capacity) {
                drop(state);
                idle = false;
                self.flush()
            } else if homeward && (idle || state.stopping || state.durable < state.queued) {
                drop(state);
                self.bring_home()
            } else if state.checkpoint_due(self.capacity) && state.through().is_some() {
                state.waiting.flusher = true;
                self.due.notify_one();
                drop(wait(&self.queued, state));
                continue;
            } else if state.stopping && state.records.is_empty() {
                return;
            } else if homeward {
                state.waiting.flusher = true;
                let waited = self.queued.wait_timeout(state, HOMEWARD_IDLE);
                idle = waited.unwrap_or_else(PoisonError::into_inner).1.timed_out();
                continue;
            } else {
                state.waiting.flusher = true;
                drop(wait(&self.queued, state));
                continue;
            };
            if done.is_err() {
                return;
            }
        }
    }

    /// The thread that syncs home files.
    fn checkpoint_on(&self) {
        loop {
            let mut state = self.lock();
            while !state.checkpoint_due(self.capacity) {
                // The other thread may need room to finish.
                let done = state.stopping && state.records.is_empty();
                if done || state.failed.is_some() {
                    return;
                }
                state = wait(&self.due, state);
            }
            drop(state);
            if self.checkpoint().is_err() {
                return;
            }
        }
    }

    /// Makes durable what is queued, with one sync. Says whether there was anything that it could
    /// do. Only one thread at a time does this.
    fn flush(&self) -> io::Result<bool> {
        let (records, mark, ring_len) = {
            let mut state = self.lock();
            state.check()?;
            if let Some(record) = state.to_write_through().cloned() {
                drop(state);
                return self.write_through(&record).map(|()| true);
            }
            let records: Vec<_> =
                state.records.range(state.to_flush(self.capacity)).cloned().collect();
            if !records.is_empty() && state.said < state.tail {
                // What went through has left the old mark behind.
                let tail = state.tail;
                state.mark(self.epoch, self.capacity, tail);
            }
            let (mark, ring_len) = (state.mark.take(), state.ring_len);
            if let Some(last) = records.last() {
                state.taken = last.end();
                // There is room for the next ones.
                self.done(state);
            }
            (records, mark, ring_len)
        };
        if records.is_empty() && mark.is_none() {
            return Ok(false);
        }
        let ring_len = self
            .append(&records, mark, ring_len)
            .map_err(|error| self.fail("writing the journal failed", &error, false))?;
        {
            let mut state = self.lock();
            state.ring_len = ring_len;
            if let Some(mark) = mark {
                state.tail = mark.place;
            }
            if let Some(last) = records.last() {
                state.durable = last.end();
            }
            self.done(state);
        }
        if let Some(last) = records.last() {
            (self.on_progress)(Progress::Durable(last.end()));
        }
        Ok(true)
    }

    /// Makes a record durable at home: see the module. Only the thread that flushes does this.
    fn write_through(&self, record: &Arc<Record>) -> io::Result<()> {
        let home = {
            let mut state = self.lock();
            state.taken = record.end();
            let home = state.files[&record.file].home.clone();
            self.done(state);
            home
        };
        home.write_through(record)
            .map_err(|error| self.fail("writing a log file failed", &error, true))?;
        let mut state = self.lock();
        state.records.pop_front();
        let end = record.end();
        (state.tail, state.marked, state.homed, state.durable) = (end, end, end, end);
        state.files.retain(|_, joined| !joined.closed || joined.end > end);
        self.done(state);
        (self.on_progress)(Progress::Durable(end));
        Ok(())
    }

    /// Writes home what is durable. Says whether there was anything. Only one thread at a time does
    /// this.
    fn bring_home(&self) -> io::Result<bool> {
        let records: Vec<_> = {
            let state = self.lock();
            state.check()?;
            state.records.range(..state.homeward()).cloned().collect()
        };
        let Some(last) = records.last() else {
            return Ok(false);
        };
        let homed = last.end();
        for records in records.chunk_by(|one, next| one.file == next.file) {
            let home = self.lock().files[&records[0].file].home.clone();
            home.bring_home(&Homeward::of(records))
                .map_err(|error| self.fail("writing a log file failed", &error, true))?;
        }
        let mut state = self.lock();
        state.records.drain(..records.len());
        state.homed = homed;
        let mut spare_bytes: usize = state.spare.iter().map(Vec::capacity).sum();
        for bytes in records.into_iter().filter_map(Arc::into_inner).map(Record::into_bytes) {
            spare_bytes += bytes.capacity();
            if spare_bytes > SPARE_BYTES_MAX && !state.spare.is_empty() {
                break;
            }
            state.spare.push(bytes);
        }
        // At the end the other thread waits for the last record.
        let due = state.checkpoint_due(self.capacity) || state.stopping;
        self.done(state);
        if due {
            self.due.notify_one();
        }
        Ok(true)
    }

    /// Writes records and a mark into the ring, and syncs it. Gives the length of its file.
    fn append(&self, records: &[Arc<Record>], mark: Option<Mark>, len: u64) -> io::Result<u64> {
        let mut ring_len = len;
        for record in records {
            let mut bytes = record.bytes();
            let mut place = record.place;
            while !bytes.is_empty() {
                let at = place % self.capacity;
                let (now, later) = bytes.split_at(bytes.len().min((self.capacity - at) as usize));
                let end = DATA_START + at + now.len() as u64;
                if end > ring_len {
                    ring_len = end.next_multiple_of(GROWTH_BYTES).min(DATA_START + self.capacity);
                    self.file.set_len(ring_len)?;
                }
                self.file.write(DATA_START + at, now)?;
                place += now.len() as u64;
                bytes = later;
            }
        }
        if let Some(mark) = mark {
            self.file.write(mark.slot(), &mark.encode())?;
        }
        self.file.sync_data()?;
        Ok(ring_len)
    }

    /// Syncs the home files, so that a mark can free their records. Only one thread at a time does
    /// this.
    fn checkpoint(&self) -> io::Result<()> {
        let (homed, homes) = {
            let state = self.lock();
            state.check()?;
            let homes: Vec<_> = state.files.values().map(|joined| joined.home.clone()).collect();
            (state.homed, homes)
        };
        for home in homes {
            home.sync().map_err(|error| self.fail("syncing a log file failed", &error, true))?;
        }
        let mut state = self.lock();
        state.files.retain(|_, joined| !joined.closed || joined.end > homed);
        if homed > state.marked {
            state.marked = homed;
            state.mark(self.epoch, self.capacity, homed);
        }
        drop(state);
        self.queued.notify_one();
        Ok(())
    }

    /// A home file was closed, after its last record.
    fn closed(&self, first: u64) {
        if let Some(joined) = self.lock().files.get_mut(&first) {
            joined.closed = true;
        }
    }

    /// What the records on their way home say of a range of a file, the last first.
    fn look(&self, file: u64, offset: u64, out: &mut [u8]) -> Look {
        let state = self.lock();
        let records = state.records.iter().rev().filter(|record| record.file == file);
        records
            .map(|record| record.look(offset, out))
            .find(|look| *look != Look::Nothing)
            .unwrap_or(Look::Nothing)
    }

    /// Reads a range from the home file and puts over it what is on its way there.
    fn merge(
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

    fn spare(&self) -> Vec<u8> {
        self.lock().spare.pop().unwrap_or_default()
    }

    /// Stops for good.
    fn fail(&self, what: &str, error: &io::Error, home: bool) -> io::Error {
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

fn wait<'a>(condition: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
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
