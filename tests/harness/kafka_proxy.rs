//! A proxy in front of a Kafka listener that loses answers: the broker has done what it was asked
//! for, and the client never hears of it.
//!
//! Owns: which answers are lost. A lost answer takes its connection with it, as it does in the field.
//! Invariant: requests reach the broker whole and unchanged, and in order.
//! Deliberately absent: rewriting addresses; the listener behind it advertises the proxy's
//! (`scripts/kafka start --proxied`).

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Answers to these may be lost, by API key: Produce, InitProducerId, AddPartitionsToTxn,
/// AddOffsetsToTxn, EndTxn, TxnOffsetCommit. All of them change something.
const CHANGING: [i16; 6] = [0, 22, 24, 25, 26, 28];
/// Largest request or answer that it passes on.
const FRAME_BYTES_MAX: u32 = 64 << 20;

/// Listens until it is dropped.
pub(crate) struct LossyProxy {
    lost: Arc<AtomicU64>,
    _task: JoinSet<()>,
}

struct Shared {
    broker: SocketAddr,
    lost_of_100: u8,
    random: Mutex<fastrand::Rng>,
    lost: Arc<AtomicU64>,
}

impl LossyProxy {
    /// Loses so many of a hundred answers to requests that change something.
    pub(crate) async fn start(
        listen: SocketAddr,
        broker: SocketAddr,
        lost_of_100: u8,
        seed: u64,
    ) -> Self {
        let listener = TcpListener::bind(listen).await.unwrap();
        let lost = Arc::new(AtomicU64::new(0));
        let random = Mutex::new(fastrand::Rng::with_seed(seed));
        let shared = Arc::new(Shared { broker, lost_of_100, random, lost: Arc::clone(&lost) });
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                // A connection that ends, for whatever reason, is what a proxy is for.
                connections.spawn(serve(client, Arc::clone(&shared)));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { lost, _task: task }
    }

    /// Answers lost so far.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

async fn serve(client: TcpStream, shared: Arc<Shared>) {
    let Ok(broker) = TcpStream::connect(shared.broker).await else { return };
    client.set_nodelay(true).ok();
    broker.set_nodelay(true).ok();
    let (from_client, to_client) = client.into_split();
    let (from_broker, to_broker) = broker.into_split();
    // A broker answers in the order of the requests of a connection.
    let asked = Mutex::new(VecDeque::new());
    // Whichever ends first takes the other with it.
    tokio::select! {
        _ = requests(from_client, to_broker, &asked) => {}
        _ = answers(from_broker, to_client, &asked, &shared) => {}
    }
}

async fn requests(
    mut client: OwnedReadHalf,
    mut broker: OwnedWriteHalf,
    asked: &Mutex<VecDeque<i16>>,
) -> io::Result<()> {
    let mut frame = Vec::new();
    loop {
        read_frame(&mut client, &mut frame).await?;
        let api_key = i16::from_be_bytes([frame[4], frame[5]]);
        asked.lock().unwrap_or_else(PoisonError::into_inner).push_back(api_key);
        broker.write_all(&frame).await?;
    }
}

async fn answers(
    mut broker: OwnedReadHalf,
    mut client: OwnedWriteHalf,
    asked: &Mutex<VecDeque<i16>>,
    shared: &Shared,
) -> io::Result<()> {
    let mut frame = Vec::new();
    loop {
        read_frame(&mut broker, &mut frame).await?;
        let api_key = asked.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let changing = api_key.is_some_and(|key| CHANGING.contains(&key));
        let drawn = shared.random.lock().unwrap_or_else(PoisonError::into_inner).u8(..100);
        if changing && drawn < shared.lost_of_100 {
            shared.lost.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        client.write_all(&frame).await?;
    }
}

/// One request or answer: its length in four bytes, then so many.
async fn read_frame(from: &mut OwnedReadHalf, frame: &mut Vec<u8>) -> io::Result<()> {
    let length = from.read_u32().await?;
    if !(6..FRAME_BYTES_MAX).contains(&length) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    frame.resize(4 + length as usize, 0);
    frame[..4].copy_from_slice(&length.to_be_bytes());
    from.read_exact(&mut frame[4..]).await?;
    Ok(())
}
