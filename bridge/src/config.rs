//! Settings of a sink, already validated: the gateway reads them from TOML and names the place of
//! every mistake, so nothing here can be wrong when a forwarder starts.
//!
//! Owns: the settings, and beside each its default and its range, so that both have one home.

#[cfg(feature = "kafka")]
mod kafka;

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use storage::Lanes;

#[cfg(feature = "kafka")]
pub use self::kafka::{
    KafkaCompression, KafkaConfig, KafkaDelivery, KafkaHeaders, KafkaSasl, KafkaTls, KafkaTopic,
    OAuthToken, ScramHash,
};
use crate::filter::Filter;
use crate::shaper::Shaping;
use crate::template::Template;

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
    /// How long a request that is smaller than it may be waits for more events: fewer, larger requests
    /// for a metered or slow link. Zero: what is there goes, and what comes meanwhile goes together.
    pub linger_max: Duration,
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
    /// What becomes of a device's later events when one is refused for good.
    pub on_reject: OnReject,
}

/// What becomes of a device's later events when one is refused for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnReject {
    /// They go on.
    #[default]
    GoOn,
    /// They are held back in the dead letters until the refused one is delivered after all, or
    /// dropped: for upstreams that must not see a device's later events without that one.
    ParkDevice,
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
    /// Range of [`SinkConfig::linger_max`].
    pub const LINGER_RANGE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_mins(1);
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
            linger_max: Duration::ZERO,
            request_timeout: Self::REQUEST_TIMEOUT,
            retry_backoff_min: Self::RETRY_BACKOFF_MIN,
            retry_backoff_max: Self::RETRY_BACKOFF_MAX,
            lag_bytes_max: 0,
            filter: Filter::default(),
            lanes: Lanes::NONE,
            backlog: Backlog::default(),
            backlog_share_percent: Self::BACKLOG_SHARE_PERCENT,
            shaping: Shaping::default(),
            on_reject: OnReject::default(),
        }
    }
}

/// Where a sink sends.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one per sink, made at the start")]
pub enum Target {
    /// HTTP or HTTPS, by POST.
    Http(HttpConfig),
    /// Kafka.
    #[cfg(feature = "kafka")]
    Kafka(KafkaConfig),
    /// An MQTT broker.
    Mqtt(MqttConfig),
    /// NDJSON in a rotated local file.
    File(FileConfig),
}

impl Target {
    /// `http`, `kafka`, `mqtt` or `file`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Http(_) => "http",
            #[cfg(feature = "kafka")]
            Self::Kafka(_) => "kafka",
            Self::Mqtt(_) => "mqtt",
            Self::File(_) => "file",
        }
    }
}

/// Settings of an HTTP sink.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// `http://` or `https://` address that takes the POST.
    pub url: String,
    /// Shape of a request.
    pub format: HttpFormat,
    /// Content coding of the body.
    pub compression: Compression,
    /// Requests in flight at once, each with whole partitions, so that a device's events stay in
    /// order.
    pub in_flight_max: usize,
    /// HTTP version.
    pub version: HttpVersion,
    /// `Authorization` header.
    pub auth: HttpAuth,
    /// Key with which every body is signed (HMAC-SHA256).
    pub signing_key: Option<SecretSource>,
    /// Certificates other than the system's.
    pub tls: TlsConfig,
    /// Proxy; `None`: what the environment says (`HTTPS_PROXY` ...), and none for loopback.
    pub proxy: Option<HttpProxy>,
    /// Further headers, sent as they are.
    pub headers: Vec<(String, String)>,
}

impl HttpConfig {
    /// Range of [`HttpConfig::in_flight_max`].
    pub const IN_FLIGHT_RANGE: RangeInclusive<usize> = 1..=64;

    /// An HTTP sink with every default: CloudEvents batches, not compressed, no authorization.
    pub fn new(url: impl Into<String>) -> Self {
        let format = HttpFormat::default();
        Self {
            url: url.into(),
            format,
            compression: Compression::default(),
            in_flight_max: format.in_flight_default(),
            version: HttpVersion::default(),
            auth: HttpAuth::default(),
            signing_key: None,
            tls: TlsConfig::default(),
            proxy: None,
            headers: Vec::new(),
        }
    }
}

/// Shape of an HTTP request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HttpFormat {
    /// `application/cloudevents-batch+json`: one JSON array of structured CloudEvents.
    #[default]
    CloudEventsBatch,
    /// `application/x-ndjson`: one structured CloudEvent a line.
    NdJson,
    /// `application/json`: one JSON array of payloads, without anything around them. A payload that
    /// is no JSON is a base64 string.
    JsonArray,
    /// `application/cloudevents+json`: one structured CloudEvent a request.
    CloudEvent,
    /// One payload a request, with the CloudEvents attributes as `ce-` headers.
    CloudEventBinary,
    /// One payload a request, with the event's id in the header `Edge-Gateway-Event`.
    Raw,
}

impl HttpFormat {
    /// Whether a request carries one event only.
    pub fn is_single(self) -> bool {
        match self {
            Self::CloudEventsBatch | Self::NdJson | Self::JsonArray => false,
            Self::CloudEvent | Self::CloudEventBinary | Self::Raw => true,
        }
    }

    /// Default of [`HttpConfig::in_flight_max`]: 1, so that requests grow with the load and radio
    /// and CPU are spared; 8 where each event is a request, and the round trip would set the pace.
    pub fn in_flight_default(self) -> usize {
        if self.is_single() { 8 } else { 1 }
    }
}

/// HTTP version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HttpVersion {
    /// What TLS negotiates (HTTP/2 where the upstream has it); 1.1 without TLS.
    #[default]
    Auto,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, also without TLS (prior knowledge).
    Http2,
}

/// A proxy for HTTP requests.
#[derive(Clone, Debug)]
pub struct HttpProxy {
    /// `http://` or `https://` address.
    pub url: String,
    /// User name and password.
    pub credentials: Option<(String, SecretSource)>,
}

/// Certificates of a TLS connection, PEM files. They are read when a connection's client is built,
/// and again after the upstream could not be reached or refused us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// Certificate authorities to trust, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// Certificate chain and private key that this gateway shows.
    pub identity: Option<TlsIdentity>,
}

/// What a gateway shows who it is with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsIdentity {
    /// Certificate chain, PEM.
    pub cert_file: PathBuf,
    /// Private key of it, PEM.
    pub key_file: PathBuf,
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
    /// RFC 6749, section 4.4: client credentials.
    OAuth2(OAuth2Config),
}

/// Where an access token comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OAuth2Config {
    /// `http://` or `https://` address of the token endpoint.
    pub token_url: String,
    /// Client id.
    pub client_id: String,
    /// Client secret, sent as RFC 6749 section 2.3.1 asks (HTTP Basic).
    pub client_secret: SecretSource,
    /// Scopes, with spaces between.
    pub scope: Option<String>,
    /// Audience, for token endpoints that want one.
    pub audience: Option<String>,
}

/// Settings of an MQTT sink.
#[derive(Clone, Debug)]
pub struct MqttConfig {
    /// Host name or address of the broker.
    pub host: String,
    /// Port of it.
    pub port: u16,
    /// TLS and its certificates; `None`: plain TCP.
    pub tls: Option<TlsConfig>,
    /// Topic that an event is published to.
    pub topic: Template,
    /// What goes as MQTT 5 user properties.
    pub user_properties: UserProperties,
    /// Client id; `None`: the gateway's id and the sink's name, with a hyphen between.
    pub client_id: Option<String>,
    /// User name, and password if there is one.
    pub credentials: Option<(String, Option<SecretSource>)>,
    /// Publishes on the wire that wait for their ack; a broker's Receive Maximum makes it less.
    pub in_flight_max: u16,
}

impl MqttConfig {
    /// Default of [`MqttConfig::topic`].
    pub const TOPIC: &str = "{topic}";
    /// Default of [`MqttConfig::in_flight_max`].
    pub const IN_FLIGHT_MAX: u16 = 100;
    /// Range of [`MqttConfig::in_flight_max`].
    pub const IN_FLIGHT_RANGE: RangeInclusive<u16> = 1..=1_000;
    /// Port without TLS, where none is given.
    pub const PORT: u16 = 1883;
    /// Port with TLS, where none is given.
    pub const TLS_PORT: u16 = 8883;

    /// An MQTT sink with every default: plain TCP, the topics as they are, nobody's credentials.
    ///
    /// # Panics
    /// Never: the default topic is one.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self {
            host: host.into(),
            port,
            tls: None,
            topic: Template::parse(Self::TOPIC).expect("a template"),
            user_properties: UserProperties::default(),
            client_id: None,
            credentials: None,
            in_flight_max: Self::IN_FLIGHT_MAX,
        }
    }
}

/// What an MQTT sink says of an event beside its payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UserProperties {
    /// CloudEvents attributes, and the content type (CloudEvents MQTT binding 1.0, binary mode).
    #[default]
    CloudEvents,
    /// The id alone.
    Id,
    /// Nothing.
    None,
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
