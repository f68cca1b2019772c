//! What the benches share: how long they run, medians, and what durability costs at least.

use std::io;
use std::time::Duration;

use anyhow::{Context, ensure};
use redb::StorageBackend;
use storage::Event;

/// Rounds in which the contestants take turns, so that a noisy machine is noisy for all of them.
#[derive(Clone, Copy)]
pub(crate) struct Rounds {
    pub(crate) count: usize,
    /// How long each contestant runs in a round.
    pub(crate) time: Duration,
}

impl Rounds {
    /// Reads `[--quick] [--seconds N] [--rounds N]`. What else the bench takes goes to `own` with a
    /// way to its value; that says whether it knows it.
    pub(crate) fn from_args(
        mut args: impl Iterator<Item = String>,
        full: Self,
        quick: Self,
        mut own: impl FnMut(&str, &mut dyn FnMut() -> anyhow::Result<String>) -> anyhow::Result<bool>,
    ) -> anyhow::Result<Self> {
        let mut rounds = full;
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--quick" => rounds = quick,
                "--seconds" => rounds.time = Duration::try_from_secs_f64(value()?.parse()?)?,
                "--rounds" => rounds.count = value()?.parse()?,
                // What cargo passes to every bench.
                "--bench" => {}
                other => ensure!(own(other, &mut value)?, "unknown argument {other}"),
            }
        }
        ensure!(rounds.count > 0 && !rounds.time.is_zero(), "nothing to measure");
        Ok(rounds)
    }
}

/// The median of one figure over all rounds.
pub(crate) fn median<T>(outcomes: &[T], figure: impl Fn(&T) -> f64) -> f64 {
    let mut figures: Vec<f64> = outcomes.iter().map(figure).collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

const SIZE_BYTES: usize = 64 << 20;

/// What durability costs at least: one write and one fdatasync per batch, into blocks that exist.
///
/// The file is written once in full and then overwritten in a circle, because fresh blocks cost the
/// file system's own journal a flush as well. This is the fastest way to be durable on a file
/// system, and it is no log: it can neither be read nor recovered.
pub(crate) struct RawFile {
    file: Box<dyn StorageBackend>,
    at: usize,
    batch: Vec<u8>,
}

impl RawFile {
    /// Writes every block of a new file once.
    pub(crate) fn new(file: Box<dyn StorageBackend>) -> io::Result<Self> {
        file.set_len(SIZE_BYTES as u64)?;
        // Page by page: the system counts a write by the unit in which the page cache holds it.
        let block = [0; 4096];
        for at in (0..SIZE_BYTES).step_by(block.len()) {
            file.write(at as u64, &block)?;
        }
        file.sync_data()?;
        Ok(Self { file, at: 0, batch: Vec::new() })
    }

    /// Writes the events as they are, and syncs. Durable on return. Gives the bytes written.
    pub(crate) fn append(&mut self, events: &[Event]) -> io::Result<usize> {
        self.batch.clear();
        for event in events {
            put_record(event, &mut self.batch);
        }
        if self.at + self.batch.len() > SIZE_BYTES {
            self.at = 0;
        }
        self.file.write(self.at as u64, &self.batch)?;
        self.file.sync_data()?;
        self.at += self.batch.len();
        Ok(self.batch.len())
    }
}

/// An event as plain bytes: what a store without a format of its own keeps of it.
pub(crate) fn put_record(event: &Event, out: &mut Vec<u8>) {
    let parts: [&[u8]; 4] = [
        event.device_key.as_bytes(),
        event.topic.as_bytes(),
        event.attributes.as_bytes(),
        &event.payload,
    ];
    out.extend_from_slice(&event.received_us.to_le_bytes());
    for part in parts {
        out.extend_from_slice(&(part.len() as u32).to_le_bytes());
        out.extend_from_slice(part);
    }
}
