//! `balance`: the sums of every sink.

use std::fmt::Write as _;

use clap::Args;

use super::super::ConfigFile;
use super::Walk;
use crate::inspection::{self, report::BalanceReport};
use crate::text::{count, table};

#[derive(Args)]
#[command(after_help = "\
What was acked was committed, or was a resend of what was (a duplicate, by its event_id).
Per sink, every event since its origin is in one place:

  committed = delivered + pending + dead letters + filtered + dropped (quota, expired, corrupt,
                                            sink absent, lag, dead letter limit, by hand)

Pending events are walked and their checksums checked, dead letters are read, dropped is the union of the
loss ledger's ranges. Delivered is what the sink's cursor has passed and none of the others claims: what
an upstream really has, only an audit can tell.

Examples:
  edge-gateway balance --config gateway.toml           also beside the running gateway
  edge-gateway balance --config gateway.toml --json    for scripts

Exit codes: 0 balanced, 1 could not be done, 2 wrong configuration or arguments, 3 NOT balanced.")]
pub(in crate::cli) struct BalanceArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub(in crate::cli) fn balance(args: &BalanceArgs) -> u8 {
    let walk = Walk {
        what: "balance",
        path: "balance",
        here: inspection::balance,
        render,
        is_sound: |report| report.balanced,
    };
    walk.run(&args.config.path, args.json)
}

fn render(report: &BalanceReport) -> String {
    let duplicates = match report.duplicates {
        0 => String::new(),
        duplicates => format!("{} duplicates recognised, ", count(duplicates)),
    };
    let mut out = format!(
        "{} (epoch {}): {} events committed, {duplicates}stored from offset {} on\n\n",
        report.gateway,
        report.epoch,
        count(report.committed),
        report.first_offset
    );
    if report.sinks.is_empty() {
        out += "no sinks: nothing is owed to anybody\n";
    } else {
        let heads = [
            "sink",
            "committed",
            "delivered",
            "pending",
            "dead letters",
            "filtered",
            "quota",
            "expired",
            "corrupt",
            "sink absent",
            "lag",
            "letter limit",
            "by hand",
            "unaccounted",
        ];
        let mut rows = vec![heads.map(str::to_owned).to_vec()];
        for sums in &report.sinks {
            let absent = if sums.configured { "" } else { " (not configured)" };
            let unaccounted = sums.unaccounted.iter().map(|range| range.count()).sum();
            let mut row = vec![format!("{}{absent}", sums.sink)];
            row.extend(
                [
                    sums.committed,
                    sums.delivered,
                    sums.pending,
                    sums.dead_lettered,
                    sums.filtered,
                    sums.dropped.quota,
                    sums.dropped.expired,
                    sums.dropped.corrupt,
                    sums.dropped.sink_absent,
                    sums.dropped.lag,
                    sums.dropped.dead_letter_limit,
                    sums.dropped.by_hand,
                    unaccounted,
                ]
                .map(count),
            );
            rows.push(row);
        }
        out += &table(&rows);
    }
    out.push('\n');
    for sums in &report.sinks {
        for range in &sums.unaccounted {
            // Writing to a String cannot fail, here and below.
            writeln!(
                out,
                "{}: offsets {}..{} are needed, cannot be read, and are in no ledger",
                sums.sink, range.from, range.to
            )
            .ok();
        }
        for problem in &sums.problems {
            writeln!(out, "{}: {problem}", sums.sink).ok();
        }
    }
    for problem in &report.problems {
        writeln!(out, "{problem}").ok();
    }
    out + if report.balanced { "Balanced.\n" } else { "NOT BALANCED.\n" }
}
