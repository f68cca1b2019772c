//! The session: any sequence of packets, commits, cuts, failures and restarts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use rmqtt_codec::types::{Publish, QoS};
use rmqtt_codec::v5;
use storage::Attributes;

use super::Input;
use crate::mqtt::codec::{Connect, Delivery, Packet, Version};
use crate::mqtt::reason::{self, Violation};
use crate::mqtt::session::{
    DOWNLINK_IN_FLIGHT_MAX, Delivered, Effect, Inbound, Limits, Session, Turn,
};

/// A client with a mind of its own, a network that cuts, and a gateway that is killed.
///
/// - Acks leave in the order of what they answer, and none before that is durable.
/// - A packet id whose receipt is durable, or on its way, makes no second event.
/// - What waits is bounded, on both ways.
/// - A packet id is in use for one message to the client at a time, and is done with once.
///
/// The first byte chooses version, window, and whether the session outlives its connections.
pub fn session(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.byte();
    let mut world = World::new(choice);
    while let Some(step) = input.next() {
        world.step(step, &mut input);
        world.check();
    }
}

/// What the client is owed, in order.
#[derive(Clone, Copy, Debug)]
struct Owed {
    what: What,
    number: u64,
    due: bool,
    /// The QoS 2 exchange that it is about, 0 if none.
    exchange: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// A packet: its first byte and packet id.
    Packet(u8, u16),
    /// A turn of the caller's.
    Turn,
    /// Nothing any more: its connection has ended.
    Silence,
}

/// What was submitted to the log.
#[derive(Clone, Copy, Debug)]
enum Record {
    /// The receipt is of a packet id and an exchange.
    Event {
        receipt: Option<(u16, u64)>,
        acked: bool,
    },
    Release(u16, u64),
    Received,
    Change,
}

/// Where a message for the client stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Downlink {
    Sent(u8),
    Releasing,
}

const PUBACK: u8 = 0x40;
const PUBREC: u8 = 0x50;
const PUBREL: u8 = 0x62;
const PUBCOMP: u8 = 0x70;

/// Few, so that they meet.
const IDS: usize = 6;

struct World {
    version: Version,
    keeps: bool,
    limits: Limits,
    session: Option<Session>,
    now: Instant,
    out: BytesMut,
    owed: VecDeque<Owed>,
    pending: Vec<(Record, u64)>,
    /// Receipts that are durable, each of an exchange: a packet id may be in use for another one
    /// already when an answer to a repeated packet of the last one leaves.
    receipts: BTreeMap<u16, u64>,
    /// The last exchange of each packet id.
    exchanges: BTreeMap<u16, u64>,
    last_exchange: u64,
    /// Exchanges whose event was durable at some time.
    stored: BTreeSet<u64>,
    downlink: BTreeMap<u16, Downlink>,
    next_id: u16,
}

impl World {
    fn new(choice: u8) -> Self {
        let mut world = Self {
            version: if choice & 1 == 0 { Version::V3 } else { Version::V5 },
            keeps: choice & 2 != 0,
            limits: Limits {
                packet_bytes_max: 1024,
                in_flight_max: NonZeroU16::MIN.saturating_add(u16::from(choice >> 2 & 3)),
                keep_alive_s_max: u16::from(choice >> 4 & 3),
            },
            session: None,
            now: Instant::now(),
            out: BytesMut::new(),
            owed: VecDeque::new(),
            pending: Vec::new(),
            receipts: BTreeMap::new(),
            exchanges: BTreeMap::new(),
            last_exchange: 0,
            stored: BTreeSet::new(),
            downlink: BTreeMap::new(),
            next_id: 1,
        };
        world.connect(None);
        world
    }

    fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("there is always one between steps")
    }

    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        match step % 16 {
            0..=3 => self.publish(step, input),
            4 | 5 => self.pubrel(input),
            6 | 7 => self.answer(input),
            8 => self.subscribe(input),
            9 => self.alias(input),
            10 => self.commit(input),
            11 => self.commit_all(),
            12 => self.deliver(input),
            13 => self.refuse(input),
            14 => self.pass_time(input),
            _ => match input.byte() % 4 {
                0 => self.cut(),
                1 => self.fail(),
                2 => self.kill(),
                _ => self.receive_unless_full(Packet::PingReq).map_or((), |_| {
                    let said = self.out.split_off(self.out.len() - 2);
                    assert_eq!(&said[..], [0xD0, 0]);
                }),
            },
        }
    }

    /// A packet, if the session takes one: its callers ask before they decode another.
    fn receive_unless_full(&mut self, packet: Packet) -> Option<Effect> {
        if !self.session().takes_publishes() {
            return None;
        }
        let session = self.session.as_mut().expect("there is always one between steps");
        match session.receive(packet, &mut self.out) {
            Ok(effect) => Some(effect),
            Err(violation) => {
                assert!(violation.code >= 0x80 && !violation.why.is_empty());
                self.cut();
                None
            }
        }
    }

    fn publish(&mut self, step: u8, input: &mut Input<'_>) {
        let id = NonZeroU16::new(1 + input.below(IDS) as u16);
        let qos = [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce, QoS::ExactlyOnce];
        let qos = qos[usize::from(step & 3)];
        let packet = Publish {
            dup: step & 0x10 != 0,
            retain: step & 0x20 != 0,
            qos,
            topic: ByteString::from_static("t"),
            packet_id: if qos == QoS::AtMostOnce { None } else { id },
            payload: Bytes::new(),
            properties: (self.version == Version::V5).then(v5::PublishProperties::default),
        };
        let id = packet.packet_id.map_or(0, NonZeroU16::get);
        match self.receive_unless_full(Packet::Publish(Box::new(packet))) {
            Some(Effect::Publish(publishing)) => {
                if let Some(receipt) = publishing.receipt {
                    assert_eq!((receipt, qos), (id, QoS::ExactlyOnce));
                    assert!(!self.receipts.contains_key(&id), "a second event of a packet id");
                    assert!(!self.is_pending(id), "a second event of a packet id on its way");
                    self.last_exchange += 1;
                    self.exchanges.insert(id, self.last_exchange);
                }
                let Some(number) = publishing.number else { return };
                let what = match qos {
                    QoS::AtMostOnce => What::Silence,
                    QoS::AtLeastOnce => What::Packet(PUBACK, id),
                    QoS::ExactlyOnce => What::Packet(PUBREC, id),
                };
                let acked = qos != QoS::AtMostOnce;
                let receipt = publishing.receipt.map(|id| (id, self.last_exchange));
                self.owe_of(what, number, receipt.map_or(0, |(_, exchange)| exchange));
                self.pending.push((Record::Event { receipt, acked }, number));
            }
            Some(Effect::None) => {
                assert_eq!(qos, QoS::ExactlyOnce, "only a repetition has no event");
                self.owe_now_of(What::Packet(PUBREC, id), self.exchanges[&id]);
            }
            Some(other) => panic!("{other:?} of a PUBLISH"),
            None => {}
        }
    }

    fn pubrel(&mut self, input: &mut Input<'_>) {
        let id = 1 + input.below(IDS) as u16;
        let known = self.session().inbound().knows(id);
        let before = self.out.len();
        match self.receive_unless_full(Packet::PubRel(id)) {
            Some(Effect::Release { packet_id, number }) => {
                assert!(self.keeps && packet_id == id);
                let exchange = self.exchanges[&id];
                self.owe_of(What::Packet(PUBCOMP, id), number, exchange);
                self.pending.push((Record::Release(id, exchange), number));
            }
            Some(Effect::None) if known => {
                if !self.keeps {
                    self.receipts.remove(&id);
                }
                self.owe_now_of(What::Packet(PUBCOMP, id), self.exchanges[&id]);
            }
            // It has no turn to wait for.
            Some(Effect::None) => {
                let said = self.out.split_off(before);
                assert_eq!((said[0], &said[2..4]), (PUBCOMP, &id.to_be_bytes()[..]));
            }
            Some(other) => panic!("{other:?} of a PUBREL"),
            None => {}
        }
    }

    /// An answer to a message of ours, or to none.
    fn answer(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let known: Vec<u16> = self.downlink.keys().copied().collect();
        let id = match known.get(usize::from(choice >> 3)) {
            Some(id) => *id,
            None => u16::from(choice),
        };
        let stage = self.downlink.get(&id).copied();
        let (packet, ends) = match choice % 4 {
            0 => (Packet::PubAck(id), stage == Some(Downlink::Sent(1))),
            1 => (Packet::PubRec(id, reason::SUCCESS), false),
            2 => (Packet::PubRec(id, reason::QUOTA_EXCEEDED), stage == Some(Downlink::Sent(2))),
            _ => (Packet::PubComp(id), stage == Some(Downlink::Releasing)),
        };
        let pubrec = matches!(packet, Packet::PubRec(..));
        let failed = matches!(packet, Packet::PubRec(_, code) if code >= reason::FAILURE);
        let before = self.out.len();
        let Some(effect) = self.receive_unless_full(packet) else { return };
        match effect {
            Effect::Acked(acked) => assert!(acked == id && ends && self.keeps),
            Effect::Received { packet_id, number } => {
                assert!(packet_id == id && stage == Some(Downlink::Sent(2)) && self.keeps);
                self.downlink.insert(id, Downlink::Releasing);
                self.owe(What::Packet(PUBREL, id), number);
                self.pending.push((Record::Received, number));
            }
            Effect::None if pubrec && stage == Some(Downlink::Releasing) => {
                self.owe_now(What::Packet(PUBREL, id));
            }
            // [MQTT-4.3.3-4]: a PUBREC of nothing that says that it has failed is not answered.
            Effect::None if failed && stage.is_none() => assert_eq!(self.out.len(), before),
            Effect::None if pubrec && !ends => {
                let said = self.out.split_off(before);
                assert_eq!((said[0], &said[2..4]), (PUBREL, &id.to_be_bytes()[..]));
                if stage == Some(Downlink::Sent(2)) {
                    self.downlink.insert(id, Downlink::Releasing);
                }
            }
            Effect::None => assert!(!ends || !self.keeps),
            other => panic!("{other:?} of an answer"),
        }
        if ends {
            self.downlink.remove(&id);
        }
    }

    fn subscribe(&mut self, input: &mut Input<'_>) {
        let packet_id = NonZeroU16::MIN.saturating_add(u16::from(input.byte()));
        let packet = if packet_id.get() & 1 == 0 {
            Packet::Subscribe(v5::Subscribe {
                packet_id,
                id: None,
                user_properties: Vec::new(),
                topic_filters: vec![(
                    ByteString::from_static("t"),
                    v5::SubscriptionOptions::default(),
                )],
            })
        } else {
            Packet::Unsubscribe(v5::Unsubscribe {
                packet_id,
                user_properties: Vec::new(),
                topic_filters: vec![ByteString::from_static("t")],
            })
        };
        if let Some(effect) = self.receive_unless_full(packet) {
            assert_eq!(effect, Effect::None);
            self.owe_now(What::Turn);
        }
    }

    fn alias(&mut self, input: &mut Input<'_>) {
        let alias = NonZeroU16::MIN.saturating_add(u16::from(input.byte() % 20));
        let topic = if input.byte() & 1 == 0 { "" } else { "t" };
        let packet = Publish {
            dup: false,
            retain: false,
            qos: QoS::AtMostOnce,
            topic: ByteString::from_static(topic),
            packet_id: None,
            payload: Bytes::new(),
            properties: Some(v5::PublishProperties {
                topic_alias: Some(alias),
                ..v5::PublishProperties::default()
            }),
        };
        match self.receive_unless_full(Packet::Publish(Box::new(packet))) {
            Some(Effect::Publish(publishing)) => assert_eq!(publishing.publish.topic, "t"),
            Some(other) => panic!("{other:?} of a PUBLISH"),
            None => {}
        }
    }

    /// One record becomes durable, any of them.
    fn commit(&mut self, input: &mut Input<'_>) {
        if !self.pending.is_empty() {
            let which = input.below(self.pending.len());
            self.durable(which);
        }
    }

    fn commit_all(&mut self) {
        while !self.pending.is_empty() {
            self.durable(0);
        }
    }

    fn durable(&mut self, which: usize) {
        let (record, number) = self.pending.remove(which);
        match record {
            Record::Event { receipt: Some((id, exchange)), .. } => {
                self.receipts.insert(id, exchange);
                self.stored.insert(exchange);
            }
            Record::Release(id, exchange) => {
                let released = self.receipts.remove(&id);
                assert_eq!(released, Some(exchange), "a release of another receipt");
            }
            Record::Event { .. } | Record::Received | Record::Change => {}
        }
        self.is_due(number);
        let session = self.session.as_mut().expect("there is always one between steps");
        session.complete(&[number], &mut self.out);
    }

    /// A publish is not taken.
    fn refuse(&mut self, input: &mut Input<'_>) {
        let events = self.pending.iter().enumerate().filter_map(|(at, (record, _))| match record {
            Record::Event { acked: true, .. } => Some(at),
            _ => None,
        });
        let events: Vec<_> = events.collect();
        // An earlier connection's are not this one's to refuse.
        let refusable = events.into_iter().rfind(|at| {
            let number = self.pending[*at].1;
            self.owed.iter().any(|owed| owed.number == number && owed.what != What::Silence)
        });
        let Some(at) = refusable else { return };
        let (_, number) = self.pending.remove(at);
        self.is_due(number);
        let session = self.session.as_mut().expect("there is always one between steps");
        let full = Violation::new(reason::QUOTA_EXCEEDED, "full");
        if input.byte() & 1 == 0 {
            session.forget(number);
            self.cut();
        } else if session.refuse(Some(number), full, &mut self.out).is_err() {
            assert_eq!(self.version, Version::V3, "v5 has negative acks");
            self.cut();
        }
    }

    fn deliver(&mut self, input: &mut Input<'_>) {
        let (qos, long) = (input.byte() % 3, input.byte());
        if qos > 0 && !self.session().takes_delivery() {
            assert!(self.downlink.len() >= usize::from(DOWNLINK_IN_FLIGHT_MAX.min(4)));
            return;
        }
        let packet_id = (qos > 0 && self.keeps).then_some(self.next_id);
        self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        self.put(qos, packet_id, long > 250);
    }

    fn put(&mut self, qos: u8, packet_id: Option<u16>, large: bool) {
        let payload = if large { vec![0; 300] } else { Vec::new() };
        let none = Attributes::default();
        let delivery = Delivery {
            topic: "t",
            payload: &payload,
            attributes: &none,
            qos,
            packet_id,
            dup: false,
            retain: false,
            expiry_s: None,
            subscription_ids: &[],
            topic_alias: None,
        };
        let before = self.out.len();
        let session = self.session.as_mut().expect("there is always one between steps");
        let delivered = session.deliver(delivery, &mut self.out);
        let said = self.out.split_off(before);
        if delivered == Delivered::TooLarge {
            assert!(large && said.is_empty());
            return;
        }
        assert!(said.len() <= 256, "larger than the client takes");
        if qos > 0 {
            let at = if said[1] & 0x80 == 0 { 5 } else { 6 };
            let id = u16::from_be_bytes([said[at], said[at + 1]]);
            assert_ne!(id, 0);
            let before = self.downlink.insert(id, Downlink::Sent(qos));
            assert_eq!(before, None, "a packet id that is in use");
        }
    }

    fn pass_time(&mut self, input: &mut Input<'_>) {
        self.now += Duration::from_secs(input.byte().into());
        let now = self.now;
        self.session().heard(now);
        assert!(self.session().deadline().is_none_or(|deadline| deadline > now));
    }

    /// The connection is lost, and the client comes back.
    fn cut(&mut self) {
        let inbound = self.part();
        self.connect(self.keeps.then_some(inbound));
    }

    /// A commit fails: nothing that is not durable will be.
    fn fail(&mut self) {
        let mut inbound = self.part();
        inbound.fail();
        self.pending.clear();
        self.owed.clear();
        self.connect(self.keeps.then_some(inbound));
    }

    /// The gateway is killed: what is durable is all there is.
    fn kill(&mut self) {
        self.part();
        self.pending.clear();
        self.owed.clear();
        let restored = Inbound::restored(self.receipts.keys().copied());
        self.connect(self.keeps.then_some(restored));
    }

    fn part(&mut self) -> Inbound {
        self.out.clear();
        for owed in &mut self.owed {
            owed.what = What::Silence;
        }
        self.session.take().expect("there is always one between steps").into_inbound()
    }

    fn connect(&mut self, before: Option<Inbound>) {
        if !self.keeps {
            self.pending.clear();
            self.owed.clear();
            self.receipts.clear();
            self.downlink.clear();
        }
        let packet = v5::Connect {
            clean_start: !self.keeps,
            keep_alive: self.limits.keep_alive_s_max * 2,
            session_expiry_interval_secs: if self.keeps { 100 } else { 0 },
            max_packet_size: std::num::NonZeroU32::new(256),
            receive_max: NonZeroU16::new(4),
            client_id: ByteString::from_static("c"),
            ..v5::Connect::default()
        };
        let connect = Connect { version: self.version, is_v31: false, packet: Box::new(packet) };
        let session = Session::open(connect, &self.limits, 1, self.now);
        let mut session = session.expect("a CONNECT that is in order");
        let expiry_s = session.expiry_s();
        session.welcome(before, self.keeps, expiry_s, &mut self.out);
        self.out.clear();
        self.session = Some(session);
        // What the client has not answered is sent again.
        for (id, stage) in std::mem::take(&mut self.downlink) {
            match stage {
                Downlink::Sent(qos) => self.put(qos, Some(id), false),
                Downlink::Releasing => {
                    self.downlink.insert(id, stage);
                    let number = self.session().release_again(id);
                    self.owe(What::Packet(PUBREL, id), number);
                    self.pending.push((Record::Received, number));
                }
            }
        }
    }

    fn owe(&mut self, what: What, number: u64) {
        self.owe_of(what, number, 0);
    }

    fn owe_of(&mut self, what: What, number: u64, exchange: u64) {
        self.owed.push_back(Owed { what, number, due: false, exchange });
    }

    /// Owes what waits for nothing but its turn.
    fn owe_now(&mut self, what: What) {
        self.owe_now_of(what, 0);
    }

    fn owe_now_of(&mut self, what: What, exchange: u64) {
        self.owed.push_back(Owed { what, number: u64::MAX, due: true, exchange });
    }

    /// Whether the event of a packet id is on its way to the log.
    fn is_pending(&self, id: u16) -> bool {
        let event_of = |record: &Record| matches!(record, Record::Event { receipt: Some((used, _)), .. } if *used == id);
        self.pending.iter().any(|(record, _)| event_of(record))
    }

    fn is_due(&mut self, number: u64) {
        let owed = self.owed.iter_mut().find(|owed| owed.number == number);
        owed.expect("every number is owed something").due = true;
    }

    /// Everything that is due has left, in order, and nothing else has.
    fn check(&mut self) {
        loop {
            let mut said = &self.out[..];
            let mut turns = 0;
            while let Some(owed) = self.owed.pop_front_if(|owed| owed.due) {
                match owed.what {
                    What::Silence => {}
                    What::Turn => turns += 1,
                    What::Packet(first, id) => {
                        let [at, len, high, low, after @ ..] = said else {
                            panic!("{owed:?} has not left")
                        };
                        assert_eq!((*at, u16::from_be_bytes([*high, *low])), (first, id));
                        let (code, after) = after.split_at(usize::from(*len) - 2);
                        said = after;
                        let taken = code.is_empty();
                        match first {
                            // v3 has no other: it must not get one of an event that was refused.
                            PUBREC if taken => {
                                let stored = self.stored.contains(&owed.exchange);
                                assert!(stored, "a PUBREC before its event");
                            }
                            PUBCOMP if taken => {
                                let durable = self.receipts.get(&id) == Some(&owed.exchange);
                                assert!(!durable, "a PUBCOMP too early");
                            }
                            _ => {}
                        }
                    }
                }
            }
            assert!(said.is_empty(), "what nobody waits for: {said:?}");
            self.out.clear();
            if turns == 0 {
                break;
            }
            for _ in 0..turns {
                self.take_turn();
            }
        }
        assert_eq!(self.session().next_turn(), None);
        let waiting_max = usize::from(self.limits.in_flight_max.get()) + 2 * 64 + 4;
        assert!(self.session().unacked() <= waiting_max);
        assert!(self.owed.len() <= waiting_max);
        assert!(self.session().room_for_deliveries() <= 4);
        assert!(self.downlink.len() <= 4);
        assert!(self.session().inbound().receipts() <= 4 * 4);
    }

    fn take_turn(&mut self) {
        let keeps = self.keeps;
        let session = self.session.as_mut().expect("there is always one between steps");
        let number = match session.next_turn().expect("a turn that is due") {
            Turn::Subscribe(subscribe) if keeps => {
                Some(session.await_suback(subscribe.packet_id, vec![0], Vec::new()))
            }
            Turn::Unsubscribe(unsubscribe) if keeps => {
                Some(session.await_unsuback(unsubscribe.packet_id, vec![0]))
            }
            _ => None,
        };
        if let Some(number) = number {
            self.owe(What::Turn, number);
            self.pending.push((Record::Change, number));
        }
    }
}
