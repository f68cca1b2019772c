//! From the durable log to the subscribers: the follower, the local bus, and each connection's inbox.
//!
//! Owns: the subscription table, the in-process `rumqttd` router, the place up to which the log has
//! been served.
//! Invariant: only what is durable is served, in log order per topic; a message that a subscriber
//! misses because it does not keep up is counted, never silent.
//! Deliberately absent: QoS, packet ids, options: the connection decides about each message.
//!
//! The router only fans out. It sees neither the clients' filters nor their topics, but one internal
//! topic per subscribed filter (`f/<slot>`, ASCII, reused), with an [`Envelope`] as payload: its
//! matcher panics on some names, and it keeps what it has once matched for ever. It never waits for
//! a link, and forgets what a slow one has not read; so the follower stops short of that, for
//! [`PATIENCE`] at most, for every subscriber that keeps up. Should it die, it is replaced, and the
//! connections that used it close, so that their clients subscribe again.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytestring::ByteString;
use rumqttd::local::{LinkBuilder, LinkError, LinkRx, LinkTx};
use rumqttd::protocol::{Disconnect, DisconnectReasonCode, Packet};
use rumqttd::{Notification, Router, RouterConfig};
use storage::{Attribute, Control, Store, StoredEvent};
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::envelope::{self, Envelope};
use super::reason;
use super::rows::{self, Message, Queued};
use super::sessions::{self, Kept};
use super::subscriptions::{Choice, Entry, Full, Matched, Subscriptions, Turn, Watcher};
use super::topic;
use crate::ingest::Ingest;

/// Filters of one connection, at most.
pub const SUBSCRIPTIONS_MAX: usize = 256;

/// How long the follower waits for a subscriber that has fallen behind before it goes on without.
pub const PATIENCE: Duration = Duration::from_millis(20);

/// A segment of the router's log of one filter: it keeps the last one and the one being filled.
const SEGMENT_BYTES: u64 = 256 * 1024;

/// What a subscriber that keeps up may have untaken before more is published for its filter.
const UNTAKEN_BYTES_MAX: u64 = SEGMENT_BYTES / 2;

/// Event bytes read from the log and published at once, about.
const READ_BYTES_MAX: usize = 64 * 1024;

/// Events read from the log at once, at most.
const READ_EVENTS_MAX: usize = 512;

/// Wait before the log is read again after it could not be.
const READ_RETRY: Duration = Duration::from_secs(1);

/// A router that has not answered in this time counts as dead.
const ROUTER_ANSWERS: Duration = Duration::from_secs(2);

/// Connections that the router is asked for at a time. Each blocks a thread, and the router answers
/// one by one: in a storm of subscribers the others wait without one.
const ROUTER_CALLS_MAX: usize = 8;

/// Notifications that the router hands to a link at once.
const ROUTER_BATCH: u64 = 100;

/// The durable note of how far sessions were served is renewed after so many events of which none was
/// for any: a restart reads what came after it again.
const SERVED_EVERY: u64 = 16 * 1024;

/// Attribute of an event whose publisher must not get it back ([MQTT-3.8.3-3]): its client id.
pub const PUBLISHER: u8 = 64;

/// Counters of the downlink.
#[derive(Debug, Default)]
pub struct DownlinkStats {
    /// Messages handed to the router.
    pub published: AtomicU64,
    /// Messages that subscribers missed because they did not keep up.
    pub missed: AtomicU64,
    /// Times that the router was replaced.
    pub respawns: AtomicU64,
}

/// The connections' side of the downlink. Cheap to clone.
#[derive(Clone)]
pub struct Downlink(Arc<Shared>);

struct Shared {
    table: Mutex<Table>,
    /// See [`Subscriptions::changes`].
    changes: Arc<AtomicU64>,
    connect: Mutex<Connect>,
    watermark: watch::Receiver<u64>,
    /// Somebody has subscribed to the first filter.
    subscribed: Notify,
    /// A subscriber has taken messages.
    taken: Notify,
    /// See [`ROUTER_CALLS_MAX`].
    calls: Semaphore,
    links_max: usize,
    stats: DownlinkStats,
}

#[derive(Default)]
struct Table {
    subscriptions: Subscriptions,
    /// Next offset to serve; means something only while anybody subscribes.
    next: u64,
    /// Which names of links are in use.
    link_names: Vec<bool>,
    last_connection: u64,
}

/// Connects a link of this name to the router of the day, whose channel has a type without a name.
type Connect = Arc<dyn Fn(&str) -> Result<(LinkTx, LinkRx), NoLink> + Send + Sync>;

/// Why there is no link.
enum NoLink {
    /// The router takes no more questions.
    Dead,
    /// It died with this one, or refused it.
    Unanswered,
}

fn spawn_router(links_max: usize) -> Connect {
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

/// The guarded data stays sound at every step: a panic elsewhere is no reason to stop serving.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn internal_topic(slot: usize) -> String {
    format!("f/{slot}")
}

impl Downlink {
    /// A downlink for at most `links_max` subscribing connections, behind a log whose watermark
    /// `watermark` tells. [`Downlink::follow`] makes it run.
    pub fn new(watermark: watch::Receiver<u64>, links_max: usize) -> Self {
        let table = Table::default();
        Self(Arc::new(Shared {
            changes: table.subscriptions.changes(),
            table: Mutex::new(table),
            connect: Mutex::new(spawn_router(links_max)),
            watermark,
            subscribed: Notify::new(),
            taken: Notify::new(),
            calls: Semaphore::new(ROUTER_CALLS_MAX),
            links_max,
            stats: DownlinkStats::default(),
        }))
    }

    /// Counters.
    pub fn stats(&self) -> &DownlinkStats {
        &self.0.stats
    }

    /// Moves whenever filters have come or gone: until then [`Downlink::has_subscriber`] says the same
    /// of a topic.
    pub fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::Relaxed)
    }

    /// Whether anybody subscribes to a topic.
    pub fn has_subscriber(&self, topic: &str) -> bool {
        lock(&self.0.table).subscriptions.has_any(topic)
    }

    /// The inbox of one connection.
    pub fn inbox(&self) -> Inbox {
        let mut table = lock(&self.0.table);
        table.last_connection += 1;
        Inbox {
            downlink: self.clone(),
            connection: table.last_connection,
            link: None,
            by_text: HashMap::new(),
            by_number: HashMap::new(),
        }
    }

    /// Adds a session to a filter, or changes what it asked for. What stands before offset `from` is
    /// not for it; gives that offset, which stays that of the first time.
    ///
    /// # Errors
    /// [`Full`].
    pub fn watch(
        &self,
        text: &str,
        kept: &Arc<Kept>,
        options: Options,
        from: u64,
    ) -> Result<u64, Full> {
        let mut table = lock(&self.0.table);
        let first = table.subscriptions.is_empty();
        let watcher = Watcher { kept: kept.clone(), options, from };
        let from = table.subscriptions.watch(text, watcher)?;
        if first {
            table.next = from;
            self.0.subscribed.notify_one();
        }
        Ok(from)
    }

    /// Takes a session off a filter.
    pub fn unwatch(&self, text: &str, kept: &Arc<Kept>) {
        lock(&self.0.table).subscriptions.unwatch(text, kept);
    }

    /// After a restart, before anything is served: the log is to be read from this offset on.
    pub fn serve_from(&self, offset: u64) {
        lock(&self.0.table).next = offset;
    }

    /// The durable end of the log now: where a subscription begins.
    pub fn watermark(&self) -> u64 {
        *self.0.watermark.borrow()
    }

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
}

/// Reads the log behind the watermark and publishes to the router.
struct Follower {
    downlink: Downlink,
    /// The writing side, and the reading side that keeps it open.
    link: Option<(LinkTx, LinkRx)>,
    /// Where what sessions keep is made durable.
    ingest: Option<Ingest>,
    /// How far the durable note says that sessions were served.
    served: u64,
}

impl Follower {
    fn new(downlink: Downlink, ingest: Option<Ingest>) -> Self {
        Self { downlink, link: None, ingest, served: 0 }
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

    /// Publishes what somebody subscribes to, and waits for its subscribers, so that what comes next
    /// does not push this out of the router before they have taken it.
    async fn hand_out(&mut self, events: &[StoredEvent], next: u64) {
        let Addressed { messages, slots, kept } = self.downlink.address(events);
        self.publish(messages).await;
        self.keep(kept, next).await;
        self.downlink.wait_for(&slots).await;
    }

    /// Makes durable what sessions keep of the events before `next`, together with the note that they
    /// have it: after a crash nothing is kept twice, and nothing is missed.
    async fn keep(&mut self, mut kept: Keeping, next: u64) {
        let Some(ingest) = &self.ingest else { return };
        if kept.controls.is_empty() && next < self.served + SERVED_EVERY {
            return;
        }
        let note = next.to_le_bytes().to_vec();
        kept.controls.push(rows::put(rows::SERVED, bytes::Bytes::new(), note));
        self.served = next;
        // A commit that failed took nothing of it: it is tried until one does not.
        while !sessions::durable(ingest, kept.controls.clone()).await {
            sleep(READ_RETRY).await;
        }
        for (session, place) in kept.places {
            session.settled(place);
        }
    }

    async fn publish(&mut self, messages: Vec<(Turn, bytes::Bytes)>) {
        if messages.is_empty() {
            return;
        }
        // What cannot be handed over now is for nobody: a bus that has died has left all its users.
        let link = match self.link.take() {
            Some(link) => link,
            None => match self.downlink.connect("follower".to_owned()).await {
                Ok(link) => link,
                Err(Interrupted) => return,
            },
        };
        let downlink = self.downlink.clone();
        self.link = spawn_blocking(move || downlink.publish(link, &messages)).await.unwrap_or_else(
            |error| {
                tracing::error!(%error, "publishing to the local bus panicked");
                None
            },
        );
    }
}

/// What a piece of the log is for whom.
#[derive(Default)]
struct Addressed {
    /// For the router.
    messages: Vec<(Turn, bytes::Bytes)>,
    /// The filters that they are for.
    slots: Vec<usize>,
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
    /// Offers an event to a session. `copy` is the event's copy, made for the first that takes it and
    /// shared by all.
    fn offer(&mut self, watcher: &Watcher, stored: &StoredEvent, copy: &mut Option<Message>) {
        if stored.offset < watcher.from {
            return;
        }
        let (kept, options, event) = (&watcher.kept, watcher.options, &stored.event);
        let (mut qos, mut retain) = (0, false);
        for attribute in event.attributes.iter() {
            match attribute {
                Attribute::QoS(published) => qos = published.min(options.qos),
                Attribute::Retain => retain = options.retain_as_published,
                Attribute::Unknown(PUBLISHER, id)
                    if options.no_local && id == kept.client_id().as_bytes() =>
                {
                    return;
                }
                _ => {}
            }
        }
        if qos == 0 && !kept.is_online() {
            return;
        }
        let message = copy.get_or_insert_with(|| Message::of(event)).clone();
        let queued = Queued {
            packet_id: 0,
            qos,
            retain,
            subscription_id: options.id,
            message: Some(message),
        };
        let place = kept.offer(queued, &mut self.controls);
        self.places.extend(place.map(|place| (kept.clone(), place)));
    }
}

impl Downlink {
    /// What to do about these events.
    fn address(&self, events: &[StoredEvent]) -> Addressed {
        let mut guard = lock(&self.0.table);
        let subscriptions = &mut guard.subscriptions;
        let (mut matched, mut addressed) = (Matched::default(), Addressed::default());
        for stored in events {
            let event = &stored.event;
            let mut copy = None;
            subscriptions.matches(&event.topic, &mut matched);
            for &slot in &matched.slots {
                for watcher in subscriptions.watchers(slot) {
                    addressed.kept.offer(watcher, stored, &mut copy);
                }
            }
            for &group in &matched.groups {
                match subscriptions.choose(group) {
                    Some(Choice::Slot(slot)) => matched.slots.push(slot),
                    Some(Choice::Kept(watcher)) => {
                        addressed.kept.offer(&watcher, stored, &mut copy);
                    }
                    None => {}
                }
            }
            for &slot in &matched.slots {
                let Some(turn) = subscriptions.turn(slot, envelope::size_bytes(event)) else {
                    continue;
                };
                addressed.messages.push((turn, envelope::encode(stored, turn)));
                if !addressed.slots.contains(&slot) {
                    addressed.slots.push(slot);
                }
            }
        }
        addressed
    }

    /// Waits, with [`PATIENCE`], for the subscribers of these filters.
    async fn wait_for(&self, slots: &[usize]) {
        let in_reach = || lock(&self.0.table).subscriptions.in_reach(slots, UNTAKEN_BYTES_MAX);
        let all = async {
            while !in_reach() {
                self.0.taken.notified().await;
            }
        };
        if timeout(PATIENCE, all).await.is_err() {
            lock(&self.0.table).subscriptions.leave_behind(slots, UNTAKEN_BYTES_MAX);
        }
    }

    /// Hands messages to the router, and gives the link back if it lives. Blocks.
    fn publish(
        &self,
        (mut tx, rx): (LinkTx, LinkRx),
        messages: &[(Turn, bytes::Bytes)],
    ) -> Option<(LinkTx, LinkRx)> {
        for (turn, envelope) in messages {
            tx.publish(internal_topic(turn.slot), envelope.clone()).ok()?;
        }
        let published = messages.len() as u64;
        self.0.stats.published.fetch_add(published, Ordering::Relaxed);
        Some((tx, rx))
    }

    /// Connects to the router, to a new one if it has died.
    async fn connect(&self, name: String) -> Result<(LinkTx, LinkRx), Interrupted> {
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

    async fn open_link(&self) -> Result<Link, Interrupted> {
        let name = LinkName::take(self)?;
        let (tx, rx) = self.connect(format!("inbox-{}", name.number)).await?;
        Ok(Link { tx, rx, unscheduled: false, early: VecDeque::new(), _name: name })
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

/// The name of a link, for as long as it is in use: the router remembers every name that it has
/// seen, so that they are numbered, and the lowest free number comes first.
struct LinkName {
    downlink: Downlink,
    number: usize,
}

impl LinkName {
    fn take(downlink: &Downlink) -> Result<Self, Interrupted> {
        let used = &mut lock(&downlink.0.table).link_names;
        let number = used.iter().position(|used| !used).unwrap_or(used.len());
        if number >= downlink.0.links_max {
            return Err(Interrupted);
        }
        if number == used.len() {
            used.push(true);
        }
        used[number] = true;
        Ok(Self { downlink: downlink.clone(), number })
    }
}

impl Drop for LinkName {
    fn drop(&mut self) {
        lock(&self.downlink.0.table).link_names[self.number] = false;
    }
}

/// A connection's link to the router; says goodbye when it is dropped, which nothing else would.
struct Link {
    tx: LinkTx,
    rx: LinkRx,
    /// The router waits for a word before it hands over more.
    unscheduled: bool,
    /// What came while an answer was waited for.
    early: VecDeque<Notification>,
    /// Given back after the goodbye.
    _name: LinkName,
}

impl Link {
    /// Subscribes, and waits until the router has: it may take what is published later over one
    /// link before what was sent to it earlier over another. Blocks.
    fn subscribe(&mut self, topics: &[String]) -> Result<(), Interrupted> {
        for topic in topics {
            self.tx.subscribe(topic).map_err(lost)?;
            self.await_ack()?;
        }
        Ok(())
    }

    /// Unsubscribes, and waits until the router has. Blocks.
    fn unsubscribe(&mut self, topics: &[String]) -> Result<(), Interrupted> {
        for topic in topics {
            self.tx.unsubscribe(topic).map_err(lost)?;
            self.await_ack()?;
        }
        Ok(())
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
    async fn next(&mut self) -> Result<Notification, Interrupted> {
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
        let goodbye = self.tx.send(Packet::Disconnect(Disconnect { reason_code }, None));
        // It has no point at which it could wait: one poll does all of it. The router takes from its
        // channel whatever its links do, so that the send inside is short.
        let sent = pin!(goodbye).poll(&mut Context::from_waker(Waker::noop()));
        debug_assert!(sent.is_ready());
    }
}

/// What a client asked for with one subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Highest QoS to deliver with.
    pub qos: u8,
    /// Not what the client itself published [MQTT-3.8.3-3].
    pub no_local: bool,
    /// Keep the publisher's retain flag [MQTT-3.3.1-13].
    pub retain_as_published: bool,
    /// Subscription identifier.
    pub id: Option<u32>,
}

#[derive(Debug)]
struct Subscription {
    entry: Entry,
    options: Options,
    /// What stands before this offset was published before it, and is not for it: the follower may
    /// be behind.
    from: u64,
    /// Next message expected; `None` before the first.
    seq: Option<u64>,
}

/// The subscriptions of one connection, and what arrives for them.
pub struct Inbox {
    downlink: Downlink,
    connection: u64,
    link: Option<Link>,
    by_text: HashMap<ByteString, u64>,
    by_number: HashMap<u64, Subscription>,
}

/// The router has died or thrown the link out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted;

/// Whatever a link complains of, it is of no more use.
fn lost(_: LinkError) -> Interrupted {
    Interrupted
}

impl Inbox {
    /// Whether there is a subscription to this filter.
    pub fn has(&self, filter: &str) -> bool {
        self.by_text.contains_key(filter)
    }

    /// Whether any subscription asks not to get what its client published.
    pub fn has_no_local(&self) -> bool {
        self.by_number.values().any(|subscription| subscription.options.no_local)
    }

    /// Subscribes to filters, valid ones, and gives the SUBACK code of each. What is published after
    /// this returns will be delivered.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub async fn subscribe(
        &mut self,
        filters: &[(ByteString, Options)],
    ) -> Result<Vec<u8>, Interrupted> {
        let mut codes = Vec::with_capacity(filters.len());
        let mut new = Vec::new();
        for (text, options) in filters {
            codes.push(self.enter(text, *options, &mut new));
        }
        if !new.is_empty() {
            let topics: Vec<_> = new.iter().map(|&slot| internal_topic(slot)).collect();
            self.with_link(move |link| link.subscribe(&topics)).await?;
        }
        Ok(codes)
    }

    /// Enters one filter; its slot goes to `new` if the router has to hear of it.
    fn enter(&mut self, text: &ByteString, options: Options, new: &mut Vec<usize>) -> u8 {
        if topic::is_shared(text) && topic::shared(text).is_none() {
            return reason::FILTER_INVALID;
        }
        if let Some(number) = self.by_text.get(text) {
            // [MQTT-3.8.4-3]: it replaces the one before.
            if let Some(subscription) = self.by_number.get_mut(number) {
                subscription.options = options;
            }
            return options.qos;
        }
        if self.by_text.len() >= SUBSCRIPTIONS_MAX {
            return reason::QUOTA_EXCEEDED;
        }
        let entry = {
            let mut table = lock(&self.downlink.0.table);
            let first = table.subscriptions.is_empty();
            match table.subscriptions.add(text, self.connection) {
                Err(Full) => return reason::QUOTA_EXCEEDED,
                Ok(entry) => {
                    if first {
                        table.next = table.next.max(*self.downlink.0.watermark.borrow());
                        self.downlink.0.subscribed.notify_one();
                    }
                    entry
                }
            }
        };
        new.push(entry.slot);
        // A copy: the filter lives longer than the read buffer that it came in.
        self.by_text.insert(ByteString::from(&**text), entry.number);
        // Who joins a group gets its turn at all that the group has not had.
        let from = if topic::is_shared(text) { 0 } else { self.downlink.watermark() };
        self.by_number.insert(entry.number, Subscription { entry, options, from, seq: None });
        options.qos
    }

    /// Unsubscribes, and gives the UNSUBACK code of each filter.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub async fn unsubscribe(&mut self, filters: &[ByteString]) -> Result<Vec<u8>, Interrupted> {
        let mut codes = Vec::with_capacity(filters.len());
        let mut gone = Vec::new();
        for text in filters {
            let number = self.by_text.remove(text);
            codes.push(match number.and_then(|number| self.by_number.remove(&number)) {
                None => reason::NO_SUBSCRIPTION_EXISTED,
                Some(subscription) => {
                    gone.push(subscription.entry.slot);
                    reason::SUCCESS
                }
            });
        }
        if !gone.is_empty() {
            let topics: Vec<_> = gone.iter().map(|&slot| internal_topic(slot)).collect();
            self.with_link(move |link| link.unsubscribe(&topics)).await?;
            // Only now: a slot that is taken anew must be out of this link before.
            self.leave(gone);
        }
        Ok(codes)
    }

    fn leave(&self, slots: impl IntoIterator<Item = usize>) {
        let mut table = lock(&self.downlink.0.table);
        for slot in slots {
            table.subscriptions.remove(slot, self.connection);
        }
    }

    /// Does something with the link, which may block, opening it first.
    async fn with_link(
        &mut self,
        f: impl FnOnce(&mut Link) -> Result<(), Interrupted> + Send + 'static,
    ) -> Result<(), Interrupted> {
        let _call = self.downlink.0.calls.acquire().await.map_err(|_| Interrupted)?;
        let mut link = match self.link.take() {
            Some(link) => link,
            None => self.downlink.open_link().await?,
        };
        let done = spawn_blocking(move || f(&mut link).ok().map(|()| link)).await;
        self.link = done.ok().flatten();
        if self.link.is_some() { Ok(()) } else { Err(Interrupted) }
    }

    /// The next message for this connection, and the options of the subscription that it matched.
    /// Waits for ever without a subscription. Cancel safe.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub async fn next(&mut self) -> Result<(Envelope, Options), Interrupted> {
        loop {
            let Some(link) = &mut self.link else {
                return std::future::pending().await;
            };
            match link.next().await? {
                Notification::Forward(forward) => {
                    let envelope = Envelope::decode(forward.publish.payload);
                    if let Some(message) = envelope.and_then(|envelope| self.take(envelope)) {
                        return Ok(message);
                    }
                }
                Notification::Disconnect(..) => return Err(Interrupted),
                _ => {}
            }
        }
    }

    /// The next message, if there is one at hand.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub fn try_next(&mut self) -> Option<Result<(Envelope, Options), Interrupted>> {
        match pin!(self.next()).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(message) => Some(message),
            Poll::Pending => None,
        }
    }

    /// Says how far this subscriber is, and counts what it missed. `None` for what was on its way
    /// when the subscription ended, or before it began.
    fn take(&mut self, envelope: Envelope) -> Option<(Envelope, Options)> {
        let subscription = self.by_number.get_mut(&envelope.number)?;
        let missed = envelope.seq.saturating_sub(subscription.seq.unwrap_or(envelope.seq));
        if missed > 0 {
            self.downlink.0.stats.missed.fetch_add(missed, Ordering::Relaxed);
        }
        subscription.seq = Some(envelope.seq + 1);
        subscription.entry.progress.set(envelope.end);
        self.downlink.0.taken.notify_one();
        (envelope.offset >= subscription.from).then_some((envelope, subscription.options))
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        // The link goes first, for the same reason as in `unsubscribe`.
        self.link = None;
        self.leave(self.by_number.values().map(|subscription| subscription.entry.slot));
    }
}

#[cfg(test)]
mod tests;
