//! The journal's two threads, and their jobs.
//!
//! Invariant: one thread at a time flushes and writes home, one syncs home files.

use std::io;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::Progress;
use super::homeward::Homeward;
use super::record::{DATA_START, Mark, Record};
use super::ring::{Ring, wait};

/// So much room of records that are done is kept for the next ones: memory that is given back and taken
/// again costs more than what is written to it.
const SPARE_BYTES_MAX: usize = 2 << 20;

/// When nothing is queued for so long, it does not wait for more.
const HOMEWARD_IDLE: Duration = Duration::from_millis(2);

/// The ring's file grows by so much at a time while it goes round for the first time.
const GROWTH_BYTES: u64 = 1 << 20;

impl Ring {
    /// The thread that writes the ring, and home what is durable if there is nothing else to do.
    pub(super) fn flush_on(&self) {
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
    pub(super) fn checkpoint_on(&self) {
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
    pub(super) fn flush(&self) -> io::Result<bool> {
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
    pub(super) fn bring_home(&self) -> io::Result<bool> {
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
    pub(super) fn checkpoint(&self) -> io::Result<()> {
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
}
