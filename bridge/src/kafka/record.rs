//! How an event becomes a record.
//!
//! - The value is the payload, untouched; the key is the device key, spread as Java's clients do
//!   (`murmur2_random`), so a device stays in one Kafka partition and in order.
//! - Headers are CloudEvents in binary mode, or `id` alone, or none. `partitionkey` and `sequence` are left out: the record's
//!   key is the one, the end of `ce_id` the other, and each header costs CPU.
//! - The record's timestamp is the time of sending, as a topic's retention goes by it; the event's
//!   time is `ce_time`.

use std::io::Write as _;

use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::BaseRecord;
use storage::{Lane, StoredEvent};

use super::client::{Producer, code};
use super::ledger::Ticket;
use crate::cloudevents::{Context, Envelope, clock_extensions, write_time};
use crate::config::{KafkaConfig, KafkaHeaders, KafkaTopic};
use crate::sink::Mark;

/// librdkafka's default of `message.max.bytes`.
const RECORD_BYTES_MAX: usize = 1_000_000;
/// Longest name of a topic.
const TOPIC_BYTES_MAX: usize = 249;

fn record_bytes_max(config: &KafkaConfig) -> usize {
    let set = config.librdkafka.iter().find(|(name, _)| name == "message.max.bytes");
    set.and_then(|(_, value)| value.parse().ok()).unwrap_or(RECORD_BYTES_MAX)
}

/// A name that Kafka takes for a topic: what it does not take becomes `_`, as does a name of nothing
/// or of dots; what is too long is cut.
fn legal(mut topic: String) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if !topic.chars().all(fits) {
        topic = topic.chars().map(|c| if fits(c) { c } else { '_' }).collect();
    }
    topic.truncate(TOPIC_BYTES_MAX);
    if topic.is_empty() || topic == "." || topic == ".." { "_".to_owned() } else { topic }
}

/// What is said of an event that no broker would take.
pub(super) const TOO_LARGE: &str = "the event is larger than message.max.bytes";

/// Hands the events of one sink to librdkafka.
pub(super) struct Recorder {
    topic: KafkaTopic,
    headers: KafkaHeaders,
    envelope: Envelope,
    record_bytes_max: usize,
    /// Header values of one event; kept for its capacity.
    scratch: Vec<u8>,
}

impl Recorder {
    pub(super) fn new(config: &KafkaConfig, envelope: Envelope) -> Self {
        Self {
            topic: config.topic.clone(),
            headers: config.headers,
            envelope,
            record_bytes_max: record_bytes_max(config),
            scratch: Vec::new(),
        }
    }

    /// Whether librdkafka is sure to refuse an event. One that is too large only with its headers
    /// passes here; it is refused when it is sent.
    pub(super) fn is_too_large(&self, stored: &StoredEvent) -> bool {
        let event = &stored.event;
        event.payload.len() + event.device_key.len() > self.record_bytes_max
    }

    /// Hands over one event, which librdkafka copies.
    pub(super) fn send(
        &mut self,
        producer: &Producer,
        stored: &StoredEvent,
        stream: Option<Mark>,
        ticket: Ticket,
    ) -> Result<(), RDKafkaErrorCode> {
        let made;
        let topic = match &self.topic {
            KafkaTopic::Fixed(topic) => topic,
            KafkaTopic::Made(template) => {
                made = legal(template.fill(&stored.event, &self.envelope));
                &made
            }
        };
        let mut record = BaseRecord::with_opaque_to(topic, ticket as usize)
            .key(&stored.event.device_key[..])
            .payload(&stored.event.payload[..]);
        record.headers = match self.headers {
            KafkaHeaders::CloudEvents => {
                Some(headers(&self.envelope, stored, stream, &mut self.scratch))
            }
            KafkaHeaders::Id => {
                self.scratch.clear();
                let _ = write!(self.scratch, "{}", self.envelope.id(stored));
                let id = Header { key: "id", value: Some(&self.scratch) };
                Some(OwnedHeaders::new_with_capacity(1).insert(id))
            }
            KafkaHeaders::None => None,
        };
        producer.send(record).map_err(|(error, _)| code(&error))
    }
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
        None => write_time(scratch, stored.received_us()),
    }
    let (rest, time) = scratch.split_at(source_end);
    let (id, source) = rest.split_at(id_end);
    let mut headers = OwnedHeaders::new_with_capacity(9);
    for (key, value) in [
        ("ce_specversion", &b"1.0"[..]),
        ("ce_id", id),
        ("ce_source", source),
        ("ce_type", envelope.event_type(event).as_bytes()),
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
    for (name, value) in clock_extensions(stored).into_iter().flatten() {
        headers = headers.insert(Header { key: &format!("ce_{name}"), value: Some(&value) });
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_topic_is_one_that_kafka_takes() {
        for (made, name) in [
            ("plant-7.line_2", "plant-7.line_2"),
            ("a/b c/ä", "a_b_c__"),
            ("", "_"),
            (".", "_"),
            ("..", "_"),
            ("...", "..."),
        ] {
            assert_eq!(legal(made.to_owned()), name, "{made:?}");
        }
        assert_eq!(legal("x".repeat(300)).len(), TOPIC_BYTES_MAX);
    }
}
