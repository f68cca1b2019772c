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
//! | the log says | then |
//! | --- | --- |
//! | quota reached | cursors are committed alone, retention runs, the batch is tried again; devices are held or refused meanwhile |
//! | disk full, or too little free | the same, slower, and the gateway is not ready |
//! | write or sync failed | the batch and what is not durable is failed: its connections close. The rings rest until a probe without events succeeds; if none does for long, the committer ends, and the process with it |

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use storage::{
    AtQuota, CommitError, Committed, Control, Event, Mark, RetentionReport, StateError, Writer,
};

use super::in_flight::{Commit, Waiting};
use super::{Admission, Pending, Rings, Shared};
use crate::config::IngestConfig;

/// What the committer asks of the log. [`Writer`] is the log; the benches put in its place what
/// acks without storing, or what a plain file would cost.
pub trait Append: Send + 'static {
    /// See [`Writer::on_durable`].
    fn on_durable(&mut self, callback: impl Fn(Mark) + Send + Sync + 'static);
    /// See [`Writer::on_failure`]. A log whose commits are durable when they return has nothing to
    /// tell.
    fn on_failure(&mut self, _callback: impl Fn() + Send + Sync + 'static) {}
    /// See [`Writer::check`].
    ///
    /// # Errors
    /// See [`Writer::check`].
    fn check(&mut self) -> Result<(), CommitError> {
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
    fn check(&mut self) -> Result<(), CommitError> {
        self.check()
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
    waiting: Vec<Waiting>,
    size_bytes: usize,
}

impl Batch {
    fn push(&mut self, pending: Pending) {
        self.size_bytes += pending.event.size_bytes();
        self.events.push(pending.event);
        if let Some(ticket) = pending.ticket {
            self.waiting.push(Waiting { ticket, read_at: pending.read_at });
        }
    }

    /// Leaves an empty batch that keeps its buffers.
    fn clear(&mut self) {
        self.events.clear();
        self.waiting.clear();
        self.size_bytes = 0;
    }

    /// Closes the connections whose events are in here, and forgets the events.
    fn fail(&mut self) {
        self.waiting.iter().for_each(|waiting| waiting.ticket.mailbox.fail());
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
    ) -> Self {
        let seen = Arc::clone(&shared);
        log.on_durable(move |mark| seen.in_flight.durable(mark, Instant::now()));
        let woken = Arc::clone(&shared);
        log.on_failure(move || woken.rings.wake_committer());
        Self {
            log,
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
        self.batch.fail();
        if self.shared.cursors.waiting_since().is_some() {
            self.commit_cursors();
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
        if !self.batch.events.is_empty() {
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
        let Self { batch, shared, .. } = self;
        let events_max = self.events_max.saturating_sub(batch.events.len());
        let size_bytes_max = self.size_bytes_max.saturating_sub(batch.size_bytes);
        let mut discarded = 0;
        shared.rings.drain(self.first_ring, events_max, size_bytes_max, |pending| {
            // What follows a failed event is sent again behind it: stored now, it would be first.
            if pending.ticket.as_ref().is_some_and(|ticket| ticket.mailbox.is_failed()) {
                discarded += 1;
            } else {
                batch.push(pending);
            }
        });
        if discarded > 0 {
            shared.count(|counters| counters.failed_events += discarded);
        }
        self.first_ring = (self.first_ring + 1) % usize::from(shared.rings.partitions());
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
            self.commit_cursors();
        } else if retain_due <= now {
            self.retain();
        } else {
            let due = cursors_due.map_or(retain_due, |due| due.min(retain_due));
            self.shared.rings.sleep(due - now);
        }
    }

    /// Commits the batch, empty or not, with the cursor moves that wait and what else is given.
    fn commit(&mut self, further: &[Control]) {
        match hand_over(&mut self.log, &self.shared, &mut self.batch, further) {
            Ok(()) => {
                self.committed_since = true;
                self.go_on();
            }
            Err(error) => self.stop_short(error),
        }
    }

    /// Commits the cursor moves alone; a batch that waits goes on waiting.
    fn commit_cursors(&mut self) {
        match hand_over(&mut self.log, &self.shared, &mut Batch::default(), &[]) {
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
        match self.log.retain(self.shared.now_us()) {
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
            self.batch.fail();
            self.shared.in_flight.fail();
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
        }
        let retry_at = now + pause;
        self.standstill = Some(Standstill { error, since, tried_at: now, retry_at });
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
        let waiting_since = self.shared.cursors.waiting_since();
        let moved = !failed && waiting_since.is_some_and(|since| since > *tried_at);
        if !left.is_zero() && !moved && !stopping {
            Rings::pause(left);
            return Ok(());
        }
        if !failed {
            if waiting_since.is_some() && !self.batch.events.is_empty() {
                self.commit_cursors();
            }
            self.retain();
        }
        // After a failure the batch is empty: only a record of its own shows that the disk writes.
        let probe = failed.then(probe);
        self.commit(probe.as_slice());
        Ok(())
    }
}

/// Hands a batch to the log, with the cursor moves that wait and further control records. On success
/// the batch is empty; after an error it is as it was.
fn hand_over<A: Append>(
    log: &mut A,
    shared: &Shared,
    batch: &mut Batch,
    further: &[Control],
) -> Result<(), CommitError> {
    let mut control = shared.cursors.take();
    let moves = control.len();
    control.extend_from_slice(further);
    let began = Instant::now();
    match log.commit(&batch.events, &control, shared.now_us()) {
        Ok(committed) => {
            let commit = Commit {
                number: committed.commit,
                events: batch.events.len() as u64,
                size_bytes: batch.size_bytes as u64,
                began,
            };
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
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests;
