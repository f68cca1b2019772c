//! A Kafka consumer that reads a topic from its beginning and writes the received ledger.
//!
//! Reads every partition without a consumer group and commits nothing; of transactions only what
//! was committed (librdkafka's default). Within a Kafka partition the order of the ledger is the
//! order of the partition; a device's events, keyed by device, share one.
//! Invariant: the ledger is written anew, because reading starts anew.
//! Deliberately absent: partitions that are added while it reads.

use std::{
    collections::HashMap,
    fs::File,
    io,
    path::Path,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::{BorrowedMessage, Headers},
    metadata::MetadataPartition,
};
use tokio_util::sync::CancellationToken;

use super::{Arrived, CollectCounters, Recorder, cloudevents, sequence::Row};
use crate::payload;

/// How long one look at the broker may take.
const POLL: Duration = Duration::from_millis(100);
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);
/// Events that are recorded together, at most.
const BATCH_EVENTS_MAX: usize = 1000;

/// What to read.
#[derive(Clone, Debug)]
pub struct KafkaSource {
    /// `host:port`, several with commas between.
    pub brokers: String,
    /// Topic.
    pub topic: String,
    /// Other librdkafka properties, for example for SASL.
    pub properties: HashMap<String, String>,
}

/// Reads until no event came for `idle_max`, or until cancelled. Blocks: not for async workers.
/// `progress` is called about ten times a second.
///
/// # Errors
/// The ledger cannot be written, a property is wrong, or the topic did not appear in `idle_max`.
pub fn collect(
    source: &KafkaSource,
    ledger: &Path,
    idle_max: Duration,
    cancel: &CancellationToken,
    mut progress: impl FnMut(CollectCounters),
) -> io::Result<CollectCounters> {
    File::create(ledger)?;
    let recorder = Recorder::append_to(ledger)?;
    let mut config = ClientConfig::new();
    config.set("group.id", "firmware-sim-collect").set("enable.auto.commit", "false");
    for (name, value) in &source.properties {
        config.set(name, value);
    }
    config.set("bootstrap.servers", &source.brokers);
    let consumer: BaseConsumer = config.create().map_err(io::Error::other)?;
    let Some(partitions) = find_partitions(&consumer, &source.topic, idle_max, cancel)? else {
        return Ok(recorder.counters());
    };
    let mut assignment = TopicPartitionList::new();
    for partition in partitions {
        assignment
            .add_partition_offset(&source.topic, partition, Offset::Beginning)
            .map_err(io::Error::other)?;
    }
    consumer.assign(&assignment).map_err(io::Error::other)?;

    let mut batch = Vec::with_capacity(BATCH_EVENTS_MAX);
    let mut latest = Instant::now();
    while !cancel.is_cancelled() && latest.elapsed() < idle_max {
        // Takes what is there; waits only for the first.
        let mut wait = POLL;
        while batch.len() < BATCH_EVENTS_MAX {
            match consumer.poll(wait) {
                Some(Ok(message)) => batch.push(read(&message)),
                // librdkafka goes on by itself; a broker that stays away ends the idle time.
                Some(Err(error)) => tracing::warn!(%error, "kafka"),
                None => break,
            }
            wait = Duration::ZERO;
        }
        if !batch.is_empty() {
            recorder.record(&batch)?;
            batch.clear();
            latest = Instant::now();
        }
        progress(recorder.counters());
    }
    Ok(recorder.counters())
}

fn find_partitions(
    consumer: &BaseConsumer,
    topic: &str,
    wait_max: Duration,
    cancel: &CancellationToken,
) -> io::Result<Option<Vec<i32>>> {
    let started = Instant::now();
    loop {
        if cancel.is_cancelled() {
            return Ok(None);
        }
        let problem = match consumer.fetch_metadata(Some(topic), METADATA_TIMEOUT) {
            Ok(metadata) => {
                let partitions: Vec<_> = metadata
                    .topics()
                    .iter()
                    .filter(|found| found.name() == topic && found.error().is_none())
                    .flat_map(|found| found.partitions().iter().map(MetadataPartition::id))
                    .collect();
                if !partitions.is_empty() {
                    return Ok(Some(partitions));
                }
                format!("no topic {topic:?}")
            }
            Err(error) => error.to_string(),
        };
        if started.elapsed() >= wait_max {
            return Err(io::Error::other(problem));
        }
        tracing::info!(problem, "waiting for the topic");
        std::thread::sleep(POLL);
    }
}

fn read(message: &BorrowedMessage<'_>) -> Arrived {
    let clean = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(char::is_control, "\u{FFFD}");
    let id = message
        .headers()
        .into_iter()
        .flat_map(Headers::iter)
        .find(|header| matches!(header.key, "ce_id" | "id"))
        .and_then(|header| header.value)
        .map_or_else(|| format!("{}@{}", message.partition(), message.offset()), clean);
    let (device, origin) = match message.payload().and_then(payload::identify) {
        Some((device, origin)) => (clean(device.as_bytes()), Some(origin)),
        None => (message.key().map(clean).unwrap_or_default(), None),
    };
    Arrived { device, origin, place: cloudevents::place(&id), id, row: Row::Plain }
}

#[cfg(test)]
mod tests {
    use rdkafka::{
        message::{Header, OwnedHeaders},
        mocking::MockCluster,
        producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer},
    };

    use super::*;
    use crate::ledger::{Origin, Place, read_received};

    #[test]
    fn every_partition_is_read_from_the_beginning_in_order() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("events", 4, 1).unwrap();
        let producer: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
            .set("bootstrap.servers", cluster.bootstrap_servers())
            .create()
            .unwrap();
        for seq in 0..50_u64 {
            for device in 0..4 {
                let payload = format!(r#"{{"device":"dev-{device}","boot":1,"seq":{seq}}}"#);
                let id = format!("edge/00/{device}/{seq}");
                let headers = OwnedHeaders::new().insert(Header { key: "ce_id", value: Some(&id) });
                let key = format!("dev-{device}");
                let record = BaseRecord::to("events")
                    .partition(device)
                    .key(&key)
                    .payload(&payload)
                    .headers(headers);
                producer.send(record).map_err(|(error, _)| error).unwrap();
            }
        }
        producer.flush(Duration::from_secs(10)).unwrap();

        let folder = tempfile::tempdir().unwrap();
        let ledger = folder.path().join("received.csv");
        let source = KafkaSource {
            brokers: cluster.bootstrap_servers(),
            topic: "events".to_owned(),
            properties: HashMap::new(),
        };
        let cancel = CancellationToken::new();
        // Ends on the count, not on a time.
        let counters = collect(&source, &ledger, Duration::from_mins(1), &cancel, |counters| {
            if counters.received >= 200 {
                cancel.cancel();
            }
        })
        .unwrap();
        assert_eq!(counters.received, 200);
        let mut next = [0; 4];
        read_received(&ledger, |row| {
            let Some(Origin { boot: 1, seq }) = row.origin else { panic!("{row:?}") };
            let Some(Place { partition, seq: place }) = row.place else { panic!("{row:?}") };
            assert_eq!((seq, place), (next[usize::from(partition)], seq));
            next[usize::from(partition)] += 1;
        })
        .unwrap();
        assert_eq!(next, [50; 4]);
    }
}
