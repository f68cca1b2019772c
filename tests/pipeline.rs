//! The whole way over real sockets: a fleet, the real gateway, an upstream, an audit.

mod harness;

use harness::{Bench, Subscriber, eventually, http_sink, sink};

/// Events a test lets through before it looks. Enough for many commits and requests.
const EVENTS: u64 = 3_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_reaches_an_http_upstream_whole_and_in_order() {
    let bench = Bench::new(1);
    let collector = bench.collector("upstream");
    bench.configure(&http_sink("upstream", collector.addr()));
    let gateway = bench.start().await;
    assert_eq!(gateway.get("/health/live").await.0, 200);
    assert_eq!(gateway.get("/health/ready").await.0, 200);

    let fleet = bench.fleet(30, 3_000.0);
    eventually("events are acked", async || (fleet.counters().acked >= EVENTS).then_some(())).await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("upstream").await;
    assert!(status.ready);
    assert!(status.store.watermark >= EVENTS);
    assert_eq!(status.store.losses, 0);
    assert_eq!(sink(&status, "upstream").dead_letters, 0);
    let (code, metrics) = gateway.get("/metrics").await;
    assert_eq!(code, 200);
    assert!(metrics.contains("edge_gateway_"), "{metrics}");

    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    let report = bench.assert_balanced("upstream");
    // Nothing failed, so nothing was sent twice, and the gateway's own numbers have no gap.
    assert_eq!((report.duplicates, report.gateway_gaps), (0, 0), "{report}");
}

/// NDJSON and compression take the same way; the file sink rotates several times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_sink_and_a_compressed_ndjson_upstream_get_the_same_events() {
    let bench = Bench::new(2);
    let collector = bench.collector("upstream");
    let archive = bench.path("archive.ndjson");
    bench.configure(&format!(
        r#"
[[sink]]
name = "upstream"
type = "http"
url = "http://{}/events"
format = "ndjson"
compression = "zstd"
[[sink]]
name = "archive"
type = "file"
path = "{}"
rotate_bytes = "256KiB"
rotate_keep = 100
"#,
        collector.addr(),
        archive.display(),
    ));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 3_000.0);
    eventually("events are acked", async || (fleet.counters().acked >= EVENTS).then_some(())).await;
    bench.drain(fleet).await;
    gateway.until_delivered("upstream").await;
    gateway.until_delivered("archive").await;
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    bench.assert_balanced("upstream");

    assert!(bench.path("archive.ndjson.1").exists(), "it was rotated");
    bench.read_file_sink(&archive, "archive").await;
    bench.assert_balanced("archive");
}

/// SIGTERM in mid-flight: the process flushes and ends with 0, and what it acked is there when it
/// comes back. Its devices stay, reconnect and resend what was not acked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_drains_and_a_restart_goes_on() {
    let bench = Bench::new(3);
    let collector = bench.collector("upstream");
    bench.configure(&http_sink("upstream", collector.addr()));
    let fleet = bench.fleet(30, 3_000.0);
    for round in 1..=3 {
        let gateway = bench.start().await;
        let enough = round * EVENTS / 2;
        eventually("events are acked", async || (fleet.counters().acked >= enough).then_some(()))
            .await;
        assert_eq!(gateway.terminate().await, Some(0));
    }
    let gateway = bench.start().await;
    bench.drain(fleet).await;
    gateway.until_delivered("upstream").await;
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    bench.assert_balanced("upstream");
}

/// The upstream is away from the start; the backlog outlives the process that took it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_on_disk_is_delivered_after_a_restart() {
    let bench = Bench::new(4);
    let mut collector = bench.collector("upstream");
    collector.take_down().await;
    bench.configure(&http_sink("upstream", collector.addr()));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 6_000.0);
    eventually("a backlog", async || (fleet.counters().acked >= 3 * EVENTS).then_some(())).await;
    bench.drain(fleet).await;
    let before = gateway.status().await;
    assert_eq!(sink(&before, "upstream").lag_events, before.store.watermark);
    assert_eq!(gateway.get("/health/ready").await.0, 200, "upstream down is ready: we store");
    assert_eq!(gateway.terminate().await, Some(0));

    let gateway = bench.start().await;
    let after = gateway.status().await;
    assert_eq!(after.store.watermark, before.store.watermark);
    assert_eq!(after.gateway.epoch, before.gateway.epoch);
    collector.bring_back().unwrap();
    gateway.until_delivered("upstream").await;
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    let report = bench.assert_balanced("upstream");
    assert_eq!((report.duplicates, report.gateway_gaps), (0, 0), "{report}");
}

/// Subscribers of both versions get every event once it is durable, beside the upstream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_of_both_versions_receive_what_was_committed() {
    let bench = Bench::new(5);
    let collector = bench.collector("upstream");
    bench.configure(&http_sink("upstream", collector.addr()));
    let gateway = bench.start().await;
    let v311 = Subscriber::v311(bench.mqtt, "dashboard-3", "devices/#").await;
    let v5 = Subscriber::v5(bench.mqtt, "dashboard-5", "devices/+/+").await;

    let fleet = bench.fleet(10, 1_000.0);
    eventually("events are acked", async || (fleet.counters().acked >= EVENTS / 3).then_some(()))
        .await;
    // Looked at in this order: what a subscriber has is durable by now.
    let (seen, watermark) = (v311.received(), gateway.status().await.store.watermark);
    assert!(seen <= watermark, "{seen} seen, {watermark} durable");
    bench.drain(fleet).await;
    let stored = gateway.until_delivered("upstream").await.store.watermark;
    for subscriber in [&v311, &v5] {
        eventually("the subscriber has everything", async || {
            (subscriber.received() >= stored).then_some(())
        })
        .await;
    }
    v311.write_ledger(&bench.received("v311"));
    v5.write_ledger(&bench.received("v5"));
    drop((v311, v5));
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    for name in ["upstream", "v311", "v5"] {
        bench.assert_balanced(name);
    }
}

/// Nothing configured upstream: a durable local broker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_sinks_it_is_a_local_broker() {
    let bench = Bench::new(6);
    bench.configure("");
    let gateway = bench.start().await;
    let subscriber = Subscriber::v5(bench.mqtt, "dashboard", "devices/#").await;
    let fleet = bench.fleet(10, 500.0);
    eventually("events are acked", async || (fleet.counters().acked >= 300).then_some(())).await;
    bench.drain(fleet).await;
    let stored = gateway.status().await.store.watermark;
    eventually("it has everything", async || (subscriber.received() >= stored).then_some(())).await;
    subscriber.write_ledger(&bench.received("dashboard"));
    drop(subscriber);
    assert_eq!(gateway.terminate().await, Some(0));
    bench.assert_balanced("dashboard");
}
