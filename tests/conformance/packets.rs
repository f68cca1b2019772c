//! The form of packets: sections 1.5, 2.1, 2.2, 3.12, 3.14, 4.13.

use crate::harness::wire::{
    BOTH, Connect, V5, V311, field, packet, publish, subscribe, unsubscribe,
};
use crate::server::server;

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

#[test]
fn mqtt_2_1_3_1_reserved_flags_are_as_they_must_be() {
    for version in BOTH {
        for first in [0x41, 0x51, 0x60, 0x71, 0x80, 0xA0, 0xC1, 0xE1, 0x00] {
            let mut raw = server().client(version, "flags");
            raw.send(&packet(first, [0, 1]));
            raw.expect_end(0x81);
        }
    }
}

#[test]
fn mqtt_2_2_1_2_a_publish_of_qos_0_has_no_id_and_3_others_have_one_that_is_not_zero() {
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
fn mqtt_2_2_1_5_acks_have_the_id_of_what_they_answer() {
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
fn mqtt_3_14_2_2_a_disconnect_asks_for_no_expiry_that_connect_did_not() {
    let mut raw = server().client(V5, "bye-with-expiry");
    raw.send(&packet(0xE0, [0, 5, 0x11, 0, 0, 0, 9]));
    raw.expect_end(0x82);
}

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
fn mqtt_3_15_a_v3_client_has_no_auth() {
    let mut raw = server().client(V311, "auth-in-v3");
    raw.send(&[0xF0, 0]);
    raw.expect_closed();
}
