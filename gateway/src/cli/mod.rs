//! The command line: one module per verb, and the exit codes that scripts rely on.

mod check;
mod demo;
mod logging;
mod passwd;
mod run;
mod status;
mod store;
mod top;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;

/// Done, and where there was an audit it balanced.
const DONE: u8 = 0;
/// Something failed at run time.
const FAILED: u8 = 1;
/// The configuration or the arguments are wrong. clap uses the same number.
const WRONG_INPUT: u8 = 2;
/// Loss or disorder was found.
const UNBALANCED: u8 = 3;

/// MQTT in, a durable log, store-and-forward to Kafka or HTTP.
///
/// A device is acked only when its event is on disk. Whatever happens upstream, events keep their
/// order per device and are delivered when the upstream is back.
#[derive(Parser)]
#[command(name = "edge-gateway", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLES: &str = "\
Examples:
  edge-gateway demo                                 see it work: outage, kill -9, balance
  edge-gateway check --config gateway.toml          every mistake at once
  edge-gateway run --config gateway.toml            the gateway
  edge-gateway passwd alice                         a user's password, from the terminal or stdin
  edge-gateway status                               what a running gateway is doing
  edge-gateway top                                  the same, each second
  edge-gateway balance --config gateway.toml        where every event went, per sink
  edge-gateway dlq list --config gateway.toml       what a sink refused for good, and why
  edge-gateway store verify --config gateway.toml   whether everything stored is whole

Exit codes: 0 done and balanced, 1 failed at run time, 2 wrong configuration or arguments,
3 loss or disorder was found.";

#[derive(Subcommand)]
enum Verb {
    /// Run the gateway until SIGTERM or SIGINT
    Run(ConfigFile),
    /// Check a configuration: every problem at once, exit code 2 if there is one
    Check(ConfigFile),
    /// Set or remove a user's password in the users file
    Passwd(passwd::PasswdArgs),
    /// Show what a running gateway is doing
    Status(status::StatusArgs),
    /// Watch a running gateway on a terminal screen; q quits
    Top(top::TopArgs),
    /// Where every event went, per sink: delivered, pending, refused, dropped
    Balance(store::BalanceArgs),
    /// Send stored events again into one sink of a running gateway, beside live traffic
    Replay(store::ReplayArgs),
    /// Events that a sink refused for good: look at them, deliver them again, drop them
    #[command(subcommand)]
    Dlq(store::DlqVerb),
    /// Look at the store, check it, export from it; also beside a running gateway
    #[command(subcommand)]
    Store(store::StoreVerb),
    /// See the whole journey on this machine: a fleet, an outage, a kill -9, and the final balance
    Demo(demo::DemoArgs),
    /// Write a completion script for a shell to stdout
    #[command(after_help = "\
Example, for bash:
  edge-gateway completion bash > /etc/bash_completion.d/edge-gateway")]
    Completion {
        /// The shell
        shell: Shell,
    },
}

#[derive(Args)]
struct ConfigFile {
    /// Configuration file (TOML); see configs/gateway.toml for every key
    #[arg(
        short = 'c',
        long = "config",
        value_name = "FILE",
        env = "EDGE_GATEWAY_CONFIG",
        default_value = "/etc/edge-gateway/gateway.toml"
    )]
    path: PathBuf,
}

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    crate::install_tls_provider();
    let code = match cli.verb {
        Verb::Run(file) => run::run(&file.path),
        Verb::Check(file) => check::check(&file.path),
        Verb::Passwd(args) => passwd::passwd(&args),
        Verb::Status(args) => status::status(&args),
        Verb::Top(args) => top::top(&args),
        Verb::Balance(args) => store::balance(&args),
        Verb::Replay(args) => store::replay(&args),
        Verb::Dlq(verb) => store::dlq(&verb),
        Verb::Store(verb) => store::store(&verb),
        Verb::Demo(args) => demo::demo(&args),
        Verb::Completion { shell } => {
            print!("{}", completion(shell));
            DONE
        }
    };
    ExitCode::from(code)
}

/// The completion script of a shell.
fn completion(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "edge-gateway", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Reads a configuration, or says what is wrong with it.
fn load(path: &std::path::Path) -> Result<crate::config::Config, u8> {
    crate::config::Config::load(path).map_err(|wrong| {
        eprintln!("{wrong}");
        WRONG_INPUT
    })
}

/// A runtime for verbs that only ask a running gateway.
fn small_runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, ValueEnum as _};

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn every_shell_learns_every_verb() {
        for &shell in super::Shell::value_variants() {
            let script = super::completion(shell);
            for verb in super::Cli::command().get_subcommands() {
                assert!(script.contains(verb.get_name()), "{shell}: {}", verb.get_name());
            }
        }
    }
}
