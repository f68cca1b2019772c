//! CONNECT and CONNACK: sections 3.1, 3.2, 4.12, 4.13.

use crate::harness::wire::{
    BOTH, Connect, V5, V31, V311, Version, field, packet, properties, subscribe, unsubscribe,
};
use crate::server::{Server, name, server};

/// Sends bytes; gives the code of the CONNACK, or `None` if there was none. Then it is closed.
fn refusal(version: Version, bytes: &[u8]) -> Option<u8> {
    let server = server();
    let mut raw = server.open(version);
    raw.send(bytes);
    let connack = raw.packet();
    if connack.is_empty() {
        return None;
    }
    assert_eq!((connack[0], connack[2]), (0x20, 0), "session present must be 0: {connack:x?}");
    raw.expect_closed();
    Some(connack[3])
}

#[test]
fn mqtt_3_1_0_1_the_first_packet_is_connect() {
    for first in
        [&[0xC0, 0][..], &[0xE0, 0], &[0x30, 3, 0, 1, b't'], &[0x82, 6, 0, 1, 0, 1, b't', 0]]
    {
        assert_eq!(refusal(V311, first), None, "{first:x?}");
    }
}

#[test]
fn mqtt_3_1_0_2_a_second_connect_is_an_error() {
    for version in BOTH {
        let server = server();
        let mut raw = server.client(version, "3.1.0-2");
        raw.send(&Connect::new(version, "again").bytes());
        raw.expect_end(0x82);
    }
}

#[test]
fn mqtt_3_1_2_1_another_protocol_name_is_closed() {
    for version in BOTH {
        assert_eq!(refusal(version, &Connect::new(version, "x").bytes_as("MQTX", 4)), None);
        assert_eq!(refusal(version, &Connect::new(version, "x").bytes_as("mqtt", 4)), None);
    }
}

#[test]
fn mqtt_3_1_2_2_another_protocol_level_is_refused() {
    for level in [0, 6, 0x84] {
        assert_eq!(refusal(V311, &Connect::new(V311, "x").bytes_as("MQTT", level)), Some(1));
    }
}

#[test]
fn mqtt_3_1_clients_are_served() {
    let server = server();
    let (mut raw, _) = server.enter(&Connect::new(V31, "3.1"));
    raw.ping();
}

#[test]
fn mqtt_3_1_clients_meet_the_rules_of_3_1() {
    // Bits that it does not use may be anything, and CONNACK says nothing of a session.
    for _ in 0..2 {
        let mut bytes = Connect { flags: 0x01, ..Connect::new(V31, "3.1-bits") }.bytes();
        bytes[0] = 0x1F;
        let mut raw = server().open(V31);
        raw.send(&bytes);
        raw.expect(&[0x20, 2, 0, 0]);
        raw.ping();
    }
    assert_eq!(refusal(V31, &Connect::new(V31, "").bytes()), Some(2));
    for version in BOTH {
        let mut bytes = Connect::new(version, "flags").bytes();
        bytes[0] = 0x12;
        assert_eq!(refusal(version, &bytes), None, "[MQTT-2.1.3-1]");
    }
}

#[test]
fn mqtt_3_1_2_3_the_reserved_flag_is_zero() {
    for version in BOTH {
        let connect = Connect { flags: 0x03, ..Connect::new(version, "x") };
        let code = refusal(version, &connect.bytes());
        assert_eq!(code, version.is_v5().then_some(0x81));
    }
}

#[test]
fn mqtt_3_1_2_9_a_will_is_there_if_its_flag_says_so() {
    for version in BOTH {
        let connect = Connect { flags: 0x06, ..Connect::new(version, "x") };
        assert_eq!(refusal(version, &connect.bytes()), version.is_v5().then_some(0x81));
    }
}

#[test]
fn mqtt_3_1_2_11_to_13_will_qos_and_retain_need_a_will_and_qos_3_is_none() {
    for version in BOTH {
        for flags in [0x0A, 0x12, 0x22] {
            let connect = Connect { flags, ..Connect::new(version, "x") };
            assert_eq!(refusal(version, &connect.bytes()), version.is_v5().then_some(0x81));
        }
        let connect = Connect::new(version, "x").will(0x18, &[], "t", "p");
        assert_eq!(refusal(version, &connect.bytes()), version.is_v5().then_some(0x81));
    }
}

#[test]
fn mqtt_3_1_2_16_to_19_user_name_and_password_are_there_as_the_flags_say() {
    for version in BOTH {
        for (flags, rest) in [
            (0x82, Vec::new()),
            (0xC2, field("user")),
            (0x02, field("user")),
            (0x82, [field("user"), field("password")].concat()),
        ] {
            let connect = Connect { flags, rest, ..Connect::new(version, "x") };
            assert_eq!(refusal(version, &connect.bytes()), version.is_v5().then_some(0x81));
        }
        let rest = [field("user"), field("password")].concat();
        let connect = Connect { flags: 0xC2, rest, ..Connect::new(version, name(version, "user")) };
        server().enter(&connect);
    }
}

#[test]
fn mqtt_3_1_2_22_of_3_1_1_a_password_needs_a_user_name() {
    let connect = Connect { flags: 0x42, rest: field("password"), ..Connect::new(V311, "x") };
    assert_eq!(refusal(V311, &connect.bytes()), None);
    // MQTT 5 allows it.
    server().enter(&Connect { version: V5, client_id: "pw".into(), ..connect });
}

#[test]
fn mqtt_3_1_2_22_a_silent_client_is_closed_after_one_and_a_half_keep_alives() {
    for version in BOTH {
        let server = server();
        let connect = Connect { keep_alive: 1, ..Connect::new(version, name(version, "silent")) };
        let (mut raw, _) = server.enter(&connect);
        raw.expect_end(0x8D);
    }
}

#[test]
fn mqtt_3_1_2_21_a_server_keep_alive_is_told_and_holds() {
    let server = Server::start("[sessions]\nkeep_alive_max = \"1s\"");
    let (mut raw, connack) = server.enter(&Connect { keep_alive: 60, ..Connect::new(V5, "asks") });
    assert!(connack.windows(3).any(|property| property == [0x13, 0, 1]), "{connack:x?}");
    raw.expect_end(0x8D);
}

#[test]
fn mqtt_3_1_2_24_no_packet_is_larger_than_the_client_takes() {
    let server = server();
    let connect = Connect { properties: vec![0x27, 0, 0, 0, 30], ..Connect::new(V5, "small") };
    let (mut raw, _) = server.enter(&connect);
    raw.subscribe("small/t", 0);
    let mut other = server.client(V5, "large");
    let large = "x".repeat(40);
    for payload in [&*large, "fits"] {
        other.send(&crate::harness::wire::publish(V5, 0x30, "small/t", 0, &[], payload));
    }
    assert_eq!(raw.message().text(), "fits", "[MQTT-3.1.2-25]: as if it had been sent");
}

#[test]
fn mqtt_3_1_2_24_and_3_2_2_19_nor_is_an_answer() {
    // It takes no CONNACK: there is nothing that could be said.
    let tiny = Connect { properties: vec![0x27, 0, 0, 0, 2], ..Connect::new(V5, "tiny") };
    assert_eq!(refusal(V5, &tiny.bytes()), None);
    // A refusal without its reason string.
    let method = [&[0x27, 0, 0, 0, 10, 0x15][..], &field("SCRAM")].concat();
    let mut raw = server().open(V5);
    raw.send(&Connect { properties: method, ..Connect::new(V5, "tiny") }.bytes());
    raw.expect(&[0x20, 3, 0, 0x8C, 0]);
    raw.expect_closed();
    // Answers that it would wait for in vain.
    for bytes in [subscribe(V5, 1, &[("a", 0); 40]), unsubscribe(V5, 1, &["a"; 40])] {
        let small =
            Connect { properties: vec![0x27, 0, 0, 0, 30], ..Connect::new(V5, "no-suback") };
        let (mut raw, _) = server().enter(&small);
        raw.send(&bytes);
        raw.expect(&[0xE0, 1, 0x95]);
        raw.expect_closed();
    }
}

#[test]
fn mqtt_3_1_3_1_the_payload_fields_are_there_and_nothing_else() {
    for version in BOTH {
        let mut bytes = Connect::new(version, "x").bytes();
        bytes.push(0);
        bytes[1] += 1;
        assert_eq!(refusal(version, &bytes), version.is_v5().then_some(0x81));
        let cut = packet(
            0x10,
            [&field("MQTT")[..], &[if version.is_v5() { 5 } else { 4 }, 2, 0, 0]].concat(),
        );
        assert_eq!(refusal(version, &cut), version.is_v5().then_some(0x81));
    }
}

#[test]
fn mqtt_3_1_3_4_a_client_id_is_utf_8_without_u_0000() {
    for version in BOTH {
        for id in [&b"\xFF\xFE"[..], b"\xED\xA0\x80", b"a\0b"] {
            let head = [field("MQTT"), vec![if version.is_v5() { 5 } else { 4 }, 2, 0, 0]].concat();
            let bytes = packet(0x10, [head, properties(version, &[]), field(id)].concat());
            assert_eq!(refusal(version, &bytes), version.is_v5().then_some(0x81), "{id:x?}");
        }
    }
}

#[test]
fn mqtt_3_1_3_5_client_ids_of_23_and_more_characters_are_taken() {
    for version in BOTH {
        let id = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
        server().enter(&Connect::new(version, name(version, id)));
    }
}

#[test]
fn mqtt_3_1_3_6_and_7_an_empty_client_id_gets_one_and_v5_is_told() {
    for version in BOTH {
        let (_, connack) = server().enter(&Connect::new(version, ""));
        assert_eq!(
            connack.windows(8).any(|w| w[0] == 0x12 && &w[3..] == b"auto-"),
            version.is_v5()
        );
    }
}

#[test]
fn mqtt_3_1_3_8_of_3_1_1_an_empty_client_id_needs_a_clean_session() {
    assert_eq!(refusal(V311, &Connect { flags: 0, ..Connect::new(V311, "") }.bytes()), Some(2));
}

#[test]
fn mqtt_3_1_4_3_a_second_connection_takes_over() {
    for version in BOTH {
        let server = server();
        let mut first = server.client(version, "twice");
        let mut second = server.client(version, "twice");
        first.expect_end(0x8E);
        second.ping();
    }
}

#[test]
fn mqtt_3_1_4_5_connack_comes_first_and_what_was_sent_with_connect_is_served() {
    for version in BOTH {
        let server = server();
        let mut raw = server.open(version);
        let connect = Connect::new(version, name(version, "eager"));
        raw.send(&[connect.bytes(), vec![0xC0, 0]].concat());
        assert_eq!(raw.packet()[0], 0x20);
        raw.expect(&[0xD0, 0]);
    }
}

#[test]
fn mqtt_3_1_4_6_nothing_is_served_after_a_refusal() {
    let server = server();
    let mut raw = server.open(V311);
    let refused = Connect::new(V311, "x").bytes_as("MQTT", 9);
    raw.send(&[refused, vec![0xC0, 0]].concat());
    raw.expect(&[0x20, 2, 0, 1]);
    raw.expect_closed();
}

#[test]
fn mqtt_3_2_2_1_and_3_session_present_says_whether_there_is_one() {
    for version in BOTH {
        let server = server();
        let id = name(version, "present");
        let present = |connect: &Connect| server.enter(connect).1[2];
        assert_eq!(present(&Connect::kept(version, id.clone())), 0);
        assert_eq!(present(&Connect::kept(version, id.clone())), 1);
        assert_eq!(present(&Connect::new(version, id.clone())), 0, "clean start [MQTT-3.2.2-2]");
        assert_eq!(present(&Connect::kept(version, id)), 0, "and it ended what there was");
    }
}

#[test]
fn mqtt_3_2_2_7_to_9_receive_maximum_is_told() {
    let (_, connack) = server().enter(&Connect::new(V5, "limits"));
    assert!(connack.windows(3).any(|property| property == [0x21, 0, 20]), "{connack:x?}");
}

#[test]
fn mqtt_4_12_0_1_an_unknown_authentication_method_is_refused() {
    let list = [&[0x15][..], &field("SCRAM-SHA-1")].concat();
    let connect = Connect { properties: list, ..Connect::new(V5, "auth") };
    assert_eq!(refusal(V5, &connect.bytes()), Some(0x8C));
}

#[test]
fn mqtt_4_12_0_6_auth_without_a_method_is_an_error() {
    let mut raw = server().client(V5, "no-method");
    raw.send(&packet(0xF0, [0x18, 0]));
    raw.expect_end(0x82);
}

#[test]
fn mqtt_3_1_2_11_2_properties_that_come_twice_or_do_not_belong_are_errors() {
    for (list, code) in [
        (&[0x11, 0, 0, 0, 1, 0x11, 0, 0, 0, 1][..], 0x82), // session expiry twice
        (&[0x21, 0, 0], 0x82),                             // receive maximum 0
        (&[0x27, 0, 0, 0, 0], 0x82),                       // maximum packet size 0
        (&[0x17, 2], 0x82),                                // request problem information 2
        (&[0x0B, 1], 0x81),                                // subscription identifier
        (&[0x7F, 1], 0x81),                                // no property at all
    ] {
        let connect = Connect { properties: list.to_vec(), ..Connect::new(V5, "x") };
        let code_given = refusal(V5, &connect.bytes());
        assert!(
            code_given == Some(code) || code_given == Some(0x81) || code_given == Some(0x82),
            "{list:x?}: {code_given:x?}"
        );
    }
}
