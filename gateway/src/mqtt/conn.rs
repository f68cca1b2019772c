//! One connection: the shell around [`Session`].
//!
//! Owns: the loop over one connection's socket: the two buffers, the timers, and the state that its
//! parts change. `serve` begins it and `end` ends it; `publish` takes what comes, by `hold` where a
//! ring is full; `deliver` sends what is for the client. `shared` is what all connections have.
//! Invariant: events of one connection enter the rings in the order in which they were read: while
//! one is held, those after it are held too, and once one was refused because the store is full, none
//! enters any more.
//! Deliberately absent: protocol rules (see `session` and `codec`).
//!
//! Backpressure: a publish whose ring is full is held, unacked, and the socket is still read, so that
//! pings flow; a QoS 1 client stops by itself at its window. Past `in_flight_max` held publishes, or
//! past the byte budget over all connections, the socket is not read, and the keep-alive timer rests.

mod deliver;
mod end;
mod hold;
mod publish;
mod serve;
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
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;

use super::clients::Seat;
use super::codec;
use super::downlink::Inbox;
use super::pace::ClientPace;
use super::reason::{self, Violation};
use super::rows::StoredWill;
use super::session::{Effect, Limits, Session};
use super::sessions::Kept;
use super::stats::FrontStats;
use super::subscriptions::Options;
use crate::access::Grant;
use crate::ingest::{AckMailbox, GivenUp, Ticket};
use end::End;
pub use hold::Held;
use hold::Hold;
use publish::Device;
pub use serve::serve;
pub use shared::{Bounds, Shared};

/// Bytes that may wait for a client to read them. Past it neither its packets nor messages for it
/// are taken.
pub const OUT_BYTES_MAX: usize = 64 * 1024;

/// A client that takes no byte for this long while some wait for it is gone.
pub const WRITE_STALL: Duration = Duration::from_secs(30);

/// Smallest and largest buffer for what is read: it doubles when a piece fills it.
const READ_BYTES: std::ops::RangeInclusive<usize> = 2 * 1024..=32 * 1024;

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
        let collected = self.mailbox.collect(&mut self.durable);
        self.session.complete(&self.durable, &mut self.out);
        self.durable.clear();
        collected.map_err(|given_up| {
            let (code, why) = match given_up {
                GivenUp::Failed => (
                    reason::IMPLEMENTATION_SPECIFIC,
                    "an event could not be stored: send again what was not acked",
                ),
                GivenUp::Refused => {
                    (reason::QUOTA_EXCEEDED, "the store is full: what was not acked is not stored")
                }
            };
            Violation::new(code, why).into()
        })
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
