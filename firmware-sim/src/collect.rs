//! The upstream side: takes what a gateway delivers and writes the received ledger.
//!
//! Owns: [`HttpCollector`], [`kafka`], and the recorder that both write with.
//! Invariant: an event counts as received only once its row was handed to the operating system;
//! rows stand in the order of arrival. Under the sequence rule (see `sequence`) each event has one
//! row. Deliberately absent: judging what arrived (see `audit`).

mod cloudevents;
mod http;
#[cfg(feature = "kafka")]
pub mod kafka;
mod sequence;

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

use self::sequence::{Row, SequenceRule};
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
    /// For the sequence rule.
    row: Row,
}

/// What a collector has taken so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CollectCounters {
    /// Events recorded by this collector, repeats too.
    pub received: u64,
    /// Events passed over by the sequence rule: they were recorded before.
    pub skipped: u64,
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
    skipped: AtomicU64,
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
    /// Only what it admits is recorded.
    rule: Option<SequenceRule>,
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
                rule: None,
            }),
            started: Instant::now(),
            received: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            latest_us: AtomicU64::new(0),
        })
    }

    /// As [`Recorder::append_to`], under the sequence rule: what the ledger has already is passed
    /// over, also what it had before this start.
    fn append_once_to(path: &Path) -> io::Result<Self> {
        let recorder = Self::append_to(path)?;
        let mut rule = SequenceRule::default();
        ledger::read_received(path, |row| {
            // A ledger does not say which rows there were: see `start_exactly_once`.
            rule.admit(&row.id, row.place, &Row::Plain);
        })
        .map_err(io::Error::other)?;
        recorder.file.lock().unwrap_or_else(PoisonError::into_inner).rule = Some(rule);
        Ok(recorder)
    }

    /// Records events that arrived together: all of them, or after an error none. What a failed
    /// write left behind is cut off before the next.
    fn record(&self, events: &[Arrived]) -> io::Result<()> {
        let mut guard = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let RecorderFile { file, size_bytes, rows, torn, text, rule } = &mut *guard;
        if *torn {
            file.set_len(*size_bytes)?;
            *torn = false;
        }
        text.clear();
        let received_us = unix_us();
        // The numbers move only with the rows.
        let mut moved = rule.clone();
        let mut recorded = 0;
        for event in events {
            let Arrived { device, origin, place, id, row } = event;
            if moved.as_mut().is_some_and(|rule| !rule.admit(id, *place, row)) {
                continue;
            }
            let (device, id) = (Cow::Borrowed(&**device), Cow::Borrowed(&**id));
            let arrival = *rows + recorded;
            ReceivedRow { arrival, received_us, device, origin: *origin, place: *place, id }
                .write_to(text);
            recorded += 1;
        }
        file.write_all(text).inspect_err(|_| *torn = true)?;
        *size_bytes += text.len() as u64;
        *rows += recorded;
        *rule = moved;
        drop(guard);
        self.received.fetch_add(recorded, Relaxed);
        self.skipped.fetch_add(events.len() as u64 - recorded, Relaxed);
        self.requests.fetch_add(1, Relaxed);
        if !events.is_empty() {
            self.latest_us.store(self.started.elapsed().as_micros() as u64, Relaxed);
        }
        Ok(())
    }

    fn counters(&self) -> CollectCounters {
        CollectCounters {
            received: self.received.load(Relaxed),
            skipped: self.skipped.load(Relaxed),
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
