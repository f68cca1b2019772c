//! A disk whose syncs fail: nothing that they were to cover is acked. Once costs a log file; for ever ends
//! the gateway, after `storage.failing_max`. How soon it is not ready is printed, never asserted.

mod harness;

use std::path::Path;
use std::time::{Duration, Instant};

use firmware_sim::audit::audit;
use firmware_sim::ledger::read_sent;
use harness::{Bench, Disk, eventually, http_sink};

/// Exit code of the command line.
const FAILED: i32 = 1;

const DEVICES: u32 = 10;
const RATE: f64 = 500.0;

/// A gateway with its upstream away: all that it acks stays in its store.
fn storage(journal: &str) -> String {
    format!(
        r#"
[storage]
failing_max = "8s"
journal = "{journal}"
journal_bytes = "1MiB"
"#
    )
}

/// The files of the log.
fn log_files(data: &Path) -> usize {
    let files = std::fs::read_dir(data.join("log")).unwrap().map(|file| file.unwrap().file_name());
    let first_offset = |name: &str| name.starts_with(|first: char| first.is_ascii_digit());
    files.filter(|name| first_offset(name.to_str().unwrap())).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn syncs_that_fail_for_ever_stop_the_acks_and_end_the_gateway() {
    tokio::join!(fail_for_ever(81, "off"), fail_for_ever(82, "on"));
}

async fn fail_for_ever(seed: u64, journal: &str) {
    let bench = Bench::new(seed);
    let mut collector = bench.collector("upstream");
    collector.take_down().await;
    bench.configure(&format!("{}{}", http_sink("upstream", collector.addr()), storage(journal)));
    let Some(disk) = Disk::new(&bench, "syncs that fail for ever").await else { return };
    let mut gateway = disk.start(&bench).await;
    let fleet = bench.fleet(DEVICES, RATE);
    eventually("events are acked", async || (fleet.counters().acked > 200).then_some(())).await;

    disk.fail();
    let began = Instant::now();
    let not_ready =
        async || Some(gateway.get("/health/ready").await).filter(|(code, _)| *code == 503);
    let (_, why) = eventually("it is not ready", not_ready).await;
    let to_not_ready = began.elapsed();
    assert!(why.contains("Input/output error"), "{why}");
    assert_eq!(gateway.get("/health/live").await.0, 200);
    assert_eq!(gateway.wait().await, Some(FAILED));
    let to_end = began.elapsed();
    println!("journal {journal}: not ready after {to_not_ready:.1?}, ended after {to_end:.1?}");
    let log = gateway.log();
    let told: Vec<&str> = log.lines().filter(|line| line.starts_with("edge-gateway: ")).collect();
    let [told] = told[..] else { panic!("one line for the user, not {told:?}") };
    for part in ["could not be written for", "Input/output error", "check the disk"] {
        assert!(told.contains(part), "{part:?} is not in {told:?}");
    }
    fleet.finish(Duration::ZERO).await.unwrap();

    // What was sent after a sync had failed was never synced, so no ack for it is true.
    let failed_us = disk.failed_us()[0];
    let (mut later, mut false_acks) = (0, Vec::new());
    read_sent(&bench.sent(), |row| {
        if row.sent_us > failed_us {
            later += 1;
            false_acks.extend(row.acked_us.map(|_| (row.device.to_string(), row.seq)));
        }
    })
    .unwrap();
    assert!(later > 0, "the fleet sent nothing to a disk that fails");
    assert_eq!(false_acks, [], "acked by a disk that fails");

    // On a disk that works all that was acked is there.
    collector.bring_back().unwrap();
    let gateway = bench.start().await;
    gateway.until_delivered("upstream").await;
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    let report = audit(&bench.sent(), &bench.received("upstream")).unwrap();
    assert!(report.acked > 200 && report.is_clean(), "{report}");
    assert_eq!((report.unknown, report.foreign), (0, 0), "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_that_failed_once_costs_a_file_and_no_event() {
    // Each with the thread whose syncs the acks wait for.
    tokio::join!(fail_once(83, "off", "committer"), fail_once(84, "on", "journal"));
}

async fn fail_once(seed: u64, journal: &str, thread: &str) {
    let bench = Bench::new(seed);
    let mut collector = bench.collector("upstream");
    collector.take_down().await;
    bench.configure(&format!("{}{}", http_sink("upstream", collector.addr()), storage(journal)));
    let Some(disk) = Disk::new(&bench, "a sync that failed once").await else { return };
    let gateway = disk.start(&bench).await;
    let fleet = bench.fleet(DEVICES, RATE);
    eventually("events are acked", async || (fleet.counters().acked > 200).then_some(())).await;
    let files = log_files(&bench.path("data"));

    disk.fail_once(thread);
    let told = async |what| {
        eventually(what, async || gateway.log().contains(what).then_some(())).await;
    };
    told("the log stands still").await;
    told("the log takes events again").await;
    assert_eq!(disk.failed_us().len(), 1);
    let enough = fleet.counters().acked + 200;
    eventually("acks again", async || (fleet.counters().acked >= enough).then_some(())).await;
    assert_eq!(log_files(&bench.path("data")), files + 1, "nothing is written behind what failed");
    assert!(gateway.status().await.ready);

    bench.end_with_upstream(gateway, fleet, collector).await;
}
