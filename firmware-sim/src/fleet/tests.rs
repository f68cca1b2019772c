//! A fleet against a small broker that loses acks, cuts connections, refuses and moves.
//!
//! What the broker took is written as a received ledger, so that each test ends with the audit
//! that users run. Waits are for conditions, never for times.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    io,
    path::Path,
    sync::{Arc, Mutex},
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::{
    audit::{Audit, AuditReport},
    ledger::{self, Origin, ReceivedRow},
    payload::{Payload, identify},
};

/// Long enough that only a hang reaches it.
const PATIENCE: Duration = Duration::from_mins(1);

/// What a broker does with the publishes that one read brought.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// Acks each.
    Ack,
    /// Acks each, the latest first.
    AckBackwards,
    /// Takes them and answers nothing.
    Silent,
    /// Closes each connection after this many publishes, without acking the last read; acks all
    /// once it has closed this many connections.
    Cut { publishes: usize, connections: usize },
    /// MQTT 5: refuses each event the first time it comes.
    RefuseFirst,
}

#[derive(Debug, Default)]
struct Taken {
    /// Device and origin of every publish that was taken, in order of arrival.
    events: Vec<(String, Origin)>,
    /// Device, boot and sequence number of all that came, also what was refused.
    seen: HashSet<(String, u32, u64)>,
    /// Publishes with DUP of what had not come before on any connection.
    false_dups: usize,
    /// Publishes without DUP of what had come before.
    missing_dups: usize,
    topics: HashSet<String>,
    connections_cut: usize,
}

/// Serves until it is dropped.
struct Broker {
    addr: String,
    taken: Arc<Mutex<Taken>>,
    count: watch::Receiver<usize>,
    _serving: JoinSet<()>,
}

impl Broker {
    async fn start(manner: Manner, receive_max: Option<u16>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let taken = Arc::new(Mutex::new(Taken::default()));
        let (counting, count) = watch::channel(0);
        let mut serving = JoinSet::new();
        serving.spawn({
            let taken = Arc::clone(&taken);
            async move {
                let mut connections = JoinSet::new();
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let (taken, counting) = (Arc::clone(&taken), counting.clone());
                    connections.spawn(async move {
                        // A client that goes away is no failure.
                        let _ = serve(stream, manner, receive_max, &taken, &counting).await;
                    });
                }
            }
        });
        Self { addr, taken, count, _serving: serving }
    }

    /// Waits until this many publishes came in all.
    async fn has_taken(&self, publishes: usize) {
        let mut count = self.count.clone();
        let reached = count.wait_for(|count| *count >= publishes);
        timeout(PATIENCE, reached).await.expect("the fleet goes on").unwrap();
    }

    /// Audits what came against the fleet's ledger.
    fn audit(&self, sent: &Path) -> AuditReport {
        let mut audit = Audit::default();
        let mut rows = HashSet::new();
        ledger::read_sent(sent, |row| {
            assert!(rows.insert((row.device.to_string(), row.boot, row.seq)), "twice: {row:?}");
            audit.sent(&row);
        })
        .unwrap();
        for (device, origin) in &self.taken.lock().unwrap().events {
            audit.received(&ReceivedRow {
                arrival: 0,
                received_us: 0,
                device: Cow::Borrowed(device),
                origin: Some(*origin),
                place: None,
                id: Cow::Borrowed(""),
            });
        }
        audit.finish()
    }
}

async fn serve(
    mut stream: TcpStream,
    manner: Manner,
    receive_max: Option<u16>,
    taken: &Mutex<Taken>,
    counting: &watch::Sender<usize>,
) -> io::Result<()> {
    let (mut buffer, mut v5, mut published) = (Vec::new(), false, 0);
    loop {
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
        let mut ids = Vec::new();
        while let Some((kind, body)) = next_packet(&mut buffer) {
            match kind >> 4 {
                1 => {
                    v5 = body[6] == 5;
                    stream.write_all(&connack(v5, receive_max)).await?;
                }
                3 => ids.push(publish(kind, &body, v5, manner, &mut taken.lock().unwrap())),
                12 => stream.write_all(&[0xD0, 0]).await?,
                14 => return Ok(()),
                other => panic!("packet type {other}"),
            }
        }
        published += ids.len();
        counting.send_modify(|count| *count += ids.len());
        let ack = |(id, _): &(u16, bool)| [&[0x40, 2][..], &id.to_be_bytes()].concat();
        let answers: Vec<_> = match manner {
            Manner::Ack => ids.iter().flat_map(ack).collect(),
            Manner::AckBackwards => ids.iter().rev().flat_map(ack).collect(),
            Manner::Silent => continue,
            Manner::Cut { publishes, connections } => {
                let mut taken = taken.lock().unwrap();
                if published >= publishes && taken.connections_cut < connections {
                    taken.connections_cut += 1;
                    return Ok(());
                }
                ids.iter().flat_map(ack).collect()
            }
            Manner::RefuseFirst => ids
                .iter()
                .flat_map(|&(id, again)| {
                    let [high, low] = id.to_be_bytes();
                    [0x40, 3, high, low, if again { 0 } else { 0x97 }]
                })
                .collect(),
        };
        stream.write_all(&answers).await?;
    }
}

/// Takes a whole packet off the front: its first byte, and what is behind its length.
fn next_packet(buffer: &mut Vec<u8>) -> Option<(u8, Vec<u8>)> {
    let (mut length, mut at) = (0, 1);
    loop {
        let byte = usize::from(*buffer.get(at)?);
        length |= (byte & 127) << (7 * (at - 1));
        at += 1;
        if byte < 128 {
            break;
        }
    }
    if buffer.len() < at + length {
        return None;
    }
    let packet: Vec<_> = buffer.drain(..at + length).collect();
    Some((packet[0], packet[at..].to_vec()))
}

fn connack(v5: bool, receive_max: Option<u16>) -> Vec<u8> {
    match (v5, receive_max.map(u16::to_be_bytes)) {
        (false, _) => vec![0x20, 2, 0, 0],
        (true, None) => vec![0x20, 3, 0, 0, 0],
        (true, Some([high, low])) => vec![0x20, 6, 0, 0, 3, 0x21, high, low],
    }
}

/// Notes a publish; gives its packet id, and whether the event had come before.
fn publish(kind: u8, body: &[u8], v5: bool, manner: Manner, taken: &mut Taken) -> (u16, bool) {
    assert_eq!(kind & 0b110, 0b010, "QoS 1");
    let (length, rest) = body.split_first_chunk().unwrap();
    let (topic, rest) = rest.split_at(usize::from(u16::from_be_bytes(*length)));
    let (id, rest) = rest.split_first_chunk().unwrap();
    // The properties are short: one byte of length.
    let payload = if v5 { &rest[1 + usize::from(rest[0])..] } else { rest };
    let event = identify(payload).unwrap();
    assert!(topic.starts_with(format!("devices/{}/", event.0).as_bytes()));
    taken.topics.insert(str::from_utf8(topic).unwrap().to_owned());
    let name = (event.0.clone(), event.1.boot, event.1.seq);
    let (dup, again) = (kind & 8 != 0, !taken.seen.insert(name));
    taken.false_dups += usize::from(dup && !again);
    taken.missing_dups += usize::from(!dup && again);
    if again || !matches!(manner, Manner::RefuseFirst) {
        taken.events.push(event);
    }
    (u16::from_be_bytes(*id), again)
}

struct Bench {
    fleet: Fleet,
    broker_addr: watch::Sender<String>,
    cancel: CancellationToken,
    ledger: std::path::PathBuf,
    _folder: TempDir,
}

fn config() -> FleetConfig {
    FleetConfig {
        devices: 6,
        rate: 3000.0,
        v5_share: 0.5,
        backoff_ms_min: 1,
        backoff_ms_max: 20,
        ..FleetConfig::default()
    }
}

fn bench(config: FleetConfig, broker: &str) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let ledger = folder.path().join("sent.csv");
    let (broker_addr, watched) = watch::channel(broker.to_owned());
    let cancel = CancellationToken::new();
    let fleet = Fleet::start(config, watched, &ledger, &cancel).unwrap();
    Bench { fleet, broker_addr, cancel, ledger, _folder: folder }
}

#[tokio::test]
async fn everything_is_sent_once_in_order_and_acked() {
    for payload in [Payload::Json, Payload::Frame] {
        let broker = Broker::start(Manner::Ack, None).await;
        let bench = bench(FleetConfig { payload, ..config() }, &broker.addr);
        broker.has_taken(500).await;
        let report = bench.fleet.finish(PATIENCE).await.unwrap();
        assert!(report.drained, "{report:?}");
        assert_eq!((report.counters.resent, report.counters.connected), (0, 0));
        let audit = broker.audit(&bench.ledger);
        assert_eq!(audit.sent, report.counters.sent);
        assert_eq!((audit.acked, audit.delivered), (audit.sent, audit.sent));
        assert_eq!((audit.lost, audit.duplicates, audit.out_of_order), (0, 0, 0));
        assert_eq!(broker.taken.lock().unwrap().false_dups, 0);
    }
}

#[tokio::test]
async fn what_lost_its_ack_is_sent_again_in_order_with_dup() {
    let manner = Manner::Cut { publishes: 15, connections: 60 };
    let broker = Broker::start(manner, None).await;
    let bench = bench(config(), &broker.addr);
    broker.has_taken(2000).await;
    let report = bench.fleet.finish(PATIENCE).await.unwrap();
    assert!(report.drained, "{report:?}");
    assert!(report.counters.reconnects >= 60, "{report:?}");
    let audit = broker.audit(&bench.ledger);
    assert_eq!((audit.acked, audit.delivered), (audit.sent, audit.sent));
    assert_eq!((audit.lost, audit.out_of_order, audit.unknown), (0, 0, 0));
    assert!(audit.duplicates > 0, "{audit:?}");
    // What a cut took before the broker read it comes with DUP and yet for the first time.
    assert_eq!(broker.taken.lock().unwrap().missing_dups, 0);
}

#[tokio::test]
async fn acks_out_of_order_confuse_nothing() {
    let broker = Broker::start(Manner::AckBackwards, None).await;
    let config = FleetConfig { burst: Burst { share: 0.5, events: 30 }, ..config() };
    let bench = bench(config, &broker.addr);
    broker.has_taken(1500).await;
    let report = bench.fleet.finish(PATIENCE).await.unwrap();
    assert!(report.drained, "{report:?}");
    assert_eq!((report.counters.resent, report.counters.reconnects), (0, 0));
    let audit = broker.audit(&bench.ledger);
    assert_eq!((audit.acked, audit.delivered, audit.duplicates), (audit.sent, audit.sent, 0));
    assert_eq!(audit.out_of_order, 0);
}

#[tokio::test]
async fn a_refused_event_is_sent_again() {
    let broker = Broker::start(Manner::RefuseFirst, None).await;
    let config = FleetConfig { v5_share: 1.0, rate: 200.0, ..config() };
    let bench = bench(config, &broker.addr);
    broker.has_taken(100).await;
    let report = bench.fleet.finish(PATIENCE).await.unwrap();
    assert!(report.drained, "{report:?}");
    assert!(report.counters.rejected > 0);
    let audit = broker.audit(&bench.ledger);
    assert_eq!((audit.acked, audit.lost, audit.out_of_order), (audit.sent, 0, 0));
}

#[tokio::test]
async fn a_broker_that_comes_back_elsewhere_is_found() {
    let first = Broker::start(Manner::Ack, None).await;
    let second = Broker::start(Manner::Ack, None).await;
    let bench = bench(config(), &first.addr);
    first.has_taken(300).await;
    let by_first = Arc::clone(&first.taken);
    drop(first);
    bench.broker_addr.send_replace(second.addr.clone());
    second.has_taken(300).await;
    let report = bench.fleet.finish(PATIENCE).await.unwrap();
    assert!(report.drained, "{report:?}");
    assert_eq!(report.counters.reconnects, 6);
    let mut events = std::mem::take(&mut by_first.lock().unwrap().events);
    let mut taken = second.taken.lock().unwrap();
    events.append(&mut taken.events);
    taken.events = events;
    drop(taken);
    let audit = second.audit(&bench.ledger);
    assert_eq!((audit.acked, audit.lost, audit.out_of_order), (audit.sent, 0, 0));
}

#[tokio::test]
async fn cancelled_it_leaves_what_is_unacked_in_the_ledger_without_an_ack() {
    let broker = Broker::start(Manner::Silent, None).await;
    let config = FleetConfig { in_flight_max: 7, ..config() };
    let bench = bench(config, &broker.addr);
    broker.has_taken(6 * 7).await;
    bench.cancel.cancel();
    let report = bench.fleet.finish(PATIENCE).await.unwrap();
    assert!(!report.drained);
    assert_eq!((report.counters.sent, report.counters.acked), (6 * 7, 0));
    let audit = broker.audit(&bench.ledger);
    assert_eq!((audit.sent, audit.acked, audit.unacked_received), (6 * 7, 0, 6 * 7));
    assert!(audit.is_clean());
}

#[tokio::test]
async fn receive_maximum_is_kept() {
    let broker = Broker::start(Manner::Silent, Some(3)).await;
    let bench = bench(FleetConfig { v5_share: 1.0, ..config() }, &broker.addr);
    broker.has_taken(6 * 3).await;
    bench.cancel.cancel();
    let report = bench.fleet.finish(PATIENCE).await.unwrap();
    assert_eq!(report.counters.sent, 6 * 3);
}

#[tokio::test]
async fn a_full_outbox_drops_the_newest_and_counts_it() {
    // Nothing listens: the port was just given back.
    let gone = Broker::start(Manner::Silent, None).await.addr;
    let live = Broker::start(Manner::Ack, None).await;
    let config = FleetConfig { outbox_events_max: 64, rate: 20_000.0, ..config() };
    let bench = bench(config, &gone);
    let full = async {
        while bench.fleet.counters().refused < 100 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, full).await.expect("the outboxes fill up");
    bench.fleet.stop_producing();
    bench.broker_addr.send_replace(live.addr.clone());
    let report = bench.fleet.finish(PATIENCE).await.unwrap();
    assert!(report.drained, "{report:?}");
    assert_eq!(report.counters.produced, 6 * 64);
    // What was kept is the oldest, without a gap.
    let mut next = HashMap::new();
    for (device, origin) in &live.taken.lock().unwrap().events {
        let next = next.entry(device.clone()).or_insert(1);
        assert_eq!(origin.seq, *next);
        *next += 1;
    }
}

#[tokio::test]
async fn two_runs_with_one_seed_are_the_same_fleet() {
    let topics = async || {
        let broker = Broker::start(Manner::Ack, None).await;
        let config = FleetConfig { devices: 40, ..config() };
        let bench = bench(config, &broker.addr);
        let all_have_sent = async {
            while broker.taken.lock().unwrap().topics.len() < 40 {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, all_have_sent).await.expect("every device sends");
        bench.fleet.finish(PATIENCE).await.unwrap();
        broker.taken.lock().unwrap().topics.clone()
    };
    let first = topics().await;
    assert_eq!(first, topics().await);
    assert!(first.iter().any(|topic| topic.ends_with("/alarm")));
    assert!(first.iter().any(|topic| topic.ends_with("/telemetry")));
}
