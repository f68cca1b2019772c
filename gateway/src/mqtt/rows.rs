//! How the front's state lies in the store's projection: namespaces, keys, values. Pure.
//!
//! Owns: every namespace of the projection that the gateway uses, so that no two parts share one.
//! Invariant: what a function here writes, its counterpart reads; a damaged row is `None`, never a
//! panic. Rows of a session begin with its number, which is never given twice in a store's life
//! while a row of it is left.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use bytestring::ByteString;
use storage::{Attributes, Control, Event};

use super::subscriptions::{Manner, Options};

/// QoS 2 receipts: session and packet id.
pub const RECEIPTS: u16 = 1;
/// Sessions: client id.
pub const SESSIONS: u16 = 2;
/// Their subscriptions: session and filter.
pub const SUBSCRIPTIONS: u16 = 3;
/// Messages that wait for a session's client: session and place in the queue.
pub const QUEUES: u16 = 4;
/// Retained messages: topic.
pub const RETAINED: u16 = 5;
/// Wills: client id.
pub const WILLS: u16 = 6;
/// How far the log was served to sessions: one row without a key.
pub const SERVED: u16 = 7;
// 8: ids that were seen, see `ingest::dedup`.

/// Sets a row.
pub fn put(namespace: u16, key: Bytes, value: impl Into<Bytes>) -> Control {
    Control::Put { namespace, key, value: value.into() }
}

/// Removes a row.
pub fn delete(namespace: u16, key: Bytes) -> Control {
    Control::Delete { namespace, key }
}

/// Key of a row of a session.
pub fn session_key(number: u64, rest: &[u8]) -> Bytes {
    [&number.to_be_bytes()[..], rest].concat().into()
}

/// The session's number in a key, and what follows it.
pub fn split_key(key: &Bytes) -> Option<(u64, Bytes)> {
    let number = key.first_chunk::<8>()?;
    Some((u64::from_be_bytes(*number), key.slice(8..)))
}

/// Key of a name: a client id or a topic.
pub fn name_key(name: &str) -> Bytes {
    Bytes::copy_from_slice(name.as_bytes())
}

/// A text from the store.
pub fn text(bytes: &[u8]) -> Option<ByteString> {
    std::str::from_utf8(bytes).ok().map(ByteString::from)
}

/// A session's own row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionRow {
    /// Its number in the keys of its rows.
    pub number: u64,
    /// Seconds that it outlives a connection.
    pub expiry_s: u32,
    /// When its last connection ended, in microseconds since the Unix epoch; 0 while there is one.
    pub ended_us: u64,
    /// The user whose it is; `None`: an anonymous client's.
    pub user: Option<ByteString>,
}

impl SessionRow {
    /// The value.
    pub fn encode(&self) -> Bytes {
        let user = self.user.as_deref();
        let mut out = BytesMut::with_capacity(23 + user.map_or(0, str::len));
        out.put_u64_le(self.number);
        out.put_u32_le(self.expiry_s);
        out.put_u64_le(self.ended_us);
        put_user(&mut out, user);
        out.freeze()
    }

    /// Reads a value.
    pub fn decode(mut row: Bytes) -> Option<Self> {
        Some(Self {
            number: row.try_get_u64_le().ok()?,
            expiry_s: row.try_get_u32_le().ok()?,
            ended_us: row.try_get_u64_le().ok()?,
            user: get_user(&mut row).ok()?,
        })
    }
}

/// A user, or that there is none: a user may have an empty name.
fn put_user(out: &mut BytesMut, user: Option<&str>) {
    out.put_u8(u8::from(user.is_some()));
    let user = user.unwrap_or_default();
    out.put_u16_le(user.len() as u16);
    out.put_slice(user.as_bytes());
}

/// A row is not whole.
struct Damaged;

fn get_user(row: &mut Bytes) -> Result<Option<ByteString>, Damaged> {
    let known = row.try_get_u8().map_err(|_| Damaged)? != 0;
    let len = usize::from(row.try_get_u16_le().map_err(|_| Damaged)?);
    if row.len() < len {
        return Err(Damaged);
    }
    let user = ByteString::try_from(row.split_to(len)).map_err(|_| Damaged)?;
    Ok(known.then_some(user))
}

const NO_LOCAL: u8 = 4;
const RETAIN_AS_PUBLISHED: u8 = 8;

/// Value of a subscription that begins at offset `from`.
pub fn encode_subscription(options: Options, from: u64) -> Bytes {
    let mut flags = options.qos;
    flags |= if options.no_local { NO_LOCAL } else { 0 };
    flags |= if options.retain_as_published { RETAIN_AS_PUBLISHED } else { 0 };
    let mut out = BytesMut::with_capacity(13);
    out.put_u8(flags);
    out.put_u32_le(options.id.unwrap_or(0));
    out.put_u64_le(from);
    out.freeze()
}

/// Reads a subscription, and where it begins.
pub fn decode_subscription(mut row: Bytes) -> Option<(Options, u64)> {
    let flags = row.try_get_u8().ok()?;
    let id = row.try_get_u32_le().ok()?;
    let options = Options {
        qos: (flags & 3).min(2),
        no_local: flags & NO_LOCAL != 0,
        retain_as_published: flags & RETAIN_AS_PUBLISHED != 0,
        id: (id > 0).then_some(id),
    };
    Some((options, row.try_get_u64_le().ok()?))
}

/// A message as subscribers get it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// When the gateway received it, in microseconds since the Unix epoch.
    pub received_us: u64,
    /// Topic.
    pub topic: ByteString,
    /// What else the publisher said.
    pub attributes: Attributes,
    /// Payload.
    pub payload: Bytes,
}

impl Message {
    /// The message that an event is, in a copy of its own: an event keeps a whole read buffer.
    pub fn of(event: &Event) -> Self {
        Self {
            received_us: event.received_us,
            topic: ByteString::from(&*event.topic),
            attributes: Attributes::from_bytes(Bytes::copy_from_slice(event.attributes.as_bytes())),
            payload: Bytes::copy_from_slice(&event.payload),
        }
    }

    /// Bytes that it counts for.
    pub fn size_bytes(&self) -> usize {
        self.topic.len() + self.attributes.len() + self.payload.len()
    }

    /// The value of a row.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(HEAD_BYTES + self.size_bytes());
        self.put(&mut out);
        out.freeze()
    }

    /// As [`Message::encode`] of the message that an event is.
    pub fn encode_event(event: &Event) -> Bytes {
        let size = event.topic.len() + event.attributes.len() + event.payload.len();
        let mut out = BytesMut::with_capacity(HEAD_BYTES + size);
        put_message(&mut out, event.received_us, &event.topic, &event.attributes, &event.payload);
        out.freeze()
    }

    fn put(&self, out: &mut BytesMut) {
        put_message(out, self.received_us, &self.topic, &self.attributes, &self.payload);
    }

    /// Reads a value.
    pub fn decode(mut row: Bytes) -> Option<Self> {
        let received_us = row.try_get_u64_le().ok()?;
        let topic_len = usize::from(row.try_get_u16_le().ok()?);
        let attributes_len = row.try_get_u32_le().ok()? as usize;
        if row.len() < topic_len.checked_add(attributes_len)? {
            return None;
        }
        let topic = ByteString::try_from(row.split_to(topic_len)).ok()?;
        let attributes = Attributes::from_bytes(row.split_to(attributes_len));
        Some(Self { received_us, topic, attributes, payload: row })
    }
}

const HEAD_BYTES: usize = 8 + 2 + 4;

fn put_message(
    out: &mut BytesMut,
    received_us: u64,
    topic: &str,
    attributes: &Attributes,
    payload: &[u8],
) {
    out.put_u64_le(received_us);
    out.put_u16_le(topic.len() as u16);
    out.put_u32_le(attributes.len() as u32);
    out.put_slice(topic.as_bytes());
    out.put_slice(attributes.as_bytes());
    out.put_slice(payload);
}

/// A message in a session's queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queued {
    /// Packet id, its own until the exchange is over.
    pub packet_id: u16,
    /// How to deliver it: with QoS 1 or 2.
    pub manner: Manner,
    /// The message; `None` once the client has it and only waits for the PUBREL.
    pub message: Option<Message>,
}

const RETAIN: u8 = 4;
const HAS_MESSAGE: u8 = 8;
/// More than one subscription identifier.
const MORE_IDS: u8 = 16;

impl Queued {
    /// The value of its row.
    pub fn encode(&self) -> Bytes {
        let Manner { qos, retain, ids } = &self.manner;
        let size = self.message.as_ref().map_or(0, Message::size_bytes);
        let mut out = BytesMut::with_capacity(24 + 4 * ids.len() + size);
        let (id, more) = ids.split_first().map_or((0, &[][..]), |(id, more)| (*id, more));
        let mut flags = *qos;
        flags |= if *retain { RETAIN } else { 0 };
        flags |= if self.message.is_some() { HAS_MESSAGE } else { 0 };
        flags |= if more.is_empty() { 0 } else { MORE_IDS };
        out.put_u16_le(self.packet_id);
        out.put_u8(flags);
        out.put_u32_le(id);
        if !more.is_empty() {
            out.put_u16_le(more.len() as u16);
            for id in more {
                out.put_u32_le(*id);
            }
        }
        if let Some(message) = &self.message {
            message.put(&mut out);
        }
        out.freeze()
    }

    /// Reads a value.
    pub fn decode(mut row: Bytes) -> Option<Self> {
        let packet_id = row.try_get_u16_le().ok()?;
        let flags = row.try_get_u8().ok()?;
        let id = row.try_get_u32_le().ok()?;
        let mut ids: Vec<u32> = (id > 0).then_some(id).into_iter().collect();
        if flags & MORE_IDS != 0 {
            for _ in 0..row.try_get_u16_le().ok()? {
                ids.push(row.try_get_u32_le().ok()?);
            }
        }
        let message = if flags & HAS_MESSAGE != 0 { Some(Message::decode(row)?) } else { None };
        let manner = Manner { qos: flags & 3, retain: flags & RETAIN != 0, ids };
        let whole = packet_id > 0 && (1..=2).contains(&manner.qos);
        whole.then_some(Self { packet_id, manner, message })
    }
}

/// A will that its client has left.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredWill {
    /// The event that it becomes.
    pub event: Event,
    /// Seconds that it waits after the end of the connection.
    pub delay_s: u32,
    /// The user who left it; `None`: an anonymous client.
    pub user: Option<ByteString>,
}

/// Value of a will.
pub fn encode_will(will: &StoredWill) -> Bytes {
    let StoredWill { event, delay_s, user } = will;
    let message = Message::of(event);
    let mut out = BytesMut::with_capacity(32 + event.size_bytes());
    out.put_u32_le(*delay_s);
    put_user(&mut out, user.as_deref());
    out.put_u16_le(event.partition);
    out.put_u16_le(event.device_key.len() as u16);
    out.put_slice(event.device_key.as_bytes());
    message.put(&mut out);
    out.freeze()
}

/// Reads a will.
pub fn decode_will(mut row: Bytes) -> Option<StoredWill> {
    let delay_s = row.try_get_u32_le().ok()?;
    let user = get_user(&mut row).ok()?;
    let partition = row.try_get_u16_le().ok()?;
    let key_len = usize::from(row.try_get_u16_le().ok()?);
    if row.len() < key_len {
        return None;
    }
    let device_key = ByteString::try_from(row.split_to(key_len)).ok()?;
    let Message { received_us, topic, attributes, payload } = Message::decode(row)?;
    let event = Event { partition, received_us, device_key, topic, attributes, payload };
    Some(StoredWill { event, delay_s, user })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use storage::Attribute;

    use super::*;

    fn event() -> Event {
        Event {
            partition: 3,
            received_us: 7,
            device_key: "dev".into(),
            topic: "é/x".into(),
            attributes: Attributes::encode([Attribute::QoS(1), Attribute::Retain]),
            payload: Bytes::from_static(b"\0payload"),
        }
    }

    #[test]
    fn rows_come_out_as_they_went_in() {
        let message = Message::of(&event());
        assert_eq!(Message::decode(message.encode()), Some(message.clone()));
        assert_eq!(Message::encode_event(&event()), message.encode());
        for message in [Some(message), None] {
            for ids in [vec![], vec![7], vec![7, 8, 7]] {
                let manner = Manner { qos: 2, retain: true, ids };
                let queued = Queued { packet_id: 9, manner, message: message.clone() };
                assert_eq!(Queued::decode(queued.encode()), Some(queued));
            }
        }
        for user in [None, Some(""), Some("élise")] {
            let user = user.map(ByteString::from);
            let will = StoredWill { event: event(), delay_s: 5, user: user.clone() };
            assert_eq!(decode_will(encode_will(&will)), Some(will));
            let row = SessionRow { number: 1, expiry_s: 2, ended_us: 3, user };
            assert_eq!(SessionRow::decode(row.encode()), Some(row));
        }
        for qos in 0..3 {
            let options =
                Options { qos, no_local: qos == 1, retain_as_published: qos == 2, id: Some(1) };
            let row = encode_subscription(options, 11);
            assert_eq!(decode_subscription(row), Some((options, 11)));
        }
        let key = session_key(5, b"x");
        assert_eq!(split_key(&key), Some((5, Bytes::from_static(b"x"))));
    }

    proptest! {
        #[test]
        fn a_damaged_row_is_none_and_no_panic(row in prop::collection::vec(any::<u8>(), 0..64)) {
            let row = Bytes::from(row);
            Message::decode(row.clone());
            Queued::decode(row.clone());
            decode_will(row.clone());
            SessionRow::decode(row.clone());
            decode_subscription(row.clone());
            split_key(&row);
        }
    }
}
