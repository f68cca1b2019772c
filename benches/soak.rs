//! The log for a long time: appending, reading and trimming at once, and opening it after a SIGKILL
//! on top of a backlog.
//!
//! Without `--reopen`, one thread commits batches while another reads them as a sink does and moves
//! its cursor; what was read is trimmed behind a window of 512 MB, and at the quota the writer
//! waits. Each GB of event bytes (payload + topic + key) gets a line: rate, bytes that the disk counts
//! as written against event bytes (also what others write meanwhile), bytes of the log files on the
//! device and the most that they were in that GB, resident memory now and at most so far, and how far
//! the reader was behind.
//!
//! With `--reopen`, a child process fills the log for a sink that takes nothing, and is killed
//! while it goes on committing. This process opens the log then and says when the first new commit
//! is durable, and what memory that took.
//!
//! `cargo bench -p gateway --bench soak [-- --gigabytes N] [--reopen] [--window MB] [--batch N]
//! [--payload N] [--journal auto|on|off]`: 10 GB, or a backlog of 1 GB, in batches of 256 events with
//! 1,024 B of payload, with a journal if it gains on this disk.
//! Figures are reported, never asserted.

mod traffic;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use storage::{AtQuota, CommitError, Control, JournalMode, SinkRetention, Store, StoreOptions};
use traffic::{Durable, PARTITIONS, event_bytes, events, now_us, written_bytes};

const SINK: &str = "upstream";
const FILE_BYTES: u64 = 64 << 20;
/// Files that are trimmed only whole, and the one that is appended to, stand above what is kept.
const SLACK_BYTES: u64 = 2 * FILE_BYTES;
const RETAIN_EVERY_BYTES: u64 = 4 << 20;
const READ_EVENTS_MAX: usize = 4096;
const READ_BYTES_MAX: usize = 1 << 20;
/// How the child is told what it is.
const FILL: &str = "fill";

struct Plan {
    gigabytes: Option<f64>,
    window_bytes: u64,
    batch: usize,
    payload_bytes: usize,
    reopen: bool,
    journal: JournalMode,
}

const JOURNALS: [(&str, JournalMode); 3] =
    [("auto", JournalMode::Auto), ("on", JournalMode::On), ("off", JournalMode::Off)];

impl Plan {
    fn from_args(mut args: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut plan = Self {
            gigabytes: None,
            window_bytes: 512 << 20,
            batch: 256,
            payload_bytes: 1024,
            reopen: false,
            journal: JournalMode::Auto,
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--gigabytes" => plan.gigabytes = Some(value()?.parse()?),
                "--window" => plan.window_bytes = value()?.parse::<u64>()? << 20,
                "--batch" => plan.batch = value()?.parse()?,
                "--payload" => plan.payload_bytes = value()?.parse()?,
                "--reopen" => plan.reopen = true,
                "--journal" => {
                    let name = value()?;
                    let mode = JOURNALS.into_iter().find(|(known, _)| *known == name);
                    plan.journal = mode.context("--journal is auto, on or off")?.1;
                }
                // What cargo passes to every bench.
                "--bench" => {}
                other => bail!("unknown argument {other}"),
            }
        }
        ensure!(plan.batch > 0 && plan.gigabytes.is_none_or(|n| n > 0.0), "nothing to measure");
        ensure!(plan.window_bytes >= 4 * FILE_BYTES, "the window takes 256 MB at least");
        Ok(plan)
    }

    fn journal_name(&self) -> &'static str {
        JOURNALS.into_iter().find(|(_, mode)| *mode == self.journal).map_or("", |(name, _)| name)
    }

    /// What is to be appended. Nothing was asked for: 10 GB, or a backlog of 1 GB.
    fn total_bytes(&self) -> u64 {
        let default = if self.reopen { 1.0 } else { 10.0 };
        (self.gigabytes.unwrap_or(default) * 1e9) as u64
    }

    /// The store as it comes, but for its size.
    fn options(&self, dir: &Path) -> StoreOptions {
        // A backlog is not to meet a quota: twice for what redb takes beside it.
        let quota_bytes =
            if self.reopen { 2 * self.total_bytes() + SLACK_BYTES } else { self.window_bytes };
        StoreOptions {
            dir: dir.to_owned(),
            partitions: PARTITIONS,
            sinks: vec![SinkRetention::new(SINK)],
            file_bytes_max: FILE_BYTES,
            cache_bytes: 16 << 20,
            quota_bytes,
            free_bytes_min: 0,
            at_quota: AtQuota::Hold,
            retain_bytes: self.window_bytes - SLACK_BYTES,
            retain_age_us: 0,
            dead_letter_bytes_max: 64 << 20,
            journal: self.journal,
            journal_bytes: 32 << 20,
            compression: storage::Compression::None,
            commits_ahead_max: 2,
        }
    }
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if_eq(FILL).is_some() {
        let dir = PathBuf::from(args.next().context("fill DIR")?);
        return fill(&Plan::from_args(args)?, &dir);
    }
    let plan = Plan::from_args(args)?;
    // On the disk that holds the build, not in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    if plan.reopen { reopen(&plan, dir.path()) } else { soak(&plan, dir.path()) }
}

/// What the two threads tell each other.
#[derive(Default)]
struct Progress {
    cursor: AtomicU64,
    events_read: AtomicU64,
    appended: AtomicBool,
}

/// What there was to see at the end of a GB.
struct Sight {
    at: Instant,
    event_bytes: u64,
    events: u64,
    written_bytes: u64,
}

impl Sight {
    fn now(dir: &Path, event_bytes: u64, events: u64) -> anyhow::Result<Self> {
        Ok(Self { at: Instant::now(), event_bytes, events, written_bytes: written_bytes(dir)? })
    }

    /// Prints what happened since.
    fn report(&self, since: &Self, what: &str, tail: &str) {
        let time_s = (self.at - since.at).as_secs_f64();
        let event_bytes = (self.event_bytes - since.event_bytes) as f64;
        println!(
            "{what:>6} {:>8.1} {:>10.0} {:>8.1} {:>9.2} {tail}",
            time_s,
            (self.events - since.events) as f64 / time_s,
            event_bytes / 1e6 / time_s,
            (self.written_bytes - since.written_bytes) as f64 / event_bytes,
        );
    }
}

fn soak(plan: &Plan, dir: &Path) -> anyhow::Result<()> {
    let (store, writer) = Store::open(plan.options(dir), now_us())?;
    let progress = Progress::default();
    println!(
        "{} B payload, batches of {}, {:.1} GB through a window of {} MB, journal {}\n\
         {:>6} {:>8} {:>10} {:>8} {:>9} {:>8} {:>8} {:>8} {:>8} {:>9}",
        plan.payload_bytes,
        plan.batch,
        plan.total_bytes() as f64 / 1e9,
        plan.window_bytes >> 20,
        plan.journal_name(),
        "GB",
        "seconds",
        "events/s",
        "MB/s",
        "written/B",
        "log MB",
        "most",
        "RSS MB",
        "peak",
        "behind"
    );
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(&store, &progress));
        let appended = append(plan, dir, &store, Durable::new(writer), &progress);
        progress.appended.store(true, Ordering::Release);
        let read = reader.join().expect("the reader does not panic");
        let (events, durable) = appended?;
        read?;
        ensure!(
            progress.events_read.load(Ordering::Acquire) == events,
            "the reader has not seen every event"
        );
        Ok(durable.writer.close()?)
    })
}

/// Appends everything. Gives the number of events, and the writer back: closing it would end the
/// reader.
fn append(
    plan: &Plan,
    dir: &Path,
    store: &Store,
    mut durable: Durable,
    progress: &Progress,
) -> anyhow::Result<(u64, Durable)> {
    let batch = events(plan.batch, plan.payload_bytes);
    let batch_bytes = event_bytes(&batch);
    let (mut appended_bytes, mut appended, mut unretained_bytes) = (0, 0, 0);
    let (mut moved, mut log_bytes_most, mut log_bytes_ever) = (0, 0, 0);
    let began = Sight::now(dir, 0, 0)?;
    let mut last = Sight::now(dir, 0, 0)?;
    while appended_bytes < plan.total_bytes() {
        let cursor = progress.cursor.load(Ordering::Acquire);
        let controls = control(&mut moved, cursor);
        let committed = match durable.writer.commit(&batch, &controls, now_us()) {
            Ok(committed) => committed,
            Err(CommitError::Quota { .. }) => {
                // The reader is a window behind: only its cursor makes room.
                thread::sleep(Duration::from_millis(1));
                let cursor = progress.cursor.load(Ordering::Acquire);
                durable.writer.commit(&[], &control(&mut moved, cursor), now_us())?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        appended_bytes += batch_bytes;
        appended += batch.len() as u64;
        unretained_bytes += batch_bytes;
        if unretained_bytes >= RETAIN_EVERY_BYTES {
            unretained_bytes = 0;
            log_bytes_most = store.stats().log_bytes.max(log_bytes_most);
            durable.writer.retain(now_us())?;
        }
        let gigabytes = appended_bytes / 1_000_000_000;
        if gigabytes > last.event_bytes / 1_000_000_000 || appended_bytes >= plan.total_bytes() {
            durable.wait(committed.commit)?;
            let now = Sight::now(dir, appended_bytes, appended)?;
            let behind = committed.offsets.end - progress.cursor.load(Ordering::Acquire);
            let stats = store.stats();
            let tail = format!(
                "{:>8.0} {:>8.0} {:>8.1} {:>8.1} {behind:>9}",
                stats.log_bytes as f64 / 1e6,
                log_bytes_most.max(stats.log_bytes) as f64 / 1e6,
                memory_mb("VmRSS")?,
                memory_mb("VmHWM")?,
            );
            now.report(&last, &format!("{:.1}", appended_bytes as f64 / 1e9), &tail);
            log_bytes_ever = log_bytes_ever.max(log_bytes_most);
            log_bytes_most = 0;
            last = now;
        }
    }
    let tail = format!(
        "{:>8} {:>8.0} {:>8} {:>8.1}",
        "",
        log_bytes_ever as f64 / 1e6,
        "",
        memory_mb("VmHWM")?
    );
    last.report(&began, "all", &tail);
    Ok((appended, durable))
}

/// A cursor that has moved, for the next commit.
fn control(moved: &mut u64, cursor: u64) -> Vec<Control> {
    if *moved == cursor {
        return Vec::new();
    }
    *moved = cursor;
    vec![Control::Cursor { sink: SINK.into(), offset: cursor }]
}

/// Follows the log as a sink does, until everything appended is read.
fn read(store: &Store, progress: &Progress) -> anyhow::Result<()> {
    let mut cursor = 0;
    loop {
        // Asked first: nothing is appended between this and the end that the read then finds.
        let appended = progress.appended.load(Ordering::Acquire);
        let read = store.read(cursor, READ_EVENTS_MAX, READ_BYTES_MAX)?;
        ensure!(read.missing.is_empty(), "the reader finds a gap: {:?}", read.missing);
        progress.events_read.fetch_add(read.events.len() as u64, Ordering::AcqRel);
        if read.next == cursor {
            if appended {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(1));
        }
        cursor = read.next;
        progress.cursor.store(cursor, Ordering::Release);
    }
}

/// The child: fills the log, says up to where it is durable, and goes on until it is killed.
fn fill(plan: &Plan, dir: &Path) -> anyhow::Result<()> {
    let (_store, writer) = Store::open(plan.options(dir), now_us())?;
    let mut durable = Durable::new(writer);
    let batch = events(plan.batch, plan.payload_bytes);
    let mut left_bytes = plan.total_bytes();
    loop {
        let committed = durable.writer.commit(&batch, &[], now_us())?;
        if left_bytes > 0 {
            left_bytes = left_bytes.saturating_sub(event_bytes(&batch));
            if left_bytes == 0 {
                durable.wait(committed.commit)?;
                println!("{}", committed.offsets.end);
            }
        }
    }
}

/// A process that is killed, at the latest when nobody waits for it any more.
struct Filler(Child);

impl Drop for Filler {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn reopen(plan: &Plan, dir: &Path) -> anyhow::Result<()> {
    let began = Instant::now();
    let total_bytes = plan.total_bytes();
    let mut filler = Filler(
        Command::new(std::env::current_exe()?)
            .arg(FILL)
            .arg(dir)
            .arg("--reopen")
            .args(["--gigabytes", &(total_bytes as f64 / 1e9).to_string()])
            .args(["--batch", &plan.batch.to_string()])
            .args(["--payload", &plan.payload_bytes.to_string()])
            .args(["--journal", plan.journal_name()])
            .stdout(Stdio::piped())
            .spawn()?,
    );
    let mut line = String::new();
    BufReader::new(filler.0.stdout.take().context("no stdout")?).read_line(&mut line)?;
    let watermark: u64 = line.trim().parse().context("the filler failed")?;
    let filled_s = began.elapsed().as_secs_f64();
    // In the middle of the commits after that.
    thread::sleep(Duration::from_millis(300));
    drop(filler);

    let rss_mb = memory_mb("VmRSS")?;
    let began = Instant::now();
    let (store, writer) = Store::open(plan.options(dir), now_us())?;
    let opened_ms = began.elapsed().as_secs_f64() * 1e3;
    let mut durable = Durable::new(writer);
    let committed = durable.writer.commit(&events(1, plan.payload_bytes), &[], now_us())?;
    durable.wait(committed.commit)?;
    let durable_ms = began.elapsed().as_secs_f64() * 1e3;
    ensure!(committed.offsets.start >= watermark, "durable events are missing");
    let stats = store.stats();
    println!(
        "a backlog of {:.1} GB in {} files ({:.0} MB on disk, filled in {filled_s:.0} s), journal {}, \
         killed while committing\n\
         opened after {opened_ms:.0} ms, the first commit durable after {durable_ms:.0} ms\n\
         resident: {rss_mb:.1} MB before, {:.1} MB after, {:.1} MB at most",
        total_bytes as f64 / 1e9,
        stats.files,
        stats.log_bytes as f64 / 1e6,
        plan.journal_name(),
        memory_mb("VmRSS")?,
        memory_mb("VmHWM")?,
    );
    durable.writer.close()?;
    Ok(())
}

/// A line of `/proc/self/status` in MB.
fn memory_mb(name: &str) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    let kib: f64 = line.context("no such line")?.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1_024.0 / 1e6)
}
