//! The committer: one thread that turns what lies in the rings into durable batches.
//!
//! Owns: the log's one writer, the batch that is being gathered, retention, and what happens when
//! the log stands still.
//! Invariant: an event leaves this thread in one of two ways only: durable, with its ticket
//! completed, or not stored, with its connection closed so that the device sends it again.
//!
//! Group commit adapts by itself: while one commit syncs, the rings gather the next. A timer
//! (`commit_linger_ms_max`) is for those who would rather spare the card.
//!
//! Order is decided here, and so is what is a resend of what is stored (see `dedup`): it is not stored
//! again, and its ack rides in the commit that counts it, which is never durable before its original.
//!
//! | the log says | then |
//! | --- | --- |
//! | quota reached | cursors are committed alone, retention runs, the batch is tried again; devices are held meanwhile, or refused, and with them what waits |
//! | disk full, or too little free | the same, slower, and the gateway is not ready |
//! | write or sync failed | the batch and what is not durable is failed: its connections close. The rings rest until a probe without events succeeds; if none does for long, the committer ends, and the process with it |

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use storage::{
    AtQuota, Clock, CommitError, Committed, Control, Event, Mark, RetentionReport, StateError,
    Writer,
};

use super::clock::Times;
use super::dedup::{self, Dedup};
use super::in_flight::{Commit, Waiting};
use super::{Admission, GivenUp, Pending, Rings, Shared};
use crate::config::IngestConfig;

/// What the committer asks of the log. [`Writer`] is the log; the benches put in its place what
/// acks without storing, or what a plain file would cost.
pub trait Append: Send + 'static {
    /// See [`Writer::on_durable`].
    fn on_durable(&mut self, callback: impl Fn(Mark) + Send + Sync + 'static);
    /// See [`Writer::on_failure`]. A log whose commits are durable when they return has nothing to
    /// tell.
    fn on_failure(&mut self, _callback: impl Fn() + Send + Sync + 'static) {}
    /// See [`Writer::set_clock`]. A log that keeps no times has nothing to commit for it.
    fn set_clock(&mut self, _clock: Clock) -> Vec<Control> {
        Vec::new()
    }
    /// See [`Writer::keep_from`].
    fn keep_from(&mut self, _offset: u64) {}
    /// See [`Writer::check`].
    ///
    /// # Errors
    /// See [`Writer::check`].
    fn check(&mut self) -> Result<(), CommitError> {
        Ok(())
    }
    /// See [`Writer::make_room`]. A log that asks for no room has it.
    ///
    /// # Errors
    /// See [`Writer::make_room`].
    fn make_room(&mut self, _now_us: u64) -> Result<(), CommitError> {
        Ok(())
    }
    /// See [`Writer::commit`].
    ///
    /// # Errors
    /// See [`CommitError`].
    fn commit(
        &mut self,
        events: &[Event],
        control: &[Control],
        now_us: u64,
    ) -> Result<Committed, CommitError>;
    /// See [`Writer::retain`].
    ///
    /// # Errors
    /// See [`StateError`].
    fn retain(&mut self, now_us: u64) -> Result<RetentionReport, StateError>;
    /// See [`Writer::close`].
    ///
    /// # Errors
    /// See [`StateError`].
    fn close(self) -> Result<(), StateError>;
}

impl Append for Writer {
    fn on_durable(&mut self, callback: impl Fn(Mark) + Send + Sync + 'static) {
        self.on_durable(callback);
    }
    fn on_failure(&mut self, callback: impl Fn() + Send + Sync + 'static) {
        self.on_failure(callback);
    }
    fn set_clock(&mut self, clock: Clock) -> Vec<Control> {
        self.set_clock(clock)
    }
    fn keep_from(&mut self, offset: u64) {
        self.keep_from(offset);
    }
    fn check(&mut self) -> Result<(), CommitError> {
        self.check()
    }
    fn make_room(&mut self, now_us: u64) -> Result<(), CommitError> {
        self.make_room(now_us)
    }
    fn commit(
        &mut self,
        events: &[Event],
        control: &[Control],
        now_us: u64,
    ) -> Result<Committed, CommitError> {
        self.commit(events, control, now_us)
    }
    fn retain(&mut self, now_us: u64) -> Result<RetentionReport, StateError> {
        self.retain(now_us)
    }
    fn close(self) -> Result<(), StateError> {
        self.close()
    }
}

/// Why the committer ended before it was asked to, or could not end well.
#[derive(Debug, thiserror::Error)]
pub enum CommitterError {
    /// The disk kept failing.
    #[error("the log could not be written for {} seconds: {reason}; check the disk", failing.as_secs())]
    Failing {
        /// How long it was tried.
        failing: Duration,
        /// The last failure.
        reason: String,
    },
    /// The last checkpoint could not be written; what was acked is in the log all the same.
    #[error("the store was not closed cleanly: {0}; the next start repairs it")]
    Close(#[from] StateError),
    /// A bug.
    #[error("the committer panicked: {message}; what was acked is safe, restart the gateway")]
    Panicked {
        /// What the panic said.
        message: String,
    },
}

/// How fast the committer does what no event asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// A cursor move waits at most so long for events to ride with.
    pub(super) cursor_delay_max: Duration,
    /// Retention runs at most so often while commits go on.
    pub(super) retain_every: Duration,
    /// Retention runs this often when nothing is committed: data also ages.
    pub(super) retain_idle_every: Duration,
    /// Pause between tries at the quota; a cursor move cuts it short.
    pub(super) quota_retry_every: Duration,
    /// Pause between tries when the disk is full or fails.
    pub(super) disk_retry_every: Duration,
    /// A disk that fails for longer ends the committer.
    pub(super) failing_max: Duration,
    /// The clock is looked at this often.
    pub(super) clock_every: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            cursor_delay_max: Duration::from_secs(1),
            retain_every: Duration::from_secs(1),
            retain_idle_every: Duration::from_secs(30),
            quota_retry_every: Duration::from_millis(250),
            disk_retry_every: Duration::from_secs(1),
            failing_max: Duration::from_mins(1),
            clock_every: Duration::from_secs(1),
        }
    }
}

/// How the log takes events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Commits succeed.
    Storing,
    /// The quota is reached, and devices are held or refused as configured.
    AtQuota {
        /// What the log said.
        reason: String,
    },
    /// The file system has no room, or less than is to be left free; tried again slowly.
    DiskFull {
        /// What the log said.
        reason: String,
    },
    /// The last commit failed; tried again slowly.
    Failing {
        /// What the log said.
        reason: String,
    },
}

impl Health {
    /// Whether the gateway is ready. At the quota it is: it does what its configuration says.
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Storing | Self::AtQuota { .. })
    }
}

/// A record that changes nothing, for a commit that only shows that the disk writes again. The
/// namespace is nobody's.
fn probe() -> Control {
    Control::Delete { namespace: u16::MAX, key: Bytes::new() }
}

/// The log stands still.
#[derive(Debug)]
struct Standstill {
    error: CommitError,
    since: Instant,
    tried_at: Instant,
    retry_at: Instant,
}

/// One batch, being gathered or waiting for another try.
#[derive(Debug, Default)]
struct Batch {
    events: Vec<Event>,
    /// Changes of state that are durable with them, in their order.
    riders: Vec<Control>,
    waiting: Vec<Waiting>,
    size_bytes: usize,
    /// Resends, of which only their acks are here.
    duplicates: u64,
}

impl Batch {
    fn push(&mut self, pending: Pending, is_duplicate: bool) {
        let mut riders = pending.riders.map_or_else(Vec::new, Vec::from);
        if is_duplicate {
            self.duplicates += 1;
            riders.truncate(pending.identity.map_or(0, |identity| identity.riders));
        } else {
            self.size_bytes += pending.event.size_bytes();
            self.events.push(pending.event);
        }
        self.riders.extend(riders);
        if let Some(ticket) = pending.ticket {
            self.waiting.push(Waiting { ticket, read_at: pending.read_at });
        }
    }

    fn is_empty(&self) -> bool {
        self.events.is_empty() && self.duplicates == 0
    }

    /// Leaves an empty batch that keeps its buffers.
    fn clear(&mut self) {
        self.events.clear();
        self.riders.clear();
        self.waiting.clear();
        (self.size_bytes, self.duplicates) = (0, 0);
    }

    /// Closes the connections whose events are in here, and forgets the events.
    fn give_up(&mut self, why: GivenUp) {
        self.waiting.iter().for_each(|waiting| waiting.ticket.mailbox.give_up(why));
        self.clear();
    }
}

/// The committer's own state; everything that others see is in [`Shared`].
#[derive(Debug)]
pub(super) struct Committer<A> {
    log: A,
    shared: Arc<Shared>,
    events_max: usize,
    size_bytes_max: usize,
    linger_max: Duration,
    at_quota: AtQuota,
    pace: Pace,
    batch: Batch,
    /// Offset of the first event of the batch.
    base: u64,
    times: Times,
    clock_at: Option<Instant>,
    dedup: Option<Dedup>,
    first_ring: usize,
    standstill: Option<Standstill>,
    retained_at: Instant,
    committed_since: bool,
    retain_fails: bool,
    /// Retention has only begun.
    retain_more: bool,
}

impl<A: Append> Committer<A> {
    pub(super) fn new(
        mut log: A,
        shared: Arc<Shared>,
        config: &IngestConfig,
        at_quota: AtQuota,
        pace: Pace,
        dedup: Option<Dedup>,
    ) -> Self {
        let seen = Arc::clone(&shared);
        log.on_durable(move |mark| {
            seen.durable.fetch_max(mark.commit, Ordering::Release);
            seen.changes.durable(mark.commit);
            seen.in_flight.durable(mark, Instant::now());
        });
        let woken = Arc::clone(&shared);
        log.on_failure(move || woken.rings.wake_committer());
        let base = *shared.in_flight.watermark().borrow();
        let times = Times::new(&shared.clock);
        if let Some(dedup) = &dedup {
            log.keep_from(dedup.needs_from());
        }
        Self {
            log,
            base,
            times,
            clock_at: None,
            dedup,
            shared,
            events_max: config.commit_events_max,
            size_bytes_max: config.commit_bytes_max,
            linger_max: config.commit_linger_max,
            at_quota,
            pace,
            batch: Batch::default(),
            first_ring: 0,
            standstill: None,
            retained_at: Instant::now(),
            committed_since: false,
            retain_fails: false,
            retain_more: false,
        }
    }

    /// Runs until it is asked to stop and the rings are empty, then closes the log.
    pub(super) fn run(mut self) -> Result<(), CommitterError> {
        while self.turn()?.is_continue() {}
        // What is left could not be stored and was not acked: its devices send it again.
        self.give_up_batch(GivenUp::Failed);
        // So that the next start need not read them again.
        let save = self.is_dedup_behind();
        if self.shared.cursors.waiting_since().is_some() || self.shared.changes.any() || save {
            self.commit_state(save);
        }
        self.log.close()?;
        Ok(())
    }

    /// Does the next thing: a commit, a try while the log stands still, or a sleep.
    fn turn(&mut self) -> Result<ControlFlow<()>, CommitterError> {
        // Read before the rings are: what was pushed before the request is found after it.
        let stopping = self.shared.is_stopping();
        if self.standstill.is_some() {
            self.stand(stopping)?;
            let gives_up = stopping && self.standstill.is_some();
            return Ok(if gives_up { ControlFlow::Break(()) } else { ControlFlow::Continue(()) });
        }
        self.gather();
        if !self.batch.is_empty() || self.shared.changes.any() {
            self.linger();
            self.commit(&[]);
            if self.retain_due() <= Instant::now() {
                self.retain();
            }
        } else if stopping {
            return Ok(ControlFlow::Break(()));
        } else {
            self.idle();
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Fills the batch from the rings.
    fn gather(&mut self) {
        self.look_at_clock();
        let Self { batch, shared, times, dedup, base, .. } = self;
        let events_max = self.events_max.saturating_sub(batch.events.len());
        let size_bytes_max = self.size_bytes_max.saturating_sub(batch.size_bytes);
        let mut discarded = 0;
        shared.rings.drain(self.first_ring, events_max, size_bytes_max, |mut pending| {
            // What follows an event that was given up is sent again behind it: stored now, it would be
            // first.
            if pending.ticket.as_ref().is_some_and(|ticket| ticket.mailbox.is_given_up()) {
                discarded += 1;
                return;
            }
            let event = &mut pending.event;
            event.received_us = times.wall_us(event.received_us);
            let is_duplicate = match (dedup.as_mut(), &pending.identity) {
                (Some(dedup), Some(identity)) => {
                    let offset = *base + batch.events.len() as u64;
                    let at_s = dedup::seconds(event.received_us);
                    dedup.is_duplicate(&event.device_key, identity.id, offset, at_s)
                }
                _ => false,
            };
            batch.push(pending, is_duplicate);
        });
        if discarded > 0 {
            shared.count(|counters| counters.failed_events += discarded);
        }
        self.first_ring = (self.first_ring + 1) % usize::from(shared.rings.partitions());
    }

    /// Tells the log where the clock stands, between two batches: the events of one have one clock.
    fn look_at_clock(&mut self) {
        let now = Instant::now();
        let is_due = self.clock_at.is_none_or(|at| now - at >= self.pace.clock_every);
        if !is_due || !self.batch.is_empty() {
            return;
        }
        self.clock_at = Some(now);
        let is_first = self.times.is_new();
        let Some(clock) = self.times.look(self.shared.clock.read()) else {
            return;
        };
        if !is_first {
            let synchronised = clock.synchronised;
            tracing::info!(synchronised, "the clock was set, or whether it is has changed");
        }
        let known = self.log.set_clock(clock);
        if !known.is_empty() {
            self.shared.changes.submit(known, None, now);
        }
    }

    /// Now, by the clock that the log was told of.
    fn now_us(&self) -> u64 {
        self.times.wall_us(self.shared.clock.received_us())
    }

    /// Whether the ids of events that are committed are in no row yet.
    fn is_dedup_behind(&self) -> bool {
        self.dedup.as_ref().is_some_and(|dedup| dedup.is_behind(self.base))
    }

    /// Waits for more events, where configured, until the batch is full.
    fn linger(&mut self) {
        let Some(until) = Instant::now().checked_add(self.linger_max) else {
            return;
        };
        while self.batch.events.len() < self.events_max
            && self.batch.size_bytes < self.size_bytes_max
            && !self.shared.is_stopping()
        {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            Rings::pause(left);
            self.gather();
        }
    }

    /// Does what no event asks for, or sleeps until there is something to do.
    fn idle(&mut self) {
        // Those who wait for a commit that will never be durable are not to wait for the next one.
        if let Err(error) = self.log.check() {
            return self.stop_short(error);
        }
        let now = Instant::now();
        let cursors_due =
            self.shared.cursors.waiting_since().map(|since| since + self.pace.cursor_delay_max);
        let retain_due = self.retain_due();
        if cursors_due.is_some_and(|due| due <= now) {
            self.commit_state(false);
        } else if retain_due <= now {
            if !self.committed_since && self.dedup.as_ref().is_some_and(Dedup::is_idle_save_due) {
                self.commit_state(true);
            }
            self.retain();
        } else {
            let due = cursors_due.map_or(retain_due, |due| due.min(retain_due));
            self.shared.rings.sleep(due - now);
        }
    }

    /// Commits the batch, empty or not, with the cursor moves that wait and what else is given.
    fn commit(&mut self, further: &[Control]) {
        let mut batch = std::mem::take(&mut self.batch);
        let save = self.dedup.as_ref().is_some_and(Dedup::is_save_due);
        let handed_over = self.hand_over(&mut batch, further, save);
        self.batch = batch;
        match handed_over {
            Ok(()) => {
                self.committed_since = true;
                self.go_on();
            }
            Err(error) => self.stop_short(error),
        }
    }

    /// Commits the cursor moves and changes of state alone, and if asked to the ids seen before the
    /// batch; a batch that waits goes on waiting.
    fn commit_state(&mut self, save: bool) {
        match self.hand_over(&mut Batch::default(), &[], save) {
            Ok(()) => self.committed_since = true,
            Err(error) => self.stop_short(error),
        }
    }

    fn retain_due(&self) -> Instant {
        let every = match self.committed_since {
            // A commit may come between two pieces of it, but no pause.
            _ if self.retain_more => Duration::ZERO,
            true => self.pace.retain_every,
            false => self.pace.retain_idle_every,
        };
        self.retained_at + every
    }

    /// Gives back what nobody needs any more.
    fn retain(&mut self) {
        self.retained_at = Instant::now();
        self.committed_since = false;
        self.retain_more = false;
        match self.log.retain(self.now_us()) {
            Ok(report) => {
                self.retain_fails = false;
                self.retain_more = report.more;
                if let (Some(first), Some(last)) = (report.losses.first(), report.losses.last()) {
                    tracing::warn!(
                        rows = report.losses.len(),
                        from = first.offsets.start,
                        to = last.offsets.end,
                        "events were dropped by policy; the loss ledger says which and why"
                    );
                }
                self.shared.count(|counters| {
                    counters.trimmed_files += u64::from(report.files);
                    counters.trimmed_bytes += report.size_bytes;
                    counters.loss_rows += report.losses.len() as u64;
                });
            }
            Err(error) => {
                self.shared.count(|counters| counters.failed_trims += 1);
                // Told once, counted every time.
                if !std::mem::replace(&mut self.retain_fails, true) {
                    tracing::error!(%error, "nothing could be trimmed");
                }
            }
        }
    }

    /// A commit was not made durable.
    fn stop_short(&mut self, error: CommitError) {
        let now = Instant::now();
        let failed = matches!(error, CommitError::Io { .. });
        let mut failed_events = 0;
        if failed {
            // Nothing that this commit covers may be acked, nor what ran ahead of its sync.
            failed_events = self.batch.events.len() as u64;
            self.batch.give_up(GivenUp::Failed);
            self.shared.in_flight.fail();
            if let Some(dedup) = &mut self.dedup {
                dedup.durable(self.shared.durable.load(Ordering::Acquire));
                dedup.void(*self.shared.in_flight.watermark().borrow());
            }
            self.shared.changes.failed(Vec::new(), now);
        }
        self.shared.count(|counters| {
            counters.failed_commits += 1;
            counters.failed_events += failed_events;
        });
        // The first retry comes at once: retention may make room, and a failed file is left for a
        // new one.
        let (since, pause) = match &self.standstill {
            None => (now, Duration::ZERO),
            Some(standstill) => {
                let same =
                    std::mem::discriminant(&standstill.error) == std::mem::discriminant(&error);
                let pause = match error {
                    CommitError::Quota { .. } => self.pace.quota_retry_every,
                    CommitError::DiskFull { .. }
                    | CommitError::LittleSpace { .. }
                    | CommitError::Io { .. } => self.pace.disk_retry_every,
                };
                (if same { standstill.since } else { now }, pause)
            }
        };
        // Told when it changes; and room that retention makes at once is nothing to tell.
        if failed || self.standstill.is_some() {
            let reason = error.to_string();
            let (health, admission) = match (&error, self.at_quota) {
                (CommitError::Io { .. }, _) => (Health::Failing { reason }, Admission::Hold),
                (CommitError::DiskFull { .. } | CommitError::LittleSpace { .. }, at_quota) => {
                    let refuses = at_quota == AtQuota::Refuse;
                    let admission = if refuses { Admission::Refuse } else { Admission::Hold };
                    (Health::DiskFull { reason }, admission)
                }
                (CommitError::Quota { .. }, AtQuota::Refuse) => {
                    (Health::AtQuota { reason }, Admission::Refuse)
                }
                (CommitError::Quota { .. }, _) => (Health::AtQuota { reason }, Admission::Hold),
            };
            if self.shared.set_health(health, admission) {
                tracing::error!(%error, failed_events, "the log stands still");
            }
            if admission == Admission::Refuse {
                self.refuse_waiting();
            }
        }
        let retry_at = now + pause;
        self.standstill = Some(Standstill { error, since, tried_at: now, retry_at });
    }

    /// Refuses what was taken before it was clear that the log is full: its devices are not to wait for
    /// an answer until there is room.
    fn refuse_waiting(&mut self) {
        let mut refused = self.batch.events.len() as u64;
        self.give_up_batch(GivenUp::Refused);
        self.shared.rings.drain(self.first_ring, usize::MAX, usize::MAX, |pending| {
            refused += 1;
            if let Some(ticket) = pending.ticket {
                ticket.mailbox.give_up(GivenUp::Refused);
            }
        });
        self.shared.count(|counters| counters.failed_events += refused);
    }

    /// Gives up what the log has taken nothing of: it is to come again, and is no resend then.
    fn give_up_batch(&mut self, why: GivenUp) {
        self.batch.give_up(why);
        if let Some(dedup) = &mut self.dedup {
            dedup.forget(self.base);
        }
    }

    /// A commit succeeded.
    fn go_on(&mut self) {
        if let Some(standstill) = self.standstill.take()
            && self.shared.set_health(Health::Storing, Admission::Open)
        {
            let stood = standstill.since.elapsed();
            tracing::info!(seconds = stood.as_secs_f64(), "the log takes events again");
        }
    }

    /// Waits for the next try while the log stands still, and tries.
    fn stand(&mut self, stopping: bool) -> Result<(), CommitterError> {
        let Some(Standstill { error, since, tried_at, retry_at }) = &self.standstill else {
            return Ok(());
        };
        let failed = matches!(error, CommitError::Io { .. });
        let failing = since.elapsed();
        if failed && failing >= self.pace.failing_max {
            return Err(CommitterError::Failing { failing, reason: error.to_string() });
        }
        let left = retry_at.saturating_duration_since(Instant::now());
        // A cursor that moved may be what retention waits for; one that was tried before waits.
        let waiting_since =
            self.shared.cursors.waiting_since().max(self.shared.changes.waiting_since());
        let moved = !failed && waiting_since.is_some_and(|since| since > *tried_at);
        if !left.is_zero() && !moved && !stopping {
            Rings::pause(left);
            return Ok(());
        }
        if !failed {
            // Files whose ids are in no row yet do not go.
            let save = self.is_dedup_behind();
            if waiting_since.is_some() || save {
                self.commit_state(save);
            }
            self.retain();
        }
        if self.batch.is_empty() {
            // It failed or was refused, and without events only this shows that the log takes some again.
            match self.log.make_room(self.now_us()) {
                Ok(()) => self.commit(&[probe()]),
                Err(error) => self.stop_short(error),
            }
        } else {
            self.commit(&[]);
        }
        Ok(())
    }

    /// Hands a batch to the log, with the cursor moves that wait, further control records and if asked to
    /// the ids seen before its end. On success the batch is empty; after an error it is as it was.
    fn hand_over(
        &mut self,
        batch: &mut Batch,
        further: &[Control],
        save: bool,
    ) -> Result<(), CommitError> {
        let now_us = self.now_us();
        let Self { log, shared, dedup, .. } = self;
        let mut control = shared.cursors.take();
        let moves = control.len();
        let changes = shared.changes.take(&mut control);
        control.extend_from_slice(&batch.riders);
        control.extend_from_slice(further);
        let save = save.then_some(self.base + batch.events.len() as u64);
        if let Some(dedup) = dedup {
            dedup.controls(batch.duplicates, save, &mut control);
        }
        let began = Instant::now();
        match log.commit(&batch.events, &control, now_us) {
            Ok(committed) => {
                let commit = Commit {
                    number: committed.commit,
                    events: batch.events.len() as u64,
                    size_bytes: batch.size_bytes as u64,
                    began,
                };
                if let Some(dedup) = dedup {
                    dedup.committed(commit.number, batch.duplicates, save, batch.size_bytes);
                    dedup.durable(shared.durable.load(Ordering::Acquire));
                    log.keep_from(dedup.needs_from());
                }
                if batch.duplicates > 0 {
                    shared.count(|counters| counters.duplicate_events += batch.duplicates);
                }
                self.base = committed.offsets.end;
                shared.changes.committed(committed.commit, changes, &mut batch.waiting);
                shared.in_flight.committed(commit, &mut batch.waiting, Instant::now());
                batch.clear();
                Ok(())
            }
            Err(error) => {
                // A failed sync may also have taken commits before this one. Else only what this one
                // carried is to be carried again: a log that is full is not written to for nothing.
                if moves > 0 || matches!(error, CommitError::Io { .. }) {
                    shared.cursors.carry_again(began);
                }
                if matches!(error, CommitError::Io { .. }) {
                    shared.changes.failed(changes, began);
                } else {
                    shared.changes.put_back(changes, began);
                }
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests;
