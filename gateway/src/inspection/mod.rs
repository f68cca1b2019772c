//! What a store holds, whether it is whole, and where every event went: for the store tools, which
//! look at a folder, and for the admin endpoint, which looks at the store of the running gateway.
//!
//! Owns: the answers in their one form ([`report`]), the walks that give them, and the selection of
//! events to export. Invariant: both ways in give the same answer for the same store, and neither
//! changes it, but for the dead letters ([`letters`]) that somebody wants requeued or dropped.
//! Deliberately absent: opening stores, HTTP, and how an answer looks to people (see `cli::store`).

pub mod letters;
pub mod place;
pub mod report;

use std::io::{self, Write};
use std::ops::Range;
use std::time::{Duration, Instant};

use bridge::config::SinkConfig;
use bridge::{Export, Framing, Origin};
use storage::{Progress, ReadError, StateError, Store};

use crate::ingest::dedup;
use place::{Bound, BoundError};
use report::{BalanceReport, StatsReport, VerifyReport};

/// Why a look came to no end.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The log cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The state database cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// A bound of an export names no place.
    #[error(transparent)]
    Bound(#[from] BoundError),
    /// Who asked is gone, or its disk is full.
    #[error("cannot write the answer: {0}")]
    Write(#[from] io::Error),
    /// Whoever is told of the progress does not want the rest.
    #[error("stopped before the end")]
    Stopped,
}

/// Told now and then how far a walk is; whether it is to go on.
pub type Tell<'a> = &'a mut dyn FnMut(Progress) -> bool;

/// Statistics of a store.
///
/// # Errors
/// See [`InspectError`].
pub fn stats(store: &Store, gateway: &str) -> Result<StatsReport, InspectError> {
    Ok(StatsReport::new(store, gateway)?)
}

/// Walks everything and says whether it is whole.
///
/// # Errors
/// See [`InspectError`].
pub fn verify(store: &Store, gateway: &str, tell: Tell<'_>) -> Result<VerifyReport, InspectError> {
    let mut verifier = store.verify()?;
    while verifier.step()? {
        if !tell(verifier.progress()) {
            return Err(InspectError::Stopped);
        }
    }
    Ok(VerifyReport::new(&verifier.finish(), store, gateway))
}

/// Walks what is pending and puts the sums together.
///
/// # Errors
/// See [`InspectError`].
pub fn balance(
    store: &Store,
    gateway: &str,
    tell: Tell<'_>,
) -> Result<BalanceReport, InspectError> {
    let mut balancer = store.balance()?;
    while balancer.step()? {
        if !tell(balancer.progress()) {
            return Err(InspectError::Stopped);
        }
    }
    let duplicates = dedup::duplicates_of(store)?;
    Ok(BalanceReport::new(&balancer.finish()?, duplicates, store, gateway))
}

/// The offset of a place.
///
/// # Errors
/// See [`InspectError`].
pub fn seek(store: &Store, gateway: &str, bound: &Bound) -> Result<u64, InspectError> {
    Ok(store.seek(bound.place(gateway, store.epoch())?)?)
}

/// Which events to export, and how.
#[derive(Clone, Debug)]
pub struct Selection {
    /// From here on; nothing: from the first stored event.
    pub from: Option<Bound>,
    /// Up to, and without, this place; nothing: up to the last event that is durable now.
    pub to: Option<Bound>,
    /// Of this device key only.
    pub device: Option<String>,
    /// How the text looks.
    pub format: Framing,
}

/// What an export gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Events written.
    pub events: u64,
    /// Ranges that were asked for and cannot be read.
    pub unreadable: Vec<Range<u64>>,
    /// Events that were trimmed while this was under way.
    pub trimmed: u64,
}

/// Events and event bytes that an export reads at once.
const READ_EVENTS_MAX: usize = 1_024;
const READ_BYTES_MAX: usize = 1 << 20;
/// Unreadable ranges that are kept; further ones extend the last.
const UNREADABLE_MAX: usize = 100;

/// Writes the selected events. Memory does not grow with their number.
///
/// # Errors
/// See [`InspectError`].
pub fn export(
    store: &Store,
    gateway: &str,
    selection: &Selection,
    out: &mut dyn Write,
    tell: Tell<'_>,
) -> Result<Exported, InspectError> {
    let place = |bound: &Option<Bound>, otherwise| match bound {
        Some(bound) => seek(store, gateway, bound),
        None => Ok(otherwise),
    };
    let from = place(&selection.from, store.stats().first_offset)?;
    let to = place(&selection.to, store.mark().watermark)?;
    let origin = Origin { gateway: gateway.to_owned(), epoch: store.epoch() };
    let mut export = Export::new(&origin, SinkConfig::EVENT_TYPE, selection.format);
    let (mut exported, mut text, mut next) = (Exported::default(), Vec::new(), from);
    while next < to {
        let read = store.look(next, READ_EVENTS_MAX, READ_BYTES_MAX)?;
        for missing in read.missing {
            exported.miss(missing.start..missing.end.min(to), store.stats().first_offset);
        }
        let mut events = read.events;
        events.retain(|e| {
            e.offset < to && selection.device.as_ref().is_none_or(|key| e.event.device_key == *key)
        });
        export.write(&mut text, &events);
        exported.events += events.len() as u64;
        out.write_all(&text)?;
        text.clear();
        if read.next <= next {
            break;
        }
        next = read.next;
        let done = next.min(to) - from;
        if !tell(Progress { done, total: to - from }) {
            return Err(InspectError::Stopped);
        }
    }
    export.finish(&mut text);
    out.write_all(&text)?;
    out.flush()?;
    Ok(exported)
}

impl Exported {
    fn miss(&mut self, offsets: Range<u64>, first_offset: u64) {
        if offsets.end <= first_offset {
            self.trimmed += offsets.end.saturating_sub(offsets.start);
            return;
        }
        let full = self.unreadable.len() == UNREADABLE_MAX;
        match self.unreadable.last_mut() {
            Some(last) if full || last.end == offsets.start => last.end = offsets.end,
            _ if offsets.is_empty() => {}
            _ => self.unreadable.push(offsets),
        }
    }
}

/// Lets a thing happen at most so often.
#[derive(Debug)]
pub struct Pace {
    every: Duration,
    last: Instant,
}

impl Pace {
    /// At most once in `every`, and not before `every` has passed.
    pub fn new(every: Duration) -> Self {
        Self { every, last: Instant::now() }
    }

    /// Whether it is time.
    pub fn is_due(&mut self) -> bool {
        let due = self.last.elapsed() >= self.every;
        if due {
            self.last = Instant::now();
        }
        due
    }
}
