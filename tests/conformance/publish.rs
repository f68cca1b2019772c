//! PUBLISH and its answers: sections 3.3 to 3.7, 4.3 to 4.6, 4.9.

use crate::harness::wire::{BOTH, Connect, V5, V311, Version, ack, field, packet, publish};
use crate::server::{Client, name, server};

/// A client, and another one that subscribes to its topic with QoS 2.
fn pair(version: Version, topic: &str) -> (Client, Client) {
    let server = server();
    let mut subscriber = server.client(version, &format!("{topic}-sub"));
    subscriber.subscribe(topic, 2);
    (server.client(version, &format!("{topic}-pub")), subscriber)
}

#[test]
fn mqtt_3_3_1_3_a_delivery_is_not_marked_because_the_publish_was() {
    for version in BOTH {
        let (mut publisher, mut subscriber) = pair(version, &name(version, "dup"));
        publisher.send(&publish(version, 0x3A, &name(version, "dup"), 1, &[], "x"));
        publisher.expect_ack(0x40, 1);
        assert_eq!(subscriber.message().first, 0x32);
    }
}

/// PUBREC has its codes, too [MQTT-3.5.2-1].
#[test]
fn mqtt_3_4_2_1_a_puback_of_v5_says_that_nobody_subscribes() {
    let mut raw = server().client(V5, "unheard");
    for _ in 0..2 {
        raw.send(&publish(V5, 0x32, "unheard/t", 1, &[], "x"));
        raw.expect(&[0x40, 3, 0, 1, 0x10]);
    }
    raw.send(&publish(V5, 0x34, "unheard/t", 2, &[], "x"));
    raw.expect(&[0x50, 2, 0, 2]);
    let mut other = server().client(V5, "unheard-sub");
    other.subscribe("unheard/+", 0);
    raw.send(&publish(V5, 0x32, "unheard/t", 1, &[], "x"));
    raw.expect(&[0x40, 2, 0, 1]);
    other.cut();
}

#[test]
fn mqtt_5_a_message_may_expire_at_once() {
    let (mut publisher, mut subscriber) = pair(V5, "at-once");
    publisher.send(&publish(V5, 0x32, "at-once", 1, &[0x02, 0, 0, 0, 0], "x"));
    publisher.expect_ack(0x40, 1);
    // Its exchange goes on as any other [MQTT-4.3.3-13].
    publisher.send(&publish(V5, 0x34, "at-once", 2, &[0x02, 0, 0, 0, 0], "x"));
    publisher.expect_ack(0x50, 2);
    publisher.send(&ack(0x62, 2));
    publisher.expect_ack(0x70, 2);
    // It came in time, or not at all.
    publisher.send(&publish(V5, 0x30, "at-once", 0, &[], "end"));
    while subscriber.message().text() != "end" {}
}

#[test]
fn mqtt_3_3_4_6_a_subscription_identifier_of_a_publisher_goes_nowhere() {
    let (mut publisher, mut subscriber) = pair(V5, "publishers-id");
    publisher.send(&publish(V5, 0x30, "publishers-id", 0, &[0x0B, 7], "x"));
    assert_eq!(subscriber.message().properties, [0_u8; 0]);
    publisher.send(&publish(V5, 0x30, "publishers-id", 0, &[0x0B, 7, 0x0B, 8], "x"));
    publisher.expect_end(0x82);
}

#[test]
fn mqtt_4_13_1_1_a_message_has_the_answers_of_its_qos() {
    for version in BOTH {
        let topic = name(version, "answers");
        for (qos, answers) in
            [(1, &[0x50][..]), (1, &[0x70]), (2, &[0x40]), (2, &[0x70]), (2, &[0x50, 0x40])]
        {
            let (mut publisher, mut subscriber) = pair(version, &topic);
            publisher.send(&publish(version, 0x30 | qos << 1, &topic, 1, &[], "x"));
            let message = subscriber.message();
            for (at, answer) in answers.iter().enumerate() {
                if at > 0 {
                    subscriber.expect_ack(0x62, message.id);
                }
                subscriber.send(&ack(*answer, message.id));
            }
            subscriber.expect_end(0x82);
        }
    }
}

/// [MQTT-3.3.2-11]
#[test]
fn mqtt_3_1_2_26_and_27_a_topic_is_sent_by_alias_to_who_takes_that() {
    let server = server();
    let mut publisher = server.client(V5, "alias-pub");
    for (max, aliased) in [(1, 1), (2, 2), (0, 0)] {
        let connect = Connect { properties: vec![0x22, 0, max], ..Connect::new(V5, "alias-sub") };
        let (mut subscriber, _) = server.enter(&connect);
        for topic in ["by-alias/1", "by-alias/2"] {
            subscriber.subscribe(topic, 1);
        }
        for round in 0..2 {
            for (n, topic) in (1..).zip(["by-alias/1", "by-alias/2"]) {
                publisher.send(&publish(V5, 0x30, topic, 0, &[], "x"));
                let message = subscriber.message();
                let (name, list) = match (n <= aliased, round) {
                    (false, _) => (topic, vec![]),
                    (true, 0) => (topic, vec![0x23, 0, n]),
                    (true, _) => ("", vec![0x23, 0, n]),
                };
                assert_eq!((&*message.topic, message.properties), (name, list));
            }
        }
    }
}

#[test]
fn mqtt_4_13_2_1_the_reason_arrives_also_at_who_is_still_sending() {
    let mut raw = server().client(V5, "hasty");
    let large = "x".repeat(1000);
    let hasty: Vec<u8> =
        (1..=200).flat_map(|id| publish(V5, 0x34, "hasty", id, &[], &large)).collect();
    raw.send(&hasty);
    let end = loop {
        let packet = raw.packet();
        if packet[0] != 0x50 {
            break packet;
        }
    };
    assert_eq!((end[0], end[2]), (0xE0, 0x93), "{end:x?}");
    raw.send(&hasty);
    raw.expect_closed();
}

#[test]
fn mqtt_3_3_1_2_dup_and_qos_0_do_not_go_together() {
    for version in BOTH {
        let mut raw = server().client(version, "dup-0");
        raw.send(&publish(version, 0x38, "dup-0", 0, &[], ""));
        raw.expect_end(0x81);
    }
}

#[test]
fn mqtt_3_3_1_4_there_is_no_qos_3() {
    for version in BOTH {
        let mut raw = server().client(version, "qos-3");
        raw.send(&publish(version, 0x36, "qos-3", 1, &[], ""));
        raw.expect_end(0x81);
    }
}

#[test]
fn mqtt_3_3_1_5_to_8_the_last_retained_message_is_kept_until_an_empty_one() {
    for version in BOTH {
        let topic = name(version, "retained/one");
        let mut raw = server().client(version, "retainer");
        for payload in ["old", "new"] {
            raw.send(&publish(version, 0x31, &topic, 0, &[], payload));
        }
        // Not retained: it changes nothing.
        raw.send(&publish(version, 0x30, &topic, 0, &[], "other"));
        raw.send(&publish(version, 0x32, &topic, 1, &[], "other"));
        raw.expect_ack(0x40, 1);
        raw.subscribe(&topic, 0);
        let message = raw.message();
        let why = "[MQTT-3.3.1-9], [MQTT-3.3.1-8 of 3.1.1]";
        assert_eq!((message.first, message.text()), (0x31, "new"), "{why}");
        // An empty one goes to who is there, and is kept for nobody.
        raw.send(&publish(version, 0x31, &topic, 0, &[], ""));
        let message = raw.message();
        assert_eq!((message.first, message.text()), (0x30, ""), "[MQTT-3.3.1-9 of 3.1.1]");
        let mut late = server().client(version, "late");
        late.subscribe(&topic, 0);
        late.ping();
    }
}

#[test]
fn mqtt_3_3_1_9_to_11_retain_handling() {
    let mut raw = server().client(V5, "handling");
    raw.send(&publish(V5, 0x31, "handling", 0, &[], "x"));
    raw.subscribe("handling", 0x20);
    raw.ping();
    raw.subscribe("handling", 0x10);
    raw.ping();
    raw.subscribe("handling", 0x00);
    assert_eq!(raw.message().first, 0x31);
    raw.send(&publish(V5, 0x31, "handling", 0, &[], ""));
    raw.message();
}

#[test]
fn mqtt_3_3_1_12_and_13_retain_as_published() {
    let server = server();
    let (mut plain, mut as_published) = (server.client(V5, "rap-0"), server.client(V5, "rap-1"));
    plain.subscribe("rap", 0);
    as_published.subscribe("rap", 0x08);
    let mut publisher = server.client(V5, "rap-pub");
    publisher.send(&publish(V5, 0x31, "rap", 0, &[], ""));
    assert_eq!(plain.message().first, 0x30);
    assert_eq!(as_published.message().first, 0x31);
}

/// [MQTT-4.7.0-1], [MQTT-4.7.3-1]
#[test]
fn mqtt_3_3_2_1_and_2_a_topic_is_there_and_has_no_wildcards() {
    for version in BOTH {
        for (topic, code) in [("", 0x82), ("a/+", 0x90), ("#", 0x90), ("a#", 0x90)] {
            let mut raw = server().client(version, "names");
            raw.send(&publish(version, 0x30, topic, 0, &[], ""));
            raw.expect_end(code);
        }
    }
}

#[test]
fn mqtt_3_3_2_4_and_15_to_18_and_20_what_a_publisher_says_reaches_the_subscriber_unchanged() {
    let (mut publisher, mut subscriber) = pair(V5, "said");
    let said = [
        &[0x01, 1][..],
        &[&[0x03][..], &field("text/plain")].concat(),
        &[&[0x08][..], &field("answers/here")].concat(),
        &[&[0x09][..], &field(b"\x00\xFF")].concat(),
        &[&[0x26][..], &field("b"), &field("1")].concat(),
        &[&[0x26][..], &field("a"), &field("2")].concat(),
        &[&[0x26][..], &field("b"), &field("3")].concat(),
    ]
    .concat();
    publisher.send(&publish(V5, 0x30, "said", 0, &said, "payload"));
    let message = subscriber.message();
    for property in [
        &[0x01, 1][..],
        &[&[0x03][..], &field("text/plain")].concat(),
        &[&[0x08][..], &field("answers/here")].concat(),
        &[&[0x09][..], &field(b"\x00\xFF")].concat(),
    ] {
        assert!(message.properties.windows(property.len()).any(|w| w == property));
    }
    let users = &said[said.len() - 24 + 3..];
    assert!(message.properties.ends_with(users), "in their order: {:x?}", message.properties);
    assert_eq!(message.text(), "payload");
}

#[test]
fn mqtt_3_3_2_6_an_expiry_is_passed_on_less_what_it_waited() {
    let (mut publisher, mut subscriber) = pair(V5, "expiry");
    publisher.send(&publish(V5, 0x30, "expiry", 0, &[0x02, 0, 0, 0, 100], "x"));
    let properties = subscriber.message().properties;
    assert_eq!(properties[..4], [0x02, 0, 0, 0]);
    assert!(properties[4] <= 100, "{properties:x?}");
}

#[test]
fn mqtt_3_3_2_7_to_9_and_12_topic_aliases() {
    let (mut publisher, mut subscriber) = pair(V5, "alias");
    publisher.send(&publish(V5, 0x30, "alias", 0, &[0x23, 0, 1], "whole"));
    publisher.send(&publish(V5, 0x30, "", 0, &[0x23, 0, 1], "short"));
    for text in ["whole", "short"] {
        let message = subscriber.message();
        assert_eq!((message.topic.as_str(), message.text()), ("alias", text));
    }
    for alias in 1..=10 {
        publisher.send(&publish(V5, 0x30, "alias", 0, &[0x23, 0, alias], "whole"));
        publisher.send(&publish(V5, 0x30, "", 0, &[0x23, 0, alias], "short"));
        assert_eq!([subscriber.message().topic, subscriber.message().topic], ["alias"; 2]);
    }
    // More than the server takes [MQTT-3.2.2-17], none, one that was never said.
    for (alias, topic, code) in
        [(11_u16, "alias", 0x94), (17, "", 0x94), (0, "alias", 0x81), (2, "", 0x82)]
    {
        let mut raw = server().client(V5, "alias-bad");
        let [high, low] = alias.to_be_bytes();
        raw.send(&publish(V5, 0x30, topic, 0, &[0x23, high, low], ""));
        raw.expect_end(code);
    }
    // An alias lives as long as its connection.
    let mut raw = server().client(V5, "alias-pub");
    raw.send(&publish(V5, 0x30, "", 0, &[0x23, 0, 1], ""));
    raw.expect_end(0x82);
}

#[test]
fn mqtt_3_3_2_14_a_response_topic_has_no_wildcards() {
    let mut raw = server().client(V5, "response");
    raw.send(&publish(V5, 0x30, "t", 0, &[&[0x08][..], &field("a/#")].concat(), ""));
    raw.expect_end(0x90);
}

#[test]
fn mqtt_3_3_4_7_receive_maximum_counts_until_pubcomp() {
    let mut raw = server().client(V5, "receive-max");
    for id in 1..=20 {
        raw.send(&publish(V5, 0x34, "receive-max", id, &[], ""));
        raw.expect_ack(0x50, id);
    }
    raw.send(&publish(V5, 0x32, "receive-max", 21, &[], ""));
    raw.expect_end(0x93);
    let mut raw = server().client(V5, "receive-max");
    for id in 1..=40 {
        raw.send(&publish(V5, 0x34, "receive-max", id, &[], ""));
        raw.expect_ack(0x50, id);
        raw.send(&ack(0x62, id));
        raw.expect_ack(0x70, id);
    }
}

#[test]
fn mqtt_3_3_4_9_no_more_is_sent_than_the_client_takes() {
    let server = server();
    let connect = Connect { properties: vec![0x21, 0, 2], ..Connect::new(V5, "narrow") };
    let (mut raw, _) = server.enter(&connect);
    raw.subscribe("narrow", 1);
    let mut publisher = server.client(V5, "narrow-pub");
    for id in 1..=4 {
        publisher.send(&publish(V5, 0x32, "narrow", id, &[], ""));
        publisher.expect_ack(0x40, id);
    }
    // Two are under way, and no more [MQTT-4.9.0-1], [MQTT-4.9.0-2]; all else goes on
    // [MQTT-3.3.4-10], [MQTT-4.9.0-3].
    let ids = [raw.message().id, raw.message().id];
    raw.ping();
    raw.subscribe("narrow/other", 0);
    raw.send(&publish(V5, 0x32, "narrow/none", 9, &[], ""));
    raw.expect_ack(0x40, 9);
    for id in ids {
        raw.send(&ack(0x40, id));
        raw.message();
    }
}

/// Each is answered as its QoS wants it [MQTT-3.3.4-1]: [MQTT-4.3.2-4], [MQTT-4.3.3-8]; and sent on as
/// its QoS wants it: [MQTT-2.2.1-2], [MQTT-4.3.1-1], [MQTT-4.3.3-4].
#[test]
fn mqtt_4_3_every_qos_reaches_the_subscriber_with_it() {
    for version in BOTH {
        let topic = name(version, "qos");
        let (mut publisher, mut subscriber) = pair(version, &topic);
        publisher.send(&publish(version, 0x30, &topic, 0, &[], "0"));
        publisher.send(&publish(version, 0x32, &topic, 7, &[], "1"));
        publisher.expect_ack(0x40, 7);
        publisher.send(&publish(version, 0x34, &topic, 8, &[], "2"));
        publisher.expect_ack(0x50, 8);
        publisher.send(&ack(0x62, 8));
        publisher.expect_ack(0x70, 8);
        let messages = [subscriber.message(), subscriber.message(), subscriber.message()];
        for (qos, message) in (0..).zip(&messages) {
            assert_eq!((message.first, message.text()), (0x30 | qos << 1, &*qos.to_string()));
        }
        assert_ne!(messages[1].id, messages[2].id);
        subscriber.send(&ack(0x40, messages[1].id));
        subscriber.send(&ack(0x50, messages[2].id));
        subscriber.expect_ack(0x62, messages[2].id);
        subscriber.send(&ack(0x70, messages[2].id));
        subscriber.ping();
    }
}

/// A message from a sender whose exchange has ended is a new one, marked or not.
#[test]
fn mqtt_4_3_2_5_after_its_puback_a_packet_id_stands_for_another_message() {
    for version in BOTH {
        let topic = name(version, "new-again");
        let (mut publisher, mut subscriber) = pair(version, &topic);
        for (first, text) in [(0x32, "1"), (0x32, "2"), (0x3A, "3")] {
            publisher.send(&publish(version, first, &topic, 5, &[], text));
            publisher.expect_ack(0x40, 5);
            assert_eq!(subscriber.message().text(), text);
        }
    }
}

#[test]
fn mqtt_4_3_3_9_after_a_refusing_pubrec_a_packet_id_stands_for_another_message() {
    let (mut publisher, mut subscriber) = pair(V5, "not-refused");
    publisher.send(&publish(V5, 0x34, "$SYS/refused", 5, &[], "x"));
    publisher.expect_refusal(0x50, 5, 0x90);
    publisher.send(&publish(V5, 0x34, "not-refused", 5, &[], "taken"));
    publisher.expect_ack(0x50, 5);
    assert_eq!(subscriber.message().text(), "taken");
}

#[test]
fn mqtt_2_2_1_4_a_message_gets_an_id_that_is_not_in_use() {
    for version in BOTH {
        let topic = name(version, "unused");
        let (mut publisher, mut subscriber) = pair(version, &topic);
        let mut used = std::collections::BTreeSet::from([0]);
        for n in 1..=30 {
            let first = if n % 2 == 0 { 0x32 } else { 0x34 };
            // So the publisher's ids and those of the server are not the same.
            let id = 1000 + n;
            publisher.send(&publish(version, first, &topic, id, &[], ""));
            publisher.expect_ack(if n % 2 == 0 { 0x40 } else { 0x50 }, id);
            if first == 0x34 {
                publisher.send(&ack(0x62, id));
                publisher.expect_ack(0x70, id);
            }
            let message = subscriber.message();
            // Not marked as sent again [MQTT-4.3.2-2], [MQTT-4.3.3-2].
            assert_eq!(message.first, first);
            assert!(used.insert(message.id), "[MQTT-4.3.2-1], [MQTT-4.3.3-1]: {}", message.id);
        }
    }
}

/// The receipt is the session's for as long as the connection is there [MQTT-4.1.0-1].
#[test]
fn mqtt_4_3_3_10_to_12_a_repeated_qos_2_publish_is_not_passed_on_again() {
    for version in BOTH {
        let topic = name(version, "once");
        let (mut publisher, mut subscriber) = pair(version, &topic);
        for first in [0x34, 0x3C, 0x3C] {
            publisher.send(&publish(version, first, &topic, 5, &[], "once"));
            publisher.expect_ack(0x50, 5);
        }
        for _ in 0..2 {
            publisher.send(&ack(0x62, 5));
            let pubcomp = publisher.packet();
            assert_eq!((pubcomp[0], &pubcomp[2..4]), (0x70, &[0, 5][..]));
        }
        publisher.send(&publish(version, 0x34, &topic, 5, &[], "again"));
        publisher.expect_ack(0x50, 5);
        assert_eq!(subscriber.message().text(), "once");
        assert_eq!(subscriber.message().text(), "again");
    }
}

#[test]
fn mqtt_3_6_2_1_an_unknown_pubrec_gets_a_pubrel_unless_it_says_that_it_failed() {
    for version in BOTH {
        let mut raw = server().client(version, "unknown-pubrec");
        raw.send(&ack(0x50, 77));
        let expected: &[u8] = if version.is_v5() { &[0, 77, 0x92] } else { &[0, 77] };
        raw.expect(&packet(0x62, expected));
        if version.is_v5() {
            raw.send(&[0x50, 3, 0, 77, 0x80]);
            raw.ping();
        }
    }
}

/// [MQTT-3.7.2-1]
#[test]
fn mqtt_4_3_3_an_unknown_pubrel_gets_a_pubcomp() {
    for version in BOTH {
        let mut raw = server().client(version, "unknown-pubrel");
        raw.send(&ack(0x62, 77));
        let expected: &[u8] = if version.is_v5() { &[0, 77, 0x92] } else { &[0, 77] };
        raw.expect(&packet(0x70, expected));
    }
}

#[test]
fn mqtt_4_3_2_an_unknown_ack_changes_nothing() {
    for version in BOTH {
        let mut raw = server().client(version, "unknown-ack");
        raw.send(&[ack(0x40, 9), ack(0x70, 9)].concat());
        raw.ping();
    }
}

#[test]
fn mqtt_4_6_0_2_and_3_acks_come_in_the_order_of_the_publishes() {
    for version in BOTH {
        let mut raw = server().client(version, "ordered");
        let publishes: Vec<u8> = (1..=18)
            .flat_map(|id| {
                let first = if id % 2 == 0 { 0x32 } else { 0x34 };
                publish(version, first, &format!("ordered/{id}"), id, &[], "")
            })
            .collect();
        raw.send(&publishes);
        for id in 1..=18 {
            raw.expect_ack(if id % 2 == 0 { 0x40 } else { 0x50 }, id);
        }
        let releases: Vec<u8> = (1..=9).flat_map(|n| ack(0x62, 2 * n - 1)).collect();
        raw.send(&releases);
        for n in 1..=9 {
            raw.expect_ack(0x70, 2 * n - 1);
        }
    }
}

#[test]
fn mqtt_4_6_0_4_pubrels_come_in_the_order_of_the_pubrecs() {
    for version in BOTH {
        let topic = name(version, "released");
        let (mut publisher, mut subscriber) = pair(version, &topic);
        for id in 1..=9 {
            publisher.send(&publish(version, 0x34, &topic, id, &[], ""));
            publisher.expect_ack(0x50, id);
        }
        let mut ids: Vec<u16> = (1..=9).map(|_| subscriber.message().id).collect();
        // Not that of the messages.
        ids.rotate_left(4);
        subscriber.send(&ids.iter().flat_map(|id| ack(0x50, *id)).collect::<Vec<u8>>());
        for id in ids {
            subscriber.expect_ack(0x62, id);
        }
    }
}

/// What comes out is the stream of bytes that went in [MQTT-4.2-1].
#[test]
fn mqtt_4_6_0_5_and_6_messages_of_a_topic_keep_their_order() {
    for version in BOTH {
        let topic = name(version, "in-order");
        let (mut publisher, mut subscriber) = pair(version, &topic);
        for n in 0..100 {
            publisher.send(&publish(version, 0x30, &topic, 0, &[], &n.to_string()));
        }
        for n in 0..100 {
            assert_eq!(subscriber.message().text(), n.to_string());
        }
    }
}

#[test]
fn mqtt_4_7_3_3_a_topic_has_up_to_65_535_bytes() {
    for version in BOTH {
        let topic = format!("{}/{}", name(version, "long"), "x".repeat(65_535));
        let topic = &topic[..65_535];
        let (mut publisher, mut subscriber) =
            (server().client(version, "long-pub"), server().client(version, "long-sub"));
        subscriber.subscribe(topic, 0);
        publisher.send(&publish(version, 0x32, topic, 1, &[], "whole"));
        publisher.expect_ack(0x40, 1);
        let message = subscriber.message();
        assert_eq!((&*message.topic, message.text()), (topic, "whole"));
    }
}

/// In 3.1.1, which cannot say so, it is closed [MQTT-3.3.5-2 of 3.1.1].
#[test]
fn mqtt_4_7_2_a_client_cannot_publish_to_the_servers_topics() {
    let mut raw = server().client(V5, "sys");
    raw.send(&publish(V5, 0x32, "$SYS/broker/uptime", 1, &[], ""));
    raw.expect_refusal(0x40, 1, 0x90);
    let mut raw = server().client(V311, "sys");
    raw.send(&publish(V311, 0x32, "$SYS/broker/uptime", 1, &[], ""));
    raw.expect_closed();
}
