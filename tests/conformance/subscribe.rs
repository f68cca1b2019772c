//! SUBSCRIBE, UNSUBSCRIBE and who gets what: sections 3.8 to 3.11, 4.7, 4.8.

use crate::harness::wire::{
    BOTH, Connect, Message, V5, V311, Version, ack, packet, properties, publish, subscribe,
    subscribe_with, unsubscribe,
};
use crate::server::{Client, Server, name, server};

#[test]
fn mqtt_3_8_3_2_and_3_10_3_2_a_packet_names_a_filter_at_least() {
    for version in BOTH {
        for first in [0x82, 0xA2] {
            let mut raw = server().client(version, "no-filter");
            raw.send(&packet(first, [&[0, 1][..], &properties(version, &[])].concat()));
            if version.is_v5() {
                let disconnect = raw.packet();
                assert_eq!(disconnect[0], 0xE0);
                assert!([0x81, 0x82].contains(&disconnect[2]), "{disconnect:x?}");
            }
            raw.expect_closed();
        }
    }
}

#[test]
fn mqtt_3_8_3_3_no_local() {
    let server = server();
    let (mut own, mut other) = (server.client(V5, "local"), server.client(V5, "local-other"));
    own.subscribe("local", 0x04);
    other.subscribe("local", 0);
    own.send(&publish(V5, 0x30, "local", 0, &[], "own"));
    assert_eq!(other.message().text(), "own");
    other.send(&publish(V5, 0x30, "local", 0, &[], "other"));
    assert_eq!(own.message().text(), "other");
}

#[test]
fn mqtt_3_8_3_4_no_local_on_a_shared_subscription_is_an_error() {
    let mut raw = server().client(V5, "shared-local");
    raw.send(&subscribe(V5, 1, &[("$share/g/t", 0x04)]));
    raw.expect_end(0x82);
}

#[test]
fn mqtt_3_8_3_5_reserved_bits_are_zero() {
    for (version, options) in [(V311, 0x03), (V311, 0x04), (V5, 0x03), (V5, 0x40), (V5, 0x30)] {
        let mut raw = server().client(version, "reserved");
        raw.send(&subscribe(version, 1, &[("t", options)]));
        if version.is_v5() {
            let disconnect = raw.packet();
            assert_eq!(disconnect[0], 0xE0);
            assert!([0x81, 0x82].contains(&disconnect[2]), "{disconnect:x?}");
        }
        raw.expect_closed();
    }
}

#[test]
fn mqtt_3_8_4_1_and_2_and_6_and_7_a_suback_has_the_id_and_a_code_per_filter_in_order() {
    for version in BOTH {
        // In their order [MQTT-3.9.3-1], and without a property [MQTT-2.2.2-1].
        let mut raw = server().client(version, "suback");
        raw.send(&subscribe(version, 0x1234, &[("a/0", 0), ("a/2", 2), ("a/1", 1)]));
        let list: &[u8] = if version.is_v5() { &[0] } else { &[] };
        raw.expect(&packet(0x90, [&[0x12, 0x34][..], list, &[0, 2, 1]].concat()));
    }
}

#[test]
fn mqtt_3_8_4_3_the_same_filter_again_replaces_the_subscription() {
    for version in BOTH {
        let topic = name(version, "replaced");
        let mut raw = server().client(version, "replacing");
        raw.subscribe(&topic, 0);
        raw.subscribe(&topic, 1);
        raw.send(&publish(version, 0x32, &topic, 1, &[], "x"));
        let (mut acked, mut messages) = (false, Vec::new());
        while !acked || messages.is_empty() {
            let packet = raw.packet();
            match packet[0] & 0xF0 {
                0x40 => acked = true,
                _ => messages.push(packet[0]),
            }
        }
        assert_eq!(messages, [0x32], "one, with the new QoS");
        raw.ping();
    }
}

#[test]
fn mqtt_3_8_4_4_who_subscribes_again_gets_what_is_retained_again_and_loses_nothing() {
    for version in BOTH {
        let (retained, topic) = (name(version, "again/retained"), name(version, "again/live"));
        let mut publisher = server().client(version, "again-pub");
        publisher.send(&publish(version, 0x33, &retained, 100, &[], "retained"));
        publisher.expect_ack(0x40, 100);
        let mut raw = server().client(version, "again");
        let (mut seen, mut due) = (0, 0);
        for id in 1..=20 {
            raw.send(&subscribe(version, id, &[(&retained, 0), (&topic, 0)]));
            if id == 1 {
                // From here on it is subscribed.
                assert_eq!(raw.packet()[0], 0x90);
                assert_eq!(raw.message().text(), "retained");
            } else {
                due += 1;
            }
            publisher.send(&publish(version, 0x32, &topic, id, &[], &id.to_string()));
        }
        let mut subacks = 0;
        while (seen, due, subacks) != (20, 0, 19) {
            let packet = raw.packet();
            if packet[0] == 0x90 {
                subacks += 1;
                continue;
            }
            let message = Message::of(version, &packet);
            if message.topic == retained {
                assert_eq!(message.first, 0x31);
                due -= 1;
            } else {
                seen += 1;
                assert_eq!(message.text(), seen.to_string());
            }
        }
        raw.ping();
    }
}

#[test]
fn mqtt_3_8_4_5_several_filters_are_as_several_packets() {
    for version in BOTH {
        let [a, b] = ["several/a", "several/b"].map(|topic| name(version, topic));
        let mut raw = server().client(version, "several");
        raw.send(&subscribe(version, 1, &[(&a, 0), (&b, 1), (&a, 1)]));
        let suback = raw.packet();
        assert_eq!(suback[suback.len() - 3..], [0, 1, 1]);
        for topic in [&a, &b] {
            raw.send(&publish(version, 0x30, topic, 0, &[], ""));
            assert_eq!(&raw.message().topic, topic);
            raw.ping();
        }
        // The last of those that are the same is what holds.
        let mut publisher = server().client(version, "several-pub");
        publisher.send(&publish(version, 0x32, &a, 1, &[], ""));
        assert_eq!(raw.message().qos(), 1);
    }
}

#[test]
fn mqtt_3_8_4_8_the_qos_is_the_lower_of_both() {
    for version in BOTH {
        let topic = name(version, "lower");
        let mut subscriber = server().client(version, "lower-sub");
        subscriber.subscribe(&topic, 1);
        let mut publisher = server().client(version, "lower-pub");
        for (first, id, qos) in [(0x30, 0, 0), (0x32, 1, 1), (0x34, 2, 1)] {
            publisher.send(&publish(version, first, &topic, id, &[], ""));
            assert_eq!(subscriber.message().qos(), qos);
        }
    }
}

#[test]
fn mqtt_3_3_4_2_of_overlapping_subscriptions_the_highest_qos_is_kept_to() {
    for version in BOTH {
        let root = name(version, "highest");
        let mut raw = server().client(version, "highest");
        for (filter, qos) in [("+", 0), ("#", 2), ("x", 1)] {
            raw.subscribe(&format!("{root}/{filter}"), qos);
        }
        let mut publisher = server().client(version, "highest-pub");
        publisher.send(&publish(version, 0x34, &format!("{root}/x"), 1, &[], ""));
        assert_eq!(raw.message().qos(), 2);
        raw.ping();
    }
}

/// One copy with all identifiers, for sessions that end with their connection and for those that are
/// kept.
#[test]
fn mqtt_3_3_4_3_and_4_overlapping_subscriptions_and_their_identifiers() {
    for version in BOTH {
        let kept = Connect::kept(version, name(version, "overlap-kept"));
        for connect in [Connect::new(version, name(version, "overlap")), kept] {
            let (mut raw, _) = server().enter(&connect);
            let parent = &connect.client_id;
            let (one, all) = (format!("{parent}/+"), format!("{parent}/#"));
            let topic = format!("{parent}/x");
            for (filter, qos, id) in [(&one, 2, &[0x0B, 7][..]), (&all, 1, &[0x0B, 0x80, 0x01])] {
                let id = if version.is_v5() { id } else { &[] };
                raw.send(&subscribe_with(version, 1, id, &[(filter, qos)]));
                assert_eq!(raw.packet().last(), Some(&qos));
            }
            let mut publisher = server().client(version, "overlap-pub");
            publisher.send(&publish(version, 0x34, &topic, 1, &[], "x"));
            let message = raw.message();
            assert_eq!((message.qos(), message.text()), (2, "x"));
            let expected = [[0x0B, 7, 0x0B, 0x80, 0x01], [0x0B, 0x80, 0x01, 0x0B, 7]];
            assert!(
                !version.is_v5() || expected.iter().any(|ids| message.properties == ids),
                "{:x?}",
                message.properties
            );
            raw.send(&ack(0x50, message.id));
            raw.expect_ack(0x62, message.id);
            raw.send(&ack(0x70, message.id));
            // The last subscription that matches counts on after the others have gone.
            raw.send(&unsubscribe(version, 2, &[&one]));
            raw.packet();
            publisher.send(&ack(0x62, 1));
            publisher.send(&publish(version, 0x30, &topic, 0, &[], "y"));
            let message = raw.message();
            assert_eq!((message.qos(), message.text()), (0, "y"));
            assert_eq!(message.properties, if version.is_v5() { &expected[1][..3] } else { &[] });
            raw.ping();
        }
    }
}

#[test]
fn mqtt_3_3_4_5_the_copy_of_a_shared_subscription_has_its_own_identifier() {
    let mut raw = server().client(V5, "both-ways");
    for (id, filter) in [(1, "both-ways"), (2, "$share/g/both-ways")] {
        raw.send(&subscribe_with(V5, 1, &[0x0B, id], &[(filter, 0)]));
        raw.packet();
    }
    raw.send(&publish(V5, 0x30, "both-ways", 0, &[], ""));
    let mut properties = [raw.message().properties, raw.message().properties];
    properties.sort();
    assert_eq!(properties, [[0x0B, 1], [0x0B, 2]]);
    raw.ping();
}

#[test]
fn mqtt_3_8_3_3_no_local_holds_for_the_subscription_that_asks_for_it() {
    let mut raw = server().client(V5, "half-local");
    raw.send(&subscribe_with(V5, 1, &[0x0B, 1], &[("half-local/+", 0x04)]));
    raw.packet();
    raw.send(&subscribe_with(V5, 1, &[0x0B, 2], &[("half-local/#", 0)]));
    raw.packet();
    raw.send(&publish(V5, 0x30, "half-local/x", 0, &[], "own"));
    let message = raw.message();
    assert_eq!((message.text(), &message.properties[..]), ("own", &[0x0B, 2][..]));
    raw.ping();
}

/// Each filter had a row of messages of its own once, and they were read in turns.
#[test]
fn mqtt_4_6_0_6_order_holds_across_overlapping_subscriptions() {
    for version in BOTH {
        let topic = name(version, "ordered");
        let mut raw = server().client(version, "ordered-sub");
        for (filter, qos) in [(format!("{topic}/#"), 1), (topic.clone(), 0)] {
            raw.subscribe(&filter, qos);
        }
        let mut publisher = server().client(version, "ordered-pub");
        let mut burst = Vec::new();
        for number in 0..200 {
            burst.extend(publish(version, 0x30, &topic, 0, &[], &number.to_string()));
        }
        publisher.send(&burst);
        for number in 0..200 {
            assert_eq!(raw.message().text(), number.to_string());
        }
        raw.ping();
    }
}

#[test]
fn mqtt_5_a_subscription_identifier_of_0_is_an_error() {
    let mut raw = server().client(V5, "identifier-0");
    raw.send(&subscribe_with(V5, 1, &[0x0B, 0], &[("t", 0)]));
    let disconnect = raw.packet();
    assert_eq!(disconnect[0], 0xE0);
    assert!([0x81, 0x82].contains(&disconnect[2]), "{disconnect:x?}");
}

#[test]
fn mqtt_3_10_4_1_and_2_and_4_to_6_after_an_unsubscribe_nothing_more_comes() {
    for version in BOTH {
        let topic = name(version, "over");
        let mut raw = server().client(version, "leaving");
        raw.subscribe(&topic, 0);
        // What matches it is not what it is.
        raw.send(&unsubscribe(version, 4, &["+", "#", &topic.to_uppercase()]));
        assert_eq!(raw.packet()[0], 0xB0);
        raw.send(&publish(version, 0x30, &topic, 0, &[], "before"));
        assert_eq!(raw.message().text(), "before");
        // A code for each, in their order [MQTT-3.11.3-1], of those that there are [MQTT-3.11.3-2].
        raw.send(&unsubscribe(version, 5, &[&topic, "never/was"]));
        let codes: &[u8] = if version.is_v5() { &[0, 5, 0, 0, 0x11] } else { &[0, 5] };
        raw.expect(&packet(0xB0, codes));
        raw.send(&publish(version, 0x32, &topic, 1, &[], "x"));
        raw.expect_ack(0x40, 1);
        raw.ping();
    }
}

#[test]
fn mqtt_3_10_4_3_what_is_under_way_at_an_unsubscribe_is_brought_to_its_end() {
    for version in BOTH {
        let topic = name(version, "under-way");
        let connect = Connect::kept(version, name(version, "under-way"));
        let (mut raw, _) = server().enter(&connect);
        raw.subscribe(&topic, 2);
        let mut publisher = server().client(version, "under-way-pub");
        for (first, id) in [(0x32, 1), (0x34, 2), (0x34, 3)] {
            publisher.send(&publish(version, first, &topic, id, &[], &id.to_string()));
        }
        let sent = [raw.message(), raw.message(), raw.message()];
        raw.send(&unsubscribe(version, 5, &[&topic]));
        assert_eq!(raw.packet()[0], 0xB0);
        // Here, or over the next connection.
        raw.send(&ack(0x50, sent[1].id));
        raw.expect_ack(0x62, sent[1].id);
        raw.send(&ack(0x70, sent[1].id));
        raw.ping();
        raw.cut();
        let (mut raw, _) = server().enter(&connect);
        for before in [&sent[0], &sent[2]] {
            let again = raw.message();
            assert_eq!((again.id, again.text()), (before.id, before.text()));
        }
        raw.send(&[ack(0x40, sent[0].id), ack(0x50, sent[2].id)].concat());
        raw.expect_ack(0x62, sent[2].id);
    }
}

#[test]
fn mqtt_4_7_3_1_a_filter_has_a_character_at_least() {
    for version in BOTH {
        for bytes in [subscribe(version, 1, &[("", 0)]), unsubscribe(version, 1, &["a", ""])] {
            let mut raw = server().client(version, "no-character");
            raw.send(&bytes);
            raw.expect_end_of(&[0x81, 0x82]);
        }
    }
}

#[test]
fn mqtt_4_7_1_1_and_2_wildcards_stand_where_they_may() {
    for version in BOTH {
        for filter in ["a#", "a/#/b", "#/a", "a+", "+a/b", "a/b+"] {
            let mut raw = server().client(version, "wild");
            raw.send(&subscribe(version, 1, &[(filter, 0)]));
            raw.expect_end(0x8F);
        }
        let mut raw = server().client(version, "wild");
        let filters = ["wild/+/x/#", "+/+", "/+", "#"];
        for filter in filters {
            raw.send(&subscribe(version, 1, &[(filter, 0)]));
            // Other tests' messages match these, too.
            while raw.packet()[0] & 0xF0 == 0x30 {}
        }
    }
}

/// A topic that arrives matches its subscription's filter [MQTT-3.3.2-3].
#[test]
fn mqtt_4_7_1_what_wildcards_match() {
    for version in BOTH {
        let root = name(version, "sport");
        for (filter, topic, matches) in [
            ("tennis/#", "tennis", true),
            ("tennis/#", "tennis/p1/rank", true),
            ("tennis/+", "tennis", false),
            ("tennis/+", "tennis/", true),
            ("tennis/+", "tennis/p1/rank", false),
            ("+/rank", "p1/rank", true),
            ("Tennis", "tennis", false),
            ("tennis", "tennis/", false),
        ] {
            let mut raw = server().client(version, "sport");
            raw.subscribe(&format!("{root}/{filter}"), 0);
            raw.subscribe(&format!("{root}/end"), 0);
            raw.send(&publish(version, 0x30, &format!("{root}/{topic}"), 0, &[], "x"));
            raw.send(&publish(version, 0x30, &format!("{root}/end"), 0, &[], "end"));
            // Order holds within a topic, not from one to another.
            let mut got = vec![raw.message()];
            if matches {
                got.push(raw.message());
            }
            raw.ping();
            assert_eq!(got.iter().any(|m| m.text() == "x"), matches, "{filter} {topic}");
        }
    }
}

#[test]
fn mqtt_4_7_2_1_a_leading_wildcard_does_not_match_a_dollar_topic() {
    for version in BOTH {
        let topic = format!("${}/x", name(version, "dollar"));
        let mut raw = server().client(version, "dollar");
        raw.subscribe("+/x", 0);
        raw.send(&publish(version, 0x32, &topic, 1, &[], ""));
        raw.expect_ack(0x40, 1);
        raw.ping();
        raw.subscribe(&topic, 0);
        raw.send(&publish(version, 0x30, &topic, 0, &[], ""));
        assert_eq!(raw.message().topic, topic);
    }
}

#[test]
fn mqtt_4_7_3_4_topics_are_compared_as_they_are() {
    for version in BOTH {
        let mut raw = server().client(version, "as-is");
        // A space, a trailing slash, a decomposed umlaut: each its own topic.
        let topics = ["as is", "as is/", "a\u{308}s", "äs", "/as"].map(|t| name(version, t));
        for topic in &topics {
            raw.subscribe(topic, 0);
        }
        for topic in &topics {
            raw.send(&publish(version, 0x30, topic, 0, &[], ""));
            assert_eq!(&raw.message().topic, topic);
        }
        raw.ping();
    }
}

#[test]
fn mqtt_4_8_2_1_and_2_a_share_has_a_name_and_a_filter() {
    for version in BOTH {
        for filter in ["$share/g", "$share/g/", "$share//t"] {
            let mut raw = server().client(version, "bad-share");
            raw.send(&subscribe(version, 1, &[(filter, 0)]));
            if version.is_v5() {
                raw.expect_end(0x82);
            } else {
                raw.expect(&[0x90, 3, 0, 1, 0x80]);
            }
        }
    }
    // Its name is one level without wildcards.
    for filter in ["$share/+/t", "$share/g+/t", "$share/#/t"] {
        let mut raw = server().client(V5, "bad-share");
        raw.send(&subscribe(V5, 1, &[(filter, 0)]));
        raw.expect_end_of(&[0x82, 0x8F]);
    }
}

#[test]
fn mqtt_3_8_4_7_and_3_9_3_2_a_subscription_may_be_refused() {
    let rules =
        "[[acl]]\npublish = [\"#\"]\nsubscribe = [\"#\"]\ndeny_subscribe = [\"kept/+/back\"]";
    let server = Server::start(rules);
    for version in BOTH {
        let mut raw = server.client(version, "refused");
        let [back, open, wide] = ["back", "open", "+"].map(|end| format!("kept/{version:?}/{end}"));
        raw.send(&subscribe(version, 1, &[(&back, 2), (&wide, 0)]));
        let suback = raw.packet();
        let denied = if version.is_v5() { 0x87 } else { 0x80 };
        assert_eq!(suback[suback.len() - 2..], [denied, 0]);
        // Nor does it come with a wider one: live, or retained.
        raw.send(&publish(version, 0x31, &back, 0, &[], "secret"));
        raw.send(&publish(version, 0x31, &open, 0, &[], "open"));
        assert_eq!(raw.message().topic, open);
        raw.subscribe(&wide, 0);
        assert_eq!(raw.message().topic, open);
        raw.ping();
    }
}

#[test]
fn mqtt_4_8_2_each_message_of_a_share_goes_to_one_member() {
    for version in BOTH {
        let topic = name(version, "shared");
        let mut members =
            ["m1", "m2"].map(|member| server().client(version, &format!("shared-{member}")));
        for member in &mut members {
            member.subscribe(&format!("$share/g/{topic}"), 1);
        }
        let mut outside = server().client(version, "shared-outside");
        outside.subscribe(&topic, 0);
        for n in 1..=4 {
            outside.send(&publish(version, 0x32, &topic, n, &[], &n.to_string()));
        }
        let mut got = Vec::new();
        for member in &mut members {
            for _ in 0..2 {
                let message = member.message();
                member.send(&ack(0x40, message.id));
                got.push(message.text().to_owned());
            }
            member.ping();
        }
        got.sort();
        assert_eq!(got, ["1", "2", "3", "4"]);
    }
}

#[test]
fn mqtt_4_8_2_3_a_member_of_a_share_gets_the_qos_that_it_was_granted() {
    for qos in [0, 1, 2] {
        let (topic, client) = (format!("shared/qos-{qos}"), format!("shared-qos-{qos}"));
        let mut member = server().client(V5, &client);
        member.subscribe(&format!("$share/g/{topic}"), qos);
        let mut publisher = server().client(V5, "shared-qos-pub");
        publisher.send(&publish(V5, 0x34, &topic, 1, &[], ""));
        assert_eq!(member.message().qos(), qos);
    }
}

/// Two members of a share whose sessions are kept; each has one of two messages of QoS 2.
fn members(version: Version, group: &str) -> ([Connect; 2], [(Client, Message); 2]) {
    let connects = ["1", "2"].map(|member| Connect::kept(version, format!("{group}-{member}")));
    let mut members = connects.each_ref().map(|connect| server().enter(connect).0);
    for member in &mut members {
        member.subscribe(&format!("$share/{group}/{group}"), 2);
    }
    let mut publisher = server().client(version, &format!("{group}-pub"));
    for id in 1..=2 {
        publisher.send(&publish(version, 0x34, group, id, &[], &id.to_string()));
        publisher.expect_ack(0x50, id);
    }
    let members = members.map(|mut member| {
        let message = member.message();
        (member, message)
    });
    (connects, members)
}

#[test]
fn mqtt_4_8_2_4_and_5_a_message_of_a_share_waits_for_its_member_and_goes_to_no_other() {
    let (connects, [(first, message), (mut second, _)]) = members(V5, "waits");
    first.cut();
    second.ping();
    // It is back, and gets it to its end.
    let (mut first, _) = server().enter(&connects[0]);
    let again = first.message();
    assert_eq!((again.first, again.id, again.text()), (0x3C, message.id, message.text()));
    // Its session ends before that.
    first.cut();
    server().enter(&Connect::new(V5, connects[0].client_id.clone())).0.cut();
    second.ping();
    // Nor does the other get it later.
    second.cut();
    let (mut second, _) = server().enter(&connects[1]);
    assert_eq!(second.message().first, 0x3C);
    second.ping();
}

#[test]
fn mqtt_4_8_2_6_a_message_of_a_share_that_its_member_refuses_goes_to_no_other() {
    let (connects, [(mut first, message), (mut second, _)]) = members(V5, "refusing-member");
    first.send(&packet(0x50, [&message.id.to_be_bytes()[..], &[0x83]].concat()));
    first.ping();
    second.ping();
    first.cut();
    server().enter(&connects[0]).0.ping();
    second.ping();
}
