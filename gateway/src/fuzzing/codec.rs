//! The codec seam: any bytes in any pieces.

use bytes::BytesMut;
use rmqtt_codec::types::Publish;
use storage::{Attribute, Attributes};

use super::Input;
use crate::mqtt::codec::{self, Delivery, Packet, Version};
use crate::mqtt::reason;

/// A stream of packets, as the front meets it: in pieces, from somebody who may say anything.
///
/// - Nothing panics, and how the stream is cut makes no difference.
/// - While a packet is not whole, nothing is taken off the buffer, and never are more bytes waited for
///   than a packet may have.
/// - What the server can say too says the same once it is encoded and decoded again.
///
/// The first two bytes choose: version and size limit, and the pieces.
pub fn codec(data: &[u8]) {
    let mut input = Input(data);
    let (choice, pieces) = (input.byte(), input.byte());
    let stream = input.rest();
    let bytes_max = if choice & 2 == 0 { 256 } else { 64 * 1024 };
    let version = if choice & 1 == 0 { Version::V3 } else { Version::V5 };

    let connect = |buf: &mut BytesMut| codec::decode_connect(buf, bytes_max);
    let whole = feed(&[stream], bytes_max, connect);
    assert_eq!(feed(&cut(stream, pieces), bytes_max, connect), whole);

    let packet = |buf: &mut BytesMut| codec::decode(buf, version, bytes_max);
    let whole = feed(&[stream], bytes_max, packet);
    assert_eq!(feed(&cut(stream, pieces), bytes_max, packet), whole);
    for packet in &whole.0 {
        say_again(packet, version);
    }
}

/// Pieces of changing length, the same for the same `choice`; 0: one byte each.
fn cut(stream: &[u8], choice: u8) -> Vec<&[u8]> {
    let (mut rest, mut len) = (stream, 1);
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(len.min(rest.len()));
        pieces.push(piece);
        rest = after;
        len = 1 + (len * 7 + usize::from(choice)) % (1 + usize::from(choice));
    }
    pieces
}

/// All that comes of the pieces, up to the first error.
fn feed<T, E>(
    pieces: &[&[u8]],
    bytes_max: usize,
    decode: impl Fn(&mut BytesMut) -> Result<Option<T>, E>,
) -> (Vec<T>, Option<E>) {
    let (mut buf, mut decoded) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        buf.extend_from_slice(piece);
        loop {
            let before = buf.len();
            match decode(&mut buf) {
                Ok(Some(packet)) => {
                    assert!(buf.len() < before, "a packet of no bytes");
                    decoded.push(packet);
                }
                Ok(None) => {
                    assert_eq!(buf.len(), before, "part of a packet is gone");
                    assert!(before < bytes_max, "more is waited for than a packet may have");
                    break;
                }
                Err(error) => return (decoded, Some(error)),
            }
        }
    }
    (decoded, None)
}

fn say_again(packet: &Packet, version: Version) {
    let mut out = BytesMut::new();
    match packet {
        Packet::PubAck(id) => codec::put_puback(&mut out, version, *id, reason::SUCCESS, ""),
        Packet::PubRec(id, code) => codec::put_pubrec(&mut out, version, *id, *code, ""),
        Packet::PubRel(id) => codec::put_pubrel(&mut out, version, *id, reason::SUCCESS),
        Packet::PubComp(id) => codec::put_pubcomp(&mut out, version, *id, reason::SUCCESS),
        Packet::Publish(publish) => return deliver(publish, version),
        _ => return,
    }
    let again = codec::decode(&mut out, version, usize::MAX).expect("it was valid before");
    assert_eq!(again.as_ref(), Some(packet));
    assert!(out.is_empty());
}

/// What a subscriber gets of a publish is what was published.
fn deliver(publish: &Publish, version: Version) {
    // A topic that an alias stands for is the session's to know.
    if publish.topic.is_empty() {
        return;
    }
    let mut expected = publish.clone();
    let said = expected.properties.get_or_insert_default();
    said.topic_alias = None;
    said.subscription_ids.clear();
    let attributes = Attributes::encode(
        said.content_type
            .as_deref()
            .map(Attribute::ContentType)
            .into_iter()
            .chain(said.is_utf8_payload.then_some(Attribute::Utf8Payload))
            .chain(said.response_topic.as_deref().map(Attribute::ResponseTopic))
            .chain(said.correlation_data.as_deref().map(Attribute::CorrelationData))
            .chain(said.user_properties.iter().map(|(n, v)| Attribute::UserProperty(n, v))),
    );
    let delivery = Delivery {
        topic: &publish.topic,
        payload: &publish.payload,
        attributes: &attributes,
        qos: publish.qos.value(),
        packet_id: publish.packet_id.map(std::num::NonZeroU16::get),
        dup: publish.dup,
        retain: publish.retain,
        expiry_s: said.message_expiry_interval.map(std::num::NonZeroU32::get),
        subscription_ids: &[],
        topic_alias: None,
    };
    let mut out = BytesMut::new();
    assert!(codec::put_publish(&mut out, version, &delivery, usize::MAX));
    let bytes = out.len();
    assert!(!codec::put_publish(&mut BytesMut::new(), version, &delivery, bytes - 1));
    if version == Version::V3 {
        expected.properties = None;
    }
    let again = codec::decode(&mut out, version, bytes).expect("it was valid before");
    assert_eq!(again, Some(Packet::Publish(Box::new(expected))));
    assert!(out.is_empty());
}
