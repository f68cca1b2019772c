//! Wills: sections 3.1.2.5, 3.1.3.2, 3.14.4.

use crate::harness::wire::{BOTH, Connect, V5, field};
use crate::server::{name, server};

/// So it was stored [MQTT-3.1.2-7].
#[test]
fn mqtt_3_1_2_8_a_will_is_published_when_the_connection_is_lost() {
    for version in BOTH {
        let server = server();
        let topic = name(version, "will/lost");
        let mut watcher = server.client(version, "will-watcher");
        watcher.subscribe(&topic, 2);
        for (flags, qos) in [(0x00, 0), (0x08, 1), (0x10, 2)] {
            let connect = Connect::new(version, name(version, "lost"));
            server.enter(&connect.will(flags, &[], &topic, "gone")).0.cut();
            let message = watcher.message();
            assert_eq!((message.qos(), message.text()), (qos, "gone"));
        }
    }
}

#[test]
fn mqtt_3_1_2_12_of_3_1_1_who_has_no_will_leaves_none() {
    for version in BOTH {
        let server = server();
        let topic = name(version, "will/none");
        let mut watcher = server.client(version, "none-watcher");
        watcher.subscribe(&topic, 0);
        let connect = Connect::kept(version, name(version, "none"));
        server.enter(&connect.clone().will(0, &[], &topic, "first")).0.cut();
        assert_eq!(watcher.message().text(), "first");
        // Its session goes on, without the will of the connection before.
        server.enter(&connect).0.cut();
        server.enter(&connect.will(0, &[], &topic, "second")).0.cut();
        assert_eq!(watcher.message().text(), "second");
        watcher.ping();
    }
}

#[test]
fn mqtt_3_1_2_10_and_3_14_4_3_a_disconnect_cancels_the_will() {
    for version in BOTH {
        let server = server();
        let topic = name(version, "will/bye");
        let mut watcher = server.client(version, "bye-watcher");
        watcher.subscribe(&topic, 0);
        let connect = Connect::new(version, name(version, "bye-will")).will(0, &[], &topic, "gone");
        let (mut raw, _) = server.enter(&connect);
        raw.send(&[0xE0, 0]);
        raw.expect_closed();
        // Its connection has ended: what there is to come has come before this one's.
        server.enter(&Connect { rest: connect.rest.clone(), ..connect }).0.cut();
        assert_eq!(watcher.message().text(), "gone");
        watcher.ping();
    }
}

#[test]
fn mqtt_5_a_disconnect_with_will() {
    let server = server();
    let mut watcher = server.client(V5, "with-will-watcher");
    watcher.subscribe("will/asked", 0);
    let connect = Connect::new(V5, "with-will").will(0, &[], "will/asked", "gone");
    let (mut raw, _) = server.enter(&connect);
    raw.send(&[0xE0, 1, 4]);
    assert_eq!(watcher.message().text(), "gone");
}

#[test]
fn mqtt_3_1_2_14_and_15_a_will_may_be_retained() {
    for version in BOTH {
        let server = server();
        let topic = name(version, "will/retained");
        let connect = Connect::new(version, name(version, "retained-will"));
        let mut watcher = server.client(version, "retained-watcher");
        watcher.subscribe(&topic, 0);
        // One that is not retained leaves what is there, and one that is replaces it.
        for (flags, retained) in [(0x00, None), (0x20, Some("2")), (0x00, Some("2"))] {
            let text = if flags == 0 { "1" } else { "2" };
            server.enter(&connect.clone().will(flags, &[], &topic, text)).0.cut();
            let message = watcher.message();
            assert_eq!((message.first, message.text()), (0x30, text));
            let mut late = server.client(version, "retained-late");
            late.subscribe(&topic, 0);
            if let Some(text) = retained {
                let message = late.message();
                assert_eq!((message.first, message.text()), (0x31, text));
            }
            late.ping();
        }
    }
}

#[test]
fn mqtt_3_1_3_10_what_a_will_says_reaches_the_subscriber() {
    let server = server();
    let mut watcher = server.client(V5, "said-watcher");
    watcher.subscribe("will/said", 0);
    let user = |name, value| [&[0x26][..], &field(name), &field(value)].concat();
    let users = [user("b", "1"), user("a", "2"), user("b", "3")].concat();
    let said = [&[0x03][..], &field("a/b"), &users].concat();
    let list = [&[0x18, 0, 0, 0, 0][..], &said].concat();
    server.enter(&Connect::new(V5, "said-will").will(0, &list, "will/said", "x")).0.cut();
    assert_eq!(watcher.message().properties, said);
}

#[test]
fn mqtt_3_1_3_9_a_client_that_is_back_in_time_has_no_will() {
    let server = server();
    let mut watcher = server.client(V5, "delay-watcher");
    watcher.subscribe("will/delay", 0);
    let connect = Connect::kept(V5, "delayed").will(0, &[0x18, 0, 0, 0, 1], "will/delay", "gone");
    server.enter(&connect).0.cut();
    let (raw, _) = server.enter(&connect);
    // Its session goes on, and with it no will; a second end has its own delay, and its will.
    raw.cut();
    assert_eq!(watcher.message().text(), "gone");
    watcher.ping();
}

#[test]
fn mqtt_5_a_will_is_due_when_its_session_ends() {
    let server = server();
    let mut watcher = server.client(V5, "ends-watcher");
    watcher.subscribe("will/ends", 0);
    // An hour of delay, and no session: due at once.
    let list = [0x18, 0, 0, 0x0E, 0x10];
    server.enter(&Connect::new(V5, "ends").will(0, &list, "will/ends", "no session")).0.cut();
    assert_eq!(watcher.message().text(), "no session");
    // A session that a clean start ends.
    let connect = Connect::kept(V5, "ends").will(0, &list, "will/ends", "clean start");
    server.enter(&connect).0.cut();
    server.client(V5, "ends-other");
    server.enter(&Connect::new(V5, "ends"));
    assert_eq!(watcher.message().text(), "clean start");
}

#[test]
fn mqtt_3_1_4_3_a_take_over_publishes_the_will() {
    for version in BOTH {
        let server = server();
        let topic = name(version, "will/taken");
        let mut watcher = server.client(version, "taken-watcher");
        watcher.subscribe(&topic, 0);
        let connect = Connect::new(version, name(version, "taken")).will(0, &[], &topic, "taken");
        let (_first, _) = server.enter(&connect);
        server.enter(&connect);
        assert_eq!(watcher.message().text(), "taken");
    }
}
