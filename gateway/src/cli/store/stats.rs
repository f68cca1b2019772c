//! `store stats`: what is in the store, and what it costs the card.
//!
//! What lies in the store is counted. What was written to get it there is not in the store, so the
//! wear of the card is an estimate, and says so.

use clap::Args;
use serde::Serialize;
use storage::JournalMode;

use super::super::{ConfigFile, DONE, FAILED};
use super::{Look, fail, look, print};
use crate::config::units;
use crate::inspection::place::time;
use crate::inspection::{self, report::StatsReport};
use crate::text::{bytes, count, duration, table};

#[derive(Args)]
#[command(after_help = "\
The wear of the card is an estimate. A commit writes its batches and about 8 pages of 4 KiB beside them
(redb's header, roots, lists of free pages and path to the batch); every stored batch is taken for a
commit of its own, which is too many under load and right for a trickle. Unless storage.journal is
\"off\", all of that is written twice: first into the journal. Bytes per day follow from the
receive times of what is stored, unless --bytes-per-day says what the system measured
(/proc/diskstats, or the card's own counter).

The default endurance, 10 TB, is what a plain 32 GB card bears: 1,000 erase cycles a block make 32 TB,
of which the card spends two thirds on moving data itself. High-endurance cards state theirs: use that.

Examples:
  edge-gateway store stats --config gateway.toml
  edge-gateway store stats --config gateway.toml --endurance-tb 60 --bytes-per-day 3GiB
  edge-gateway store stats --config gateway.toml --json

Exit codes: 0 done, 1 could not be done, 2 wrong configuration or arguments.")]
pub(in crate::cli) struct StatsArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// What the card bears, in terabytes written
    #[arg(long, value_name = "TB", default_value = "10", value_parser = endurance)]
    endurance_tb: f64,
    /// What is written to the card in a day, where it was measured
    #[arg(long, value_name = "SIZE", value_parser = size)]
    bytes_per_day: Option<u64>,
}

fn endurance(text: &str) -> Result<f64, String> {
    let tb = text.parse().ok().filter(|tb: &f64| tb.is_finite() && *tb > 0.0);
    tb.ok_or_else(|| "must be a number of terabytes above 0".to_owned())
}

fn size(text: &str) -> Result<u64, String> {
    let bytes = units::parse_size(text).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| format!("must be {}, above 0", units::SIZE_FORM))
}

#[derive(Serialize)]
struct Stats {
    #[serde(flatten)]
    store: StatsReport,
    wear: Wear,
}

pub(super) fn stats(args: &StatsArgs) -> u8 {
    let (config, look) = match look(&args.config.path) {
        Ok(found) => found,
        Err(code) => return code,
    };
    let store = match look {
        Look::Folder(store) => match inspection::stats(&store, &config.gateway.id) {
            Ok(report) => report,
            Err(error) => return fail(&error),
        },
        Look::Gateway(remote) => match remote.stats() {
            Ok(report) => report,
            Err(why) => {
                eprintln!("edge-gateway: {why}");
                return FAILED;
            }
        },
    };
    let journaled = config.storage.journal != JournalMode::Off;
    let wear = Wear::estimate(&store, journaled, args.bytes_per_day, args.endurance_tb);
    let stats = Stats { store, wear };
    if args.json {
        print(&(serde_json::to_string_pretty(&stats).unwrap_or_default() + "\n"));
    } else {
        print(&render(&stats));
    }
    DONE
}

/// Pages that a commit writes beside its batches: see the help text.
const COMMIT_PAGES: u64 = 8;
const PAGE_BYTES: u64 = 4096;
const DAY_US: f64 = 86_400e6;
/// Less than this says nothing about a day.
const SPAN_US_MIN: u64 = 60_000_000;

/// What the store costs the card. Estimates, but for the first.
#[derive(Debug, PartialEq, Serialize)]
struct Wear {
    /// File bytes per event byte, as they lie there.
    stored_per_event_byte: Option<f64>,
    /// Written bytes per event byte.
    write_amplification: Option<f64>,
    /// Bytes written in a day.
    bytes_per_day: Option<f64>,
    /// Whether that was given, not estimated.
    bytes_per_day_given: bool,
    /// What the card is taken to bear.
    endurance_tb: f64,
    /// Days until then, from a new card.
    life_days: Option<f64>,
}

impl Wear {
    fn estimate(
        store: &StatsReport,
        journaled: bool,
        bytes_per_day: Option<u64>,
        endurance_tb: f64,
    ) -> Self {
        let copies = if journaled { 2 } else { 1 };
        let written = copies * (store.log_bytes + store.batches * COMMIT_PAGES * PAGE_BYTES);
        let ratio =
            |bytes: u64| (store.event_bytes > 0).then(|| bytes as f64 / store.event_bytes as f64);
        let span = store.first_received_us.zip(store.last_received_us);
        let span_us = span.map(|(first, last)| last - first).filter(|us| *us >= SPAN_US_MIN);
        let per_day = match bytes_per_day {
            Some(given) => Some(given as f64),
            None => span_us.map(|us| written as f64 / us as f64 * DAY_US),
        };
        Self {
            stored_per_event_byte: ratio(store.log_bytes),
            write_amplification: ratio(written),
            bytes_per_day: per_day,
            bytes_per_day_given: bytes_per_day.is_some(),
            endurance_tb,
            life_days: per_day.map(|per_day| endurance_tb * 1e12 / per_day),
        }
    }
}

fn render(stats: &Stats) -> String {
    let (store, wear) = (&stats.store, &stats.wear);
    let row = |name: &str, text: String| vec![name.to_owned(), text];
    let when = |us: Option<u64>| us.map_or("never".to_owned(), time);
    let mut out = table(&[
        row("store", format!("{} (epoch {})", store.gateway, store.epoch)),
        row(
            "events",
            format!(
                "{} stored, offsets {} to {}, {}",
                count(store.offsets.count()),
                store.offsets.from,
                store.offsets.to,
                bytes(store.event_bytes)
            ),
        ),
        row(
            "received",
            format!("{} to {}", when(store.first_received_us), when(store.last_received_us)),
        ),
        row(
            "log",
            format!(
                "{} of {} in {} file(s), {} batches",
                bytes(store.log_bytes),
                bytes(store.quota_bytes),
                store.files.len(),
                count(store.batches)
            ),
        ),
        row(
            "state",
            format!(
                "{}, {} dead letters, {} rows in the loss ledger",
                bytes(store.state_bytes),
                count(store.dead_letters),
                count(store.losses)
            ),
        ),
    ]);
    out.push('\n');
    let heads = ["file", "from", "to", "batches", "size", "event bytes"].map(str::to_owned);
    let mut rows = vec![heads.to_vec()];
    for file in &store.files {
        let name = file.path.rsplit('/').next().unwrap_or_default();
        let damaged = if file.sound_head { "" } else { "  DAMAGED head row" };
        rows.push(vec![
            name.to_owned(),
            file.offsets.from.to_string(),
            file.offsets.to.to_string(),
            count(file.batches),
            bytes(file.size_bytes),
            file.event_bytes.map_or("unknown".to_owned(), bytes) + damaged,
        ]);
    }
    out += &table(&rows);
    out.push('\n');
    let heads = ["partition", "first seq", "next seq", "events"].map(str::to_owned).to_vec();
    let mut rows = vec![heads];
    for p in store.partitions.iter().filter(|p| p.next_seq > 0) {
        rows.push(vec![
            p.partition.to_string(),
            p.first_seq.map_or("unknown".to_owned(), |first| first.to_string()),
            p.next_seq.to_string(),
            p.first_seq.map_or(String::new(), |first| count(p.next_seq.saturating_sub(first))),
        ]);
    }
    out += &table(&rows);
    out.push('\n');
    let number = |n: Option<f64>| n.map_or("unknown".to_owned(), |n| format!("{n:.2}"));
    let per_day = wear.bytes_per_day.map(|n| bytes(n as u64) + " a day");
    out + &table(&[
        row(
            "stored per event byte",
            format!("{} (counted: file bytes by event bytes)", number(wear.stored_per_event_byte)),
        ),
        row(
            "write amplification",
            format!("about {} (estimate: see --help)", number(wear.write_amplification)),
        ),
        row(
            "written to the card",
            match per_day {
                Some(text) if wear.bytes_per_day_given => format!("{text} (given)"),
                Some(text) => format!("about {text} (estimate from what is stored)"),
                None => "unknown: less than a minute is stored; give --bytes-per-day".to_owned(),
            },
        ),
        row(
            "life of the card",
            wear.life_days.map_or("unknown".to_owned(), |days| {
                format!("about {} (estimate, for {} TB from new)", life(days), wear.endurance_tb)
            }),
        ),
    ])
}

fn life(days: f64) -> String {
    match days {
        d if d >= 730.0 => format!("{:.0} years", d / 365.0),
        d if d >= 60.0 => format!("{:.0} months", d / 30.4),
        d => duration(d * 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspection::report::Offsets;

    fn store(span_us: u64) -> StatsReport {
        StatsReport {
            gateway: "edge-01".into(),
            epoch: "00".into(),
            offsets: Offsets { from: 0, to: 100 },
            batches: 10,
            log_bytes: 1_000_000,
            state_bytes: 0,
            quota_bytes: 0,
            event_bytes: 500_000,
            event_bytes_ever: 500_000,
            first_received_us: Some(1_000_000),
            last_received_us: Some(1_000_000 + span_us),
            losses: 0,
            dead_letters: 0,
            files: vec![],
            partitions: vec![],
        }
    }

    #[test]
    fn the_life_of_a_card_is_its_endurance_by_what_a_day_writes() {
        let wear = Wear::estimate(&store(86_400_000_000), false, None, 10.0);
        let written = 1_000_000.0 + 10.0 * 8.0 * 4096.0;
        assert_eq!(wear.stored_per_event_byte, Some(2.0));
        assert_eq!(wear.bytes_per_day, Some(written));
        assert_eq!(wear.life_days, Some(1e13 / written));
        let journaled = Wear::estimate(&store(86_400_000_000), true, None, 10.0);
        assert_eq!(journaled.bytes_per_day, Some(2.0 * written));
        let given = Wear::estimate(&store(86_400_000_000), true, Some(1_000_000_000), 1.0);
        assert_eq!(given.life_days, Some(1_000.0));
    }

    #[test]
    fn too_short_a_time_projects_nothing() {
        let wear = Wear::estimate(&store(1_000_000), false, None, 10.0);
        assert_eq!((wear.bytes_per_day, wear.life_days), (None, None));
        let empty = StatsReport { event_bytes: 0, ..store(0) };
        assert_eq!(Wear::estimate(&empty, false, None, 10.0).write_amplification, None);
    }

    #[test]
    fn a_life_reads_well() {
        assert_eq!(life(3_650.0), "10 years");
        assert_eq!(life(100.0), "3 months");
        assert_eq!(life(2.5), "2d 12h");
    }
}
