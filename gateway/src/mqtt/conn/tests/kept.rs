//! What outlives a connection, over real sockets and a real store that is closed and opened again.

use super::*;

fn kept(version: Version, client_id: &'static str) -> ConnectPacket {
    let properties = if version == V5 { vec![0x11, 0, 0, 0x0E, 0x10] } else { Vec::new() };
    ConnectPacket { flags: 0, properties, client_id, ..ConnectPacket::new(version) }
}

fn named(version: Version, client_id: &'static str) -> ConnectPacket {
    ConnectPacket { client_id, ..ConnectPacket::new(version) }
}

fn qos2(version: Version, id: u16, payload: &str) -> Vec<u8> {
    wire::publish_with(version, 0x34, "t", Some(id), &[], payload)
}

fn ack(first: u8, id: u16) -> Vec<u8> {
    packet(first, id.to_be_bytes())
}

fn retained(version: Version, topic: &str, payload: &str) -> Vec<u8> {
    wire::publish_with(version, 0x31, topic, None, &[], payload)
}

/// First byte, topic, packet id and payload of a PUBLISH without properties.
fn message(version: Version, packet: &[u8]) -> (u8, String, u16, Vec<u8>) {
    let (first, topic, rest) = event_of(packet);
    let (id, rest) = if first & 6 == 0 {
        (0, &rest[..])
    } else {
        (u16::from_be_bytes([rest[0], rest[1]]), &rest[2..])
    };
    let rest = &rest[usize::from(version == V5)..];
    (first, topic, id, rest.to_vec())
}

impl Rig {
    /// Connects, and gives whether there was a session.
    async fn enter(&self, connect: &ConnectPacket) -> (Socket, bool) {
        let mut socket = self.socket().await;
        socket.send(&connect.bytes()).await;
        let connack = socket.packet().await;
        assert_eq!((connack[0], connack[3]), (0x20, 0), "{connack:x?}");
        (socket, connack[2] == 1)
    }
}

impl Socket {
    async fn subscribe(&mut self, version: Version, filter: &str, options: u8) {
        self.send(&wire::subscribe(version, 9, &[(filter, options)])).await;
        let suback = self.packet().await;
        assert_eq!((suback[0], *suback.last().unwrap()), (0x90, options & 3), "{suback:x?}");
    }
}

#[tokio::test]
async fn a_qos_2_publish_is_one_event_over_reconnects_and_restarts() {
    for version in BOTH {
        let rig = Rig::new().await;
        let connect = kept(version, "dev");
        let (mut client, present) = rig.enter(&connect).await;
        assert!(!present);
        client.send(&qos2(version, 7, "once")).await;
        client.expect(&ack(0x50, 7)).await;
        drop(client);
        let (mut client, present) = rig.enter(&connect).await;
        assert!(present, "[MQTT-3.2.2-2]");
        client.send(&qos2(version, 7, "once")).await;
        client.expect(&ack(0x50, 7)).await;
        drop(client);

        let rig = rig.restarted().await;
        let (mut client, present) = rig.enter(&connect).await;
        assert!(present);
        client.send(&qos2(version, 7, "once")).await;
        client.expect(&ack(0x50, 7)).await;
        client.send(&ack(0x62, 7)).await;
        client.expect(&ack(0x70, 7)).await;
        drop(client);

        let rig = rig.restarted().await;
        let (mut client, _) = rig.enter(&connect).await;
        // PUBCOMP was durable: the id is free, and this is another message.
        client.send(&qos2(version, 7, "twice")).await;
        client.expect(&ack(0x50, 7)).await;
        let payloads: Vec<_> = rig.stored().await.into_iter().map(|(_, p)| p).collect();
        assert_eq!(payloads, [b"once".to_vec(), b"twice".to_vec()]);
    }
}

#[tokio::test]
async fn a_clean_start_ends_what_was_kept_mqtt_3_1_2_4() {
    for version in BOTH {
        let rig = Rig::new().await;
        let (mut client, _) = rig.enter(&kept(version, "dev")).await;
        client.subscribe(version, "t", 1).await;
        client.send(&qos2(version, 7, "one")).await;
        client.expect(&ack(0x50, 7)).await;
        client.expect_message(version, 1, "t", b"one").await;
        drop(client);
        let (client, present) = rig.enter(&named(version, "dev")).await;
        assert!(!present);
        drop(client);
        let (mut client, present) = rig.enter(&kept(version, "dev")).await;
        assert!(!present);
        client.send(&qos2(version, 7, "two")).await;
        client.expect(&ack(0x50, 7)).await;
        client.ping().await;
        assert_eq!(rig.stored().await.len(), 2, "not subscribed, and a message of its own");
    }
}

impl Socket {
    async fn expect_message(
        &mut self,
        version: Version,
        qos: u8,
        topic: &str,
        payload: &[u8],
    ) -> u16 {
        let packet = self.packet().await;
        let (first, to, id, body) = message(version, &packet);
        assert_eq!(((first >> 1) & 3, &*to, &*body), (qos, topic, payload), "{packet:x?}");
        id
    }
}

#[tokio::test]
async fn a_sleeping_client_gets_its_messages_when_it_is_back_also_after_a_restart() {
    for version in BOTH {
        let rig = Rig::new().await;
        let (mut client, _) = rig.enter(&kept(version, "dev")).await;
        client.subscribe(version, "cmd/+", 2).await;
        client.send(&[0xE0, 0]).await;
        client.expect_closed().await;
        let (mut upstream, _) = rig.enter(&named(version, "up")).await;
        for (id, first) in [(1, 0x32), (2, 0x34)] {
            let payload = id.to_string();
            upstream
                .send(&wire::publish_with(version, first, "cmd/x", Some(id), &[], &payload))
                .await;
            assert_eq!(upstream.packet().await[0] & 0xE0, 0x40);
        }

        let rig = rig.restarted().await;
        let (mut client, present) = rig.enter(&kept(version, "dev")).await;
        assert!(present);
        let first = client.expect_message(version, 1, "cmd/x", b"1").await;
        let second = client.expect_message(version, 2, "cmd/x", b"2").await;
        client.send(&wire::puback(first)).await;
        client.send(&ack(0x50, second)).await;
        client.expect(&ack(0x62, second)).await;
        drop(client);

        // The first is over; of the second only the release is left.
        let rig = rig.restarted().await;
        let (mut client, _) = rig.enter(&kept(version, "dev")).await;
        client.expect(&ack(0x62, second)).await;
        client.send(&ack(0x70, second)).await;
        client.ping().await;
        drop(client);
        let rig = rig.restarted().await;
        let (mut client, _) = rig.enter(&kept(version, "dev")).await;
        client.ping().await;
    }
}

#[tokio::test]
async fn what_was_not_acked_comes_again_marked_under_its_id_mqtt_4_4_0_1() {
    for version in BOTH {
        let rig = Rig::new().await;
        let (mut client, _) = rig.enter(&kept(version, "dev")).await;
        client.subscribe(version, "t", 1).await;
        client.send(&wire::publish(version, "t", Some(1), "x")).await;
        let (mut id, mut acked) = (None, false);
        while id.is_none() || !acked {
            let packet = client.packet().await;
            match packet[0] {
                0x40 => acked = true,
                0x32 => id = Some(message(version, &packet).2),
                _ => panic!("{packet:x?}"),
            }
        }
        drop(client);
        let (mut client, _) = rig.enter(&kept(version, "dev")).await;
        let again = message(version, &client.packet().await);
        assert_eq!((again.0, again.2), (0x3A, id.unwrap()));
    }
}

#[tokio::test]
async fn an_expiry_of_0_at_the_end_ends_the_session_mqtt_3_1_2_23() {
    let rig = Rig::new().await;
    let (mut client, _) = rig.enter(&kept(V5, "dev")).await;
    client.send(&packet(0xE0, [0, 5, 0x11, 0, 0, 0, 0])).await;
    client.expect_closed().await;
    let (_, present) = rig.enter(&kept(V5, "dev")).await;
    assert!(!present);
}

#[tokio::test]
async fn past_the_bound_of_sessions_a_client_is_refused_and_one_without_is_served() {
    let rig = Rig::new().await;
    for id in ["1", "2", "3", "4", "5", "6", "7", "8"] {
        rig.enter(&kept(V5, id)).await;
    }
    let mut socket = rig.socket().await;
    socket.send(&kept(V5, "9").bytes()).await;
    assert_eq!(socket.packet().await[3], reason::SERVER_UNAVAILABLE);
    socket.expect_closed().await;
    rig.enter(&named(V5, "9")).await;
    let (_, present) = rig.enter(&kept(V5, "1")).await;
    assert!(present);
}

#[tokio::test]
async fn a_retained_message_is_there_for_who_comes_later_also_after_a_restart() {
    for version in BOTH {
        let rig = Rig::new().await;
        let mut client = rig.client(version).await;
        // In one piece: the subscription takes its turn.
        let both = [retained(version, "r/a", "old"), retained(version, "r/a", "new")].concat();
        client.send(&[both, wire::subscribe(version, 9, &[("r/+", 1)])].concat()).await;
        assert_eq!(client.packet().await[0], 0x90);
        let (first, _, _, payload) = message(version, &client.packet().await);
        assert_eq!((first, payload), (0x31, b"new".to_vec()), "with the retain flag, and one only");
        client.ping().await;
        drop(client);

        let rig = rig.restarted().await;
        let mut client = rig.client(version).await;
        client.subscribe(version, "r/#", 0).await;
        assert_eq!(message(version, &client.packet().await).3, b"new");
        // To who is there it goes as any other [MQTT-3.3.1-9 of 3.1.1].
        client.send(&retained(version, "r/b", "live")).await;
        assert_eq!(message(version, &client.packet().await).0, 0x30);
        client.send(&retained(version, "r/a", "")).await;
        assert_eq!(message(version, &client.packet().await).3, b"");
        drop(client);
        let rig = rig.restarted().await;
        let mut client = rig.client(version).await;
        client.subscribe(version, "#", 0).await;
        assert_eq!(message(version, &client.packet().await).1, "r/b");
        client.ping().await;
    }
}

#[tokio::test]
async fn retain_handling_and_retain_as_published_mqtt_3_3_1_9_to_13() {
    let rig = Rig::new().await;
    let mut client = rig.client(V5).await;
    client.send(&retained(V5, "r", "x")).await;
    // 2: never. 1: if it is new; this one is not any more.
    for options in [0x20, 0x10] {
        client.subscribe(V5, "r", options).await;
        client.ping().await;
    }
    client.subscribe(V5, "+", 0x10).await;
    assert_eq!(message(V5, &client.packet().await).0, 0x31);
    client.subscribe(V5, "r", 0x08).await;
    assert_eq!(message(V5, &client.packet().await).0, 0x31);
    client.send(&wire::unsubscribe(V5, 3, &["+"])).await;
    client.packet().await;
    client.send(&retained(V5, "r", "y")).await;
    assert_eq!(message(V5, &client.packet().await).0, 0x31, "as published");
}

#[tokio::test]
async fn retained_messages_wait_for_a_session_that_is_kept() {
    let rig = Rig::new().await;
    let (mut client, _) = rig.enter(&kept(V5, "dev")).await;
    client.send(&wire::publish_with(V5, 0x33, "r", Some(1), &[], "x")).await;
    client.expect(&wire::puback(1)).await;
    client.subscribe(V5, "r", 1).await;
    let (first, _, id, _) = message(V5, &client.packet().await);
    assert_eq!(first, 0x33);
    drop(client);
    let rig = rig.restarted().await;
    let (mut client, _) = rig.enter(&kept(V5, "dev")).await;
    let (first, _, again, _) = message(V5, &client.packet().await);
    assert_eq!((first, again), (0x3B, id));
}

#[tokio::test]
async fn a_will_survives_a_restart_and_waits_for_its_delay() {
    let rig = Rig::new().await;
    let mut connect = kept(V5, "dev").will(1, "will", "gone");
    // Will delay 1 h, as long as the session.
    connect.rest = [&[5, 0x18, 0, 0, 0x0E, 0x10][..], &field("will"), &field("gone")].concat();
    let (client, _) = rig.enter(&connect).await;
    drop(client);
    // It comes back in time: no will [MQTT-3.1.3-9].
    let (client, present) = rig.enter(&connect).await;
    assert!(present);
    drop(client);
    let rig = rig.restarted().await;
    // A clean start ends the session, and with it the delay.
    let (mut watcher, _) = rig.enter(&named(V5, "watcher")).await;
    watcher.subscribe(V5, "will", 0).await;
    rig.enter(&named(V5, "dev")).await;
    assert_eq!(message(V5, &watcher.packet().await).3, b"gone");
    drop(watcher);
    let rig = rig.restarted().await;
    rig.enter(&named(V5, "dev")).await;
    assert_eq!(rig.stored().await.len(), 1, "it was published once");
}

#[tokio::test]
async fn a_shared_subscription_goes_to_its_members_in_turn_mqtt_4_8_2_4() {
    for version in BOTH {
        let rig = Rig::new().await;
        let (mut one, _) = rig.enter(&named(version, "one")).await;
        let (mut two, _) = rig.enter(&kept(version, "two")).await;
        for member in [&mut one, &mut two] {
            member.subscribe(version, "$share/g/t", 1).await;
        }
        let (mut publisher, _) = rig.enter(&named(version, "pub")).await;
        for id in 1..=4 {
            publisher.send(&wire::publish(version, "t", Some(id), &id.to_string())).await;
            publisher.expect(&wire::puback(id)).await;
        }
        let mut got = Vec::new();
        for member in [&mut one, &mut two] {
            for _ in 0..2 {
                let (_, _, id, payload) = message(version, &member.packet().await);
                member.send(&wire::puback(id)).await;
                got.push(payload);
            }
            member.ping().await;
        }
        got.sort();
        assert_eq!(got, ["1", "2", "3", "4"].map(|n| n.as_bytes().to_vec()));
        // While one sleeps, the other gets all.
        drop(two);
        while rig.count(|s| &s.connections) > 2 {
            tokio::task::yield_now().await;
        }
        for id in 5..=6 {
            publisher.send(&wire::publish(version, "t", Some(id), &id.to_string())).await;
            publisher.expect(&wire::puback(id)).await;
            let (_, _, _, payload) = message(version, &one.packet().await);
            assert_eq!(payload, id.to_string().as_bytes());
        }
    }
}

#[tokio::test]
async fn no_local_on_a_shared_subscription_is_an_error_mqtt_3_8_3_4() {
    let rig = Rig::new().await;
    let mut client = rig.client(V5).await;
    client.send(&wire::subscribe(V5, 1, &[("$share/g/t", 0x04)])).await;
    let disconnect = client.packet().await;
    assert_eq!((disconnect[0], disconnect[2]), (0xE0, reason::PROTOCOL_ERROR));
}
