//! The Kafka sink: librdkafka's producer, several requests in flight.
//!
//! Owns: the producer, and the [`Ledger`] of what was handed to it.
//!
//! - The record is the payload, untouched; its key is the device key, spread as Java's clients do
//!   (`murmur2_random`), so a device stays in one Kafka partition and in order. Its headers are
//!   CloudEvents in binary mode. `partitionkey` and `sequence` are left out: the record's key is the
//!   one, the end of `ce_id` the other, and each header costs CPU. The record's timestamp is the time
//!   of sending, as a topic's retention goes by it; the event's time is `ce_time`.
//! - Idempotent: `enable.gapless.guarantee` ends the producer at the first batch that a broker
//!   refuses, so nothing behind it overtakes. Plain: one request per broker at a time, for the order;
//!   only a batch that the broker itself refuses (not: an event too large, which never leaves) can be
//!   overtaken by the one behind it.
//! - librdkafka never gives up on a message (`message.timeout.ms = 0`: a finite one leaves gaps). The
//!   watchdog does: no sign of life for `request_timeout`, or any error that librdkafka does not mend
//!   itself, and the producer is dropped and everything that it had not delivered is answered for.
//!   The next request makes a new one. Its state is never repaired.
//! - The queue is bounded by the window, well under librdkafka's own bounds, which are therefore
//!   never met.
//!
//! Deliberately absent: transactions, TLS and SASL.

mod ledger;

use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, ProducerContext, ThreadedProducer};
use storage::{Lane, StoredEvent};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use self::ledger::{Ledger, Ticket};
use crate::cloudevents::{Context, Envelope, write_time};
use crate::config::{KafkaCompression, KafkaConfig, KafkaDelivery};
use crate::sink::{Answer, Mark, Request, RequestId, Sink, Window};

const WINDOW: Window = Window { requests_max: 64, events_max: 10_000, bytes_max: 8 * 1024 * 1024 };

/// How long a topic may be unknown before that is an answer: brokers that make topics on first use
/// need a moment.
const TOPIC_WAIT_MS: &str = "5000";

/// Sends requests to Kafka.
pub(crate) struct KafkaSink {
    config: KafkaConfig,
    envelope: Envelope,
    request_timeout: Duration,
    producer: Option<ThreadedProducer<Reports>>,
    /// A producer on its way out, on the blocking pool: its threads take a moment to end.
    closing: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    /// When the ledger was last seen to move, and how far it was.
    alive: (Instant, u64),
    /// Header values of one event; kept for its capacity.
    scratch: Vec<u8>,
}

#[derive(Default)]
struct Shared {
    ledger: Mutex<Ledger>,
    changed: Notify,
}

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KafkaSink {
    pub(crate) fn new(config: KafkaConfig, envelope: Envelope, request_timeout: Duration) -> Self {
        Self {
            config,
            envelope,
            request_timeout,
            producer: None,
            closing: None,
            shared: Arc::default(),
            alive: (Instant::now(), 0),
            scratch: Vec::new(),
        }
    }

    fn connect(&self) -> Result<ThreadedProducer<Reports>, KafkaError> {
        let mut client = ClientConfig::new();
        client
            .set("bootstrap.servers", &self.config.brokers)
            .set("client.id", "edge-gateway")
            .set("acks", "all")
            .set("message.timeout.ms", "0")
            .set("partitioner", "murmur2_random")
            .set("compression.type", self.compression())
            .set("socket.keepalive.enable", "true")
            .set("topic.metadata.propagation.max.ms", TOPIC_WAIT_MS)
            // Twice the window: what was reported is freed a moment later.
            .set("queue.buffering.max.messages", (2 * WINDOW.events_max).to_string())
            .set("queue.buffering.max.kbytes", (2 * WINDOW.bytes_max / 1024).to_string());
        match self.config.delivery {
            KafkaDelivery::Idempotent => {
                client.set("enable.idempotence", "true").set("enable.gapless.guarantee", "true")
            }
            KafkaDelivery::AtLeastOnce => client.set("max.in.flight.requests.per.connection", "1"),
        };
        client.create_with_context(Reports { shared: Arc::clone(&self.shared) })
    }

    fn compression(&self) -> &'static str {
        match self.config.compression {
            KafkaCompression::None => "none",
            KafkaCompression::Gzip => "gzip",
            KafkaCompression::Snappy => "snappy",
            KafkaCompression::Lz4 => "lz4",
            KafkaCompression::Zstd => "zstd",
        }
    }

    /// Hands an event to librdkafka, which copies it.
    fn send(
        &mut self,
        stored: &StoredEvent,
        stream: Option<Mark>,
        ticket: Ticket,
    ) -> Result<(), RDKafkaErrorCode> {
        let headers = headers(&self.envelope, stored, stream, &mut self.scratch);
        let producer = self.producer.as_ref().expect("made before the first event");
        let record = BaseRecord::with_opaque_to(&self.config.topic, ticket as usize)
            .key(&stored.event.device_key[..])
            .payload(&stored.event.payload[..])
            .headers(headers);
        producer.send(record).map_err(|(error, _)| code(&error))
    }

    /// Drops the producer; what it has not delivered is answered for once that is done.
    fn close(&mut self) {
        if let Some(producer) = self.producer.take() {
            self.closing = Some(tokio::task::spawn_blocking(move || drop(producer)));
        }
    }

    /// When the watchdog bites: a request timeout after the last sign of life.
    fn deadline(&mut self) -> Option<Instant> {
        let ledger = self.shared.ledger();
        if ledger.moves() != self.alive.1 || ledger.is_empty() {
            self.alive = (Instant::now(), ledger.moves());
        }
        (!ledger.is_empty()).then(|| self.alive.0 + self.request_timeout)
    }
}

impl Sink for KafkaSink {
    fn window(&self) -> Window {
        WINDOW
    }

    fn begin(&mut self, request: Request) {
        // Before the first event goes: its report may come at once.
        let first = {
            let mut ledger = self.shared.ledger();
            if ledger.is_empty() {
                // The watchdog does not count the idle time before.
                self.alive = (Instant::now(), ledger.moves());
            }
            ledger.admit(request.id, request.events.len())
        };
        if self.shared.ledger().is_broken() {
            return;
        }
        if self.producer.is_none() {
            match self.connect() {
                Ok(producer) => self.producer = Some(producer),
                Err(error) => {
                    let reason = format!("the producer cannot start: {error}; check the settings");
                    self.shared.ledger().hold(reason);
                    self.shared.changed.notify_one();
                    return;
                }
            }
        }
        for (stored, place) in request.events.iter().zip(0..) {
            let ticket = first.wrapping_add(place);
            if let Err(code) = self.send(stored, request.stream, ticket) {
                let mut ledger = self.shared.ledger();
                ledger.refused(ticket, code);
                self.shared.changed.notify_one();
                if ledger.is_broken() {
                    return;
                }
            }
        }
    }

    async fn answer(&mut self) -> (RequestId, Answer) {
        loop {
            if let Some(closing) = &mut self.closing {
                let outcome = closing.await;
                self.closing = None;
                if let Err(error) = outcome {
                    std::panic::resume_unwind(error.into_panic());
                }
            }
            if self.shared.ledger().is_broken() {
                self.close();
                if self.closing.is_some() {
                    continue;
                }
                self.shared.ledger().settle();
            }
            if let Some(answered) = self.shared.ledger().take_answer() {
                return answered;
            }
            match self.deadline() {
                Some(deadline) if deadline <= Instant::now() => {
                    self.shared.ledger().no_sign_of_life(self.request_timeout);
                }
                Some(deadline) => {
                    let changed = self.shared.changed.notified();
                    // Either way the loop looks again.
                    let _ = tokio::time::timeout_at(deadline.into(), changed).await;
                }
                None => self.shared.changed.notified().await,
            }
        }
    }
}

/// What librdkafka's threads report, into the ledger.
struct Reports {
    shared: Arc<Shared>,
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

fn code(error: &KafkaError) -> RDKafkaErrorCode {
    error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail)
}

/// CloudEvents attributes in binary mode (CloudEvents Kafka protocol binding 1.0).
fn headers(
    envelope: &Envelope,
    stored: &StoredEvent,
    stream: Option<Mark>,
    scratch: &mut Vec<u8>,
) -> OwnedHeaders {
    let event = &stored.event;
    let context = Context::of(event);
    scratch.clear();
    let _ = write!(scratch, "{}", envelope.id(stored));
    let id_end = scratch.len();
    envelope.write_source(scratch, event);
    let source_end = scratch.len();
    match context.time {
        Some(time) => scratch.extend_from_slice(time.as_bytes()),
        None => write_time(scratch, event.received_us),
    }
    let (rest, time) = scratch.split_at(source_end);
    let (id, source) = rest.split_at(id_end);
    let mut headers = OwnedHeaders::new_with_capacity(9);
    for (key, value) in [
        ("ce_specversion", &b"1.0"[..]),
        ("ce_id", id),
        ("ce_source", source),
        ("ce_type", envelope.event_type(&context).as_bytes()),
        ("ce_subject", event.topic.as_bytes()),
        ("ce_time", time),
        ("content-type", context.content_type.as_bytes()),
    ] {
        headers = headers.insert(Header { key, value: Some(value) });
    }
    if let Some(traceparent) = context.traceparent {
        headers = headers.insert(Header { key: "ce_traceparent", value: Some(traceparent) });
    }
    if context.lane != Lane::Live {
        headers = headers.insert(Header { key: "ce_lane", value: Some(context.lane.name()) });
    }
    if let Some(stream) = stream {
        headers = headers.insert(Header { key: "ce_stream", value: Some(stream.name()) });
    }
    if context.requeued {
        headers = headers.insert(Header { key: "ce_requeued", value: Some("true") });
    }
    headers
}

#[cfg(test)]
mod tests;
