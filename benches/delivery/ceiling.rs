//! A forwarder beside a plain reqwest loop that posts the same bodies from memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use bridge::config::SinkConfig;
use bytes::Bytes;
use storage::Store;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::Plan;
use super::backlog::{self, Drain, Poison};
use super::rounds::median;
use super::upstream::{Receivers, Upstream};

const PAYLOAD_BYTES: usize = 128;
const IN_FLIGHT: [usize; 2] = [1, 4];

pub(crate) fn run(plan: &Plan) -> anyhow::Result<()> {
    let dir = backlog::place()?;
    let (store, _writer) =
        backlog::fill(dir.path(), plan.events, PAYLOAD_BYTES, Poison::None, Duration::ZERO)?;
    let receivers = Receivers::start()?;
    let bodies = bodies(&store)?;
    println!(
        "{} events of {PAYLOAD_BYTES} B as NDJSON, {} in a POST; median of {} rounds, in turns",
        plan.events,
        SinkConfig::REQUEST_EVENTS_MAX,
        plan.rounds.count
    );
    println!(
        "{:>9} {:>14} {:>14} {:>8} {:>16} {:>16}",
        "in flight", "loop events/s", "sink events/s", "ratio", "loop CPU us/ev", "sink CPU us/ev"
    );
    for in_flight in IN_FLIGHT {
        let (mut loops, mut sinks) = (Vec::new(), Vec::new());
        for round in 0..plan.rounds.count {
            let upstream = receivers.add(Duration::ZERO, 0.0)?;
            loops.push(measure(&receivers, plan.events, |runtime| {
                post_all(runtime, &upstream, &bodies, in_flight)
            })?);
            let upstream = receivers.add(Duration::ZERO, 0.0)?;
            let sink = backlog::sink(&format!("s{in_flight}-{round}"), &upstream, in_flight);
            sinks.push(measure(&receivers, plan.events, |runtime| {
                let mut drain = Drain::begin(runtime, &store, sink.clone());
                drain.until(runtime, "drained", |s| s.delivered_events == plan.events)?;
                drain.end(runtime)
            })?);
            ensure!(upstream.events() == plan.events, "{} arrived", upstream.events());
        }
        let ratios: Vec<f64> =
            loops.iter().zip(&sinks).map(|(plain, sink)| sink.rate / plain.rate).collect();
        println!(
            "{in_flight:>9} {:>14.0} {:>14.0} {:>8.2} {:>16.2} {:>16.2}",
            median(&loops, |m| m.rate),
            median(&sinks, |m| m.rate),
            median(&ratios, |ratio| *ratio),
            median(&loops, |m| m.cpu_us),
            median(&sinks, |m| m.cpu_us),
        );
    }
    Ok(())
}

struct Measured {
    rate: f64,
    /// Per event, without the receivers'.
    cpu_us: f64,
}

fn measure(
    receivers: &Receivers,
    events: u64,
    run: impl FnOnce(&Runtime) -> anyhow::Result<()>,
) -> anyhow::Result<Measured> {
    let runtime = Runtime::new()?;
    let cpu = || anyhow::Ok(process_cpu().saturating_sub(receivers.cpu()?));
    let (before, began) = (cpu()?, Instant::now());
    run(&runtime)?;
    let (spent, elapsed) = (cpu()?.saturating_sub(before), began.elapsed());
    Ok(Measured {
        rate: events as f64 / elapsed.as_secs_f64(),
        cpu_us: spent.as_secs_f64() * 1e6 / events as f64,
    })
}

/// CPU time of this process.
fn process_cpu() -> Duration {
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(clock.tv_sec.cast_unsigned(), clock.tv_nsec as u32)
}

/// The bodies that the sink would send.
fn bodies(store: &Store) -> anyhow::Result<Vec<Bytes>> {
    let origin = bridge::Origin { gateway: "bench".into(), epoch: store.epoch() };
    let mut export = bridge::Export::new(&origin, SinkConfig::EVENT_TYPE, bridge::Framing::Lines);
    let (mut bodies, mut from) = (Vec::new(), store.stats().first_offset);
    while from < store.mark().watermark {
        let read = store.read(from, SinkConfig::REQUEST_EVENTS_MAX, usize::MAX)?;
        from = read.next;
        let mut body = Vec::new();
        export.write(&mut body, &read.events);
        bodies.push(Bytes::from(body));
    }
    Ok(bodies)
}

fn post_all(
    runtime: &Runtime,
    upstream: &Arc<Upstream>,
    bodies: &[Bytes],
    in_flight: usize,
) -> anyhow::Result<()> {
    runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().build()?;
        let mut loops = JoinSet::new();
        for first in 0..in_flight {
            let bodies: Vec<Bytes> =
                bodies.iter().skip(first).step_by(in_flight).cloned().collect();
            let (client, url) = (client.clone(), upstream.url());
            loops.spawn(async move {
                for body in bodies {
                    let post = client.post(&url).header("content-type", "application/x-ndjson");
                    post.body(body).send().await?.error_for_status()?.bytes().await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = loops.join_next().await {
            ended??;
        }
        Ok(())
    })
}
