//! A gateway as a process of its own, and publishers at a steady rate.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{io, sync::Arc};

use anyhow::Context;
use gateway::Addresses;
use gateway::admin::status::{SinkStatus, Status};
use tokio::runtime::Runtime;

use super::backlog::now_us;
use super::device;

const CONNECTIONS: u64 = 8;
/// Publishes of one connection that wait for their ack at most.
const WINDOW: u64 = 500;

/// The real binary.
pub(crate) struct Server {
    process: Child,
    pub(crate) addresses: Addresses,
    http: reqwest::Client,
    runtime: Runtime,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

impl Server {
    /// Starts it over `dir/data`, with these sinks, and waits until it is ready.
    pub(crate) fn start(dir: &Path, sinks: &str) -> anyhow::Result<Self> {
        let config = configure(dir, sinks)?;
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
        let http = reqwest::Client::builder().no_proxy().build()?;
        Ok(Self { process, addresses, http, runtime: Runtime::new()? })
    }

    pub(crate) fn status(&self) -> anyhow::Result<Status> {
        let url = format!("http://{}/api/v1/status", self.addresses.admin);
        let body =
            self.runtime.block_on(async { self.http.get(url).send().await?.bytes().await })?;
        Ok(serde_json::from_slice(&body)?)
    }

    pub(crate) fn sink(&self, name: &str) -> anyhow::Result<SinkStatus> {
        let sinks = self.status()?.sinks;
        sinks.into_iter().find(|sink| sink.name == name).context("no such sink")
    }

    /// A line of `/proc/PID/status` in MB.
    pub(crate) fn memory_mb(&self, name: &str) -> anyhow::Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        let kib: f64 = line.context("no such line")?.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1_024.0 / 1e6)
    }
}

fn configure(dir: &Path, sinks: &str) -> anyhow::Result<PathBuf> {
    let data = toml::Value::String(dir.join("data").display().to_string());
    let text = format!(
        r#"
[gateway]
id = "bench"
data_dir = {data}
[[listener]]
bind = "127.0.0.1:0"
[[route]]
filter = "devices/{{device}}/#"
[storage]
quota_bytes = "60GiB"
free_bytes_min = 0
[admin]
bind = "127.0.0.1:0"
{sinks}"#
    );
    let path = dir.join("gateway.toml");
    std::fs::write(&path, text)?;
    Ok(path)
}

/// Publishes at a steady rate until it is dropped.
pub(crate) struct Fleet {
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Fleet {
    pub(crate) fn start(mqtt: SocketAddr, events_per_second: f64, payload_bytes: usize) -> Self {
        let (stop, acked) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let rate = events_per_second / CONNECTIONS as f64;
        let threads = (0..CONNECTIONS).map(|n| {
            let (stop, acked) = (Arc::clone(&stop), Arc::clone(&acked));
            thread::spawn(move || publish(mqtt, n, rate, payload_bytes, &stop, &acked))
        });
        let threads = threads.collect();
        Self { stop, acked, threads }
    }

    pub(crate) fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    pub(crate) fn end(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("publishers do not panic")?;
        }
        Ok(())
    }
}

/// One device: what is due goes in one write, QoS 1, with the time of its publish in the payload.
fn publish(
    mqtt: SocketAddr,
    n: u64,
    rate: f64,
    payload_bytes: usize,
    stop: &AtomicBool,
    acked: &AtomicU64,
) -> io::Result<()> {
    let client_id = format!("live-{n:06}");
    let topic = format!("devices/{client_id}/telemetry");
    let mut stream = device::connect(mqtt, &client_id)?;
    let (began, mut sent) = (Instant::now(), 0);
    let mut acks = vec![0; device::PUBACK_BYTES * WINDOW as usize];
    while !stop.load(Ordering::Relaxed) {
        let due = (began.elapsed().as_secs_f64() * rate) as u64;
        let count = (due - sent).min(WINDOW);
        if count == 0 {
            thread::sleep(Duration::from_millis(5));
            continue;
        }
        let mut burst = Vec::new();
        for id in 1..=count as u16 {
            let mut payload = format!(r#"{{"sent_us":{},"noise":""#, now_us()).into_bytes();
            payload.resize(payload_bytes.max(payload.len() + 2) - 2, b'x');
            payload.extend(b"\"}");
            burst.extend(device::publish(&topic, id, &payload));
        }
        stream.write_all(&burst)?;
        stream.read_exact(&mut acks[..device::PUBACK_BYTES * count as usize])?;
        sent += count;
        acked.fetch_add(count, Ordering::Relaxed);
    }
    stream.write_all(&device::DISCONNECT)
}
