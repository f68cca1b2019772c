//! The seam over the MQTT codec: bytes in, packets out, and back.
//!
//! Owns: framing, every rule of the specification that the codec crate leaves out, and the encoding
//! of what the server sends. MQTT 3.1 and 3.1.1 packets are lifted into their MQTT 5 form, so that
//! the session knows one set of packets.
//! Invariant: the codec crate sees whole frames only, within the size limit, of packet types that a
//! client may send; memory grows with the bytes received, never with the length announced.
//! Deliberately absent: state beyond the protocol version.

use bytes::{Buf, BufMut, BytesMut};
use bytestring::ByteString;
use rmqtt_codec::types::{MQTT_LEVEL_5, MQTT_LEVEL_31, MQTT_LEVEL_311, Publish};
use rmqtt_codec::{v3, v5};
use storage::{Attribute, Attributes};
use tokio_util::codec::Decoder as _;

use super::reason::{self, Violation};
use super::topic;

mod properties;

/// Largest CONNECT taken, in bytes: who has not been let in gets less memory than who has.
pub const CONNECT_BYTES_MAX: usize = 64 * 1024;

/// First byte of a fixed header (MQTT 5, 2.1.2).
mod header {
    pub(super) const CONNECT: u8 = 0x10;
    pub(super) const CONNACK: u8 = 0x20;
    pub(super) const PUBLISH: u8 = 0x30;
    pub(super) const PUBACK: u8 = 0x40;
    pub(super) const PUBREC: u8 = 0x50;
    pub(super) const PUBREL: u8 = 0x62;
    pub(super) const PUBCOMP: u8 = 0x70;
    pub(super) const SUBSCRIBE: u8 = 0x82;
    pub(super) const SUBACK: u8 = 0x90;
    pub(super) const UNSUBSCRIBE: u8 = 0xA2;
    pub(super) const UNSUBACK: u8 = 0xB0;
    pub(super) const PINGREQ: u8 = 0xC0;
    pub(super) const PINGRESP: u8 = 0xD0;
    pub(super) const DISCONNECT: u8 = 0xE0;
    pub(super) const AUTH: u8 = 0xF0;
}

// Properties (MQTT 5, 2.2.2.2) that the server writes.
const UTF8_PAYLOAD: u8 = 0x01;
const MESSAGE_EXPIRY: u8 = 0x02;
const CONTENT_TYPE: u8 = 0x03;
const RESPONSE_TOPIC: u8 = 0x08;
const CORRELATION_DATA: u8 = 0x09;
const SUBSCRIPTION_ID: u8 = 0x0B;
const SESSION_EXPIRY: u8 = 0x11;
const ASSIGNED_CLIENT_ID: u8 = 0x12;
const SERVER_KEEP_ALIVE: u8 = 0x13;
const REASON_STRING: u8 = 0x1F;
const RECEIVE_MAX: u8 = 0x21;
const TOPIC_ALIAS_MAX: u8 = 0x22;
const TOPIC_ALIAS: u8 = 0x23;
const USER_PROPERTY: u8 = 0x26;
const MAX_PACKET_SIZE: u8 = 0x27;

/// Protocol version of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// MQTT 3.1 or 3.1.1.
    V3,
    /// MQTT 5.
    V5,
}

/// The first packet of a connection.
#[derive(Debug, PartialEq, Eq)]
pub struct Connect {
    /// Version asked for.
    pub version: Version,
    /// Whether that is 3.1, whose CONNACK says nothing of a session.
    pub is_v31: bool,
    /// The packet, lifted where it was 3.1 or 3.1.1.
    pub packet: Box<v5::Connect>,
}

/// Any later packet that a client may send.
#[derive(Debug, PartialEq, Eq)]
pub enum Packet {
    /// PUBLISH. In v3, `properties` is `None`.
    Publish(Box<Publish>),
    /// PUBACK.
    PubAck(u16),
    /// PUBREC, and its reason code.
    PubRec(u16, u8),
    /// PUBREL.
    PubRel(u16),
    /// PUBCOMP.
    PubComp(u16),
    /// SUBSCRIBE.
    Subscribe(v5::Subscribe),
    /// UNSUBSCRIBE.
    Unsubscribe(v5::Unsubscribe),
    /// PINGREQ.
    PingReq,
    /// DISCONNECT.
    Disconnect(v5::Disconnect),
    /// AUTH.
    Auth,
}

/// Why no session came of a CONNECT, and in which version to say so.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// Version to answer in; `None` if it is not MQTT, or too broken for an answer.
    pub version: Option<Version>,
    /// Largest answer that the client takes, in bytes.
    pub bytes_max: usize,
    /// Reason.
    pub violation: Violation,
}

impl From<Violation> for Refused {
    fn from(violation: Violation) -> Self {
        Self { version: None, bytes_max: 0, violation }
    }
}

/// A frame's first byte, and where its content lies.
#[derive(Clone, Copy)]
struct Frame {
    first: u8,
    content: usize,
    end: usize,
}

/// Reads a fixed header. `None` until the whole frame is in `buf`.
fn frame(
    buf: &[u8],
    version: Option<Version>,
    bytes_max: usize,
) -> Result<Option<Frame>, Violation> {
    let Some(&first) = buf.first() else {
        return Ok(None);
    };
    check_first_byte(first, version)?;
    let mut remaining = 0;
    for (i, &byte) in buf[1..].iter().take(4).enumerate() {
        remaining |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            // [MQTT-1.5.5-1]; 3.1.1 has no such rule.
            if byte == 0 && i > 0 && version != Some(Version::V3) {
                return Err(Violation::malformed("remaining length not in its shortest form"));
            }
            let content = 2 + i;
            let end = content + remaining;
            if end > bytes_max {
                return Err(Violation::new(reason::PACKET_TOO_LARGE, "packet too large"));
            }
            return Ok((buf.len() >= end).then_some(Frame { first, content, end }));
        }
        if i == 3 {
            return Err(Violation::malformed("remaining length of more than four bytes"));
        }
    }
    Ok(None)
}

/// Packet types and flags that a client may send at this point, from the first byte alone: nothing
/// more is read of what breaks this.
fn check_first_byte(first: u8, version: Option<Version>) -> Result<(), Violation> {
    let Some(version) = version else {
        // Its flags are checked once it is known that they are not those of 3.1.
        return if first & 0xF0 == header::CONNECT {
            Ok(())
        } else {
            // [MQTT-3.1.0-1]
            Err(Violation::protocol("the first packet is not CONNECT"))
        };
    };
    match first {
        0x36 | 0x37 | 0x3E | 0x3F => Err(Violation::malformed("QoS 3")),
        // [MQTT-3.3.1-2]
        0x38 | 0x39 => Err(Violation::malformed("DUP set on QoS 0")),
        0x30..=0x3F
        | header::PUBACK
        | header::PUBREC
        | header::PUBREL
        | header::PUBCOMP
        | header::SUBSCRIBE
        | header::UNSUBSCRIBE
        | header::PINGREQ
        | header::DISCONNECT => Ok(()),
        header::AUTH if version == Version::V5 => Ok(()),
        // [MQTT-3.1.0-2]
        header::CONNECT => Err(Violation::protocol("a second CONNECT")),
        header::CONNACK | header::SUBACK | header::UNSUBACK | header::PINGRESP => {
            Err(Violation::protocol("a packet that only a server may send"))
        }
        // [MQTT-2.1.3-1]
        _ => Err(Violation::malformed("unknown packet type or reserved flags")),
    }
}

/// Takes the CONNECT off the front of `buf`; `None` until it is whole.
///
/// # Errors
/// [`Refused`] for anything but a well-formed CONNECT of a known version.
pub fn decode_connect(buf: &mut BytesMut, bytes_max: usize) -> Result<Option<Connect>, Refused> {
    let Some(frame) = frame(buf, None, bytes_max.min(CONNECT_BYTES_MAX))? else {
        return Ok(None);
    };
    let (version, level, flags_at) = protocol_version(&buf[frame.content..frame.end])?;
    let refused = |violation| Refused { version: Some(version), bytes_max: usize::MAX, violation };

    let flags_at = frame.content + flags_at;
    if flags_at + 3 > frame.end {
        return Err(refused(Violation::malformed("CONNECT ends before its payload")));
    }
    let is_v31 = level == MQTT_LEVEL_31;
    if is_v31 {
        // It says of these bits that they are not used, and nothing of who sets them.
        buf[0] = header::CONNECT;
        buf[flags_at] &= !RESERVED;
    }
    if buf[0] != header::CONNECT {
        // [MQTT-2.1.3-1]
        return Err(Violation::malformed("reserved flags set in CONNECT").into());
    }
    let flags = buf[flags_at];
    check_connect_flags(flags, version).map_err(refused)?;
    let fields = &buf[flags_at + 3..frame.end];
    if connect_fields_len(fields, flags, version) != Some(fields.len()) {
        return Err(refused(Violation::malformed("CONNECT does not end with its last field")));
    }
    if flags & WILL != 0 && version == Version::V5 {
        properties::raise_expiry(&mut buf[flags_at + 3..frame.end], properties::Place::Will);
    }
    // The codec takes an empty client id only together with this flag; the session decides that.
    buf[flags_at] |= CLEAN_START;

    let mut packet = match version {
        Version::V3 => match v3::Codec::default().decode(buf) {
            Ok(Some((v3::Packet::Connect(connect), _))) => lift_connect(*connect),
            other => return Err(refused(undecodable(other.err()))),
        },
        Version::V5 => match v5::Codec::default().decode(buf) {
            Ok(Some((v5::Packet::Connect(connect), _))) => connect,
            other => return Err(refused(undecodable(other.err()))),
        },
    };
    packet.clean_start = flags & CLEAN_START != 0;
    check_connect(&packet).map_err(refused)?;
    if is_v31 && packet.client_id.is_empty() {
        // Only later versions let the server choose.
        let why = "an empty client id in MQTT 3.1";
        return Err(refused(Violation::new(reason::CLIENT_ID_NOT_VALID, why)));
    }
    Ok(Some(Connect { version, is_v31, packet }))
}

const RESERVED: u8 = 0x01;
const CLEAN_START: u8 = 0x02;
const WILL: u8 = 0x04;
const WILL_QOS_AND_RETAIN: u8 = 0x38;
const PASSWORD: u8 = 0x40;
const USER_NAME: u8 = 0x80;

/// Version, its level, and where the connect flags are, from a CONNECT's variable header.
fn protocol_version(content: &[u8]) -> Result<(Version, u8, usize), Refused> {
    let (name, level) = match content {
        [0, 4, rest @ ..] if rest.len() > 4 => (&content[2..6], content[6]),
        [0, 6, rest @ ..] if rest.len() > 6 => (&content[2..8], content[8]),
        _ => return Err(Violation::malformed("not an MQTT CONNECT").into()),
    };
    let flags_at = 2 + name.len() + 1;
    match (name, level) {
        (b"MQIsdp", MQTT_LEVEL_31) | (b"MQTT", MQTT_LEVEL_311) => {
            Ok((Version::V3, level, flags_at))
        }
        (b"MQTT", MQTT_LEVEL_5) => Ok((Version::V5, level, flags_at)),
        // [MQTT-3.1.2-2] of 3.1.1 wants the refusal in its own CONNACK; later versions know it.
        (b"MQTT" | b"MQIsdp", _) => Err(Refused {
            version: Some(Version::V3),
            bytes_max: usize::MAX,
            violation: Violation::new(reason::UNSUPPORTED_VERSION, "unknown protocol level"),
        }),
        _ => Err(Violation::malformed("not an MQTT CONNECT").into()),
    }
}

fn check_connect_flags(flags: u8, version: Version) -> Result<(), Violation> {
    if flags & RESERVED != 0 {
        // [MQTT-3.1.2-3]
        return Err(Violation::malformed("reserved CONNECT flag set"));
    }
    if flags & WILL == 0 && flags & WILL_QOS_AND_RETAIN != 0 {
        // [MQTT-3.1.2-11], [MQTT-3.1.2-13]
        return Err(Violation::malformed("will QoS or will retain without a will"));
    }
    if version == Version::V3 && flags & PASSWORD != 0 && flags & USER_NAME == 0 {
        // [MQTT-3.1.2-22] of 3.1.1
        return Err(Violation::malformed("password without user name"));
    }
    Ok(())
}

/// Length of what follows the keep-alive [MQTT-3.1.3-1]: the codec ignores bytes after the last field.
fn connect_fields_len(content: &[u8], flags: u8, version: Version) -> Option<usize> {
    let mut rest = content;
    let properties = |rest: &mut &[u8]| match version {
        Version::V3 => Some(()),
        Version::V5 => skip_properties(rest),
    };
    properties(&mut rest)?;
    skip_field(&mut rest)?;
    if flags & WILL != 0 {
        properties(&mut rest)?;
        skip_field(&mut rest)?;
        skip_field(&mut rest)?;
    }
    for flag in [USER_NAME, PASSWORD] {
        if flags & flag != 0 {
            skip_field(&mut rest)?;
        }
    }
    Some(content.len() - rest.len())
}

/// Steps over a string or binary field with its two bytes of length.
fn skip_field(rest: &mut &[u8]) -> Option<()> {
    let (len, after) = rest.split_first_chunk::<2>()?;
    *rest = after.get(usize::from(u16::from_be_bytes(*len))..)?;
    Some(())
}

/// Steps over a property list with its variable length.
fn skip_properties(rest: &mut &[u8]) -> Option<()> {
    let mut len = 0;
    for i in 0..4 {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        len |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            *rest = rest.get(len..)?;
            return Some(());
        }
    }
    None
}

fn lift_connect(connect: v3::Connect) -> Box<v5::Connect> {
    Box::new(v5::Connect {
        keep_alive: connect.keep_alive,
        client_id: connect.client_id,
        username: connect.username,
        password: connect.password,
        last_will: connect.last_will.map(|will| v5::LastWill {
            qos: will.qos,
            retain: will.retain,
            topic: will.topic,
            message: will.message,
            will_delay_interval_sec: None,
            correlation_data: None,
            message_expiry_interval: None,
            content_type: None,
            user_properties: Vec::new(),
            is_utf8_payload: None,
            response_topic: None,
        }),
        ..v5::Connect::default()
    })
}

fn check_connect(connect: &v5::Connect) -> Result<(), Violation> {
    let text = [Some(&connect.client_id), connect.username.as_ref(), connect.auth_method.as_ref()];
    check_text(text.into_iter().flatten())?;
    check_user_properties(&connect.user_properties)?;
    for name in [Some(&connect.client_id), connect.username.as_ref()].into_iter().flatten() {
        check_name(name)?;
    }
    if connect.auth_data.is_some() && connect.auth_method.is_none() {
        return Err(Violation::protocol("authentication data without a method"));
    }
    if let Some(will) = &connect.last_will {
        check_text(will.content_type.iter())?;
        check_user_properties(&will.user_properties)?;
        check_topic(&will.topic)?;
        if let Some(response_topic) = &will.response_topic {
            check_topic(response_topic)?;
        }
    }
    Ok(())
}

/// Takes the next packet off the front of `buf`; `None` until it is whole.
///
/// # Errors
/// A [`Violation`] of the protocol: nothing after it can be read.
pub fn decode(
    buf: &mut BytesMut,
    version: Version,
    bytes_max: usize,
) -> Result<Option<Packet>, Violation> {
    let Some(frame) = frame(buf, Some(version), bytes_max)? else {
        return Ok(None);
    };
    let content = frame.content..frame.end;
    match frame.first {
        header::PINGREQ | header::DISCONNECT if content.is_empty() => {
            buf.advance(frame.end);
            return Ok(Some(match frame.first {
                header::PINGREQ => Packet::PingReq,
                _ => Packet::Disconnect(v5::Disconnect::default()),
            }));
        }
        header::PINGREQ => return Err(Violation::malformed("PINGREQ with content")),
        header::DISCONNECT if version == Version::V3 => {
            return Err(Violation::malformed("DISCONNECT with content"));
        }
        header::SUBSCRIBE if version == Version::V3 => check_subscribe_v3(&buf[content])?,
        first if first & 0xF0 == header::PUBLISH && version == Version::V5 => {
            properties::raise_expiry(&mut buf[content], properties::Place::Publish { first });
        }
        _ => {}
    }
    let packet = match version {
        Version::V3 => match v3::Codec::default().decode(buf) {
            Ok(Some((packet, _))) => lift(packet)?,
            other => return Err(undecodable(other.err())),
        },
        Version::V5 => match v5::Codec::default().decode(buf) {
            Ok(Some((packet, _))) => narrow(packet)?,
            other => return Err(undecodable(other.err())),
        },
    };
    check(&packet)?;
    Ok(Some(packet))
}

/// The codec's error; or its silence about a frame that is whole.
fn undecodable(error: Option<rmqtt_codec::error::DecodeError>) -> Violation {
    use rmqtt_codec::error::DecodeError as E;
    let code = match error {
        Some(E::InvalidTopicFilter) => reason::PROTOCOL_ERROR,
        Some(E::InvalidTopicName) => reason::TOPIC_INVALID,
        Some(E::UnsupportedProtocolLevel) => reason::UNSUPPORTED_VERSION,
        _ => reason::MALFORMED,
    };
    let why = error.map_or("packet ends early".into(), |e| e.to_string());
    Violation { code, why: why.into() }
}

fn lift(packet: v3::Packet) -> Result<Packet, Violation> {
    Ok(match packet {
        v3::Packet::Publish(publish) => Packet::Publish(publish),
        v3::Packet::PublishAck { packet_id } => Packet::PubAck(packet_id.get()),
        v3::Packet::PublishReceived { packet_id } => {
            Packet::PubRec(packet_id.get(), reason::SUCCESS)
        }
        v3::Packet::PublishRelease { packet_id } => Packet::PubRel(packet_id.get()),
        v3::Packet::PublishComplete { packet_id } => Packet::PubComp(packet_id.get()),
        v3::Packet::Subscribe { packet_id, topic_filters } => Packet::Subscribe(v5::Subscribe {
            packet_id,
            id: None,
            user_properties: Vec::new(),
            topic_filters: topic_filters
                .into_iter()
                .map(|(filter, qos)| {
                    (filter, v5::SubscriptionOptions { qos, ..Default::default() })
                })
                .collect(),
        }),
        v3::Packet::Unsubscribe { packet_id, topic_filters } => {
            Packet::Unsubscribe(v5::Unsubscribe {
                packet_id,
                user_properties: Vec::new(),
                topic_filters,
            })
        }
        v3::Packet::PingRequest => Packet::PingReq,
        v3::Packet::Disconnect => Packet::Disconnect(v5::Disconnect::default()),
        v3::Packet::Connect(_)
        | v3::Packet::ConnectAck(_)
        | v3::Packet::SubscribeAck { .. }
        | v3::Packet::UnsubscribeAck { .. }
        | v3::Packet::PingResponse => return Err(Violation::protocol("unexpected packet")),
    })
}

fn narrow(packet: v5::Packet) -> Result<Packet, Violation> {
    Ok(match packet {
        v5::Packet::Publish(mut publish) => {
            // [MQTT-3.3.4-6] binds the client, and names no reason code for one that breaks it: an
            // identifier is read by nobody. More than one is only ever the answer to subscriptions.
            if let Some(properties) = &mut publish.properties {
                if properties.subscription_ids.len() > 1 {
                    let why = "several subscription identifiers in a client's PUBLISH";
                    return Err(Violation::protocol(why));
                }
                properties.subscription_ids.clear();
            }
            Packet::Publish(publish)
        }
        v5::Packet::PublishAck(ack) => Packet::PubAck(ack.packet_id.get()),
        v5::Packet::PublishReceived(ack) => {
            Packet::PubRec(ack.packet_id.get(), ack.reason_code.into())
        }
        v5::Packet::PublishRelease(ack) => Packet::PubRel(ack.packet_id.get()),
        v5::Packet::PublishComplete(ack) => Packet::PubComp(ack.packet_id.get()),
        v5::Packet::Subscribe(subscribe) => Packet::Subscribe(subscribe),
        v5::Packet::Unsubscribe(unsubscribe) => Packet::Unsubscribe(unsubscribe),
        v5::Packet::PingRequest => Packet::PingReq,
        v5::Packet::Disconnect(disconnect) => Packet::Disconnect(disconnect),
        v5::Packet::Auth(_) => Packet::Auth,
        v5::Packet::Connect(_)
        | v5::Packet::ConnectAck(_)
        | v5::Packet::SubscribeAck(_)
        | v5::Packet::UnsubscribeAck(_)
        | v5::Packet::PingResponse => return Err(Violation::protocol("unexpected packet")),
    })
}

/// Reserved bits of the requested QoS [MQTT-3.8.3-4 of 3.1.1]: the codec masks them away.
fn check_subscribe_v3(content: &[u8]) -> Result<(), Violation> {
    let mut rest = content.get(2..).unwrap_or_default();
    while !rest.is_empty() {
        match skip_field(&mut rest).and_then(|()| rest.split_off_first()) {
            Some(0..=2) => {}
            Some(_) => return Err(Violation::malformed("reserved bits in a SUBSCRIBE")),
            None => return Err(Violation::malformed("packet ends early")),
        }
    }
    Ok(())
}

fn check(packet: &Packet) -> Result<(), Violation> {
    match packet {
        Packet::Publish(publish) => check_publish(publish),
        Packet::Subscribe(subscribe) => {
            check_user_properties(&subscribe.user_properties)?;
            check_filters(subscribe.topic_filters.iter().map(|(filter, _)| filter))
        }
        Packet::Unsubscribe(unsubscribe) => {
            check_user_properties(&unsubscribe.user_properties)?;
            check_filters(unsubscribe.topic_filters.iter())
        }
        Packet::Disconnect(disconnect) => {
            check_text(disconnect.reason_string.iter())?;
            check_user_properties(&disconnect.user_properties)?;
            if disconnect.server_reference.is_some() {
                return Err(Violation::protocol("a server reference from a client"));
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn check_publish(publish: &Publish) -> Result<(), Violation> {
    let Some(properties) = &publish.properties else {
        return check_topic(&publish.topic);
    };
    if let Some(response_topic) = &properties.response_topic {
        // [MQTT-3.3.2-14]
        check_topic(response_topic)?;
    }
    check_text(properties.content_type.iter())?;
    check_user_properties(&properties.user_properties)?;
    if publish.topic.is_empty() && properties.topic_alias.is_some() {
        return Ok(());
    }
    check_topic(&publish.topic)
}

fn check_topic(name: &str) -> Result<(), Violation> {
    if topic::is_valid_name(name) {
        check_name(name)
    } else if name.is_empty() {
        Err(Violation::protocol("an empty topic name"))
    } else if name.contains('\0') {
        Err(Violation::malformed("U+0000 in a topic name"))
    } else {
        Err(Violation::new(reason::TOPIC_INVALID, "a wildcard in a topic name"))
    }
}

fn check_filters<'a>(filters: impl Iterator<Item = &'a ByteString>) -> Result<(), Violation> {
    for filter in filters {
        if filter.is_empty() {
            return Err(Violation::malformed("an empty topic filter"));
        }
        check_text([filter])?;
        check_name(filter)?;
        if !topic::is_valid_filter(filter) {
            return Err(Violation::new(reason::FILTER_INVALID, "an invalid topic filter"));
        }
    }
    Ok(())
}

/// What names somebody or something goes into logs, files and the keys of upstreams. So of what a
/// server may refuse there (MQTT 5, 1.5.4) it refuses all: control characters and non-characters.
fn check_name(name: &str) -> Result<(), Violation> {
    let refused = |c: char| {
        c.is_control()
            || matches!(c, '\u{FDD0}'..='\u{FDEF}')
            || matches!(u32::from(c) & 0xFFFF, 0xFFFE | 0xFFFF)
    };
    if name.bytes().all(|b| (b' '..=b'~').contains(&b)) || !name.contains(refused) {
        Ok(())
    } else {
        Err(Violation::malformed("a control character or non-character in a name"))
    }
}

/// [MQTT-1.5.4-2]: no U+0000 in any string.
fn check_text<'a>(text: impl IntoIterator<Item = &'a ByteString>) -> Result<(), Violation> {
    if text.into_iter().any(|text| text.contains('\0')) {
        return Err(Violation::malformed("U+0000 in a string"));
    }
    Ok(())
}

fn check_user_properties(properties: &[(ByteString, ByteString)]) -> Result<(), Violation> {
    check_text(properties.iter().flat_map(|(name, value)| [name, value]))
}

/// What CONNACK tells a client that was let in.
#[derive(Debug)]
pub struct Welcome {
    /// Whether there is a session from before.
    pub session_present: bool,
    /// The client id that the server chose, if it did.
    pub assigned_client_id: Option<ByteString>,
    /// Seconds that the session outlives the connection, where that is not what was asked for.
    pub session_expiry_s: Option<u32>,
    /// Keep-alive in seconds that the client has to use instead of its own.
    pub keep_alive_s: Option<u16>,
    /// QoS 1 and 2 publishes that the client may have under way.
    pub receive_max: std::num::NonZeroU16,
    /// Largest packet taken, in bytes.
    pub packet_bytes_max: u32,
    /// Topic aliases that the client may use.
    pub topic_alias_max: u16,
}

/// CONNACK with success. What is not said is available: QoS 2, retain, wildcards, identifiers, shared
/// subscriptions.
pub fn put_welcome(out: &mut BytesMut, version: Version, welcome: &Welcome) {
    let flags = u8::from(welcome.session_present);
    match version {
        Version::V3 => out.put_slice(&[header::CONNACK, 2, flags, reason::SUCCESS]),
        Version::V5 => {
            let mut list = BytesMut::with_capacity(64);
            if let Some(seconds) = welcome.session_expiry_s {
                list.put_u8(SESSION_EXPIRY);
                list.put_u32(seconds);
            }
            list.put_u8(RECEIVE_MAX);
            list.put_u16(welcome.receive_max.get());
            list.put_u8(MAX_PACKET_SIZE);
            list.put_u32(welcome.packet_bytes_max);
            list.put_u8(TOPIC_ALIAS_MAX);
            list.put_u16(welcome.topic_alias_max);
            if let Some(seconds) = welcome.keep_alive_s {
                list.put_u8(SERVER_KEEP_ALIVE);
                list.put_u16(seconds);
            }
            if let Some(client_id) = &welcome.assigned_client_id {
                list.put_u8(ASSIGNED_CLIENT_ID);
                put_field(&mut list, client_id.as_bytes());
            }
            put_head(out, header::CONNACK, 2 + variable_len(list.len()) + list.len());
            out.put_slice(&[flags, reason::SUCCESS]);
            put_variable(out, list.len());
            out.put_slice(&list);
        }
    }
}

/// Bytes of the CONNACK that [`put_welcome`] appends.
pub fn welcome_len(version: Version, welcome: &Welcome) -> usize {
    let mut out = BytesMut::new();
    put_welcome(&mut out, version, welcome);
    out.len()
}

/// CONNACK with a refusal; nothing where the version has no code for it, or where the client takes
/// at most `bytes_max` bytes and it has more [MQTT-3.1.2-24].
pub fn put_refusal(out: &mut BytesMut, version: Version, violation: &Violation, bytes_max: usize) {
    match version {
        Version::V3 => {
            if let Some(code) = reason::connack_v3(violation.code) {
                out.put_slice(&[header::CONNACK, 2, 0, code]);
            }
        }
        Version::V5 => {
            let reason = reason_string(&violation.why);
            if 5 + reason.len() <= bytes_max {
                put_head(out, header::CONNACK, 3 + reason.len());
                out.put_slice(&[0, violation.code, reason.len() as u8]);
                put_reason(out, reason);
            } else if bytes_max >= 5 {
                // [MQTT-3.2.2-19]
                out.put_slice(&[header::CONNACK, 3, 0, violation.code, 0]);
            }
        }
    }
}

/// DISCONNECT of MQTT 5; 3.1.1 has none from a server. Without words, of three bytes.
pub fn put_disconnect(out: &mut BytesMut, violation: &Violation) {
    if violation.why.is_empty() {
        return out.put_slice(&[header::DISCONNECT, 1, violation.code]);
    }
    let reason = reason_string(&violation.why);
    put_head(out, header::DISCONNECT, 2 + reason.len());
    out.put_slice(&[violation.code, reason.len() as u8]);
    put_reason(out, reason);
}

/// A reason string as a property, short enough that all lengths fit one byte.
struct Reason<'a>(&'a str);

impl Reason<'_> {
    fn len(&self) -> usize {
        3 + self.0.len()
    }
}

fn reason_string(why: &str) -> Reason<'_> {
    Reason(&why[..why.floor_char_boundary(100)])
}

fn put_reason(out: &mut BytesMut, Reason(why): Reason<'_>) {
    out.put_u8(REASON_STRING);
    out.put_u16(why.len() as u16);
    out.put_slice(why.as_bytes());
}

/// First byte and remaining length.
fn put_head(out: &mut BytesMut, first: u8, remaining: usize) {
    out.put_u8(first);
    put_variable(out, remaining);
}

fn put_variable(out: &mut BytesMut, mut value: usize) {
    while value > 0x7f {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn variable_len(value: usize) -> usize {
    match value {
        0..=0x7f => 1,
        0x80..=0x3fff => 2,
        0x4000..=0x1f_ffff => 3,
        _ => 4,
    }
}

/// PUBACK. The code is left out where it says success, and in v3, which knows no other; `why` is empty
/// where there is nothing to say to a person.
pub fn put_puback(out: &mut BytesMut, version: Version, packet_id: u16, code: u8, why: &str) {
    put_ack(out, header::PUBACK, version, packet_id, code, why);
}

/// PUBREC, as [`put_puback`].
pub fn put_pubrec(out: &mut BytesMut, version: Version, packet_id: u16, code: u8, why: &str) {
    put_ack(out, header::PUBREC, version, packet_id, code, why);
}

/// PUBREL.
pub fn put_pubrel(out: &mut BytesMut, version: Version, packet_id: u16, code: u8) {
    put_ack(out, header::PUBREL, version, packet_id, code, "");
}

/// PUBCOMP.
pub fn put_pubcomp(out: &mut BytesMut, version: Version, packet_id: u16, code: u8) {
    put_ack(out, header::PUBCOMP, version, packet_id, code, "");
}

fn put_ack(out: &mut BytesMut, first: u8, version: Version, packet_id: u16, code: u8, why: &str) {
    let [high, low] = packet_id.to_be_bytes();
    if code == reason::SUCCESS || version == Version::V3 {
        out.put_slice(&[first, 2, high, low]);
    } else if why.is_empty() {
        out.put_slice(&[first, 3, high, low, code]);
    } else {
        let reason = reason_string(why);
        put_head(out, first, 4 + reason.len());
        out.put_slice(&[high, low, code, reason.len() as u8]);
        put_reason(out, reason);
    }
}

/// SUBACK: a code per filter, in their order.
pub fn put_suback(out: &mut BytesMut, version: Version, packet_id: u16, codes: &[u8]) {
    let properties = usize::from(version == Version::V5);
    put_head(out, header::SUBACK, 2 + properties + codes.len());
    out.put_u16(packet_id);
    match version {
        // 3.1.1 knows one failure.
        Version::V3 => out.extend(codes.iter().map(|&code| code.min(0x80))),
        Version::V5 => {
            out.put_u8(0);
            out.put_slice(codes);
        }
    }
}

/// UNSUBACK: in v5 a code per filter, in their order.
pub fn put_unsuback(out: &mut BytesMut, version: Version, packet_id: u16, codes: &[u8]) {
    match version {
        Version::V3 => {
            put_head(out, header::UNSUBACK, 2);
            out.put_u16(packet_id);
        }
        Version::V5 => {
            put_head(out, header::UNSUBACK, 3 + codes.len());
            out.put_u16(packet_id);
            out.put_u8(0);
            out.put_slice(codes);
        }
    }
}

/// PINGRESP.
pub fn put_pingresp(out: &mut BytesMut) {
    out.put_slice(&[header::PINGRESP, 0]);
}

/// A message on its way to a subscriber.
#[derive(Debug)]
pub struct Delivery<'a> {
    /// Topic.
    pub topic: &'a str,
    /// Payload.
    pub payload: &'a [u8],
    /// What else the publisher said.
    pub attributes: &'a Attributes,
    /// QoS to send it with.
    pub qos: u8,
    /// Packet id, from QoS 1 on.
    pub packet_id: Option<u16>,
    /// Whether it may have been sent before.
    pub dup: bool,
    /// Retain flag.
    pub retain: bool,
    /// Seconds the message has left, where it expires.
    pub expiry_s: Option<u32>,
    /// Identifiers of the subscriptions that it matched.
    pub subscription_ids: &'a [u32],
    /// Alias of the topic, which may be empty where the client knows the alias.
    pub topic_alias: Option<u16>,
}

/// PUBLISH, if the packet has at most `bytes_max` bytes; else `false`, and nothing is written.
pub fn put_publish(
    out: &mut BytesMut,
    version: Version,
    delivery: &Delivery<'_>,
    bytes_max: usize,
) -> bool {
    let properties = match version {
        Version::V3 => 0,
        Version::V5 => properties_len(delivery),
    };
    let properties_head = if version == Version::V5 { variable_len(properties) } else { 0 };
    let id = if delivery.packet_id.is_some() { 2 } else { 0 };
    let remaining =
        2 + delivery.topic.len() + id + properties_head + properties + delivery.payload.len();
    if 1 + variable_len(remaining) + remaining > bytes_max {
        return false;
    }
    let flags = u8::from(delivery.dup) << 3 | delivery.qos << 1 | u8::from(delivery.retain);
    put_head(out, header::PUBLISH | flags, remaining);
    put_field(out, delivery.topic.as_bytes());
    if let Some(packet_id) = delivery.packet_id {
        out.put_u16(packet_id);
    }
    if version == Version::V5 {
        put_variable(out, properties);
        put_properties(out, delivery);
    }
    out.put_slice(delivery.payload);
    true
}

fn properties_len(delivery: &Delivery<'_>) -> usize {
    let attributes: usize = delivery
        .attributes
        .iter()
        .map(|attribute| match attribute {
            Attribute::Utf8Payload => 2,
            Attribute::ContentType(text) | Attribute::ResponseTopic(text) => 3 + text.len(),
            Attribute::CorrelationData(data) => 3 + data.len(),
            Attribute::UserProperty(name, value) => 5 + name.len() + value.len(),
            _ => 0,
        })
        .sum();
    let expiry = if delivery.expiry_s.is_some() { 5 } else { 0 };
    let ids: usize =
        delivery.subscription_ids.iter().map(|id| 1 + variable_len(*id as usize)).sum();
    let alias = if delivery.topic_alias.is_some() { 3 } else { 0 };
    attributes + expiry + ids + alias
}

fn put_properties(out: &mut BytesMut, delivery: &Delivery<'_>) {
    if let Some(seconds) = delivery.expiry_s {
        out.put_u8(MESSAGE_EXPIRY);
        out.put_u32(seconds);
    }
    if let Some(alias) = delivery.topic_alias {
        out.put_u8(TOPIC_ALIAS);
        out.put_u16(alias);
    }
    for id in delivery.subscription_ids {
        out.put_u8(SUBSCRIPTION_ID);
        put_variable(out, *id as usize);
    }
    for attribute in delivery.attributes.iter() {
        let mut property = |id: u8, value: &[u8]| {
            out.put_u8(id);
            put_field(out, value);
        };
        match attribute {
            Attribute::Utf8Payload => out.put_slice(&[UTF8_PAYLOAD, 1]),
            Attribute::ContentType(text) => property(CONTENT_TYPE, text.as_bytes()),
            Attribute::ResponseTopic(text) => property(RESPONSE_TOPIC, text.as_bytes()),
            Attribute::CorrelationData(data) => property(CORRELATION_DATA, data),
            Attribute::UserProperty(name, value) => {
                property(USER_PROPERTY, name.as_bytes());
                put_field(out, value.as_bytes());
            }
            _ => {}
        }
    }
}

fn put_field(out: &mut BytesMut, field: &[u8]) {
    out.put_u16(field.len() as u16);
    out.put_slice(field);
}

#[cfg(test)]
mod tests;
