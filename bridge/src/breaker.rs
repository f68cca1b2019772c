//! The circuit breaker as it is seen: whether requests go to an upstream at all. Pure.
//!
//! Owns: [`Circuit`], and how often it has opened. What opens and closes it is `delivery`: a failure
//! of the upstream opens it, for a pause with exponential bound and full jitter (`retry`), or for as
//! long as the upstream asked; then one request tries (half-open), and the first that comes through
//! closes it. An event that is refused opens nothing: the upstream works.

use std::time::Instant;

use crate::delivery::{Moment, Trouble};

/// Whether requests go to an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Circuit {
    /// They do.
    #[default]
    Closed,
    /// None does: the upstream failed, and is left alone for a while.
    Open,
    /// One does, to see whether it works again.
    HalfOpen,
}

/// Follows the circuit of one sink.
#[derive(Clone, Debug, Default)]
pub(crate) struct Breaker {
    circuit: Circuit,
    opened: u64,
}

impl Breaker {
    /// `trouble` is what stands in the way, and `resumes_at` when it is tried again.
    pub(crate) fn update(
        &mut self,
        trouble: Option<&Trouble>,
        resumes_at: Option<Instant>,
        now: Moment,
    ) {
        let circuit = match (trouble, resumes_at) {
            // A store that fails is on this side.
            (None | Some(Trouble::Store(_)), _) => Circuit::Closed,
            (Some(_), Some(at)) if now.at < at => Circuit::Open,
            (Some(_), _) => Circuit::HalfOpen,
        };
        self.opened += u64::from(circuit == Circuit::Open && self.circuit != Circuit::Open);
        self.circuit = circuit;
    }

    /// Where it is.
    pub(crate) fn circuit(&self) -> Circuit {
        self.circuit
    }

    /// How often it has opened.
    pub(crate) fn opened(&self) -> u64 {
        self.opened
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_opens_with_each_failure_and_closes_when_one_comes_through() {
        let (mut breaker, start) = (Breaker::default(), Instant::now());
        let down = Trouble::Upstream("503".into());
        let mut look = |trouble: Option<&Trouble>, resumes_s: u64, at_s: u64| {
            let at = |seconds| start + Duration::from_secs(seconds);
            let now = Moment { at: at(at_s), unix_us: 0 };
            breaker.update(trouble, trouble.map(|_| at(resumes_s)), now);
            (breaker.circuit(), breaker.opened())
        };
        assert_eq!(look(None, 0, 0), (Circuit::Closed, 0));
        assert_eq!(look(Some(&down), 5, 0), (Circuit::Open, 1));
        assert_eq!(look(Some(&down), 5, 4), (Circuit::Open, 1));
        assert_eq!(look(Some(&down), 5, 5), (Circuit::HalfOpen, 1));
        let held = Trouble::Held("401".into());
        assert_eq!(look(Some(&held), 35, 6), (Circuit::Open, 2), "the try failed");
        assert_eq!(look(Some(&held), 35, 35), (Circuit::HalfOpen, 2));
        assert_eq!(look(None, 0, 36), (Circuit::Closed, 2));
        let store = Trouble::Store("disk".into());
        assert_eq!(look(Some(&store), 60, 37), (Circuit::Closed, 2), "the upstream is fine");
    }
}
