//! Room for what comes: quota, minimum free disk, ballast, and what goes by retention.
//!
//! Invariant: what a sink still has to have goes only after the loss ledger says so; the checkpoint says
//! where the log starts before a file is removed.
//! Deliberately absent: which files are expendable (see `retention`).

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{AtQuota, RetentionReport, StoreOptions, Writer};
use crate::disk::is_full;
use crate::head::Tail;
use crate::log::{self, Span};
use crate::passed::Lanes;
use crate::ranges::Ranges;
use crate::retention::{self, Rules};
use crate::{CommitError, Loss, LossReason, StateError};

/// Files that one call of [`Writer::retain`] removes: it runs where commits wait for it.
const RETAIN_FILES_MAX: usize = 2;

/// A fully delivered active file is worth replacing from this part of a full one on.
const WORTH_ROLLING: u64 = 8;

impl Writer {
    /// Sees to it that there is room for events: what no sink needs goes, and under
    /// [`AtQuota::DropOldest`] what one needs.
    ///
    /// # Errors
    /// [`CommitError::Quota`], [`CommitError::LittleSpace`] or [`CommitError::DiskFull`] if there is none;
    /// [`CommitError::Io`].
    pub fn make_room(&mut self, now_us: u64) -> Result<(), CommitError> {
        self.hold_ballast(now_us)?;
        self.make_room_in_log(now_us)
    }

    /// Sees to it that the ballast is held: on a disk that was full, events wait for that.
    fn hold_ballast(&mut self, now_us: u64) -> Result<(), CommitError> {
        let drop_oldest = self.shared.options.at_quota == AtQuota::DropOldest;
        let mut report = RetentionReport::default();
        while let Err(error) = self.ballast.hold(self.shared.state.used_bytes()) {
            let path = self.ballast.path();
            if !is_full(&error) {
                let reason = error.to_string();
                return Err(CommitError::Io { path, reason });
            }
            if self.shared.log.remove_spare() {
                continue;
            }
            // As at the quota: what only a wish keeps goes first.
            let removed = report.files;
            self.trim(now_us, true, &mut report)?;
            if report.files == removed && !(drop_oldest && self.drop_oldest(now_us, &mut report)?) {
                return Err(CommitError::DiskFull { path });
            }
        }
        Ok(())
    }

    /// Sees to it that the log is below its quota, and that enough of the disk is free.
    fn make_room_in_log(&mut self, now_us: u64) -> Result<(), CommitError> {
        let drop_oldest = self.shared.options.at_quota == AtQuota::DropOldest;
        let mut report = RetentionReport::default();
        while let Err(error) = self.has_room() {
            if self.shared.log.remove_spare() {
                continue;
            }
            // What only a wish keeps goes first, and no more of it than is needed.
            let removed = report.files;
            self.trim(now_us, true, &mut report)?;
            if report.files == removed && !(drop_oldest && self.drop_oldest(now_us, &mut report)?) {
                return Err(error);
            }
        }
        Ok(())
    }

    fn has_room(&self) -> Result<(), CommitError> {
        let StoreOptions { quota_bytes, free_bytes_min, .. } = self.shared.options;
        let used_bytes = self.shared.log.used_bytes();
        if used_bytes >= quota_bytes {
            return Err(CommitError::Quota { used_bytes, quota_bytes });
        }
        // What cannot be asked is no reason to stand still.
        if free_bytes_min > 0
            && let Ok(free_bytes) = self.shared.disk.free_bytes()
            && free_bytes < free_bytes_min
        {
            let path = self.shared.disk.path(log::FOLDER);
            return Err(CommitError::LittleSpace { path, free_bytes, free_bytes_min });
        }
        Ok(())
    }

    /// Applies retention: trims behind the slowest cursor, and by policy. Removes a few files at most
    /// and says whether there are more, so that commits do not wait for long.
    ///
    /// # Errors
    /// [`StateError`] if the loss ledger could not be written; then nothing was removed.
    pub fn retain(&mut self, now_us: u64) -> Result<RetentionReport, StateError> {
        self.shared.now_us.store(now_us, Ordering::Relaxed);
        let mut report = RetentionReport::default();
        let limited = self.limit_lags(now_us, &mut report);
        let limited = limited.map_err(|error| self.state_failed(error));
        match limited.and_then(|()| self.trim(now_us, false, &mut report)) {
            Ok(()) => Ok(report),
            Err(error) => {
                let disk_full = matches!(error, CommitError::DiskFull { .. });
                if disk_full {
                    self.ballast.release();
                }
                Err(StateError { disk_full, reason: error.to_string() })
            }
        }
    }

    /// Moves sinks that lag too far over what they can no longer have.
    fn limit_lags(&mut self, now_us: u64, report: &mut RetentionReport) -> Result<(), StateError> {
        let tail = self.shared.progress.tail();
        let losses: Vec<Loss> = self
            .shared
            .options
            .sinks
            .iter()
            .filter(|sink| sink.lag_bytes_max > 0)
            .flat_map(|sink| {
                let cursor = self.shared.progress.projection().cursors.get(&sink.name);
                let offsets = cursor.and_then(|cursor| {
                    Some(cursor..self.within_lag(cursor, sink.lag_bytes_max, &tail)?)
                });
                let owed = offsets.map(|offsets| self.owed(&sink.name, offsets));
                self.losses(&sink.name, &owed.unwrap_or_default(), LossReason::Lag, now_us)
            })
            .collect();
        if !losses.is_empty() {
            let start = self.shared.progress.projection().start;
            self.save(start, &losses)?;
            report.losses.extend(losses);
        }
        Ok(())
    }

    /// Where a cursor that lags by more than the limit has to go: to a little less than the limit,
    /// so that it is not moved, and written down, a few events at a time.
    fn within_lag(&self, cursor: u64, lag_bytes_max: u64, tail: &Tail) -> Option<u64> {
        let lag_bytes = |from| {
            let before = self.shared.event_bytes_before(from, tail).ok()?;
            Some(tail.event_bytes.saturating_sub(before))
        };
        if lag_bytes(cursor)? <= lag_bytes_max {
            return None;
        }
        let target_bytes = lag_bytes_max - lag_bytes_max / 16;
        let (mut low, mut high) = (cursor, tail.position.offset);
        while low < high {
            let middle = low.midpoint(high);
            if lag_bytes(middle)? > target_bytes {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Some(low)
    }

    /// Removes a few files that no sink needs and no wish keeps; at the quota wishes do not count.
    fn trim(
        &mut self,
        now_us: u64,
        at_quota: bool,
        report: &mut RetentionReport,
    ) -> Result<(), CommitError> {
        let options = &self.shared.options;
        let floor = self.shared.progress.projection().cursors.floor();
        let mut rules = Rules {
            sinks: floor.is_some(),
            retain_bytes: options.retain_bytes,
            retain_age_us: options.retain_age_us,
        };
        if at_quota && rules.sinks {
            (rules.retain_bytes, rules.retain_age_us) = (0, 0);
        }
        let watermark = self.tail.position.offset;
        let floor = floor.unwrap_or(watermark).min(self.kept_from);
        let mut spans = self.shared.log.spans(watermark);
        let age_us = |span: &Span| {
            let end = span.offsets.end;
            // What is not durable yet has only just come.
            if end > self.shared.progress.mark().watermark {
                return 0;
            }
            // For a last event that is damaged the one after it speaks, which is not older.
            let event = [end.saturating_sub(1), end]
                .into_iter()
                .find_map(|offset| self.shared.event_at(offset).ok().flatten());
            let boots = &self.shared.progress.projection().boots;
            event.map_or(0, |event| boots.age_us(&event, self.clock.as_ref(), now_us))
        };
        let mut count = retention::expendable(&spans, floor, rules, RETAIN_FILES_MAX, age_us);
        if let Some(active) = spans.last()
            && count + 1 == spans.len()
            && !active.offsets.is_empty()
            && active.offsets.end <= floor
            && (at_quota || active.size_bytes >= self.file_bytes_max / WORTH_ROLLING)
            && !rules.keeps(0, || age_us(active))
        {
            self.roll()?;
            spans = self.shared.log.spans(watermark);
            count = spans.len() - 1;
        }
        if count == 0 {
            return Ok(());
        }
        report.more = count == RETAIN_FILES_MAX;
        let mut losses = Vec::new();
        if !rules.sinks {
            let offsets = spans[0].offsets.start..spans[count - 1].offsets.end;
            losses.extend(self.loss(None, offsets, LossReason::Expired, now_us));
        }
        self.remove(&spans[..count], losses, report).map_err(|error| self.state_failed(error))
    }

    /// Drops the oldest file, whoever still needs it. Says whether there was one.
    fn drop_oldest(
        &mut self,
        now_us: u64,
        report: &mut RetentionReport,
    ) -> Result<bool, CommitError> {
        let watermark = self.tail.position.offset;
        let mut spans = self.shared.log.spans(watermark);
        if spans.len() < 2 {
            if spans.first().is_none_or(|active| active.offsets.is_empty()) {
                return Ok(false);
            }
            self.roll()?;
            spans = self.shared.log.spans(watermark);
        }
        let end = spans[0].offsets.end;
        if end > self.kept_from {
            return Ok(false);
        }
        let (start, cursors): (u64, Vec<(String, u64)>) = {
            let projection = self.shared.progress.projection();
            let configured = projection.cursors.configured();
            let cursors = configured.map(|(sink, cursor)| (sink.to_owned(), cursor.offset));
            (projection.start, cursors.collect())
        };
        let losses = if cursors.is_empty() {
            self.loss(None, start..end, LossReason::Quota, now_us).into_iter().collect()
        } else {
            let of = |(sink, cursor): (String, u64)| {
                self.losses(&sink, &self.owed(&sink, cursor..end), LossReason::Quota, now_us)
            };
            cursors.into_iter().flat_map(of).collect()
        };
        self.remove(&spans[..1], losses, report).map_err(|error| self.state_failed(error))?;
        Ok(true)
    }

    fn loss(
        &self,
        sink: Option<String>,
        offsets: Range<u64>,
        reason: LossReason,
        at_us: u64,
    ) -> Option<Loss> {
        if offsets.is_empty() {
            return None;
        }
        let size_bytes = self.shared.event_bytes_in(&offsets);
        Some(Loss::new(sink, offsets, size_bytes, reason, at_us))
    }

    fn losses(&self, sink: &str, owed: &Ranges, reason: LossReason, at_us: u64) -> Vec<Loss> {
        let of =
            |range: &Range<u64>| self.loss(Some(sink.to_owned()), range.clone(), reason, at_us);
        owed.iter().filter_map(of).collect()
    }

    /// What of a range from its cursor on a sink still is to have: not what it got ahead of its turn.
    fn owed(&self, sink: &str, offsets: Range<u64>) -> Ranges {
        let owed = Ranges::from(offsets);
        match self.shared.passed(sink) {
            Ok(passed) => owed.without(&passed.done(Lanes::ALL)),
            // Then more is called lost than is.
            Err(_) => owed,
        }
    }

    /// Removes the first files, after the ledger and the checkpoint say so.
    fn remove(
        &mut self,
        spans: &[Span],
        losses: Vec<Loss>,
        report: &mut RetentionReport,
    ) -> Result<(), StateError> {
        let Some(last) = spans.last() else {
            return Ok(());
        };
        self.save(last.offsets.end, &losses)?;
        self.shared.log.remove_first(spans.len());
        report.files += spans.len() as u32;
        report.size_bytes += spans.iter().map(|span| span.size_bytes).sum::<u64>();
        report.losses.extend(losses);
        Ok(())
    }
}
