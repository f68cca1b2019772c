//! The shell around delivery: one task per sink that reads the log, sends, and moves the cursor.
//!
//! Owns: when to read, and the order of effects: a dead letter is durable before the cursor passes
//! it, and is one until its upstream has taken it; the cursor moves only over what `streams` calls
//! done. A range that is missing from the log is passed over with a warning; it stands in the loss
//! ledger. Who reads is in `reader`, what is asked of the store for dead letters in `letters`, what is
//! told of it in `report`.
//! Deliberately absent: decisions about requests (`delivery`), whose turn it is (`streams`), and
//! shared state between sinks.

mod letters;
mod reader;
mod report;

use std::sync::Arc;
use std::time::Instant;

use storage::{KeptLetter, Passed, Read, ReadError, SinkProgress, StateError, Store};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use self::letters::{Search, Written};
use self::reader::Reader;
use self::report::Report;
use crate::breaker::Circuit;
use crate::cloudevents::Envelope;
#[cfg(feature = "kafka")]
use crate::config::KafkaDelivery;
use crate::config::{Backlog, OnReject, SinkConfig, Target};
use crate::delivery::{Limits, Moment, Trouble};
use crate::file::FileSink;
use crate::http::HttpSink;
#[cfg(feature = "kafka")]
use crate::kafka::{KafkaSink, Place, TransactionalSink};
use crate::mqtt::MqttSink;
use crate::origin::Origin;
use crate::parked::Found;
use crate::replay::{Order, Replays, Running};
use crate::requeue::{Requeue, Settlement};
use crate::retry::Backoff;
use crate::sink::{Answer, OUTSIDE_ORDER, RequestId, Sink};
use crate::streams::{Key, Plan, ReadOrder, Seen, StreamStatus, Streams};

/// What a sink is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkState {
    /// Not yet connected.
    Starting,
    /// Everything that is durable has been delivered.
    Idle,
    /// Sending.
    Sending,
    /// The last request failed; it is tried again after a pause.
    Retrying {
        /// What went wrong.
        error: String,
    },
    /// The upstream refuses us (authentication, unknown topic ...): nothing is dropped, tried again
    /// slowly, and somebody must act.
    Held {
        /// What the upstream said, and what to do.
        error: String,
    },
    /// Its rate, windows or budget keep it from sending.
    Waiting {
        /// Which of them, and what goes all the same.
        reason: &'static str,
    },
    /// Shut down.
    Stopped,
}

/// A look at a sink. Counters are since the start of the process.
#[derive(Clone, Debug)]
pub struct SinkStatus {
    /// Name.
    pub name: String,
    /// `http`, `kafka`, `mqtt` or `file`.
    pub kind: &'static str,
    /// What it is doing.
    pub state: SinkState,
    /// Next offset that it needs: the end of the contiguous acknowledged prefix.
    pub cursor: u64,
    /// Its streams, where it has more than one.
    pub streams: Vec<StreamStatus>,
    /// Events acknowledged.
    pub delivered_events: u64,
    /// Event bytes acknowledged.
    pub delivered_bytes: u64,
    /// Events sent to the dead letters.
    pub dead_lettered_events: u64,
    /// Events that its filters kept from it.
    pub filtered_events: u64,
    /// Devices that wait behind an event of theirs that was refused.
    pub parked_devices: u64,
    /// Dead letters that were requeued and delivered after all.
    pub requeued_events: u64,
    /// Requests that failed and were tried again.
    pub retries: u64,
    /// Whether requests go to the upstream.
    pub circuit: Circuit,
    /// How often the circuit has opened.
    pub circuit_opened: u64,
    /// Last acknowledgement, microseconds since the Unix epoch.
    pub last_delivered_us: Option<u64>,
}

/// Reports how far a sink is: it needs nothing below its cursor any more. Must not block: the
/// committer coalesces moves and writes them with its next batch, a cursor and what was passed beside
/// it in one commit.
pub type MoveCursor = Arc<dyn Fn(&str, &SinkProgress) + Send + Sync>;

/// Tells a forwarder that dead letters of its sink were requeued or dropped. Does not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// One sink's task.
pub struct Forwarder {
    config: SinkConfig,
    origin: Origin,
    store: Store,
    watermark: watch::Receiver<u64>,
    report: Report,
    requeued: Arc<Notify>,
    progress: SinkProgress,
    replays: Replays,
    orders: mpsc::Receiver<Order>,
}

impl Forwarder {
    /// Prepares a forwarder that starts at the store's durable cursor, and goes on with what it has
    /// passed beside that; what of the latter cannot be read is sent again. `watermark` is a wake-up:
    /// it carries the durable end of the log.
    pub fn new(
        config: SinkConfig,
        origin: Origin,
        store: Store,
        watermark: watch::Receiver<u64>,
        move_cursor: MoveCursor,
    ) -> Self {
        let cursor = store.cursor(&config.name).unwrap_or_else(|| store.stats().first_offset);
        let passed = store.passed(&config.name).unwrap_or_else(|error| {
            tracing::error!(sink = config.name, %error, "events ahead of the cursor are sent again");
            Passed::default()
        });
        let progress = SinkProgress { cursor, passed };
        let kind = config.target.kind();
        let report = Report::new(&config.name, kind, progress.clone(), move_cursor);
        let (replays, orders) = Replays::new(&config.name);
        let requeued = Arc::default();
        Self { config, origin, store, watermark, report, requeued, progress, replays, orders }
    }

    /// What to call once dead letters of this sink were requeued or dropped in the store. Those that a restart
    /// left behind it finds by itself.
    pub fn wake(&self) -> Wake {
        let requeued = Arc::clone(&self.requeued);
        Arc::new(move || requeued.notify_one())
    }

    /// A view of the status that stays valid while the task runs, and after it.
    pub fn status(&self) -> watch::Receiver<SinkStatus> {
        self.report.subscribe()
    }

    /// The way to ask for a replay while the task runs.
    pub fn replays(&self) -> Replays {
        self.replays.clone()
    }

    /// Runs until cancelled; then lets the requests in flight end, within their timeout, and returns.
    ///
    /// # Panics
    /// Only on a bug of this package. Give it a task of its own, so that it ends nothing else.
    pub async fn run(mut self, shutdown: CancellationToken) {
        #[cfg(feature = "kafka")]
        let timeout = self.config.request_timeout;
        let envelope = Envelope::new(&self.origin, &self.config.event_type);
        match self.config.target.clone() {
            Target::Http(config) => {
                let sink = HttpSink::new(config, envelope, &self.origin, &self.config);
                // Where an event is a POST, a request is many of them.
                self.config.request_events_max = sink.request_events_max();
                self.drive(sink, shutdown).await;
            }
            #[cfg(feature = "kafka")]
            Target::Kafka(config) if config.delivery == KafkaDelivery::ExactlyOnce => {
                let place = Place::new(&self.origin, &self.config.name, &config);
                let store = self.store.clone();
                let log = Arc::new(move |from| store.read(from, 1, 1));
                let sink = TransactionalSink::new(config, envelope, place, log, timeout);
                self.drive(sink, shutdown).await;
            }
            #[cfg(feature = "kafka")]
            Target::Kafka(config) => {
                self.drive(KafkaSink::new(config, envelope, timeout), shutdown).await;
            }
            Target::Mqtt(config) => {
                let sink = MqttSink::new(config, envelope, &self.config);
                self.drive(sink, shutdown).await;
            }
            Target::File(config) => self.drive(FileSink::new(config, envelope), shutdown).await,
        }
    }

    async fn drive<S: Sink>(self, sink: S, shutdown: CancellationToken) {
        let config = self.config;
        let window = sink.window();
        let limits = Limits::new(config.request_events_max, config.request_bytes_max, window)
            .lingering(config.linger_max)
            .letters_first(S::KEEPS_CURSOR);
        let backoff = Backoff::new(config.retry_backoff_min, config.retry_backoff_max);
        let plan = Plan {
            filter: config.filter,
            event_type: config.event_type,
            lanes: config.lanes,
            live_first: match config.backlog {
                Backlog::InOrder => None,
                Backlog::LiveFirst { after } => Some(after),
            },
            backlog_share: f64::from(config.backlog_share_percent) / 100.0,
            shaping: config.shaping,
            parks: config.on_reject == OnReject::ParkDevice,
        };
        let name = config.name.clone();
        let streams =
            Streams::new(config.name, plan, limits, window, backoff.clone(), &self.progress);
        // A sink that keeps a cursor finds there where streams were split.
        let streams = if S::KEEPS_CURSOR { streams } else { streams.restarted() };
        let task = Task {
            sink,
            name: name.clone(),
            reader: Reader::new(self.store.clone(), &name),
            requeue: Requeue::new(name, limits, backoff),
            streams,
            limits,
            store: self.store,
            watermark: self.watermark,
            report: self.report,
            requeued: self.requeued,
            writing: None,
            looking: None,
            settling: None,
            searching: None,
            search: Search::default(),
            orders: self.orders,
            running: None,
        };
        task.run(shutdown).await;
    }
}

/// A forwarder at work: one owner of everything, one `select!`, then plain functions that change
/// state.
struct Task<S> {
    sink: S,
    name: String,
    streams: Streams,
    requeue: Requeue,
    limits: Limits,
    store: Store,
    watermark: watch::Receiver<u64>,
    report: Report,
    /// Dead letters were marked.
    requeued: Arc<Notify>,
    reader: Reader,
    /// Dead letters of a stream being made durable, on the blocking pool, and how many.
    writing: Option<JoinHandle<(Key, usize, Written)>>,
    /// A look for marked dead letters, on the blocking pool.
    looking: Option<JoinHandle<Result<Vec<KeptLetter>, StateError>>>,
    /// What came of them being made durable, on the blocking pool.
    settling: Option<JoinHandle<(Settlement, Result<(), StateError>)>>,
    /// A look through all dead letters for what is parked, on the blocking pool.
    searching: Option<JoinHandle<Result<Found, StateError>>>,
    search: Search,
    orders: mpsc::Receiver<Order>,
    /// Who is told of the replay that is under way.
    running: Option<Running>,
}

impl<S: Sink> Task<S> {
    async fn run(mut self, shutdown: CancellationToken) {
        let mut stopping = false;
        let mut watched = true;
        loop {
            let now = Moment::now();
            self.write_letters(now);
            self.settle_requeued(now);
            self.look_for_parked(now);
            if let Some(cursor) = self.store.cursor(&self.name) {
                self.report.missing(&self.streams.pass(cursor));
            }
            // One look a turn: a rise after it, and before the wait below, is a change that the
            // wait sees at once.
            let watermark = *self.watermark.borrow_and_update();
            let Seen { all_read: caught_up, waits_for_more } = self.streams.look(watermark, now);
            if !stopping {
                self.look_for_requeued(now);
                self.begin_requests(now);
                if !caught_up {
                    self.read_on(now);
                }
            }
            let all_begun = !self.reader.is_reading() && self.streams.in_flight() > 0;
            if all_begun || self.requeue.is_in_flight() {
                self.sink.close();
            }
            self.report.update(&self.streams, &self.requeue, caught_up, now);
            self.tell_replay();
            if stopping && self.is_quiet() {
                break;
            }
            let resumes =
                [self.streams.resumes_at(now), self.requeue.resumes_at(), self.search.not_before];
            let resumes = resumes.into_iter().flatten().filter(|&at| at > now.at && !stopping);
            let resumes_at = resumes.min();
            debug_assert!(
                caught_up || resumes_at.is_some() || !self.is_quiet(),
                "what is owed is under way, or waits for a time"
            );
            tokio::select! {
                () = shutdown.cancelled(), if !stopping => {
                    stopping = true;
                    self.sink.stop();
                }
                (id, answer) = self.sink.answer() => self.answered(id, &answer),
                (order, read) = self.reader.finished() => self.has_read(order, read),
                (key, count, result) = finished(&mut self.writing) => {
                    self.has_written(key, count, result);
                }
                letters = finished(&mut self.looking) => self.has_looked(letters),
                (settlement, result) = finished(&mut self.settling) => {
                    self.has_settled(&settlement, result);
                }
                found = finished(&mut self.searching) => self.has_searched(found),
                () = self.requeued.notified() => {
                    self.requeue.wake();
                    self.search.is_due = true;
                }
                // Only who has read all: a busy log is not to wake us with every commit.
                changed = self.watermark.changed(), if watched && waits_for_more => {
                    watched = changed.is_ok();
                }
                // Nothing comes where nobody can ask any more.
                Some(order) = self.orders.recv(), if self.running.is_none() && !stopping => {
                    self.replay(order);
                }
                () = abandoned(self.running.as_ref()) => self.streams.cancel_replay(),
                () = sleep_until(resumes_at) => {}
            }
        }
        // A producer's threads end while it is dropped: not where other tasks run.
        let (sink, reader) = (self.sink, self.reader);
        let end = move || {
            drop(sink);
            reader.end();
        };
        joined(tokio::task::spawn_blocking(end).await);
        self.report.stopped();
    }

    /// Whether nothing is under way any more. Dead letters that the store does not take now are
    /// found again from the cursor.
    fn is_quiet(&self) -> bool {
        self.streams.in_flight() == 0
            && !self.requeue.is_in_flight()
            && !self.reader.is_reading()
            && self.writing.is_none()
            && self.looking.is_none()
            && self.settling.is_none()
            && self.searching.is_none()
    }

    fn replay(&mut self, order: Order) {
        let Order { again, running } = order;
        let (from, to) = (again.offsets.start, again.offsets.end);
        tracing::info!(sink = self.name, from, to, "a replay begins");
        self.streams.replay(again);
        self.running = Some(running);
    }

    /// Says how far the replay is, and that it has ended.
    fn tell_replay(&mut self) {
        if let (Some(progress), Some(running)) = (self.streams.replay_progress(), &self.running) {
            running.tell(progress);
        }
        if let Some(end) = self.streams.take_replay_end()
            && let Some(running) = self.running.take()
        {
            tracing::info!(
                sink = self.name,
                delivered_events = end.delivered_events,
                refused_events = end.refused_events,
                "the replay has ended"
            );
            running.tell(end);
        }
    }

    fn begin_requests(&mut self, now: Moment) {
        if self.requeue.is_in_flight() {
            return;
        }
        // An upstream that fails is tried with the events whose order matters.
        let is_calm = match self.streams.troubled_until() {
            None => true,
            // Unless those wait for what was held back.
            Some(at) => self.streams.waits_for_parked() && now.at >= at,
        };
        let may_requeue = is_calm && self.streams.lets_others(now);
        if may_requeue && self.requeue.is_waiting(now) {
            if self.streams.in_flight() > 0 {
                return;
            }
            if let Some(request) = self.requeue.next_request(now) {
                self.streams.others_sent(request.size_bytes(), now);
                self.sink.begin(request);
                return;
            }
        }
        if self.streams.waits_for_parked() {
            return;
        }
        while let Some(request) = self.streams.next_request(now) {
            if request.id < OUTSIDE_ORDER {
                self.sink.begin_reaching(request, || self.streams.reach());
            } else {
                self.sink.begin(request);
            }
        }
    }

    fn read_on(&mut self, now: Moment) {
        if self.reader.is_reading() || self.streams.waits_for_parked() {
            return;
        }
        let Some(order) = self.streams.next_read(now) else { return };
        if let Err(error) = self.reader.begin(order) {
            self.store_failed(order.key, format!("no thread to read the log with: {error}"));
        }
    }

    fn has_read(&mut self, order: ReadOrder, read: Result<Read, ReadError>) {
        match read {
            Ok(read) => {
                self.report.missing(&read.missing);
                if !self.streams.push(order, read) {
                    let reason = format!("the log gave nothing at offset {}", order.from);
                    self.store_failed(order.key, reason);
                }
            }
            Err(error) => self.store_failed(order.key, error.to_string()),
        }
    }

    fn answered(&mut self, id: RequestId, answer: &Answer) {
        let (now, random) = (Moment::now(), fastrand::f64());
        if self.streams.carries(id) {
            self.streams.answer(id, answer, now, random);
        } else {
            let busy = !self.streams.is_idle() && !self.streams.waits_for_parked();
            self.requeue.answer(id, answer, busy, now, random);
        }
        if let Some(found) = self.sink.found() {
            self.streams.split_as(found);
        }
    }

    fn store_failed(&mut self, key: Key, reason: String) {
        let now = Moment::now();
        self.report.complain(&Trouble::Store(reason.clone()), now);
        self.streams.store_failed(key, reason, now, fastrand::f64());
    }
}

/// Waits for a job on the blocking pool; pends while there is none. Cancel-safe.
async fn finished<T>(job: &mut Option<JoinHandle<T>>) -> T {
    match job {
        Some(handle) => {
            let outcome = handle.await;
            *job = None;
            joined(outcome)
        }
        None => std::future::pending().await,
    }
}

/// What a job gave; its panic goes on in this task.
fn joined<T>(outcome: Result<T, JoinError>) -> T {
    outcome.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// Waits until nobody watches the replay any more; pends while there is none.
async fn abandoned(running: Option<&Running>) {
    match running {
        Some(running) => running.abandoned().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
