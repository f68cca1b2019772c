//! Exactly once into a real Apache Kafka, whatever is killed and whatever answer is lost: a reader of
//! what is committed sees every event of the gateway once, and those of a device in their order; where
//! live events and alarms go ahead of a backlog, in the order of their device, lane and stream. The
//! same run with at-least-once shows duplicates: the test can fail.
//!
//! Needs Java and Maven; skipped loudly without. `EDGE_GATEWAY_KAFKA_KILLS` sets the number of kills
//! of the gateway, 6 by default; from ten on the broker is killed too, once in ten.

mod harness;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;

use firmware_sim::audit::audit;
use gateway::admin::status::Status;
use harness::kafka::{Arrived, Broker, Isolation, read_records};
use harness::kafka_proxy::LossyProxy;
use harness::{Bench, GatewayProcess, eventually, number_from_env, sink, stable_address};

const DEVICES: u32 = 24;
const RATE: f64 = 2_000.0;
/// Answers that are lost, of a hundred.
const LOST_OF_100: u8 = 3;

fn kills() -> u64 {
    number_from_env("EDGE_GATEWAY_KAFKA_KILLS").unwrap_or(6)
}

/// What a run sends with, and where to.
struct Way {
    topic: &'static str,
    delivery: &'static str,
    /// More of its sink.
    more: &'static str,
    /// Routes before the general one.
    routes: &'static str,
}

/// Everything in one stream.
const IN_ORDER: Way = Way { topic: "in-order", delivery: "exactly_once", more: "", routes: "" };

/// The sink gets less than the fleet sends, so there is always a backlog that live events overtake;
/// the alarms of one device overtake both, and another's events can wait.
const LIVE_FIRST: Way = Way {
    topic: "live-first",
    delivery: "exactly_once",
    more: r#"
backlog = "live_first"
live_first_after = "200ms"
rate_bytes_per_second = "512KiB"
"#,
    routes: r#"
[[route]]
filter = "devices/dev-000001/#"
lane = "alarm"
[[route]]
filter = "devices/dev-000002/#"
lane = "backfill"
"#,
};

const AT_LEAST_ONCE: Way =
    Way { topic: "at-least-once", delivery: "at_least_once", more: "", routes: "" };

impl Way {
    fn config(&self, brokers: SocketAddr) -> String {
        let Self { topic, delivery, more, .. } = self;
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
{more}
"#
        )
    }
}

/// What a reader saw, by the names that the gateway gave: each event of the gateway has one.
#[derive(Debug, Default)]
struct Seen {
    events: u64,
    duplicates: u64,
    /// First arrivals after a later event of the same device, lane and stream.
    inversions: u64,
    /// Numbers of a partition that are missing below its highest.
    missing: u64,
    /// By lane and stream.
    streams: BTreeMap<String, u64>,
}

fn look(arrived: Vec<Arrived>) -> Seen {
    let mut seen = Seen::default();
    let mut names = HashSet::new();
    let mut ends: HashMap<u16, u64> = HashMap::new();
    let mut last: HashMap<_, u64> = HashMap::new();
    for Arrived { place, device, lane, stream } in arrived {
        seen.events += 1;
        if !names.insert((place.partition, place.seq)) {
            seen.duplicates += 1;
            continue;
        }
        let end = ends.entry(place.partition).or_default();
        *end = (*end).max(place.seq + 1);
        let stream =
            format!("{}/{}", lane.as_deref().unwrap_or("live"), stream.unwrap_or_default());
        *seen.streams.entry(stream.clone()).or_default() += 1;
        let last = last.entry((device, stream)).or_default();
        seen.inversions += u64::from(place.seq + 1 < *last);
        *last = place.seq + 1;
    }
    seen.missing = ends.values().sum::<u64>() - names.len() as u64;
    seen
}

/// Kills the gateway again and again, and the broker now and then, while answers are lost; gives what
/// a reader of committed records saw in the end.
async fn run(broker: &mut Broker, proxy: SocketAddr, way: &Way, bench: &Bench, kills: u64) -> Seen {
    let mut random = fastrand::Rng::with_seed(bench.seed);
    let behind = broker.said("proxied").parse().unwrap();
    let lossy = LossyProxy::start(proxy, behind, LOST_OF_100, bench.seed).await;
    broker.create_topic(way.topic, 4).await;
    bench.configure(&way.config(proxy));
    bench.route_first(way.routes);
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
    eventually("an answer is lost", async || (lossy.lost() > 0).then_some(())).await;
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
    let seen = read_records(broker.bootstrap(), way.topic, Isolation::Committed, committed).await;
    let all = read_records(broker.bootstrap(), way.topic, Isolation::Uncommitted, all).await;
    if way.more.is_empty() {
        bench.assert_balanced("bus");
    } else {
        // A device's order is that of each stream, below.
        let report = audit(&bench.sent(), &bench.received("bus")).unwrap();
        let outcome = (report.lost, report.delivered, report.unknown, report.foreign);
        assert_eq!(outcome, (0, report.sent, 0, 0), "{report}");
    }
    let seen = look(seen);
    println!(
        "{}: {kills} kills of the gateway, {broker_kills} of the broker, {} answers lost\n\
         committed:   {seen:?}\nuncommitted: {:?}",
        way.topic,
        lossy.lost(),
        look(all)
    );
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
    for (way, seed, kills, streams) in
        [(IN_ORDER, 41, kills, 1), (LIVE_FIRST, 43, kills.div_ceil(2), 4)]
    {
        let seen = run(&mut broker, proxy, &way, &Bench::new(seed), kills).await;
        assert_eq!((seen.duplicates, seen.missing, seen.inversions), (0, 0, 0), "{seen:?}");
        assert_eq!(seen.streams.len(), streams, "{seen:?}");
    }
    let seen = run(&mut broker, proxy, &AT_LEAST_ONCE, &Bench::new(42), kills.min(3)).await;
    assert_eq!((seen.missing, seen.inversions), (0, 0), "{seen:?}");
    assert!(seen.duplicates > 0, "the test could not have failed: {seen:?}");
}

/// Waits until a sink is held with these words, and is held again after it has tried again.
async fn until_tried_again(gateway: &GatewayProcess, told: &str) {
    let is_held = |status: &Status| sink(status, "bus").state == "held";
    let held = gateway.until("it is held", is_held).await;
    let error = sink(&held, "bus").error.clone().unwrap_or_default();
    assert!(error.contains(told), "{error}");
    let tries = sink(&held, "bus").retries_total + 1;
    let tried = |status: &Status| sink(status, "bus").retries_total >= tries && is_held(status);
    gateway.until("it is held after it has tried again", tried).await;
}

/// How far a gateway's sink is, and how often it had to try again.
async fn place(gateway: &GatewayProcess) -> (u64, u64) {
    let status = gateway.status().await;
    (sink(&status, "bus").cursor, sink(&status, "bus").retries_total)
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Two live gateways of one name: an image that was put back beside the gateway that it was taken of,
/// and a stand-in with a store of its own. The image is behind, is held and disturbs nobody. The
/// stand-in takes over; the older one is held, says why, does not take the name back, and delivers
/// what it holds once the other is gone. The image is held even when it has as many events as Kafka
/// has of the older one, and starts then: they are others, and none of them is skipped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_gateway_of_the_same_name_is_told_and_nothing_is_lost() {
    let broker = match Broker::start().await {
        Ok(broker) => broker,
        Err(missing) => return harness::skip("a real Kafka", &missing),
    };
    let way = Way { topic: "two", ..IN_ORDER };
    broker.create_topic(way.topic, 4).await;
    // It is held for so long at a time.
    let config = way.config(broker.bootstrap().parse().unwrap()).replace("500ms", "1s");
    let [older, image, stand_in] = [44, 45, 46].map(Bench::new);
    for bench in [&older, &image, &stand_in] {
        bench.configure(&config);
    }

    let gateway = older.start().await;
    let fleet = older.fleet(4, 200.0);
    gateway.until("it delivers", |status| sink(status, "bus").cursor > 0).await;
    assert_eq!(gateway.terminate().await, Some(0));
    copy_folder(&older.path("data"), &image.path("data"));
    let gateway = older.start().await;
    let copied = place(&gateway).await.0;
    gateway.until("it is ahead", |status| sink(status, "bus").cursor > copied + 100).await;

    let restored = image.start().await;
    let new = image.fleet(4, 200.0);
    until_tried_again(&restored, "restored from a copy").await;
    let (cursor, retries) = place(&gateway).await;
    gateway.until("it goes on", |status| sink(status, "bus").cursor > cursor).await;
    assert_eq!((place(&gateway).await.1, retries), (0, 0), "the copy has disturbed it");
    image.drain(new).await;
    assert_eq!(restored.terminate().await, Some(0));
    std::fs::rename(image.sent(), image.path("sent-before.csv")).unwrap();

    let second = stand_in.start().await;
    let others = stand_in.fleet(4, 200.0);
    second.until("it delivers", |status| sink(status, "bus").cursor > 0).await;
    until_tried_again(&gateway, "another gateway with the same id").await;
    // The older one may have been faster than the newer one's first mark, but not after that.
    let (cursor, retries) = place(&second).await;
    until_tried_again(&gateway, "another gateway with the same id").await;
    second.until("it goes on", |status| sink(status, "bus").cursor > cursor).await;
    assert_eq!(place(&second).await.1, retries, "the older one has taken the name back");
    older.drain(fleet).await;
    stand_in.drain(others).await;
    second.until_delivered("bus").await;
    assert_eq!(second.terminate().await, Some(0));
    // Somebody has to say so: it does not know that the other is gone.
    until_tried_again(&gateway, "another gateway with the same id").await;
    assert_eq!(gateway.terminate().await, Some(0));
    let gateway = older.start().await;
    let end = sink(&gateway.until_delivered("bus").await, "bus").cursor;
    assert_eq!(gateway.terminate().await, Some(0));

    let read = async |bench: &Bench| {
        let ledger = bench.received("bus");
        read_records(broker.bootstrap(), way.topic, Isolation::Committed, ledger).await;
    };
    for bench in [&older, &stand_in] {
        read(bench).await;
        let report = audit(&bench.sent(), &bench.received("bus")).unwrap();
        let outcome = (report.lost, report.delivered, report.duplicates, report.out_of_order);
        assert_eq!(outcome, (0, report.sent, 0, 0), "{report}");
    }

    let restored = image.start().await;
    let more = image.fleet(4, 1_000.0);
    restored.until("it has as many", |status| status.store.watermark > end).await;
    image.drain(more).await;
    restored.kill().await;
    let restored = image.start().await;
    until_tried_again(&restored, "restored from a copy").await;
    broker.delete_group("gw-test-bus").await;
    restored.until_delivered("bus").await;
    assert_eq!(restored.terminate().await, Some(0));
    read(&image).await;
    for sent in [image.path("sent-before.csv"), image.sent()] {
        let report = audit(&sent, &image.received("bus")).unwrap();
        assert_eq!((report.lost, report.delivered), (0, report.sent), "{report}");
    }
}
