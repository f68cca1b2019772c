//! The local bus: an in-process `rumqttd` router without a listener, and the links to it.
//!
//! Invariant: a link says goodbye before its place is anybody else's. Should the router die, it is
//! replaced, and every link to the old one says [`Interrupted`].
//! Deliberately absent: filters and topics of clients. The router's matcher panics on some names, and
//! it keeps what it has once matched for ever: it sees one internal topic per subscribing connection
//! (`c/<place>`, ASCII, reused).

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rumqttd::local::{LinkBuilder, LinkError, LinkRx, LinkTx};
use rumqttd::protocol::{Disconnect, DisconnectReasonCode, Packet, Publish, PublishProperties};
use rumqttd::{Notification, Router, RouterConfig};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::streams::Entry;
use super::{Downlink, lock};

/// A segment of the router's log of one topic: it keeps the last one and the one being filled.
pub(super) const SEGMENT_BYTES: u64 = 256 * 1024;

/// A router that has not answered in this time counts as dead.
const ROUTER_ANSWERS: Duration = Duration::from_secs(2);

/// Notifications that the router hands to a link at once.
const ROUTER_BATCH: u64 = 100;

/// The router has died or thrown the link out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted;

/// Whatever a link complains of, it is of no more use.
fn lost(_: LinkError) -> Interrupted {
    Interrupted
}

/// Connects a link of this name to the router of the day, whose channel has a type without a name.
pub(super) type Connect = Arc<dyn Fn(&str) -> Result<(LinkTx, LinkRx), NoLink> + Send + Sync>;

/// Why there is no link.
pub(super) enum NoLink {
    /// The router takes no more questions.
    Dead,
    /// It died with this one, or refused it.
    Unanswered,
}

pub(super) fn spawn_router(links_max: usize) -> Connect {
    let config = RouterConfig {
        max_connections: links_max + 1,
        max_outgoing_packet_count: ROUTER_BATCH,
        max_segment_size: SEGMENT_BYTES as usize,
        max_segment_count: 2,
        ..RouterConfig::default()
    };
    let router = Router::new(0, config).spawn();
    Arc::new(move |name| match LinkBuilder::new(name, router.clone()).build() {
        Ok((tx, rx, _)) => Ok((tx, rx)),
        Err(LinkError::Send(_)) => Err(NoLink::Dead),
        Err(_) => Err(NoLink::Unanswered),
    })
}

fn topic_of(slot: usize) -> String {
    format!("c/{slot}")
}

impl Downlink {
    /// Connects to the router, to a new one if it has died.
    pub(super) async fn connect(&self, name: String) -> Result<(LinkTx, LinkRx), Interrupted> {
        let connect = lock(&self.0.connect).clone();
        match answer_of(connect.clone(), name.clone()).await {
            Some(Err(NoLink::Dead)) => {
                let connect = self.respawn(&connect);
                answer_of(connect, name).await
            }
            answer => answer,
        }
        .and_then(Result::ok)
        .ok_or(Interrupted)
    }

    /// Replaces the router that `dead` leads to, unless somebody has already.
    fn respawn(&self, dead: &Connect) -> Connect {
        let mut connect = lock(&self.0.connect);
        if Arc::ptr_eq(&connect, dead) {
            tracing::error!("the local bus has died; a new one takes over");
            self.0.stats.respawns.fetch_add(1, Ordering::Relaxed);
            *connect = spawn_router(self.0.links_max);
        }
        connect.clone()
    }

    /// A link of a connection's own, with its place.
    pub(super) async fn open_link(&self) -> Result<Link, Interrupted> {
        let entry = lock(&self.0.table).streams.open(self.0.links_max).ok_or(Interrupted)?;
        let place = Place { downlink: self.clone(), entry };
        let (tx, rx) = self.connect(format!("inbox-{}", place.entry.slot)).await?;
        Ok(Link { tx, rx, unscheduled: false, early: VecDeque::new(), place })
    }
}

/// What the router answers to a new link; `None` if nothing in time. A router that dies with the
/// question in its queue never answers, and its channel does not tell: hence a thread of its own,
/// which then stays behind, rather than a worker that the runtime would wait for at its end.
async fn answer_of(connect: Connect, name: String) -> Option<Result<(LinkTx, LinkRx), NoLink>> {
    let (tx, answer) = oneshot::channel();
    std::thread::Builder::new()
        .name("link".to_owned())
        .spawn(move || drop(tx.send(connect(&name))))
        .ok()?;
    timeout(ROUTER_ANSWERS, answer).await.ok()?.ok()
}

/// The writing side of the bus.
pub(super) struct Writer {
    tx: LinkTx,
    /// Keeps the link open.
    _rx: LinkRx,
}

impl Writer {
    pub(super) async fn open(downlink: &Downlink) -> Result<Self, Interrupted> {
        let (tx, rx) = downlink.connect("follower".to_owned()).await?;
        Ok(Self { tx, _rx: rx })
    }

    /// Hands a message over for the connection at this place. What is that connection's own travels as
    /// correlation data, so that all share one body. Blocks.
    pub(super) fn put(
        &mut self,
        slot: usize,
        label: Bytes,
        body: Bytes,
    ) -> Result<(), Interrupted> {
        let properties =
            PublishProperties { correlation_data: Some(label), ..PublishProperties::default() };
        let publish = Publish::new(Bytes::from(topic_of(slot)), body, false);
        at_once(self.tx.send(Packet::Publish(publish, Some(properties))))
    }
}

/// Ends a sending, which has no point at which it could wait: one poll does all of it. The router takes
/// from its channel whatever its links do, so that the send inside is short.
fn at_once<T>(sending: impl Future<Output = Result<T, LinkError>>) -> Result<(), Interrupted> {
    match pin!(sending).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(sent) => sent.map(drop).map_err(lost),
        Poll::Pending => Err(Interrupted),
    }
}

/// A connection's place on the bus, for as long as it is in use: the router remembers every name that
/// it has seen, so that they are numbered.
struct Place {
    downlink: Downlink,
    entry: Entry,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.downlink.0.table).streams.close(self.entry.slot);
    }
}

/// A connection's link to the router; says goodbye when it is dropped, which nothing else would.
pub(super) struct Link {
    tx: LinkTx,
    rx: LinkRx,
    /// The router waits for a word before it hands over more.
    unscheduled: bool,
    /// What came while an answer was waited for.
    early: VecDeque<Notification>,
    /// Given back after the goodbye.
    place: Place,
}

impl Link {
    pub(super) fn entry(&self) -> &Entry {
        &self.place.entry
    }

    /// Subscribes to what is put to its place, and waits until the router has: it may take what is put
    /// later over one link before what was sent to it earlier over another. Blocks.
    pub(super) fn subscribe(&mut self) -> Result<(), Interrupted> {
        self.tx.subscribe(topic_of(self.place.entry.slot)).map_err(lost)?;
        self.await_ack()
    }

    fn await_ack(&mut self) -> Result<(), Interrupted> {
        let deadline = Instant::now() + ROUTER_ANSWERS;
        loop {
            // A link that has to be called for gets no answers either.
            if self.unscheduled {
                self.rx.ready().map_err(lost)?;
                self.unscheduled = false;
            }
            match self.rx.recv_deadline(deadline).map_err(lost)? {
                Some(Notification::DeviceAck(_)) => return Ok(()),
                Some(Notification::Unschedule) => self.unscheduled = true,
                other => self.early.extend(other),
            }
        }
    }

    /// What the router has for this link. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Notification, Interrupted> {
        loop {
            if let Some(early) = self.early.pop_front() {
                return Ok(early);
            }
            if self.unscheduled {
                self.rx.wake().await.map_err(lost)?;
                self.unscheduled = false;
            }
            match self.rx.next().await.map_err(lost)? {
                Some(Notification::Unschedule) => self.unscheduled = true,
                Some(other) => return Ok(other),
                None => {}
            }
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let reason_code = DisconnectReasonCode::NormalDisconnection;
        let goodbye = Packet::Disconnect(Disconnect { reason_code }, None);
        // A router that has died needs none.
        let _ = at_once(self.tx.send(goodbye));
    }
}
