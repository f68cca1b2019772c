//! Devices that send again what was acked, or was not: with an id of their own each event is stored
//! once, over a kill -9 too. And a machine that learns late what time it is.
//!
//! `EDGE_GATEWAY_KILLS` sets the number of kills, 4 by default.

mod harness;

use std::net::SocketAddr;

use harness::wire::{self, Connect, Raw, V5, V311, Version};
use harness::{Bench, eventually, number_from_env, run_to_end};
use serde_json::Value;

const ID_IN_PAYLOAD: &str = "[[route]]\nfilter = \"devices/{device}/#\"\nevent_id = \"json:/id\"\n";

fn connect(address: SocketAddr, version: Version, client_id: &str) -> Raw {
    let mut raw = Raw::open(address, version).unwrap();
    raw.send(&Connect::new(version, client_id).bytes());
    assert_eq!(raw.packet()[0], 0x20);
    raw
}

/// Publishes with QoS 1 and waits for the ack; `false` if the gateway is gone.
fn publish(raw: &mut Raw, packet_id: u16, topic: &str, list: &[u8], payload: &str) -> bool {
    let sent = raw.try_send(&wire::publish(raw.version, 0x32, topic, packet_id, list, payload));
    sent.is_ok() && matches!(raw.try_packet(), Ok(Some(ack)) if ack[0] == 0x40)
}

/// What is in the log, as it would go upstream.
async fn stored(bench: &Bench) -> Vec<Value> {
    let config = bench.path("gateway.toml");
    let config = config.to_str().unwrap();
    let ended = harness::run_words(&["store", "export", "--config", config]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Two connections send the same events, again and again, while the gateway is killed. Without the id
/// in the route this stores several of each.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_is_sent_again_is_stored_once_over_kills() {
    const EVENTS: u64 = 40;
    let bench = Bench::new(101);
    bench.configure("[dedup]\nwindow_events_max = 4096\n");
    bench.route_first(ID_IN_PAYLOAD);
    let kills = number_from_env("EDGE_GATEWAY_KILLS").unwrap_or(4);
    let mut acked = 0;
    for round in 0..=kills {
        let gateway = bench.start().await;
        let senders = [V311, V5].map(|version| {
            let address = bench.mqtt;
            tokio::task::spawn_blocking(move || {
                let mut raw = connect(address, version, &format!("round {round}, {version:?}"));
                let mut acked = 0;
                // All of the rounds before, and some that are new.
                for id in 0..(round + 1) * EVENTS {
                    let payload = format!("{{\"id\": {id}}}");
                    let packet_id = id as u16 + 1;
                    if !publish(&mut raw, packet_id, "devices/a/t", &[], &payload) {
                        break;
                    }
                    acked += 1;
                }
                acked
            })
        });
        // Each time a little later.
        let commits = 10 + 10 * (round % 20);
        gateway.until("they are at work", |status| status.ingest.commits_total >= commits).await;
        if round < kills {
            gateway.kill().await;
            for sender in senders {
                acked += sender.await.unwrap();
            }
            continue;
        }
        for sender in senders {
            acked += sender.await.unwrap();
        }
        assert_eq!(gateway.terminate().await, Some(0));
    }
    let ids: Vec<u64> =
        stored(&bench).await.iter().map(|e| e["data"]["id"].as_u64().unwrap()).collect();
    let expected: Vec<u64> = (0..(kills + 1) * EVENTS).collect();
    let mut sorted = ids.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, expected, "in the order of the log: {ids:?}");
    // Acked = committed + recognised duplicates, but for acks that a kill has swallowed.
    let ended = run_to_end("balance", &bench.path("gateway.toml")).await;
    let text = &ended.stdout;
    let duplicates =
        text.split_once(" duplicates").and_then(|(before, _)| before.rsplit(' ').next());
    let duplicates: u64 = duplicates.expect(text).replace(',', "").parse().unwrap();
    let (sum, swallowed) = (ids.len() as u64 + duplicates, 2 * kills);
    assert!(
        (acked..=acked + swallowed).contains(&sum),
        "{acked} acked, {sum} accounted for: {text}"
    );
}

/// The id may be a user property; and what has none is an event of its own every time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_is_what_the_route_says_and_nothing_else() {
    let bench = Bench::new(102);
    bench.configure("");
    bench.route_first("[[route]]\nfilter = \"devices/{device}/#\"\nevent_id = \"property:id\"\n");
    let gateway = bench.start().await;
    let mut raw = connect(bench.mqtt, V5, "c");
    let property = |id: &str| [&[0x26][..], &wire::field("id"), &wire::field(id)].concat();
    for (packet_id, (topic, list)) in (1..).zip([
        ("devices/a/t", property("1")),
        ("devices/a/t", property("1")),
        ("devices/a/other", property("1")),
        ("devices/b/t", property("1")),
        ("devices/a/t", property("2")),
        ("devices/a/t", Vec::new()),
        ("devices/a/t", Vec::new()),
    ]) {
        assert!(publish(&mut raw, packet_id, topic, &list, "x"));
    }
    let status = gateway.status().await;
    assert_eq!((status.ingest.duplicates_total, status.mqtt.publishes_without_id_total), (2, 2));
    assert_eq!(status.store.watermark, 5);
    assert_eq!(gateway.terminate().await, Some(0));
}

/// The clock is set while the gateway is up, and what came before, also before a restart, gets the time
/// that it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_before_the_clock_was_set_say_so_until_it_is() {
    let bench = Bench::new(103);
    let file = bench.path("synchronized");
    let path = toml::Value::String(file.display().to_string());
    bench.configure(&format!("[time]\nsynchronised_file = {path}\n"));
    for packet_id in 1..=2 {
        let gateway = bench.start().await;
        let mut raw = connect(bench.mqtt, V311, "c");
        assert!(publish(&mut raw, packet_id, "devices/a/t", &[], "1"));
        assert_eq!(gateway.terminate().await, Some(0));
    }
    let qualities = async || -> Vec<Option<String>> {
        let quality = |event: &Value| event.get("timequality")?.as_str().map(str::to_owned);
        stored(&bench).await.iter().map(quality).collect()
    };
    let unsynchronised = Some("unsynchronised".to_owned());
    assert_eq!(qualities().await, [unsynchronised.clone(), unsynchronised]);

    std::fs::write(&file, b"").unwrap();
    let gateway = bench.start().await;
    let mut raw = connect(bench.mqtt, V311, "c");
    assert!(publish(&mut raw, 3, "devices/a/t", &[], "1"));
    let corrected = Some("corrected".to_owned());
    eventually("the times are put right", async || {
        (qualities().await == [corrected.clone(), corrected.clone(), None]).then_some(())
    })
    .await;
    let events = stored(&bench).await;
    assert_eq!(events[0]["bootid"], events[1]["bootid"]);
    let up = |event: &Value| event["uptimemicros"].as_str().unwrap().parse::<u64>().unwrap();
    assert!(up(&events[0]) < up(&events[1]));
    assert!(events.windows(2).all(|pair| pair[0]["time"].as_str() < pair[1]["time"].as_str()));
    assert_eq!(gateway.terminate().await, Some(0));
}
