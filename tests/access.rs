//! Who gets in, by which door, and what they may do there: TLS, client certificates, WebSocket, Unix
//! sockets; passwords and rules.

mod harness;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use harness::pki::{Authority, Signed};
use harness::raw::{Hello, Raw};
use harness::tunnel::{Tunnel, Way, tls};
use harness::{Bench, GatewayProcess, eventually, http_sink, stable_address};
use ring::hmac;
use rustix::process::Signal;
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Events that a test lets through before it looks.
const EVENTS: u64 = 500;

const SAYS_NOTHING: Hello<'_> = Hello { client_id: "good", user: None, password: None };

/// Certificates in a bench's folder, and a listener that uses them.
struct Secured {
    authority: Authority,
    addr: SocketAddr,
    cert_file: PathBuf,
    key_file: PathBuf,
}

impl Secured {
    fn new(bench: &Bench) -> Self {
        let secured = Self {
            authority: Authority::new(),
            addr: stable_address(),
            cert_file: bench.path("cert.pem"),
            key_file: bench.path("key.pem"),
        };
        secured.renew();
        secured
    }

    /// Writes a new certificate.
    fn renew(&self) -> Signed {
        let signed = self.authority.sign("gateway");
        signed.write(&self.cert_file, &self.key_file);
        signed
    }

    /// The listener's part of the configuration; `more` are keys of `[listener.tls]`.
    fn listener(&self, kind: &str, allow_anonymous: bool, more: &str) -> String {
        format!(
            r#"
[[listener]]
type = "{kind}"
bind = "{}"
allow_anonymous = {allow_anonymous}
connect_timeout = "2s"
[listener.tls]
cert_file = "{}"
key_file = "{}"
{more}
"#,
            self.addr,
            self.cert_file.display(),
            self.key_file.display(),
        )
    }
}

/// `client_ca_file` with the authority's certificate.
fn client_ca(authority: &Authority, path: &Path) -> String {
    format!("client_ca_file = \"{}\"", authority.write(path).display())
}

/// A fleet comes over a listener, and everything that it sent arrives upstream.
async fn audited(bench: &Bench, listener: &str, way: Way) {
    let collector = bench.collector("upstream");
    bench.configure(&format!("{listener}{}", http_sink("upstream", collector.addr())));
    let gateway = bench.start().await;
    let tunnel = Tunnel::open(way).await;
    let fleet = bench.fleet_at(tunnel.addr, 10, 1_000.0);
    eventually("events are acked", async || (fleet.counters().acked >= EVENTS).then_some(())).await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("upstream").await;
    assert_eq!(status.mqtt.protocol_errors_total, 0);
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    let report = bench.assert_balanced("upstream");
    assert_eq!(report.duplicates, 0, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_over_tls_is_whole() {
    let bench = Bench::new(61);
    let secured = Secured::new(&bench);
    let way = Way::Tls(secured.addr, secured.authority.client(None));
    audited(&bench, &secured.listener("mqtt", true, ""), way).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_with_client_certificates_is_whole() {
    let bench = Bench::new(62);
    let secured = Secured::new(&bench);
    let own = secured.authority.sign("fleet");
    let way = Way::Tls(secured.addr, secured.authority.client(Some(&own)));
    let ca = client_ca(&secured.authority, &bench.path("clients.pem"));
    audited(&bench, &secured.listener("mqtt", false, &ca), way).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_over_websocket_is_whole() {
    let bench = Bench::new(63);
    let addr = stable_address();
    let listener = format!("[[listener]]\ntype = \"websocket\"\nbind = \"{addr}\"\n");
    audited(&bench, &listener, Way::WebSocket(addr)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_over_secure_websocket_is_whole() {
    let bench = Bench::new(64);
    let secured = Secured::new(&bench);
    let way = Way::SecureWebSocket(secured.addr, secured.authority.client(None));
    audited(&bench, &secured.listener("websocket", true, ""), way).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_over_a_unix_socket_is_whole_and_the_socket_outlives_a_kill() {
    let bench = Bench::new(65);
    let path = bench.path("mqtt.sock");
    let listener = format!("[[listener]]\nbind = \"unix:{}\"\n", path.display());
    bench.configure(&listener);
    bench.start().await.kill().await;
    assert!(path.exists(), "a killed gateway cleans up nothing");
    audited(&bench, &listener, Way::Unix(path.clone())).await;
    assert!(!path.exists(), "one that ended by itself does");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_certificate_of_its_authority_nobody_passes() {
    let bench = Bench::new(66);
    let secured = Secured::new(&bench);
    let ca = client_ca(&secured.authority, &bench.path("clients.pem"));
    bench.configure(&secured.listener("mqtt", false, &ca));
    let gateway = bench.start().await;
    let stranger = Authority::new().sign("good");
    for own in [None, Some(&stranger)] {
        let config = secured.authority.client(own);
        // With TLS 1.3 the client learns of it at its first read.
        let passed = match tls(secured.addr, config).await {
            Ok(stream) => Raw::connect(stream, true, SAYS_NOTHING).await.1,
            Err(_) => None,
        };
        assert_eq!(passed, None);
    }
    let own = secured.authority.sign("good");
    let stream = tls(secured.addr, secured.authority.client(Some(&own))).await.unwrap();
    let mut client = Raw::welcome(stream, true, SAYS_NOTHING).await;
    assert_eq!(client.publish("devices/good/t", "1").await, Some(0));
    assert!(gateway.log().contains("handshake failed"), "{}", gateway.log());
    assert_eq!(gateway.terminate().await, Some(0));
}

/// The certificate that a listener shows now.
async fn shown(addr: SocketAddr, config: Arc<ClientConfig>) -> CertificateDer<'static> {
    let stream = tls(addr, config).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

async fn reloaded(gateway: &GatewayProcess, said: &str, times: usize) {
    gateway.signal(Signal::HUP);
    let what = format!("the log says {times} times: {said}");
    eventually(&what, async || (gateway.log().matches(said).count() >= times).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_renews_the_certificate_and_drops_no_connection() {
    let bench = Bench::new(67);
    let secured = Secured::new(&bench);
    bench.configure(&secured.listener("mqtt", true, ""));
    let gateway = bench.start().await;
    let config = secured.authority.client(None);
    let stream = tls(secured.addr, config.clone()).await.unwrap();
    let mut client = Raw::welcome(stream, false, SAYS_NOTHING).await;

    let renewed = secured.renew();
    assert_ne!(shown(secured.addr, config.clone()).await, renewed.certificate);
    reloaded(&gateway, "certificates read again", 1).await;
    assert_eq!(shown(secured.addr, config.clone()).await, renewed.certificate);
    assert_eq!(client.publish("devices/good/t", "1").await, Some(0), "the old one is served");

    // A certificate without its key, and a configuration that cannot be read.
    secured.authority.sign("gateway").write(&secured.cert_file, &bench.path("elsewhere.pem"));
    reloaded(&gateway, "the certificates in use stay in use", 1).await;
    assert!(gateway.log().contains("do not fit"), "{}", gateway.log());
    std::fs::write(bench.path("gateway.toml"), "[gateway]\nid = \"a b\"\n").unwrap();
    reloaded(&gateway, "the configuration in use stays in use", 1).await;
    assert_eq!(shown(secured.addr, config).await, renewed.certificate);
    client.ping().await;
    assert_eq!(gateway.terminate().await, Some(0));
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named_at_the_start() {
    let bench = Bench::new(68);
    let secured = Secured::new(&bench);
    std::fs::remove_file(&secured.key_file).unwrap();
    let more = with_users(&bench, &secured.listener("mqtt", true, ""));
    let config = bench.configure(&more);
    let ended = harness::run_to_end("run", &config).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("listener.tls.key_file: "), "{ended:?}");
    assert!(!bench.path("data").exists(), "nothing was touched");
    let ended = harness::run_to_end("check", &config).await;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    for part in ["listener.tls.key_file: ", "auth.users_file: ", "edge-gateway passwd makes one"] {
        assert!(ended.stderr.contains(part), "{part:?} is not in {ended:?}");
    }
}

/// Half-open connections: nothing said, a handshake begun, a handshake and no CONNECT. The good
/// client gets in beside them, and their time ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_handshakes_hold_up_nobody_and_end() {
    let bench = Bench::new(69);
    let secured = Secured::new(&bench);
    bench.configure(&secured.listener("mqtt", true, ""));
    let gateway = bench.start().await;
    let config = secured.authority.client(None);
    let mut slow = Vec::new();
    for n in 0..100 {
        let mut stream = TcpStream::connect(secured.addr).await.unwrap();
        if n % 2 == 0 {
            // The beginning of a TLS record.
            stream.write_all(&[0x16, 3, 1, 2]).await.unwrap();
        }
        slow.push(stream);
    }
    let silent = tls(secured.addr, config.clone()).await.unwrap();

    let stream = tls(secured.addr, config).await.unwrap();
    let mut client = Raw::welcome(stream, true, SAYS_NOTHING).await;
    assert_eq!(client.publish("devices/good/t", "1").await, Some(0));
    gateway.until("only the good one is left", |status| status.mqtt.connections == 1).await;
    assert_eq!(gateway.status().await.mqtt.refused_total, 101);
    for mut stream in slow {
        assert!(matches!(stream.read(&mut [0; 64]).await, Ok(0) | Err(_)), "it was closed");
    }
    drop(silent);
    client.ping().await;
    assert_eq!(gateway.terminate().await, Some(0));
}

/// A configuration with users, and what they may do.
fn with_users(bench: &Bench, more: &str) -> String {
    // The bench's own listener lets in anonymous clients, who may do nothing here.
    let users = bench.path("users");
    format!("{more}[auth]\nusers_file = \"{}\"\n", users.display())
}

/// `edge-gateway passwd`, the password on stdin.
async fn passwd(bench: &Bench, user: &str, password: &str) {
    let mut command = harness::command("passwd", &bench.path("gateway.toml"));
    command.arg(user).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(format!("{password}\n").as_bytes()).await.unwrap();
    drop(stdin);
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
}

fn hello<'a>(client_id: &'a str, user: &'a str, password: &'a str) -> Hello<'a> {
    Hello { client_id, user: Some(user), password: Some(password) }
}

async fn log_in(bench: &Bench, v5: bool, hello: Hello<'_>) -> (Raw<TcpStream>, Option<u8>) {
    Raw::connect(TcpStream::connect(bench.mqtt).await.unwrap(), v5, hello).await
}

const RULES: &str = r#"
[[acl]]
users = ["alice", "bob"]
publish = ["devices/%c/#"]
subscribe = ["commands/%u/#"]
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_lets_in_and_the_rules_say_what_to() {
    let bench = Bench::new(70);
    bench.configure(&with_users(&bench, RULES));
    passwd(&bench, "alice", "correct horse").await;
    let gateway = bench.start().await;
    for (v5, not_known, not_allowed) in [(false, 4, 0x80), (true, 0x86, 0x87)] {
        for (user, password) in [("alice", "wrong secret"), ("eve", "correct horse")] {
            let (_, code) = log_in(&bench, v5, hello("d1", user, password)).await;
            assert_eq!(code, Some(not_known), "{user}");
        }
        let (mut alice, code) = log_in(&bench, v5, hello("d1", "alice", "correct horse")).await;
        assert_eq!(code, Some(0));
        assert_eq!(alice.publish("devices/d1/t", "1").await, Some(0));
        assert_eq!(alice.subscribe("commands/alice/#").await, 1);
        assert_eq!(alice.subscribe("commands/#").await, not_allowed);
        // 3.1.1 has no word for it, and no ack may say that it was stored.
        let denied = alice.publish("devices/d2/t", "not hers").await;
        assert_eq!(denied, v5.then_some(0x87));
        let (mut nobody, code) = log_in(&bench, v5, SAYS_NOTHING).await;
        assert_eq!(code, Some(0));
        assert_eq!(nobody.publish("devices/good/t", "2").await, v5.then_some(0x87));
    }
    let status = gateway.status().await;
    assert_eq!(status.store.watermark, 2, "what is not allowed is not stored");
    assert_eq!((status.mqtt.logins_failed_total, status.mqtt.denied_total), (4, 6));
    assert!(!gateway.log().contains("secret"), "{}", gateway.log());
    let said = "unknown user or wrong password (user \"eve\")";
    assert!(gateway.log().contains(said), "{}", gateway.log());
    assert_eq!(gateway.terminate().await, Some(0));
}

/// SIGHUP: who may still do the same stays connected; whose password or rules have changed does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_and_rules_follow_sighup_and_nobody_else_notices() {
    let bench = Bench::new(71);
    bench.configure(&with_users(&bench, RULES));
    passwd(&bench, "alice", "a").await;
    passwd(&bench, "bob", "b").await;
    let gateway = bench.start().await;
    let (mut alice, _) = log_in(&bench, true, hello("d1", "alice", "a")).await;
    let (mut bob, _) = log_in(&bench, true, hello("d2", "bob", "b")).await;
    passwd(&bench, "bob", "better").await;
    reloaded(&gateway, "users and rules read again", 1).await;
    assert_eq!(alice.publish("devices/d1/t", "1").await, Some(0));
    assert_eq!(bob.publish("devices/d2/t", "1").await, None, "its password is another");
    assert_eq!(log_in(&bench, true, hello("d2", "bob", "b")).await.1, Some(0x86));
    let (mut bob, code) = log_in(&bench, true, hello("d2", "bob", "better")).await;
    assert_eq!(code, Some(0));

    let narrower = RULES.replace("[\"alice\", \"bob\"]", "[\"bob\"]");
    bench.configure(&with_users(&bench, &narrower));
    reloaded(&gateway, "users and rules read again", 2).await;
    assert_eq!(alice.publish("devices/d1/t", "2").await, None, "her rule is gone");
    assert_eq!(bob.publish("devices/d2/t", "2").await, Some(0));
    std::fs::write(bench.path("users"), "bob:broken\n").unwrap();
    reloaded(&gateway, "the users and rules in use stay in use", 1).await;
    assert_eq!(bob.publish("devices/d2/t", "3").await, Some(0));
    assert_eq!(gateway.terminate().await, Some(0));
}

/// A client id alone is no right to end another's connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_id_is_not_taken_over_by_another_user() {
    let bench = Bench::new(76);
    bench.configure(&with_users(&bench, ""));
    for user in ["alice", "bob"] {
        passwd(&bench, user, user).await;
    }
    let gateway = bench.start().await;
    for v5 in [false, true] {
        let (mut alice, code) = log_in(&bench, v5, hello("dev", "alice", "alice")).await;
        assert_eq!(code, Some(0));
        let not_authorized = Some(if v5 { 0x87 } else { 5 });
        assert_eq!(log_in(&bench, v5, hello("dev", "bob", "bob")).await.1, not_authorized);
        let anybody = Hello { client_id: "dev", ..SAYS_NOTHING };
        assert_eq!(log_in(&bench, v5, anybody).await.1, not_authorized);
        alice.ping().await;
        let (_again, code) = log_in(&bench, v5, hello("dev", "alice", "alice")).await;
        assert_eq!(code, Some(0), "herself she may");
    }
    assert_eq!(gateway.terminate().await, Some(0));
}

/// Hundreds of devices come back at once, each with a password to check: all get in, and one that is
/// there already goes on meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reconnect_storm_is_let_in_and_holds_up_nobody() {
    let bench = Bench::new(72);
    bench.configure(&with_users(&bench, ""));
    let users: Vec<String> = (0..8).map(|n| format!("fleet-{n}")).collect();
    for user in &users {
        passwd(&bench, user, user).await;
    }
    let gateway = bench.start().await;
    let stream = TcpStream::connect(bench.mqtt).await.unwrap();
    let mut good = Raw::welcome(stream, true, SAYS_NOTHING).await;
    let mut storm = JoinSet::new();
    for n in 0..400 {
        let (broker, user) = (bench.mqtt, users[n % users.len()].clone());
        storm.spawn(async move {
            let stream = TcpStream::connect(broker).await.unwrap();
            let id = format!("d{n}");
            let (raw, code) = Raw::connect(stream, n % 2 == 0, hello(&id, &user, &user)).await;
            assert_eq!(code, Some(0), "{id}");
            raw
        });
    }
    let mut devices = Vec::new();
    let mut beside = 0;
    while let Some(device) = storm.join_next().await {
        devices.push(device.unwrap());
        if devices.len() % 40 == 0 {
            assert_eq!(good.publish("devices/good/t", "1").await, Some(0));
            beside += 1;
        }
    }
    assert_eq!((devices.len(), beside), (400, 10));
    let status = gateway.status().await;
    assert_eq!((status.mqtt.logins_failed_total, status.mqtt.connections), (0, 401));
    assert_eq!(gateway.terminate().await, Some(0));
}

/// The device key of each event that a file sink has, by its topic.
fn keys_by_topic(archive: &Path) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(archive).unwrap();
    let event = |line: &str| {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = |name: &str| event[name].as_str().unwrap().to_owned();
        (text("subject"), text("partitionkey"))
    };
    let mut keys: Vec<_> = text.lines().map(event).collect();
    keys.sort();
    keys
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_says_where_the_device_key_stands() {
    let bench = Bench::new(74);
    let (secured, archive) = (Secured::new(&bench), bench.path("archive.ndjson"));
    let ca = client_ca(&secured.authority, &bench.path("clients.pem"));
    let routes: String = ["client_id", "username", "certificate", "property:dev"]
        .map(|device| format!("[[route]]\nfilter = \"{device}/#\"\ndevice = \"{device}\"\n"))
        .concat();
    let sink = format!("[[sink]]\nname = \"a\"\ntype = \"file\"\npath = {archive:?}\n");
    let listener = secured.listener("mqtt", false, &ca);
    bench.configure(&with_users(&bench, &format!("{listener}{routes}{sink}")));
    passwd(&bench, "alice", "a").await;
    let gateway = bench.start().await;

    let (mut alice, _) = log_in(&bench, true, hello("c1", "alice", "a")).await;
    let own = secured.authority.sign("dev-7");
    let stream = tls(secured.addr, secured.authority.client(Some(&own))).await.unwrap();
    let mut certified = Raw::welcome(stream, true, Hello { client_id: "c2", ..SAYS_NOTHING }).await;
    for topic in ["client_id/a", "username/a", "certificate/a", "property:dev/a"] {
        assert_eq!(alice.publish(topic, "").await, Some(0));
    }
    for topic in ["username/c", "certificate/c"] {
        assert_eq!(certified.publish(topic, "").await, Some(0));
    }
    for (topic, value) in
        [("property:dev/1", "d1"), ("property:dev/1", "d2"), ("property:dev/2", "")]
    {
        assert_eq!(alice.publish_with(topic, "dev", value).await, Some(0));
    }
    gateway.until_delivered("a").await;
    assert_eq!(gateway.terminate().await, Some(0));
    let expected = [
        ("certificate/a", "c1"),
        ("certificate/c", "dev-7"),
        ("client_id/a", "c1"),
        ("property:dev/1", "d1"),
        ("property:dev/1", "d2"),
        ("property:dev/2", "c1"),
        ("property:dev/a", "c1"),
        ("username/a", "alice"),
        ("username/c", "dev-7"),
    ];
    let keys = keys_by_topic(&archive);
    assert!(keys.iter().map(|(topic, key)| (&**topic, &**key)).eq(expected), "{keys:?}");
}

/// A token of HS256 that ends so many seconds from now.
fn token(key: &[u8], user: &str, seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let claims = format!(r#"{{"sub":"{user}","exp":{}}}"#, now + seconds);
    let parts = [r#"{"alg":"HS256"}"#, &claims].map(|part| URL_SAFE_NO_PAD.encode(part));
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let signature = hmac::sign(&key, parts.join(".").as_bytes());
    format!("{}.{}", parts.join("."), URL_SAFE_NO_PAD.encode(signature))
}

/// A token lets in, and its end ends the connection, whatever the client does or leaves undone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_lets_in_until_its_end() {
    let bench = Bench::new(75);
    let (key, key_file) = ([7; 32], bench.path("jwt.key"));
    std::fs::write(&key_file, key).unwrap();
    let jwt = format!("[auth.jwt]\nhmac_key_file = \"{}\"\nleeway = 0\n", key_file.display());
    let rule = "[[acl]]\nusers = [\"dev-7\"]\npublish = [\"devices/%u/#\"]\n";
    bench.configure(&format!("{jwt}{rule}"));
    let gateway = bench.start().await;
    let forged = token(&[8; 32], "dev-7", 60);
    assert_eq!(log_in(&bench, true, hello("c", "", &forged)).await.1, Some(0x86));
    let good = token(&key, "dev-7", 3);
    let (mut client, code) = log_in(&bench, true, hello("c", "", &good)).await;
    assert_eq!(code, Some(0));
    assert_eq!(client.publish("devices/dev-7/t", "1").await, Some(0));
    assert_eq!(client.publish("devices/dev-8/t", "1").await, Some(0x87));
    let goodbye = client.packet().await.expect("a DISCONNECT");
    assert_eq!((goodbye[0], goodbye[2]), (0xE0, 0x87));
    assert!(client.packet().await.is_none());
    assert_eq!(log_in(&bench, true, hello("c", "", &good)).await.1, Some(0x86), "it has ended");
    assert_eq!(gateway.terminate().await, Some(0));
}
