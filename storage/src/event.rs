//! What the log stores, and what it is called for ever.
//!
//! Owns: [`Event`] (accepted, not yet numbered), [`StoredEvent`] (numbered), [`EventId`].
//! Invariant: payload and topic are kept byte for byte as they arrived.
//! Deliberately absent: how an event is encoded (see `batch`).

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};
use bytestring::ByteString;

use crate::clock::Stamp;

/// One accepted publish, before it has an offset and a sequence number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Hash bucket of the device key, below the store's number of partitions.
    pub partition: u16,
    /// When the gateway received it, in microseconds since the Unix epoch. The store raises it
    /// where needed, so that stored receive times never go backwards; the time itself, where it is
    /// another one, is in [`StoredEvent::stamp`].
    pub received_us: u64,
    /// The identity within which order holds.
    pub device_key: ByteString,
    /// MQTT topic as published.
    pub topic: ByteString,
    /// What else the publish said (content type, user properties, quality of service).
    pub attributes: Attributes,
    /// Payload, untouched.
    pub payload: Bytes,
}

impl Event {
    /// Event bytes as every quota, lag and benchmark counts them: payload + topic + device key
    /// + attributes.
    pub fn size_bytes(&self) -> usize {
        self.payload.len() + self.topic.len() + self.device_key.len() + self.attributes.len()
    }
}

/// An [`Event`] with its place in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredEvent {
    /// Dense position in this gateway's log.
    pub offset: u64,
    /// Dense position in its partition, given at commit.
    pub seq: u64,
    /// The event itself.
    pub event: Event,
    /// When it came; nothing if nobody told the store of a clock.
    pub stamp: Option<Stamp>,
}

impl StoredEvent {
    /// When the gateway received it, as well as that is known, in microseconds since the Unix epoch.
    pub fn received_us(&self) -> u64 {
        self.stamp.map_or(self.event.received_us, |stamp| stamp.received_us)
    }
}

/// The name of an event for ever: gateway, epoch, partition and sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EventId<'a> {
    /// Configured id of the gateway.
    pub gateway: &'a str,
    /// Random id of one store's life.
    pub epoch: u64,
    /// Partition.
    pub partition: u16,
    /// Sequence number within the partition.
    pub seq: u64,
}

impl fmt::Display for EventId<'_> {
    /// `gateway/epoch/partition/seq`, the epoch in 16 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:016x}/{}/{}", self.gateway, self.epoch, self.partition, self.seq)
    }
}

/// One thing a publish said beside topic and payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute<'a> {
    /// MQTT quality of service it was published with: 0, 1 or 2. Absent means 0.
    QoS(u8),
    /// MQTT retain flag was set.
    Retain,
    /// MQTT v5 content type, or the route's: an RFC 2046 media type.
    ContentType(&'a str),
    /// MQTT v5 payload format indicator 1: the payload is UTF-8.
    Utf8Payload,
    /// MQTT v5 response topic.
    ResponseTopic(&'a str),
    /// MQTT v5 correlation data.
    CorrelationData(&'a [u8]),
    /// MQTT v5 message expiry interval in seconds, as received.
    MessageExpiry(u32),
    /// MQTT v5 user property: name and value, in order of arrival, repeats allowed.
    UserProperty(&'a str, &'a str),
    /// CloudEvents type, as the route says. Absent: the sink's.
    EventType(&'a str),
    /// Priority class, as the route says. Absent means [`Lane::Live`].
    Lane(Lane),
    /// The event was a dead letter and is delivered again, outside the order. Never stored: it is put
    /// on the event's way out.
    Requeued,
    /// A tag that this version does not know: kept, passed on, not interpreted.
    Unknown(u8, &'a [u8]),
}

/// Priority class of a route. Order holds per device and lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Before all others.
    Alarm,
    /// What has no lane of its own.
    #[default]
    Live,
    /// What can wait: it gets a bounded share beside live events.
    Backfill,
}

impl Lane {
    /// All of them, the first first.
    pub const ALL: [Self; 3] = [Self::Alarm, Self::Live, Self::Backfill];

    /// As in configurations, and upstream.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alarm => "alarm",
            Self::Live => "live",
            Self::Backfill => "backfill",
        }
    }
}

/// The attributes of an event in their stored form: a run of (tag `u8`, length `u16` little-endian,
/// bytes), so that a later version can add tags and an older store stays readable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Bytes);

const QOS: u8 = 1;
const RETAIN: u8 = 2;
const CONTENT_TYPE: u8 = 3;
const UTF8_PAYLOAD: u8 = 4;
const RESPONSE_TOPIC: u8 = 5;
const CORRELATION_DATA: u8 = 6;
const MESSAGE_EXPIRY: u8 = 7;
const USER_PROPERTY: u8 = 8;
const EVENT_TYPE: u8 = 9;
const LANE: u8 = 10;
const REQUEUED: u8 = 128;

/// Tag and length in front of each value.
const ATTRIBUTE_HEADER_BYTES: usize = 3;

impl Attributes {
    /// Encodes attributes. One that does not fit its 16-bit length is left out: MQTT strings and
    /// binary data are at most 65,535 bytes each, so only a user property whose name and value
    /// together pass that can be.
    pub fn encode<'a>(attributes: impl IntoIterator<Item = Attribute<'a>>) -> Self {
        let mut out = BytesMut::new();
        for attribute in attributes {
            match attribute {
                Attribute::QoS(0) | Attribute::Lane(Lane::Live) => {}
                Attribute::QoS(qos) => put(&mut out, QOS, &[&[qos]]),
                Attribute::Retain => put(&mut out, RETAIN, &[]),
                Attribute::ContentType(v) => put(&mut out, CONTENT_TYPE, &[v.as_bytes()]),
                Attribute::Utf8Payload => put(&mut out, UTF8_PAYLOAD, &[]),
                Attribute::ResponseTopic(v) => put(&mut out, RESPONSE_TOPIC, &[v.as_bytes()]),
                Attribute::CorrelationData(v) => put(&mut out, CORRELATION_DATA, &[v]),
                Attribute::MessageExpiry(v) => put(&mut out, MESSAGE_EXPIRY, &[&v.to_le_bytes()]),
                Attribute::UserProperty(name, value) => {
                    let Ok(name_len) = u16::try_from(name.len()) else {
                        continue;
                    };
                    put(
                        &mut out,
                        USER_PROPERTY,
                        &[&name_len.to_le_bytes(), name.as_bytes(), value.as_bytes()],
                    );
                }
                Attribute::EventType(v) => put(&mut out, EVENT_TYPE, &[v.as_bytes()]),
                Attribute::Lane(lane) => put(&mut out, LANE, &[&[lane as u8]]),
                Attribute::Requeued => put(&mut out, REQUEUED, &[]),
                Attribute::Unknown(tag, v) => put(&mut out, tag, &[v]),
            }
        }
        Self(out.freeze())
    }

    /// These, with one more at the end.
    #[must_use]
    pub fn with(&self, attribute: Attribute<'_>) -> Self {
        Self::from_bytes([&self.0[..], &Self::encode([attribute]).0].concat().into())
    }

    /// Takes bytes that [`Attributes::as_bytes`] gave; malformed ones end the iteration early.
    pub fn from_bytes(bytes: Bytes) -> Self {
        Self(bytes)
    }

    /// The stored form.
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }

    /// Length of the stored form in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The attributes in the order in which they were encoded.
    pub fn iter(&self) -> impl Iterator<Item = Attribute<'_>> {
        let mut rest: &[u8] = &self.0;
        std::iter::from_fn(move || {
            let (header, after) = rest.split_at_checked(ATTRIBUTE_HEADER_BYTES)?;
            let (tag, len) = (header[0], usize::from(u16::from_le_bytes([header[1], header[2]])));
            let (value, after) = after.split_at_checked(len)?;
            rest = after;
            Some(decode(tag, value).unwrap_or(Attribute::Unknown(tag, value)))
        })
    }

    /// MQTT quality of service of the publish: 0, 1 or 2.
    pub fn qos(&self) -> u8 {
        self.iter()
            .find_map(|a| if let Attribute::QoS(q) = a { Some(q) } else { None })
            .unwrap_or(0)
    }

    /// Content type, if the publish or its route named one.
    pub fn content_type(&self) -> Option<&str> {
        self.iter().find_map(|a| if let Attribute::ContentType(v) = a { Some(v) } else { None })
    }

    /// CloudEvents type, if the route named one.
    pub fn event_type(&self) -> Option<&str> {
        self.iter().find_map(|a| if let Attribute::EventType(v) = a { Some(v) } else { None })
    }

    /// The lane.
    pub fn lane(&self) -> Lane {
        self.iter()
            .find_map(|a| if let Attribute::Lane(lane) = a { Some(lane) } else { None })
            .unwrap_or_default()
    }
}

fn put(out: &mut BytesMut, tag: u8, parts: &[&[u8]]) {
    let Ok(len) = u16::try_from(parts.iter().map(|p| p.len()).sum::<usize>()) else {
        return;
    };
    out.put_u8(tag);
    out.put_u16_le(len);
    for part in parts {
        out.put_slice(part);
    }
}

fn decode(tag: u8, value: &[u8]) -> Option<Attribute<'_>> {
    Some(match tag {
        QOS => Attribute::QoS(*value.first()?),
        RETAIN => Attribute::Retain,
        REQUEUED => Attribute::Requeued,
        CONTENT_TYPE => Attribute::ContentType(str::from_utf8(value).ok()?),
        UTF8_PAYLOAD => Attribute::Utf8Payload,
        RESPONSE_TOPIC => Attribute::ResponseTopic(str::from_utf8(value).ok()?),
        CORRELATION_DATA => Attribute::CorrelationData(value),
        MESSAGE_EXPIRY => Attribute::MessageExpiry(u32::from_le_bytes(value.try_into().ok()?)),
        USER_PROPERTY => {
            let (len, rest) = value.split_at_checked(2)?;
            let (name, value) =
                rest.split_at_checked(usize::from(u16::from_le_bytes([len[0], len[1]])))?;
            Attribute::UserProperty(str::from_utf8(name).ok()?, str::from_utf8(value).ok()?)
        }
        EVENT_TYPE => Attribute::EventType(str::from_utf8(value).ok()?),
        LANE => Attribute::Lane(*Lane::ALL.get(usize::from(*value.first()?))?),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_round_trip() {
        let all = [
            Attribute::QoS(1),
            Attribute::Retain,
            Attribute::ContentType("application/json"),
            Attribute::Utf8Payload,
            Attribute::ResponseTopic("answers/here"),
            Attribute::CorrelationData(&[0, 255, 7]),
            Attribute::MessageExpiry(3600),
            Attribute::UserProperty("traceparent", "00-ab-cd-01"),
            Attribute::UserProperty("", ""),
            Attribute::EventType("com.example.reading"),
            Attribute::Lane(Lane::Backfill),
            Attribute::Requeued,
            Attribute::Unknown(200, b"later"),
        ];
        let encoded = Attributes::encode(all.clone());
        assert_eq!(encoded.iter().collect::<Vec<_>>(), all);
        let (last, rest) = all.split_last().expect("not empty");
        assert_eq!(Attributes::encode(rest.iter().cloned()).with(last.clone()), encoded);
        assert_eq!(encoded.qos(), 1);
        assert_eq!(encoded.content_type(), Some("application/json"));
        assert_eq!(encoded.event_type(), Some("com.example.reading"));
        assert_eq!(encoded.lane(), Lane::Backfill);
        let live = Attributes::encode([Attribute::QoS(1), Attribute::Lane(Lane::Live)]);
        assert_eq!(live, Attributes::encode([Attribute::QoS(1)]), "the default takes no byte");
        assert_eq!((live.event_type(), live.lane()), (None, Lane::Live));
    }

    #[test]
    fn a_truncated_attribute_ends_the_iteration() {
        let encoded = Attributes::encode([Attribute::ContentType("text/plain"), Attribute::Retain]);
        for len in 0..encoded.len() {
            let cut = Attributes::from_bytes(encoded.as_bytes().slice(..len));
            assert!(cut.iter().count() < 2);
        }
    }

    #[test]
    fn an_event_id_reads_as_four_parts() {
        let id = EventId { gateway: "edge-01", epoch: 0xab, partition: 3, seq: 42 };
        assert_eq!(id.to_string(), "edge-01/00000000000000ab/3/42");
    }
}
