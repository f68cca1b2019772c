//! What a connection has agreed on, and what each packet does: the protocol as a pure state machine.
//!
//! Owns: the rules of MQTT 3.1.1 and 5 beyond single packets: CONNECT, keep-alive, windows both
//! ways, topic aliases, the will, the order of acks. `inbound` is what the client is owed, `outbound`
//! what it owes.
//! Invariant: acks leave in the order in which their packets came, each only after it was completed
//! [MQTT-4.6.0-2].
//! Deliberately absent: I/O, clocks, tokio. Time is an argument; what is to be sent is appended to
//! the caller's buffer; what the caller must do comes back as an [`Effect`].

mod inbound;
mod outbound;

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use rmqtt_codec::types::{Publish, QoS};
use rmqtt_codec::v5;

use super::codec::{self, Connect, Delivery, Packet, Version, Welcome};
use super::reason::{self, Violation};
use super::subscriptions::Options;
pub use inbound::Inbound;
use inbound::{Arrival, Release};
use outbound::{Ended, Received, Stage, Window};

/// Topic aliases a v5 client may use, and that it may be sent at most.
pub const TOPIC_ALIAS_MAX: u16 = 10;

/// QoS 1 and 2 messages on their way to one client, at most; fewer if it asks so by Receive Maximum.
pub const DOWNLINK_IN_FLIGHT_MAX: u16 = 64;

/// Longest client id taken, in bytes.
pub const CLIENT_ID_BYTES_MAX: usize = 1024;

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

/// What waits for its turn among the acks: everything that came before it is durable then.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// Subscribe, then [`Session::await_suback`] or [`Session::subscribed`].
    Subscribe(v5::Subscribe),
    /// Unsubscribe, then [`Session::await_unsuback`] or [`Session::unsubscribed`].
    Unsubscribe(v5::Unsubscribe),
    /// A subscription is durable.
    SubAck {
        /// Packet id of the SUBSCRIBE.
        packet_id: NonZeroU16,
        /// Code of each filter.
        codes: Vec<u8>,
        /// Retained messages that are due then.
        retained: Vec<Retained>,
    },
    /// Messages for the client are durable, at these places of its queue.
    Settled(Vec<u64>),
    /// An unsubscription is durable.
    UnsubAck {
        /// Packet id of the UNSUBSCRIBE.
        packet_id: NonZeroU16,
        /// Code of each filter.
        codes: Vec<u8>,
    },
}

/// A new subscription that wants what is retained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retained {
    /// The filter.
    pub filter: ByteString,
    /// What was asked for.
    pub options: Options,
}

/// A will, and how long it waits.
#[derive(Debug, PartialEq, Eq)]
pub struct Will {
    /// The PUBLISH that it becomes.
    pub publish: Box<Publish>,
    /// Seconds from the end of the connection.
    pub delay_s: u32,
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

/// Session expiry that means never.
pub const NEVER_S: u32 = u32::MAX;

impl Session {
    /// Agrees to a CONNECT. `random` names a client that does not name itself.
    /// [`Session::welcome`] says so.
    ///
    /// # Errors
    /// The reason for which it is refused.
    pub fn open(
        connect: Connect,
        limits: &Limits,
        random: u64,
        now: Instant,
    ) -> Result<Self, Violation> {
        let Connect { version, is_v31, packet: connect } = connect;
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
        // In 3.1.1 the flag says both: begin anew, and end with the connection.
        let expiry_s = match version {
            Version::V3 if connect.clean_start => 0,
            Version::V3 => NEVER_S,
            Version::V5 => connect.session_expiry_interval_secs,
        };
        let keep_alive_s = match limits.keep_alive_s_max {
            max if version == Version::V5
                && max > 0
                && !(1..=max).contains(&connect.keep_alive) =>
            {
                max
            }
            _ => connect.keep_alive,
        };
        let receive_max = connect.receive_max.map_or(u16::MAX, NonZeroU16::get);
        let session = Self {
            version,
            client_id,
            nameless,
            is_v31,
            clean_start: connect.clean_start,
            expiry_s,
            expiry_asked_s: expiry_s,
            keeps: false,
            limits: *limits,
            packet_bytes_max: connect.max_packet_size.map_or(usize::MAX, |max| max.get() as usize),
            // [MQTT-3.1.2-22]: one and a half times; 0 turns it off.
            keep_alive: (keep_alive_s > 0)
                .then(|| Duration::from_millis(u64::from(keep_alive_s) * 1500)),
            keep_alive_told_s: (keep_alive_s != connect.keep_alive).then_some(keep_alive_s),
            heard: now,
            will: connect.last_will.map(|will| will_of(version, will)),
            aliases: Vec::new(),
            told: Vec::new(),
            // [MQTT-3.1.2-26], [MQTT-3.1.2-27]
            told_max: usize::from(connect.topic_alias_max.min(TOPIC_ALIAS_MAX)),
            inbound: Inbound::default(),
            turns: VecDeque::new(),
            turns_due: 0,
            window: Window::new(receive_max.min(DOWNLINK_IN_FLIGHT_MAX)),
        };
        // [MQTT-3.1.2-24]; the expiry is told where it is not what was asked for.
        let told = session.welcome_of(false, (expiry_s > 0).then_some(expiry_s));
        if codec::welcome_len(version, &told) > session.packet_bytes_max {
            return Err(Violation::new(reason::PACKET_TOO_LARGE, "it takes no CONNACK"));
        }
        Ok(session)
    }

    fn welcome_of(&self, session_present: bool, session_expiry_s: Option<u32>) -> Welcome {
        Welcome {
            session_present: session_present && !self.is_v31,
            assigned_client_id: self.nameless.then(|| self.client_id.clone()),
            session_expiry_s,
            keep_alive_s: self.keep_alive_told_s,
            receive_max: self.limits.in_flight_max,
            packet_bytes_max: self.limits.packet_bytes_max as u32,
            topic_alias_max: TOPIC_ALIAS_MAX,
        }
    }

    /// Appends the CONNACK. `expiry_s` is what the client gets of the expiry that it asked for;
    /// `keeps` says whether messages and receipts are kept in the store, and `before` is what the
    /// session has from earlier connections.
    pub fn welcome(
        &mut self,
        before: Option<Inbound>,
        keeps: bool,
        expiry_s: u32,
        out: &mut BytesMut,
    ) {
        let told = (expiry_s != self.expiry_asked_s).then_some(expiry_s);
        let welcome = self.welcome_of(before.is_some(), told);
        codec::put_welcome(out, self.version, &welcome);
        self.inbound = before.unwrap_or_default();
        self.expiry_s = expiry_s;
        self.keeps = keeps;
    }

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

    /// The last answer to a message for the client.
    fn ended(&mut self, packet_id: u16, stage: Stage) -> Result<Effect, Violation> {
        match self.window.ended(packet_id, stage) {
            Ended::Now if self.keeps => Ok(Effect::Acked(packet_id)),
            Ended::Now | Ended::Unknown => Ok(Effect::None),
            Ended::Wrong => Err(wrong_answer()),
        }
    }

    fn pubrec(
        &mut self,
        packet_id: u16,
        code: u8,
        out: &mut BytesMut,
    ) -> Result<Effect, Violation> {
        match self.window.received(packet_id, code) {
            Received::Now if self.keeps => {
                let number = self.inbound.our_pubrel(packet_id);
                return Ok(Effect::Received { packet_id, number });
            }
            Received::Now => codec::put_pubrel(out, self.version, packet_id, reason::SUCCESS),
            Received::Again => {
                // Behind the first, which may wait to be durable.
                let number = self.inbound.our_pubrel(packet_id);
                self.complete(&[number], out);
            }
            Received::Refused if self.keeps => return Ok(Effect::Acked(packet_id)),
            Received::Wrong => return Err(wrong_answer()),
            // [MQTT-4.3.3-4]: what says that it has failed is not answered.
            Received::Refused => {}
            Received::Unknown if code >= reason::FAILURE => {}
            Received::Unknown => {
                codec::put_pubrel(out, self.version, packet_id, reason::PACKET_ID_NOT_FOUND);
            }
        }
        Ok(Effect::None)
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
        self.inbound.refuse(number, violation.code);
        if closes {
            return Err(violation);
        }
        self.release(out);
        Ok(())
    }

    fn release(&mut self, out: &mut BytesMut) {
        self.turns_due += self.inbound.release(self.version, out);
    }

    fn take_turn(&mut self, turn: Turn, out: &mut BytesMut) {
        let number = self.inbound.turn();
        self.turns.push_back(turn);
        self.complete(&[number], out);
    }

    /// What has its turn now.
    pub fn next_turn(&mut self) -> Option<Turn> {
        self.turns_due = self.turns_due.checked_sub(1)?;
        self.turns.pop_front()
    }

    /// A subscription is to be made durable before its SUBACK: [`Session::complete`] the number then,
    /// and the turn comes.
    pub fn await_suback(
        &mut self,
        packet_id: NonZeroU16,
        codes: Vec<u8>,
        retained: Vec<Retained>,
    ) -> u64 {
        self.turns.push_back(Turn::SubAck { packet_id, codes, retained });
        self.inbound.turn()
    }

    /// As [`Session::await_suback`], for an UNSUBACK.
    pub fn await_unsuback(&mut self, packet_id: NonZeroU16, codes: Vec<u8>) -> u64 {
        self.turns.push_back(Turn::UnsubAck { packet_id, codes });
        self.inbound.turn()
    }

    /// As [`Session::await_suback`], for messages at these places of the client's queue.
    pub fn await_settled(&mut self, places: Vec<u64>) -> u64 {
        self.turns.push_back(Turn::Settled(places));
        self.inbound.turn()
    }

    /// Appends the SUBACK.
    ///
    /// # Errors
    /// The client takes no packet of its size [MQTT-3.1.2-24], and would wait for it.
    pub fn subscribed(
        &self,
        packet_id: NonZeroU16,
        codes: &[u8],
        out: &mut BytesMut,
    ) -> Result<(), Violation> {
        let before = out.len();
        codec::put_suback(out, self.version, packet_id.get(), codes);
        self.fits(before, out)
    }

    /// Appends the UNSUBACK.
    ///
    /// # Errors
    /// As [`Session::subscribed`].
    pub fn unsubscribed(
        &self,
        packet_id: NonZeroU16,
        codes: &[u8],
        out: &mut BytesMut,
    ) -> Result<(), Violation> {
        let before = out.len();
        codec::put_unsuback(out, self.version, packet_id.get(), codes);
        self.fits(before, out)
    }

    /// Takes back what was appended if it is larger than what the client takes.
    fn fits(&self, before: usize, out: &mut BytesMut) -> Result<(), Violation> {
        if out.len() - before <= self.packet_bytes_max {
            return Ok(());
        }
        out.truncate(before);
        let why = "the answer is larger than the client's maximum packet size";
        Err(Violation::new(reason::PACKET_TOO_LARGE, why))
    }

    /// Whether the client takes another QoS 1 or 2 message now [MQTT-3.3.4-9].
    pub fn takes_delivery(&self) -> bool {
        self.window.has_room()
    }

    /// QoS 1 and 2 messages that the client takes now.
    pub fn room_for_deliveries(&self) -> usize {
        self.window.room()
    }

    /// Appends a message for the client. One of QoS 1 or 2 gets a packet id, unless it has one: see
    /// [`Session::takes_delivery`].
    pub fn deliver(&mut self, mut delivery: Delivery<'_>, out: &mut BytesMut) -> Delivered {
        let stage = match delivery.qos {
            0 => None,
            1 => Some(Stage::Ack),
            _ => Some(Stage::Rec),
        };
        if stage.is_some() {
            delivery.packet_id.get_or_insert_with(|| self.window.next_id());
        }
        if !self.put_publish(&mut delivery, out) {
            return Delivered::TooLarge;
        }
        if let (Some(packet_id), Some(stage)) = (delivery.packet_id, stage) {
            self.window.sent(packet_id, stage);
        }
        Delivered::Sent
    }

    /// Appends the PUBLISH, its topic by alias where the client takes that: those that came first have
    /// one, for the life of the connection.
    fn put_publish(&mut self, delivery: &mut Delivery<'_>, out: &mut BytesMut) -> bool {
        let (version, bytes_max) = (self.version, self.packet_bytes_max);
        if self.told_max > 0 {
            let known = self.told.iter().position(|topic| topic == delivery.topic);
            let at = known.unwrap_or(self.told.len());
            if at < self.told_max {
                let topic = delivery.topic;
                if known.is_some() {
                    delivery.topic = "";
                }
                delivery.topic_alias = Some(at as u16 + 1);
                if codec::put_publish(out, version, delivery, bytes_max) {
                    if known.is_none() {
                        self.told.push(ByteString::from(topic));
                    }
                    return true;
                }
                (delivery.topic, delivery.topic_alias) = (topic, None);
            }
        }
        codec::put_publish(out, version, delivery, bytes_max)
    }

    /// A QoS 2 message reached the client over an earlier connection, which may have ended before that
    /// was durable: make it so, then [`Session::complete`] the number, and its PUBREL leaves.
    pub fn release_again(&mut self, packet_id: u16) -> u64 {
        self.window.sent(packet_id, Stage::Comp);
        self.inbound.our_pubrel(packet_id)
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

/// [MQTT-4.3.2-1], [MQTT-4.3.3-1], [MQTT-4.13.1-1]
fn wrong_answer() -> Violation {
    Violation::protocol("an answer that is not of the QoS of its message, or too early")
}

fn too_many_under_way() -> Violation {
    Violation::new(reason::RECEIVE_MAX_EXCEEDED, "more publishes under way than Receive Maximum")
}

/// The will as the PUBLISH that it becomes.
fn will_of(version: Version, will: v5::LastWill) -> Will {
    let delay_s = will.will_delay_interval_sec.unwrap_or(0);
    let properties = v5::PublishProperties {
        correlation_data: will.correlation_data,
        message_expiry_interval: will.message_expiry_interval,
        content_type: will.content_type,
        user_properties: will.user_properties,
        is_utf8_payload: will.is_utf8_payload.unwrap_or(false),
        response_topic: will.response_topic,
        ..v5::PublishProperties::default()
    };
    let publish = Box::new(Publish {
        dup: false,
        retain: will.retain,
        qos: will.qos,
        topic: ByteString::from(&*will.topic),
        packet_id: None,
        payload: Bytes::copy_from_slice(&will.message),
        properties: (version == Version::V5).then_some(properties),
    });
    Will { publish, delay_s }
}

#[cfg(test)]
mod tests;
