//! What the benches share: how long they run, medians, and what durability costs at least.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use storage::Event;

/// Rounds in which the contestants take turns, so that a noisy machine is noisy for all of them.
#[derive(Clone, Copy)]
pub(crate) struct Rounds {
    pub(crate) count: usize,
    /// How long each contestant runs in a round.
    pub(crate) time: Duration,
}

impl Rounds {
    /// Reads `[--quick] [--seconds N] [--rounds N]`.
    pub(crate) fn from_args(
        mut args: impl Iterator<Item = String>,
        full: Self,
        quick: Self,
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
                other => bail!("unknown argument {other}; try --quick, --seconds N, --rounds N"),
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
    file: File,
    at: usize,
    batch: Vec<u8>,
}

impl RawFile {
    /// Creates the file and writes every block once.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = File::create_new(path)?;
        // Page by page: the system counts a write by the unit in which the page cache holds it.
        let block = [0; 4096];
        for at in (0..SIZE_BYTES).step_by(block.len()) {
            file.write_all_at(&block, at as u64)?;
        }
        file.sync_all()?;
        Ok(Self { file, at: 0, batch: Vec::new() })
    }

    /// Writes the events as they are, and syncs. Durable on return. Gives the bytes written.
    pub(crate) fn append(&mut self, events: &[Event]) -> io::Result<usize> {
        self.batch.clear();
        for event in events {
            let parts: [&[u8]; 4] = [
                event.device_key.as_bytes(),
                event.topic.as_bytes(),
                event.attributes.as_bytes(),
                &event.payload,
            ];
            self.batch.extend_from_slice(&event.received_us.to_le_bytes());
            for part in parts {
                self.batch.extend_from_slice(&(part.len() as u32).to_le_bytes());
                self.batch.extend_from_slice(part);
            }
        }
        if self.at + self.batch.len() > SIZE_BYTES {
            self.at = 0;
        }
        self.file.write_all_at(&self.batch, self.at as u64)?;
        self.file.sync_data()?;
        self.at += self.batch.len();
        Ok(self.batch.len())
    }
}
