//! Into a real Apache Kafka over TLS, with every way to log in, and with every way wrong.
//!
//! Needs the feature `kafka-tls`, which builds OpenSSL: `cargo test -p gateway --features kafka-tls
//! --test kafka_secure`. Needs Java, Maven and openssl; skipped loudly without.

mod harness;

use axum::http::{HeaderMap, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD as BASE64_URL};
use harness::kafka::{Broker, Isolation, read_records};
use harness::{Bench, sink};

/// A sink of its own topic. `more` is its security.
fn kafka_sink(name: &str, brokers: &str, delivery: &str, more: &str) -> String {
    format!(
        r#"
[[sink]]
name = "{name}"
type = "kafka"
brokers = "{brokers}"
topic = "{name}"
delivery = "{delivery}"
retry_backoff_min = "20ms"
retry_backoff_max = "500ms"
{more}
"#
    )
}

fn tls(files: &str, identity: bool) -> String {
    let identity = if identity {
        format!("cert_file = \"{files}/client.pem\"\nkey_file = \"{files}/client.key\"\n")
    } else {
        String::new()
    };
    format!("[sink.tls]\nca_file = \"{files}/ca.pem\"\n{identity}")
}

fn sasl(mechanism: &str, password: &str) -> String {
    format!(
        "[sink.sasl]\nmechanism = \"{mechanism}\"\nusername = \"gw\"\npassword = \"{password}\"\n"
    )
}

fn token_url(url: &str, client_secret: &str) -> String {
    format!(
        "[sink.sasl]\nmechanism = \"oauthbearer\"\ntoken_url = \"{url}\"\nclient_id = \"gw\"\n\
         client_secret = \"{client_secret}\"\n"
    )
}

/// A token endpoint that knows one client, gw with the secret pw: its tokens are unsecured ones, as
/// this broker takes them, and live so short that a run needs several. Stops when it is dropped.
async fn token_endpoint() -> (String, tokio::task::JoinSet<()>) {
    let grant = async |headers: HeaderMap| {
        let known = format!("Basic {}", BASE64.encode("gw:pw"));
        if headers.get("authorization").is_none_or(|given| *given != *known) {
            return (StatusCode::UNAUTHORIZED, "{\"error\":\"invalid_client\"}".to_owned());
        }
        let since = std::time::SystemTime::UNIX_EPOCH;
        let now = std::time::SystemTime::now().duration_since(since).unwrap().as_secs();
        let claims = format!("{{\"sub\":\"gw\",\"iat\":{now},\"exp\":{}}}", now + 20);
        let (head, claims) = (BASE64_URL.encode("{\"alg\":\"none\"}"), BASE64_URL.encode(claims));
        let granted =
            format!("{{\"access_token\":\"{head}.{claims}.\",\"token_type\":\"Bearer\"}}");
        (StatusCode::OK, granted)
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/token", listener.local_addr().unwrap());
    let app = axum::Router::new().route("/token", axum::routing::post(grant));
    let mut server = tokio::task::JoinSet::new();
    server.spawn(async move { axum::serve(listener, app).await.unwrap() });
    (url, server)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_to_log_in_delivers_and_every_wrong_one_is_held() {
    let broker = match Broker::start_secure().await {
        Ok(broker) => broker,
        Err(missing) => return harness::skip("a real Kafka", &missing),
    };
    let files = broker.said("files");
    let (sasl_ssl, ssl) = (broker.said("sasl_ssl"), broker.said("ssl"));
    let plaintext = broker.said("sasl_plaintext");
    let ca = tls(files, false);
    let token = "[sink.sasl]\nmechanism = \"oauthbearer\"\nunsecured_subject = \"gw\"\n";
    let (endpoint, _server) = token_endpoint().await;
    let right = [
        ("plain", sasl_ssl, "idempotent", ca.clone() + &sasl("plain", "pw")),
        ("scram-256", sasl_ssl, "idempotent", ca.clone() + &sasl("scram_sha_256", "pw")),
        ("scram-512", sasl_ssl, "exactly_once", ca.clone() + &sasl("scram_sha_512", "pw")),
        ("scram-bare", plaintext, "at_least_once", sasl("scram_sha_512", "pw")),
        ("token", sasl_ssl, "exactly_once", ca.clone() + token),
        ("endpoint", sasl_ssl, "exactly_once", ca.clone() + &token_url(&endpoint, "pw")),
        ("mutual", ssl, "exactly_once", tls(files, true)),
    ];
    // What each is told contains the word beside it.
    let wrong = [
        ("bad-plain", "authentication", sasl_ssl, ca.clone() + &sasl("plain", "no")),
        ("bad-scram", "authentication", sasl_ssl, ca.clone() + &sasl("scram_sha_256", "no")),
        ("bad-client", "client_secret", sasl_ssl, ca.clone() + &token_url(&endpoint, "no")),
        ("no-authority", "ssl", sasl_ssl, "[sink.tls]\n".to_owned() + &sasl("plain", "pw")),
    ];
    let bench = Bench::new(51);
    let mut config = String::new();
    for (name, brokers, delivery, more) in &right {
        broker.create_topic(name, 4).await;
        config += &kafka_sink(name, brokers, delivery, more);
    }
    for (at, (name, _, brokers, more)) in wrong.iter().enumerate() {
        let delivery = ["idempotent", "exactly_once"][at % 2];
        config += &kafka_sink(name, brokers, delivery, more);
    }
    bench.configure(&config);
    let gateway = bench.start().await;
    let fleet = bench.fleet(10, 200.0);
    for (name, told, ..) in &wrong {
        let held = gateway.until(name, |status| sink(status, name).state == "held").await;
        let error = sink(&held, name).error.clone().unwrap_or_default().to_lowercase();
        assert!(error.contains(told), "{name}: {error}");
    }
    bench.drain(fleet).await;
    for (name, ..) in &right {
        gateway.until_delivered(name).await;
    }
    assert_eq!(gateway.terminate().await, Some(0));
    for (name, ..) in right {
        let ledger = bench.received(name);
        read_records(broker.bootstrap(), name, Isolation::Committed, ledger).await;
        assert_eq!(bench.assert_balanced(name).duplicates, 0, "{name}");
    }
}
