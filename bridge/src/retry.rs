//! How long to wait after a failure.
//!
//! Owns: exponential backoff with full jitter, capped: the pause is drawn evenly between nothing
//! and a bound that doubles, so that gateways that lost the same upstream do not come back in step.
//! Pure: randomness is an argument.

use std::time::Duration;

/// Longest pause that an upstream's `Retry-After` can ask for: a mistaken header must not stop a
/// sink for days.
pub(crate) const RETRY_AFTER_MAX: Duration = Duration::from_hours(1);

/// Counts failures in a row and gives the pause after each.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    bound_min: Duration,
    bound_max: Duration,
    failures: u32,
}

impl Backoff {
    /// The first pause is drawn up to `bound_min`, no pause is longer than `bound_max`.
    pub(crate) fn new(bound_min: Duration, bound_max: Duration) -> Self {
        Self { bound_min, bound_max, failures: 0 }
    }

    /// The pause after one more failure. `random` is drawn evenly from `0.0..1.0`.
    pub(crate) fn pause(&mut self, random: f64) -> Duration {
        let doubled = self.bound_min.saturating_mul(1 << self.failures.min(31));
        self.failures = self.failures.saturating_add(1);
        doubled.min(self.bound_max).mul_f64(random)
    }

    /// The longest pause.
    pub(crate) fn pause_max(&self) -> Duration {
        self.bound_max
    }

    /// It worked: the next failure is the first again.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_bound_doubles_up_to_the_cap_and_starts_over_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let bounds: Vec<_> = (0..6).map(|_| backoff.pause(1.0).as_millis()).collect();
        assert_eq!(bounds, [100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.pause(0.5), Duration::from_millis(50));
    }

    proptest! {
        #[test]
        fn no_pause_passes_the_cap(
            min_ms in 1_u64..10_000, more_ms in 0_u64..10_000_000, failures in 0_u32..200,
            random in 0.0..1.0_f64,
        ) {
            let cap = Duration::from_millis(min_ms + more_ms);
            let mut backoff = Backoff::new(Duration::from_millis(min_ms), cap);
            for _ in 0..failures {
                prop_assert!(backoff.pause(random) <= cap);
            }
        }
    }
}
