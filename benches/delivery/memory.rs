//! Resident memory while a large backlog drains.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::Plan;
use super::backlog::{self, Poison};
use super::fleet::Server;
use super::upstream::Receivers;

const PAYLOAD_BYTES: usize = 1_024;

pub(crate) fn run(plan: &Plan) -> anyhow::Result<()> {
    let receivers = Receivers::start()?;
    let dir = backlog::place()?;
    let events = (plan.gigabytes * 1e9 / PAYLOAD_BYTES as f64) as u64;
    let (store, writer) = backlog::fill(
        &dir.path().join("data"),
        events,
        PAYLOAD_BYTES,
        Poison::None,
        Duration::from_hours(1),
    )?;
    let log_gb = store.stats().log_bytes as f64 / 1e9;
    writer.close()?;
    drop(store);
    let upstream = receivers.add(Duration::ZERO, 0.0)?;
    let url = upstream.url();
    let sink = format!("[[sink]]\nname = \"up\"\ntype = \"http\"\nurl = \"{url}\"\n");
    let server = Server::start(dir.path(), &sink)?;
    let (began, mut largest_mb) = (Instant::now(), 0.0_f64);
    while server.sink("up")?.lag_events > 0 {
        ensure!(began.elapsed() < Duration::from_mins(30), "the backlog does not drain");
        thread::sleep(Duration::from_millis(200));
        largest_mb = largest_mb.max(server.memory_mb("VmRSS")?);
    }
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "a backlog of {log_gb:.1} GB, {events} events of {PAYLOAD_BYTES} B: drained in {seconds:.0} s, \
         {:.0} events/s; resident {largest_mb:.1} MB at most, {:.1} MB at its peak",
        events as f64 / seconds,
        server.memory_mb("VmHWM")?,
    );
    Ok(())
}
