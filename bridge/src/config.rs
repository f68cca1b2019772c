//! Settings of a sink, already validated: the gateway reads them from TOML and names the place of
//! every mistake, so nothing here can be wrong when a forwarder starts.
//!
//! Owns: the settings, and beside each its default and its range, so that both have one home.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use storage::Lanes;

use crate::filter::Filter;
use crate::shaper::Shaping;

/// A value that must not reach a log: `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }
    /// The secret itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("<secret>")
    }
}

/// One upstream destination.
#[derive(Clone, Debug)]
pub struct SinkConfig {
    /// Name, unique among the sinks: the key of its cursor.
    pub name: String,
    /// Where it goes.
    pub target: Target,
    /// CloudEvents `type` of every event, not empty.
    pub event_type: String,
    /// Events in one request at most.
    pub request_events_max: usize,
    /// Event bytes in one request at most; a single larger event still goes, alone. What is sent is
    /// larger: the JSON around an event takes 300 to 400 bytes.
    pub request_bytes_max: usize,
    /// How long to wait for an answer before the request counts as failed.
    pub request_timeout: Duration,
    /// Bound of the first pause after a failure; doubles from there, with full jitter.
    pub retry_backoff_min: Duration,
    /// Longest pause after a failure, and the pause of a sink that is held. Only a `Retry-After`
    /// of the upstream makes it longer.
    pub retry_backoff_max: Duration,
    /// Event bytes that the store keeps for it at most; 0 for no limit but the store's. Beyond it,
    /// its oldest are dropped for it, and stand in the loss ledger.
    pub lag_bytes_max: u64,
    /// What it is to have.
    pub filter: Filter,
    /// Lanes besides `live` that get a stream of their own: those that some route gives.
    pub lanes: Lanes,
    /// What goes first after an outage.
    pub backlog: Backlog,
    /// Share of the requests, by bytes, that what can wait (a backlog that live events go ahead of,
    /// and the lane `backfill`) gets beside live events, in percent.
    pub backlog_share_percent: u8,
    /// When it may send, and how much.
    pub shaping: Shaping,
}

/// What goes first after an outage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backlog {
    /// The oldest event: order per device.
    #[default]
    InOrder,
    /// What comes in from now on, once the oldest event has waited for longer than `after`: order
    /// per device within the backlog and within what went ahead of it.
    LiveFirst {
        /// How long an event may wait.
        after: Duration,
    },
}

impl SinkConfig {
    /// Default of [`SinkConfig::event_type`].
    pub const EVENT_TYPE: &str = "edge.gateway.event";
    /// Default of [`SinkConfig::request_events_max`].
    pub const REQUEST_EVENTS_MAX: usize = 1_000;
    /// Range of [`SinkConfig::request_events_max`].
    pub const REQUEST_EVENTS_RANGE: RangeInclusive<usize> = 1..=100_000;
    /// Default of [`SinkConfig::request_bytes_max`]: with the JSON around them, a thousand small
    /// events stay under the 1 MiB at which common reverse proxies refuse a body.
    pub const REQUEST_BYTES_MAX: usize = 512 * 1024;
    /// Range of [`SinkConfig::request_bytes_max`].
    pub const REQUEST_BYTES_RANGE: RangeInclusive<usize> = 1024..=64 * 1024 * 1024;
    /// Default of [`SinkConfig::request_timeout`].
    pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
    /// Range of [`SinkConfig::request_timeout`].
    pub const REQUEST_TIMEOUT_RANGE: RangeInclusive<Duration> =
        Duration::from_millis(100)..=Duration::from_mins(10);
    /// Default of [`SinkConfig::retry_backoff_min`].
    pub const RETRY_BACKOFF_MIN: Duration = Duration::from_millis(200);
    /// Default of [`SinkConfig::retry_backoff_max`].
    pub const RETRY_BACKOFF_MAX: Duration = Duration::from_secs(30);
    /// Range of [`SinkConfig::retry_backoff_min`] and [`SinkConfig::retry_backoff_max`]; the first
    /// must not be above the second.
    pub const RETRY_BACKOFF_RANGE: RangeInclusive<Duration> =
        Duration::from_millis(1)..=Duration::from_hours(1);

    /// Default of [`SinkConfig::backlog_share_percent`].
    pub const BACKLOG_SHARE_PERCENT: u8 = 50;
    /// Range of [`SinkConfig::backlog_share_percent`].
    pub const BACKLOG_SHARE_RANGE: RangeInclusive<u8> = 1..=99;
    /// Default of [`Backlog::LiveFirst::after`].
    pub const LIVE_FIRST_AFTER: Duration = Duration::from_secs(10);
    /// Range of [`Backlog::LiveFirst::after`].
    pub const LIVE_FIRST_AFTER_RANGE: RangeInclusive<Duration> =
        Duration::from_millis(100)..=Duration::from_hours(24);

    /// A sink with every default.
    pub fn new(name: impl Into<String>, target: Target) -> Self {
        Self {
            name: name.into(),
            target,
            event_type: Self::EVENT_TYPE.to_owned(),
            request_events_max: Self::REQUEST_EVENTS_MAX,
            request_bytes_max: Self::REQUEST_BYTES_MAX,
            request_timeout: Self::REQUEST_TIMEOUT,
            retry_backoff_min: Self::RETRY_BACKOFF_MIN,
            retry_backoff_max: Self::RETRY_BACKOFF_MAX,
            lag_bytes_max: 0,
            filter: Filter::default(),
            lanes: Lanes::NONE,
            backlog: Backlog::default(),
            backlog_share_percent: Self::BACKLOG_SHARE_PERCENT,
            shaping: Shaping::default(),
        }
    }
}

/// Where a sink sends.
#[derive(Clone, Debug)]
pub enum Target {
    /// HTTP or HTTPS, one POST per request.
    Http(HttpConfig),
    /// Kafka.
    #[cfg(feature = "kafka")]
    Kafka(KafkaConfig),
    /// NDJSON in a rotated local file.
    File(FileConfig),
}

impl Target {
    /// `http`, `kafka` or `file`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Http(_) => "http",
            #[cfg(feature = "kafka")]
            Self::Kafka(_) => "kafka",
            Self::File(_) => "file",
        }
    }
}

/// Settings of an HTTP sink.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// `http://` or `https://` address that takes the POST.
    pub url: String,
    /// Shape of the body.
    pub format: HttpFormat,
    /// Content coding of the body.
    pub compression: Compression,
    /// `Authorization` header.
    pub auth: HttpAuth,
    /// Further headers, sent as they are.
    pub headers: Vec<(String, String)>,
}

impl HttpConfig {
    /// An HTTP sink with every default: CloudEvents batches, not compressed, no authorization.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            format: HttpFormat::default(),
            compression: Compression::default(),
            auth: HttpAuth::default(),
            headers: Vec::new(),
        }
    }
}

/// Shape of an HTTP body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HttpFormat {
    /// `application/cloudevents-batch+json`: one JSON array of structured CloudEvents.
    #[default]
    CloudEventsBatch,
    /// `application/x-ndjson`: one structured CloudEvent a line.
    NdJson,
}

/// Content coding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    #[default]
    None,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

/// Where a secret is. Files and environment variables are read when the sink starts, and again
/// after the upstream refused it, so that a rotated secret is picked up without a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// In the configuration itself.
    Inline(Secret),
    /// First line of a file.
    File(PathBuf),
    /// Environment variable.
    Env(String),
}

/// `Authorization` of an HTTP sink.
#[derive(Clone, Debug, Default)]
pub enum HttpAuth {
    /// None.
    #[default]
    None,
    /// RFC 6750.
    Bearer(SecretSource),
    /// RFC 7617.
    Basic {
        /// User name.
        username: String,
        /// Password.
        password: SecretSource,
    },
}

/// Settings of a Kafka sink.
#[cfg(feature = "kafka")]
#[derive(Clone, Debug)]
pub struct KafkaConfig {
    /// Bootstrap brokers, `host:port[,host:port]`.
    pub brokers: String,
    /// Topic; it must exist, or the broker must create it on first use.
    pub topic: String,
    /// What a retry may do.
    pub delivery: KafkaDelivery,
    /// Compression of record batches: `none`, `gzip`, `snappy`, `lz4` or `zstd`.
    pub compression: KafkaCompression,
}

#[cfg(feature = "kafka")]
impl KafkaConfig {
    /// A Kafka sink with every default: idempotent, LZ4.
    pub fn new(brokers: impl Into<String>, topic: impl Into<String>) -> Self {
        Self {
            brokers: brokers.into(),
            topic: topic.into(),
            delivery: KafkaDelivery::default(),
            compression: KafkaCompression::default(),
        }
    }
}

/// What a retry into Kafka may do.
#[cfg(feature = "kafka")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KafkaDelivery {
    /// Idempotent producer: no duplicate and no reorder while the producer lives.
    #[default]
    Idempotent,
    /// Plain producer with acks from all replicas: a lost answer gives a duplicate.
    AtLeastOnce,
}

/// Compression of record batches.
#[cfg(feature = "kafka")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KafkaCompression {
    /// None.
    None,
    /// gzip.
    Gzip,
    /// Snappy.
    Snappy,
    /// LZ4.
    #[default]
    Lz4,
    /// Zstandard.
    Zstd,
}

/// Settings of a file sink.
#[derive(Clone, Debug)]
pub struct FileConfig {
    /// File that is written; rotated ones get `.1`, `.2` ... behind the name.
    pub path: PathBuf,
    /// Size in bytes at which it is rotated.
    pub rotate_bytes: u64,
    /// Rotated files kept; the oldest goes first. 0: none.
    pub rotate_keep: u32,
}

impl FileConfig {
    /// Default of [`FileConfig::rotate_bytes`].
    pub const ROTATE_BYTES: u64 = 64 * 1024 * 1024;
    /// Range of [`FileConfig::rotate_bytes`].
    pub const ROTATE_BYTES_RANGE: RangeInclusive<u64> = 1024..=1024 * 1024 * 1024 * 1024;
    /// Default of [`FileConfig::rotate_keep`].
    pub const ROTATE_KEEP: u32 = 5;
    /// Range of [`FileConfig::rotate_keep`].
    pub const ROTATE_KEEP_RANGE: RangeInclusive<u32> = 0..=1_000;

    /// A file sink with every default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), rotate_bytes: Self::ROTATE_BYTES, rotate_keep: Self::ROTATE_KEEP }
    }
}
