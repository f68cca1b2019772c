//! kill -9, again and again, on the real gateway under load: nothing that was acked is lost, order
//! holds, and duplicates stay within what was in flight.
//!
//! `EDGE_GATEWAY_KILLS` sets the number of kills, 20 by default.

mod harness;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use firmware_sim::ledger::{ReceivedRow, read_received};
use harness::{Bench, GatewayProcess, Subscriber, eventually, number_from_env};

const DEVICES: u32 = 24;
const RATE: f64 = 3_000.0;
const REQUEST_EVENTS: u64 = 200;
/// Publishes in flight per device, at most: the fleet's default.
const IN_FLIGHT: u64 = 20;

fn kills() -> u64 {
    number_from_env("EDGE_GATEWAY_KILLS").unwrap_or(20)
}

fn config(bench: &Bench, upstream: SocketAddr) {
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
"#
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acked_is_lost_or_reordered_by_kills() {
    let bench = Bench::new(11);
    let mut random = fastrand::Rng::with_seed(bench.seed);
    let collector = bench.collector("upstream");
    config(&bench, collector.addr());
    let fleet = bench.fleet(DEVICES, RATE);
    let kills = kills();
    let mut in_recovery = 0;
    for _ in 0..kills {
        // One in five dies while it opens its store: recovery must bear a kill too. The pause is
        // the fault's moment, nothing waits for it.
        if random.u8(..) < 51 {
            in_recovery += 1;
            let mut early = GatewayProcess::spawn(&bench.path("gateway.toml"), &bench.path("log"));
            tokio::time::sleep(Duration::from_micros(random.u64(0..30_000))).await;
            early.kill().await.unwrap();
        }
        let gateway = bench.start().await;
        // A random number of acks later, in the middle of whatever goes on then.
        let enough = fleet.counters().acked + random.u64(1..1_500);
        eventually("events are acked", async || (fleet.counters().acked >= enough).then_some(()))
            .await;
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
    // A device sends again what was in flight; the sink sends again what it had delivered since its
    // last durable cursor, which rides in the next commit: a few requests, one in flight at a time.
    let window = u64::from(DEVICES) * IN_FLIGHT + 4 * REQUEST_EVENTS;
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
    config(&bench, collector.addr());
    let gateway = bench.start().await;
    let subscriber = Subscriber::v5(bench.mqtt, "dashboard", "devices/#").await;
    let fleet = bench.fleet(DEVICES, RATE);
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
