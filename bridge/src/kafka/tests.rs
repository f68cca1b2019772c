//! The Kafka sink against librdkafka's mock cluster, in this process.

use std::collections::BTreeSet;

use rdkafka::Message as _;
use rdkafka::Offset;
use rdkafka::TopicPartitionList;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{BorrowedMessage, Headers as _};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use storage::StoredEvent;

use super::*;
use crate::config::SinkConfig;
use crate::delivery::{Delivery, Limits, Moment};
use crate::fake;
use crate::retry::Backoff;
use crate::sink::{Failure, Which};

pub(super) const TOPIC: &str = "events";
const PARTITIONS: i32 = 3;

pub(super) type Cluster = MockCluster<'static, DefaultProducerContext>;

pub(super) fn cluster() -> Cluster {
    let cluster = MockCluster::new(1).expect("a mock cluster");
    cluster.create_topic(TOPIC, PARTITIONS, 1).expect("a topic");
    cluster
}

fn sink(cluster: &Cluster, delivery: KafkaDelivery, request_timeout: Duration) -> KafkaSink {
    let config = KafkaConfig { delivery, ..KafkaConfig::new(cluster.bootstrap_servers(), TOPIC) };
    let envelope = Envelope::new(&fake::origin(), SinkConfig::EVENT_TYPE);
    KafkaSink::new(config, envelope, request_timeout)
}

pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Events of three devices in turn.
pub(super) fn events(offsets: std::ops::Range<u64>) -> Vec<StoredEvent> {
    offsets.map(|o| fake::stored(o, &format!("dev-{}", o % 3), &format!("{{\"n\":{o}}}"))).collect()
}

pub(super) fn request(id: RequestId, events: Vec<StoredEvent>) -> Request {
    Request { id, stream: None, events: Arc::new(events) }
}

/// A record that arrived.
pub(super) struct Record {
    key: String,
    payload: Vec<u8>,
    pub(super) seq: u64,
    headers: Vec<(String, String)>,
}

impl Record {
    fn of(message: &BorrowedMessage<'_>) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        let headers: Vec<_> = message
            .headers()
            .expect("headers")
            .iter()
            .map(|header| (header.key.to_owned(), text(header.value.expect("a value"))))
            .collect();
        let id = &headers.iter().find(|(key, _)| key == "ce_id").expect("an id").1;
        Self {
            key: text(message.key().expect("a key")),
            payload: message.payload().expect("a payload").to_vec(),
            seq: id.rsplit('/').next().and_then(|seq| seq.parse().ok()).expect("a number"),
            headers,
        }
    }
}

/// Everything in the topic; each partition in its order.
pub(super) fn arrived(cluster: &Cluster) -> Vec<Record> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", cluster.bootstrap_servers())
        .set("group.id", "test")
        .set("enable.partition.eof", "true")
        .set("fetch.wait.max.ms", "10")
        .create()
        .expect("a consumer");
    let mut list = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        list.add_partition_offset(TOPIC, partition, Offset::Beginning).expect("an offset");
    }
    consumer.assign(&list).expect("assigned");
    let mut records = Vec::new();
    let mut ended = 0;
    while ended < PARTITIONS {
        match consumer.poll(PATIENCE) {
            Some(Ok(message)) => records.push(Record::of(&message)),
            Some(Err(KafkaError::PartitionEOF(_))) => ended += 1,
            Some(Err(error)) => panic!("{error}"),
            // An event of another kind.
            None => {}
        }
    }
    records
}

pub(super) fn seqs_of(records: &[Record], key: &str) -> Vec<u64> {
    records.iter().filter(|record| record.key == key).map(|record| record.seq).collect()
}

/// Runs a sink as a forwarder would, with pauses skipped, until all is delivered or dead-lettered;
/// gives the offsets of the dead letters.
pub(super) async fn deliver<S: Sink>(
    sink: &mut S,
    events: Vec<StoredEvent>,
    request_events: usize,
) -> Vec<u64> {
    let limits = Limits::new(request_events, 1 << 20, sink.window());
    let backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(10));
    let mut delivery = Delivery::new("kafka".into(), limits, backoff, 0);
    let next = events.last().expect("an event").offset + 1;
    delivery.push(storage::Read { events, next, missing: Vec::new() });
    let mut dead = Vec::new();
    let mut now = Moment::now();
    while !delivery.is_idle() {
        now.at += Duration::from_secs(1);
        dead.extend(delivery.letters().iter().map(|letter| letter.event.offset));
        let written = delivery.letters().len();
        delivery.letters_written(written);
        while let Some(request) = delivery.next_request(now) {
            sink.begin_reaching(request, || delivery.begun_to().into());
        }
        if delivery.in_flight() > 0 {
            sink.close();
            let (id, answer) = sink.answer().await;
            delivery.answer(id, &answer, now, 0.5);
        }
    }
    assert_eq!(delivery.cursor(), next);
    dead
}

pub(super) fn distinct(records: &[Record]) -> usize {
    records.iter().map(|record| record.seq).collect::<BTreeSet<_>>().len()
}

pub(super) fn assert_order(records: &[Record]) {
    for device in 0..3 {
        let seqs = seqs_of(records, &format!("dev-{device}"));
        let mut seen = BTreeSet::new();
        let first: Vec<_> = seqs.iter().copied().filter(|&seq| seen.insert(seq)).collect();
        assert!(first.is_sorted(), "dev-{device}: {first:?}");
    }
}

#[tokio::test]
async fn many_requests_in_flight_arrive_whole_and_in_order() {
    for delivery in [KafkaDelivery::Idempotent, KafkaDelivery::AtLeastOnce] {
        let cluster = cluster();
        let mut sink = sink(&cluster, delivery, PATIENCE);
        assert!(deliver(&mut sink, events(0..3_000), 100).await.is_empty());
        let records = arrived(&cluster);
        assert_eq!(records.len(), 3_000);
        for device in 0..3 {
            let expected: Vec<u64> = (device..3_000).step_by(3).collect();
            assert_eq!(seqs_of(&records, &format!("dev-{device}")), expected);
        }
    }
}

#[tokio::test]
async fn a_record_is_the_payload_with_cloudevents_headers() {
    let cluster = cluster();
    let mut sink = sink(&cluster, KafkaDelivery::Idempotent, PATIENCE);
    deliver(&mut sink, vec![fake::stored(42, "dev/ä", "{ \"t\" : 1 }")], 1).await;
    let records = arrived(&cluster);
    assert_eq!(records[0].key, "dev/ä");
    assert_eq!(records[0].payload, b"{ \"t\" : 1 }");
    let headers: Vec<_> =
        records[0].headers.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(
        headers,
        [
            ("ce_specversion", "1.0"),
            ("ce_id", "edge-01/00000000000000ab/0/42"),
            ("ce_source", "/edge-01/dev%2F%C3%A4"),
            ("ce_type", "edge.gateway.event"),
            ("ce_subject", "devices/dev/ä/t"),
            ("ce_time", "2023-11-14T22:13:20.000000Z"),
            ("content-type", "application/json"),
        ]
    );
}

#[tokio::test]
async fn errors_that_librdkafka_mends_are_not_even_seen() {
    let cluster = cluster();
    let mut sink = sink(&cluster, KafkaDelivery::Idempotent, PATIENCE);
    cluster.request_errors(
        RDKafkaApiKey::Produce,
        &[
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__TRANSPORT,
        ],
    );
    sink.begin(request(0, events(0..300)));
    assert_eq!(sink.answer().await, (0, Answer::delivered()));
    // The mock does not deduplicate what an idempotent producer repeats.
    assert_eq!(distinct(&arrived(&cluster)), 300);
}

#[tokio::test]
async fn an_event_too_large_is_named_and_its_neighbours_go_on() {
    let cluster = cluster();
    let mut sink = sink(&cluster, KafkaDelivery::Idempotent, PATIENCE);
    let mut events = events(0..6);
    events[4].event.payload = vec![0; 1_100_000].into();
    sink.begin(request(0, events));
    let (_, answer) = sink.answer().await;
    assert_eq!(answer.failed.len(), 1);
    assert_eq!(answer.failed[0].which, Which::These(vec![4]));
    assert_eq!(answer.failed[0].failure, Failure::Reject);
    assert!(answer.failed[0].reason.contains("too large"), "{answer:?}");
    assert_eq!(arrived(&cluster).len(), 5);
    // And the producer lives on.
    sink.begin(request(1, self::events(6..9)));
    assert_eq!(sink.answer().await, (1, Answer::delivered()));
}

#[tokio::test]
async fn a_batch_that_the_broker_refuses_is_taken_apart_and_nothing_is_lost() {
    for delivery in [KafkaDelivery::Idempotent, KafkaDelivery::AtLeastOnce] {
        let cluster = cluster();
        let mut sink = sink(&cluster, delivery, PATIENCE);
        let refusals = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE; 3];
        cluster.request_errors(RDKafkaApiKey::Produce, &refusals);
        // The mock refuses whatever comes next, three times, so nothing can be found guilty.
        let dead = deliver(&mut sink, events(0..300), 100).await;
        assert!(dead.is_empty(), "{dead:?}");
        let records = arrived(&cluster);
        // What was on the wire when the producer went may come twice.
        assert_eq!(distinct(&records), 300);
        if delivery == KafkaDelivery::Idempotent {
            assert_order(&records);
        }
    }
}

#[tokio::test]
async fn a_broker_that_refuses_one_event_finds_it_alone() {
    let cluster = cluster();
    let mut sink = sink(&cluster, KafkaDelivery::Idempotent, PATIENCE);
    cluster.request_errors(
        RDKafkaApiKey::Produce,
        &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_INVALID_RECORD; 2],
    );
    // Refused together, then the first alone; the second goes.
    let dead = deliver(&mut sink, vec![fake::stored(0, "d", "a"), fake::stored(1, "d", "b")], 2);
    assert_eq!(dead.await, [0]);
    assert_eq!(seqs_of(&arrived(&cluster), "d"), [1]);
}

#[tokio::test]
async fn an_unknown_topic_holds() {
    let cluster = cluster();
    let unknown = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    cluster.topic_error(TOPIC, unknown).expect("set");
    let mut sink = sink(&cluster, KafkaDelivery::Idempotent, PATIENCE);
    for id in 0..3 {
        sink.begin(request(id, events(id * 3..id * 3 + 3)));
    }
    for id in 0..3 {
        let (answered, answer) = sink.answer().await;
        assert_eq!(answered, id);
        assert!(answer.failed.iter().all(|f| f.failure == Failure::Hold), "{answer:?}");
        assert!(answer.failed[0].reason.contains("nknown"), "{answer:?}");
    }
    cluster.topic_error(TOPIC, RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR).expect("set");
    assert!(deliver(&mut sink, events(0..9), 3).await.is_empty());
    assert_order(&arrived(&cluster));
}

#[tokio::test]
async fn brokers_that_are_away_are_told_at_once_and_the_sink_comes_back() {
    for delivery in [KafkaDelivery::Idempotent, KafkaDelivery::AtLeastOnce] {
        let cluster = cluster();
        let mut sink = sink(&cluster, delivery, PATIENCE);
        cluster.broker_down(1).expect("down");
        sink.begin(request(0, events(0..50)));
        sink.begin(request(1, events(50..100)));
        for id in 0..2 {
            let (answered, answer) = sink.answer().await;
            assert_eq!(answered, id);
            assert_eq!(answer.failed[0].failure, Failure::Retry { after: None });
            assert!(answer.failed[0].reason.contains("no broker can be reached"), "{answer:?}");
        }
        cluster.broker_up(1).expect("up");
        assert!(deliver(&mut sink, events(0..100), 50).await.is_empty());
        assert_order(&arrived(&cluster));
    }
}

#[tokio::test]
async fn the_watchdog_ends_a_silence_and_the_sink_comes_back() {
    for delivery in [KafkaDelivery::Idempotent, KafkaDelivery::AtLeastOnce] {
        let cluster = cluster();
        let mut sink = sink(&cluster, delivery, Duration::from_millis(300));
        cluster.broker_round_trip_time(1, PATIENCE).expect("set");
        sink.begin(request(0, events(0..50)));
        sink.begin(request(1, events(50..100)));
        for id in 0..2 {
            let (answered, answer) = sink.answer().await;
            assert_eq!(answered, id);
            assert_eq!(answer.failed[0].failure, Failure::Retry { after: None });
            assert!(answer.failed[0].reason.contains("did not answer"), "{answer:?}");
        }
        cluster.broker_round_trip_time(1, Duration::ZERO).expect("set");
        sink.request_timeout = PATIENCE;
        assert!(deliver(&mut sink, events(0..100), 50).await.is_empty());
        assert_order(&arrived(&cluster));
    }
}

/// A gateway that stops does not wait for brokers that are away, even if they were there before.
#[tokio::test]
async fn a_sink_that_is_stopped_gives_up_on_brokers_that_are_away() {
    let cluster = cluster();
    let mut sink = sink(&cluster, KafkaDelivery::Idempotent, Duration::from_hours(1));
    assert!(deliver(&mut sink, events(0..3), 3).await.is_empty());
    cluster.broker_down(1).expect("down");
    sink.begin(request(9, events(3..6)));
    sink.stop();
    let (answered, answer) = sink.answer().await;
    assert_eq!(answered, 9);
    assert!(answer.failed[0].reason.contains("no broker can be reached"), "{answer:?}");
}

#[tokio::test]
async fn the_watchdog_does_not_count_idle_time() {
    let cluster = cluster();
    let mut sink = sink(&cluster, KafkaDelivery::Idempotent, PATIENCE);
    deliver(&mut sink, events(0..1), 1).await;
    // Slow enough that dropping the producer would be seen.
    cluster.broker_round_trip_time(1, Duration::from_millis(500)).expect("set");
    let long_ago = Instant::now().checked_sub(2 * PATIENCE).expect("up for a minute");
    sink.alive = (long_ago, sink.shared.ledger().moves());
    sink.begin(request(9, events(1..2)));
    assert_eq!(sink.answer().await, (9, Answer::delivered()));
}

#[tokio::test]
async fn lost_answers_and_restarts_leave_no_gap_and_no_disorder() {
    let cluster = cluster();
    let mut sink = sink(&cluster, KafkaDelivery::Idempotent, Duration::from_millis(500));
    let transport = RDKafkaRespErr::RD_KAFKA_RESP_ERR__TRANSPORT;
    let refused = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    let fine = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    cluster.request_errors(
        RDKafkaApiKey::Produce,
        &[fine, transport, fine, refused, fine, fine, refused, transport, transport, refused],
    );
    let dead = deliver(&mut sink, events(0..2_000), 50).await;
    assert!(dead.is_empty());
    let records = arrived(&cluster);
    assert_order(&records);
    assert_eq!(distinct(&records), 2_000);
}
