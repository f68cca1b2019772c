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
    let secrets =
        ["bearer_token", "password", "proxy_password", "signing_key", "client_secret", "token"];
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

/// The services in configs/kafka.toml, each in the place of the sink above them. A build without TLS
/// says so, and finds nothing else wrong.
#[cfg(feature = "kafka")]
#[test]
fn every_kafka_service_that_is_shown_is_right() {
    let text = include_str!("../../../configs/kafka.toml");
    let mut blocks = text.split("\n# == ");
    let (before, _) = blocks.next().unwrap().split_once("[[sink]]").unwrap();
    let mut services = 0;
    for block in blocks {
        let lines: Vec<&str> = block.lines().filter_map(|line| line.strip_prefix("##")).collect();
        let name = block.lines().next().unwrap();
        match parse(&format!("{before}{}", lines.join("\n"))) {
            Ok(config) => assert_eq!(config.sinks.len(), 1, "{name}"),
            Err(wrong) => {
                let built_in = bridge::config::KafkaConfig::TLS_BUILT_IN;
                let expected = |line: &str| !built_in && line.contains("the feature kafka-tls");
                assert!(wrong.lines().all(expected), "{name}: {wrong}");
            }
        }
        services += 1;
    }
    assert_eq!(services, 5);
}

/// Its brokers would refuse the first record, and the sink would be held.
#[cfg(feature = "kafka")]
#[test]
fn event_hubs_get_no_compression_that_they_do_not_take() {
    let sink = |brokers: &str, more: &str| {
        parse(&format!(
            "[[sink]]\nname = \"a\"\ntype = \"kafka\"\nbrokers = \"{brokers}\"\ntopic = \"t\"\n{more}"
        ))
    };
    let hubs = "Plant.servicebus.windows.net:9093";
    for right in ["compression = \"none\"", "compression = \"gzip\""] {
        sink(hubs, right).unwrap();
    }
    sink("servicebus.windows.net.example.com:9093", "").unwrap();
    for wrong in ["", "compression = \"lz4\"", "compression = \"zstd\""] {
        let problems = sink(hubs, wrong).unwrap_err();
        assert!(problems.contains("sink.compression: must be \"none\""), "{problems}");
    }
}

#[cfg(feature = "kafka")]
#[test]
fn what_kafka_would_refuse_is_refused_here() {
    let sink = |more: &str| {
        parse(&format!("[[sink]]\nname = \"a\"\ntype = \"kafka\"\nbrokers = \"b:9092\"\n{more}"))
    };
    for right in [
        "topic = \"plant.{2}.{device}\"",
        "topic = \"{type}\"\ndelivery = \"exactly_once\"\ncursor_topic = \"cursors\"",
        "topic = \"t\"\ndelivery = \"exactly_once\"\nbacklog = \"live_first\"\n[[route]]\n\
         filter = \"a\"\nlane = \"alarm\"",
        "topic = \"t\"\nheaders = \"id\"\n[sink.librdkafka]\n\"linger.ms\" = \"20\"",
        "topic = \"t\"\n[sink.sasl]\nmechanism = \"plain\"\nusername = \"u\"\npassword_env = \"P\"",
    ] {
        sink(right).unwrap();
    }
    for (wrong, place, told) in [
        ("topic = \"a b\"", "5: sink.topic", "letters, digits"),
        ("topic = \"a/{device}\"", "5: sink.topic", "between what is in braces"),
        ("topic = \"{devcie}\"", "5: sink.topic", "{device}"),
        ("topic = \"{1}\"\ndelivery = \"exactly_once\"", "1: sink.cursor_topic", "template"),
        ("topic = \"t\"\n[sink.librdkafka]\nacks = \"1\"", "7: sink.librdkafka.acks", "replicas"),
        (
            "topic = \"t\"\n[sink.librdkafka]\n\"linger.sm\" = \"1\"",
            "7: sink.librdkafka.linger.sm",
            "not taken",
        ),
        ("topic = \"t\"\n[sink.sasl]", "6: sink.sasl.mechanism", "is missing"),
        (
            "topic = \"t\"\n[sink.sasl]\nmechanism = \"plain\"\nusername = \"u\"",
            "6: sink.sasl.password_file",
            "is missing",
        ),
        ("topic = \"t\"\n[sink.tls]\ncert_file = \"c.pem\"", "6: sink.tls.key_file", "private key"),
        (
            "topic = \"t\"\n[sink.sasl]\nmechanism = \"oauthbearer\"",
            "6: sink.sasl.token_url",
            "is missing",
        ),
        (
            "topic = \"t\"\n[sink.sasl]\nmechanism = \"oauthbearer\"\ntoken_url = \"https://x/\"",
            "6: sink.sasl.client_id",
            "is missing",
        ),
        (
            "topic = \"t\"\n[sink.sasl]\nmechanism = \"oauthbearer\"\ntoken_url = \"https://x/\"\n\
             client_id = \"c\"\nclient_secret = \"s3cret\"\nunsecured_subject = \"u\"",
            "8: sink.sasl.token_url",
            "keep one",
        ),
    ] {
        let problems = sink(wrong).unwrap_err();
        let line = problems.lines().find(|line| line.starts_with(&format!("t.toml:{place}: ")));
        assert!(line.is_some_and(|line| line.contains(told)), "{wrong:?}: {problems}");
    }
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
cursor_topic = "cursors"
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
        (22, "sink.cursor_topic"),
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

#[test]
fn listeners_say_what_they_need() {
    let right = r#"
[[listener]]
bind = "unix:/run/edge-gateway/mqtt.sock"
unix_mode = "0600"
[[listener]]
type = "websocket"
bind = "0.0.0.0:8883"
[listener.tls]
cert_file = "c"
key_file = "k"
client_ca_file = "a"
client_identity = "san"
"#;
    let listeners = parse(right).unwrap().listeners;
    assert_eq!(listeners[0].bind, Bind::Unix("/run/edge-gateway/mqtt.sock".into()));
    assert_eq!((listeners[0].unix_mode, listeners[0].allow_anonymous), (0o600, true));
    assert_eq!(
        (listeners[1].transport, listeners[1].allow_anonymous),
        (Transport::WebSocket, false)
    );
    let tls = listeners[1].tls.as_ref().unwrap();
    assert_eq!(tls.client_identity, ClientIdentity::AltName);

    let wrong = r#"
[[listener]]
bind = "unix:mqtt.sock"
unix_mode = "rw"
[listener.tls]
key_file = "k"
client_identity = "cn"
[[listener]]
bind = "unix:mqtt.sock"
[[listener]]
bind = "0.0.0.0:8883"
unix_mode = "0600"
[listener.tls]
cert_file = "c"
key_file = "k"
client_ca_file = "a"
client_identity = "none"
"#;
    let wrong = parse(wrong).unwrap_err();
    for (line, key, what) in [
        (3, "listener.bind", "from the root on"),
        (4, "listener.unix_mode", "octal"),
        (5, "listener.tls", "Unix socket"),
        (5, "listener.tls.cert_file", "is missing"),
        (5, "listener.tls.client_ca_file", "is missing"),
        (9, "listener.bind", "taken by another listener"),
        (9, "listener.bind", "from the root on"),
        (11, "listener.bind", "nobody could connect"),
        (12, "listener.unix_mode", "Unix sockets only"),
    ] {
        let place = format!("t.toml:{line}: {key}: ");
        let told = wrong.lines().any(|l| l.starts_with(&place) && l.contains(what));
        assert!(told, "no {place:?} with {what:?} in\n{wrong}");
    }
    assert_eq!(wrong.lines().count(), 9, "{wrong}");
}

#[test]
fn log_ins_and_rules_say_what_they_need() {
    let right = r##"
[[listener]]
bind = "0.0.0.0:1883"
[auth]
users_file = "/etc/edge-gateway/users"
[auth.jwt]
jwks_file = "keys"
[[acl]]
publish = ["devices/%c/#"]
[[acl]]
users = ["alice"]
subscribe = ["plant/+/%u", "#"]
"##;
    let config = parse(right).unwrap();
    assert!(!config.listeners[0].allow_anonymous);
    assert_eq!(config.auth.jwt.unwrap().user_claim, "sub");
    assert_eq!(config.acl[1].subscribe, ["plant/+/%u", "#"]);

    let wrong = r#"
[auth.jwt]
hmac_key_file = "k"
jwks_file = "keys"
[[acl]]
users = []
[[acl]]
publish = ["a/#/b", 7]
subscribe = "t"
"#;
    let wrong = parse(wrong).unwrap_err();
    for (line, key, what) in [
        (4, "auth.jwt.jwks_file", "only one of"),
        (5, "acl.publish", "is missing"),
        (6, "acl.users", "nobody"),
        (8, "acl.publish", "must be topic filters"),
        (8, "acl.publish", "texts in quotes"),
        (9, "acl.subscribe", "a list of texts"),
    ] {
        let place = format!("t.toml:{line}: {key}: ");
        let told = wrong.lines().any(|l| l.starts_with(&place) && l.contains(what));
        assert!(told, "no {place:?} with {what:?} in\n{wrong}");
    }
    assert_eq!(wrong.lines().count(), 6, "{wrong}");
    assert!(parse("[auth.jwt]").unwrap_err().contains("jwks_file: is missing"));
}

#[test]
fn a_device_key_stands_in_one_place() {
    let device = |filter: &str, device: &str| {
        parse(&format!("[[route]]\nfilter = {filter:?}\n{device}"))
            .map(|c| c.routes[0].device.clone())
    };
    for (filter, written, read) in [
        ("a/{device}/#", "", DeviceFrom::Topic),
        ("a/+/#", "", DeviceFrom::ClientId),
        ("a/{device}/#", "device = \"topic\"", DeviceFrom::Topic),
        ("a/#", "device = \"username\"", DeviceFrom::Username),
        ("a/#", "device = \"certificate\"", DeviceFrom::Certificate),
        ("a/#", "device = \"property:dev\"", DeviceFrom::Property("dev".to_owned())),
    ] {
        assert_eq!(device(filter, written).unwrap(), read, "{filter} {written}");
    }
    for (filter, wrong) in
        [("a/#", "topic"), ("a/{device}", "username"), ("a/#", "property:"), ("a/#", "serial")]
    {
        let problems = device(filter, &format!("device = {wrong:?}")).unwrap_err();
        assert!(problems.starts_with("t.toml:3: route.device: "), "{problems}");
        assert_eq!(problems.lines().count(), 1, "{problems}");
    }
}
