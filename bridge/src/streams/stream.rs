//! One stream of a sink: what it is to have of the log, and how far it is.
//!
//! Owns: a [`Delivery`] with a range of offsets and some lanes, and what was read and is not wanted:
//! that is counted once its cursor has passed it.
//! Deliberately absent: other streams (`streams`).

use std::collections::VecDeque;
use std::ops::Range;

use storage::{Lanes, Read, StoredEvent};

use super::Key;
use super::plan::{Class, Plan};
use crate::delivery::{Counts, Delivery, Moment, Trouble};
use crate::sink::Mark;

/// One stream. See the module.
#[derive(Debug)]
pub(super) struct Stream {
    /// Its name.
    pub(super) key: Key,
    /// Its priority.
    pub(super) class: Class,
    /// Its lanes: of others it passes everything.
    pub(super) lanes: Lanes,
    /// What it is to have: to `u64::MAX` if it has no end.
    pub(super) offsets: Range<u64>,
    /// How far it is, and what is under way.
    pub(super) delivery: Delivery,
    /// Read and not wanted, in offset order, from its cursor on.
    unwanted: VecDeque<Range<u64>>,
    /// Not wanted, and passed by its cursor.
    filtered: u64,
    /// Later events of its lanes go ahead of it, or have.
    pub(super) is_late: bool,
    /// The last read left something behind.
    pub(super) backlog: bool,
}

impl Stream {
    /// Goes on where `delivery` does.
    pub(super) fn new(
        key: Key,
        class: Class,
        lanes: Lanes,
        offsets: Range<u64>,
        delivery: Delivery,
    ) -> Self {
        Self {
            key,
            class,
            lanes,
            offsets,
            delivery,
            unwanted: VecDeque::new(),
            filtered: 0,
            is_late: false,
            backlog: false,
        }
    }

    /// Whether everything that it is to have of a log up to `watermark` has been read.
    pub(super) fn is_read(&self, watermark: u64) -> bool {
        self.delivery.read_to() >= watermark.min(self.offsets.end)
    }

    /// What its events say of it, where they say anything.
    pub(super) fn mark(&self) -> Mark {
        match self.class {
            Class::Replay => Mark::Replay,
            _ if self.is_late => Mark::Backfill,
            _ => Mark::Live,
        }
    }

    /// Whether it has an end, and has reached it.
    pub(super) fn is_done(&self) -> bool {
        self.delivery.cursor() >= self.offsets.end && self.delivery.is_idle()
    }

    /// Takes what was read for it. `device`: a replay's, if it is of one.
    pub(super) fn take(&mut self, read: Read, plan: &Plan, device: Option<&str>, watermark: u64) {
        let end = self.offsets.end;
        let mut events = read.events;
        let kept = events.partition_point(|stored| stored.offset < end);
        events.truncate(kept);
        if self.class == Class::Replay {
            events.retain(|stored| {
                device.is_none_or(|key| stored.event.device_key == key)
                    && plan.filter.wants(&stored.event, &plan.event_type)
            });
        } else if self.lanes != Lanes::ALL || !plan.filter.is_open() {
            events.retain(|stored| self.keeps(stored, plan));
        }
        let next = read.next.min(end);
        self.backlog = next < watermark.min(end);
        self.delivery.push(Read { events, next, missing: Vec::new() });
        self.settle();
    }

    /// Whether an event is to be sent by this stream; what is its own and not wanted is noted.
    fn keeps(&mut self, stored: &StoredEvent, plan: &Plan) -> bool {
        let lane = stored.event.attributes.lane();
        if !self.lanes.contains(lane) {
            return false;
        }
        if plan.filter.wants(&stored.event, &plan.event_type) {
            return true;
        }
        match self.unwanted.back_mut() {
            Some(last) if last.end == stored.offset => last.end += 1,
            _ => self.unwanted.push_back(stored.offset..stored.offset + 1),
        }
        false
    }

    /// Counts what its cursor has passed of the unwanted.
    pub(super) fn settle(&mut self) {
        let cursor = self.delivery.cursor();
        self.unwanted_below(cursor, |filtered, passed| *filtered += passed);
    }

    fn unwanted_below(&mut self, cursor: u64, count: impl Fn(&mut u64, u64)) {
        while let Some(first) = self.unwanted.front_mut() {
            let end = first.end.min(cursor);
            if end <= first.start {
                break;
            }
            count(&mut self.filtered, end - first.start);
            first.start = end;
            if first.is_empty() {
                self.unwanted.pop_front();
            }
        }
    }

    /// See [`Delivery::pass`]: what a policy has dropped counts as dropped, also what was unwanted.
    pub(super) fn pass(&mut self, cursor: u64) -> Option<Range<u64>> {
        let passed = self.delivery.pass(cursor);
        self.unwanted_below(cursor, |_, _| {});
        self.settle();
        passed
    }

    /// Sums since it began.
    pub(super) fn counts(&self) -> Counts {
        Counts { filtered_events: self.filtered, ..self.delivery.counts() }
    }

    /// Whether an upstream that failed it is to be left alone: it is the same for all streams.
    pub(super) fn waits_for_upstream(&self, now: Moment) -> bool {
        self.delivery.is_paused(now) && !matches!(self.delivery.trouble(), Some(Trouble::Store(_)))
    }
}
