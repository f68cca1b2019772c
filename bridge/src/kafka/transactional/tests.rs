//! Transactions against librdkafka's mock cluster, which accepts them and keeps the group's offset. It
//! does not hide what was aborted: what a reader of committed records sees is for the real Kafka.

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use rdkafka::{Offset, TopicPartitionList};
use storage::{Ahead, Lanes, StoredEvent};

use super::*;
use crate::config::{KafkaDelivery, SinkConfig};
use crate::fake;
use crate::kafka::tests::{
    Cluster, PATIENCE, TOPIC, arrived, assert_order, cluster, deliver, distinct, events, request,
    seqs_of,
};
use crate::sink::OUTSIDE_ORDER;

/// What [`transactional`] keeps its cursor under.
const GROUP: &str = "gw-edge-01-kafka";

/// Over a log of [`events`].
fn transactional(cluster: &Cluster, log_end: u64) -> TransactionalSink {
    transactional_over(cluster, "kafka", events(0..log_end))
}

fn transactional_over(cluster: &Cluster, sink: &str, log: Vec<StoredEvent>) -> TransactionalSink {
    let delivery = KafkaDelivery::ExactlyOnce;
    let config = KafkaConfig { delivery, ..KafkaConfig::new(cluster.bootstrap_servers(), TOPIC) };
    let envelope = Envelope::new(&fake::origin(), SinkConfig::EVENT_TYPE);
    let place = Place::new(&fake::origin(), sink, &config);
    let log = Arc::new(move |from| Ok(fake::read(&log, from)));
    TransactionalSink::new(config, envelope, place, log, PATIENCE)
}

/// Leaves a mark as a sink of this store would that has sent all of `reach`: the mock keeps only what a
/// consumer commits.
fn leave_mark(cluster: &Cluster, group: &str, reach: Reach) {
    let end = reach.ahead.iter().map(|ahead| ahead.offsets.end).fold(reach.cursor, u64::max);
    let last = end.checked_sub(1).map(|last| Witness::of(&events(last..end)[0]));
    let place = transactional(cluster, 0).place;
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", cluster.bootstrap_servers())
        .set("group.id", group)
        .create()
        .expect("a consumer");
    let mut list = TopicPartitionList::new();
    let mark = place.mark(reach, last);
    let mut element = list.add_partition(&place.topic, 0);
    element.set_offset(Offset::Offset(mark.offset())).expect("an offset");
    element.set_metadata(mark.metadata());
    consumer.commit(&list, CommitMode::Sync).expect("committed");
}

#[tokio::test]
async fn a_sink_that_starts_again_sends_nothing_of_what_is_committed() {
    let cluster = cluster();
    leave_mark(&cluster, GROUP, 3_001.into());
    // Its own cursor did not survive: it begins at the start of the log again.
    let mut sink = transactional(&cluster, 4_000);
    assert!(deliver(&mut sink, events(0..4_000), 130).await.is_empty());
    let records = arrived(&cluster);
    assert_eq!(records.len(), 999);
    for device in 0..3 {
        let expected: Vec<u64> = (3_001..4_000).filter(|seq| seq % 3 == device).collect();
        assert_eq!(seqs_of(&records, &format!("dev-{device}")), expected);
    }
}

/// Streams as an earlier process has left them are told of before anything is sent, and what is done
/// of each is not sent again.
#[tokio::test]
async fn streams_that_were_split_are_told_of_and_each_goes_on_where_it_was() {
    let cluster = cluster();
    let ahead = Ahead { lanes: Lanes::ALL, offsets: 60..80 };
    let left = Reach { cursor: 20, ahead: vec![ahead] };
    leave_mark(&cluster, GROUP, left.clone());
    let mut sink = transactional(&cluster, 100);
    sink.begin_reaching(request(0, events(0..50)), || 50.into());
    sink.begin(request(OUTSIDE_ORDER, events(3..4)));
    for id in [0, OUTSIDE_ORDER] {
        let (answered, answer) = sink.answer().await;
        assert_eq!((answered, answer.was_taken_back()), (id, true), "{answer:?}");
        assert_eq!(sink.found(), (id == 0).then(|| left.clone()));
    }
    // Both streams, in turn, and a dead letter that was requeued: it is sent and moves nothing.
    let reach = |backlog: u64, live: u64| Reach {
        cursor: backlog,
        ahead: vec![Ahead { lanes: Lanes::ALL, offsets: 60..live }],
    };
    sink.begin_reaching(request(1, events(10..30)), || reach(30, 60));
    sink.begin_reaching(request(2, events(60..90)), || reach(30, 90));
    sink.begin(request(OUTSIDE_ORDER + 1, events(3..4)));
    sink.close();
    for id in [1, 2, OUTSIDE_ORDER + 1] {
        assert_eq!(sink.answer().await, (id, Answer::delivered()));
    }
    assert_eq!(sink.done, reach(30, 90));
    let mut seqs: Vec<u64> = arrived(&cluster).iter().map(|record| record.seq).collect();
    seqs.sort_unstable();
    assert_eq!(seqs, [3].into_iter().chain(20..30).chain(80..90).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_stands_under_a_former_name_is_taken_over() {
    let cluster = cluster();
    let mut sink = transactional_over(&cluster, "kafka-1", events(0..30));
    leave_mark(&cluster, "gw-edge-01-kafka-1", 20.into());
    assert_eq!(sink.place.name, "gw-edge-01-kafka~1");
    assert!(deliver(&mut sink, events(0..30), 10).await.is_empty());
    assert_eq!(arrived(&cluster).len(), 10);
    // What stands under its own name goes before: the other may belong to another gateway.
    leave_mark(&cluster, "gw-edge-01-kafka~1", 30.into());
    leave_mark(&cluster, "gw-edge-01-kafka-1", 0.into());
    let mut sink = transactional_over(&cluster, "kafka-1", events(0..30));
    assert!(deliver(&mut sink, events(0..30), 10).await.is_empty());
    assert_eq!(arrived(&cluster).len(), 10);
}

/// A store was put back from a copy: Kafka has events of its former life under the offsets that it
/// gives to new ones. That the new ones reach as far by the time that Kafka is asked, as after an
/// outage and a restart, does not make them the old ones.
#[tokio::test]
async fn a_store_that_was_put_back_is_held_however_much_it_has_taken_in_since() {
    let cluster = cluster();
    leave_mark(&cluster, GROUP, 51.into());
    let mut new = events(50..60);
    for stored in &mut new {
        stored.event.received_us += 1;
    }
    let grown = [events(0..50), new].concat();
    for log in [events(0..50), grown] {
        let mut restored = transactional_over(&cluster, "kafka", log.clone());
        for id in 0..2 {
            restored.begin_reaching(request(id, log.clone()), || (log.len() as u64).into());
            let (_, answer) = restored.answer().await;
            assert_eq!(answer.failed[0].failure, Failure::Hold);
            assert!(answer.failed[0].reason.contains("restored from a copy"), "{answer:?}");
        }
    }
    assert!(arrived(&cluster).is_empty());
}

/// What was filtered is in the mark, and was never sent: a copy may have other events there.
#[tokio::test]
async fn what_lies_beyond_the_last_event_that_was_sent_is_sent() {
    let cluster = cluster();
    let mut before = transactional(&cluster, 10);
    before.begin_reaching(request(0, events(0..5)), || 10.into());
    before.close();
    assert_eq!(before.answer().await, (0, Answer::delivered()));
    let mark = before.mark.clone().expect("committed");
    let resumed =
        before.place.resume(Some(&mark), &*before.log).expect("its own").expect("a cursor");
    assert_eq!((mark.reach(), resumed.reach()), (&10.into(), &5.into()));
}

#[tokio::test]
async fn a_transaction_is_answered_as_one_and_only_once_it_is_closed() {
    let cluster = cluster();
    let mut sink = transactional(&cluster, 9);
    sink.config.transaction_time_max = Duration::from_hours(1);
    for id in 0..3 {
        sink.begin_reaching(request(id, events(id * 3..id * 3 + 3)), || (id * 3 + 3).into());
    }
    let early = tokio::time::timeout(Duration::from_millis(300), sink.answer()).await;
    assert!(early.is_err(), "{early:?}");
    sink.close();
    for id in 0..3 {
        assert_eq!(sink.answer().await, (id, Answer::delivered()));
    }
    assert_eq!(sink.done, 9.into());
}

#[tokio::test]
async fn an_event_too_large_for_a_transaction_is_refused_and_the_rest_goes_on() {
    // Too large by itself, and too large only with its headers.
    for payload_bytes in [1_100_000, 999_800] {
        let cluster = cluster();
        let mut sink = transactional(&cluster, 100);
        let mut events = events(0..100);
        for place in [0, 41, 42, 99] {
            events[place].event.payload = vec![0; payload_bytes].into();
        }
        let dead = deliver(&mut sink, events, 10).await;
        assert_eq!(dead, [0, 41, 42, 99], "{payload_bytes}");
        // The mock does not hide what was aborted.
        let records = arrived(&cluster);
        assert_eq!(distinct(&records), 96);
        assert_order(&records);
    }
}

#[tokio::test]
async fn any_error_in_a_transaction_starts_over_and_nothing_is_lost() {
    let cluster = cluster();
    let mut sink = transactional(&cluster, 2_000);
    let refused = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    let fine = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    cluster.request_errors(RDKafkaApiKey::Produce, &[fine, refused, fine, fine, refused]);
    let failed = RDKafkaRespErr::RD_KAFKA_RESP_ERR_INVALID_TXN_STATE;
    cluster.request_errors(RDKafkaApiKey::EndTxn, &[fine, failed]);
    cluster.request_errors(RDKafkaApiKey::TxnOffsetCommit, &[fine, fine, failed]);
    assert!(deliver(&mut sink, events(0..2_000), 50).await.is_empty());
    let records = arrived(&cluster);
    assert_order(&records);
    assert_eq!(distinct(&records), 2_000);
}

#[tokio::test]
async fn a_transactional_sink_without_brokers_says_so_and_stops_at_once() {
    let cluster = cluster();
    cluster.broker_down(1).expect("down");
    let mut sink = transactional(&cluster, 9);
    sink.begin_reaching(request(0, events(0..9)), || 9.into());
    let (_, answer) = sink.answer().await;
    assert_eq!(answer.failed[0].failure, Failure::Retry { after: None });
    assert!(answer.failed[0].reason.contains("no broker can be reached"), "{answer:?}");
    // With brokers that take connections and do not answer, it is the end of the gateway that ends it.
    cluster.broker_up(1).expect("up");
    cluster.broker_round_trip_time(1, Duration::from_hours(1)).expect("set");
    sink.request_timeout = Duration::from_hours(1);
    sink.begin_reaching(request(1, events(0..9)), || 9.into());
    sink.stop();
    let (answered, answer) = sink.answer().await;
    assert_eq!(answered, 1);
    assert_eq!(answer.failed[0].failure, Failure::Retry { after: None });
}
