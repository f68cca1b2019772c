use proptest::prelude::*;

use super::*;
use crate::mqtt::wire::{self, BOTH, ConnectPacket, V3, V5, buf, field, packet};

const BYTES_MAX: usize = 1 << 20;

fn connect_of(bytes: &[u8]) -> Result<Option<Connect>, Refused> {
    decode_connect(&mut buf(bytes), BYTES_MAX)
}

fn refusal(bytes: &[u8]) -> (Option<Version>, u8) {
    let refused = connect_of(bytes).unwrap_err();
    (refused.version, refused.violation.code)
}

fn next(version: Version, bytes: &[u8]) -> Result<Option<Packet>, Violation> {
    decode(&mut buf(bytes), version, BYTES_MAX)
}

fn code(version: Version, bytes: &[u8]) -> u8 {
    next(version, bytes).unwrap_err().code
}

#[test]
fn a_first_packet_that_is_no_connect_is_refused_on_its_first_byte_mqtt_3_1_0_1() {
    // CVE-2023-0809: it announces 256 MB.
    for first in (0..=0xFF).filter(|first| first & 0xF0 != 0x10) {
        let mut bytes = buf([first, 0xFF, 0xFF, 0xFF, 0x7F]);
        let refused = decode_connect(&mut bytes, usize::MAX).unwrap_err();
        assert_eq!(refused.violation.code, reason::PROTOCOL_ERROR, "{first:#x}");
    }
}

#[test]
fn a_huge_connect_is_refused_before_it_is_read() {
    let mut bytes = buf([0x10, 0xFF, 0xFF, 0xFF, 0x7F]);
    let refused = decode_connect(&mut bytes, usize::MAX).unwrap_err();
    assert_eq!(refused.violation.code, reason::PACKET_TOO_LARGE);
    assert!(bytes.capacity() < 64);
}

#[test]
fn the_announced_length_reserves_nothing() {
    let mut bytes = buf([0x30, 0x80, 0x80, 0x40, 0, 1, b'a']);
    let before = bytes.capacity();
    assert_eq!(decode(&mut bytes, V3, BYTES_MAX + 10), Ok(None));
    assert_eq!(bytes.capacity(), before);
}

#[test]
fn a_packet_over_the_limit_is_refused_on_its_header() {
    for version in BOTH {
        let bytes = [0x30, 0xFF, 0xFF, 0x7F];
        let violation = decode(&mut buf(bytes), version, 1000).unwrap_err();
        assert_eq!(violation.code, reason::PACKET_TOO_LARGE);
        let whole = wire::publish(version, "t", None, "0123456789");
        assert!(decode(&mut buf(&whole), version, whole.len()).unwrap().is_some());
        assert!(decode(&mut buf(&whole), version, whole.len() - 1).is_err());
    }
}

#[test]
fn a_variable_integer_of_five_bytes_is_malformed() {
    // CVE-2026-21888.
    for version in BOTH {
        assert_eq!(code(version, &[0x30, 0x80, 0x80, 0x80, 0x80, 0x01]), reason::MALFORMED);
        assert_eq!(code(version, &[0x30, 0xFF, 0xFF, 0xFF, 0xFF]), reason::MALFORMED);
    }
    let list = [0x00, 1, b't', 0x80, 0x80, 0x80, 0x80, 0x01];
    assert_eq!(code(V5, &packet(0x30, list)), reason::MALFORMED);
}

#[test]
fn a_length_not_in_its_shortest_form_is_malformed_in_v5_mqtt_1_5_5_1() {
    assert_eq!(code(V5, &[0xC0, 0x80, 0x00]), reason::MALFORMED);
    assert_eq!(next(V3, &[0xC0, 0x80, 0x00]), Ok(Some(Packet::PingReq)));
}

#[test]
fn packets_that_only_a_server_may_send_are_refused() {
    // CVE-2021-28166, and what fills rumqttd's slots.
    for version in BOTH {
        for first in [0x20, 0x90, 0xB0, 0xD0] {
            assert_eq!(code(version, &packet(first, [0, 0])), reason::PROTOCOL_ERROR);
        }
    }
}

#[test]
fn a_second_connect_is_refused_mqtt_3_1_0_2() {
    for version in BOTH {
        assert_eq!(code(version, &wire::connect(version)), reason::PROTOCOL_ERROR);
    }
}

#[test]
fn reserved_flags_are_malformed_mqtt_2_1_3_1() {
    for version in BOTH {
        for first in [0x41, 0x51, 0x60, 0x63, 0x72, 0x80, 0x83, 0xA0, 0xA3, 0xC1, 0xE1, 0x00] {
            assert_eq!(code(version, &packet(first, [0, 1])), reason::MALFORMED, "{first:#x}");
        }
    }
    assert_eq!(code(V3, &packet(0xF0, [])), reason::MALFORMED);
    assert_eq!(code(V5, &packet(0xF1, [])), reason::MALFORMED);
}

#[test]
fn qos_3_is_malformed_mqtt_3_3_1_4() {
    for version in BOTH {
        let bytes = wire::publish_with(version, 0x36, "t", Some(1), &[], "");
        assert_eq!(code(version, &bytes), reason::MALFORMED);
    }
}

#[test]
fn dup_on_qos_0_is_malformed_mqtt_3_3_1_2() {
    for version in BOTH {
        let bytes = wire::publish_with(version, 0x38, "t", None, &[], "");
        assert_eq!(code(version, &bytes), reason::MALFORMED);
    }
}

#[test]
fn a_packet_id_of_zero_is_malformed_mqtt_2_2_1_3() {
    for version in BOTH {
        assert_eq!(code(version, &wire::publish(version, "t", Some(0), "")), reason::MALFORMED);
        assert_eq!(code(version, &wire::subscribe(version, 0, &[("t", 0)])), reason::MALFORMED);
        assert_eq!(code(version, &wire::unsubscribe(version, 0, &["t"])), reason::MALFORMED);
        assert_eq!(code(version, &wire::puback(0)), reason::MALFORMED);
    }
}

#[test]
fn a_topic_name_must_be_valid_mqtt_3_3_2_2_and_4_7_3() {
    for version in BOTH {
        for topic in ["a/+", "#", "a\0"] {
            assert!(next(version, &wire::publish(version, topic, None, "")).is_err(), "{topic:?}");
        }
        // What killed another broker's matcher.
        assert!(next(version, &wire::publish(version, "é/x", None, "")).is_ok());
    }
}

#[test]
fn an_empty_topic_name_is_refused_mqtt_4_7_3_1() {
    // CVE-2021-34432.
    for version in BOTH {
        for id in [None, Some(1)] {
            assert!(next(version, &wire::publish(version, "", id, "x")).is_err());
        }
    }
    let aliased = wire::publish_with(V5, 0x30, "", None, &[0x23, 0, 1], "x");
    assert!(matches!(next(V5, &aliased), Ok(Some(Packet::Publish(_)))));
}

#[test]
fn a_truncated_publish_is_malformed() {
    // nanomq#2270: the id and the payload are missing; the topic's length is a lie.
    for version in BOTH {
        assert_eq!(code(version, &packet(0x32, field("t"))), reason::MALFORMED);
        assert_eq!(code(version, &packet(0x32, [0, 9, b't'])), reason::MALFORMED);
        assert_eq!(code(version, &packet(0x30, [])), reason::MALFORMED);
        assert_eq!(code(version, &packet(0x30, [0])), reason::MALFORMED);
    }
}

#[test]
fn text_must_be_utf8_without_nul_mqtt_1_5_4() {
    for version in BOTH {
        let surrogate = packet(0x30, [0, 3, 0xED, 0xA0, 0x80, 0]);
        assert_eq!(code(version, &surrogate), reason::MALFORMED);
        let nul = ConnectPacket { client_id: "a\0b", ..ConnectPacket::new(version) };
        assert_eq!(refusal(&nul.bytes()), (Some(version), reason::MALFORMED));
    }
    let user = [&[0x26][..], &field("k\0"), &field("v")].concat();
    let bytes = wire::publish_with(V5, 0x30, "t", None, &user, "");
    assert_eq!(code(V5, &bytes), reason::MALFORMED);
}

#[test]
fn filters_must_be_valid_mqtt_4_7_1() {
    for version in BOTH {
        for filter in ["a#", "#/a", "a+", "", "a\0"] {
            assert!(next(version, &wire::subscribe(version, 1, &[(filter, 0)])).is_err());
            assert!(next(version, &wire::unsubscribe(version, 1, &[filter])).is_err());
        }
        assert!(next(version, &wire::subscribe(version, 1, &[("é/+/#", 1)])).is_ok());
    }
}

#[test]
fn a_subscribe_or_unsubscribe_without_filters_is_an_error_mqtt_3_8_3_2_and_3_10_3_2() {
    for version in BOTH {
        assert_eq!(code(version, &wire::subscribe(version, 1, &[])), reason::PROTOCOL_ERROR);
        assert_eq!(code(version, &wire::unsubscribe(version, 1, &[])), reason::PROTOCOL_ERROR);
    }
}

#[test]
fn reserved_bits_of_subscribe_options_are_malformed_mqtt_3_8_3_4_and_5() {
    for option in [3, 4, 0x10, 0x80] {
        assert_eq!(code(V3, &wire::subscribe(V3, 1, &[("a", option)])), reason::MALFORMED);
    }
    for option in [3, 0x30, 0x40, 0x80] {
        assert_eq!(code(V5, &wire::subscribe(V5, 1, &[("a", option)])), reason::MALFORMED);
    }
    assert!(next(V5, &wire::subscribe(V5, 1, &[("a", 0x2D)])).is_ok());
}

#[test]
fn a_subscription_identifier_from_a_client_goes_nowhere_mqtt_3_3_4_6() {
    let bytes = wire::publish_with(V5, 0x30, "t", None, &[0x0B, 1], "");
    let Ok(Some(Packet::Publish(publish))) = next(V5, &bytes) else { panic!("not taken") };
    assert!(publish.properties.unwrap().subscription_ids.is_empty());
    let bytes = wire::publish_with(V5, 0x30, "t", None, &[0x0B, 1, 0x0B, 1], "");
    assert_eq!(code(V5, &bytes), reason::PROTOCOL_ERROR);
}

#[test]
fn a_message_may_expire_at_once() {
    let at_once = [0x02, 0, 0, 0, 0];
    // What only looks like it stays as it is.
    let decoy = [&[0x09][..], &field(at_once)].concat();
    for list in [at_once.to_vec(), [&decoy[..], &at_once].concat()] {
        let bytes = wire::publish_with(V5, 0x32, "t", Some(1), &list, "\u{2}\0\0\0\0");
        let Ok(Some(Packet::Publish(publish))) = next(V5, &bytes) else { panic!("not taken") };
        let properties = publish.properties.unwrap();
        assert_eq!(properties.message_expiry_interval.map(std::num::NonZero::get), Some(1));
        assert_eq!(&publish.payload[..], at_once);
        assert!(properties.correlation_data.is_none_or(|data| data[..] == at_once));
    }
    let connect = wire::ConnectPacket::new(V5).will(0, "w", "x");
    let rest = [&[5][..], &at_once, &field("w"), &field("x")].concat();
    let bytes = wire::ConnectPacket { rest, ..connect }.bytes();
    let connect = decode_connect(&mut buf(bytes), BYTES_MAX).unwrap().unwrap();
    let will = connect.packet.last_will.unwrap();
    assert_eq!(will.message_expiry_interval.map(std::num::NonZero::get), Some(1));
}

#[test]
fn a_wildcard_in_a_response_topic_is_an_error_mqtt_3_3_2_14() {
    let list = [&[0x08][..], &field("a/#")].concat();
    assert!(next(V5, &wire::publish_with(V5, 0x30, "t", None, &list, "")).is_err());
}

#[test]
fn a_disconnect_without_content_is_normal_in_both_versions() {
    for version in BOTH {
        let normal = Packet::Disconnect(v5::Disconnect::default());
        assert_eq!(next(version, &[0xE0, 0]), Ok(Some(normal)));
    }
    assert_eq!(code(V3, &[0xE0, 1, 0]), reason::MALFORMED);
    assert!(next(V5, &[0xE0, 1, 4]).is_ok());
}

#[test]
fn a_pingreq_has_no_content() {
    for version in BOTH {
        assert_eq!(code(version, &[0xC0, 1, 0]), reason::MALFORMED);
    }
}

#[test]
fn the_reserved_connect_flag_is_malformed_mqtt_3_1_2_3() {
    for version in BOTH {
        let bytes = ConnectPacket { flags: 0x03, ..ConnectPacket::new(version) }.bytes();
        assert_eq!(refusal(&bytes), (Some(version), reason::MALFORMED));
    }
}

#[test]
fn will_flags_without_a_will_are_malformed_mqtt_3_1_2_11_and_13() {
    for version in BOTH {
        for flags in [0x0A, 0x12, 0x22] {
            let bytes = ConnectPacket { flags, ..ConnectPacket::new(version) }.bytes();
            assert_eq!(refusal(&bytes), (Some(version), reason::MALFORMED));
        }
    }
}

#[test]
fn a_password_needs_a_user_name_in_v3_only_mqtt_3_1_2_22() {
    for version in BOTH {
        let connect =
            ConnectPacket { flags: 0x42, rest: field("secret"), ..ConnectPacket::new(version) };
        assert_eq!(connect_of(&connect.bytes()).is_ok(), version == V5);
    }
}

#[test]
fn a_connect_ends_with_its_last_field_mqtt_3_1_3_1() {
    for version in BOTH {
        let longer = ConnectPacket { rest: vec![0], ..ConnectPacket::new(version) };
        assert_eq!(refusal(&longer.bytes()), (Some(version), reason::MALFORMED));
        let shorter = ConnectPacket { flags: 0x82, ..ConnectPacket::new(version) };
        assert_eq!(refusal(&shorter.bytes()), (Some(version), reason::MALFORMED));
    }
}

#[test]
fn a_will_with_bad_properties_is_refused() {
    // CVE-2023-3592: a property that is none of a will's, one twice, one cut short.
    for list in [&[0x21, 0, 1][..], &[0x18, 0, 0, 0, 1, 0x18, 0, 0, 0, 1], &[0x18, 0]] {
        let rest = [wire::properties(V5, list), field("t"), field("m")].concat();
        let bytes = ConnectPacket { flags: 0x06, rest, ..ConnectPacket::new(V5) }.bytes();
        assert_eq!(refusal(&bytes), (Some(V5), reason::MALFORMED));
    }
}

#[test]
fn an_unknown_protocol_level_is_refused_in_connack_mqtt_3_1_2_2() {
    for (name, level) in [("MQTT", 3), ("MQTT", 6), ("MQTT", 0x84), ("MQIsdp", 4)] {
        let head = [&field(name)[..], &[level, 2, 0, 0], &field("dev")].concat();
        assert_eq!(refusal(&packet(0x10, head)), (Some(V3), reason::UNSUPPORTED_VERSION));
    }
}

#[test]
fn another_protocol_name_gets_no_answer_mqtt_3_1_2_1() {
    for name in ["HTTP", "MQTTT", "", "mqtt"] {
        let head = [&field(name)[..], &[4, 2, 0, 0], &field("dev")].concat();
        assert_eq!(refusal(&packet(0x10, head)).0, None);
    }
}

#[test]
fn mqtt_3_1_is_taken_under_its_own_name() {
    let head = [&field("MQIsdp")[..], &[3, 2, 0, 9], &field("dev")].concat();
    let connect = connect_of(&packet(0x10, head)).unwrap().unwrap();
    assert_eq!((connect.version, connect.packet.keep_alive), (V3, 9));
}

#[test]
fn an_empty_client_id_without_clean_start_is_for_the_session_to_judge() {
    for version in BOTH {
        let bytes =
            ConnectPacket { flags: 0, client_id: "", ..ConnectPacket::new(version) }.bytes();
        let connect = connect_of(&bytes).unwrap().unwrap();
        assert!(!connect.packet.clean_start && connect.packet.client_id.is_empty());
    }
}

#[test]
fn what_follows_a_packet_stays_in_the_buffer() {
    for version in BOTH {
        let mut bytes = buf([wire::connect(version), vec![0xC0, 0, 0xC0]].concat());
        assert!(decode_connect(&mut bytes, BYTES_MAX).unwrap().is_some());
        assert_eq!(decode(&mut bytes, version, BYTES_MAX), Ok(Some(Packet::PingReq)));
        assert_eq!(decode(&mut bytes, version, BYTES_MAX), Ok(None));
        assert_eq!(&bytes[..], [0xC0]);
    }
}

#[test]
fn a_suback_of_v3_knows_one_failure() {
    let mut out = BytesMut::new();
    put_suback(&mut out, V3, 7, &[0, 1, reason::QUOTA_EXCEEDED]);
    assert_eq!(&out[..], [0x90, 5, 0, 7, 0, 1, 0x80]);
    out.clear();
    put_suback(&mut out, V5, 7, &[0, 1, reason::QUOTA_EXCEEDED]);
    assert_eq!(&out[..], [0x90, 6, 0, 7, 0, 0, 1, 0x97]);
}

#[test]
fn acks_name_their_reason_only_where_they_must() {
    let mut out = BytesMut::new();
    put_puback(&mut out, V5, 0x1234, reason::SUCCESS, "");
    put_puback(&mut out, V5, 2, reason::QUOTA_EXCEEDED, "");
    put_puback(&mut out, V3, 3, reason::QUOTA_EXCEEDED, "");
    assert_eq!(&out[..], [0x40, 2, 0x12, 0x34, 0x40, 3, 0, 2, 0x97, 0x40, 2, 0, 3]);
}

/// What the server writes, read by the codec crate, which the encoders do not use.
fn read_back(version: Version, mut bytes: BytesMut) -> Publish {
    match version {
        V3 => match v3::Codec::default().decode(&mut bytes) {
            Ok(Some((v3::Packet::Publish(publish), _))) => *publish,
            other => panic!("{other:?}"),
        },
        V5 => match v5::Codec::default().decode(&mut bytes) {
            Ok(Some((v5::Packet::Publish(publish), _))) => *publish,
            other => panic!("{other:?}"),
        },
    }
}

fn text() -> impl Strategy<Value = String> {
    "[a-zé/]{0,20}"
}

proptest! {
    #[test]
    fn a_delivery_is_read_back_as_it_was_written(
        topic in "[a-zé/]{1,20}",
        payload in prop::collection::vec(any::<u8>(), 0..300),
        packet_id in prop::option::of(1u16..),
        retain in any::<bool>(),
        expiry_s in prop::option::of(1u32..),
        subscription_ids in prop::collection::vec(1u32..0x0FFF_FFFF, 0..4),
        user in prop::collection::vec((text(), text()), 0..8),
        content_type in prop::option::of(text()),
        correlation in prop::option::of(prop::collection::vec(any::<u8>(), 0..20)),
    ) {
        let attributes = Attributes::encode(
            user.iter()
                .map(|(name, value)| Attribute::UserProperty(name, value))
                .chain(content_type.as_deref().map(Attribute::ContentType))
                .chain(correlation.as_deref().map(Attribute::CorrelationData))
                .chain([Attribute::Utf8Payload, Attribute::QoS(1), Attribute::Unknown(99, b"x")]),
        );
        let delivery = Delivery {
            topic: &topic,
            payload: &payload,
            attributes: &attributes,
            qos: u8::from(packet_id.is_some()),
            packet_id,
            dup: false,
            retain,
            expiry_s,
            subscription_ids: &subscription_ids,
            topic_alias: None,
        };
        for version in BOTH {
            let mut out = BytesMut::new();
            prop_assert!(put_publish(&mut out, version, &delivery, usize::MAX));
            let size = out.len();
            let mut again = BytesMut::new();
            prop_assert!(put_publish(&mut again, version, &delivery, size));
            prop_assert!(!put_publish(&mut again, version, &delivery, size - 1));
            prop_assert_eq!(again.len(), size, "nothing is written of what is too large");

            let read = read_back(version, out);
            prop_assert_eq!(&*read.topic, &*topic);
            prop_assert_eq!(&read.payload[..], &payload[..]);
            prop_assert_eq!(read.packet_id.map(std::num::NonZero::get), packet_id);
            prop_assert_eq!((read.retain, read.dup), (retain, false));
            let Some(properties) = read.properties else { continue };
            prop_assert_eq!(properties.message_expiry_interval.map(std::num::NonZero::get), expiry_s);
            let ids: Vec<_> = properties.subscription_ids.iter().map(|id| id.get()).collect();
            prop_assert_eq!(&ids, &subscription_ids);
            let read_user: Vec<_> = properties
                .user_properties
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect();
            prop_assert_eq!(read_user, user.clone());
            prop_assert_eq!(properties.content_type.as_deref(), content_type.as_deref());
            prop_assert_eq!(properties.correlation_data.as_deref(), correlation.as_deref());
            prop_assert!(properties.is_utf8_payload);
        }
    }

    /// Well-formed packets with bytes changed, cut and repeated: no panic, no endless loop, nothing
    /// taken from the buffer without an outcome, no memory beyond what came in.
    #[test]
    fn mutated_input_never_panics_and_takes_no_memory(
        picks in prop::collection::vec(0usize..9, 1..6),
        mutations in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        v5 in any::<bool>(),
        first in any::<bool>(),
    ) {
        let version = if v5 { V5 } else { V3 };
        let samples = samples(version);
        let mut bytes: Vec<u8> = if first { wire::connect(version) } else { Vec::new() };
        bytes.extend(picks.iter().flat_map(|&pick| samples[pick].clone()));
        for (at, byte) in &mutations {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let mut buffer = buf(&bytes);
        if first && !matches!(decode_connect(&mut buffer, BYTES_MAX), Ok(Some(_))) {
            return Ok(());
        }
        loop {
            let before = buffer.len();
            match decode(&mut buffer, version, BYTES_MAX) {
                Ok(Some(_)) => prop_assert!(buffer.len() < before),
                Ok(None) => {
                    prop_assert_eq!(buffer.len(), before);
                    break;
                }
                Err(_) => break,
            }
        }
        // What the codec reserves after a frame is as much as the buffer had from the start.
        prop_assert!(buffer.capacity() <= (2 * bytes.len()).max(1024));
    }
}

fn samples(version: Version) -> [Vec<u8>; 9] {
    let user = [&[0x26][..], &field("k"), &field("v"), &[0x01, 1, 0x02, 0, 0, 0, 9]].concat();
    let user = if version == V5 { user } else { Vec::new() };
    [
        wire::publish(version, "a/b", None, "payload"),
        wire::publish_with(version, 0x32, "a/b", Some(7), &user, "payload"),
        wire::subscribe(version, 1, &[("a/+", 1), ("b/#", 0)]),
        wire::unsubscribe(version, 2, &["a/+", "b/#"]),
        wire::puback(3),
        packet(0x62, [0, 1]),
        packet(0xC0, []),
        packet(0xE0, []),
        ConnectPacket::new(version).will(1, "will", "gone").bytes(),
    ]
}
