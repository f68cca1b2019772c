//! How a connection ends, and what outlives it: the last words, what is held, the will.
//!
//! Invariant: QoS 0 publishes that are given up are counted; the others are not acked, and so still
//! the device's. Everything here has a bound of its own in time.
//! Deliberately absent: why it ends (`conn` and `session` say so), and the session that is kept
//! (`sessions`).

use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::super::downlink::Interrupted;
use super::super::reason::{self, Violation};
use super::super::rows::StoredWill;
use super::super::stats::FrontStats;
use super::publish::shorten;
use super::shared::Shared;
use super::{Conn, READ_BYTES};
use crate::ingest::Pending;

/// What a connection gets at its end for its last bytes, and for publishes that are still held.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What is read and dropped at most of who is told why its connection ends.
const LINGER_BYTES_MAX: usize = 1024 * 1024;

/// How a connection ends.
#[derive(Debug)]
pub(super) enum End {
    /// DISCONNECT, or the client has closed its side.
    Client,
    /// The socket has failed or stalled.
    Lost(String),
    /// We end it, and say why.
    Server(Violation),
    /// The gateway shuts down.
    Shutdown,
}

impl From<Violation> for End {
    fn from(violation: Violation) -> Self {
        Self::Server(violation)
    }
}

impl From<std::io::Error> for End {
    fn from(error: std::io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<Interrupted> for End {
    fn from(_: Interrupted) -> Self {
        let why = "the local bus was restarted: subscribe again";
        Self::Server(Violation::new(reason::IMPLEMENTATION_SPECIFIC, why))
    }
}

/// Reads and drops what is on its way, until the client has closed its side too, or for
/// [`LAST_WORDS`]. A socket that is closed with bytes unread is reset, and then its client may never
/// see what was said to it last.
pub(super) async fn linger<R: AsyncRead + Unpin>(reader: &mut R) {
    let mut dropped = 0;
    let mut buf = BytesMut::with_capacity(*READ_BYTES.start());
    let read = async {
        while dropped < LINGER_BYTES_MAX
            && let Ok(n @ 1..) = reader.read_buf(&mut buf).await
        {
            dropped += n;
            buf.clear();
        }
    };
    timeout(LAST_WORDS, read).await.ok();
}

/// Writes what is left, within [`LAST_WORDS`], and closes our side.
pub(super) async fn say_goodbye<W: AsyncWrite + Unpin>(
    writer: &mut W,
    out: &mut BytesMut,
    shared: &Shared,
) {
    let sent = out.len() as u64;
    let words = async {
        writer.write_all_buf(out).await?;
        writer.shutdown().await
    };
    if let Ok(Ok(())) = timeout(LAST_WORDS, words).await {
        FrontStats::add(&shared.stats.sent_bytes, sent);
    }
}

impl Conn<'_> {
    /// Makes the will durable, so that a restart does not forget it.
    pub(super) fn leave_will(&mut self) {
        let Some(will) = self.session.will() else { return };
        let (publish, delay_s) = ((*will.publish).clone(), will.delay_s);
        if self.resolve(&publish.topic) && self.fits(&publish) {
            let event = self.event(publish);
            let will = StoredWill { event, delay_s, user: self.grant.user().cloned() };
            self.shared.sessions.leave_will(self.session.client_id(), &will);
            self.will = Some(will);
        } else {
            FrontStats::add(&self.shared.stats.publishes_refused, 1);
            if let Some(unlogged) = self.shared.log_limit.allows(Instant::now()) {
                let (client, topic) = (self.session.client_id(), shorten(&publish.topic));
                tracing::warn!(%client, topic, unlogged, "no route takes the will, or not one as large");
            }
        }
    }

    /// Shutdown: reads nothing more, waits for the acks of what was read, and says goodbye.
    pub(super) async fn finish<W: AsyncWrite + Unpin>(&mut self, writer: &mut W) -> End {
        let ingest = &self.shared.ingest;
        // The other half is for the sinks and the last commit.
        let grace = self.shared.shutdown_grace / 2;
        let finish = async {
            while !self.hold.queue.is_empty() || self.session.unacked() > 0 || !self.out.is_empty()
            {
                tokio::select! {
                    written = writer.write_buf(&mut self.out), if !self.out.is_empty() => {
                        self.written(written)?;
                    }
                    () = self.mailbox.changed() => self.collect()?,
                    () = self.shared.ingest.room(), if !self.hold.queue.is_empty() => {
                        self.push_held()?;
                    }
                }
            }
            Ok(())
        };
        let finished = tokio::select! {
            finished = timeout(grace, finish) => finished.unwrap_or(Ok(())),
            // A disk that failed for good, say: no ack will come.
            () = ingest.ended() => Ok(()),
        };
        finished.err().unwrap_or_else(|| {
            Violation::new(reason::SHUTTING_DOWN, "the gateway shuts down").into()
        })
    }

    /// Sends the last words, and stores what must outlive the connection: held publishes, the will.
    pub(super) async fn end<W: AsyncWrite + Unpin>(mut self, end: End, writer: &mut W, peer: &str) {
        let client = self.session.client_id().clone();
        if let Some(pace) = self.pace.take() {
            self.shared.paces.leave(&client, pace, Instant::now());
        }
        match &end {
            End::Client => tracing::debug!(peer, %client, "disconnected"),
            End::Lost(why) => tracing::debug!(peer, %client, why, "lost"),
            End::Shutdown => {}
            End::Server(violation) => {
                let ours = matches!(violation.code, reason::SHUTTING_DOWN | reason::TAKEN_OVER);
                if !ours {
                    FrontStats::add(&self.shared.stats.protocol_errors, 1);
                }
                if !ours && let Some(unlogged) = self.shared.log_limit.allows(Instant::now()) {
                    let (code, why) = (violation.code, &violation.why);
                    tracing::warn!(peer, %client, code, %why, unlogged, "connection closed");
                }
                self.session.close(violation, &mut self.out);
            }
        }
        if !matches!(end, End::Lost(_)) {
            say_goodbye(writer, &mut self.out, self.shared).await;
        }
        if self.refused_full {
            // What is held may stand behind what was refused.
            self.drop_held();
        }
        self.end_will();
        self.settle().await;
        if let Some(kept) = self.kept.take() {
            let expiry_s = self.session.expiry_s();
            let inbound = self.session.into_inbound();
            self.shared.sessions.detach(&kept, inbound, expiry_s, Instant::now());
        }
    }

    /// Publishes the will, or lets it wait, or cancels it.
    fn end_will(&mut self) {
        let Some(mut will) = self.will.take() else { return };
        let sessions = &self.shared.sessions;
        // The session's end makes it due at the latest.
        let lasts_s = if self.kept.is_some() { self.session.expiry_s() } else { 0 };
        let left = self.session.take_will();
        let client_id = self.session.client_id();
        match (left, will.delay_s.min(lasts_s)) {
            (None, _) => sessions.cancel_will(client_id),
            (Some(_), 0) if !sessions.allows_will(client_id, &will) => {}
            (Some(_), 0) => {
                will.event.received_us = self.shared.ingest.received_us();
                let riders = sessions.riders_of_will(client_id, &will.event);
                let (read_at, ticket) = (Instant::now(), None);
                let (event, identity) = (will.event, None);
                self.hold.push_back(Pending { event, read_at, ticket, riders, identity });
            }
            (Some(_), delay_s) => {
                let due = Instant::now() + Duration::from_secs(delay_s.into());
                sessions.will_due(client_id, will, due);
            }
        }
    }

    /// Gives what is held a last chance. QoS 1 publishes are not acked, and so still the device's.
    async fn settle(&mut self) {
        let pushed = async {
            loop {
                while let Some(pending) = self.hold.pop_front() {
                    if let Err(pending) = self.shared.ingest.try_push(pending) {
                        self.hold.push_front(pending);
                        break;
                    }
                }
                if self.hold.queue.is_empty() {
                    return;
                }
                self.shared.ingest.room().await;
            }
        };
        if timeout(LAST_WORDS, pushed).await.is_err() {
            self.drop_held();
        }
    }

    /// Gives up what is held. QoS 0 publishes are lost by that, and counted.
    fn drop_held(&mut self) {
        if self.hold.queue.is_empty() {
            return;
        }
        let dropped = self.hold.queue.iter().filter(|p| p.event.attributes.qos() == 0).count();
        FrontStats::add(&self.shared.stats.publishes_dropped, dropped as u64);
        if dropped > 0
            && let Some(unlogged) = self.shared.log_limit.allows(Instant::now())
        {
            let client = self.session.client_id();
            tracing::warn!(%client, dropped, unlogged, "its last publishes are not stored");
        }
        while let Some(pending) = self.hold.pop_front() {
            if let Some(ticket) = pending.ticket {
                self.session.forget(ticket.number);
            }
        }
    }
}
