//! A real Apache Kafka through `scripts/kafka`, and a topic read back into a received ledger.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use firmware_sim::collect::kafka::{KafkaSource, collect};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
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
    pid: Pid,
}

impl Broker {
    /// Starts a broker; `Err` says what this machine lacks.
    pub(crate) async fn start() -> Result<Self, String> {
        let folder = tempfile::Builder::new().prefix("edge-gateway-kafka-").tempdir().unwrap();
        let port = stable_address().port();
        let pid = launch(folder.path().to_owned(), port).await?;
        Ok(Self { folder, port, pid })
    }

    pub(crate) fn bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.port)
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
        self.pid = launch(self.folder.path().to_owned(), self.port).await.unwrap();
    }

    pub(crate) async fn create_topic(&self, name: &str, partitions: i32) {
        let admin: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", self.bootstrap()).create().unwrap();
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for created in admin.create_topics([&topic], &options).await.unwrap() {
            created.unwrap();
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        kill_process(self.pid, Signal::KILL).ok();
    }
}

async fn launch(folder: PathBuf, port: u16) -> Result<Pid, String> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/kafka");
    let mut command = Command::new(script);
    command.arg("start").arg("--dir").arg(&folder).arg("--port").arg(port.to_string());
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
    let pid = text.lines().find_map(|line| line.strip_prefix("pid=")?.parse().ok());
    Ok(Pid::from_raw(pid.expect("it names the pid")).unwrap())
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
