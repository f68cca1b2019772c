//! The HTTP sink: one POST per request, one request at a time.
//!
//! Owns: body and headers of a request, and the sorting of answers ([`sort`]).
//!
//! - Body: CloudEvents (see `cloudevents`) as a JSON array or one a line, as it is or compressed.
//! - `Edge-Gateway-Offsets: <epoch>/<first>-<last>` names the range of log offsets of the request,
//!   both ends included, the epoch in 16 hexadecimal digits. A hint for logs and receivers: what the
//!   upstream has refused before is not in it, so a range may have holes.
//! - Redirects are not followed: an upstream that moved is for somebody to confirm.
//!
//! TLS takes the process's default rustls provider, which the binary installs. Roots are the
//! system's (`ca-certificates` on Debian, or `SSL_CERT_FILE`), read when the client is built: nothing
//! is fetched and nothing is baked in. A system without roots holds an `https` sink; plain `http`
//! needs none.
//!
//! Deliberately absent: pauses and repeats (`delivery`); what reqwest would retry or follow by
//! itself is switched off.

use std::error::Error as _;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use reqwest::header::{
    AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION,
    RETRY_AFTER,
};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::task::JoinSet;

use crate::cloudevents::{Envelope, Framing};
use crate::config::{Compression, HttpAuth, HttpConfig, HttpFormat, Secret, SecretSource};
use crate::origin::Origin;
use crate::sink::{Answer, Failure, Request, RequestId, Sink, Window};

const OFFSETS: HeaderName = HeaderName::from_static("edge-gateway-offsets");
const USER_AGENT: &str = concat!("edge-gateway/", env!("CARGO_PKG_VERSION"));

/// Bytes of an error's body that are quoted.
const QUOTE_BYTES_MAX: usize = 200;
/// Bytes of a good answer's body that are read away, so that the connection can be used again.
const DRAIN_BYTES_MAX: usize = 64 * 1024;
/// zstd's fastest ordinary level: an event costs CPU on a small board.
const ZSTD_LEVEL: i32 = 1;

/// Sends requests to an HTTP upstream.
pub(crate) struct HttpSink {
    upstream: Arc<Upstream>,
    posts: JoinSet<(RequestId, Answer)>,
}

impl HttpSink {
    pub(crate) fn new(
        config: HttpConfig,
        envelope: Envelope,
        origin: &Origin,
        request_timeout: Duration,
    ) -> Self {
        let upstream = Upstream {
            config,
            envelope,
            epoch: origin.epoch,
            request_timeout,
            client: Mutex::new(None),
        };
        Self { upstream: Arc::new(upstream), posts: JoinSet::new() }
    }
}

impl Sink for HttpSink {
    fn window(&self) -> Window {
        Window { requests_max: 1, events_max: usize::MAX, bytes_max: usize::MAX }
    }

    fn begin(&mut self, request: Request) {
        let upstream = Arc::clone(&self.upstream);
        self.posts.spawn(async move {
            let id = request.id;
            (id, upstream.post(request).await.unwrap_or_else(|refused| refused))
        });
    }

    async fn answer(&mut self) -> (RequestId, Answer) {
        match self.posts.join_next().await {
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
    epoch: u64,
    request_timeout: Duration,
    /// Carries the secrets; thrown away when they are refused, so that they are read again.
    client: Mutex<Option<Client>>,
}

impl Upstream {
    /// Both sides are an answer: `Err` is what is known before the upstream was asked.
    async fn post(self: Arc<Self>, request: Request) -> Result<Answer, Answer> {
        let offsets = self.offsets(&request);
        // Files are read and bodies compressed where blocking harms nobody.
        let upstream = Arc::clone(&self);
        let prepared = tokio::task::spawn_blocking(move || upstream.prepare(&request)).await;
        let (client, body) = match prepared {
            Ok(prepared) => prepared?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };

        let mut post = client
            .post(&self.config.url)
            .header(CONTENT_TYPE, self.content_type())
            .header(OFFSETS, offsets)
            .body(body);
        if let Some(coding) = self.content_coding() {
            post = post.header(CONTENT_ENCODING, coding);
        }
        let response = match post.send().await {
            Ok(response) => response,
            Err(error) => {
                return Err(Answer::failed(Failure::Retry { after: None }, chain(error)));
            }
        };
        let status = response.status();
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            *self.client.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        let headers = response.headers().clone();
        let quote_max = if status.is_success() { DRAIN_BYTES_MAX } else { QUOTE_BYTES_MAX };
        let quote = quote(response, quote_max).await;
        Ok(sort(status, &headers, &quote, SystemTime::now()))
    }

    fn offsets(&self, request: &Request) -> String {
        let first = request.events.first().map_or(0, |e| e.offset);
        let last = request.events.last().map_or(0, |e| e.offset);
        format!("{:016x}/{first}-{last}", self.epoch)
    }

    fn content_type(&self) -> &'static str {
        match self.config.format {
            HttpFormat::CloudEventsBatch => "application/cloudevents-batch+json",
            HttpFormat::NdJson => "application/x-ndjson",
        }
    }

    fn content_coding(&self) -> Option<&'static str> {
        match self.config.compression {
            Compression::None => None,
            Compression::Gzip => Some("gzip"),
            Compression::Zstd => Some("zstd"),
        }
    }

    fn prepare(&self, request: &Request) -> Result<(Client, Bytes), Answer> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        let client = match &mut *client {
            Some(client) => client.clone(),
            none => {
                let built =
                    self.build_client().map_err(|reason| Answer::failed(Failure::Hold, reason))?;
                none.insert(built).clone()
            }
        };
        Ok((client, self.body(request)))
    }

    fn build_client(&self) -> Result<Client, String> {
        let url = Url::parse(&self.config.url)
            .map_err(|error| format!("url is not a valid address: {error}"))?;
        let mut headers = HeaderMap::new();
        for (name, value) in &self.config.headers {
            match (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                (Ok(name), Ok(value)) => headers.append(name, value),
                _ => return Err(format!("headers: {name:?} or its value is no HTTP header")),
            };
        }
        if let Some(value) = authorization(&self.config.auth)? {
            headers.insert(AUTHORIZATION, value);
        }
        let mut builder = Client::builder()
            .user_agent(USER_AGENT)
            .default_headers(headers)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .timeout(self.request_timeout);
        if url.scheme() == "http" {
            // Nothing will be verified, so a system without roots is no obstacle.
            builder = builder.tls_certs_only([]);
        }
        if is_loopback(&url) {
            builder = builder.no_proxy();
        }
        builder.build().map_err(|error| {
            format!(
                "cannot build the client: {}; is the package ca-certificates installed?",
                chain(error)
            )
        })
    }

    fn body(&self, request: &Request) -> Bytes {
        let framing = match self.config.format {
            HttpFormat::CloudEventsBatch => Framing::Array,
            HttpFormat::NdJson => Framing::Lines,
        };
        let mut body = Vec::new();
        self.envelope.write_all(&mut body, &request.events, request.stream, framing);
        match self.config.compression {
            Compression::None => body,
            Compression::Gzip => gzip(&body),
            Compression::Zstd => {
                zstd::bulk::compress(&body, ZSTD_LEVEL).expect("zstd has room for its own bound")
            }
        }
        .into()
    }
}

fn gzip(body: &[u8]) -> Vec<u8> {
    let out = Vec::with_capacity(body.len() / 4);
    let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::fast());
    encoder.write_all(body).and_then(|()| encoder.finish()).expect("a Vec takes every write")
}

fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost" | "[::1]") => true,
        Some(host) => host.parse().is_ok_and(|ip: std::net::Ipv4Addr| ip.is_loopback()),
        None => false,
    }
}

/// What an answer means. Anything that neither takes the events nor blames them, and that waiting
/// does not mend, is held: nothing is dropped for an answer that we do not know.
fn sort(status: StatusCode, headers: &HeaderMap, quote: &str, now: SystemTime) -> Answer {
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
        _ => (Failure::Hold, "; this sink does not know that answer"),
    };
    reason.push_str(advice);
    Answer::failed(failure, reason)
}

/// RFC 9110, section 10.2.3: seconds or a date.
fn retry_after(value: &HeaderValue, now: SystemTime) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).ok(),
    }
}

/// The beginning of a body, in one line.
async fn quote(mut response: Response, bytes_max: usize) -> String {
    let mut head = Vec::new();
    while head.len() < bytes_max
        && let Ok(Some(chunk)) = response.chunk().await
    {
        head.extend_from_slice(&chunk);
    }
    head.truncate(QUOTE_BYTES_MAX);
    let text = String::from_utf8_lossy(&head);
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
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

fn authorization(auth: &HttpAuth) -> Result<Option<HeaderValue>, String> {
    let text = match auth {
        HttpAuth::None => return Ok(None),
        HttpAuth::Bearer(token) => format!("Bearer {}", read(token)?.reveal()),
        HttpAuth::Basic { username, password } => {
            let pair = format!("{username}:{}", read(password)?.reveal());
            format!("Basic {}", BASE64.encode(pair))
        }
    };
    let mut value = HeaderValue::try_from(text)
        .map_err(|_| "auth: the secret has characters that a header cannot carry".to_owned())?;
    value.set_sensitive(true);
    Ok(Some(value))
}

fn read(source: &SecretSource) -> Result<Secret, String> {
    let (text, place) = match source {
        SecretSource::Inline(secret) => return Ok(secret.clone()),
        SecretSource::File(path) => {
            let place = path.display().to_string();
            let text = std::fs::read_to_string(path)
                .map_err(|error| format!("auth: cannot read {place}: {error}"))?;
            (text.lines().next().unwrap_or_default().to_owned(), place)
        }
        SecretSource::Env(name) => {
            let place = format!("the environment variable {name}");
            let text = std::env::var(name)
                .map_err(|error| format!("auth: cannot read {place}: {error}"))?;
            (text, place)
        }
    };
    if text.is_empty() {
        return Err(format!("auth: {place} is empty"));
    }
    Ok(Secret::new(text))
}

#[cfg(test)]
mod tests;
