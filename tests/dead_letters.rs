//! Poison events over the real binary: the rest arrives, all poison stands in the dead letters, and
//! `dlq` lists, shows, exports, drops and delivers them again, beside the gateway and without it. The
//! balance adds up after every step, also through kill -9.

mod harness;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use gateway::inspection::letters::{LetterPage, LetterReport};
use gateway::inspection::report::{BalanceReport, SinkSums};
use harness::{Bench, Ended, GatewayProcess, eventually, http_sink, run_words, sink};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

const DONE: i32 = 0;
const FAILED: i32 = 1;
const WRONG_INPUT: i32 = 2;

/// An upstream that refuses a request with poison in it, and remembers what it took.
#[derive(Clone)]
struct Picky {
    address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    /// An event is poison if its sequence number is a multiple of this; 0: none is.
    poison_every: u64,
    /// Ids in order of arrival, without those that were requeued.
    taken: Vec<(String, Value)>,
    /// Ids of the requeued ones, in order of arrival.
    requeued: Vec<String>,
    /// After so many requeued events are taken no answer is given any more.
    silent_after: Option<usize>,
    /// The first event that comes of this device is poison from then on.
    spoilt_device: Option<String>,
    /// That event's id.
    spoilt: Option<String>,
}

impl Picky {
    async fn start(poison_every: u64, tasks: &mut JoinSet<()>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Seen { poison_every, ..Seen::default() };
        let picky = Self { address, seen: Arc::new(Mutex::new(seen)) };
        let app = Router::new().route("/events", post(receive)).with_state(picky.clone());
        tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
        picky
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }
}

async fn receive(State(picky): State<Picky>, body: Bytes) -> (StatusCode, &'static str) {
    let events: Vec<Value> = serde_json::from_slice(&body).unwrap();
    let silent = {
        let mut seen = picky.seen();
        let of_spoilt = |event: &&Value| seen.spoilt_device.as_deref() == Some(device(event));
        if seen.spoilt.is_none()
            && let Some(first) = events.iter().find(of_spoilt)
        {
            seen.spoilt = Some(id(first).to_owned());
        }
        let is_spoilt = |event: &Value| seen.spoilt.as_deref() == Some(id(event));
        if events.iter().any(is_spoilt) {
            return (StatusCode::UNPROCESSABLE_ENTITY, "spoilt");
        }
        let every = seen.poison_every;
        if every > 0 && events.iter().any(|event| sequence(event).is_multiple_of(every)) {
            return (StatusCode::UNPROCESSABLE_ENTITY, "no such unit");
        }
        for event in events {
            let id = id(&event).to_owned();
            if event["requeued"] == true {
                seen.requeued.push(id);
            } else {
                seen.taken.push((id, event));
            }
        }
        seen.silent_after.is_some_and(|after| seen.requeued.len() >= after)
    };
    if silent {
        std::future::pending::<()>().await;
    }
    (StatusCode::OK, "")
}

fn id(event: &Value) -> &str {
    event["id"].as_str().unwrap()
}

fn device(event: &Value) -> &str {
    event["partitionkey"].as_str().unwrap()
}

fn sequence(event: &Value) -> u64 {
    event["sequence"].as_str().unwrap().parse().unwrap()
}

/// Runs `dlq WORDS --config FILE`.
async fn dlq(words: &[&str], config: &Path) -> Ended {
    let config = config.to_str().unwrap();
    run_words(&[&["dlq"], words, &["--config", config]].concat()).await
}

/// Runs `dlq WORDS`, which must work.
async fn done(words: &[&str], config: &Path) -> String {
    let ended = dlq(words, config).await;
    assert_eq!(ended.code, Some(DONE), "{words:?}: {ended:?}");
    ended.stdout
}

/// All dead letters, page by page.
async fn list(config: &Path) -> Vec<LetterReport> {
    let mut letters: Vec<LetterReport> = Vec::new();
    let mut from = "0".to_owned();
    loop {
        let words = ["list", "--json", "--sink", "up", "--limit", "17", "--from", &from];
        let page: LetterPage = serde_json::from_str(&done(&words, config).await).unwrap();
        assert!(page.letters.len() <= 17);
        letters.extend(page.letters);
        match page.next {
            Some(next) => from = next.from.to_string(),
            None => return letters,
        }
    }
}

/// The sums of the sink once nothing is pending; they add up all the time.
async fn balance(config: &Path) -> SinkSums {
    eventually("the cursor is durable", async || {
        Some(balance_now(config).await).filter(|sums| sums.pending == 0)
    })
    .await
}

async fn balance_now(config: &Path) -> SinkSums {
    let ended = run_words(&["balance", "--json", "--config", config.to_str().unwrap()]).await;
    assert_eq!(ended.code, Some(DONE), "{ended:?}");
    let report: BalanceReport = serde_json::from_str(&ended.stdout).unwrap();
    report.sinks.into_iter().find(|sums| sums.sink == "up").expect("the sink is known")
}

/// A gateway whose upstream has refused the poison of a fleet, and taken the rest.
async fn poisoned(
    bench: &Bench,
    upstream: &Picky,
    events: u64,
    more: &str,
) -> (std::path::PathBuf, GatewayProcess, u64) {
    let config = bench.configure(&format!("{}{more}", http_sink("up", upstream.address)));
    let gateway = bench.start().await;
    let fleet = bench.fleet(20, 2_000.0);
    eventually("events are acked", async || (fleet.counters().acked >= events).then_some(())).await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("up").await;
    (config, gateway, status.store.watermark)
}

fn state_of_letters(status: &gateway::admin::status::Status) -> (u64, u64) {
    let up = sink(status, "up");
    (up.dead_letters, up.requeued)
}

/// Per device, what was taken has rising sequence numbers.
fn assert_in_order(taken: &[(String, Value)]) {
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    for (id, event) in taken {
        let before = last.insert(device(event), sequence(event));
        assert!(before < Some(sequence(event)), "{id} after {before:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_event_in_a_hundred_is_poison_and_makes_its_way_in_the_end() {
    let bench = Bench::new(71);
    let mut tasks = JoinSet::new();
    let upstream = Picky::start(100, &mut tasks).await;
    let (config, gateway, stored) = poisoned(&bench, &upstream, 4_000, "").await;

    // The rest was delivered, in order, and all poison is there, each with its reason.
    let letters = list(&config).await;
    let poison = letters.len() as u64;
    assert!(poison >= stored / 200, "{poison} of {stored}");
    assert_eq!(upstream.seen().taken.len() as u64, stored - poison);
    assert_in_order(&upstream.seen().taken);
    for letter in &letters {
        let seq: u64 = letter.id.rsplit('/').next().unwrap().parse().unwrap();
        assert!(seq.is_multiple_of(100), "{letter:?}");
        assert!(letter.reason.contains("422") && letter.reason.contains("no such unit"));
        assert!(letter.attempts >= 1 && letter.first_us <= letter.last_us);
        assert_eq!(letter.requeued_us, None);
    }
    let sums = balance(&config).await;
    assert_eq!((sums.delivered, sums.dead_lettered), (stored - poison, poison));

    // One, whole; and all of them, as CloudEvents.
    let first = &letters[0];
    let shown = done(&["show", "--sink", "up", &first.id], &config).await;
    for part in [&*first.id, "no such unit", &*first.topic, &*first.device] {
        assert!(shown.contains(part), "no {part} in {shown}");
    }
    let shown = done(&["show", "--sink", "up", "--json", &first.offset.to_string()], &config).await;
    let event: Value = serde_json::from_str(&shown).unwrap();
    assert!(event.get("data").is_some() || event.get("data_base64").is_some(), "{shown}");
    assert_eq!(event["deadletterattempts"], first.attempts);
    let exported = done(&["export", "--sink", "up"], &config).await;
    assert_eq!(exported.lines().next(), Some(shown.trim_end()));
    assert_eq!(exported.lines().count() as u64, poison);
    let of_device = done(&["export", "--sink", "up", "--device", &first.device], &config).await;
    let same = letters.iter().filter(|letter| letter.device == first.device).count();
    assert_eq!(of_device.lines().count(), same);

    // Too early: refused again, with its attempts added up.
    done(&["requeue", "--sink", "up", &first.id], &config).await;
    let refused_again = async || {
        let again = list(&config).await.swap_remove(0);
        (again.requeued_us.is_none() && again.attempts > first.attempts).then_some(again)
    };
    let again = eventually("it is a dead letter again", refused_again).await;
    assert_eq!((again.offset, again.first_us), (first.offset, first.first_us));
    assert!(again.last_us > first.last_us);
    assert_eq!(balance(&config).await.dead_lettered, poison);

    // Dropped: said, then done, into the loss ledger.
    let words = ["drop", "--sink", "up", &first.id];
    assert!(done(&words, &config).await.contains("1 dead letter(s) would be dropped"));
    assert_eq!(list(&config).await.len() as u64, poison);
    done(&[&words[..], &["--yes"]].concat(), &config).await;
    let sums = balance(&config).await;
    assert_eq!((sums.dead_lettered, sums.dropped.by_hand), (poison - 1, 1));
    assert_eq!(gateway.status().await.store.losses, 1);
    assert_eq!(dlq(&words, &config).await.code, Some(DONE), "a dry run finds nothing to do");
    let gone = dlq(&[&words[..], &["--yes"]].concat(), &config).await;
    assert_eq!(gone.code, Some(FAILED), "{gone:?}");

    // The upstream has learned: the rest arrives, each once, marked and with its identity.
    upstream.seen().poison_every = 0;
    let told = done(&["requeue", "--sink", "up", "--all"], &config).await;
    assert!(told.contains(&format!("{} dead letter(s)", poison - 1)), "{told}");
    gateway.until("none is left", |status| state_of_letters(status) == (0, 0)).await;
    let requeued: Vec<String> = std::mem::take(&mut upstream.seen().requeued);
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    for (partition, sequence) in requeued.iter().map(|id| id.rsplit_once('/').unwrap()) {
        let sequence = sequence.parse().unwrap();
        assert!(last.insert(partition, sequence) < Some(sequence), "{partition}: {requeued:?}");
    }
    let requeued: BTreeSet<&String> = requeued.iter().collect();
    assert_eq!(requeued, letters[1..].iter().map(|letter| &letter.id).collect());
    let status = gateway.status().await;
    assert_eq!(sink(&status, "up").requeued_events_total, poison - 1);
    assert_eq!(done(&["list"], &config).await, "no dead letters\n");
    let sums = balance(&config).await;
    assert_eq!((sums.delivered, sums.dropped.by_hand), (stored - 1, 1));
    assert_eq!(gateway.terminate().await, Some(DONE));
    assert_eq!(balance(&config).await.delivered, stored - 1);
}

/// Killed with requeued events in flight, with answers lost, and between an answer and its record:
/// every letter arrives, some twice, and the sums are right whenever the gateway is down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_during_a_requeue_loses_no_letter() {
    const KILLS: usize = 6;
    const PASS: usize = 5;
    let bench = Bench::new(72);
    let mut random = fastrand::Rng::with_seed(bench.seed);
    let mut tasks = JoinSet::new();
    let upstream = Picky::start(4, &mut tasks).await;
    let more = format!("request_events_max = {PASS}\n[ingest]\npartitions = 4\n");
    let (config, gateway, stored) = poisoned(&bench, &upstream, 1_000, &more).await;
    assert_eq!(gateway.terminate().await, Some(DONE));
    let letters: BTreeSet<String> =
        list(&config).await.into_iter().map(|letter| letter.id).collect();
    let poison = letters.len() as u64;
    assert!(poison > 200, "{poison} of {stored}");
    upstream.seen().poison_every = 0;
    let told = done(&["requeue", "--sink", "up", "--all"], &config).await;
    assert!(told.contains("when the gateway runs"), "{told}");

    for kill in 0..KILLS {
        // Every other time the upstream takes a request and its answer is lost.
        let arrived = upstream.seen().requeued.len();
        let enough = arrived + random.usize(1..=4 * PASS);
        upstream.seen().silent_after = (kill % 2 == 0).then_some(enough);
        let gateway = bench.start().await;
        eventually("letters arrive", async || {
            let done = state_of_letters(&gateway.status().await) == (0, 0);
            (done || upstream.seen().requeued.len() >= enough).then_some(())
        })
        .await;
        gateway.kill().await;
        let sums = balance(&config).await;
        assert_eq!(sums.delivered + sums.dead_lettered, stored, "{sums:?}");
        let left = list(&config).await;
        assert_eq!(left.len() as u64, sums.dead_lettered);
        let seen = upstream.seen();
        let arrived: BTreeSet<&String> = seen.requeued.iter().collect();
        let is_left = |id: &String| left.iter().any(|letter| letter.id == *id);
        assert!(letters.iter().all(|id| is_left(id) || arrived.contains(id)), "a letter is lost");
        assert!(left.iter().all(|letter| letter.requeued_us.is_some()), "a mark is lost");
    }
    upstream.seen().silent_after = None;
    let gateway = bench.start().await;
    gateway.until("none is left", |status| state_of_letters(status) == (0, 0)).await;
    assert_eq!(gateway.terminate().await, Some(DONE));
    let seen = std::mem::take(&mut *upstream.seen());
    let arrived: BTreeSet<String> = seen.requeued.iter().cloned().collect();
    assert_eq!(arrived, letters);
    println!("{poison} letters, {} arrivals, {KILLS} kills", seen.requeued.len());
    assert!(seen.requeued.len() > letters.len(), "the lost answers left no duplicate");
    assert!(seen.requeued.len() <= letters.len() + KILLS * PASS, "a pass again for a kill");
    let sums = balance(&config).await;
    assert_eq!((sums.delivered, sums.dead_lettered), (stored, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_told() {
    let bench = Bench::new(73);
    let config = bench.configure(&http_sink("up", harness::stable_address()));
    let missing = dlq(&["list"], &config).await;
    assert_eq!(missing.code, Some(FAILED), "{missing:?}");
    assert!(missing.stderr.contains("there is no store in"), "{missing:?}");
    assert_eq!(dlq(&["requeue", "--sink", "up", "--all"], &config).await.code, Some(FAILED));
    assert!(!bench.path("data").exists(), "a look makes nothing");
    let gateway = bench.start().await;
    for beside in [true, false] {
        let cases: [(&[&str], i32); 8] = [
            (&["requeue", "--sink", "up"], WRONG_INPUT),
            (&["requeue", "--sink", "up", "1", "--all"], WRONG_INPUT),
            (&["requeue", "--sink", "up", "noon"], WRONG_INPUT),
            (&["requeue", "--sink", "up", "2026-01-31"], WRONG_INPUT),
            (&["requeue", "--sink", "gone", "--all"], WRONG_INPUT),
            (&["drop", "--sink", "up", "--yes", "other/00000000000000ab/0/1"], WRONG_INPUT),
            (&["list", "--from", "1"], WRONG_INPUT),
            (&["show", "--sink", "up", "7"], FAILED),
        ];
        for (words, code) in cases {
            let ended = dlq(words, &config).await;
            assert_eq!(ended.code, Some(code), "{words:?} {beside}: {ended:?}");
            assert!(!ended.stderr.is_empty() && !ended.stderr.contains("panicked"), "{ended:?}");
        }
        assert_eq!(done(&["list"], &config).await, "no dead letters\n");
        assert_eq!(done(&["export", "--sink", "up"], &config).await, "");
        let none = done(&["requeue", "--sink", "up", "--all"], &config).await;
        assert!(none.contains("no dead letter"), "{none}");
        if beside {
            // A web page's form cannot change anything: only JSON is taken.
            let url = format!("http://{}/api/v1/dlq/drop", gateway.admin());
            let post = reqwest::Client::builder().no_proxy().build().unwrap().post(url);
            let answer = post.body(r#"{"sink":"up","all":true}"#).send().await.unwrap();
            assert_eq!(answer.status(), 415);
            gateway.signal(rustix::process::Signal::TERM);
            eventually("the store is free", async || {
                (dlq(&["list"], &config).await.stderr.is_empty()).then_some(())
            })
            .await;
        }
    }
}

/// A refused event parks its device: what comes of it later is held back, over a kill too, while all
/// others go on. Once the refused one is taken, the rest follows by itself, in order, and nothing
/// overtakes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_device_waits_behind_its_refused_event_and_then_goes_on_in_order() {
    const DEVICE: &str = "dev-000003";
    let bench = Bench::new(74);
    let mut tasks = JoinSet::new();
    let upstream = Picky::start(0, &mut tasks).await;
    upstream.seen().spoilt_device = Some(DEVICE.into());
    let more = "request_events_max = 50\non_reject = \"park_device\"\n";
    let (config, gateway, stored) = poisoned(&bench, &upstream, 1_000, more).await;

    let letters = list(&config).await;
    let held = letters.len() as u64;
    assert!(held > 10, "{held} letters: the later events of the device are there");
    assert!(letters.iter().all(|letter| letter.device == DEVICE), "{letters:?}");
    assert!(letters[0].reason.contains("spoilt") && letters[0].attempts > 0, "{:?}", letters[0]);
    let behind = format!("behind offset {}", letters[0].offset);
    for letter in &letters[1..] {
        assert!(letter.attempts == 0 && letter.reason.contains(&behind), "{letter:?}");
    }
    assert!(upstream.seen().taken.iter().all(|(_, event)| device(event) != DEVICE));
    assert_eq!(upstream.seen().taken.len() as u64, stored - held, "the others went on");
    assert_eq!(sink(&gateway.status().await, "up").parked_devices, 1);

    // Killed, it is parked as before.
    gateway.kill().await;
    let gateway = bench.start().await;
    let fleet = bench.fleet(20, 2_000.0);
    eventually("events are acked", async || (fleet.counters().acked >= 500).then_some(())).await;
    bench.drain(fleet).await;
    gateway.until_delivered("up").await;
    assert!(upstream.seen().taken.iter().all(|(_, event)| device(event) != DEVICE));
    let held = list(&config).await;
    assert!(held.len() > letters.len());

    // The one event is requeued, while the device goes on sending; the rest follows.
    let fleet = bench.fleet(20, 2_000.0);
    upstream.seen().spoilt_device = None;
    upstream.seen().spoilt = None;
    done(&["requeue", "--sink", "up", &letters[0].id], &config).await;
    let freed = |status: &gateway::admin::status::Status| {
        state_of_letters(status) == (0, 0) && sink(status, "up").parked_devices == 0
    };
    gateway.until("the device is free", freed).await;
    let arrived = |upstream: &Picky| {
        upstream.seen().taken.iter().filter(|(_, event)| device(event) == DEVICE).count()
    };
    eventually("the device is served", async || (arrived(&upstream) > 10).then_some(())).await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("up").await;
    assert!(freed(&status));
    let mut seen = std::mem::take(&mut *upstream.seen());
    // The kill may have taken back the last moves of the cursor: what arrived before comes again.
    let mut known = BTreeSet::new();
    seen.taken.retain(|(id, _)| known.insert(id.clone()));
    assert_in_order(&seen.taken);
    let sequence_of = |id: &String| -> u64 { id.rsplit('/').next().unwrap().parse().unwrap() };
    let requeued: Vec<u64> = seen.requeued.iter().map(sequence_of).collect();
    assert!(requeued.is_sorted_by(|a, b| a < b), "in order, and each once");
    assert!(requeued.len() >= held.len());
    let later = seen.taken.iter().filter(|(_, event)| device(event) == DEVICE);
    let first = later.map(|(_, event)| sequence(event)).min();
    assert!(first > requeued.last().copied(), "nothing has overtaken them");
    let all = seen.taken.len() + seen.requeued.len();
    assert_eq!(all as u64, status.store.watermark);
    assert_eq!(gateway.terminate().await, Some(DONE));
    assert_eq!(balance(&config).await.delivered, status.store.watermark);
}
