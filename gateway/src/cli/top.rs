//! `top`: what a running gateway is doing, on a terminal screen that is drawn anew each second.
//!
//! Owns: the loop (ask, draw, listen for a key) and the frame, which is pure. A gateway that does not
//! answer is said to be silent, over what it said last, and asked again.
//! Deliberately absent: anything that the status does not say.

mod terminal;

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::MissedTickBehavior;

use self::terminal::{Key, Terminal};
use super::status::{self, estimate};
use super::{DONE, FAILED, WRONG_INPUT, small_runtime};
use crate::admin::status::{SinkStatus, Status};
use crate::text::{bytes, count, duration};

#[derive(Args)]
pub(super) struct TopArgs {
    /// Admin address of the gateway
    #[arg(long, value_name = "ADDR", env = "EDGE_GATEWAY_ADMIN", default_value = "127.0.0.1:9641")]
    admin: String,
}

const REFRESH: Duration = Duration::from_secs(1);

pub(super) fn top(args: &TopArgs) -> u8 {
    if !Terminal::is_there() {
        eprintln!("edge-gateway: top needs a terminal; for a look at one moment there is `status`");
        return WRONG_INPUT;
    }
    let shown = small_runtime().map_err(Into::into).and_then(|rt| rt.block_on(show(&args.admin)));
    match shown {
        Ok(()) => DONE,
        Err(error) => {
            eprintln!("edge-gateway: {error}");
            FAILED
        }
    }
}

/// What is known of the gateway.
struct View<'a> {
    admin: &'a str,
    /// What it said last.
    status: Option<Status>,
    /// Since when it does not answer, and why; nothing while it does.
    silent: Option<(Instant, String)>,
}

async fn show(admin: &str) -> anyhow::Result<()> {
    let client = status::client()?;
    let (mut resized, mut ends) = (signal(SignalKind::window_change())?, Ends::listen()?);
    let mut terminal = Terminal::enter()?;
    let mut beat = tokio::time::interval(REFRESH);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut view = View { admin, status: None, silent: None };
    let mut asking = None;
    loop {
        tokio::select! {
            _ = beat.tick() => {
                if asking.is_none() {
                    asking = Some(Box::pin(status::ask(&client, admin)));
                }
            }
            answer = async { asking.as_mut().expect("guarded").await }, if asking.is_some() => {
                asking = None;
                match answer {
                    Ok(status) => {
                        view.status = Some(status);
                        view.silent = None;
                    }
                    Err(error) => {
                        let since = view.silent.map_or_else(Instant::now, |(since, _)| since);
                        view.silent = Some((since, error.root_cause().to_string()));
                    }
                }
            }
            _ = resized.recv() => {}
            key = terminal.key() => match key {
                Key::Quit => return Ok(()),
                Key::Other => continue,
            },
            () = ends.recv() => return Ok(()),
        }
        let (columns, rows) = Terminal::size();
        terminal.draw(&frame(&view, Instant::now(), columns, rows))?;
    }
}

/// The signals that end it.
struct Ends([Signal; 3]);

impl Ends {
    fn listen() -> std::io::Result<Self> {
        Ok(Self([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    async fn recv(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

const BOLD: &str = "\x1b[1m";
const REVERSE: &str = "\x1b[7m";
const RED: &str = "\x1b[31m";
const PLAIN: &str = "\x1b[0m";
/// From here on a terminal is a wide one.
const WIDE_COLUMNS: usize = 100;
/// Cells of the bar that shows how full the store is.
const BAR_CELLS: usize = 20;

/// The lines of the screen, none longer than it is wide and no more than it is high.
fn frame(view: &View<'_>, now: Instant, columns: usize, rows: usize) -> Vec<String> {
    let mut lines = vec![headline(view, columns)];
    if let Some((since, why)) = &view.silent {
        let seconds = duration(now.saturating_duration_since(*since).as_secs_f64());
        let what = format!("NO ANSWER for {seconds}, trying again: {why}");
        lines.push(styled(RED, &what, columns));
        if view.status.is_some() {
            lines.push(styled(RED, "below is what it said before", columns));
        }
    }
    match &view.status {
        Some(status) => body(&mut lines, status, columns),
        None if view.silent.is_none() => lines.push(fit("asking ...", columns)),
        None => {
            let hint = "is the gateway running, and is this its [admin] bind?";
            lines.push(fit(hint, columns));
        }
    }
    let foot = fit("q quits", columns);
    if lines.len() >= rows {
        lines.truncate(rows.saturating_sub(1));
    } else {
        lines.resize(rows - 1, String::new());
    }
    lines.push(foot);
    lines.truncate(rows);
    lines
}

fn headline(view: &View<'_>, columns: usize) -> String {
    let text = match &view.status {
        None => format!(" edge-gateway top   {}", view.admin),
        Some(status) => {
            let gateway = &status.gateway;
            let ready = match &status.not_ready {
                _ if view.silent.is_some() => "SILENT",
                None if status.ingest.health == "at_quota" => "AT QUOTA",
                None => "ready",
                Some(_) => "NOT READY",
            };
            let rss = gateway.rss_bytes.map_or(String::new(), |rss| format!("   {}", bytes(rss)));
            let up = duration(gateway.uptime_seconds);
            format!(" {}   {ready}   up {up}{rss}   edge-gateway {}", gateway.id, gateway.version)
        }
    };
    styled(REVERSE, &format!("{text:<columns$}"), columns)
}

fn body(lines: &mut Vec<String>, status: &Status, columns: usize) {
    let (mqtt, ingest, store) = (&status.mqtt, &status.ingest, &status.store);
    let whole = |rate: f64| count(rate.round().max(0.0) as u64);
    if let Some(why) = &status.not_ready {
        lines.push(styled(RED, &format!("NOT READY: {why}"), columns));
    }
    lines.push(String::new());
    lines.push(fit(
        &format!(
            "events in   {}/s   {}/s   {} connected",
            whole(ingest.events_per_second),
            bytes(ingest.bytes_per_second.max(0.0) as u64),
            count(mqtt.connections),
        ),
        columns,
    ));
    let (ack, commit) = (&ingest.ack_latency_ms, &ingest.commit_latency_ms);
    lines.push(fit(
        &format!(
            "acks        {:.1} ms median   {:.1} ms p99   {:.1} ms max   commit {:.1} ms p99",
            ack.p50, ack.p99, ack.max, commit.p99
        ),
        columns,
    ));
    let full = (store.log_bytes as f64 / store.quota_bytes.max(1) as f64).clamp(0.0, 1.0);
    let cells = (full * BAR_CELLS as f64).round() as usize;
    lines.push(fit(
        &format!(
            "log         {} of {} [{}{}]   room for {}",
            bytes(store.log_bytes),
            bytes(store.quota_bytes),
            "#".repeat(cells),
            ".".repeat(BAR_CELLS - cells),
            estimate(store.left_seconds),
        ),
        columns,
    ));
    let losses = format!("losses      {} in the ledger", count(store.losses));
    lines.push(fit(&losses, columns));
    lines.push(String::new());
    if status.sinks.is_empty() {
        lines.push(fit("no sinks: a durable local broker", columns));
        return;
    }
    let head = ["SINK", "STATE", "LAG", "BYTES", "OLDEST", "RATE", "GONE IN", "LETTERS", "FULL IN"];
    lines.push(styled(BOLD, &row(columns, head), columns));
    for sink in &status.sinks {
        lines.push(fit(&sink_row(columns, sink), columns));
        if let Some(error) = &sink.error {
            let circuit = match sink.circuit.as_str() {
                "open" => "circuit open: ",
                "half_open" => "circuit half-open: ",
                _ => "",
            };
            lines.extend(wrapped(&format!("{circuit}{error}"), columns));
        }
    }
}

/// Lines that a complaint takes at most.
const COMPLAINT_LINES: usize = 2;

/// A complaint over as many lines as it may take: what matters in it often comes last.
fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let text: Vec<char> = text.chars().collect();
    let pieces = text.chunks(columns.saturating_sub(2).max(1)).take(COMPLAINT_LINES);
    pieces
        .map(|piece| styled(RED, &format!("  {}", piece.iter().collect::<String>()), columns))
        .collect()
}

fn sink_row(columns: usize, sink: &SinkStatus) -> String {
    let cells: [&str; 9] = [
        &sink.name,
        &sink.state,
        &count(sink.lag_events),
        &bytes(sink.lag_bytes),
        &if sink.lag_events == 0 { "-".to_owned() } else { duration(sink.lag_seconds) },
        &format!("{}/s", count(sink.drain_events_per_second.round().max(0.0) as u64)),
        &estimate(sink.eta_seconds.filter(|_| sink.lag_events > 0)),
        &count(sink.dead_letters),
        &estimate(sink.left_seconds),
    ];
    row(columns, cells)
}

/// Columns that make 79 cells, so that they fit the smallest usual terminal. A wider one has room for
/// longer names, and for how long until the sink's lag has no more room.
fn row(columns: usize, cells: [&str; 9]) -> String {
    let [name, state, lag, size, oldest, rate, eta, letters, full] = cells;
    let is_wide = columns >= WIDE_COLUMNS;
    let width = if is_wide { (columns - 75).min(64) } else { 14 };
    let name: String = name.chars().take(width).collect();
    let mut row = format!(
        "{name:<width$} {state:<8} {lag:>11} {size:>8} {oldest:>7} {rate:>9} {eta:>7} {letters:>7}"
    );
    if is_wide {
        let _ = write!(row, " {full:>8}");
    }
    row
}

/// What of a text fits a line. A control character in it would not be ours.
fn fit(text: &str, columns: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(columns).collect()
}

fn styled(style: &str, text: &str, columns: usize) -> String {
    format!("{style}{}{PLAIN}", fit(text, columns))
}

#[cfg(test)]
mod tests;
