//! The HTTP sink: POSTs of one or of many events.
//!
//! Owns: sending what `tracks` says is to be sent next. What a POST carries is in `body`, what its
//! answer means in `answer`, which events it carries and what that means for their requests in
//! `tracks`, what they are sent with in `link` and `oauth`.
//!
//! - Up to `in_flight_max` POSTs at a time, each with whole partitions. Enough requests of `delivery`
//!   are in the sink that the next POST is at hand when one is answered; what waits goes together, so
//!   POSTs grow with the load.
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

#[cfg(feature = "kafka")]
pub(crate) use self::link::endpoint;

use std::error::Error as _;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Response, StatusCode};
use tokio::task::JoinSet;

use self::link::Link;
use self::tracks::{Piece, PieceId, PieceLimits, Tracks};
use crate::cloudevents::Envelope;
use crate::config::{Compression, HttpConfig, OnReject, SinkConfig};
use crate::origin::Origin;
use crate::sink::{Answer, Failure, Request, RequestId, Sink, Window};

const OFFSETS: HeaderName = HeaderName::from_static("edge-gateway-offsets");

/// Events of one request for each POST at a time, where each event is a POST: bounds how long a
/// request takes.
const SINGLES_MAX: usize = 32;
/// Bad events that trials of one request find before it is answered: they are to become dead letters
/// now and then.
const FOUND_MAX: usize = 64;
/// Requests in the sink: what arrives while POSTs are in flight is handed over as it comes, and goes
/// together.
const REQUESTS_MAX: usize = 64;

/// Sends requests to an HTTP upstream.
pub(crate) struct HttpSink {
    upstream: Arc<Upstream>,
    request: PieceLimits,
    tracks: Tracks,
    posts: JoinSet<(PieceId, Answer)>,
}

impl HttpSink {
    /// A sink that keeps the limits of `sink` for each POST.
    pub(crate) fn new(
        config: HttpConfig,
        envelope: Envelope,
        origin: &Origin,
        sink: &SinkConfig,
    ) -> Self {
        let (is_single, in_flight_max) = (config.format.is_single(), config.in_flight_max);
        let limits = PieceLimits {
            events_max: if is_single { 1 } else { sink.request_events_max },
            bytes_max: sink.request_bytes_max,
        };
        let singles = PieceLimits { events_max: SINGLES_MAX * in_flight_max, ..limits };
        let found_max = match sink.on_reject {
            OnReject::GoOn => FOUND_MAX,
            // What is behind it in the sink must not go.
            OnReject::ParkDevice => 1,
        };
        let upstream = Upstream {
            config,
            envelope,
            origin: origin.clone(),
            request_timeout: sink.request_timeout,
            link: Mutex::new(None),
        };
        Self {
            upstream: Arc::new(upstream),
            request: if is_single { singles } else { limits },
            tracks: Tracks::new(in_flight_max, limits, found_max),
            posts: JoinSet::new(),
        }
    }

    /// Events that one request of `delivery` should hold.
    pub(crate) fn request_events_max(&self) -> usize {
        self.request.events_max
    }

    fn send_on(&mut self) {
        while let Some((id, piece)) = self.tracks.next_piece() {
            let upstream = Arc::clone(&self.upstream);
            self.posts.spawn(async move {
                let answer = upstream.post(&piece).await.unwrap_or_else(|refused| refused);
                (id, answer)
            });
        }
    }
}

impl Sink for HttpSink {
    fn window(&self) -> Window {
        // As much as is in flight, and one more POST.
        let posts = self.upstream.config.in_flight_max;
        let single = self.upstream.config.format.is_single();
        let requests = if single { 2 } else { posts + 1 };
        Window {
            requests_max: REQUESTS_MAX,
            events_max: self.request.events_max.saturating_mul(requests),
            bytes_max: self.request.bytes_max.saturating_mul(requests),
        }
    }

    fn begin(&mut self, request: Request) {
        self.tracks.begin(request);
        self.send_on();
    }

    fn stop(&mut self) {
        self.tracks.stop();
    }

    async fn answer(&mut self) -> (RequestId, Answer) {
        loop {
            if let Some(answered) = self.tracks.take_answer() {
                return answered;
            }
            match self.posts.join_next().await {
                Some(Ok((id, answer))) => {
                    self.tracks.posted(id, &answer);
                    self.send_on();
                }
                // A bug of ours: it ends this sink's task and no other.
                Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
                None => std::future::pending().await,
            }
        }
    }
}

struct Upstream {
    config: HttpConfig,
    envelope: Envelope,
    origin: Origin,
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
    /// Both sides are an answer: `Err` is what is known before the upstream was asked.
    async fn post(self: &Arc<Self>, piece: &Arc<Piece>) -> Result<Answer, Answer> {
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let prepared = match link {
            Some(link) if self.config.compression == Compression::None => self.prepare(link, piece),
            _ => {
                // Files are read and bodies compressed where blocking harms nobody.
                let (upstream, piece) = (Arc::clone(self), Arc::clone(piece));
                let prepared = tokio::task::spawn_blocking(move || {
                    let link = upstream.link()?;
                    Ok(upstream.prepare(link, &piece))
                });
                match prepared.await {
                    Ok(prepared) => prepared?,
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                }
            }
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

    /// What to send with; built where there is none. Blocks then.
    fn link(&self) -> Result<Link, Answer> {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = &*link {
            return Ok(link.clone());
        }
        let built = Link::build(&self.config, self.request_timeout)
            .map_err(|reason| Answer::failed(Failure::Hold, reason))?;
        Ok(link.insert(built).clone())
    }

    fn prepare(&self, link: Link, piece: &Piece) -> Prepared {
        let HttpConfig { format, compression, .. } = self.config;
        let (own, body) = body::write(format, compression, &self.envelope, piece);
        let mut headers = link.headers().clone();
        headers.extend(own);
        headers.insert(OFFSETS, self.offsets(piece));
        Prepared { link, headers, body: body.into() }
    }

    fn forget_link(&self) {
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn offsets(&self, piece: &Piece) -> HeaderValue {
        let offsets = || piece.events().map(|stored| stored.offset);
        let (first, last) = (offsets().min().unwrap_or(0), offsets().max().unwrap_or(0));
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
