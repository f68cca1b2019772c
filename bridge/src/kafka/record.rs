//! How an event becomes a record.
//!
//! - The value is the payload, untouched; the key is the device key, spread as Java's clients do
//!   (`murmur2_random`), so a device stays in one Kafka partition and in order.
//! - Headers are CloudEvents in binary mode, or `id` alone, or none. `partitionkey` and `sequence` are
//!   left out: the record's key is the one, the end of `ce_id` the other, and each header costs CPU.
//! - The record's timestamp is the time of sending, as a topic's retention goes by it; the event's
//!   time is `ce_time`.

use std::io::Write as _;

use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::BaseRecord;
use storage::StoredEvent;

use super::client::{Producer, code};
use super::ledger::Ticket;
use crate::cloudevents::{Context, Envelope, Name};
use crate::config::{KafkaConfig, KafkaHeaders, KafkaTopic};
use crate::sink::Mark;

/// librdkafka's default of `message.max.bytes`.
const RECORD_BYTES_MAX: usize = 1_000_000;
/// Headers of most events.
const HEADERS: usize = 7;
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
    /// A header's value; kept for its capacity.
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
    let context = Context::of(&stored.event);
    let mut headers = Some(OwnedHeaders::new_with_capacity(HEADERS));
    let mut insert = |key: &str, value: &str| {
        headers = headers.take().map(|headers| headers.insert(Header { key, value: Some(value) }));
    };
    envelope.for_each_attribute(stored, &context, stream, scratch, |name, value| {
        if name != Name::PARTITION_KEY && name != Name::SEQUENCE {
            insert(name.prefixed(), value);
        }
    });
    insert("content-type", context.content_type);
    headers.expect("put back each time")
}

#[cfg(test)]
mod tests {
    use rdkafka::message::Headers as _;
    use storage::{Attribute, Attributes, Lane, Stamp, TimeQuality};

    use super::*;
    use crate::config::SinkConfig;
    use crate::fake;

    /// The headers of an event whose publish said this, but for those that every event has.
    fn told(
        attributes: &[Attribute<'_>],
        stamp: Option<Stamp>,
        stream: Option<Mark>,
    ) -> Vec<(String, String)> {
        let always = ["ce_specversion", "ce_id", "ce_source", "ce_type", "ce_subject", "ce_time"];
        let mut stored = StoredEvent { stamp, ..fake::stored(42, "dev", "{}") };
        stored.event.attributes = Attributes::encode(attributes.iter().cloned());
        let envelope = Envelope::new(&fake::origin(), SinkConfig::EVENT_TYPE);
        let headers = headers(&envelope, &stored, stream, &mut b"left over".to_vec());
        let text = |value: Option<&[u8]>| String::from_utf8(value.unwrap().to_vec()).unwrap();
        let all: Vec<_> = headers.iter().map(|h| (h.key.to_owned(), text(h.value))).collect();
        let (same, other): (Vec<_>, _) =
            all.into_iter().partition(|(key, _)| always.contains(&&**key));
        assert_eq!(same.len(), always.len(), "{same:?}");
        other
    }

    #[test]
    fn what_an_event_is_beside_the_usual_is_in_its_headers() {
        let stamp = |quality| Stamp { boot: 0xb, uptime_us: 9, received_us: 1, quality };
        let time = "2026-01-02T03:04:05.678+01:00";
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let told = |attributes: &[Attribute<'_>], stamp, stream| {
            let mut told = told(attributes, stamp, stream);
            assert_eq!(told.pop().unwrap().0, "content-type");
            told.into_iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>()
        };
        assert!(told(&[], Some(stamp(TimeQuality::Synchronised)), None).is_empty());
        for (attribute, expected) in [
            (Attribute::Lane(Lane::Alarm), "ce_lane=alarm"),
            (Attribute::Lane(Lane::Backfill), "ce_lane=backfill"),
            (Attribute::Requeued, "ce_requeued=true"),
            (Attribute::UserProperty("time", time), "ce_recordedtime=2023-11-14T22:13:20.000000Z"),
            (Attribute::UserProperty("traceparent", trace), &format!("ce_traceparent={trace}")),
        ] {
            assert_eq!(told(&[attribute], None, None), [expected]);
        }
        for (stream, expected) in [
            (Mark::Live, "ce_stream=live"),
            (Mark::Backfill, "ce_stream=backfill"),
            (Mark::Replay, "ce_stream=replay"),
        ] {
            assert_eq!(told(&[], None, Some(stream)), [expected]);
        }
        let unset = Some(stamp(TimeQuality::Unsynchronised));
        assert_eq!(
            told(&[Attribute::Lane(Lane::Alarm), Attribute::Requeued], unset, Some(Mark::Live)),
            [
                "ce_lane=alarm",
                "ce_stream=live",
                "ce_requeued=true",
                "ce_timequality=unsynchronised",
                "ce_bootid=000000000000000b",
                "ce_uptimemicros=9",
            ]
        );
    }

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
