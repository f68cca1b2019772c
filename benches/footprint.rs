//! Memory of a gateway: idle, with a backlog of 1 GB on disk, after a SIGKILL on top of it, and while
//! the backlog drains; and how long after the SIGKILL's restart it acks again.
//!
//! The gateway is the real binary as a process of its own; its upstream is away until the end. Eight
//! connections publish events of 1 KB (QoS 1, 100 in flight) until the log holds the backlog, about a
//! million events, and go on until the gateway is killed.
//!
//! `cargo bench -p gateway --bench footprint [-- --quick]`. Figures are reported, never asserted.

mod device;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use firmware_sim::collect::HttpCollector;
use gateway::Addresses;
use gateway::admin::status::Status;

const BACKLOG_BYTES: u64 = 1_000_000_000;
const QUICK_BACKLOG_BYTES: u64 = 50_000_000;
const CONNECTIONS: usize = 8;
const WINDOW: usize = 100;
const PAYLOAD_BYTES: usize = 1_000;
const PAYLOAD: [u8; PAYLOAD_BYTES] = [b'x'; PAYLOAD_BYTES];

struct Server {
    process: Child,
    addresses: Addresses,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

impl Server {
    /// Starts it, and waits until it is ready.
    fn start(config: &Path) -> anyhow::Result<Self> {
        let mut process = Command::new(env!("CARGO_BIN_EXE_edge-gateway"))
            .args(["run", "--config"])
            .arg(config)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut line = String::new();
        let stdout = process.stdout.take().context("no stdout")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let addresses = Addresses::from_ready_line(line.trim()).context("it did not get ready")?;
        Ok(Self { process, addresses })
    }

    /// A line of `/proc/PID/status` in MB.
    fn memory_mb(&self, name: &str) -> anyhow::Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        let kib: f64 = line.context("no such line")?.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1_024.0 / 1e6)
    }

    fn status(
        &self,
        http: &reqwest::Client,
        runtime: &tokio::runtime::Runtime,
    ) -> anyhow::Result<Status> {
        let url = format!("http://{}/api/v1/status", self.addresses.admin);
        let body = runtime.block_on(async { http.get(url).send().await?.bytes().await })?;
        Ok(serde_json::from_slice(&body)?)
    }

    fn report(&self, what: &str, note: &str) -> anyhow::Result<()> {
        let (now, peak) = (self.memory_mb("VmRSS")?, self.memory_mb("VmHWM")?);
        println!("{what:<34} {now:>7.1} MB {peak:>9.1} MB   {note}");
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    gateway::install_tls_provider();
    let quick = std::env::args().any(|arg| arg == "--quick");
    let backlog_bytes = if quick { QUICK_BACKLOG_BYTES } else { BACKLOG_BYTES };
    let runtime = tokio::runtime::Runtime::new()?;
    let http = reqwest::Client::new();
    let dir = tempfile::tempdir()?;
    // Taken, so that it stays free for the upstream that comes later.
    let upstream = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let config = dir.path().join("gateway.toml");
    std::fs::write(&config, toml(dir.path(), upstream))?;

    println!("{:<34} {:>10} {:>12}", "gateway", "resident", "peak");
    let server = Server::start(&config)?;
    thread::sleep(Duration::from_secs(2));
    server.report("idle", "just started, empty store")?;

    let began = Instant::now();
    let mqtt = *server.addresses.mqtt.first().context("no listener")?;
    let events = thread::scope(|scope| -> anyhow::Result<u64> {
        for n in 0..CONNECTIONS {
            // Ends with its gateway.
            scope.spawn(move || publish(mqtt, n).ok());
        }
        // Dropped, and so killed, in the middle of the load.
        let server = server;
        let status = loop {
            thread::sleep(Duration::from_millis(200));
            let status = server.status(&http, &runtime)?;
            if status.store.log_bytes >= backlog_bytes {
                break status;
            }
        };
        let (events, seconds) = (status.store.watermark, began.elapsed().as_secs_f64());
        server.report(
            &format!("with a backlog of {:.2} GB", status.store.log_bytes as f64 / 1e9),
            &format!(
                "{events} events of {PAYLOAD_BYTES} B, {:.0} acked/s",
                events as f64 / seconds
            ),
        )?;
        Ok(events)
    })?;

    let began = Instant::now();
    let server = Server::start(&config)?;
    let ready_ms = began.elapsed().as_millis();
    let mqtt = *server.addresses.mqtt.first().context("no listener")?;
    publish_one(mqtt)?;
    let acked_ms = began.elapsed().as_millis();
    let note = format!("ready after {ready_ms} ms, first ack after {acked_ms} ms");
    server.report("killed and started again", &note)?;

    let ledger = dir.path().join("received.csv");
    let collector = runtime.block_on(async { HttpCollector::start(upstream, &ledger) })?;
    let began = Instant::now();
    let mut largest_mb: f64 = 0.0;
    loop {
        thread::sleep(Duration::from_millis(200));
        largest_mb = largest_mb.max(server.memory_mb("VmRSS")?);
        let status = server.status(&http, &runtime)?;
        ensure!(began.elapsed() < Duration::from_mins(10), "the backlog does not drain");
        if status.sinks.iter().all(|sink| sink.lag_events == 0) {
            break;
        }
    }
    let rate = events as f64 / began.elapsed().as_secs_f64();
    server
        .report("drained", &format!("{rate:.0} events/s over HTTP, at most {largest_mb:.1} MB"))?;
    runtime.block_on(collector.finish());
    Ok(())
}

fn toml(dir: &Path, upstream: SocketAddr) -> String {
    let data = toml::Value::String(dir.join("data").display().to_string());
    format!(
        r#"
[gateway]
id = "footprint"
data_dir = {data}
[[listener]]
bind = "127.0.0.1:0"
[[route]]
filter = "devices/{{device}}/#"
[[sink]]
name = "upstream"
type = "http"
url = "http://{upstream}/"
retry_backoff_max = "1s"
[admin]
bind = "127.0.0.1:0"
"#
    )
}

/// Publishes in windows for as long as there is a gateway.
fn publish(mqtt: SocketAddr, n: usize) -> std::io::Result<()> {
    let (mut stream, topic) = connect(mqtt, n)?;
    let window: Vec<u8> =
        (1..=WINDOW as u16).flat_map(|id| device::publish(&topic, id, &PAYLOAD)).collect();
    let mut acks = [0; device::PUBACK_BYTES * WINDOW];
    loop {
        stream.write_all(&window)?;
        stream.read_exact(&mut acks)?;
    }
}

/// Publishes an event and waits for its ack.
fn publish_one(mqtt: SocketAddr) -> std::io::Result<()> {
    let (mut stream, topic) = connect(mqtt, 0)?;
    stream.write_all(&device::publish(&topic, 1, &PAYLOAD))?;
    stream.read_exact(&mut [0; device::PUBACK_BYTES])?;
    stream.write_all(&device::DISCONNECT)
}

/// A connection, and the topic to publish to.
fn connect(mqtt: SocketAddr, n: usize) -> std::io::Result<(TcpStream, String)> {
    let client_id = format!("dev-{n:06}");
    Ok((device::connect(mqtt, &client_id)?, format!("devices/{client_id}/telemetry")))
}
