//! How a stored event travels through the local bus: the event and its turn, in one buffer.
//!
//! Invariant: what [`encode`] writes, [`Envelope::decode`] reads; both ends live in one process.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use bytestring::ByteString;
use storage::{Attributes, Event, StoredEvent};

use super::rows::Message;
use super::subscriptions::Turn;

const HEAD_BYTES: usize = 5 * 8 + 2 + 4;

/// An event on its way to the subscribers of one filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Which life of which filter it matched ([`Turn::number`]).
    pub number: u64,
    /// Its place among what was published for the filter, in messages.
    pub seq: u64,
    /// Position after it, in bytes.
    pub end: u64,
    /// Its offset in the log.
    pub offset: u64,
    /// The event.
    pub message: Message,
}

/// Bytes that an event takes in an envelope.
pub fn size_bytes(event: &Event) -> u64 {
    (HEAD_BYTES + event.topic.len() + event.attributes.len() + event.payload.len()) as u64
}

/// Packs an event for its turn.
pub fn encode(stored: &StoredEvent, turn: Turn) -> Bytes {
    let event = &stored.event;
    let size = size_bytes(event);
    let mut out = BytesMut::with_capacity(size as usize);
    out.put_u64_le(turn.number);
    out.put_u64_le(turn.seq);
    out.put_u64_le(turn.position + size);
    out.put_u64_le(stored.offset);
    out.put_u64_le(event.received_us);
    out.put_u16_le(event.topic.len() as u16);
    out.put_u32_le(event.attributes.len() as u32);
    out.put_slice(event.topic.as_bytes());
    out.put_slice(event.attributes.as_bytes());
    out.put_slice(&event.payload);
    out.freeze()
}

impl Envelope {
    /// Unpacks; `None` if it is not an envelope.
    pub fn decode(mut bytes: Bytes) -> Option<Self> {
        if bytes.len() < HEAD_BYTES {
            return None;
        }
        let (number, seq, end) = (bytes.get_u64_le(), bytes.get_u64_le(), bytes.get_u64_le());
        let (offset, received_us) = (bytes.get_u64_le(), bytes.get_u64_le());
        let topic_len = usize::from(bytes.get_u16_le());
        let attributes_len = bytes.get_u32_le() as usize;
        if bytes.len() < topic_len + attributes_len {
            return None;
        }
        let topic = ByteString::try_from(bytes.split_to(topic_len)).ok()?;
        let attributes = Attributes::from_bytes(bytes.split_to(attributes_len));
        let message = Message { received_us, topic, attributes, payload: bytes };
        Some(Self { number, seq, end, offset, message })
    }
}

#[cfg(test)]
mod tests {
    use storage::Attribute;

    use super::*;

    #[test]
    fn an_envelope_comes_out_as_it_went_in() {
        let event = Event {
            partition: 3,
            received_us: 7,
            device_key: "dev".into(),
            topic: "é/x".into(),
            attributes: Attributes::encode([Attribute::QoS(1), Attribute::ContentType("a/b")]),
            payload: Bytes::from_static(b"\0payload"),
        };
        let turn = Turn { slot: 9, number: 11, position: 100, seq: 5 };
        let stored = StoredEvent { offset: 13, seq: 0, event: event.clone(), stamp: None };
        let bytes = encode(&stored, turn);
        assert_eq!(bytes.len() as u64, size_bytes(&event));
        let envelope = Envelope::decode(bytes.clone()).unwrap();
        assert_eq!(
            envelope,
            Envelope {
                number: 11,
                seq: 5,
                end: 100 + bytes.len() as u64,
                offset: 13,
                message: Message::of(&event),
            }
        );
        assert_eq!(Envelope::decode(bytes.slice(..HEAD_BYTES)), None);
    }
}
