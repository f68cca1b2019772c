//! What `/api/v1/status` says, and what `status` and `demo` read back.
//!
//! Scripts hold on to these names: fields are added, never renamed. Times are seconds or
//! milliseconds as their names say, sizes bytes.

use serde::{Deserialize, Serialize};

/// The whole answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Who answers.
    pub gateway: GatewayStatus,
    /// Whether new events can be made durable. An upstream that is down does not make it false.
    pub ready: bool,
    /// Why not, if it is not.
    pub not_ready: Option<String>,
    /// The MQTT front.
    pub mqtt: MqttStatus,
    /// From publish to ack.
    pub ingest: IngestStatus,
    /// The durable log.
    pub store: StoreStatus,
    /// One entry per partition, by number.
    pub partitions: Vec<PartitionStatus>,
    /// One entry per configured sink.
    pub sinks: Vec<SinkStatus>,
}

/// Who answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// Configured id.
    pub id: String,
    /// Version of the program.
    pub version: String,
    /// Random id of the store's life, 16 hexadecimal digits.
    pub epoch: String,
    /// Since the start of the process.
    pub uptime_seconds: f64,
    /// Resident memory of the process, where the system tells it.
    pub rss_bytes: Option<u64>,
}

/// The MQTT front. Counters are since the start of the process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MqttStatus {
    /// Open connections.
    pub connections: u64,
    /// Connections ever taken.
    pub connections_total: u64,
    /// Connections turned away at a limit or at CONNECT.
    pub refused_total: u64,
    /// Publishes read, of every quality of service.
    pub publishes_total: u64,
    /// Publishes of these that were refused: no route, a reserved topic, or a store that is full.
    pub publishes_refused_total: u64,
    /// QoS 0 publishes and wills for which there was no room until their connection had ended.
    pub publishes_dropped_total: u64,
    /// Publishes without the id that their route looks for: their resends are not recognised.
    #[serde(default)]
    pub publishes_without_id_total: u64,
    /// Log-ins that failed: an unknown user, a wrong password, a token that is none of ours.
    #[serde(default)]
    pub logins_failed_total: u64,
    /// Publishes, wills and subscriptions that the rules did not allow, and messages that waited for a
    /// client and that they do not allow it any more.
    #[serde(default)]
    pub denied_total: u64,
    /// Times that a client was not read for a while because it was over its rate.
    #[serde(default)]
    pub paced_total: u64,
    /// Connections closed for a breach of the protocol.
    pub protocol_errors_total: u64,
    /// Connections that ended in a panic.
    pub panics_total: u64,
    /// Messages written to subscribers.
    pub deliveries_total: u64,
    /// Messages that a subscriber did not get: it did not keep up, they had expired, they were larger
    /// than it takes, or the rules do not allow them any more.
    pub deliveries_missed_total: u64,
    /// Sessions that are kept, with a connection or without.
    #[serde(default)]
    pub sessions: u64,
    /// Bytes of messages that wait for their clients.
    #[serde(default)]
    pub queued_bytes: u64,
    /// Messages that were not kept for a client, or made room for others, at a bound of its queue.
    #[serde(default)]
    pub queued_dropped_total: u64,
    /// Topics with a retained message.
    #[serde(default)]
    pub retained: u64,
    /// Messages that were not retained, at a bound.
    #[serde(default)]
    pub retained_refused_total: u64,
}

/// From publish to ack. Counters are since the start of the process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IngestStatus {
    /// Events made durable.
    pub committed_events_total: u64,
    /// Event bytes made durable.
    pub committed_bytes_total: u64,
    /// Commits.
    pub commits_total: u64,
    /// Commits that failed: nothing of them was acked.
    pub commit_failures_total: u64,
    /// Resends that were recognised by their ids: acked and not stored again.
    #[serde(default)]
    pub duplicates_total: u64,
    /// What stands in the way of commits (`at_quota`, `disk_full`, `failing`), else `storing`.
    pub health: String,
    /// Event bytes in the rings now.
    pub ring_bytes: u64,
    /// Events made durable per second, over the last ten seconds or so.
    #[serde(default)]
    pub events_per_second: f64,
    /// Event bytes made durable per second, over the last ten seconds or so.
    #[serde(default)]
    pub bytes_per_second: f64,
    /// Event bytes made durable per second, over the last day or so, or since the start.
    #[serde(default)]
    pub bytes_per_second_today: f64,
    /// From the read of a publish to its durable commit.
    pub ack_latency_ms: Quantiles,
    /// From the start of a commit to its durable end.
    pub commit_latency_ms: Quantiles,
}

/// Quantiles of a latency over the last minute, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Quantiles {
    /// Median.
    pub p50: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p999: f64,
    /// Largest.
    pub max: f64,
}

/// The durable log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreStatus {
    /// First stored offset.
    pub first_offset: u64,
    /// End-exclusive durable offset.
    pub watermark: u64,
    /// Log files.
    pub files: u32,
    /// Bytes they take.
    pub log_bytes: u64,
    /// Bytes of the state database.
    pub state_bytes: u64,
    /// Bytes that the log may take.
    pub quota_bytes: u64,
    /// Rows in the loss ledger.
    pub losses: u64,
    /// Events that were found unreadable since the start of the process, because their batches are
    /// damaged: their exact ranges are in the loss ledger, everything around them is delivered.
    #[serde(default)]
    pub quarantined_events_total: u64,
    /// Bytes that the log may still grow by: to its quota, and to what is left free of the disk.
    #[serde(default)]
    pub room_bytes: u64,
    /// Estimate: how long that lasts at today's rate if nothing is trimmed, as when an upstream is
    /// down; nothing while no events come.
    #[serde(default)]
    pub left_seconds: Option<f64>,
    /// Cursors of sinks that are no longer configured: they hold nothing back.
    pub absent_sinks: Vec<AbsentSink>,
}

/// A sink that the store knows and the configuration does not.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AbsentSink {
    /// Its name.
    pub name: String,
    /// Its last cursor.
    pub cursor: u64,
}

/// One partition.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PartitionStatus {
    /// Its number.
    pub partition: u16,
    /// Next sequence number.
    pub next_seq: u64,
    /// Events in its ring now.
    pub ring_events: u64,
}

/// One sink.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SinkStatus {
    /// Its name.
    pub name: String,
    /// `kafka`, `http` or `file`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `starting`, `idle`, `sending`, `retrying`, `held`, `waiting` or `stopped`.
    pub state: String,
    /// What went wrong last, while it is retrying or held; what it waits for, while it is waiting.
    pub error: Option<String>,
    /// Next offset that it needs.
    pub cursor: u64,
    /// Its streams, where it has more than one: their cursors are at or ahead of its own.
    #[serde(default)]
    pub streams: Vec<StreamStatus>,
    /// Durable events that it still needs.
    pub lag_events: u64,
    /// Their event bytes.
    pub lag_bytes: u64,
    /// Age of the oldest of them.
    pub lag_seconds: f64,
    /// Events acknowledged since the start of the process.
    pub delivered_events_total: u64,
    /// Event bytes acknowledged since the start of the process.
    pub delivered_bytes_total: u64,
    /// Events that its filters kept from it since the start of the process.
    #[serde(default)]
    pub filtered_events_total: u64,
    /// Devices whose events are held back behind one of theirs that was refused.
    #[serde(default)]
    pub parked_devices: u64,
    /// Events sent to the dead letters since the start of the process.
    pub dead_lettered_events_total: u64,
    /// Dead letters that are stored.
    pub dead_letters: u64,
    /// Bytes that they take.
    #[serde(default)]
    pub dead_letter_bytes: u64,
    /// Of them, those that are to be delivered again.
    #[serde(default)]
    pub requeued: u64,
    /// Dead letters that were requeued and delivered since the start of the process.
    #[serde(default)]
    pub requeued_events_total: u64,
    /// Requests that were tried again since the start of the process.
    pub retries_total: u64,
    /// Last acknowledgement, microseconds since the Unix epoch.
    #[serde(default)]
    pub last_delivered_us: Option<u64>,
    /// Whether requests go to the upstream: `closed` (they do), `open` (it is left alone for a
    /// while), or `half_open` (one tries whether it works again).
    #[serde(default)]
    pub circuit: String,
    /// How often the circuit has opened since the start of the process.
    #[serde(default)]
    pub circuit_opened_total: u64,
    /// Events delivered or refused for good per second, over the last ten seconds or so.
    #[serde(default)]
    pub drain_events_per_second: f64,
    /// Event bytes delivered per second, over the last ten seconds or so.
    #[serde(default)]
    pub drain_bytes_per_second: f64,
    /// Estimate: how long until its lag is gone, while new events go on coming; nothing if the lag
    /// does not shrink.
    #[serde(default)]
    pub eta_seconds: Option<f64>,
    /// Estimate: how long its lag may grow at today's rate before `lag_bytes_max`, the quota or the
    /// end of the disk; nothing while no events come.
    #[serde(default)]
    pub left_seconds: Option<f64>,
}

/// One stream of a sink.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StreamStatus {
    /// `live`, `backlog`, `alarm` or `backfill`.
    pub name: String,
    /// Next offset that it needs.
    pub cursor: u64,
    /// Where it ends: none for a stream that goes on.
    pub end: Option<u64>,
}
