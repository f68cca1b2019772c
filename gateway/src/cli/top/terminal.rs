//! The terminal as a screen: entered, drawn on, and given back as it was.
//!
//! Owns: raw mode, the alternate screen, and the keys.
//! Invariant: however this ends (a key, a signal, an error, a panic), the terminal is as it was.

use std::io::{self, IsTerminal, Read as _, Stdout, Write as _};
use std::thread;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;

/// Alternate screen, no cursor, and both undone.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// Keys that wait for the loop; more are of no use to it.
const KEYS_MAX: usize = 8;
const CTRL_C: u8 = 3;

/// A key that was pressed.
pub(super) enum Key {
    /// `q` or Ctrl-C, or nobody is there any more.
    Quit,
    /// Any other.
    Other,
}

/// The terminal, taken over.
pub(super) struct Terminal {
    before: Termios,
    out: Stdout,
    keys: mpsc::Receiver<u8>,
}

impl Terminal {
    /// Whether there is one to read from and to write to.
    pub(super) fn is_there() -> bool {
        io::stdin().is_terminal() && io::stdout().is_terminal()
    }

    /// Takes it over.
    pub(super) fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        let (sender, keys) = mpsc::channel(KEYS_MAX);
        // It waits in a read that nothing ends, so it is not waited for: it ends with the process.
        thread::Builder::new().name("keys".to_owned()).spawn(move || {
            let mut byte = [0];
            while io::stdin().read(&mut byte).is_ok_and(|len| len == 1) {
                if sender.blocking_send(byte[0]).is_err() {
                    break;
                }
            }
        })?;
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        let mut terminal = Self { before, out: io::stdout(), keys };
        terminal.write(ENTER)?;
        Ok(terminal)
    }

    /// Its columns and rows.
    pub(super) fn size() -> (usize, usize) {
        tcgetwinsize(io::stdout()).map_or((80, 24), |size| {
            let or = |told: u16, usual: usize| if told == 0 { usual } else { usize::from(told) };
            (or(size.ws_col, 80), or(size.ws_row, 24))
        })
    }

    /// The next key. Cancel safe.
    pub(super) async fn key(&mut self) -> Key {
        match self.keys.recv().await {
            None | Some(b'q' | b'Q' | CTRL_C) => Key::Quit,
            Some(_) => Key::Other,
        }
    }

    /// Draws a frame over the last one: each line and what is behind it, without a clear screen
    /// between, which would flicker.
    pub(super) fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        let mut out = String::from("\x1b[H");
        for (place, line) in lines.iter().enumerate() {
            if place > 0 {
                out += "\r\n";
            }
            out += line;
            out += "\x1b[K";
        }
        out += "\x1b[J";
        self.write(&out)
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing back.
        self.write(LEAVE).ok();
        tcsetattr(io::stdin(), OptionalActions::Now, &self.before).ok();
    }
}
