//! How far a walk is: a bar on a terminal, a line now and then elsewhere. On stderr, so that stdout
//! is the answer alone.

use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use storage::Progress;

use crate::inspection::Pace;
use crate::text::count;

const BAR_EVERY: Duration = Duration::from_millis(100);
const LINE_EVERY: Duration = Duration::from_secs(5);
const BAR_CELLS: u64 = 30;

/// One walk's progress.
pub(super) struct Bar {
    what: &'static str,
    terminal: bool,
    pace: Pace,
    shown: bool,
}

impl Bar {
    pub(super) fn new(what: &'static str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let every = if terminal { BAR_EVERY } else { LINE_EVERY };
        Self { what, terminal, pace: Pace::new(every), shown: false }
    }

    /// Shows how far it is, if that was not shown just now.
    pub(super) fn show(&mut self, progress: Progress) {
        if !self.pace.is_due() {
            return;
        }
        let line = line(self.what, progress);
        if self.terminal {
            self.shown = true;
            eprint!("\r{line} {}", bar(progress));
            std::io::stderr().flush().ok();
        } else {
            eprintln!("{line}");
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.shown {
            // Back to the start of the line, and clear it.
            eprint!("\r\x1b[K");
        }
    }
}

fn line(what: &str, Progress { done, total }: Progress) -> String {
    let percent = (u128::from(done) * 100).checked_div(u128::from(total)).unwrap_or(100);
    format!("{what}: {percent:3} %, {} of {} events", count(done), count(total))
}

fn bar(Progress { done, total }: Progress) -> String {
    let cells = u128::from(done) * u128::from(BAR_CELLS);
    let filled = cells.checked_div(u128::from(total)).unwrap_or(0).min(u128::from(BAR_CELLS));
    let filled = filled as usize;
    format!("[{}{}]", "#".repeat(filled), ".".repeat(BAR_CELLS as usize - filled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_fills_up() {
        let at = |done, total| Progress { done, total };
        assert_eq!(line("verify", at(500, 2_000)), "verify:  25 %, 500 of 2,000 events");
        assert_eq!(bar(at(0, 10)), format!("[{}]", ".".repeat(30)));
        assert_eq!(bar(at(5, 10)), format!("[{}{}]", "#".repeat(15), ".".repeat(15)));
        assert_eq!(bar(at(u64::MAX, u64::MAX)), format!("[{}]", "#".repeat(30)));
        assert_eq!(bar(at(0, 0)), format!("[{}]", ".".repeat(30)));
    }
}
