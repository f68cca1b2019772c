//! `dlq`: events that a sink refused for good.
//!
//! As the other tools of the store: the folder where no gateway has it, else that gateway. What only
//! looks opens the folder read-only; `requeue` and `drop` take the store for themselves.

use std::fmt::Write as _;
use std::io::BufWriter;

use clap::{Args, Subcommand};
use serde_json::Value;
use storage::{OpenError, Store, Writer};

use super::super::{ConfigFile, DONE, FAILED, WRONG_INPUT};
use super::remote::{Passed, Remote};
use super::{Look, cannot_open, fail, look, print};
use crate::config::Config;
use crate::ingest::clock;
use crate::inspection::InspectError;
use crate::inspection::letters::{self, Changed, LetterPage, PageQuery, Selected, Selection};
use crate::inspection::place::time;
use crate::text::{bytes, count, table};

#[derive(Subcommand)]
#[command(after_help = "\
An EVENT is an offset (1234), partition and sequence number (3/42), or its whole id as `list` shows it.

Exit codes: 0 done, 1 could not be done, 2 wrong configuration or arguments.")]
pub(in crate::cli) enum DlqVerb {
    /// List dead letters, oldest first, with their reasons
    List(ListArgs),
    /// Show one dead letter, whole
    Show(ShowArgs),
    /// Deliver dead letters again; each stays one until its upstream has taken it
    Requeue(ChangeArgs),
    /// Drop dead letters, each into the loss ledger; says what it would do unless --yes is given
    Drop(DropArgs),
    /// Write dead letters to stdout as CloudEvents, one a line; they stay where they are
    Export(ExportArgs),
}

#[derive(Args)]
pub(in crate::cli) struct ListArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// Only of this sink
    #[arg(long, value_name = "NAME")]
    sink: Option<String>,
    /// From this offset on
    #[arg(long, value_name = "OFFSET", requires = "sink")]
    from: Option<u64>,
    /// So many at most
    #[arg(long, value_name = "N", default_value_t = 50,
        value_parser = clap::value_parser!(u64).range(1..=letters::PAGE_MAX as u64))]
    limit: u64,
    /// Print the page as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(in crate::cli) struct ShowArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// The sink that refused it
    #[arg(long, value_name = "NAME")]
    sink: String,
    /// Which one
    #[arg(value_name = "EVENT")]
    event: String,
    /// Print it as a CloudEvent
    #[arg(long)]
    json: bool,
}

/// Which letters a change is about.
#[derive(Args)]
pub(in crate::cli) struct ChangeArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// The sink that refused them
    #[arg(long, value_name = "NAME")]
    sink: String,
    /// Which ones
    #[arg(value_name = "EVENT", required_unless_present = "all", conflicts_with = "all")]
    events: Vec<String>,
    /// All of the sink
    #[arg(long)]
    all: bool,
    /// Only those of this device key
    #[arg(long, value_name = "KEY")]
    device: Option<String>,
    /// Only those whose reason contains this
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

#[derive(Args)]
pub(in crate::cli) struct DropArgs {
    #[command(flatten)]
    which: ChangeArgs,
    /// Do it
    #[arg(long)]
    yes: bool,
}

#[derive(Args)]
pub(in crate::cli) struct ExportArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// The sink that refused them
    #[arg(long, value_name = "NAME")]
    sink: String,
    /// Only those of this device key
    #[arg(long, value_name = "KEY")]
    device: Option<String>,
    /// Only those whose reason contains this
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

pub(in crate::cli) fn dlq(verb: &DlqVerb) -> u8 {
    let done = match verb {
        DlqVerb::List(args) => list(args),
        DlqVerb::Show(args) => show(args),
        DlqVerb::Requeue(args) => change(args, Change::Requeue),
        DlqVerb::Drop(args) if args.yes => change(&args.which, Change::Drop),
        DlqVerb::Drop(args) => would_drop(&args.which),
        DlqVerb::Export(args) => {
            let selection = Selection {
                sink: args.sink.clone(),
                all: true,
                device: args.device.clone(),
                reason: args.reason.clone(),
                ..Selection::default()
            };
            let mut out = BufWriter::new(std::io::stdout().lock());
            read(&args.config, selection, &mut out)
        }
    };
    done.map_or_else(|code| code, |()| DONE)
}

fn list(args: &ListArgs) -> Result<(), u8> {
    let query =
        PageQuery { sink: args.sink.clone(), from: args.from, limit: Some(args.limit as usize) };
    let (config, look) = look(&args.config.path)?;
    let page: LetterPage = match look {
        Look::Folder(store) => {
            letters::list(&store, &config.gateway.id, &query).map_err(|error| fail(&error))?
        }
        Look::Gateway(remote) => {
            let pairs = [
                ("sink", query.sink.clone()),
                ("from", query.from.map(|from| from.to_string())),
                ("limit", query.limit.map(|limit| limit.to_string())),
            ];
            remote.get_json("dlq", &pairs).map_err(|why| tell(&why))?
        }
    };
    print(&if args.json {
        serde_json::to_string_pretty(&page).unwrap_or_default() + "\n"
    } else {
        render(&page, args.sink.as_deref())
    });
    Ok(())
}

fn render(page: &LetterPage, sink: Option<&str>) -> String {
    let sums = page.sinks.iter().filter(|sums| sink.is_none_or(|sink| sums.sink == sink));
    let mut out = String::new();
    for sums in sums {
        let requeued = match sums.requeued {
            0 => String::new(),
            n => format!(", {} of them to be delivered again", count(n)),
        };
        let (events, size) = (count(sums.events), bytes(sums.size_bytes));
        // Writing to a String cannot fail, here and below.
        writeln!(out, "{}: {events} dead letter(s), {size}{requeued}", sums.sink).ok();
    }
    if out.is_empty() {
        return "no dead letters\n".to_owned();
    }
    let heads = ["sink", "offset", "event", "device", "topic", "tries", "first", "last", "reason"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for letter in &page.letters {
        let mark = if letter.requeued_us.is_some() { " (requeued)" } else { "" };
        rows.push(vec![
            letter.sink.clone(),
            letter.offset.to_string(),
            letter.id.clone(),
            letter.device.clone(),
            letter.topic.clone(),
            letter.attempts.to_string(),
            time(letter.first_us),
            time(letter.last_us),
            format!("{}{mark}", letter.reason),
        ]);
    }
    if rows.len() > 1 {
        out.push('\n');
        out += &table(&rows);
    }
    if let Some(next) = &page.next {
        writeln!(out, "\nmore: edge-gateway dlq list --sink {} --from {}", next.sink, next.from)
            .ok();
    }
    out
}

fn show(args: &ShowArgs) -> Result<(), u8> {
    let selection = Selection {
        sink: args.sink.clone(),
        events: vec![args.event.clone()],
        ..Selection::default()
    };
    let mut text = Vec::new();
    read(&args.config, selection, &mut text)?;
    let text = String::from_utf8_lossy(&text);
    if text.is_empty() {
        return Err(tell(&format!("{} has no dead letter {}", args.sink, args.event)));
    }
    if args.json {
        print(&text);
        return Ok(());
    }
    let letter: Value =
        serde_json::from_str(&text).map_err(|wrong| tell(&format!("not an answer: {wrong}")))?;
    print(&letter_text(&letter));
    Ok(())
}

/// A letter for people: what it is line by line, then its payload.
fn letter_text(letter: &Value) -> String {
    let text = |key: &str| match &letter[key] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let fields = [
        ("event", "id"),
        ("sink", "deadlettersink"),
        ("reason", "deadletterreason"),
        ("attempts", "deadletterattempts"),
        ("first", "deadletterfirsttime"),
        ("last", "deadletterlasttime"),
        ("device", "partitionkey"),
        ("topic", "subject"),
        ("time", "time"),
        ("content type", "datacontenttype"),
    ];
    let rows: Vec<_> =
        fields.iter().map(|(name, key)| vec![(*name).to_owned(), text(key)]).collect();
    let payload = match (&letter["data"], &letter["data_base64"]) {
        (Value::Null, Value::String(base64)) => format!("(base64) {base64}"),
        (data, _) => serde_json::to_string_pretty(data).unwrap_or_default(),
    };
    format!("{}\n{payload}\n", table(&rows))
}

/// Writes what is selected, from wherever the store is looked at.
fn read(config: &ConfigFile, selection: Selection, out: &mut dyn std::io::Write) -> Result<(), u8> {
    let (config, look) = look(&config.path)?;
    match look {
        Look::Folder(store) => {
            let selected = of(selection, &store, &config)?;
            match letters::export(&store, &config.gateway.id, &selected, out, &|| true) {
                Err(InspectError::Write(error))
                    if error.kind() == std::io::ErrorKind::BrokenPipe =>
                {
                    Ok(())
                }
                done => done.map(drop).map_err(|error| fail(&error)),
            }
        }
        Look::Gateway(remote) => {
            let event = selection.events.first().cloned();
            let pairs = [
                ("sink", Some(selection.sink)),
                ("event", event),
                ("device", selection.device),
                ("reason", selection.reason),
            ];
            match remote.pass_on("dlq/export", &pairs, out) {
                Passed::Whole => out.flush().map_err(|_| DONE),
                Passed::WrongInput(why) => Err(wrong(&why)),
                Passed::Broken(why) => Err(tell(&why)),
            }
        }
    }
}

/// What is done with the letters.
#[derive(Clone, Copy)]
enum Change {
    Requeue,
    Drop,
}

fn change(args: &ChangeArgs, change: Change) -> Result<(), u8> {
    let config = super::super::load(&args.config.path)?;
    let known = config.sinks.iter().any(|sink| sink.name == args.sink);
    if matches!(change, Change::Requeue) && !known {
        return Err(wrong(&crate::admin::no_such_sink(&args.sink)));
    }
    let path = match change {
        Change::Requeue => "dlq/requeue",
        Change::Drop => "dlq/drop",
    };
    let mut running = true;
    let changed: Changed = match open(&config)? {
        Opened::Gateway(remote) => {
            remote.post_json(path, &args.selection()).map_err(|passed| match passed {
                Passed::WrongInput(why) => wrong(&why),
                Passed::Broken(why) => tell(&why),
                Passed::Whole => FAILED,
            })?
        }
        Opened::Folder(store, writer) => {
            running = false;
            let selected = of(args.selection(), &store, &config)?;
            let now_us = clock::now_us();
            let changed = match change {
                Change::Requeue => letters::requeue(&store, &selected, now_us),
                Change::Drop => letters::drop(&store, &selected, now_us),
            };
            // Closed well also when the change failed.
            let closed = writer.close();
            let changed = changed.map_err(|error| fail(&error.into()))?;
            closed.map_err(|error| fail(&error.into()))?;
            changed
        }
    };
    let n = count(changed.events);
    print(&match (change, running) {
        _ if changed.events == 0 => "no dead letter was meant by that\n".to_owned(),
        (Change::Requeue, true) => format!("{n} dead letter(s) are being delivered again\n"),
        (Change::Requeue, false) => {
            format!("{n} dead letter(s) will be delivered again when the gateway runs\n")
        }
        (Change::Drop, _) => format!("{n} dead letter(s) dropped; the loss ledger has them\n"),
    });
    if changed.events == 0 && !args.all { Err(FAILED) } else { Ok(()) }
}

fn would_drop(args: &ChangeArgs) -> Result<(), u8> {
    let (config, look) = look(&args.config.path)?;
    let events = match look {
        Look::Folder(store) => {
            let selected = of(args.selection(), &store, &config)?;
            let counted = letters::count(&store, &config.gateway.id, &selected);
            counted.map_err(|error| fail(&error))?.events
        }
        Look::Gateway(remote) => {
            let found: Result<Changed, Passed> = remote.post_json("dlq/count", &args.selection());
            found
                .map_err(|passed| match passed {
                    Passed::WrongInput(why) => wrong(&why),
                    Passed::Broken(why) => tell(&why),
                    Passed::Whole => FAILED,
                })?
                .events
        }
    };
    print(&format!(
        "{} dead letter(s) would be dropped, into the loss ledger; nothing was done: add --yes\n",
        count(events)
    ));
    Ok(())
}

impl ChangeArgs {
    fn selection(&self) -> Selection {
        Selection {
            sink: self.sink.clone(),
            events: self.events.clone(),
            all: self.all,
            device: self.device.clone(),
            reason: self.reason.clone(),
        }
    }
}

/// A store that may be changed.
enum Opened {
    Folder(Box<Store>, Box<Writer>),
    Gateway(Remote),
}

fn open(config: &Config) -> Result<Opened, u8> {
    // A look first: opening to write would make a store where there is none.
    let looked = Store::open_to_look(config.store_options(), clock::now_us()).map(drop);
    match looked.and_then(|()| Store::open(config.store_options(), clock::now_us())) {
        Ok((store, writer)) => Ok(Opened::Folder(Box::new(store), Box::new(writer))),
        Err(OpenError::InUse { .. }) => super::ask_gateway(config).map(Opened::Gateway),
        Err(error) => Err(cannot_open(&error)),
    }
}

fn of(selection: Selection, store: &Store, config: &Config) -> Result<Selected, u8> {
    selection.of(store, &config.gateway.id).map_err(|why| wrong(&why))
}

fn wrong(why: &str) -> u8 {
    eprintln!("edge-gateway: {why}");
    WRONG_INPUT
}

fn tell(why: &str) -> u8 {
    eprintln!("edge-gateway: {why}");
    FAILED
}
