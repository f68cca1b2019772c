//! Raw MQTT 3.1.1 publishers (QoS 1, 128 B payload), all of them on one thread: as fast as acks come,
//! or at a pace of their own.
//!
//! A paced publisher's latency counts from the time at which its publish was due, so that a server
//! that lets it wait is not spared the publishes that could not leave meanwhile.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::sleep_until;

/// Publishes of one connection under way, at most.
pub(crate) const WINDOW: usize = 100;
pub(crate) const PAYLOAD_BYTES: usize = 128;

/// How often a paced publisher looks what is due.
const TICK: Duration = Duration::from_millis(2);

/// What the publishers have reached so far.
pub(crate) struct Load {
    stop: AtomicBool,
    acked: AtomicU64,
    /// In microseconds.
    latency: Mutex<Histogram<u64>>,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            stop: AtomicBool::default(),
            acked: AtomicU64::default(),
            latency: Mutex::new(latencies()),
        }
    }
}

impl Load {
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(crate) fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    /// The latencies since the last call.
    pub(crate) fn take_latency(&self) -> Histogram<u64> {
        let mut latency = self.latency.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *latency, latencies())
    }

    fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("constant bounds")
}

/// Publishes over all connections on this thread until told to stop; `rate` is what each of them
/// publishes per second, if it is paced.
pub(crate) fn publish_all(
    address: SocketAddr,
    connections: usize,
    rate: Option<f64>,
    load: &Arc<Load>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut publishers = JoinSet::new();
        for device in 0..connections {
            publishers.spawn(publish(address, device, rate, Arc::clone(load)));
        }
        while let Some(one) = publishers.join_next().await {
            one??;
        }
        Ok(())
    })
}

async fn publish(
    address: SocketAddr,
    device: usize,
    rate: Option<f64>,
    load: Arc<Load>,
) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&connect_packet(&format!("dev-{device:06}"))).await?;
    let mut connack = [0; 4];
    stream.read_exact(&mut connack).await?;
    ensure!(connack == [0x20, 2, 0, 0], "refused: {connack:?}");

    let (packet, id_at) = publish_packet(&format!("devices/dev-{device:06}/telemetry"));
    let mut burst = packet.repeat(WINDOW);
    let mut next_id = 1_u16;
    let mut expected_id = 1_u16;
    let mut sent_at: VecDeque<Instant> = VecDeque::with_capacity(WINDOW);
    let mut acks = [0; 4 * WINDOW];
    let mut acks_len = 0;
    let (began, mut sent) = (Instant::now(), 0_u64);
    while !load.stops() {
        // As many as may be under way leave in one write, like a device that drains its backlog.
        let now = Instant::now();
        let room = WINDOW - sent_at.len();
        let due = rate.map(|rate| ((now - began).as_secs_f64() * rate) as u64 - sent);
        let count = due.map_or(room, |due| room.min(due as usize));
        for packet in burst.chunks_exact_mut(packet.len()).take(count) {
            packet[id_at..id_at + 2].copy_from_slice(&next_id.to_be_bytes());
            next_id = following(next_id);
            sent_at.push_back(match rate {
                Some(rate) => began + Duration::from_secs_f64(sent as f64 / rate),
                None => now,
            });
            sent += 1;
        }
        stream.write_all(&burst[..count * packet.len()]).await?;

        let read = tokio::select! {
            read = stream.read(&mut acks[acks_len..]) => read?,
            () = sleep_until((now + TICK).into()), if rate.is_some() => continue,
        };
        ensure!(read > 0, "the server closed the connection");
        acks_len += read;
        let whole = acks_len / 4 * 4;
        let now = Instant::now();
        let mut latency = load.latency.lock().unwrap_or_else(PoisonError::into_inner);
        for ack in acks[..whole].chunks_exact(4) {
            let expected = expected_id.to_be_bytes();
            ensure!(*ack == [0x40, 2, expected[0], expected[1]], "not in order: {ack:?}");
            expected_id = following(expected_id);
            let sent = sent_at.pop_front().context("an ack for nothing")?;
            latency.saturating_record(now.saturating_duration_since(sent).as_micros() as u64);
        }
        drop(latency);
        load.acked.fetch_add(whole as u64 / 4, Ordering::Relaxed);
        acks.copy_within(whole..acks_len, 0);
        acks_len -= whole;
    }
    Ok(())
}

/// The packet identifier after this one; 0 is none.
fn following(id: u16) -> u16 {
    id.checked_add(1).unwrap_or(1)
}

/// CONNECT of MQTT 3.1.1: clean session, keep-alive 60 s.
fn connect_packet(client_id: &str) -> Vec<u8> {
    let mut packet = vec![0x10, (12 + client_id.len()) as u8];
    packet.extend_from_slice(b"\0\x04MQTT\x04\x02\0\x3c\0");
    packet.push(client_id.len() as u8);
    packet.extend_from_slice(client_id.as_bytes());
    packet
}

/// A QoS 1 PUBLISH, and where its packet identifier is.
fn publish_packet(topic: &str) -> (Vec<u8>, usize) {
    let remaining = 2 + topic.len() + 2 + PAYLOAD_BYTES;
    assert!((128..1 << 14).contains(&remaining), "a remaining length of two bytes");
    let mut packet = vec![0x32, (remaining % 128) as u8 | 0x80, (remaining / 128) as u8];
    packet.extend_from_slice(&(topic.len() as u16).to_be_bytes());
    packet.extend_from_slice(topic.as_bytes());
    let id_at = packet.len();
    packet.extend_from_slice(&[0; 2]);
    packet.extend((0..PAYLOAD_BYTES).map(|i| (i * 37) as u8));
    (packet, id_at)
}
