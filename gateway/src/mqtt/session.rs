//! What a connection has agreed on, and what each packet does: the protocol as a pure state machine.
//!
//! Owns: the rules of MQTT 3.1.1 and 5 beyond single packets: CONNECT, keep-alive, windows both
//! ways, topic aliases, the will, the order of acks.
//! Invariant: PUBACKs leave in the order in which their PUBLISHes came, each only after it was
//! completed [MQTT-4.6.0-2].
//! Deliberately absent: I/O, clocks, tokio. Time is an argument; what is to be sent is appended to
//! the caller's buffer; what the caller must do comes back as an [`Effect`]. Sessions end with their
//! connection: session present is always false, and v5 clients are told so.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use rmqtt_codec::types::{Publish, QoS};
use rmqtt_codec::v5;

use super::codec::{self, Connect, Delivery, Packet, Version, Welcome};
use super::reason::{self, Violation};
use crate::ingest::AckLedger;

/// Topic aliases a v5 client may use.
pub const TOPIC_ALIAS_MAX: u16 = 16;

/// QoS 1 messages on their way to one client, at most; fewer if it asks so by Receive Maximum.
pub const DOWNLINK_IN_FLIGHT_MAX: u16 = 64;

/// Longest client id taken, in bytes.
pub const CLIENT_ID_BYTES_MAX: usize = 1024;

/// A client that takes no packet of this size, in bytes, gets no reason strings.
const REASON_STRING_BYTES_MIN: usize = 128;

/// What the listener allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest packet taken, in bytes.
    pub packet_bytes_max: usize,
    /// QoS 1 publishes that wait for their ack, at most.
    pub in_flight_max: NonZeroU16,
}

/// A publish to be stored.
#[derive(Debug, PartialEq, Eq)]
pub struct Publishing {
    /// The packet; its topic is whole, aliases are resolved.
    pub publish: Box<Publish>,
    /// Its number in the order of acks; `None` for QoS 0.
    pub number: Option<u64>,
}

/// What the caller must do about a packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Store it, then [`Session::complete`] its number; or [`Session::refuse`] it.
    Publish(Publishing),
    /// Subscribe, then [`Session::subscribed`].
    Subscribe(v5::Subscribe),
    /// Unsubscribe, then [`Session::unsubscribed`].
    Unsubscribe(v5::Unsubscribe),
    /// The client has said goodbye: close.
    Disconnect,
}

/// What became of a message for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// It is in the buffer.
    Sent,
    /// It is larger than what the client takes: dropped [MQTT-3.1.2-25].
    TooLarge,
}

/// One client's agreement with the server, from CONNECT to the end of the connection.
#[derive(Debug)]
pub struct Session {
    version: Version,
    client_id: ByteString,
    in_flight_max: usize,
    packet_bytes_max: usize,
    expiry_asked: bool,
    keep_alive: Option<Duration>,
    heard: Instant,
    will: Option<Box<Publish>>,
    aliases: Vec<ByteString>,
    /// Packet ids that wait for their ack, by their number.
    acks: AckLedger<u16>,
    last_number: u64,
    /// Numbers that get another code than success. Empty but for refused publishes.
    refused: Vec<(u64, u8)>,
    window: Window,
}

impl Session {
    /// Opens a session for a CONNECT and appends its CONNACK. `random` names a client that does not
    /// name itself.
    ///
    /// # Errors
    /// The reason for which it is refused; the CONNACK, where there is one for it, is in `out`.
    pub fn open(
        connect: Connect,
        limits: &Limits,
        random: u64,
        now: Instant,
        out: &mut BytesMut,
    ) -> Result<Self, Violation> {
        let Connect { version, packet } = connect;
        Self::agree(version, *packet, limits, random, now, out)
            .inspect_err(|violation| codec::put_refusal(out, version, violation))
    }

    fn agree(
        version: Version,
        connect: v5::Connect,
        limits: &Limits,
        random: u64,
        now: Instant,
        out: &mut BytesMut,
    ) -> Result<Self, Violation> {
        let id = &connect.client_id;
        let nameless = id.is_empty();
        if id.len() > CLIENT_ID_BYTES_MAX {
            return Err(Violation::new(reason::CLIENT_ID_NOT_VALID, "client id too long"));
        }
        if nameless && version == Version::V3 && !connect.clean_start {
            // [MQTT-3.1.3-8] of 3.1.1
            let why = "an empty client id without clean session";
            return Err(Violation::new(reason::CLIENT_ID_NOT_VALID, why));
        }
        // Copies: a slice of the read buffer would keep all of it for as long as the session lives.
        let client_id = if nameless {
            ByteString::from(format!("auto-{random:016x}"))
        } else {
            ByteString::from(&**id)
        };
        let will = connect.last_will.map(|will| will_of(version, will)).transpose()?;

        let welcome = Welcome {
            assigned_client_id: nameless.then(|| client_id.clone()),
            session_expiry_asked: connect.session_expiry_interval_secs > 0,
            receive_max: limits.in_flight_max,
            packet_bytes_max: limits.packet_bytes_max as u32,
            topic_alias_max: TOPIC_ALIAS_MAX,
        };
        codec::put_welcome(out, version, &welcome);
        let receive_max = connect.receive_max.map_or(u16::MAX, NonZeroU16::get);
        Ok(Self {
            version,
            client_id,
            in_flight_max: usize::from(limits.in_flight_max.get()),
            packet_bytes_max: connect.max_packet_size.map_or(usize::MAX, |max| max.get() as usize),
            expiry_asked: connect.session_expiry_interval_secs > 0,
            // [MQTT-3.1.2-22]: one and a half times; 0 turns it off.
            keep_alive: (connect.keep_alive > 0)
                .then(|| Duration::from_millis(u64::from(connect.keep_alive) * 1500)),
            heard: now,
            will,
            aliases: Vec::new(),
            acks: AckLedger::default(),
            last_number: 0,
            refused: Vec::new(),
            window: Window::new(receive_max.min(DOWNLINK_IN_FLIGHT_MAX)),
        })
    }

    /// Protocol version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The client's name, its own or assigned.
    pub fn client_id(&self) -> &ByteString {
        &self.client_id
    }

    /// Something was read from the client, or it could not speak because we were not reading.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// When the client counts as gone if nothing is read from it; `None`: never.
    pub fn deadline(&self) -> Option<Instant> {
        self.keep_alive.map(|keep_alive| self.heard + keep_alive)
    }

    /// Whether another publish may be decoded: v5 clients are bound by Receive Maximum, and a v3
    /// client, which has no such word, is not read from while its unacked publishes are at the bound.
    pub fn takes_publishes(&self) -> bool {
        self.version == Version::V5 || self.acks.len() < self.in_flight_max
    }

    /// Number of publishes that wait for their ack.
    pub fn unacked(&self) -> usize {
        self.acks.len()
    }

    /// Takes a packet. Answers that need nothing else are appended to `out`.
    ///
    /// # Errors
    /// A [`Violation`]: close the connection after [`Session::close`].
    pub fn receive(&mut self, packet: Packet, out: &mut BytesMut) -> Result<Effect, Violation> {
        match packet {
            Packet::Publish(publish) => return self.publish(publish).map(Effect::Publish),
            Packet::PubAck(packet_id) => self.window.acked(packet_id),
            // No message goes out with QoS 2, and none is taken: both name ids unknown here.
            Packet::PubRec(packet_id) => {
                codec::put_pubrel(out, self.version, packet_id, reason::PACKET_ID_NOT_FOUND);
            }
            Packet::PubRel(packet_id) => {
                codec::put_pubcomp(out, self.version, packet_id, reason::PACKET_ID_NOT_FOUND);
            }
            Packet::PubComp(_) => {}
            Packet::Subscribe(subscribe) => return Ok(Effect::Subscribe(subscribe)),
            Packet::Unsubscribe(unsubscribe) => return Ok(Effect::Unsubscribe(unsubscribe)),
            Packet::PingReq => codec::put_pingresp(out),
            Packet::Disconnect(disconnect) => {
                let expiry = disconnect.session_expiry_interval_secs.unwrap_or(0);
                if expiry > 0 && !self.expiry_asked {
                    return Err(Violation::protocol(
                        "a session expiry that CONNECT did not ask for",
                    ));
                }
                // [MQTT-3.14.4-3]
                if disconnect.reason_code == v5::DisconnectReasonCode::NormalDisconnection {
                    self.will = None;
                }
                return Ok(Effect::Disconnect);
            }
            // [MQTT-3.15.0], 4.12: only a client that named a method may send it, and none is let in.
            Packet::Auth => return Err(Violation::protocol("AUTH without a method in CONNECT")),
        }
        Ok(Effect::None)
    }

    fn publish(&mut self, mut publish: Box<Publish>) -> Result<Publishing, Violation> {
        if publish.qos == QoS::ExactlyOnce {
            return Err(Violation::new(reason::QOS_NOT_SUPPORTED, "QoS 2 is not supported"));
        }
        if publish.retain && self.version == Version::V5 {
            return Err(Violation::new(reason::RETAIN_NOT_SUPPORTED, "retain is not supported"));
        }
        if let Some(alias) = publish.properties.as_ref().and_then(|p| p.topic_alias) {
            self.resolve_alias(alias, &mut publish.topic)?;
        }
        let number = match publish.packet_id {
            None => None,
            Some(_) if self.version == Version::V5 && self.acks.len() >= self.in_flight_max => {
                let why = "more unacked publishes than Receive Maximum";
                return Err(Violation::new(reason::RECEIVE_MAX_EXCEEDED, why));
            }
            Some(packet_id) => {
                self.last_number = self.acks.enter(packet_id.get());
                Some(self.last_number)
            }
        };
        Ok(Publishing { publish, number })
    }

    fn resolve_alias(
        &mut self,
        alias: NonZeroU16,
        topic: &mut ByteString,
    ) -> Result<(), Violation> {
        // [MQTT-3.3.2-8], [MQTT-3.3.2-9]
        if alias.get() > TOPIC_ALIAS_MAX {
            return Err(Violation::new(reason::TOPIC_ALIAS_INVALID, "topic alias out of range"));
        }
        let slot = usize::from(alias.get() - 1);
        if topic.is_empty() {
            match self.aliases.get(slot) {
                Some(known) if !known.is_empty() => *topic = known.clone(),
                _ => return Err(Violation::protocol("an unknown topic alias")),
            }
        } else {
            if self.aliases.len() <= slot {
                self.aliases.resize(slot + 1, ByteString::new());
            }
            self.aliases[slot] = ByteString::from(&**topic);
        }
        Ok(())
    }

    /// These publishes are durable: appends every ack whose turn has come.
    pub fn complete(&mut self, numbers: &[u64], out: &mut BytesMut) {
        for &number in numbers {
            self.acks.complete(number);
        }
        self.release(out);
    }

    /// A publish is not taken. v5 says so in its PUBACK, in turn; a QoS 0 publish has none and is the
    /// caller's to count.
    ///
    /// # Errors
    /// v3 has no negative ack, and must not get a positive one: the connection has to be closed.
    pub fn refuse(
        &mut self,
        number: Option<u64>,
        violation: Violation,
        out: &mut BytesMut,
    ) -> Result<(), Violation> {
        let Some(number) = number else { return Ok(()) };
        if self.version == Version::V3 {
            return Err(violation);
        }
        self.refused.push((number, violation.code));
        self.complete(&[number], out);
        Ok(())
    }

    fn release(&mut self, out: &mut BytesMut) {
        loop {
            let unacked = self.acks.len() as u64;
            let Some(packet_id) = self.acks.release() else {
                break;
            };
            let mut code = reason::SUCCESS;
            if !self.refused.is_empty() {
                let number = self.last_number + 1 - unacked;
                if let Some(at) = self.refused.iter().position(|&(refused, _)| refused == number) {
                    (_, code) = self.refused.swap_remove(at);
                }
            }
            codec::put_puback(out, self.version, packet_id, code);
        }
    }

    /// Appends the SUBACK.
    pub fn subscribed(&self, packet_id: NonZeroU16, codes: &[u8], out: &mut BytesMut) {
        codec::put_suback(out, self.version, packet_id.get(), codes);
    }

    /// Appends the UNSUBACK.
    pub fn unsubscribed(&self, packet_id: NonZeroU16, codes: &[u8], out: &mut BytesMut) {
        codec::put_unsuback(out, self.version, packet_id.get(), codes);
    }

    /// Whether the client takes another QoS 1 message now [MQTT-3.3.4-9].
    pub fn takes_delivery(&self) -> bool {
        self.window.has_room()
    }

    /// Appends a message for the client. `qos1` gives it a packet id: see
    /// [`Session::takes_delivery`].
    pub fn deliver(
        &mut self,
        mut delivery: Delivery<'_>,
        qos1: bool,
        out: &mut BytesMut,
    ) -> Delivered {
        if qos1 {
            delivery.packet_id = Some(self.window.next_id());
        }
        if !codec::put_publish(out, self.version, &delivery, self.packet_bytes_max) {
            return Delivered::TooLarge;
        }
        if let Some(packet_id) = delivery.packet_id {
            self.window.sent(packet_id);
        }
        Delivered::Sent
    }

    /// Appends what is said before the server closes the connection: DISCONNECT in v5.
    pub fn close(&self, violation: &Violation, out: &mut BytesMut) {
        if self.version == Version::V5 {
            if self.packet_bytes_max < REASON_STRING_BYTES_MIN {
                codec::put_disconnect(out, &Violation::new(violation.code, ""));
            } else {
                codec::put_disconnect(out, violation);
            }
        }
    }

    /// The will, if the connection has ended otherwise than by a DISCONNECT with reason 0. The will
    /// delay never applies: the session ends with the connection, and then the will is due
    /// [MQTT-3.1.2-8].
    pub fn take_will(&mut self) -> Option<Box<Publish>> {
        self.will.take()
    }
}

/// The will as the PUBLISH that it becomes.
fn will_of(version: Version, will: v5::LastWill) -> Result<Box<Publish>, Violation> {
    if will.qos == QoS::ExactlyOnce {
        return Err(Violation::new(reason::QOS_NOT_SUPPORTED, "a will of QoS 2 is not supported"));
    }
    if will.retain && version == Version::V5 {
        // [MQTT-3.2.2-13]
        return Err(Violation::new(reason::RETAIN_NOT_SUPPORTED, "retain is not supported"));
    }
    let properties = v5::PublishProperties {
        correlation_data: will.correlation_data,
        message_expiry_interval: will.message_expiry_interval,
        content_type: will.content_type,
        user_properties: will.user_properties,
        is_utf8_payload: will.is_utf8_payload.unwrap_or(false),
        response_topic: will.response_topic,
        ..v5::PublishProperties::default()
    };
    Ok(Box::new(Publish {
        dup: false,
        retain: will.retain,
        qos: will.qos,
        topic: ByteString::from(&*will.topic),
        packet_id: None,
        payload: Bytes::copy_from_slice(&will.message),
        properties: (version == Version::V5).then_some(properties),
    }))
}

/// Packet ids of QoS 1 messages that the client has not acked.
#[derive(Debug)]
struct Window {
    max: usize,
    last_id: u16,
    unacked: Vec<u16>,
}

impl Window {
    fn new(max: u16) -> Self {
        Self { max: usize::from(max), last_id: 0, unacked: Vec::new() }
    }

    fn has_room(&self) -> bool {
        self.unacked.len() < self.max
    }

    /// The next id that is not in use: the window is far smaller than the range of ids.
    fn next_id(&self) -> u16 {
        let mut id = self.last_id;
        loop {
            id = id.checked_add(1).unwrap_or(1);
            if !self.unacked.contains(&id) {
                return id;
            }
        }
    }

    fn sent(&mut self, id: u16) {
        self.last_id = id;
        self.unacked.push(id);
    }

    fn acked(&mut self, id: u16) {
        if let Some(at) = self.unacked.iter().position(|&unacked| unacked == id) {
            self.unacked.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests;
