//! What all connections share, and what bounds them together.
//!
//! Invariant: what is here is made once, before the first connection, and outlives the last.
//! Deliberately absent: listeners (each has its own limits), and what the parts do.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use bytestring::ByteString;

use super::super::clients::Clients;
use super::super::downlink::Downlink;
use super::super::pace::{ClientPace, Paces, Rate};
use super::super::retained::Retained;
use super::super::sessions::Sessions;
use super::super::stats::{FrontStats, LogLimit};
use super::WRITE_STALL;
use super::hold::Held;
use crate::access::Access;
use crate::config::SessionsConfig;
use crate::ingest::Ingest;
use crate::ingest::device_key::Routes;

/// What all connections share.
pub struct Shared {
    /// Where publishes go.
    pub ingest: Ingest,
    /// Device keys by topic.
    pub routes: Routes,
    /// Who is let in.
    pub access: Arc<Access>,
    /// Where subscriptions are.
    pub downlink: Downlink,
    /// Sessions that outlive their connections.
    pub sessions: Sessions,
    /// Retained messages.
    pub retained: Retained,
    /// Byte budget of held publishes.
    pub held: Arc<Held>,
    /// Counters.
    pub stats: FrontStats,
    /// How long a shutdown may wait for acks.
    pub shutdown_grace: Duration,
    /// See [`super::super::session::Limits::keep_alive_s_max`].
    pub keep_alive_s_max: u16,
    /// Whether what is published goes upstream.
    pub has_sinks: bool,
    /// See [`WRITE_STALL`].
    pub(super) write_stall: Duration,
    pub(super) clients: Clients,
    pub(super) paces: Paces,
    pub(super) log_limit: LogLimit,
}

/// Bounds over all connections.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    /// `[sessions]`.
    pub sessions: &'a SessionsConfig,
    /// Whether what is published goes upstream.
    pub has_sinks: bool,
    /// Bytes of publishes held for connections whose ring is full.
    pub held_bytes_max: usize,
    /// How long a shutdown may wait for acks.
    pub shutdown_grace: Duration,
}

impl Shared {
    /// For all listeners of a process.
    pub fn new(
        ingest: Ingest,
        routes: Routes,
        access: Access,
        downlink: Downlink,
        retained: Retained,
        bounds: Bounds<'_>,
    ) -> Self {
        let Bounds { sessions, has_sinks, held_bytes_max, shutdown_grace } = bounds;
        let keep_alive_s_max = sessions.keep_alive_max.as_secs();
        let access = Arc::new(access);
        let (downlinks, retains, ingests) = (downlink.clone(), retained.clone(), ingest.clone());
        Self {
            sessions: Sessions::new(sessions, downlinks, retains, ingests, access.clone()),
            retained,
            has_sinks,
            keep_alive_s_max: u16::try_from(keep_alive_s_max).unwrap_or(u16::MAX),
            ingest,
            routes,
            access,
            downlink,
            held: Arc::new(Held { bytes: AtomicUsize::new(0), bytes_max: held_bytes_max }),
            stats: FrontStats::default(),
            shutdown_grace,
            write_stall: WRITE_STALL,
            clients: Clients::default(),
            paces: Paces::default(),
            log_limit: LogLimit::default(),
        }
    }

    /// The pace of a client that comes over a listener of this rate.
    pub(super) fn pace_of(&self, client_id: &ByteString, rate: Rate) -> Option<ClientPace> {
        self.paces.enter(client_id, rate, self.routes.limit_rates(), Instant::now())
    }

    /// Whether a line may be logged that a client has caused, and how many were not of late.
    pub(in crate::mqtt) fn may_log(&self) -> Option<u64> {
        self.log_limit.allows(Instant::now())
    }
}
