//! `demo`: the whole journey on this machine, on embedded defaults.
//!
//! A fleet publishes to a gateway (this program as a child process), which forwards to a collector.
//! In the middle the collector goes away for a while; later the gateway is killed with SIGKILL and
//! started again. Then everything drains, and the two ledgers are audited. Loopback only, ports from
//! the system, data in a temporary folder.

mod balance;
mod child;
mod screen;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use firmware_sim::audit::audit;
use firmware_sim::collect::HttpCollector;
use firmware_sim::fleet::{Fleet, FleetConfig};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::balance::Balance;
use self::child::ChildGateway;
use self::screen::{Progress, Screen};
use super::{DONE, FAILED, UNBALANCED};
use crate::Addresses;
use crate::admin::status::Status;
use crate::cli::status::fetch;
use crate::text::count;

/// What the fleet sends and what happens to it.
#[derive(Args)]
pub(super) struct DemoArgs {
    /// Simulated devices
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    devices: u32,
    /// Events per second of the whole fleet
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// How long the fleet publishes; what is left then drains
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(4..=86_400))]
    seconds: u64,
    /// Seed of everything random in the fleet
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object at the end; progress goes to stderr
    #[arg(long)]
    json: bool,
    /// Keep the store, the log of the gateway and both ledgers in this folder
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

pub(super) fn demo(args: &DemoArgs) -> u8 {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(async {
            tokio::select! {
                ended = play(args) => ended,
                signal = ended_from_outside() => Err(anyhow::anyhow!("ended by {}", signal?)),
            }
        }),
        Err(source) => Err(source.into()),
    };
    match ended {
        Ok(balance) if balance.is_clean() => DONE,
        Ok(_) => UNBALANCED,
        Err(failure) => {
            eprintln!("edge-gateway demo: {failure:#}");
            FAILED
        }
    }
}

/// Waits for a signal that would end this process, and with it the chance to end its child and to
/// remove its folder.
async fn ended_from_outside() -> io::Result<&'static str> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        _ = hangup.recv() => "SIGHUP",
    })
}

/// Everything the demo keeps on disk.
struct Folder {
    path: PathBuf,
    /// Removed at the end unless the user keeps it.
    _temporary: Option<tempfile::TempDir>,
}

impl Folder {
    fn create(keep: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = keep else {
            let temporary = tempfile::Builder::new()
                .prefix("edge-gateway-demo-")
                .tempdir()
                .context("no temporary folder; set TMPDIR to one, or use --keep DIR")?;
            return Ok(Self { path: temporary.path().to_owned(), _temporary: Some(temporary) });
        };
        std::fs::create_dir_all(path)
            .with_context(|| format!("cannot create the folder {}", path.display()))?;
        if std::fs::read_dir(path)?.next().is_some() {
            bail!("{} is not empty; choose another folder for --keep", path.display());
        }
        Ok(Self { path: path.canonicalize()?, _temporary: None })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// The gateway's configuration: defaults, but for the ports and for pauses that suit a short show.
fn write_config(
    folder: &Folder,
    listen: Option<&Addresses>,
    upstream: SocketAddr,
) -> io::Result<PathBuf> {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let mqtt = listen.and_then(|a| a.mqtt.first().copied()).unwrap_or(any);
    let admin = listen.map_or(any, |a| a.admin);
    let data = toml::Value::String(folder.file("data").display().to_string());
    let text = format!(
        r#"# Written by edge-gateway demo.
[gateway]
id = "demo"
data_dir = {data}
[[listener]]
bind = "{mqtt}"
[[route]]
filter = "devices/{{device}}/#"
[[sink]]
name = "upstream"
type = "http"
url = "http://{upstream}/events"
request_timeout = "5s"
retry_backoff_min = "100ms"
retry_backoff_max = "1s"
[admin]
bind = "{admin}"
"#
    );
    let path = folder.file("gateway.toml");
    std::fs::write(&path, text)?;
    Ok(path)
}

/// The parts on stage.
struct Stage {
    folder: Folder,
    screen: Screen,
    collector: HttpCollector,
    gateway: ChildGateway,
    fleet: Fleet,
}

async fn play(args: &DemoArgs) -> anyhow::Result<Balance> {
    let folder = Folder::create(args.keep.as_deref())?;
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let collector = HttpCollector::start(any, &folder.file("received.csv"))?;
    let config = write_config(&folder, None, collector.addr())?;
    let gateway = ChildGateway::start(&config, &folder.file("gateway.log")).await?;
    // From now on on the same ports, also after the kill.
    let config = write_config(&folder, Some(&gateway.addresses), collector.addr())?;
    let mqtt = gateway.addresses.mqtt.first().context("the gateway has no listener")?.to_string();
    let (_broker, broker) = watch::channel(mqtt.clone());
    let fleet_config = FleetConfig {
        devices: args.devices,
        rate: args.rate.into(),
        seed: args.seed,
        ..FleetConfig::default()
    };
    let mut screen = Screen::new(args.json);
    screen.say(&format!(
        "{} devices publish {} events/s (seed {}) to {mqtt};\n\
         the gateway forwards to http://{}",
        count(args.devices.into()),
        count(args.rate.into()),
        args.seed,
        collector.addr(),
    ));
    let cancel = CancellationToken::new();
    let fleet = Fleet::start(fleet_config, broker, &folder.file("sent.csv"), &cancel)?;
    let mut stage = Stage { folder, screen, collector, gateway, fleet };
    match stage.acts(args, &config).await {
        Ok(status) => stage.settle(args, &status).await,
        Err(failure) => {
            stage.show_gateway_log();
            Err(failure)
        }
    }
}

impl Stage {
    /// Plays the acts; ends with the status of a drained gateway.
    async fn acts(&mut self, args: &DemoArgs, config: &Path) -> anyhow::Result<Status> {
        let part = |share: f64| Duration::from_secs_f64(args.seconds as f64 * share);

        self.screen.phase("steady", "every ack waits for the disk");
        self.wait(part(0.25)).await?;

        self.collector.take_down().await;
        self.screen
            .phase("outage", "the upstream is gone: devices go on, the log keeps everything");
        self.wait(part(0.20)).await?;
        self.collector.bring_back().context("the collector cannot come back")?;
        self.screen.phase("recovery", "the upstream is back: the backlog drains, in order");
        self.wait(part(0.20)).await?;

        self.screen.phase("kill -9", "the gateway is killed in mid-flight and started again");
        self.restart(config).await?;
        self.wait(part(0.35)).await?;

        self.screen.phase("drain", "the fleet stops; what is left goes out");
        self.drain().await
    }

    async fn restart(&mut self, config: &Path) -> anyhow::Result<()> {
        let log = self.folder.file("gateway.log");
        let killed = Instant::now();
        self.gateway.kill().await?;
        self.gateway = ChildGateway::start(config, &log).await?;
        let ms = killed.elapsed().as_millis();
        self.screen.say(&format!("        taking connections again {ms} ms after the kill"));
        Ok(())
    }

    fn progress(&self) -> Progress {
        let fleet = self.fleet.counters();
        Progress {
            sent: fleet.sent,
            acked: fleet.acked,
            delivered: self.collector.counters().received,
            connected: fleet.connected,
            ack_p99_ms: fleet.ack_latency.p99_us as f64 / 1_000.0,
        }
    }

    /// Lets time pass, and shows it.
    async fn wait(&mut self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.tick().await?;
        }
        Ok(())
    }

    async fn tick(&mut self) -> anyhow::Result<()> {
        tokio::time::sleep(Duration::from_millis(100)).await;
        if let Some(ended) = self.gateway.died() {
            bail!("the gateway ended by itself with {ended}");
        }
        let progress = self.progress();
        self.screen.show(Instant::now(), progress);
        Ok(())
    }

    /// Waits until everything that was produced is acked, and everything that is stored delivered.
    async fn drain(&mut self) -> anyhow::Result<Status> {
        self.fleet.stop_producing();
        let mut patience = Patience::new();
        loop {
            self.tick().await?;
            let fleet = self.fleet.counters();
            if fleet.acked == fleet.produced {
                break;
            }
            patience.spend(fleet.acked).context("the fleet's last events were not acked")?;
        }
        let mut patience = Patience::new();
        loop {
            self.tick().await?;
            let status = fetch(self.gateway.addresses.admin).await?;
            let lag: u64 = status.sinks.iter().map(|sink| sink.lag_events).sum();
            if lag == 0 {
                return Ok(status);
            }
            patience.spend(lag).context("the gateway did not deliver its backlog")?;
        }
    }

    /// Ends everything in good order and draws up the balance.
    async fn settle(mut self, args: &DemoArgs, status: &Status) -> anyhow::Result<Balance> {
        let report = self.fleet.finish(Duration::from_secs(5)).await?;
        self.gateway.stop().await?;
        self.collector.finish().await;
        let (sent, received) = (self.folder.file("sent.csv"), self.folder.file("received.csv"));
        let audit = tokio::task::spawn_blocking(move || audit(&sent, &received)).await??;
        let balance = Balance::new(args, &report, status, &audit);
        if args.json {
            println!("{}", serde_json::to_string(&balance)?);
        } else {
            self.screen.say(&balance.to_string());
        }
        if args.keep.is_some() {
            self.screen.say(&format!("kept in {}", self.folder.path.display()));
        }
        Ok(balance)
    }

    /// The last lines of the gateway's log, when something went wrong.
    fn show_gateway_log(&mut self) {
        let log = std::fs::read_to_string(self.folder.file("gateway.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(10)..];
        self.screen.say(&format!("the gateway's log ends with:\n{}", last.join("\n")));
    }
}

/// Gives up when nothing has moved for a while; a long backlog may take as long as it moves.
struct Patience {
    value: u64,
    since: Instant,
}

impl Patience {
    const LIMIT: Duration = Duration::from_secs(30);

    fn new() -> Self {
        Self { value: 0, since: Instant::now() }
    }

    fn spend(&mut self, value: u64) -> anyhow::Result<()> {
        if value != self.value {
            *self = Self { value, since: Instant::now() };
        }
        if self.since.elapsed() > Self::LIMIT {
            bail!("nothing moved for {} s", Self::LIMIT.as_secs());
        }
        Ok(())
    }
}
