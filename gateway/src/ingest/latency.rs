//! Quantiles of a latency over the last minute, and its sum since the start.
//!
//! Two histograms take turns, so that a quantile tells of the last half to whole period and an old
//! spike goes away; time is an argument.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// How long one histogram records before the other takes its turn.
const PERIOD: Duration = Duration::from_secs(30);
/// Longest latency told apart, in microseconds: an hour.
const LATENCY_US_MAX: u64 = 3_600_000_000;
/// Significant digits: a quantile is right to one percent.
const DIGITS: u8 = 2;

/// Records latencies.
#[derive(Debug)]
pub(super) struct Latency {
    current: Histogram<u64>,
    previous: Histogram<u64>,
    turn_at: Instant,
    count: u64,
    sum_us: u64,
}

/// A look at a latency. Quantiles are 0 when nothing was recorded in the last minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencyStats {
    /// Recorded since the start of the process.
    pub count: u64,
    /// Their sum in microseconds.
    pub sum_us: u64,
    /// Median of the last minute in microseconds.
    pub p50_us: u64,
    /// 99th percentile of the last minute in microseconds.
    pub p99_us: u64,
    /// 99.9th percentile of the last minute in microseconds.
    pub p999_us: u64,
    /// Maximum of the last minute in microseconds.
    pub max_us: u64,
}

impl Latency {
    pub(super) fn new(now: Instant) -> Self {
        let histogram =
            Histogram::new_with_bounds(1, LATENCY_US_MAX, DIGITS).expect("constant bounds");
        Self {
            previous: histogram.clone(),
            current: histogram,
            turn_at: now + PERIOD,
            count: 0,
            sum_us: 0,
        }
    }

    /// Records the same latency `count` times.
    pub(super) fn record(&mut self, latency: Duration, count: u64, now: Instant) {
        self.turn(now);
        let latency_us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.current.saturating_record_n(latency_us.max(1), count);
        self.count += count;
        self.sum_us = self.sum_us.saturating_add(latency_us.saturating_mul(count));
    }

    pub(super) fn stats(&mut self, now: Instant) -> LatencyStats {
        self.turn(now);
        let mut recent = self.current.clone();
        recent.add(&self.previous).expect("the same bounds");
        let quantile = |q| {
            if recent.is_empty() { 0 } else { recent.value_at_quantile(q) }
        };
        LatencyStats {
            count: self.count,
            sum_us: self.sum_us,
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
            max_us: if recent.is_empty() { 0 } else { recent.max() },
        }
    }

    fn turn(&mut self, now: Instant) {
        if now < self.turn_at {
            return;
        }
        if now < self.turn_at + PERIOD {
            std::mem::swap(&mut self.current, &mut self.previous);
        } else {
            self.previous.reset();
        }
        self.current.reset();
        self.turn_at = now + PERIOD;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_forget_and_sums_do_not() {
        let start = Instant::now();
        let mut latency = Latency::new(start);
        assert_eq!(latency.stats(start), LatencyStats::default());

        latency.record(Duration::from_millis(1), 99, start);
        latency.record(Duration::from_secs(1), 1, start);
        let stats = latency.stats(start);
        assert_eq!((stats.count, stats.sum_us), (100, 99_000 + 1_000_000));
        assert!((990..=1010).contains(&stats.p50_us), "{stats:?}");
        assert!((990_000..=1_010_000).contains(&stats.p999_us), "{stats:?}");

        // One turn later the old values still count, another turn later they are gone.
        latency.record(Duration::from_millis(2), 1, start + PERIOD);
        assert!(latency.stats(start + PERIOD).max_us > 900_000);
        let stats = latency.stats(start + 2 * PERIOD);
        assert!((1990..=2010).contains(&stats.max_us), "{stats:?}");
        assert_eq!(stats.count, 101);
        assert_eq!(latency.stats(start + 10 * PERIOD).max_us, 0);
    }

    #[test]
    fn extremes_are_recorded_not_lost() {
        let now = Instant::now();
        let mut latency = Latency::new(now);
        latency.record(Duration::ZERO, 1, now);
        latency.record(Duration::MAX, 1, now);
        let stats = latency.stats(now);
        assert_eq!(stats.count, 2);
        assert!(stats.max_us >= LATENCY_US_MAX);
    }
}
