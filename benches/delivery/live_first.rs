//! How old new events are when they arrive, while the backlog of an outage drains.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::Plan;
use super::backlog::{self, Poison};
use super::fleet::{Fleet, Server};
use super::upstream::Receivers;

const PAYLOAD_BYTES: usize = 128;
const LIVE_EVENTS_PER_SECOND: f64 = 1_000.0;
/// What the upstream takes: the backlog lasts for a while.
const CAPACITY: f64 = 40_000.0;
/// How long ago the outage has begun.
const OUTAGE: Duration = Duration::from_hours(1);

pub(crate) fn run(plan: &Plan) -> anyhow::Result<()> {
    let receivers = Receivers::start()?;
    println!(
        "an outage of {} events of {PAYLOAD_BYTES} B; {LIVE_EVENTS_PER_SECOND} live events/s, an \
         upstream that takes {CAPACITY}/s",
        plan.outage
    );
    println!(
        "{:<24} {:>10} {:>12} {:>9} {:>9} {:>9}",
        "backlog", "drained s", "live events", "p50 ms", "p99 ms", "max ms"
    );
    for (name, more) in [
        ("in_order", "backlog = \"in_order\"\n"),
        ("live_first, 50 %", "backlog = \"live_first\"\n"),
        ("live_first, 90 %", "backlog = \"live_first\"\nbacklog_share_percent = 90\n"),
    ] {
        let dir = backlog::place()?;
        let data = dir.path().join("data");
        let (store, writer) =
            backlog::fill(&data, plan.outage, PAYLOAD_BYTES, Poison::None, OUTAGE)?;
        writer.close()?;
        drop(store);
        let upstream = receivers.add(Duration::ZERO, CAPACITY)?;
        let url = upstream.url();
        let sink = format!(
            "[[sink]]\nname = \"up\"\ntype = \"http\"\nformat = \"ndjson\"\nurl = \"{url}\"\n{more}"
        );
        let server = Server::start(dir.path(), &sink)?;
        let began = Instant::now();
        let fleet = Fleet::start(server.addresses.mqtt[0], LIVE_EVENTS_PER_SECOND, PAYLOAD_BYTES);
        // The live events count for nothing here: they are not of the outage.
        while upstream.events() < plan.outage + fleet.acked() / 2 {
            ensure!(began.elapsed() < Duration::from_mins(5), "the backlog does not drain");
            thread::sleep(Duration::from_millis(50));
        }
        let (ages, drained) = (upstream.take_ages(), began.elapsed().as_secs_f64());
        fleet.end()?;
        println!(
            "{name:<24} {drained:>10.1} {:>12} {:>9} {:>9} {:>9}",
            ages.len(),
            ages.value_at_quantile(0.5),
            ages.value_at_quantile(0.99),
            ages.max()
        );
    }
    Ok(())
}
