//! The Kafka sink: librdkafka's producer, several requests in flight.
//!
//! Owns: the producer, and the [`Ledger`](ledger::Ledger) of what was handed to it.
//!
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
//! Deliberately absent: exactly once (`transactional`), how an event becomes a record (`record`),
//! and librdkafka's settings (`client`).

mod client;
mod cursor;
mod ledger;
mod login;
mod record;
mod session;
mod transactional;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;
use tokio::task::JoinHandle;

use self::client::{Producer, Reports, Shared, Tokens, producer_config};
pub(crate) use self::cursor::Place;
use self::record::Recorder;
pub(crate) use self::transactional::TransactionalSink;
use crate::cloudevents::Envelope;
use crate::config::{KafkaConfig, KafkaDelivery};
use crate::sink::{Answer, Request, RequestId, Sink, Window};

/// What librdkafka has at once: what it needs to fill its batches, and to have more at hand while their
/// answers are on the way. An event costs it a kilobyte beside its own bytes.
const WINDOW: Window = Window { requests_max: 64, events_max: 10_000, bytes_max: 4 * 1024 * 1024 };

/// Sends requests to Kafka.
pub(crate) struct KafkaSink {
    config: KafkaConfig,
    recorder: Recorder,
    request_timeout: Duration,
    producer: Option<Producer>,
    /// A producer on its way out, on the blocking pool: its threads take a moment to end.
    closing: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    /// When the ledger was last seen to move, and how far it was.
    alive: (Instant, u64),
}

impl KafkaSink {
    pub(crate) fn new(config: KafkaConfig, envelope: Envelope, request_timeout: Duration) -> Self {
        Self {
            recorder: Recorder::new(&config, envelope),
            config,
            request_timeout,
            producer: None,
            closing: None,
            shared: Arc::default(),
            alive: (Instant::now(), 0),
        }
    }

    fn connect(&self) -> Result<Producer, String> {
        let mut client = producer_config(&self.config, WINDOW.events_max, WINDOW.bytes_max)?;
        client.set("message.timeout.ms", "0");
        match self.config.delivery {
            KafkaDelivery::AtLeastOnce => client.set("max.in.flight.requests.per.connection", "1"),
            KafkaDelivery::Idempotent | KafkaDelivery::ExactlyOnce => {
                client.set("enable.idempotence", "true").set("enable.gapless.guarantee", "true")
            }
        };
        let reports = Reports::to(&self.shared, Tokens::of(&self.config));
        client.create_with_context(reports).map_err(|error| cannot_start(&error))
    }

    /// Drops the producer; what it has not delivered is answered for once that is done.
    fn drop_producer(&mut self) {
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

fn cannot_start(error: &KafkaError) -> String {
    format!("the producer cannot start: {error}; check the settings")
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
            ledger.admit(request.id, request.events.len(), request.size_bytes())
        };
        if self.shared.ledger().is_broken() {
            return;
        }
        if self.producer.is_none() {
            match self.connect() {
                Ok(producer) => self.producer = Some(producer),
                Err(reason) => {
                    self.shared.ledger().hold(reason);
                    self.shared.changed.notify_one();
                    return;
                }
            }
        }
        for (stored, place) in request.events.iter().zip(0..) {
            let ticket = first.wrapping_add(place);
            let producer = self.producer.as_ref().expect("made before the first event");
            if let Err(code) = self.recorder.send(producer, stored, request.stream, ticket) {
                let mut ledger = self.shared.ledger();
                ledger.refused(ticket, code);
                self.shared.changed.notify_one();
                if ledger.is_broken() {
                    return;
                }
            }
        }
    }

    fn stop(&mut self) {
        if self.shared.ledger().hurry() {
            self.shared.changed.notify_one();
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
                self.drop_producer();
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

#[cfg(test)]
mod tests;
