//! How a stored event travels through the local bus: its content, the same for all who get it, and
//! beside it what is each one's own.
//!
//! Invariant: what [`Message::encode_event`] and [`label`] write, [`Envelope::open`] reads; both ends live in one process.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::downlink::Turn;
use super::rows::Message;
use super::subscriptions::Manner;

const LABEL_BYTES: usize = 3 * 8 + 1;
const RETAIN: u8 = 4;

/// An event on its way to one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Whose it is ([`Turn::number`]).
    pub number: u64,
    /// Its place among what was handed out to the connection, in messages.
    pub seq: u64,
    /// Position after it, in bytes.
    pub end: u64,
    /// How the client gets it.
    pub manner: Manner,
    /// The event.
    pub message: Message,
}

/// What is one connection's own.
pub fn label(turn: Turn, manner: &Manner) -> Bytes {
    let mut out = BytesMut::with_capacity(LABEL_BYTES + 4 * manner.ids.len());
    out.put_u64_le(turn.number);
    out.put_u64_le(turn.seq);
    out.put_u64_le(turn.end);
    out.put_u8(manner.qos | if manner.retain { RETAIN } else { 0 });
    for id in &manner.ids {
        out.put_u32_le(*id);
    }
    out.freeze()
}

impl Envelope {
    /// Unpacks; `None` if it is not an envelope.
    pub fn open(mut label: Bytes, body: Bytes) -> Option<Self> {
        let number = label.try_get_u64_le().ok()?;
        let seq = label.try_get_u64_le().ok()?;
        let end = label.try_get_u64_le().ok()?;
        let flags = label.try_get_u8().ok()?;
        let mut ids = Vec::with_capacity(label.len() / 4);
        while let Ok(id) = label.try_get_u32_le() {
            ids.push(id);
        }
        let manner = Manner { qos: flags & 3, retain: flags & RETAIN != 0, ids };
        Some(Self { number, seq, end, manner, message: Message::decode(body)? })
    }
}

#[cfg(test)]
mod tests {
    use storage::{Attribute, Attributes, Event};

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
        let turn = Turn { slot: 9, number: 11, end: 100, seq: 5 };
        for ids in [vec![], vec![1, 0x0FFF_FFFF]] {
            let manner = Manner { qos: 2, retain: true, ids };
            let (label, body) = (label(turn, &manner), Message::encode_event(&event));
            let message = Message::of(&event);
            let whole = Envelope { number: 11, seq: 5, end: 100, manner, message };
            assert_eq!(Envelope::open(label.clone(), body.clone()), Some(whole));
            assert_eq!(Envelope::open(label.slice(..LABEL_BYTES - 1), body.clone()), None);
            assert_eq!(Envelope::open(label, body.slice(..3)), None);
        }
    }
}
