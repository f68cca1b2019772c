//! HTTP receivers that cost as little as possible: they read the head, take the body, judge it as they
//! are told, and answer. All of them share one thread.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::backlog::{POISON, SENT_US, now_us};

/// What becomes of events that hold [`POISON`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Judge {
    /// They are taken as all others.
    TakesAll,
    /// A request with one of them is refused, by 400.
    RefusesRequest,
    /// Each is named in a 207, the rest is taken.
    NamesEvents,
}

/// How an upstream behaves, and what it got.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    judge: AtomicU8,
    /// Before each answer.
    delay: Duration,
    /// It takes no more events than this in a second; 0: all that come.
    events_per_second: f64,
    free_at: Mutex<Option<Instant>>,
    events: AtomicU64,
    posts: AtomicU64,
    /// From the payload's own time to its arrival, in milliseconds, of those that have one.
    ages: Mutex<Histogram<u64>>,
}

impl Upstream {
    /// Events that it has taken.
    pub(crate) fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    /// POSTs that it has answered.
    pub(crate) fn posts(&self) -> u64 {
        self.posts.load(Ordering::Relaxed)
    }

    /// From now on it judges so.
    pub(crate) fn judge(&self, judge: Judge) {
        self.judge.store(judge as u8, Ordering::Relaxed);
    }

    /// The ages of what has arrived since the last call.
    pub(crate) fn take_ages(&self) -> Histogram<u64> {
        std::mem::replace(&mut self.ages.lock().unwrap_or_else(PoisonError::into_inner), ages())
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/events", self.address)
    }

    /// Counts, and says what to answer.
    fn take(&self, body: &[u8]) -> Vec<u8> {
        self.posts.fetch_add(1, Ordering::Relaxed);
        let lines = memchr::memchr_iter(b'\n', body).count() as u64;
        let judge = self.judge.load(Ordering::Relaxed);
        let bad: Vec<usize> = memchr::memmem::find_iter(body, POISON).collect();
        if judge == Judge::RefusesRequest as u8 && !bad.is_empty() {
            return b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n".to_vec();
        }
        if judge == Judge::NamesEvents as u8 && !bad.is_empty() {
            self.events.fetch_add(lines - bad.len() as u64, Ordering::Relaxed);
            let (mut index, mut from, mut results) = (0, 0, Vec::new());
            for at in bad {
                index += memchr::memchr_iter(b'\n', &body[from..at]).count();
                from = at;
                results.push(format!(r#"{{"index":{index},"status":422,"error":"no such unit"}}"#));
            }
            let results = format!(r#"{{"results":[{}]}}"#, results.join(","));
            let len = results.len();
            let head = format!("HTTP/1.1 207 Multi-Status\r\ncontent-length: {len}\r\n\r\n");
            return (head + &results).into_bytes();
        }
        self.events.fetch_add(lines, Ordering::Relaxed);
        let now_us = now_us();
        let mut ages = self.ages.lock().unwrap_or_else(PoisonError::into_inner);
        for at in memchr::memmem::find_iter(body, SENT_US) {
            let digits = body[at + SENT_US.len()..].iter().take_while(|b| b.is_ascii_digit());
            let sent_us = digits.fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'));
            ages.saturating_record(now_us.saturating_sub(sent_us) / 1_000);
        }
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_vec()
    }

    /// When so many events may be answered for.
    fn due(&self, events: u64) -> Instant {
        let now = Instant::now();
        if self.events_per_second <= 0.0 {
            return now + self.delay;
        }
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = Duration::from_secs_f64(events as f64 / self.events_per_second);
        let due = free_at.unwrap_or(now).max(now) + busy;
        *free_at = Some(due);
        due + self.delay
    }
}

fn ages() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 86_400_000, 3).expect("constant bounds")
}

/// The thread of the receivers. It ends with the process.
pub(crate) struct Receivers {
    commands: tokio::sync::mpsc::Sender<(TcpListener, Arc<Upstream>)>,
    runtime: tokio::runtime::Handle,
    /// Of the thread, in `/proc`.
    schedstat: String,
}

impl Receivers {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let (commands, mut taken) = tokio::sync::mpsc::channel::<(TcpListener, Arc<Upstream>)>(1);
        let (tell, told) = mpsc::sync_channel(1);
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime");
            let own = std::fs::read_link("/proc/thread-self").unwrap_or_default();
            tell.send((runtime.handle().clone(), own)).ok();
            runtime.block_on(async {
                let mut servers = JoinSet::new();
                while let Some((listener, upstream)) = taken.recv().await {
                    servers.spawn(serve(listener, upstream));
                }
            });
        });
        let (runtime, own) = told.recv()?;
        let schedstat = format!("/proc/{}/schedstat", own.display());
        Ok(Self { commands, runtime, schedstat })
    }

    /// One more receiver.
    pub(crate) fn add(
        &self,
        delay: Duration,
        events_per_second: f64,
    ) -> anyhow::Result<Arc<Upstream>> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let upstream = Arc::new(Upstream {
            address: listener.local_addr()?,
            judge: AtomicU8::new(Judge::TakesAll as u8),
            delay,
            events_per_second,
            free_at: Mutex::new(None),
            events: AtomicU64::new(0),
            posts: AtomicU64::new(0),
            ages: Mutex::new(ages()),
        });
        let listener = {
            let _guard = self.runtime.enter();
            TcpListener::from_std(listener)?
        };
        let sent = self.commands.blocking_send((listener, Arc::clone(&upstream)));
        sent.ok().context("the thread has ended")?;
        Ok(upstream)
    }

    /// CPU time that the thread has used.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        let text = std::fs::read_to_string(&self.schedstat)?;
        let nanos = text.split_whitespace().next().context("an empty schedstat")?;
        Ok(Duration::from_nanos(nanos.parse()?))
    }
}

async fn serve(listener: TcpListener, upstream: Arc<Upstream>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        stream.set_nodelay(true).ok();
        connections.spawn(receive(stream, Arc::clone(&upstream)));
        while connections.try_join_next().is_some() {}
    }
}

async fn receive(mut stream: TcpStream, upstream: Arc<Upstream>) -> io::Result<()> {
    let mut buffer: Vec<u8> = Vec::with_capacity(1 << 20);
    loop {
        let (head, body) = loop {
            if let Some(at) = memchr::memmem::find(&buffer, b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&buffer[..at]).to_ascii_lowercase();
                let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
                let length = length.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
                break (at + 4, length);
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let end: usize = head + body;
        buffer.reserve(end.saturating_sub(buffer.len()));
        while buffer.len() < end {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        let before = upstream.events();
        let answer = upstream.take(&buffer[head..end]);
        let due = upstream.due(upstream.events() - before);
        buffer.drain(..end);
        if due > Instant::now() {
            tokio::time::sleep_until(due.into()).await;
        }
        stream.write_all(&answer).await?;
    }
}
