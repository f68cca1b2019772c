//! The upstream side: takes what a gateway delivers and writes the received ledger.
//!
//! Owns: [`HttpCollector`], [`kafka`], and the recorder that both write with.
//! Invariant: an event counts as received only once its row was handed to the operating system;
//! rows stand in the order of arrival. Deliberately absent: judging what arrived (see `audit`).

mod cloudevents;
mod http;
#[cfg(feature = "kafka")]
pub mod kafka;

use std::{
    borrow::Cow,
    fs::File,
    io::{self, Write},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde::Serialize;

pub use http::{BODY_BYTES_MAX, DECODED_BYTES_MAX, HttpCollector};

use crate::{
    fleet::unix_us,
    ledger::{self, Origin, Place, RECEIVED_HEADER, ReceivedRow},
};

/// An event that arrived, as far as the ledger wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Arrived {
    device: String,
    origin: Option<Origin>,
    place: Option<Place>,
    id: String,
}

/// What a collector has taken so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CollectCounters {
    /// Events recorded by this collector, repeats too.
    pub received: u64,
    /// Requests (HTTP) or reads (Kafka) that brought them.
    pub requests: u64,
    /// Requests that were refused: malformed, too large, or not recorded.
    pub refused: u64,
}

/// Writes the received ledger; shared by all connections.
#[derive(Debug)]
struct Recorder {
    file: Mutex<RecorderFile>,
    started: Instant,
    received: AtomicU64,
    requests: AtomicU64,
    refused: AtomicU64,
    /// When the latest event was recorded, in microseconds since `started`.
    latest_us: AtomicU64,
}

#[derive(Debug)]
struct RecorderFile {
    file: File,
    size_bytes: u64,
    rows: u64,
    /// A write failed: there may be a part of a row behind `size_bytes`.
    torn: bool,
    text: Vec<u8>,
}

impl Recorder {
    fn append_to(path: &Path) -> io::Result<Self> {
        let (file, rows) = ledger::append_to(path, RECEIVED_HEADER)?;
        let size_bytes = file.metadata()?.len();
        Ok(Self {
            file: Mutex::new(RecorderFile {
                file,
                size_bytes,
                rows,
                torn: false,
                text: Vec::new(),
            }),
            started: Instant::now(),
            received: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            latest_us: AtomicU64::new(0),
        })
    }

    /// Records events that arrived together: all of them, or after an error none. What a failed
    /// write left behind is cut off before the next.
    fn record(&self, events: &[Arrived]) -> io::Result<()> {
        let mut guard = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let RecorderFile { file, size_bytes, rows, torn, text } = &mut *guard;
        if *torn {
            file.set_len(*size_bytes)?;
            *torn = false;
        }
        text.clear();
        let received_us = unix_us();
        for (arrival, event) in (*rows..).zip(events) {
            let Arrived { device, origin, place, id } = event;
            let (device, id) = (Cow::Borrowed(&**device), Cow::Borrowed(&**id));
            ReceivedRow { arrival, received_us, device, origin: *origin, place: *place, id }
                .write_to(text);
        }
        file.write_all(text).inspect_err(|_| *torn = true)?;
        *size_bytes += text.len() as u64;
        *rows += events.len() as u64;
        drop(guard);
        self.received.fetch_add(events.len() as u64, Relaxed);
        self.requests.fetch_add(1, Relaxed);
        if !events.is_empty() {
            self.latest_us.store(self.started.elapsed().as_micros() as u64, Relaxed);
        }
        Ok(())
    }

    fn counters(&self) -> CollectCounters {
        CollectCounters {
            received: self.received.load(Relaxed),
            requests: self.requests.load(Relaxed),
            refused: self.refused.load(Relaxed),
        }
    }

    /// Time since the latest event, or since the start when none came.
    fn idle(&self) -> Duration {
        let latest = Duration::from_micros(self.latest_us.load(Relaxed));
        self.started.elapsed().saturating_sub(latest)
    }
}
