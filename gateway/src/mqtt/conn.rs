//! One connection: the shell around [`Session`].
//!
//! Owns: the two buffers, the publishes held back while their ring is full, the timers.
//! Invariant: events of one connection enter the rings in the order in which they were read: while
//! one is held, those after it are held too, and once one was refused because the store is full, none
//! enters any more.
//! Deliberately absent: protocol rules (see `session` and `codec`).
//!
//! Backpressure: a publish whose ring is full is held, unacked, and the socket is still read, so that
//! pings flow; a QoS 1 client stops by itself at its window. Past `in_flight_max` held publishes, or
//! past the byte budget over all connections, the socket is not read, and the keep-alive timer rests.

mod deliver;
mod hold;
mod publish;
mod shared;

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use bytestring::ByteString;
use rmqtt_codec::types::Publish;
use storage::Control;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::auth::{self, Peer};
use super::clients::Seat;
use super::codec::{self, Connect, Refused};
use super::downlink::{Inbox, Interrupted, Options};
use super::pace::ClientPace;
use super::reason::{self, Violation};
use super::rows::StoredWill;
use super::session::{Effect, Limits, Session};
use super::sessions::{Attached, Kept, Unattached};
use super::stats::FrontStats;
use crate::access::Grant;
use crate::ingest::{AckMailbox, Pending, Ticket};
pub use hold::Held;
use hold::Hold;
use publish::{Device, shorten};
pub use shared::{Bounds, Shared};

/// Bytes that may wait for a client to read them. Past it neither its packets nor messages for it
/// are taken.
pub const OUT_BYTES_MAX: usize = 64 * 1024;

/// A client that takes no byte for this long while some wait for it is gone.
pub const WRITE_STALL: Duration = Duration::from_secs(30);

/// What a connection gets at its end for its last bytes, and for publishes that are still held.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What is read and dropped at most of who is told why its connection ends.
const LINGER_BYTES_MAX: usize = 1024 * 1024;

/// Smallest and largest buffer for what is read: it doubles when a piece fills it.
const READ_BYTES: std::ops::RangeInclusive<usize> = 2 * 1024..=32 * 1024;

/// How a connection ends.
#[derive(Debug)]
enum End {
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
        inbox: shared.downlink.inbox(),
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

/// Reads and drops what is on its way, until the client has closed its side too, or for
/// [`LAST_WORDS`]. A socket that is closed with bytes unread is reset, and then its client may never
/// see what was said to it last.
async fn linger<R: AsyncRead + Unpin>(reader: &mut R) {
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

/// Writes what is left, within [`LAST_WORDS`], and closes our side.
async fn say_goodbye<W: AsyncWrite + Unpin>(writer: &mut W, out: &mut BytesMut, shared: &Shared) {
    let sent = out.len() as u64;
    let words = async {
        writer.write_all_buf(out).await?;
        writer.shutdown().await
    };
    if let Ok(Ok(())) = timeout(LAST_WORDS, words).await {
        FrontStats::add(&shared.stats.sent_bytes, sent);
    }
}

struct Conn<'a> {
    shared: &'a Shared,
    limits: Limits,
    /// Who it is, and what it may do.
    grant: Grant,
    /// How fast it may publish.
    pace: Option<ClientPace>,
    session: Session,
    buf: BytesMut,
    out: BytesMut,
    hold: Hold,
    mailbox: Arc<AckMailbox>,
    /// Messages for a session that ends with the connection.
    inbox: Inbox,
    /// The session, if it outlives the connection: then its messages are there.
    kept: Option<Arc<Kept>>,
    /// Retained messages that are due, by topic.
    retained_due: VecDeque<(ByteString, Options)>,
    /// The event that the will becomes.
    will: Option<StoredWill>,
    /// Some subscription does not want this client's own publishes.
    marks_publisher: bool,
    /// A QoS 1 publish was refused because the store is full. The client may have sent others behind
    /// it before it learned that, and only a new connection shows where it begins again: nothing
    /// more is stored from this one.
    refused_full: bool,
    device: Option<Device>,
    durable: Vec<u64>,
    /// When it was last judged whether it is over its rate.
    paced_at: Instant,
    /// When the bytes that are being worked on were read.
    now: Instant,
    received_us: u64,
    /// Whether the socket was read in the last round.
    reading: bool,
    /// Since when the client has taken nothing of what waits for it.
    stalled_since: Option<Instant>,
    read_bytes: usize,
    /// Bytes of other packets that came between publishes, less those of publishes.
    chatter_bytes: usize,
}

impl Conn<'_> {
    async fn run<R, W>(
        &mut self,
        reader: &mut R,
        writer: &mut W,
        seat: &Seat,
        stop: &CancellationToken,
    ) -> End
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut timer = pin!(sleep_until(tokio::time::Instant::now()));
        let mut stopped = pin!(stop.cancelled());
        let mut taken_over = pin!(seat.taken_over());
        loop {
            if let Err(end) = self.check_grant() {
                return end;
            }
            if let Err(end) = self.digest().await {
                return end;
            }
            if let Err(end) = self.deliver_waiting().await {
                return end;
            }
            self.look_ahead();
            let deadline = self.deadline(self.paced_at);
            // Set back only when it is due: a timer moved at every packet costs more than the packet.
            if let Some(deadline) = deadline
                && (timer.is_elapsed() || timer.deadline().into_std() > deadline)
            {
                timer.as_mut().reset(deadline.into());
            }
            let takes_delivery = self.takes_delivery();
            let step = tokio::select! {
                written = writer.write_buf(&mut self.out), if !self.out.is_empty() => {
                    self.written(written)
                }
                () = &mut stopped => Err(End::Shutdown),
                () = &mut taken_over => {
                    let why = "another connection has this client id";
                    Err(End::Server(Violation::new(reason::TAKEN_OVER, why)))
                }
                () = self.mailbox.changed() => self.collect(),
                () = self.shared.ingest.room(), if !self.hold.queue.is_empty() => self.push_held(),
                message = self.inbox.next(), if takes_delivery => self.deliver(message),
                () = changed(self.kept.as_deref()) => Ok(()),
                read = read_some(reader, &mut self.buf, self.read_bytes), if self.reading => {
                    self.was_read(read)
                }
                () = &mut timer, if deadline.is_some() => self.timeout(),
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// Works on everything that was read, as far as bounds allow.
    async fn digest(&mut self) -> Result<(), End> {
        let mut publishes = [0; 3];
        // One look at the clock serves all that came at once, and what is decided from it: whoever is
        // not over its rate any more after a last look would wait with whole packets in its buffer.
        if self.pace.is_some() {
            self.paced_at = Instant::now();
        }
        let result = loop {
            while let Some(turn) = self.session.next_turn() {
                self.shared.ingest.announce();
                self.take(turn).await?;
            }
            if !self.may_decode() {
                break Ok(());
            }
            let (version, before) = (self.session.version(), self.buf.len());
            let packet = match codec::decode(&mut self.buf, version, self.limits.packet_bytes_max) {
                Ok(Some(packet)) => packet,
                Ok(None) => break Ok(()),
                Err(violation) => break Err(violation.into()),
            };
            if !matches!(packet, codec::Packet::Publish(_)) {
                self.chatter_bytes += before - self.buf.len();
            }
            let step = match self.session.receive(packet, &mut self.out) {
                Ok(Effect::None) => Ok(()),
                Ok(Effect::Publish(publishing)) => {
                    publishes[usize::from(publishing.publish.qos.value())] += 1;
                    if let Some(pace) = &mut self.pace {
                        let Publish { topic, payload, .. } = &*publishing.publish;
                        pace.take(topic.len() + payload.len(), self.paced_at);
                    }
                    self.publish(publishing).map_err(End::from)
                }
                Ok(Effect::Release { packet_id, number }) => {
                    self.keep(number, |kept| Some(kept.release(packet_id)));
                    Ok(())
                }
                Ok(Effect::Received { packet_id, number }) => {
                    self.keep(number, |kept| kept.received(packet_id));
                    Ok(())
                }
                Ok(Effect::Acked(packet_id)) => {
                    let gone = self.kept.as_ref().and_then(|kept| kept.acked(packet_id));
                    self.submit(gone);
                    Ok(())
                }
                Ok(Effect::Disconnect) => Err(End::Client),
                Err(violation) => Err(violation.into()),
            };
            if step.is_err() {
                break step;
            }
        };
        // Once for all that came at once.
        if publishes != [0; 3] {
            self.shared.ingest.announce();
        }
        for (counter, n) in self.shared.stats.publishes.iter().zip(publishes) {
            if n > 0 {
                FrontStats::add(counter, n);
            }
        }
        result
    }

    /// Whether bounds allow another packet to be worked on. If so, all whole ones have been after
    /// [`Conn::digest`], and more may be read.
    fn may_decode(&self) -> bool {
        self.out.len() < OUT_BYTES_MAX
            && self.session.takes_publishes()
            && self.hold.has_room(usize::from(self.limits.in_flight_max.get()))
            && self.paced_until(self.paced_at).is_none()
    }

    /// Until when it is not read because it is over its rate.
    fn paced_until(&self, now: Instant) -> Option<Instant> {
        self.pace.as_ref().and_then(|pace| pace.opens_at(now))
    }

    fn takes_delivery(&self) -> bool {
        self.out.len() < OUT_BYTES_MAX && self.session.takes_delivery()
    }

    /// Takes note of what the next round waits for.
    fn look_ahead(&mut self) {
        let reading = self.may_decode();
        if reading && !self.reading {
            // It could not speak while it was not read.
            self.session.heard(Instant::now());
        }
        if !reading && self.reading && self.paced_until(self.paced_at).is_some() {
            FrontStats::add(&self.shared.stats.paced, 1);
        }
        self.reading = reading;
        if self.out.is_empty() {
            self.stalled_since = None;
        } else {
            self.stalled_since.get_or_insert_with(Instant::now);
        }
    }

    /// When the client counts as gone: silent too long while it is read, taking nothing, or let in
    /// until then. Also when whoever is over its rate at `now` is not any more.
    fn deadline(&self, now: Instant) -> Option<Instant> {
        let silent = self.session.deadline().filter(|_| self.reading);
        let stalled = self.stalled_since.map(|since| since + self.shared.write_stall);
        let paced = self.paced_until(now);
        silent.into_iter().chain(stalled).chain(self.grant.until()).chain(paced).min()
    }

    fn timeout(&mut self) -> Result<(), End> {
        let now = Instant::now();
        match self.deadline(now) {
            Some(deadline) if deadline > now => Ok(()),
            Some(_) if self.grant.until().is_some_and(|until| until <= now) => {
                let why = "its token has expired";
                Err(Violation::new(reason::NOT_AUTHORIZED, why).into())
            }
            Some(_)
                if self
                    .stalled_since
                    .is_some_and(|since| since + self.shared.write_stall <= now) =>
            {
                Err(End::Lost("it does not read".into()))
            }
            Some(_) => {
                let why = "nothing heard for one and a half times the keep-alive";
                Err(Violation::new(reason::KEEP_ALIVE_TIMEOUT, why).into())
            }
            None => Ok(()),
        }
    }

    fn was_read(&mut self, read: std::io::Result<usize>) -> Result<(), End> {
        let n = read?;
        if n == 0 {
            return Err(End::Lost("closed without DISCONNECT".into()));
        }
        FrontStats::add(&self.shared.stats.received_bytes, n as u64);
        self.now = Instant::now();
        self.received_us = self.shared.ingest.received_us();
        self.session.heard(self.now);
        if self.buf.len() == self.buf.capacity() {
            self.read_bytes = (2 * self.read_bytes).min(*READ_BYTES.end());
        }
        Ok(())
    }

    fn written(&mut self, written: std::io::Result<usize>) -> Result<(), End> {
        let n = written?;
        FrontStats::add(&self.shared.stats.sent_bytes, n as u64);
        self.stalled_since = None;
        Ok(())
    }

    /// Makes a change of the session durable, and completes the number then.
    fn keep(&mut self, number: u64, change: impl FnOnce(&Kept) -> Option<Control>) {
        match self.kept.as_ref().and_then(|kept| change(kept)) {
            Some(control) => self.submit_for(number, vec![control]),
            None => self.session.complete(&[number], &mut self.out),
        }
    }

    fn submit_for(&self, number: u64, controls: Vec<Control>) {
        let ticket = Ticket { mailbox: self.mailbox.clone(), number };
        self.shared.ingest.submit(controls, Some(ticket));
    }

    fn submit(&self, controls: impl IntoIterator<Item = Control>) {
        let controls: Vec<_> = controls.into_iter().collect();
        if !controls.is_empty() {
            self.shared.ingest.submit(controls, None);
        }
    }

    /// A grant ends with its token, and when its log-in would not give the same any more.
    fn check_grant(&mut self) -> Result<(), End> {
        if !self.grant.is_upheld() {
            let why = "what this client may do has changed: log in again";
            return Err(Violation::new(reason::ADMINISTRATIVE_ACTION, why).into());
        }
        Ok(())
    }

    /// Acks what became durable.
    fn collect(&mut self) -> Result<(), End> {
        let sound = self.mailbox.collect(&mut self.durable);
        self.session.complete(&self.durable, &mut self.out);
        self.durable.clear();
        if !sound {
            let why = "an event could not be stored: send again what was not acked";
            return Err(Violation::new(reason::IMPLEMENTATION_SPECIFIC, why).into());
        }
        Ok(())
    }

    /// Makes the will durable, so that a restart does not forget it.
    fn leave_will(&mut self) {
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
    async fn finish<W: AsyncWrite + Unpin>(&mut self, writer: &mut W) -> End {
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
        match timeout(grace, finish).await {
            Ok(Err(end)) => end,
            _ => Violation::new(reason::SHUTTING_DOWN, "the gateway shuts down").into(),
        }
    }

    /// Sends the last words, and stores what must outlive the connection: held publishes, the will.
    async fn end<W: AsyncWrite + Unpin>(mut self, end: End, writer: &mut W, peer: &str) {
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

/// Resolves when a session that is kept may have something for its client.
async fn changed(kept: Option<&Kept>) {
    match kept {
        Some(kept) => kept.changed().await,
        None => std::future::pending().await,
    }
}

/// Reads a piece into the room that is left, so that small pieces share a buffer; near its end into a
/// new one, as large as the packet that has begun, so that a large one is copied a few times only.
async fn read_some<R: AsyncRead + Unpin>(
    reader: &mut R,
    buf: &mut BytesMut,
    read_bytes: usize,
) -> std::io::Result<usize> {
    if buf.capacity() - buf.len() < read_bytes / 8 {
        buf.reserve(read_bytes.max(buf.len()));
    }
    reader.read_buf(buf).await
}

#[cfg(test)]
pub(super) mod tests;
