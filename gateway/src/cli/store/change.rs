//! `store compact` and `store repair`: the tools that change a store. The gateway must be stopped.

use std::ops::Range;

use clap::Args;
use storage::{Damage, OpenError, Store, Verification, Writer};

use super::super::{ConfigFile, DONE, FAILED, UNBALANCED, load};
use super::progress::Bar;
use super::{cannot_open, print};
use crate::config::Config;
use crate::ingest::clock;
use crate::text::{bytes, count};

#[derive(Args)]
#[command(after_help = "\
Sealed log files are packed anew where that makes them smaller, which it does after a trickle of small
commits; the state database is copied without what was removed from it. Events keep their offsets and
sequence numbers. The file that is appended to, and files that are damaged, stay as they are. Each file is
replaced whole: a power cut leaves the old one or the new one. It needs room for the largest file.

Example:
  edge-gateway store compact --config gateway.toml

Exit codes: 0 done, 1 could not be done, 2 wrong configuration or arguments.")]
pub(in crate::cli) struct CompactArgs {
    #[command(flatten)]
    config: ConfigFile,
}

#[derive(Args)]
#[command(after_help = "\
Reads everything, as `store verify` does, and says which events cannot be read and which sinks lose them.
With --yes their exact ranges go to the loss ledger, so that the balance adds up again and new damage is
told from old. No file is removed or cut: everything that can be read is kept, and so is what cannot.

Where state.redb itself is damaged, --yes makes it anew from the log files: cursors and keys as they tell,
and the dead letters and losses that can still be read. A sink whose cursor they do not tell begins at the
first stored event: it gets some again and misses none. The damaged file is kept as state.damaged.

Examples:
  edge-gateway store repair --config gateway.toml          what it would do
  edge-gateway store repair --config gateway.toml --yes

Exit codes: 0 nothing is left to repair, 1 could not be done, 2 wrong configuration or arguments,
3 damage found that was not repaired.")]
pub(in crate::cli) struct RepairArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// Do it
    #[arg(long)]
    yes: bool,
}

/// Opens a store to change it: one that is there, and that no gateway has.
fn open(config: &Config) -> Result<(Store, Writer), u8> {
    let in_use = |dir: &std::path::Path| {
        eprintln!(
            "edge-gateway: the store in {} is in use: stop the gateway first, this changes its files",
            dir.display()
        );
        FAILED
    };
    // A look first: opening to write would make a store where there is none.
    let looked = Store::open_to_look(config.store_options(), clock::now_us()).map(drop);
    let opened = looked.and_then(|()| Store::open(config.store_options(), clock::now_us()));
    opened.map_err(|error| match error {
        OpenError::InUse { path } => in_use(&path),
        error => cannot_open(&error),
    })
}

pub(super) fn compact(args: &CompactArgs) -> u8 {
    let config = match load(&args.config.path) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let (_store, mut writer) = match open(&config) {
        Ok(opened) => opened,
        Err(code) => return code,
    };
    let done = match writer.compact() {
        Ok(done) => done,
        Err(error) => return fail(&error),
    };
    if let Err(error) = writer.close() {
        return fail(&error);
    }
    print(&format!(
        "{} of {} sealed file(s) packed anew; {} before, {} now: {} gained\n",
        done.rewritten,
        done.files,
        bytes(done.before_bytes),
        bytes(done.after_bytes),
        bytes(done.before_bytes.saturating_sub(done.after_bytes))
    ));
    DONE
}

pub(super) fn repair(args: &RepairArgs) -> u8 {
    let config = match load(&args.config.path) {
        Ok(config) => config,
        Err(code) => return code,
    };
    if !args.yes {
        return match Store::open_to_look(config.store_options(), clock::now_us()) {
            Ok(store) => match walk(&store) {
                Ok(found) => tell(&found, "would go to the loss ledger, with --yes"),
                Err(error) => fail(&error),
            },
            Err(OpenError::InUse { .. }) => open(&config).err().unwrap_or(FAILED),
            Err(OpenError::DamagedState { path, reason }) => {
                let path = path.display();
                print(&format!(
                    "{path}: {reason}; it would be made anew from the log, with --yes\n"
                ));
                UNBALANCED
            }
            Err(error) => cannot_open(&error),
        };
    }
    if let Err(code) = mend_state(&config) {
        return code;
    }
    let (store, mut writer) = match open(&config) {
        Ok(opened) => opened,
        Err(code) => return code,
    };
    let found = match walk(&store) {
        Ok(found) => found,
        Err(error) => return fail(&error),
    };
    let recorded = writer.record_unreadable(&unreadable(&found), clock::now_us());
    for loss in recorded.iter().flatten() {
        let sink = loss.sink.as_deref().map_or("recorded".to_owned(), |s| format!("lost to {s}"));
        print(&format!("{sink}: offsets {}..{}\n", loss.offsets.start, loss.offsets.end));
    }
    if let Err(error) = recorded.map(drop).and_then(|()| writer.close()) {
        return fail(&error);
    }
    let code = tell(&found, "went to the loss ledger");
    let left = found.findings.iter().any(|f| f.damage == Damage::Disorder);
    if left || found.findings_more > 0 { code } else { DONE }
}

/// Makes a damaged state database anew.
fn mend_state(config: &Config) -> Result<(), u8> {
    let options = config.store_options();
    let looked = Store::open_to_look(options.clone(), clock::now_us());
    let Err(OpenError::DamagedState { path, .. }) = looked else {
        // Anything else is told by who opens it next.
        return Ok(());
    };
    let rebuilt = Store::rebuild_state(&options).map_err(|error| cannot_open(&error))?;
    print(&format!(
        "{} was made anew from the log, which begins at offset {}; it keeps {} dead letter(s) and {} \
         row(s) of the loss ledger\n",
        path.display(),
        rebuilt.first_offset,
        count(rebuilt.dead_letters),
        count(rebuilt.losses)
    ));
    Ok(())
}

fn walk(store: &Store) -> anyhow::Result<Verification> {
    let mut bar = Bar::new("repair");
    let mut verifier = store.verify()?;
    while verifier.step()? {
        bar.show(verifier.progress());
    }
    Ok(verifier.finish())
}

fn unreadable(found: &Verification) -> Vec<Range<u64>> {
    let findings = found.findings.iter().filter(|f| f.damage == Damage::Unreadable);
    findings.map(|finding| finding.offsets.clone()).collect()
}

/// Says what is damaged, and what becomes of it; the exit code if nothing was repaired.
fn tell(found: &Verification, what: &str) -> u8 {
    let ranges = unreadable(found);
    for range in &ranges {
        let events = count(range.end - range.start);
        print(&format!("offsets {}..{} ({events} events) {what}\n", range.start, range.end));
    }
    for finding in &found.findings {
        let (path, reason) = (finding.path.display(), &finding.reason);
        match finding.damage {
            Damage::Unreadable | Damage::Recorded => {}
            Damage::Disorder => {
                print(&format!(
                    "cannot be repaired: {path}: {reason}; `store export` what you need\n"
                ));
            }
            Damage::Bookkeeping => print(&format!("no event is lost: {path}: {reason}\n")),
        }
    }
    if found.findings_more > 0 {
        print("there is more damage: repair again\n");
    }
    if found.is_sound() {
        print("nothing to repair\n");
        return DONE;
    }
    UNBALANCED
}

fn fail(error: &dyn std::fmt::Display) -> u8 {
    eprintln!("edge-gateway: {error}");
    FAILED
}
