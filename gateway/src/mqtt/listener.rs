//! Accepting connections, within limits, and ending them.
//!
//! Owns: what lies between a socket and a connection's bytes. `socket` binds, `tls` and `websocket`
//! unwrap, `flushed` keeps their writers honest.
//! Invariant: a connection that panics ends alone; nothing that a client or the system does makes
//! this loop stop or spin. All handshakes together have `connect_timeout`, each in a task of its own:
//! a client that is slow at them holds up nobody else. Accepting, and the handshakes of TLS and WebSocket,
//! are worked on where they cannot keep devices waiting that are let in
//! ([`gatehouse`](crate::access::gatehouse)).

mod flushed;
mod newcomers;
mod socket;
pub mod tls;
mod websocket;

use std::io;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytestring::ByteString;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_util::context::TokioContext;
use tokio_util::sync::CancellationToken;

use self::flushed::Flushed;
pub(crate) use self::newcomers::Newcomer;
use self::newcomers::Newcomers;
use self::socket::{Accepted, Socket};
use self::tls::Tls;
use super::auth::Peer;
use super::conn::{self, Shared};
use super::pace::Rate;
use super::session::Limits;
use super::stats::FrontStats;
use crate::config::{Bind, ClientIdentity, ListenerConfig, Transport};

/// Connections beyond `connections_max` that have made room for others and are about to end.
const ENDING_MAX: usize = 128;

/// Rest after a failed accept: what fails it (no descriptors left) takes time to pass.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// One listener, bound.
pub struct Front {
    socket: Socket,
    bound: Bind,
    connections_max: usize,
    newcomers: Newcomers,
    door: Arc<Door>,
}

/// What a listener's connections pass through.
struct Door {
    transport: Transport,
    tls: Option<Arc<Tls>>,
    connect_timeout: Duration,
    allow_anonymous: bool,
    rate: Rate,
    limits: Limits,
    shared: Arc<Shared>,
}

/// What stands between an accepted connection and its CONNECT.
struct Handshakes {
    tls: Option<(TlsAcceptor, ClientIdentity)>,
    transport: Transport,
    packet_bytes_max: usize,
}

impl Handshakes {
    /// Gives the stream of MQTT packets, and the user that a client's certificate names.
    async fn unwrap(
        self,
        mut stream: Box<dyn Duplex>,
    ) -> io::Result<(Box<dyn Duplex>, Option<ByteString>)> {
        let mut user = None;
        if let Some((acceptor, identity)) = self.tls {
            let secured = acceptor.accept(stream).await?;
            let chain = secured.get_ref().1.peer_certificates().unwrap_or_default();
            user = chain.first().and_then(|own| tls::user_of(own, identity));
            stream = Box::new(secured);
        }
        if self.transport == Transport::WebSocket {
            stream = Box::new(websocket::accept(stream, self.packet_bytes_max).await?);
        }
        Ok((stream, user))
    }
}

/// A connection below TLS and WebSocket, or above them.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

impl Front {
    /// Binds the listener's address. `tls` is what `[listener.tls]` was loaded into.
    ///
    /// # Errors
    /// What the system says: the port is in use, the address is not ours.
    pub async fn bind(
        config: &ListenerConfig,
        tls: Option<Arc<Tls>>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let socket = Socket::bind(&config.bind, config.unix_mode).await?;
        let limits = Limits {
            packet_bytes_max: config.packet_bytes_max,
            in_flight_max: NonZeroU16::new(config.in_flight_max).unwrap_or(NonZeroU16::MIN),
            keep_alive_s_max: shared.keep_alive_s_max,
        };
        Ok(Self {
            bound: socket.bound()?,
            socket,
            connections_max: config.connections_max,
            newcomers: Newcomers::default(),
            door: Arc::new(Door {
                transport: config.transport,
                tls,
                connect_timeout: config.connect_timeout,
                allow_anonymous: config.allow_anonymous,
                rate: config.client_rate,
                limits,
                shared,
            }),
        })
    }

    /// Where it listens, with the port that the system gave where port 0 was asked for.
    pub fn bound(&self) -> &Bind {
        &self.bound
    }

    /// Serves until `stop`; then stops reading, acks what is durable within the grace time, says
    /// goodbye and returns.
    ///
    /// Who comes is accepted at low priority, so that a storm of reconnects waits in the system's queue
    /// while devices are at work; who was accepted is served on the caller's runtime.
    ///
    /// # Panics
    /// If accepting has: nothing that a client does makes it.
    pub async fn run(self, stop: CancellationToken) {
        let access = self.door.shared.access.clone();
        let accepting = TokioContext::new(self.accept(stop), Handle::current());
        access.gatehouse().work(accepting).await.expect("accepting does not panic");
    }

    async fn accept(self, stop: CancellationToken) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(ended) = connections.join_next() => self.ended(ended),
                accepted = self.socket.accept() => match accepted {
                    Ok(accepted) => self.accepted(accepted, &mut connections, &stop),
                    Err(error) => {
                        FrontStats::add(&self.stats().accept_errors, 1);
                        tracing::warn!(%error, "cannot accept connections");
                        tokio::time::sleep(ACCEPT_REST).await;
                    }
                },
            }
        }
        while let Some(ended) = connections.join_next().await {
            self.ended(ended);
        }
    }

    fn accepted(
        &self,
        accepted: Accepted,
        connections: &mut JoinSet<()>,
        stop: &CancellationToken,
    ) {
        let stats = self.stats();
        FrontStats::add(&stats.connections_total, 1);
        let beyond = (connections.len() + 1).saturating_sub(self.connections_max);
        if beyond > 0 && (beyond > ENDING_MAX || !self.newcomers.make_room(accepted.address())) {
            FrontStats::add(&stats.connections_refused, 1);
            tracing::debug!(peer = accepted.name(), "too many connections");
            return;
        }
        // Acks are small and late enough already.
        if let Accepted::Tcp(stream, peer) = &accepted
            && let Err(error) = stream.set_nodelay(true)
        {
            tracing::debug!(%peer, %error, "gone before it began");
            return;
        }
        FrontStats::add(&stats.connections, 1);
        let (door, stop) = (self.door.clone(), stop.child_token());
        let newcomer = self.newcomers.enter(accepted.address(), stop.clone());
        connections.spawn(async move { door.serve(accepted, newcomer, &stop).await });
    }

    fn stats(&self) -> &FrontStats {
        &self.door.shared.stats
    }

    fn ended(&self, ended: Result<(), JoinError>) {
        self.stats().connections.fetch_sub(1, Ordering::Relaxed);
        if let Err(error) = ended {
            FrontStats::add(&self.stats().panics, 1);
            tracing::error!(%error, "a connection panicked and was closed");
        }
    }
}

impl Door {
    /// Serves a connection until it ends, or `stop`.
    async fn serve(&self, accepted: Accepted, newcomer: Newcomer, stop: &CancellationToken) {
        let mut peer = Peer {
            name: accepted.name(),
            address: accepted.address(),
            user: None,
            newcomer: Some(newcomer),
            allow_anonymous: self.allow_anonymous,
            rate: self.rate,
        };
        let deadline = Instant::now() + self.connect_timeout;
        let stream: Box<dyn Duplex> = match accepted {
            // The plain way, without a box and a lock between its halves.
            Accepted::Tcp(stream, _) if self.is_plain() => {
                let (reader, writer) = stream.into_split();
                return self.speak(reader, writer, &peer, deadline, stop).await;
            }
            Accepted::Unix(stream) if self.is_plain() => {
                let (reader, writer) = stream.into_split();
                return self.speak(reader, writer, &peer, deadline, stop).await;
            }
            Accepted::Tcp(stream, _) => Box::new(stream),
            Accepted::Unix(stream) => Box::new(stream),
        };
        let unwrapped = timeout_at(deadline, self.handshakes().unwrap(stream));
        let unwrapped = self.shared.access.gatehouse().work(unwrapped);
        // Boxed, so that a plain connection's task has no room for it.
        match stop.run_until_cancelled(Box::pin(unwrapped)).await.flatten() {
            None => {}
            Some(Ok(Ok((stream, user)))) => {
                peer.user = user;
                let (reader, writer) = tokio::io::split(stream);
                self.speak(reader, Flushed::new(writer), &peer, deadline, stop).await;
            }
            Some(Ok(Err(error))) => self.refuse(&peer, &error.to_string()),
            Some(Err(_)) => self.refuse(&peer, "it took too long"),
        }
    }

    fn handshakes(&self) -> Handshakes {
        Handshakes {
            tls: self.tls.as_ref().map(|tls| tls.acceptor()),
            transport: self.transport,
            packet_bytes_max: self.limits.packet_bytes_max,
        }
    }

    fn is_plain(&self) -> bool {
        self.tls.is_none() && self.transport == Transport::Mqtt
    }

    async fn speak<R, W>(
        &self,
        reader: R,
        writer: W,
        peer: &Peer,
        deadline: Instant,
        stop: &CancellationToken,
    ) where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let left = deadline.saturating_duration_since(Instant::now());
        conn::serve(reader, writer, peer, self.limits, left, &self.shared, stop).await;
    }

    fn refuse(&self, peer: &Peer, why: &str) {
        FrontStats::add(&self.shared.stats.connections_refused, 1);
        if let Some(unlogged) = self.shared.may_log() {
            tracing::info!(peer = peer.name, why, unlogged, "handshake failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::{Ingest, Routes};
    use crate::mqtt::Downlink;
    use crate::mqtt::conn::tests::{
        Gate, ingest_config, listener_config, open_access, sessions_config,
    };

    #[tokio::test]
    async fn a_connection_that_panicked_is_counted_and_gone() {
        let at_quota = storage::AtQuota::Hold;
        let (ingest, _committer) =
            Ingest::start(Gate::default(), 0, &ingest_config(), at_quota, Duration::from_mins(1))
                .unwrap();
        let downlink = Downlink::new(ingest.watermark(), 1);
        let retained = crate::mqtt::Retained::new(0, 0, |_, _| None);
        let bounds = crate::mqtt::conn::Bounds {
            sessions: &sessions_config(),
            has_sinks: true,
            held_bytes_max: 0,
            shutdown_grace: Duration::ZERO,
        };
        let (routes, access) = (Routes::default(), open_access());
        let shared = Shared::new(ingest, routes, access, downlink, retained, bounds);
        let front = Front::bind(&listener_config(), None, Arc::new(shared)).await.unwrap();
        let stats = front.stats();
        FrontStats::add(&stats.connections, 1);
        let mut connections = JoinSet::new();
        connections.spawn(async { panic!("injected") });
        front.ended(connections.join_next().await.unwrap());
        assert_eq!(stats.panics.load(Ordering::Relaxed), 1);
        assert_eq!(stats.connections.load(Ordering::Relaxed), 0);
    }
}
