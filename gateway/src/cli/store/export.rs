//! `store export`: stored events as CloudEvents on stdout.

use std::io::{BufWriter, ErrorKind};

use bridge::Framing;
use clap::{Args, ValueEnum};

use super::super::{ConfigFile, DONE, FAILED, UNBALANCED, WRONG_INPUT};
use super::progress::Bar;
use super::remote::Passed;
use super::{Look, fail, look};
use crate::admin::store::ExportQuery;
use crate::inspection::place::Bound;
use crate::inspection::{self, InspectError, Selection};
use crate::text::count;

#[derive(Args)]
#[command(after_help = "\
A place is an offset (1234), a time of receipt in UTC (2026-01-31T12:00:00Z, or the date alone), or
partition and sequence number (3/42, or the whole id of an event as it went upstream).

Examples:
  edge-gateway store export --config gateway.toml > all.ndjson
  edge-gateway store export --config gateway.toml --from 2026-01-31 --to 2026-02-01 --device pump-7
  edge-gateway store export --config gateway.toml --format cloudevents_batch > all.json

Exit codes: 0 whole, 1 could not be done, 2 wrong configuration or arguments, 3 some events cannot be
read; the rest was written.")]
pub(in crate::cli) struct ExportArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// First event: an offset, a time, or partition/seq; default: the first that is stored
    #[arg(long, value_name = "PLACE")]
    from: Option<Bound>,
    /// The event to stop at, without it; default: the end
    #[arg(long, value_name = "PLACE")]
    to: Option<Bound>,
    /// Only events of this device key
    #[arg(long, value_name = "KEY")]
    device: Option<String>,
    /// One CloudEvent a line, or all of them as one JSON array
    #[arg(long, value_enum, default_value = "ndjson")]
    format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Ndjson,
    #[value(name = "cloudevents_batch")]
    CloudeventsBatch,
}

pub(super) fn export(args: &ExportArgs) -> u8 {
    let (config, look) = match look(&args.config.path) {
        Ok(found) => found,
        Err(code) => return code,
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    match look {
        Look::Folder(store) => {
            let format = match args.format {
                Format::Ndjson => Framing::Lines,
                Format::CloudeventsBatch => Framing::Array,
            };
            let selection = Selection {
                from: args.from.clone(),
                to: args.to.clone(),
                device: args.device.clone(),
                format,
            };
            let mut bar = Bar::new("export");
            let mut tell = |progress| {
                bar.show(progress);
                true
            };
            let gateway = &config.gateway.id;
            let exported =
                match inspection::export(&store, gateway, &selection, &mut out, &mut tell) {
                    Ok(exported) => exported,
                    Err(InspectError::Write(error)) if error.kind() == ErrorKind::BrokenPipe => {
                        return DONE;
                    }
                    Err(error) => return fail(&error),
                };
            drop(bar);
            for lost in &exported.unreadable {
                eprintln!(
                    "edge-gateway: offsets {}..{} cannot be read ({} events)",
                    lost.start,
                    lost.end,
                    count(lost.end - lost.start)
                );
            }
            if exported.unreadable.is_empty() { DONE } else { UNBALANCED }
        }
        Look::Gateway(remote) => {
            let format = args.format.to_possible_value().map(|value| value.get_name().to_owned());
            let query = ExportQuery {
                from: args.from.as_ref().map(ToString::to_string),
                to: args.to.as_ref().map(ToString::to_string),
                device: args.device.clone(),
                format,
            };
            let (code, why) = match remote.export(&query, &mut out) {
                Passed::Whole => return DONE,
                Passed::WrongInput(why) => (WRONG_INPUT, why),
                Passed::Broken(why) => (FAILED, why),
            };
            eprintln!("edge-gateway: {why}");
            code
        }
    }
}
