//! What the server owes a client for what it sent: acks in their order, and the receipts of QoS 2.
//!
//! Owns: the row of acks that wait for something to become durable, and the state of every packet id
//! whose QoS 2 exchange is under way.
//! Invariant: a PUBREC leaves only after its event and receipt are durable together, and a PUBCOMP
//! only after the receipt is durably gone [MQTT-4.3.3-2]; a packet id with a receipt never makes a
//! second event; a publish that is refused has no receipt from then on, so that it may come again, and
//! no ack says that it is taken. Everything leaves in the order in which its packet came
//! [MQTT-4.6.0-2].
//! Deliberately absent: how receipts are stored. This lives as long as the session, which may be
//! longer than a connection: [`Inbound::part`] says what becomes of the acks of one that has ended.

use std::borrow::Cow;
use std::collections::HashMap;

use bytes::BytesMut;

use super::super::codec::{self, Version};
use super::super::reason;
use crate::ingest::AckLedger;

/// Where a QoS 2 exchange stands, from the server's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Receipt {
    /// The event is on its way to the log.
    Storing,
    /// Event and receipt are durable.
    Stored,
    /// PUBREL came; the receipt is on its way out of the log.
    Releasing,
}

/// What leaves when its turn has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing.
    Silent,
    PubAck,
    PubRec,
    /// As `PubRec`, for a connection that has ended.
    SilentPubRec,
    /// Of a repetition: it says what the first says, and stands for nothing.
    PubRecAgain,
    PubRel,
    PubComp,
    /// As `PubComp`, for a connection that has ended.
    SilentPubComp,
    /// The caller's turn: [`Inbound::release`] gives how many have come.
    Turn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ack {
    kind: Kind,
    /// Reason code, for versions that have one.
    code: u8,
    packet_id: u16,
}

/// What a QoS 2 PUBLISH is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// New: an event, with this number, whose receipt is to be stored with it.
    New(u64),
    /// One that has its event already; its PUBREC leaves in turn.
    Repeated,
    /// The id is still being released: its owner has had no PUBCOMP yet.
    InUse,
}

/// What the caller has to do about a PUBREL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Release {
    /// Make the receipt's end durable, then complete this number.
    Receipt(u64),
    /// Nothing; its PUBCOMP leaves in turn.
    Repeated,
    /// There is no such receipt.
    Unknown,
    /// The PUBREC has not left yet.
    Early,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Inbound {
    acks: AckLedger<Ack>,
    receipts: HashMap<u16, Receipt>,
    /// QoS 1 publishes that wait for their ack.
    unacked: usize,
    /// What the acks of those that were refused say to a person, by packet id.
    reasons: HashMap<u16, Cow<'static, str>>,
}

impl Inbound {
    /// What is known of a session after a restart: its durable receipts.
    pub fn restored(receipts: impl IntoIterator<Item = u16>) -> Self {
        let receipts = receipts.into_iter().map(|id| (id, Receipt::Stored)).collect();
        Self { receipts, ..Self::default() }
    }

    /// Packet ids with a receipt.
    pub(crate) fn ids(&self) -> impl Iterator<Item = u16> {
        self.receipts.keys().copied()
    }

    /// Acks that wait, of every kind.
    pub(crate) fn waiting(&self) -> usize {
        self.acks.len()
    }

    /// QoS 1 and 2 publishes that are under way: what Receive Maximum counts [MQTT-3.3.4-7].
    pub(crate) fn under_way(&self) -> usize {
        self.unacked + self.receipts.len()
    }

    /// QoS 2 exchanges that are under way.
    pub(crate) fn receipts(&self) -> usize {
        self.receipts.len()
    }

    /// Whether a QoS 2 exchange with this packet id is under way.
    pub(crate) fn knows(&self, packet_id: u16) -> bool {
        self.receipts.contains_key(&packet_id)
    }

    fn enter(&mut self, kind: Kind, packet_id: u16) -> u64 {
        self.acks.enter(Ack { kind, code: reason::SUCCESS, packet_id })
    }

    /// A publish of QoS 0 that something after it waits for.
    pub(crate) fn unacknowledged(&mut self) -> u64 {
        self.enter(Kind::Silent, 0)
    }

    /// A publish of QoS 1.
    pub(crate) fn qos1(&mut self, packet_id: u16) -> u64 {
        self.unacked += 1;
        self.enter(Kind::PubAck, packet_id)
    }

    /// A publish of QoS 2.
    pub(crate) fn qos2(&mut self, packet_id: u16) -> Arrival {
        match self.receipts.get(&packet_id) {
            None => {
                self.receipts.insert(packet_id, Receipt::Storing);
                Arrival::New(self.enter(Kind::PubRec, packet_id))
            }
            // Its turn comes after that of the first, and so after the event is durable.
            Some(Receipt::Storing | Receipt::Stored) => {
                let number = self.enter(Kind::PubRecAgain, packet_id);
                self.acks.complete(number);
                Arrival::Repeated
            }
            Some(Receipt::Releasing) => Arrival::InUse,
        }
    }

    /// A PUBREL.
    pub(crate) fn pubrel(&mut self, packet_id: u16) -> Release {
        match self.receipts.get_mut(&packet_id) {
            None => Release::Unknown,
            Some(Receipt::Storing) => Release::Early,
            Some(receipt @ Receipt::Stored) => {
                *receipt = Receipt::Releasing;
                Release::Receipt(self.enter(Kind::PubComp, packet_id))
            }
            Some(Receipt::Releasing) => {
                let number = self.enter(Kind::PubComp, packet_id);
                self.acks.complete(number);
                Release::Repeated
            }
        }
    }

    /// A PUBREL of ours, once what it releases is durable.
    pub(crate) fn our_pubrel(&mut self, packet_id: u16) -> u64 {
        self.enter(Kind::PubRel, packet_id)
    }

    /// A turn of the caller's own, behind everything that came before.
    pub(crate) fn turn(&mut self) -> u64 {
        self.enter(Kind::Turn, 0)
    }

    /// This is durable.
    pub(crate) fn complete(&mut self, number: u64) {
        self.acks.complete(number);
    }

    /// Whether a publish of this number has an ack by which it could be refused.
    pub(crate) fn is_acked(&self, number: u64) -> bool {
        self.acks.get(number).is_some_and(|ack| ack.kind != Kind::Silent)
    }

    /// A publish is not taken: its ack says so, in turn. Its receipt does not wait for that turn: the
    /// client may be gone by then and send it again, and it is new then. `why` is empty where the client
    /// wants no words.
    pub(crate) fn refuse(&mut self, number: u64, code: u8, why: Cow<'static, str>) {
        self.set_code(number, code);
        self.acks.complete(number);
        if !why.is_empty()
            && let Some(&Ack { kind: Kind::PubAck | Kind::PubRec, packet_id, .. }) =
                self.acks.get(number)
        {
            self.reasons.insert(packet_id, why);
        }
        let Some(&Ack { kind: Kind::PubRec | Kind::SilentPubRec, packet_id, .. }) =
            self.acks.get(number)
        else {
            return;
        };
        self.receipts.remove(&packet_id);
        // Those of an exchange before this one have left, or were refused as well.
        self.acks.for_each_mut(|ack| {
            if ack.kind == Kind::PubRecAgain && ack.packet_id == packet_id {
                ack.code = code;
            }
        });
    }

    /// Nobody subscribes to a publish that is taken: its ack says so.
    pub(crate) fn unheard(&mut self, number: u64) {
        self.set_code(number, reason::NO_MATCHING_SUBSCRIBERS);
    }

    fn set_code(&mut self, number: u64, code: u8) {
        if let Some(ack) = self.acks.get_mut(number) {
            ack.code = code;
        }
    }

    /// Appends every ack whose turn has come; gives how many turns of the caller's own have.
    pub(crate) fn release(&mut self, version: Version, out: &mut BytesMut) -> usize {
        let mut turns = 0;
        while let Some(Ack { kind, code, packet_id }) = self.acks.release() {
            match kind {
                Kind::PubAck => {
                    self.unacked -= 1;
                    let why = self.reason(packet_id, code);
                    codec::put_puback(out, version, packet_id, code, &why);
                }
                Kind::PubRec => {
                    self.stored(packet_id, code);
                    let why = self.reason(packet_id, code);
                    codec::put_pubrec(out, version, packet_id, code, &why);
                }
                Kind::SilentPubRec => self.stored(packet_id, code),
                Kind::PubRecAgain => codec::put_pubrec(out, version, packet_id, code, ""),
                Kind::PubComp | Kind::SilentPubComp => {
                    if self.receipts.get(&packet_id) == Some(&Receipt::Releasing) {
                        self.receipts.remove(&packet_id);
                    }
                    if kind == Kind::PubComp {
                        codec::put_pubcomp(out, version, packet_id, reason::SUCCESS);
                    }
                }
                Kind::PubRel => codec::put_pubrel(out, version, packet_id, reason::SUCCESS),
                Kind::Turn => turns += 1,
                Kind::Silent => {}
            }
        }
        turns
    }

    /// What an ack with this code says to a person.
    fn reason(&mut self, packet_id: u16, code: u8) -> Cow<'static, str> {
        let refused = code >= reason::FAILURE;
        refused.then(|| self.reasons.remove(&packet_id)).flatten().unwrap_or_default()
    }

    /// The turn of a PUBREC has come. After one that refuses, the packet id may be in use again.
    fn stored(&mut self, packet_id: u16, code: u8) {
        if code < reason::FAILURE
            && let Some(receipt @ Receipt::Storing) = self.receipts.get_mut(&packet_id)
        {
            *receipt = Receipt::Stored;
        }
    }

    /// A publish was given up before it entered a ring: there will be no event of it.
    pub(crate) fn forget(&mut self, number: u64) {
        self.refuse(number, reason::IMPLEMENTATION_SPECIFIC, Cow::default());
    }

    /// The connection has ended, and the session goes on: what its acks stood for still happens, but
    /// nobody is told. The client asks again, and its packets take their turn behind these.
    pub(crate) fn part(&mut self) {
        self.acks.for_each_mut(|ack| {
            ack.kind = match ack.kind {
                Kind::PubRec | Kind::SilentPubRec => Kind::SilentPubRec,
                Kind::PubComp | Kind::SilentPubComp => Kind::SilentPubComp,
                Kind::Silent | Kind::PubAck | Kind::PubRecAgain | Kind::PubRel | Kind::Turn => {
                    Kind::Silent
                }
            };
        });
        self.unacked = 0;
        self.reasons.clear();
    }

    /// What waits and is not durable never will be: no such event, no such release. Begins anew.
    pub(crate) fn fail(&mut self) {
        let waiting: Vec<_> = self.acks.drain().collect();
        for (ack, durable) in waiting {
            let receipt = self.receipts.get(&ack.packet_id).copied();
            match (ack.kind, receipt) {
                (Kind::PubRec | Kind::SilentPubRec, _) if durable => {
                    self.stored(ack.packet_id, ack.code);
                }
                (Kind::PubRec | Kind::SilentPubRec, Some(Receipt::Storing)) => {
                    self.receipts.remove(&ack.packet_id);
                }
                (Kind::PubComp | Kind::SilentPubComp, Some(Receipt::Releasing)) if durable => {
                    self.receipts.remove(&ack.packet_id);
                }
                (Kind::PubComp | Kind::SilentPubComp, Some(Receipt::Releasing)) => {
                    self.receipts.insert(ack.packet_id, Receipt::Stored);
                }
                _ => {}
            }
        }
        let receipts = std::mem::take(&mut self.receipts);
        *self = Self { receipts, ..Self::default() };
    }
}

#[cfg(test)]
mod tests;
