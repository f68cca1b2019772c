//! What one bad event in a hundred costs the others.

use std::time::{Duration, Instant};

use anyhow::ensure;
use storage::Store;
use tokio::runtime::Runtime;

use super::Plan;
use super::backlog::{self, Drain, Poison};
use super::rounds::median;
use super::upstream::{Judge, Receivers, Upstream};

const PAYLOAD_BYTES: usize = 128;

/// How long the upstream takes for an answer, in milliseconds, and how many POSTs may be under way.
const UPSTREAMS: [(u64, usize); 4] = [(0, 1), (0, 8), (20, 1), (20, 8)];

const CASES: [(&str, Poison, Judge); 3] = [
    ("named one by one", Poison::Spread, Judge::NamesEvents),
    ("whole request, any device", Poison::Spread, Judge::RefusesRequest),
    ("whole request, 1 % of devices", Poison::OfDevices, Judge::RefusesRequest),
];

pub(crate) fn run(plan: &Plan) -> anyhow::Result<()> {
    let receivers = Receivers::start()?;
    // A slow upstream makes it long: a part of the events says as much.
    let events = plan.events / 3;
    println!(
        "{events} events of {PAYLOAD_BYTES} B as NDJSON, 1 % poison; median of {} rounds, in turns",
        plan.rounds.count
    );
    println!(
        "{:>9} {:>9}  {:<30} {:>11} {:>11} {:>8} {:>11}",
        "answer ms", "in flight", "poison is", "clean ev/s", "rest ev/s", "ratio", "POSTs/1000"
    );
    let dir = backlog::place()?;
    let mut stores = Vec::new();
    for (case, (_, poison, _)) in CASES.iter().enumerate() {
        let dir = dir.path().join(case.to_string());
        stores.push(backlog::fill(&dir, events, PAYLOAD_BYTES, *poison, Duration::ZERO)?);
    }
    for (delay_ms, in_flight) in UPSTREAMS {
        let mut measured = CASES.map(|_| Vec::new());
        for round in 0..plan.rounds.count {
            for ((case, measured), (store, _)) in CASES.iter().zip(&mut measured).zip(&stores) {
                let add = || receivers.add(Duration::from_millis(delay_ms), 0.0);
                let name = |kind: &str| format!("{kind}-{delay_ms}-{in_flight}-{round}");
                let clean = drain(store, &*add()?, &name("clean"), in_flight, Judge::TakesAll)?;
                let dirty = drain(store, &*add()?, &name("dirty"), in_flight, case.2)?;
                measured.push((clean, dirty));
            }
        }
        for ((name, ..), measured) in CASES.iter().zip(&measured) {
            println!(
                "{delay_ms:>9} {in_flight:>9}  {name:<30} {:>11.0} {:>11.0} {:>8.2} {:>11.1}",
                median(measured, |(clean, _)| clean.rate),
                median(measured, |(_, dirty)| dirty.rate),
                median(measured, |(clean, dirty)| dirty.rate / clean.rate),
                median(measured, |(_, dirty)| dirty.posts_per_thousand),
            );
        }
    }
    Ok(())
}

struct Drained {
    /// Events that were taken per second.
    rate: f64,
    posts_per_thousand: f64,
}

fn drain(
    store: &Store,
    upstream: &Upstream,
    name: &str,
    in_flight: usize,
    judge: Judge,
) -> anyhow::Result<Drained> {
    let events = store.mark().watermark;
    upstream.judge(judge);
    let runtime = Runtime::new()?;
    let began = Instant::now();
    let mut drain = Drain::begin(&runtime, store, backlog::sink(name, upstream, in_flight));
    drain.until(&runtime, "all is judged", |s| {
        s.delivered_events + s.dead_lettered_events == events
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let (taken, posts) = (upstream.events(), upstream.posts());
    let letters = drain.status.borrow().dead_lettered_events;
    ensure!(taken + letters == events, "{taken} taken, {letters} dead letters, of {events}");
    if judge != Judge::TakesAll {
        ensure!(letters > 0, "nothing was poison");
        // The upstream has learned: all of it arrives, each once.
        upstream.judge(Judge::TakesAll);
        let mut from = 0;
        while let Some(next) = store.requeue(name, from, &|_| true, backlog::now_us())?.next {
            from = next;
        }
        (drain.wake)();
        drain.until(&runtime, "requeued", |s| s.requeued_events == letters)?;
        ensure!(upstream.events() == events, "{} of {events} arrived", upstream.events());
    }
    drain.end(&runtime)?;
    let rate = taken as f64 / seconds;
    Ok(Drained { rate, posts_per_thousand: posts as f64 * 1e3 / events as f64 })
}
