//! CONNECT and CONNACK: sections 3.1, 3.2, 4.12, 4.13.

use std::io::Write;

use crate::harness::wire::{
    BOTH, Connect, V5, V31, V311, Version, field, packet, properties, publish, subscribe,
    unsubscribe,
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

/// Nor is there a DISCONNECT before a CONNACK [MQTT-3.14.0-1].
#[test]
fn mqtt_3_1_0_1_the_first_packet_is_connect() {
    for version in BOTH {
        for first in [
            &[0xC0, 0][..],
            &[0xE0, 0],
            &publish(version, 0x30, "t", 0, &[], ""),
            &subscribe(version, 1, &[("t", 0)]),
        ] {
            assert_eq!(refusal(version, first), None, "{first:x?}");
        }
    }
}

#[test]
fn mqtt_3_1_0_2_a_second_connect_is_an_error() {
    for version in BOTH {
        let server = server();
        let mut raw = server.client(version, "3.1.0-2");
        raw.send(&Connect::new(version, "again").bytes());
        // No second CONNACK [MQTT-3.2.0-2].
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
    for version in BOTH {
        for level in [0, 6, 0x84] {
            let connect = Connect::new(version, "x").bytes_as("MQTT", level);
            assert_eq!(refusal(version, &connect), Some(1));
        }
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

/// No return code says that: there is no CONNACK [MQTT-3.2.2-6 of 3.1.1].
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
        let (mut raw, connack) = server.enter(&connect);
        // It was not told another one [MQTT-3.2.2-22].
        assert_eq!(&connack[4..], if version.is_v5() { PLAIN } else { &[] });
        raw.expect_end(0x8D);
    }
}

/// The properties of a CONNACK for a client that asked for nothing: Receive Maximum, Maximum Packet
/// Size (256 KiB), Topic Alias Maximum.
const PLAIN: &[u8] = &[11, 0x21, 0, 20, 0x27, 0, 4, 0, 0, 0x22, 0, 10];

#[test]
fn mqtt_3_1_2_28_and_4_12_0_6_a_connack_has_no_response_information_and_no_method() {
    for asked in [&[][..], &[0x19, 0], &[0x19, 1]] {
        let connect = Connect { properties: asked.to_vec(), ..Connect::new(V5, "asks-nothing") };
        assert_eq!(&server().enter(&connect).1[4..], PLAIN);
    }
}

#[test]
fn mqtt_3_1_2_29_who_wants_no_problem_information_gets_none_with_acks() {
    let connect = Connect { properties: vec![0x17, 0], ..Connect::new(V5, "no-problems") };
    let (mut raw, _) = server().enter(&connect);
    // One whose packets have no room for it, either [MQTT-3.4.2-2] [MQTT-3.5.2-2].
    let connect =
        Connect { properties: vec![0x27, 0, 0, 0, 30], ..Connect::new(V5, "small-problems") };
    let (mut small, _) = server().enter(&connect);
    let mut told = server().client(V5, "problems");
    for (first, ack) in [(0x32, 0x40), (0x34, 0x50)] {
        let refused = publish(V5, first, "$SYS/not/ours", 7, &[], "");
        for raw in [&mut raw, &mut small] {
            raw.send(&refused);
            raw.expect(&[ack, 3, 0, 7, 0x90]);
        }
        told.send(&refused);
        told.expect_refusal(ack, 7, 0x90);
    }
    raw.send(&unsubscribe(V5, 8, &["never/subscribed"]));
    raw.expect(&[0xB0, 4, 0, 8, 0, 0x11]);
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
        other.send(&publish(V5, 0x30, "small/t", 0, &[], payload));
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
        // Without a reason string, either [MQTT-3.14.2-3].
        raw.expect(&[0xE0, 1, 0x95]);
        raw.expect_closed();
    }
}

/// The client id is there, too [MQTT-3.1.3-3]; what is not as it must be is closed [MQTT-3.1.4-1].
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
fn mqtt_3_1_3_5_client_ids_of_1_to_23_and_of_more_characters_are_taken() {
    let id = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    for version in BOTH {
        for id in [&id[..1], &id[..23], &id[23..46], &id[46..], id] {
            server().enter(&Connect::new(version, id));
        }
    }
}

#[test]
fn mqtt_3_1_3_6_and_7_and_3_2_2_16_an_empty_client_id_gets_one_of_its_own_and_v5_is_told() {
    for version in BOTH {
        let server = server();
        let mut both = [(); 2].map(|()| server.enter(&Connect::new(version, "")));
        let told = both.each_ref().map(|(_, connack)| {
            let at = connack.windows(8).position(|w| w[0] == 0x12 && &w[3..] == b"auto-");
            at.map(|at| connack[at..at + 24].to_vec())
        });
        assert_eq!(told[0].is_some(), version.is_v5());
        assert!(told[0].is_none() || told[0] != told[1], "{told:x?}");
        // Neither took the other's place.
        for (raw, _) in &mut both {
            raw.ping();
        }
    }
}

#[test]
fn mqtt_3_1_3_8_a_client_id_that_is_not_taken_is_refused_as_such() {
    for version in BOTH {
        let code = if version.is_v5() { 0x85 } else { 2 };
        assert_eq!(refusal(version, &Connect::new(version, "x".repeat(1025)).bytes()), Some(code));
    }
}

#[test]
fn mqtt_3_1_3_11_and_12_will_topic_and_user_name_are_utf_8() {
    for version in BOTH {
        for bad in [&b"\xFF"[..], b"\xED\xA0\x80", b"a\0"] {
            let rest = [properties(version, &[]), field(bad), field("x")].concat();
            let will = Connect { flags: 0x06, rest, ..Connect::new(version, "x") };
            let user = Connect { flags: 0x82, rest: field(bad), ..Connect::new(version, "x") };
            for connect in [will, user] {
                let code = refusal(version, &connect.bytes());
                assert_eq!(code, version.is_v5().then_some(0x81), "{bad:x?}");
            }
        }
    }
}

#[test]
fn mqtt_3_1_3_7_and_8_of_3_1_1_an_empty_client_id_needs_a_clean_session() {
    assert_eq!(refusal(V311, &Connect { flags: 0, ..Connect::new(V311, "") }.bytes()), Some(2));
}

#[test]
fn mqtt_3_1_4_2_who_may_not_enter_is_told_so_and_closed() {
    let mut key = tempfile::NamedTempFile::new().unwrap();
    key.write_all(&[7; 32]).unwrap();
    let path = key.path().display();
    let server =
        Server::start(&format!("allow_anonymous = false\n[auth.jwt]\nhmac_key_file = \"{path}\""));
    for version in BOTH {
        let nobody = Connect::new(version, "nobody");
        let rest = [field(""), field("no token")].concat();
        let forger = Connect { flags: 0xC2, rest, ..Connect::new(version, "forger") };
        for (connect, code_v5, code_v3) in [(nobody, 0x87, 5), (forger, 0x86, 4)] {
            let mut raw = server.open(version);
            raw.send(&connect.bytes());
            let connack = raw.packet();
            assert_eq!(connack[2..4], [0, if version.is_v5() { code_v5 } else { code_v3 }]);
            raw.expect_closed();
        }
    }
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

/// [MQTT-3.2.0-1]
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
    for version in BOTH {
        let server = server();
        let topic = name(version, "after-refusal");
        let mut watcher = server.client(version, "after-refusal");
        watcher.subscribe(&topic, 0);
        let mut raw = server.open(version);
        let refused = Connect::new(version, "x").bytes_as("MQTT", 9);
        let unread = publish(version, 0x30, &topic, 0, &[], "x");
        raw.send(&[refused, unread, vec![0xC0, 0]].concat());
        raw.expect(&[0x20, 2, 0, 1]);
        raw.expect_closed();
        watcher.ping();
    }
}

/// One of the codes that there are [MQTT-3.2.2-8].
#[test]
fn mqtt_3_2_2_6_and_7_a_refusal_knows_no_session_and_closes() {
    for version in BOTH {
        let mut connect = Connect::kept(version, name(version, "known"));
        server().enter(&connect).0.cut();
        let refused = if version.is_v5() {
            connect.properties.extend([&[0x15][..], &field("none")].concat());
            (connect.bytes(), 0x8C)
        } else {
            (connect.bytes_as("MQTT", 9), 1)
        };
        assert_eq!(refusal(version, &refused.0), Some(refused.1));
    }
}

/// So a clean start is processed [MQTT-3.1.4-4].
#[test]
fn mqtt_3_2_2_1_and_3_session_present_says_whether_there_is_one() {
    for version in BOTH {
        let server = server();
        let id = name(version, "present");
        let present = |connect: &Connect| server.enter(connect).1[2];
        assert_eq!(present(&Connect::kept(version, id.clone())), 0);
        assert_eq!(present(&Connect::kept(version, id.clone())), 1);
        let other = Connect::kept(version, id.to_uppercase());
        assert_eq!(present(&other), 0, "another client's [MQTT-3.1.3-2]");
        assert_eq!(present(&Connect::new(version, id.clone())), 0, "clean start [MQTT-3.2.2-2]");
        assert_eq!(present(&Connect::kept(version, id)), 0, "and it ended what there was");
    }
}

#[test]
fn mqtt_5_connack_tells_receive_maximum() {
    let (_, connack) = server().enter(&Connect::new(V5, "limits"));
    assert!(connack.windows(3).any(|property| property == [0x21, 0, 20]), "{connack:x?}");
}

#[test]
fn mqtt_3_2_2_15_a_packet_larger_than_what_the_server_takes_is_an_error() {
    for version in BOTH {
        // 256 KiB, of which the header takes four bytes.
        for (length, fits) in [([0xFC, 0xFF, 0x0F], true), ([0xFD, 0xFF, 0x0F], false)] {
            let mut raw = server().client(version, "too-large");
            raw.send(&[&[0x30][..], &length].concat());
            if fits {
                let rest = [field("too-large"), properties(version, &[])].concat();
                raw.send(&[&rest[..], &vec![b'x'; (256 << 10) - 4 - rest.len()]].concat());
                raw.ping();
            } else {
                raw.expect_end(0x95);
            }
        }
    }
}

#[test]
fn mqtt_4_12_0_1_an_unknown_authentication_method_is_refused() {
    let list = [&[0x15][..], &field("SCRAM-SHA-1")].concat();
    let connect = Connect { properties: list, ..Connect::new(V5, "auth") };
    assert_eq!(refusal(V5, &connect.bytes()), Some(0x8C));
}

#[test]
fn mqtt_4_12_0_7_auth_without_a_method_is_an_error() {
    let mut raw = server().client(V5, "no-method");
    raw.send(&packet(0xF0, [0x18, 0]));
    raw.expect_end(0x82);
}

#[test]
fn mqtt_5_connect_properties_that_come_twice_or_do_not_belong_are_errors() {
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
