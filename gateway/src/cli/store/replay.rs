//! `replay`: stored events again, into one sink of a running gateway.

use clap::Args;

use super::super::{DONE, FAILED, WRONG_INPUT};
use super::print;
use super::remote::{Passed, Remote};
use crate::admin::replay::{ReplayQuery, ReplayReport};
use crate::config::units;
use crate::inspection::place::Bound;
use crate::text::count;

#[derive(Args)]
#[command(after_help = "\
The events go out beside live traffic, with a share of their own, and say so: their CloudEvents
attribute stream is \"replay\". They stand outside the order, and the sink's cursor, its balance and its
dead letters know nothing of them. What the sink's filters keep from it is not replayed. How much is
still there is up to storage.retain_bytes and retain_age.

It goes on as long as this command runs: Ctrl-C cancels it.

A place is an offset (1234), a time of receipt in UTC (2026-01-31T12:00:00Z, or the date alone), or
partition and sequence number (3/42, or the whole id of an event as it went upstream).

Examples:
  edge-gateway replay --sink cloud --from 2026-01-31T12:00:00Z --to 2026-01-31T13:00:00Z
  edge-gateway replay --sink cloud --device pump-7 --rate 64KiB

Exit codes: 0 done, 1 could not be done or was cancelled, 2 wrong arguments.")]
pub(in crate::cli) struct ReplayArgs {
    /// Admin address of the gateway
    #[arg(long, value_name = "ADDR", env = "EDGE_GATEWAY_ADMIN", default_value = "127.0.0.1:9641")]
    admin: String,
    /// Name of the sink
    #[arg(long, value_name = "NAME")]
    sink: String,
    /// First event: an offset, a time, or partition/seq; default: the first that is stored
    #[arg(long, value_name = "PLACE")]
    from: Option<Bound>,
    /// The event to stop at, without it; default: what is durable now
    #[arg(long, value_name = "PLACE")]
    to: Option<Bound>,
    /// Only events of this device key
    #[arg(long, value_name = "KEY")]
    device: Option<String>,
    /// Event bytes a second, such as 64KiB; default: no limit but the share of a replay
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    rate: Option<u64>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

fn rate(text: &str) -> Result<u64, String> {
    let size = units::parse_size(text).filter(|&size| size > 0);
    size.ok_or_else(|| format!("must be {}", units::SIZE_FORM))
}

pub(in crate::cli) fn replay(args: &ReplayArgs) -> u8 {
    let query = ReplayQuery {
        sink: args.sink.clone(),
        from: args.from.as_ref().map(ToString::to_string),
        to: args.to.as_ref().map(ToString::to_string),
        device: args.device.clone(),
        rate: args.rate.unwrap_or(0),
    };
    let followed = Remote::at(&args.admin)
        .map_err(Passed::Broken)
        .and_then(|remote| remote.replay::<ReplayReport>(&query));
    match followed {
        Ok(report) if args.json => {
            print(&(serde_json::to_string_pretty(&report).unwrap_or_default() + "\n"));
            DONE
        }
        Ok(report) => {
            print(&format!(
                "replayed {} events of offsets {} to {} into {}; {} refused, {} requests tried again\n",
                count(report.delivered),
                report.from,
                report.to,
                args.sink,
                count(report.refused),
                count(report.retries)
            ));
            DONE
        }
        Err(Passed::WrongInput(why)) => {
            eprintln!("edge-gateway: {why}");
            WRONG_INPUT
        }
        Err(Passed::Broken(why)) => {
            eprintln!("edge-gateway: {why}");
            FAILED
        }
        Err(Passed::Whole) => unreachable!("a replay is whole only with its report"),
    }
}
