//! `[[sink]]` of the type `kafka`.

use std::path::PathBuf;

use bridge::Template;
use bridge::config::{
    KafkaCompression, KafkaConfig, KafkaDelivery, KafkaHeaders, KafkaSasl, KafkaTls, KafkaTopic,
    OAuthToken, ScramHash,
};

use super::reader::Section;
use super::sinks::{read_oauth2, read_secret, wide};

/// What is particular to a sink of the type `kafka`.
pub(super) fn read(section: &Section<'_, '_>) -> KafkaConfig {
    let brokers = section.required("brokers", "the brokers, such as \"10.0.0.5:9092\"");
    let is_broker = |b: &str| {
        b.trim().rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p != 0)
        })
    };
    if !brokers.is_empty() && !brokers.split(',').all(is_broker) {
        section.problem("brokers", format!("must be host:port[,host:port ...], not {brokers:?}"));
    }
    let topic = read_topic(section);
    let deliveries = [
        ("idempotent", KafkaDelivery::Idempotent),
        ("exactly_once", KafkaDelivery::ExactlyOnce),
        ("at_least_once", KafkaDelivery::AtLeastOnce),
    ];
    let delivery = section.choice("delivery", &deliveries, KafkaDelivery::default());
    let exactly_once = delivery == KafkaDelivery::ExactlyOnce;
    for key in ["cursor_topic", "transaction_time_max", "transaction_bytes_max"] {
        if section.has(key) && !exactly_once {
            section.problem(key, "is for delivery = \"exactly_once\" only");
        }
    }
    let cursor_topic = section.string("cursor_topic");
    match (&cursor_topic, &topic) {
        (Some(cursor_topic), _) => check_topic(section, "cursor_topic", cursor_topic),
        (None, KafkaTopic::Made(_)) if exactly_once => {
            section.missing("cursor_topic", "the topic that keeps the cursor: topic is a template");
        }
        _ => {}
    }
    let compressions = [
        ("none", KafkaCompression::None),
        ("gzip", KafkaCompression::Gzip),
        ("snappy", KafkaCompression::Snappy),
        ("lz4", KafkaCompression::Lz4),
        ("zstd", KafkaCompression::Zstd),
    ];
    let headers = [
        ("cloudevents", KafkaHeaders::CloudEvents),
        ("id", KafkaHeaders::Id),
        ("none", KafkaHeaders::None),
    ];
    let compression = section.choice("compression", &compressions, KafkaCompression::default());
    let is_taken = matches!(compression, KafkaCompression::None | KafkaCompression::Gzip);
    if is_event_hubs(&brokers) && !is_taken {
        section.problem(
            "compression",
            "must be \"none\" for Azure Event Hubs, or \"gzip\" where its tier takes that",
        );
    }
    let bytes = wide(KafkaConfig::TRANSACTION_BYTES_RANGE);
    let bytes_max = KafkaConfig::TRANSACTION_BYTES_MAX as u64;
    KafkaConfig {
        delivery,
        cursor_topic,
        transaction_time_max: section.time(
            "transaction_time_max",
            KafkaConfig::TRANSACTION_TIME_RANGE,
            KafkaConfig::TRANSACTION_TIME_MAX,
        ),
        transaction_bytes_max: section.size("transaction_bytes_max", bytes, bytes_max) as usize,
        compression,
        headers: section.choice("headers", &headers, KafkaHeaders::default()),
        tls: read_tls(section),
        sasl: read_sasl(section),
        librdkafka: read_properties(&section.section("librdkafka")),
        brokers,
        topic,
    }
}

/// Whether brokers are those of Azure's service, whose names are given.
fn is_event_hubs(brokers: &str) -> bool {
    let host = |broker: &str| broker.trim().rsplit_once(':').map(|(host, _)| host.to_lowercase());
    brokers.split(',').filter_map(host).any(|host| host.ends_with(".servicebus.windows.net"))
}

/// One topic, or a template, which has braces.
fn read_topic(section: &Section<'_, '_>) -> KafkaTopic {
    let topic = section.required("topic", "the Kafka topic, such as \"events\"");
    if !topic.contains(['{', '}']) {
        if !topic.is_empty() {
            check_topic(section, "topic", &topic);
        }
        return KafkaTopic::Fixed(topic);
    }
    match Template::parse(&topic) {
        Ok(template) => {
            if !template.literals().all(|text| text.chars().all(fits_topic)) {
                section.problem(
                    "topic",
                    format!("must have only {TOPIC_FORM} between what is in braces, not {topic:?}"),
                );
            }
            KafkaTopic::Made(template)
        }
        Err(wrong) => {
            section.problem("topic", wrong);
            KafkaTopic::Fixed(topic)
        }
    }
}

fn read_tls(section: &Section<'_, '_>) -> Option<KafkaTls> {
    let tls = section.section("tls");
    let path = |key| tls.string(key).map(PathBuf::from);
    let (ca_file, cert_file, key_file) = (path("ca_file"), path("cert_file"), path("key_file"));
    if !section.has("tls") {
        return None;
    }
    needs_tls(section, "tls", "TLS");
    if cert_file.is_some() != key_file.is_some() {
        let (key, what) = if cert_file.is_some() {
            ("key_file", "the PEM file of the certificate's private key")
        } else {
            ("cert_file", "the PEM file of the key's certificate chain")
        };
        tls.missing(key, what);
    }
    Some(KafkaTls { ca_file, identity: cert_file.zip(key_file) })
}

fn read_sasl(section: &Section<'_, '_>) -> Option<KafkaSasl> {
    #[derive(Clone, Copy)]
    enum Mechanism {
        Plain,
        Scram(ScramHash),
        OAuthBearer,
    }
    let sasl = section.section("sasl");
    let mechanisms = [
        ("plain", Some(Mechanism::Plain)),
        ("scram_sha_256", Some(Mechanism::Scram(ScramHash::Sha256))),
        ("scram_sha_512", Some(Mechanism::Scram(ScramHash::Sha512))),
        ("oauthbearer", Some(Mechanism::OAuthBearer)),
    ];
    let mechanism = sasl.choice("mechanism", &mechanisms, None);
    let username = sasl.string("username");
    let password = read_secret(&sasl, ["password", "password_file", "password_env"]);
    let token = read_secret(&sasl, ["token", "token_file", "token_env"]);
    let endpoint = ["token_url", "client_id"].into_iter().any(|key| sasl.has(key));
    let endpoint = endpoint.then(|| read_oauth2(&sasl));
    let unsecured = sasl.string("unsecured_subject");
    if !section.has("sasl") {
        return None;
    }
    let Some(mechanism) = mechanism else {
        if !sasl.has("mechanism") {
            sasl.missing(
                "mechanism",
                "\"plain\", \"scram_sha_256\", \"scram_sha_512\" or \"oauthbearer\"",
            );
        }
        return None;
    };
    if let Mechanism::OAuthBearer = mechanism {
        needs_tls(&sasl, "mechanism", "OAUTHBEARER");
        let second = if endpoint.is_some() { "token_url" } else { "unsecured_subject" };
        let mut sources = [
            token.map(OAuthToken::Kept),
            endpoint.map(OAuthToken::Endpoint),
            unsecured.map(OAuthToken::Unsecured),
        ]
        .into_iter()
        .flatten();
        let source = sources.next();
        if source.is_none() {
            let what =
                "the token endpoint; or token_file: a file that somebody keeps a fresh token in";
            sasl.missing("token_url", what);
        }
        if sources.next().is_some() {
            sasl.problem(second, "cannot stand beside another source of tokens; keep one of them");
        }
        return source.map(KafkaSasl::OAuthBearer);
    }
    if username.is_none() {
        sasl.missing("username", "the user to log in as");
    }
    if password.is_none() {
        sasl.missing("password_file", "the file that holds the user's password");
    }
    let (username, password) = username.zip(password)?;
    Some(match mechanism {
        Mechanism::Scram(hash) => {
            needs_tls(&sasl, "mechanism", "SCRAM");
            KafkaSasl::Scram { hash, username, password }
        }
        _ => KafkaSasl::Plain { username, password },
    })
}

fn needs_tls(section: &Section<'_, '_>, key: &str, what: &str) {
    if !KafkaConfig::TLS_BUILT_IN {
        section.problem(
            key,
            format!(
                "this edge-gateway was built without {what} for Kafka; use one with the feature \
                 kafka-tls"
            ),
        );
    }
}

fn read_properties(section: &Section<'_, '_>) -> Vec<(String, String)> {
    let properties = section.free_strings();
    for (name, value) in &properties {
        if let Err(wrong) = KafkaConfig::check_property(name, value) {
            section.problem(name, wrong);
        }
    }
    properties
}

const TOPIC_FORM: &str = "letters, digits, '-', '_' and '.'";

fn fits_topic(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_.".contains(c)
}

fn check_topic(section: &Section<'_, '_>, key: &str, topic: &str) {
    if topic.is_empty() || topic.len() > 249 || !topic.chars().all(fits_topic) {
        section.problem(key, format!("must be 1 to 249 {TOPIC_FORM}, not {topic:?}"));
    }
}
