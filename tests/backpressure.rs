//! A disk that is slower than the publishers, one that stands still, and a full quota under each policy:
//! devices are slowed, held or refused, nothing that was acked is lost, and whoever only wants to talk
//! is not kept waiting. (A disk without room: see `bad_input`.)

mod harness;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use harness::raw::{Hello, Raw};
use harness::wire::{self, BOTH, Connect, V5, V311, Version};
use harness::{Bench, Disk, eventually, http_sink, run_to_end};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Events that a ring has room for, and a commit: so few that a publisher soon meets a full one.
const RING_EVENTS: u64 = 64;

const SMALL_RINGS: &str = "\n[ingest]\nring_events_max = 64\ncommit_events_max = 64\n";

/// A client that says its packets by itself; blocks.
fn client(bench: &Bench, version: Version, client_id: &str) -> wire::Raw {
    let mut raw = wire::Raw::open(bench.mqtt, version).unwrap();
    raw.send(&Connect::new(version, client_id).bytes());
    let connack = raw.packet();
    assert_eq!((connack[0], connack[3]), (0x20, 0), "{connack:x?}");
    raw
}

/// Publishes one event with QoS 1, and waits for nothing.
fn publish(raw: &mut wire::Raw, id: u16) {
    raw.send(&wire::publish(raw.version, 0x32, "devices/ballast/fill", id, &[], "x"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_faster_than_the_disk_is_slowed_and_loses_nothing() {
    const EVENTS: u16 = 5_000;
    for journal in ["off", "on"] {
        let bench = Bench::new(101);
        bench.configure(&format!("{SMALL_RINGS}[storage]\njournal = \"{journal}\"\n"));
        let Some(disk) = Disk::new(&bench, "a slow disk").await else { return };
        let disk = disk.with_sync_ms(10);
        let gateway = disk.start(&bench).await;
        let stream = TcpStream::connect(bench.mqtt).await.unwrap();
        let hello = Hello { client_id: "hasty", ..Hello::default() };
        let mut hasty = Raw::welcome(stream, false, hello).await;
        let mut flood = JoinSet::new();
        // Its acks come in order, each of them.
        flood.spawn(async move { hasty.flood("devices/hasty/t", EVENTS).await });
        let full = |ring: &gateway::admin::status::PartitionStatus| ring.ring_events >= RING_EVENTS;
        gateway.until("it meets a full ring", |s| s.partitions.iter().any(full)).await;
        // Meanwhile others come, talk, and have their events stored.
        let mut stored = u64::from(EVENTS);
        for version in BOTH {
            let mut other = client(&bench, version, "other");
            for id in 1..=10 {
                other.ping();
                other.send(&wire::publish(version, 0x32, "devices/other/t", id, &[], "x"));
                other.expect_ack(0x40, id);
                stored += 1;
            }
        }
        flood.join_next().await.unwrap().unwrap();
        let status = gateway.status().await;
        let refused = status.mqtt.publishes_refused_total + status.mqtt.publishes_dropped_total;
        assert_eq!((status.store.watermark, refused, status.store.losses), (stored, 0, 0));
        assert_eq!(gateway.terminate().await, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_stands_still_holds_the_acks_and_nobody_else() {
    for journal in ["off", "on"] {
        let bench = Bench::new(102);
        let collector = bench.collector("upstream");
        let sink = http_sink("upstream", collector.addr()) + TELEMETRY_ONLY;
        bench.configure(&format!("{sink}{SMALL_RINGS}[storage]\njournal = \"{journal}\"\n"));
        let Some(disk) = Disk::new(&bench, "a disk that stands still").await else { return };
        let gateway = disk.start(&bench).await;
        let fleet = bench.fleet(20, 4_000.0);
        eventually("events are acked", async || (fleet.counters().acked >= 500).then_some(()))
            .await;
        let mut idle = BOTH.map(|version| client(&bench, version, &format!("idle-{version:?}")));

        disk.stall();
        let mut waiting = BOTH.map(|version| client(&bench, version, &format!("new-{version:?}")));
        for raw in &mut waiting {
            // No ack comes before the answer to the ping, nor does anything keep that back.
            publish(raw, 1);
            raw.ping();
            publish(raw, 2);
            raw.ping();
        }
        for raw in &mut idle {
            raw.ping();
            raw.subscribe("devices/none/t", 1);
        }
        assert_eq!(gateway.get("/health/live").await.0, 200);
        // Still none.
        for raw in &mut waiting {
            raw.ping();
        }

        disk.go_on();
        for raw in &mut waiting {
            raw.expect_ack(0x40, 1);
            raw.expect_ack(0x40, 2);
        }
        bench.drain(fleet).await;
        let status = gateway.until_delivered("upstream").await;
        assert_eq!((status.mqtt.publishes_refused_total, status.store.losses), (0, 0));
        assert_eq!(gateway.terminate().await, Some(0));
        collector.finish().await;
        bench.assert_balanced("upstream");
    }
}

/// The sink gets what the fleet publishes, and not what only fills the log.
const TELEMETRY_ONLY: &str = "topics = [\"devices/+/telemetry\", \"devices/+/alarm\"]\n";

/// A gateway whose upstream is away and whose quota is small.
fn at_quota(bench: &Bench, upstream: std::net::SocketAddr, policy: &str) -> PathBuf {
    let storage = format!(
        "[storage]\nquota_bytes = \"16MiB\"\nfile_bytes_max = \"1MiB\"\njournal = \"off\"\n\
         at_quota = \"{policy}\"\n"
    );
    bench.configure(&format!("{}{TELEMETRY_ONLY}{storage}", http_sink("upstream", upstream)))
}

/// Fills the log with large events until it is told to stop or is refused.
fn fill(bench: &Bench) -> (JoinSet<()>, Arc<AtomicBool>) {
    let (addr, enough) = (bench.mqtt, Arc::new(AtomicBool::new(false)));
    let (mut filling, told) = (JoinSet::new(), enough.clone());
    filling.spawn(async move {
        let hello = Hello { client_id: "ballast", ..Hello::default() };
        let stream = TcpStream::connect(addr).await.unwrap();
        let mut raw = Raw::welcome(stream, true, hello).await;
        let large = "x".repeat(200 << 10);
        while !told.load(Ordering::Relaxed)
            && raw.publish("devices/ballast/fill", &large).await == Some(0)
        {}
    });
    (filling, enough)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_quota_devices_are_held_until_there_is_room() {
    let bench = Bench::new(103);
    let mut collector = bench.collector("upstream");
    collector.take_down().await;
    at_quota(&bench, collector.addr(), "hold");
    let gateway = bench.start().await;
    let fleet = bench.fleet(20, 500.0);
    eventually("events are acked", async || (fleet.counters().acked >= 50).then_some(())).await;
    let (mut filling, enough) = fill(&bench);
    gateway.until("it is full", |status| status.ingest.health == "at_quota").await;
    enough.store(true, Ordering::Relaxed);

    let mut waiting = BOTH.map(|version| client(&bench, version, &format!("{version:?}")));
    for raw in &mut waiting {
        publish(raw, 1);
        raw.ping();
    }
    let status = gateway.status().await;
    assert!(status.ready, "it does what it was told to");
    assert_eq!(status.mqtt.publishes_refused_total, 0);
    for raw in &mut waiting {
        raw.ping();
    }

    collector.bring_back().unwrap();
    for raw in &mut waiting {
        raw.expect_ack(0x40, 1);
    }
    filling.join_next().await.unwrap().unwrap();
    bench.drain(fleet).await;
    let status = gateway.until_delivered("upstream").await;
    assert_eq!((status.mqtt.publishes_refused_total, status.store.losses), (0, 0));
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    bench.assert_balanced("upstream");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_quota_devices_are_refused_and_may_come_again() {
    let bench = Bench::new(104);
    let mut collector = bench.collector("upstream");
    collector.take_down().await;
    at_quota(&bench, collector.addr(), "refuse");
    let gateway = bench.start().await;
    let mut idle = BOTH.map(|version| client(&bench, version, &format!("idle-{version:?}")));
    let fleet = bench.fleet(20, 500.0);
    eventually("events are acked", async || (fleet.counters().acked >= 50).then_some(())).await;
    let (mut filling, _) = fill(&bench);
    filling.join_next().await.unwrap().unwrap();
    gateway.until("it is full", |status| status.ingest.health == "at_quota").await;

    let mut told = client(&bench, V5, "told");
    publish(&mut told, 1);
    told.expect_refusal(0x40, 1, 0x97);
    told.ping();
    let mut cut = client(&bench, V311, "cut");
    publish(&mut cut, 1);
    cut.expect_closed();
    for raw in &mut idle {
        raw.ping();
    }

    collector.bring_back().unwrap();
    gateway.until("there is room", |status| status.ingest.health == "storing").await;
    for version in BOTH {
        let mut raw = client(&bench, version, "again");
        publish(&mut raw, 1);
        raw.expect_ack(0x40, 1);
    }
    bench.drain(fleet).await;
    let status = gateway.until_delivered("upstream").await;
    assert!(status.mqtt.publishes_refused_total > 0);
    assert_eq!(status.store.losses, 0);
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    bench.assert_balanced("upstream");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_quota_the_oldest_goes_into_the_loss_ledger_and_nobody_waits() {
    let bench = Bench::new(105);
    let mut collector = bench.collector("upstream");
    collector.take_down().await;
    let config = at_quota(&bench, collector.addr(), "drop_oldest");
    let gateway = bench.start().await;
    let mut others = BOTH.map(|version| client(&bench, version, &format!("{version:?}")));
    // The sink still needs this one, and with it all that comes after it.
    others[0].send(&wire::publish(V311, 0x32, "devices/needed/telemetry", 1, &[], "x"));
    others[0].expect_ack(0x40, 1);
    let (mut filling, enough) = fill(&bench);
    let mut id = 0;
    while gateway.status().await.store.losses == 0 {
        id += 1;
        for raw in &mut others {
            publish(raw, id);
            raw.expect_ack(0x40, id);
            raw.ping();
        }
    }
    enough.store(true, Ordering::Relaxed);
    filling.join_next().await.unwrap().unwrap();
    assert_eq!(gateway.status().await.mqtt.publishes_refused_total, 0);
    assert_eq!(gateway.terminate().await, Some(0));
    // What is gone is accounted for.
    let balance = run_to_end("balance", &config).await;
    assert_eq!(balance.code, Some(0), "{balance:?}");
    collector.finish().await;
}
