//! `[[sink]]`: reads every kind of sink.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use bridge::Template;
use bridge::config::{
    Backlog, Compression, FileConfig, HttpAuth, HttpConfig, HttpFormat, HttpProxy, HttpVersion,
    MqttConfig, OAuth2Config, OnReject, Secret, SecretSource, SinkConfig, Target, TlsConfig,
    TlsIdentity, UserProperties,
};

use bridge::filter::{Filter, TopicFilter};
use bridge::shaper::{AtBudget, DayWindow, Shaping};
use storage::{Lane, Lanes};

use super::RouteConfig;
use super::reader::Section;

/// Longest MQTT client id that is taken; brokers need not take more than 23 [MQTT-3.1.3-5].
const CLIENT_ID_BYTES_MAX: usize = 256;

/// Range of `lag_bytes_max`, where there is a limit.
const LAG_BYTES_MIN: u64 = 1 << 20;
const LAG_BYTES_MAX: u64 = 64 << 40;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kafka,
    Http,
    Mqtt,
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
    let kinds = [
        ("kafka", Some(Kind::Kafka)),
        ("http", Some(Kind::Http)),
        ("mqtt", Some(Kind::Mqtt)),
        ("file", Some(Kind::File)),
    ];
    if !section.has("type") {
        section.missing("type", "\"kafka\", \"http\", \"mqtt\" or \"file\"");
    }
    let kind = section.choice("type", &kinds, None);
    let target = match kind {
        #[cfg(feature = "kafka")]
        Some(Kind::Kafka) => Some(Target::Kafka(super::kafka::read(section))),
        #[cfg(not(feature = "kafka"))]
        Some(Kind::Kafka) => read_kafka(section),
        Some(Kind::Http) => Some(Target::Http(read_http(section))),
        Some(Kind::Mqtt) => Some(Target::Mqtt(read_mqtt(section))),
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
    sink.linger_max = section.time("linger_ms_max", SinkConfig::LINGER_RANGE, sink.linger_max);
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
    let policies = [("go_on", OnReject::GoOn), ("park_device", OnReject::ParkDevice)];
    sink.on_reject = section.choice("on_reject", &policies, OnReject::default());
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

pub(super) fn wide(range: RangeInclusive<usize>) -> RangeInclusive<u64> {
    *range.start() as u64..=*range.end() as u64
}

fn read_http(section: &Section<'_, '_>) -> HttpConfig {
    let url = read_url(section, "url", "\"https://bus.example.com/events\"", "username");
    let formats = [
        ("cloudevents_batch", HttpFormat::CloudEventsBatch),
        ("ndjson", HttpFormat::NdJson),
        ("json_array", HttpFormat::JsonArray),
        ("cloudevent", HttpFormat::CloudEvent),
        ("cloudevent_binary", HttpFormat::CloudEventBinary),
        ("raw", HttpFormat::Raw),
    ];
    let codings =
        [("none", Compression::None), ("gzip", Compression::Gzip), ("zstd", Compression::Zstd)];
    let versions =
        [("auto", HttpVersion::Auto), ("1.1", HttpVersion::Http1), ("2", HttpVersion::Http2)];
    let format = section.choice("format", &formats, HttpFormat::default());
    let in_flight = wide(HttpConfig::IN_FLIGHT_RANGE);
    HttpConfig {
        url,
        format,
        compression: section.choice("compression", &codings, Compression::default()),
        in_flight_max: section.integer(
            "in_flight_max",
            in_flight,
            format.in_flight_default() as u64,
        ) as usize,
        version: section.choice("http_version", &versions, HttpVersion::default()),
        auth: read_auth(section),
        signing_key: read_secret(section, ["signing_key", "signing_key_file", "signing_key_env"]),
        tls: read_tls(section),
        proxy: read_proxy(section),
        headers: read_headers(&section.section("headers")),
    }
}

/// An `http` or `https` address. Credentials have keys of their own, `instead` is one of them.
fn read_url(section: &Section<'_, '_>, key: &'static str, such: &str, instead: &str) -> String {
    let url = section.required(key, &format!("an address such as {such}"));
    if !url.is_empty() {
        match reqwest::Url::parse(&url) {
            Ok(parsed) if !["http", "https"].contains(&parsed.scheme()) || !parsed.has_host() => {
                section.problem(key, format!("must begin with http:// or https://, not {url:?}"));
            }
            Ok(parsed) if !parsed.username().is_empty() || parsed.password().is_some() => {
                section.problem(
                    key,
                    format!("must not hold credentials; use {instead} and the key for its secret"),
                );
            }
            Ok(_) => {}
            Err(wrong) => section.problem(key, format!("is no address: {wrong}")),
        }
    }
    url
}

fn read_proxy(section: &Section<'_, '_>) -> Option<HttpProxy> {
    let username = section.string("proxy_username");
    let password =
        read_secret(section, ["proxy_password", "proxy_password_file", "proxy_password_env"]);
    if !section.has("proxy") {
        if username.is_some() || password.is_some() {
            section.missing("proxy", "the proxy's address, such as \"http://proxy:3128\"");
        }
        return None;
    }
    let url = read_url(section, "proxy", "\"http://proxy:3128\"", "proxy_username");
    if username.is_some() != password.is_some() {
        let key = if username.is_some() { "proxy_password_file" } else { "proxy_username" };
        section.missing(key, "the other half of the proxy's credentials");
    }
    Some(HttpProxy { url, credentials: username.zip(password) })
}

fn read_tls(section: &Section<'_, '_>) -> TlsConfig {
    let section = section.section("tls");
    let path = |key| section.string(key).map(PathBuf::from);
    let ca_file = path("ca_file");
    let identity = match (path("cert_file"), path("key_file")) {
        (Some(cert_file), Some(key_file)) => Some(TlsIdentity { cert_file, key_file }),
        (None, None) => None,
        (Some(_), None) => {
            section.missing("key_file", "the PEM file of the certificate's private key");
            None
        }
        (None, Some(_)) => {
            section.missing("cert_file", "the PEM file of the key's certificate chain");
            None
        }
    };
    TlsConfig { ca_file, identity }
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
    let oauth2 = section.has("oauth2").then(|| read_oauth2(&section.section("oauth2")));
    if oauth2.is_some() && (bearer.is_some() || username.is_some()) {
        section.problem("oauth2", "cannot stand beside a bearer token or a username; keep one");
    }
    match (oauth2, bearer, username, password) {
        (Some(oauth2), ..) => HttpAuth::OAuth2(oauth2),
        (None, Some(_), Some(_), _) => {
            section.problem("username", "cannot stand beside a bearer token; keep one of them");
            HttpAuth::None
        }
        (None, Some(token), None, None) => HttpAuth::Bearer(token),
        (None, None, Some(username), Some(password)) => HttpAuth::Basic { username, password },
        (None, None, Some(_), None) => {
            section.missing("password_file", "the file that holds the password of username");
            HttpAuth::None
        }
        (None, _, None, Some(_)) => {
            section.missing("username", "the user whose password is given");
            HttpAuth::None
        }
        (None, None, None, None) => HttpAuth::None,
    }
}

pub(super) fn read_oauth2(section: &Section<'_, '_>) -> OAuth2Config {
    let such = "\"https://login.example.com/oauth2/token\"";
    let token_url = read_url(section, "token_url", such, "client_id");
    let client_id = section.required("client_id", "the id of this client");
    let keys = ["client_secret", "client_secret_file", "client_secret_env"];
    let client_secret = read_secret(section, keys).unwrap_or_else(|| {
        section.missing("client_secret_file", "the file that holds the client's secret");
        SecretSource::Inline(Secret::new(""))
    });
    OAuth2Config {
        token_url,
        client_id,
        client_secret,
        scope: section.string("scope"),
        audience: section.string("audience"),
    }
}

/// A secret may stand in the configuration, in a file or in the environment: in one of them.
pub(super) fn read_secret(
    section: &Section<'_, '_>,
    keys: [&'static str; 3],
) -> Option<SecretSource> {
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

#[cfg(not(feature = "kafka"))]
fn read_kafka(section: &Section<'_, '_>) -> Option<Target> {
    section.ignore_rest();
    section.problem("type", "this edge-gateway was built without Kafka; use the one that has it");
    None
}

fn read_mqtt(section: &Section<'_, '_>) -> MqttConfig {
    let (host, port, is_tls) = read_broker(section);
    let tls = read_tls(section);
    if !is_tls && tls != TlsConfig::default() {
        section.problem("tls", "is for a url that begins with mqtts://");
    }
    let topic = section.string("topic").unwrap_or_else(|| MqttConfig::TOPIC.to_owned());
    let topic = Template::parse(&topic).and_then(|template| {
        if template.literals().any(|text| text.contains(['+', '#', '\0'])) {
            return Err("must be a topic to publish to, without + and #".to_owned());
        }
        Ok(template)
    });
    let defaults = MqttConfig::new(host, port);
    let topic = topic.unwrap_or_else(|wrong| {
        section.problem("topic", wrong);
        defaults.topic.clone()
    });
    let properties = [
        ("cloudevents", UserProperties::CloudEvents),
        ("id", UserProperties::Id),
        ("none", UserProperties::None),
    ];
    let client_id = section.string("client_id");
    if client_id.as_ref().is_some_and(|id| id.is_empty() || id.len() > CLIENT_ID_BYTES_MAX) {
        section.problem("client_id", format!("must be 1 to {CLIENT_ID_BYTES_MAX} bytes long"));
    }
    let username = section.string("username");
    let password = read_secret(section, ["password", "password_file", "password_env"]);
    if username.is_none() && password.is_some() {
        section.missing("username", "the user whose password is given");
    }
    let in_flight = MqttConfig::IN_FLIGHT_RANGE;
    let in_flight = u64::from(*in_flight.start())..=u64::from(*in_flight.end());
    let in_flight_max =
        section.integer("in_flight_max", in_flight, defaults.in_flight_max.into()) as u16;
    MqttConfig {
        tls: is_tls.then_some(tls),
        topic,
        user_properties: section.choice("user_properties", &properties, UserProperties::default()),
        client_id,
        credentials: username.map(|username| (username, password)),
        in_flight_max,
        ..defaults
    }
}

/// Host and port of an MQTT broker, and whether it is spoken to over TLS.
fn read_broker(section: &Section<'_, '_>) -> (String, u16, bool) {
    let url = section.required("url", "an address such as \"mqtts://broker.example.com:8883\"");
    let nowhere = (String::new(), MqttConfig::PORT, url.starts_with("mqtts:"));
    if url.is_empty() {
        return nowhere;
    }
    let parsed = match reqwest::Url::parse(&url) {
        Ok(parsed) => parsed,
        Err(wrong) => {
            section.problem("url", format!("is no address: {wrong}"));
            return nowhere;
        }
    };
    let default = match parsed.scheme() {
        "mqtt" => MqttConfig::PORT,
        "mqtts" => MqttConfig::TLS_PORT,
        _ => {
            section.problem("url", format!("must begin with mqtt:// or mqtts://, not {url:?}"));
            return nowhere;
        }
    };
    if !parsed.username().is_empty() || parsed.password().is_some() {
        section.problem("url", "must not hold credentials; use username and password_file");
    } else if !matches!(parsed.path(), "" | "/") || parsed.query().is_some() {
        section.problem("url", "must be host and port only; the topic has a key of its own");
    }
    match parsed.host_str() {
        Some(host) => (host.to_owned(), parsed.port().unwrap_or(default), nowhere.2),
        None => {
            section.problem("url", "names no host");
            nowhere
        }
    }
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
