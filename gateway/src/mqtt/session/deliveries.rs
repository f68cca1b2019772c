//! Messages for the client, and its answers to them.
//!
//! Invariant: no more are under way than the client takes [MQTT-3.3.4-9], and none is larger
//! [MQTT-3.1.2-24].

use bytes::BytesMut;
use bytestring::ByteString;

use super::super::codec::{self, Delivery};
use super::super::reason::{self, Violation};
use super::outbound::{Ended, Received, Stage};
use super::{Effect, Session};

/// QoS 1 and 2 messages on their way to one client, at most; fewer if it asks so by Receive Maximum.
pub const DOWNLINK_IN_FLIGHT_MAX: u16 = 64;

/// What became of a message for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// It is in the buffer.
    Sent,
    /// It is larger than what the client takes: dropped [MQTT-3.1.2-25].
    TooLarge,
}

impl Session {
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

    /// The last answer to a message for the client.
    pub(super) fn ended(&mut self, packet_id: u16, stage: Stage) -> Result<Effect, Violation> {
        match self.window.ended(packet_id, stage) {
            Ended::Now if self.keeps => Ok(Effect::Acked(packet_id)),
            Ended::Now | Ended::Unknown => Ok(Effect::None),
            Ended::Wrong => Err(wrong_answer()),
        }
    }

    pub(super) fn pubrec(
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
}

/// [MQTT-4.3.2-1], [MQTT-4.3.3-1], [MQTT-4.13.1-1]
fn wrong_answer() -> Violation {
    Violation::protocol("an answer that is not of the QoS of its message, or too early")
}
