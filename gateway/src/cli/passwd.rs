//! `passwd`: sets or removes a user's password in the users file.
//!
//! The password never is an argument, which everybody on the machine could read: it comes from the
//! terminal, unseen, or from stdin.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::path::PathBuf;

use clap::Args;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use super::{ConfigFile, DONE, FAILED, WRONG_INPUT, load};
use crate::access::users::{self, PASSWORD_BYTES_MAX};

#[derive(Args)]
pub(super) struct PasswdArgs {
    /// User name
    user: String,
    /// Users file; without it, auth.users_file of the configuration
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Remove the user
    #[arg(long)]
    delete: bool,
    #[command(flatten)]
    config: ConfigFile,
}

pub(super) fn passwd(args: &PasswdArgs) -> u8 {
    let path = match &args.file {
        Some(path) => path.clone(),
        None => match load(&args.config.path).map(|config| config.auth.users_file) {
            Ok(Some(path)) => path,
            Ok(None) => {
                let config = args.config.path.display();
                eprintln!("edge-gateway: {config} has no auth.users_file; set it, or use --file");
                return WRONG_INPUT;
            }
            Err(code) => return code,
        },
    };
    if let Some(why) = users::wrong_name(&args.user) {
        eprintln!("edge-gateway: {why}");
        return WRONG_INPUT;
    }
    let hash = match (!args.delete).then(read_password).transpose() {
        Ok(None) => None,
        Ok(Some(password)) => match users::hash(password.as_bytes()) {
            Ok(hash) => Some(hash),
            Err(wrong) => return failed(&wrong),
        },
        Err(why) => {
            eprintln!("edge-gateway: {why}");
            return WRONG_INPUT;
        }
    };
    match users::set(&path, &args.user, hash.as_deref()) {
        Ok(true) => {
            let done = if args.delete { "removed from" } else { "set in" };
            println!(
                "{:?} {done} {}; a running gateway reads it at SIGHUP",
                args.user,
                path.display()
            );
            DONE
        }
        Ok(false) => {
            eprintln!("edge-gateway: {:?} is not in {}", args.user, path.display());
            WRONG_INPUT
        }
        Err(wrong) => failed(&wrong),
    }
}

fn failed(wrong: &users::UsersError) -> u8 {
    eprintln!("edge-gateway: {wrong}");
    FAILED
}

/// From the terminal, twice and without showing it; or one line of stdin.
fn read_password() -> Result<String, String> {
    let password = if io::stdin().is_terminal() {
        let _unseen = Unseen::begin().map_err(|error| format!("no password read: {error}"))?;
        let first = prompt("Password: ")?;
        if prompt("Again: ")? != first {
            return Err("the two passwords differ; nothing was changed".to_owned());
        }
        first
    } else {
        read_line()?
    };
    if password.is_empty() || password.len() > PASSWORD_BYTES_MAX {
        return Err(format!("a password has 1 to {PASSWORD_BYTES_MAX} bytes"));
    }
    Ok(password)
}

fn prompt(text: &str) -> Result<String, String> {
    eprint!("{text}");
    io::stderr().flush().ok();
    let line = read_line();
    // The line end was not shown either.
    eprintln!();
    line
}

fn read_line() -> Result<String, String> {
    let mut line = String::new();
    let read = io::stdin().lock().read_line(&mut line);
    read.map_err(|error| format!("no password read: {error}"))?;
    let end = line.trim_end_matches(['\r', '\n']).len();
    line.truncate(end);
    Ok(line)
}

/// The terminal shows nothing of what is typed until this is dropped.
struct Unseen(Termios);

impl Unseen {
    fn begin() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut unseen = before.clone();
        unseen.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &unseen)?;
        Ok(Self(before))
    }
}

impl Drop for Unseen {
    fn drop(&mut self) {
        tcsetattr(io::stdin(), OptionalActions::Flush, &self.0).ok();
    }
}
