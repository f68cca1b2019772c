//! The walk over every file and batch that says whether the store is whole.
//!
//! Owns: [`Verifier`], which takes one piece of a file at a time, so that who calls it can tell how
//! far it is, stop, and let others have the disk; and the rules (`Check`, pure): offsets are
//! dense, a partition's sequence numbers are gapless, receive times never go back, every checksum
//! fits, head rows say what the batches before them come to.
//!
//! Invariant: what is lost is told as an exact range of offsets, once; numbers that a lost batch
//! without a sound head may have held are no disorder of those after it.
//! Deliberately absent: changing anything, the loss ledger included.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;

use bytes::Bytes;

use super::{LossReason, Mark, ReadError, StateError, Store};
use crate::batch::{Batch, BatchHead};
use crate::event::Lane;
use crate::head::{BadHead, Head, Position, Tail};
use crate::log::Span;
use crate::ranges::Ranges;

/// So many findings are kept; the rest is counted.
const FINDINGS_MAX: usize = 1_000;

/// What kind of damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Events that cannot be read, and that the loss ledger does not know of.
    Unreadable,
    /// Events that cannot be read, with a row in the loss ledger.
    Recorded,
    /// Events that read well and whose numbers or times do not follow.
    Disorder,
    /// A head row or control records: no event is lost.
    Bookkeeping,
}

/// One damaged place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What kind.
    pub damage: Damage,
    /// The file.
    pub path: PathBuf,
    /// Events that it is about, end-exclusive; empty if it is about none.
    pub offsets: Range<u64>,
    /// What is wrong, in one line.
    pub reason: String,
}

/// What a walk found.
#[derive(Clone, Debug, Default)]
pub struct Verification {
    /// Offsets that were walked, end-exclusive.
    pub offsets: Range<u64>,
    /// Files looked at.
    pub files: u32,
    /// Sound batches.
    pub batches: u64,
    /// Sound events.
    pub events: u64,
    /// Their event bytes.
    pub event_bytes: u64,
    /// Control records beside them.
    pub controls: u64,
    /// First and last sequence number that was seen, per partition; nothing where none was.
    pub seqs: Vec<Option<(u64, u64)>>,
    /// What is wrong, in the order of the log; at most a thousand entries.
    pub findings: Vec<Finding>,
    /// Findings beyond those.
    pub findings_more: u64,
    /// Events that cannot be read and are not in the loss ledger.
    pub unreadable: u64,
    /// Events that cannot be read and are in the loss ledger.
    pub recorded: u64,
}

impl Verification {
    /// Whether nothing is wrong but what the loss ledger knows.
    pub fn is_sound(&self) -> bool {
        self.findings_more == 0 && self.findings.iter().all(|f| f.damage == Damage::Recorded)
    }
}

/// How far a walk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Offsets done.
    pub done: u64,
    /// Offsets in all.
    pub total: u64,
}

/// A walk under way.
pub struct Verifier {
    store: Store,
    from: u64,
    watermark: u64,
    /// What the store says comes after the last event.
    next_seq: Vec<u64>,
    files: VecDeque<Span>,
    /// Where to go on in the first of the files.
    at: Option<Range<Position>>,
    check: Check,
    /// As it was before the first of the files, and how many files had been packed by then.
    before: (Check, u64),
}

impl Store {
    /// A walk over the whole store as it is now.
    ///
    /// # Errors
    /// [`StateError`] if the loss ledger cannot be read.
    pub fn verify(&self) -> Result<Verifier, StateError> {
        self.verify_from(0)
    }

    /// A walk from the file on that holds an offset.
    pub(super) fn verify_from(&self, offset: u64) -> Result<Verifier, StateError> {
        let (Mark { watermark, .. }, Tail { next_seq, .. }) = self.shared.progress.reached();
        let start = self.shared.progress.projection().start;
        let mut files: VecDeque<Span> = self.shared.log.spans(watermark).into();
        while files.len() > 1 && files[0].offsets.end <= offset {
            files.pop_front();
        }
        let from = files.front().map_or(watermark, |file| file.offsets.start).max(start);
        let ledger = self.losses()?.into_iter();
        let corrupt = ledger.filter(|loss| loss.reason == LossReason::Corrupt);
        let check = Check {
            recorded: corrupt.map(|loss| loss.offsets).collect(),
            ..Check::new(from..watermark, next_seq.len())
        };
        Ok(Verifier {
            store: self.clone(),
            from,
            watermark,
            before: (check.clone(), self.shared.log.packed()),
            check,
            next_seq,
            files,
            at: None,
        })
    }
}

impl Verifier {
    /// Walks a piece; says whether there is more.
    ///
    /// # Errors
    /// [`ReadError`] if the disk cannot be read. Damage is no error.
    pub fn step(&mut self) -> Result<bool, ReadError> {
        let Some(file) = self.files.front().cloned() else {
            return Ok(false);
        };
        let end = self.end_of(&file);
        let (log, check) = (&self.store.shared.log, &mut self.check);
        let walked = match self.at.clone() {
            None => {
                check.path = log.path_of(file.offsets.start);
                check.file_end = file.offsets.end;
                log.summary(file.offsets.start).map(|summary| {
                    let start = Position::at(file.offsets.start);
                    let head = match summary.head {
                        Ok(head) => check.head(&head, file.offsets.start).unwrap_or(start),
                        Err(error) => check.bad_head(&error, start),
                    };
                    Some(head..end)
                })
            }
            Some(range) => {
                let end = range.end;
                let walked = log.walk(range, |position, row| check.row(position, row));
                walked.map(|next| next.map(|next| next..end))
            }
        };
        let check = &mut self.check;
        self.at = match walked {
            Ok(at) => at,
            Err(error) if error.is_damage() => {
                let start = self.store.shared.progress.projection().start;
                if start < file.offsets.end {
                    check.broken(&error.error.to_string());
                }
                None
            }
            Err(error) => return Err(error.into()),
        };
        if self.at.is_none() {
            // What was trimmed while this was walking is not lost.
            check.trimmed(self.store.shared.progress.projection().start.min(self.watermark));
            check.skip_to(file.offsets.end, "no batch holds them");
            let lost = |check: &Check| check.report.unreadable + check.report.recorded;
            let (before, packed) = &mut self.before;
            if lost(check) > lost(before) {
                let packed_before = std::mem::replace(packed, log.packed());
                // Once more: it was packed meanwhile, or for what its tree does not show.
                if packed_before != *packed || log.distrust(file.offsets.start)? {
                    *check = before.clone();
                    return Ok(true);
                }
            }
            check.report.files += 1;
            self.before = (check.clone(), log.packed());
            self.files.pop_front();
        }
        Ok(!self.files.is_empty())
    }

    /// Where a file ends: batches without events may stand in front of the next file's first.
    fn end_of(&self, file: &Span) -> Position {
        match self.files.get(1) {
            Some(next) => {
                let summary = self.store.shared.log.summary(next.offsets.start);
                let head = summary.ok().and_then(|summary| summary.head.ok());
                head.map_or(Position::at(file.offsets.end), |head| head.tail.position)
            }
            None => Position { offset: self.watermark, ordinal: u32::MAX },
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let done = self.check.next.clamp(self.from, self.watermark) - self.from;
        Progress { done, total: self.watermark - self.from }
    }

    /// What was found.
    pub fn finish(mut self) -> Verification {
        self.check.end(&self.next_seq);
        let mut report = self.check.report;
        report.offsets = self.from..self.watermark;
        report
    }

    /// Also finds out which lane each event is in: that takes room for every change of lane.
    pub(super) fn with_lanes(mut self) -> Self {
        self.check.lanes = Some(Lanes::default());
        self
    }

    /// What was found, which offsets read well, and their lanes.
    pub(super) fn finish_with_ranges(mut self) -> (Verification, Ranges, Lanes) {
        let sound = std::mem::take(&mut self.check.sound);
        let lanes = self.check.lanes.take().unwrap_or_default();
        (self.finish(), sound, lanes)
    }
}

/// What is known of a partition's next sequence number.
#[derive(Clone, Copy, Debug)]
enum NextSeq {
    /// It is this one.
    Is(u64),
    /// It is at least this one: something was lost that may have held some.
    AtLeast(u64),
}

/// The rules, and what they found.
#[derive(Clone)]
struct Check {
    path: PathBuf,
    /// Everything before this offset was seen or reported.
    next: u64,
    /// Where the file ends that is looked at. What it holds beyond is void, or being committed.
    file_end: u64,
    watermark: u64,
    received_us: u64,
    /// Event bytes ever appended before `next`, where that is known.
    event_bytes: Option<u64>,
    next_seq: Vec<NextSeq>,
    /// Whether the row before was not sound, and why.
    unsound: Option<&'static str>,
    /// Offsets that the loss ledger calls corrupt.
    recorded: Ranges,
    sound: Ranges,
    /// What of it is in a lane of its own, if that is asked for.
    lanes: Option<Lanes>,
    report: Verification,
}

/// Offsets of the events that read well and are not live, by lane.
#[derive(Clone, Default)]
pub(super) struct Lanes {
    pub(super) alarm: Ranges,
    pub(super) backfill: Ranges,
}

impl Check {
    fn new(offsets: Range<u64>, partitions: usize) -> Self {
        Self {
            path: PathBuf::new(),
            next: offsets.start,
            file_end: offsets.end,
            watermark: offsets.end,
            received_us: 0,
            event_bytes: None,
            next_seq: vec![NextSeq::AtLeast(0); partitions],
            unsound: None,
            recorded: Ranges::default(),
            sound: Ranges::default(),
            lanes: None,
            report: Verification { seqs: vec![None; partitions], ..Verification::default() },
        }
    }

    fn find(&mut self, damage: Damage, offsets: Range<u64>, reason: impl Into<String>) {
        let findings = &mut self.report.findings;
        if findings.len() == FINDINGS_MAX {
            self.report.findings_more += 1;
            return;
        }
        let reason = reason.into();
        if let Some(last) = findings.last_mut()
            && (last.damage, &last.path, &last.reason) == (damage, &self.path, &reason)
            && last.offsets.end == offsets.start
            && !offsets.is_empty()
        {
            last.offsets.end = offsets.end;
            return;
        }
        findings.push(Finding { damage, path: self.path.clone(), offsets, reason });
    }

    /// Events that cannot be read.
    fn lost(&mut self, offsets: Range<u64>, reason: &str) {
        let lost = Ranges::from(offsets.clone());
        let unknown = lost.without(&self.recorded);
        for range in unknown.iter() {
            self.find(Damage::Unreadable, range.clone(), reason);
        }
        for range in self.recorded.within(&offsets).iter() {
            self.find(Damage::Recorded, range.clone(), reason);
        }
        self.report.unreadable += unknown.count();
        self.report.recorded += lost.count() - unknown.count();
    }

    /// Everything before `offset` that was not seen is lost, and nobody knows whose it was.
    fn skip_to(&mut self, offset: u64, reason: &'static str) {
        let unsound = self.unsound.take();
        if self.next < offset {
            self.lost(self.next..offset, unsound.unwrap_or(reason));
            self.unsure();
            self.next = offset;
        } else if let Some(reason) = unsound {
            let reason = format!("a batch without events: {reason}");
            self.find(Damage::Bookkeeping, self.next..self.next, reason);
        }
    }

    /// Numbers may be missing from here on.
    fn unsure(&mut self) {
        self.event_bytes = None;
        for next in &mut self.next_seq {
            let (NextSeq::Is(seq) | NextSeq::AtLeast(seq)) = *next;
            *next = NextSeq::AtLeast(seq);
        }
    }

    /// What came before `start` is gone for good, with or without a row in the loss ledger.
    fn trimmed(&mut self, start: u64) {
        if self.next < start {
            self.next = start;
            self.unsound = None;
            self.unsure();
        }
    }

    /// The file, or the rest of it, cannot be opened or walked.
    fn broken(&mut self, reason: &str) {
        self.unsound = Some("the file is damaged");
        self.find(Damage::Bookkeeping, self.next..self.next, format!("damaged file: {reason}"));
    }

    /// A head row: what the file takes over. Says where its batches start, if it fits its file.
    fn head(&mut self, head: &Head, first: u64) -> Option<Position> {
        let tail = &head.tail;
        if tail.position.offset != first || tail.next_seq.len() != self.next_seq.len() {
            let reason = "the head row is another file's";
            self.find(Damage::Disorder, first..first, reason);
            return None;
        }
        self.skip_to(first, "no batch holds them");
        for (partition, &seq) in tail.next_seq.iter().enumerate() {
            self.follow(partition, seq, 0, first);
        }
        if self.event_bytes.is_some_and(|bytes| bytes != tail.event_bytes) {
            self.find(Damage::Disorder, first..first, "the head row counts other event bytes");
        }
        self.follow_time(tail.received_us, tail.received_us, first);
        self.event_bytes = Some(tail.event_bytes);
        Some(tail.position)
    }

    fn bad_head(&mut self, error: &BadHead, start: Position) -> Position {
        let reason = match error {
            BadHead::Corrupt => "the head row fails its checksum",
            BadHead::Newer(_) => "a later version wrote the head row",
        };
        self.skip_to(start.offset, "no batch holds them");
        self.find(Damage::Bookkeeping, start.offset..start.offset, reason);
        start
    }

    fn row(&mut self, position: Position, row: &[u8]) {
        let head = match BatchHead::decode(row) {
            Ok(head) if head.position() == position => head,
            // What it held shows where the next sound batch starts.
            Ok(_) => return self.unsound = Some("the head of the batch is another one's"),
            Err(_) => return self.unsound = Some("the head of the batch fails its checksum"),
        };
        if head.end() > self.file_end {
            return;
        }
        if position.offset < self.next {
            let reason = "a batch starts before the one in front of it ends";
            return self.find(Damage::Disorder, position.offset..head.end(), reason);
        }
        self.skip_to(position.offset, "no batch holds them");
        let offsets = position.offset..head.end();
        for (partition, base, count) in head.partitions() {
            self.follow(usize::from(partition), base, u64::from(count), position.offset);
        }
        if self.event_bytes.is_some_and(|bytes| bytes != head.event_bytes_before()) {
            self.find(Damage::Disorder, offsets.clone(), "event bytes do not add up");
        }
        self.event_bytes = head.event_bytes_before().checked_add(head.event_bytes());
        if !offsets.is_empty() {
            let (first_us, last_us) = head.received_us();
            self.follow_time(first_us, last_us, position.offset);
        }
        self.next = head.end();
        self.body(&head, row, offsets);
    }

    fn body(&mut self, head: &BatchHead<'_>, row: &[u8], offsets: Range<u64>) {
        let Ok(batch) = Batch::decode(Bytes::copy_from_slice(row)) else {
            let reason = "the body of the batch fails its checksum";
            return if offsets.is_empty() {
                self.find(
                    Damage::Bookkeeping,
                    offsets,
                    format!("a batch without events: {reason}"),
                );
            } else {
                self.lost(offsets, reason);
            };
        };
        let mut size_bytes = 0;
        let mut end = offsets.start;
        for event in batch.events(0).map_while(Result::ok) {
            size_bytes += event.event.size_bytes() as u64;
            end = event.offset + 1;
            if let Some(lanes) = &mut self.lanes {
                match event.event.attributes.lane() {
                    Lane::Alarm => lanes.alarm.insert(event.offset..end),
                    Lane::Backfill => lanes.backfill.insert(event.offset..end),
                    Lane::Live => {}
                }
            }
        }
        if end < offsets.end {
            self.lost(end..offsets.end, "the records of the batch do not add up");
        } else if size_bytes != head.event_bytes() {
            let reason = "the head of the batch counts other event bytes";
            self.find(Damage::Disorder, offsets.clone(), reason);
        }
        match batch.controls() {
            Ok(controls) => self.report.controls += controls.len() as u64,
            Err(_) => self.find(Damage::Bookkeeping, end..end, "control records do not decode"),
        }
        self.report.batches += 1;
        self.report.events += end - offsets.start;
        self.report.event_bytes += size_bytes;
        self.sound.insert(offsets.start..end);
    }

    /// `count` events of a partition from `seq` on; none of them for a head row.
    fn follow(&mut self, partition: usize, seq: u64, count: u64, offset: u64) {
        let Some(next) = self.next_seq.get_mut(partition) else {
            let reason = format!("there is no partition {partition}");
            return self.find(Damage::Disorder, offset..offset + count, reason);
        };
        let before = *next;
        *next = NextSeq::Is(seq.saturating_add(count));
        if count > 0 {
            let seen = &mut self.report.seqs[partition];
            *seen = Some((seen.map_or(seq, |(first, _)| first), seq + count - 1));
        }
        let follows = match before {
            NextSeq::Is(expected) => seq == expected,
            NextSeq::AtLeast(least) => seq >= least,
        };
        if !follows {
            let (NextSeq::Is(expected) | NextSeq::AtLeast(expected)) = before;
            let reason = format!("partition {partition} goes on with {seq}, not {expected}");
            self.find(Damage::Disorder, offset..offset + count, reason);
        }
    }

    fn follow_time(&mut self, first_us: u64, last_us: u64, offset: u64) {
        if first_us < self.received_us || last_us < first_us {
            self.find(Damage::Disorder, offset..offset, "receive times go back");
        }
        self.received_us = self.received_us.max(last_us);
    }

    /// The end of the log, and what the store says comes after it.
    fn end(&mut self, next_seq: &[u64]) {
        self.skip_to(self.watermark, "no batch holds them");
        for (partition, &seq) in next_seq.iter().enumerate() {
            self.follow(partition, seq, 0, self.watermark);
        }
    }
}
