//! Ten thousand idle connections: how long it takes until all are there, and what each costs in memory,
//! over TCP, TLS and WebSocket.
//!
//! The gateway is the real binary as a process of its own. The clients are four more processes, each on
//! a 127.x address of its own, which connect 64 at a time over MQTT 5, and then say nothing.
//!
//! `cargo bench -p gateway --bench connections [-- --count N]`. Figures are reported, never asserted.

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use gateway::Addresses;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

const CONNECTIONS: usize = 10_000;
const CLIENTS: usize = 4;
/// Connections that one client process opens at once.
const OPENING_MAX: usize = 64;
const WAYS: [&str; 3] = ["tcp", "tls", "websocket"];

/// A child that is killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

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
        "{:<12} {:>12} {:>12} {:>14} {:>14} {:>14}",
        "over", "connections", "all there", "RSS before", "RSS with all", "each"
    );
    for (listener, way) in WAYS.iter().enumerate() {
        measure(way, listener, count)?;
    }
    Ok(())
}

fn measure(way: &str, listener: usize, count: usize) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let certificate = dir.path().join("cert.pem");
    let config = dir.path().join("gateway.toml");
    std::fs::write(&config, configuration(dir.path(), &certificate, count)?)?;
    let mut gateway = Command::new(env!("CARGO_BIN_EXE_edge-gateway"));
    gateway.args(["run", "--config"]).arg(&config).stderr(Stdio::null());
    let (gateway, line, _stdout) = start(&mut gateway)?;
    let addresses = Addresses::from_ready_line(line.trim()).context("it did not get ready")?;
    let broker = addresses.mqtt[listener];
    std::thread::sleep(Duration::from_secs(1));
    let before = rss_bytes(&gateway)?;

    let began = Instant::now();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let share = count / CLIENTS + usize::from(n < count % CLIENTS);
            let mut command = Command::new(std::env::current_exe()?);
            let source = Ipv4Addr::new(127, 0, 0, 2 + n as u8);
            command.args(["client", way, &broker.to_string(), &source.to_string()]);
            command.arg(share.to_string()).arg(&certificate).stdin(Stdio::piped());
            let child = command.stdout(Stdio::piped()).spawn()?;
            Ok(Process(child))
        })
        .collect::<anyhow::Result<_>>()?;
    let mut clients = clients;
    for client in &mut clients {
        let mut line = String::new();
        BufReader::new(client.0.stdout.take().context("no stdout")?).read_line(&mut line)?;
        ensure!(line.trim() == "all there", "a client said {line:?}");
    }
    let took = began.elapsed();
    std::thread::sleep(Duration::from_secs(1));
    let with_all = rss_bytes(&gateway)?;
    println!(
        "{way:<12} {count:>12} {:>10.2} s {:>11.1} MB {:>11.1} MB {:>12.1} KB",
        took.as_secs_f64(),
        before as f64 / 1e6,
        with_all as f64 / 1e6,
        (with_all - before) as f64 / count as f64 / 1e3,
    );
    Ok(())
}

/// Starts a process, and gives its first line.
fn start(command: &mut Command) -> anyhow::Result<(Process, String, BufReader<ChildStdout>)> {
    let mut child = Process(command.stdout(Stdio::piped()).spawn()?);
    let mut stdout = BufReader::new(child.0.stdout.take().context("no stdout")?);
    let mut line = String::new();
    stdout.read_line(&mut line)?;
    Ok((child, line, stdout))
}

fn rss_bytes(process: &Process) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{}/status", process.0.id()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: u64 = line.context("no VmRSS")?.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

/// A listener for each way, in their order.
fn configuration(dir: &Path, certificate: &Path, count: usize) -> anyhow::Result<String> {
    let key = KeyPair::generate()?;
    let signed = CertificateParams::new(vec!["localhost".to_owned()])?.self_signed(&key)?;
    std::fs::write(certificate, signed.pem())?;
    let key_file = dir.join("key.pem");
    std::fs::write(&key_file, key.serialize_pem())?;
    let listener = |kind| {
        format!(
            "[[listener]]\ntype = \"{kind}\"\nbind = \"127.0.0.1:0\"\nconnections_max = {}\n\
             connect_timeout = \"60s\"\n",
            count + 1
        )
    };
    Ok(format!(
        "[gateway]\ndata_dir = \"{}\"\n[admin]\nbind = \"127.0.0.1:0\"\n{}{}[listener.tls]\n\
         cert_file = \"{}\"\nkey_file = \"{}\"\n{}",
        dir.join("data").display(),
        listener("mqtt"),
        listener("mqtt"),
        certificate.display(),
        key_file.display(),
        listener("websocket"),
    ))
}

/// One process of clients: opens its share, says so, and holds it until its stdin ends.
fn client(args: &[String]) -> anyhow::Result<()> {
    let [way, broker, source, count, certificate] = args else {
        bail!("client WAY BROKER SOURCE COUNT CERTIFICATE, not {args:?}");
    };
    let (broker, source) = (broker.parse()?, source.parse()?);
    let certificate = CertificateDer::from_pem_file(certificate)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let open = open_all(way.clone(), broker, source, count.parse()?, certificate);
    let _connections = runtime.block_on(open)?;
    println!("all there");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

async fn open_all(
    way: String,
    broker: SocketAddr,
    source: Ipv4Addr,
    count: usize,
    certificate: CertificateDer<'static>,
) -> anyhow::Result<Vec<Box<dyn Stream>>> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tls = TlsConnector::from(Arc::new(config));
    let opening = Arc::new(Semaphore::new(OPENING_MAX));
    let mut tasks = JoinSet::new();
    for n in 0..count {
        let (way, tls, opening) = (way.clone(), tls.clone(), opening.clone());
        tasks.spawn(async move {
            let _turn = opening.acquire().await?;
            let socket = TcpSocket::new_v4()?;
            socket.bind((source, 0).into())?;
            let stream = socket.connect(broker).await?;
            stream.set_nodelay(true)?;
            let id = format!("{source}-{n}");
            Box::pin(open(&way, tls, stream, &id)).await
        });
    }
    let mut connections = Vec::with_capacity(count);
    while let Some(opened) = tasks.join_next().await {
        connections.push(opened??);
    }
    Ok(connections)
}

async fn open(
    way: &str,
    tls: TlsConnector,
    stream: TcpStream,
    id: &str,
) -> anyhow::Result<Box<dyn Stream>> {
    let mut stream: Box<dyn Stream> = match way {
        "tls" => Box::new(tls.connect(ServerName::try_from("localhost")?, stream).await?),
        _ => Box::new(stream),
    };
    let id_len = (id.len() as u16).to_be_bytes();
    let head = [0, 4, b'M', b'Q', b'T', b'T', 5, 2, 0, 0, 0];
    let content = [&head[..], &id_len, id.as_bytes()].concat();
    let mut connect = [&[0x10, content.len() as u8][..], &content].concat();
    if way == "websocket" {
        let request = format!(
            "GET /mqtt HTTP/1.1\r\nHost: {id}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: mqtt\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await?);
        }
        // One masked frame, the mask of which is zero.
        connect = [&[0x82, 0x80 | connect.len() as u8, 0, 0, 0, 0][..], &connect].concat();
    }
    stream.write_all(&connect).await?;
    let mut answer = [0; 2];
    if way == "websocket" {
        stream.read_exact(&mut answer).await?;
    }
    stream.read_exact(&mut answer).await?;
    let mut connack = vec![0; usize::from(answer[1])];
    stream.read_exact(&mut connack).await?;
    ensure!(answer[0] == 0x20 && connack[1] == 0, "CONNACK {connack:x?}");
    Ok(stream)
}
