//! How long a bench runs, and what it says of its rounds.

use std::time::Duration;

use anyhow::{Context, ensure};

/// Rounds in which the contestants take turns, so that a noisy machine is noisy for all of them.
#[derive(Clone, Copy)]
pub(crate) struct Rounds {
    pub(crate) count: usize,
    /// How long each contestant runs in a round.
    pub(crate) time: Duration,
}

impl Rounds {
    /// Reads `[--quick] [--seconds N] [--rounds N]`. What else the bench takes goes to `own` with a
    /// way to its value; that says whether it knows it.
    pub(crate) fn from_args(
        mut args: impl Iterator<Item = String>,
        full: Self,
        quick: Self,
        mut own: impl FnMut(&str, &mut dyn FnMut() -> anyhow::Result<String>) -> anyhow::Result<bool>,
    ) -> anyhow::Result<Self> {
        let mut rounds = full;
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--quick" => rounds = quick,
                "--seconds" => rounds.time = Duration::try_from_secs_f64(value()?.parse()?)?,
                "--rounds" => rounds.count = value()?.parse()?,
                // What cargo passes to every bench.
                "--bench" => {}
                other => ensure!(own(other, &mut value)?, "unknown argument {other}"),
            }
        }
        ensure!(rounds.count > 0 && !rounds.time.is_zero(), "nothing to measure");
        Ok(rounds)
    }
}

/// The median of one figure over all rounds.
pub(crate) fn median<T>(outcomes: &[T], figure: impl Fn(&T) -> f64) -> f64 {
    let mut figures: Vec<f64> = outcomes.iter().map(figure).collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
