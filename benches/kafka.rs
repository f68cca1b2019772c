//! A stored backlog into a real Apache Kafka, beside the fastest that librdkafka goes with the same
//! records.
//!
//! Contestants, each in a process of its own, one after the other in every round:
//! - *ceiling*: a plain idempotent producer with the sink's settings. Its records are made before the
//!   clock runs, and it does nothing but hand them over and count what was delivered.
//! - *idempotent*, *exactly once*, *at least once*: the sink as it comes, with its forwarder, out of a
//!   store on disk. *Exactly once* commits transactions as they come by default.
//!
//! Reported are events per second, as medians and as medians of the ratios to the ceiling of the same
//! round; CPU of the process (the broker's is apart); and the most resident memory that it took. A
//! store of 10 GB shows that this does not grow with the backlog: `--gigabytes 10 --payload 1024`.
//!
//! `cargo bench -p gateway --bench kafka [-- --events N | --gigabytes N] [--payload N] [--rounds N]
//! [--headers cloudevents|id|none] [--only CONTESTANT] [--property NAME=VALUE ...]`: 1,000,000 events
//! with 128 B of payload, 5 rounds. A property is passed on to the librdkafka of the sinks. Needs Java
//! and Maven; skipped loudly without. Figures are reported, never asserted.

#[expect(dead_code, reason = "what is written to the disk is of no interest here")]
mod traffic;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bridge::config::{KafkaConfig, KafkaDelivery, KafkaHeaders, SinkConfig, Target};
use bridge::{Forwarder, Origin};
use rdkafka::ClientContext;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication, TopicResult};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, ProducerContext, ThreadedProducer};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use storage::{AtQuota, Compression, JournalMode, SinkRetention, Store, StoreOptions, Writer};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use traffic::{Durable, PARTITIONS, event_bytes, events, now_us};

const SINK: &str = "bus";
const TOPIC_PARTITIONS: i32 = 8;
const BATCH_EVENTS: usize = 1_000;
/// Different records that the ceiling sends, over and over: as many as the log has different ones.
const CEILING_RECORDS: usize = BATCH_EVENTS;
/// As the sink's own: what librdkafka may have at once.
const QUEUE_EVENTS: &str = "20000";
/// `scripts/kafka` says so when Java or Maven is missing.
const MISSING: i32 = 3;
/// Nothing here takes so long.
const PATIENCE: Duration = Duration::from_mins(30);
/// How a child is told what it is.
const CHILD: &str = "run";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Contestant {
    Ceiling,
    Sink(KafkaDelivery),
}

const CONTESTANTS: [(&str, Contestant); 4] = [
    ("ceiling", Contestant::Ceiling),
    ("idempotent", Contestant::Sink(KafkaDelivery::Idempotent)),
    ("exactly-once", Contestant::Sink(KafkaDelivery::ExactlyOnce)),
    ("at-least-once", Contestant::Sink(KafkaDelivery::AtLeastOnce)),
];

const HEADERS: [(&str, KafkaHeaders); 3] = [
    ("cloudevents", KafkaHeaders::CloudEvents),
    ("id", KafkaHeaders::Id),
    ("none", KafkaHeaders::None),
];

fn named<T: Copy>(choices: &[(&'static str, T)], name: &str) -> anyhow::Result<T> {
    let found = choices.iter().find(|(known, _)| *known == name);
    Ok(found.with_context(|| format!("unknown: {name}"))?.1)
}

struct Plan {
    events: u64,
    payload_bytes: usize,
    rounds: usize,
    headers: String,
    only: Option<String>,
    /// For the sinks' librdkafka.
    properties: Vec<(String, String)>,
}

impl Plan {
    fn from_args(mut args: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut plan = Self {
            events: 1_000_000,
            payload_bytes: 128,
            rounds: 5,
            headers: "cloudevents".to_owned(),
            only: None,
            properties: Vec::new(),
        };
        let mut gigabytes: Option<f64> = None;
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--events" => plan.events = value()?.parse()?,
                "--gigabytes" => gigabytes = Some(value()?.parse()?),
                "--payload" => plan.payload_bytes = value()?.parse()?,
                "--rounds" => plan.rounds = value()?.parse()?,
                "--headers" => plan.headers = value()?,
                "--only" => plan.only = Some(value()?),
                "--property" => {
                    let given = value()?;
                    let (name, value) = given.split_once('=').context("--property NAME=VALUE")?;
                    plan.properties.push((name.to_owned(), value.to_owned()));
                }
                // What cargo passes to every bench.
                "--bench" => {}
                other => bail!("unknown argument {other}"),
            }
        }
        if let Some(gigabytes) = gigabytes {
            let one = event_bytes(&events(1, plan.payload_bytes)) as f64;
            plan.events = (gigabytes * 1e9 / one) as u64;
        }
        named(&HEADERS, &plan.headers)?;
        plan.only.as_deref().map(|name| named(&CONTESTANTS, name)).transpose()?;
        plan.events = plan.events.next_multiple_of(BATCH_EVENTS as u64);
        ensure!(plan.events > 0 && plan.rounds > 0, "nothing to measure");
        Ok(plan)
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if_eq(CHILD).is_some() {
        let job: Value = serde_json::from_str(&args.next().context("run JOB")?)?;
        println!("{}", Job::read(&job)?.run()?);
        return Ok(ExitCode::SUCCESS);
    }
    let plan = Plan::from_args(args)?;
    // On the disk that holds the build, not in memory.
    let dir = tempfile::tempdir_in(scratch())?;
    let Some(broker) = Broker::start(&dir.path().join("kafka"))? else {
        return Ok(ExitCode::SUCCESS);
    };
    let store = dir.path().join("store");
    let bytes = fill(&plan, &store)?;
    println!(
        "{} events, {} B payload, {:.2} GB of event bytes, headers {}, {} rounds, medians\n\
         {:<14} {:>10} {:>9} {:>11} {:>8}",
        plan.events,
        plan.payload_bytes,
        bytes as f64 / 1e9,
        plan.headers,
        plan.rounds,
        "",
        "events/s",
        "/ceiling",
        "CPU s/M ev",
        "RSS MB"
    );
    let mut outcomes: Vec<Vec<Outcome>> = vec![Vec::new(); CONTESTANTS.len()];
    for round in 0..plan.rounds {
        for (place, (name, _)) in CONTESTANTS.iter().enumerate() {
            if plan.only.as_deref().is_some_and(|only| only != *name && place > 0) {
                continue;
            }
            let topic = format!("{name}-{round}");
            broker.create_topic(&topic)?;
            let job = json!({
                "contestant": name, "store": store, "brokers": broker.bootstrap, "topic": topic,
                "events": plan.events, "payload_bytes": plan.payload_bytes, "headers": plan.headers,
                "properties": plan.properties,
            });
            outcomes[place].push(Outcome::of(&job)?);
            broker.delete_topic(&topic)?;
        }
    }
    for ((name, _), own) in CONTESTANTS.iter().zip(&outcomes).filter(|(_, own)| !own.is_empty()) {
        let ratios = own.iter().zip(&outcomes[0]).map(|(own, ceiling)| own.rate / ceiling.rate);
        println!(
            "{name:<14} {:>10.0} {:>9.3} {:>11.2} {:>8.0}",
            median(own.iter().map(|o| o.rate)),
            median(ratios),
            median(own.iter().map(|o| o.cpu_s_per_million)),
            median(own.iter().map(|o| o.rss_mb)),
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// What came of one topic.
fn told(outcome: TopicResult) -> anyhow::Result<()> {
    match outcome {
        Ok(_) => Ok(()),
        Err((topic, code)) => bail!("{topic}: {code}"),
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

fn scratch() -> PathBuf {
    option_env!("CARGO_TARGET_TMPDIR").map_or_else(std::env::temp_dir, PathBuf::from)
}

fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// What a child has to say.
#[derive(Clone, Copy)]
struct Outcome {
    rate: f64,
    cpu_s_per_million: f64,
    rss_mb: f64,
}

impl Outcome {
    /// Runs a contestant in a process of its own.
    fn of(job: &Value) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?);
        let output = child.arg(CHILD).arg(job.to_string()).output()?;
        let text = String::from_utf8(output.stdout)?;
        let said: Value = serde_json::from_str(text.trim()).with_context(|| {
            format!(
                "{job} ended with {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            )
        })?;
        let number =
            |name: &str| said[name].as_f64().with_context(|| format!("no {name} in {said}"));
        let events = job["events"].as_f64().context("a number of events")?;
        Ok(Self {
            rate: events / number("seconds")?,
            cpu_s_per_million: number("cpu_s")? / events * 1e6,
            rss_mb: number("rss_mb")?,
        })
    }
}

/// What a child is to do.
struct Job {
    contestant: Contestant,
    store: PathBuf,
    brokers: String,
    topic: String,
    events: u64,
    payload_bytes: usize,
    headers: KafkaHeaders,
    properties: Vec<(String, String)>,
}

impl Job {
    fn read(job: &Value) -> anyhow::Result<Self> {
        let text = |name: &str| job[name].as_str().with_context(|| format!("no {name}"));
        let number = |name: &str| job[name].as_u64().with_context(|| format!("no {name}"));
        Ok(Self {
            contestant: named(&CONTESTANTS, text("contestant")?)?,
            store: text("store")?.into(),
            brokers: text("brokers")?.to_owned(),
            topic: text("topic")?.to_owned(),
            events: number("events")?,
            payload_bytes: number("payload_bytes")? as usize,
            headers: named(&HEADERS, text("headers")?)?,
            properties: serde_json::from_value(job["properties"].clone())?,
        })
    }

    /// Does it; gives what [`Outcome::of`] reads.
    fn run(&self) -> anyhow::Result<Value> {
        let (time, cpu_s) = match self.contestant {
            Contestant::Ceiling => self.ceiling()?,
            Contestant::Sink(delivery) => self.drain(delivery)?,
        };
        Ok(json!({ "seconds": time.as_secs_f64(), "cpu_s": cpu_s, "rss_mb": rss_mb_max()? }))
    }

    /// The sink out of the store. The clock runs until its cursor is at the end.
    fn drain(&self, delivery: KafkaDelivery) -> anyhow::Result<(Duration, f64)> {
        let (store, writer) = open(&self.store)?;
        let kafka = KafkaConfig {
            delivery,
            headers: self.headers,
            librdkafka: self.properties.clone(),
            ..KafkaConfig::new(&self.brokers, &self.topic)
        };
        let config = SinkConfig::new(SINK.to_owned(), Target::Kafka(kafka));
        let origin = Origin { gateway: self.topic.clone(), epoch: store.epoch() };
        let (_raised, watermark) = watch::channel(store.stats().watermark);
        runtime()?.block_on(async {
            let (began, cpu_s) = (Instant::now(), cpu_s());
            let forwarder =
                Forwarder::new(config, origin, store, watermark, Arc::new(|_: &str, _: &_| {}));
            let (mut status, stop) = (forwarder.status(), CancellationToken::new());
            let mut tasks = tokio::task::JoinSet::new();
            tasks.spawn(forwarder.run(stop.clone()));
            let done = status.wait_for(|status| status.cursor >= self.events);
            tokio::time::timeout(PATIENCE, done).await.context("it does not end")??;
            let outcome = (began.elapsed(), cpu_s_since(cpu_s));
            stop.cancel();
            while let Some(ended) = tasks.join_next().await {
                ended?;
            }
            drop(writer);
            Ok(outcome)
        })
    }

    /// The same records from memory.
    fn ceiling(&self) -> anyhow::Result<(Duration, f64)> {
        let records: Vec<Record> = events(CEILING_RECORDS, self.payload_bytes)
            .into_iter()
            .zip(0..)
            .map(|(event, seq)| Record {
                key: event.device_key.to_string(),
                payload: event.payload.to_vec(),
                headers: self.headers_of(&event.device_key, &event.topic, seq),
            })
            .collect();
        let mut client = ClientConfig::new();
        client
            .set("bootstrap.servers", &self.brokers)
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("partitioner", "murmur2_random")
            .set("compression.type", "lz4")
            .set("queue.buffering.max.messages", QUEUE_EVENTS);
        let delivered = Arc::new(AtomicU64::new(0));
        let (began, cpu_s) = (Instant::now(), cpu_s());
        let context = Count(Arc::clone(&delivered));
        let producer: ThreadedProducer<Count> = client.create_with_context(context)?;
        for record in records.iter().cycle().take(self.events as usize) {
            let mut next = record.next(&self.topic);
            while let Err((error, back)) = producer.send(next) {
                let full = KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull);
                ensure!(error == full, "{error}");
                next = back;
                thread::sleep(Duration::from_millis(1));
            }
        }
        while delivered.load(Ordering::Acquire) < self.events {
            ensure!(began.elapsed() < PATIENCE, "it does not end");
            thread::sleep(Duration::from_millis(1));
        }
        let outcome = (began.elapsed(), cpu_s_since(cpu_s));
        drop(producer);
        Ok(outcome)
    }

    /// What the sink says of such an event, as long as there.
    fn headers_of(&self, device: &str, topic: &str, seq: u64) -> Option<OwnedHeaders> {
        let id = format!("{}/00000000000000ab/0/{:07}", self.topic, seq + self.events / 2);
        let source = format!("/{}/{device}", self.topic);
        let all: &[(&str, &str)] = &[
            ("ce_specversion", "1.0"),
            ("ce_id", &id),
            ("ce_source", &source),
            ("ce_type", SinkConfig::EVENT_TYPE),
            ("ce_subject", topic),
            ("ce_time", "2025-01-01T00:00:00.000000Z"),
            ("content-type", "application/octet-stream"),
        ];
        let some = match self.headers {
            KafkaHeaders::CloudEvents => all,
            KafkaHeaders::Id => &[("id", &*id)],
            KafkaHeaders::None => return None,
        };
        let insert = |headers: OwnedHeaders, &(key, value): &(&str, &str)| {
            headers.insert(Header { key, value: Some(value) })
        };
        Some(some.iter().fold(OwnedHeaders::new_with_capacity(some.len()), insert))
    }
}

struct Record {
    key: String,
    payload: Vec<u8>,
    headers: Option<OwnedHeaders>,
}

impl Record {
    fn next<'a>(&'a self, topic: &'a str) -> BaseRecord<'a, String, Vec<u8>> {
        let mut record = BaseRecord::to(topic).key(&self.key).payload(&self.payload);
        record.headers.clone_from(&self.headers);
        record
    }
}

struct Count(Arc<AtomicU64>);

impl ClientContext for Count {}

impl ProducerContext for Count {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        assert!(result.is_ok(), "not delivered: {:?}", result.as_ref().err());
        self.0.fetch_add(1, Ordering::Release);
    }
}

/// CPU time of this process, all threads.
fn cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn cpu_s_since(before: f64) -> f64 {
    cpu_s() - before
}

/// The most memory that this process had resident.
fn rss_mb_max() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kb = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kb = kb.and_then(|kb| kb.trim().strip_suffix(" kB")).context("no VmHWM")?;
    Ok(kb.parse::<f64>()? / 1024.0)
}

/// The store as it comes, but for its size.
fn open(dir: &Path) -> anyhow::Result<(Store, Writer)> {
    let options = StoreOptions {
        dir: dir.to_owned(),
        partitions: PARTITIONS,
        sinks: vec![SinkRetention::new(SINK)],
        file_bytes_max: 64 << 20,
        cache_bytes: 16 << 20,
        quota_bytes: 1 << 40,
        free_bytes_min: 0,
        at_quota: AtQuota::Hold,
        retain_bytes: 0,
        retain_age_us: 0,
        dead_letter_bytes_max: 64 << 20,
        journal: JournalMode::Auto,
        journal_bytes: 32 << 20,
        compression: Compression::None,
        commits_ahead_max: 2,
    };
    Ok(Store::open(options, now_us())?)
}

/// Makes the backlog; gives its event bytes.
fn fill(plan: &Plan, dir: &Path) -> anyhow::Result<u64> {
    let (_store, writer) = open(dir)?;
    let mut durable = Durable::new(writer);
    let batch = events(BATCH_EVENTS, plan.payload_bytes);
    let mut last = 0;
    for _ in 0..plan.events / BATCH_EVENTS as u64 {
        last = durable.writer.commit(&batch, &[], now_us())?.commit;
    }
    durable.wait(last)?;
    durable.writer.close()?;
    Ok(event_bytes(&batch) * (plan.events / BATCH_EVENTS as u64))
}

/// A broker of its own, stopped when dropped.
struct Broker {
    dir: PathBuf,
    bootstrap: String,
}

impl Broker {
    /// `None` where this machine lacks something, which was said.
    fn start(dir: &Path) -> anyhow::Result<Option<Self>> {
        let mut broker = Self { dir: dir.to_owned(), bootstrap: String::new() };
        let output = broker.script("start").output()?;
        if output.status.code() == Some(MISSING) {
            println!("SKIPPED: {}", String::from_utf8_lossy(&output.stderr).trim());
            return Ok(None);
        }
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let said = String::from_utf8(output.stdout)?;
        let bootstrap = said.lines().find_map(|line| line.strip_prefix("bootstrap="));
        bootstrap.context("no bootstrap=")?.clone_into(&mut broker.bootstrap);
        Ok(Some(broker))
    }

    fn script(&self, verb: &str) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/kafka"));
        command.arg(verb).arg("--dir").arg(&self.dir);
        command
    }

    fn create_topic(&self, name: &str) -> anyhow::Result<()> {
        let topic = NewTopic::new(name, TOPIC_PARTITIONS, TopicReplication::Fixed(1));
        let created =
            runtime()?.block_on(self.admin()?.create_topics([&topic], &AdminOptions::new()))?;
        created.into_iter().try_for_each(told)
    }

    /// What is not there any more costs the next contestant nothing.
    fn delete_topic(&self, name: &str) -> anyhow::Result<()> {
        let deleted =
            runtime()?.block_on(self.admin()?.delete_topics(&[name], &AdminOptions::new()))?;
        deleted.into_iter().try_for_each(told)
    }

    fn admin(&self) -> anyhow::Result<AdminClient<DefaultClientContext>> {
        Ok(ClientConfig::new().set("bootstrap.servers", &self.bootstrap).create()?)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // It has nothing to lose.
        self.script("stop").output().ok();
    }
}
