//! The HTTP sink against a server on loopback.

use std::path::Path;

use super::*;
use crate::config::SinkConfig;
use crate::fake::{self, Upstream as Server, reply};
use crate::sink::Which;

fn sink(config: HttpConfig) -> HttpSink {
    let envelope = Envelope::new(&fake::origin(), SinkConfig::EVENT_TYPE);
    HttpSink::new(config, envelope, &fake::origin(), Duration::from_secs(20))
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
async fn both_formats_arrive_in_every_coding() {
    let server = Server::start(|_| reply(204)).await;
    let mut expected = 0;
    for format in [HttpFormat::CloudEventsBatch, HttpFormat::NdJson] {
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let config = HttpConfig { format, compression, ..HttpConfig::new(&server.url) };
            assert_eq!(ask(&mut sink(config), 9).await, Answer::delivered());
            expected += 1;
            let accepted = server.accepted();
            assert_eq!(accepted.len(), expected);
            let received = &accepted[expected - 1];
            assert_eq!(received.seqs(), [5, 6]);
            let content_type = received.header("content-type");
            match format {
                HttpFormat::CloudEventsBatch => {
                    assert_eq!(content_type, "application/cloudevents-batch+json");
                }
                HttpFormat::NdJson => assert_eq!(content_type, "application/x-ndjson"),
            }
            assert_eq!(received.header("edge-gateway-offsets"), "00000000000000ab/5-6");
            assert!(received.header("user-agent").starts_with("edge-gateway/"));
        }
    }
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
    assert_eq!(failure, Failure::Suspect);
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
    let envelope = Envelope::new(&fake::origin(), SinkConfig::EVENT_TYPE);
    let timeout = Duration::from_millis(50);
    let mut sink = HttpSink::new(HttpConfig::new(url), envelope, &fake::origin(), timeout);
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
