//! One failure stays one failure: upstreams that go away, hang, or refuse one event, and what the
//! devices and the other sinks notice of it, which is nothing.

mod harness;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use firmware_sim::fleet::Fleet;
use gateway::admin::status::Status;
use harness::{Bench, eventually, http_sink, sink};
use rumqttc::mqttbytes::QoS;
use rumqttc::{AsyncClient, Event, MqttOptions, Packet};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// Waits until so many events more are acked.
async fn more_acks(fleet: &Fleet, events: u64) {
    let enough = fleet.counters().acked + events;
    eventually("events are acked", async || (fleet.counters().acked >= enough).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_comes_and_goes_loses_nothing() {
    let bench = Bench::new(21);
    let mut collector = bench.collector("upstream");
    bench.configure(&http_sink("upstream", collector.addr()));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 3_000.0);
    for _ in 0..3 {
        let arrived = collector.counters().received;
        eventually("the upstream is served", async || {
            (collector.counters().received > arrived).then_some(())
        })
        .await;
        // Cut in the middle of requests; the devices are acked as before.
        collector.take_down().await;
        gateway
            .until("the sink retries", |status| sink(status, "upstream").state == "retrying")
            .await;
        more_acks(&fleet, 1_000).await;
        assert_eq!(gateway.get("/health/ready").await.0, 200);
        collector.bring_back().unwrap();
    }
    bench.drain(fleet).await;
    let status = gateway.until_delivered("upstream").await;
    let upstream = sink(&status, "upstream");
    assert!(upstream.retries_total >= 3 && upstream.circuit_opened_total >= 3, "{upstream:?}");
    let working = |status: &Status| {
        let upstream = sink(status, "upstream");
        upstream.circuit == "closed" && upstream.eta_seconds == Some(0.0)
    };
    let status = gateway.until("the sink has nothing to do", working).await;
    // What has happened a moment ago still shows, also in the estimates.
    assert!(sink(&status, "upstream").drain_events_per_second > 0.0, "{status:?}");
    assert!(status.ingest.events_per_second > 0.0 && status.store.left_seconds > Some(0.0));
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    bench.assert_balanced("upstream");
}

/// Two sinks, one dead from the start: the other gets everything. The dead one's backlog outlives a
/// restart and is delivered when its upstream comes to life.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_sink_does_not_slow_the_other_and_loses_nothing() {
    let bench = Bench::new(22);
    let alive = bench.collector("alive");
    let mut dead = bench.collector("dead");
    dead.take_down().await;
    let sinks = http_sink("alive", alive.addr()) + &http_sink("dead", dead.addr());
    // Small files: the living sink's progress must not let the dead one's data be trimmed.
    bench.configure(&format!("{sinks}\n[storage]\nfile_bytes_max = \"1MiB\"\n"));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 6_000.0);
    more_acks(&fleet, 12_000).await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("alive").await;
    assert_eq!(sink(&status, "dead").lag_events, status.store.watermark);
    assert_eq!(sink(&status, "dead").state, "retrying");
    assert_ne!(sink(&status, "dead").circuit, "closed");
    assert_eq!(sink(&status, "dead").eta_seconds, None, "it does not drain");
    assert_eq!(sink(&status, "dead").left_seconds, status.store.left_seconds);
    assert_eq!(status.store.first_offset, 0, "the dead sink still needs everything");
    assert_eq!(gateway.terminate().await, Some(0));
    alive.finish().await;
    bench.assert_balanced("alive");

    let gateway = bench.start().await;
    dead.bring_back().unwrap();
    let status = gateway.until_delivered("dead").await;
    assert_eq!(status.store.losses, 0);
    assert_eq!(gateway.terminate().await, Some(0));
    dead.finish().await;
    bench.assert_balanced("dead");
}

/// An upstream that accepts and never answers holds its own sink only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_hangs_holds_only_its_sink() {
    let bench = Bench::new(23);
    let alive = bench.collector("alive");
    let black_hole = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = black_hole.local_addr().unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut held = Vec::new();
        while let Ok((connection, _)) = black_hole.accept().await {
            held.push(connection);
        }
    });
    let hangs = http_sink("hangs", address) + "request_timeout = \"1s\"\n";
    bench.configure(&(http_sink("alive", alive.addr()) + &hangs));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 3_000.0);
    gateway.until("a request timed out", |status| sink(status, "hangs").retries_total > 0).await;
    more_acks(&fleet, 1_000).await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("alive").await;
    assert_eq!(sink(&status, "hangs").delivered_events_total, 0);
    assert_eq!(sink(&status, "hangs").lag_events, status.store.watermark);
    // Its request in flight does not hold the shutdown beyond the grace time.
    assert_eq!(gateway.terminate().await, Some(0));
    alive.finish().await;
    bench.assert_balanced("alive");
}

/// What [`picky_upstream`] refuses.
const POISON: &str = r#"{"poison":true}"#;

/// An upstream that answers 400 to a request with the poison event in it, and passes others on to the
/// collector at `behind`.
async fn picky_upstream(behind: SocketAddr) -> (SocketAddr, JoinSet<()>) {
    type Shared = Arc<(reqwest::Client, String)>;
    async fn receive(
        State(shared): State<Shared>,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<StatusCode, StatusCode> {
        if body.windows(POISON.len()).any(|part| part == POISON.as_bytes()) {
            return Err(StatusCode::BAD_REQUEST);
        }
        let (client, url) = &*shared;
        let content_type = headers["content-type"].clone();
        let answer = client.post(url).header("content-type", content_type).body(body).send().await;
        answer.map(|answer| answer.status()).map_err(|_| StatusCode::BAD_GATEWAY)
    }
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let shared: Shared = Arc::new((client, format!("http://{behind}/events")));
    let app = Router::new().route("/events", post(receive)).with_state(shared);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move { axum::serve(listener, app).await.unwrap() });
    (address, task)
}

/// The poison event ends among the dead letters, alone; its neighbours are delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poison_event_does_not_stop_its_neighbours() {
    let bench = Bench::new(24);
    let collector = bench.collector("upstream");
    let (address, _upstream) = picky_upstream(collector.addr()).await;
    bench.configure(&http_sink("upstream", address));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 3_000.0);
    more_acks(&fleet, 500).await;

    let mut options = MqttOptions::new("bad", bench.mqtt.ip().to_string(), bench.mqtt.port());
    options.set_keep_alive(std::time::Duration::from_secs(30));
    let (client, mut events) = AsyncClient::new(options, 4);
    client.publish("devices/bad/telemetry", QoS::AtLeastOnce, false, POISON).await.unwrap();
    let acked = Mutex::new(false);
    eventually("the poison is acked", async || {
        let event = events.poll().await.unwrap();
        *acked.lock().unwrap() |= matches!(event, Event::Incoming(Packet::PubAck(_)));
        acked.lock().unwrap().then_some(())
    })
    .await;

    more_acks(&fleet, 500).await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("upstream").await;
    assert_eq!(sink(&status, "upstream").dead_letters, 1);
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    let report = bench.assert_balanced("upstream");
    // The one hole in the gateway's numbers is the dead letter.
    assert!(report.gateway_gaps <= 1, "{report}");
}
