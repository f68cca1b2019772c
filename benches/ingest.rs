//! Durable acks per second and CPU per event, from socket to PUBACK, between a ceiling and a floor.
//!
//! Raw MQTT 3.1.1 publishers (QoS 1, 128 B, 100 publishes in flight each) against three servers in
//! one run, in turns, each server a process of its own so that its CPU and memory can be read alone:
//!
//! - *null ceiling*: the gateway's front, rings and committer over a log that acks without storing;
//! - *durable floor*: the same over one `pwrite` and `fdatasync` per batch (see `support`);
//! - *gateway*: the whole gateway with its store, configured as it comes.
//!
//! `cargo bench -p gateway --bench ingest [-- --quick] [--seconds N] [--rounds N]`. Figures are
//! reported, never asserted. The publishers share the machine with the server: compare CPU and
//! ratios rather than rates.

mod support;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use gateway::Gateway;
use gateway::access::Access;
use gateway::config::{Bind, Config};
use gateway::ingest::{Append, Ingest, Routes};
use gateway::mqtt::{self, Downlink, Front};
use hdrhistogram::Histogram;
use redb::backends::FileBackend;
use storage::{CommitError, Committed, Control, Event, Mark, RetentionReport, StateError};
use support::{RawFile, Rounds, median};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const CONNECTIONS: [usize; 2] = [8, 64];
const WINDOW: usize = 100;
const PAYLOAD_BYTES: usize = 128;
const WARM_UP: Duration = Duration::from_millis(700);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    Null,
    Floor,
    Gateway,
}

const SERVERS: [(Server, &str); 3] = [
    (Server::Null, "null ceiling"),
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
    let rounds = Rounds::from_args(args, full, quick, |_, _| Ok(false))?;
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
        let mut results = SERVERS.map(|_| Vec::new());
        for _ in 0..rounds.count {
            for ((_, name), results) in SERVERS.iter().zip(&mut results) {
                results.push(
                    round(name, connections, rounds.time).with_context(|| (*name).to_owned())?,
                );
            }
        }
        let floor = median(&results[1], |r| r.acked_per_s);
        for ((_, name), results) in SERVERS.iter().zip(&results) {
            let acked_per_s = median(results, |r| r.acked_per_s);
            println!(
                "{connections:>11}  {name:<13} {acked_per_s:>10.0} {:>9.2} {:>14.2} {:>8.1} {:>8.1} {:>7.1}",
                acked_per_s / floor,
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
    let server = Process::start(server, dir.path())?;
    let load = Arc::new(Load::default());
    let publishers = {
        let (load, address) = (Arc::clone(&load), server.address);
        thread::spawn(move || publish_all(address, connections, &load))
    };
    thread::sleep(WARM_UP);
    let (cpu_s, acked, began) = (server.cpu_s()?, load.acked(), Instant::now());
    load.enter(Phase::Measure);
    thread::sleep(time);
    let (cpu_s, acked) = (server.cpu_s()? - cpu_s, load.acked() - acked);
    let elapsed = began.elapsed();
    let rss_mb = server.rss_mb()?;
    load.enter(Phase::Stop);
    let latency = publishers.join().expect("the publishers do not panic")?;
    server.stop()?;
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

// ---- the publishers

#[derive(Clone, Copy)]
#[repr(u8)]
enum Phase {
    Measure = 1,
    Stop = 2,
}

#[derive(Default)]
struct Load {
    phase: AtomicU8,
    acked: AtomicU64,
}

impl Load {
    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }
    fn is(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::Relaxed) == phase as u8
    }
    fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }
}

/// Publishes over all connections on this thread until told to stop. Gives the ack latencies of the
/// measured time in microseconds.
fn publish_all(
    address: SocketAddr,
    connections: usize,
    load: &Arc<Load>,
) -> anyhow::Result<Histogram<u64>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut publishers = JoinSet::new();
        for device in 0..connections {
            publishers.spawn(publish(address, device, Arc::clone(load)));
        }
        let mut all = latencies();
        while let Some(one) = publishers.join_next().await {
            all += one??;
        }
        Ok(all)
    })
}

fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("constant bounds")
}

async fn publish(
    address: SocketAddr,
    device: usize,
    load: Arc<Load>,
) -> anyhow::Result<Histogram<u64>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&connect_packet(&format!("dev-{device:06}"))).await?;
    let mut connack = [0; 4];
    stream.read_exact(&mut connack).await?;
    ensure!(connack == [0x20, 2, 0, 0], "refused: {connack:?}");

    let (packet, id_at) = publish_packet(&format!("devices/dev-{device:06}/telemetry"));
    let mut burst = packet.repeat(WINDOW);
    let mut next_id = 1_u16;
    let mut expected_id = 1_u16;
    let mut sent_at: VecDeque<Instant> = VecDeque::with_capacity(WINDOW);
    let mut acks = [0; 4 * WINDOW];
    let mut acks_len = 0;
    let mut latency = latencies();
    while !load.is(Phase::Stop) {
        // As many as were acked leave in one write, like a device that drains its backlog.
        let room = WINDOW - sent_at.len();
        for packet in burst.chunks_exact_mut(packet.len()).take(room) {
            packet[id_at..id_at + 2].copy_from_slice(&next_id.to_be_bytes());
            next_id = following(next_id);
        }
        sent_at.resize(WINDOW, Instant::now());
        stream.write_all(&burst[..room * packet.len()]).await?;

        let read = stream.read(&mut acks[acks_len..]).await?;
        ensure!(read > 0, "the server closed the connection");
        acks_len += read;
        let whole = acks_len / 4 * 4;
        let (now, measures) = (Instant::now(), load.is(Phase::Measure));
        for ack in acks[..whole].chunks_exact(4) {
            let expected = expected_id.to_be_bytes();
            ensure!(*ack == [0x40, 2, expected[0], expected[1]], "not in order: {ack:?}");
            expected_id = following(expected_id);
            let sent = sent_at.pop_front().context("an ack for nothing")?;
            if measures {
                latency.saturating_record(now.duration_since(sent).as_micros() as u64);
            }
        }
        load.acked.fetch_add(whole as u64 / 4, Ordering::Relaxed);
        acks.copy_within(whole..acks_len, 0);
        acks_len -= whole;
    }
    Ok(latency)
}

/// The packet identifier after this one; 0 is none.
fn following(id: u16) -> u16 {
    id.checked_add(1).unwrap_or(1)
}

/// CONNECT of MQTT 3.1.1: clean session, keep-alive 60 s.
fn connect_packet(client_id: &str) -> Vec<u8> {
    let mut packet = vec![0x10, (12 + client_id.len()) as u8];
    packet.extend_from_slice(b"\0\x04MQTT\x04\x02\0\x3c\0");
    packet.push(client_id.len() as u8);
    packet.extend_from_slice(client_id.as_bytes());
    packet
}

/// A QoS 1 PUBLISH, and where its packet identifier is.
fn publish_packet(topic: &str) -> (Vec<u8>, usize) {
    let remaining = 2 + topic.len() + 2 + PAYLOAD_BYTES;
    assert!((128..1 << 14).contains(&remaining), "a remaining length of two bytes");
    let mut packet = vec![0x32, (remaining % 128) as u8 | 0x80, (remaining / 128) as u8];
    packet.extend_from_slice(&(topic.len() as u16).to_be_bytes());
    packet.extend_from_slice(topic.as_bytes());
    let id_at = packet.len();
    packet.extend_from_slice(&[0; 2]);
    packet.extend((0..PAYLOAD_BYTES).map(|i| (i * 37) as u8));
    (packet, id_at)
}

// ---- a server in its own process

struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    fn start(server: &str, dir: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", server])
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("piped")?).read_line(&mut line)?;
        let address = line.trim().parse().with_context(|| format!("no address: {line:?}"))?;
        Ok(Self { child, address })
    }

    /// CPU time that it has used, in seconds.
    fn cpu_s(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // User and system time are the 12th and 13th field behind the name in brackets.
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let ticks: Vec<u64> = fields.skip(11).take(2).flat_map(str::parse).collect();
        ensure!(ticks.len() == 2, "cannot read {stat:?}");
        let per_second = rustix::param::clock_ticks_per_second() as f64;
        Ok((ticks[0] + ticks[1]) as f64 / per_second)
    }

    /// Its resident memory.
    fn rss_mb(&self) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"));
        let kib: f64 = kib.context("no VmRSS")?.trim().parse()?;
        Ok(kib * 1024.0 / 1e6)
    }

    /// Tells it to stop, by the end of its input, and waits until it has.
    fn stop(mut self) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }
}

fn serve(server: Server, dir: &Path) -> anyhow::Result<()> {
    let config = Config::parse("bench", &settings(dir), &|_| None)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match server {
            Server::Null => serve_front(config, NullLog::default()).await,
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

/// The configuration as it comes, but on free ports.
fn settings(dir: &Path) -> String {
    format!(
        "gateway = {{ data_dir = '{}', shutdown_grace = \"2s\" }}\n\
         admin = {{ bind = \"127.0.0.1:0\" }}\n\
         [[listener]]\ntype = \"mqtt\"\nbind = \"127.0.0.1:0\"\n\
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
