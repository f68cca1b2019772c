//! kill -9 on the real gateway while devices publish and subscribe with QoS 2: every message becomes
//! one event, every message for a device arrives once, and every session is found again.
//!
//! `EDGE_GATEWAY_KILLS` sets the number of kills, 6 by default.

mod harness;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use harness::wire::{self, BOTH, Connect, Raw, Version};
use harness::{Bench, eventually, number_from_env};

const DEVICES: usize = 6;
/// Exchanges that a device has under way, at most.
const WINDOW: usize = 8;

/// What a device still owes a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its PUBLISH, until a PUBREC.
    Publish,
    /// Its PUBREL, until a PUBCOMP.
    Release,
}

/// One device: what it has sent, and what came back.
struct Device {
    name: String,
    version: Version,
    next: u64,
    messages: u64,
    /// By message: packet id and stage.
    exchanges: BTreeMap<u64, (u16, Stage)>,
    connected: bool,
}

impl Device {
    /// Publishes until all its messages are done.
    fn run(mut self, address: SocketAddr, done: &AtomicU64) {
        while self.next < self.messages || !self.exchanges.is_empty() {
            // The gateway is away now and then: that is what this is about.
            if self.connection(address, done).is_err() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    fn connection(&mut self, address: SocketAddr, done: &AtomicU64) -> std::io::Result<()> {
        let mut raw = Raw::open(address, self.version)?;
        raw.try_send(&Connect::kept(self.version, self.name.clone()).bytes())?;
        let Some(connack) = raw.try_packet()? else { return Ok(()) };
        assert_eq!((connack[0], connack[3]), (0x20, 0), "{connack:x?}");
        let present = connack[2] == 1;
        let owed = self.exchanges.values().any(|(_, stage)| *stage == Stage::Release);
        assert!(present || !owed, "{}: a session with receipts was forgotten", self.name);
        self.connected |= present;
        assert_eq!(present, self.connected, "{}: a session that was there is gone", self.name);
        // [MQTT-4.4.0-1]
        for (message, (id, stage)) in self.exchanges.clone() {
            raw.try_send(&match stage {
                Stage::Publish => self.publish(0x3C, message, id),
                Stage::Release => wire::ack(0x62, id),
            })?;
        }
        let mut unheard = VecDeque::new();
        loop {
            while self.exchanges.len() < WINDOW && self.next < self.messages {
                let used: HashSet<u16> = self.exchanges.values().map(|(id, _)| *id).collect();
                let id = (1..=u16::MAX).find(|id| !used.contains(id)).unwrap();
                let message = self.next;
                self.next += 1;
                self.exchanges.insert(message, (id, Stage::Publish));
                raw.try_send(&self.publish(0x34, message, id))?;
            }
            if self.exchanges.is_empty() {
                return raw.try_send(&[0xE0, 0]);
            }
            // It is slow to hear: what it has not heard when the gateway dies is lost to it.
            let Some(packet) = raw.try_packet()? else { return Ok(()) };
            unheard.push_back(packet);
            while unheard.len() > self.exchanges.len() / 2
                && let Some(packet) = unheard.pop_front()
            {
                self.hear(&packet, &mut raw, done)?;
            }
        }
    }

    fn hear(&mut self, packet: &[u8], raw: &mut Raw, done: &AtomicU64) -> std::io::Result<()> {
        // A PUBREL that comes again after its PUBCOMP was lost finds nothing any more.
        let known = packet.len() == 4 || matches!(packet, [0x70, 3, _, _, 0x92]);
        assert!(known, "another code: {packet:x?}");
        let id = u16::from_be_bytes([packet[2], packet[3]]);
        let exchange = self.exchanges.iter_mut().find(|(_, (used, _))| *used == id);
        match (packet[0], exchange) {
            (0x50, Some((_, (_, stage)))) => {
                *stage = Stage::Release;
                raw.try_send(&wire::ack(0x62, id))?;
            }
            (0x70, Some((&message, (_, Stage::Release)))) => {
                self.exchanges.remove(&message);
                done.fetch_add(1, Ordering::Relaxed);
            }
            _ => panic!("{}: not an answer: {packet:x?}", self.name),
        }
        Ok(())
    }

    fn publish(&self, first: u8, message: u64, id: u16) -> Vec<u8> {
        let topic = format!("devices/{}/x", self.name);
        let payload = format!("\"{}-{message}\"", self.name);
        wire::publish(self.version, first, &topic, id, &[], &payload)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_qos_2_message_is_one_event_whatever_is_killed() {
    let bench = Bench::new(71);
    let mut random = fastrand::Rng::with_seed(bench.seed);
    let archive = bench.path("archive.ndjson");
    bench.configure(&format!(
        "[[sink]]\nname = \"archive\"\ntype = \"file\"\npath = \"{}\"\n\
         [storage]\nfile_bytes_max = \"1MiB\"\n",
        archive.display()
    ));
    let kills = number_from_env("EDGE_GATEWAY_KILLS").unwrap_or(6);
    let messages = 40 * kills;
    let done = Arc::new(AtomicU64::new(0));
    let mut devices = tokio::task::JoinSet::new();
    for i in 0..DEVICES {
        let device = Device {
            name: format!("d{i}"),
            version: BOTH[i % 2],
            next: 0,
            messages,
            exchanges: BTreeMap::new(),
            connected: false,
        };
        let (address, done) = (bench.mqtt, done.clone());
        devices.spawn_blocking(move || device.run(address, &done));
    }
    let all = messages * DEVICES as u64;
    for kill in 1..=kills {
        let gateway = bench.start().await;
        // The kills come at random places of the whole run.
        let enough = all * (kill - 1) / kills + random.u64(1..all / kills);
        eventually("messages are done", async || {
            (done.load(Ordering::Relaxed) >= enough).then_some(())
        })
        .await;
        gateway.kill().await;
    }
    let gateway = bench.start().await;
    while let Some(ended) = devices.join_next().await {
        ended.unwrap();
    }
    assert_eq!(done.load(Ordering::Relaxed), all);
    gateway.until_delivered("archive").await;
    assert_eq!(gateway.status().await.mqtt.sessions, DEVICES as u64);
    assert_eq!(gateway.terminate().await, Some(0));

    // The sink may write an event twice over a kill, but under one id: what counts are ids.
    let mut ids: HashMap<String, HashSet<String>> = HashMap::new();
    for line in std::fs::read_to_string(&archive).unwrap().lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        let (id, data) = (event["id"].as_str().unwrap(), event["data"].as_str().unwrap());
        ids.entry(data.to_owned()).or_default().insert(id.to_owned());
    }
    let twice: Vec<_> = ids.iter().filter(|(_, ids)| ids.len() > 1).collect();
    assert!(twice.is_empty(), "more than one event: {twice:?}");
    assert_eq!(ids.len() as u64, all, "every message is there");
    println!("{kills} kills, {all} messages, each one event");
}

/// A device that takes commands with QoS 2, and is away now and then.
struct Commanded {
    version: Version,
    random: fastrand::Rng,
    /// Payloads as they came.
    got: Vec<String>,
    /// Packet ids that were received and not released yet.
    held: HashSet<u16>,
    subscribed: bool,
}

impl Commanded {
    fn run(mut self, address: SocketAddr, got: &AtomicU64, all: u64) -> Vec<String> {
        while (self.got.len() as u64) < all {
            if self.connection(address, got, all).is_err() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        self.got
    }

    fn connection(
        &mut self,
        address: SocketAddr,
        got: &AtomicU64,
        all: u64,
    ) -> std::io::Result<()> {
        let mut raw = Raw::open(address, self.version)?;
        raw.try_send(&Connect::kept(self.version, "commanded").bytes())?;
        let Some(connack) = raw.try_packet()? else { return Ok(()) };
        assert_eq!((connack[0], connack[3]), (0x20, 0), "{connack:x?}");
        assert!(connack[2] == 1 || !self.subscribed, "a session that was there is gone");
        if !self.subscribed {
            raw.try_send(&wire::subscribe(self.version, 1, &[("devices/upstream/#", 2)]))?;
            let Some(suback) = raw.try_packet()? else { return Ok(()) };
            assert_eq!((suback[0], suback.last()), (0x90, Some(&2)), "{suback:x?}");
            self.subscribed = true;
            got.store(1, Ordering::Relaxed);
        }
        // So many packets, and it is away again, whatever it was in.
        for _ in 0..self.random.u32(1..60) {
            if self.got.len() as u64 == all {
                break;
            }
            let Some(packet) = raw.try_packet()? else { return Ok(()) };
            if self.random.u8(..) < 4 {
                // It came, and was lost on the way.
                return Ok(());
            }
            let id = |at: &[u8]| u16::from_be_bytes([at[0], at[1]]);
            match packet[0] & 0xF0 {
                0x30 => {
                    let message = wire::Message::of(self.version, &packet);
                    assert_eq!(message.qos(), 2);
                    if self.held.insert(message.id) {
                        self.got.push(message.text().to_owned());
                    }
                    raw.try_send(&wire::ack(0x50, message.id))?;
                }
                0x60 => {
                    self.held.remove(&id(&packet[2..]));
                    raw.try_send(&wire::ack(0x70, id(&packet[2..])))?;
                }
                _ => panic!("not for a subscriber: {packet:x?}"),
            }
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_message_for_a_device_arrives_once_whatever_is_killed() {
    let bench = Bench::new(72);
    let mut random = fastrand::Rng::with_seed(bench.seed);
    bench.configure("[sessions]\nqueue_messages_max = 10000\nqueue_bytes_max = \"1MiB\"\n");
    let kills = number_from_env("EDGE_GATEWAY_KILLS").unwrap_or(6);
    let messages = 100 * kills;
    for version in BOTH {
        let (done, subscribed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let mut gateway = Some(bench.start().await);
        let commanded = Commanded {
            version,
            random: random.fork(),
            got: Vec::new(),
            held: HashSet::new(),
            subscribed: false,
        };
        let (address, mark) = (bench.mqtt, subscribed.clone());
        let taken = tokio::task::spawn_blocking(move || commanded.run(address, &mark, messages));
        eventually("it has subscribed", async || {
            (subscribed.load(Ordering::Relaxed) == 1).then_some(())
        })
        .await;
        let upstream = Device {
            name: "upstream".to_owned(),
            version,
            next: 0,
            messages,
            exchanges: BTreeMap::new(),
            connected: false,
        };
        let counter = done.clone();
        let sent = tokio::task::spawn_blocking(move || upstream.run(address, &counter));
        for kill in 1..=kills {
            let enough = messages * (kill - 1) / kills + random.u64(1..messages / kills);
            eventually("messages are done", async || {
                (done.load(Ordering::Relaxed) >= enough).then_some(())
            })
            .await;
            gateway.take().unwrap().kill().await;
            gateway = Some(bench.start().await);
        }
        sent.await.unwrap();
        let got = taken.await.unwrap();
        let expected: Vec<_> = (0..messages).map(|n| format!("\"upstream-{n}\"")).collect();
        assert_eq!(got, expected, "each once, in the order in which they were sent");
        assert_eq!(gateway.unwrap().terminate().await, Some(0));
        // The other version begins anew.
        std::fs::remove_dir_all(bench.path("data")).unwrap();
    }
}
