//! Forwarders between a real store and upstreams on loopback.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::http::StatusCode;
use serde_json::Value;
use storage::{AtQuota, DeadLetter, SinkRetention, StoreOptions, Writer};
use tokio::task::JoinSet;

use super::*;
use crate::config::{FileConfig, HttpConfig};
use crate::fake::{self, Upstream, reply};
use crate::sink::{Request, Window};

/// A store, its writer, and what the gateway would put around them.
struct Log {
    store: Store,
    writer: Writer,
    watermark: watch::Sender<u64>,
    cursors: Arc<Mutex<Vec<(String, SinkProgress)>>>,
}

impl Log {
    fn open(dir: &Path, sinks: &[&str]) -> Self {
        Self::with(Self::options(dir, sinks))
    }

    fn options(dir: &Path, sinks: &[&str]) -> StoreOptions {
        StoreOptions {
            dir: dir.join("data"),
            partitions: 1,
            sinks: sinks.iter().copied().map(SinkRetention::new).collect(),
            file_bytes_max: 1 << 20,
            cache_bytes: 1 << 20,
            quota_bytes: 1 << 30,
            free_bytes_min: 0,
            at_quota: AtQuota::Hold,
            retain_bytes: 0,
            retain_age_us: 0,
            dead_letter_bytes_max: 1 << 20,
            journal: storage::JournalMode::Off,
            journal_bytes: 32 << 20,
            commits_ahead_max: 2,
            compression: storage::Compression::None,
        }
    }

    fn with(options: StoreOptions) -> Self {
        let (store, writer) = Store::open(options, 1).expect("a store");
        let watermark = watch::Sender::new(store.mark().watermark);
        Self { store, writer, watermark, cursors: Arc::default() }
    }

    /// Commits events of three devices in turn, numbered by their sequence number.
    fn append(&mut self, count: u64) {
        let from = self.store.mark().watermark;
        let event = |n: u64| fake::event(&format!("dev-{}", n % 3), &format!("{{\"n\":{n}}}"));
        let events: Vec<_> = (from..from + count).map(event).collect();
        self.writer.commit(&events, &[], 1).expect("committed");
        self.watermark.send_replace(self.store.mark().watermark);
    }

    fn forwarder(&self, config: SinkConfig) -> Forwarder {
        let cursors = Arc::clone(&self.cursors);
        let move_cursor: MoveCursor =
            Arc::new(move |sink, to| cursors.lock().unwrap().push((sink.into(), to.clone())));
        let origin = fake::origin();
        Forwarder::new(config, origin, self.store.clone(), self.watermark.subscribe(), move_cursor)
    }

    /// Makes dead letters of all that is stored, as if the sink had refused it, and requeues them.
    fn requeue_all(&mut self, sink: &str) {
        let events = self.store.read(0, usize::MAX, usize::MAX).expect("readable").events;
        let letters = events.into_iter().map(|event| DeadLetter {
            sink: sink.to_owned(),
            event,
            reason: "400".into(),
            attempts: 1,
            first_us: 1,
            last_us: 1,
        });
        self.store.put_dead_letters(&letters.collect::<Vec<_>>()).expect("written");
        let end = self.store.mark().watermark;
        self.cursors.lock().unwrap().push((sink.to_owned(), end.into()));
        self.commit_cursors();
        self.store.requeue(sink, 0, &|_| true, 1_000).expect("marked");
    }

    /// Makes the cursors that were moved durable, as the committer would.
    fn commit_cursors(&mut self) {
        let moves = std::mem::take(&mut *self.cursors.lock().unwrap());
        let moves: Vec<_> = moves
            .into_iter()
            .flat_map(|(sink, SinkProgress { cursor: offset, passed })| {
                let passed = passed.control(&sink);
                [storage::Control::Cursor { sink: sink.into(), offset }, passed]
            })
            .collect();
        self.writer.commit(&[], &moves, 1).expect("committed");
    }
}

fn http(name: &str, url: &str) -> SinkConfig {
    SinkConfig {
        request_events_max: 10,
        retry_backoff_min: Duration::from_millis(1),
        retry_backoff_max: Duration::from_millis(20),
        ..SinkConfig::new(name, Target::Http(HttpConfig::new(url)))
    }
}

/// Running forwarders; stops them in order.
struct Running {
    tasks: JoinSet<()>,
    shutdown: CancellationToken,
}

impl Running {
    fn start(forwarders: impl IntoIterator<Item = Forwarder>) -> Self {
        let (mut tasks, shutdown) = (JoinSet::new(), CancellationToken::new());
        for forwarder in forwarders {
            tasks.spawn(forwarder.run(shutdown.clone()));
        }
        Self { tasks, shutdown }
    }

    async fn stop(mut self) {
        self.shutdown.cancel();
        while let Some(outcome) = self.tasks.join_next().await {
            outcome.expect("no panic");
        }
    }
}

async fn until(
    status: &mut watch::Receiver<SinkStatus>,
    reached: impl FnMut(&SinkStatus) -> bool,
) -> SinkStatus {
    status.wait_for(reached).await.expect("the forwarder lives").clone()
}

#[tokio::test]
async fn what_is_stored_and_what_comes_later_is_delivered_in_order() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["cloud"]);
    log.append(95);
    let upstream = Upstream::start(|_| reply(204)).await;
    let forwarder = log.forwarder(http("cloud", &upstream.url));
    let mut status = forwarder.status();
    assert_eq!(status.borrow().state, SinkState::Starting);
    let running = Running::start([forwarder]);
    let seen = until(&mut status, |s| s.state == SinkState::Idle).await;
    assert_eq!((seen.cursor, seen.delivered_events), (95, 95));
    assert!(seen.last_delivered_us.is_some());
    for _ in 0..20 {
        log.append(3);
    }
    let seen = until(&mut status, |s| s.cursor == 155).await;
    running.stop().await;
    assert_eq!(seen.retries, 0);
    assert_eq!(upstream.seqs(), (0..155).collect::<Vec<_>>());
    assert_eq!(status.borrow().state, SinkState::Stopped);
    assert_eq!(log.cursors.lock().unwrap().last(), Some(&("cloud".to_owned(), 155.into())));
    assert!(upstream.accepted().iter().all(|received| received.seqs().len() <= 10));
}

#[tokio::test]
async fn an_outage_loses_nothing_and_is_visible() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["cloud"]);
    let upstream = Upstream::start(|_| reply(503)).await;
    let forwarder = log.forwarder(http("cloud", &upstream.url));
    let mut status = forwarder.status();
    let running = Running::start([forwarder]);
    log.append(50);
    let seen = until(&mut status, |s| s.retries > 3).await;
    assert!(matches!(&seen.state, SinkState::Retrying { error } if error.contains("503")));
    assert_eq!(seen.cursor, 0);
    assert!(seen.circuit != Circuit::Closed && seen.circuit_opened > 0, "{seen:?}");
    // Down, up, and down in the middle.
    let mut count = 0;
    upstream.behave(move |_| {
        count += 1;
        reply(if count == 3 || count == 4 { 500 } else { 200 })
    });
    let seen = until(&mut status, |s| s.cursor == 50 && s.state == SinkState::Idle).await;
    assert_eq!(seen.circuit, Circuit::Closed);
    running.stop().await;
    assert_eq!(upstream.seqs(), (0..50).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_dead_sink_does_not_touch_the_other() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["dead", "file"]);
    log.append(100);
    let upstream = Upstream::start(|_| reply(401)).await;
    let path = dir.path().join("events.ndjson");
    let dead = log.forwarder(http("dead", &upstream.url));
    let file = log.forwarder(SinkConfig::new("file", Target::File(FileConfig::new(&path))));
    let (mut dead_status, mut file_status) = (dead.status(), file.status());
    let running = Running::start([dead, file]);
    let held = until(&mut dead_status, |s| matches!(s.state, SinkState::Held { .. })).await;
    until(&mut file_status, |s| s.cursor == 100).await;
    running.stop().await;
    assert_eq!((held.cursor, held.dead_lettered_events), (0, 0));
    let text = std::fs::read_to_string(path).expect("a file");
    let data = |line| serde_json::from_str::<Value>(line).expect("JSON")["data"]["n"].as_u64();
    assert!(text.lines().map(data).eq((0..100).map(Some)));
}

#[tokio::test]
async fn poison_goes_to_the_dead_letters_and_its_neighbours_arrive_in_order() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["cloud"]);
    log.append(60);
    let poison = [7, 23, 24, 59];
    let upstream = Upstream::start(move |received| {
        if received.seqs().iter().any(|seq| poison.contains(seq)) {
            (StatusCode::BAD_REQUEST, vec![], "no such unit".into())
        } else {
            reply(200)
        }
    })
    .await;
    let forwarder = log.forwarder(http("cloud", &upstream.url));
    let mut status = forwarder.status();
    let running = Running::start([forwarder]);
    let seen = until(&mut status, |s| s.cursor == 60).await;
    running.stop().await;
    assert_eq!((seen.delivered_events, seen.dead_lettered_events), (56, 4));
    let rest: Vec<u64> = (0..60).filter(|seq| !poison.contains(seq)).collect();
    assert_eq!(upstream.seqs(), rest);
    let letters = log.store.dead_letters("cloud", 0, 100).expect("readable");
    let letters: Vec<_> = letters.into_iter().map(|kept| kept.letter).collect();
    assert_eq!(letters.iter().map(|letter| letter.event.seq).collect::<Vec<_>>(), poison);
    for letter in letters {
        assert_eq!(letter.reason, "HTTP 400 Bad Request: no such unit");
        assert!(letter.attempts > 0 && letter.first_us <= letter.last_us);
    }
}

/// Letters that the upstream takes in the end, one that it refuses again, and live events beside
/// them, which keep their order.
#[tokio::test]
async fn requeued_letters_are_delivered_beside_live_events() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["cloud"]);
    log.append(60);
    let poison = [7, 23, 24, 59];
    let refuse = |poison: Vec<u64>| {
        move |received: &fake::Received| {
            let bad = received.seqs().iter().any(|seq| poison.contains(seq));
            if bad { (StatusCode::BAD_REQUEST, vec![], "no".into()) } else { reply(200) }
        }
    };
    let upstream = Upstream::start(refuse(poison.to_vec())).await;
    let forwarder = log.forwarder(http("cloud", &upstream.url));
    let (mut status, wake) = (forwarder.status(), forwarder.wake());
    let running = Running::start([forwarder]);
    until(&mut status, |s| s.cursor == 60).await;
    let attempts = |store: &Store| -> Vec<(u64, u32)> {
        let kept = store.dead_letters("cloud", 0, 100).expect("readable");
        kept.iter().map(|kept| (kept.letter.event.seq, kept.letter.attempts)).collect()
    };
    let before = attempts(&log.store);
    // 24 stays what it was.
    upstream.behave(refuse(vec![24]));
    assert_eq!(log.store.requeue("cloud", 0, &|_| true, 1_000).expect("marked").events, 4);
    wake();
    for _ in 0..30 {
        log.append(3);
    }
    until(&mut status, |s| s.cursor == 150 && s.requeued_events == 3).await;
    until(&mut status, |s| s.state == SinkState::Idle).await;
    let [(24, again)] = attempts(&log.store)[..] else { panic!("{:?}", attempts(&log.store)) };
    assert!(again > before[2].1, "the attempts add up: {before:?}, {again}");
    assert_eq!(log.store.requeued("cloud", 9, 9).expect("readable"), []);
    let (marked, rest): (Vec<Value>, Vec<Value>) = upstream
        .accepted()
        .iter()
        .flat_map(fake::Received::events)
        .partition(|event| event["requeued"] == true);
    let seqs = |events: &[Value]| -> Vec<u64> {
        events.iter().map(|e| e["sequence"].as_str().expect("text").parse().expect("seq")).collect()
    };
    assert_eq!(seqs(&marked), [7, 23, 59]);
    assert_eq!(seqs(&rest), (0..150).filter(|seq| !poison.contains(seq)).collect::<Vec<_>>());
    // The letter itself has no mark: refused again it is the event that it was.
    let letter = log.store.dead_letters("cloud", 0, 1).expect("readable").remove(0).letter;
    assert_eq!(letter.event, log.store.look(24, 1, 1).expect("readable").events[0]);
    running.stop().await;
}

/// An upstream that takes live events and says nothing to a requeued one: that one has a share of the
/// time, the others are not held up for good, and in the end it is delivered.
#[tokio::test]
async fn a_requeued_letter_that_hangs_does_not_hold_up_live_events() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["cloud"]);
    log.append(1);
    log.requeue_all("cloud");
    let (hung, asked) = watch::channel(0);
    let upstream = Upstream::start(move |received| {
        let is_requeued = received.events().iter().any(|event| event["requeued"] == true);
        hung.send_modify(|count| *count += u32::from(is_requeued));
        reply(if is_requeued { fake::SILENCE } else { 200 })
    })
    .await;
    let request_timeout = Duration::from_millis(100);
    let config = SinkConfig { request_timeout, ..http("cloud", &upstream.url) };
    let forwarder = log.forwarder(config);
    let mut status = forwarder.status();
    let running = Running::start([forwarder]);
    let mut end = 1;
    for times in 1..=2 {
        // While it hangs.
        asked.clone().wait_for(|count| *count >= times).await.expect("the upstream lives");
        log.append(20);
        end += 20;
        let seen = until(&mut status, |s| s.cursor == end).await;
        assert_eq!((seen.requeued_events, seen.dead_lettered_events), (0, 0));
    }
    assert_eq!(log.store.requeued("cloud", 9, 9).expect("readable").len(), 1);
    upstream.behave(|_| reply(200));
    until(&mut status, |s| s.requeued_events == 1).await;
    running.stop().await;
    // A machine that is slow enough has a live event time out, and come again.
    let mut known = std::collections::BTreeSet::new();
    let first: Vec<u64> = upstream.seqs().into_iter().filter(|&seq| known.insert(seq)).collect();
    assert_eq!(first, (1..end).chain([0]).collect::<Vec<_>>());
}

/// What was marked while no forwarder ran is found at the start; an upstream that is down keeps it.
#[tokio::test]
async fn letters_that_were_requeued_before_the_start_outlive_an_outage() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["cloud"]);
    log.append(25);
    log.requeue_all("cloud");
    let upstream = Upstream::start(|_| reply(503)).await;
    let forwarder = log.forwarder(http("cloud", &upstream.url));
    let mut status = forwarder.status();
    let running = Running::start([forwarder]);
    let seen = until(&mut status, |s| s.retries > 3).await;
    assert!(matches!(&seen.state, SinkState::Retrying { error } if error.contains("503")));
    assert_eq!((seen.cursor, seen.requeued_events), (25, 0));
    assert_eq!(log.store.dead_letters("cloud", 0, 100).expect("readable").len(), 25);
    upstream.behave(|_| reply(200));
    until(&mut status, |s| s.requeued_events == 25 && s.state == SinkState::Idle).await;
    running.stop().await;
    assert_eq!(upstream.seqs(), (0..25).collect::<Vec<_>>());
    assert_eq!(log.store.dead_letters("cloud", 0, 100).expect("readable"), []);
}

#[tokio::test]
async fn a_restart_goes_on_at_the_durable_cursor() {
    let dir = tempfile::tempdir().expect("a folder");
    let upstream = Upstream::start(|_| reply(200)).await;
    {
        let mut log = Log::open(dir.path(), &["cloud"]);
        log.append(40);
        let forwarder = log.forwarder(http("cloud", &upstream.url));
        let mut status = forwarder.status();
        let running = Running::start([forwarder]);
        until(&mut status, |s| s.cursor == 40).await;
        running.stop().await;
        log.commit_cursors();
        log.append(5);
        log.writer.close().expect("closed");
    }
    let log = Log::open(dir.path(), &["cloud"]);
    let forwarder = log.forwarder(http("cloud", &upstream.url));
    let mut status = forwarder.status();
    assert_eq!(status.borrow().cursor, 40);
    let running = Running::start([forwarder]);
    until(&mut status, |s| s.cursor == 45).await;
    running.stop().await;
    assert_eq!(upstream.seqs(), (0..45).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_shutdown_waits_for_the_request_in_flight_and_begins_no_other() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["cloud"]);
    log.append(30);
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    // Asked to stop while the first request is with the upstream.
    let upstream = Upstream::start(move |_| {
        token.cancel();
        reply(200)
    })
    .await;
    let forwarder = log.forwarder(http("cloud", &upstream.url));
    let status = forwarder.status();
    forwarder.run(shutdown).await;
    assert_eq!(upstream.seqs(), (0..10).collect::<Vec<_>>());
    assert_eq!(status.borrow().cursor, 10);
    assert_eq!(log.cursors.lock().unwrap().last(), Some(&("cloud".to_owned(), 10.into())));
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_an_upstream_that_is_down() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["cloud"]);
    log.append(30);
    let upstream = Upstream::start(|_| reply(500)).await;
    let mut config = http("cloud", &upstream.url);
    (config.retry_backoff_min, config.retry_backoff_max) =
        (Duration::from_hours(1), Duration::from_hours(1));
    let forwarder = log.forwarder(config);
    let mut status = forwarder.status();
    let running = Running::start([forwarder]);
    until(&mut status, |s| s.retries == 1).await;
    running.stop().await;
    assert_eq!(status.borrow().state, SinkState::Stopped);
}

#[tokio::test]
async fn what_a_policy_has_dropped_is_passed_over() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::with(StoreOptions {
        file_bytes_max: 64 * 1024,
        quota_bytes: 512 * 1024,
        at_quota: AtQuota::DropOldest,
        ..Log::options(dir.path(), &["cloud"])
    });
    for _ in 0..200 {
        log.append(100);
    }
    let end = log.store.mark().watermark;
    let upstream = Upstream::start(|_| reply(200)).await;
    let mut config = http("cloud", &upstream.url);
    config.request_events_max = 1_000;
    let forwarder = log.forwarder(config);
    let mut status = forwarder.status();
    let running = Running::start([forwarder]);
    let seen = until(&mut status, |s| s.cursor == end).await;
    running.stop().await;
    let lost: u64 =
        log.store.losses().expect("readable").iter().map(|l| l.offsets.end - l.offsets.start).sum();
    assert!(lost > 0, "the quota was to bite");
    assert_eq!(seen.delivered_events, end - lost);
    assert_eq!(upstream.seqs(), (lost..end).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_gateway_that_went_away_does_not_make_it_spin() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["cloud"]);
    log.append(3);
    let upstream = Upstream::start(|_| reply(200)).await;
    let forwarder = log.forwarder(http("cloud", &upstream.url));
    let mut status = forwarder.status();
    let running = Running::start([forwarder]);
    drop(std::mem::replace(&mut log.watermark, watch::Sender::new(0)));
    until(&mut status, |s| s.cursor == 3).await;
    running.stop().await;
}

/// A watermark that rose between two looks of one turn was once taken for a read under way, and the
/// sink slept for ever. Here it rises on another thread, one event at a time, just when the sink has
/// delivered the one before and looks for more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watermark_that_rises_at_any_moment_is_seen() {
    const EVENTS: u64 = 20_000;
    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["cloud"]);
    log.append(EVENTS);
    log.watermark.send_replace(0);
    let sink = AnswersAtOnce::default();
    let answered = Arc::clone(&sink.answered);
    let config = SinkConfig {
        request_events_max: 1,
        ..SinkConfig::new("cloud", Target::File(FileConfig::new(dir.path().join("unused"))))
    };
    let forwarder = log.forwarder(config);
    let mut status = forwarder.status();
    let (mut tasks, shutdown) = (JoinSet::new(), CancellationToken::new());
    tasks.spawn(forwarder.drive(sink, shutdown.clone()));
    let watermark = log.watermark.clone();
    tasks.spawn_blocking(move || {
        for end in 1..=EVENTS {
            let deadline = Instant::now() + Duration::from_mins(1);
            while answered.load(Ordering::Acquire) + 1 < end {
                assert!(Instant::now() < deadline, "the sink sleeps and owes offset {}", end - 2);
                std::hint::spin_loop();
            }
            (0..fastrand::u32(..1_000)).for_each(|_| std::hint::spin_loop());
            watermark.send_replace(end);
        }
    });
    tasks.spawn(async move {
        until(&mut status, |s| s.cursor == EVENTS).await;
        shutdown.cancel();
    });
    while let Some(outcome) = tasks.join_next().await {
        outcome.expect("no panic");
    }
}

/// A sink whose upstream takes everything at once.
#[derive(Default)]
struct AnswersAtOnce {
    begun: Option<RequestId>,
    answered: Arc<AtomicU64>,
}

impl Sink for AnswersAtOnce {
    fn window(&self) -> Window {
        Window { requests_max: 1, events_max: usize::MAX, bytes_max: usize::MAX }
    }

    fn begin(&mut self, request: Request) {
        self.begun = Some(request.id);
    }

    async fn answer(&mut self) -> (RequestId, Answer) {
        match self.begun.take() {
            Some(id) => {
                self.answered.fetch_add(1, Ordering::Release);
                (id, Answer::delivered())
            }
            None => std::future::pending().await,
        }
    }
}

#[cfg(feature = "kafka")]
#[tokio::test]
async fn kafka_takes_a_backlog_through_its_window() {
    use crate::config::KafkaConfig;
    use rdkafka::mocking::MockCluster;

    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["bus"]);
    for _ in 0..10 {
        log.append(500);
    }
    let cluster = MockCluster::new(1).expect("a mock cluster");
    cluster.create_topic("events", 2, 1).expect("a topic");
    let config = KafkaConfig::new(cluster.bootstrap_servers(), "events");
    let forwarder = log.forwarder(SinkConfig {
        request_events_max: 100,
        ..SinkConfig::new("bus", Target::Kafka(config))
    });
    let mut status = forwarder.status();
    let running = Running::start([forwarder]);
    let seen = until(&mut status, |s| s.cursor == 5_000).await;
    running.stop().await;
    assert_eq!((seen.delivered_events, seen.retries), (5_000, 0));
}

/// A producer's window has room for many requests; a requeued one goes alone all the same.
#[cfg(feature = "kafka")]
#[tokio::test]
async fn kafka_takes_requeued_letters_between_live_events() {
    use crate::config::KafkaConfig;
    use rdkafka::mocking::MockCluster;

    let dir = tempfile::tempdir().expect("a folder");
    let mut log = Log::open(dir.path(), &["bus"]);
    log.append(500);
    log.requeue_all("bus");
    log.append(500);
    let cluster = MockCluster::new(1).expect("a mock cluster");
    cluster.create_topic("events", 2, 1).expect("a topic");
    let config = KafkaConfig::new(cluster.bootstrap_servers(), "events");
    let forwarder = log.forwarder(SinkConfig {
        request_events_max: 100,
        ..SinkConfig::new("bus", Target::Kafka(config))
    });
    let mut status = forwarder.status();
    let running = Running::start([forwarder]);
    log.append(500);
    let seen = until(&mut status, |s| s.cursor == 1_500 && s.requeued_events == 500).await;
    running.stop().await;
    assert_eq!((seen.delivered_events, seen.retries), (1_000, 0));
    assert_eq!(log.store.dead_letters("bus", 0, 1).expect("readable"), []);
}
