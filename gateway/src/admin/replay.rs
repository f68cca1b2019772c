//! `POST /api/v1/replay`: stored events again, into one sink.
//!
//! The answer is a line of progress a second, and the report in the last line. The replay lives as
//! long as its answer is read: who hangs up has cancelled it. One runs at a time into a sink; a second
//! is answered with 429.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bridge::replay::{ReplayError, ReplayRange};
use bridge::{ReplayProgress, Replays};
use serde::{Deserialize, Serialize};
use storage::Store;
use tokio::sync::watch;
use tokio::time::timeout;

use super::store::{Pipe, piped, write_line};
use crate::inspection::place::Bound;
use crate::inspection::report::Line;
use crate::inspection::{self, InspectError};

const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// What the answer needs.
#[derive(Clone)]
struct Shared {
    store: Store,
    gateway: Arc<str>,
    sinks: Arc<[Replays]>,
}

/// What `/api/v1/replay` takes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReplayQuery {
    /// Name of the sink.
    pub(crate) sink: String,
    /// As `--from`; none for the first stored event.
    pub(crate) from: Option<String>,
    /// As `--to`; none for what is durable now.
    pub(crate) to: Option<String>,
    /// As `--device`.
    pub(crate) device: Option<String>,
    /// Event bytes a second; 0 for no limit but the share of a replay.
    #[serde(default)]
    pub(crate) rate: u64,
}

impl ReplayQuery {
    /// Each key with its value, if that is set.
    pub(crate) fn pairs(&self) -> [(&'static str, Option<String>); 5] {
        [
            ("sink", Some(self.sink.clone())),
            ("from", self.from.clone()),
            ("to", self.to.clone()),
            ("device", self.device.clone()),
            ("rate", Some(self.rate.to_string())),
        ]
    }
}

/// What a replay came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ReplayReport {
    /// First offset.
    pub(crate) from: u64,
    /// Offset that it stopped at, without it.
    pub(crate) to: u64,
    /// Events delivered.
    pub(crate) delivered: u64,
    /// Events that the upstream refused for good.
    pub(crate) refused: u64,
    /// Requests that were tried again.
    pub(crate) retries: u64,
}

pub(super) fn router(store: Store, gateway: &str, sinks: Vec<Replays>) -> Router {
    Router::new().route("/api/v1/replay", post(replay)).with_state(Shared {
        store,
        gateway: gateway.into(),
        sinks: sinks.into(),
    })
}

async fn replay(State(shared): State<Shared>, Query(query): Query<ReplayQuery>) -> Response {
    let begun = tokio::task::spawn_blocking(move || shared.begin(query)).await;
    match begun {
        Ok(Ok((from, to, progress))) => piped("application/x-ndjson", move |pipe| {
            follow(from, to, progress, pipe);
            Ok(())
        }),
        Ok(Err((status, why))) => (status, format!("{why}\n")).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "see the gateway's log\n").into_response(),
    }
}

type Begun = (u64, u64, watch::Receiver<ReplayProgress>);

impl Shared {
    /// Finds the places, which reads the disk, and asks the sink.
    fn begin(&self, query: ReplayQuery) -> Result<Begun, (StatusCode, String)> {
        let wrong = |why: String| (StatusCode::BAD_REQUEST, why);
        let ReplayQuery { sink, from, to, device, rate } = query;
        let Some(sink) = self.sinks.iter().find(|replays| replays.sink() == sink) else {
            let names: Vec<_> = self.sinks.iter().map(Replays::sink).collect();
            return Err(wrong(format!(
                "there is no sink {sink:?}; there are {}",
                names.join(", ")
            )));
        };
        let place = |key: &str, text: Option<String>, otherwise: u64| {
            let Some(text) = text else { return Ok(otherwise) };
            let bound: Bound = text.parse().map_err(|why| wrong(format!("{key} {why}")))?;
            inspection::seek(&self.store, &self.gateway, &bound).map_err(|error| match error {
                InspectError::Bound(_) => wrong(error.to_string()),
                error => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
            })
        };
        let watermark = self.store.mark().watermark;
        let from = place("from", from, self.store.stats().first_offset)?;
        // What is still to come is nothing to do again.
        let to = place("to", to, watermark)?.min(watermark).max(from);
        let range = ReplayRange { offsets: from..to, device, rate_bytes_per_second: rate };
        let progress = sink.begin(range).map_err(|error| match error {
            ReplayError::Busy => (StatusCode::TOO_MANY_REQUESTS, error.to_string()),
            ReplayError::Stopped => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
        })?;
        Ok((from, to, progress))
    }
}

/// Tells how far it is until it has ended, or until nobody reads any more.
fn follow(from: u64, to: u64, mut progress: watch::Receiver<ReplayProgress>, pipe: &mut Pipe) {
    let runtime = tokio::runtime::Handle::current();
    loop {
        let ended = timeout(PROGRESS_EVERY, progress.wait_for(|progress| progress.ended));
        let ended = runtime.block_on(ended).map(|end| end.is_ok());
        let told = progress.borrow().clone();
        let line = match ended {
            Ok(true) => Line::Report(ReplayReport {
                from,
                to,
                delivered: told.delivered_events,
                refused: told.refused_events,
                retries: told.retries,
            }),
            Ok(false) => Line::Failed("the gateway stopped before the replay had ended".into()),
            Err(_) => {
                let done = told.cursor.clamp(from, to) - from;
                if !write_line(pipe, &Line::Progress::<ReplayReport> { done, total: to - from }) {
                    return;
                }
                continue;
            }
        };
        write_line(pipe, &line);
        return;
    }
}
