//! The follower: reads the log behind the watermark, and hands out what somebody subscribes to.
//!
//! Invariant: what sessions keep of a piece of the log is durable, together with the note that they
//! have it, before the next piece is read.
//! Deliberately absent: who gets what (`subscriptions`).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use storage::{Control, Store, StoredEvent};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::bus::{self, Writer};
use super::streams::Turn;
use super::{Downlink, Table, lock};
use crate::ingest::Ingest;
use crate::mqtt::envelope;
use crate::mqtt::rows::{self, Message, Queued};
use crate::mqtt::sessions::{self, Kept};
use crate::mqtt::subscriptions::{Manner, Reader};

/// How long the follower waits for a subscriber that has fallen behind before it goes on without.
pub const PATIENCE: Duration = Duration::from_millis(20);

/// What a subscriber that keeps up may have untaken before more is handed out.
pub(super) const UNTAKEN_BYTES_MAX: u64 = bus::SEGMENT_BYTES / 2;

/// Event bytes read from the log and handed out at once, about.
const READ_BYTES_MAX: usize = 64 * 1024;

/// Events read from the log at once, at most.
const READ_EVENTS_MAX: usize = 512;

/// Messages made up for connections at once, about: a few events may be for very many.
pub(super) const MESSAGES_AT_ONCE: usize = 4096;

/// Wait before the log is read again after it could not be.
const READ_RETRY: Duration = Duration::from_secs(1);

/// The durable note of how far sessions were served is renewed after so many events of which none was
/// for any: a restart reads what came after it again.
const SERVED_EVERY: u64 = 16 * 1024;

impl Downlink {
    /// Serves what becomes durable until `stop`, or until the watermark has no sender any more.
    pub async fn follow(self, store: Store, ingest: Ingest, stop: CancellationToken) {
        let mut follower = Follower::new(self, Some(ingest));
        let mut watermark = follower.downlink.0.watermark.clone();
        while let Some(Some(next)) = stop.run_until_cancelled(follower.work(&mut watermark)).await {
            if !follower.serve(&store, next).await {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = sleep(READ_RETRY) => {}
                }
            }
        }
    }

    /// What to do about the first of these events; gives those that are left for the next time.
    pub(super) fn address<'a>(&self, events: &'a [StoredEvent]) -> (Addressed, &'a [StoredEvent]) {
        let mut guard = lock(&self.0.table);
        let Table { subscriptions, streams, .. } = &mut *guard;
        let mut addressed = Addressed::default();
        for (at, stored) in events.iter().enumerate() {
            if addressed.messages.len() >= MESSAGES_AT_ONCE {
                return (addressed, &events[at..]);
            }
            // Both made for the first who takes one, and shared by all.
            let (mut body, mut copy) = (None, None);
            subscriptions.address(stored, |reader, manner| match reader {
                Reader::Connection { number, slot, .. } => {
                    let body =
                        body.get_or_insert_with(|| Message::encode_event(&stored.event)).clone();
                    if let Some(turn) = streams.turn(*slot, *number, body.len() as u64) {
                        addressed.messages.push((turn, manner, body));
                    }
                }
                Reader::Session(kept) => {
                    if manner.qos > 0 || kept.is_online() {
                        let copy = copy.get_or_insert_with(|| Message::of(&stored.event));
                        addressed.kept.offer(kept, manner, copy.clone());
                    }
                }
            });
        }
        (addressed, &[])
    }

    /// Waits, with [`PATIENCE`], for the connections at these places.
    async fn wait_for(&self, slots: &[usize]) {
        let in_reach = || lock(&self.0.table).streams.in_reach(slots, UNTAKEN_BYTES_MAX);
        let all = async {
            while !in_reach() {
                self.0.taken.notified().await;
            }
        };
        if timeout(PATIENCE, all).await.is_err() {
            lock(&self.0.table).streams.leave_behind(slots, UNTAKEN_BYTES_MAX);
        }
    }
}

/// See the module.
pub(super) struct Follower {
    downlink: Downlink,
    writer: Option<Writer>,
    /// Where what sessions keep is made durable.
    ingest: Option<Ingest>,
    /// How far the durable note says that sessions were served.
    served: u64,
}

impl Follower {
    pub(super) fn new(downlink: Downlink, ingest: Option<Ingest>) -> Self {
        Self { downlink, writer: None, ingest, served: 0 }
    }

    /// Waits until there is something to serve. While nobody subscribes the log is not even looked
    /// at: the first subscription says where to begin.
    async fn work(&self, watermark: &mut watch::Receiver<u64>) -> Option<u64> {
        let shared = &self.downlink.0;
        loop {
            let next = {
                let table = lock(&shared.table);
                (!table.subscriptions.is_empty()).then_some(table.next)
            };
            match next {
                None => shared.subscribed.notified().await,
                Some(next) if *watermark.borrow_and_update() > next => return Some(next),
                Some(_) => watermark.changed().await.ok()?,
            }
        }
    }

    /// Reads on from `next` and publishes what somebody subscribes to. `false` if it could not read.
    async fn serve(&mut self, store: &Store, next: u64) -> bool {
        let store = store.clone();
        let read = spawn_blocking(move || store.read(next, READ_EVENTS_MAX, READ_BYTES_MAX)).await;
        let read = match read {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => {
                tracing::warn!(%error, "subscribers wait: the log cannot be read");
                return false;
            }
            Err(error) => {
                tracing::error!(%error, "subscribers wait: reading the log panicked");
                return false;
            }
        };
        self.hand_out(&read.events, read.next).await;
        let mut table = lock(&self.downlink.0.table);
        // A subscription that was the first meanwhile has moved it already.
        table.next = table.next.max(read.next);
        read.next > next
    }

    /// Hands out what somebody subscribes to, and waits for those who get it, so that what comes next
    /// does not push this out of the router before they have taken it.
    pub(super) async fn hand_out(&mut self, mut events: &[StoredEvent], next: u64) {
        loop {
            let (Addressed { messages, kept }, rest) = self.downlink.address(events);
            let mut slots: Vec<usize> = messages.iter().map(|(turn, ..)| turn.slot).collect();
            slots.sort_unstable();
            slots.dedup();
            self.publish(messages).await;
            self.keep(kept, rest.first().map_or(next, |event| event.offset)).await;
            self.downlink.wait_for(&slots).await;
            if rest.is_empty() {
                return;
            }
            events = rest;
        }
    }

    /// Makes durable what sessions keep of the events before `next`, together with the note that they
    /// have it: after a crash nothing is kept twice, and nothing is missed.
    async fn keep(&mut self, mut kept: Keeping, next: u64) {
        let Some(ingest) = &self.ingest else { return };
        if kept.controls.is_empty() && next < self.served + SERVED_EVERY {
            return;
        }
        let note = next.to_le_bytes().to_vec();
        kept.controls.push(rows::put(rows::SERVED, Bytes::new(), note));
        self.served = next;
        // A commit that failed took nothing of it: it is tried until one does not.
        while !sessions::durable(ingest, kept.controls.clone()).await {
            sleep(READ_RETRY).await;
        }
        for (session, place) in kept.places {
            session.settled(place);
        }
    }

    async fn publish(&mut self, messages: Vec<(Turn, Manner, Bytes)>) {
        if messages.is_empty() {
            return;
        }
        // What cannot be handed over now is for nobody: a bus that has died has left all its users.
        let writer = match self.writer.take() {
            Some(writer) => writer,
            None => match Writer::open(&self.downlink).await {
                Ok(writer) => writer,
                Err(bus::Interrupted) => return,
            },
        };
        let downlink = self.downlink.clone();
        let put = spawn_blocking(move || downlink.publish(writer, messages));
        self.writer = put.await.unwrap_or_else(|error| {
            tracing::error!(%error, "publishing to the local bus panicked");
            None
        });
    }
}

impl Downlink {
    /// Hands messages to the router, and gives the writer back if it lives. Blocks.
    fn publish(&self, mut writer: Writer, messages: Vec<(Turn, Manner, Bytes)>) -> Option<Writer> {
        let published = messages.len() as u64;
        for (turn, manner, body) in messages {
            writer.put(turn.slot, envelope::label(turn, &manner), body).ok()?;
        }
        self.0.stats.published.fetch_add(published, Ordering::Relaxed);
        Some(writer)
    }
}

/// What a piece of the log is for whom.
#[derive(Default)]
pub(super) struct Addressed {
    /// For connections, by way of the router.
    pub(super) messages: Vec<(Turn, Manner, Bytes)>,
    kept: Keeping,
}

/// What sessions keep.
#[derive(Default)]
struct Keeping {
    controls: Vec<Control>,
    /// Where it stands, for when it is durable.
    places: Vec<(Arc<Kept>, u64)>,
}

impl Keeping {
    /// Offers a message to a session.
    fn offer(&mut self, kept: &Arc<Kept>, manner: Manner, message: Message) {
        let queued = Queued { packet_id: 0, manner, message: Some(message) };
        let place = kept.offer(queued, &mut self.controls);
        self.places.extend(place.map(|place| (kept.clone(), place)));
    }
}
