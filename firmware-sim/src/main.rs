//! `firmware-sim`: run a fleet, collect what arrives upstream, audit the two.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use firmware_sim::{
    audit::audit,
    collect::{CollectCounters, HttpCollector},
    fleet::{ConfigError, Fleet, FleetConfig, FleetCounters, FleetReport},
    payload::Payload,
};
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

const WRONG_ARGUMENTS: u8 = 2;
const LOSS_OR_DISORDER: u8 = 3;

const EXAMPLES: &str = "\
Examples:
  # Receive what a gateway delivers to http://127.0.0.1:8080/
  firmware-sim collect --http 127.0.0.1:8080 --ledger received.csv

  # 500 devices, 2,000 events a second in all, for a minute
  firmware-sim run --broker 127.0.0.1:1883 --devices 500 --rate 2000 --seconds 60 --ledger sent.csv

  # Was anything that was acked lost or reordered?
  firmware-sim audit --sent sent.csv --received received.csv

Exit codes: 0 done and balanced, 1 a failure at run time, 2 wrong configuration or arguments,
3 the audit found loss or disorder.";

/// A simulated fleet of devices, the upstream that receives its events, and the audit of the two.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(RunArgs),
    Collect(CollectArgs),
    Audit(AuditArgs),
}

/// Run a fleet that publishes over MQTT at QoS 1, and write the ledger of what it sent.
///
/// Devices produce for the given time; then the run waits until everything is acked. Ctrl-C ends
/// the first phase early, once more ends the run at once.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  firmware-sim run --broker 127.0.0.1:1883 --devices 200 --rate 1000 --seconds 20 --ledger sent.csv
  firmware-sim run --fleet configs/fleet.toml --seed 7 --ledger sent.csv --json

Ack latencies leave out the time that a device was disconnected.
Exit codes: 0 everything acked, 1 not everything acked or another failure, 2 wrong arguments.")]
struct RunArgs {
    /// Broker, as host:port
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:1883", value_parser = broker)]
    broker: String,
    /// Ledger to write, one row per event; an old one is replaced
    #[arg(long, value_name = "FILE")]
    ledger: PathBuf,
    /// TOML file that describes the fleet; the flags below override it
    #[arg(long, value_name = "FILE")]
    fleet: Option<PathBuf>,
    /// Number of devices [default: 100]
    #[arg(long, value_name = "N")]
    devices: Option<u32>,
    /// Number of the first device [default: 1]
    #[arg(long, value_name = "N")]
    first_device: Option<u32>,
    /// Events per second of the whole fleet [default: 1000]
    #[arg(long, value_name = "N")]
    rate: Option<f64>,
    /// How long to produce, in seconds [default: 10]
    #[arg(long, value_name = "N")]
    seconds: Option<f64>,
    /// How long to wait after that for the last acks, in seconds [default: 30]
    #[arg(long, value_name = "N")]
    drain_seconds_max: Option<f64>,
    /// Seed of signals, kinds and times [default: 1]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Form of the payloads [default: json]
    #[arg(long)]
    payload: Option<PayloadArg>,
    /// Share of the devices that speak MQTT 5, from 0 to 1 [default: 0.25]
    #[arg(long, value_name = "SHARE")]
    v5_share: Option<f64>,
    /// Publishes in flight per device, at most [default: 20]
    #[arg(long, value_name = "N")]
    in_flight_max: Option<u16>,
    /// Print the summary as one JSON object
    #[arg(long)]
    json: bool,
    /// No progress lines on standard error
    #[arg(long)]
    quiet: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PayloadArg {
    /// Compact JSON
    Json,
    /// The binary frame of the device core
    Frame,
}

/// Receive what a gateway delivers, and write the ledger of what arrived.
///
/// As HTTP receiver it takes POSTs of CloudEvents (batch, structured, NDJSON; plain, gzip or zstd)
/// on any path, answers only once the rows are written, and adds to the ledger if there is one. As
/// Kafka consumer it reads the topic from its beginning into a new ledger.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  firmware-sim collect --http 127.0.0.1:8080 --ledger received.csv
  firmware-sim collect --http 127.0.0.1:0 --ledger received.csv    # prints: listening on 127.0.0.1:PORT
  firmware-sim collect --http 127.0.0.1:8080 --ledger received.csv --exactly-once
  firmware-sim collect --kafka 127.0.0.1:9092 --topic events --ledger received.csv

It ends on Ctrl-C, SIGTERM, or after --idle-seconds without an event.")]
struct CollectArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Kafka topic
    #[cfg(feature = "kafka")]
    #[arg(long, requires = "kafka")]
    topic: Option<String>,
    /// Another librdkafka property, as KEY=VALUE; may be repeated
    #[cfg(feature = "kafka")]
    #[arg(long, value_name = "KEY=VALUE", requires = "kafka", value_parser = property)]
    property: Vec<(String, String)>,
    /// Ledger to write, one row per event that arrived
    #[arg(long, value_name = "FILE")]
    ledger: PathBuf,
    /// Record each event once: keep the last sequence number per gateway, epoch and partition, and
    /// pass over what is not above it. Lanes and streams of a sink have numbers of their own; with
    /// them, begin with a new ledger
    #[arg(long, requires = "http")]
    exactly_once: bool,
    /// End after this time without an event; 0 is never [default: 0 for HTTP, 10 for Kafka]
    #[arg(long, value_name = "N", value_parser = seconds)]
    idle_seconds: Option<Duration>,
    /// Print the summary as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct SourceArgs {
    /// Address to listen on; port 0 takes one from the system
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// Kafka brokers, as host:port, several with commas between
    #[cfg(feature = "kafka")]
    #[arg(long, value_name = "BROKERS", requires = "topic")]
    kafka: Option<String>,
}

/// Compare what a fleet sent with what arrived: lost, duplicates, out of order per device.
///
/// Lost is what was acked and never arrived. A repeat is a duplicate; order is judged on first
/// arrivals.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  firmware-sim audit --sent sent.csv --received received.csv
  firmware-sim audit --sent sent.csv --received received.csv --json

Exit codes: 0 nothing lost or reordered, 1 a ledger cannot be read, 3 loss or disorder.")]
struct AuditArgs {
    /// Ledger of `firmware-sim run`
    #[arg(long, value_name = "FILE")]
    sent: PathBuf,
    /// Ledger of `firmware-sim collect`
    #[arg(long, value_name = "FILE")]
    received: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn broker(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Ok(text.to_owned())
        }
        _ => Err("must be host:port".to_owned()),
    }
}

#[cfg(feature = "kafka")]
fn property(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "must be a number of seconds, 0 or more".to_owned())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    let done = match cli.verb {
        Verb::Audit(args) => run_audit(&args),
        Verb::Run(args) => block_on(run_fleet(args)),
        Verb::Collect(args) => block_on(run_collect(args)),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("firmware-sim: {error:#}");
            if error.is::<ConfigError>() { WRONG_ARGUMENTS.into() } else { ExitCode::FAILURE }
        }
    }
}

/// Two threads carry thousands of devices, and leave the machine to what is measured.
fn block_on(verb: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(verb)
}

async fn run_fleet(args: RunArgs) -> anyhow::Result<ExitCode> {
    let config = fleet_config(&args)?;
    let produce = Duration::from_secs_f64(config.seconds);
    let drain_max = Duration::from_secs_f64(config.drain_seconds_max);
    let (_broker, broker) = watch::channel(args.broker.clone());
    let cancel = CancellationToken::new();
    let fleet = Fleet::start(config, broker, &args.ledger, &cancel)
        .with_context(|| format!("cannot write the ledger {}", args.ledger.display()))?;

    let mut interrupts = Interrupts::new()?;
    let mut every_second = interval(Duration::from_secs(1));
    every_second.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut produced_enough = std::pin::pin!(sleep(produce));
    loop {
        select! {
            () = &mut produced_enough => break,
            () = interrupts.next() => break,
            _ = every_second.tick() => if !args.quiet { print_progress(&fleet.counters()) },
        }
    }
    let mut finish = std::pin::pin!(fleet.finish(drain_max));
    let report = loop {
        select! {
            report = &mut finish => break report.context("the run failed")?,
            () = interrupts.next() => cancel.cancel(),
        }
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print_report(&report);
    }
    Ok(if report.drained { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn fleet_config(args: &RunArgs) -> anyhow::Result<FleetConfig> {
    let mut config = match &args.fleet {
        None => FleetConfig::default(),
        Some(path) => read_fleet(path)?,
    };
    set(&mut config.devices, args.devices);
    set(&mut config.first_device, args.first_device);
    set(&mut config.rate, args.rate);
    set(&mut config.seconds, args.seconds);
    set(&mut config.drain_seconds_max, args.drain_seconds_max);
    set(&mut config.seed, args.seed);
    set(&mut config.v5_share, args.v5_share);
    set(&mut config.in_flight_max, args.in_flight_max);
    let payload = args.payload.map(|payload| match payload {
        PayloadArg::Json => Payload::Json,
        PayloadArg::Frame => Payload::Frame,
    });
    set(&mut config.payload, payload);
    config.validate()?;
    Ok(config)
}

fn set<T: Copy>(target: &mut T, flag: Option<T>) {
    *target = flag.unwrap_or(*target);
}

fn read_fleet(path: &Path) -> anyhow::Result<FleetConfig> {
    let text = fs::read_to_string(path)
        .map_err(|error| ConfigError(vec![format!("{}: {error}", path.display())]))?;
    Ok(FleetConfig::from_toml(&text)?)
}

fn print_progress(counters: &FleetCounters) {
    eprintln!(
        "connected {}  produced {}  sent {}  acked {}  unacked {}  resent {}  ack p99 {:.1} ms",
        counters.connected,
        counters.produced,
        counters.sent,
        counters.acked,
        counters.unacked,
        counters.resent,
        counters.ack_latency.p99_us as f64 / 1000.0,
    );
}

fn print_report(report: &FleetReport) {
    let FleetReport { devices, seconds, events_per_second, drained, unsent, counters } = report;
    let latency = &counters.ack_latency;
    println!("devices         {devices}");
    println!("seconds         {seconds:.1}");
    println!("produced        {}", counters.produced);
    println!("sent            {}", counters.sent);
    println!("acked           {}  ({events_per_second:.0}/s)", counters.acked);
    println!("unacked         {}", counters.unacked);
    println!("never sent      {unsent}");
    println!("outbox full     {}", counters.refused);
    println!("resent          {}", counters.resent);
    println!("reconnects      {}", counters.reconnects);
    for (name, latency_us) in [
        ("ack p50", latency.p50_us),
        ("ack p90", latency.p90_us),
        ("ack p99", latency.p99_us),
        ("ack p99.9", latency.p999_us),
        ("ack max", latency.max_us),
    ] {
        println!("{name:<16}{:.2} ms", latency_us as f64 / 1000.0);
    }
    if let (false, Some(error)) = (drained, &counters.last_error) {
        println!("last error      {error}");
    }
    println!("{}", if *drained { "everything acked" } else { "NOT everything acked" });
}

async fn run_collect(args: CollectArgs) -> anyhow::Result<ExitCode> {
    #[cfg(feature = "kafka")]
    if args.source.kafka.is_some() {
        return collect_kafka(args).await;
    }
    let addr = args.source.http.context("no source")?;
    let collector = if args.exactly_once {
        HttpCollector::start_exactly_once(addr, &args.ledger)?
    } else {
        HttpCollector::start(addr, &args.ledger)?
    };
    println!("listening on {}", collector.addr());
    let idle_max = args.idle_seconds.filter(|idle| !idle.is_zero());
    let idle = async {
        let Some(idle_max) = idle_max else {
            return std::future::pending().await;
        };
        while let Some(left) = idle_max.checked_sub(collector.idle()) {
            sleep(left.max(Duration::from_millis(1))).await;
        }
    };
    let mut interrupts = Interrupts::new()?;
    select! {
        () = idle => {}
        () = interrupts.next() => {}
    }
    print_collected(&collector.finish().await, args.json)
}

#[cfg(feature = "kafka")]
async fn collect_kafka(args: CollectArgs) -> anyhow::Result<ExitCode> {
    use firmware_sim::collect::kafka::{KafkaSource, collect};

    const IDLE_DEFAULT: Duration = Duration::from_secs(10);

    let source = KafkaSource {
        brokers: args.source.kafka.context("no brokers")?,
        topic: args.topic.context("no topic")?,
        properties: args.property.into_iter().collect(),
    };
    let idle_max = match args.idle_seconds {
        None => IDLE_DEFAULT,
        Some(Duration::ZERO) => Duration::MAX,
        Some(idle_max) => idle_max,
    };
    let cancel = CancellationToken::new();
    let mut reading = tokio::task::spawn_blocking({
        let cancel = cancel.clone();
        move || collect(&source, &args.ledger, idle_max, &cancel, |_| ())
    });
    let mut interrupts = Interrupts::new()?;
    let counters = loop {
        select! {
            counters = &mut reading => break counters?.context("cannot collect from Kafka")?,
            () = interrupts.next() => cancel.cancel(),
        }
    };
    print_collected(&counters, args.json)
}

fn print_collected(counters: &CollectCounters, json: bool) -> anyhow::Result<ExitCode> {
    if json {
        println!("{}", serde_json::to_string(counters)?);
    } else {
        let CollectCounters { received, skipped, requests, refused } = counters;
        println!(
            "received {received} events in {requests} requests, passed over {skipped}; \
             {refused} refused"
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn run_audit(args: &AuditArgs) -> anyhow::Result<ExitCode> {
    let report = audit(&args.sent, &args.received)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
        println!("{}", if report.is_clean() { "balanced" } else { "LOSS OR DISORDER" });
    }
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { LOSS_OR_DISORDER.into() })
}

/// SIGINT and SIGTERM.
struct Interrupts {
    int: tokio::signal::unix::Signal,
    term: tokio::signal::unix::Signal,
}

impl Interrupts {
    fn new() -> io::Result<Self> {
        Ok(Self { int: signal(SignalKind::interrupt())?, term: signal(SignalKind::terminate())? })
    }

    /// Resolves at the next of either.
    async fn next(&mut self) {
        select! {
            _ = self.int.recv() => {}
            _ = self.term.recv() => {}
        }
    }
}
