//! The admin endpoint: `/metrics`, `/health/live`, `/health/ready`, `/api/v1/status`, and the store
//! tools (`store`).
//!
//! Owns: putting one [`status::Status`] together from what the parts report, and serving it. It
//! only looks, but for `replay`, which has events sent again: it is bound to loopback by default, because it
//! has no log-in.

pub mod metrics;
pub(crate) mod replay;
pub mod status;
pub(crate) mod store;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use bridge::{Replays, SinkState};
use storage::{Store, StoreStats};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::ingest::{Health, Ingest, LatencyStats, clock};
use crate::mqtt;
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
    pub sinks: Vec<watch::Receiver<bridge::SinkStatus>>,
    /// One per configured sink.
    pub replays: Vec<Replays>,
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
    let tools = store::router(parts.store.clone(), &parts.gateway_id, shutdown.clone());
    let replay = replay::router(parts.store.clone(), &parts.gateway_id, parts.replays.clone());
    let router = Router::new()
        .route("/metrics", get(serve_metrics))
        .route("/health/live", get(|| async { "live\n" }))
        .route("/health/ready", get(serve_ready))
        .route("/api/v1/status", get(serve_status))
        .with_state(parts)
        .merge(tools)
        .merge(replay);
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
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
    fn status(&self) -> Status {
        let store = self.store.stats();
        let ingest = self.ingest.stats();
        let not_ready = not_ready(&ingest.health);
        let sinks: Vec<_> =
            self.sinks.iter().map(|sink| self.sink(&sink.borrow(), &store)).collect();
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
                health: match ingest.health {
                    Health::Storing => "storing",
                    Health::AtQuota { .. } => "at_quota",
                    Health::DiskFull { .. } => "disk_full",
                    Health::Failing { .. } => "failing",
                }
                .to_owned(),
                ring_bytes: ingest.ring_bytes as u64,
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
            protocol_errors_total: read(&stats.protocol_errors),
            panics_total: read(&stats.panics),
            deliveries_total: read(&stats.deliveries),
            deliveries_missed_total: read(&stats.deliveries_dropped)
                + read(&self.front.downlink.stats().missed),
        }
    }

    fn sink(&self, sink: &bridge::SinkStatus, store: &StoreStats) -> SinkStatus {
        let (state, error) = match &sink.state {
            SinkState::Starting => ("starting", None),
            SinkState::Idle => ("idle", None),
            SinkState::Sending => ("sending", None),
            SinkState::Retrying { error } => ("retrying", Some(error.clone())),
            SinkState::Held { error } => ("held", Some(error.clone())),
            SinkState::Waiting { reason } => ("waiting", Some((*reason).to_owned())),
            SinkState::Stopped => ("stopped", None),
        };
        let lag_events = store.watermark.saturating_sub(sink.cursor);
        let oldest_us = if lag_events == 0 { None } else { self.store.received_us(sink.cursor) };
        let age_us = oldest_us.map_or(0, |us| clock::now_us().saturating_sub(us));
        let dead_letters = store.dead_letters.iter().find(|(name, _)| *name == sink.name);
        SinkStatus {
            name: sink.name.clone(),
            kind: sink.kind.to_owned(),
            state: state.to_owned(),
            error,
            cursor: sink.cursor,
            streams: sink.streams.iter().map(stream).collect(),
            lag_events,
            lag_bytes: if lag_events == 0 { 0 } else { self.store.lag_bytes(sink.cursor) },
            lag_seconds: age_us as f64 / 1e6,
            delivered_events_total: sink.delivered_events,
            delivered_bytes_total: sink.delivered_bytes,
            filtered_events_total: sink.filtered_events,
            dead_lettered_events_total: sink.dead_lettered_events,
            dead_letters: dead_letters.map_or(0, |(_, count)| *count),
            retries_total: sink.retries,
        }
    }
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
