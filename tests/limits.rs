//! What a listener or a route allows at most, and that nobody else suffers from whoever wants more:
//! connections, the time until CONNECT, packets and payloads, the rate of a device. (How many publishes
//! are under way: see `conformance`; slow handshakes: see `access`.)

mod harness;

use std::net::SocketAddr;

use harness::raw::{Hello, Raw};
use harness::{Bench, PATIENCE, stable_address};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// A bench, and a listener with limits.
fn limited(seed: u64, limits: &str) -> (Bench, SocketAddr) {
    let (bench, addr) = (Bench::new(seed), stable_address());
    bench.configure(&format!("[[listener]]\nbind = \"{addr}\"\n{limits}\n"));
    (bench, addr)
}

async fn connect_from(source: [u8; 4], addr: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    socket.connect(addr).await.unwrap()
}

async fn welcome(stream: TcpStream, client_id: &str) -> Raw<TcpStream> {
    Raw::welcome(stream, true, Hello { client_id, ..Hello::default() }).await
}

async fn is_closed(stream: &mut TcpStream) -> bool {
    matches!(timeout(PATIENCE, stream.read(&mut [0; 64])).await, Ok(Ok(0) | Err(_)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_listener_turns_away_and_has_room_again() {
    let (bench, addr) = limited(91, "connections_max = 3\nconnect_timeout = \"10m\"");
    let gateway = bench.start().await;
    let mut clients = Vec::new();
    for id in ["a", "b", "c"] {
        clients.push(welcome(TcpStream::connect(addr).await.unwrap(), id).await);
    }
    // Whoever is let in keeps its place, also for somebody from elsewhere.
    for source in [[127, 0, 0, 1], [127, 0, 0, 2]] {
        assert!(is_closed(&mut connect_from(source, addr).await).await);
    }
    assert_eq!(gateway.status().await.mqtt.refused_total, 2);
    for client in &mut clients {
        client.ping().await;
    }
    drop(clients.pop());
    gateway.until("one has gone", |status| status.mqtt.connections == 2).await;
    welcome(TcpStream::connect(addr).await.unwrap(), "d").await.ping().await;
    assert_eq!(gateway.terminate().await, Some(0));
}

/// One address takes every place and says nothing: others get in, and it waits for its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_nothing_gives_way_to_another_address() {
    let (bench, addr) = limited(92, "connections_max = 8\nconnect_timeout = \"10m\"");
    let gateway = bench.start().await;
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(connect_from([127, 0, 0, 1], addr).await);
    }
    gateway.until("it is full", |status| status.mqtt.connections == 8).await;
    assert!(is_closed(&mut connect_from([127, 0, 0, 1], addr).await).await, "no better than they");

    let mut good = Vec::new();
    for id in ["a", "b", "c"] {
        let mut client = welcome(connect_from([127, 0, 0, 2], addr).await, id).await;
        assert_eq!(client.publish("devices/good/t", "1").await, Some(0));
        good.push(client);
    }
    for oldest in &mut silent[..3] {
        assert!(is_closed(oldest).await);
    }
    let status = gateway.until("three made room", |status| status.mqtt.connections == 8).await;
    assert_eq!(status.mqtt.refused_total, 1, "{status:?}");
    // Of those who are left each may still say who it is.
    welcome(silent.pop().unwrap(), "late").await.ping().await;
    assert_eq!(gateway.terminate().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_packet_beyond_the_limit_ends_its_connection_alone() {
    let (bench, addr) = limited(93, "packet_bytes_max = \"4KiB\"");
    let gateway = bench.start().await;
    let mut good = welcome(TcpStream::connect(addr).await.unwrap(), "good").await;
    let mut large = welcome(TcpStream::connect(addr).await.unwrap(), "large").await;
    let topic = "devices/large/t";
    // Of the first limit everything but the payload: headers, topic, packet id, properties.
    let payload = "x".repeat(4096 - 3 - 2 - topic.len() - 2 - 1);
    assert_eq!(large.publish(topic, &payload).await, Some(0));
    assert_eq!(large.publish(topic, &(payload + "x")).await, None);
    assert_eq!(good.publish("devices/good/t", "1").await, Some(0));
    assert_eq!(gateway.status().await.store.watermark, 2);
    assert_eq!(gateway.terminate().await, Some(0));
}

/// What a route allows holds for its topics alone: who is over its rate is slowed and loses nothing,
/// and a payload that is too large is refused by the book, beside those that fit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_has_limits_of_its_own() {
    let (bench, addr) = limited(94, "");
    bench.route_first(
        "[[route]]\nfilter = \"meters/{device}/#\"\n\
         events_per_second_max = 200\npayload_bytes_max = 100\n",
    );
    let gateway = bench.start().await;
    let connect = async |id| welcome(TcpStream::connect(addr).await.unwrap(), id).await;

    let mut client = connect("large").await;
    let (fits, too_large) = ("x".repeat(100), "x".repeat(101));
    assert_eq!(client.publish("meters/m/t", &too_large).await, Some(0x97));
    assert_eq!(client.publish("meters/m/t", &fits).await, Some(0));
    assert_eq!(client.publish("devices/d/t", &too_large).await, Some(0), "another route");
    // Before MQTT 5 no ack can say no.
    let stream = TcpStream::connect(addr).await.unwrap();
    let mut old = Raw::welcome(stream, false, Hello { client_id: "old", ..Hello::default() }).await;
    assert_eq!(old.publish("meters/m/t", &too_large).await, None);

    let mut fast = connect("fast").await;
    fast.flood("devices/fast/t", 300).await;
    assert_eq!(gateway.status().await.mqtt.paced_total, 0, "this route has no rate");
    let (mut slow, mut flood) = (connect("slow").await, JoinSet::new());
    flood.spawn(async move { slow.flood("meters/slow/t", 300).await });
    gateway.until("it is slowed", |status| status.mqtt.paced_total > 0).await;
    flood.join_next().await.unwrap().unwrap();

    let status = gateway.status().await;
    assert_eq!((status.store.watermark, status.mqtt.publishes_refused_total), (602, 2));
    assert_eq!(gateway.terminate().await, Some(0));
}

/// A device over its rate, of events or of bytes, is slowed and loses nothing, and others do not
/// notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flooding_device_is_slowed_and_starves_nobody() {
    let long = format!("devices/flooding/{}", "t".repeat(1000));
    for (limit, topic, events) in [
        ("events_per_second_max = 200", "devices/flooding/t", 300),
        ("bytes_per_second_max = \"40KiB\"", &*long, 60),
    ] {
        let (bench, addr) = limited(73, limit);
        let gateway = bench.start().await;
        let mut flooding = welcome(TcpStream::connect(addr).await.unwrap(), "flooding").await;
        let (mut flood, topic) = (JoinSet::new(), topic.to_owned());
        flood.spawn(async move { flooding.flood(&topic, events).await });
        gateway.until("it is slowed", |status| status.mqtt.paced_total > 0).await;
        let mut good = welcome(TcpStream::connect(addr).await.unwrap(), "good").await;
        for _ in 0..20 {
            assert_eq!(good.publish("devices/good/t", "1").await, Some(0));
        }
        flood.join_next().await.unwrap().unwrap();
        let status = gateway.status().await;
        let stored = u64::from(events) + 20;
        assert_eq!((status.store.watermark, status.mqtt.publishes_refused_total), (stored, 0));
        assert_eq!(gateway.terminate().await, Some(0));
    }
}
