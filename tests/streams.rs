//! What goes first: live events after an outage, alarms, and what a sink is not to have at all, or not
//! now: outside of its windows, or beyond the month's budget. Each over restarts, and each with sums
//! that add up.

mod harness;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Json;
use axum::routing::post;
use firmware_sim::fleet::Fleet;
use gateway::admin::status::Status;
use gateway::inspection::report::{BalanceReport, SinkSums};
use harness::{Bench, GatewayProcess, eventually, http_sink, run_to_end, run_words, sink};
use rumqttc::mqttbytes::QoS;
use rumqttc::{AsyncClient, Event, MqttOptions, Packet};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const REQUEST_EVENTS: usize = 100;
const ALARM_ROUTE: &str =
    "[[route]]\nfilter = \"devices/{device}/siren\"\nlane = \"alarm\"\nevent_type = \"alarm\"";

/// An event as it arrived.
#[derive(Clone, Debug)]
struct Arrival {
    device: String,
    partition: u16,
    seq: u64,
    stream: Option<String>,
    lane: Option<String>,
    event_type: String,
}

impl Arrival {
    fn new(event: &Value) -> Self {
        let text = |key: &str| event[key].as_str().map(str::to_owned);
        let id = text("id").unwrap();
        let parts: Vec<&str> = id.split('/').collect();
        Self {
            device: text("partitionkey").unwrap(),
            partition: parts[2].parse().unwrap(),
            seq: parts[3].parse().unwrap(),
            stream: text("stream"),
            lane: text("lane"),
            event_type: text("type").unwrap(),
        }
    }

    fn is_live(&self) -> bool {
        self.stream.as_deref() == Some("live")
    }
}

/// An upstream that takes so many requests as it has permits, and holds the others.
struct Upstream {
    address: SocketAddr,
    permits: Arc<Semaphore>,
    arrived: Arc<Mutex<Vec<Arrival>>>,
    _server: JoinSet<()>,
}

impl Upstream {
    async fn start() -> Self {
        type Shared = (Arc<Semaphore>, Arc<Mutex<Vec<Arrival>>>);
        async fn take(
            State((permits, arrived)): State<Shared>,
            Json(events): Json<Vec<Value>>,
        ) -> StatusCode {
            permits.acquire().await.unwrap().forget();
            arrived.lock().unwrap().extend(events.iter().map(Arrival::new));
            StatusCode::OK
        }
        let (permits, arrived) = (Arc::new(Semaphore::new(0)), Arc::default());
        let shared: Shared = (Arc::clone(&permits), Arc::clone(&arrived));
        let app = Router::new().route("/events", post(take)).with_state(shared);
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address, permits, arrived, _server: server }
    }

    /// One that takes everything at once.
    async fn open() -> Self {
        let upstream = Self::start().await;
        upstream.take_all();
        upstream
    }

    fn arrived(&self) -> Vec<Arrival> {
        self.arrived.lock().unwrap().clone()
    }

    /// Takes one request more at a time until what has arrived is as wanted.
    async fn take_until(&self, what: &str, wanted: impl Fn(&[Arrival]) -> bool) {
        eventually(what, async || {
            let done = wanted(&self.arrived());
            if !done && self.permits.available_permits() == 0 {
                self.permits.add_permits(1);
            }
            done.then_some(())
        })
        .await;
        self.permits.forget_permits(self.permits.available_permits());
    }

    fn take_all(&self) {
        self.permits.add_permits(Semaphore::MAX_PERMITS / 2);
    }

    /// Different events that arrived.
    fn different(&self) -> BTreeSet<(u16, u64)> {
        self.arrived().iter().map(|arrival| (arrival.partition, arrival.seq)).collect()
    }
}

fn sink_to(name: &str, upstream: &Upstream, more: &str) -> String {
    let sink = http_sink(name, upstream.address);
    format!("{sink}request_events_max = {REQUEST_EVENTS}\n{more}\n")
}

async fn acks(fleet: &Fleet, events: u64) {
    eventually("events are acked", async || (fleet.counters().acked >= events).then_some(())).await;
}

/// Publishes one event and waits for its ack.
async fn publish(bench: &Bench, topic: &str) {
    let mut options = MqttOptions::new("one", bench.mqtt.ip().to_string(), bench.mqtt.port());
    options.set_keep_alive(std::time::Duration::from_secs(30));
    let (client, mut events) = AsyncClient::new(options, 4);
    client.publish(topic, QoS::AtLeastOnce, false, "{}").await.unwrap();
    while !matches!(events.poll().await.unwrap(), Event::Incoming(Packet::PubAck(_))) {}
}

/// The durable sums of a sink, asked of the running gateway.
async fn sums(gateway: &GatewayProcess, name: &str) -> SinkSums {
    let (_, lines) = gateway.get("/api/v1/balance").await;
    let last = lines.lines().last().unwrap();
    let mut line: Value = serde_json::from_str(last).unwrap();
    let report: BalanceReport = serde_json::from_value(line["report"].take()).unwrap();
    report.sinks.into_iter().find(|sums| sums.sink == name).unwrap()
}

/// An outage, then a slow upstream: live events overtake the backlog, both go on after a SIGKILL
/// where they were, and in the end everything is there, each stream in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn live_events_go_ahead_of_a_backlog_also_after_a_kill() {
    let bench = Bench::new(61);
    let upstream = Upstream::start().await;
    let live_first = "backlog = \"live_first\"\nlive_first_after = \"300ms\"";
    bench.configure(&sink_to("cloud", &upstream, live_first));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 3_000.0);
    acks(&fleet, 6_000).await;
    let backlog = |status: &Status| {
        let streams = &sink(status, "cloud").streams;
        let backlogs = streams.iter().filter(|stream| stream.name == "backlog");
        backlogs.map(|stream| stream.end.unwrap() - stream.cursor).reduce(|sum, of| sum + of)
    };
    // It has split in the middle, and does so again when a request is answered.
    upstream.permits.add_permits(1);
    gateway.until("it has split", |status| backlog(status) > Some(5_000)).await;
    let lives = |arrived: &[Arrival]| arrived.iter().filter(|arrival| arrival.is_live()).count();
    // What was in flight at the split came in the one stream that there was.
    upstream
        .take_until("live and late events come", |arrived| {
            lives(arrived) > 3 * REQUEST_EVENTS
                && arrived.len() - lives(arrived) > 3 * REQUEST_EVENTS
        })
        .await;
    assert!(backlog(&gateway.status().await) > Some(2_000), "far from drained");
    // Quiet, so that everything that arrived is durable as such.
    let arrived = upstream.different().len() as u64;
    eventually("the cursors are durable", async || {
        (sums(&gateway, "cloud").await.delivered == arrived).then_some(())
    })
    .await;
    assert!(sums(&gateway, "cloud").await.cursor < arrived, "some of it ahead of the cursor");
    gateway.kill().await;

    let gateway = bench.start().await;
    let before = lives(&upstream.arrived());
    upstream.take_until("live events go on", |arrived| lives(arrived) > before + 300).await;
    assert!(backlog(&gateway.status().await) > Some(1_000), "far from drained");
    bench.drain(fleet).await;
    upstream.take_all();
    let status = gateway.until_delivered("cloud").await;
    assert_eq!(sink(&status, "cloud").streams.len(), 0, "one stream again");

    let arrived = upstream.arrived();
    let repeated = arrived.len() - upstream.different().len();
    assert!(repeated <= REQUEST_EVENTS, "{repeated} repeated, more than were in flight");
    let all = status.partitions.iter().flat_map(|p| (0..p.next_seq).map(|seq| (p.partition, seq)));
    assert_eq!(upstream.different(), all.collect(), "nothing is missing");
    let (mut seen, mut last) = (BTreeSet::new(), BTreeMap::new());
    for Arrival { device, partition, seq, stream, .. } in arrived {
        if seen.insert((partition, seq)) {
            let before = last.insert((device.clone(), stream.clone()), seq);
            assert!(before < Some(seq), "{device} {stream:?}: {seq} after {before:?}");
        }
    }
    assert_eq!(gateway.terminate().await, Some(0));
    assert_eq!(run_to_end("balance", &bench.path("gateway.toml")).await.code, Some(0));
}

/// A sink that wants alarms only: the rest is filtered, counted over a restart, and holds nothing
/// back. A sink that has everything has the alarm before the backlog.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alarm_passes_the_backlog_and_what_is_not_wanted_is_counted() {
    let bench = Bench::new(62);
    let [all, alarms] = [Upstream::start().await, Upstream::start().await];
    alarms.take_all();
    let filter = "lanes = [\"alarm\"]\ntopics = [\"devices/+/siren\"]\nevent_types = [\"alarm\"]";
    bench.configure(&(sink_to("all", &all, "") + &sink_to("alarms", &alarms, filter)));
    bench.route_first(ALARM_ROUTE);
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 3_000.0);
    acks(&fleet, 3_000).await;
    bench.drain(fleet).await;
    publish(&bench, "devices/one/siren").await;
    // One request is with the upstream since before there was an alarm.
    all.take_until("the alarm comes", |arrived| arrived.iter().any(|a| a.lane.is_some())).await;
    let arrived = all.arrived();
    assert!(arrived.len() <= 3 * REQUEST_EVENTS, "{} came before it", arrived.len());
    let alarm = arrived.iter().find(|arrival| arrival.lane.is_some()).unwrap();
    assert_eq!((alarm.lane.as_deref(), &*alarm.event_type), (Some("alarm"), "alarm"));
    let watermark = gateway.until_delivered("alarms").await.store.watermark;
    eventually("the alarm is all that it got", async || {
        let sums = sums(&gateway, "alarms").await;
        (sums.balanced && (sums.delivered, sums.filtered) == (1, watermark - 1)).then_some(())
    })
    .await;
    assert_eq!(alarms.arrived().len(), 1);
    gateway.kill().await;

    let gateway = bench.start().await;
    publish(&bench, "devices/one/siren").await;
    publish(&bench, "devices/one/other").await;
    all.take_all();
    gateway.until_delivered("alarms").await;
    let status = gateway.until_delivered("all").await;
    assert_eq!(alarms.different().len(), 2);
    assert_eq!(all.different().len() as u64, status.store.watermark);
    assert_eq!(gateway.terminate().await, Some(0));
    let config = bench.path("gateway.toml").display().to_string();
    let balance = run_words(&["balance", "--config", &config, "--json"]).await;
    assert_eq!(balance.code, Some(0), "{balance:?}");
    let report: BalanceReport = serde_json::from_str(&balance.stdout).unwrap();
    let of = |name: &str| report.sinks.iter().find(|sums| sums.sink == name).unwrap();
    assert_eq!((of("alarms").delivered, of("alarms").filtered), (2, watermark));
    assert_eq!((of("all").delivered, of("all").filtered), (watermark + 2, 0));
}

/// A replay runs beside live traffic, marked, and the balance knows nothing of it. One at a time; who
/// hangs up has cancelled it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_sends_again_what_it_is_asked_for_and_ends_with_its_asker() {
    let bench = Bench::new(64);
    let upstream = Upstream::start().await;
    upstream.take_all();
    let retention = "[storage]\nretain_bytes = \"64MiB\"";
    bench.configure(&sink_to("cloud", &upstream, retention));
    let gateway = bench.start().await;
    let fleet = bench.fleet(10, 2_000.0);
    acks(&fleet, 2_000).await;
    let admin = gateway.admin().to_string();
    let replay = |more: &[&'static str]| {
        let mut words = vec!["replay", "--json", "--sink", "cloud", "--from", "100", "--to", "900"];
        words.extend(more);
        words
            .iter()
            .map(|&word| word.to_owned())
            .chain(["--admin".into(), admin.clone()])
            .collect::<Vec<String>>()
    };
    let run = async |words: Vec<String>| {
        run_words(&words.iter().map(String::as_str).collect::<Vec<_>>()).await
    };
    let ended = run(replay(&[])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&report["delivered"], &report["refused"]), (&800.into(), &0.into()), "{report}");
    let arrived = upstream.arrived();
    let replayed = || arrived.iter().filter(|a| a.stream.as_deref() == Some("replay"));
    assert_eq!(replayed().count(), 800);

    // At this rate it would take minutes.
    let mut slow = tokio::process::Command::new(env!("CARGO_BIN_EXE_edge-gateway"));
    slow.args(replay(&["--rate", "1KiB"])).kill_on_drop(true).stdin(std::process::Stdio::null());
    let mut slow = slow.spawn().unwrap();
    gateway
        .until("the slow one is under way", |status| {
            sink(status, "cloud").streams.iter().any(|stream| stream.name == "replay")
        })
        .await;
    let second = run(replay(&[])).await;
    assert_eq!(second.code, Some(1), "{second:?}");
    assert!(second.stderr.contains("another replay"), "{second:?}");
    slow.kill().await.unwrap();
    let device = replayed().next().unwrap().device.clone();
    let of_one = [replay(&[]), vec!["--device".into(), device.clone()]].concat();
    let ended = eventually("the slow one is cancelled", async || {
        let ended = run(of_one.clone()).await;
        (ended.code == Some(0)).then_some(ended)
    })
    .await;
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    let expected = replayed().filter(|arrival| arrival.device == device).count();
    assert_eq!(report["delivered"], expected, "{report}");
    let wrong =
        run(["replay", "--admin", &admin, "--sink", "none"].map(str::to_owned).into()).await;
    assert_eq!(wrong.code, Some(2), "{wrong:?}");

    bench.drain(fleet).await;
    let status = gateway.until_delivered("cloud").await;
    assert_eq!(upstream.different().len() as u64, status.store.watermark);
    assert_eq!(gateway.terminate().await, Some(0));
    assert_eq!(run_to_end("balance", &bench.path("gateway.toml")).await.code, Some(0));
}

/// A dead sink with a limit of its own loses its oldest, by name, and the other has everything; the
/// disk holds little more than the limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_sink_with_a_limit_does_not_fill_the_disk_for_the_other() {
    const MIB: u64 = 1 << 20;
    let bench = Bench::new(63);
    let alive = bench.collector("alive");
    let dead = Upstream::start().await;
    let sinks =
        http_sink("alive", alive.addr()) + &sink_to("dead", &dead, "lag_bytes_max = \"1MiB\"");
    bench.configure(&format!("{sinks}\n[storage]\nfile_bytes_max = \"1MiB\"\n"));
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 20_000.0);
    gateway
        .until("more is stored than the limit", |s| s.ingest.committed_bytes_total > 5 * MIB)
        .await;
    bench.drain(fleet).await;
    gateway.until_delivered("alive").await;
    // What the dead sink itself shows moves when its request has ended.
    let status = gateway
        .until("most of it is trimmed", |status| {
            status.store.watermark - status.store.first_offset < status.store.watermark / 2
        })
        .await;
    assert!(status.store.losses > 0);
    dead.take_all();
    gateway.until_delivered("dead").await;
    assert_eq!(gateway.terminate().await, Some(0));
    alive.finish().await;
    bench.assert_balanced("alive");
    let config = bench.path("gateway.toml").display().to_string();
    let balance = run_words(&["balance", "--config", &config, "--json"]).await;
    assert_eq!(balance.code, Some(0), "{balance:?}");
    let report: BalanceReport = serde_json::from_str(&balance.stdout).unwrap();
    let sums = report.sinks.iter().find(|sums| sums.sink == "dead").unwrap();
    assert!(sums.dropped.lag > 0, "{sums:?}");
    assert_eq!(sums.delivered + sums.dropped.lag, sums.committed, "{sums:?}");
}

/// Polls until all of these sinks wait, for a reason that says so.
async fn until_they_wait(gateway: &GatewayProcess, names: &[&str], reason: &str) {
    let waits = |status: &Status, name: &str| {
        let sink = sink(status, name);
        sink.state == "waiting" && sink.error.as_deref().is_some_and(|e| e.contains(reason))
    };
    let wait = |status: &Status| names.iter().all(|n| waits(status, n));
    gateway.until("they wait", wait).await;
}

/// Polls until what has arrived at a sink is durable as delivered, and gives how much that is.
async fn until_durable(gateway: &GatewayProcess, name: &str, upstream: &Upstream) -> u64 {
    let arrived = upstream.different().len() as u64;
    eventually("what has arrived is durable", async || {
        (sums(gateway, name).await.delivered == arrived).then_some(())
    })
    .await;
    arrived
}

fn alarms(upstream: &Upstream) -> usize {
    upstream.arrived().iter().filter(|arrival| arrival.lane.as_deref() == Some("alarm")).count()
}

/// A budget that is used up stays so over a SIGKILL. One sink then sends nothing, the other alarms; a
/// third, without a budget, has everything. With a larger budget nothing is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_that_is_used_up_holds_all_or_all_but_alarms_also_after_a_kill() {
    let bench = Bench::new(65);
    let [held, alarmed, free] =
        [Upstream::open().await, Upstream::open().await, Upstream::open().await];
    let sinks = |budget: &str| {
        let budget = format!("budget_bytes_month = \"{budget}\"\n");
        sink_to("held", &held, &format!("{budget}at_budget = \"hold\""))
            + &sink_to("alarmed", &alarmed, &format!("{budget}at_budget = \"alarms_only\""))
            + &sink_to("free", &free, "")
    };
    bench.configure(&sinks("4KiB"));
    bench.route_first(ALARM_ROUTE);
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 3_000.0);
    acks(&fleet, 6_000).await;
    bench.drain(fleet).await;
    gateway.until_delivered("free").await;
    until_they_wait(&gateway, &["held", "alarmed"], "budget").await;
    publish(&bench, "devices/one/siren").await;
    eventually("the alarm comes", async || (alarms(&alarmed) == 1).then_some(())).await;
    let sent = until_durable(&gateway, "held", &held).await;
    let with_alarm = until_durable(&gateway, "alarmed", &alarmed).await;
    let stored = gateway.until_delivered("free").await.store.watermark;
    assert!(sent > 0 && with_alarm > 1, "there was something to spend");
    assert!(sent.max(with_alarm) < stored / 2, "{sent} and {with_alarm} of {stored}");
    gateway.kill().await;

    let gateway = bench.start().await;
    publish(&bench, "devices/one/siren").await;
    eventually("the next alarm comes", async || (alarms(&alarmed) == 2).then_some(())).await;
    until_they_wait(&gateway, &["held", "alarmed"], "budget").await;
    gateway.until_delivered("free").await;
    assert_eq!(until_durable(&gateway, "held", &held).await, sent, "nothing more");
    assert_eq!(until_durable(&gateway, "alarmed", &alarmed).await, with_alarm + 1, "the alarm");
    assert_eq!(gateway.terminate().await, Some(0));

    bench.configure(&sinks("1GiB"));
    bench.route_first(ALARM_ROUTE);
    let gateway = bench.start().await;
    for (name, upstream) in [("held", &held), ("alarmed", &alarmed), ("free", &free)] {
        gateway.until_delivered(name).await;
        assert_eq!(upstream.different().len() as u64, stored + 1, "{name} has everything");
    }
    assert_eq!(gateway.terminate().await, Some(0));
    assert_eq!(run_to_end("balance", &bench.path("gateway.toml")).await.code, Some(0));
}

/// A window of two hours, UTC, that begins so many minutes from now.
fn window(begins_in_minutes: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 60;
    let clock = |minute: u64| format!("{:02}:{:02}", minute / 60 % 24, minute % 60);
    let begins = now + begins_in_minutes;
    format!("windows = [\"{}-{}\"]", clock(begins), clock(begins + 120))
}

/// Outside of its windows a sink has alarms only, and the others do not wait for it; inside of one it
/// has everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outside_of_its_windows_a_sink_has_alarms_only() {
    const DAY_MINUTES: u64 = 24 * 60;
    let bench = Bench::new(66);
    let [night, day] = [Upstream::open().await, Upstream::open().await];
    let (closed, open) = (window(60), window(DAY_MINUTES - 60));
    bench.configure(&(sink_to("night", &night, &closed) + &sink_to("day", &day, &open)));
    bench.route_first(ALARM_ROUTE);
    let gateway = bench.start().await;
    let fleet = bench.fleet(10, 1_000.0);
    acks(&fleet, 1_000).await;
    bench.drain(fleet).await;
    publish(&bench, "devices/one/siren").await;
    gateway.until_delivered("day").await;
    eventually("the alarm comes", async || (alarms(&night) == 1).then_some(())).await;
    until_they_wait(&gateway, &["night"], "windows").await;
    assert_eq!(until_durable(&gateway, "night", &night).await, 1, "the alarm alone");
    assert_eq!(gateway.terminate().await, Some(0));

    // Now is another time of the day.
    bench.configure(&(sink_to("night", &night, &open) + &sink_to("day", &day, &closed)));
    bench.route_first(ALARM_ROUTE);
    let gateway = bench.start().await;
    let stored = gateway.until_delivered("night").await.store.watermark;
    assert_eq!(night.different().len() as u64, stored);
    publish(&bench, "devices/one/other").await;
    gateway.until_delivered("night").await;
    until_they_wait(&gateway, &["day"], "windows").await;
    assert_eq!(day.different().len() as u64, stored, "all of it came before");
    assert_eq!(gateway.terminate().await, Some(0));
    assert_eq!(run_to_end("balance", &bench.path("gateway.toml")).await.code, Some(0));
}
