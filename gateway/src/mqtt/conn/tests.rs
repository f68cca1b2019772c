//! Connections over real sockets, a real store and the real committer; and, where the log must stand
//! still or fail, a log that does so on command.

use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex};

use storage::{
    AtQuota, CommitError, Committed, Control, Event, Mark, RetentionReport, StateError, Store,
    StoreOptions,
};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::*;
use crate::access::Access;
use crate::config::{
    AclConfig, AuthConfig, Bind, IngestConfig, ListenerConfig, RouteConfig, RouteLimits,
    SessionsConfig, Transport,
};
use crate::ingest::device_key::{DeviceFrom, Routes};
use crate::ingest::{Admission, Append, CommitterHandle, Ingest};
use crate::mqtt::Front;
use crate::mqtt::codec::Version;
use crate::mqtt::downlink::Downlink;
use crate::mqtt::pace::Rate;
use crate::mqtt::retained::Retained;
use crate::mqtt::sessions::Unattached;
use crate::mqtt::wire::{self, BOTH, ConnectPacket, V3, V5, field, packet};

/// Nothing here takes long: this only ends a test that has gone wrong.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn ingest_config() -> IngestConfig {
    IngestConfig {
        partitions: 4,
        ring_events_max: 1024,
        ring_bytes_max: 1 << 20,
        commit_linger_max: Duration::ZERO,
        commit_events_max: 1024,
        commit_bytes_max: 1 << 20,
        held_bytes_max: 1 << 20,
    }
}

pub(crate) fn listener_config() -> ListenerConfig {
    ListenerConfig {
        bind: Bind::Tcp("127.0.0.1:0".parse().unwrap()),
        transport: Transport::Mqtt,
        tls: None,
        unix_mode: 0o600,
        allow_anonymous: true,
        connections_max: 16,
        connect_timeout: PATIENCE,
        packet_bytes_max: 64 * 1024,
        in_flight_max: 4,
        client_rate: Rate::default(),
    }
}

pub(crate) fn sessions_config() -> SessionsConfig {
    SessionsConfig {
        sessions_max: 8,
        expiry_max: Duration::from_hours(1),
        queue_messages_max: 8,
        queue_bytes_max: 1 << 20,
        queued_bytes_max: 1 << 20,
        queue_drops_oldest: true,
        keep_alive_max: Duration::ZERO,
    }
}

fn no_users() -> AuthConfig {
    AuthConfig { users_file: None, credential_cache: Duration::ZERO, jwt: None }
}

/// No users and no rules.
pub(crate) fn open_access() -> Access {
    Access::load(&no_users(), &[]).unwrap()
}

fn open_store(dir: &tempfile::TempDir) -> (Store, storage::Writer) {
    let options = StoreOptions {
        dir: dir.path().join("data"),
        partitions: 4,
        sinks: Vec::new(),
        file_bytes_max: 16 << 20,
        cache_bytes: 1 << 20,
        quota_bytes: 1 << 30,
        free_bytes_min: 0,
        at_quota: AtQuota::Hold,
        retain_bytes: 1 << 30,
        retain_age_us: u64::MAX,
        dead_letter_bytes_max: 64 << 20,
        journal: storage::JournalMode::Auto,
        journal_bytes: 32 << 20,
        compression: storage::Compression::None,
        commits_ahead_max: 2,
    };
    Store::open(options, 0).unwrap()
}

struct Rig {
    shared: Arc<Shared>,
    address: std::net::SocketAddr,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    committer: CommitterHandle,
    dir: Option<tempfile::TempDir>,
}

impl Rig {
    /// With a real store.
    async fn new() -> Self {
        Self::with(listener_config(), ingest_config(), &[]).await
    }

    async fn with(listener: ListenerConfig, ingest: IngestConfig, routes: &[&str]) -> Self {
        Self::at(tempfile::tempdir().unwrap(), listener, ingest, routes).await
    }

    /// Over the store that is in a folder.
    async fn at(
        dir: tempfile::TempDir,
        listener: ListenerConfig,
        ingest: IngestConfig,
        routes: &[&str],
    ) -> Self {
        let (store, writer) = open_store(&dir);
        let (watermark, rows) = (store.mark().watermark, store.clone());
        let rows = move |namespace, key: &[u8]| rows.state(namespace, key).unwrap();
        let retained = Retained::new(8, 1 << 20, rows);
        let front = (watermark, retained, Some(&store));
        let mut rig = Self::wired(writer, listener, &ingest, AtQuota::Hold, routes, front).await;
        let (downlink, ingest) = (rig.shared.downlink.clone(), rig.shared.ingest.clone());
        rig.tasks.spawn(downlink.follow(store, ingest, rig.stop.clone()));
        rig.tasks.spawn(rig.shared.sessions.clone().keep(rig.stop.clone()));
        rig.dir = Some(dir);
        rig
    }

    /// Ends everything in order, and begins again over the same store.
    async fn restarted(self) -> Self {
        let dir = self.end().await.unwrap();
        Self::at(dir, listener_config(), ingest_config(), &[]).await
    }

    async fn over<A: Append>(
        log: A,
        listener: ListenerConfig,
        ingest_config: &IngestConfig,
        at_quota: AtQuota,
        routes: &[&str],
    ) -> Self {
        let front = (0, Retained::new(8, 1 << 20, |_, _| None), None);
        Self::wired(log, listener, ingest_config, at_quota, routes, front).await
    }

    async fn wired<A: Append>(
        log: A,
        listener: ListenerConfig,
        ingest_config: &IngestConfig,
        at_quota: AtQuota,
        routes: &[&str],
        (watermark, retained, store): (u64, Retained, Option<&Store>),
    ) -> Self {
        let (ingest, committer) =
            Ingest::start(log, watermark, ingest_config, at_quota, Duration::from_mins(1)).unwrap();
        let routes: Vec<_> = routes
            .iter()
            .map(|filter| RouteConfig {
                filter: (*filter).to_owned(),
                content_type: None,
                device: DeviceFrom::default(),
                event_id: None,
                event_type: None,
                lane: storage::Lane::Live,
                limits: RouteLimits::default(),
            })
            .collect();
        let downlink = Downlink::new(ingest.watermark(), 16);
        let held_bytes_max = ingest_config.held_bytes_max;
        let routes = Routes::new(&routes).unwrap();
        let bounds = Bounds {
            sessions: &sessions_config(),
            has_sinks: true,
            held_bytes_max,
            // Half of it is for the connections: more than any test waits.
            shutdown_grace: 4 * PATIENCE,
        };
        let mut shared = Shared::new(ingest, routes, open_access(), downlink, retained, bounds);
        shared.write_stall = Duration::from_secs(1);
        if let Some(store) = store {
            shared.retained.load(store).unwrap();
            shared.sessions.load(store, Instant::now(), shared.ingest.now_us()).unwrap();
        }
        let shared = Arc::new(shared);
        let front = Front::bind(&listener, None, shared.clone()).await.unwrap();
        let Bind::Tcp(address) = *front.bound() else { panic!("it is on TCP") };
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(front.run(stop.clone()));
        Self { shared, address, stop, tasks, committer, dir: None }
    }

    async fn socket(&self) -> Socket {
        Socket(TcpStream::connect(self.address).await.unwrap())
    }

    async fn client(&self, version: Version) -> Socket {
        self.client_with(&ConnectPacket::new(version)).await
    }

    async fn client_with(&self, connect: &ConnectPacket) -> Socket {
        let mut socket = self.socket().await;
        socket.send(&connect.bytes()).await;
        let connack = socket.packet().await;
        assert_eq!((connack[0], connack[3]), (0x20, 0), "{connack:x?}");
        socket
    }

    /// Stops everything in order.
    async fn end(mut self) -> Option<tempfile::TempDir> {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        self.committer.stop().await.unwrap();
        self.dir
    }

    /// Stops everything in order, and gives the topics and payloads that were stored.
    async fn stored(self) -> Vec<(String, Vec<u8>)> {
        let dir = self.end().await.unwrap();
        let (store, _writer) = open_store(&dir);
        let read = store.read(0, usize::MAX, usize::MAX).unwrap();
        let event = |stored: storage::StoredEvent| {
            (stored.event.topic.to_string(), stored.event.payload.to_vec())
        };
        read.events.into_iter().map(event).collect()
    }

    async fn until(&self, admission: Admission) {
        let reached = async {
            while self.shared.ingest.admission() != admission {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, reached).await.unwrap();
    }

    fn count(&self, counter: impl Fn(&FrontStats) -> &std::sync::atomic::AtomicU64) -> u64 {
        counter(&self.shared.stats).load(Ordering::Relaxed)
    }
}

/// Sends a CONNECT and gives the code of the CONNACK that refuses it.
async fn refused(rig: &Rig, connect: &ConnectPacket) -> u8 {
    let mut socket = rig.socket().await;
    socket.send(&connect.bytes()).await;
    let connack = socket.packet().await;
    assert_eq!((connack[0], connack[2]), (0x20, 0), "{connack:x?}");
    socket.expect_closed().await;
    connack[3]
}

#[tokio::test]
async fn a_listener_without_anonymous_clients_refuses_by_the_book() {
    let closed = ListenerConfig { allow_anonymous: false, ..listener_config() };
    let rig = Rig::with(closed, ingest_config(), &[]).await;
    for (version, none, wrong) in
        [(V3, 5, 4), (V5, reason::NOT_AUTHORIZED, reason::BAD_CREDENTIALS)]
    {
        assert_eq!(refused(&rig, &ConnectPacket::new(version)).await, none);
        let rest = [field("user"), field("password")].concat();
        let named = ConnectPacket { flags: 0xC2, rest, ..ConnectPacket::new(version) };
        assert_eq!(refused(&rig, &named).await, wrong);
    }
    rig.end().await;
}

#[tokio::test]
async fn enhanced_authentication_is_refused_mqtt_4_12_0_1() {
    let rig = Rig::new().await;
    let method = [&[0x15][..], &field("SCRAM")].concat();
    let asks = ConnectPacket { properties: method, ..ConnectPacket::new(V5) };
    assert_eq!(refused(&rig, &asks).await, reason::BAD_AUTHENTICATION_METHOD);
    rig.end().await;
}

struct Socket(TcpStream);

impl Socket {
    async fn send(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.0.write_all(bytes)).await.unwrap().unwrap();
    }

    async fn byte(&mut self) -> Option<u8> {
        match timeout(PATIENCE, self.0.read_u8()).await.expect("something to read") {
            Ok(byte) => Some(byte),
            Err(e) if matches!(e.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// The next packet whole; empty when the server has closed.
    async fn packet(&mut self) -> Vec<u8> {
        let Some(first) = self.byte().await else { return Vec::new() };
        let (mut packet, mut remaining) = (vec![first], 0);
        for i in 0..4 {
            let byte = self.byte().await.unwrap();
            packet.push(byte);
            remaining |= usize::from(byte & 0x7f) << (7 * i);
            if byte & 0x80 == 0 {
                break;
            }
        }
        let mut content = vec![0; remaining];
        timeout(PATIENCE, self.0.read_exact(&mut content)).await.unwrap().unwrap();
        packet.extend(content);
        packet
    }

    async fn expect(&mut self, bytes: &[u8]) {
        assert_eq!(self.packet().await, bytes, "expected {bytes:x?}");
    }

    /// The next packet is an ack that refuses, and says why.
    async fn expect_refusal(&mut self, first: u8, id: u8, code: u8, why: &str) {
        let property = [&[0x1F][..], &wire::field(why)].concat();
        let content = [&[0, id, code, property.len() as u8][..], &property].concat();
        self.expect(&packet(first, content)).await;
    }

    async fn expect_closed(&mut self) {
        self.expect(&[]).await;
    }

    /// v5 is told why, then the connection is closed; before v5 it is closed.
    async fn expect_end(&mut self, version: Version, code: u8) {
        if version == V5 {
            let disconnect = self.packet().await;
            assert_eq!((disconnect[0], disconnect[2]), (0xE0, code));
        }
        self.expect_closed().await;
    }

    async fn ping(&mut self) {
        self.send(&[0xC0, 0]).await;
        self.expect(&[0xD0, 0]).await;
    }
}

/// A log that acks what it has not stored, when it is let, and says why it does not.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Default)]
pub(crate) struct GateState {
    open: bool,
    closing: bool,
    error: Option<fn() -> CommitError>,
    events: Vec<Event>,
    on_durable: Option<Box<dyn Fn(Mark) + Send + Sync>>,
    commit: u64,
}

impl Gate {
    fn set(&self, f: impl FnOnce(&mut GateState)) {
        f(&mut self.0.0.lock().unwrap());
        self.0.1.notify_all();
    }
}

impl Append for Gate {
    fn on_durable(&mut self, callback: impl Fn(Mark) + Send + Sync + 'static) {
        self.set(|state| state.on_durable = Some(Box::new(callback)));
    }

    fn commit(
        &mut self,
        events: &[Event],
        _control: &[Control],
        _now_us: u64,
    ) -> Result<Committed, CommitError> {
        let state = self.0.0.lock().unwrap();
        let wait = |state: &mut GateState| !state.open && !state.closing && state.error.is_none();
        let mut state = self.0.1.wait_while(state, wait).unwrap();
        if let Some(error) = state.error {
            return Err(error());
        }
        let first = state.events.len() as u64;
        state.events.extend_from_slice(events);
        state.commit += 1;
        let mark = Mark { commit: state.commit, watermark: state.events.len() as u64 };
        let offsets = first..mark.watermark;
        // As the real log does: the mark is told before the commit returns.
        if let Some(on_durable) = &state.on_durable {
            on_durable(mark);
        }
        Ok(Committed { commit: mark.commit, offsets })
    }

    fn make_room(&mut self, _now_us: u64) -> Result<(), CommitError> {
        self.0.0.lock().unwrap().error.map_or(Ok(()), |error| Err(error()))
    }

    fn retain(&mut self, _now_us: u64) -> Result<RetentionReport, StateError> {
        Ok(RetentionReport::default())
    }

    fn close(self) -> Result<(), StateError> {
        Ok(())
    }
}

fn event_of(packet: &[u8]) -> (u8, String, Vec<u8>) {
    let len = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    let topic = String::from_utf8(packet[4..4 + len].to_vec()).unwrap();
    (packet[0], topic, packet[4 + len..].to_vec())
}

#[tokio::test]
async fn publishes_are_acked_and_stored_in_order() {
    let rig = Rig::new().await;
    for (i, version) in BOTH.into_iter().enumerate() {
        let mut client = rig.client(version).await;
        let batch: Vec<u8> = (1..=4)
            .flat_map(|id| wire::publish(version, "t/x", Some(id), &format!("{i}{id}")))
            .chain(wire::publish(version, "t/x", None, &format!("{i}5")))
            .collect();
        client.send(&batch).await;
        for id in 1..=4 {
            client.expect(&wire::puback(id)).await;
        }
        client.ping().await;
        client.send(&[0xE0, 0]).await;
        client.expect_closed().await;
    }
    let payloads: Vec<_> = rig.stored().await.into_iter().map(|(_, p)| p).collect();
    let expected: Vec<_> =
        (0..2).flat_map(|i| (1..=5).map(move |n| format!("{i}{n}").into_bytes())).collect();
    assert_eq!(payloads, expected);
}

#[tokio::test]
async fn bytes_may_come_one_by_one() {
    let rig = Rig::new().await;
    for version in BOTH {
        let mut socket = rig.socket().await;
        let bytes = [wire::connect(version), wire::publish(version, "t", Some(9), "x")].concat();
        for byte in bytes {
            socket.send(&[byte]).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(socket.packet().await[0], 0x20);
        socket.expect(&wire::puback(9)).await;
    }
}

#[tokio::test]
async fn a_packet_larger_than_any_read_arrives_whole() {
    let rig = Rig::new().await;
    let payload = "x".repeat(60_000);
    let mut client = rig.client(V5).await;
    client.send(&wire::publish(V5, "big", Some(1), &payload)).await;
    client.expect(&wire::puback(1)).await;
    assert_eq!(rig.stored().await, [("big".to_owned(), payload.into_bytes())]);
}

#[tokio::test]
async fn a_violation_is_answered_and_ends_that_connection_only() {
    let rig = Rig::new().await;
    let other = ConnectPacket { client_id: "other", ..ConnectPacket::new(V3) };
    let mut other = rig.client_with(&other).await;
    let mut client = rig.client(V5).await;
    client.send(&wire::publish(V5, "a/+", Some(1), "")).await;
    let disconnect = client.packet().await;
    assert_eq!((disconnect[0], disconnect[2]), (0xE0, reason::TOPIC_INVALID));
    client.expect_closed().await;

    let mut client = rig.client(V3).await;
    client.send(&wire::publish(V3, "a/+", Some(1), "")).await;
    client.expect_closed().await;
    other.ping().await;
    assert_eq!(rig.count(|s| &s.protocol_errors), 2);
    assert_eq!(rig.count(|s| &s.panics), 0);
}

#[tokio::test]
async fn what_is_no_connect_is_closed_without_a_word_mqtt_3_1_0_1() {
    let rig = Rig::new().await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x30, 0xFF, 0xFF, 0xFF, 0x7F], &[0xC0, 0]] {
        let mut socket = rig.socket().await;
        socket.send(bytes).await;
        socket.expect_closed().await;
    }
    assert_eq!(rig.count(|s| &s.connections_refused), 3);
}

#[tokio::test]
async fn a_connection_without_connect_ends_in_time() {
    let mut listener = listener_config();
    listener.connect_timeout = Duration::from_millis(50);
    let rig = Rig::over(Gate::default(), listener, &ingest_config(), AtQuota::Hold, &[]).await;
    let mut socket = rig.socket().await;
    // Slowloris: a byte now and then does not prolong it.
    socket.send(&wire::connect(V5)[..3]).await;
    socket.expect_closed().await;
    assert_eq!(rig.count(|s| &s.connections_refused), 1);
}

#[tokio::test]
async fn a_silent_client_is_closed_after_one_and_a_half_keep_alives_mqtt_3_1_2_22() {
    let rig =
        Rig::over(Gate::default(), listener_config(), &ingest_config(), AtQuota::Hold, &[]).await;
    let mut client =
        rig.client_with(&ConnectPacket { keep_alive: 1, ..ConnectPacket::new(V5) }).await;
    let disconnect = client.packet().await;
    assert_eq!((disconnect[0], disconnect[2]), (0xE0, reason::KEEP_ALIVE_TIMEOUT));
    client.expect_closed().await;
}

#[tokio::test]
async fn a_second_connection_takes_over_mqtt_3_1_4_3() {
    let rig = Rig::new().await;
    for (version, code) in [(V3, None), (V5, Some(reason::TAKEN_OVER))] {
        let mut first = rig.client(version).await;
        let mut second = rig.client(version).await;
        if let Some(code) = code {
            assert_eq!(first.packet().await[2], code);
        }
        first.expect_closed().await;
        second.ping().await;
    }
}

#[tokio::test]
async fn too_many_connections_are_closed_at_once() {
    let mut listener = listener_config();
    listener.connections_max = 1;
    let rig = Rig::with(listener, ingest_config(), &[]).await;
    let mut first = rig.client(V5).await;
    rig.socket().await.expect_closed().await;
    first.ping().await;
    assert_eq!(rig.count(|s| &s.connections_refused), 1);
}

#[tokio::test]
async fn a_will_is_stored_after_an_end_without_disconnect_mqtt_3_1_2_8() {
    let rig = Rig::new().await;
    for version in BOTH {
        let will = ConnectPacket::new(version).will(1, "will", "gone");
        let mut watcher = rig
            .client_with(&ConnectPacket { client_id: "watcher", ..ConnectPacket::new(V3) })
            .await;
        watcher.send(&wire::subscribe(V3, 1, &[("will", 0)])).await;
        watcher.expect(&[0x90, 3, 0, 1, 0]).await;
        drop(rig.client_with(&will).await);
        assert_eq!(event_of(&watcher.packet().await).2, b"gone");

        let mut polite = rig.client_with(&will).await;
        polite.send(&[0xE0, 0]).await;
        polite.expect_closed().await;
    }
    let wills = rig.stored().await;
    assert_eq!(wills.len(), 2, "{wills:?}");
}

#[tokio::test]
async fn a_topic_without_a_route_is_refused_by_the_book() {
    let rig = Rig::with(listener_config(), ingest_config(), &["devices/{device}/#"]).await;
    let mut client = rig.client(V5).await;
    client.send(&wire::publish(V5, "devices/d1/x", Some(1), "1")).await;
    client.send(&wire::publish(V5, "elsewhere", Some(2), "2")).await;
    client.send(&wire::publish(V5, "elsewhere", None, "3")).await;
    client.send(&wire::publish(V5, "$SYS/x", Some(3), "4")).await;
    client.expect(&wire::puback(1)).await;
    for (id, topic) in [(2, "elsewhere"), (3, "$SYS/x")] {
        let why = format!("topic {topic:?} is not taken by any route");
        client.expect_refusal(0x40, id, reason::TOPIC_INVALID, &why).await;
    }

    let mut client = rig.client(V3).await;
    client.send(&wire::publish(V3, "elsewhere", None, "5")).await;
    client.ping().await;
    client.send(&wire::publish(V3, "elsewhere", Some(1), "6")).await;
    client.expect_closed().await;
    assert_eq!(rig.count(|s| &s.publishes_refused), 5);
    assert_eq!(rig.stored().await, [("devices/d1/x".to_owned(), b"1".to_vec())]);
}

#[tokio::test]
async fn subscribers_get_what_was_stored_with_their_qos() {
    let rig = Rig::new().await;
    for version in BOTH {
        let named = |id| ConnectPacket { client_id: id, ..ConnectPacket::new(version) };
        let mut subscriber = rig.client_with(&named("sub")).await;
        let mut publisher = rig.client_with(&named("pub")).await;
        subscriber.send(&wire::subscribe(version, 1, &[("a/+", 2), ("b", 0)])).await;
        let suback = subscriber.packet().await;
        assert_eq!(suback[suback.len() - 2..], [2, 0]);
        publisher.send(&wire::publish(version, "a/é", Some(1), "one")).await;
        publisher.send(&wire::publish(version, "b", Some(2), "two")).await;
        publisher.send(&wire::publish(version, "a/x", None, "three")).await;
        publisher.expect(&wire::puback(1)).await;
        publisher.expect(&wire::puback(2)).await;
        let mut got = Vec::new();
        for _ in 0..3 {
            let (first, topic, rest) = event_of(&subscriber.packet().await);
            if first == 0x32 {
                subscriber.send(&wire::puback(u16::from_be_bytes([rest[0], rest[1]]))).await;
            }
            let skip = if first == 0x32 { 2 } else { 0 } + usize::from(version == V5);
            got.push((first, topic, rest[skip..].to_vec()));
        }
        got.sort();
        assert_eq!(
            got,
            [
                (0x30, "a/x".to_owned(), b"three".to_vec()),
                (0x30, "b".to_owned(), b"two".to_vec()),
                (0x32, "a/é".to_owned(), b"one".to_vec()),
            ]
        );
        subscriber.send(&wire::unsubscribe(version, 2, &["a/+", "b", "c"])).await;
        let unsuback = subscriber.packet().await;
        let codes: &[u8] = if version == V5 { &[0, 0, 0, 0x11] } else { &[] };
        assert_eq!(unsuback, packet(0xB0, [&[0, 2][..], codes].concat()));
    }
}

#[tokio::test]
async fn v5_properties_reach_the_subscriber_and_no_local_holds_mqtt_3_8_3_3() {
    let rig = Rig::new().await;
    let mut client = rig.client(V5).await;
    // No local on `a/+`; identifier 7 on `a/#`.
    client.send(&wire::subscribe(V5, 1, &[("a/+", 0x04)])).await;
    client.packet().await;
    let content = [&[0, 2, 2, 0x0B, 7][..], &field("a/#"), &[0]].concat();
    client.send(&packet(0x82, content)).await;
    client.packet().await;
    let said = [&[0x03][..], &field("text/plain"), &[0x26], &field("k"), &field("v")].concat();
    client.send(&wire::publish_with(V5, 0x30, "a/b", None, &said, "x")).await;
    let (_, topic, rest) = event_of(&client.packet().await);
    let list = [&[0x0B, 7][..], &said].concat();
    assert_eq!((topic.as_str(), rest), ("a/b", [wire::properties(V5, &list), vec![b'x']].concat()));
    // Somebody else's matches both, and comes once.
    let other = ConnectPacket { client_id: "other", ..ConnectPacket::new(V5) };
    let mut other = rig.client_with(&other).await;
    other.send(&wire::publish(V5, "a/c", None, "y")).await;
    let (_, topic, rest) = event_of(&client.packet().await);
    let properties = wire::properties(V5, &[0x0B, 7]);
    assert_eq!((topic.as_str(), rest), ("a/c", [properties, vec![b'y']].concat()));
    client.ping().await;
}

#[tokio::test]
async fn a_publisher_can_subscribe_to_itself() {
    let rig = Rig::new().await;
    for version in BOTH {
        let mut client = rig.client(version).await;
        for i in 0..20u16 {
            let topic = format!("loop/{i}");
            let subscribe = wire::subscribe(version, 100 + i, &[(&topic, 0)]);
            client.send(&[subscribe, wire::publish(version, &topic, None, "x")].concat()).await;
            assert_eq!(client.packet().await[0], 0x90);
            assert_eq!(event_of(&client.packet().await).1, topic);
        }
    }
}

fn narrow_ring() -> IngestConfig {
    IngestConfig { partitions: 1, ring_events_max: 2, commit_events_max: 1, ..ingest_config() }
}

#[tokio::test]
async fn while_the_rings_are_full_pings_flow_and_nothing_is_acked_or_lost() {
    for version in BOTH {
        let gate = Gate::default();
        let rig =
            Rig::over(gate.clone(), listener_config(), &narrow_ring(), AtQuota::Hold, &[]).await;
        let mut client = rig.client(version).await;
        for id in 1..=4 {
            client.send(&wire::publish(version, "t", Some(id), &id.to_string())).await;
        }
        if version == V5 {
            // QoS 0 is not bound by Receive Maximum; it is held in its turn.
            client.send(&wire::publish(version, "t", None, "5")).await;
            client.ping().await;
            assert!(rig.shared.held.bytes() > 0);
        }
        gate.set(|state| state.open = true);
        for id in 1..=4 {
            client.expect(&wire::puback(id)).await;
        }
        client.ping().await;
        assert_eq!(rig.shared.held.bytes(), 0);
        rig.end().await;
        let events = &gate.0.0.lock().unwrap().events;
        let payloads: Vec<_> = events.iter().map(|event| event.payload.clone()).collect();
        let expected: Vec<_> =
            ["1", "2", "3", "4", "5"][..if version == V5 { 5 } else { 4 }].into();
        assert_eq!(payloads, expected);
    }
}

#[tokio::test]
async fn past_the_bound_the_socket_is_not_read() {
    let gate = Gate::default();
    let rig = Rig::over(gate.clone(), listener_config(), &narrow_ring(), AtQuota::Hold, &[]).await;
    let mut client = rig.client(V3).await;
    // More than any buffer on the way holds: the writer must block.
    let flood: Vec<u8> =
        (0..20_000u16).flat_map(|i| wire::publish(V3, "t", None, &format!("{i:01000}"))).collect();
    let (mut read, mut write) = client.0.split();
    let sent = async {
        write.write_all(&flood).await.unwrap();
        write.write_all(&[0xC0, 0]).await.unwrap();
    };
    let blocked = async {
        // Waits until the connection has stopped reading: as many held as it may.
        while rig.shared.held.bytes() < 4 * 1001 {
            tokio::task::yield_now().await;
        }
        assert!(rig.shared.held.bytes() <= 4 * 1004);
        assert!(rig.count(|s| &s.received_bytes) < flood.len() as u64 / 2);
        gate.set(|state| state.open = true);
    };
    let pong = async {
        let mut answer = [0; 2];
        read.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, [0xD0, 0]);
    };
    timeout(PATIENCE, async { tokio::join!(sent, blocked, pong) }).await.unwrap();
    assert_eq!(rig.count(|s| &s.publishes[0]), 20_000);
    rig.end().await;
    let events = &gate.0.0.lock().unwrap().events;
    let in_order = (0..20_000).map(|i| format!("{i:01000}"));
    assert!(events.iter().map(|event| event.payload.clone()).eq(in_order.map(bytes::Bytes::from)));
}

#[tokio::test]
async fn a_failed_commit_acks_nothing_and_closes_the_connection() {
    for version in BOTH {
        let gate = Gate::default();
        let rig =
            Rig::over(gate.clone(), listener_config(), &ingest_config(), AtQuota::Hold, &[]).await;
        let mut client = rig.client(version).await;
        client.send(&wire::publish(version, "t", Some(1), "")).await;
        gate.set(|state| {
            state.error =
                Some(|| CommitError::Io { path: "log".into(), reason: "injected".into() });
        });
        client.expect_end(version, reason::IMPLEMENTATION_SPECIFIC).await;
        gate.set(|state| (state.error, state.closing) = (None, true));
    }
}

/// A log that takes nothing, and the committer with it.
struct Broken;

impl Append for Broken {
    fn on_durable(&mut self, _callback: impl Fn(Mark) + Send + Sync + 'static) {}

    fn commit(&mut self, _: &[Event], _: &[Control], _: u64) -> Result<Committed, CommitError> {
        panic!("injected")
    }

    fn retain(&mut self, _now_us: u64) -> Result<RetentionReport, StateError> {
        Ok(RetentionReport::default())
    }

    fn close(self) -> Result<(), StateError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_shutdown_without_a_committer_waits_for_no_ack() {
    let rig = Rig::over(Broken, listener_config(), &ingest_config(), AtQuota::Hold, &[]).await;
    let mut client = rig.client(V5).await;
    client.send(&wire::publish(V5, "t", Some(1), "")).await;
    rig.committer.ended().await;
    rig.stop.cancel();
    client.expect_end(V5, reason::SHUTTING_DOWN).await;
}

#[tokio::test]
async fn a_full_store_refuses_if_that_is_the_policy() {
    let gate = Gate::default();
    let full = || CommitError::Quota { used_bytes: 2, quota_bytes: 1 };
    gate.set(|state| state.error = Some(full));
    let rig =
        Rig::over(gate.clone(), listener_config(), &ingest_config(), AtQuota::Refuse, &[]).await;
    // Taken when nobody knew yet, and not stored: there is no room.
    let mut client = rig.client(V5).await;
    client.send(&wire::publish(V5, "t", Some(1), "first")).await;
    client.expect_end(V5, reason::QUOTA_EXCEEDED).await;
    rig.until(Admission::Refuse).await;
    let mut client = rig.client(V5).await;
    client.send(&wire::publish(V5, "t", Some(2), "second")).await;
    let why = "the store is full and takes no more";
    client.expect_refusal(0x40, 2, reason::QUOTA_EXCEEDED, why).await;
    assert_eq!(rig.count(|s| &s.publishes_refused), 1);

    gate.set(|state| (state.error, state.open) = (None, true));
    rig.until(Admission::Open).await;
    // Nobody can tell whether the next publish was sent before or after that answer was read.
    client.send(&wire::publish(V5, "t", Some(3), "third")).await;
    client.expect_end(V5, reason::QUOTA_EXCEEDED).await;
    let mut client = rig.client(V5).await;
    client.send(&wire::publish(V5, "t", Some(1), "second")).await;
    client.expect(&wire::puback(1)).await;
    let events = &gate.0.0.lock().unwrap().events;
    assert!(events.iter().map(|event| &event.payload[..]).eq([b"second"]));
}

/// A client that pipelines learns of a refusal late. What it sent behind the refused publish must not
/// be stored before that one comes again.
#[tokio::test]
async fn nothing_is_stored_behind_a_refused_publish() {
    let gate = Gate::default();
    let listener = ListenerConfig { in_flight_max: 16, ..listener_config() };
    let mut rig = Rig::over(gate.clone(), listener, &narrow_ring(), AtQuota::Refuse, &[]).await;
    let mut client = rig.client(V5).await;
    // One in the committer's hands, two in the ring, the others held.
    for id in 1..=5 {
        client.send(&wire::publish(V5, "t", Some(id), &id.to_string())).await;
    }
    client.ping().await;
    assert!(rig.shared.held.bytes() > 0);
    gate.set(|state| {
        state.error = Some(|| CommitError::Quota { used_bytes: 2, quota_bytes: 1 });
    });
    rig.until(Admission::Refuse).await;
    // The server may have closed by now.
    client.0.write_all(&wire::publish(V5, "t", Some(6), "6")).await.ok();
    gate.set(|state| (state.error, state.open) = (None, true));
    rig.until(Admission::Open).await;
    client.0.write_all(&wire::publish(V5, "t", Some(7), "7")).await.ok();
    loop {
        let packet = client.packet().await;
        match packet.first() {
            Some(0x40) => assert_eq!(packet[4], reason::QUOTA_EXCEEDED, "{packet:x?}"),
            Some(0xE0) => assert_eq!(packet[2], reason::QUOTA_EXCEEDED, "{packet:x?}"),
            Some(_) => panic!("{packet:x?}"),
            None => break,
        }
    }
    rig.stop.cancel();
    while let Some(ended) = rig.tasks.join_next().await {
        ended.unwrap();
    }
    rig.committer.stop().await.unwrap();
    let events = &gate.0.0.lock().unwrap().events;
    let payloads: Vec<_> = events.iter().map(|event| event.payload.clone()).collect();
    assert!(payloads.is_empty(), "stored behind a refused publish: {payloads:?}");
}

#[tokio::test]
async fn shutdown_acks_what_was_taken_and_says_goodbye() {
    for version in BOTH {
        let gate = Gate::default();
        let mut rig =
            Rig::over(gate.clone(), listener_config(), &narrow_ring(), AtQuota::Hold, &[]).await;
        let mut client = rig.client(version).await;
        for id in 1..=3 {
            client.send(&wire::publish(version, "t", Some(id), "")).await;
        }
        client.ping().await;
        rig.stop.cancel();
        gate.set(|state| state.open = true);
        for id in 1..=3 {
            client.expect(&wire::puback(id)).await;
        }
        client.expect_end(version, reason::SHUTTING_DOWN).await;
        rig.tasks.join_next().await.unwrap().unwrap();
        assert_eq!(rig.count(|s| &s.connections), 0);
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_is_closed_and_its_keep_alive_rests() {
    let rig =
        Rig::over(Gate::default(), listener_config(), &ingest_config(), AtQuota::Hold, &[]).await;
    let mut client = rig.client(V5).await;
    // Answers pile up until no buffer on the way takes more; then nothing more is read.
    let pings = [0xC0, 0].repeat(64 * 1024);
    let flood = async { while client.0.write_all(&pings).await.is_ok() {} };
    timeout(PATIENCE, flood).await.unwrap();
    while rig.count(|s| &s.connections) > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(rig.count(|s| &s.protocol_errors), 0);
}

mod kept;

fn rule(publish: &[&str], subscribe: &[&str]) -> Vec<AclConfig> {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    vec![AclConfig {
        users: Vec::new(),
        publish: owned(publish),
        subscribe: owned(subscribe),
        deny_subscribe: Vec::new(),
    }]
}

impl Rig {
    /// From now on these rules are in force.
    fn rule(&self, publish: &[&str], subscribe: &[&str]) {
        self.shared.access.reload(&no_users(), &rule(publish, subscribe)).unwrap();
    }
}

/// A CONNECT whose session is kept.
fn keeps(version: Version, client_id: &'static str) -> ConnectPacket {
    let mut connect = ConnectPacket { flags: 0, client_id, ..ConnectPacket::new(version) };
    if version == V5 {
        connect.properties = vec![0x11, 0, 0, 0x0E, 0x10];
    }
    connect
}

#[tokio::test]
async fn a_qos_2_publish_that_the_rules_deny_is_refused_by_the_book_and_not_stored() {
    let rig = Rig::new().await;
    rig.rule(&["mine/#"], &[]);
    let mut v5 = rig.client(V5).await;
    v5.send(&wire::publish_with(V5, 0x34, "others/a", Some(7), &[], "no")).await;
    let why = "topic \"others/a\" is not allowed to this client";
    v5.expect_refusal(0x50, 7, 0x87, why).await;
    // The exchange is over with that: its id is free, and belongs to a new publish.
    v5.send(&wire::publish_with(V5, 0x34, "mine/a", Some(7), &[], "yes")).await;
    v5.expect(&packet(0x50, [0, 7])).await;
    v5.send(&packet(0x62, [0, 7])).await;
    v5.expect(&packet(0x70, [0, 7])).await;

    let other = ConnectPacket { client_id: "v3", ..ConnectPacket::new(V3) };
    let mut v3 = rig.client_with(&other).await;
    v3.send(&wire::publish_with(V3, 0x34, "others/a", Some(7), &[], "no")).await;
    v3.expect_closed().await;
    assert_eq!(rig.count(|stats| &stats.denied), 2);
    assert_eq!(rig.stored().await, [("mine/a".to_owned(), b"yes".to_vec())]);
}

#[tokio::test]
async fn denied_filters_among_allowed_ones_keep_their_places_mqtt_3_9_3_1() {
    let rig = Rig::new().await;
    rig.rule(&[], &["a/#", "b"]);
    let filters =
        [("no", 0), ("a/x", 2), ("#", 1), ("$share/g/b/x", 1), ("b", 1), ("$share/g/no", 0)];
    let connects = [ConnectPacket::new(V5), keeps(V5, "kept"), keeps(V3, "old")];
    for (connect, denied) in connects.iter().zip([0x87, 0x87, 0x80]) {
        let mut client = rig.client_with(connect).await;
        client.send(&wire::subscribe(connect.version, 3, &filters)).await;
        let codes = [denied, 2, denied, denied, 1, denied];
        let head = [&[0, 3][..], &wire::properties(connect.version, &[])].concat();
        client.expect(&packet(0x90, [&head[..], &codes].concat())).await;
    }
    rig.end().await;
}

#[tokio::test]
async fn a_will_is_not_published_once_the_rules_deny_its_topic() {
    let rig = Rig::new().await;
    rig.rule(&["wills/#"], &["#"]);
    let allowed = ConnectPacket::new(V5).will(1, "wills/kept", "gone");
    let denied = ConnectPacket { client_id: "2", ..ConnectPacket::new(V5) }.will(1, "no", "gone");
    assert_eq!(refused(&rig, &denied).await, 0x87);

    let watcher = ConnectPacket { client_id: "watcher", ..ConnectPacket::new(V3) };
    let mut watcher = rig.client_with(&watcher).await;
    watcher.send(&wire::subscribe(V3, 1, &[("wills/#", 0)])).await;
    watcher.expect(&[0x90, 3, 0, 1, 0]).await;
    let other = ConnectPacket { client_id: "3", ..ConnectPacket::new(V5) };
    let mut two = rig.client_with(&other.will(1, "wills/lost", "gone")).await;
    drop(rig.client_with(&allowed).await);
    assert_eq!(event_of(&watcher.packet().await).1, "wills/kept");
    rig.rule(&["wills/kept"], &["#"]);
    two.send(&[0xC0, 0]).await;
    let farewell = two.packet().await;
    assert_eq!((farewell[0], farewell[2]), (0xE0, 0x98), "{farewell:x?}");
    two.expect_closed().await;
    assert_eq!(rig.stored().await, [("wills/kept".to_owned(), b"gone".to_vec())]);
}

#[tokio::test]
async fn a_session_that_is_kept_is_its_users_alone() {
    let mut rig = Rig::new().await;
    let (alice, bob) = (ByteString::from_static("alice"), ByteString::from_static("bob"));
    let (id, other_id) = (ByteString::from_static("d1"), ByteString::from_static("d2"));
    let leave = |rig: &Rig, id, user| {
        let attached = rig.shared.sessions.attach(id, user, false, 60).unwrap();
        let inbound = crate::mqtt::session::Inbound::default();
        rig.shared.sessions.detach(&attached.kept.unwrap(), inbound, 60, Instant::now());
        attached.before.is_some()
    };
    assert!(!leave(&rig, &id, Some(&alice)));
    assert!(!leave(&rig, &other_id, None));
    for restarted in [false, true] {
        if restarted {
            rig = rig.restarted().await;
        }
        for user in [None, Some(&bob)] {
            for (clean_start, expiry_s) in [(false, 60), (true, 0)] {
                let refused = rig.shared.sessions.attach(&id, user, clean_start, expiry_s);
                assert_eq!(refused.err(), Some(Unattached::Anothers), "{user:?}");
            }
        }
        assert!(leave(&rig, &id, Some(&alice)), "it is still there");
        assert!(leave(&rig, &other_id, None));
    }
    assert!(!leave(&rig, &other_id, Some(&bob)), "what an anonymous client left is not taken over");
    assert!(leave(&rig, &other_id, Some(&bob)));

    // The client id's own client, over a connection: nobody is closed for who is not let in.
    let connect = ConnectPacket { client_id: "d1", ..ConnectPacket::new(V5) };
    assert_eq!(refused(&rig, &connect).await, 0x87);
    let connect = ConnectPacket { client_id: "d1", ..ConnectPacket::new(V3) };
    assert_eq!(refused(&rig, &connect).await, 5);
    rig.end().await;
}

#[tokio::test]
async fn who_comes_back_under_other_rules_gets_nothing_that_they_deny() {
    let rig = Rig::new().await;
    rig.rule(&["#"], &["a/#", "b/#"]);
    let mut reader = rig.client_with(&keeps(V3, "reader")).await;
    reader.send(&wire::subscribe(V3, 1, &[("a/#", 1), ("b/#", 1)])).await;
    reader.expect(&[0x90, 4, 0, 1, 1, 1]).await;
    reader.send(&[0xE0, 0]).await;
    reader.expect_closed().await;
    let mut writer = rig.client(V3).await;
    let payload = "x".repeat(100);
    for (id, topic) in [(1, "a/1"), (2, "b/1")] {
        writer.send(&wire::publish(V3, topic, Some(id), &payload)).await;
        writer.expect(&wire::puback(id)).await;
    }
    let queued = async {
        while rig.shared.sessions.stats().queued_bytes.load(Ordering::Relaxed) < 200 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, queued).await.unwrap();

    rig.rule(&["#"], &["b/#"]);
    let mut reader = rig.socket().await;
    reader.send(&keeps(V3, "reader").bytes()).await;
    reader.expect(&[0x20, 2, 1, 0]).await;
    assert_eq!(event_of(&reader.packet().await).1, "b/1", "a/1 waited before it");
    let mut writer = rig.client(V3).await;
    for (id, topic) in [(3, "a/2"), (4, "b/2")] {
        writer.send(&wire::publish(V3, topic, Some(id), "x")).await;
        writer.expect(&wire::puback(id)).await;
    }
    assert_eq!(event_of(&reader.packet().await).1, "b/2");
    // One subscription and the message that waited for it.
    assert_eq!(rig.count(|stats| &stats.denied), 2);
    rig.end().await;
}
