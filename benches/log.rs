//! The log against the disk: commits of 1 to 4,096 events, beside raw writes of the same events.
//!
//! Events are as a fleet sends them: 128 B of payload, topic `devices/dev-000123/telemetry`, key
//! `dev-000123`. Raw is one `pwrite` and one `fdatasync` per batch into blocks that exist (see
//! `support`). Both run in turns, slice by slice, so that the ratio survives a noisy machine.
//! Bytes written are what the system counts for this process, against event bytes
//! (payload + topic + key).
//!
//! `cargo bench -p gateway --bench log [-- --quick] [--seconds N] [--rounds N]`. Figures are
//! reported, never asserted.

mod support;

use std::time::{Duration, Instant};

use anyhow::Context;
use storage::{AtQuota, Attribute, Attributes, Event, Store, StoreOptions};
use support::{RawFile, Rounds, median};

const BATCHES: [usize; 4] = [1, 16, 256, 4096];
const DEVICES: usize = 1000;
const PARTITIONS: u16 = 16;
const PAYLOAD_BYTES: usize = 128;

fn main() -> anyhow::Result<()> {
    let full = Rounds { count: 7, time: Duration::from_millis(700) };
    let quick = Rounds { count: 3, time: Duration::from_millis(200) };
    let rounds = Rounds::from_args(std::env::args().skip(1), full, quick)?;
    println!(
        "{PAYLOAD_BYTES} B payload; median of {} rounds of {:?} each, in turns\n\
         {:>6} {:>13} {:>13} {:>6} {:>12} {:>12} {:>15} {:>15}",
        rounds.count,
        rounds.time,
        "batch",
        "raw events/s",
        "log events/s",
        "ratio",
        "raw µs/sync",
        "log µs/commit",
        "raw written/B",
        "log written/B"
    );
    for batch in BATCHES {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let mut raw = RawFile::create(&dir.path().join("raw"))?;
        let (_store, mut writer) = Store::open(options(&dir.path().join("store")), 1)?;
        let events = events(batch);
        let mut results = [Vec::new(), Vec::new()];
        for _ in 0..rounds.count {
            results[0].push(run(rounds.time, &events, || Ok(raw.append(&events).map(drop)?))?);
            results[1].push(run(rounds.time, &events, || {
                writer.commit(&events, &[], now_us())?;
                Ok(())
            })?);
            writer.retain(now_us())?;
        }
        writer.close()?;
        let [raw, log] = &results;
        println!(
            "{batch:>6} {:>13.0} {:>13.0} {:>6.2} {:>12.0} {:>12.0} {:>15.2} {:>15.2}",
            median(raw, |r| r.events_per_s),
            median(log, |r| r.events_per_s),
            median(log, |r| r.events_per_s) / median(raw, |r| r.events_per_s),
            median(raw, |r| r.us_per_commit),
            median(log, |r| r.us_per_commit),
            median(raw, |r| r.written_per_byte),
            median(log, |r| r.written_per_byte),
        );
    }
    Ok(())
}

struct Outcome {
    events_per_s: f64,
    us_per_commit: f64,
    written_per_byte: f64,
}

/// Commits the same events over and over for a while.
fn run(
    time: Duration,
    events: &[Event],
    mut commit: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let (written, began, mut commits) = (written_bytes()?, Instant::now(), 0_u64);
    while began.elapsed() < time {
        commit()?;
        commits += 1;
    }
    let elapsed = began.elapsed().as_secs_f64();
    let written = written_bytes()? - written;
    let event_bytes = commits * events.iter().map(|e| e.size_bytes() as u64).sum::<u64>();
    Ok(Outcome {
        events_per_s: commits as f64 * events.len() as f64 / elapsed,
        us_per_commit: elapsed * 1e6 / commits as f64,
        written_per_byte: written as f64 / event_bytes as f64,
    })
}

fn events(batch: usize) -> Vec<Event> {
    (0..batch)
        .map(|index| {
            let device = format!("dev-{:06}", index % DEVICES);
            Event {
                partition: gateway::ingest::partition::of(&device, PARTITIONS),
                received_us: now_us(),
                topic: format!("devices/{device}/telemetry").into(),
                device_key: device.into(),
                attributes: Attributes::encode([Attribute::QoS(1)]),
                payload: (0..PAYLOAD_BYTES).map(|_| fastrand::u8(..)).collect(),
            }
        })
        .collect()
}

/// The store as it comes, in a window that is trimmed as it goes.
fn options(dir: &std::path::Path) -> StoreOptions {
    StoreOptions {
        dir: dir.to_owned(),
        partitions: PARTITIONS,
        sinks: Vec::new(),
        file_bytes_max: 128 << 20,
        cache_bytes: 16 << 20,
        quota_bytes: 512 << 20,
        free_bytes_min: 0,
        at_quota: AtQuota::DropOldest,
        retain_bytes: 256 << 20,
        retain_age_us: 0,
        journal: storage::JournalMode::Auto,
        journal_bytes: 32 << 20,
        commits_ahead_max: 2,
    }
}

fn now_us() -> u64 {
    gateway::ingest::clock::now_us()
}

/// Bytes that this process has caused to be written to the disk.
fn written_bytes() -> anyhow::Result<u64> {
    let io = std::fs::read_to_string("/proc/self/io")?;
    let bytes = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    Ok(bytes.context("no write_bytes in /proc/self/io")?.parse()?)
}
