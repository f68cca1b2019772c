//! Accepting connections, within limits, and ending them.
//!
//! Invariant: a connection that panics ends alone; nothing that a client or the system does makes
//! this loop stop or spin.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::conn::{self, Shared};
use super::session::Limits;
use super::stats::FrontStats;
use crate::config::ListenerConfig;

/// Rest after a failed accept: what fails it (no descriptors left) takes time to pass.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// One listener, bound.
pub struct Front {
    listener: TcpListener,
    local_addr: SocketAddr,
    connections_max: usize,
    connect_timeout: Duration,
    limits: Limits,
    shared: Arc<Shared>,
}

impl Front {
    /// Binds the listener's address.
    ///
    /// # Errors
    /// What the system says: the port is in use, the address is not ours.
    pub async fn bind(config: &ListenerConfig, shared: Arc<Shared>) -> io::Result<Self> {
        let listener = TcpListener::bind(config.bind).await?;
        Ok(Self {
            local_addr: listener.local_addr()?,
            listener,
            connections_max: config.connections_max,
            connect_timeout: config.connect_timeout,
            limits: Limits {
                packet_bytes_max: config.packet_bytes_max,
                in_flight_max: NonZeroU16::new(config.in_flight_max).unwrap_or(NonZeroU16::MIN),
                allow_anonymous: config.allow_anonymous,
                keep_alive_s_max: shared.keep_alive_s_max,
            },
            shared,
        })
    }

    /// The address, with the port that the system gave where port 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until `stop`; then stops reading, acks what is durable within the grace time, says
    /// goodbye and returns.
    pub async fn run(self, stop: CancellationToken) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(ended) = connections.join_next() => self.ended(ended),
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, peer)) => self.accepted(stream, peer, &mut connections, &stop),
                    Err(error) => {
                        FrontStats::add(&self.shared.stats.accept_errors, 1);
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
        stream: TcpStream,
        peer: SocketAddr,
        connections: &mut JoinSet<()>,
        stop: &CancellationToken,
    ) {
        let stats = &self.shared.stats;
        FrontStats::add(&stats.connections_total, 1);
        if connections.len() >= self.connections_max {
            FrontStats::add(&stats.connections_refused, 1);
            tracing::debug!(%peer, "too many connections");
            return;
        }
        // Acks are small and late enough already.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "gone before it began");
            return;
        }
        FrontStats::add(&stats.connections, 1);
        let (shared, stop) = (self.shared.clone(), stop.child_token());
        let (limits, connect_timeout) = (self.limits, self.connect_timeout);
        connections.spawn(async move {
            let (reader, writer) = stream.into_split();
            let peer = peer.to_string();
            conn::serve(reader, writer, &peer, limits, connect_timeout, &shared, &stop).await;
        });
    }

    fn ended(&self, ended: Result<(), JoinError>) {
        self.shared.stats.connections.fetch_sub(1, Ordering::Relaxed);
        if let Err(error) = ended {
            FrontStats::add(&self.shared.stats.panics, 1);
            tracing::error!(%error, "a connection panicked and was closed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::{Ingest, Routes};
    use crate::mqtt::Downlink;
    use crate::mqtt::conn::tests::{Gate, ingest_config, listener_config, sessions_config};

    #[tokio::test]
    async fn a_connection_that_panicked_is_counted_and_gone() {
        let at_quota = storage::AtQuota::Hold;
        let (ingest, _committer) =
            Ingest::start(Gate::default(), 0, &ingest_config(), at_quota, Duration::from_mins(1))
                .unwrap();
        let downlink = Downlink::new(ingest.watermark(), 1);
        let retained = crate::mqtt::Retained::new(0, 0, |_, _| None);
        let (routes, sessions) = (Routes::default(), sessions_config());
        let shared = Shared::new(ingest, routes, downlink, retained, &sessions, 0, Duration::ZERO);
        let front = Front::bind(&listener_config(), Arc::new(shared)).await.unwrap();
        let stats = &front.shared.stats;
        FrontStats::add(&stats.connections, 1);
        let mut connections = JoinSet::new();
        connections.spawn(async { panic!("injected") });
        front.ended(connections.join_next().await.unwrap());
        assert_eq!(stats.panics.load(Ordering::Relaxed), 1);
        assert_eq!(stats.connections.load(Ordering::Relaxed), 0);
    }
}
