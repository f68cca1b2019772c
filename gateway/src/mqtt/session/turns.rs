//! What has to wait among the acks, and its answers.
//!
//! Invariant: a turn comes when everything that came before it is durable; what is to be durable before
//! its answer is a turn again.

use std::num::NonZeroU16;

use bytes::BytesMut;
use bytestring::ByteString;
use rmqtt_codec::v5;

use super::super::codec;
use super::super::reason::{self, Violation};
use super::super::subscriptions::Options;
use super::Session;

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

impl Session {
    pub(super) fn take_turn(&mut self, turn: Turn, out: &mut BytesMut) {
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
}
