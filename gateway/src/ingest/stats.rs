//! A look at ingest, for metrics and status.

use super::{Admission, Health, LatencyStats};

/// A look at ingest. Counters are since the start of the process.
#[derive(Clone, Debug)]
pub struct IngestStats {
    /// How the log takes events.
    pub health: Health,
    /// Whether new publishes are taken.
    pub admission: Admission,
    /// Durable end of the log.
    pub watermark: u64,
    /// Events in each ring, by partition.
    pub ring_events: Vec<usize>,
    /// Events a ring holds, at most.
    pub ring_events_max: usize,
    /// Event bytes in all rings.
    pub ring_bytes: usize,
    /// Event bytes in all rings, at most.
    pub ring_bytes_max: usize,
    /// Connections that wait for room in a ring.
    pub waiting_connections: usize,
    /// What became durable.
    pub durable: Durable,
    /// What else happened.
    pub counters: Counters,
    /// From handing a commit to the log until it is durable.
    pub commit_latency: LatencyStats,
    /// From reading a publish until its ack may leave.
    pub ack_latency: LatencyStats,
}

/// What else happened in the committer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Commits that the log refused or failed.
    pub failed_commits: u64,
    /// Events that were taken and not stored, because their commit or one before it on the same
    /// connection failed, or the log is full and refuses; the connection was closed, so that the device
    /// sends them again.
    pub failed_events: u64,
    /// Resends that were recognised: acked and not stored again.
    pub duplicate_events: u64,
    /// Times that retention failed.
    pub failed_trims: u64,
    /// Files that retention removed.
    pub trimmed_files: u64,
    /// Bytes that retention gave back.
    pub trimmed_bytes: u64,
    /// Rows that retention wrote to the loss ledger.
    pub loss_rows: u64,
}

/// What became durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Durable {
    /// Commits.
    pub commits: u64,
    /// Events in them.
    pub events: u64,
    /// Event bytes in them.
    pub size_bytes: u64,
}
