//! What was handed out to each connection that subscribes, and how far it has taken that. Pure.
//!
//! Owns: the place of each such connection on the local bus, and its row of messages there.
//! Invariant: a place is the lowest free one, so that whatever is kept per place stays as small as the
//! most there ever were; a number is never given twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How far a connection has taken what was handed out to it, in bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress(Arc<AtomicU64>);

impl Progress {
    /// Everything before this position has been taken, or is lost.
    pub(super) fn set(&self, position: u64) {
        self.0.store(position, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A connection's hold on its stream.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Its place, taken by another after it has gone.
    pub(super) slot: usize,
    /// Its name, never reused.
    pub(super) number: u64,
    /// Where it says how far it is.
    pub(super) progress: Progress,
}

#[derive(Debug)]
struct Stream {
    number: u64,
    /// Bytes handed out so far.
    position: u64,
    /// Messages handed out so far.
    seq: u64,
    progress: Progress,
    /// Too slow, and not waited for until it has caught up.
    behind: bool,
}

/// A message's place in the row of messages of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Place of the connection.
    pub slot: usize,
    /// Its name.
    pub number: u64,
    /// Bytes handed out to it, with this message.
    pub end: u64,
    /// Messages handed out to it before.
    pub seq: u64,
}

/// The streams of all connections that subscribe.
#[derive(Debug, Default)]
pub(super) struct Streams {
    slots: Vec<Option<Stream>>,
    last_number: u64,
}

impl Streams {
    /// A new stream; `None` if there are `max`.
    pub(super) fn open(&mut self, max: usize) -> Option<Entry> {
        let free = self.slots.iter().position(Option::is_none);
        let slot = free.unwrap_or(self.slots.len());
        if slot >= max {
            return None;
        }
        self.last_number += 1;
        let (number, progress) = (self.last_number, Progress::default());
        let stream =
            Stream { number, position: 0, seq: 0, progress: progress.clone(), behind: false };
        match free {
            Some(free) => self.slots[free] = Some(stream),
            None => self.slots.push(Some(stream)),
        }
        Some(Entry { slot, number, progress })
    }

    /// Gives a place back.
    pub(super) fn close(&mut self, slot: usize) {
        self.slots[slot] = None;
    }

    /// Places that were ever in use, and how many of them are.
    #[cfg(test)]
    pub(super) fn places(&self) -> (usize, usize) {
        (self.slots.len(), self.slots.iter().flatten().count())
    }

    /// The turn of a message of `size_bytes`, if the connection is still there.
    pub(super) fn turn(&mut self, slot: usize, number: u64, size_bytes: u64) -> Option<Turn> {
        let stream = self.slots.get_mut(slot)?.as_mut()?;
        if stream.number != number {
            return None;
        }
        stream.position += size_bytes;
        stream.seq += 1;
        Some(Turn { slot, number, end: stream.position, seq: stream.seq - 1 })
    }

    /// Whether each of these connections that keeps up has taken all but `bytes_max`.
    pub(super) fn in_reach(&mut self, slots: &[usize], bytes_max: u64) -> bool {
        let mut all = true;
        self.each(slots, |stream, untaken| {
            let near = untaken <= bytes_max;
            stream.behind &= !near;
            all &= near || stream.behind;
        });
        all
    }

    /// Waits no more for those of these connections that are further behind.
    pub(super) fn leave_behind(&mut self, slots: &[usize], bytes_max: u64) {
        self.each(slots, |stream, untaken| stream.behind = untaken > bytes_max);
    }

    fn each(&mut self, slots: &[usize], mut f: impl FnMut(&mut Stream, u64)) {
        for &slot in slots {
            if let Some(Some(stream)) = self.slots.get_mut(slot) {
                let untaken = stream.position.saturating_sub(stream.progress.get());
                f(stream, untaken);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_reused_and_numbers_are_not() {
        let mut streams = Streams::default();
        let first = streams.open(2).unwrap();
        streams.open(2).unwrap();
        assert!(streams.open(2).is_none());
        streams.close(first.slot);
        let again = streams.open(2).unwrap();
        assert_eq!(again.slot, first.slot);
        assert_ne!(again.number, first.number);
        assert_eq!(streams.turn(first.slot, first.number, 1), None, "not the other's messages");
        assert_eq!(streams.turn(again.slot, again.number, 1).unwrap().seq, 0);
    }

    #[test]
    fn only_subscribers_that_keep_up_are_waited_for() {
        let mut streams = Streams::default();
        let Entry { slot, number, progress } = streams.open(1).unwrap();
        let slots = [slot];
        streams.turn(slot, number, 100).unwrap();
        assert!(streams.in_reach(&slots, 100));
        streams.turn(slot, number, 1).unwrap();
        assert!(!streams.in_reach(&slots, 100));
        streams.leave_behind(&slots, 100);
        assert!(streams.in_reach(&slots, 100), "left behind");
        progress.set(101);
        assert!(streams.in_reach(&slots, 100), "caught up");
        streams.turn(slot, number, 101).unwrap();
        assert!(!streams.in_reach(&slots, 100), "waited for again");
    }
}
