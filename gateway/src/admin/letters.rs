//! The dead letters beside a running gateway: `/api/v1/dlq` lists them, `/api/v1/dlq/export` gives
//! them whole, `POST /api/v1/dlq/count` says how many a selection is about, and
//! `POST /api/v1/dlq/requeue` and `/api/v1/dlq/drop` change them.
//!
//! The last two are all that the admin endpoint changes. They take JSON and nothing else, so that a web
//! page in somebody's browser cannot send them without asking first, which is never answered.
//! Whoever requeues is answered when the marks are durable; the forwarder is told then.

use std::collections::BTreeMap;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use bridge::forwarder::Wake;
use serde::Serialize;
use storage::Store;

use super::store::{Walks, failed};
use crate::ingest::clock;
use crate::inspection::InspectError;
use crate::inspection::letters::{self, PageQuery, Selected, Selection};

#[derive(Clone)]
struct Letters {
    walks: Walks,
    wakes: BTreeMap<String, Wake>,
}

/// The routes of the dead letters.
pub(super) fn router(walks: Walks, wakes: BTreeMap<String, Wake>) -> Router {
    Router::new()
        .route("/api/v1/dlq", get(list))
        .route("/api/v1/dlq/export", get(export))
        .route("/api/v1/dlq/count", post(count))
        .route("/api/v1/dlq/requeue", post(requeue))
        .route("/api/v1/dlq/drop", post(drop_letters))
        .with_state(Letters { walks, wakes })
}

async fn list(State(letters): State<Letters>, Query(query): Query<PageQuery>) -> Response {
    blocking(move || letters::list(&letters.walks.store, &letters.walks.gateway, &query)).await
}

/// What `/api/v1/dlq/export` takes.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportQuery {
    sink: String,
    event: Option<String>,
    device: Option<String>,
    reason: Option<String>,
}

async fn export(State(letters): State<Letters>, Query(query): Query<ExportQuery>) -> Response {
    let selection = Selection {
        sink: query.sink,
        all: query.event.is_none(),
        events: query.event.into_iter().collect(),
        device: query.device,
        reason: query.reason,
    };
    let walks = letters.walks;
    let selected = match selection.of(&walks.store, &walks.gateway) {
        Ok(selected) => selected,
        Err(wrong) => return refused(&wrong),
    };
    walks.answer("application/x-ndjson", move |walks, pipe| {
        let go_on = || !walks.is_stopping();
        match letters::export(&walks.store, &walks.gateway, &selected, pipe, &go_on) {
            Ok(_) => Ok(()),
            Err(InspectError::Write(error)) => Err(error),
            Err(error) => pipe.fail(error.to_string()),
        }
    })
}

async fn count(State(letters): State<Letters>, Json(selection): Json<Selection>) -> Response {
    let gateway = letters.walks.gateway.clone();
    letters
        .change(selection, move |store, selected| letters::count(store, &gateway, selected))
        .await
}

async fn requeue(State(letters): State<Letters>, Json(selection): Json<Selection>) -> Response {
    let Some(wake) = letters.wakes.get(&selection.sink).cloned() else {
        return refused(&no_such_sink(&selection.sink));
    };
    letters
        .change(selection, move |store, selected| {
            let changed = letters::requeue(store, selected, clock::now_us());
            // Also after a failure: some may be marked.
            wake();
            changed.map_err(InspectError::from)
        })
        .await
}

async fn drop_letters(
    State(letters): State<Letters>,
    Json(selection): Json<Selection>,
) -> Response {
    // What was held back behind them goes now. A sink that is not configured any more has no one to
    // tell.
    let wake = letters.wakes.get(&selection.sink).cloned();
    letters
        .change(selection, move |store, selected| {
            let changed = letters::drop(store, selected, clock::now_us());
            if let Some(wake) = wake {
                wake();
            }
            changed.map_err(InspectError::from)
        })
        .await
}

impl Letters {
    async fn change(
        self,
        selection: Selection,
        change: impl FnOnce(&Store, &Selected) -> Result<letters::Changed, InspectError>
        + Send
        + 'static,
    ) -> Response {
        let walks = self.walks;
        match selection.of(&walks.store, &walks.gateway) {
            Ok(selected) => blocking(move || change(&walks.store, &selected)).await,
            Err(wrong) => refused(&wrong),
        }
    }
}

/// Why nothing of a sink can be requeued.
pub(crate) fn no_such_sink(sink: &str) -> String {
    format!("the sink {sink:?} is not in the configuration: nothing would deliver its letters")
}

fn refused(wrong: &str) -> Response {
    (StatusCode::BAD_REQUEST, format!("{wrong}\n")).into_response()
}

async fn blocking<T: Serialize + Send + 'static>(
    job: impl FnOnce() -> Result<T, InspectError> + Send + 'static,
) -> Response {
    match tokio::task::spawn_blocking(job).await {
        Ok(Ok(answer)) => Json(answer).into_response(),
        Ok(Err(error)) => failed(&error.to_string()),
        Err(_) => failed("the look at the dead letters panicked"),
    }
}
