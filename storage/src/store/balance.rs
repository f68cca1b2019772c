//! The balance: the sums of promise P3, per sink, from what lies in the store.
//!
//! Owns: [`Balancer`], a walk over what the slowest sink still needs, and [`Balance`], the sums.
//!
//! Every event from a sink's origin to the watermark is in exactly one place. What can be counted is
//! counted: pending events are walked batch by batch, dead letters are read row by row, losses are
//! the union of the ledger's ranges, and the events of rows that were merged (see `loss_ledger`). What
//! the store does not know for itself is whether an upstream took what the cursor passed, or what a
//! sink got ahead of its turn: delivered is what of that neither a dead letter, the ledger nor the
//! sink's count of filtered events claims. The balance fails where something is nowhere: an event that
//! is still needed, cannot
//! be read and is in no ledger; a cursor, a dead letter or a loss outside the log; numbers that do not
//! follow.
//!
//! Deliberately absent: what devices sent and upstreams received (that is the audit).

use std::ops::Range;

use super::{LossReason, ReadError, StateError, Store};
use crate::Loss;
use crate::cursor::Cursor;
use crate::event::Lane;
use crate::passed::{Lanes, Passed};
use crate::ranges::Ranges;
use crate::state::Letters;
use crate::store::verify::{self, Damage, Progress, Verification, Verifier};

/// Events dropped by policy, by reason. An event is counted once, under the first that fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// At the quota.
    pub quota: u64,
    /// By age.
    pub expired: u64,
    /// Damaged.
    pub corrupt: u64,
    /// Trimmed while the sink was not configured.
    pub sink_absent: u64,
    /// Beyond the sink's `lag_bytes_max`.
    pub lag: u64,
    /// Dead letters beyond their bound.
    pub dead_letter_limit: u64,
    /// Dead letters that somebody dropped.
    pub by_hand: u64,
}

impl Dropped {
    /// All of them.
    pub fn total(&self) -> u64 {
        let Self { quota, expired, corrupt, sink_absent, lag, dead_letter_limit, by_hand } = self;
        quota + expired + corrupt + sink_absent + lag + dead_letter_limit + by_hand
    }

    fn of(&mut self, reason: LossReason) -> &mut u64 {
        match reason {
            LossReason::Quota => &mut self.quota,
            LossReason::Expired => &mut self.expired,
            LossReason::Corrupt => &mut self.corrupt,
            LossReason::SinkAbsent => &mut self.sink_absent,
            LossReason::Lag => &mut self.lag,
            LossReason::DeadLetterLimit => &mut self.dead_letter_limit,
            LossReason::DroppedByHand => &mut self.by_hand,
        }
    }
}

/// The sums of one sink, in events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkBalance {
    /// Its name.
    pub sink: String,
    /// Whether it is configured: only then does it hold data back.
    pub configured: bool,
    /// First offset that was ever its own.
    pub origin: u64,
    /// Next offset that it needs.
    pub cursor: u64,
    /// Durable since its origin.
    pub committed: u64,
    /// Passed by its cursor or ahead of it, and neither refused, filtered nor dropped.
    pub delivered: u64,
    /// Found readable from its cursor on, and not done ahead of it.
    pub pending: u64,
    /// Refused for good, and kept.
    pub dead_lettered: u64,
    /// Not what the sink is to have, by its filters.
    pub filtered: u64,
    /// In the loss ledger.
    pub dropped: Dropped,
    /// Needed, and neither readable nor in the loss ledger.
    pub unaccounted: Vec<Range<u64>>,
    /// What does not fit, each in one line.
    pub problems: Vec<String>,
}

impl SinkBalance {
    /// Whether every event is somewhere.
    pub fn adds_up(&self) -> bool {
        let done = self.delivered + self.dead_lettered + self.filtered + self.dropped.total();
        let sum = done + self.pending;
        self.committed == sum && self.unaccounted.is_empty() && self.problems.is_empty()
    }
}

/// The sums of all sinks.
#[derive(Clone, Debug, Default)]
pub struct Balance {
    /// End-exclusive durable offset: what was ever committed.
    pub committed: u64,
    /// First stored offset.
    pub first_offset: u64,
    /// One per sink that the store knows, also those that are no longer configured.
    pub sinks: Vec<SinkBalance>,
    /// Disorder in the part of the log that was walked, each in one line.
    pub problems: Vec<String>,
}

impl Balance {
    /// Whether every event of every sink is somewhere.
    pub fn adds_up(&self) -> bool {
        self.problems.is_empty() && self.sinks.iter().all(SinkBalance::adds_up)
    }
}

/// A balance under way.
pub struct Balancer {
    store: Store,
    walk: Verifier,
}

impl Store {
    /// The balance of the store as it is now.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn balance(&self) -> Result<Balancer, StateError> {
        let (cursors, start) = {
            let projection = self.shared.progress.projection();
            (projection.cursors.all().clone(), projection.start)
        };
        let slowest = cursors.values().map(|cursor| cursor.offset).min();
        let mut walk = self.verify_from(slowest.unwrap_or(0).max(start))?;
        for sink in cursors.keys() {
            let ahead = self.passed(sink)?.ahead;
            if ahead.iter().any(|ahead| !ahead.lanes.covers(Lanes::ALL)) {
                walk = walk.with_lanes();
                break;
            }
        }
        Ok(Balancer { store: self.clone(), walk })
    }
}

impl Balancer {
    /// Walks a piece of what is pending; says whether there is more.
    ///
    /// # Errors
    /// [`ReadError`] if the disk cannot be read.
    pub fn step(&mut self) -> Result<bool, ReadError> {
        self.walk.step()
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.walk.progress()
    }

    /// The sums.
    ///
    /// # Errors
    /// [`StateError`] if dead letters or loss ledger cannot be read.
    pub fn finish(self) -> Result<Balance, StateError> {
        let shared = self.store.shared.clone();
        let (verification, sound, lanes) = self.walk.finish_with_ranges();
        let watermark = verification.offsets.end;
        // The cursors first: dead letters and losses are durable before a cursor passes them.
        let (sinks, start) = {
            let projection = shared.progress.projection();
            let sinks: Vec<(String, Cursor, bool)> = projection
                .cursors
                .all()
                .iter()
                .map(|(sink, &cursor)| {
                    (sink.clone(), cursor, projection.cursors.get(sink).is_some())
                })
                .collect();
            (sinks, projection.start)
        };
        let losses = self.store.losses()?;
        let mut balance = Balance {
            committed: watermark,
            first_offset: start,
            sinks: Vec::new(),
            problems: disorder(&verification),
        };
        for (sink, cursor, configured) in sinks {
            // What it passed may be newer than its cursor, and then claims less as pending.
            let passed = self.store.passed(&sink)?;
            let letters = shared.state.check_dead_letters(&sink)?;
            let losses: Vec<&Loss> =
                losses.iter().filter(|loss| loss.sink.as_deref() == Some(&sink)).collect();
            let log = Held { start, watermark, sound: &sound, lanes: &lanes };
            let standing = Standing { cursor, passed, configured };
            balance.sinks.push(sums(sink, standing, &letters, &losses, &log));
        }
        Ok(balance)
    }
}

fn disorder(verification: &Verification) -> Vec<String> {
    let disorder = verification.findings.iter().filter(|f| f.damage == Damage::Disorder);
    disorder
        .map(|f| format!("{}: offset {}: {}", f.path.display(), f.offsets.start, f.reason))
        .collect()
}

/// What the log holds.
struct Held<'a> {
    start: u64,
    watermark: u64,
    /// What was walked and reads well.
    sound: &'a Ranges,
    /// What of it is not live.
    lanes: &'a verify::Lanes,
}

impl Held<'_> {
    /// What reads well, is in a lane, and is done ahead of a cursor.
    fn done(&self, lane: Lane, passed: &Passed) -> Ranges {
        let done = passed.done(Lanes::NONE.with(lane));
        let among = |ranges: &Ranges| -> Ranges {
            done.iter()
                .flat_map(|range| ranges.within(range).iter().cloned().collect::<Vec<_>>())
                .collect()
        };
        match lane {
            Lane::Alarm => among(&self.lanes.alarm),
            Lane::Backfill => among(&self.lanes.backfill),
            Lane::Live => {
                among(self.sound).without(&self.lanes.alarm).without(&self.lanes.backfill)
            }
        }
    }
}

/// Where a sink stands.
struct Standing {
    cursor: Cursor,
    passed: Passed,
    configured: bool,
}

/// Puts the sums of one sink together. Pure.
fn sums(
    sink: String,
    standing: Standing,
    letters: &Letters,
    losses: &[&Loss],
    log: &Held<'_>,
) -> SinkBalance {
    let Standing { cursor: Cursor { origin, offset: cursor }, passed: beside, configured } =
        standing;
    let filtered = beside.filtered;
    let mut problems = Vec::new();
    // A cursor may have moved on while this was counted.
    let watermark = log.watermark.max(cursor);
    let (passed, ahead) = (origin..cursor, cursor..watermark);
    if origin > cursor {
        problems.push(format!("its cursor {cursor} is before its origin {origin}"));
    }
    // What is done, and not below the cursor.
    let done_ahead: Ranges = Lane::ALL
        .into_iter()
        .flat_map(|lane| log.done(lane, &beside).within(&ahead).iter().cloned().collect::<Vec<_>>())
        .collect();
    let mut claimed = letters.sound.within(&passed);
    let letters_ahead = letters.sound.count() - letters.sound.without(&done_ahead).count();
    let dead_lettered = claimed.count() + letters_ahead;
    let strangers = letters.sound.without(&(origin..watermark).into()).count();
    if strangers > 0 {
        problems.push(format!("{strangers} dead letter(s) of events that were never its own"));
    }
    if letters.damaged > 0 {
        problems.push(format!("{} dead letter(s) are damaged", letters.damaged));
    }
    let readable = log.sound.within(&ahead);
    let mut owed = Ranges::from(ahead.clone()).without(&readable);
    let mut dropped = Dropped::default();
    let mut counted = 0;
    // Nobody kept anything for a sink that is not configured; its rows come when it is back.
    if !configured {
        let gone = owed.within(&(0..log.start));
        dropped.sink_absent += gone.count();
        owed = owed.without(&gone);
    }
    for reason in LossReason::ALL {
        let rows = || losses.iter().filter(|loss| loss.reason == reason);
        let lost: Ranges =
            rows().filter(|loss| loss.is_exact()).map(|loss| loss.offsets.clone()).collect();
        // Which ones they were is no longer known: only that the cursor has passed them.
        let merged: u64 = rows().filter(|loss| !loss.is_exact()).map(|loss| loss.events).sum();
        counted += merged;
        if lost.iter().any(|range| range.end > watermark) {
            problems.push("the loss ledger has a row beyond the end of the log".to_owned());
        }
        let before = lost.within(&passed).without(&claimed);
        before.iter().for_each(|range| claimed.insert(range.clone()));
        let still = owed.clone();
        owed = owed.without(&lost);
        *dropped.of(reason) += merged + before.count() + still.count() - owed.count();
    }
    let passed_events = cursor.saturating_sub(origin);
    if claimed.count() + counted > passed_events {
        problems.push("more is lost or refused than its cursor has passed".to_owned());
    }
    let done = cursor.saturating_sub(origin) + done_ahead.count();
    let delivered = done.checked_sub(claimed.count() + counted + letters_ahead + filtered);
    if delivered.is_none() {
        problems
            .push(format!("it claims to have filtered {filtered} events, more than there were"));
    }
    SinkBalance {
        sink,
        configured,
        origin,
        cursor,
        committed: watermark.saturating_sub(origin),
        delivered: delivered.unwrap_or(0),
        pending: readable.without(&done_ahead).count(),
        dead_lettered,
        filtered,
        dropped,
        unaccounted: owed.iter().cloned().collect(),
        problems,
    }
}
