//! The configuration as a whole: the shipped files, the defaults, and mistakes across keys.

use super::*;

const ANNOTATED: &str = include_str!("../../../configs/gateway.toml");

fn env(name: &str) -> Option<String> {
    (name == "KAFKA_BROKERS").then(|| "10.0.0.5:9092,10.0.0.6:9092".to_owned())
}

fn parse(text: &str) -> Result<Config, String> {
    Config::parse("t.toml", text, &env).map_err(|e| e.to_string())
}

/// The settings of the annotated file: `#key` lines, and with `optional` the `##key` lines as well.
fn annotated(optional: bool) -> String {
    let lines = ANNOTATED.lines().map(|line| {
        let line = if optional { line.replacen("##", "#", 1) } else { line.to_owned() };
        match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => {
                rest.to_owned()
            }
            _ => line,
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Keys that have no default: the least that each table needs.
const LEAST: &str = r#"
[gateway]
id = "edge-01"
[[listener]]
[[route]]
filter = "devices/{device}/#"
[storage]
at_quota = "drop_oldest" # the default without a sink, which the annotated file shows
[[sink]]
name = "bus"
type = "kafka"
brokers = "127.0.0.1:9092"
topic = "events"
[[sink]]
name = "cloud"
type = "http"
url = "http://127.0.0.1:8080/events"
[[sink]]
name = "north"
type = "mqtt"
url = "mqtt://127.0.0.1:1884"
[[sink]]
name = "archive"
type = "file"
path = "/var/lib/edge-gateway/archive.ndjson"
"#;

#[test]
fn the_annotated_defaults_are_the_defaults() {
    let annotated = parse(&annotated(false)).unwrap();
    let least = parse(LEAST).unwrap();
    assert_eq!(format!("{annotated:#?}"), format!("{least:#?}"));
    // As shipped, every setting a comment, it is the empty configuration.
    let shipped = parse(ANNOTATED).unwrap();
    assert_eq!(format!("{shipped:#?}"), format!("{:#?}", parse("").unwrap()));
    assert_eq!(shipped.storage.at_quota, AtQuota::DropOldest);
}

#[test]
fn the_annotated_file_shows_every_key() {
    let (_, asked) = Config::parse_asking("t.toml", &annotated(true), &env);
    // The alternatives of a secret are named in prose.
    let secrets = ["bearer_token", "password", "proxy_password", "signing_key", "client_secret"];
    for path in asked {
        let key = path.rsplit('.').next().unwrap();
        let shown = ANNOTATED.lines().any(|line| {
            let line = line.trim_start_matches('#');
            line.starts_with(&format!("{key} =")) || line.trim_matches(['[', ']']) == path
        });
        let in_prose = secrets.contains(&key.trim_end_matches("_env"));
        assert!(shown || in_prose, "configs/gateway.toml does not show {path}");
    }
}

#[test]
fn every_shipped_configuration_is_right() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        // A fleet's file belongs to firmware-sim, whose tests read it.
        if path.extension().is_none_or(|e| e != "toml") || name.starts_with("fleet") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        if let Err(wrong) = Config::parse(&name, &text, &env) {
            panic!("{wrong}");
        }
        seen.push(name);
    }
    seen.sort();
    assert_eq!(seen, ["gateway.toml", "http.toml", "kafka.toml", "quickstart.toml"]);
}

#[test]
fn every_mistake_is_told_at_once() {
    let text = r#"
[gateway]
id = "edge 01"
[[listener]]
bind = "0.0.0.0:1883"
[[listener]]
bind = "localhost"
[[route]]
filter = "a/#/b"
[storage]
quota_bytes = "64MiB"
file_bytes_max = "32MiB"
[[sink]]
name = "a"
type = "http"
url = "ftp://x/y"
username = "u"
[[sink]]
name = "a"
type = "kafka"
brokers = "nowhere"
delivery = "exactly_once"
topic = "t"
[[sink]]
type = "htp"
whatever = 1
[storge]
"#;
    let wrong = parse(text).unwrap_err();
    for (line, key) in [
        (3, "gateway.id"),
        (5, "listener.bind"),
        (7, "listener.bind"),
        (9, "route.filter"),
        (12, "storage.file_bytes_max"),
        (16, "sink.url"),
        (13, "sink.password_file"),
        (19, "sink.name"),
        (21, "sink.brokers"),
        (22, "sink.delivery"),
        (24, "sink.name"),
        (25, "sink.type"),
        (27, "storge"),
    ] {
        let place = format!("t.toml:{line}: {key}: ");
        assert!(wrong.lines().any(|l| l.starts_with(&place)), "no {place:?} in\n{wrong}");
    }
    assert!(wrong.contains("did you mean \"storage\"?"), "{wrong}");
    assert_eq!(wrong.lines().count(), 13, "{wrong}");
}

#[test]
fn secrets_do_not_show() {
    let text = r#"
[[sink]]
name = "a"
type = "http"
url = "https://example.com/"
bearer_token = "hunter2"
"#;
    let config = parse(text).unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
    let twice = format!("{text}bearer_token_env = \"TOKEN\"\n");
    assert!(parse(&twice).unwrap_err().contains("only one of"));
}

/// An HTTP sink with these keys.
fn http_sink(keys: &str) -> Result<Config, String> {
    parse(&format!(
        "[[sink]]\nname = \"a\"\ntype = \"http\"\nurl = \"https://example.com/\"\n{keys}"
    ))
}

#[test]
fn a_format_of_single_events_has_more_of_them_in_flight() {
    for (keys, expected) in [
        ("", "in_flight_max: 1,"),
        ("format = \"raw\"", "in_flight_max: 8,"),
        ("format = \"raw\"\nin_flight_max = 2", "in_flight_max: 2,"),
    ] {
        let config = http_sink(keys).unwrap();
        assert!(format!("{:?}", config.sinks).contains(expected), "{keys}: {:?}", config.sinks);
    }
}

#[test]
fn an_mqtt_sink_is_host_port_and_a_topic_to_publish_to() {
    let sink = |keys: &str| parse(&format!("[[sink]]\nname = \"n\"\ntype = \"mqtt\"\n{keys}"));
    for (url, expected) in [
        ("mqtt://broker", "host: \"broker\", port: 1883, tls: None"),
        ("mqtts://broker:9000", "host: \"broker\", port: 9000, tls: Some("),
        ("mqtts://10.0.0.5/", "host: \"10.0.0.5\", port: 8883, tls: Some("),
    ] {
        let config = sink(&format!("url = {url:?}\nusername = \"u\"")).unwrap();
        assert!(format!("{:?}", config.sinks).contains(expected), "{url}: {:?}", config.sinks);
    }
    for (keys, told) in [
        ("", "sink.url: is missing"),
        ("url = \"tcp://x\"", "sink.url: must begin with mqtt://"),
        ("url = \"mqtt://u:s3cret@x\"", "sink.url: must not hold credentials"),
        ("url = \"mqtt://x/topic\"", "sink.url: must be host and port only"),
        ("url = \"mqtt://x\"\n[sink.tls]\nca_file = \"c\"", "sink.tls: is for a url"),
        ("url = \"mqtt://x\"\ntopic = \"up/#\"", "sink.topic: must be a topic to publish to"),
        ("url = \"mqtt://x\"\ntopic = \"up/{devcie}\"", "sink.topic: has {devcie}"),
        ("url = \"mqtt://x\"\npassword = \"s3cret\"", "sink.username: is missing"),
        ("url = \"mqtt://x\"\nin_flight_max = 0", "sink.in_flight_max: must be"),
    ] {
        let problems = sink(keys).unwrap_err();
        assert!(problems.contains(told), "{keys}: {problems}");
        assert_eq!(problems.lines().count(), 1, "{keys}: {problems}");
    }
}

#[test]
fn half_of_what_belongs_together_is_told() {
    for (keys, told) in [
        ("proxy_username = \"u\"", "sink.proxy: is missing"),
        ("proxy = \"http://p:1\"\nproxy_password = \"s3cret\"", "sink.proxy_username: is missing"),
        ("proxy = \"http://u:s3cret@p:1\"", "sink.proxy: must not hold credentials"),
        ("proxy = \"socks5://p:1\"", "sink.proxy: must begin with http"),
        ("[sink.tls]\ncert_file = \"c\"", "sink.tls.key_file: is missing"),
        ("[sink.tls]\nkey_file = \"k\"", "sink.tls.cert_file: is missing"),
        (
            "bearer_token = \"s3cret\"\n[sink.oauth2]\ntoken_url = \"https://x/\"\nclient_id = \"c\"\nclient_secret = \"s3cret\"",
            "sink.oauth2: cannot stand beside",
        ),
        (
            "[sink.oauth2]\ntoken_url = \"https://x/\"\nclient_id = \"c\"",
            "sink.oauth2.client_secret_file: is missing",
        ),
        (
            "[sink.oauth2]\nclient_id = \"c\"\nclient_secret = \"s3cret\"",
            "sink.oauth2.token_url: is missing",
        ),
        ("in_flight_max = 65", "sink.in_flight_max: must be a whole number from 1 to 64"),
    ] {
        let problems = http_sink(keys).unwrap_err();
        assert!(problems.contains(told), "{keys}: {problems}");
        assert_eq!(problems.lines().count(), 1, "{keys}: {problems}");
    }
}

#[test]
fn a_word_that_is_no_level_would_silence_the_log() {
    for right in ["warn", "INFO", "off", "info,gateway::mqtt=debug", "gateway=trace, error"] {
        assert!(parse(&format!("[log]\nlevel = {right:?}")).is_ok(), "{right}");
    }
    for wrong in ["wran", "", "info,", "loud", "gateway", "gateway=loud"] {
        let problems = parse(&format!("[log]\nlevel = {wrong:?}")).unwrap_err();
        assert!(problems.starts_with("t.toml:2: log.level: must be error"), "{problems}");
    }
}

#[test]
fn a_small_quota_gets_small_files() {
    let config = parse("[storage]\nquota_bytes = \"64MiB\"").unwrap();
    assert_eq!(config.storage.file_bytes_max, 16 << 20);
}
