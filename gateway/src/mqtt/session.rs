//! What a connection has agreed on, and what each packet does: the protocol as a pure state machine.
//!
//! Owns: the rules of MQTT 3.1.1 and 5 beyond single packets: CONNECT, keep-alive, windows both
//! ways, topic aliases, the will, the order of acks. `inbound` is what the client is owed, `outbound`
//! what it owes. Beside this file, which takes packets: `opening`, `turns`, `deliveries`.
//! Invariant: acks leave in the order in which their packets came, each only after it was completed
//! [MQTT-4.6.0-2].
//! Deliberately absent: I/O, clocks, tokio. Time is an argument; what is to be sent is appended to
//! the caller's buffer; what the caller must do comes back as an [`Effect`].

mod deliveries;
mod inbound;
mod opening;
mod outbound;
mod turns;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use bytestring::ByteString;
use rmqtt_codec::types::{Publish, QoS};
use rmqtt_codec::v5;

use super::codec::{self, Packet, Version};
use super::reason::{self, Violation};
pub use deliveries::{DOWNLINK_IN_FLIGHT_MAX, Delivered};
pub use inbound::Inbound;
use inbound::{Arrival, Release};
pub use opening::{CLIENT_ID_BYTES_MAX, NEVER_S};
use outbound::{Stage, Window};
pub use turns::{Retained, Turn};

/// Topic aliases a v5 client may use, and that it may be sent at most.
pub const TOPIC_ALIAS_MAX: u16 = 10;

/// QoS 2 exchanges of a v3 client, which knows no Receive Maximum, as a multiple of what a v5 client
/// may have under way: it learns of our limit only by being disconnected.
const RECEIPTS_FACTOR: usize = 4;

/// Answers of other kinds than acks of publishes that may wait; more are not read.
const TURNS_MAX: usize = 64;

/// A client that takes no packet of this size, in bytes, gets no reason strings.
const REASON_STRING_BYTES_MIN: usize = 128;

/// What the listener allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest packet taken, in bytes.
    pub packet_bytes_max: usize,
    /// QoS 1 and 2 publishes under way, at most.
    pub in_flight_max: NonZeroU16,
    /// Longest keep-alive; a v5 client is told, and one that has none gets it. 0: none.
    pub keep_alive_s_max: u16,
}

/// A publish to be stored.
#[derive(Debug, PartialEq, Eq)]
pub struct Publishing {
    /// The packet; its topic is whole, aliases are resolved.
    pub publish: Box<Publish>,
    /// Its number in the order of acks; `None` for QoS 0 that nothing waits for.
    pub number: Option<u64>,
    /// Packet id of the receipt that is to be stored with it: QoS 2.
    pub receipt: Option<u16>,
}

/// What the caller must do about a packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Store it, then [`Session::complete`] its number; or [`Session::refuse`] it.
    Publish(Publishing),
    /// Make the end of a receipt durable, then [`Session::complete`] the number.
    Release {
        /// Packet id of the receipt.
        packet_id: u16,
        /// Its number in the order of acks.
        number: u64,
    },
    /// A message that the session keeps has reached the client for good: it is done with.
    Acked(u16),
    /// A QoS 2 message that the session keeps has reached the client: make durable that it is
    /// released, then [`Session::complete`] the number.
    Received {
        /// Packet id of the message.
        packet_id: u16,
        /// Its number in the order of acks.
        number: u64,
    },
    /// The client has said goodbye: close.
    Disconnect,
}

/// A will, and how long it waits.
#[derive(Debug, PartialEq, Eq)]
pub struct Will {
    /// The PUBLISH that it becomes.
    pub publish: Box<Publish>,
    /// Seconds from the end of the connection.
    pub delay_s: u32,
}

/// One client's agreement with the server, from CONNECT to the end of the connection.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing of what was agreed on")]
pub struct Session {
    version: Version,
    client_id: ByteString,
    nameless: bool,
    is_v31: bool,
    clean_start: bool,
    expiry_s: u32,
    expiry_asked_s: u32,
    /// Whether messages and receipts are kept beyond the connection.
    keeps: bool,
    limits: Limits,
    packet_bytes_max: usize,
    /// Whether it is told why with packets of any kind: Request Problem Information.
    wants_reasons: bool,
    keep_alive: Option<Duration>,
    keep_alive_told_s: Option<u16>,
    heard: Instant,
    will: Option<Will>,
    aliases: Vec<ByteString>,
    /// Topics that the client knows by alias, 1 and up, and how many it takes.
    told: Vec<ByteString>,
    told_max: usize,
    inbound: Inbound,
    /// What waits for a turn, in order, and how many of them have it.
    turns: VecDeque<Turn>,
    turns_due: usize,
    window: Window,
}

impl Session {
    /// Whether the client wants nothing of an earlier session.
    pub fn is_clean_start(&self) -> bool {
        self.clean_start
    }

    /// Seconds that the session outlives its connection.
    pub fn expiry_s(&self) -> u32 {
        self.expiry_s
    }

    /// Whether messages and receipts are kept beyond the connection.
    pub fn keeps(&self) -> bool {
        self.keeps
    }

    /// Protocol version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The client's name, its own or assigned.
    pub fn client_id(&self) -> &ByteString {
        &self.client_id
    }

    /// Largest packet that the client takes, in bytes.
    pub fn packet_bytes_max(&self) -> usize {
        self.packet_bytes_max
    }

    /// Something was read from the client, or it could not speak because we were not reading.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// When the client counts as gone if nothing is read from it; `None`: never.
    pub fn deadline(&self) -> Option<Instant> {
        self.keep_alive.map(|keep_alive| self.heard + keep_alive)
    }

    /// Whether another packet may be decoded: v5 clients are bound by Receive Maximum, and a v3
    /// client, which has no such word, is not read from while its unacked publishes are at the bound.
    pub fn takes_publishes(&self) -> bool {
        let in_flight_max = usize::from(self.limits.in_flight_max.get());
        let waiting_max = match self.version {
            Version::V3 => in_flight_max,
            Version::V5 => in_flight_max + TURNS_MAX,
        };
        self.inbound.waiting() < waiting_max && self.turns.len() < TURNS_MAX
    }

    /// Number of answers that wait for something to become durable.
    pub fn unacked(&self) -> usize {
        self.inbound.waiting()
    }

    /// QoS 2 exchanges of the client's that are under way.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn inbound(&self) -> &Inbound {
        &self.inbound
    }

    /// Takes a packet. Answers that need nothing else are appended to `out`.
    ///
    /// # Errors
    /// A [`Violation`]: close the connection after [`Session::close`].
    pub fn receive(&mut self, packet: Packet, out: &mut BytesMut) -> Result<Effect, Violation> {
        match packet {
            Packet::Publish(publish) => return self.publish(publish, out),
            Packet::PubAck(packet_id) => return self.ended(packet_id, Stage::Ack),
            Packet::PubRec(packet_id, code) => return self.pubrec(packet_id, code, out),
            Packet::PubRel(packet_id) => return self.pubrel(packet_id, out),
            Packet::PubComp(packet_id) => return self.ended(packet_id, Stage::Comp),
            Packet::Subscribe(subscribe) => self.take_turn(Turn::Subscribe(subscribe), out),
            Packet::Unsubscribe(unsubscribe) => {
                self.take_turn(Turn::Unsubscribe(unsubscribe), out);
            }
            Packet::PingReq => codec::put_pingresp(out),
            Packet::Disconnect(disconnect) => {
                if let Some(expiry_s) = disconnect.session_expiry_interval_secs {
                    // [MQTT-3.1.2-23], 3.14.2.2.2
                    if expiry_s > 0 && self.expiry_asked_s == 0 {
                        let why = "a session expiry that CONNECT did not ask for";
                        return Err(Violation::protocol(why));
                    }
                    self.expiry_s = expiry_s;
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

    fn publish(
        &mut self,
        mut publish: Box<Publish>,
        out: &mut BytesMut,
    ) -> Result<Effect, Violation> {
        if let Some(alias) = publish.properties.as_ref().and_then(|p| p.topic_alias) {
            self.resolve_alias(alias, &mut publish.topic)?;
        }
        let in_flight_max = usize::from(self.limits.in_flight_max.get());
        let (number, receipt) = match (publish.qos, publish.packet_id.map(NonZeroU16::get)) {
            (QoS::AtLeastOnce, Some(packet_id)) => {
                if self.version == Version::V5 && self.inbound.under_way() >= in_flight_max {
                    return Err(too_many_under_way());
                }
                (Some(self.inbound.qos1(packet_id)), None)
            }
            (QoS::ExactlyOnce, Some(packet_id)) => {
                let full = match self.version {
                    Version::V5 => self.inbound.under_way() >= in_flight_max,
                    Version::V3 => self.inbound.receipts() >= RECEIPTS_FACTOR * in_flight_max,
                };
                if full && !self.inbound.knows(packet_id) {
                    return Err(too_many_under_way());
                }
                match self.inbound.qos2(packet_id) {
                    Arrival::New(number) => (Some(number), Some(packet_id)),
                    Arrival::Repeated => {
                        self.release(out);
                        return Ok(Effect::None);
                    }
                    Arrival::InUse => {
                        let why = "a packet id that was released and has no PUBCOMP yet";
                        return Err(Violation::protocol(why));
                    }
                }
            }
            // Somebody may subscribe right after it, and must find it.
            _ if publish.retain => (Some(self.inbound.unacknowledged()), None),
            _ => (None, None),
        };
        Ok(Effect::Publish(Publishing { publish, number, receipt }))
    }

    fn pubrel(&mut self, packet_id: u16, out: &mut BytesMut) -> Result<Effect, Violation> {
        match self.inbound.pubrel(packet_id) {
            Release::Receipt(number) if self.keeps => {
                return Ok(Effect::Release { packet_id, number });
            }
            // The receipt of a session that ends with the connection is in memory only.
            Release::Receipt(number) => self.complete(&[number], out),
            Release::Repeated => self.release(out),
            Release::Unknown => {
                codec::put_pubcomp(out, self.version, packet_id, reason::PACKET_ID_NOT_FOUND);
            }
            Release::Early => return Err(Violation::protocol("a PUBREL before its PUBREC")),
        }
        Ok(Effect::None)
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

    /// These are durable: appends every ack whose turn has come.
    pub fn complete(&mut self, numbers: &[u64], out: &mut BytesMut) {
        for &number in numbers {
            self.inbound.complete(number);
        }
        self.release(out);
    }

    /// A publish is taken, and nobody subscribes to its topic: its ack says so in v5.
    pub fn unheard(&mut self, number: u64) {
        self.inbound.unheard(number);
    }

    /// A publish is not taken. v5 says so in its PUBACK or PUBREC, in turn; a QoS 0 publish has none
    /// and is the caller's to count.
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
        let closes = self.version == Version::V3 && self.inbound.is_acked(number);
        if closes {
            self.inbound.refuse(number, violation.code, Cow::default());
            return Err(violation);
        }
        // [MQTT-3.1.2-29], [MQTT-3.4.2-2], [MQTT-3.5.2-2]
        let explains = self.wants_reasons && self.packet_bytes_max >= REASON_STRING_BYTES_MIN;
        let why = if explains { violation.why } else { Cow::default() };
        self.inbound.refuse(number, violation.code, why);
        self.release(out);
        Ok(())
    }

    fn release(&mut self, out: &mut BytesMut) {
        self.turns_due += self.inbound.release(self.version, out);
    }

    /// A publish was given up before it entered a ring: there will be no event of it.
    pub fn forget(&mut self, number: u64) {
        self.inbound.forget(number);
    }

    /// What the session takes with it when the connection ends.
    pub fn into_inbound(mut self) -> Inbound {
        self.inbound.part();
        self.inbound
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

    /// The will, as long as no DISCONNECT with reason 0 has cancelled it [MQTT-3.1.2-8].
    pub fn will(&self) -> Option<&Will> {
        self.will.as_ref()
    }

    /// Takes the will.
    pub fn take_will(&mut self) -> Option<Will> {
        self.will.take()
    }
}

fn too_many_under_way() -> Violation {
    Violation::new(reason::RECEIVE_MAX_EXCEEDED, "more publishes under way than Receive Maximum")
}

#[cfg(test)]
mod tests;
