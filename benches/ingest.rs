//! Durable acks per second and CPU per event, from socket to PUBACK, between a ceiling and a floor.
//!
//! Raw MQTT 3.1.1 publishers (QoS 1, 128 B, 100 publishes in flight each) against five servers in
//! one run, in turns, each server a process of its own so that its CPU and memory can be read alone:
//!
//! - *rumqttd*: a broker in Rust that acks before it has stored, and stores in memory;
//! - *null ceiling*: the gateway's front, rings and committer over a log that acks without storing;
//! - *… all checks*: the same with rules and rates, each publish being looked at;
//! - *durable floor*: the ceiling over one `pwrite` and `fdatasync` per batch (see `support`);
//! - *gateway*: the whole gateway with its store, configured as it comes.
//!
//! `cargo bench -p gateway --bench ingest [-- --quick] [--seconds N] [--rounds N] [--front]`, the last
//! without those that store. Figures are reported, never asserted. The publishers share the machine
//! with the server: compare CPU and ratios rather than rates.

mod process;
mod publishers;
mod rounds;
mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use gateway::Gateway;
use gateway::access::Access;
use gateway::config::{Bind, Config};
use gateway::ingest::{Append, Ingest, Routes};
use gateway::mqtt::{self, Downlink, Front};
use process::Process;
use publishers::{Load, PAYLOAD_BYTES, WINDOW, publish_all};
use redb::backends::FileBackend;
use rounds::{Rounds, median};
use storage::{CommitError, Committed, Control, Event, Mark, RetentionReport, StateError};
use support::RawFile;
use tokio_util::sync::CancellationToken;

const CONNECTIONS: [usize; 2] = [8, 64];
const WARM_UP: Duration = Duration::from_millis(700);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    Rumqttd,
    Null,
    Checked,
    Floor,
    Gateway,
}

/// Those of the front alone first.
const SERVERS: [(Server, &str); 5] = [
    (Server::Rumqttd, "rumqttd"),
    (Server::Null, "null ceiling"),
    (Server::Checked, "… all checks"),
    (Server::Floor, "durable floor"),
    (Server::Gateway, "gateway"),
];

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if_eq("serve").is_some() {
        let (name, dir) = args.next().zip(args.next()).context("serve SERVER DIR")?;
        let server = SERVERS.into_iter().find(|(_, n)| *n == name);
        let (server, _) = server.with_context(|| format!("no server {name}"))?;
        return serve(server, Path::new(&dir));
    }
    let full = Rounds { count: 3, time: Duration::from_millis(2500) };
    let quick = Rounds { count: 1, time: Duration::from_secs(1) };
    let mut servers = &SERVERS[..];
    let rounds = Rounds::from_args(args, full, quick, |arg, _| {
        let front = arg == "--front";
        if front {
            servers = &SERVERS[..3];
        }
        Ok(front)
    })?;
    println!(
        "QoS 1, {PAYLOAD_BYTES} B payload, {WINDOW} in flight per connection; median of {} \
         rounds of {:?} each, in turns; {} CPUs, shared with the publishers",
        rounds.count,
        rounds.time,
        thread::available_parallelism()?,
    );
    println!(
        "{:>11}  {:<13} {:>10} {:>9} {:>14} {:>8} {:>8} {:>7}",
        "connections",
        "server",
        "acked/s",
        "of floor",
        "CPU-s/million",
        "p50 ms",
        "p99 ms",
        "RSS MB"
    );
    for connections in CONNECTIONS {
        let mut results: Vec<Vec<Outcome>> = servers.iter().map(|_| Vec::new()).collect();
        for _ in 0..rounds.count {
            for ((_, name), results) in servers.iter().zip(&mut results) {
                results.push(
                    round(name, connections, rounds.time).with_context(|| (*name).to_owned())?,
                );
            }
        }
        let floor = servers.iter().position(|(server, _)| *server == Server::Floor);
        let floor = floor.map(|at| median(&results[at], |r| r.acked_per_s));
        for ((_, name), results) in servers.iter().zip(&results) {
            let acked_per_s = median(results, |r| r.acked_per_s);
            println!(
                "{connections:>11}  {name:<13} {acked_per_s:>10.0} {:>9} {:>14.2} {:>8.1} {:>8.1} {:>7.1}",
                floor.map_or("-".to_owned(), |floor| format!("{:.2}", acked_per_s / floor)),
                median(results, |r| r.cpu_s_per_million),
                median(results, |r| r.p50_ms),
                median(results, |r| r.p99_ms),
                median(results, |r| r.rss_mb),
            );
        }
    }
    Ok(())
}

/// One server under load for a while.
struct Outcome {
    acked_per_s: f64,
    cpu_s_per_million: f64,
    p50_ms: f64,
    p99_ms: f64,
    rss_mb: f64,
}

fn round(server: &str, connections: usize, time: Duration) -> anyhow::Result<Outcome> {
    // On the disk that holds the build, not in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let mut command = Command::new(std::env::current_exe()?);
    let mut server = Process::start(command.args(["serve", server]).arg(dir.path()))?;
    let line = server.line()?;
    let address = line.parse().with_context(|| format!("no address: {line:?}"))?;
    let load = Arc::new(Load::default());
    let publishers = {
        let load = Arc::clone(&load);
        thread::spawn(move || publish_all(address, connections, None, &load))
    };
    thread::sleep(WARM_UP);
    let (cpu_s, acked, began) = (server.cpu_s()?, load.acked(), Instant::now());
    load.take_latency();
    thread::sleep(time);
    let (cpu_s, acked) = (server.cpu_s()? - cpu_s, load.acked() - acked);
    let (elapsed, latency) = (began.elapsed(), load.take_latency());
    let rss_mb = server.rss_mb()?;
    load.stop();
    publishers.join().expect("the publishers do not panic")?;
    let ms = |quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
    ensure!(acked > 0, "nothing was acked");
    Ok(Outcome {
        acked_per_s: acked as f64 / elapsed.as_secs_f64(),
        cpu_s_per_million: cpu_s / acked as f64 * 1e6,
        p50_ms: ms(0.5),
        p99_ms: ms(0.99),
        rss_mb,
    })
}

// ---- a server in its own process

fn serve(server: Server, dir: &Path) -> anyhow::Result<()> {
    if server == Server::Rumqttd {
        return serve_rumqttd();
    }
    let checks = if server == Server::Checked { CHECKS } else { "" };
    let config = Config::parse("bench", &settings(dir, checks), &|_| None)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match server {
            Server::Rumqttd => unreachable!("it has a runtime of its own"),
            Server::Null | Server::Checked => serve_front(config, NullLog::default()).await,
            Server::Floor => {
                let file = FileBackend::new(File::create_new(dir.join("raw"))?)?;
                let file = RawFile::new(Box::new(file))?;
                serve_front(config, FloorLog { file, marks: NullLog::default() }).await
            }
            Server::Gateway => {
                let gateway = Gateway::start(config).await?;
                announce(gateway.addresses().mqtt[0])?;
                let stop = CancellationToken::new();
                let (stopped, ()) = tokio::join!(gateway.run(stop.clone()), async {
                    end_of_input().await;
                    stop.cancel();
                });
                Ok(stopped?)
            }
        }
    })
}

/// What can be asked of each publish: rules, and a rate that nobody reaches.
const CHECKS: &str = "events_per_second_max = 1_000_000\nbytes_per_second_max = \"1GiB\"\n\
                      [[acl]]\npublish = [\"alarms/%c\", \"devices/%c/#\"]\n";

/// The configuration as it comes, but on free ports; `more` goes on with its listener.
fn settings(dir: &Path, more: &str) -> String {
    format!(
        "gateway = {{ data_dir = '{}', shutdown_grace = \"2s\" }}\n\
         admin = {{ bind = \"127.0.0.1:0\" }}\n\
         [[listener]]\ntype = \"mqtt\"\nbind = \"127.0.0.1:0\"\n{more}\
         [[route]]\nfilter = \"devices/{{device}}/#\"\n",
        dir.display(),
    )
}

/// The gateway's way in, wired as `Gateway` does it, over another log.
async fn serve_front(config: Config, log: impl Append) -> anyhow::Result<()> {
    let (ingest, committer) =
        Ingest::start(log, 0, &config.ingest, config.storage.at_quota, config.storage.failing_max)?;
    let downlink = Downlink::new(ingest.watermark(), config.listeners[0].connections_max);
    let shared = mqtt::Shared::new(
        ingest,
        Routes::new(&config.routes)?,
        Access::load(&config.auth, &config.acl)?,
        downlink,
        mqtt::Retained::new(config.retained.messages_max, config.retained.bytes_max, |_, _| None),
        mqtt::Bounds {
            sessions: &config.sessions,
            has_sinks: true,
            held_bytes_max: config.ingest.held_bytes_max,
            shutdown_grace: config.gateway.shutdown_grace,
        },
    );
    let front = Front::bind(&config.listeners[0], None, Arc::new(shared)).await?;
    let Bind::Tcp(address) = *front.bound() else { bail!("it is on a Unix socket") };
    announce(address)?;
    let stop = CancellationToken::new();
    tokio::join!(front.run(stop.clone()), async {
        end_of_input().await;
        stop.cancel();
    });
    Ok(committer.stop().await?)
}

/// With the limits of its example configuration, and a window as large as the publishers'.
fn serve_rumqttd() -> anyhow::Result<()> {
    // It does not say which port it got.
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let config = format!(
        "id = 0\n[router]\nid = 0\nmax_connections = 1000\nmax_outgoing_packet_count = 200\n\
         max_segment_size = 104857600\nmax_segment_count = 10\n\
         [v4.1]\nname = \"v4\"\nlisten = \"{address}\"\nnext_connection_delay_ms = 1\n\
         [v4.1.connections]\nconnection_timeout_ms = 60000\nmax_payload_size = 20480\n\
         max_inflight_count = {WINDOW}\n"
    );
    let mut broker = rumqttd::Broker::new(toml::from_str(&config)?);
    let serves = thread::spawn(move || broker.start().map_err(|error| error.to_string()));
    while TcpStream::connect(address).is_err() {
        ensure!(!serves.is_finished(), "rumqttd ended: {:?}", serves.join());
        thread::sleep(Duration::from_millis(10));
    }
    announce(address)?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn announce(address: SocketAddr) -> anyhow::Result<()> {
    println!("{address}");
    Ok(std::io::stdout().flush()?)
}

/// The parent has closed our input, or is gone.
async fn end_of_input() {
    let waits = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    // However it ends, there is no more input.
    drop(waits.await);
}

/// Acks without storing.
#[derive(Default)]
struct NullLog {
    on_durable: Option<Box<dyn Fn(Mark) + Send + Sync>>,
    mark: Mark,
}

impl Append for NullLog {
    fn on_durable(&mut self, callback: impl Fn(Mark) + Send + Sync + 'static) {
        self.on_durable = Some(Box::new(callback));
    }
    fn commit(
        &mut self,
        events: &[Event],
        _control: &[Control],
        _now_us: u64,
    ) -> Result<Committed, CommitError> {
        let offsets = self.mark.watermark..self.mark.watermark + events.len() as u64;
        self.mark = Mark { commit: self.mark.commit + 1, watermark: offsets.end };
        if let Some(callback) = &self.on_durable {
            callback(self.mark);
        }
        Ok(Committed { commit: self.mark.commit, offsets })
    }
    fn retain(&mut self, _now_us: u64) -> Result<RetentionReport, StateError> {
        Ok(RetentionReport::default())
    }
    fn close(self) -> Result<(), StateError> {
        Ok(())
    }
}

/// Acks after a write and a sync.
struct FloorLog {
    file: RawFile,
    marks: NullLog,
}

impl Append for FloorLog {
    fn on_durable(&mut self, callback: impl Fn(Mark) + Send + Sync + 'static) {
        self.marks.on_durable(callback);
    }
    fn commit(
        &mut self,
        events: &[Event],
        control: &[Control],
        now_us: u64,
    ) -> Result<Committed, CommitError> {
        self.file
            .append(events)
            .map_err(|error| CommitError::Io { path: "raw".into(), reason: error.to_string() })?;
        self.marks.commit(events, control, now_us)
    }
    fn retain(&mut self, now_us: u64) -> Result<RetentionReport, StateError> {
        self.marks.retain(now_us)
    }
    fn close(self) -> Result<(), StateError> {
        self.marks.close()
    }
}
