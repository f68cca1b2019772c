//! Ten thousand idle connections: how long it takes until all are there, and what each costs in CPU
//! and memory, over TCP, TLS and WebSocket.
//!
//! The gateway is the real binary as a process of its own. The clients are four more processes, each on
//! a 127.x address of its own, which connect 64 at a time, and then say nothing.
//!
//! `cargo bench -p gateway --bench connections [-- --count N]`. Figures are reported, never asserted.

mod clients;
mod process;

use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clients::{Opener, Stream, WAYS, connect_packet, listeners};
use gateway::Addresses;
use process::Process;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const CONNECTIONS: usize = 10_000;
const CLIENTS: usize = 4;
/// Connections that one client process opens at once.
const OPENING_MAX: usize = 64;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|arg| arg == "client") {
        return client(&args[at + 1..]);
    }
    let count = match args.iter().position(|arg| arg == "--count") {
        Some(at) => args.get(at + 1).context("--count wants a number")?.parse()?,
        None => CONNECTIONS,
    };
    println!(
        "{:<12} {:>12} {:>12} {:>12} {:>14} {:>14} {:>14}",
        "over", "connections", "all there", "CPU each", "RSS before", "RSS with all", "RSS each"
    );
    for (listener, (way, _)) in WAYS.iter().enumerate() {
        measure(way, listener, count)?;
    }
    Ok(())
}

fn measure(way: &str, listener: usize, count: usize) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let config = dir.path().join("gateway.toml");
    std::fs::write(&config, configuration(dir.path(), count)?)?;
    let mut gateway = Command::new(env!("CARGO_BIN_EXE_edge-gateway"));
    gateway.args(["run", "--config"]).arg(&config).stderr(Stdio::null());
    let mut gateway = Process::start(&mut gateway)?;
    let addresses = Addresses::from_ready_line(&gateway.line()?);
    let broker = addresses.context("it did not get ready")?.mqtt[listener];
    std::thread::sleep(Duration::from_secs(1));
    let (cpu_s, before) = (gateway.cpu_s()?, gateway.rss_mb()?);

    let began = Instant::now();
    let mut clients = Vec::new();
    for n in 0..CLIENTS {
        let share = count / CLIENTS + usize::from(n < count % CLIENTS);
        let source = Ipv4Addr::new(127, 0, 0, 2 + n as u8);
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["client", way, &broker.to_string(), &source.to_string()]);
        clients.push(Process::start(command.arg(share.to_string()).arg(dir.path()))?);
    }
    for client in &mut clients {
        let line = client.line()?;
        ensure!(line == "all there", "a client said {line:?}");
    }
    let (took, cpu_s) = (began.elapsed(), gateway.cpu_s()? - cpu_s);
    std::thread::sleep(Duration::from_secs(1));
    let with_all = gateway.rss_mb()?;
    println!(
        "{way:<12} {count:>12} {:>10.2} s {:>9.1} µs {before:>11.1} MB {with_all:>11.1} MB {:>11.1} KB",
        took.as_secs_f64(),
        cpu_s / count as f64 * 1e6,
        (with_all - before) / count as f64 * 1e3,
    );
    Ok(())
}

/// A listener for each way, in their order.
fn configuration(dir: &Path, count: usize) -> anyhow::Result<String> {
    let more = format!("connections_max = {}\nconnect_timeout = \"60s\"\n", count + 1);
    Ok(format!(
        "[gateway]\ndata_dir = \"{}\"\n[admin]\nbind = \"127.0.0.1:0\"\n{}",
        dir.join("data").display(),
        listeners(dir, &more)?,
    ))
}

/// One process of clients: opens its share, says so, and holds it until its stdin ends.
fn client(args: &[String]) -> anyhow::Result<()> {
    let [way, broker, source, count, dir] = args else {
        bail!("client WAY BROKER SOURCE COUNT DIR, not {args:?}");
    };
    let source = source.parse()?;
    let way = WAYS.into_iter().find(|(name, _)| name == way).context("no such way")?.1;
    let opener = Opener::new(way, broker.parse()?, source, Path::new(dir))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _connections = runtime.block_on(open_all(opener, source, count.parse()?))?;
    println!("all there");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

async fn open_all(
    opener: Opener,
    source: Ipv4Addr,
    count: usize,
) -> anyhow::Result<Vec<Box<dyn Stream>>> {
    let opening = Arc::new(Semaphore::new(OPENING_MAX));
    let mut tasks = JoinSet::new();
    for n in 0..count {
        let (opener, opening) = (opener.clone(), opening.clone());
        tasks.spawn(async move {
            let _turn = opening.acquire().await?;
            let (stream, code) =
                opener.open(&connect_packet(&format!("{source}-{n}"), 0, None)).await?;
            ensure!(code == 0, "refused: {code}");
            anyhow::Ok(stream)
        });
    }
    let mut connections = Vec::with_capacity(count);
    while let Some(opened) = tasks.join_next().await {
        connections.push(opened??);
    }
    Ok(connections)
}
