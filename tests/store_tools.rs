//! The store tools and the balance, over the real binary: on a folder, and beside the gateway that
//! has it. Both ways say the same; damage is found with its exact range and exit code 3; nothing is
//! changed by looking.

mod harness;

use std::path::{Path, PathBuf};

use gateway::admin::status::Status;
use gateway::inspection::report::{BalanceReport, SinkSums, StatsReport, VerifyReport};
use harness::{Bench, Ended, GatewayProcess, eventually, http_sink, run_words};
use serde_json::Value;

const DONE: i32 = 0;
const FAILED: i32 = 1;
const WRONG_INPUT: i32 = 2;
const UNBALANCED: i32 = 3;

/// Runs a tool with its configuration.
async fn tool(words: &[&str], config: &Path) -> Ended {
    let config = config.to_str().unwrap();
    run_words(&[words, &["--config", config]].concat()).await
}

/// Runs a tool and reads its JSON.
async fn json<T: serde::de::DeserializeOwned>(words: &[&str], config: &Path, code: i32) -> T {
    let ended = tool(&[words, &["--json"]].concat(), config).await;
    assert_eq!(ended.code, Some(code), "{ended:?}");
    serde_json::from_str(&ended.stdout).unwrap_or_else(|wrong| panic!("{wrong}: {ended:?}"))
}

fn sums<'a>(report: &'a BalanceReport, name: &str) -> &'a SinkSums {
    report.sinks.iter().find(|sums| sums.sink == name).expect("the sink is known")
}

/// A store with a few hundred events in it, of which one sink had all and one had none.
async fn filled(bench: &Bench) -> (PathBuf, GatewayProcess, u64) {
    let upstream = bench.collector("upstream");
    let nobody = harness::stable_address();
    let sinks = [http_sink("upstream", upstream.addr()), http_sink("nobody", nobody)].concat();
    let config = bench.configure(&format!("{sinks}\n[ingest]\npartitions = 4\n"));
    let gateway = bench.start().await;
    let fleet = bench.fleet(10, 500.0);
    eventually("events are acked", async || (fleet.counters().acked > 300).then_some(())).await;
    bench.drain(fleet).await;
    let status = gateway.until_delivered("upstream").await;
    // The cursor is durable once the status after it says so.
    upstream.finish().await;
    (config, gateway, status.store.watermark)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_and_the_gateway_that_has_it_give_the_same_answers() {
    let bench = Bench::new(61);
    let (config, gateway, stored) = filled(&bench).await;
    let words: [&[&str]; 3] = [&["store", "stats"], &["store", "verify"], &["balance"]];
    let mut beside: Vec<Value> = Vec::new();
    for words in words {
        let said = tool(words, &config).await;
        assert!(said.stderr.contains("asking the gateway"), "{said:?}");
        beside.push(json(words, &config, DONE).await);
    }
    let exported_beside = tool(&["store", "export"], &config).await;
    assert_eq!(exported_beside.code, Some(DONE), "{exported_beside:?}");
    assert_eq!(gateway.terminate().await, Some(DONE));

    let stats: StatsReport = json(words[0], &config, DONE).await;
    assert_eq!((stats.offsets.from, stats.offsets.to), (0, stored));
    assert_eq!(stats.partitions.iter().map(|p| p.next_seq).sum::<u64>(), stored);
    assert!(stats.log_bytes > stats.event_bytes / 2 && stats.event_bytes > 0, "{stats:?}");
    let verified: VerifyReport = json(words[1], &config, DONE).await;
    assert!(verified.sound);
    assert_eq!((verified.events, verified.event_bytes), (stored, stats.event_bytes));
    let balance: BalanceReport = json(words[2], &config, DONE).await;
    let (had_all, had_none) = (sums(&balance, "upstream"), sums(&balance, "nobody"));
    assert_eq!((had_all.delivered, had_all.pending), (stored, 0), "{balance:?}");
    assert_eq!((had_none.delivered, had_none.pending), (0, stored), "{balance:?}");
    // Beside the gateway the same, but for control records and files that its end adds.
    for (value, keys) in beside.iter().zip([
        &["offsets", "event_bytes", "partitions"][..],
        &["sound", "offsets", "events", "event_bytes", "findings", "partitions"],
        &["balanced", "committed", "first_offset"],
    ]) {
        let offline: Value =
            json(words[beside.iter().position(|v| std::ptr::eq(v, value)).unwrap()], &config, DONE)
                .await;
        for key in keys {
            assert_eq!(value[key], offline[key], "{key}");
        }
    }

    let exported = tool(&["store", "export"], &config).await;
    assert_eq!(exported.stdout, exported_beside.stdout);
    assert_eq!(exported.stdout.lines().count() as u64, stored);
    // For people, in words.
    for (words, part) in words.iter().zip(["life of the card", "Sound", "Balanced."]) {
        let ended = tool(words, &config).await;
        assert!(ended.stdout.contains(part) && ended.code == Some(DONE), "{ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_takes_places_devices_and_formats() {
    let bench = Bench::new(62);
    let (config, gateway, stored) = filled(&bench).await;
    let all = tool(&["store", "export"], &config).await.stdout;
    let events: Vec<Value> = all.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let device = events[0]["partitionkey"].as_str().unwrap();
    let id = events[100]["id"].as_str().unwrap();
    let place = id.splitn(3, '/').last().unwrap();
    let time = events[100]["time"].as_str().unwrap();
    let since = events.iter().position(|e| e["time"].as_str() >= Some(time)).unwrap();
    let of_device = events.iter().filter(|e| e["partitionkey"] == device).count();
    let cases: [(&[&str], usize); 8] = [
        (&["--from", "100", "--to", "110"], 10),
        (&["--from", id], events.len() - 100),
        (&["--from", place, "--to", "101"], 1),
        (&["--from", time], events.len() - since),
        (&["--to", time], since),
        (&["--from", "2100-01-01"], 0),
        (&["--device", device], of_device),
        (&["--device", "no such&device"], 0),
    ];
    let check = async || {
        for (words, count) in cases {
            let ended = tool(&[&["store", "export"], words].concat(), &config).await;
            assert_eq!(ended.code, Some(DONE), "{words:?}: {ended:?}");
            assert_eq!(ended.stdout.lines().count(), count, "{words:?}");
            let words = [&["store", "export", "--format", "cloudevents_batch"], words].concat();
            let batch = tool(&words, &config).await.stdout;
            let batch: Vec<Value> = serde_json::from_str(&batch).unwrap();
            assert_eq!(batch.len(), count, "{words:?}");
        }
        let other = tool(&["store", "export", "--from", "other/00000000000000ab/0/1"], &config);
        assert_eq!(other.await.code, Some(WRONG_INPUT), "another store's event");
    };
    check().await;
    assert_eq!(gateway.terminate().await, Some(DONE));
    check().await;
    assert_eq!(events.len() as u64, stored);
}

/// Flips one byte in the middle of a stored payload.
fn flip_a_payload_byte(data: &Path) {
    for entry in std::fs::read_dir(data.join("log")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let topic = b"devices/";
        if let Some(at) = bytes.windows(topic.len()).position(|part| part == topic) {
            bytes[at + topic.len()] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            return;
        }
    }
    panic!("no event found in {}", data.display());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_is_found_with_its_range() {
    let bench = Bench::new(63);
    let (config, gateway, stored) = filled(&bench).await;
    assert_eq!(gateway.terminate().await, Some(DONE));
    flip_a_payload_byte(&bench.path("data"));

    let verified: VerifyReport = json(&["store", "verify"], &config, UNBALANCED).await;
    let [finding] = &verified.findings[..] else { panic!("{verified:?}") };
    assert_eq!((finding.damage.as_str(), verified.sound), ("unreadable", false));
    assert_eq!(finding.offsets.count(), verified.unreadable_events);
    assert_eq!(verified.events, stored - verified.unreadable_events);
    let told = tool(&["store", "verify"], &config).await;
    assert_eq!(told.code, Some(UNBALANCED));
    assert!(told.stdout.contains("DAMAGED"), "{told:?}");

    // Who had it already misses nothing; who did not, does.
    let balance: BalanceReport = json(&["balance"], &config, UNBALANCED).await;
    assert!(sums(&balance, "upstream").balanced);
    assert_eq!(sums(&balance, "nobody").unaccounted, [finding.offsets]);

    let exported = tool(&["store", "export"], &config).await;
    assert_eq!(exported.code, Some(UNBALANCED), "{exported:?}");
    assert_eq!(exported.stdout.lines().count() as u64, verified.events);
    let range = format!("{}..{}", finding.offsets.from, finding.offsets.to);
    assert!(exported.stderr.contains(&range), "{}", exported.stderr);
    // Looking again finds the same: the look before wrote nothing.
    let again: VerifyReport = json(&["store", "verify"], &config, UNBALANCED).await;
    assert_eq!(again.unreadable_events, verified.unreadable_events);

    // A dry run repairs nothing; the repair does, and the gateway goes on.
    let dry = tool(&["store", "repair"], &config).await;
    assert_eq!(dry.code, Some(UNBALANCED), "{dry:?}");
    assert!(dry.stdout.contains(&range) && dry.stdout.contains("--yes"), "{dry:?}");
    let _: VerifyReport = json(&["store", "verify"], &config, UNBALANCED).await;
    let repaired = tool(&["store", "repair", "--yes"], &config).await;
    assert_eq!(repaired.code, Some(DONE), "{repaired:?}");
    assert!(repaired.stdout.contains("lost to nobody"), "{repaired:?}");
    assert!(!repaired.stdout.contains("lost to upstream"), "{repaired:?}");
    let verified: VerifyReport = json(&["store", "verify"], &config, DONE).await;
    assert_eq!(
        (verified.unreadable_events, verified.recorded_events),
        (0, finding.offsets.count())
    );
    let balance: BalanceReport = json(&["balance"], &config, DONE).await;
    assert_eq!(sums(&balance, "nobody").dropped.corrupt, finding.offsets.count());
    let gateway = bench.start().await;
    let _: BalanceReport = json(&["balance"], &config, DONE).await;
    assert_eq!(gateway.terminate().await, Some(DONE));
}

/// Nobody looked before: the gateway itself finds it, passes over it, and says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_batch_is_quarantined_by_the_gateway_that_meets_it() {
    let bench = Bench::new(68);
    let (config, gateway, stored) = filled(&bench).await;
    assert_eq!(gateway.terminate().await, Some(DONE));
    flip_a_payload_byte(&bench.path("data"));
    let verified: VerifyReport = json(&["store", "verify"], &config, UNBALANCED).await;
    let [finding] = &verified.findings[..] else { panic!("{verified:?}") };

    // The upstream that nobody was there for is there now.
    let late = bench.collector("late");
    let text = std::fs::read_to_string(&config).unwrap();
    let (before, after) = text.split_once("name = \"nobody\"").unwrap();
    let url = after.split('"').find(|part| part.starts_with("http://")).unwrap();
    let after = after.replace(url, &format!("http://{}/events", late.addr()));
    std::fs::write(&config, format!("{before}name = \"nobody\"{after}")).unwrap();
    let gateway = bench.start().await;
    let has_all = |status: &Status| harness::sink(status, "nobody").cursor == stored;
    let status = gateway.until("the rest is delivered", has_all).await;
    let lost = finding.offsets.count();
    assert_eq!(status.store.quarantined_events_total, lost);
    let (_, metrics) = gateway.get("/metrics").await;
    let line = format!("edge_gateway_store_quarantined_events_total {lost}");
    assert!(metrics.lines().any(|l| l == line), "no {line:?} in {metrics}");
    // The cursor is in the log by then.
    assert_eq!(gateway.terminate().await, Some(DONE));
    late.finish().await;
    let balance: BalanceReport = json(&["balance"], &config, DONE).await;
    let sums = sums(&balance, "nobody");
    assert_eq!((sums.delivered, sums.dropped.corrupt), (stored - lost, lost), "{balance:?}");
    let verified: VerifyReport = json(&["store", "verify"], &config, DONE).await;
    let [recorded] = &verified.findings[..] else { panic!("{verified:?}") };
    assert_eq!((recorded.damage.as_str(), recorded.offsets), ("recorded", finding.offsets));
}

/// The state database is not what it was when it was closed: nobody opens it, the remedy is told, and
/// it helps.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_state_is_refused_and_made_anew() {
    let bench = Bench::new(67);
    let (config, gateway, stored) = filled(&bench).await;
    assert_eq!(gateway.terminate().await, Some(DONE));
    let state = bench.path("data").join("state.redb");
    let mut bytes = std::fs::read(&state).unwrap();
    let at = bytes.windows(8).position(|part| part == b"upstream").unwrap();
    bytes[at] ^= 1;
    std::fs::write(&state, bytes).unwrap();
    for (words, code) in [
        (&["store", "verify"][..], UNBALANCED),
        (&["run"], FAILED),
        (&["store", "repair"], UNBALANCED),
    ] {
        let ended = tool(words, &config).await;
        assert_eq!(ended.code, Some(code), "{ended:?}");
        let said = ended.stdout + &ended.stderr;
        assert!(said.contains("state.redb") && said.contains("anew from the log"), "{said}");
    }
    let repaired = tool(&["store", "repair", "--yes"], &config).await;
    assert_eq!(repaired.code, Some(DONE), "{repaired:?}");
    let verified: VerifyReport = json(&["store", "verify"], &config, DONE).await;
    assert_eq!(verified.events, stored);
    let balance: BalanceReport = json(&["balance"], &config, DONE).await;
    assert_eq!(sums(&balance, "nobody").pending, stored);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_a_store_wants_it_for_itself() {
    let bench = Bench::new(66);
    let config = bench.configure("[storage]\nfile_bytes_max = \"1MiB\"");
    for words in [&["store", "compact"][..], &["store", "repair"], &["store", "repair", "--yes"]] {
        let ended = tool(words, &config).await;
        assert_eq!(ended.code, Some(FAILED), "{ended:?}");
        assert!(ended.stderr.contains("there is no store in"), "{ended:?}");
    }
    assert!(!bench.path("data").exists());
    let gateway = bench.start().await;
    for words in [&["store", "compact"][..], &["store", "repair"], &["store", "repair", "--yes"]] {
        let ended = tool(words, &config).await;
        assert_eq!(ended.code, Some(FAILED), "{ended:?}");
        assert!(ended.stderr.contains("stop the gateway first"), "{ended:?}");
        assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    }
    let fleet = bench.fleet(10, 2_000.0);
    let files = async || (gateway.status().await.store.files >= 3).then_some(());
    eventually("there are sealed files", files).await;
    bench.drain(fleet).await;
    assert_eq!(gateway.terminate().await, Some(DONE));
    let before = tool(&["store", "export"], &config).await.stdout;
    let ended = tool(&["store", "compact"], &config).await;
    println!("{}", ended.stdout);
    assert_eq!(ended.code, Some(DONE), "{ended:?}");
    assert!(tool(&["store", "export"], &config).await.stdout == before, "the same events");
    let verified: VerifyReport = json(&["store", "verify"], &config, DONE).await;
    assert_eq!(verified.events, before.lines().count() as u64);
    assert_eq!(bench.start().await.terminate().await, Some(DONE));
}

#[tokio::test]
async fn where_there_is_no_store_or_no_sense_it_is_told() {
    let bench = Bench::new(64);
    let config = bench.configure("");
    let words: [&[&str]; 4] =
        [&["store", "stats"], &["store", "verify"], &["store", "export"], &["balance"]];
    for words in words {
        let ended = tool(words, &config).await;
        assert_eq!(ended.code, Some(FAILED), "{ended:?}");
        assert!(ended.stderr.contains("there is no store in"), "{ended:?}");
        let ended = tool(words, &bench.path("missing.toml")).await;
        assert_eq!(ended.code, Some(WRONG_INPUT), "{ended:?}");
    }
    assert!(!bench.path("data").exists(), "a look makes nothing");
    let wrong: [&[&str]; 5] = [
        &["store"],
        &["store", "export", "--from", "noon"],
        &["store", "export", "--format", "xml"],
        &["store", "stats", "--endurance-tb", "0"],
        &["store", "stats", "--bytes-per-day", "much"],
    ];
    for words in wrong {
        let ended = tool(words, &config).await;
        assert_eq!(ended.code, Some(WRONG_INPUT), "{ended:?}");
    }
}

/// The store is in use, and nobody answers for it, or somebody else does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_whose_gateway_cannot_be_asked_is_told() {
    let bench = Bench::new(65);
    let config = bench.configure("");
    let gateway = bench.start().await;
    let text = std::fs::read_to_string(&config).unwrap();
    let other = bench.path("other.toml");
    let nobody = harness::stable_address().to_string();
    std::fs::write(&other, text.replace(&bench.admin.to_string(), &nobody)).unwrap();
    let ended = tool(&["balance"], &other).await;
    assert_eq!(ended.code, Some(FAILED), "{ended:?}");
    assert!(ended.stderr.contains("no answer from"), "{ended:?}");
    std::fs::write(&other, text.replace(r#"id = "test""#, r#"id = "test-2""#)).unwrap();
    let ended = tool(&["balance"], &other).await;
    assert_eq!(ended.code, Some(FAILED), "{ended:?}");
    assert!(ended.stderr.contains("is this the right configuration"), "{ended:?}");
    let (code, text) = gateway.get("/api/v1/store/export?from=noon").await;
    assert!(code == 400 && text.contains("from must be"), "{code} {text}");
    let (code, _) = gateway.get("/api/v1/store/export?fron=1").await;
    assert_eq!(code, 400);
    assert_eq!(gateway.terminate().await, Some(DONE));
}
