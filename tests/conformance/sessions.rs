//! Sessions: sections 3.1.2.4, 3.1.2.11.2, 4.1, 4.4.

use crate::harness::wire::{BOTH, Connect, V5, ack, packet, publish};
use crate::server::{Client, name, server};

/// Messages are added to the session while its client is away [MQTT-4.5.0-1].
#[test]
fn mqtt_3_1_2_5_and_6_what_was_subscribed_is_there_when_the_client_is_back() {
    for version in BOTH {
        let server = server();
        let topic = name(version, "kept/topic");
        let connect = Connect::kept(version, name(version, "kept"));
        let (mut raw, _) = server.enter(&connect);
        raw.subscribe(&topic, 1);
        raw.send(&[0xE0, 0]);
        raw.expect_closed();
        let mut publisher = server.client(version, "kept-pub");
        for (first, id) in [(0x32, 1), (0x34, 2)] {
            publisher.send(&publish(version, first, &topic, id, &[], &id.to_string()));
            assert_eq!(publisher.packet()[2..4], id.to_be_bytes());
        }
        let (mut raw, connack) = server.enter(&connect);
        assert_eq!(connack[2], 1);
        for text in ["1", "2"] {
            let message = raw.message();
            assert_eq!((message.qos(), message.text()), (1, text));
            raw.send(&ack(0x40, message.id));
        }
        raw.ping();
    }
}

/// In their order [MQTT-4.6.0-1], marked [MQTT-3.3.1-1], and as long as their exchange is not at its end:
/// [MQTT-4.3.2-3], [MQTT-4.3.3-3], [MQTT-4.3.3-5], [MQTT-4.3.3-6].
#[test]
fn mqtt_4_4_0_1_what_was_not_acked_is_sent_again_with_its_id() {
    for version in BOTH {
        let server = server();
        let topic = name(version, "resent");
        let connect = Connect::kept(version, name(version, "resent"));
        let (mut raw, _) = server.enter(&connect);
        raw.subscribe(&topic, 2);
        let mut publisher = server.client(version, "resent-pub");
        for (first, id) in [(0x32, 1), (0x34, 2), (0x34, 3)] {
            publisher.send(&publish(version, first, &topic, id, &[], &id.to_string()));
        }
        let sent = [raw.message(), raw.message(), raw.message()];
        raw.send(&ack(0x50, sent[2].id));
        raw.expect_ack(0x62, sent[2].id);
        raw.cut();
        let (mut raw, _) = server.enter(&connect);
        for (before, first) in sent[..2].iter().zip([0x3A, 0x3C]) {
            let again = raw.message();
            assert_eq!((again.first, again.id), (first, before.id));
            assert_eq!(again.payload, before.payload);
        }
        // The third has arrived: only its release is repeated.
        raw.expect_ack(0x62, sent[2].id);
        raw.send(&[ack(0x40, sent[0].id), ack(0x50, sent[1].id), ack(0x70, sent[2].id)].concat());
        raw.expect_ack(0x62, sent[1].id);
        raw.send(&ack(0x70, sent[1].id));
        raw.ping();
        raw.cut();
        let (mut raw, _) = server.enter(&connect);
        raw.ping();
    }
}

#[test]
fn mqtt_4_4_0_2_what_the_client_has_refused_is_not_sent_again() {
    let server = server();
    let connect = Connect::kept(V5, "refusing");
    let (mut raw, _) = server.enter(&connect);
    raw.subscribe("refusing", 2);
    let mut publisher = server.client(V5, "refusing-pub");
    for (first, id) in [(0x32, 1), (0x34, 2)] {
        publisher.send(&publish(V5, first, "refusing", id, &[], ""));
    }
    let ids = [raw.message().id, raw.message().id];
    for (first, id) in [0x40, 0x50].into_iter().zip(ids) {
        raw.send(&packet(first, [&id.to_be_bytes()[..], &[0x83]].concat()));
    }
    // No PUBREL, either.
    raw.ping();
    raw.cut();
    let (mut raw, connack) = server.enter(&connect);
    assert_eq!(connack[2], 1);
    raw.ping();
}

/// A retained message with a second to live, from now on: once it is gone, so is all that came before it
/// with as much.
fn let_a_second_pass(raw: &mut Client, topic: &str) {
    raw.send(&publish(V5, 0x33, topic, 1, &[0x02, 0, 0, 0, 1], "tick"));
    raw.expect_ack(0x40, 1);
    let mut ticks = true;
    while ticks {
        raw.subscribe(topic, 0);
        raw.send(&[0xC0, 0]);
        // What is retained may come before the answer or behind it.
        let first = raw.packet()[0];
        ticks = first == 0x31;
        if ticks {
            raw.expect(&[0xD0, 0]);
        }
    }
}

#[test]
fn mqtt_3_3_2_5_what_has_expired_while_the_client_was_away_does_not_reach_it() {
    let server = server();
    let connect = Connect::kept(V5, "away");
    let (mut raw, _) = server.enter(&connect);
    raw.subscribe("away", 1);
    raw.cut();
    let mut publisher = server.client(V5, "away-pub");
    for (expiry_s, text) in [(1, "expired"), (100, "in time")] {
        publisher.send(&publish(V5, 0x32, "away", 1, &[0x02, 0, 0, 0, expiry_s], text));
        publisher.expect_ack(0x40, 1);
    }
    let_a_second_pass(&mut publisher, "away/clock");
    let (mut raw, _) = server.enter(&connect);
    assert_eq!(raw.message().text(), "in time");
    raw.ping();
}

#[test]
fn mqtt_4_3_3_7_what_was_sent_once_is_sent_again_even_when_it_has_expired() {
    let server = server();
    let connect = Connect::kept(V5, "sent-once");
    let (mut raw, _) = server.enter(&connect);
    raw.subscribe("sent-once", 2);
    let mut publisher = server.client(V5, "sent-once-pub");
    publisher.send(&publish(V5, 0x34, "sent-once", 1, &[0x02, 0, 0, 0, 1], "x"));
    publisher.expect_ack(0x50, 1);
    let sent = raw.message();
    raw.cut();
    let_a_second_pass(&mut publisher, "sent-once/clock");
    let (mut raw, _) = server.enter(&connect);
    let again = raw.message();
    assert_eq!((again.first, again.id, again.text()), (0x3C, sent.id, "x"));
    raw.send(&ack(0x50, again.id));
    raw.expect_ack(0x62, again.id);
}

#[test]
fn mqtt_3_1_2_7_of_3_1_1_retained_messages_outlive_the_session_of_their_publisher() {
    for version in BOTH {
        let server = server();
        let topic = name(version, "outlives");
        let id = name(version, "outlived");
        let (mut raw, _) = server.enter(&Connect::kept(version, id.clone()));
        raw.send(&publish(version, 0x33, &topic, 1, &[], "x"));
        raw.expect_ack(0x40, 1);
        raw.cut();
        // A clean start ends that session, and its end this one.
        server.enter(&Connect::new(version, id)).0.cut();
        let mut late = server.client(version, "outlives-late");
        late.subscribe(&topic, 1);
        assert_eq!(late.message().text(), "x");
    }
}

#[test]
fn mqtt_4_3_3_receipts_outlive_the_connection() {
    for version in BOTH {
        let server = server();
        let topic = name(version, "receipts");
        let mut subscriber = server.client(version, "receipts-sub");
        subscriber.subscribe(&topic, 0);
        let connect = Connect::kept(version, name(version, "receipts"));
        for first in [0x34, 0x3C, 0x3C] {
            let (mut raw, _) = server.enter(&connect);
            raw.send(&publish(version, first, &topic, 9, &[], "once"));
            raw.expect_ack(0x50, 9);
            raw.cut();
        }
        let (mut raw, _) = server.enter(&connect);
        raw.send(&ack(0x62, 9));
        raw.expect_ack(0x70, 9);
        assert_eq!(subscriber.message().text(), "once");
        subscriber.ping();
    }
}

#[test]
fn mqtt_3_1_2_4_a_clean_start_forgets_everything() {
    for version in BOTH {
        let server = server();
        let topic = name(version, "forgotten");
        let id = name(version, "forgotten");
        let (mut raw, _) = server.enter(&Connect::kept(version, id.clone()));
        raw.subscribe(&topic, 1);
        raw.cut();
        server.enter(&Connect::new(version, id.clone())).0.cut();
        let mut publisher = server.client(version, "forgotten-pub");
        publisher.send(&publish(version, 0x32, &topic, 1, &[], "x"));
        publisher.expect_ack(0x40, 1);
        let (mut raw, connack) = server.enter(&Connect::kept(version, id));
        assert_eq!(connack[2], 0);
        raw.ping();
    }
}

/// And not before [MQTT-4.1.0-2].
#[test]
fn mqtt_3_1_2_23_a_session_ends_when_it_expires() {
    let server = server();
    let mut connect = Connect::kept(V5, "expires");
    connect.properties = vec![0x11, 0, 0, 0, 1];
    server.enter(&connect).0.cut();
    let (_, connack) = server.enter(&connect);
    assert_eq!(connack[2], 1, "it was not away for a second");
    // Gone a second after its end; whoever looks in between prolongs it, so that it is left alone.
    server.enter(&connect).0.cut();
    std::thread::sleep(std::time::Duration::from_millis(2_600));
    assert_eq!(server.enter(&connect).1[2], 0);
}

#[test]
fn mqtt_5_a_disconnect_may_change_the_expiry() {
    let server = server();
    let connect = Connect::kept(V5, "shortened");
    let (mut raw, _) = server.enter(&connect);
    raw.send(&packet(0xE0, [0, 5, 0x11, 0, 0, 0, 0]));
    raw.expect_closed();
    assert_eq!(server.enter(&connect).1[2], 0);
}

#[test]
fn mqtt_5_a_client_is_told_when_it_gets_less_than_it_asked_for() {
    let mut connect = Connect::kept(V5, "for-ever");
    connect.properties = vec![0x11, 0xFF, 0xFF, 0xFF, 0xFF];
    let (_, connack) = server().enter(&connect);
    let week = [&[0x11][..], &(7 * 24 * 3600_u32).to_be_bytes()].concat();
    assert!(connack.windows(5).any(|property| property == week), "{connack:x?}");
}
