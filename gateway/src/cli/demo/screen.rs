//! What the demo shows while it runs: one line that is redrawn in a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::text::count;

/// What the line shows.
#[derive(Clone, Copy, Default)]
pub(super) struct Progress {
    pub(super) sent: u64,
    pub(super) acked: u64,
    pub(super) delivered: u64,
    pub(super) connected: u64,
    pub(super) ack_p99_ms: f64,
}

/// Between two plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(1);

/// Writes to stderr when stdout is for a machine.
pub(super) struct Screen {
    out: Box<dyn Write + Send>,
    live: bool,
    started: Instant,
    phase: &'static str,
    last: (Instant, Progress),
    acked_per_second: f64,
    delivered_per_second: f64,
    drawn: Option<Instant>,
    /// The cursor stands at the end of a line that may be drawn over.
    unfinished: bool,
}

impl Screen {
    pub(super) fn new(to_stderr: bool) -> Self {
        let (out, live): (Box<dyn Write + Send>, bool) = if to_stderr {
            (Box::new(std::io::stderr()), std::io::stderr().is_terminal())
        } else {
            (Box::new(std::io::stdout()), std::io::stdout().is_terminal())
        };
        let now = Instant::now();
        Self {
            out,
            live,
            started: now,
            phase: "starting",
            last: (now, Progress::default()),
            acked_per_second: 0.0,
            delivered_per_second: 0.0,
            drawn: None,
            unfinished: false,
        }
    }

    /// A line that stays.
    pub(super) fn say(&mut self, text: &str) {
        let clear = if self.live { "\r\x1b[2K" } else { "" };
        // A closed terminal must not end the demo: the balance still counts.
        writeln!(self.out, "{clear}{text}").ok();
        self.unfinished = false;
        self.out.flush().ok();
    }

    /// Enters a phase and says what is being shown in it.
    pub(super) fn phase(&mut self, name: &'static str, text: &str) {
        self.phase = name;
        let at = self.started.elapsed().as_secs_f64();
        let (bold, plain) = if self.live { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        self.say(&format!("{at:5.1}s  {bold}{name:<8}{plain} {text}"));
        self.drawn = None;
    }

    /// Shows where things stand.
    pub(super) fn show(&mut self, now: Instant, progress: Progress) {
        let every = if self.live { Duration::from_millis(200) } else { PLAIN_EVERY };
        if self.drawn.is_some_and(|drawn| now.duration_since(drawn) < every) {
            return;
        }
        self.drawn = Some(now);
        let (then, before) = self.last;
        let seconds = now.duration_since(then).as_secs_f64();
        if seconds >= 0.5 {
            let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
            self.acked_per_second = rate(progress.acked, before.acked);
            self.delivered_per_second = rate(progress.delivered, before.delivered);
            self.last = (now, progress);
        }
        let at = self.started.elapsed().as_secs_f64();
        let mut line = format!("{at:5.1}s  {:<8}", self.phase);
        // What matters most comes first, and fits 80 columns.
        let parts = [
            format!(" acked {}/s", count(self.acked_per_second as u64)),
            format!("  delivered {}/s", count(self.delivered_per_second as u64)),
            format!("  lag {}", count(progress.acked.saturating_sub(progress.delivered))),
            format!("  ack p99 {:.1} ms", progress.ack_p99_ms),
            format!("  {} devices", count(progress.connected)),
            format!("  {} sent", count(progress.sent)),
            format!("  {} acked", count(progress.acked)),
            format!("  {} delivered", count(progress.delivered)),
        ];
        // A line that wraps could not be drawn over.
        let columns = if self.live { columns() - 1 } else { usize::MAX };
        for part in &parts {
            if line.len() + part.len() > columns {
                break;
            }
            line += part;
        }
        self.unfinished = self.live;
        if self.live {
            write!(self.out, "\r\x1b[2K{line}").ok();
        } else {
            writeln!(self.out, "{line}").ok();
        }
        self.out.flush().ok();
    }
}

impl Drop for Screen {
    /// What the shell or an error says next gets a line of its own.
    fn drop(&mut self) {
        if self.unfinished {
            writeln!(self.out).ok();
        }
    }
}

/// Width of the terminal, 80 where it does not say.
fn columns() -> usize {
    let told = rustix::termios::tcgetwinsize(std::io::stdout())
        .or_else(|_| rustix::termios::tcgetwinsize(std::io::stderr()));
    told.map_or(80, |size| usize::from(size.ws_col).max(20))
}
