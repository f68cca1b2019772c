//! librdkafka's client: its settings, and its reports on their way into the [`Ledger`].
//!
//! Owns: which properties are ours.
//! Deliberately absent: what a sink does with a report.

use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rdkafka::ClientContext;
use rdkafka::client::OAuthToken as Token;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{DeliveryResult, ProducerContext, ThreadedProducer};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::ledger::{Ledger, Ticket};
use super::login;
use crate::config::{KafkaCompression, KafkaConfig, KafkaSasl, OAuthToken};
use crate::sink::Failure;

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

/// What every client of a sink has. Blocks: secrets may be in files.
///
/// # Errors
/// A secret cannot be read: one line, with its place.
pub(super) fn client_config(config: &KafkaConfig) -> Result<ClientConfig, String> {
    let mut client = ClientConfig::new();
    client.set("client.id", "edge-gateway").set("socket.keepalive.enable", "true");
    for (name, value) in &config.librdkafka {
        client.set(name, value);
    }
    client.set("bootstrap.servers", &config.brokers);
    login::apply(config, &mut client)?;
    Ok(client)
}

/// What every producer has. `events_max` and `bytes_max` are what it may be given at once.
pub(super) fn producer_config(
    config: &KafkaConfig,
    events_max: usize,
    bytes_max: usize,
) -> Result<ClientConfig, String> {
    let mut client = client_config(config)?;
    if client.get("topic.metadata.propagation.max.ms").is_none() {
        client.set("topic.metadata.propagation.max.ms", TOPIC_WAIT_MS);
    }
    client
        .set("acks", "all")
        .set("partitioner", "murmur2_random")
        .set("compression.type", compression(config.compression))
        // Twice what it is given: what was reported is freed a moment later.
        .set("queue.buffering.max.messages", (2 * events_max).to_string())
        .set("queue.buffering.max.kbytes", (2 * bytes_max / 1024).to_string());
    Ok(client)
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

/// Where tokens come from, if the brokers want any.
pub(super) struct Tokens {
    source: Option<OAuthToken>,
    /// librdkafka asks on threads of its own.
    runtime: Handle,
}

impl Tokens {
    pub(super) fn of(config: &KafkaConfig) -> Self {
        let source = match &config.sasl {
            Some(KafkaSasl::OAuthBearer(token)) => Some(token.clone()),
            _ => None,
        };
        Self { source, runtime: Handle::current() }
    }

    fn next(&self) -> Result<Token, (Failure, String)> {
        let source = self.source.as_ref().expect("only OAUTHBEARER asks for a token");
        login::token(source, SystemTime::now(), &self.runtime)
    }
}

/// A client whose errors nobody waits for: the producer beside it has the same.
pub(super) struct Quiet(pub(super) Tokens);

impl ClientContext for Quiet {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(target: "librdkafka", ?level, facility, "{message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, "{reason}");
    }

    fn generate_oauth_token(&self, _: Option<&str>) -> Result<Token, Box<dyn Error>> {
        self.0.next().map_err(|(_, reason)| reason.into())
    }
}

impl ConsumerContext for Quiet {}

/// What librdkafka's threads report, into the ledger.
pub(super) struct Reports {
    shared: Arc<Shared>,
    tokens: Tokens,
}

impl Reports {
    pub(super) fn to(shared: &Arc<Shared>, tokens: Tokens) -> Self {
        Self { shared: Arc::clone(shared), tokens }
    }
}

impl ClientContext for Reports {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // What matters comes as an error too; its own log repeats itself without end.
        tracing::debug!(target: "librdkafka", ?level, facility, "{message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if self.shared.ledger().client_error(code(&error), reason) {
            self.shared.changed.notify_one();
        }
    }

    fn generate_oauth_token(&self, _: Option<&str>) -> Result<Token, Box<dyn Error>> {
        self.tokens.next().map_err(|(failure, reason)| {
            self.shared.ledger().breaks(failure, reason.clone());
            self.shared.changed.notify_one();
            reason.into()
        })
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
