//! Stand-ins for tests: events, and an HTTP upstream on loopback that does as it is told.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::post;
use serde_json::Value;
use storage::{Attributes, Event, StoredEvent};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::origin::Origin;

pub(crate) fn origin() -> Origin {
    Origin { gateway: "edge-01".into(), epoch: 0xab }
}

pub(crate) fn event(device: &str, payload: &str) -> Event {
    Event {
        partition: 0,
        received_us: 1_700_000_000_000_000,
        device_key: device.into(),
        topic: format!("devices/{device}/t").into(),
        attributes: Attributes::default(),
        payload: payload.to_owned().into(),
    }
}

pub(crate) fn stored(offset: u64, device: &str, payload: &str) -> StoredEvent {
    StoredEvent { offset, seq: offset, event: event(device, payload), stamp: None }
}

/// What a log gives from an offset on: one event, if there is one.
#[cfg(feature = "kafka")]
pub(crate) fn read(log: &[StoredEvent], from: u64) -> storage::Read {
    let event = log.iter().find(|stored| stored.offset >= from);
    let next = event.map_or(from, |stored| stored.offset + 1);
    storage::Read { events: event.cloned().into_iter().collect(), next, missing: Vec::new() }
}

/// A POST that arrived, its body decoded.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Received {
    /// The events in it, whether as an array or one a line.
    pub(crate) fn events(&self) -> Vec<Value> {
        if self.body.first() == Some(&b'[') {
            serde_json::from_slice(&self.body).expect("an array of events")
        } else {
            let lines = self.body.split(|&b| b == b'\n').filter(|line| !line.is_empty());
            lines.map(|line| serde_json::from_slice(line).expect("a line is JSON")).collect()
        }
    }
    /// Sequence numbers of the events in it.
    pub(crate) fn seqs(&self) -> Vec<u64> {
        let seq = |event: &Value| event["sequence"].as_str().and_then(|s| s.parse().ok());
        self.events().iter().map(|event| seq(event).expect("a sequence number")).collect()
    }
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }
}

/// What it answers: status, headers, body.
pub(crate) type Reply = (StatusCode, Vec<(&'static str, String)>, String);

pub(crate) fn reply(status: u16) -> Reply {
    (StatusCode::from_u16(status).expect("a status"), Vec::new(), String::new())
}

/// Stands for a status: it does not answer at all.
pub(crate) const SILENCE: u16 = 999;

type Behaviour = Box<dyn FnMut(&Received) -> Reply + Send>;

#[derive(Clone)]
struct Shared {
    behaviour: Arc<Mutex<Behaviour>>,
    accepted: Arc<watch::Sender<Vec<Received>>>,
}

/// An HTTP upstream that stops when it is dropped.
pub(crate) struct Upstream {
    pub(crate) url: String,
    shared: Shared,
    _server: JoinSet<()>,
}

impl Upstream {
    /// Answers each POST as `behaviour` says.
    pub(crate) async fn start(behaviour: impl FnMut(&Received) -> Reply + Send + 'static) -> Self {
        // Only the first test's call can succeed, and one is enough.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/events", listener.local_addr().expect("bound"));
        let shared = Shared {
            behaviour: Arc::new(Mutex::new(Box::new(behaviour))),
            accepted: Arc::new(watch::Sender::new(Vec::new())),
        };
        let app = Router::new().route("/events", post(take)).with_state(shared.clone());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, app).await.expect("serving") });
        Self { url, shared, _server: server }
    }

    pub(crate) fn behave(&self, behaviour: impl FnMut(&Received) -> Reply + Send + 'static) {
        *self.shared.behaviour.lock().expect("no panic") = Box::new(behaviour);
    }

    /// What it answered with a 2xx so far.
    pub(crate) fn accepted(&self) -> Vec<Received> {
        self.shared.accepted.borrow().clone()
    }

    /// Sequence numbers of every event that it accepted, in order of arrival.
    pub(crate) fn seqs(&self) -> Vec<u64> {
        self.accepted().iter().flat_map(Received::seqs).collect()
    }
}

async fn take(State(shared): State<Shared>, headers: HeaderMap, body: Bytes) -> impl IntoResponse {
    let body = match headers.get("content-encoding").map(|v| v.to_str().expect("text")) {
        None => body.to_vec(),
        Some("gzip") => {
            let mut out = Vec::new();
            let mut decoder = flate2::read::GzDecoder::new(&body[..]);
            std::io::Read::read_to_end(&mut decoder, &mut out).expect("gzip");
            out
        }
        Some("zstd") => zstd::stream::decode_all(&body[..]).expect("zstd"),
        Some(other) => panic!("content coding {other}"),
    };
    let received = Received { headers, body };
    let (status, headers, text) = (shared.behaviour.lock().expect("no panic"))(&received);
    if status == SILENCE {
        return std::future::pending().await;
    }
    if status.is_success() {
        shared.accepted.send_modify(|all| all.push(received));
    }
    let mut response = (status, text).into_response();
    for (name, value) in headers {
        response.headers_mut().insert(name, value.parse().expect("a header value"));
    }
    response
}
