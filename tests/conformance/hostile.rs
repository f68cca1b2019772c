//! Inputs that broke brokers in the field. After each the gateway serves as before.

use crate::harness::wire::{
    BOTH, Connect, V5, V311, Version, ack, field, packet, publish, subscribe,
};
use crate::server::{name, server};

/// Another client is served.
fn assert_alive(version: Version) {
    // By no name: other tests do the same at the same time.
    let (mut raw, _) = server().enter(&Connect::new(version, ""));
    raw.send(&publish(version, 0x32, "alive", 1, &[], ""));
    raw.expect_ack(0x40, 1);
}

#[test]
fn cve_2023_0809_a_huge_first_packet_that_is_no_connect() {
    let mut raw = server().open(V311);
    raw.send(&[0x30, 0xFF, 0xFF, 0xFF, 0x7F]);
    raw.expect_closed();
    let mut raw = server().open(V311);
    raw.send(&[0x10, 0xFF, 0xFF, 0xFF, 0x7F]);
    raw.expect_closed();
    assert_alive(V311);
}

#[test]
fn cve_2023_28366_qos_2_packet_ids_that_are_never_released() {
    for version in BOTH {
        let mut raw = server().client(version, "never-released");
        let mut id = 0;
        let closed = loop {
            id += 1;
            if raw.try_send(&publish(version, 0x34, "never-released", id, &[], "")).is_err() {
                break true;
            }
            match raw.try_packet() {
                Ok(Some(packet)) if packet[0] == 0x50 => {}
                Ok(Some(packet)) => break packet[0] == 0xE0 && packet[2] == 0x93,
                Ok(None) | Err(_) => break true,
            }
            assert!(id < 1_000, "receipts without a bound");
        };
        assert!(closed);
        assert_alive(version);
    }
}

#[test]
fn cve_2023_3592_a_will_with_bad_properties() {
    for list in [&[0x11, 0, 0, 0, 1][..], &[0x0B, 1], &[0x23, 0, 1], &[0x7F], &[0x18, 0]] {
        let mut raw = server().open(V5);
        raw.send(&Connect::new(V5, "bad-will").will(0, list, "t", "p").bytes());
        let connack = raw.packet();
        assert!(connack.is_empty() || connack[3] >= 0x80, "{list:x?}: {connack:x?}");
    }
    assert_alive(V5);
}

#[test]
fn cve_2021_34432_a_topic_of_length_0() {
    for version in BOTH {
        for first in [0x30, 0x32, 0x34] {
            let mut raw = server().client(version, "empty-topic");
            raw.send(&publish(version, first, "", 1, &[], "x"));
            raw.expect_end(0x82);
        }
        assert_alive(version);
    }
}

#[test]
fn cve_2021_28166_a_client_sends_connack() {
    for version in BOTH {
        for bytes in [&[0x20, 2, 0, 0][..], &[0x20, 3, 0, 0, 0], &[0x20, 0]] {
            let mut raw = server().client(version, "connack");
            raw.send(bytes);
            raw.expect_end(0x82);
        }
        assert_alive(version);
    }
}

#[test]
fn cve_2026_21888_a_variable_integer_of_five_bytes() {
    for version in BOTH {
        let mut raw = server().client(version, "five-bytes");
        raw.send(&[0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0x01]);
        raw.expect_end(0x81);
    }
    // Inside a packet: the length of the properties, and a subscription identifier.
    for bytes in [
        packet(0x30, [&field("t")[..], &[0xFF, 0xFF, 0xFF, 0xFF, 0x01]].concat()),
        packet(
            0x82,
            [&[0, 1, 6, 0x0B, 0xFF, 0xFF, 0xFF, 0xFF, 0x01][..], &field("t"), &[0]].concat(),
        ),
    ] {
        let mut raw = server().client(V5, "five-bytes");
        raw.send(&bytes);
        let disconnect = raw.packet();
        assert_eq!(disconnect.first(), Some(&0xE0), "{disconnect:x?}");
    }
    assert_alive(V5);
}

#[test]
fn cve_2025_59946_subscriptions_come_and_go_while_messages_flow() {
    let publisher = std::thread::spawn(|| {
        let mut raw = server().client(V311, "race-pub");
        for id in 1..=400 {
            raw.send(&publish(V311, 0x32, "race/t", id, &[], "x"));
            raw.expect_ack(0x40, id);
        }
    });
    let mut round = 0;
    while !publisher.is_finished() && round < 1_000 {
        round += 1;
        let mut raw = server().client(V311, "race-sub");
        raw.send(&subscribe(V311, 1, &[("race/#", 1), ("race/+", 0), ("$share/g/race/t", 1)]));
        raw.send(&crate::harness::wire::unsubscribe(V311, 2, &["race/#", "$share/g/race/t"]));
        raw.cut();
    }
    publisher.join().unwrap();
    assert_alive(V311);
}

#[test]
fn cve_2024_48077_a_flood_of_acks_and_pings() {
    for version in BOTH {
        let mut raw = server().client(version, "flood");
        let acks = [ack(0x40, 1), ack(0x50, 2), ack(0x70, 3)].concat().repeat(5_000);
        raw.send(&acks);
        for _ in 0..5_000 {
            assert_eq!(raw.packet()[0], 0x62, "an unknown PUBREC is answered");
        }
        raw.ping();
    }
}

#[test]
fn nanomq_2270_a_truncated_publish() {
    for version in BOTH {
        for (first, content) in [
            (0x32, &[0, 1, b't'][..]),
            (0x32, &[0, 1, b't', 0]),
            (0x34, &[0, 9, b't']),
            (0x30, &[0]),
        ] {
            let mut raw = server().client(version, "truncated");
            raw.send(&packet(first, content));
            raw.expect_end(0x81);
        }
        assert_alive(version);
    }
}

#[test]
fn cve_2021_22116_and_33175_and_33176_what_is_announced_takes_no_memory() {
    // Hundreds announce the largest packet and send nothing of it.
    let announced: Vec<_> = (0..200)
        .map(|i| {
            let mut raw = server().client(V311, &format!("announced-{i}"));
            raw.send(&[0x30, 0xFF, 0xFF, 0x0F]);
            raw
        })
        .collect();
    assert_alive(V311);
    drop(announced);
}

#[test]
fn rumqttd_a_topic_that_begins_with_another_script() {
    for version in BOTH {
        let mut raw = server().client(version, "é");
        let topic = format!("é/{}", name(version, "x"));
        raw.subscribe(&topic, 1);
        raw.send(&publish(version, 0x30, &topic, 0, &[], "x"));
        assert_eq!(raw.message().topic, topic);
    }
}

#[test]
fn rumqttd_a_client_id_with_a_slash_twice() {
    for version in BOTH {
        let _first = server().client(version, "a/b");
        let mut second = server().client(version, "a/b");
        second.ping();
    }
}

#[test]
fn rumqttd_a_share_is_left_with_an_unacked_message() {
    for version in BOTH {
        let topic = name(version, "left");
        let mut member = server().client(version, "left-member");
        member.subscribe(&format!("$share/g/{topic}"), 1);
        let mut publisher = server().client(version, "left-pub");
        publisher.send(&publish(version, 0x32, &topic, 1, &[], "x"));
        member.message();
        member.cut();
        assert_alive(version);
    }
}
