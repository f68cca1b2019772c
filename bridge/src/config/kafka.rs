//! Settings of a Kafka sink.
//!
//! Owns: which of librdkafka's properties belong to us ([`KafkaConfig::check_property`]), and what a
//! build can do ([`KafkaConfig::TLS_BUILT_IN`]).

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;

use super::{OAuth2Config, SecretSource};
use crate::template::Template;

/// Settings of a Kafka sink.
#[derive(Clone, Debug)]
pub struct KafkaConfig {
    /// Bootstrap brokers, `host:port[,host:port]`.
    pub brokers: String,
    /// Topic; it must exist, or the broker must create it on first use.
    pub topic: KafkaTopic,
    /// What a retry may do.
    pub delivery: KafkaDelivery,
    /// Exactly once: topic under whose partition 0 the cursor is kept. `None`: [`Self::topic`],
    /// which then is no template.
    pub cursor_topic: Option<String>,
    /// Exactly once: how long a transaction stays open for more events at most. It closes earlier
    /// when none are at hand.
    pub transaction_time_max: Duration,
    /// Exactly once: event bytes in a transaction, give or take a request.
    pub transaction_bytes_max: usize,
    /// Compression of record batches: `none`, `gzip`, `snappy`, `lz4` or `zstd`.
    pub compression: KafkaCompression,
    /// What a record says beside its payload.
    pub headers: KafkaHeaders,
    /// `Some`: TLS, with these settings.
    pub tls: Option<KafkaTls>,
    /// `Some`: SASL, with these credentials.
    pub sasl: Option<KafkaSasl>,
    /// Further properties of librdkafka, none of them ours ([`Self::check_property`]).
    pub librdkafka: Vec<(String, String)>,
}

impl KafkaConfig {
    /// Default of [`KafkaConfig::transaction_time_max`].
    pub const TRANSACTION_TIME_MAX: Duration = Duration::from_millis(250);
    /// Range of [`KafkaConfig::transaction_time_max`].
    pub const TRANSACTION_TIME_RANGE: RangeInclusive<Duration> =
        Duration::from_millis(1)..=Duration::from_secs(30);
    /// Default of [`KafkaConfig::transaction_bytes_max`].
    pub const TRANSACTION_BYTES_MAX: usize = 8 * 1024 * 1024;
    /// Range of [`KafkaConfig::transaction_bytes_max`].
    pub const TRANSACTION_BYTES_RANGE: RangeInclusive<usize> = 64 * 1024..=64 * 1024 * 1024;
    /// Whether this build has TLS, and with it SCRAM and OAUTHBEARER: the feature `kafka-tls`.
    pub const TLS_BUILT_IN: bool = cfg!(feature = "kafka-tls");

    /// A Kafka sink with every default: one topic, idempotent, LZ4, CloudEvents headers, no security.
    pub fn new(brokers: impl Into<String>, topic: impl Into<String>) -> Self {
        Self {
            brokers: brokers.into(),
            topic: KafkaTopic::Fixed(topic.into()),
            delivery: KafkaDelivery::default(),
            cursor_topic: None,
            transaction_time_max: Self::TRANSACTION_TIME_MAX,
            transaction_bytes_max: Self::TRANSACTION_BYTES_MAX,
            compression: KafkaCompression::default(),
            headers: KafkaHeaders::default(),
            tls: None,
            sasl: None,
            librdkafka: Vec::new(),
        }
    }

    /// Whether a property may be passed through to librdkafka.
    ///
    /// # Errors
    /// It is ours, with the reason and the key to use instead, or librdkafka does not take it.
    pub fn check_property(name: &str, value: &str) -> Result<(), String> {
        if let Some(reason) = reserved(name) {
            return Err(format!("is not passed through: {reason}"));
        }
        match ClientConfig::new().set(name, value).create_native_config() {
            Ok(_) => Ok(()),
            Err(KafkaError::ClientConfig(_, wrong, _, _)) => {
                Err(format!("is not taken by librdkafka: {wrong}"))
            }
            Err(error) => Err(format!("is not taken by librdkafka: {error}")),
        }
    }
}

/// Why a property is not to be passed through, if it is not.
fn reserved(name: &str) -> Option<&'static str> {
    Some(match name {
        "bootstrap.servers" | "metadata.broker.list" => "set brokers",
        "compression.type" | "compression.codec" => "set compression",
        "acks" | "request.required.acks" => "an event is delivered once all replicas have it",
        "enable.idempotence"
        | "enable.gapless.guarantee"
        | "transactional.id"
        | "transaction.timeout.ms"
        | "max.in.flight.requests.per.connection"
        | "max.in.flight"
        | "message.send.max.retries"
        | "retries" => "set delivery; order and repeats rest on it",
        "message.timeout.ms" | "delivery.timeout.ms" => {
            "an event is never given up; set request_timeout for how long to wait for an answer"
        }
        "partitioner" | "sticky.partitioning.linger.ms" => {
            "the key is the device key, spread as Java clients do, so that a device stays in order"
        }
        "queue.buffering.max.messages"
        | "queue.buffering.max.kbytes"
        | "queue.buffering.max.ms.no" => {
            "the queue is bounded by what is in flight; set request_events_max, request_bytes_max"
        }
        "group.id" | "group.instance.id" | "isolation.level" | "enable.auto.commit" => {
            "the group is the cursor of this sink and of no other"
        }
        "delivery.report.only.error" | "dr_cb" | "dr_msg_cb" => "every report is counted",
        "statistics.interval.ms" => "the gateway has its own figures under /metrics",
        "plugin.library.paths" => "no code is loaded into a gateway",
        "security.protocol" => "set [sink.tls] and [sink.sasl]",
        "ssl.ca.location" | "ssl.ca.pem" => "set ca_file in [sink.tls]",
        _ if name.starts_with("ssl.certificate.")
            || name.starts_with("ssl.key.")
            || name.starts_with("ssl.keystore.") =>
        {
            "set cert_file and key_file in [sink.tls]"
        }
        _ if name.starts_with("sasl.") || name.contains("oauthbearer") => "set [sink.sasl]",
        _ if name.ends_with("_cb") => "it is for programs",
        _ => return None,
    })
}

/// Where a record goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KafkaTopic {
    /// One topic.
    Fixed(String),
    /// Made from the event. What Kafka does not take in a name becomes `_`.
    Made(Template),
}

/// What a retry into Kafka may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KafkaDelivery {
    /// Transactions that carry the events and the cursor together: a consumer that reads what is
    /// committed sees each event once, whatever dies in between.
    ExactlyOnce,
    /// Idempotent producer: no duplicate and no reorder while the producer lives.
    #[default]
    Idempotent,
    /// Plain producer with acks from all replicas: a lost answer gives a duplicate.
    AtLeastOnce,
}

/// Compression of record batches.
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

/// What a record says beside its payload. Each header costs CPU, here and at every reader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KafkaHeaders {
    /// CloudEvents in binary mode.
    #[default]
    CloudEvents,
    /// `id` alone: `gateway/epoch/partition/seq`, enough to deduplicate by.
    Id,
    /// Nothing.
    None,
}

/// TLS towards the brokers. Their certificates are verified, and their names in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KafkaTls {
    /// Certificate authorities to trust, PEM, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// Certificate chain and private key that this gateway shows, both PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Credentials for SASL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KafkaSasl {
    /// RFC 4616. The password travels as it is: only over TLS, or where the network is trusted.
    Plain {
        /// User name.
        username: String,
        /// Password.
        password: SecretSource,
    },
    /// RFC 5802.
    Scram {
        /// Which of the two.
        hash: ScramHash,
        /// User name.
        username: String,
        /// Password.
        password: SecretSource,
    },
    /// RFC 7628.
    OAuthBearer(OAuthToken),
}

/// Hash of SCRAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScramHash {
    /// SCRAM-SHA-256.
    Sha256,
    /// SCRAM-SHA-512.
    Sha512,
}

/// Where the token of OAUTHBEARER comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OAuthToken {
    /// A JSON Web Token that somebody else keeps fresh: read again before it expires.
    Kept(SecretSource),
    /// A token endpoint, which is asked again before a token expires. Its authorities are the system's.
    Endpoint(OAuth2Config),
    /// An unsecured one that is made here for this subject: for brokers that check nothing.
    Unsecured(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_pass_unless_they_are_ours_or_unknown() {
        for (name, value) in [
            ("linger.ms", "20"),
            ("message.max.bytes", "2000000"),
            ("broker.address.family", "v4"),
            ("socket.nagle.disable", "true"),
            ("client.id", "plant-7"),
        ] {
            assert_eq!(KafkaConfig::check_property(name, value), Ok(()), "{name}");
        }
        for (name, value, told) in [
            ("acks", "1", "all replicas"),
            ("bootstrap.servers", "b:9092", "set brokers"),
            ("sasl.password", "pw", "[sink.sasl]"),
            ("ssl.key.location", "k.pem", "[sink.tls]"),
            ("message.timeout.ms", "1000", "request_timeout"),
            ("plugin.library.paths", "evil.so", "no code"),
            ("linger.sm", "20", "not taken by librdkafka"),
            ("linger.ms", "soon", "not taken by librdkafka"),
        ] {
            let wrong = KafkaConfig::check_property(name, value).expect_err(name);
            assert!(wrong.contains(told), "{name}: {wrong}");
        }
    }
}
