//! How fast things go, and so how long they will take. Pure: time is an argument.
//!
//! Owns: [`Rate`], a counter's slope averaged over the recent past, and the estimates that stand on
//! it. They are estimates: each says how things will be if they go on as they do now.

use std::time::{Duration, Instant};

/// The slope of a counter, as an exponentially weighted mean of what was observed: an observation
/// that is one `window` old weighs a third of a new one. Until a window has passed it is the mean
/// since the first observation, and not drawn towards nothing.
#[derive(Clone, Debug)]
pub(super) struct Rate {
    window: Duration,
    last: Option<(Instant, u64)>,
    sum: f64,
    weight: f64,
}

impl Rate {
    /// Over the recent past of about `window`.
    pub(super) fn new(window: Duration) -> Self {
        Self { window, last: None, sum: 0.0, weight: 0.0 }
    }

    /// The counter stands at `total`. One that went back was started anew and adds nothing.
    pub(super) fn observe(&mut self, now: Instant, total: u64) {
        if let Some((at, before)) = self.last {
            let seconds = now.saturating_duration_since(at).as_secs_f64();
            if seconds <= 0.0 {
                return;
            }
            let keep = (-seconds / self.window.as_secs_f64()).exp();
            let slope = total.saturating_sub(before) as f64 / seconds;
            self.sum = self.sum * keep + slope * (1.0 - keep);
            self.weight = self.weight * keep + (1.0 - keep);
        }
        self.last = Some((now, total));
    }

    /// Per second; 0 until there are two observations.
    pub(super) fn per_second(&self) -> f64 {
        if self.weight > 0.0 { self.sum / self.weight } else { 0.0 }
    }
}

/// Seconds until a lag is gone, while it is drained at `drain` and grows at `ingest` events per
/// second; nothing if it does not shrink. A lag of less than a second's draining is events under
/// way, and not one that has to shrink.
pub(super) fn eta_seconds(lag_events: u64, drain: f64, ingest: f64) -> Option<f64> {
    let lag = lag_events as f64;
    if lag_events == 0 {
        Some(0.0)
    } else if lag <= drain {
        Some(lag / drain)
    } else {
        // Rates that are equal but for noise would give any time at all.
        (drain > ingest * 1.001).then(|| lag / (drain - ingest))
    }
}

/// Seconds until room is used up; nothing if nothing comes.
pub(super) fn seconds_left(room_bytes: u64, bytes_per_second: f64) -> Option<f64> {
    // Less than a byte in twenty minutes is noise.
    (bytes_per_second > 0.001).then(|| room_bytes as f64 / bytes_per_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(10);

    fn near(left: f64, right: f64) -> bool {
        (left - right).abs() < 0.01 * right.abs().max(1.0)
    }

    #[test]
    fn a_steady_counter_has_its_rate_from_the_second_observation_on() {
        let (mut rate, start) = (Rate::new(WINDOW), Instant::now());
        rate.observe(start, 5_000);
        assert!(near(rate.per_second(), 0.0));
        for second in 1..100 {
            rate.observe(start + Duration::from_secs(second), 5_000 + 300 * second);
            assert!(near(rate.per_second(), 300.0), "{} after {second} s", rate.per_second());
        }
    }

    #[test]
    fn a_change_shows_after_a_window_and_not_at_once() {
        let (mut rate, start) = (Rate::new(WINDOW), Instant::now());
        let at = |tenths| start + Duration::from_millis(100 * tenths);
        (0..=1_000).for_each(|tenth| rate.observe(at(tenth), 10 * tenth));
        // It stops: a window later a third is left, whatever the beat of the observations.
        rate.observe(at(1_001), 10_000);
        assert!(rate.per_second() > 95.0);
        rate.observe(at(1_050), 10_000);
        rate.observe(at(1_100), 10_000);
        assert!(near(rate.per_second(), 100.0 / std::f64::consts::E), "{}", rate.per_second());
        rate.observe(at(2_000), 10_000);
        assert!(rate.per_second() < 0.1);
    }

    #[test]
    fn a_counter_that_starts_anew_or_a_clock_that_stands_does_no_harm() {
        let (mut rate, start) = (Rate::new(WINDOW), Instant::now());
        rate.observe(start, 100);
        rate.observe(start, 200);
        assert!(near(rate.per_second(), 0.0));
        rate.observe(start + WINDOW, 7);
        assert!(near(rate.per_second(), 0.0));
    }

    #[test]
    fn a_lag_that_grows_has_no_end() {
        assert_eq!(eta_seconds(0, 0.0, 100.0), Some(0.0));
        assert_eq!(eta_seconds(50, 100.0, 100.0), Some(0.5));
        assert_eq!(eta_seconds(9_000, 1_000.0, 100.0), Some(10.0));
        assert_eq!(eta_seconds(9_000, 100.0, 100.0), None);
        assert_eq!(eta_seconds(9_000, 0.0, 0.0), None);
        assert_eq!(seconds_left(3_600, 1.0), Some(3_600.0));
        assert_eq!(seconds_left(3_600, 0.0), None);
    }
}
