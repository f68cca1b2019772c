//! The log against the disk, and against what else one could store events in: commits of 1 to 4,096
//! events, each durable, in the steady state of a window that is trimmed as it moves.
//!
//! | name | what it is | durable by |
//! | --- | --- | --- |
//! | `raw` | one `pwrite` per batch into blocks that exist (see `support`): no log, but what every log pays at least | `fdatasync` |
//! | `journal` | the gateway's [`Store`]: global log of packed batches in rolling redb files, over the pipelined journal | its mark |
//! | `plain` | the same without a journal | its mark |
//! | `rows` | redb, one table `offset → record` | `Durability::Immediate` |
//! | `fjall` | an LSM tree, one keyspace `offset (big-endian) → record` | `PersistMode::SyncData` per batch |
//! | `sqlite` | one table `events(offset INTEGER PRIMARY KEY, partition, received_us, device_key, topic, attributes, payload)` | WAL, `synchronous = FULL`, one transaction per batch |
//!
//! Each keeps a window of 64 MB of events, filled before the clock starts. The log trims files of 16 MB,
//! and writes the next ones over them: blocks that batches of another size have left are
//! not quite those that it needs, so the steady state of a size shows the second time
//! (`--batch 256,256`); `rows` and `sqlite` delete ranges of 4,096 events at least, in the
//! transaction that appends; fjall drops whole tables (its FIFO strategy, the cheapest it has).
//! Every cache is 16 MB; fjall has memtables of 16 MB beside it. Nothing is compressed. A record is
//! what `raw` writes for an event: receive time, key, topic, attributes, payload.
//!
//! All run in turns, slice by slice, and a ratio is the median over the rounds of a contender's
//! rate through that of `raw` in the same round: so it survives a noisy machine. `mean` is the same
//! over all rounds together: rare, expensive work shows there. A slice ends when every commit of it
//! is durable and what the contender put off is done, so that nobody works in another's slice.
//! Written is what the device counts, against event bytes (payload + topic + key): the file system's
//! journal is in it, and what others write meanwhile as well. CPU is that of all threads, in the kernel
//! too.
//!
//! With `--model sd`, `raw` and the log run on a model of an SD card (see `sd`), each on one of its
//! own; written is then what reached the card, the file system's journal included, beside the
//! operations and flushes per commit. What is not on the storage seam cannot run there. Work put
//! off for long (rolling, checkpoints) needs long slices to show: `--seconds 10`.
//!
//! `cargo bench -p gateway --bench log [-- --quick] [--seconds N] [--rounds N] [--batch N,N]
//! [--payload N,N] [--only NAME,NAME] [--model sd]`. Figures are reported, never asserted.

mod rounds;
mod sd;
mod support;
mod traffic;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use fjall::{KeyspaceCreateOptions, PersistMode};
use redb::{Builder, Durability, TableDefinition};
use rounds::{Rounds, median};
use rusqlite::{Connection, params};
use rustix::time::{ClockId, clock_gettime};
use sd::{Card, CardDisk};
use storage::disk::{FileDisk, SharedDisk};
use storage::{AtQuota, Event, JournalMode, Store, StoreOptions};
use support::{RawFile, put_record};
use traffic::{Durable, PARTITIONS, event_bytes, events, now_us, written_bytes};

const WINDOW_BYTES: u64 = 64 << 20;
const FILE_BYTES: u64 = 16 << 20;
const CACHE_BYTES: usize = 16 << 20;
/// What is trimmed at once by those that delete rows.
const TRIM_EVENTS_MIN: u64 = 4096;
const FILL_BATCH: usize = 4096;

/// Something that keeps events.
trait Contender {
    /// Commits a batch and trims what leaves the window.
    fn append(&mut self, events: &[Event]) -> anyhow::Result<()>;

    /// Waits until every batch is durable.
    fn wait_durable(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    /// Waits for what it does behind its commits.
    fn settle(&mut self) {}
}

type Open = fn(&Place) -> anyhow::Result<Box<dyn Contender>>;

/// What stands on the storage seam, where a model can slow it down; `raw` comes first.
const ON_THE_SEAM: &[(&str, Open)] = &[
    ("raw", Raw::open),
    ("journal", |place| Log::open(place, place.store_options(JournalMode::On))),
    ("plain", |place| Log::open(place, place.store_options(JournalMode::Off))),
];
/// What only knows files.
const ON_FILES: &[(&str, Open)] =
    &[("rows", Rows::open), ("fjall", Fjall::open), ("sqlite", Sqlite::open)];

/// Where a contender lives.
struct Place {
    dir: PathBuf,
    card: Option<Arc<Card>>,
    window_events: u64,
}

impl Place {
    fn disk(&self) -> anyhow::Result<SharedDisk> {
        let disk = Arc::new(FileDisk::prepare(self.dir.clone(), "log")?);
        Ok(match &self.card {
            Some(card) => Arc::new(CardDisk::new(disk, card.clone())),
            None => disk,
        })
    }

    /// The store as it comes, but for its window.
    fn store_options(&self, journal: JournalMode) -> StoreOptions {
        StoreOptions {
            dir: self.dir.clone(),
            partitions: PARTITIONS,
            sinks: Vec::new(),
            file_bytes_max: FILE_BYTES,
            cache_bytes: CACHE_BYTES,
            quota_bytes: 4 * WINDOW_BYTES,
            free_bytes_min: 0,
            at_quota: AtQuota::DropOldest,
            retain_bytes: WINDOW_BYTES,
            retain_age_us: 0,
            dead_letter_bytes_max: 64 << 20,
            journal,
            journal_bytes: 32 << 20,
            compression: storage::Compression::None,
            commits_ahead_max: 2,
        }
    }
}

struct Raw(RawFile);

impl Raw {
    fn open(place: &Place) -> anyhow::Result<Box<dyn Contender>> {
        Ok(Box::new(Self(RawFile::new(place.disk()?.create("raw")?)?)))
    }
}

impl Contender for Raw {
    fn append(&mut self, events: &[Event]) -> anyhow::Result<()> {
        self.0.append(events)?;
        Ok(())
    }
}

struct Log {
    durable: Durable,
    last_commit: u64,
    unretained_bytes: u64,
}

impl Log {
    fn open(place: &Place, options: StoreOptions) -> anyhow::Result<Box<dyn Contender>> {
        let (_, writer) = Store::open_on(place.disk()?, options, now_us())?;
        let durable = Durable::new(writer);
        Ok(Box::new(Self { durable, last_commit: 0, unretained_bytes: 0 }))
    }
}

impl Contender for Log {
    fn append(&mut self, events: &[Event]) -> anyhow::Result<()> {
        self.last_commit = self.durable.writer.commit(events, &[], now_us())?.commit;
        self.unretained_bytes += event_bytes(events);
        if self.unretained_bytes >= FILE_BYTES / 4 {
            self.durable.writer.retain(now_us())?;
            self.unretained_bytes = 0;
        }
        Ok(())
    }

    fn wait_durable(&mut self) -> anyhow::Result<()> {
        self.durable.wait(self.last_commit)
    }
}

/// Which rows there are, for those that delete rows.
struct Window {
    rows: Range<u64>,
    events_max: u64,
}

impl Window {
    fn new(place: &Place) -> Self {
        Self { rows: 0..0, events_max: place.window_events }
    }

    /// Moves on by a batch. Gives its rows, and those to delete before.
    fn advance(&mut self, events: &[Event]) -> (Range<u64>, Range<u64>) {
        let new = self.rows.end..self.rows.end + events.len() as u64;
        self.rows.end = new.end;
        let first = self.rows.end.saturating_sub(self.events_max).max(self.rows.start);
        let mut old = self.rows.start..first;
        if old.end - old.start < TRIM_EVENTS_MIN {
            old.end = old.start;
        }
        self.rows.start = old.end;
        (new, old)
    }
}

const ROWS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events");

struct Rows {
    database: redb::Database,
    window: Window,
    record: Vec<u8>,
}

impl Rows {
    fn open(place: &Place) -> anyhow::Result<Box<dyn Contender>> {
        let path = place.dir.join("rows.redb");
        let database = Builder::new().set_cache_size(CACHE_BYTES).create(path)?;
        Ok(Box::new(Self { database, window: Window::new(place), record: Vec::new() }))
    }
}

impl Contender for Rows {
    fn append(&mut self, events: &[Event]) -> anyhow::Result<()> {
        let (new, old) = self.window.advance(events);
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        {
            let mut table = transaction.open_table(ROWS)?;
            // Before the inserts: afterwards it would push their pages out of the cache.
            if !old.is_empty() {
                table.retain_in(old, |_, _| false)?;
            }
            for (offset, event) in new.zip(events) {
                self.record.clear();
                put_record(event, &mut self.record);
                table.insert(offset, self.record.as_slice())?;
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

struct Fjall {
    database: fjall::Database,
    keyspace: fjall::Keyspace,
    next: u64,
}

impl Fjall {
    fn open(place: &Place) -> anyhow::Result<Box<dyn Contender>> {
        let database = fjall::Database::builder(place.dir.join("fjall"))
            .cache_size(CACHE_BYTES as u64)
            .max_journaling_size(WINDOW_BYTES)
            .open()?;
        let keyspace = database.keyspace("events", || {
            KeyspaceCreateOptions::default()
                .max_memtable_size(CACHE_BYTES as u64)
                .compaction_strategy(Arc::new(fjall::compaction::Fifo::new(WINDOW_BYTES, None)))
        })?;
        Ok(Box::new(Self { database, keyspace, next: 0 }))
    }
}

impl Contender for Fjall {
    fn append(&mut self, events: &[Event]) -> anyhow::Result<()> {
        let mut batch = self.database.batch().durability(Some(PersistMode::SyncData));
        for event in events {
            let mut record = Vec::new();
            put_record(event, &mut record);
            batch.insert(&self.keyspace, self.next.to_be_bytes(), record);
            self.next += 1;
        }
        batch.commit()?;
        Ok(())
    }

    fn settle(&mut self) {
        while self.keyspace.sealed_memtable_count() > 0 || self.database.active_compactions() > 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

struct Sqlite {
    connection: Connection,
    window: Window,
}

impl Sqlite {
    fn open(place: &Place) -> anyhow::Result<Box<dyn Contender>> {
        let connection = Connection::open(place.dir.join("events.sqlite"))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        // Negative: in KiB.
        connection.pragma_update(None, "cache_size", format!("-{}", CACHE_BYTES / 1024))?;
        connection.execute_batch(
            "CREATE TABLE events (offset INTEGER PRIMARY KEY, partition INTEGER,
             received_us INTEGER, device_key TEXT, topic TEXT, attributes BLOB, payload BLOB)",
        )?;
        Ok(Box::new(Self { connection, window: Window::new(place) }))
    }
}

impl Contender for Sqlite {
    fn append(&mut self, events: &[Event]) -> anyhow::Result<()> {
        let (new, old) = self.window.advance(events);
        let transaction = self.connection.transaction()?;
        {
            if !old.is_empty() {
                let sql = "DELETE FROM events WHERE offset < ?";
                transaction.prepare_cached(sql)?.execute([old.end.cast_signed()])?;
            }
            let sql = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)";
            let mut insert = transaction.prepare_cached(sql)?;
            for (offset, event) in new.zip(events) {
                insert.execute(params![
                    offset.cast_signed(),
                    event.partition,
                    event.received_us.cast_signed(),
                    &*event.device_key,
                    &*event.topic,
                    &event.attributes.as_bytes()[..],
                    &event.payload[..],
                ])?;
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

/// What to run.
struct Plan {
    rounds: Rounds,
    batches: Vec<usize>,
    payloads: Vec<usize>,
    contenders: Vec<(&'static str, Open)>,
    sd: bool,
}

impl Plan {
    fn from_args() -> anyhow::Result<Self> {
        let full = Rounds { count: 7, time: Duration::from_millis(700) };
        let quick = Rounds { count: 3, time: Duration::from_millis(200) };
        let (mut batches, mut payloads) = (vec![1, 16, 256, 4096], vec![128, 1024]);
        let (mut only, mut sd) = (None, false);
        let args = std::env::args().skip(1);
        let rounds = Rounds::from_args(args, full, quick, |arg, value| {
            match arg {
                "--batch" => batches = numbers(&value()?)?,
                "--payload" => payloads = numbers(&value()?)?,
                "--only" => only = Some(value()?),
                "--model" => {
                    ensure!(value()? == "sd", "the one model is sd");
                    sd = true;
                }
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        let mut contenders = ON_THE_SEAM.to_vec();
        if !sd {
            contenders.extend(ON_FILES);
        }
        if let Some(only) = only {
            let names: Vec<&str> = only.split(',').map(str::trim).collect();
            for name in &names {
                let known: Vec<&str> = contenders.iter().map(|(name, _)| *name).collect();
                ensure!(known.contains(name), "no contender {name} here; there are {known:?}");
            }
            // Every ratio is to raw.
            contenders.retain(|(name, _)| *name == "raw" || names.contains(name));
        }
        Ok(Self { rounds, batches, payloads, contenders, sd })
    }
}

fn numbers(list: &str) -> anyhow::Result<Vec<usize>> {
    let number = |n: &str| n.trim().parse().ok().filter(|&n| n > 0);
    list.split(',')
        .map(|n| number(n).with_context(|| format!("{n} is not a number above 0")))
        .collect()
}

/// A contender with what it did, slice by slice.
struct Runner {
    name: &'static str,
    dir: PathBuf,
    contender: Box<dyn Contender>,
    card: Option<Arc<Card>>,
    slices: Vec<Slice>,
}

struct Slice {
    time_s: f64,
    cpu_s: f64,
    commits: f64,
    events: f64,
    event_bytes: f64,
    written_bytes: f64,
    operations: f64,
    flushes: f64,
}

impl Slice {
    fn events_per_s(&self) -> f64 {
        self.events / self.time_s
    }
}

impl Runner {
    /// Opens a contender in a folder of its own and fills its window.
    fn open(
        name: &'static str,
        open: Open,
        dir: &Path,
        plan: &Plan,
        fill: &[Event],
    ) -> anyhow::Result<Self> {
        let dir = dir.join(name);
        std::fs::create_dir(&dir)?;
        let card = plan.sd.then(|| Arc::new(Card::new()));
        let window_events = WINDOW_BYTES * fill.len() as u64 / event_bytes(fill);
        let mut contender = open(&Place { dir: dir.clone(), card: card.clone(), window_events })?;
        // Half as much again as the window, so that all have begun to trim.
        for _ in 0..(window_events * 3 / 2).div_ceil(fill.len() as u64) {
            contender.append(fill)?;
        }
        contender.wait_durable()?;
        contender.settle();
        if let Some(card) = &card {
            card.turn_on();
        }
        Ok(Self { name, dir, contender, card, slices: Vec::new() })
    }

    /// Commits the same batch over and over for a while.
    fn run(&mut self, time: Duration, batch: &[Event]) -> anyhow::Result<()> {
        let card = self.card.as_deref();
        let (card_before, written_before, cpu_before) =
            (card.map(Card::work), written_bytes(&self.dir)?, cpu_s());
        let (began, mut commits) = (Instant::now(), 0_u64);
        while began.elapsed() < time {
            self.contender.append(batch)?;
            commits += 1;
        }
        self.contender.wait_durable()?;
        self.contender.settle();
        if let Some(card) = card {
            card.wait_idle();
        }
        let time_s = began.elapsed().as_secs_f64();
        let mut slice = Slice {
            time_s,
            cpu_s: cpu_s() - cpu_before,
            commits: commits as f64,
            events: (commits * batch.len() as u64) as f64,
            event_bytes: (commits * event_bytes(batch)) as f64,
            written_bytes: (written_bytes(&self.dir)? - written_before) as f64,
            operations: 0.0,
            flushes: 0.0,
        };
        if let Some((card, before)) = card.zip(card_before) {
            let after = card.work();
            slice.written_bytes = (after.written_bytes - before.written_bytes) as f64;
            slice.operations = (after.operations - before.operations) as f64;
            slice.flushes = (after.flushes - before.flushes) as f64;
        }
        self.slices.push(slice);
        Ok(())
    }

    fn sum(&self, figure: impl Fn(&Slice) -> f64) -> f64 {
        self.slices.iter().map(figure).sum()
    }

    fn report(&self, raw: &Self, payload_bytes: usize, batch: usize) {
        let pairs: Vec<(&Slice, &Slice)> = self.slices.iter().zip(&raw.slices).collect();
        let ratio = median(&pairs, |(own, raw)| own.events_per_s() / raw.events_per_s());
        let mean_rate = |of: &Self| of.sum(|s| s.events) / of.sum(|s| s.time_s);
        print!(
            "{payload_bytes:>7} {batch:>5} {:<14} {:>10.0} {ratio:>6.2} {:>6.2} {:>9.0} {:>8.2} {:>9.2}",
            self.name,
            median(&self.slices, Slice::events_per_s),
            mean_rate(self) / mean_rate(raw),
            median(&self.slices, |s| s.time_s / s.commits) * 1e6,
            self.sum(|s| s.cpu_s) / self.sum(|s| s.events) * 1e6,
            self.sum(|s| s.written_bytes) / self.sum(|s| s.event_bytes),
        );
        if self.card.is_some() {
            let commits = self.sum(|s| s.commits);
            print!(
                " {:>10.1} {:>7.1}",
                self.sum(|s| s.operations) / commits,
                self.sum(|s| s.flushes) / commits
            );
        }
        println!();
    }
}

fn main() -> anyhow::Result<()> {
    let plan = Plan::from_args()?;
    println!(
        "{} rounds of {:?} each, in turns, {}",
        plan.rounds.count,
        plan.rounds.time,
        if plan.sd { "on the model of an SD card" } else { "on the disk that holds the build" }
    );
    print!(
        "{:>7} {:>5} {:<14} {:>10} {:>6} {:>6} {:>9} {:>8} {:>9}",
        "payload", "batch", "", "events/s", "ratio", "mean", "µs/commit", "CPU µs/e", "written/B"
    );
    println!("{}", if plan.sd { " ops/commit flushes" } else { "" });
    for &payload_bytes in &plan.payloads {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let fill = events(FILL_BATCH, payload_bytes);
        let mut runners = Vec::new();
        for &(name, open) in &plan.contenders {
            runners.push(Runner::open(name, open, dir.path(), &plan, &fill)?);
        }
        for &batch in &plan.batches {
            let events = events(batch, payload_bytes);
            for _ in 0..plan.rounds.count {
                for runner in &mut runners {
                    runner
                        .run(plan.rounds.time, &events)
                        .with_context(|| runner.name.to_owned())?;
                }
            }
            for runner in &runners {
                runner.report(&runners[0], payload_bytes, batch);
            }
            for runner in &mut runners {
                runner.slices.clear();
            }
        }
    }
    Ok(())
}

/// CPU time of this process, all threads.
fn cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
