//! A proxy in front of an HTTP upstream that breaks what passes, by a seed.
//!
//! Owns: the [`Fault`] of each request, and which requests are *in doubt*: they may have been applied
//! upstream, and it is not certain that their answer got through. What arrives twice can only have
//! been in one of them.
//! It knows as much of HTTP/1.1 as it takes to see where a request and its answer end: both are framed
//! by `Content-Length`, as the sink and the collector send them.
//! Deliberately absent: waiting by the clock for the other side. A fault that must outlast the
//! client's patience waits until the client has hung up.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Longest head of a request or an answer.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Longest pause that [`Fault::Delay`] makes, and [`Fault::Throttle`] between two pieces.
const DELAY_MS_MAX: u64 = 30;
const THROTTLE_MS_MAX: u64 = 3;
/// Pieces into which [`Fault::Throttle`] cuts a body.
const PIECES: usize = 16;

/// What is done to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// The connection is closed before the upstream saw anything.
    Cut,
    /// Half of the body is forwarded, then both connections are reset.
    ResetMidBody,
    /// The upstream applied the request; its answer is swallowed and the connection is closed.
    DropAnswer,
    /// The client gets half of the answer's first line, then a reset.
    ResetMidAnswer,
    /// The request is held until the client has given up, and forwarded all the same.
    Late,
    /// The request waits for a moment.
    Delay,
    /// The body goes on in small pieces.
    Throttle,
}

impl Fault {
    pub(crate) const ALL: [Self; 7] = [
        Self::Cut,
        Self::ResetMidBody,
        Self::DropAnswer,
        Self::ResetMidAnswer,
        Self::Late,
        Self::Delay,
        Self::Throttle,
    ];
}

struct Shared {
    upstream: SocketAddr,
    state: Mutex<State>,
}

struct State {
    random: fastrand::Rng,
    /// Share of the requests that something is done to.
    share: f64,
    done: BTreeMap<Fault, u64>,
    requests: u64,
    in_doubt: Vec<Vec<u8>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listens until it is dropped.
pub(crate) struct FaultProxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    _task: JoinSet<()>,
}

impl FaultProxy {
    /// Stands in front of `upstream` and does one of [`Fault::ALL`] to this share of the requests.
    pub(crate) async fn start(upstream: SocketAddr, seed: u64, share: f64) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State {
            random: fastrand::Rng::with_seed(seed),
            share,
            done: BTreeMap::new(),
            requests: 0,
            in_doubt: Vec::new(),
        };
        let shared = Arc::new(Shared { upstream, state: Mutex::new(state) });
        let accepting = Arc::clone(&shared);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                let shared = Arc::clone(&accepting);
                connections.spawn(async move {
                    let mut exchange = Exchange { shared, in_doubt: None };
                    // An error is the end of a connection, which is what a proxy is for.
                    let _ = exchange.carry(client).await;
                });
            }
        });
        Self { shared, address, _task: task }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on requests pass.
    pub(crate) fn calm_down(&self) {
        self.shared.state().share = 0.0;
    }

    /// How often each fault was done.
    pub(crate) fn done(&self) -> BTreeMap<Fault, u64> {
        self.shared.state().done.clone()
    }

    /// Requests seen.
    pub(crate) fn requests(&self) -> u64 {
        self.shared.state().requests
    }

    /// Bodies of the requests in doubt.
    pub(crate) fn in_doubt(&self) -> Vec<Vec<u8>> {
        self.shared.state().in_doubt.clone()
    }
}

/// One connection of the client.
struct Exchange {
    shared: Arc<Shared>,
    /// Body of the request that the upstream may have, and the client may not know of.
    in_doubt: Option<Vec<u8>>,
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(body) = self.in_doubt.take() {
            self.shared.state().in_doubt.push(body);
        }
    }
}

impl Exchange {
    async fn carry(&mut self, client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let upstream = TcpStream::connect(self.shared.upstream).await?;
        upstream.set_nodelay(true)?;
        let (mut client, mut upstream) = (BufReader::new(client), BufReader::new(upstream));
        loop {
            let (head, body) = read_message(&mut client).await?;
            // The client goes on with the same connection: it has read the last answer. Unless it is
            // the same request again: a starved client may find its patience at an end beside an
            // answer that has come.
            if let Some(last) = self.in_doubt.take()
                && last == body
            {
                self.shared.state().in_doubt.push(last);
            }
            let (fault, pause) = self.choose();
            match fault {
                Some(Fault::Cut) => return client.get_ref().set_zero_linger(),
                Some(Fault::ResetMidBody) => {
                    upstream.write_all(&head).await?;
                    upstream.write_all(&body[..body.len() / 2]).await?;
                    client.get_ref().set_zero_linger()?;
                    return upstream.get_ref().set_zero_linger();
                }
                Some(Fault::Late) => {
                    // Reading ends when the client hangs up.
                    while client.read_u8().await.is_ok() {}
                }
                Some(Fault::Delay) => tokio::time::sleep(pause).await,
                _ => {}
            }
            self.in_doubt = Some(body.clone());
            upstream.write_all(&head).await?;
            if fault == Some(Fault::Throttle) {
                for piece in body.chunks(body.len().div_ceil(PIECES).max(1)) {
                    upstream.write_all(piece).await?;
                    tokio::time::sleep(pause).await;
                }
            } else {
                upstream.write_all(&body).await?;
            }
            let (head, body) = read_message(&mut upstream).await?;
            match fault {
                // The upstream has applied it, or said why not.
                Some(Fault::DropAnswer | Fault::Late) => return client.get_ref().set_zero_linger(),
                Some(Fault::ResetMidAnswer) => {
                    client.write_all(&head[..head.len().min(8)]).await?;
                    return client.get_ref().set_zero_linger();
                }
                _ => {
                    client.write_all(&head).await?;
                    client.write_all(&body).await?;
                }
            }
        }
    }

    fn choose(&self) -> (Option<Fault>, Duration) {
        let mut state = self.shared.state();
        state.requests += 1;
        if state.random.f64() >= state.share {
            return (None, Duration::ZERO);
        }
        let place = state.random.usize(..Fault::ALL.len());
        let fault = Fault::ALL[place];
        *state.done.entry(fault).or_default() += 1;
        let ms_max = if fault == Fault::Throttle { THROTTLE_MS_MAX } else { DELAY_MS_MAX };
        let pause = Duration::from_millis(state.random.u64(1..=ms_max));
        (Some(fault), pause)
    }
}

/// Reads a request or an answer: its head with the empty line, and its body.
async fn read_message(stream: &mut BufReader<TcpStream>) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == HEAD_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        head.push(stream.read_u8().await?);
    }
    let mut body = vec![0; content_length(&head)];
    stream.read_exact(&mut body).await?;
    Ok((head, body))
}

fn content_length(head: &[u8]) -> usize {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    assert!(!head.contains("\r\ntransfer-encoding:"), "chunks are not for this proxy: {head}");
    let value = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    value.map_or(0, |value| value.trim().parse().expect("a length"))
}
