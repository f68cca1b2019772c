//! Exactly once, against everything that may go wrong between a client and a durable log.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};

use proptest::prelude::*;

use super::*;

/// What the log takes in one piece.
#[derive(Clone, Copy, Debug)]
enum Record {
    /// An event and its receipt: message, packet id.
    Event(u32, u16),
    /// The end of a receipt.
    Release(u16),
}

/// What the client still owes a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its PUBLISH, until a PUBREC.
    Publish,
    /// Its PUBREL, until a PUBCOMP.
    Release,
}

/// A client, a network, a gateway and its log.
#[derive(Default)]
struct World {
    inbound: Inbound,
    /// Submitted and not durable: what, and its number.
    pending: VecDeque<(Record, u64)>,
    events: Vec<u32>,
    receipts: BTreeSet<u16>,
    /// The client's exchanges, oldest first.
    exchanges: BTreeMap<u32, (u16, Stage)>,
    done: HashSet<u32>,
    next_message: u32,
    /// What the client has sent that the gateway has not read.
    to_gateway: VecDeque<(u8, u16, u32)>,
}

const IDS: u16 = 4;

impl World {
    fn publish(&mut self) {
        let used: Vec<u16> = self.exchanges.values().map(|(id, _)| *id).collect();
        if let Some(id) = (1..=IDS).find(|id| !used.contains(id)) {
            let message = self.next_message;
            self.next_message += 1;
            self.exchanges.insert(message, (id, Stage::Publish));
            self.to_gateway.push_back((3, id, message));
        }
    }

    /// The gateway reads a packet.
    fn read(&mut self) {
        let Some((kind, id, message)) = self.to_gateway.pop_front() else { return };
        if kind == 3 {
            match self.inbound.qos2(id) {
                Arrival::New(number) => {
                    self.pending.push_back((Record::Event(message, id), number));
                }
                Arrival::Repeated => self.answer(),
                Arrival::InUse => panic!("the client reuses no id before its PUBCOMP"),
            }
        } else {
            match self.inbound.pubrel(id) {
                Release::Receipt(number) => self.pending.push_back((Record::Release(id), number)),
                Release::Repeated => self.answer(),
                Release::Unknown => self.pubcomp(id),
                Release::Early => panic!("the client releases only what has a PUBREC"),
            }
        }
    }

    /// The gateway reads a packet, does not take what it publishes, and closes, as v3 has no other way
    /// to say so.
    fn refuse(&mut self) {
        let before = self.pending.len();
        self.read();
        if let Some((Record::Event(..), number)) = self.pending.get(before) {
            self.inbound.refuse(*number, reason::QUOTA_EXCEEDED, "full".into());
            self.pending.truncate(before);
            self.cut();
        }
    }

    /// The gateway's answers, read by the client at once.
    fn answer(&mut self) {
        let mut out = BytesMut::new();
        self.inbound.release(Version::V3, &mut out);
        for packet in out.chunks(4) {
            let id = u16::from_be_bytes([packet[2], packet[3]]);
            if packet[0] == 0x50 {
                let sent = self.exchanges.iter_mut().find(|(_, (used, _))| *used == id);
                if let Some((message, (_, stage))) = sent {
                    assert!(self.events.contains(message), "a PUBREC before its event is durable");
                    *stage = Stage::Release;
                    self.to_gateway.push_back((6, id, 0));
                }
            } else {
                self.pubcomp(id);
            }
        }
    }

    fn pubcomp(&mut self, id: u16) {
        assert!(!self.receipts.contains(&id), "a PUBCOMP while the receipt is durable");
        let released =
            |(_, (used, stage)): &(&u32, &(u16, Stage))| *used == id && *stage == Stage::Release;
        let over = self.exchanges.iter().find(released).map(|(message, _)| *message);
        if let Some(message) = over {
            self.exchanges.remove(&message);
            self.done.insert(message);
        }
    }

    /// The log makes so many records durable, in their order.
    fn commit(&mut self, records: usize) {
        let records = records.min(self.pending.len());
        for (record, number) in self.pending.drain(..records) {
            match record {
                Record::Event(message, id) => {
                    self.events.push(message);
                    self.receipts.insert(id);
                }
                Record::Release(id) => {
                    self.receipts.remove(&id);
                }
            }
            self.inbound.complete(number);
        }
    }

    /// The client connects again, and sends again what is unanswered [MQTT-4.4.0-1].
    fn reconnect(&mut self) {
        self.to_gateway.clear();
        for (message, (id, stage)) in &self.exchanges {
            let kind = if *stage == Stage::Publish { 3 } else { 6 };
            self.to_gateway.push_back((kind, *id, *message));
        }
    }

    /// The connection is lost. What was submitted goes on.
    fn cut(&mut self) {
        self.inbound.part();
        self.reconnect();
    }

    /// A commit fails: nothing that is not durable will be.
    fn fail(&mut self) {
        self.inbound.part();
        self.pending.clear();
        self.inbound.fail();
        self.reconnect();
    }

    /// The gateway is killed: what is durable is all there is.
    fn kill(&mut self) {
        self.pending.clear();
        self.inbound = Inbound::restored(self.receipts.iter().copied());
        self.reconnect();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Publish,
    Read,
    Commit(usize),
    Answer,
    Refuse,
    Cut,
    Fail,
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::Publish),
        12 => Just(Step::Read),
        6 => (1..3_usize).prop_map(Step::Commit),
        8 => Just(Step::Answer),
        1 => Just(Step::Refuse),
        1 => Just(Step::Cut),
        1 => Just(Step::Fail),
        1 => Just(Step::Kill),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// Whatever is cut, fails or is killed, and wherever: every message becomes one event.
    #[test]
    fn every_message_becomes_exactly_one_event(steps in prop::collection::vec(step(), 0..200)) {
        let mut world = World::default();
        for step in steps {
            match step {
                Step::Publish => world.publish(),
                Step::Read => world.read(),
                Step::Commit(records) => world.commit(records),
                Step::Answer => world.answer(),
                Step::Refuse => world.refuse(),
                Step::Cut => world.cut(),
                Step::Fail => world.fail(),
                Step::Kill => world.kill(),
            }
            let once: HashSet<u32> = world.events.iter().copied().collect();
            prop_assert_eq!(once.len(), world.events.len(), "a second event: {:?}", world.events);
        }
        // In quiet, everything comes to its end.
        world.reconnect();
        for _ in 0..10 * IDS {
            while !world.to_gateway.is_empty() {
                world.read();
            }
            world.commit(usize::MAX);
            world.answer();
        }
        prop_assert!(world.exchanges.is_empty(), "{:?}", world.exchanges);
        prop_assert!(world.receipts.is_empty(), "{:?}", world.receipts);
        prop_assert_eq!(world.inbound.receipts(), 0);
        let mut events = world.events;
        events.sort_unstable();
        prop_assert_eq!(events, (0..world.next_message).collect::<Vec<_>>());
    }
}
