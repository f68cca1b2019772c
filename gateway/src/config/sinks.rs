//! `[[sink]]`: reads every kind of sink.

use std::ops::RangeInclusive;

use bridge::config::{
    Backlog, Compression, FileConfig, HttpAuth, HttpConfig, HttpFormat, Secret, SecretSource,
    SinkConfig, Target,
};

use bridge::filter::{Filter, TopicFilter};
use bridge::shaper::{AtBudget, DayWindow, Shaping};
use storage::{Lane, Lanes};

use super::RouteConfig;
use super::reader::Section;

/// Range of `lag_bytes_max`, where there is a limit.
const LAG_BYTES_MIN: u64 = 1 << 20;
const LAG_BYTES_MAX: u64 = 64 << 40;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kafka,
    Http,
    File,
}

pub(super) fn read(root: &Section<'_, '_>, routes: &[RouteConfig]) -> Vec<SinkConfig> {
    let given = |lane| routes.iter().any(|route| route.lane == lane);
    let own = [Lane::Alarm, Lane::Backfill].into_iter().filter(|&lane| given(lane));
    let lanes = own.fold(Lanes::NONE, Lanes::with);
    let mut sinks: Vec<SinkConfig> = Vec::new();
    for section in root.sections("sink") {
        let Some(mut sink) = read_sink(&section) else {
            continue;
        };
        sink.lanes = lanes;
        if sink.shaping.at_budget == AtBudget::AlarmsOnly && !lanes.contains(Lane::Alarm) {
            section
                .problem("at_budget", "no [[route]] has lane = \"alarm\": nothing would be sent");
        }
        if sinks.iter().any(|other| other.name == sink.name) {
            section.problem("name", format!("{:?} is the name of another sink", sink.name));
        }
        sinks.push(sink);
    }
    sinks
}

fn read_sink(section: &Section<'_, '_>) -> Option<SinkConfig> {
    let name = section.required("name", "a name for this sink, such as \"cloud\"");
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.len() > 64 || !name.chars().all(fits) {
        section.problem(
            "name",
            format!("must be 1 to 64 letters, digits, '-', '_' or '.', not {name:?}"),
        );
    }
    let kinds =
        [("kafka", Some(Kind::Kafka)), ("http", Some(Kind::Http)), ("file", Some(Kind::File))];
    if !section.has("type") {
        section.missing("type", "\"kafka\", \"http\" or \"file\"");
    }
    let kind = section.choice("type", &kinds, None);
    let target = match kind {
        Some(Kind::Kafka) => read_kafka(section),
        Some(Kind::Http) => Some(Target::Http(read_http(section))),
        Some(Kind::File) => Some(Target::File(read_file(section))),
        None => {
            // What its other keys mean depends on the type: say nothing of them.
            section.ignore_rest();
            None
        }
    };
    let mut sink = SinkConfig::new(name, target?);
    sink.event_type = section.string("event_type").unwrap_or(sink.event_type);
    if sink.event_type.is_empty() {
        section.problem("event_type", "must not be empty: CloudEvents asks for a type");
    }
    let events = wide(SinkConfig::REQUEST_EVENTS_RANGE);
    sink.request_events_max =
        section.integer("request_events_max", events, sink.request_events_max as u64) as usize;
    let bytes = wide(SinkConfig::REQUEST_BYTES_RANGE);
    sink.request_bytes_max =
        section.size("request_bytes_max", bytes, sink.request_bytes_max as u64) as usize;
    let range = SinkConfig::REQUEST_TIMEOUT_RANGE;
    sink.request_timeout = section.time("request_timeout", range, sink.request_timeout);
    let range = SinkConfig::RETRY_BACKOFF_RANGE;
    sink.retry_backoff_min =
        section.time("retry_backoff_min", range.clone(), sink.retry_backoff_min);
    sink.retry_backoff_max = section.time("retry_backoff_max", range, sink.retry_backoff_max);
    if sink.retry_backoff_max < sink.retry_backoff_min {
        section.problem("retry_backoff_max", "must not be below retry_backoff_min");
    }
    sink.lag_bytes_max = section.size("lag_bytes_max", 0..=LAG_BYTES_MAX, 0);
    if (1..LAG_BYTES_MIN).contains(&sink.lag_bytes_max) {
        section.problem("lag_bytes_max", "must be 0 for no limit, or at least 1MiB");
    }
    sink.filter = read_filter(section);
    let share = SinkConfig::BACKLOG_SHARE_RANGE;
    let share = u64::from(*share.start())..=u64::from(*share.end());
    let default = SinkConfig::BACKLOG_SHARE_PERCENT.into();
    sink.backlog_share_percent = section.integer("backlog_share_percent", share, default) as u8;
    let after = section.time(
        "live_first_after",
        SinkConfig::LIVE_FIRST_AFTER_RANGE,
        SinkConfig::LIVE_FIRST_AFTER,
    );
    let backlogs = [("in_order", Backlog::InOrder), ("live_first", Backlog::LiveFirst { after })];
    sink.backlog = section.choice("backlog", &backlogs, Backlog::default());
    sink.shaping = read_shaping(section);
    Some(sink)
}

/// When the sink may send, and how much.
fn read_shaping(section: &Section<'_, '_>) -> Shaping {
    let windows = section.strings("windows");
    let windows = windows.iter().filter_map(|text| match DayWindow::parse(text) {
        Ok(window) => Some(window),
        Err(wrong) => {
            section.problem("windows", format!("{text:?} {wrong}"));
            None
        }
    });
    let policies = [("hold", AtBudget::Hold), ("alarms_only", AtBudget::AlarmsOnly)];
    Shaping {
        rate_bytes_per_second: section.size("rate_bytes_per_second", 0..=LAG_BYTES_MAX, 0),
        windows: windows.collect(),
        budget_bytes_month: section.size("budget_bytes_month", 0..=LAG_BYTES_MAX, 0),
        at_budget: section.choice("at_budget", &policies, AtBudget::default()),
    }
}

/// What the sink is to have.
fn read_filter(section: &Section<'_, '_>) -> Filter {
    let mut filter = Filter::default();
    for text in section.strings("topics") {
        match TopicFilter::parse(&text) {
            Ok(topic) => filter.topics.push(topic),
            Err(wrong) => section.problem("topics", format!("{text:?}: {wrong}")),
        }
    }
    filter.event_types = section.strings("event_types");
    let lanes = section.strings("lanes");
    if !lanes.is_empty() {
        filter.lanes = Lanes::NONE;
    }
    for text in lanes {
        match Lane::ALL.into_iter().find(|lane| lane.name() == text) {
            Some(lane) => filter.lanes = filter.lanes.with(lane),
            None => section.problem(
                "lanes",
                format!("must name \"alarm\", \"live\" or \"backfill\", not {text:?}"),
            ),
        }
    }
    filter
}

fn wide(range: RangeInclusive<usize>) -> RangeInclusive<u64> {
    *range.start() as u64..=*range.end() as u64
}

fn read_http(section: &Section<'_, '_>) -> HttpConfig {
    let url = section.required("url", "an address such as \"https://bus.example.com/events\"");
    if !url.is_empty() {
        match reqwest::Url::parse(&url) {
            Ok(parsed) if !["http", "https"].contains(&parsed.scheme()) || !parsed.has_host() => {
                section.problem("url", format!("must begin with http:// or https://, not {url:?}"));
            }
            Ok(parsed) if !parsed.username().is_empty() || parsed.password().is_some() => {
                section.problem("url", "must not hold credentials; use username and password_file");
            }
            Ok(_) => {}
            Err(wrong) => section.problem("url", format!("is no address: {wrong}")),
        }
    }
    let formats =
        [("cloudevents_batch", HttpFormat::CloudEventsBatch), ("ndjson", HttpFormat::NdJson)];
    let codings =
        [("none", Compression::None), ("gzip", Compression::Gzip), ("zstd", Compression::Zstd)];
    HttpConfig {
        url,
        format: section.choice("format", &formats, HttpFormat::default()),
        compression: section.choice("compression", &codings, Compression::default()),
        auth: read_auth(section),
        headers: read_headers(&section.section("headers")),
    }
}

fn read_headers(section: &Section<'_, '_>) -> Vec<(String, String)> {
    let headers = section.free_strings();
    for (name, value) in &headers {
        if reqwest::header::HeaderName::from_bytes(name.as_bytes()).is_err() {
            section.problem(name, "is no name of an HTTP header");
        } else if reqwest::header::HeaderValue::from_str(value).is_err() {
            section.problem(name, "is no value of an HTTP header");
        }
    }
    headers
}

fn read_auth(section: &Section<'_, '_>) -> HttpAuth {
    let bearer = read_secret(section, ["bearer_token", "bearer_token_file", "bearer_token_env"]);
    let password = read_secret(section, ["password", "password_file", "password_env"]);
    let username = section.string("username");
    match (bearer, username, password) {
        (Some(_), Some(_), _) => {
            section.problem("username", "cannot stand beside a bearer token; keep one of them");
            HttpAuth::None
        }
        (Some(token), None, None) => HttpAuth::Bearer(token),
        (None, Some(username), Some(password)) => HttpAuth::Basic { username, password },
        (None, Some(_), None) => {
            section.missing("password_file", "the file that holds the password of username");
            HttpAuth::None
        }
        (_, None, Some(_)) => {
            section.missing("username", "the user whose password is given");
            HttpAuth::None
        }
        (None, None, None) => HttpAuth::None,
    }
}

/// A secret may stand in the configuration, in a file or in the environment: in one of them.
fn read_secret(section: &Section<'_, '_>, keys: [&'static str; 3]) -> Option<SecretSource> {
    let [inline, file, env] = keys;
    let sources = [
        section.string(inline).map(|text| SecretSource::Inline(Secret::new(text))),
        section.string(file).map(|path| SecretSource::File(path.into())),
        section.string(env).map(SecretSource::Env),
    ];
    let mut given = sources.into_iter().flatten();
    let first = given.next()?;
    if given.next().is_some() {
        section.problem(
            if section.has(file) { file } else { env },
            format!("only one of {inline}, {file} and {env} may be set"),
        );
    }
    Some(first)
}

#[cfg(feature = "kafka")]
#[expect(clippy::unnecessary_wraps, reason = "without the feature there is nothing to give")]
fn read_kafka(section: &Section<'_, '_>) -> Option<Target> {
    use bridge::config::{KafkaCompression, KafkaConfig, KafkaDelivery};
    let brokers = section.required("brokers", "the brokers, such as \"10.0.0.5:9092\"");
    let is_broker = |b: &str| {
        b.trim().rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p != 0)
        })
    };
    if !brokers.is_empty() && !brokers.split(',').all(is_broker) {
        section.problem("brokers", format!("must be host:port[,host:port ...], not {brokers:?}"));
    }
    let topic = section.required("topic", "the Kafka topic, such as \"events\"");
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if topic.len() > 249 || !topic.chars().all(fits) {
        section.problem(
            "topic",
            format!("must be 1 to 249 letters, digits, '-', '_' or '.', not {topic:?}"),
        );
    }
    let deliveries = [
        ("idempotent", Some(KafkaDelivery::Idempotent)),
        ("at_least_once", Some(KafkaDelivery::AtLeastOnce)),
        ("exactly_once", None),
    ];
    let delivery = section
        .choice("delivery", &deliveries, Some(KafkaDelivery::default()))
        .unwrap_or_else(|| {
            section.problem(
                "delivery",
                "\"exactly_once\" is not in this version; \"idempotent\" is the nearest: no \
                 duplicate while the gateway lives",
            );
            KafkaDelivery::default()
        });
    let compressions = [
        ("none", KafkaCompression::None),
        ("gzip", KafkaCompression::Gzip),
        ("snappy", KafkaCompression::Snappy),
        ("lz4", KafkaCompression::Lz4),
        ("zstd", KafkaCompression::Zstd),
    ];
    let compression = section.choice("compression", &compressions, KafkaCompression::default());
    Some(Target::Kafka(KafkaConfig { brokers, topic, delivery, compression }))
}

#[cfg(not(feature = "kafka"))]
fn read_kafka(section: &Section<'_, '_>) -> Option<Target> {
    section.ignore_rest();
    section.problem("type", "this edge-gateway was built without Kafka; use the one that has it");
    None
}

fn read_file(section: &Section<'_, '_>) -> FileConfig {
    let path = section.required("path", "the file to write, such as \"/srv/events.ndjson\"");
    let keep = FileConfig::ROTATE_KEEP_RANGE;
    let keep = u64::from(*keep.start())..=u64::from(*keep.end());
    FileConfig {
        rotate_bytes: section.size(
            "rotate_bytes",
            FileConfig::ROTATE_BYTES_RANGE,
            FileConfig::ROTATE_BYTES,
        ),
        rotate_keep: section.integer("rotate_keep", keep, FileConfig::ROTATE_KEEP.into()) as u32,
        ..FileConfig::new(path)
    }
}
