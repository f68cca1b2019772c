//! The MQTT sink against a broker on loopback that does as it is told.

use std::sync::Mutex;

use bytes::{Bytes, BytesMut};
use rumqttc::v5::mqttbytes::Error as CodecError;
use rumqttc::v5::mqttbytes::v5::{
    ConnAck, ConnAckProperties, ConnectReturnCode, DisconnectReasonCode, PubAck, PubAckReason,
    Publish,
};
use storage::StoredEvent;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::config::{Secret, SecretSource, Target, UserProperties};
use crate::fake;
use crate::sink::{Answer, Which};
use crate::template::Template;

const RETRY: Failure = Failure::Retry { after: None };

/// What the broker does about a PUBLISH.
enum Deed {
    Ack(PubAckReason),
    /// Nothing, for ever.
    Silence,
    Disconnect(DisconnectReasonCode),
    /// Bytes of its own.
    Say(&'static [u8]),
    Close,
}

/// Client id, and user name with password, of a CONNECT.
type Connected = (String, Option<(String, String)>);
type Behaviour = Box<dyn FnMut(&Publish) -> Deed + Send>;

struct Shared {
    behaviour: Mutex<Behaviour>,
    connack: Mutex<(ConnectReturnCode, Option<u32>)>,
    taken: Mutex<Vec<Publish>>,
    connects: Mutex<Vec<Connected>>,
}

struct Broker {
    port: u16,
    shared: Arc<Shared>,
    _server: JoinSet<()>,
}

impl Broker {
    async fn start(behaviour: impl FnMut(&Publish) -> Deed + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(Box::new(behaviour)),
            connack: Mutex::new((ConnectReturnCode::Success, None)),
            taken: Mutex::default(),
            connects: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&serving)));
            }
        });
        Self { port, shared, _server: server }
    }

    fn behave(&self, behaviour: impl FnMut(&Publish) -> Deed + Send + 'static) {
        *self.shared.behaviour.lock().unwrap() = Box::new(behaviour);
    }

    /// Sequence numbers of what it acked, in order.
    fn seqs(&self) -> Vec<u64> {
        let taken = self.shared.taken.lock().unwrap();
        let seq = |publish: &Publish| property(publish, "sequence").parse().expect("a number");
        taken.iter().map(seq).collect()
    }

    fn sink(&self) -> MqttSink {
        sink(MqttConfig::new("127.0.0.1", self.port))
    }
}

fn property(publish: &Publish, name: &str) -> String {
    let properties = publish.properties.as_ref().expect("properties");
    let found = properties.user_properties.iter().find(|(key, _)| key == name);
    found.map(|(_, value)| value.clone()).unwrap_or_default()
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>) -> std::io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        let packet = match Packet::read(&mut buffer, Some(1 << 20)) {
            Ok(packet) => packet,
            Err(CodecError::InsufficientBytes(_)) => {
                if stream.read_buf(&mut buffer).await? == 0 {
                    return Ok(());
                }
                continue;
            }
            Err(error) => panic!("no MQTT: {error}"),
        };
        let mut out = BytesMut::new();
        match packet {
            Packet::Connect(connect, _, login) => {
                let login = login.map(|login| (login.username, login.password));
                shared.connects.lock().unwrap().push((connect.client_id, login));
                let (code, max_packet_size) = *shared.connack.lock().unwrap();
                let properties = ConnAckProperties {
                    session_expiry_interval: None,
                    receive_max: Some(20),
                    max_qos: None,
                    retain_available: None,
                    max_packet_size,
                    assigned_client_identifier: None,
                    topic_alias_max: None,
                    reason_string: None,
                    user_properties: Vec::new(),
                    wildcard_subscription_available: None,
                    subscription_identifiers_available: None,
                    shared_subscription_available: None,
                    server_keep_alive: Some(0),
                    response_information: None,
                    server_reference: None,
                    authentication_method: None,
                    authentication_data: None,
                };
                let ack = ConnAck { session_present: false, code, properties: Some(properties) };
                ack.write(&mut out).expect("written");
            }
            Packet::Publish(publish) => {
                let deed = (shared.behaviour.lock().unwrap())(&publish);
                match deed {
                    Deed::Ack(reason) => {
                        let ack = PubAck { reason, ..PubAck::new(publish.pkid, None) };
                        ack.write(&mut out).expect("written");
                        if reason == PubAckReason::Success {
                            shared.taken.lock().unwrap().push(publish);
                        }
                    }
                    Deed::Silence => {}
                    Deed::Disconnect(code) => {
                        // The client's own codec writes a wrong length.
                        out.extend_from_slice(&[0xe0, 2, code as u8, 0]);
                    }
                    Deed::Say(bytes) => {
                        out.extend_from_slice(bytes);
                        out.extend_from_slice(&publish.pkid.to_be_bytes());
                        out.extend_from_slice(&[0x95, 0]);
                    }
                    Deed::Close => return Ok(()),
                }
            }
            Packet::PingReq(_) => out.extend_from_slice(&[0xd0, 0]),
            other => panic!("not of this sink: {other:?}"),
        }
        stream.write_all(&out).await?;
    }
}

fn sink(config: MqttConfig) -> MqttSink {
    sink_with(config, Duration::from_secs(20))
}

fn sink_with(config: MqttConfig, request_timeout: Duration) -> MqttSink {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let envelope = Envelope::new(&fake::origin(), SinkConfig::EVENT_TYPE);
    let own = SinkConfig::new("north", Target::Mqtt(config.clone()));
    MqttSink::new(config, envelope, &SinkConfig { request_timeout, ..own })
}

fn request(id: RequestId, seqs: std::ops::Range<u64>) -> Request {
    let events = seqs.map(|seq| fake::stored(seq, "dev-1", &format!("{{\"n\":{seq}}}")));
    Request { id, stream: None, events: Arc::new(events.collect()) }
}

async fn ask(sink: &mut MqttSink, id: RequestId, seqs: std::ops::Range<u64>) -> Answer {
    sink.begin(request(id, seqs));
    let (answered, answer) = sink.answer().await;
    assert_eq!(answered, id);
    answer
}

/// What failed, and how: indexes by failure, with the first reason.
fn failures(answer: &Answer) -> Vec<(Failure, Vec<usize>, &str)> {
    let indexes = |which: &Which| match which {
        Which::All => panic!("each is named"),
        Which::These(indexes) => indexes.clone(),
    };
    answer.failed.iter().map(|f| (f.failure, indexes(&f.which), &*f.reason)).collect()
}

#[tokio::test]
async fn many_requests_in_flight_arrive_whole_and_in_order() {
    let broker = Broker::start(|_| Deed::Ack(PubAckReason::Success)).await;
    let mut sink = broker.sink();
    for id in 0..10 {
        sink.begin(request(id, id * 50..(id + 1) * 50));
    }
    for _ in 0..10 {
        assert_eq!(sink.answer().await.1, Answer::delivered());
    }
    assert!(broker.seqs().into_iter().eq(0..500));
    let connects = broker.shared.connects.lock().unwrap();
    assert_eq!(*connects, [("edge-01-north".to_owned(), None)], "one connection");
}

#[tokio::test]
async fn a_publish_is_the_payload_with_cloudevents_properties() {
    let broker = Broker::start(|_| Deed::Ack(PubAckReason::Success)).await;
    let config = MqttConfig {
        topic: Template::parse("up/{gateway}/{device}/{3}").expect("a template"),
        client_id: Some("me".into()),
        credentials: Some(("gw".into(), Some(SecretSource::Inline(Secret::new("pw"))))),
        ..MqttConfig::new("localhost", broker.port)
    };
    assert_eq!(ask(&mut sink(config.clone()), 0, 5..6).await, Answer::delivered());
    let id = MqttConfig { user_properties: UserProperties::Id, ..config.clone() };
    assert_eq!(ask(&mut sink(id), 0, 5..6).await, Answer::delivered());
    let none = MqttConfig { user_properties: UserProperties::None, ..config };
    assert_eq!(ask(&mut sink(none), 0, 5..6).await, Answer::delivered());
    let taken = broker.shared.taken.lock().unwrap();
    let [full, id, none] = &taken[..] else { panic!("three: {taken:?}") };
    assert_eq!(full.topic, "up/edge-01/dev-1/t");
    assert_eq!(full.payload, "{\"n\":5}");
    assert!(!full.retain && !full.dup);
    let properties = full.properties.as_ref().expect("properties");
    assert_eq!(properties.content_type.as_deref(), Some("application/json"));
    for (name, value) in [
        ("specversion", "1.0"),
        ("id", "edge-01/00000000000000ab/0/5"),
        ("source", "/edge-01/dev-1"),
        ("type", SinkConfig::EVENT_TYPE),
        ("subject", "devices/dev-1/t"),
        ("time", "2023-11-14T22:13:20.000000Z"),
        ("partitionkey", "dev-1"),
        ("sequence", "00000000000000000005"),
    ] {
        assert_eq!(property(full, name), value, "{name}");
    }
    let properties = id.properties.as_ref().expect("properties");
    assert_eq!(properties.user_properties.len(), 1);
    assert_eq!(property(id, "id"), "edge-01/00000000000000ab/0/5");
    assert!(none.properties.as_ref().is_none_or(|p| p.user_properties.is_empty()));
    let connects = broker.shared.connects.lock().unwrap();
    assert_eq!(connects[0], ("me".to_owned(), Some(("gw".to_owned(), "pw".to_owned()))));
}

#[tokio::test]
async fn every_refusal_of_a_publish_is_sorted() {
    let broker = Broker::start(|_| Deed::Silence).await;
    let mut sink = broker.sink();
    for (id, (reason, expected)) in (0..).zip([
        (PubAckReason::NoMatchingSubscribers, None),
        (PubAckReason::QuotaExceeded, Some(RETRY)),
        (PubAckReason::UnspecifiedError, Some(RETRY)),
        (PubAckReason::NotAuthorized, Some(Failure::Hold)),
        (PubAckReason::PayloadFormatInvalid, Some(Failure::Reject)),
        (PubAckReason::TopicNameInvalid, Some(Failure::Reject)),
    ]) {
        broker.behave(move |_| Deed::Ack(reason));
        let answer = ask(&mut sink, id, 0..1).await;
        let failed: Vec<_> = failures(&answer).into_iter().map(|f| f.0).collect();
        assert_eq!(failed, expected.into_iter().collect::<Vec<_>>(), "{reason:?}");
    }
}

#[tokio::test]
async fn a_refused_event_goes_alone_and_its_neighbours_are_taken() {
    let broker = Broker::start(|publish| {
        let bad = property(publish, "sequence").ends_with('3');
        Deed::Ack(if bad { PubAckReason::PayloadFormatInvalid } else { PubAckReason::Success })
    })
    .await;
    let mut sink = broker.sink();
    let answer = ask(&mut sink, 0, 0..10).await;
    let reason = "PUBACK PayloadFormatInvalid";
    assert_eq!(failures(&answer), [(Failure::Reject, vec![3], reason)]);
    assert_eq!(broker.seqs(), [0, 1, 2, 4, 5, 6, 7, 8, 9]);
}

#[tokio::test]
async fn what_was_not_acked_when_the_connection_broke_is_answered_for_and_the_sink_comes_back() {
    let mut publishes = 0;
    let broker = Broker::start(move |_| {
        publishes += 1;
        if publishes == 5 { Deed::Close } else { Deed::Ack(PubAckReason::Success) }
    })
    .await;
    let mut sink = broker.sink();
    sink.begin(request(0, 0..8));
    sink.begin(request(1, 8..10));
    let (_, first) = sink.answer().await;
    let [(failure, open, _)] = &failures(&first)[..] else { panic!("{first:?}") };
    assert_eq!((*failure, open.last()), (RETRY, Some(&7)));
    // An ack on the wire may have been lost with the connection: no more than was taken is missing.
    assert!(open[0] <= 4 && open.len() == 8 - open[0], "{open:?}");
    let (_, second) = sink.answer().await;
    assert_eq!(failures(&second)[0].1, [0, 1]);
    assert_eq!(ask(&mut sink, 2, 4..10).await, Answer::delivered());
    assert!(broker.seqs().ends_with(&[4, 5, 6, 7, 8, 9]));
}

#[tokio::test]
async fn a_broker_that_hangs_up_on_one_event_makes_it_a_suspect() {
    // 0x40 with reason 0x95: what some brokers say to a payload that is too large for them.
    for deed in
        [|| Deed::Disconnect(DisconnectReasonCode::PacketTooLarge), || Deed::Say(&[0x40, 4])]
    {
        let broker = Broker::start(move |_| deed()).await;
        let mut sink = broker.sink();
        let answer = ask(&mut sink, 0, 0..1).await;
        let failed = failures(&answer);
        assert_eq!((failed[0].0, &failed[0].1[..]), (Failure::Suspect, &[0][..]), "{answer:?}");
    }
}

#[tokio::test]
async fn an_event_larger_than_the_broker_takes_is_named_and_harms_nobody() {
    let broker = Broker::start(|_| Deed::Ack(PubAckReason::Success)).await;
    broker.shared.connack.lock().unwrap().1 = Some(2_000);
    let mut sink = broker.sink();
    let event =
        |offset, bytes: usize| -> StoredEvent { fake::stored(offset, "d", &"x".repeat(bytes)) };
    let events = Arc::new(vec![event(0, 10), event(1, 3_000), event(2, 10)]);
    // Before the broker has said so it costs a connection, later nothing.
    for (id, neighbours) in [(0, vec![2]), (1, vec![])] {
        sink.begin(Request { id, stream: None, events: Arc::clone(&events) });
        let (_, answer) = sink.answer().await;
        let failed = failures(&answer);
        let rejected = failed.iter().find(|f| f.0 == Failure::Reject).expect("one is too large");
        assert_eq!(rejected.1, [1]);
        assert!(rejected.2.contains("2000 bytes"), "{}", rejected.2);
        let again: Vec<_> =
            failed.iter().filter(|f| f.0 == RETRY).flat_map(|f| f.1.clone()).collect();
        assert!(again.ends_with(&neighbours), "{failed:?}");
    }
    assert_eq!(broker.seqs().iter().filter(|&&seq| seq == 2).count(), 1);
}

#[tokio::test]
async fn a_refused_connection_says_what_to_do() {
    let broker = Broker::start(|_| Deed::Silence).await;
    let mut sink = broker.sink();
    for (id, (code, expected, advice)) in (0..).zip([
        (ConnectReturnCode::BadUserNamePassword, Failure::Hold, "password"),
        (ConnectReturnCode::NotAuthorized, Failure::Hold, "password"),
        (ConnectReturnCode::ClientIdentifierNotValid, Failure::Hold, "client_id"),
        (ConnectReturnCode::ServerMoved, Failure::Hold, "url"),
        (ConnectReturnCode::ServerBusy, RETRY, "ServerBusy"),
        (ConnectReturnCode::QuotaExceeded, RETRY, "QuotaExceeded"),
    ]) {
        broker.shared.connack.lock().unwrap().0 = code;
        let answer = ask(&mut sink, id, 0..2).await;
        let [(failure, all, reason)] = &failures(&answer)[..] else { panic!("{answer:?}") };
        assert_eq!((*failure, &all[..]), (expected, &[0, 1][..]), "{code:?}");
        assert!(reason.contains(advice), "{reason}");
    }
}

#[tokio::test]
async fn the_watchdog_ends_a_silence_and_nobody_there_is_a_retry() {
    let broker = Broker::start(|_| Deed::Silence).await;
    let config = MqttConfig::new("127.0.0.1", broker.port);
    let mut sink = sink_with(config.clone(), Duration::from_millis(100));
    let answer = ask(&mut sink, 0, 0..2).await;
    let [(RETRY, _, reason)] = failures(&answer)[..] else { panic!("{answer:?}") };
    assert!(reason.contains("did not answer within 100ms"), "{reason}");
    broker.behave(|_| Deed::Ack(PubAckReason::Success));
    assert_eq!(ask(&mut sink, 1, 0..2).await, Answer::delivered());

    drop(broker);
    let mut sink = sink_with(config, Duration::from_secs(20));
    let answer = ask(&mut sink, 0, 0..1).await;
    let [(RETRY, _, reason)] = failures(&answer)[..] else { panic!("{answer:?}") };
    assert!(reason.contains("refused"), "{reason}");
}

#[tokio::test]
async fn an_event_without_a_topic_to_publish_to_is_refused_alone() {
    let broker = Broker::start(|_| Deed::Ack(PubAckReason::Success)).await;
    let mut sink = sink(MqttConfig {
        topic: Template::parse("up/{device}").expect("a template"),
        ..MqttConfig::new("127.0.0.1", broker.port)
    });
    let events = vec![fake::stored(0, "a+b", "x"), fake::stored(1, "good", "x")];
    sink.begin(Request { id: 0, stream: None, events: Arc::new(events) });
    let (_, answer) = sink.answer().await;
    let [(Failure::Reject, ref bad, reason)] = failures(&answer)[..] else { panic!("{answer:?}") };
    assert_eq!(bad, &[0]);
    assert!(reason.contains("up/a+b"), "{reason}");
    assert_eq!(broker.seqs(), [1]);
    let payload: Bytes = broker.shared.taken.lock().unwrap()[0].payload.clone();
    assert_eq!(payload, "x");
}

#[tokio::test]
async fn a_missing_password_file_holds_and_names_it() {
    let missing = SecretSource::File("/nonexistent/password".into());
    let config = MqttConfig {
        credentials: Some(("gw".into(), Some(missing))),
        ..MqttConfig::new("127.0.0.1", 1)
    };
    let answer = ask(&mut sink(config), 0, 0..1).await;
    let [(Failure::Hold, _, reason)] = failures(&answer)[..] else { panic!("{answer:?}") };
    assert!(reason.contains("/nonexistent/password"), "{reason}");
}
