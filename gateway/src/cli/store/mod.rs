//! `store`, `balance` and `dlq`: what is in the store, whether it is whole, where every event went,
//! and what no sink would take.
//!
//! Owns: where the store is looked at. The tools that only look open the folder read-only; where a
//! gateway has it, they ask that gateway's admin endpoint instead, and say so.
//! Invariant: the answer, and with it the exit code, is the same either way.

mod balance;
mod change;
mod dlq;
mod export;
mod progress;
mod remote;
mod replay;
mod stats;
mod verify;

use std::path::Path;

use clap::Subcommand;
use serde::Serialize;
use serde::de::DeserializeOwned;
use storage::{OpenError, Store};

use super::{DONE, FAILED, UNBALANCED, WRONG_INPUT, load};
use crate::config::Config;
use crate::ingest::clock;
use crate::inspection::{InspectError, Tell};
use progress::Bar;
use remote::Remote;

pub(super) use balance::{BalanceArgs, balance};
pub(super) use dlq::{DlqVerb, dlq};
pub(super) use replay::{ReplayArgs, replay};

#[derive(Subcommand)]
pub(super) enum StoreVerb {
    /// What is in the store: files, events, sequence numbers, and what it costs the card
    Stats(stats::StatsArgs),
    /// Read everything: every checksum, every sequence number; exit code 3 if anything is wrong
    Verify(verify::VerifyArgs),
    /// Write stored events to stdout, as CloudEvents
    Export(export::ExportArgs),
    /// Rewrite what takes more room than it needs; the gateway must be stopped
    Compact(change::CompactArgs),
    /// Record what cannot be read in the loss ledger; a dry run unless --yes is given
    Repair(change::RepairArgs),
}

pub(super) fn store(verb: &StoreVerb) -> u8 {
    match verb {
        StoreVerb::Stats(args) => stats::stats(args),
        StoreVerb::Verify(args) => verify::verify(args),
        StoreVerb::Export(args) => export::export(args),
        StoreVerb::Compact(args) => change::compact(args),
        StoreVerb::Repair(args) => change::repair(args),
    }
}

/// Where the store is looked at.
enum Look {
    /// In its folder.
    Folder(Box<Store>),
    /// By the gateway that has it.
    Gateway(Remote),
}

/// Finds out where the store of a configuration is to be looked at.
fn look(path: &Path) -> Result<(Config, Look), u8> {
    let config = load(path)?;
    match Store::open_to_look(config.store_options(), clock::now_us()) {
        Ok(store) => Ok((config, Look::Folder(Box::new(store)))),
        Err(OpenError::InUse { .. }) => {
            let remote = ask_gateway(&config)?;
            Ok((config, Look::Gateway(remote)))
        }
        Err(error) => Err(cannot_open(&error)),
    }
}

/// A walk over the whole store that comes to a report.
struct Walk<T> {
    /// What the bar calls it.
    what: &'static str,
    /// Where the admin endpoint has it.
    path: &'static str,
    here: fn(&Store, &str, Tell<'_>) -> Result<T, InspectError>,
    render: fn(&T) -> String,
    is_sound: fn(&T) -> bool,
}

impl<T: Serialize + DeserializeOwned> Walk<T> {
    /// Walks where the store is and prints the report; the exit code.
    fn run(&self, config: &Path, json: bool) -> u8 {
        let (config, look) = match look(config) {
            Ok(found) => found,
            Err(code) => return code,
        };
        let report = match look {
            Look::Folder(store) => {
                let mut bar = Bar::new(self.what);
                let mut tell = |progress| {
                    bar.show(progress);
                    true
                };
                match (self.here)(&store, &config.gateway.id, &mut tell) {
                    Ok(report) => report,
                    Err(error) => return fail(&error),
                }
            }
            Look::Gateway(remote) => match remote.walk(self.path, self.what) {
                Ok(report) => report,
                Err(why) => {
                    eprintln!("edge-gateway: {why}");
                    return FAILED;
                }
            },
        };
        if json {
            print(&(serde_json::to_string_pretty(&report).unwrap_or_default() + "\n"));
        } else {
            print(&(self.render)(&report));
        }
        if (self.is_sound)(&report) { DONE } else { UNBALANCED }
    }
}

/// The gateway that has the store, or the exit code.
fn ask_gateway(config: &Config) -> Result<Remote, u8> {
    eprintln!(
        "edge-gateway: the store in {} is in use: asking the gateway at {}",
        config.gateway.data_dir.display(),
        config.admin.bind
    );
    Remote::find(config).map_err(|why| {
        eprintln!("edge-gateway: {why}");
        FAILED
    })
}

/// Tells the user why there is nothing to look at; the exit code.
fn cannot_open(error: &OpenError) -> u8 {
    eprintln!("edge-gateway: {error}");
    match error {
        OpenError::Partitions { .. } => WRONG_INPUT,
        // It is there, and what it says of itself cannot be read.
        OpenError::Database { .. } | OpenError::DamagedState { .. } => UNBALANCED,
        _ => FAILED,
    }
}

/// Tells the user what went wrong; the exit code.
fn fail(error: &InspectError) -> u8 {
    eprintln!("edge-gateway: {error}");
    if matches!(error, InspectError::Bound(_)) { WRONG_INPUT } else { FAILED }
}

/// Writes an answer; a reader that has seen enough and closed the pipe is no failure.
fn print(text: &str) {
    use std::io::Write as _;
    std::io::stdout().write_all(text.as_bytes()).ok();
}
