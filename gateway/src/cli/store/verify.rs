//! `store verify`: every checksum, every sequence number.

use std::fmt::Write as _;

use clap::Args;

use super::super::ConfigFile;
use super::Walk;
use crate::inspection::{self, report::VerifyReport};
use crate::text::{bytes, count, table};

#[derive(Args)]
#[command(after_help = "\
Reads every batch: checksums, offsets without a gap, sequence numbers without a gap per partition,
receive times that never go back, head rows that say what came before them. Nothing is changed. Events
that cannot be read are told as exact ranges; those that the loss ledger knows already are no new damage.

Examples:
  edge-gateway store verify --config gateway.toml           also beside the running gateway
  edge-gateway store verify --config gateway.toml --json    for scripts

Exit codes: 0 sound, 1 could not be done, 2 wrong configuration or arguments, 3 damage found.")]
pub(in crate::cli) struct VerifyArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn verify(args: &VerifyArgs) -> u8 {
    let walk = Walk {
        what: "verify",
        path: "store/verify",
        here: inspection::verify,
        render,
        is_sound: |report| report.sound,
    };
    walk.run(&args.config.path, args.json)
}

fn render(report: &VerifyReport) -> String {
    let row = |name: &str, text: String| vec![name.to_owned(), text];
    let mut rows = vec![
        row("store", format!("{} (epoch {})", report.gateway, report.epoch)),
        row("offsets", format!("{} to {}", report.offsets.from, report.offsets.to)),
        row("files", count(report.files.into())),
        row("batches", format!("{} sound", count(report.batches))),
        row("events", format!("{} sound, {}", count(report.events), bytes(report.event_bytes))),
        row("control records", count(report.controls)),
    ];
    if report.recorded_events > 0 {
        rows.push(row(
            "recorded",
            format!("{} event(s) lost before, in the loss ledger", count(report.recorded_events)),
        ));
    }
    let mut out = table(&rows) + "\n";
    let numbers: Vec<_> = report
        .partitions
        .iter()
        .filter_map(|p| Some((p.partition, p.first_seq?, p.last_seq?)))
        .map(|(p, first, last)| {
            vec![p.to_string(), first.to_string(), last.to_string(), count(last - first + 1)]
        })
        .collect();
    if !numbers.is_empty() {
        let heads = ["partition", "first seq", "last seq", "events"].map(str::to_owned).to_vec();
        out += &table(&[vec![heads], numbers].concat());
        out.push('\n');
    }
    for finding in &report.findings {
        let place = match finding.offsets.count() {
            0 => format!("at offset {}", finding.offsets.from),
            n => format!("offsets {}..{} ({n})", finding.offsets.from, finding.offsets.to),
        };
        // Writing to a String cannot fail, here and below.
        let (damage, reason) = (&finding.damage, &finding.reason);
        writeln!(out, "{damage}: {place}: {reason}: {}", finding.path).ok();
    }
    if report.findings_more > 0 {
        writeln!(out, "and {} more", count(report.findings_more)).ok();
    }
    out + &if report.sound {
        "Sound: nothing is missing, and everything follows.\n".to_owned()
    } else {
        format!(
            "DAMAGED: {} event(s) cannot be read and are in no ledger. Copy the folder, then see \
             `store repair`.\n",
            count(report.unreadable_events)
        )
    }
}
