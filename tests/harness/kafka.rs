//! A real Apache Kafka through `scripts/kafka`, and a topic read back into a received ledger.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use firmware_sim::collect::kafka::{KafkaSource, collect};
use firmware_sim::ledger::{Place, RECEIVED_HEADER, ReceivedRow};
use firmware_sim::payload::identify;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::{PATIENCE, stable_address};

/// Exit code with which the script says that Java or Maven is missing.
const MISSING: i32 = 3;

/// One broker, killed when dropped.
pub(crate) struct Broker {
    folder: TempDir,
    port: u16,
    options: Vec<String>,
    pid: Pid,
    /// What `scripts/kafka start` printed, by name.
    said: HashMap<String, String>,
}

impl Broker {
    /// Starts a broker; `Err` says what this machine lacks.
    pub(crate) async fn start() -> Result<Self, String> {
        Self::start_with(Vec::new()).await
    }

    /// Starts a broker with listeners for TLS and SASL.
    pub(crate) async fn start_secure() -> Result<Self, String> {
        Self::start_with(vec!["--secure".to_owned()]).await
    }

    /// Starts a broker that has a listener behind a proxy.
    pub(crate) async fn start_behind(proxy: SocketAddr) -> Result<Self, String> {
        Self::start_with(vec!["--proxied".to_owned(), proxy.port().to_string()]).await
    }

    async fn start_with(options: Vec<String>) -> Result<Self, String> {
        let folder = tempfile::Builder::new().prefix("edge-gateway-kafka-").tempdir().unwrap();
        let port = stable_address().port();
        let said = launch(folder.path().to_owned(), port, &options).await?;
        Ok(Self { pid: pid_of(&said), folder, port, options, said })
    }

    pub(crate) fn bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// What the script printed under a name: another listener's address, or a folder.
    pub(crate) fn said(&self, name: &str) -> &str {
        &self.said[name]
    }

    /// SIGKILL; returns when the process is gone and the port is closed.
    pub(crate) async fn kill(&self) {
        // Gone already is as good.
        kill_process(self.pid, Signal::KILL).ok();
        let port = ("127.0.0.1", self.port);
        super::eventually("the killed broker's port is closed", async || {
            std::net::TcpListener::bind(port).ok().map(drop)
        })
        .await;
    }

    /// Starts it again: same data, same port.
    pub(crate) async fn restart(&mut self) {
        let said = launch(self.folder.path().to_owned(), self.port, &self.options).await;
        self.pid = pid_of(&said.unwrap());
    }

    pub(crate) async fn create_topic(&self, name: &str, partitions: i32) {
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for created in self.admin().create_topics([&topic], &options).await.unwrap() {
            created.unwrap();
        }
    }

    /// Forgets where a consumer group is.
    pub(crate) async fn delete_group(&self, name: &str) {
        let deleted = self.admin().delete_groups(&[name], &AdminOptions::new()).await.unwrap();
        for deleted in deleted {
            deleted.unwrap();
        }
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        ClientConfig::new().set("bootstrap.servers", self.bootstrap()).create().unwrap()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        kill_process(self.pid, Signal::KILL).ok();
    }
}

fn pid_of(said: &HashMap<String, String>) -> Pid {
    Pid::from_raw(said["pid"].parse().unwrap()).unwrap()
}

async fn launch(
    folder: PathBuf,
    port: u16,
    options: &[String],
) -> Result<HashMap<String, String>, String> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/kafka");
    let mut command = Command::new(script);
    command
        .arg("start")
        .arg("--dir")
        .arg(&folder)
        .arg("--port")
        .arg(port.to_string())
        .args(options);
    // A file: the broker inherits a pipe, and reading one to its end would wait for the broker.
    let said = folder.join("start.log");
    command.stdin(Stdio::null()).stderr(std::fs::File::create(&said).unwrap());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = std::fs::read_to_string(said).unwrap_or_default();
    match output.status.code() {
        Some(0) => {}
        Some(MISSING) => return Err(said.trim().to_owned()),
        code => panic!("scripts/kafka start ended with {code:?}: {said}"),
    }
    let text = String::from_utf8(output.stdout).unwrap();
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    Ok(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
}

/// What a reader of a topic sees of transactions.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Isolation {
    Committed,
    Uncommitted,
}

/// A record as its headers name it.
#[derive(Clone, Debug)]
pub(crate) struct Arrived {
    /// By the number that the gateway gave.
    pub(crate) place: Place,
    pub(crate) device: String,
    /// `ce_lane`, if it has one.
    pub(crate) lane: Option<String>,
    /// `ce_stream`, if it has one.
    pub(crate) stream: Option<String>,
}

/// Reads all that a topic holds now into a received ledger, each partition in its order, whatever
/// transactions have left between its records. Gives the same as the headers have it.
pub(crate) async fn read_records(
    brokers: String,
    topic: &'static str,
    isolation: Isolation,
    ledger: PathBuf,
) -> Vec<Arrived> {
    let read = move || {
        let level = match isolation {
            Isolation::Committed => "read_committed",
            Isolation::Uncommitted => "read_uncommitted",
        };
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &brokers)
            .set("group.id", "reader")
            .set("isolation.level", level)
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .create()
            .unwrap();
        let metadata = consumer.fetch_metadata(Some(topic), PATIENCE).unwrap();
        let mut list = TopicPartitionList::new();
        let mut unread = metadata.topics()[0].partitions().len();
        for partition in metadata.topics()[0].partitions() {
            list.add_partition_offset(topic, partition.id(), Offset::Beginning).unwrap();
        }
        consumer.assign(&list).unwrap();
        let mut text = format!("{RECEIVED_HEADER}\n").into_bytes();
        let mut arrived = Vec::new();
        while unread > 0 {
            match consumer.poll(PATIENCE) {
                Some(Ok(message)) => {
                    let row = received_row(arrived.len() as u64, &message);
                    row.write_to(&mut text);
                    arrived.push(Arrived {
                        place: row.place.expect("numbered"),
                        device: row.device.into_owned(),
                        lane: header(&message, "ce_lane"),
                        stream: header(&message, "ce_stream"),
                    });
                }
                Some(Err(KafkaError::PartitionEOF(_))) => unread -= 1,
                Some(Err(error)) => panic!("{error}"),
                // An event of another kind.
                None => {}
            }
        }
        std::fs::write(ledger, text).unwrap();
        arrived
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

fn header(message: &BorrowedMessage<'_>, name: &str) -> Option<String> {
    let header = message.headers()?.iter().find(|header| header.key == name)?;
    Some(String::from_utf8(header.value?.to_vec()).expect("text"))
}

fn received_row(arrival: u64, message: &BorrowedMessage<'_>) -> ReceivedRow<'static> {
    let (device, origin) = identify(message.payload().unwrap()).expect("a fleet's event");
    let id = header(message, "ce_id").expect("an id");
    let mut parts = id.rsplit('/');
    let seq = parts.next().unwrap().parse().unwrap();
    let partition = parts.next().unwrap().parse().unwrap();
    ReceivedRow {
        arrival,
        received_us: 0,
        device: device.into(),
        origin: Some(origin),
        place: Some(Place { partition, seq }),
        id: id.into(),
    }
}

/// Reads all that a topic holds now, and records it.
pub(crate) async fn read_topic(brokers: &str, topic: &str, ledger: &Path) {
    let source = KafkaSource {
        brokers: brokers.to_owned(),
        topic: topic.to_owned(),
        properties: HashMap::new(),
    };
    let ledger = ledger.to_owned();
    let read = tokio::task::spawn_blocking(move || {
        let events = events_in(&source);
        let enough = CancellationToken::new();
        let stop = enough.clone();
        collect(&source, &ledger, PATIENCE, &stop, |counters| {
            if counters.received >= events {
                enough.cancel();
            }
        })
    });
    read.await.unwrap().unwrap();
}

/// Number of records in all partitions. Without transactions their offsets are dense.
fn events_in(source: &KafkaSource) -> u64 {
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", &source.brokers).create().unwrap();
    let metadata = consumer.fetch_metadata(Some(&source.topic), PATIENCE).unwrap();
    let partitions = metadata.topics()[0].partitions();
    let ends = partitions.iter().map(|partition| {
        let (low, high) =
            consumer.fetch_watermarks(&source.topic, partition.id(), PATIENCE).unwrap();
        u64::try_from(high - low).unwrap()
    });
    ends.sum()
}
