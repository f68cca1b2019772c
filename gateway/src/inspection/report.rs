//! The answers of the store tools, as `--json` prints them and the admin endpoint serves them.
//!
//! Scripts hold on to these names: fields are added, never renamed. Ranges are end-exclusive, times
//! microseconds since the Unix epoch, sizes bytes.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use storage::{Balance, Damage, ReadError, SinkBalance, Store, Verification};

/// A range of offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offsets {
    /// First offset.
    pub from: u64,
    /// The offset after the last.
    pub to: u64,
}

impl Offsets {
    /// Number of offsets.
    pub fn count(self) -> u64 {
        self.to.saturating_sub(self.from)
    }
}

impl From<&Range<u64>> for Offsets {
    fn from(range: &Range<u64>) -> Self {
        Self { from: range.start, to: range.end }
    }
}

/// `store stats`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatsReport {
    /// Configured id of the gateway.
    pub gateway: String,
    /// Random id of the store's life, 16 hexadecimal digits.
    pub epoch: String,
    /// Events that are stored; its end is the watermark.
    pub offsets: Offsets,
    /// Rows of batches in all files.
    pub batches: u64,
    /// Bytes that the log files take on the device.
    pub log_bytes: u64,
    /// Bytes that the state database takes.
    pub state_bytes: u64,
    /// Bytes that the log may take.
    pub quota_bytes: u64,
    /// Event bytes (payload, topic, device key, attributes) of the stored events.
    pub event_bytes: u64,
    /// Event bytes ever committed.
    pub event_bytes_ever: u64,
    /// Receive time of the first stored event.
    pub first_received_us: Option<u64>,
    /// Receive time of the last one.
    pub last_received_us: Option<u64>,
    /// Rows in the loss ledger.
    pub losses: u64,
    /// Dead letters of all sinks.
    pub dead_letters: u64,
    /// Oldest first.
    pub files: Vec<FileReport>,
    /// By number.
    pub partitions: Vec<PartitionReport>,
}

/// One log file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileReport {
    /// Where it is.
    pub path: String,
    /// Its events.
    pub offsets: Offsets,
    /// Rows of batches.
    pub batches: u64,
    /// Bytes that it takes on the device.
    pub size_bytes: u64,
    /// Event bytes of its events, where its neighbours' head rows tell.
    pub event_bytes: Option<u64>,
    /// Whether its head row could be read.
    pub sound_head: bool,
}

/// The stored range of one partition.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PartitionReport {
    /// Its number.
    pub partition: u16,
    /// First stored sequence number, if the first head row tells; equal to `next_seq` if none is.
    pub first_seq: Option<u64>,
    /// Next sequence number.
    pub next_seq: u64,
}

impl StatsReport {
    pub(super) fn new(store: &Store, gateway: &str) -> Result<Self, ReadError> {
        let files = store.files()?;
        let stats = store.stats();
        let first_seqs = files.first().and_then(|file| file.before.as_ref());
        let partitions = stats.next_seq.iter().enumerate().map(|(partition, &next_seq)| {
            let first_seq = first_seqs.and_then(|before| before.next_seq.get(partition).copied());
            PartitionReport { partition: partition as u16, first_seq, next_seq }
        });
        let last = stats.watermark.checked_sub(1).filter(|last| *last >= stats.first_offset);
        Ok(Self {
            gateway: gateway.to_owned(),
            epoch: format!("{:016x}", store.epoch()),
            offsets: Offsets { from: stats.first_offset, to: stats.watermark },
            batches: files.iter().map(|file| file.batches).sum(),
            log_bytes: stats.log_bytes,
            state_bytes: stats.state_bytes,
            quota_bytes: stats.quota_bytes,
            event_bytes: store.lag_bytes(stats.first_offset),
            event_bytes_ever: stats.event_bytes,
            first_received_us: store.received_us(stats.first_offset),
            last_received_us: last.and_then(|last| store.received_us(last)),
            losses: stats.losses,
            dead_letters: stats.dead_letters.iter().map(|(_, stats)| stats.events).sum(),
            partitions: partitions.collect(),
            files: files
                .into_iter()
                .map(|file| FileReport {
                    path: file.path.display().to_string(),
                    offsets: (&file.offsets).into(),
                    batches: file.batches,
                    size_bytes: file.size_bytes,
                    event_bytes: file.event_bytes,
                    sound_head: file.before.is_some(),
                })
                .collect(),
        })
    }
}

/// `store verify`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Configured id of the gateway.
    pub gateway: String,
    /// Random id of the store's life, 16 hexadecimal digits.
    pub epoch: String,
    /// Nothing is wrong, or only what the loss ledger knows.
    pub sound: bool,
    /// What was walked.
    pub offsets: Offsets,
    /// Files looked at.
    pub files: u32,
    /// Sound batches.
    pub batches: u64,
    /// Sound events.
    pub events: u64,
    /// Their event bytes.
    pub event_bytes: u64,
    /// Control records beside them.
    pub controls: u64,
    /// Events that cannot be read and are in no ledger.
    pub unreadable_events: u64,
    /// Events that cannot be read, each with a row in the loss ledger.
    pub recorded_events: u64,
    /// What is wrong, in the order of the log.
    pub findings: Vec<FindingReport>,
    /// Findings that are not listed.
    pub findings_more: u64,
    /// Sequence numbers seen, by partition.
    pub partitions: Vec<SeenReport>,
}

/// One damaged place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FindingReport {
    /// `unreadable`, `recorded` (in the loss ledger), `disorder`, or `bookkeeping` (no event is lost).
    pub damage: String,
    /// The file.
    pub path: String,
    /// Events that it is about.
    pub offsets: Offsets,
    /// What is wrong.
    pub reason: String,
}

/// Sequence numbers of a partition that were seen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SeenReport {
    /// Its number.
    pub partition: u16,
    /// First one; none if no event was seen.
    pub first_seq: Option<u64>,
    /// Last one.
    pub last_seq: Option<u64>,
}

impl VerifyReport {
    pub(super) fn new(verification: &Verification, store: &Store, gateway: &str) -> Self {
        let findings = verification.findings.iter().map(|finding| FindingReport {
            damage: match finding.damage {
                Damage::Unreadable => "unreadable",
                Damage::Recorded => "recorded",
                Damage::Disorder => "disorder",
                Damage::Bookkeeping => "bookkeeping",
            }
            .to_owned(),
            path: finding.path.display().to_string(),
            offsets: (&finding.offsets).into(),
            reason: finding.reason.clone(),
        });
        let partitions = verification.seqs.iter().enumerate().map(|(partition, seen)| SeenReport {
            partition: partition as u16,
            first_seq: seen.map(|(first, _)| first),
            last_seq: seen.map(|(_, last)| last),
        });
        Self {
            gateway: gateway.to_owned(),
            epoch: format!("{:016x}", store.epoch()),
            sound: verification.is_sound(),
            offsets: (&verification.offsets).into(),
            files: verification.files,
            batches: verification.batches,
            events: verification.events,
            event_bytes: verification.event_bytes,
            controls: verification.controls,
            unreadable_events: verification.unreadable,
            recorded_events: verification.recorded,
            findings: findings.collect(),
            findings_more: verification.findings_more,
            partitions: partitions.collect(),
        }
    }
}

/// `balance`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BalanceReport {
    /// Configured id of the gateway.
    pub gateway: String,
    /// Random id of the store's life, 16 hexadecimal digits.
    pub epoch: String,
    /// Whether every event of every sink is somewhere.
    pub balanced: bool,
    /// Events ever committed.
    pub committed: u64,
    /// Resends that were recognised in the store's life: with what was committed, all that was acked.
    #[serde(default)]
    pub duplicates: u64,
    /// First stored offset.
    pub first_offset: u64,
    /// One per sink that the store knows.
    pub sinks: Vec<SinkSums>,
    /// Disorder in the part of the log that was walked.
    pub problems: Vec<String>,
}

/// The sums of one sink, in events: committed = delivered + pending + dead_lettered +
/// filtered + dropped.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SinkSums {
    /// Its name.
    pub sink: String,
    /// Whether it is in the configuration.
    pub configured: bool,
    /// Whether every event is somewhere.
    pub balanced: bool,
    /// First offset that was ever its own.
    pub origin: u64,
    /// Next offset that it needs.
    pub cursor: u64,
    /// Durable since its origin.
    pub committed: u64,
    /// Passed by its cursor, and neither refused nor dropped.
    pub delivered: u64,
    /// Walked and readable, from its cursor on.
    pub pending: u64,
    /// Refused for good, and kept.
    pub dead_lettered: u64,
    /// Not what it is to have, by its filters.
    #[serde(default)]
    pub filtered: u64,
    /// In the loss ledger, by reason.
    pub dropped: DroppedSums,
    /// Needed, and neither readable nor in the loss ledger.
    pub unaccounted: Vec<Offsets>,
    /// What does not fit.
    pub problems: Vec<String>,
}

/// Events dropped by policy, by reason.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct DroppedSums {
    /// At the quota.
    pub quota: u64,
    /// By age.
    pub expired: u64,
    /// Damaged.
    pub corrupt: u64,
    /// Trimmed while the sink was not configured.
    pub sink_absent: u64,
    /// Beyond the sink's `lag_bytes_max`.
    pub lag: u64,
    /// Dead letters beyond `storage.dead_letter_bytes_max`.
    #[serde(default)]
    pub dead_letter_limit: u64,
    /// Dead letters that somebody dropped.
    #[serde(default)]
    pub by_hand: u64,
}

impl BalanceReport {
    pub(super) fn new(balance: &Balance, duplicates: u64, store: &Store, gateway: &str) -> Self {
        Self {
            gateway: gateway.to_owned(),
            epoch: format!("{:016x}", store.epoch()),
            balanced: balance.adds_up(),
            committed: balance.committed,
            duplicates,
            first_offset: balance.first_offset,
            sinks: balance.sinks.iter().map(SinkSums::from).collect(),
            problems: balance.problems.clone(),
        }
    }
}

impl From<&SinkBalance> for SinkSums {
    fn from(sums: &SinkBalance) -> Self {
        let dropped = &sums.dropped;
        Self {
            sink: sums.sink.clone(),
            configured: sums.configured,
            balanced: sums.adds_up(),
            origin: sums.origin,
            cursor: sums.cursor,
            committed: sums.committed,
            delivered: sums.delivered,
            pending: sums.pending,
            dead_lettered: sums.dead_lettered,
            filtered: sums.filtered,
            dropped: DroppedSums {
                quota: dropped.quota,
                expired: dropped.expired,
                corrupt: dropped.corrupt,
                sink_absent: dropped.sink_absent,
                lag: dropped.lag,
                dead_letter_limit: dropped.dead_letter_limit,
                by_hand: dropped.by_hand,
            },
            unaccounted: sums.unaccounted.iter().map(Offsets::from).collect(),
            problems: sums.problems.clone(),
        }
    }
}

/// One line of a walk's answer: how far it is, and last what came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line<T> {
    /// How far it is.
    Progress {
        /// Offsets done.
        done: u64,
        /// Offsets in all.
        total: u64,
    },
    /// It is done.
    Report(T),
    /// It came to no end.
    Failed(String),
}
