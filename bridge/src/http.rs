//! The HTTP sink: POSTs of one or of many events.
//!
//! Owns: how a request becomes POSTs and their answers one answer. What a POST carries is in `body`,
//! what its answer means in `answer`, how events are spread over POSTs in `tracks`, what they are sent
//! with in `link` and `oauth`.
//!
//! - Up to `in_flight_max` POSTs at a time, each with whole partitions. One request of `delivery` is
//!   in the sink at a time; it is as large as that many POSTs, and its answer is theirs together.
//! - `Edge-Gateway-Offsets: <gateway>/<epoch>/<first>-<last>` names the range of log offsets of the
//!   POST, both ends included, the epoch in 16 hexadecimal digits. A hint for logs and receivers: what
//!   went in another POST, or was refused before, is not in it, so a range may have holes.
//! - Redirects are not followed: an upstream that moved is for somebody to confirm.
//!
//! Deliberately absent: pauses and repeats (`delivery`); what reqwest would retry or follow by
//! itself is switched off. The one repeat is that of a POST whose access token was refused, with a new
//! token.

mod answer;
mod body;
mod link;
mod oauth;
mod tracks;

use std::error::Error as _;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Response, StatusCode};
use storage::StoredEvent;
use tokio::task::JoinSet;

use self::link::Link;
use self::tracks::{PieceLimits, Track};
use crate::cloudevents::Envelope;
use crate::config::{HttpConfig, SinkConfig};
use crate::origin::Origin;
use crate::sink::{Answer, Failed, Failure, Request, RequestId, Sink, Window};

const OFFSETS: HeaderName = HeaderName::from_static("edge-gateway-offsets");

/// POSTs of one event that one track sends for a request: bounds how long a request takes.
const SINGLES_MAX: usize = 32;

/// Sends requests to an HTTP upstream.
pub(crate) struct HttpSink {
    upstream: Arc<Upstream>,
    requests: JoinSet<(RequestId, Answer)>,
}

impl HttpSink {
    /// A sink that keeps the limits of `sink` for each POST.
    pub(crate) fn new(
        config: HttpConfig,
        envelope: Envelope,
        origin: &Origin,
        sink: &SinkConfig,
    ) -> Self {
        let is_single = config.format.is_single();
        let upstream = Upstream {
            limits: PieceLimits {
                events_max: if is_single { 1 } else { sink.request_events_max },
                bytes_max: sink.request_bytes_max,
            },
            config,
            envelope,
            origin: origin.clone(),
            request_timeout: sink.request_timeout,
            link: Mutex::new(None),
        };
        Self { upstream: Arc::new(upstream), requests: JoinSet::new() }
    }

    /// Events and event bytes that one request of `delivery` should hold: what fits into
    /// `in_flight_max` POSTs.
    pub(crate) fn at_once(&self) -> (usize, usize) {
        let Upstream { config, limits, .. } = &*self.upstream;
        let posts = |one: usize| match config.in_flight_max {
            1 => one,
            // An eighth less: partitions are not of one size, and what does not fit into the POST of
            // its track waits for a second one.
            in_flight_max => one.saturating_mul(in_flight_max).saturating_mul(7).div_ceil(8),
        };
        let events_max = if config.format.is_single() {
            SINGLES_MAX * config.in_flight_max
        } else {
            posts(limits.events_max)
        };
        (events_max, posts(limits.bytes_max))
    }
}

impl Sink for HttpSink {
    fn window(&self) -> Window {
        Window { requests_max: 1, events_max: usize::MAX, bytes_max: usize::MAX }
    }

    fn begin(&mut self, request: Request) {
        let (id, upstream) = (request.id, Arc::clone(&self.upstream));
        self.requests.spawn(async move { (id, upstream.deliver(request).await) });
    }

    async fn answer(&mut self) -> (RequestId, Answer) {
        match self.requests.join_next().await {
            Some(Ok(answered)) => answered,
            // A bug of ours: it ends this sink's task and no other.
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            None => std::future::pending().await,
        }
    }
}

struct Upstream {
    config: HttpConfig,
    envelope: Envelope,
    origin: Origin,
    limits: PieceLimits,
    request_timeout: Duration,
    /// Carries the secrets; thrown away when they are refused, so that they are read again.
    link: Mutex<Option<Link>>,
}

/// A POST that is ready to go.
struct Prepared {
    link: Link,
    headers: HeaderMap,
    body: Bytes,
}

impl Upstream {
    /// Sends a request's events on their tracks.
    async fn deliver(self: Arc<Self>, request: Request) -> Answer {
        let mut tracks = JoinSet::new();
        for track in tracks::split(&request.events, self.config.in_flight_max, self.limits) {
            tracks.spawn(Arc::clone(&self).send(request.clone(), track));
        }
        let mut failed = Vec::new();
        while let Some(ended) = tracks.join_next().await {
            match ended {
                Ok(of_one) => failed.extend(of_one),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }
        tracks::merge(request.events.len(), failed)
    }

    /// Sends the pieces of a track, one after the other. Gives what was not delivered.
    async fn send(self: Arc<Self>, request: Request, mut track: Track) -> Vec<Failed> {
        while let Some(piece) = track.next() {
            let piece = Arc::new(piece);
            let answer = self.post(&request, &piece).await.unwrap_or_else(|refused| refused);
            track.answered(&piece, answer);
        }
        track.into_failed()
    }

    /// Both sides are an answer: `Err` is what is known before the upstream was asked.
    async fn post(
        self: &Arc<Self>,
        request: &Request,
        piece: &Arc<Vec<usize>>,
    ) -> Result<Answer, Answer> {
        // Files are read and bodies compressed where blocking harms nobody.
        let (upstream, request, places) = (Arc::clone(self), request.clone(), Arc::clone(piece));
        let prepared = tokio::task::spawn_blocking(move || upstream.prepare(&request, &places));
        let prepared = match prepared.await {
            Ok(prepared) => prepared?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let token = prepared.link.token().await?;
        let mut response = self.ask(&prepared, token.as_ref()).await?;
        if response.status() == StatusCode::UNAUTHORIZED
            && let Some(token) = token
        {
            // It may have been withdrawn before its time.
            prepared.link.token_refused(&token).await;
            let token = prepared.link.token().await?;
            response = self.ask(&prepared, token.as_ref()).await?;
        }
        if matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            self.forget_link();
        }
        Ok(answer::read(response, piece.len(), self.config.format.is_single()).await)
    }

    async fn ask(
        &self,
        prepared: &Prepared,
        token: Option<&HeaderValue>,
    ) -> Result<Response, Answer> {
        let Prepared { link, headers, body } = prepared;
        let mut headers = headers.clone();
        if let Some(token) = token {
            headers.insert(AUTHORIZATION, token.clone());
        }
        if let Some(signature) = link.sign(body, SystemTime::now()) {
            headers.insert(link::SIGNATURE, signature);
        }
        let post = link.client.post(&self.config.url).headers(headers).body(body.clone());
        post.send().await.map_err(|error| {
            // Certificates may have been renewed. That ours is refused shows only after connecting.
            if error.is_connect() || self.config.tls.identity.is_some() {
                self.forget_link();
            }
            Answer::failed(Failure::Retry { after: None }, chain(error))
        })
    }

    fn prepare(&self, request: &Request, piece: &[usize]) -> Result<Prepared, Answer> {
        let link = {
            let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
            match &mut *link {
                Some(link) => link.clone(),
                none => {
                    let built = Link::build(&self.config, self.request_timeout)
                        .map_err(|reason| Answer::failed(Failure::Hold, reason))?;
                    none.insert(built).clone()
                }
            }
        };
        let (own, body) = body::write(
            self.config.format,
            self.config.compression,
            &self.envelope,
            request,
            piece,
        );
        let mut headers = link.headers().clone();
        headers.extend(own);
        headers.insert(OFFSETS, self.offsets(&request.events, piece));
        Ok(Prepared { link, headers, body: body.into() })
    }

    fn forget_link(&self) {
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn offsets(&self, events: &[StoredEvent], piece: &[usize]) -> HeaderValue {
        let offset = |place: Option<&usize>| place.map_or(0, |&place| events[place].offset);
        let (first, last) = (offset(piece.first()), offset(piece.last()));
        let Origin { gateway, epoch } = &self.origin;
        HeaderValue::try_from(format!("{gateway}/{epoch:016x}/{first}-{last}"))
            .expect("a gateway's id is printable")
    }
}

/// An error with its causes in one line, without the address: that may hold a secret.
fn chain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
