//! Into Kafka: librdkafka's mock cluster for errors of brokers and requests, and a real Apache Kafka
//! for what only the real one shows. The latter needs Java and Maven and is skipped loudly without.

mod harness;

use harness::kafka::{Broker, read_topic};
use harness::{Bench, eventually, sink};
use rdkafka::mocking::MockCluster;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

const TOPIC: &str = "events";

fn kafka_sink(brokers: &str, delivery: &str) -> String {
    format!(
        r#"
[[sink]]
name = "bus"
type = "kafka"
brokers = "{brokers}"
topic = "{TOPIC}"
delivery = "{delivery}"
retry_backoff_min = "20ms"
retry_backoff_max = "500ms"
"#
    )
}

/// Brokers refuse requests and go away; everything arrives, in order.
async fn errors_are_retried(own_seed: u64, delivery: &str) {
    let bench = Bench::new(own_seed);
    let cluster = MockCluster::new(3).unwrap();
    cluster.create_topic(TOPIC, 4, 3).unwrap();
    bench.configure(&kafka_sink(&cluster.bootstrap_servers(), delivery));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 2_000.0);
    let acked = async |events: u64| {
        let enough = fleet.counters().acked + events;
        eventually("events are acked", async || (fleet.counters().acked >= enough).then_some(()))
            .await;
    };

    acked(500).await;
    cluster.request_errors(
        RDKafkaApiKey::Produce,
        &[
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
        ],
    );
    acked(500).await;
    for broker in 1..=3 {
        cluster.broker_down(broker).unwrap();
    }
    // Every broker is away: the devices do not notice, and the backlog grows.
    acked(1_000).await;
    gateway.until("a backlog", |status| sink(status, "bus").lag_events >= 500).await;
    assert_eq!(gateway.get("/health/ready").await.0, 200);
    for broker in 1..=3 {
        cluster.broker_up(broker).unwrap();
    }
    acked(500).await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("bus").await;
    assert_eq!(sink(&status, "bus").dead_letters, 0);
    assert_eq!(gateway.terminate().await, Some(0));
    let ledger = bench.received("bus");
    read_topic(&cluster.bootstrap_servers(), TOPIC, &ledger).await;
    bench.assert_balanced("bus");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idempotent_sink_rides_out_errors_of_brokers() {
    errors_are_retried(31, "idempotent").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_at_least_once_sink_rides_out_errors_of_brokers() {
    errors_are_retried(32, "at_least_once").await;
}

/// A real broker that wants a password: a wrong one holds the sink, and the right one, written to the
/// file, ends that without a restart; a topic that does not exist yet holds it too, and loses nothing;
/// then it is created; then the broker is killed and comes back, and the gateway is killed too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_kafka_gets_everything_through_kills_of_both_sides() {
    let mut broker = match Broker::start_secure().await {
        Ok(broker) => broker,
        Err(missing) => return harness::skip("a real Kafka", &missing),
    };
    let bench = Bench::new(33);
    let password = bench.path("password");
    std::fs::write(&password, "wrong\n").unwrap();
    bench.configure(&format!(
        "{}[sink.sasl]\nmechanism = \"plain\"\nusername = \"gw\"\npassword_file = {password:?}\n",
        kafka_sink(broker.said("sasl_plaintext"), "idempotent")
    ));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 1_000.0);
    let held = async |what: &str| {
        let found = gateway
            .until(what, |status| {
                let sink = sink(status, "bus");
                let error = sink.error.as_deref().unwrap_or_default().to_lowercase();
                sink.state == "held" && error.contains(what)
            })
            .await;
        assert_eq!(sink(&found, "bus").dead_letters, 0);
    };
    held("authentication").await;
    std::fs::write(&password, "pw\n").unwrap();
    held("topic").await;

    broker.create_topic(TOPIC, 4).await;
    gateway
        .until("the topic is found", |status| sink(status, "bus").delivered_events_total > 1_000)
        .await;
    broker.kill().await;
    let enough = fleet.counters().acked + 1_000;
    eventually("acked without Kafka", async || (fleet.counters().acked >= enough).then_some(()))
        .await;
    broker.restart().await;
    let cursor = sink(&gateway.status().await, "bus").cursor;
    gateway.until("it delivers again", |status| sink(status, "bus").cursor > cursor).await;
    gateway.kill().await;

    let gateway = bench.start().await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("bus").await;
    assert_eq!((status.store.losses, sink(&status, "bus").dead_letters), (0, 0));
    assert_eq!(gateway.terminate().await, Some(0));
    let ledger = bench.received("bus");
    read_topic(&broker.bootstrap(), TOPIC, &ledger).await;
    bench.assert_balanced("bus");
}
