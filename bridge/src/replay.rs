//! Asking a sink to send stored events again.
//!
//! Owns: [`Replays`], the way to a forwarder, which takes one replay at a time; a second is told so.
//! Invariant: who asked holds the other end. Dropping it cancels the replay, so that nothing goes on
//! that nobody watches; what is in flight then may still arrive.
//! Deliberately absent: how it is sent (`streams`).

use std::ops::Range;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::streams::{Again, ReplayProgress};

/// What is to be sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayRange {
    /// Offsets, end-exclusive. What was trimmed of them is passed over.
    pub offsets: Range<u64>,
    /// Of this device key only.
    pub device: Option<String>,
    /// Event bytes a second on average; 0 for no limit but the share of a replay.
    pub rate_bytes_per_second: u64,
}

/// Why a replay does not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// There is another one.
    #[error("another replay into this sink is under way: try again when it is done")]
    Busy,
    /// Its sink runs no more.
    #[error("the sink has stopped")]
    Stopped,
}

/// The way to one sink's forwarder. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Replays {
    sink: Arc<str>,
    orders: mpsc::Sender<Order>,
    one: Arc<Semaphore>,
}

/// A replay on its way to the forwarder, and while it is under way.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) again: Again,
    pub(crate) running: Running,
}

/// Who is told how far a replay is.
#[derive(Debug)]
pub(crate) struct Running {
    progress: watch::Sender<ReplayProgress>,
    _permit: OwnedSemaphorePermit,
}

impl Running {
    /// Tells how far it is.
    pub(crate) fn tell(&self, progress: ReplayProgress) {
        self.progress.send_if_modified(|told| {
            let news = *told != progress;
            *told = progress;
            news
        });
    }

    /// Resolves when nobody watches any more.
    pub(crate) async fn abandoned(&self) {
        self.progress.closed().await;
    }
}

impl Replays {
    /// The way, and its end at the forwarder.
    pub(crate) fn new(sink: &str) -> (Self, mpsc::Receiver<Order>) {
        let (orders, taken) = mpsc::channel(1);
        (Self { sink: sink.into(), orders, one: Arc::new(Semaphore::new(1)) }, taken)
    }

    /// Name of the sink.
    pub fn sink(&self) -> &str {
        &self.sink
    }

    /// Begins a replay. It goes on as long as the receiver lives.
    ///
    /// # Errors
    /// See [`ReplayError`].
    pub fn begin(
        &self,
        range: ReplayRange,
    ) -> Result<watch::Receiver<ReplayProgress>, ReplayError> {
        let permit = self.one.clone().try_acquire_owned().map_err(|_| ReplayError::Busy)?;
        let ReplayRange { offsets, device, rate_bytes_per_second } = range;
        let cursor = offsets.start;
        let (progress, receiver) =
            watch::channel(ReplayProgress { cursor, ..ReplayProgress::default() });
        let again = Again { offsets, device, rate_bytes_per_second };
        let running = Running { progress, _permit: permit };
        self.orders.try_send(Order { again, running }).map_err(|_| ReplayError::Stopped)?;
        Ok(receiver)
    }
}
