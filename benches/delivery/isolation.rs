//! What a sink notices of another one that is dead or slow.

use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use super::Plan;
use super::backlog;
use super::fleet::{Fleet, Server};
use super::rounds::median;
use super::upstream::Receivers;

/// What B's upstream takes in a second; it is asked for half of it.
const CAPACITY: f64 = 10_000.0;
const PAYLOAD_BYTES: usize = 200;
const LAG_BYTES_MAX: u64 = 1 << 20;
const WARM_UP: Duration = Duration::from_secs(1);

/// What sink A is while B is measured.
const CASES: [&str; 3] = ["alone", "beside a dead one", "beside one at 1 %"];

pub(crate) fn run(plan: &Plan) -> anyhow::Result<()> {
    let receivers = Receivers::start()?;
    println!(
        "sink B gets {:.0} events/s of {PAYLOAD_BYTES} B, half of what its upstream takes; median of \
         {} rounds of {:?}, in turns; A may keep {LAG_BYTES_MAX} B",
        CAPACITY / 2.0,
        plan.rounds.count,
        plan.rounds.time
    );
    println!(
        "{:<20} {:>10} {:>9} {:>8} {:>8} {:>14} {:>12}",
        "B", "events/s", "of alone", "p50 ms", "p99 ms", "A's lag bytes", "log MB"
    );
    let mut measured = CASES.map(|_| Vec::new());
    for _ in 0..plan.rounds.count {
        for (case, measured) in CASES.into_iter().zip(&mut measured) {
            measured.push(measure(plan, &receivers, case)?);
        }
    }
    for (case, outcomes) in CASES.into_iter().zip(&measured) {
        let ratios: Vec<f64> =
            measured[0].iter().zip(outcomes).map(|(alone, own)| own.rate / alone.rate).collect();
        println!(
            "{case:<20} {:>10.0} {:>9.3} {:>8.0} {:>8.0} {:>14.0} {:>12.1}",
            median(outcomes, |o| o.rate),
            median(&ratios, |ratio| *ratio),
            median(outcomes, |o| o.p50_ms),
            median(outcomes, |o| o.p99_ms),
            median(outcomes, |o| o.lag_bytes),
            median(outcomes, |o| o.log_mb),
        );
    }
    Ok(())
}

struct Outcome {
    rate: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// What the store keeps for A, at most of what was seen.
    lag_bytes: f64,
    log_mb: f64,
}

fn measure(plan: &Plan, receivers: &Receivers, case: &str) -> anyhow::Result<Outcome> {
    let dir = backlog::place()?;
    let b = receivers.add(Duration::ZERO, CAPACITY)?;
    let slow = receivers.add(Duration::ZERO, CAPACITY / 100.0)?;
    // Taken, so that it stays free: nobody is there.
    let nobody = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let a = match case {
        "beside a dead one" => Some(format!("http://{nobody}/")),
        "beside one at 1 %" => Some(slow.url()),
        _ => None,
    };
    let sink = |name: &str, url: &str, more: &str| {
        format!(
            "[[sink]]\nname = \"{name}\"\ntype = \"http\"\nformat = \"ndjson\"\nurl = \"{url}\"\n\
             retry_backoff_max = \"1s\"\n{more}"
        )
    };
    let mut sinks = sink("b", &b.url(), "");
    if let Some(url) = &a {
        sinks += &sink("a", url, &format!("lag_bytes_max = {LAG_BYTES_MAX}\n"));
    }
    let server = Server::start(dir.path(), &sinks)?;
    let fleet = Fleet::start(server.addresses.mqtt[0], CAPACITY / 2.0, PAYLOAD_BYTES);
    thread::sleep(WARM_UP);
    b.take_ages();
    let (before, began) = (b.events(), Instant::now());
    let mut lag_bytes = 0;
    while began.elapsed() < plan.rounds.time {
        thread::sleep(Duration::from_millis(200));
        if a.is_some() {
            lag_bytes = lag_bytes.max(server.sink("a")?.lag_bytes);
        }
    }
    let rate = (b.events() - before) as f64 / began.elapsed().as_secs_f64();
    let (ages, log_bytes) = (b.take_ages(), server.status()?.store.log_bytes);
    fleet.end()?;
    Ok(Outcome {
        rate,
        p50_ms: ages.value_at_quantile(0.5) as f64,
        p99_ms: ages.value_at_quantile(0.99) as f64,
        lag_bytes: lag_bytes as f64,
        log_mb: log_bytes as f64 / 1e6,
    })
}
