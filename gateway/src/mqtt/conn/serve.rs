//! The life of a connection: CONNECT, who it is, its place and its session, until its end.
//!
//! Invariant: nothing of a client is touched before it is let in; its client id is free only once its
//! end is done with.
//! Deliberately absent: what happens in between (`conn`), and how it is let in (`auth`).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::super::auth::{self, Peer};
use super::super::codec::{self, Connect, Refused};
use super::super::reason::{self, Violation};
use super::super::session::{Limits, Session};
use super::super::sessions::{Attached, Unattached};
use super::super::stats::FrontStats;
use super::end::{End, linger, say_goodbye};
use super::hold::Hold;
use super::shared::Shared;
use super::{Conn, READ_BYTES};
use crate::access::Grant;

/// Serves a connection until it ends, or `stop`.
pub async fn serve<R, W>(
    mut reader: R,
    mut writer: W,
    from: &Peer,
    limits: Limits,
    connect_timeout: Duration,
    shared: &Shared,
    stop: &CancellationToken,
) where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (mut buf, mut out) = (BytesMut::new(), BytesMut::new());
    let peer = &*from.name;
    let connect = read_connect(&mut reader, &mut buf, &limits, connect_timeout, shared, stop).await;
    let opened = match connect {
        Ok(Some(connect)) => {
            let version = Some(connect.version);
            let taken_max = connect.packet.max_packet_size.map_or(usize::MAX, |n| n.get() as usize);
            let admitted = auth::admit(&connect.packet, from, &shared.access);
            let Some(admitted) = stop.run_until_cancelled(admitted).await else { return };
            let open = |grant: Grant| {
                let session = Session::open(connect, &limits, fastrand::u64(..), Instant::now())?;
                if shared.sessions.is_anothers(session.client_id(), grant.user()) {
                    return Err(not_its_session());
                }
                Ok((session, grant))
            };
            admitted.and_then(open).map_err(|violation| Refused {
                version,
                bytes_max: taken_max,
                violation,
            })
        }
        Ok(None) => return,
        Err(refused) => Err(refused),
    };
    let (mut session, grant) = match opened {
        Ok(opened) => opened,
        Err(refused) => return refuse(refused, &mut writer, &mut out, peer, shared).await,
    };
    if from.newcomer.as_ref().is_some_and(|newcomer| !newcomer.is_let_in()) {
        return;
    }
    let Some(seat) = shared.clients.enter(session.client_id(), grant.user()).await else {
        let (version, bytes_max) = (Some(session.version()), session.packet_bytes_max());
        let refused = Refused { version, bytes_max, violation: not_its_session() };
        return refuse(refused, &mut writer, &mut out, peer, shared).await;
    };
    let (client_id, expiry_s) = (session.client_id().clone(), session.expiry_s());
    let user = grant.user();
    let attached = shared.sessions.attach(&client_id, user, session.is_clean_start(), expiry_s);
    let Attached { kept, before, expiry_s } = match attached {
        Ok(attached) => attached,
        Err(unattached) => {
            let violation = match unattached {
                Unattached::TooMany => {
                    let why = "as many sessions are kept as may be: connect without one";
                    Violation::new(reason::SERVER_UNAVAILABLE, why)
                }
                Unattached::Anothers => not_its_session(),
            };
            let (version, bytes_max) = (Some(session.version()), session.packet_bytes_max());
            let refused = Refused { version, bytes_max, violation };
            return refuse(refused, &mut writer, &mut out, peer, shared).await;
        }
    };
    session.welcome(before, kept.is_some(), expiry_s, &mut out);
    tracing::debug!(peer, client = %session.client_id(), version = ?session.version(), "connected");
    let inbox = shared.downlink.inbox(session.client_id());

    let mut conn = Conn {
        shared,
        limits,
        grant,
        pace: shared.pace_of(session.client_id(), from.rate),
        session,
        buf,
        out,
        hold: Hold { queue: VecDeque::new(), budget: shared.held.clone() },
        mailbox: kept.as_ref().map(|kept| kept.mailbox()).unwrap_or_default(),
        inbox,
        marks_publisher: kept.as_ref().is_some_and(|kept| kept.has_no_local()),
        kept,
        retained_due: VecDeque::new(),
        will: None,
        refused_full: false,
        device: None,
        durable: Vec::new(),
        paced_at: Instant::now(),
        now: Instant::now(),
        received_us: shared.ingest.received_us(),
        reading: true,
        stalled_since: None,
        read_bytes: *READ_BYTES.start(),
        chatter_bytes: 0,
    };
    conn.drop_denied();
    conn.settle_kept();
    conn.leave_will();
    let mut end = conn.run(&mut reader, &mut writer, &seat, stop).await;
    if let End::Shutdown = end {
        end = conn.finish(&mut writer).await;
    }
    let lingers = matches!(&end, End::Server(why) if why.code != reason::TAKEN_OVER);
    conn.end(end, &mut writer, peer).await;
    // The client id is free from here on.
    drop(seat);
    if lingers {
        stop.run_until_cancelled(linger(&mut reader)).await;
    }
}

fn not_its_session() -> Violation {
    let why = "the session of this client id belongs to another user";
    Violation::new(reason::NOT_AUTHORIZED, why)
}

/// Says why there is no session, and closes.
async fn refuse<W: AsyncWrite + Unpin>(
    refused: Refused,
    writer: &mut W,
    out: &mut BytesMut,
    peer: &str,
    shared: &Shared,
) {
    let Refused { version, bytes_max, violation } = refused;
    if let Some(version) = version {
        codec::put_refusal(out, version, &violation, bytes_max);
    }
    FrontStats::add(&shared.stats.connections_refused, 1);
    if let Some(unlogged) = shared.log_limit.allows(Instant::now()) {
        tracing::info!(peer, code = violation.code, why = %violation.why, unlogged, "refused");
    }
    say_goodbye(writer, out, shared).await;
}

/// Reads until a CONNECT is whole; `None` if there will be none.
async fn read_connect<R: AsyncRead + Unpin>(
    reader: &mut R,
    buf: &mut BytesMut,
    limits: &Limits,
    connect_timeout: Duration,
    shared: &Shared,
    stop: &CancellationToken,
) -> Result<Option<Connect>, Refused> {
    let read = async {
        loop {
            if let Some(connect) = codec::decode_connect(buf, limits.packet_bytes_max)? {
                return Ok(Some(connect));
            }
            buf.reserve(*READ_BYTES.start());
            match reader.read_buf(buf).await {
                Ok(0) | Err(_) => return Ok(None),
                Ok(n) => FrontStats::add(&shared.stats.received_bytes, n as u64),
            }
        }
    };
    match stop.run_until_cancelled(timeout(connect_timeout, read)).await {
        None => Ok(None),
        Some(Ok(connect)) => connect,
        Some(Err(_)) => {
            FrontStats::add(&shared.stats.connections_refused, 1);
            Ok(None)
        }
    }
}
