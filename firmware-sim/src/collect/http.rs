//! An HTTP receiver of CloudEvents that can be taken away and brought back.
//!
//! Takes POSTs on any path: `application/cloudevents-batch+json`, `application/cloudevents+json`
//! and `application/x-ndjson` (one structured event a line), a payload with `ce-` headers, and one
//! with its event's id in `Edge-Gateway-Event`; plain or with `Content-Encoding` gzip or zstd. Answers 204 once every row is recorded, 400 for a malformed body, 413 for one
//! that is too large, 415 for another type or encoding, 503 when the ledger cannot be written; in
//! those cases nothing of the request is recorded.
//!
//! Invariant: once [`HttpCollector::take_down`] has returned, nothing more is recorded, the port
//! is closed, and so is every connection.

use std::{
    fmt,
    io::{self, Read},
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, HeaderName, StatusCode, header},
    routing::post,
    serve::Listener,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::{Arrived, CollectCounters, Recorder, cloudevents, sequence::Row};

/// Longest body that is taken, as sent, in bytes.
pub const BODY_BYTES_MAX: usize = 16 << 20;
/// Longest body that is taken, decoded, in bytes.
pub const DECODED_BYTES_MAX: usize = 64 << 20;

const CE_SPECVERSION: HeaderName = HeaderName::from_static("ce-specversion");
const CE_ID: HeaderName = HeaderName::from_static("ce-id");
const CE_SOURCE: HeaderName = HeaderName::from_static("ce-source");
const CE_LANE: HeaderName = HeaderName::from_static("ce-lane");
const CE_STREAM: HeaderName = HeaderName::from_static("ce-stream");
const CE_REQUEUED: HeaderName = HeaderName::from_static("ce-requeued");
const EVENT: HeaderName = HeaderName::from_static("edge-gateway-event");

/// Connections waiting to be accepted, at most.
const BACKLOG: u32 = 1024;
/// How long requests under way may take when the collector ends.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// A receiver at work. Dropping it closes the port and every connection.
#[derive(Debug)]
pub struct HttpCollector {
    recorder: Arc<Recorder>,
    addr: SocketAddr,
    server: Option<Server>,
}

#[derive(Debug)]
struct Server {
    /// Cancelled to take no more connections and end those there are after their request.
    stop: CancellationToken,
    /// Cancelled to cut every connection at once.
    cut: CancellationToken,
    serving: JoinSet<io::Result<()>>,
}

impl Drop for Server {
    /// The connections are tasks of their own: they have to be told.
    fn drop(&mut self) {
        self.stop.cancel();
        self.cut.cancel();
    }
}

impl HttpCollector {
    /// Listens on `addr` (port 0: one from the system) and adds rows to the ledger at `ledger`,
    /// which is created if there is none.
    ///
    /// # Errors
    /// The address cannot be listened on, or the ledger cannot be opened.
    pub fn start(addr: SocketAddr, ledger: &Path) -> io::Result<Self> {
        Self::start_with(Recorder::append_to(ledger), addr, ledger)
    }

    /// As [`HttpCollector::start`], with the sequence rule: per gateway, epoch and partition it
    /// keeps the last sequence number, and passes over what is not above it. So the ledger has each
    /// event of a gateway once, also over restarts of this collector, as long as its sink has neither
    /// lanes nor streams: a ledger does not say which event came in which.
    ///
    /// # Errors
    /// As [`HttpCollector::start`], and when a ledger that is there cannot be read.
    pub fn start_exactly_once(addr: SocketAddr, ledger: &Path) -> io::Result<Self> {
        Self::start_with(Recorder::append_once_to(ledger), addr, ledger)
    }

    fn start_with(
        recorder: io::Result<Recorder>,
        addr: SocketAddr,
        ledger: &Path,
    ) -> io::Result<Self> {
        let recorder = recorder.map_err(|error| {
            io::Error::new(error.kind(), format!("ledger {}: {error}", ledger.display()))
        })?;
        let mut collector = Self { recorder: Arc::new(recorder), addr, server: None };
        collector.bring_back().map_err(|error| {
            io::Error::new(error.kind(), format!("cannot listen on {addr}: {error}"))
        })?;
        Ok(collector)
    }

    /// The address that it listens on, also while it is taken down.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What it has taken so far.
    pub fn counters(&self) -> CollectCounters {
        self.recorder.counters()
    }

    /// Time since the latest event, or since the start when none came.
    pub fn idle(&self) -> Duration {
        self.recorder.idle()
    }

    /// Closes the port and cuts every connection, also in the middle of a request.
    pub async fn take_down(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.cut.cancel();
            server.stop.cancel();
            while server.serving.join_next().await.is_some() {}
        }
    }

    /// Listens again on the same address; nothing when it does already.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn bring_back(&mut self) -> io::Result<()> {
        if self.server.is_some() {
            return Ok(());
        }
        let socket = if self.addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // The port may still be held by connections of before, in TIME_WAIT.
        socket.set_reuseaddr(true)?;
        socket.bind(self.addr)?;
        let listener = socket.listen(BACKLOG)?;
        self.addr = listener.local_addr()?;

        let (stop, cut) = (CancellationToken::new(), CancellationToken::new());
        let app = Router::new()
            .route("/", post(receive))
            .route("/{*path}", post(receive))
            .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
            .with_state(Arc::clone(&self.recorder));
        let serve = axum::serve(CutListener { listener, cut: cut.clone() }, app)
            .with_graceful_shutdown(stop.clone().cancelled_owned());
        let mut serving = JoinSet::new();
        serving.spawn(serve.into_future());
        self.server = Some(Server { stop, cut, serving });
        Ok(())
    }

    /// Ends it: requests under way get their answer, then everything is closed.
    pub async fn finish(mut self) -> CollectCounters {
        if let Some(server) = &mut self.server {
            server.stop.cancel();
            let _ = timeout(FINISH_TIMEOUT, server.serving.join_next()).await;
        }
        self.take_down().await;
        self.recorder.counters()
    }
}

type Refusal = (StatusCode, [(HeaderName, &'static str); 1], String);

fn refusal(status: StatusCode, reason: &dyn fmt::Display) -> Refusal {
    (status, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], format!("{reason}\n"))
}

async fn receive(
    State(recorder): State<Arc<Recorder>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<StatusCode, Refusal> {
    let outcome = read(&headers, &body).and_then(|events| {
        recorder.record(&events).map_err(|error| {
            tracing::error!(%error, "the ledger cannot be written");
            refusal(StatusCode::SERVICE_UNAVAILABLE, &error)
        })
    });
    if outcome.is_err() {
        recorder.refused.fetch_add(1, Relaxed);
    }
    outcome.map(|()| StatusCode::NO_CONTENT)
}

fn read(headers: &HeaderMap, body: &[u8]) -> Result<Vec<Arrived>, Refusal> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
    let decoded;
    let body = match text(header::CONTENT_ENCODING) {
        "" | "identity" => body,
        encoding => {
            decoded = decode(encoding, body)?;
            &decoded
        }
    };
    let row = || Row::of(text(CE_LANE), text(CE_STREAM), text(CE_REQUEUED) == "true");
    let beside = |id, source| {
        cloudevents::read_payload(id, source, body, row())
            .map(|event| vec![event])
            .map_err(|reason| refusal(StatusCode::BAD_REQUEST, &reason))
    };
    if headers.contains_key(CE_SPECVERSION) {
        return beside(text(CE_ID), text(CE_SOURCE));
    }
    if headers.contains_key(EVENT) {
        return beside(text(EVENT), "");
    }
    let content_type = text(header::CONTENT_TYPE);
    let media_type = content_type.split(';').next().unwrap_or("").trim();
    match media_type.to_ascii_lowercase().as_str() {
        "application/cloudevents-batch+json" => cloudevents::read_batch(body),
        "application/cloudevents+json" => cloudevents::read_one(body).map(|event| vec![event]),
        "application/x-ndjson" => cloudevents::read_lines(body),
        _ => {
            let reason = format!("content type {content_type:?} is not taken");
            return Err(refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, &reason));
        }
    }
    .map_err(|reason| refusal(StatusCode::BAD_REQUEST, &reason))
}

fn decode(encoding: &str, body: &[u8]) -> Result<Vec<u8>, Refusal> {
    let mut reader: Box<dyn Read + '_> = match encoding.to_ascii_lowercase().as_str() {
        "gzip" | "x-gzip" => Box::new(flate2::read::MultiGzDecoder::new(body)),
        "zstd" => Box::new(
            zstd::stream::read::Decoder::with_buffer(body)
                .map_err(|error| refusal(StatusCode::BAD_REQUEST, &error))?,
        ),
        _ => {
            let reason = format!("content encoding {encoding:?} is not taken");
            return Err(refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, &reason));
        }
    };
    let mut decoded = Vec::new();
    let limit = DECODED_BYTES_MAX as u64 + 1;
    reader
        .by_ref()
        .take(limit)
        .read_to_end(&mut decoded)
        .map_err(|error| refusal(StatusCode::BAD_REQUEST, &format!("{encoding}: {error}")))?;
    if decoded.len() > DECODED_BYTES_MAX {
        return Err(refusal(StatusCode::PAYLOAD_TOO_LARGE, &"the decoded body is too large"));
    }
    Ok(decoded)
}

/// Accepts connections that can all be cut at once.
struct CutListener {
    listener: TcpListener,
    cut: CancellationToken,
}

impl Listener for CutListener {
    type Io = CutStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (CutStream, SocketAddr) {
        let (stream, addr) = Listener::accept(&mut self.listener).await;
        // Answers are small and wait for nothing.
        let _ = stream.set_nodelay(true);
        let cut = Box::pin(self.cut.clone().cancelled_owned());
        (CutStream { stream, cut }, addr)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that fails, whatever it is doing, once it is cut.
struct CutStream {
    stream: TcpStream,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl CutStream {
    fn poll_stream<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        poll(Pin::new(&mut self.stream), cx)
    }
}

impl AsyncRead for CutStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_stream(cx, |stream, cx| stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for CutStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_stream(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_stream(cx, |stream, cx| stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_stream(cx, AsyncWrite::poll_flush)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_stream(cx, AsyncWrite::poll_shutdown)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, path::PathBuf};

    use tempfile::TempDir;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::ledger::read_received;

    const BATCH: &str = "application/cloudevents-batch+json";

    struct Bench {
        collector: HttpCollector,
        ledger: PathBuf,
        folder: TempDir,
    }

    fn bench() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let ledger = folder.path().join("received.csv");
        let addr = "127.0.0.1:0".parse().unwrap();
        let collector = HttpCollector::start(addr, &ledger).unwrap();
        Bench { collector, ledger, folder }
    }

    impl Bench {
        fn rows(&self) -> Vec<(u64, String)> {
            let mut rows = Vec::new();
            read_received(&self.ledger, |row| {
                rows.push((row.arrival, row.id.into_owned()));
            })
            .unwrap();
            rows
        }

        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.collector.addr()).await.unwrap()
        }
    }

    fn event(id: &str) -> String {
        format!(r#"{{"specversion":"1.0","id":"{id}","type":"t","source":"s"}}"#)
    }

    /// Sends a request over a raw connection, and gives the status.
    async fn post(stream: &mut TcpStream, headers: &str, body: &[u8]) -> u16 {
        let head = format!(
            "POST /events HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n{headers}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        let mut answer = vec![0; 4096];
        let length = stream.read(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
        answer.split(' ').nth(1).unwrap().parse().unwrap()
    }

    #[tokio::test]
    async fn every_form_and_encoding_is_recorded_before_the_answer() {
        let bench = bench();
        let mut stream = bench.connect().await;
        let batch = format!("[{},{}]", event("a"), event("b"));
        let lines = format!("{}\n{}\n", event("c"), event("d"));
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(batch.as_bytes()).unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = zstd::encode_all(lines.as_bytes(), 1).unwrap();
        let batch_type = format!("content-type: {BATCH}; charset=utf-8");
        let lines_type = "content-type: application/x-ndjson";
        for (headers, body, rows) in [
            (batch_type.clone(), batch.as_bytes(), 2),
            (lines_type.to_owned(), lines.as_bytes(), 4),
            (format!("{batch_type}\r\ncontent-encoding: gzip"), &gzip, 6),
            (format!("{lines_type}\r\ncontent-encoding: zstd"), &zstd, 8),
            ("content-type: application/cloudevents+json".to_owned(), event("e").as_bytes(), 9),
            ("ce-specversion: 1.0\r\nce-id: f\r\nce-source: /s".to_owned(), b"21.5", 10),
            ("edge-gateway-event: g".to_owned(), b"21.5", 11),
        ] {
            assert_eq!(post(&mut stream, &headers, body).await, 204);
            assert_eq!(bench.rows().len(), rows);
        }
        let rows = bench.rows();
        assert!(rows.iter().map(|(arrival, _)| *arrival).eq(0..11));
        assert_eq!(bench.collector.counters().received, 11);
    }

    #[tokio::test]
    async fn with_the_sequence_rule_each_event_has_one_row_also_over_a_restart() {
        let bench = bench();
        let ledger = bench.folder.path().join("once.csv");
        let addr = "127.0.0.1:0".parse().unwrap();
        let batch_type = format!("content-type: {BATCH}");
        let batch = |seqs: std::ops::Range<u64>| {
            let events: Vec<_> = seqs.map(|seq| event(&format!("edge/00/0/{seq}"))).collect();
            format!("[{}]", events.join(","))
        };
        let collector = HttpCollector::start_exactly_once(addr, &ledger).unwrap();
        let mut stream = TcpStream::connect(collector.addr()).await.unwrap();
        for seqs in [0..5, 3..8] {
            assert_eq!(post(&mut stream, &batch_type, batch(seqs).as_bytes()).await, 204);
        }
        assert_eq!(collector.finish().await.skipped, 2);
        let collector = HttpCollector::start_exactly_once(addr, &ledger).unwrap();
        let mut stream = TcpStream::connect(collector.addr()).await.unwrap();
        assert_eq!(post(&mut stream, &batch_type, batch(0..10).as_bytes()).await, 204);
        assert_eq!((collector.counters().received, collector.counters().skipped), (2, 8));
        let mut ids = Vec::new();
        read_received(&ledger, |row| ids.push(row.id.into_owned())).unwrap();
        assert!(ids.iter().eq(&(0..10).map(|seq| format!("edge/00/0/{seq}")).collect::<Vec<_>>()));
    }

    #[tokio::test]
    async fn what_is_refused_is_not_recorded() {
        let bench = bench();
        let mut stream = bench.connect().await;
        let bad = format!("[{},{{}}]", event("a"));
        let bomb = zstd::encode_all(io::repeat(b' ').take(DECODED_BYTES_MAX as u64 + 1), 1);
        for (headers, body, status) in [
            (format!("content-type: {BATCH}"), bad.into_bytes(), 400),
            ("content-type: text/plain".to_owned(), b"x".to_vec(), 415),
            (format!("content-type: {BATCH}\r\ncontent-encoding: br"), b"x".to_vec(), 415),
            (format!("content-type: {BATCH}\r\ncontent-encoding: gzip"), b"x".to_vec(), 400),
            (format!("content-type: {BATCH}\r\ncontent-encoding: zstd"), bomb.unwrap(), 413),
        ] {
            assert_eq!(post(&mut stream, &headers, &body).await, status);
        }
        assert_eq!(bench.rows(), []);
        assert_eq!(bench.collector.counters().refused, 5);
    }

    #[tokio::test]
    async fn taken_down_it_cuts_every_connection_and_comes_back_on_its_port() {
        let mut bench = bench();
        let addr = bench.collector.addr();
        let headers = format!("content-type: {BATCH}");
        let body = format!("[{}]", event("a"));
        let mut idle = bench.connect().await;
        assert_eq!(post(&mut idle, &headers, body.as_bytes()).await, 204);
        // A request of which only a part has arrived.
        let mut half = bench.connect().await;
        half.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n[")
            .await
            .unwrap();

        bench.collector.take_down().await;
        for stream in [&mut idle, &mut half] {
            let mut byte = [0];
            assert!(matches!(stream.read(&mut byte).await, Ok(0) | Err(_)));
        }
        assert!(TcpStream::connect(addr).await.is_err());

        bench.collector.bring_back().unwrap();
        assert_eq!(bench.collector.addr(), addr);
        let mut again = bench.connect().await;
        assert_eq!(post(&mut again, &headers, body.as_bytes()).await, 204);
        assert_eq!(bench.rows(), [(0, "a".to_owned()), (1, "a".to_owned())]);
    }

    #[tokio::test]
    async fn what_cannot_be_recorded_is_not_acknowledged() {
        let bench = bench();
        let mut stream = bench.connect().await;
        let headers = format!("content-type: {BATCH}");
        let body = format!("[{}]", event("a"));
        // A handle that cannot write, and the rest of a write that was cut short.
        let broken = std::fs::File::open(&bench.ledger).unwrap();
        let recorder = &bench.collector.recorder;
        let mut working = std::mem::replace(&mut recorder.file.lock().unwrap().file, broken);
        assert_eq!(post(&mut stream, &headers, body.as_bytes()).await, 503);
        assert_eq!(bench.collector.counters().received, 0);
        working.write_all(b"0,17,dev").unwrap();
        recorder.file.lock().unwrap().file = working;
        assert_eq!(post(&mut stream, &headers, body.as_bytes()).await, 204);
        assert_eq!(bench.rows(), [(0, "a".to_owned())]);
    }

    #[tokio::test]
    async fn started_again_it_goes_on_with_its_ledger() {
        let Bench { collector, ledger, folder } = bench();
        let headers = format!("content-type: {BATCH}");
        let mut stream = TcpStream::connect(collector.addr()).await.unwrap();
        assert_eq!(post(&mut stream, &headers, format!("[{}]", event("a")).as_bytes()).await, 204);
        collector.finish().await;
        let collector = HttpCollector::start("127.0.0.1:0".parse().unwrap(), &ledger).unwrap();
        let mut stream = TcpStream::connect(collector.addr()).await.unwrap();
        assert_eq!(post(&mut stream, &headers, format!("[{}]", event("b")).as_bytes()).await, 204);
        let bench = Bench { collector, ledger, folder };
        assert_eq!(bench.rows(), [(0, "a".to_owned()), (1, "b".to_owned())]);
    }
}
