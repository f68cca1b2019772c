//! The dead letters of a store: what they are, which ones somebody means, and what is to become of
//! them.
//!
//! Owns: the answers in their one form, and [`Selection`]. `requeue` and `drop` are the only things in
//! `inspection` that change a store; both go in steps of a thousand letters, each durable by itself.
//! Deliberately absent: telling the forwarder (see `admin::letters`).

use std::io::{self, Write};

use bridge::Origin;
use bridge::config::SinkConfig;
use serde::{Deserialize, Serialize};
use storage::{DeadLetter, EventId, KeptLetter, Picked, StateError, Store};

use super::InspectError;
use super::place::Bound;

/// Letters that one page lists at most.
pub const PAGE_MAX: usize = 1_000;
/// Letters that an export reads at once.
const READ_MAX: usize = 256;

/// One dead letter, without its payload. Times are microseconds since the Unix epoch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LetterReport {
    /// The sink that refused it.
    pub sink: String,
    /// Offset in the log.
    pub offset: u64,
    /// The event's name: gateway, epoch, partition and sequence number.
    pub id: String,
    /// Device key.
    pub device: String,
    /// MQTT topic.
    pub topic: String,
    /// What the sink said.
    pub reason: String,
    /// How many times it was offered.
    pub attempts: u32,
    /// First attempt.
    pub first_us: u64,
    /// Last attempt.
    pub last_us: u64,
    /// When the gateway received it.
    pub received_us: u64,
    /// Bytes of its payload.
    pub payload_bytes: u64,
    /// Since when it is to be delivered again, if it is.
    pub requeued_us: Option<u64>,
}

/// What the dead letters of a sink come to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LetterSums {
    /// The sink.
    pub sink: String,
    /// Letters.
    pub events: u64,
    /// Bytes that they take.
    pub size_bytes: u64,
    /// Of the letters, those that are to be delivered again.
    pub requeued: u64,
}

/// `dlq list`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LetterPage {
    /// Every sink that has dead letters.
    pub sinks: Vec<LetterSums>,
    /// By sink, oldest first.
    pub letters: Vec<LetterReport>,
    /// Where the next page begins, if there is one.
    pub next: Option<NextPage>,
}

/// Where a page begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextPage {
    /// The sink.
    pub sink: String,
    /// The first offset.
    pub from: u64,
}

/// Which page to list.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageQuery {
    /// Of this sink only.
    pub sink: Option<String>,
    /// From this offset on.
    pub from: Option<u64>,
    /// So many letters at most; [`PAGE_MAX`] where nothing is said.
    pub limit: Option<usize>,
}

/// Which dead letters somebody means.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selection {
    /// Of this sink.
    pub sink: String,
    /// These: an offset, partition and sequence number, or the whole id of an event.
    #[serde(default)]
    pub events: Vec<String>,
    /// All of them, where none is named.
    #[serde(default)]
    pub all: bool,
    /// Of them, those of this device key.
    pub device: Option<String>,
    /// Of them, those whose reason contains this text.
    pub reason: Option<String>,
}

/// What a change of dead letters did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Letters that were changed.
    pub events: u64,
}

/// A selection that names places in this store.
#[derive(Clone, Debug)]
pub struct Selected {
    sink: String,
    events: Vec<Wanted>,
    device: Option<String>,
    reason: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Offset(u64),
    Seq { partition: u16, seq: u64 },
}

impl Selection {
    /// Finds out which letters of this store are meant.
    ///
    /// # Errors
    /// What is wrong with it, in one line.
    pub fn of(self, store: &Store, gateway: &str) -> Result<Selected, String> {
        if self.events.is_empty() != self.all {
            return Err("name the events, or say that all are meant (--all)".into());
        }
        let mut events = Vec::with_capacity(self.events.len());
        for text in &self.events {
            let bound: Bound = text.parse().map_err(|wrong| format!("an event {wrong}"))?;
            bound.place(gateway, store.epoch()).map_err(|wrong| wrong.to_string())?;
            events.push(match bound {
                Bound::Offset(offset) => Wanted::Offset(offset),
                Bound::Seq { partition, seq, .. } => Wanted::Seq { partition, seq },
                Bound::Time(_) => {
                    return Err(format!("an event is named by its offset or id, not {text:?}"));
                }
            });
        }
        let Self { sink, device, reason, .. } = self;
        Ok(Selected { sink, events, device, reason })
    }
}

impl Selected {
    /// The sink whose letters are meant.
    pub fn sink(&self) -> &str {
        &self.sink
    }

    fn wants(&self, letter: &DeadLetter) -> bool {
        let event = &letter.event;
        let named = |wanted: &Wanted| match *wanted {
            Wanted::Offset(offset) => event.offset == offset,
            Wanted::Seq { partition, seq } => {
                (event.event.partition, event.seq) == (partition, seq)
            }
        };
        (self.events.is_empty() || self.events.iter().any(named))
            && self.device.as_ref().is_none_or(|key| event.event.device_key == *key)
            && self.reason.as_ref().is_none_or(|text| letter.reason.contains(text.as_str()))
    }

    /// The first and the last offset that it may be about.
    fn offsets(&self) -> (u64, u64) {
        let of = |wanted: &Wanted| match *wanted {
            Wanted::Offset(offset) => Some(offset),
            Wanted::Seq { .. } => None,
        };
        let offsets: Option<Vec<u64>> = self.events.iter().map(of).collect();
        let offsets = offsets.unwrap_or_default();
        let (first, last) = (offsets.iter().min(), offsets.iter().max());
        (first.copied().unwrap_or(0), last.copied().unwrap_or(u64::MAX))
    }
}

/// A page of dead letters.
///
/// # Errors
/// See [`InspectError`].
pub fn list(store: &Store, gateway: &str, query: &PageQuery) -> Result<LetterPage, InspectError> {
    let sums: Vec<LetterSums> = store
        .stats()
        .dead_letters
        .into_iter()
        .map(|(sink, stats)| LetterSums {
            sink,
            events: stats.events,
            size_bytes: stats.size_bytes,
            requeued: stats.requeued,
        })
        .collect();
    let limit = query.limit.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
    let mut page = LetterPage { sinks: sums, letters: Vec::new(), next: None };
    let mut found: Vec<KeptLetter> = Vec::new();
    let sinks = page.sinks.iter().map(|sums| &sums.sink);
    for sink in sinks.filter(|sink| query.sink.as_ref().is_none_or(|wanted| wanted == *sink)) {
        // One more than is shown: then there is a next page, and this is where it begins.
        let room = limit + 1 - found.len();
        found.extend(store.dead_letters(sink, query.from.unwrap_or(0), room)?);
        if found.len() > limit {
            break;
        }
    }
    page.next = found
        .get(limit)
        .map(|kept| NextPage { sink: kept.letter.sink.clone(), from: kept.letter.event.offset });
    found.truncate(limit);
    page.letters = found.into_iter().map(|kept| report(store, gateway, kept)).collect();
    Ok(page)
}

fn report(store: &Store, gateway: &str, kept: KeptLetter) -> LetterReport {
    let KeptLetter { letter, requeued_us } = kept;
    let event = &letter.event.event;
    let (epoch, partition, seq) = (store.epoch(), event.partition, letter.event.seq);
    LetterReport {
        offset: letter.event.offset,
        id: EventId { gateway, epoch, partition, seq }.to_string(),
        device: event.device_key.to_string(),
        topic: event.topic.to_string(),
        received_us: event.received_us,
        payload_bytes: event.payload.len() as u64,
        sink: letter.sink,
        reason: letter.reason,
        attempts: letter.attempts,
        first_us: letter.first_us,
        last_us: letter.last_us,
        requeued_us,
    }
}

/// Writes the selected letters as CloudEvents, one a line, with what became of them as extension
/// attributes. Gives how many. Memory does not grow with their number.
///
/// # Errors
/// See [`InspectError`].
pub fn export(
    store: &Store,
    gateway: &str,
    selected: &Selected,
    out: &mut dyn Write,
    go_on: &dyn Fn() -> bool,
) -> Result<u64, InspectError> {
    let origin = Origin { gateway: gateway.to_owned(), epoch: store.epoch() };
    let (mut from, last) = selected.offsets();
    let (mut events, mut text) = (0, Vec::new());
    loop {
        let kept = store.dead_letters(&selected.sink, from, READ_MAX)?;
        let Some(end) = kept.last().map(|kept| kept.letter.event.offset) else { break };
        let wanted: Vec<&DeadLetter> =
            kept.iter().map(|kept| &kept.letter).filter(|letter| selected.wants(letter)).collect();
        events += wanted.len() as u64;
        bridge::export_letters(&origin, SinkConfig::EVENT_TYPE, &mut text, wanted);
        out.write_all(&text)?;
        text.clear();
        if end >= last {
            break;
        }
        if !go_on() {
            return Err(InspectError::Stopped);
        }
        from = end + 1;
    }
    out.flush()?;
    Ok(events)
}

/// How many letters are selected.
///
/// # Errors
/// See [`InspectError`].
pub fn count(store: &Store, gateway: &str, selected: &Selected) -> Result<Changed, InspectError> {
    let events = export(store, gateway, selected, &mut io::sink(), &|| true)?;
    Ok(Changed { events })
}

/// Marks the selected letters to be delivered again.
///
/// # Errors
/// [`StateError`]; those that were marked before it stay marked.
pub fn requeue(store: &Store, selected: &Selected, now_us: u64) -> Result<Changed, StateError> {
    change(selected, |from| {
        store.requeue(&selected.sink, from, &|letter| selected.wants(letter), now_us)
    })
}

/// Drops the selected letters, each into the loss ledger.
///
/// # Errors
/// [`StateError`]; those that were dropped before it stay dropped.
pub fn drop(store: &Store, selected: &Selected, now_us: u64) -> Result<Changed, StateError> {
    change(selected, |from| {
        store.drop_dead_letters(&selected.sink, from, &|letter| selected.wants(letter), now_us)
    })
}

fn change(
    selected: &Selected,
    mut step: impl FnMut(u64) -> Result<Picked, StateError>,
) -> Result<Changed, StateError> {
    let (first, last) = selected.offsets();
    let (mut events, mut next) = (0, Some(first));
    while let Some(from) = next.filter(|from| *from <= last) {
        let picked = step(from)?;
        events += picked.events;
        next = picked.next;
    }
    Ok(Changed { events })
}
