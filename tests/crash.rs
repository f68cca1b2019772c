//! kill -9, again and again, on the real gateway under load: nothing that was acked is lost, order
//! holds, and duplicates stay within what was in flight.
//!
//! `EDGE_GATEWAY_KILLS` sets the number of kills, 50 by default. The fleet offers 20,000 events a
//! second; what of that was acked, and how long a restarted gateway took to ack again, is printed and
//! never asserted: an unoptimized build on a shared machine says little about either. For figures:
//! `EDGE_GATEWAY_KILLS=500 cargo test --release -p gateway --test crash -- --nocapture`.

mod harness;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use firmware_sim::fleet::FleetConfig;
use firmware_sim::ledger::{ReceivedRow, read_received};
use harness::{Bench, GatewayProcess, Subscriber, eventually, number_from_env, sink};
use rustix::process::Signal;

const DEVICES: u32 = 100;
const RATE: f64 = 20_000.0;
const REQUEST_EVENTS: u64 = 500;
/// Publishes in flight per device, at most.
const IN_FLIGHT: u16 = 20;
/// What a gateway does between its first ack and its end.
const ACKING: std::ops::Range<Duration> = Duration::from_millis(200)..Duration::from_millis(800);

fn kills() -> u64 {
    number_from_env("EDGE_GATEWAY_KILLS").unwrap_or(50)
}

fn config(bench: &Bench, upstream: SocketAddr, journal: &str) {
    bench.configure(&format!(
        r#"
[[sink]]
name = "upstream"
type = "http"
url = "http://{upstream}/events"
request_events_max = {REQUEST_EVENTS}
retry_backoff_min = "20ms"
retry_backoff_max = "200ms"
[storage]
file_bytes_max = "1MiB"
journal = "{journal}"
journal_bytes = "1MiB"
"#
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acked_is_lost_or_reordered_by_kills() {
    let bench = Bench::new(11);
    let mut random = fastrand::Rng::with_seed(bench.seed);
    let collector = bench.collector("upstream");
    // Each gateway takes over what the one before has left, also a journal that it would not begin.
    let configure = |random: &mut fastrand::Rng| {
        config(&bench, collector.addr(), random.choice(["on", "off"]).unwrap());
    };
    configure(&mut random);
    let fleet = bench.fleet_with(
        bench.mqtt,
        FleetConfig {
            devices: DEVICES,
            rate: RATE,
            in_flight_max: IN_FLIGHT,
            // Devices drop what an overloaded machine does not take, and the last ones drain soon.
            outbox_events_max: 64,
            backoff_ms_max: 100,
            ..bench.fleet_config()
        },
    );
    let kills = kills();
    let mut in_recovery = 0;
    let (mut to_first_ack, mut acking, mut acked) = (Vec::new(), Duration::ZERO, 0);
    for _ in 0..kills {
        configure(&mut random);
        // One in five dies while it opens its store: recovery must bear a kill too. The pauses are
        // the fault's moments, nothing waits for them.
        if random.u8(..) < 51 {
            in_recovery += 1;
            let mut early = GatewayProcess::spawn(&bench.path("gateway.toml"), &bench.path("log"));
            tokio::time::sleep(Duration::from_micros(random.u64(0..30_000))).await;
            early.kill().await.unwrap();
        }
        // An ack of the one before that is heard late is not one of this one.
        let all_gone = async || (fleet.counters().connected == 0).then_some(());
        eventually("the devices know that it is gone", all_gone).await;
        let before = fleet.counters().acked;
        let started = Instant::now();
        let gateway = bench.start().await;
        let to_ready = started.elapsed();
        eventually("events are acked", async || (fleet.counters().acked > before).then_some(()))
            .await;
        to_first_ack.push((started.elapsed(), to_ready));
        let first = Instant::now();
        let pause_us = random.u128(ACKING.start.as_micros()..ACKING.end.as_micros());
        tokio::time::sleep(Duration::from_micros(pause_us as u64)).await;
        acked += fleet.counters().acked - before;
        acking += first.elapsed();
        gateway.kill().await;
    }
    let gateway = bench.start().await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("upstream").await;
    assert_eq!(status.store.losses, 0);
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;

    let report = bench.assert_balanced("upstream");
    println!("{kills} kills under load, {in_recovery} more in recovery");
    to_first_ack.sort();
    if let (Some((median, _)), Some((longest, to_ready))) =
        (to_first_ack.get(to_first_ack.len() / 2), to_first_ack.last())
    {
        println!(
            "{acked} acked in between, {:.0} a second of {RATE} offered; from start to first ack \
             {median:.1?} (median), {longest:.1?} (longest, ready after {to_ready:.1?})",
            acked as f64 / acking.as_secs_f64()
        );
    }
    // A device sends again what was in flight; the sink sends again what it had delivered since its
    // last durable cursor, which rides in the next commit: a few requests, one in flight at a time.
    let window = u64::from(DEVICES) * u64::from(IN_FLIGHT) + 4 * REQUEST_EVENTS;
    let kills = kills + in_recovery;
    assert!(
        report.duplicates <= kills * window,
        "{} duplicates in {kills} kills, at most {window} each",
        report.duplicates
    );
    // Stored once means forwarded: the gateway's own numbers have no gap in any partition.
    assert_eq!(report.gateway_gaps, 0, "{report}");
}

/// The device's name of an event.
fn event(row: &ReceivedRow<'_>) -> (String, u32, u64) {
    let origin = row.origin.expect("a fleet's event");
    (row.device.to_string(), origin.boot, origin.seq)
}

/// What a subscriber saw is never lost: it is served after the commit, so a kill cannot take back
/// what it was shown. The fleet dies with the gateway, so that no resend can hide a loss.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_subscriber_saw_survives_the_kill() {
    let bench = Bench::new(12);
    let mut collector = bench.collector("upstream");
    collector.take_down().await;
    config(&bench, collector.addr(), "auto");
    let gateway = bench.start().await;
    let subscriber = Subscriber::v5(bench.mqtt, "dashboard", "devices/#").await;
    let fleet = bench.fleet(24, 3_000.0);
    eventually("the subscriber is served", async || (subscriber.received() >= 2_000).then_some(()))
        .await;
    gateway.kill().await;
    drop(fleet);
    subscriber.write_ledger(&bench.received("dashboard"));
    drop(subscriber);

    collector.bring_back().unwrap();
    let gateway = bench.start().await;
    gateway.until_delivered("upstream").await;
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    let mut arrived = HashSet::new();
    read_received(&bench.received("upstream"), |row| {
        arrived.insert(event(&row));
    })
    .unwrap();
    let mut shown = 0;
    read_received(&bench.received("dashboard"), |row| {
        shown += 1;
        let event = event(&row);
        assert!(arrived.contains(&event), "shown, then lost: {event:?}");
    })
    .unwrap();
    assert!(shown >= 2_000);
}

/// A suspended machine, or a debugger: time passes, and nothing happens. Nobody is taken for gone, and
/// nothing is given up for being old.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_was_suspended_goes_on_where_it_was() {
    let bench = Bench::new(13);
    let mut random = fastrand::Rng::with_seed(bench.seed);
    let collector = bench.collector("upstream");
    config(&bench, collector.addr(), "auto");
    let gateway = bench.start().await;
    let devices = 24;
    let fleet = bench.fleet(devices, 3_000.0);
    for _ in 0..4 {
        let enough = fleet.counters().acked + 500;
        eventually("events are acked", async || (fleet.counters().acked >= enough).then_some(()))
            .await;
        gateway.signal(Signal::STOP);
        // The suspension itself; nothing waits for it.
        tokio::time::sleep(Duration::from_millis(random.u64(100..1_500))).await;
        gateway.signal(Signal::CONT);
    }
    bench.drain(fleet).await;
    let status = gateway.until_delivered("upstream").await;
    assert_eq!((status.store.losses, sink(&status, "upstream").dead_letters), (0, 0));
    assert_eq!(status.mqtt.connections_total, u64::from(devices), "nobody had to come again");
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    let report = bench.assert_balanced("upstream");
    assert_eq!((report.duplicates, report.gateway_gaps), (0, 0), "{report}");
}
