//! The form of packets: sections 1.5, 2.1, 2.2, 3.12, 3.14, 4.13.

use crate::harness::wire::{
    BOTH, Connect, V5, V311, field, packet, properties, publish, subscribe, subscribe_with,
    unsubscribe,
};
use crate::server::server;

/// Nor has a topic [MQTT-4.7.3-2].
#[test]
fn mqtt_1_5_4_1_and_2_strings_are_utf_8_without_u_0000() {
    for version in BOTH {
        for topic in [&b"a\xC0\x80"[..], b"\xED\xA0\x80", b"a\0"] {
            let mut raw = server().client(version, "utf-8");
            let list: &[u8] = if version.is_v5() { &[0] } else { &[] };
            raw.send(&packet(0x30, [&field(topic)[..], list].concat()));
            if version.is_v5() {
                let disconnect = raw.packet();
                assert_eq!(disconnect[0], 0xE0);
                assert!([0x81, 0x82, 0x90].contains(&disconnect[2]), "{disconnect:x?}");
            }
            raw.expect_closed();
        }
    }
}

#[test]
fn mqtt_1_5_4_names_have_no_control_characters() {
    for version in BOTH {
        for bad in ["a\u{1}", "a\u{1F}b", "\u{7F}", "a\u{9F}", "\u{FDD0}", "a\u{FFFF}", "\u{1FFFE}"]
        {
            let user = Connect { flags: 0x82, rest: field(bad), ..Connect::new(version, "x") };
            let will = Connect::new(version, "x").will(0, &[], bad, "x");
            for connect in [Connect::new(version, bad), user, will] {
                let mut raw = server().open(version);
                raw.send(&connect.bytes());
                let connack = raw.packet();
                assert_eq!(connack.get(3), version.is_v5().then_some(&0x81), "{bad:?}");
            }
            for bytes in [
                publish(version, 0x30, bad, 0, &[], ""),
                subscribe(version, 1, &[(bad, 0)]),
                unsubscribe(version, 1, &[bad]),
            ] {
                let mut raw = server().client(version, "control");
                raw.send(&bytes);
                raw.expect_end(0x81);
            }
        }
    }
}

#[test]
fn mqtt_1_5_4_3_a_byte_order_mark_stays_where_it_is() {
    for version in BOTH {
        let mut raw = server().client(version, "bom");
        raw.subscribe("\u{FEFF}bom", 0);
        raw.send(&publish(version, 0x30, "\u{FEFF}bom", 0, &[], "x"));
        assert_eq!(raw.message().topic, "\u{FEFF}bom");
    }
}

#[test]
fn mqtt_1_5_5_1_lengths_come_in_their_shortest_form() {
    let mut raw = server().client(V5, "shortest");
    raw.send(&[0xC0, 0x80, 0x00]);
    raw.expect_end(0x81);
}

/// Strings, alone and in pairs, in whatever packet and property.
#[test]
fn mqtt_1_5_7_1_and_3_3_2_13_and_19_properties_are_utf_8() {
    for bad in [&b"\xFF"[..], b"\xC0\x80", b"\xED\xA0\x80", b"a\0"] {
        let pairs = [[field(bad), field("v")].concat(), [field("k"), field(bad)].concat()];
        let [key, value] = pairs.map(|pair| [&[0x26][..], &pair].concat());
        let [content_type, response] = [0x03, 0x08].map(|id| [&[id][..], &field(bad)].concat());
        for list in [&key, &value, &content_type, &response] {
            let mut raw = server().client(V5, "properties");
            raw.send(&publish(V5, 0x30, "t", 0, list, ""));
            raw.expect_end_of(&[0x81, 0x90]);
        }
        for list in [&key, &value] {
            for bytes in [
                subscribe_with(V5, 1, list, &[("t", 0)]),
                packet(0xA2, [&[0, 1][..], &properties(V5, list), &field("t")].concat()),
            ] {
                let mut raw = server().client(V5, "properties");
                raw.send(&bytes);
                raw.expect_end(0x81);
            }
        }
    }
}

#[test]
fn mqtt_3_8_3_1_and_3_10_3_1_filters_are_utf_8() {
    for version in BOTH {
        for bad in [&b"\xFF"[..], b"a/\xC0\x80", b"\xED\xA0\x80/#", b"a\0"] {
            for (first, options) in [(0x82, &[0][..]), (0xA2, &[])] {
                let head = [&[0, 1][..], &properties(version, &[])].concat();
                let mut raw = server().client(version, "filters");
                raw.send(&packet(first, [&head, &field(bad)[..], options].concat()));
                raw.expect_end_of(&[0x81]);
            }
        }
    }
}

/// Those of PUBREL, SUBSCRIBE, UNSUBSCRIBE and DISCONNECT are named apart: [MQTT-3.6.1-1],
/// [MQTT-3.8.1-1], [MQTT-3.10.1-1], [MQTT-3.14.1-1].
#[test]
fn mqtt_2_1_3_1_reserved_flags_are_as_they_must_be() {
    for version in BOTH {
        for first in [0x41, 0x51, 0x60, 0x6A, 0x71, 0x80, 0x83, 0xA0, 0xA6, 0xC1, 0xE1, 0x00] {
            let mut raw = server().client(version, "flags");
            raw.send(&packet(first, [0, 1]));
            raw.expect_end(0x81);
        }
    }
}

#[test]
fn mqtt_3_15_1_1_the_flags_of_auth_are_0() {
    for first in [0xF1, 0xF2, 0xF8] {
        let mut raw = server().client(V5, "auth-flags");
        raw.send(&packet(first, [0x18, 0]));
        raw.expect_end(0x81);
    }
}

#[test]
fn mqtt_2_2_1_3_a_packet_id_is_not_zero() {
    for version in BOTH {
        for bytes in [
            publish(version, 0x32, "zero", 0, &[], ""),
            publish(version, 0x34, "zero", 0, &[], ""),
            subscribe(version, 0, &[("zero", 0)]),
            unsubscribe(version, 0, &["zero"]),
        ] {
            let mut raw = server().client(version, "zero");
            raw.send(&bytes);
            if version.is_v5() {
                assert_eq!(raw.packet()[0], 0xE0);
            }
            raw.expect_closed();
        }
    }
}

#[test]
fn mqtt_2_2_1_5_and_6_acks_have_the_id_of_what_they_answer() {
    for version in BOTH {
        let mut raw = server().client(version, "ids");
        for id in [1, 255, 256, 65_535] {
            raw.send(&publish(version, 0x32, "ids", id, &[], ""));
            raw.expect_ack(0x40, id);
            raw.send(&subscribe(version, id, &[("ids/none", 0)]));
            assert_eq!(raw.packet()[2..4], id.to_be_bytes());
            raw.send(&unsubscribe(version, id, &["ids/none"]));
            assert_eq!(raw.packet()[2..4], id.to_be_bytes());
        }
    }
}

#[test]
fn mqtt_3_12_4_1_a_pingreq_is_answered() {
    for version in BOTH {
        server().client(version, "ping").ping();
    }
}

#[test]
fn mqtt_3_14_4_1_a_disconnect_ends_the_connection_on_the_servers_side_too() {
    for version in BOTH {
        let mut raw = server().client(version, "bye");
        raw.send(&[0xE0, 0]);
        raw.expect_closed();
    }
}

#[test]
fn mqtt_3_14_1_1_of_3_1_1_a_disconnect_has_no_content() {
    let mut raw = server().client(V311, "bye-with-content");
    raw.send(&[0xE0, 1, 0]);
    raw.expect_closed();
}

#[test]
fn mqtt_5_a_disconnect_asks_for_no_expiry_that_connect_did_not() {
    let mut raw = server().client(V5, "bye-with-expiry");
    raw.send(&packet(0xE0, [0, 5, 0x11, 0, 0, 0, 9]));
    raw.expect_end(0x82);
}

#[test]
fn mqtt_3_14_2_2_a_disconnect_of_the_server_says_nothing_of_the_sessions_expiry() {
    let connect = Connect::kept(V5, "no-expiry-back");
    let (mut raw, _) = server().enter(&connect);
    server().enter(&connect);
    let disconnect = raw.packet();
    assert_eq!((disconnect[0], disconnect[2], disconnect[4]), (0xE0, 0x8E, 0x1F));
    // The reason string is all that there is.
    assert_eq!(usize::from(disconnect[3]), 3 + usize::from(disconnect[6]));
    raw.expect_closed();
}

/// With one of the codes that there are [MQTT-3.14.2-1], and no packet after it [MQTT-3.14.4-2].
#[test]
fn mqtt_4_13_1_1_what_only_a_server_sends_is_an_error() {
    for version in BOTH {
        for bytes in [&[0x20, 2, 0, 0][..], &[0x90, 3, 0, 1, 0], &[0xB0, 2, 0, 1], &[0xD0, 0]] {
            let mut raw = server().client(version, "server-packets");
            raw.send(bytes);
            raw.expect_end(0x82);
        }
    }
}

#[test]
fn mqtt_3_1_1_has_no_auth() {
    let mut raw = server().client(V311, "auth-in-v3");
    raw.send(&[0xF0, 0]);
    raw.expect_closed();
}
