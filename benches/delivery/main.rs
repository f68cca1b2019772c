//! The way out, measured: what a sink reaches beside the plainest client there is, and what the
//! failures of others cost it. The upstreams are HTTP receivers on loopback, in a thread of their own.
//!
//! - *ceiling*: a forwarder that drains a stored backlog, beside a plain reqwest loop that posts the
//!   same bodies from memory; events per second, and CPU per event without the receiver's.
//! - *poison*: one event in a hundred is refused: with an answer per event, or with the whole request;
//!   of any device, or of one device in a hundred. The rest per second as a part of the clean rate,
//!   POSTs, and whether all poison is in the dead letters and arrives when it is requeued.
//! - *isolation*: a gateway with one sink at half of what its upstream takes, alone, beside a sink
//!   whose upstream is dead, and beside one at 1 % speed.
//! - *live-first*: after an outage of a million events, the age at which new events reach the upstream
//!   while the backlog drains.
//! - *memory*: resident memory of a gateway that drains a large backlog.
//!
//! Contestants take turns, and ratios are medians of the rounds' ratios. *ceiling* and *poison* stand
//! on `bridge` and `storage` alone; the others run the real binary.
//!
//! `cargo bench -p gateway --bench delivery [-- MODE ...] [--quick] [--rounds N] [--seconds N]
//! [--gigabytes N] [--events N]`. Figures are reported, never asserted.

mod backlog;
mod ceiling;
#[path = "../device.rs"]
mod device;
mod fleet;
mod isolation;
mod live_first;
mod memory;
mod poison;
#[path = "../rounds.rs"]
mod rounds;
mod upstream;

use std::time::Duration;

use self::rounds::Rounds;

/// What is asked for.
struct Plan {
    rounds: Rounds,
    /// Events of a backlog that a contestant drains.
    events: u64,
    /// Events of the outage.
    outage: u64,
    /// Backlog of the memory bench.
    gigabytes: f64,
}

type Mode = fn(&Plan) -> anyhow::Result<()>;

const MODES: [(&str, Mode); 5] = [
    ("ceiling", ceiling::run),
    ("poison", poison::run),
    ("isolation", isolation::run),
    ("live-first", live_first::run),
    ("memory", memory::run),
];

fn main() -> anyhow::Result<()> {
    gateway::install_tls_provider();
    let full = Rounds { count: 5, time: Duration::from_secs(8) };
    let quick = Rounds { count: 1, time: Duration::from_secs(3) };
    let (mut modes, mut is_quick) = (Vec::new(), false);
    let (mut events, mut gigabytes) = (None, None);
    let args: Vec<String> = std::env::args().skip(1).collect();
    is_quick |= args.iter().any(|arg| arg == "--quick");
    let rounds = Rounds::from_args(args.into_iter(), full, quick, |arg, value| {
        match (arg, MODES.iter().find(|(name, _)| *name == arg)) {
            (_, Some(mode)) => modes.push(mode),
            ("--events", _) => events = Some(value()?.parse()?),
            ("--gigabytes", _) => gigabytes = Some(value()?.parse()?),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let plan = Plan {
        rounds,
        events: events.unwrap_or(if is_quick { 50_000 } else { 300_000 }),
        outage: events.unwrap_or(if is_quick { 100_000 } else { 1_000_000 }),
        gigabytes: gigabytes.unwrap_or(if is_quick { 0.1 } else { 10.0 }),
    };
    for (name, run) in if modes.is_empty() { MODES.iter().collect() } else { modes } {
        println!("== {name}");
        run(&plan)?;
        println!();
    }
    Ok(())
}
