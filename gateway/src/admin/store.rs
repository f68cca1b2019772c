//! The store tools beside a running gateway: `/api/v1/store/stats`, `/api/v1/store/verify`,
//! `/api/v1/store/export`, `/api/v1/balance`.
//!
//! Walks read much: they run on the blocking pool, one at a time ([`Walks`]; a second is answered
//! with 429), and end when who asked is gone or the gateway stops. What they say goes through a short
//! pipe, so that a slow reader costs no memory. Verify and balance answer with a line of progress a
//! second and their report in the last line; an export that could not read everything ends in a
//! broken answer, so that nobody takes it for whole.

use std::io::{self, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use bridge::Framing;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use storage::{Progress, Store};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::io::ReaderStream;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::inspection::place::Bound;
use crate::inspection::report::Line;
use crate::inspection::{self, InspectError, Pace, Selection, Tell};

/// Pieces of an answer that wait for their reader.
const PIECES_MAX: usize = 4;
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// What the walks need.
#[derive(Clone)]
pub(super) struct Walks {
    pub(super) store: Store,
    pub(super) gateway: Arc<str>,
    one: Arc<Semaphore>,
    stop: CancellationToken,
}

/// The routes of the store tools.
pub(super) fn router(walks: Walks) -> Router {
    Router::new()
        .route("/api/v1/store/stats", get(stats))
        .route("/api/v1/store/verify", get(verify))
        .route("/api/v1/store/export", get(export))
        .route("/api/v1/balance", get(balance))
        .with_state(walks)
}

async fn stats(State(walks): State<Walks>) -> Response {
    let job = move || inspection::stats(&walks.store, &walks.gateway);
    match tokio::task::spawn_blocking(job).await {
        Ok(Ok(report)) => Json(report).into_response(),
        Ok(Err(error)) => failed(&error.to_string()),
        Err(_) => failed("the look at the store panicked"),
    }
}

pub(super) fn failed(why: &str) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{why}\n")).into_response()
}

async fn verify(State(walks): State<Walks>) -> Response {
    walks.lines(inspection::verify)
}

async fn balance(State(walks): State<Walks>) -> Response {
    walks.lines(inspection::balance)
}

/// What `/api/v1/store/export` takes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExportQuery {
    /// As `--from`.
    pub(crate) from: Option<String>,
    /// As `--to`.
    pub(crate) to: Option<String>,
    /// As `--device`.
    pub(crate) device: Option<String>,
    /// As `--format`.
    pub(crate) format: Option<String>,
}

impl ExportQuery {
    /// What is set, with its key.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let values = [
            ("from", &self.from),
            ("to", &self.to),
            ("device", &self.device),
            ("format", &self.format),
        ];
        values.into_iter().filter_map(|(key, value)| Some((key, value.as_deref()?)))
    }

    fn selection(self) -> Result<Selection, String> {
        let bound = |key: &str, text: Option<String>| {
            text.map(|text| text.parse().map_err(|wrong| format!("{key} {wrong}"))).transpose()
        };
        let format = match self.format.as_deref() {
            None | Some("ndjson") => Framing::Lines,
            Some("cloudevents_batch") => Framing::Array,
            Some(other) => {
                return Err(format!("format must be ndjson or cloudevents_batch, not {other:?}"));
            }
        };
        let (from, to) = (bound("from", self.from)?, bound("to", self.to)?);
        Ok(Selection { from, to, device: self.device, format })
    }
}

async fn export(State(walks): State<Walks>, Query(query): Query<ExportQuery>) -> Response {
    let ours = |bound: &Bound| bound.place(&walks.gateway, walks.store.epoch()).map(|_| ());
    let selection = query.selection().and_then(|selection| {
        let mut bounds = selection.from.iter().chain(&selection.to);
        bounds.try_for_each(ours).map_err(|error| error.to_string())?;
        Ok(selection)
    });
    let selection = match selection {
        Ok(selection) => selection,
        Err(wrong) => return (StatusCode::BAD_REQUEST, format!("{wrong}\n")).into_response(),
    };
    let media_type = match selection.format {
        Framing::Lines => "application/x-ndjson",
        Framing::Array => "application/cloudevents-batch+json",
    };
    walks.answer(media_type, move |walks, pipe| {
        let mut tell = |_: Progress| !walks.is_stopping();
        let export = inspection::export(&walks.store, &walks.gateway, &selection, pipe, &mut tell);
        let why = match export {
            Ok(exported) if exported.unreadable.is_empty() => return Ok(()),
            Ok(exported) => {
                let ranges = exported.unreadable.iter().map(|r| format!("{}..{}", r.start, r.end));
                let ranges = ranges.collect::<Vec<_>>().join(", ");
                format!("events that were to be exported cannot be read: offsets {ranges}")
            }
            Err(InspectError::Write(error)) => return Err(error),
            Err(error) => error.to_string(),
        };
        warn!("an export is not whole: {why}");
        pipe.fail(why)
    })
}

impl Walks {
    pub(super) fn new(store: Store, gateway: &str, stop: CancellationToken) -> Self {
        Self { store, gateway: gateway.into(), one: Arc::new(Semaphore::new(1)), stop }
    }

    /// Runs a walk that answers in lines.
    fn lines<T: Serialize + Send + 'static>(
        self,
        walk: fn(&Store, &str, Tell<'_>) -> Result<T, InspectError>,
    ) -> Response {
        self.answer("application/x-ndjson", move |walks, pipe| {
            let mut pace = Pace::new(PROGRESS_EVERY);
            let mut tell = |Progress { done, total }: Progress| {
                let told = !pace.is_due() || write_line(pipe, &Line::Progress::<T> { done, total });
                told && !walks.is_stopping()
            };
            let line = match walk(&walks.store, &walks.gateway, &mut tell) {
                Ok(report) => Line::Report(report),
                Err(error) => Line::Failed(error.to_string()),
            };
            write_line(pipe, &line);
            Ok(())
        })
    }

    /// Whether the gateway stops, and walks are to end.
    pub(super) fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Runs a job on the blocking pool, whose output is the answer.
    pub(super) fn answer(
        self,
        media_type: &'static str,
        job: impl FnOnce(&Walks, &mut Pipe) -> io::Result<()> + Send + 'static,
    ) -> Response {
        let Ok(permit) = self.one.clone().try_acquire_owned() else {
            let busy =
                "another verify, export or balance is under way: try again when it is done\n";
            return (StatusCode::TOO_MANY_REQUESTS, busy).into_response();
        };
        piped(media_type, move |pipe| {
            let _permit: OwnedSemaphorePermit = permit;
            job(&self, pipe)
        })
    }
}

/// Runs a job on the blocking pool, whose output is the answer.
pub(super) fn piped(
    media_type: &'static str,
    job: impl FnOnce(&mut Pipe) -> io::Result<()> + Send + 'static,
) -> Response {
    let (sender, receiver) = mpsc::channel(PIECES_MAX);
    tokio::task::spawn_blocking(move || {
        // It fails when nobody reads any more: then there is nobody to tell.
        job(&mut Pipe(sender)).ok();
    });
    let body = Body::from_stream(ReaderStream::new(Piped { receiver, rest: Bytes::new() }));
    ([(header::CONTENT_TYPE, media_type)], body).into_response()
}

/// Whether the line could be written.
pub(super) fn write_line<T: Serialize>(out: &mut Pipe, line: &Line<T>) -> bool {
    let Ok(mut text) = serde_json::to_vec(line) else { return false };
    text.push(b'\n');
    out.write_all(&text).is_ok()
}

/// The end that a job writes to, from its own thread.
pub(super) struct Pipe(mpsc::Sender<io::Result<Bytes>>);

impl Pipe {
    /// Breaks the answer off.
    pub(super) fn fail(&mut self, why: String) -> io::Result<()> {
        self.send(Err(io::Error::other(why)))
    }

    fn send(&mut self, piece: io::Result<Bytes>) -> io::Result<()> {
        self.0.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !bytes.is_empty() {
            self.send(Ok(Bytes::copy_from_slice(bytes)))?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The end that the answer is read from.
struct Piped {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    rest: Bytes,
}

impl AsyncRead for Piped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.rest.is_empty() {
            match ready!(self.receiver.poll_recv(context)) {
                Some(piece) => self.rest = piece?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let len = self.rest.len().min(out.remaining());
        out.put_slice(&self.rest.split_to(len));
        Poll::Ready(Ok(()))
    }
}
