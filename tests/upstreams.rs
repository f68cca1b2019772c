//! Upstreams at their worst: what passes a network that breaks, and what the receiver sees of it.

mod harness;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use firmware_sim::collect::HttpCollector;
use firmware_sim::ledger::read_received;
use harness::{
    Bench, Fault, FaultProxy, Subscriber, assert_balanced, eventually, number_from_env, sink,
    stable_address,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

/// How often each fault is to happen to each sink: `EDGE_GATEWAY_FAULTS`.
const FAULTS: u64 = 2;
/// Share of the requests that something happens to.
const SHARE: f64 = 0.4;
/// The same where a request is many POSTs.
const SINGLES_SHARE: f64 = 0.05;

/// Kills of the upper gateway of a chain.
const KILLS: usize = 2;

/// An HTTP sink through a proxy, its requests small, so that there are many.
fn faulty_sink(name: &str, proxy: &FaultProxy, more: &str) -> String {
    harness::http_sink(name, proxy.address())
        + &format!("request_events_max = 100\nrequest_timeout = \"1s\"\n{more}\n")
}

/// Waits until every fault has happened often enough.
async fn until_everything_happened(proxy: &FaultProxy, times: u64) {
    let what = format!("every fault {times} times");
    let mut most = Vec::new();
    // Each is a wait of its own: a long campaign takes longer than one may.
    for wanted in 1..=times {
        eventually(&what, async || {
            let done = proxy.done();
            let all = Fault::ALL.iter().all(|f| done.get(f).is_some_and(|n| *n >= wanted));
            most = done.into_iter().collect();
            all.then_some(())
        })
        .await;
    }
    println!("{} requests: {most:?}", proxy.requests());
}

/// Ids of the events in the requests that may have been applied without the sink learning of it.
fn ids_in_doubt(proxy: &FaultProxy) -> HashSet<String> {
    let mut ids = HashSet::new();
    for body in proxy.in_doubt() {
        let events: Vec<serde_json::Value> = serde_json::from_slice(&body).unwrap();
        ids.extend(events.iter().map(|event| event["id"].as_str().unwrap().to_owned()));
    }
    ids
}

/// Ids that arrived more than once.
fn ids_twice(ledger: &Path) -> HashSet<String> {
    let (mut seen, mut twice) = (HashSet::new(), HashSet::new());
    read_received(ledger, |row| {
        if !seen.insert(row.id.clone().into_owned()) {
            twice.insert(row.id.into_owned());
        }
    })
    .unwrap();
    twice
}

/// Requests are cut, reset, delayed, throttled, applied without an answer, and applied long after the
/// sink has given up on them. Nothing is lost and no device's order is broken; what arrives twice was
/// in a request whose answer did not get through; and a receiver with the sequence rule has nothing
/// twice, in the same run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_through_every_fault_is_whole_in_order_and_once_with_the_sequence_rule() {
    let times = number_from_env("EDGE_GATEWAY_FAULTS").unwrap_or(FAULTS);
    let bench = Bench::new(61);
    let plain = bench.collector("plain");
    let once =
        HttpCollector::start_exactly_once(stable_address(), &bench.received("once")).unwrap();
    let to_plain = FaultProxy::start(plain.addr(), bench.seed, SHARE).await;
    let to_once = FaultProxy::start(once.addr(), bench.seed + 1, SHARE).await;
    let once_more = "in_flight_max = 4\ncompression = \"zstd\"";
    bench.configure(
        &(faulty_sink("plain", &to_plain, "") + &faulty_sink("once", &to_once, once_more)),
    );
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 2_000.0);
    until_everything_happened(&to_plain, times).await;
    until_everything_happened(&to_once, times).await;
    bench.drain(fleet).await;
    to_plain.calm_down();
    to_once.calm_down();
    gateway.until_delivered("plain").await;
    gateway.until_delivered("once").await;
    assert_eq!(gateway.terminate().await, Some(0));
    plain.finish().await;
    let counters = once.finish().await;

    let report = bench.assert_balanced("plain");
    assert!(report.duplicates > 0, "lost answers give duplicates, or this test shows nothing");
    assert_eq!(report.gateway_gaps, 0, "{report}");
    let twice = ids_twice(&bench.received("plain"));
    let in_doubt = ids_in_doubt(&to_plain);
    let unexplained: Vec<_> = twice.difference(&in_doubt).collect();
    assert!(unexplained.is_empty(), "sent twice after an answer: {unexplained:?}");

    let report = bench.assert_balanced("once");
    assert_eq!((report.duplicates, report.gateway_gaps), (0, 0), "{report}");
    assert!(counters.skipped > 0, "the rule had nothing to do: {counters:?}");
}

/// One event a POST, several POSTs in flight: every device's order holds, through the same faults.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_events_in_flight_together_keep_the_order_of_each_device_through_every_fault() {
    let times = number_from_env("EDGE_GATEWAY_FAULTS").unwrap_or(FAULTS);
    let bench = Bench::new(62);
    let collector = bench.collector("upstream");
    // A request of these is many POSTs: with as many faults it would never get through.
    let proxy = FaultProxy::start(collector.addr(), bench.seed, SINGLES_SHARE).await;
    bench.configure(&faulty_sink("upstream", &proxy, "format = \"cloudevent_binary\""));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 200.0);
    until_everything_happened(&proxy, times).await;
    bench.drain(fleet).await;
    proxy.calm_down();
    gateway.until_delivered("upstream").await;
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    let report = bench.assert_balanced("upstream");
    assert_eq!(report.gateway_gaps, 0, "{report}");
}

/// Gateway to gateway: the edge's MQTT sink publishes to another gateway, which is killed and started
/// again in mid-flight. The way is at least once, whole, and in order per device.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_of_gateways_is_whole_and_in_order_through_kills_of_the_upper_one() {
    let (edge, core) = (Bench::new(63), Bench::new(64));
    let collector = core.collector("upstream");
    core.configure(&harness::http_sink("upstream", collector.addr()));
    edge.configure(&mqtt_sink(core.mqtt.port(), ""));
    let mut upper = core.start().await;
    let lower = edge.start().await;
    let fleet = edge.fleet(30, 2_000.0);
    for _ in 0..KILLS {
        let before = collector.counters().received;
        eventually("events come through the chain", async || {
            (collector.counters().received > before + 500).then_some(())
        })
        .await;
        upper.kill().await;
        lower.until("the sink retries", |status| sink(status, "north").state == "retrying").await;
        upper = core.start().await;
    }
    edge.drain(fleet).await;
    let status = lower.until_delivered("north").await;
    assert_eq!((status.store.losses, sink(&status, "north").dead_letters), (0, 0));
    upper.until_delivered("upstream").await;
    assert_eq!(lower.terminate().await, Some(0));
    assert_eq!(upper.terminate().await, Some(0));
    collector.finish().await;
    let report = assert_balanced(&edge.sent(), &core.received("upstream"));
    assert_eq!(report.gateway_gaps, 0, "{report}");
}

/// A broker of others: TLS with certificates on both sides, a password that is wrong at first, and
/// what a subscriber there gets of the events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mosquitto_takes_everything_over_mutual_tls_once_the_password_is_right() {
    let bench = Bench::new(65);
    let broker = match Mosquitto::start(&bench).await {
        Ok(broker) => broker,
        Err(why) => return harness::skip("mosquitto_takes_everything_over_mutual_tls", &why),
    };
    let subscriber = Subscriber::v5(broker.plain, "watcher", "site/#").await;
    let password = bench.path("password");
    std::fs::write(&password, "wrong\n").unwrap();
    bench.configure(&mqtt_sink(broker.tls.port(), &broker.sink_keys(&password)));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 2_000.0);
    let status = gateway.until("it is held", |s| sink(s, "north").state == "held").await;
    let said = sink(&status, "north").error.clone().unwrap_or_default();
    assert!(said.contains("password") && !said.contains("wrong"), "{said}");
    std::fs::write(&password, "right\n").unwrap();
    eventually("events come through", async || (subscriber.received() > 1_000).then_some(())).await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("north").await;
    let delivered = sink(&status, "north").delivered_events_total;
    eventually("the subscriber has them", async || {
        (subscriber.received() >= delivered).then_some(())
    })
    .await;
    assert_eq!(gateway.terminate().await, Some(0));
    subscriber.write_ledger(&bench.received("subscriber"));
    bench.assert_balanced("subscriber");
}

fn mqtt_sink(port: u16, more: &str) -> String {
    let scheme = if more.contains("[sink.tls]") { "mqtts" } else { "mqtt" };
    format!(
        r#"
[[sink]]
name = "north"
type = "mqtt"
url = "{scheme}://localhost:{port}"
retry_backoff_min = "20ms"
retry_backoff_max = "200ms"
{more}
"#
    )
}

/// Mosquitto with a plain listener for watching and one with mutual TLS and passwords, killed when
/// dropped.
struct Mosquitto {
    plain: SocketAddr,
    tls: SocketAddr,
    folder: PathBuf,
    _process: Child,
}

impl Mosquitto {
    /// `Err` says what this machine lacks.
    async fn start(bench: &Bench) -> Result<Self, String> {
        let found = ["/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto", "/usr/bin/mosquitto"];
        let program = found.into_iter().find(|path| Path::new(path).exists());
        let program = program.ok_or("mosquitto is not installed (Debian: mosquitto)")?;
        let folder = bench.path("mosquitto");
        std::fs::create_dir(&folder).unwrap();
        let file = |name: &str| folder.join(name).display().to_string();

        let mut authority = CertificateParams::new([]).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "authority");
        let key = KeyPair::generate().unwrap();
        let authority = CertifiedIssuer::self_signed(authority, key).unwrap();
        std::fs::write(file("ca.pem"), authority.pem()).unwrap();
        for name in ["server", "client"] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
            params.distinguished_name.push(DnType::CommonName, name);
            let certificate = params.signed_by(&key, &authority).unwrap();
            std::fs::write(file(&format!("{name}.pem")), certificate.pem()).unwrap();
            std::fs::write(file(&format!("{name}-key.pem")), key.serialize_pem()).unwrap();
        }
        // mosquitto_passwd's own form: "right", salted and hashed by PBKDF2.
        let passwords = std::process::Command::new("mosquitto_passwd")
            .args(["-b", "-c", &file("passwords"), "edge", "right"])
            .status();
        if !passwords.is_ok_and(|status| status.success()) {
            return Err("mosquitto_passwd is not installed (Debian: mosquitto)".to_owned());
        }
        let (plain, tls) = (stable_address(), stable_address());
        let config = format!(
            "per_listener_settings true\nmax_queued_messages 0\n\
             listener {} 127.0.0.1\nallow_anonymous true\nmax_inflight_messages 0\n\
             listener {} 127.0.0.1\nallow_anonymous false\npassword_file {}\n\
             cafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate true\n",
            plain.port(),
            tls.port(),
            file("passwords"),
            file("ca.pem"),
            file("server.pem"),
            file("server-key.pem"),
        );
        std::fs::write(file("mosquitto.conf"), config).unwrap();
        let log = std::fs::File::create(file("log")).unwrap();
        let process = Command::new(program)
            .args(["-c", &file("mosquitto.conf")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("{program}: {error}"))?;
        eventually("mosquitto listens", async || TcpStream::connect(tls).await.ok()).await;
        Ok(Self { plain, tls, folder, _process: process })
    }

    /// What a sink says to get in.
    fn sink_keys(&self, password: &Path) -> String {
        let folder = self.folder.display();
        let password = password.display();
        format!(
            r#"
topic = "site/{{gateway}}/{{device}}/{{3}}"
username = "edge"
password_file = "{password}"
[sink.tls]
ca_file = "{folder}/ca.pem"
cert_file = "{folder}/client.pem"
key_file = "{folder}/client-key.pem"
"#
        )
    }
}
