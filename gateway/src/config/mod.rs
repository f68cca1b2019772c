//! The configuration, validated: every value here is in its range.
//!
//! Owns: [`Config`], its defaults and bounds, and how it is read from TOML. It is validated once,
//! here; nothing behind it checks again. `reader` does the reading, `units` sizes and times,
//! `auth`, `listeners` and `sinks` their tables.
//! Invariant: `configs/gateway.toml` shows every key with the default that this code has; a test
//! holds the two together.

mod auth;
#[cfg(feature = "kafka")]
mod kafka;
mod listeners;
mod reader;
mod sinks;
pub(crate) mod units;

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bridge::config::SinkConfig;
use storage::{AtQuota, Compression, JournalMode, Lane, SinkRetention, StoreOptions};
use tracing_subscriber::filter::{LevelFilter, Targets};

use crate::ingest::device_key::{self, DeviceFrom};
use crate::ingest::event_id::EventIdFrom;
use crate::mqtt::pace::Rate;
pub use auth::{AclConfig, AuthConfig, JwtConfig, JwtKeys};
pub use listeners::{Bind, ClientIdentity, ListenerConfig, TlsConfig, Transport};
pub use reader::{Env, Problem};
use reader::{Reader, Section};

/// The whole configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// `[gateway]`.
    pub gateway: GatewayConfig,
    /// `[[listener]]`, at least one.
    pub listeners: Vec<ListenerConfig>,
    /// `[auth]`.
    pub auth: AuthConfig,
    /// `[[acl]]`; none: who is let in may do everything.
    pub acl: Vec<AclConfig>,
    /// `[[route]]`, in the order in which they are tried. None: every topic is accepted and the
    /// device key is the client id.
    pub routes: Vec<RouteConfig>,
    /// `[ingest]`.
    pub ingest: IngestConfig,
    /// `[dedup]`.
    pub dedup: DedupConfig,
    /// `[time]`.
    pub time: TimeConfig,
    /// `[sessions]`.
    pub sessions: SessionsConfig,
    /// `[retained]`.
    pub retained: RetainedConfig,
    /// `[storage]`.
    pub storage: StorageConfig,
    /// `[[sink]]`.
    pub sinks: Vec<SinkConfig>,
    /// `[admin]`.
    pub admin: AdminConfig,
    /// `[log]`.
    pub log: LogConfig,
}

/// `[gateway]`.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Name of this gateway, in the identity of every event.
    pub id: String,
    /// Data folder.
    pub data_dir: PathBuf,
    /// How long a shutdown may take to flush and to let requests end.
    pub shutdown_grace: Duration,
}

/// `[[route]]`.
#[derive(Clone, Debug)]
pub struct RouteConfig {
    /// MQTT topic filter whose one `{device}` level, if any, is the device key.
    pub filter: String,
    /// Media type of payloads that name none themselves.
    pub content_type: Option<String>,
    /// Where the device key stands.
    pub device: DeviceFrom,
    /// Where an event's own id stands, by which a resend is recognised; none: it is stored again.
    pub event_id: Option<EventIdFrom>,
    /// CloudEvents type of its events; none: the sink's.
    pub event_type: Option<String>,
    /// Priority class of its events.
    pub lane: Lane,
    /// What may come over it.
    pub limits: RouteLimits,
}

/// What may come over a route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteLimits {
    /// How fast each client may publish over it, beside what its listener allows.
    pub client_rate: Rate,
    /// Bytes of one payload, at most. 0: as many as the listener's packets hold.
    pub payload_bytes_max: usize,
}

/// `[ingest]`.
#[derive(Clone, Debug)]
pub struct IngestConfig {
    /// Number of partitions, 1 to 1024; fixed when the store is created.
    pub partitions: u16,
    /// Events a partition's ring holds, at most.
    pub ring_events_max: usize,
    /// Event bytes in all rings together, at most.
    pub ring_bytes_max: usize,
    /// Longest wait for more events before a commit. Zero: none, commits follow the disk.
    pub commit_linger_max: Duration,
    /// Events in one commit, at most.
    pub commit_events_max: usize,
    /// Event bytes in one commit, at most.
    pub commit_bytes_max: usize,
    /// Decoded publishes held for connections whose ring is full, in bytes over all connections.
    pub held_bytes_max: usize,
}

/// `[dedup]`: how far back resends are recognised.
#[derive(Clone, Debug)]
pub struct DedupConfig {
    /// Devices whose last ids are kept, at most.
    pub devices_max: usize,
    /// Ids kept for one device, at most.
    pub window_events_max: usize,
    /// For how long an id counts. Zero: as long as it is kept.
    pub window_max: Duration,
}

/// `[time]`.
#[derive(Clone, Debug)]
pub struct TimeConfig {
    /// While this file is there the machine's clock counts as set; none: always.
    pub synchronised_file: Option<PathBuf>,
}

/// `[sessions]`: what is kept for clients beyond their connections.
#[derive(Clone, Debug)]
pub struct SessionsConfig {
    /// Sessions that are kept, at most.
    pub sessions_max: usize,
    /// Longest time that a session is kept without a connection.
    pub expiry_max: Duration,
    /// Messages that wait for one client, at most.
    pub queue_messages_max: usize,
    /// Bytes of messages that wait for one client, at most.
    pub queue_bytes_max: usize,
    /// Bytes of messages that wait for all clients, at most. They are held in memory, too.
    pub queued_bytes_max: usize,
    /// Whether the oldest message makes room in a full queue; else the new one is dropped.
    pub queue_drops_oldest: bool,
    /// Longest keep-alive, which MQTT 5 clients are told; zero: theirs holds.
    pub keep_alive_max: Duration,
}

/// `[retained]`.
#[derive(Clone, Debug)]
pub struct RetainedConfig {
    /// Topics with a retained message, at most.
    pub messages_max: usize,
    /// Bytes of retained messages, at most.
    pub bytes_max: usize,
}

/// `[storage]`.
#[derive(Clone, Debug)]
pub struct StorageConfig {
    /// Bytes the log may take on disk.
    pub quota_bytes: u64,
    /// Bytes of the file system that are left free.
    pub free_bytes_min: u64,
    /// A disk that fails for so long ends the process.
    pub failing_max: Duration,
    /// What happens at the quota.
    pub at_quota: AtQuota,
    /// Size in bytes at which a log file is sealed.
    pub file_bytes_max: u64,
    /// redb's cache in bytes.
    pub cache_bytes: usize,
    /// Whether commits go through the pipelined journal.
    pub journal: JournalMode,
    /// Bytes of the journal's file.
    pub journal_bytes: u64,
    /// How sealed files that have to stay are written.
    pub compression: Compression,
    /// Commits that may be queued behind those that are being synced, while the next one is made.
    pub commits_ahead_max: usize,
    /// Delivered data kept for replay, in bytes.
    pub retain_bytes: u64,
    /// Delivered data kept for replay, by age.
    pub retain_age: Duration,
    /// Bytes of dead letters kept for one sink.
    pub dead_letter_bytes_max: u64,
}

/// `[admin]`.
#[derive(Clone, Debug)]
pub struct AdminConfig {
    /// Address and port; port 0 takes one from the system.
    pub bind: SocketAddr,
}

/// `[log]`.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Least severity that is written, or a filter per module as `tracing` knows them.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why there is no configuration.
#[derive(Debug)]
pub enum ConfigError {
    /// The file cannot be read.
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It can be read, and these are its mistakes, in the order of the lines.
    Invalid(Vec<Problem>),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { path, source } => write!(
                f,
                "cannot read the configuration {}: {source}; name another file with --config",
                path.display()
            ),
            Self::Invalid(problems) => {
                for (i, problem) in problems.iter().enumerate() {
                    let end = if i + 1 < problems.len() { "\n" } else { "" };
                    write!(f, "{problem}{end}")?;
                }
                Ok(())
            }
        }
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads a file, with `${NAME}` in its texts taken from the process environment.
    ///
    /// # Errors
    /// See [`ConfigError`]: every problem at once.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        Self::parse(&path.display().to_string(), &text, &|name| std::env::var(name).ok())
    }

    /// How the store is opened, by the gateway and by the tools that look at it.
    pub fn store_options(&self) -> StoreOptions {
        let storage = &self.storage;
        StoreOptions {
            dir: self.gateway.data_dir.clone(),
            partitions: self.ingest.partitions,
            sinks: self.sinks.iter().map(retention).collect(),
            file_bytes_max: storage.file_bytes_max,
            cache_bytes: storage.cache_bytes,
            quota_bytes: storage.quota_bytes,
            free_bytes_min: storage.free_bytes_min,
            at_quota: storage.at_quota,
            retain_bytes: storage.retain_bytes,
            retain_age_us: u64::try_from(storage.retain_age.as_micros()).unwrap_or(u64::MAX),
            dead_letter_bytes_max: storage.dead_letter_bytes_max,
            journal: storage.journal,
            journal_bytes: storage.journal_bytes,
            commits_ahead_max: storage.commits_ahead_max,
            compression: storage.compression,
        }
    }

    /// Reads a text. `file` names it in messages, `env` looks up `${NAME}`.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with every problem.
    pub fn parse(file: &str, text: &str, env: Env<'_>) -> Result<Self, ConfigError> {
        Self::parse_asking(file, text, env).0
    }

    /// As [`Config::parse`], with every key that was asked for.
    fn parse_asking(
        file: &str,
        text: &str,
        env: Env<'_>,
    ) -> (Result<Self, ConfigError>, BTreeSet<String>) {
        let reader = Reader::new(file, text, env);
        let table = reader.parse();
        let config = read(&reader.root(&table));
        drop(table);
        let asked = reader.asked();
        (reader.finish().map(|()| config).map_err(ConfigError::Invalid), asked)
    }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_hours(24);

fn read(root: &Section<'_, '_>) -> Config {
    let routes = read_routes(root);
    let sinks = sinks::read(root, &routes);
    let auth = auth::read(&root.section("auth"));
    Config {
        gateway: read_gateway(&root.section("gateway")),
        listeners: listeners::read(root, auth.knows_users()),
        auth,
        acl: auth::read_acl(root),
        routes,
        ingest: read_ingest(&root.section("ingest")),
        dedup: read_dedup(&root.section("dedup")),
        time: read_time(&root.section("time")),
        sessions: read_sessions(&root.section("sessions")),
        retained: read_retained(&root.section("retained")),
        storage: read_storage(&root.section("storage"), !sinks.is_empty()),
        sinks,
        admin: read_admin(&root.section("admin")),
        log: read_log(&root.section("log")),
    }
}

fn read_gateway(section: &Section<'_, '_>) -> GatewayConfig {
    let id = section.string("id").unwrap_or_else(host_name);
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if id.is_empty() || id.len() > 64 || !id.chars().all(fits) {
        section
            .problem("id", format!("must be 1 to 64 letters, digits, '-', '_' or '.', not {id:?}"));
    }
    let data_dir = section.string("data_dir").unwrap_or("/var/lib/edge-gateway".to_owned());
    if data_dir.is_empty() {
        section.problem("data_dir", "must name a folder");
    }
    GatewayConfig {
        id,
        data_dir: data_dir.into(),
        shutdown_grace: section.time("shutdown_grace", SECOND..=600 * SECOND, 10 * SECOND),
    }
}

/// The machine's name: what people would call their gateway when they do not name it.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn read_address(section: &Section<'_, '_>, key: &'static str, default: SocketAddr) -> SocketAddr {
    let Some(text) = section.string(key) else {
        return default;
    };
    text.parse().unwrap_or_else(|_| {
        section.problem(
            key,
            format!("must be an address and a port such as \"{default}\", not {text:?}"),
        );
        default
    })
}

fn read_routes(root: &Section<'_, '_>) -> Vec<RouteConfig> {
    let mut routes = Vec::new();
    for section in root.sections("route") {
        let filter = section.required("filter", "a topic filter such as \"devices/{device}/#\"");
        let parsed = device_key::RouteFilter::parse(&filter);
        if let (false, Err(wrong)) = (filter.is_empty(), &parsed) {
            section.problem("filter", wrong.to_string());
        }
        let event_type = section.string("event_type");
        if event_type.as_deref() == Some("") {
            section.problem("event_type", "must not be empty: CloudEvents asks for a type");
        }
        let in_topic = parsed.is_ok_and(|filter| filter.has_device());
        let lanes = Lane::ALL.map(|lane| (lane.name(), lane));
        routes.push(RouteConfig {
            filter,
            content_type: section.string("content_type"),
            device: read_device(&section, in_topic),
            event_id: read_event_id(&section),
            event_type,
            lane: section.choice("lane", &lanes, Lane::default()),
            limits: RouteLimits {
                client_rate: listeners::read_rate(&section),
                payload_bytes_max: section.size("payload_bytes_max", 0..=64 * MIB, 0) as usize,
            },
        });
    }
    routes
}

/// `in_topic`: the filter has `{device}`.
fn read_device(section: &Section<'_, '_>, in_topic: bool) -> DeviceFrom {
    let Some(text) = section.string("device") else {
        return if in_topic { DeviceFrom::Topic } else { DeviceFrom::ClientId };
    };
    match DeviceFrom::parse(&text) {
        Ok(device) => {
            if in_topic != (device == DeviceFrom::Topic) {
                let why = "\"topic\" goes with {device} in the filter, and only with that: write \
                           '+' there if the device key stands elsewhere";
                section.problem("device", why);
            }
            device
        }
        Err(wrong) => {
            section.problem("device", wrong);
            DeviceFrom::default()
        }
    }
}

fn read_event_id(section: &Section<'_, '_>) -> Option<EventIdFrom> {
    let text = section.string("event_id")?;
    EventIdFrom::parse(&text).map_err(|wrong| section.problem("event_id", wrong)).ok()
}

fn read_dedup(section: &Section<'_, '_>) -> DedupConfig {
    DedupConfig {
        devices_max: section.integer("devices_max", 1..=100_000, 1_024) as usize,
        window_events_max: section.integer("window_events_max", 1..=4_096, 128) as usize,
        window_max: section.time("window_max", Duration::ZERO..=365 * DAY, DAY),
    }
}

fn read_time(section: &Section<'_, '_>) -> TimeConfig {
    let file = section
        .string("synchronised_file")
        .unwrap_or("/run/systemd/timesync/synchronized".to_owned());
    if !file.is_empty() && !Path::new(&file).is_absolute() {
        section.problem("synchronised_file", "must be an absolute path, or \"\" for no file");
    }
    TimeConfig { synchronised_file: (!file.is_empty()).then(|| file.into()) }
}

fn read_ingest(section: &Section<'_, '_>) -> IngestConfig {
    IngestConfig {
        partitions: section.integer("partitions", 1..=1_024, 16) as u16,
        ring_events_max: section.integer("ring_events_max", 16..=1_048_576, 1_024) as usize,
        ring_bytes_max: section.size("ring_bytes_max", MIB..=GIB, 16 * MIB) as usize,
        held_bytes_max: section.size("held_bytes_max", MIB..=GIB, 16 * MIB) as usize,
        commit_linger_max: section.time(
            "commit_linger_ms_max",
            Duration::ZERO..=10 * SECOND,
            Duration::ZERO,
        ),
        commit_events_max: section.integer("commit_events_max", 1..=65_536, 4_096) as usize,
        commit_bytes_max: section.size("commit_bytes_max", 4 * KIB..=64 * MIB, 4 * MIB) as usize,
    }
}

fn read_sessions(section: &Section<'_, '_>) -> SessionsConfig {
    let policies = [("drop_oldest", true), ("drop_newest", false)];
    SessionsConfig {
        sessions_max: section.integer("sessions_max", 0..=1_000_000, 10_000) as usize,
        expiry_max: section.time("expiry_max", SECOND..=36_500 * DAY, 7 * DAY),
        queue_messages_max: section.integer("queue_messages_max", 1..=65_535, 1_000) as usize,
        queue_bytes_max: section.size("queue_bytes_max", KIB..=GIB, 256 * KIB) as usize,
        queued_bytes_max: section.size("queued_bytes_max", KIB..=GIB, 16 * MIB) as usize,
        queue_drops_oldest: section.choice("queue_full", &policies, true),
        keep_alive_max: section.time(
            "keep_alive_max",
            Duration::ZERO..=65_535 * SECOND,
            Duration::ZERO,
        ),
    }
}

fn read_retained(section: &Section<'_, '_>) -> RetainedConfig {
    RetainedConfig {
        messages_max: section.integer("messages_max", 0..=1_000_000, 10_000) as usize,
        bytes_max: section.size("bytes_max", 0..=GIB, 16 * MIB) as usize,
    }
}

fn retention(sink: &SinkConfig) -> SinkRetention {
    SinkRetention { name: sink.name.clone(), lag_bytes_max: sink.lag_bytes_max }
}

fn read_storage(section: &Section<'_, '_>, has_sinks: bool) -> StorageConfig {
    let policies = [
        ("hold", AtQuota::Hold),
        ("refuse", AtQuota::Refuse),
        ("drop_oldest", AtQuota::DropOldest),
    ];
    let journals =
        [("auto", JournalMode::Auto), ("on", JournalMode::On), ("off", JournalMode::Off)];
    let compressions =
        [("none", Compression::None), ("lz4", Compression::Lz4), ("zstd", Compression::Zstd)];
    // Without a sink nothing else would ever make room.
    let policy = if has_sinks { AtQuota::Hold } else { AtQuota::DropOldest };
    let at_quota = section.choice("at_quota", &policies, policy);
    let quota_bytes = section.size("quota_bytes", 16 * MIB..=64 * TIB, 8 * GIB);
    let file_max = quota_bytes / 4;
    let file_bytes_max =
        section.size("file_bytes_max", MIB..=4 * GIB, file_max.clamp(MIB, 128 * MIB));
    if file_bytes_max > file_max {
        section.problem(
            "file_bytes_max",
            format!(
                "must be at most a quarter of quota_bytes, {}: room is made a file at a time",
                units::size(file_max)
            ),
        );
    }
    StorageConfig {
        quota_bytes,
        free_bytes_min: section.size("free_bytes_min", 0..=64 * TIB, 64 * MIB),
        failing_max: section.time("failing_max", SECOND..=DAY, 60 * SECOND),
        at_quota,
        file_bytes_max,
        cache_bytes: section.size("cache_bytes", MIB..=GIB, 16 * MIB) as usize,
        retain_bytes: section.size("retain_bytes", 0..=64 * TIB, 0),
        journal: section.choice("journal", &journals, JournalMode::Auto),
        journal_bytes: section.size("journal_bytes", MIB..=GIB, 32 * MIB),
        commits_ahead_max: section.integer("commits_ahead_max", 1..=16, 2) as usize,
        compression: section.choice("compression", &compressions, Compression::None),
        retain_age: section.time("retain_age", Duration::ZERO..=3_650 * DAY, Duration::ZERO),
        dead_letter_bytes_max: section.size("dead_letter_bytes_max", MIB..=TIB, 64 * MIB),
    }
}

fn read_admin(section: &Section<'_, '_>) -> AdminConfig {
    AdminConfig { bind: read_address(section, "bind", SocketAddr::from(([127, 0, 0, 1], 9641))) }
}

fn read_log(section: &Section<'_, '_>) -> LogConfig {
    let level = section.string("level").unwrap_or("info".to_owned());
    if !is_log_filter(&level) {
        section.problem(
            "level",
            format!(
                "must be error, warn, info, debug or trace, or a filter per module such as \
                 \"info,gateway::mqtt=debug\", not {level:?}"
            ),
        );
    }
    LogConfig {
        level,
        format: section.choice(
            "format",
            &[("text", LogFormat::Text), ("json", LogFormat::Json)],
            LogFormat::Text,
        ),
    }
}

/// Levels and `module=level` pairs. A bare word that is no level names a module to `tracing`, which
/// would then write nothing of any other: it is a slip of the pen here.
fn is_log_filter(text: &str) -> bool {
    let is_level = |word: &str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
    text.split(',').all(|part| part.contains('=') || is_level(part.trim()))
        && text.parse::<Targets>().is_ok()
}

#[cfg(test)]
mod tests;
