//! Exactly once into a real Apache Kafka, whatever is killed and whatever answer is lost: a reader of
//! what is committed sees every event of the gateway once, and those of a device in their order. The
//! same run with at-least-once shows duplicates: the test can fail.
//!
//! Needs Java and Maven; skipped loudly without. `EDGE_GATEWAY_KAFKA_KILLS` sets the number of kills
//! of the gateway, 6 by default; from ten on the broker is killed too, once in ten.

mod harness;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;

use firmware_sim::ledger::read_received;
use gateway::admin::status::Status;
use harness::kafka::{Broker, Isolation, read_records};
use harness::kafka_proxy::LossyProxy;
use harness::{Bench, eventually, number_from_env, sink, stable_address};

const DEVICES: u32 = 24;
const RATE: f64 = 2_000.0;
/// Answers that are lost, of a hundred.
const LOST_OF_100: u8 = 3;

fn kills() -> u64 {
    number_from_env("EDGE_GATEWAY_KAFKA_KILLS").unwrap_or(6)
}

fn config(brokers: SocketAddr, topic: &str, delivery: &str) -> String {
    format!(
        r#"
[[sink]]
name = "bus"
type = "kafka"
brokers = "{brokers}"
topic = "{topic}"
delivery = "{delivery}"
retry_backoff_min = "20ms"
retry_backoff_max = "500ms"
"#
    )
}

/// What a reader saw, by the names that the gateway gave: each event of the gateway has one.
#[derive(Debug, Default)]
struct Seen {
    events: u64,
    duplicates: u64,
    /// First arrivals after a later event of the same device.
    inversions: u64,
    /// Numbers of a partition that are missing below its highest.
    missing: u64,
}

fn look(ledger: &Path) -> Seen {
    let mut seen = Seen::default();
    let mut names = HashSet::new();
    let mut ends: HashMap<u16, u64> = HashMap::new();
    let mut last: HashMap<String, u64> = HashMap::new();
    read_received(ledger, |row| {
        let place = row.place.expect("numbered");
        seen.events += 1;
        if !names.insert((place.partition, place.seq)) {
            seen.duplicates += 1;
            return;
        }
        let end = ends.entry(place.partition).or_default();
        *end = (*end).max(place.seq + 1);
        let last = last.entry(row.device.into_owned()).or_default();
        seen.inversions += u64::from(place.seq + 1 < *last);
        *last = place.seq + 1;
    })
    .unwrap();
    seen.missing = ends.values().sum::<u64>() - names.len() as u64;
    seen
}

/// Kills the gateway again and again, and the broker now and then, while answers are lost; gives what
/// a reader of committed records saw in the end.
async fn run(
    broker: &mut Broker,
    proxy: SocketAddr,
    delivery: &'static str,
    bench: &Bench,
    kills: u64,
) -> Seen {
    let mut random = fastrand::Rng::with_seed(bench.seed);
    let behind = broker.said("proxied").parse().unwrap();
    let lossy = LossyProxy::start(proxy, behind, LOST_OF_100, bench.seed).await;
    // A topic for each delivery.
    broker.create_topic(delivery, 4).await;
    bench.configure(&config(proxy, delivery, delivery));
    let fleet = bench.fleet(DEVICES, RATE);
    let mut broker_kills = 0;
    for kill in 0..kills {
        let gateway = bench.start().await;
        let first = sink(&gateway.status().await, "bus").cursor;
        // It gets something through; then, a random number of events later, in the middle of whatever
        // goes on, it dies.
        gateway.until("it delivers", |status| sink(status, "bus").cursor > first).await;
        if kill % 10 == 9 {
            broker.kill().await;
            broker_kills += 1;
            broker.restart().await;
            let before = sink(&gateway.status().await, "bus").cursor;
            gateway.until("it delivers again", |status| sink(status, "bus").cursor > before).await;
        }
        let enough = fleet.counters().acked + random.u64(1..1_500);
        eventually("events are acked", async || (fleet.counters().acked >= enough).then_some(()))
            .await;
        gateway.kill().await;
    }
    let gateway = bench.start().await;
    bench.drain(fleet).await;
    // A long outage of the broker leaves more than a slow machine delivers at once: as long as the
    // cursor moves, all is well.
    loop {
        let before = sink(&gateway.status().await, "bus").cursor;
        let moved = |status: &Status| {
            let sink = sink(status, "bus");
            sink.lag_events == 0 || sink.cursor > before
        };
        if sink(&gateway.until("it delivers", moved).await, "bus").lag_events == 0 {
            break;
        }
    }
    let status = gateway.status().await;
    assert_eq!((status.store.losses, sink(&status, "bus").dead_letters), (0, 0));
    assert_eq!(gateway.terminate().await, Some(0));

    let (committed, all) = (bench.received("bus"), bench.path("uncommitted.csv"));
    read_records(broker.bootstrap(), delivery, Isolation::Committed, committed.clone()).await;
    read_records(broker.bootstrap(), delivery, Isolation::Uncommitted, all.clone()).await;
    bench.assert_balanced("bus");
    let seen = look(&committed);
    println!(
        "{delivery}: {kills} kills of the gateway, {broker_kills} of the broker, {} answers lost\n\
         committed:   {seen:?}\nuncommitted: {:?}",
        lossy.lost(),
        look(&all)
    );
    assert!(lossy.lost() > 0, "no answer was lost: nothing was tried");
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_event_is_seen_once_and_in_order_whatever_dies() {
    let proxy = stable_address();
    let mut broker = match Broker::start_behind(proxy).await {
        Ok(broker) => broker,
        Err(missing) => return harness::skip("a real Kafka", &missing),
    };
    let kills = kills();
    let seen = run(&mut broker, proxy, "exactly_once", &Bench::new(41), kills).await;
    assert_eq!((seen.duplicates, seen.missing, seen.inversions), (0, 0, 0), "{seen:?}");
    let seen = run(&mut broker, proxy, "at_least_once", &Bench::new(42), kills.min(3)).await;
    assert_eq!((seen.missing, seen.inversions), (0, 0), "{seen:?}");
    assert!(seen.duplicates > 0, "the test could not have failed: {seen:?}");
}
