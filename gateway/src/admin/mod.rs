//! The admin endpoint: `/metrics`, `/health/live`, `/health/ready`, `/api/v1/status`, the store tools
//! (`store`), and the dead letters (`letters`).
//!
//! Owns: putting one [`status::Status`] together from what the parts report, and serving it. It is
//! bound to loopback by default, because it has no log-in; nothing here but `letters` and `replay`
//! changes anything.

mod letters;
pub mod metrics;
mod rate;
pub(crate) mod replay;
pub mod status;
pub(crate) mod store;

use std::convert::Infallible;
use std::future::IntoFuture as _;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use bridge::forwarder::Wake;
use bridge::{Circuit, Replays, SinkState};
use storage::{Store, StoreStats};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::ingest::{Health, Ingest, LatencyStats, clock};
use crate::mqtt;
pub(crate) use letters::no_such_sink;
use rate::Rate;
use status::{
    AbsentSink, GatewayStatus, IngestStatus, MqttStatus, PartitionStatus, Quantiles, SinkStatus,
    Status, StoreStatus, StreamStatus,
};

/// Everything that is looked at.
pub struct Parts {
    /// Configured id of the gateway.
    pub gateway_id: String,
    /// Start of the process.
    pub started: Instant,
    /// The MQTT front.
    pub front: Arc<mqtt::Shared>,
    /// From publish to ack.
    pub ingest: Ingest,
    /// The durable log.
    pub store: Store,
    /// One per configured sink.
    pub sinks: Vec<Sink>,
    /// How fast all that goes.
    pub rates: Mutex<Rates>,
}

/// A configured sink.
pub struct Sink {
    /// What its forwarder says.
    pub status: watch::Receiver<bridge::SinkStatus>,
    /// What to call when its dead letters were requeued.
    pub wake: Wake,
    /// How to ask it for a replay.
    pub replays: Replays,
    /// Event bytes that are kept for it at most; 0 for no limit of its own.
    pub lag_bytes_max: u64,
}

/// How fast events come and go; observed once a second, whoever asks.
#[derive(Debug)]
pub struct Rates {
    ingest_events: Rate,
    ingest_bytes: Rate,
    today_bytes: Rate,
    /// Events and bytes, in the order of the sinks.
    sinks: Vec<(Rate, Rate)>,
}

/// What "now" means to a rate, and what "today".
const NOW: Duration = Duration::from_secs(10);
const TODAY: Duration = Duration::from_hours(24);
const OBSERVE_EVERY: Duration = Duration::from_secs(1);

/// What the log takes on the disk for an event byte, until so much is stored that it can be told.
const OVERHEAD: f64 = 1.2;
const OVERHEAD_FROM_BYTES: u64 = 4 << 20;

impl Rates {
    /// Of so many sinks, with nothing observed yet.
    pub fn new(sinks: usize) -> Self {
        let now = || Rate::new(NOW);
        Self {
            ingest_events: now(),
            ingest_bytes: now(),
            today_bytes: Rate::new(TODAY),
            sinks: std::iter::repeat_with(|| (now(), now())).take(sinks).collect(),
        }
    }
}

/// Serves until cancelled; then lets the answers under way end.
///
/// # Errors
/// The listener broke.
pub async fn serve(
    listener: TcpListener,
    parts: Arc<Parts>,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let replays = parts.sinks.iter().map(|sink| sink.replays.clone()).collect();
    let replay = replay::router(parts.store.clone(), &parts.gateway_id, replays);
    let walks = store::Walks::new(parts.store.clone(), &parts.gateway_id, shutdown.clone());
    let wakes = parts.sinks.iter().map(|sink| {
        let name = sink.status.borrow().name.clone();
        (name, sink.wake.clone())
    });
    let letters = letters::router(walks.clone(), wakes.collect());
    let tools = store::router(walks).merge(letters);
    let router = Router::new()
        .route("/metrics", get(serve_metrics))
        .route("/health/live", get(|| async { "live\n" }))
        .route("/health/ready", get(serve_ready))
        .route("/api/v1/status", get(serve_status))
        .with_state(Arc::clone(&parts))
        .merge(tools)
        .merge(replay);
    let server = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned());
    tokio::select! {
        served = server.into_future() => served,
        never = observe(&parts) => match never {},
    }
}

/// Observes how fast things go, for as long as it is polled.
async fn observe(parts: &Parts) -> Infallible {
    let mut beat = tokio::time::interval(OBSERVE_EVERY);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        parts.observe(Instant::now());
    }
}

async fn serve_metrics(State(parts): State<Arc<Parts>>) -> Response {
    match look(parts).await {
        Ok(status) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::render(status))
            .into_response(),
        Err(broken) => broken,
    }
}

async fn serve_ready(State(parts): State<Arc<Parts>>) -> Response {
    match not_ready(&parts.ingest.health()) {
        None => "ready\n".into_response(),
        Some(why) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")).into_response()
        }
    }
}

async fn serve_status(State(parts): State<Arc<Parts>>) -> Response {
    match look(parts).await {
        Ok(status) => Json(status).into_response(),
        Err(broken) => broken,
    }
}

/// A look may read the disk, so it happens off the async workers.
async fn look(parts: Arc<Parts>) -> Result<Status, Response> {
    tokio::task::spawn_blocking(move || parts.status()).await.map_err(|_| {
        (StatusCode::INTERNAL_SERVER_ERROR, "the look at the gateway failed: see its log\n")
            .into_response()
    })
}

impl Parts {
    fn rates(&self) -> MutexGuard<'_, Rates> {
        // Every change is a single step, so a panic elsewhere leaves nothing half done.
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn observe(&self, now: Instant) {
        let durable = self.ingest.stats().durable;
        let mut rates = self.rates();
        rates.ingest_events.observe(now, durable.events);
        rates.ingest_bytes.observe(now, durable.size_bytes);
        rates.today_bytes.observe(now, durable.size_bytes);
        for (sink, (events, bytes)) in self.sinks.iter().zip(&mut rates.sinks) {
            let status = sink.status.borrow();
            events.observe(now, status.delivered_events + status.dead_lettered_events);
            bytes.observe(now, status.delivered_bytes);
        }
    }

    /// Bytes by which the log grows in a second, as of today.
    fn growth(&self, store: &StoreStats, today: f64) -> f64 {
        let stored = self.store.lag_bytes(store.first_offset);
        let overhead = if stored >= OVERHEAD_FROM_BYTES {
            store.log_bytes as f64 / stored as f64
        } else {
            OVERHEAD
        };
        today * overhead
    }

    fn status(&self) -> Status {
        let store = self.store.stats();
        let ingest = self.ingest.stats();
        let not_ready = not_ready(&ingest.health);
        let (events_per_second, bytes_per_second, today) = {
            let rates = self.rates();
            let of = |rate: &Rate| rate.per_second();
            (of(&rates.ingest_events), of(&rates.ingest_bytes), of(&rates.today_bytes))
        };
        let left_seconds = rate::seconds_left(store.room_bytes, self.growth(&store, today));
        let sinks: Vec<_> = (0..self.sinks.len())
            .map(|place| {
                let mut sink = self.sink(place, &store);
                let limit = self.sinks[place].lag_bytes_max;
                let own = (limit > 0)
                    .then(|| rate::seconds_left(limit.saturating_sub(sink.lag_bytes), today));
                sink.left_seconds =
                    [own.flatten(), left_seconds].into_iter().flatten().min_by(f64::total_cmp);
                sink
            })
            .collect();
        let absent = store.cursors.iter().filter(|(name, _)| sinks.iter().all(|s| s.name != *name));
        let absent_sinks = absent
            .map(|(name, cursor)| AbsentSink { name: name.clone(), cursor: *cursor })
            .collect();
        let partitions = store.next_seq.iter().zip(&ingest.ring_events).enumerate().map(
            |(partition, (next_seq, ring_events))| PartitionStatus {
                partition: partition as u16,
                next_seq: *next_seq,
                ring_events: *ring_events as u64,
            },
        );
        Status {
            gateway: GatewayStatus {
                id: self.gateway_id.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                epoch: format!("{:016x}", self.store.epoch()),
                uptime_seconds: self.started.elapsed().as_secs_f64(),
                rss_bytes: rss_bytes(),
            },
            ready: not_ready.is_none(),
            not_ready,
            mqtt: self.mqtt(),
            ingest: IngestStatus {
                committed_events_total: ingest.durable.events,
                committed_bytes_total: ingest.durable.size_bytes,
                commits_total: ingest.durable.commits,
                commit_failures_total: ingest.counters.failed_commits,
                duplicates_total: ingest.counters.duplicate_events,
                health: match ingest.health {
                    Health::Storing => "storing",
                    Health::AtQuota { .. } => "at_quota",
                    Health::DiskFull { .. } => "disk_full",
                    Health::Failing { .. } => "failing",
                }
                .to_owned(),
                ring_bytes: ingest.ring_bytes as u64,
                events_per_second,
                bytes_per_second,
                bytes_per_second_today: today,
                ack_latency_ms: quantiles(ingest.ack_latency),
                commit_latency_ms: quantiles(ingest.commit_latency),
            },
            partitions: partitions.collect(),
            sinks,
            store: StoreStatus {
                first_offset: store.first_offset,
                watermark: store.watermark,
                files: store.files,
                log_bytes: store.log_bytes,
                state_bytes: store.state_bytes,
                quota_bytes: store.quota_bytes,
                losses: store.losses,
                quarantined_events_total: store.quarantined_events,
                room_bytes: store.room_bytes,
                left_seconds,
                absent_sinks,
            },
        }
    }

    fn mqtt(&self) -> MqttStatus {
        let stats = &self.front.stats;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MqttStatus {
            connections: read(&stats.connections),
            connections_total: read(&stats.connections_total),
            refused_total: read(&stats.connections_refused),
            publishes_total: stats.publishes.iter().map(read).sum(),
            publishes_refused_total: read(&stats.publishes_refused),
            publishes_dropped_total: read(&stats.publishes_dropped),
            publishes_without_id_total: read(&stats.publishes_without_id),
            logins_failed_total: self.front.access.failures(),
            denied_total: read(&stats.denied) + read(&self.front.sessions.stats().wills_denied),
            paced_total: read(&stats.paced),
            protocol_errors_total: read(&stats.protocol_errors),
            panics_total: read(&stats.panics),
            deliveries_total: read(&stats.deliveries),
            deliveries_missed_total: read(&stats.deliveries_dropped)
                + read(&self.front.downlink.stats().missed),
            sessions: self.front.sessions.len() as u64,
            queued_bytes: self.front.sessions.stats().queued_bytes.load(Ordering::Relaxed) as u64,
            queued_dropped_total: read(&self.front.sessions.stats().dropped),
            retained: self.front.retained.len() as u64,
            retained_refused_total: self.front.retained.refused(),
        }
    }

    /// Event bytes of a range of the log.
    fn bytes_of(&self, range: &Range<u64>, watermark: u64) -> u64 {
        let behind = if range.end < watermark { self.store.lag_bytes(range.end) } else { 0 };
        self.store.lag_bytes(range.start).saturating_sub(behind)
    }

    fn sink(&self, place: usize, store: &StoreStats) -> SinkStatus {
        let sink = self.sinks[place].status.borrow().clone();
        let (drain_events, drain_bytes, ingest) = {
            let rates = self.rates();
            let (events, bytes) = &rates.sinks[place];
            (events.per_second(), bytes.per_second(), rates.ingest_events.per_second())
        };
        let (state, error) = match &sink.state {
            SinkState::Starting => ("starting", None),
            SinkState::Idle => ("idle", None),
            SinkState::Sending => ("sending", None),
            SinkState::Retrying { error } => ("retrying", Some(error.clone())),
            SinkState::Held { error } => ("held", Some(error.clone())),
            SinkState::Waiting { reason } => ("waiting", Some((*reason).to_owned())),
            SinkState::Stopped => ("stopped", None),
        };
        let pending = pending(&sink, store.watermark);
        let lag_events = pending.iter().map(|range| range.end - range.start).sum();
        let oldest_us = if lag_events == 0 { None } else { self.store.received_us(sink.cursor) };
        let age_us = oldest_us.map_or(0, |us| clock::now_us().saturating_sub(us));
        let letters = store.dead_letters.iter().find(|(name, _)| *name == sink.name);
        let letters = letters.map(|(_, stats)| *stats).unwrap_or_default();
        SinkStatus {
            name: sink.name.clone(),
            kind: sink.kind.to_owned(),
            state: state.to_owned(),
            error,
            cursor: sink.cursor,
            streams: sink.streams.iter().map(stream).collect(),
            lag_events,
            lag_bytes: pending.iter().map(|range| self.bytes_of(range, store.watermark)).sum(),
            lag_seconds: age_us as f64 / 1e6,
            delivered_events_total: sink.delivered_events,
            delivered_bytes_total: sink.delivered_bytes,
            filtered_events_total: sink.filtered_events,
            parked_devices: sink.parked_devices,
            dead_lettered_events_total: sink.dead_lettered_events,
            dead_letters: letters.events,
            dead_letter_bytes: letters.size_bytes,
            requeued: letters.requeued,
            requeued_events_total: sink.requeued_events,
            retries_total: sink.retries,
            last_delivered_us: sink.last_delivered_us,
            circuit: match sink.circuit {
                Circuit::Closed => "closed",
                Circuit::Open => "open",
                Circuit::HalfOpen => "half_open",
            }
            .to_owned(),
            circuit_opened_total: sink.circuit_opened,
            drain_events_per_second: drain_events,
            drain_bytes_per_second: drain_bytes,
            eta_seconds: rate::eta_seconds(lag_events, drain_events, ingest),
            left_seconds: None,
        }
    }
}

/// What a sink still needs of a log up to `watermark`: what has gone ahead of its cursor is not in it,
/// unless another of its lanes may still need some of that.
fn pending(sink: &bridge::SinkStatus, watermark: u64) -> Vec<Range<u64>> {
    if sink.streams.is_empty() {
        return Vec::from_iter((sink.cursor < watermark).then_some(sink.cursor..watermark));
    }
    let owed = sink.streams.iter().filter(|stream| stream.name != "replay");
    let mut ranges: Vec<_> = owed
        .map(|stream| stream.cursor..stream.end.unwrap_or(watermark).min(watermark))
        .filter(|range| !range.is_empty())
        .collect();
    ranges.sort_by_key(|range| range.start);
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => all.push(range),
        }
    }
    all
}

fn stream(stream: &bridge::StreamStatus) -> StreamStatus {
    StreamStatus { name: stream.name.to_owned(), cursor: stream.cursor, end: stream.end }
}

fn quantiles(latency: LatencyStats) -> Quantiles {
    let ms = |us: u64| us as f64 / 1_000.0;
    Quantiles {
        p50: ms(latency.p50_us),
        p99: ms(latency.p99_us),
        p999: ms(latency.p999_us),
        max: ms(latency.max_us),
    }
}

/// Why events cannot be made durable now, if they cannot.
fn not_ready(health: &Health) -> Option<String> {
    match health {
        Health::Storing | Health::AtQuota { .. } => None,
        Health::DiskFull { reason } | Health::Failing { reason } => Some(reason.clone()),
    }
}

/// Resident memory as Linux tells it.
fn rss_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}
