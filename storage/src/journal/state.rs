//! How far the stream of records has come, and what is to be done next.
//!
//! Deliberately absent: doing it (see `work`).

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::home::HomeFile;
use super::record::{Mark, Record};

/// So much that is durable may wait to be written home: it goes together, see `homeward`. More would
/// save little, and the next sync waits for it.
const HOMEWARD_BYTES_MAX: u64 = 256 << 10;

/// Places in the stream of records rise: `tail <= marked <= homed <= durable <= taken <= queued`.
pub(super) struct State {
    /// What is before has no room in the ring any more.
    pub(super) tail: u64,
    /// What is before is home and synced; a mark says so, or is about to.
    pub(super) marked: u64,
    /// What is before is home.
    pub(super) homed: u64,
    /// What is before is in the ring and synced.
    pub(super) durable: u64,
    /// What is before is in the ring, or is being written there.
    pub(super) taken: u64,
    pub(super) queued: u64,
    /// From `homed` to `queued`.
    pub(super) records: VecDeque<Arc<Record>>,
    /// Home files that have not been synced since they were last written, by first offset.
    pub(super) files: BTreeMap<u64, Joined>,
    /// To be written by the next flush.
    pub(super) mark: Option<Mark>,
    pub(super) marks: u64,
    /// What the last mark says, in the ring or about to be.
    pub(super) said: u64,
    /// Bytes of the last record.
    pub(super) last_bytes: u64,
    /// Length of the ring's file.
    pub(super) ring_len: u64,
    /// Somebody waits for everything to be home.
    pub(super) home_wanted: bool,
    /// Somebody waits for everything to be home and synced.
    pub(super) checkpoint_wanted: bool,
    pub(super) stopping: bool,
    pub(super) waiting: Waiting,
    pub(super) failed: Option<Failure>,
    /// Room of records that are done, to be used again.
    pub(super) spare: Vec<Vec<u8>>,
}

/// Who has to be woken: waking nobody costs a call of the system all the same.
#[derive(Default)]
pub(super) struct Waiting {
    /// The thread that flushes has nothing to do.
    pub(super) flusher: bool,
    /// Threads that wait for something to be done.
    pub(super) others: usize,
}

pub(super) struct Joined {
    pub(super) home: Arc<HomeFile>,
    /// End of its last record.
    pub(super) end: u64,
    pub(super) closed: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) kind: io::ErrorKind,
    pub(super) reason: String,
    /// A home file may lack what the ring has.
    pub(super) home: bool,
}

impl Failure {
    pub(super) fn error(&self) -> io::Error {
        io::Error::new(self.kind, self.reason.clone())
    }
}

impl State {
    /// Nothing is queued: what is before the mark is all done.
    pub(super) fn new(mark: &Mark, ring_len: u64) -> Self {
        let place = mark.place;
        Self {
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
        }
    }

    pub(super) fn check(&self) -> io::Result<()> {
        self.failed.as_ref().map_or(Ok(()), |failure| Err(failure.error()))
    }

    /// How many records are durable and not home yet: the first ones.
    pub(super) fn homeward(&self) -> usize {
        self.records.partition_point(|record| record.place < self.durable)
    }

    /// Records that no sync has taken.
    pub(super) fn ahead(&self) -> usize {
        self.records.len() - self.records.partition_point(|record| record.place < self.taken)
    }

    /// What the next flush can take: the records that are not durable and fit into the ring, up to one
    /// that goes through.
    pub(super) fn to_flush(&self, capacity: u64) -> Range<usize> {
        let first = self.homeward();
        let fits = |record: &&Arc<Record>| !record.through && record.end() - self.tail <= capacity;
        first..first + self.records.range(first..).take_while(fits).count()
    }

    /// The next record, if that is one that goes through.
    pub(super) fn through(&self) -> Option<&Arc<Record>> {
        self.records.get(self.homeward()).filter(|record| record.through)
    }

    /// The same, if its time has come: nothing before it is left to replay.
    pub(super) fn to_write_through(&self) -> Option<&Arc<Record>> {
        self.through().filter(|record| record.place == self.tail)
    }

    pub(super) fn can_flush(&self, capacity: u64) -> bool {
        self.mark.is_some()
            || !self.to_flush(capacity).is_empty()
            || self.to_write_through().is_some()
    }

    /// Has the next flush write a mark that says where the tail is going to be.
    pub(super) fn mark(&mut self, epoch: u64, capacity: u64, place: u64) {
        self.marks += 1;
        self.said = place;
        self.mark = Some(Mark { epoch, number: self.marks, place, capacity });
    }

    /// Whether what is durable has to go home before anything else is done.
    pub(super) fn home_due(&self, capacity: u64) -> bool {
        let waiting_bytes = self.durable - self.homed;
        let bytes_max = HOMEWARD_BYTES_MAX.min(capacity / 8);
        waiting_bytes > bytes_max || self.home_wanted && waiting_bytes > 0
    }

    pub(super) fn checkpoint_due(&self, capacity: u64) -> bool {
        let due = self.homed - self.marked > capacity / 2;
        let wanted = self.checkpoint_wanted || self.through().is_some();
        due || wanted && self.homed > self.marked
    }
}
