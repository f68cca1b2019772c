use proptest::prelude::*;

use super::outbound::Ended;
use super::*;
use crate::mqtt::codec::Delivery;
use crate::mqtt::wire::{self, BOTH, ConnectPacket, V3, V5, buf, field, packet};

const BYTES_MAX: usize = 1 << 20;
const NOTHING: [u8; 0] = [];
const EXPIRY_S_MAX: u32 = 9;

fn limits() -> Limits {
    Limits {
        packet_bytes_max: BYTES_MAX,
        in_flight_max: NonZeroU16::new(3).unwrap(),
        keep_alive_s_max: 0,
    }
}

/// A session, and everything that it has said so far.
struct Client {
    session: Session,
    out: BytesMut,
}

fn open(bytes: &[u8], limits: Limits) -> (Result<Session, Violation>, BytesMut) {
    let connect = codec::decode_connect(&mut buf(bytes), BYTES_MAX).unwrap().unwrap();
    let mut out = BytesMut::new();
    let version = connect.version;
    let session = Session::open(connect, &limits, 0xABC, Instant::now());
    let session = session.map(|mut session| {
        let expiry_s = session.expiry_s().min(EXPIRY_S_MAX);
        session.welcome(None, expiry_s > 0, expiry_s, &mut out);
        session
    });
    let session = session
        .inspect_err(|violation| codec::put_refusal(&mut out, version, violation, usize::MAX));
    (session, out)
}

impl Client {
    fn new(version: Version) -> Self {
        Self::with(&ConnectPacket::new(version))
    }

    fn with(connect: &ConnectPacket) -> Self {
        let (session, out) = open(&connect.bytes(), limits());
        let mut client = Self { session: session.unwrap(), out };
        client.said();
        client
    }

    fn send(&mut self, bytes: &[u8]) -> Result<Effect, Violation> {
        let packet = codec::decode(&mut buf(bytes), self.session.version(), BYTES_MAX)?.unwrap();
        self.session.receive(packet, &mut self.out)
    }

    fn code(&mut self, bytes: &[u8]) -> u8 {
        self.send(bytes).unwrap_err().code
    }

    fn publish(&mut self, id: u16) -> u64 {
        let bytes = wire::publish(self.session.version(), "t", Some(id), "");
        match self.send(&bytes).unwrap() {
            Effect::Publish(publishing) => publishing.number.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn complete(&mut self, numbers: &[u64]) -> Vec<u8> {
        self.session.complete(numbers, &mut self.out);
        self.said()
    }

    fn said(&mut self) -> Vec<u8> {
        self.out.split().to_vec()
    }
}

fn connack_of_refusal(version: Version, said: &[u8]) -> Option<u8> {
    match (version, said) {
        (_, []) => None,
        (V3, [0x20, 2, 0, code]) | (V5, [0x20, _, 0, code, _, ..]) => Some(*code),
        _ => panic!("not a CONNACK: {said:?}"),
    }
}

#[test]
fn connack_comes_first_and_without_a_session_mqtt_3_2_0_1() {
    let (session, out) = open(&wire::connect(V3), limits());
    assert!(session.is_ok());
    assert_eq!(&out[..], [0x20, 2, 0, 0]);
}

#[test]
fn connack_of_v5_tells_every_limit() {
    let asked = ConnectPacket { properties: vec![0x11, 0, 0, 0, 10], ..ConnectPacket::new(V5) };
    let (session, out) = open(&asked.bytes(), Limits { keep_alive_s_max: 60, ..limits() });
    assert_eq!(session.unwrap().deadline().map(|_| ()), Some(()), "the keep-alive that it is told");
    let list = [
        &[0x11, 0, 0, 0, 9][..], // session expiry: less than it asked for
        &[0x21, 0, 3],           // receive maximum
        &[0x27, 0, 0x10, 0, 0],  // maximum packet size
        &[0x22, 0, 10],          // topic alias maximum
        &[0x13, 0, 60],          // server keep-alive
    ]
    .concat();
    assert_eq!(&out[..5], [0x20, list.len() as u8 + 3, 0, 0, list.len() as u8]);
    assert_eq!(&out[5..], list);
}

#[test]
fn a_client_without_a_name_gets_one_mqtt_3_1_3_6_and_7() {
    for version in BOTH {
        let nameless = ConnectPacket { client_id: "", ..ConnectPacket::new(version) };
        let (session, out) = open(&nameless.bytes(), limits());
        assert_eq!(session.unwrap().client_id(), "auto-0000000000000abc");
        let assigned = [&[0x12][..], &field("auto-0000000000000abc")].concat();
        let told = out.windows(assigned.len()).any(|window| window == assigned);
        assert_eq!(told, version == V5);
    }
}

#[test]
fn an_empty_client_id_needs_a_clean_session_in_v3_only_mqtt_3_1_3_8() {
    for version in BOTH {
        let nameless = ConnectPacket { client_id: "", flags: 0, ..ConnectPacket::new(version) };
        let (session, out) = open(&nameless.bytes(), limits());
        match version {
            V3 => {
                assert!(session.is_err());
                assert_eq!(&out[..], [0x20, 2, 0, 2]);
            }
            V5 => assert!(session.is_ok()),
        }
    }
}

#[test]
fn a_client_id_that_is_too_long_is_refused() {
    for (version, code) in [(V3, 2), (V5, reason::CLIENT_ID_NOT_VALID)] {
        let id: &'static str = Box::leak("x".repeat(CLIENT_ID_BYTES_MAX + 1).into_boxed_str());
        let long = ConnectPacket { client_id: id, ..ConnectPacket::new(version) };
        let (session, out) = open(&long.bytes(), limits());
        assert!(session.is_err());
        assert_eq!(connack_of_refusal(version, &out), Some(code));
    }
}

#[test]
fn auth_without_a_method_is_a_protocol_error_mqtt_4_12_0_1() {
    assert_eq!(Client::new(V5).code(&packet(0xF0, [])), reason::PROTOCOL_ERROR);
}

#[test]
fn keep_alive_counts_one_and_a_half_times_mqtt_3_1_2_22() {
    for version in BOTH {
        let connect = ConnectPacket { keep_alive: 10, ..ConnectPacket::new(version) };
        let mut session = Client::with(&connect).session;
        let now = Instant::now();
        session.heard(now);
        assert_eq!(session.deadline(), Some(now + Duration::from_secs(15)));
    }
}

#[test]
fn a_keep_alive_of_zero_means_none_mqtt_3_1_2_10() {
    for version in BOTH {
        assert_eq!(Client::new(version).session.deadline(), None);
    }
}

#[test]
fn a_pingreq_is_answered_mqtt_3_12_4_1() {
    for version in BOTH {
        let mut client = Client::new(version);
        assert_eq!(client.send(&[0xC0, 0]), Ok(Effect::None));
        assert_eq!(client.said(), [0xD0, 0]);
    }
}

#[test]
fn a_publish_of_qos_1_is_acked_only_when_it_is_durable() {
    for version in BOTH {
        let mut client = Client::new(version);
        let number = client.publish(7);
        assert_eq!(client.said(), NOTHING);
        assert_eq!(client.complete(&[number]), [0x40, 2, 0, 7]);
    }
}

#[test]
fn acks_leave_in_the_order_of_the_publishes_mqtt_4_6_0_2() {
    for version in BOTH {
        let mut client = Client::new(version);
        let numbers = [client.publish(7), client.publish(5), client.publish(9)];
        assert_eq!(client.complete(&[numbers[2]]), NOTHING);
        assert_eq!(client.complete(&[numbers[0]]), [0x40, 2, 0, 7]);
        assert_eq!(client.complete(&[numbers[1]]), [0x40, 2, 0, 5, 0x40, 2, 0, 9]);
    }
}

#[test]
fn a_publish_of_qos_0_has_no_ack() {
    for version in BOTH {
        let mut client = Client::new(version);
        let effect = client.send(&wire::publish(version, "t", None, "x")).unwrap();
        assert!(matches!(effect, Effect::Publish(Publishing { number: None, .. })));
        assert_eq!(client.session.unacked(), 0);
    }
}

fn qos2(version: Version, id: u16) -> Vec<u8> {
    wire::publish_with(version, 0x34, "t", Some(id), &[], "")
}

fn pubrel(id: u16) -> Vec<u8> {
    packet(0x62, id.to_be_bytes())
}

impl Client {
    fn publish_qos2(&mut self, id: u16) -> Option<u64> {
        match self.send(&qos2(self.session.version(), id)).unwrap() {
            Effect::Publish(publishing) => {
                assert_eq!(publishing.receipt, Some(id));
                publishing.number
            }
            Effect::None => None,
            other => panic!("{other:?}"),
        }
    }

    /// A client whose session is kept.
    fn kept(version: Version) -> Self {
        Self::with(&ConnectPacket {
            flags: 0,
            properties: if version == V5 { vec![0x11, 0, 0, 0, 9] } else { Vec::new() },
            ..ConnectPacket::new(version)
        })
    }

    /// The next connection of a session that is kept.
    fn reconnected(self) -> Self {
        let mut client = Self::kept(self.session.version());
        let before = self.session.into_inbound();
        let expiry_s = client.session.expiry_s();
        client.session.welcome(Some(before), true, expiry_s, &mut client.out);
        client.said();
        client
    }
}

#[test]
fn a_pubrec_waits_for_the_event_and_a_pubcomp_for_the_end_of_the_receipt_mqtt_4_3_3_2() {
    for version in BOTH {
        let mut client = Client::kept(version);
        let number = client.publish_qos2(5).unwrap();
        assert_eq!(client.said(), NOTHING);
        assert_eq!(client.complete(&[number]), [0x50, 2, 0, 5]);
        let Ok(Effect::Release { packet_id: 5, number }) = client.send(&pubrel(5)) else {
            panic!("no release")
        };
        assert_eq!(client.said(), NOTHING);
        assert_eq!(client.complete(&[number]), [0x70, 2, 0, 5]);
        assert_eq!(client.session.inbound.receipts(), 0);
    }
}

#[test]
fn a_repeated_packet_id_gets_its_pubrec_and_no_second_event() {
    for version in BOTH {
        let mut client = Client::kept(version);
        let number = client.publish_qos2(5).unwrap();
        assert_eq!(client.publish_qos2(5), None);
        assert_eq!(client.said(), NOTHING, "not before the event is durable");
        assert_eq!(client.complete(&[number]), [0x50, 2, 0, 5, 0x50, 2, 0, 5]);
        assert_eq!(client.publish_qos2(5), None);
        assert_eq!(client.said(), [0x50, 2, 0, 5]);
    }
}

#[test]
fn a_pubrel_before_its_pubrec_and_an_id_before_its_pubcomp_are_errors() {
    for version in BOTH {
        let mut client = Client::kept(version);
        let number = client.publish_qos2(5).unwrap();
        assert_eq!(client.code(&pubrel(5)), reason::PROTOCOL_ERROR);
        client.complete(&[number]);
        client.send(&pubrel(5)).unwrap();
        assert_eq!(client.code(&qos2(version, 5)), reason::PROTOCOL_ERROR);
    }
}

#[test]
fn receipts_are_bounded() {
    let mut client = Client::new(V5);
    for id in 1..=3 {
        let number = client.publish_qos2(id).unwrap();
        client.complete(&[number]);
    }
    assert_eq!(client.code(&qos2(V5, 4)), reason::RECEIVE_MAX_EXCEEDED);
    assert_eq!(client.code(&wire::publish(V5, "t", Some(4), "")), reason::RECEIVE_MAX_EXCEEDED);
    assert_eq!(client.publish_qos2(1), None, "a repetition is none too many");
    let mut client = Client::new(V3);
    for id in 1..=12 {
        let number = client.publish_qos2(id).unwrap();
        client.complete(&[number]);
    }
    assert_eq!(client.code(&qos2(V3, 13)), reason::RECEIVE_MAX_EXCEEDED);
}

#[test]
fn a_refused_qos_2_publish_leaves_no_receipt() {
    let mut client = Client::kept(V5);
    let number = client.publish_qos2(5).unwrap();
    client.publish_qos2(5);
    let full = Violation::new(reason::QUOTA_EXCEEDED, "");
    client.session.refuse(Some(number), full, &mut client.out).unwrap();
    assert_eq!(
        client.said(),
        [0x50, 3, 0, 5, reason::QUOTA_EXCEEDED, 0x50, 3, 0, 5, reason::QUOTA_EXCEEDED],
        "its repetition was not stored either"
    );
    assert!(client.publish_qos2(5).is_some(), "the id is free");
}

#[test]
fn a_refused_qos_2_publish_that_comes_again_over_the_next_connection_is_no_repetition() {
    let full = || Violation::new(reason::QUOTA_EXCEEDED, "");
    for version in BOTH {
        for is_held_up in [false, true] {
            let mut client = Client::kept(version);
            let before = is_held_up.then(|| client.publish(1));
            let number = client.publish_qos2(5).unwrap();
            let refused = client.session.refuse(Some(number), full(), &mut client.out);
            assert_eq!(refused.is_err(), version == V3);

            let mut client = client.reconnected();
            let again = client.publish_qos2(5).expect("there is no event of it");
            if let Some(before) = before {
                assert_eq!(client.complete(&[before]), NOTHING);
            }
            assert_eq!(client.said(), NOTHING, "no PUBREC before its event");
            assert_eq!(client.complete(&[again]), [0x50, 2, 0, 5]);
        }
    }
}

#[test]
fn a_repetition_of_what_was_refused_says_nothing_of_the_next_with_its_id() {
    let mut client = Client::kept(V5);
    let refused = client.publish_qos2(5).unwrap();
    let between = client.publish(1);
    assert_eq!(client.publish_qos2(5), None);
    let full = Violation::new(reason::QUOTA_EXCEEDED, "");
    client.session.refuse(Some(refused), full, &mut client.out).unwrap();
    assert_eq!(client.said(), [0x50, 3, 0, 5, reason::QUOTA_EXCEEDED]);
    let next = client.publish_qos2(5).expect("the id is free");
    let said = client.complete(&[between]);
    assert_eq!(said, [0x40, 2, 0, 1, 0x50, 3, 0, 5, reason::QUOTA_EXCEEDED]);
    assert_eq!(client.code(&pubrel(5)), reason::PROTOCOL_ERROR, "its event is not durable yet");
    assert_eq!(client.complete(&[next]), [0x50, 2, 0, 5]);
}

#[test]
fn retain_is_taken_and_whoever_comes_after_it_waits_for_it() {
    for version in BOTH {
        let mut client = Client::new(version);
        let bytes = wire::publish_with(version, 0x31, "t", None, &[], "");
        let Ok(Effect::Publish(publishing)) = client.send(&bytes) else { panic!("no publish") };
        assert!(publishing.publish.retain);
        assert_eq!(client.send(&wire::subscribe(version, 1, &[("t", 0)])), Ok(Effect::None));
        assert_eq!(client.session.next_turn(), None);
        assert_eq!(client.complete(&[publishing.number.unwrap()]), NOTHING, "it has no ack");
        assert!(matches!(client.session.next_turn(), Some(Turn::Subscribe(_))));
        assert_eq!(client.session.next_turn(), None);
    }
}

#[test]
fn more_than_receive_maximum_is_an_error_in_v5_mqtt_3_3_4_7() {
    let mut client = Client::new(V5);
    let first = client.publish(1);
    client.publish(2);
    client.publish(3);
    assert_eq!(client.code(&wire::publish(V5, "t", Some(4), "")), reason::RECEIVE_MAX_EXCEEDED);
    client.complete(&[first]);
    client.publish(4);
    // QoS 0 does not count.
    assert!(client.send(&wire::publish(V5, "t", None, "")).is_ok());
}

#[test]
fn a_v3_client_is_not_read_from_past_the_window() {
    let mut client = Client::new(V3);
    let first = client.publish(1);
    client.publish(2);
    assert!(client.session.takes_publishes());
    client.publish(3);
    assert!(!client.session.takes_publishes());
    client.complete(&[first]);
    assert!(client.session.takes_publishes());
}

fn aliased(topic: &str, alias: u16) -> Vec<u8> {
    let [high, low] = alias.to_be_bytes();
    wire::publish_with(V5, 0x30, topic, None, &[0x23, high, low], "")
}

fn topic_of(effect: Result<Effect, Violation>) -> ByteString {
    match effect.unwrap() {
        Effect::Publish(publishing) => publishing.publish.topic,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_topic_alias_stands_for_the_last_topic_that_it_came_with_mqtt_3_3_2_12() {
    let mut client = Client::new(V5);
    assert_eq!(topic_of(client.send(&aliased("a/b", 10))), "a/b");
    assert_eq!(topic_of(client.send(&aliased("", 10))), "a/b");
    assert_eq!(topic_of(client.send(&aliased("c", 10))), "c");
    assert_eq!(topic_of(client.send(&aliased("", 10))), "c");
}

#[test]
fn an_unknown_or_impossible_topic_alias_is_an_error_mqtt_3_3_2_8_and_9() {
    assert_eq!(Client::new(V5).code(&aliased("", 1)), reason::PROTOCOL_ERROR);
    assert_eq!(Client::new(V5).code(&aliased("t", 11)), reason::TOPIC_ALIAS_INVALID);
    assert_eq!(Client::new(V5).code(&aliased("t", 0)), reason::MALFORMED);
}

#[test]
fn a_refused_publish_gets_its_reason_in_turn_in_v5() {
    let mut client = Client::new(V5);
    let numbers = [client.publish(1), client.publish(2), client.publish(3)];
    let full = || Violation::new(reason::QUOTA_EXCEEDED, "");
    let invalid = || Violation::new(reason::TOPIC_INVALID, "none");
    client.session.refuse(Some(numbers[2]), invalid(), &mut client.out).unwrap();
    client.session.refuse(Some(numbers[1]), full(), &mut client.out).unwrap();
    assert_eq!(client.said(), NOTHING);
    let why = [0x1F, 0, 4, b'n', b'o', b'n', b'e'];
    assert_eq!(
        client.complete(&[numbers[0]]),
        [&[0x40, 2, 0, 1, 0x40, 3, 0, 2, 0x97, 0x40, 11, 0, 3, 0x90, 7][..], &why].concat()
    );
}

#[test]
fn a_refusal_has_no_words_for_who_wants_none_or_takes_none_mqtt_3_1_2_29_3_4_2_2_and_3_5_2_2() {
    for properties in [vec![0x17, 0], vec![0x27, 0, 0, 0, 30]] {
        let mut client = Client::with(&ConnectPacket { properties, ..ConnectPacket::new(V5) });
        let numbers = [client.publish(1), client.publish_qos2(2).unwrap()];
        for number in numbers {
            let invalid = Violation::new(reason::TOPIC_INVALID, "nothing takes it");
            client.session.refuse(Some(number), invalid, &mut client.out).unwrap();
        }
        assert_eq!(client.said(), [0x40, 3, 0, 1, 0x90, 0x50, 3, 0, 2, 0x90]);
    }
}

#[test]
fn a_refused_publish_closes_the_connection_in_v3() {
    let mut client = Client::new(V3);
    let number = client.publish(1);
    let violation = Violation::new(reason::TOPIC_INVALID, "no route");
    let refused = client.session.refuse(Some(number), violation.clone(), &mut client.out);
    assert_eq!(refused, Err(violation.clone()));
    assert_eq!(client.session.refuse(None, violation, &mut client.out), Ok(()), "QoS 0 is dropped");
    assert_eq!(client.said(), NOTHING);
}

#[test]
fn a_normal_disconnect_cancels_the_will_mqtt_3_14_4_3() {
    for version in BOTH {
        let mut client = Client::with(&ConnectPacket::new(version).will(1, "will", "gone"));
        assert_eq!(client.send(&[0xE0, 0]), Ok(Effect::Disconnect));
        assert_eq!(client.session.take_will(), None);
    }
}

#[test]
fn any_other_end_leaves_the_will_mqtt_3_1_2_8() {
    for version in BOTH {
        let mut client = Client::with(&ConnectPacket::new(version).will(1, "will", "gone"));
        let will = client.session.take_will().unwrap().publish;
        assert_eq!(
            (&*will.topic, &will.payload[..], will.qos),
            ("will", &b"gone"[..], QoS::AtLeastOnce)
        );
    }
    let mut client = Client::with(&ConnectPacket::new(V5).will(1, "will", "gone"));
    assert_eq!(client.send(&[0xE0, 1, 4]), Ok(Effect::Disconnect));
    assert!(client.session.take_will().is_some());
}

#[test]
fn a_disconnect_cannot_ask_for_the_expiry_that_connect_did_not_mqtt_3_14_2_2() {
    let bytes = packet(0xE0, [0, 5, 0x11, 0, 0, 0, 9]);
    assert_eq!(Client::new(V5).code(&bytes), reason::PROTOCOL_ERROR);
    let asked = ConnectPacket { properties: vec![0x11, 0, 0, 0, 9], ..ConnectPacket::new(V5) };
    assert_eq!(Client::with(&asked).send(&bytes), Ok(Effect::Disconnect));
}

#[test]
fn an_unknown_pubrel_gets_a_pubcomp_and_no_disconnect_mqtt_4_3_3() {
    for (version, said) in [(V3, &[0x70, 2, 0, 9][..]), (V5, &[0x70, 3, 0, 9, 0x92])] {
        let mut client = Client::new(version);
        assert_eq!(client.send(&packet(0x62, [0, 9])), Ok(Effect::None));
        assert_eq!(client.said(), said);
    }
}

#[test]
fn an_unknown_puback_changes_nothing() {
    for version in BOTH {
        let mut client = Client::new(version);
        assert_eq!(client.send(&wire::puback(77)), Ok(Effect::None));
        assert_eq!(client.said(), NOTHING);
    }
}

#[test]
fn only_v5_is_told_why_the_server_closes_mqtt_3_14_0_1() {
    let violation = Violation::new(reason::SHUTTING_DOWN, "bye");
    for version in BOTH {
        let mut client = Client::new(version);
        client.session.close(&violation, &mut client.out);
        let expected = packet(0xE0, [&[0x8B, 6, 0x1F][..], &field("bye")].concat());
        assert_eq!(client.said(), if version == V5 { expected } else { Vec::new() });
    }
}

fn delivery<'a>(payload: &'a [u8], attributes: &'a storage::Attributes) -> Delivery<'a> {
    Delivery {
        topic: "t",
        payload,
        attributes,
        qos: 0,
        packet_id: None,
        dup: false,
        retain: false,
        expiry_s: None,
        subscription_ids: &[],
        topic_alias: None,
    }
}

#[test]
fn no_packet_is_larger_than_the_client_takes_mqtt_3_1_2_24() {
    let small = ConnectPacket { properties: vec![0x27, 0, 0, 0, 20], ..ConnectPacket::new(V5) };
    let mut client = Client::with(&small);
    let none = storage::Attributes::default();
    for qos in 0..3 {
        let large = Delivery { qos, ..delivery(&[0; 20], &none) };
        let sent = client.session.deliver(large, &mut client.out);
        assert_eq!(sent, Delivered::TooLarge);
        assert_eq!(client.said(), NOTHING);
    }
    let small = Delivery { qos: 1, ..delivery(&[0; 10], &none) };
    let sent = client.session.deliver(small, &mut client.out);
    assert_eq!(sent, Delivered::Sent);
    assert_eq!(client.said().len(), 18);
    client.session.close(&Violation::new(reason::SHUTTING_DOWN, "long"), &mut client.out);
    assert!(client.said().len() <= 20, "no reason string [MQTT-3.14.2-3]");
}

#[test]
fn deliveries_keep_to_the_clients_receive_maximum_mqtt_3_3_4_9() {
    let narrow = ConnectPacket { properties: vec![0x21, 0, 2], ..ConnectPacket::new(V5) };
    let mut client = Client::with(&narrow);
    let none = storage::Attributes::default();
    let deliver = |client: &mut Client| {
        assert!(client.session.takes_delivery());
        let message = Delivery { qos: 1, ..delivery(b"", &none) };
        client.session.deliver(message, &mut client.out);
        let said = client.said();
        u16::from_be_bytes([said[5], said[6]])
    };
    let (first, second) = (deliver(&mut client), deliver(&mut client));
    assert!(!client.session.takes_delivery());
    client.send(&wire::puback(second)).unwrap();
    let third = deliver(&mut client);
    assert_ne!(first, third);
    assert!(!client.session.takes_delivery());
}

#[test]
fn packet_ids_are_never_zero_and_not_reused_while_unacked_mqtt_2_2_1_3() {
    let mut window = Window::new(3);
    let stuck = window.next_id();
    window.sent(stuck, Stage::Rec);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..u16::MAX {
        let id = window.next_id();
        assert!(id != 0 && id != stuck);
        seen.insert(id);
        window.sent(id, Stage::Ack);
        assert_eq!(window.ended(id, Stage::Ack), Ended::Now);
    }
    assert_eq!(seen.len(), usize::from(u16::MAX) - 1);
}

#[test]
fn a_qos_2_delivery_is_released_and_ends_with_pubcomp_mqtt_4_3_3() {
    for version in BOTH {
        let none = storage::Attributes::default();
        let mut client = Client::new(version);
        let message = Delivery { qos: 2, ..delivery(b"", &none) };
        client.session.deliver(message, &mut client.out);
        assert_eq!(client.said()[0], 0x34);
        assert_eq!(client.session.room_for_deliveries(), usize::from(DOWNLINK_IN_FLIGHT_MAX) - 1);
        for _ in 0..2 {
            client.send(&packet(0x50, [0, 1])).unwrap();
            assert_eq!(client.said(), [0x62, 2, 0, 1]);
        }
        client.send(&packet(0x70, [0, 1])).unwrap();
        assert_eq!(client.session.room_for_deliveries(), usize::from(DOWNLINK_IN_FLIGHT_MAX));
        client.send(&packet(0x50, [0, 1])).unwrap();
        let unknown: &[u8] = if version == V5 { &[0x62, 3, 0, 1, 0x92] } else { &[0x62, 2, 0, 1] };
        assert_eq!(client.said(), unknown);
    }
}

#[test]
fn a_kept_message_is_released_only_when_that_is_durable() {
    let none = storage::Attributes::default();
    let mut client = Client::kept(V5);
    let message = Delivery { qos: 2, packet_id: Some(77), ..delivery(b"", &none) };
    client.session.deliver(message, &mut client.out);
    client.said();
    let Ok(Effect::Received { packet_id: 77, number }) = client.send(&packet(0x50, [0, 77])) else {
        panic!("not received")
    };
    assert_eq!(client.send(&packet(0x50, [0, 77])), Ok(Effect::None));
    assert_eq!(client.said(), NOTHING);
    assert_eq!(client.complete(&[number]), [0x62, 2, 0, 77, 0x62, 2, 0, 77]);
    assert_eq!(client.send(&packet(0x70, [0, 77])), Ok(Effect::Acked(77)));
    // Over a later connection it is released again, and again not before that is durable.
    let number = client.session.release_again(79);
    assert_eq!(client.said(), NOTHING);
    assert_eq!(client.complete(&[number]), [0x62, 2, 0, 79]);
    assert_eq!(client.send(&packet(0x70, [0, 79])), Ok(Effect::Acked(79)));
    // One that the client refuses is over at once.
    let message = Delivery { qos: 2, packet_id: Some(78), ..delivery(b"", &none) };
    client.session.deliver(message, &mut client.out);
    assert_eq!(client.send(&packet(0x50, [0, 78, 0x97])), Ok(Effect::Acked(78)));
}

#[derive(Clone, Debug)]
enum Step {
    Publish {
        qos1: bool,
    },
    /// Completes the n-th of those that are open.
    Complete(prop::sample::Index),
    Refuse(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => any::<bool>().prop_map(|qos1| Step::Publish { qos1 }),
        2 => any::<prop::sample::Index>().prop_map(Step::Complete),
        1 => any::<prop::sample::Index>().prop_map(Step::Refuse),
    ]
}

proptest! {
    /// Every publish gets exactly one ack, its own, in order, and none before its outcome.
    #[test]
    fn every_publish_gets_its_ack_in_order(steps in prop::collection::vec(step(), 0..200)) {
        let mut client = Client::new(V5);
        let mut open: Vec<u64> = Vec::new();
        let mut outcomes: Vec<Option<u8>> = Vec::new();
        let mut acked = 0;
        for step in steps {
            match step {
                Step::Publish { qos1: false } => {
                    client.send(&wire::publish(V5, "t", None, "")).unwrap();
                }
                Step::Publish { qos1: true } if client.session.unacked() < 3 => {
                    let number = client.publish(outcomes.len() as u16 + 1);
                    open.push(number);
                    outcomes.push(None);
                }
                Step::Publish { .. } => {}
                Step::Complete(_) | Step::Refuse(_) if open.is_empty() => {}
                Step::Complete(which) => {
                    let number = open.remove(which.index(open.len()));
                    outcomes[number as usize] = Some(reason::SUCCESS);
                    client.session.complete(&[number], &mut client.out);
                }
                Step::Refuse(which) => {
                    let number = open.remove(which.index(open.len()));
                    outcomes[number as usize] = Some(reason::QUOTA_EXCEEDED);
                    let full = Violation::new(reason::QUOTA_EXCEEDED, "");
                    client.session.refuse(Some(number), full, &mut client.out).unwrap();
                }
            }
            let said = client.said();
            let mut said = &said[..];
            while let Some(Some(code)) = outcomes.get(acked) {
                let id = acked as u8 + 1;
                let expected: &[u8] =
                    if *code == 0 { &[0x40, 2, 0, id] } else { &[0x40, 3, 0, id, *code] };
                prop_assert!(said.starts_with(expected));
                said = &said[expected.len()..];
                acked += 1;
            }
            prop_assert!(said.is_empty());
        }
    }
}
