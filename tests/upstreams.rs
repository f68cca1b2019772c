//! Upstreams at their worst: what passes a network that breaks, and what the receiver sees of it.

mod harness;

use std::collections::HashSet;
use std::path::Path;

use firmware_sim::collect::HttpCollector;
use firmware_sim::ledger::read_received;
use harness::{Bench, Fault, FaultProxy, eventually, number_from_env, stable_address};

/// How often each fault is to happen to each sink: `EDGE_GATEWAY_FAULTS`.
const FAULTS: u64 = 2;
/// Share of the requests that something happens to.
const SHARE: f64 = 0.4;
/// The same where a request is many POSTs.
const SINGLES_SHARE: f64 = 0.05;

/// An HTTP sink through a proxy, its requests small, so that there are many.
fn faulty_sink(name: &str, proxy: &FaultProxy, more: &str) -> String {
    harness::http_sink(name, proxy.address())
        + &format!("request_events_max = 100\nrequest_timeout = \"500ms\"\n{more}\n")
}

/// Waits until every fault has happened often enough.
async fn until_everything_happened(proxy: &FaultProxy, times: u64) {
    let what = format!("every fault {times} times");
    let mut most = Vec::new();
    // Each is a wait of its own: a long campaign takes longer than one may.
    for wanted in 1..=times {
        eventually(&what, async || {
            let done = proxy.done();
            let all = Fault::ALL.iter().all(|f| done.get(f).is_some_and(|n| *n >= wanted));
            most = done.into_iter().collect();
            all.then_some(())
        })
        .await;
    }
    println!("{} requests: {most:?}", proxy.requests());
}

/// Ids of the events in the requests that may have been applied without the sink learning of it.
fn ids_in_doubt(proxy: &FaultProxy) -> HashSet<String> {
    let mut ids = HashSet::new();
    for body in proxy.in_doubt() {
        let events: Vec<serde_json::Value> = serde_json::from_slice(&body).unwrap();
        ids.extend(events.iter().map(|event| event["id"].as_str().unwrap().to_owned()));
    }
    ids
}

/// Ids that arrived more than once.
fn ids_twice(ledger: &Path) -> HashSet<String> {
    let (mut seen, mut twice) = (HashSet::new(), HashSet::new());
    read_received(ledger, |row| {
        if !seen.insert(row.id.clone().into_owned()) {
            twice.insert(row.id.into_owned());
        }
    })
    .unwrap();
    twice
}

/// Requests are cut, reset, delayed, throttled, applied without an answer, and applied long after the
/// sink has given up on them. Nothing is lost and no device's order is broken; what arrives twice was
/// in a request whose answer did not get through; and a receiver with the sequence rule has nothing
/// twice, in the same run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_through_every_fault_is_whole_in_order_and_once_with_the_sequence_rule() {
    let times = number_from_env("EDGE_GATEWAY_FAULTS").unwrap_or(FAULTS);
    let bench = Bench::new(61);
    let plain = bench.collector("plain");
    let once =
        HttpCollector::start_exactly_once(stable_address(), &bench.received("once")).unwrap();
    let to_plain = FaultProxy::start(plain.addr(), bench.seed, SHARE).await;
    let to_once = FaultProxy::start(once.addr(), bench.seed + 1, SHARE).await;
    let once_more = "in_flight_max = 4\ncompression = \"zstd\"";
    bench.configure(
        &(faulty_sink("plain", &to_plain, "") + &faulty_sink("once", &to_once, once_more)),
    );
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 2_000.0);
    until_everything_happened(&to_plain, times).await;
    until_everything_happened(&to_once, times).await;
    bench.drain(fleet).await;
    to_plain.calm_down();
    to_once.calm_down();
    gateway.until_delivered("plain").await;
    gateway.until_delivered("once").await;
    assert_eq!(gateway.terminate().await, Some(0));
    plain.finish().await;
    let counters = once.finish().await;

    let report = bench.assert_balanced("plain");
    assert!(report.duplicates > 0, "lost answers give duplicates, or this test shows nothing");
    assert_eq!(report.gateway_gaps, 0, "{report}");
    let twice = ids_twice(&bench.received("plain"));
    let in_doubt = ids_in_doubt(&to_plain);
    let unexplained: Vec<_> = twice.difference(&in_doubt).collect();
    assert!(unexplained.is_empty(), "sent twice after an answer: {unexplained:?}");

    let report = bench.assert_balanced("once");
    assert_eq!((report.duplicates, report.gateway_gaps), (0, 0), "{report}");
    assert!(counters.skipped > 0, "the rule had nothing to do: {counters:?}");
}

/// One event a POST, several POSTs in flight: every device's order holds, through the same faults.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_events_in_flight_together_keep_the_order_of_each_device_through_every_fault() {
    let times = number_from_env("EDGE_GATEWAY_FAULTS").unwrap_or(FAULTS);
    let bench = Bench::new(62);
    let collector = bench.collector("upstream");
    // A request of these is many POSTs: with as many faults it would never get through.
    let proxy = FaultProxy::start(collector.addr(), bench.seed, SINGLES_SHARE).await;
    bench.configure(&faulty_sink("upstream", &proxy, "format = \"cloudevent_binary\""));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 200.0);
    until_everything_happened(&proxy, times).await;
    bench.drain(fleet).await;
    proxy.calm_down();
    gateway.until_delivered("upstream").await;
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    let report = bench.assert_balanced("upstream");
    assert_eq!(report.gateway_gaps, 0, "{report}");
}
