//! The HTTP sink against a server on loopback.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use storage::StoredEvent;

use super::answer::{retry_after, sort, sort_results};
use super::*;
use crate::config::{
    Compression, HttpAuth, HttpFormat, HttpProxy, HttpVersion, Secret, SecretSource, SinkConfig,
    Target,
};
use crate::fake::{self, Upstream as Server, reply};
use crate::sink::Which;

fn sink(config: HttpConfig) -> HttpSink {
    sink_with(config, Duration::from_secs(20))
}

fn sink_with(config: HttpConfig, request_timeout: Duration) -> HttpSink {
    let envelope = Envelope::new(&fake::origin(), SinkConfig::EVENT_TYPE);
    let own = SinkConfig::new("s", Target::Http(config.clone()));
    let own = SinkConfig { request_timeout, ..own };
    HttpSink::new(config, envelope, &fake::origin(), &own)
}

fn request(id: RequestId) -> Request {
    let events = vec![fake::stored(5, "dev-1", "{\"t\":1}"), fake::stored(6, "dev-2", "\u{1}")];
    Request { id, stream: None, events: Arc::new(events) }
}

async fn ask(sink: &mut HttpSink, id: RequestId) -> Answer {
    sink.begin(request(id));
    let (answered, answer) = sink.answer().await;
    assert_eq!(answered, id);
    answer
}

fn failure(answer: &Answer) -> (Failure, &str) {
    assert_eq!(answer.failed.len(), 1);
    assert_eq!(answer.failed[0].which, Which::All);
    (answer.failed[0].failure, &answer.failed[0].reason)
}

#[tokio::test]
async fn formats_of_many_events_arrive_in_every_coding() {
    let server = Server::start(|_| reply(204)).await;
    let mut expected = 0;
    for (format, content_type) in [
        (HttpFormat::CloudEventsBatch, "application/cloudevents-batch+json"),
        (HttpFormat::NdJson, "application/x-ndjson"),
        (HttpFormat::JsonArray, "application/json"),
    ] {
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let config = HttpConfig { format, compression, ..HttpConfig::new(&server.url) };
            assert_eq!(ask(&mut sink(config), 9).await, Answer::delivered());
            expected += 1;
            let accepted = server.accepted();
            assert_eq!(accepted.len(), expected);
            let received = &accepted[expected - 1];
            if format == HttpFormat::JsonArray {
                // The second payload is no JSON.
                assert_eq!(received.body, b"[{\"t\":1},\"AQ==\"]");
            } else {
                assert_eq!(received.seqs(), [5, 6]);
            }
            assert_eq!(received.header("content-type"), content_type);
            assert_eq!(received.header("edge-gateway-offsets"), "edge-01/00000000000000ab/5-6");
            assert!(received.header("user-agent").starts_with("edge-gateway/"));
        }
    }
}

#[tokio::test]
async fn formats_of_one_event_send_each_alone_and_in_order() {
    let server = Server::start(|_| reply(204)).await;
    for format in [HttpFormat::CloudEvent, HttpFormat::CloudEventBinary, HttpFormat::Raw] {
        let before = server.accepted().len();
        let config = HttpConfig { format, in_flight_max: 2, ..HttpConfig::new(&server.url) };
        assert_eq!(ask(&mut sink(config), 9).await, Answer::delivered());
        let accepted = &server.accepted()[before..];
        assert_eq!(accepted.len(), 2, "{format:?}");
        let [first, second] = accepted else { panic!("two") };
        assert_eq!(first.header("edge-gateway-offsets"), "edge-01/00000000000000ab/5-5");
        if format == HttpFormat::CloudEvent {
            assert_eq!(first.header("content-type"), "application/cloudevents+json");
            let event: serde_json::Value = serde_json::from_slice(&first.body).expect("JSON");
            assert_eq!(event["id"], "edge-01/00000000000000ab/0/5");
            continue;
        }
        assert_eq!((&first.body[..], &second.body[..]), (&b"{\"t\":1}"[..], &[1][..]));
        assert_eq!(first.header("content-type"), "application/json");
        assert_eq!(second.header("content-type"), "application/octet-stream");
        if format == HttpFormat::Raw {
            assert_eq!(first.header("edge-gateway-event"), "edge-01/00000000000000ab/0/5");
            assert_eq!(first.header("ce-id"), "");
            continue;
        }
        for (name, value) in [
            ("ce-specversion", "1.0"),
            ("ce-id", "edge-01/00000000000000ab/0/5"),
            ("ce-source", "/edge-01/dev-1"),
            ("ce-type", SinkConfig::EVENT_TYPE),
            ("ce-subject", "devices/dev-1/t"),
            ("ce-time", "2023-11-14T22:13:20.000000Z"),
            ("ce-partitionkey", "dev-1"),
            ("ce-sequence", "00000000000000000005"),
        ] {
            assert_eq!(first.header(name), value, "{name}");
        }
    }
}

/// CloudEvents HTTP binding 1.0, section 3.1.3.2.
#[tokio::test]
async fn headers_carry_any_text_of_a_device() {
    let server = Server::start(|_| reply(204)).await;
    let format = HttpFormat::CloudEventBinary;
    let mut sink = sink(HttpConfig { format, ..HttpConfig::new(&server.url) });
    let mut event = fake::stored(0, "Tür \"1\" 100%", "x");
    event.event.attributes =
        storage::Attributes::encode([storage::Attribute::ContentType("text/\u{1}")]);
    sink.begin(Request { id: 0, stream: None, events: Arc::new(vec![event]) });
    assert_eq!(sink.answer().await, (0, Answer::delivered()));
    let received = &server.accepted()[0];
    assert_eq!(received.header("ce-partitionkey"), "T%C3%BCr%20%221%22%20100%25");
    assert_eq!(received.header("content-type"), "application/octet-stream");
}

#[test]
fn every_status_is_sorted() {
    let none = HeaderMap::new();
    let now = SystemTime::UNIX_EPOCH;
    for status in 100..=999 {
        let status = StatusCode::from_u16(status).expect("three digits");
        let answer = sort(status, &none, "because", now);
        let Some(failed) = answer.failed.first() else {
            assert!(status.is_success());
            continue;
        };
        assert!(failed.reason.contains("because") && failed.reason.contains(status.as_str()));
        let expected = match status.as_u16() {
            408 | 425 | 429 | 500..=599 => Failure::Retry { after: None },
            400 | 413 | 422 => Failure::Suspect,
            _ => Failure::Hold,
        };
        assert_eq!(failed.failure, expected, "{status}");
    }
}

#[test]
fn retry_after_is_seconds_or_a_date() {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_770);
    for (text, seconds) in [
        ("120", Some(120)),
        ("Sun, 06 Nov 1994 08:49:37 GMT", Some(7)),
        ("Sun, 06 Nov 1994 08:49:00 GMT", None),
        ("-1", None),
        ("soon", None),
    ] {
        let value = HeaderValue::from_static(text);
        assert_eq!(retry_after(&value, now), seconds.map(Duration::from_secs), "{text}");
    }
}

#[tokio::test]
async fn the_answer_says_what_the_upstream_said() {
    let server = Server::start(|_| {
        let body = format!("no\n\tsuch \u{7}field {}", "x".repeat(1_000));
        (StatusCode::UNPROCESSABLE_ENTITY, vec![], body)
    })
    .await;
    let mut sink = sink(HttpConfig::new(&server.url));
    let answer = ask(&mut sink, 0).await;
    let (failure, reason) = failure(&answer);
    assert_eq!(failure, Failure::Reject, "each of them, alone");
    assert!(reason.starts_with("HTTP 422 Unprocessable Entity: no such field x"), "{reason}");
    assert!(reason.len() < 300, "{reason}");
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let server = Server::start(|_| {
        (StatusCode::TEMPORARY_REDIRECT, vec![("location", "/events".into())], String::new())
    })
    .await;
    let mut sink = sink(HttpConfig::new(&server.url));
    let answer = ask(&mut sink, 0).await;
    assert_eq!(failure(&answer).0, Failure::Hold);
    assert!(failure(&answer).1.contains("redirects to /events"));
}

#[tokio::test]
async fn a_pause_that_the_upstream_asks_for_is_passed_on() {
    let server = Server::start(|_| {
        (StatusCode::TOO_MANY_REQUESTS, vec![("retry-after", "7".into())], String::new())
    })
    .await;
    let mut sink = sink(HttpConfig::new(&server.url));
    let after = Some(Duration::from_secs(7));
    assert_eq!(failure(&ask(&mut sink, 0).await).0, Failure::Retry { after });
}

#[tokio::test]
async fn nobody_there_is_a_retry_and_the_address_stays_out_of_the_log() {
    let server = Server::start(|_| reply(204)).await;
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("bound").port()
    };
    drop(server);
    let mut sink = sink(HttpConfig::new(format!("http://127.0.0.1:{port}/?key=hidden")));
    let answer = ask(&mut sink, 0).await;
    let (failure, reason) = failure(&answer);
    assert_eq!(failure, Failure::Retry { after: None });
    assert!(reason.contains("refused") && !reason.contains("hidden"), "{reason}");
}

#[tokio::test]
async fn an_upstream_that_never_answers_is_a_retry_after_the_timeout() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut sink = sink_with(HttpConfig::new(url), Duration::from_millis(50));
    let answer = ask(&mut sink, 0).await;
    assert_eq!(failure(&answer).0, Failure::Retry { after: None });
}

#[tokio::test]
async fn a_refused_secret_is_read_again() {
    let server = Server::start(|received| {
        let welcome = received.header("authorization") == "Bearer second";
        reply(if welcome { 200 } else { 401 })
    })
    .await;
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("token");
    std::fs::write(&path, "first\nsecond line\n").expect("written");
    let auth = HttpAuth::Bearer(SecretSource::File(path.clone()));
    let mut sink = sink(HttpConfig { auth, ..HttpConfig::new(&server.url) });
    let answer = ask(&mut sink, 0).await;
    let (failure, reason) = failure(&answer);
    assert_eq!(failure, Failure::Hold);
    assert!(!reason.contains("first"), "{reason}");
    std::fs::write(&path, "second").expect("written");
    assert_eq!(ask(&mut sink, 1).await, Answer::delivered());
}

#[tokio::test]
async fn basic_auth_and_further_headers_are_sent() {
    let server = Server::start(|_| reply(202)).await;
    let auth = HttpAuth::Basic {
        username: "gw".into(),
        password: SecretSource::Inline(Secret::new("p:w")),
    };
    let headers = vec![("X-Site".into(), "north 7".into())];
    let mut sink = sink(HttpConfig { auth, headers, ..HttpConfig::new(&server.url) });
    assert_eq!(ask(&mut sink, 0).await, Answer::delivered());
    let received = &server.accepted()[0];
    assert_eq!(received.header("authorization"), format!("Basic {}", BASE64.encode("gw:p:w")));
    assert_eq!(received.header("x-site"), "north 7");
}

#[tokio::test]
async fn what_cannot_even_be_asked_is_held_with_advice() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let missing = SecretSource::File(Path::new("/nonexistent/token").into());
    let unset = SecretSource::Env("EDGE_GATEWAY_TEST_UNSET".into());
    let good = HttpConfig::new("http://127.0.0.1:1/");
    for (config, word) in [
        (HttpConfig { auth: HttpAuth::Bearer(missing), ..good.clone() }, "/nonexistent/token"),
        (HttpConfig { auth: HttpAuth::Bearer(unset), ..good.clone() }, "EDGE_GATEWAY_TEST_UNSET"),
        (HttpConfig { headers: vec![("a b".into(), "c".into())], ..good.clone() }, "a b"),
        (HttpConfig { url: "not a url".into(), ..good }, "url"),
    ] {
        let answer = ask(&mut sink(config), 0).await;
        let (failure, reason) = failure(&answer);
        assert_eq!(failure, Failure::Hold);
        assert!(reason.contains(word), "{reason}");
    }
}

fn results(body: &str, events: usize) -> Vec<(Vec<usize>, Failure)> {
    let answer = sort_results(body.as_bytes(), events);
    let which = |which: &Which| match which {
        Which::All => (0..events).collect(),
        Which::These(these) => these.clone(),
    };
    answer.failed.iter().map(|failed| (which(&failed.which), failed.failure)).collect()
}

#[test]
fn an_answer_per_event_is_sorted_event_by_event() {
    let body = r#"{"results": [
        {"index": 0, "status": 200},
        {"index": 1, "status": 422, "error": "no such sensor"},
        {"index": 4, "status": 422, "error": "no such sensor"},
        {"index": 3, "status": 503, "retry_after": 9},
        {"index": 2, "status": 403}
    ]}"#;
    let after = Some(Duration::from_secs(9));
    assert_eq!(
        results(body, 6),
        [
            (vec![1, 4], Failure::Reject),
            (vec![3], Failure::Retry { after }),
            (vec![2], Failure::Hold)
        ]
    );
    assert_eq!(results(r#"{"results": []}"#, 2), []);
}

#[test]
fn an_answer_per_event_that_makes_no_sense_holds_and_delivers_nothing() {
    for body in [
        "",
        "[]",
        r#"{"multi": "status"}"#,
        r#"{"results": [{"index": 2, "status": 200}]}"#,
        r#"{"results": [{"index": -1, "status": 200}]}"#,
        r#"{"results": [{"index": 1, "status": 200}, {"index": 1, "status": 400}]}"#,
        r#"{"results": [{"index": 1, "status": 7}]}"#,
    ] {
        assert_eq!(results(body, 2), [(vec![0, 1], Failure::Hold)], "{body}");
    }
}

#[tokio::test]
async fn one_event_of_a_post_is_rejected_by_an_answer_per_event() {
    let server = Server::start(|_| {
        let body = r#"{"results": [{"index": 1, "status": 400, "error": "bad\nvalue"}]}"#;
        (StatusCode::MULTI_STATUS, vec![], body.to_owned())
    })
    .await;
    let answer = ask(&mut sink(HttpConfig::new(&server.url)), 0).await;
    assert_eq!(answer.failed.len(), 1);
    assert_eq!(answer.failed[0].which, Which::These(vec![1]));
    assert_eq!(answer.failed[0].failure, Failure::Reject);
    assert_eq!(answer.failed[0].reason, "HTTP 400 Bad Request: bad value");
}

/// Events of so many partitions in turn.
fn spread(partitions: u16, count: u64) -> Vec<StoredEvent> {
    (0..count)
        .map(|offset| {
            let mut stored = fake::stored(offset, &format!("dev-{}", offset % 7), "{}");
            stored.event.partition = (offset % u64::from(partitions)) as u16;
            stored
        })
        .collect()
}

/// A server that answers only once so many POSTs are in its hands.
async fn meeting(posts: usize) -> (String, JoinSet<()>) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let barrier = Arc::new(tokio::sync::Barrier::new(posts));
    let take = move || {
        let barrier = Arc::clone(&barrier);
        async move {
            barrier.wait().await;
        }
    };
    serve(axum::Router::new().route("/events", axum::routing::post(take))).await
}

async fn serve(app: axum::Router) -> (String, JoinSet<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let mut server = JoinSet::new();
    server.spawn(async move { axum::serve(listener, app).await.expect("serving") });
    (url, server)
}

#[tokio::test]
async fn posts_of_different_partitions_are_in_flight_together() {
    let (url, _server) = meeting(4).await;
    let url = format!("{url}/events");
    let mut sink = sink(HttpConfig { in_flight_max: 4, ..HttpConfig::new(url) });
    sink.begin(Request { id: 0, stream: None, events: Arc::new(spread(8, 80)) });
    assert_eq!(sink.answer().await, (0, Answer::delivered()));
}

#[tokio::test]
async fn an_access_token_is_fetched_kept_and_replaced_when_it_is_refused() {
    use axum::http::header::AUTHORIZATION;
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
    let _ = rustls::crypto::ring::default_provider().install_default();
    let fetched = Arc::new(AtomicU64::new(0));
    let granting = Arc::clone(&fetched);
    let token = move |headers: HeaderMap, body: String| {
        let number = granting.fetch_add(1, SeqCst) + 1;
        let basic = format!("Basic {}", BASE64.encode("edge%3A1:s+e%2Fcret"));
        let right = headers[AUTHORIZATION] == basic
            && body == "grant_type=client_credentials&scope=a+b&audience=bus";
        let granted = format!(r#"{{"access_token": "t{number}", "expires_in": 3600}}"#);
        async move {
            if right {
                (StatusCode::OK, granted)
            } else {
                (StatusCode::UNAUTHORIZED, String::new())
            }
        }
    };
    // The first token is withdrawn after one POST.
    let posts = Arc::new(AtomicU64::new(0));
    let take = move |headers: HeaderMap| {
        let number = posts.fetch_add(1, SeqCst);
        let welcome = if number == 0 { "Bearer t1" } else { "Bearer t2" };
        let status = if headers[AUTHORIZATION] == welcome { 204 } else { 401 };
        async move { StatusCode::from_u16(status).expect("a status") }
    };
    let app = axum::Router::new()
        .route("/token", axum::routing::post(token))
        .route("/events", axum::routing::post(take));
    let (url, _server) = serve(app).await;
    let oauth2 = crate::config::OAuth2Config {
        token_url: format!("{url}/token"),
        client_id: "edge:1".into(),
        client_secret: SecretSource::Inline(Secret::new("s e/cret")),
        scope: Some("a b".into()),
        audience: Some("bus".into()),
    };
    let config = |oauth2| HttpConfig {
        auth: HttpAuth::OAuth2(oauth2),
        ..HttpConfig::new(format!("{url}/events"))
    };
    let mut sink1 = sink(config(oauth2.clone()));
    for id in 0..3 {
        assert_eq!(ask(&mut sink1, id).await, Answer::delivered());
    }
    assert_eq!(fetched.load(SeqCst), 2, "one at first, one for the refused");

    let wrong = SecretSource::Inline(Secret::new("hunter2"));
    let mut sink2 = sink(config(crate::config::OAuth2Config { client_secret: wrong, ..oauth2 }));
    let answer = ask(&mut sink2, 0).await;
    let (failure, reason) = failure(&answer);
    assert_eq!(failure, Failure::Hold);
    assert!(reason.contains("client_secret") && !reason.contains("hunter2"), "{reason}");
}

#[tokio::test]
async fn a_body_is_signed_as_it_is_sent() {
    use ring::hmac;
    let server = Server::start(|_| reply(204)).await;
    let config = HttpConfig {
        signing_key: Some(SecretSource::Inline(Secret::new("key"))),
        ..HttpConfig::new(&server.url)
    };
    assert_eq!(ask(&mut sink(config), 0).await, Answer::delivered());
    let received = &server.accepted()[0];
    let signature = received.header("edge-gateway-signature");
    let (seconds, mac) =
        signature.strip_prefix("t=").and_then(|s| s.split_once(",v1=")).expect("its form");
    let mac: Vec<u8> = (0..mac.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&mac[at..at + 2], 16).expect("hexadecimal"))
        .collect();
    let signed = [seconds.as_bytes(), b".", &received.body].concat();
    let key = hmac::Key::new(hmac::HMAC_SHA256, b"key");
    hmac::verify(&key, &signed, &mac).expect("it is right");
    let other = hmac::Key::new(hmac::HMAC_SHA256, b"other");
    assert!(hmac::verify(&other, &signed, &mac).is_err());
}

#[tokio::test]
async fn http2_is_spoken_without_tls_when_it_is_asked_for() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let take = |version: axum::http::Version| async move {
        if version == axum::http::Version::HTTP_2 {
            StatusCode::OK
        } else {
            StatusCode::BAD_REQUEST
        }
    };
    let app = axum::Router::new().route("/events", axum::routing::post(take));
    let (url, _server) = serve(app).await;
    for (version, expected) in [
        (HttpVersion::Http2, Answer::delivered()),
        (HttpVersion::Auto, Answer::failed(Failure::Reject, "HTTP 400 Bad Request")),
    ] {
        let config = HttpConfig { version, ..HttpConfig::new(format!("{url}/events")) };
        assert_eq!(ask(&mut sink(config), 0).await, expected);
    }
}

#[tokio::test]
async fn a_proxy_gets_the_request_and_its_own_credentials() {
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let proxy = format!("http://{}", listener.local_addr().expect("bound"));
    let mut server = JoinSet::new();
    server.spawn(async move {
        let (stream, _) = listener.accept().await.expect("a client");
        let mut stream = tokio::io::BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            stream.read_line(&mut head).await.expect("a line");
        }
        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.expect("answered");
        head
    });
    let credentials = Some(("gw".to_owned(), SecretSource::Inline(Secret::new("pw"))));
    let config = HttpConfig {
        proxy: Some(HttpProxy { url: proxy, credentials }),
        ..HttpConfig::new("http://upstream.invalid/events")
    };
    assert_eq!(ask(&mut sink(config), 0).await, Answer::delivered());
    let head = server.join_next().await.expect("one").expect("no panic").to_ascii_lowercase();
    assert!(head.starts_with("post http://upstream.invalid/events http/1.1\r\n"), "{head}");
    let basic =
        format!("proxy-authorization: basic {}", BASE64.encode("gw:pw").to_ascii_lowercase());
    assert!(head.contains(&basic), "{head}");
}

/// A TLS server on loopback that asks for a certificate, and what its clients need.
mod tls {
    use std::net::SocketAddr;
    use std::path::PathBuf;

    use axum::serve::Listener;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls::server::WebPkiClientVerifier;
    use rustls::{RootCertStore, ServerConfig};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::server::TlsStream;

    use super::*;
    use crate::config::{TlsConfig, TlsIdentity};

    struct Authority {
        issuer: CertifiedIssuer<'static, KeyPair>,
    }

    impl Authority {
        fn new(name: &str) -> Self {
            let mut params = CertificateParams::new([]).expect("no names");
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().expect("a key");
            Self { issuer: CertifiedIssuer::self_signed(params, key).expect("signed") }
        }

        fn issue(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
            let key = KeyPair::generate().expect("a key");
            let params = CertificateParams::new([name.to_owned()]).expect("a name");
            (params.signed_by(&key, &self.issuer).expect("signed"), key)
        }
    }

    struct TlsListener {
        tcp: TcpListener,
        acceptor: TlsAcceptor,
    }

    impl Listener for TlsListener {
        type Io = TlsStream<TcpStream>;
        type Addr = SocketAddr;

        async fn accept(&mut self) -> (Self::Io, SocketAddr) {
            loop {
                let (stream, addr) = self.tcp.accept().await.expect("a client");
                if let Ok(stream) = self.acceptor.accept(stream).await {
                    return (stream, addr);
                }
            }
        }

        fn local_addr(&self) -> std::io::Result<SocketAddr> {
            self.tcp.local_addr()
        }
    }

    /// Serves over TLS, to clients of this authority only, and gives the HTTP version as the status.
    async fn serve(authority: &Authority) -> (String, JoinSet<()>) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut roots = RootCertStore::empty();
        roots.add(authority.issuer.der().clone()).expect("a root");
        let verifier = WebPkiClientVerifier::builder(roots.into()).build().expect("a verifier");
        let (certificate, key) = authority.issue("localhost");
        let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let mut config = ServerConfig::builder()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .expect("a server");
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("https://localhost:{}/events", tcp.local_addr().expect("bound").port());
        let listener = TlsListener { tcp, acceptor: TlsAcceptor::from(Arc::new(config)) };
        let take = |version: axum::http::Version| async move {
            if version == axum::http::Version::HTTP_2 { StatusCode::OK } else { StatusCode::GONE }
        };
        let app = axum::Router::new().route("/events", axum::routing::post(take));
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, app).await.expect("serving") });
        (url, server)
    }

    #[tokio::test]
    async fn client_and_server_know_each_other_by_certificates_and_speak_http2() {
        let (authority, other) = (Authority::new("ours"), Authority::new("another"));
        let (url, _server) = serve(&authority).await;
        let dir = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: String| -> PathBuf {
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("written");
            path
        };
        let ca_file = write("ca.pem", authority.issuer.pem());
        let identity = |authority: &Authority, name: &str| {
            let (certificate, key) = authority.issue("gateway");
            TlsIdentity {
                cert_file: write(&format!("{name}.pem"), certificate.pem()),
                key_file: write(&format!("{name}-key.pem"), key.serialize_pem()),
            }
        };
        let (right, wrong) = (identity(&authority, "right"), identity(&other, "wrong"));
        let good = TlsConfig { ca_file: Some(ca_file), identity: Some(right) };
        let config = |tls: TlsConfig| HttpConfig { tls, ..HttpConfig::new(&url) };
        let mut trusted = sink(config(good.clone()));
        assert_eq!(ask(&mut trusted, 0).await, Answer::delivered());
        let stranger = write("other-ca.pem", other.issuer.pem());
        let renewed = wrong.clone();
        let mut refused = sink(config(TlsConfig { identity: Some(wrong), ..good.clone() }));
        let nobody = sink(config(TlsConfig { identity: None, ..good.clone() }));
        let distrustful = sink(config(TlsConfig { ca_file: Some(stranger), ..good.clone() }));
        for (sink, said) in [
            (&mut refused, "received fatal alert"),
            (&mut { nobody }, "received fatal alert"),
            (&mut { distrustful }, "invalid peer certificate"),
        ] {
            let answer = ask(sink, 0).await;
            let (failure, reason) = failure(&answer);
            assert_eq!(failure, Failure::Retry { after: None });
            assert!(reason.contains(said), "{reason}");
        }
        // What was renewed in its place is used without a restart.
        let TlsConfig { identity: Some(right), .. } = &good else { panic!("it has one") };
        std::fs::copy(&right.cert_file, &renewed.cert_file).expect("renewed");
        std::fs::copy(&right.key_file, &renewed.key_file).expect("renewed");
        assert_eq!(ask(&mut refused, 1).await, Answer::delivered());
        let empty = TlsConfig { ca_file: Some(write("empty.pem", String::new())), ..good };
        let answer = ask(&mut sink(config(empty)), 0).await;
        assert_eq!(failure(&answer).0, Failure::Hold);
        assert!(failure(&answer).1.contains("holds no certificate"), "{answer:?}");
    }
}

/// What is in the sink when the gateway stops is given back, and not sent first.
#[tokio::test]
async fn a_sink_that_stops_gives_back_what_waits() {
    let (url, _server) = meeting(2).await;
    let config = HttpConfig { in_flight_max: 1, ..HttpConfig::new(format!("{url}/events")) };
    let mut sink = sink_with(config, Duration::from_millis(200));
    (0..3).for_each(|id| sink.begin(request(id)));
    sink.stop();
    for expected in [1, 2] {
        let (id, answer) = sink.answer().await;
        assert_eq!((id, failure(&answer).0), (expected, Failure::Again));
    }
    let (id, answer) = sink.answer().await;
    assert_eq!((id, failure(&answer).0), (0, Failure::Retry { after: None }), "nobody answers it");
}
