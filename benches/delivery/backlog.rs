//! Stored backlogs, and forwarders that drain them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};
use bridge::config::{HttpConfig, HttpFormat, SinkConfig, Target};
use bridge::{Forwarder, Origin, SinkStatus};
use storage::{
    AtQuota, Attribute, Attributes, Event, JournalMode, SinkRetention, Store, StoreOptions, Writer,
};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::upstream::Upstream;

/// In the payload of what an upstream may refuse.
pub(crate) const POISON: &[u8] = b"poison";
/// In front of the time of its publish, in the payload of a live event.
pub(crate) const SENT_US: &[u8] = b"\"sent_us\":";

pub(crate) const PARTITIONS: u16 = 16;
pub(crate) const DEVICES: u64 = 1_000;

/// Which events are poison: one in a hundred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Poison {
    None,
    /// Any.
    Spread,
    /// Those of one device in a hundred.
    OfDevices,
}

pub(crate) fn now_us() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_micros() as u64)
}

fn options(dir: &Path, sinks: &[&str]) -> StoreOptions {
    StoreOptions {
        dir: dir.to_owned(),
        partitions: PARTITIONS,
        sinks: sinks.iter().map(|name| SinkRetention::new(*name)).collect(),
        file_bytes_max: 128 << 20,
        cache_bytes: 16 << 20,
        quota_bytes: 64 << 30,
        free_bytes_min: 0,
        at_quota: AtQuota::Hold,
        retain_bytes: 64 << 30,
        retain_age_us: 0,
        dead_letter_bytes_max: 1 << 30,
        journal: JournalMode::Auto,
        journal_bytes: 32 << 20,
        compression: storage::Compression::None,
        commits_ahead_max: 2,
    }
}

/// Stores so many events as if they had been received `age` ago.
pub(crate) fn fill(
    dir: &Path,
    events: u64,
    payload_bytes: usize,
    poison: Poison,
    age: Duration,
) -> anyhow::Result<(Store, Writer)> {
    let (store, mut writer) = Store::open(options(dir, &[]), now_us())?;
    let received_us = now_us() - age.as_micros() as u64;
    let mut random = fastrand::Rng::with_seed(7);
    let mut left = events;
    while left > 0 {
        let batch: Vec<Event> = (0..left.min(4_096))
            .map(|index| {
                let number = (left - index) % DEVICES;
                let bad = match poison {
                    Poison::None => false,
                    Poison::Spread => random.u8(..100) == 0,
                    Poison::OfDevices => number % 100 == 7,
                };
                event(number, payload_bytes, bad, received_us, &mut random)
            })
            .collect();
        left -= batch.len() as u64;
        writer.commit(&batch, &[], now_us())?;
    }
    let (began, end) = (Instant::now(), events);
    while store.mark().watermark < end {
        ensure!(began.elapsed() < Duration::from_mins(1), "the backlog does not become durable");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok((store, writer))
}

/// A JSON reading, as long as it is to be.
fn event(
    number: u64,
    payload_bytes: usize,
    bad: bool,
    received_us: u64,
    random: &mut fastrand::Rng,
) -> Event {
    let device = format!("dev-{number:06}");
    let mark = if bad { "poison" } else { "plain" };
    let mut payload = format!(r#"{{"kind":"{mark}","value":{},"noise":""#, random.u32(..));
    while payload.len() + 2 < payload_bytes {
        payload.push(random.alphanumeric());
    }
    payload.push_str("\"}");
    Event {
        partition: (number % u64::from(PARTITIONS)) as u16,
        received_us,
        topic: format!("devices/{device}/telemetry").into(),
        device_key: device.into(),
        attributes: Attributes::encode([Attribute::QoS(1)]),
        payload: payload.into(),
    }
}

/// One forwarder that drains a store from its beginning.
pub(crate) struct Drain {
    pub(crate) status: watch::Receiver<SinkStatus>,
    pub(crate) wake: bridge::forwarder::Wake,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    _watermark: watch::Sender<u64>,
}

/// The sink of the benches that stand on `bridge`.
pub(crate) fn sink(name: &str, upstream: &Upstream, in_flight_max: usize) -> SinkConfig {
    let format = HttpFormat::NdJson;
    let http = HttpConfig { format, in_flight_max, ..HttpConfig::new(upstream.url()) };
    SinkConfig::new(name, Target::Http(http))
}

impl Drain {
    pub(crate) fn begin(runtime: &Runtime, store: &Store, sink: SinkConfig) -> Self {
        let (watermark, seen) = watch::channel(store.mark().watermark);
        let origin = Origin { gateway: "bench".into(), epoch: store.epoch() };
        let forwarder = Forwarder::new(sink, origin, store.clone(), seen, Arc::new(|_, _| {}));
        let (status, wake, stop) = (forwarder.status(), forwarder.wake(), CancellationToken::new());
        let task = runtime.spawn(forwarder.run(stop.clone()));
        Self { status, wake, stop, task, _watermark: watermark }
    }

    /// Waits until its status is as it should be.
    pub(crate) fn until(
        &mut self,
        runtime: &Runtime,
        what: &str,
        done: impl Fn(&SinkStatus) -> bool,
    ) -> anyhow::Result<()> {
        let seen = runtime.block_on(async {
            let until = self.status.wait_for(|status| done(status));
            tokio::time::timeout(Duration::from_mins(5), until).await.map(|seen| seen.is_ok())
        });
        ensure!(seen.with_context(|| what.to_owned())?, "the forwarder has ended: {what}");
        Ok(())
    }

    pub(crate) fn end(self, runtime: &Runtime) -> anyhow::Result<()> {
        self.stop.cancel();
        Ok(runtime.block_on(self.task)?)
    }
}

/// A place on the disk that holds the build, not in memory.
pub(crate) fn place() -> anyhow::Result<tempfile::TempDir> {
    Ok(tempfile::tempdir_in(PathBuf::from(env!("CARGO_TARGET_TMPDIR")))?)
}
