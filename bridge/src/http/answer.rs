//! What an upstream's answer means.
//!
//! Owns: the sorting of status codes ([`sort`]), and the reading of answers per event
//! ([`sort_results`]).
//!
//! A service that judges events one by one answers 207 with
//!
//! ```json
//! {"results": [{"index": 3, "status": 400, "error": "no such sensor"}]}
//! ```
//!
//! `index` is the event's place in the request, from 0; `status` an HTTP status code, sorted as that
//! of a whole request would be, so that 400, 413 or 422 rejects this one event; `error` is optional,
//! and so is `retry_after` in seconds. Events that are not named were taken. A service that asks for
//! an event again and takes a later one of the same device in the same request gives up that device's
//! order. A 207 in any other shape holds the sink: nobody knows what was taken.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Response, StatusCode};
use serde::Deserialize;

use crate::sink::{Answer, Failed, Failure, Which};

/// Bytes of an error's body that are quoted.
const QUOTE_BYTES_MAX: usize = 200;
/// Bytes of a good answer's body that are read away, so that the connection can be used again.
const DRAIN_BYTES_MAX: usize = 64 * 1024;
/// Longest list of results that is read.
const RESULTS_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Reads an answer to a POST of so many events, and sorts it. `headers_are_theirs`: the events put
/// something into its headers.
pub(super) async fn read(
    mut response: Response,
    events: usize,
    headers_are_theirs: bool,
) -> Answer {
    let status = response.status();
    let headers = std::mem::take(response.headers_mut());
    if status == StatusCode::MULTI_STATUS {
        return match body(response, RESULTS_BYTES_MAX).await {
            Ok(body) => sort_results(&body, events),
            Err(error) => Answer::failed(Failure::Retry { after: None }, super::chain(error)),
        };
    }
    let bytes_max = if status.is_success() { DRAIN_BYTES_MAX } else { QUOTE_BYTES_MAX };
    // The status says it all; a body that breaks off changes nothing.
    let quote = body(response, bytes_max).await.map(|body| quote(&body)).unwrap_or_default();
    let mut answer = sort(status, &headers, &quote, SystemTime::now());
    if status == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE && headers_are_theirs {
        answer = Answer::failed(Failure::Suspect, format!("HTTP {status}"));
    }
    answer
}

/// The beginning of a body.
pub(super) async fn body(mut response: Response, bytes_max: usize) -> reqwest::Result<Vec<u8>> {
    let mut head = Vec::new();
    while head.len() < bytes_max
        && let Some(chunk) = response.chunk().await?
    {
        head.extend_from_slice(&chunk);
    }
    Ok(head)
}

/// The beginning of a text, in one line.
pub(super) fn quote(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(&text[..text.len().min(QUOTE_BYTES_MAX)]);
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// What an answer means. Anything that neither takes the events nor blames them, and that waiting
/// does not mend, is held: nothing is dropped for an answer that we do not know.
pub(super) fn sort(
    status: StatusCode,
    headers: &HeaderMap,
    quote: &str,
    now: SystemTime,
) -> Answer {
    if status.is_success() {
        return Answer::delivered();
    }
    let mut reason = format!("HTTP {status}");
    if !quote.is_empty() {
        let _ = write!(reason, ": {quote}");
    }
    let (failure, advice) = match status.as_u16() {
        408 | 425 | 429 | 500..=599 => {
            let after = headers.get(RETRY_AFTER).and_then(|value| retry_after(value, now));
            (Failure::Retry { after }, "")
        }
        400 | 413 | 422 => (Failure::Suspect, ""),
        300..=399 => {
            let to = headers.get(LOCATION).and_then(|value| value.to_str().ok());
            let _ = write!(reason, ": it redirects to {}", to.unwrap_or("nowhere"));
            (Failure::Hold, "; set url to where it moved")
        }
        401 | 403 => (Failure::Hold, "; check auth, it is read again before the next try"),
        404 | 405 | 410 => (Failure::Hold, "; check url"),
        406 | 415 => (Failure::Hold, "; check format and compression"),
        407 => (Failure::Hold, "; check the proxy"),
        431 => (Failure::Hold, "; check headers"),
        _ => (Failure::Hold, "; this sink does not know that answer"),
    };
    reason.push_str(advice);
    Answer::failed(failure, reason)
}

/// RFC 9110, section 10.2.3: seconds or a date.
pub(super) fn retry_after(value: &HeaderValue, now: SystemTime) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).ok(),
    }
}

#[derive(Deserialize)]
struct Results {
    results: Vec<EventResult>,
}

#[derive(Deserialize)]
struct EventResult {
    index: usize,
    status: u16,
    #[serde(default)]
    error: String,
    retry_after: Option<u64>,
}

/// What an answer per event means; see the module for its shape.
pub(super) fn sort_results(body: &[u8], events: usize) -> Answer {
    let held = |why: &str| {
        let reason = format!("HTTP 207 with {why}; its body must be {{\"results\": [...]}}");
        Answer::failed(Failure::Hold, reason)
    };
    let Ok(Results { results }) = serde_json::from_slice(body) else {
        return held("a body that this sink does not know");
    };
    let mut judged = vec![false; events];
    let mut failed: Vec<Failed> = Vec::new();
    for EventResult { index, status, error, retry_after } in results {
        let Some(first @ false) = judged.get_mut(index) else {
            return held("an index that is not in the request, or twice");
        };
        *first = true;
        let Ok(status) = StatusCode::from_u16(status) else {
            return held("a status that is none");
        };
        let answer =
            sort(status, &HeaderMap::new(), &quote(error.as_bytes()), SystemTime::UNIX_EPOCH);
        let Some(Failed { failure, reason, .. }) = answer.failed.into_iter().next() else {
            continue;
        };
        let failure = match failure {
            // It is named: nobody has to look for it.
            Failure::Suspect => Failure::Reject,
            Failure::Retry { .. } => Failure::Retry { after: retry_after.map(Duration::from_secs) },
            other => other,
        };
        match failed.iter_mut().find(|f| f.failure == failure && f.reason == reason) {
            Some(Failed { which: Which::These(indexes), .. }) => indexes.push(index),
            _ => failed.push(Failed { which: Which::These(vec![index]), failure, reason }),
        }
    }
    Answer { failed }
}
