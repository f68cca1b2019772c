//! A seeded fleet of simulated devices that publish over MQTT and keep what is not acked.
//!
//! Owns: [`Fleet`], one task per device on the caller's tokio runtime. Two phases: devices produce
//! until [`Fleet::stop_producing`], then each leaves by itself once everything it kept is acked;
//! [`Fleet::finish`] waits for that, within a bound. The broker's address is a watched value: a
//! device asks for it at each connect, so that a broker may come back elsewhere.
//!
//! Invariant: every event that was published stands once in the sent ledger.
//! Deliberately absent: what arrives upstream (see `collect`), and judging it (see `audit`).

mod config;
mod counters;
mod link;
mod node;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, io, path::Path, sync::Arc, time::Duration};

use bytes::BytesMut;
use serde::Serialize;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

pub use config::{Burst, ConfigError, FleetConfig, Mix};
pub use counters::{AckLatency, FleetCounters};

pub(crate) use node::unix_us;

use crate::{
    device::Device,
    frame::{Clock, DeviceId},
    ledger::{QueuedRow, SentLedger},
    sensor::{Kind, Sensor},
};
use counters::Counters;
use link::Version;
use node::{ConnectedTime, Node, Shared};

/// At the start, devices connect one after another, not faster than this.
const FIRST_CONNECTS_PER_SECOND: u32 = 2000;

/// A fleet at work. Dropping it ends every device at once, and then the ledger lacks what was
/// unacked: see [`Fleet::finish`].
#[derive(Debug)]
pub struct Fleet {
    shared: Arc<Shared>,
    devices: JoinSet<()>,
    ledger: SentLedger,
}

/// What a fleet did, at its end.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FleetReport {
    /// Number of devices.
    pub devices: u32,
    /// From the start until the last device had left, in seconds.
    pub seconds: f64,
    /// Acked events per second over that time.
    pub events_per_second: f64,
    /// Whether every event that was produced is acked.
    pub drained: bool,
    /// Events that the devices kept and never published.
    pub unsent: u64,
    /// The final counters.
    #[serde(flatten)]
    pub counters: FleetCounters,
}

impl Fleet {
    /// Starts the devices on the current tokio runtime, and the ledger at `ledger`, which is
    /// created or emptied. `broker` holds the address as `host:port`. When `cancel` is cancelled,
    /// every device leaves at once.
    ///
    /// # Errors
    /// The ledger cannot be written; or, as [`io::ErrorKind::InvalidInput`], the configuration is
    /// not valid.
    pub fn start(
        config: FleetConfig,
        broker: watch::Receiver<String>,
        ledger: &Path,
        cancel: &CancellationToken,
    ) -> io::Result<Self> {
        config.validate().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let (ledger, rows) = SentLedger::create(ledger)?;
        let outbox_events_max = config.outbox_events_max;
        let shared = Arc::new(Shared {
            config,
            counters: Counters::new(),
            broker,
            stop: CancellationToken::new(),
            cancel: cancel.child_token(),
            started: Instant::now(),
        });
        let devices = match outbox_events_max {
            64 => spawn_all::<64>(&shared, &rows),
            256 => spawn_all::<256>(&shared, &rows),
            1024 => spawn_all::<1024>(&shared, &rows),
            _ => spawn_all::<4096>(&shared, &rows),
        };
        Ok(Self { shared, devices, ledger })
    }

    /// The counters now.
    pub fn counters(&self) -> FleetCounters {
        self.shared.counters.read()
    }

    /// Ends the first phase: devices sample no more, and leave once everything is acked.
    pub fn stop_producing(&self) {
        self.shared.stop.cancel();
    }

    /// Ends the first phase if it has not ended, waits at most `drain_max` until every device has
    /// left, then ends those that have not. The ledger is complete when this returns.
    ///
    /// # Errors
    /// The ledger could not be written, or a device's task panicked.
    pub async fn finish(mut self, drain_max: Duration) -> io::Result<FleetReport> {
        self.stop_producing();
        let mut panicked = false;
        let all_left = async {
            while let Some(left) = self.devices.join_next().await {
                panicked |= left.is_err();
            }
        };
        if timeout(drain_max, all_left).await.is_err() {
            self.shared.cancel.cancel();
            while let Some(left) = self.devices.join_next().await {
                panicked |= left.is_err();
            }
        }
        let seconds = self.shared.started.elapsed().as_secs_f64();
        let ledger = self.ledger;
        tokio::task::spawn_blocking(move || ledger.finish()).await.map_err(io::Error::other)??;
        if panicked {
            return Err(io::Error::other("a device's task panicked"));
        }
        let counters = self.shared.counters.read();
        Ok(FleetReport {
            devices: self.shared.config.devices,
            seconds,
            events_per_second: counters.acked as f64 / seconds,
            drained: counters.acked == counters.produced,
            unsent: counters.produced.saturating_sub(counters.sent),
            counters,
        })
    }
}

fn spawn_all<const N: usize>(shared: &Arc<Shared>, rows: &mpsc::Sender<QueuedRow>) -> JoinSet<()> {
    // A boot id names one run: two runs with one seed must not look like one.
    let boot = (unix_us() / 1_000_000) as u32;
    let mut devices = JoinSet::new();
    for index in 0..shared.config.devices {
        let node = node::<N>(shared, rows, boot, index);
        devices.spawn(node.run(Duration::from_secs(1) * index / FIRST_CONNECTS_PER_SECOND));
    }
    devices
}

fn node<const N: usize>(
    shared: &Arc<Shared>,
    rows: &mpsc::Sender<QueuedRow>,
    boot: u32,
    index: u32,
) -> Node<N> {
    let config = &shared.config;
    let id = DeviceId(config.first_device + index);
    // Each device has a stream of random numbers of its own: what one does changes no other.
    let mut rng = fastrand::Rng::with_seed(config.seed ^ (u64::from(id.0) << 32));
    let kind = pick_kind(config, &mut rng);
    let version = if rng.f64() < config.v5_share { Version::V5 } else { Version::V311 };
    let clock = if rng.f64() < config.wall_clock_share { Clock::Wall } else { Clock::Boot };
    let first_sample_after = config.interval_mean_s() * rng.f64();
    let suffix = if kind == Kind::Door { "alarm" } else { "telemetry" };
    Node {
        device: Box::new(Device::new(id, boot, Sensor::new(kind, rng.u32(..)))),
        version,
        clock,
        topic: format!("{}/{id}/{suffix}", config.topic_prefix),
        rng,
        ledger: rows.clone(),
        next_at: shared.started + Duration::from_secs_f64(first_sample_after),
        published: VecDeque::new(),
        connected_time: ConnectedTime::default(),
        had_link: false,
        payloads: BytesMut::new(),
        shared: Arc::clone(shared),
    }
}

fn pick_kind(config: &FleetConfig, rng: &mut fastrand::Rng) -> Kind {
    let weights = config.mix.weights();
    let total = weights.iter().map(|(_, weight)| weight).sum();
    let mut at = rng.u32(0..total);
    for (kind, weight) in weights {
        match at.checked_sub(weight) {
            Some(rest) => at = rest,
            None => return kind,
        }
    }
    unreachable!("the weights sum up to the total")
}
