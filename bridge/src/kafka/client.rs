//! librdkafka's client: its settings, and its reports on their way into the [`Ledger`].
//!
//! Owns: which properties are ours.
//! Deliberately absent: what a sink does with a report.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{DeliveryResult, ProducerContext, ThreadedProducer};
use tokio::sync::Notify;

use super::ledger::{Ledger, Ticket};
use crate::config::{KafkaCompression, KafkaConfig};

/// How long a topic may be unknown before that is an answer: brokers that make topics on first use
/// need a moment.
const TOPIC_WAIT_MS: &str = "5000";

pub(super) type Producer = ThreadedProducer<Reports>;

/// What a sink and librdkafka's threads share.
#[derive(Default)]
pub(super) struct Shared {
    ledger: Mutex<Ledger>,
    pub(super) changed: Notify,
}

impl Shared {
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What every client of a sink has.
pub(super) fn client_config(config: &KafkaConfig) -> ClientConfig {
    let mut client = ClientConfig::new();
    client
        .set("bootstrap.servers", &config.brokers)
        .set("client.id", "edge-gateway")
        .set("socket.keepalive.enable", "true");
    client
}

/// What every producer has. `events_max` and `bytes_max` are what it may be given at once.
pub(super) fn producer_config(
    config: &KafkaConfig,
    events_max: usize,
    bytes_max: usize,
) -> ClientConfig {
    let mut client = client_config(config);
    client
        .set("acks", "all")
        .set("partitioner", "murmur2_random")
        .set("compression.type", compression(config.compression))
        .set("topic.metadata.propagation.max.ms", TOPIC_WAIT_MS)
        // Twice what it is given: what was reported is freed a moment later.
        .set("queue.buffering.max.messages", (2 * events_max).to_string())
        .set("queue.buffering.max.kbytes", (2 * bytes_max / 1024).to_string());
    client
}

fn compression(compression: KafkaCompression) -> &'static str {
    match compression {
        KafkaCompression::None => "none",
        KafkaCompression::Gzip => "gzip",
        KafkaCompression::Snappy => "snappy",
        KafkaCompression::Lz4 => "lz4",
        KafkaCompression::Zstd => "zstd",
    }
}

/// What librdkafka's threads report, into the ledger.
pub(super) struct Reports {
    shared: Arc<Shared>,
}

impl Reports {
    pub(super) fn to(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared) }
    }
}

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // What matters comes as an error too; its own log repeats itself without end.
        tracing::debug!(target: "librdkafka", ?level, facility, "{message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if self.shared.ledger().client_error(code(&error), reason) {
            self.shared.changed.notify_one();
        }
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: usize) {
        let result = result.as_ref().map(drop).map_err(|(error, _)| code(error));
        if self.shared.ledger().report(ticket as Ticket, result) {
            self.shared.changed.notify_one();
        }
    }
}

pub(super) fn code(error: &KafkaError) -> RDKafkaErrorCode {
    error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail)
}
