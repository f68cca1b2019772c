//! `[[sink]]` of the type `kafka`.

use bridge::config::{KafkaCompression, KafkaConfig, KafkaDelivery};

use super::reader::Section;
use super::sinks::wide;

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
    let topic = section.required("topic", "the Kafka topic, such as \"events\"");
    check_topic(section, "topic", &topic);
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
    if let Some(topic) = &cursor_topic {
        check_topic(section, "cursor_topic", topic);
    }
    let compressions = [
        ("none", KafkaCompression::None),
        ("gzip", KafkaCompression::Gzip),
        ("snappy", KafkaCompression::Snappy),
        ("lz4", KafkaCompression::Lz4),
        ("zstd", KafkaCompression::Zstd),
    ];
    let compression = section.choice("compression", &compressions, KafkaCompression::default());
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
        ..KafkaConfig::new(brokers, topic)
    }
}

fn check_topic(section: &Section<'_, '_>, key: &str, topic: &str) {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if topic.is_empty() || topic.len() > 249 || !topic.chars().all(fits) {
        section.problem(
            key,
            format!("must be 1 to 249 letters, digits, '-', '_' or '.', not {topic:?}"),
        );
    }
}
