//! A hostile network: what is left to good clients beside it.
//!
//! The good ones are 64 connections that publish with QoS 1 and 128 B, at half of the rate that they
//! reach as fast as acks come, measured in the same run. They are measured alone and then beside one
//! attack, in turns; an attack is four processes on 127.x addresses of their own, with 10,000 clients
//! in all if nothing else is said:
//!
//! - *slow loris*: 6,000 connections that send a byte a second, of a TLS handshake, a CONNECT, or a
//!   PUBLISH, and come again when they are cut off;
//! - *half open*: 6,000 connections that never say a thing, vanish behind their CONNECT, or fall
//!   silent until their keep-alive is over; 48 that subscribe to a good device and never read;
//! - *storm, …*: everybody connects, is let in, is gone without a word, and connects again, at once:
//!   over TCP; over TLS; with one user's password; each with a password of its own; with wrong ones;
//! - *flood*: one device that publishes as fast as it can, on a listener with a rate.
//!
//! What an attacker's machine has to do it does here too, so attackers run at the lowest priority.
//! The gateway is the real binary as a process of its own, and does not.
//!
//! `cargo bench -p gateway --bench storm [-- --quick] [--seconds N] [--rounds N] [--only NAME]`.
//! Figures are reported, never asserted.

mod clients;
mod process;
mod publishers;
mod rounds;

use std::io::{BufRead as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clients::{Opener, Way, connect_packet, listeners};
use gateway::Addresses;
use gateway::access::users;
use process::Process;
use publishers::{Load, publish_all};
use rounds::{Rounds, median};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const GOOD: usize = 64;
/// Processes of one attack.
const ATTACKERS: usize = 4;
/// How long the gateway gets to feel an attack, or to forget one, before it is measured.
const SETTLES: Duration = Duration::from_secs(2);
const PASSWORD: &str = "correct horse";
/// Longest that a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What an attack does, over which listener, with how many clients.
struct Attack {
    name: &'static str,
    kind: Kind,
    listener: usize,
    clients: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    SlowLoris,
    HalfOpen,
    Storm(Login),
    Flood,
}

/// What clients of a storm say of themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Login {
    Nothing,
    OneUser,
    ManyUsers,
    Wrong,
}

/// Those of `clients::WAYS`, and one with a rate.
const TCP: usize = 0;
const TLS: usize = 1;
const RATED: usize = 3;

const ATTACKS: [Attack; 8] = [
    Attack { name: "slow loris", kind: Kind::SlowLoris, listener: TLS, clients: 6_000 },
    Attack { name: "half open", kind: Kind::HalfOpen, listener: TCP, clients: 6_048 },
    storm("storm, TCP", TCP, Login::Nothing),
    storm("storm, TLS", TLS, Login::Nothing),
    storm("storm, one user", TCP, Login::OneUser),
    storm("storm, many users", TCP, Login::ManyUsers),
    storm("storm, wrong passwords", TCP, Login::Wrong),
    Attack { name: "flood", kind: Kind::Flood, listener: RATED, clients: ATTACKERS },
];

const fn storm(name: &'static str, listener: usize, login: Login) -> Attack {
    Attack { name, kind: Kind::Storm(login), listener, clients: 10_000 }
}

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("good") => return good(&args[1..]),
        Some("attack") => return attack(&args[1..]),
        _ => {}
    }
    let full = Rounds { count: 3, time: Duration::from_secs(4) };
    let quick = Rounds { count: 1, time: Duration::from_secs(2) };
    let mut only = None;
    let rounds = Rounds::from_args(args.into_iter(), full, quick, |arg, value| {
        let known = arg == "--only";
        if known {
            only = Some(value()?);
        }
        Ok(known)
    })?;
    let chosen = |attack: &&Attack| only.as_ref().is_none_or(|only| attack.name.contains(only));
    let attacks: Vec<_> = ATTACKS.iter().filter(chosen).collect();
    ensure!(!attacks.is_empty(), "no attack is named {only:?}");
    measure(&attacks, rounds)
}

/// The good clients, and the gateway meanwhile.
struct Outcome {
    acked_per_s: f64,
    p99_ms: f64,
    cpus: f64,
    rss_mb: f64,
    /// What the attackers got done.
    attempts_per_s: f64,
}

fn measure(attacks: &[&Attack], rounds: Rounds) -> anyhow::Result<()> {
    // On the disk that holds the build, not in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let config = dir.path().join("gateway.toml");
    std::fs::write(&config, configuration(dir.path())?)?;
    let mut gateway = Command::new(env!("CARGO_BIN_EXE_edge-gateway"));
    gateway.args(["run", "--config"]).arg(&config).stderr(Stdio::null());
    let mut gateway = Process::start(&mut gateway)?;
    let addresses = Addresses::from_ready_line(&gateway.line()?).context("it did not get ready")?;
    let brokers = addresses.mqtt;

    let saturated = {
        let mut fast = Good::start(brokers[TCP], None)?;
        thread::sleep(SETTLES);
        fast.measure(&gateway, &mut [], rounds.time)?.acked_per_s
    };
    let mut good = Good::start(brokers[TCP], Some(saturated / 2.0))?;
    println!(
        "{GOOD} good clients at {:.0} events/s, half of {saturated:.0}; median of {} rounds of {:?} \
         alone and beside; {} CPUs for everybody",
        saturated / 2.0,
        rounds.count,
        rounds.time,
        thread::available_parallelism()?,
    );
    println!(
        "{:<24} {:>10} {:>10} {:>6} {:>9} {:>9} {:>11} {:>11} {:>12}",
        "beside",
        "alone/s",
        "beside/s",
        "ratio",
        "p99 ms",
        "p99 ms",
        "CPUs",
        "RSS MB",
        "attempts/s"
    );
    for attack in attacks {
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        for _ in 0..rounds.count {
            thread::sleep(SETTLES);
            alone.push(good.measure(&gateway, &mut [], rounds.time)?);
            let mut attackers = attack.start(brokers[attack.listener], dir.path())?;
            thread::sleep(SETTLES);
            beside.push(good.measure(&gateway, &mut attackers, rounds.time)?);
        }
        let of = |outcomes: &[Outcome], figure: fn(&Outcome) -> f64| median(outcomes, figure);
        println!(
            "{:<24} {:>10.0} {:>10.0} {:>6.2} {:>9.1} {:>9.1} {:>4.2} {:>6.2} {:>4.0} {:>6.0} {:>12.0}",
            attack.name,
            of(&alone, |o| o.acked_per_s),
            of(&beside, |o| o.acked_per_s),
            of(&beside, |o| o.acked_per_s) / of(&alone, |o| o.acked_per_s),
            of(&alone, |o| o.p99_ms),
            of(&beside, |o| o.p99_ms),
            of(&alone, |o| o.cpus),
            of(&beside, |o| o.cpus),
            of(&alone, |o| o.rss_mb),
            of(&beside, |o| o.rss_mb),
            of(&beside, |o| o.attempts_per_s),
        );
    }
    Ok(())
}

/// A listener for each way and one with a rate; thousands of users, all with one hash, since to check
/// it takes as long for each.
fn configuration(dir: &Path) -> anyhow::Result<String> {
    let hash = users::hash(PASSWORD.as_bytes())?;
    let users_file = dir.join("users");
    let users: Vec<_> = (0..10_000).map(|n| format!("user-{n}:{hash}\n")).collect();
    std::fs::write(&users_file, users.concat())?;
    let more = "connections_max = 20000\n";
    Ok(format!(
        "[gateway]\ndata_dir = \"{}\"\n[admin]\nbind = \"127.0.0.1:0\"\n\
         [auth]\nusers_file = \"{}\"\n{}\
         [[listener]]\nbind = \"127.0.0.1:0\"\nevents_per_second_max = 1000\n\
         [[route]]\nfilter = \"devices/{{device}}/#\"\n",
        dir.join("data").display(),
        users_file.display(),
        listeners(dir, more)?,
    ))
}

// ---- the good clients, in a process of their own

struct Good(Process);

impl Good {
    /// `rate` is that of all together.
    fn start(broker: SocketAddr, rate: Option<f64>) -> anyhow::Result<Self> {
        let each = rate.map_or("as fast as it can".to_owned(), |r| (r / GOOD as f64).to_string());
        let mut command = Command::new(std::env::current_exe()?);
        Process::start(command.args(["good", &broker.to_string(), &each])).map(Self)
    }

    /// Measures them for a while, beside whom there is.
    fn measure(
        &mut self,
        gateway: &Process,
        attackers: &mut [Process],
        time: Duration,
    ) -> anyhow::Result<Outcome> {
        self.report()?;
        let attempts: u64 = count_all(attackers)?;
        let (began, cpu_s) = (Instant::now(), gateway.cpu_s()?);
        thread::sleep(time);
        let (acked_per_s, p99_ms) = self.report()?;
        let (took, cpu_s) = (began.elapsed().as_secs_f64(), gateway.cpu_s()? - cpu_s);
        Ok(Outcome {
            acked_per_s,
            p99_ms,
            cpus: cpu_s / took,
            rss_mb: gateway.rss_mb()?,
            attempts_per_s: (count_all(attackers)? - attempts) as f64 / took,
        })
    }

    /// Acks per second and the 99th percentile in milliseconds since the last call.
    fn report(&mut self) -> anyhow::Result<(f64, f64)> {
        let line = ask(&mut self.0)?;
        let (acked_per_s, p99_ms) = line.split_once(' ').context("two figures")?;
        Ok((acked_per_s.parse()?, p99_ms.parse()?))
    }
}

/// Asks for a line, and gets it.
fn ask(process: &mut Process) -> anyhow::Result<String> {
    process.child.stdin.as_mut().context("piped")?.write_all(b"\n")?;
    process.line()
}

fn count_all(attackers: &mut [Process]) -> anyhow::Result<u64> {
    attackers.iter_mut().map(|attacker| Ok(ask(attacker)?.parse::<u64>()?)).sum()
}

fn good(args: &[String]) -> anyhow::Result<()> {
    let [broker, rate] = args else { bail!("good BROKER RATE, not {args:?}") };
    let (broker, rate) = (broker.parse()?, rate.parse().ok());
    let load = Arc::new(Load::default());
    let counts = Arc::clone(&load);
    let publishes = thread::spawn(move || publish_all(broker, GOOD, rate, &counts));
    let (mut since, mut before) = (Instant::now(), 0);
    for line in std::io::stdin().lock().lines() {
        line?;
        if publishes.is_finished() {
            break;
        }
        let (now, acked, latency) = (Instant::now(), load.acked(), load.take_latency());
        let rate = (acked - before) as f64 / (now - since).as_secs_f64();
        println!("{rate} {}", latency.value_at_quantile(0.99) as f64 / 1e3);
        (since, before) = (now, acked);
    }
    load.stop();
    publishes.join().expect("the publishers do not panic")
}

// ---- an attack, in processes of its own

impl Attack {
    fn start(&self, broker: SocketAddr, dir: &Path) -> anyhow::Result<Vec<Process>> {
        let start = |n: usize| {
            let source = Ipv4Addr::new(127, 0, 0, 2 + n as u8).to_string();
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["attack", self.name, &broker.to_string(), &source]);
            Process::start(command.arg(dir))
        };
        (0..ATTACKERS).map(start).collect()
    }
}

/// One process of an attack: says how often it has tried whenever it is asked.
fn attack(args: &[String]) -> anyhow::Result<()> {
    let [name, broker, source, dir] = args else {
        bail!("attack NAME BROKER SOURCE DIR, not {args:?}");
    };
    rustix::process::nice(19)?;
    let attack = ATTACKS.iter().find(|attack| attack.name == name).context("no such attack")?;
    let way = if attack.listener == TLS { Way::Tls } else { Way::Tcp };
    let source = source.parse()?;
    let opener = Opener::new(way, broker.parse()?, source, Path::new(dir))?;
    let attempts = Arc::new(AtomicU64::new(0));
    let counts = Arc::clone(&attempts);
    thread::spawn(move || attack_on(attack, source, &opener, &counts));
    for line in std::io::stdin().lock().lines() {
        line?;
        println!("{}", attempts.load(Ordering::Relaxed));
    }
    // With the process its connections are gone, as when a network fails.
    Ok(())
}

fn attack_on(attack: &Attack, source: Ipv4Addr, opener: &Opener, attempts: &Arc<AtomicU64>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let mut clients = JoinSet::new();
        for n in 0..attack.clients / ATTACKERS {
            let (kind, opener, attempts) = (attack.kind, opener.clone(), Arc::clone(attempts));
            clients.spawn(async move {
                loop {
                    // However it ends: the next try shows whether the gateway is there.
                    let tried = tried(kind, n, source, &opener);
                    if !matches!(timeout(PATIENCE, tried).await, Ok(Ok(()))) {
                        sleep(Duration::from_millis(100)).await;
                    }
                    attempts.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        clients.join_all().await;
    });
}

async fn tried(kind: Kind, n: usize, source: Ipv4Addr, opener: &Opener) -> anyhow::Result<()> {
    let id = format!("{source}-{n}");
    match kind {
        Kind::SlowLoris => drip(n, &id, opener).await,
        Kind::HalfOpen => stay_half_open(n, &id, opener).await,
        Kind::Storm(login) => {
            let wrong = format!("wrong {}", fastrand::u64(..));
            // The addresses' last bytes tell them apart.
            let user = format!("user-{}", n * ATTACKERS + usize::from(source.octets()[3]) - 2);
            let user = match login {
                Login::Nothing => None,
                Login::OneUser => Some(("user-0", PASSWORD)),
                Login::ManyUsers => Some((&*user, PASSWORD)),
                Login::Wrong => Some((&*user, &*wrong)),
            };
            opener.open(&connect_packet(&id, 60, user)).await.map(drop)
        }
        Kind::Flood => flood(&id, opener).await,
    }
}

/// A byte a second of something that never ends.
async fn drip(n: usize, id: &str, opener: &Opener) -> anyhow::Result<()> {
    let connect = connect_packet(id, 60, None);
    let client_hello = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xFC, 3, 3][..], &[7; 64]].concat();
    let (mut stream, bytes) = match n % 3 {
        // The other two have no business with TLS: to it they are the beginning of a long record.
        0 => (Box::new(opener.connect().await?) as Box<dyn clients::Stream>, client_hello),
        1 => (Box::new(opener.connect().await?) as _, connect),
        _ => (opener.open(&connect).await?.0, [&[0x32, 0x80, 0x10][..], &[b'd'; 64]].concat()),
    };
    for byte in bytes {
        stream.write_all(&[byte]).await?;
        sleep(Duration::from_secs(1)).await;
    }
    Ok(())
}

async fn stay_half_open(n: usize, id: &str, opener: &Opener) -> anyhow::Result<()> {
    if n < 12 {
        let (mut stream, _) = opener.open(&connect_packet(id, 0, None)).await?;
        let filter = b"devices/dev-000001/telemetry";
        let content = [&[0, 1, 0, filter.len() as u8][..], filter, &[0]].concat();
        stream.write_all(&[&[0x82, content.len() as u8][..], &content].concat()).await?;
        sleep(PATIENCE).await;
        return Ok(());
    }
    match n % 3 {
        0 => drop(opener.connect().await?.read_u8().await),
        1 => {
            let mut stream = opener.connect().await?;
            stream.write_all(&connect_packet(id, 60, None)).await?;
            sleep(Duration::from_millis(500)).await;
        }
        _ => drop(opener.open(&connect_packet(id, 1, None)).await?.0.read_u8().await),
    }
    Ok(())
}

async fn flood(id: &str, opener: &Opener) -> anyhow::Result<()> {
    let (stream, _) = opener.open(&connect_packet(id, 60, None)).await?;
    let topic = b"devices/flood/t";
    let content = [&[0, topic.len() as u8][..], topic, &[0, 1], &[7; 64]].concat();
    let publish = [&[0x32, content.len() as u8][..], &content].concat().repeat(256);
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sends = async {
        loop {
            writer.write_all(&publish).await?;
        }
    };
    let reads = async {
        let mut acks = [0; 4096];
        while reader.read(&mut acks).await? > 0 {}
        Ok(())
    };
    tokio::select! {
        ended = sends => ended,
        ended = reads => ended,
    }
}
