//! One test's place: its folder, its ports, its configuration, its fleets.

use std::collections::HashSet;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use firmware_sim::collect::HttpCollector;
use firmware_sim::fleet::{Fleet, FleetConfig};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{GatewayProcess, PATIENCE, assert_balanced, sink};

/// Rotated files of a file sink that are read back, at most.
const ROTATED_MAX: usize = 1_000;

/// A folder, two addresses that stay the same over restarts, and a seed.
pub(crate) struct Bench {
    folder: TempDir,
    pub(crate) seed: u64,
    pub(crate) mqtt: SocketAddr,
    pub(crate) admin: SocketAddr,
}

impl Bench {
    pub(crate) fn new(own_seed: u64) -> Self {
        gateway::install_tls_provider();
        Self {
            folder: tempfile::Builder::new().prefix("edge-gateway-test-").tempdir().unwrap(),
            seed: super::seed(own_seed),
            mqtt: stable_address(),
            admin: stable_address(),
        }
    }

    /// A path inside the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a configuration: this bench's addresses and data folder, then `more`, which is TOML.
    pub(crate) fn configure(&self, more: &str) -> PathBuf {
        self.configure_at(&self.path("data"), more)
    }

    /// As [`Bench::configure`], with another data folder.
    pub(crate) fn configure_at(&self, data_dir: &Path, more: &str) -> PathBuf {
        let data_dir = toml::Value::String(data_dir.display().to_string());
        let text = format!(
            r#"
[gateway]
id = "test"
data_dir = {data_dir}
[[listener]]
bind = "{}"
[[route]]
filter = "devices/{{device}}/#"
[admin]
bind = "{}"
[log]
level = "info"
{more}
"#,
            self.mqtt, self.admin
        );
        let path = self.path("gateway.toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Puts routes in front of the bench's own, in the configuration that was written last.
    pub(crate) fn route_first(&self, routes: &str) {
        let path = self.path("gateway.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, text.replacen("[[route]]", &format!("{routes}\n[[route]]"), 1))
            .unwrap();
    }

    /// Starts the gateway with the configuration that was written last.
    pub(crate) async fn start(&self) -> GatewayProcess {
        GatewayProcess::start(&self.path("gateway.toml"), &self.path("gateway.log")).await
    }

    /// An upstream that records into `NAME.csv`.
    pub(crate) fn collector(&self, name: &str) -> HttpCollector {
        HttpCollector::start(stable_address(), &self.received(name)).unwrap()
    }

    /// Ledger of the collector of this name.
    pub(crate) fn received(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.csv"))
    }

    /// Ledger of what the fleet sent.
    pub(crate) fn sent(&self) -> PathBuf {
        self.path("sent.csv")
    }

    /// A fleet that publishes to this bench's gateway until it is told to stop.
    pub(crate) fn fleet(&self, devices: u32, rate: f64) -> Fleet {
        self.fleet_at(self.mqtt, devices, rate)
    }

    /// As [`Bench::fleet`], to another address.
    pub(crate) fn fleet_at(&self, broker: SocketAddr, devices: u32, rate: f64) -> Fleet {
        let config = FleetConfig { devices, rate, ..self.fleet_config() };
        self.fleet_with(broker, config)
    }

    /// How this bench's fleets are, but for their number and rate.
    pub(crate) fn fleet_config(&self) -> FleetConfig {
        FleetConfig {
            seed: self.seed,
            v5_share: 0.5,
            backoff_ms_max: 200,
            ..FleetConfig::default()
        }
    }

    /// As [`Bench::fleet_at`], of any kind.
    pub(crate) fn fleet_with(&self, broker: SocketAddr, config: FleetConfig) -> Fleet {
        let (_, broker) = watch::channel(broker.to_string());
        Fleet::start(config, broker, &self.sent(), &CancellationToken::new()).unwrap()
    }

    /// Lets a fleet leave once everything that it measured is acked.
    ///
    /// # Panics
    /// When that does not happen.
    pub(crate) async fn drain(&self, fleet: Fleet) {
        let report = fleet.finish(PATIENCE).await.unwrap();
        assert!(report.drained, "the last events were not acked: {report:?}");
    }

    /// Ends a test whose upstream was away: it comes back, everything drains into it, nothing was given
    /// up, and the gateway stops.
    ///
    /// # Panics
    /// When that does not happen, or the audit finds anything.
    pub(crate) async fn end_with_upstream(
        &self,
        gateway: GatewayProcess,
        fleet: Fleet,
        mut collector: HttpCollector,
    ) {
        collector.bring_back().unwrap();
        self.drain(fleet).await;
        let status = gateway.until_delivered("upstream").await;
        assert_eq!((status.store.losses, sink(&status, "upstream").dead_letters), (0, 0));
        assert_eq!(gateway.terminate().await, Some(0));
        collector.finish().await;
        self.assert_balanced("upstream");
    }

    /// Audits a collector's ledger against the fleet's.
    pub(crate) fn assert_balanced(&self, name: &str) -> firmware_sim::audit::AuditReport {
        assert_balanced(&self.sent(), &self.received(name))
    }

    /// An NDJSON file sink's lines as a received ledger of this name, oldest file first: posted to a
    /// collector, which takes the same lines over HTTP.
    pub(crate) async fn read_file_sink(&self, path: &Path, name: &str) {
        let collector = self.collector(name);
        let rotated = |n: usize| PathBuf::from(format!("{}.{n}", path.display()));
        let oldest = (1..=ROTATED_MAX).take_while(|n| rotated(*n).exists()).last().unwrap_or(0);
        let files = (1..=oldest).rev().map(rotated).chain([path.to_owned()]);
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        for file in files {
            let answer = client
                .post(format!("http://{}/", collector.addr()))
                .header("content-type", "application/x-ndjson")
                .body(std::fs::read(file).unwrap())
                .send()
                .await
                .unwrap();
            assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
        }
        collector.finish().await;
    }
}

/// Configuration of an HTTP sink that tries again soon.
pub(crate) fn http_sink(name: &str, address: SocketAddr) -> String {
    format!(
        r#"
[[sink]]
name = "{name}"
type = "http"
url = "http://{address}/events"
retry_backoff_min = "20ms"
retry_backoff_max = "200ms"
"#
    )
}

/// A loopback address whose port stays free while nobody listens on it: it is from below the range
/// that the system gives to outgoing connections, so that neither a fleet that reconnects nor
/// anybody else can sit on it when a gateway comes back.
pub(crate) fn stable_address() -> SocketAddr {
    static TAKEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let first = range.ok().and_then(|range| range.split_whitespace().next()?.parse::<u16>().ok());
    let first = first.filter(|first| *first > 12_000).unwrap_or(32_768);
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    let taken = taken.get_or_insert_default();
    std::iter::repeat_with(|| fastrand::u16(first - 10_000..first))
        .take(1000)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok() && taken.insert(*port))
        .map(|port| SocketAddr::from(([127, 0, 0, 1], port)))
        .expect("a free port")
}
