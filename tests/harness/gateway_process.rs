//! The real binary as a child process, killed when dropped.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use gateway::Addresses;
use gateway::admin::status::{SinkStatus, Status};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use super::{PATIENCE, eventually};

/// A running gateway.
pub(crate) struct GatewayProcess {
    process: Child,
    addresses: Addresses,
    log: PathBuf,
    client: reqwest::Client,
    /// Kept open: a gateway whose stdout is closed is another test.
    _stdout: BufReader<ChildStdout>,
}

/// A gateway that has ended by itself, or was told to.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Exit code; `None` after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// `edge-gateway VERB --config FILE`, not started yet.
pub(crate) fn command(verb: &str, config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-gateway"));
    command.arg(verb).arg("--config").arg(config).stdin(Stdio::null()).kill_on_drop(true);
    command
}

fn spawn(mut command: Command, log: &Path) -> Child {
    let log = File::options().create(true).append(true).open(log).unwrap();
    command.stdout(Stdio::piped()).stderr(log).spawn().unwrap()
}

impl GatewayProcess {
    /// Starts `edge-gateway run` and waits until it is ready. Its log is appended to `log`.
    pub(crate) async fn start(config: &Path, log: &Path) -> Self {
        Self::start_as(command("run", config), log).await
    }

    /// As [`GatewayProcess::start`], with a command of the test's own.
    pub(crate) async fn start_as(command: Command, log: &Path) -> Self {
        let mut process = spawn(command, log);
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        let read = timeout(PATIENCE, stdout.read_line(&mut line)).await;
        let addresses = Addresses::from_ready_line(line.trim_end());
        let Some(addresses) = addresses else {
            print_tail(log);
            panic!("the gateway did not get ready ({read:?}); it said {line:?}");
        };
        let client = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
        Self { process, addresses, log: log.to_owned(), client, _stdout: stdout }
    }

    /// Starts `edge-gateway run` and does not wait for anything.
    pub(crate) fn spawn(config: &Path, log: &Path) -> Child {
        spawn(command("run", config), log)
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        self.addresses.admin
    }

    /// SIGKILL: no goodbye, no flush. Returns when the process is gone.
    pub(crate) async fn kill(mut self) {
        self.process.kill().await.unwrap();
    }

    /// SIGTERM, and the exit code.
    pub(crate) async fn terminate(mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.wait().await
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.process.id().expect("it was not waited for")
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.id().cast_signed()).unwrap(), signal).unwrap();
    }

    /// Waits for the end, and gives the exit code.
    pub(crate) async fn wait(&mut self) -> Option<i32> {
        timeout(PATIENCE, self.process.wait()).await.expect("the gateway ends").unwrap().code()
    }

    /// What `/api/v1/status` says.
    pub(crate) async fn status(&self) -> Status {
        let url = format!("http://{}/api/v1/status", self.addresses.admin);
        let answer = self.client.get(url).send().await.expect("the admin endpoint answers");
        serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
    }

    /// Status code and text of another path of the admin endpoint.
    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", self.addresses.admin);
        let answer = self.client.get(url).send().await.expect("the admin endpoint answers");
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// Polls until the status is as wanted.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
        eventually(what, async || Some(self.status().await).filter(&wanted)).await
    }

    /// Polls until a sink has everything that is durable.
    pub(crate) async fn until_delivered(&self, sink: &str) -> Status {
        let what = format!("{sink} has everything");
        self.until(&what, |status| self::sink(status, sink).lag_events == 0).await
    }

    /// What the gateway has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// A sink's part of the status.
pub(crate) fn sink<'a>(status: &'a Status, name: &str) -> &'a SinkStatus {
    status.sinks.iter().find(|sink| sink.name == name).expect("the sink is configured")
}

/// Runs `edge-gateway VERB --config FILE` until it ends by itself.
pub(crate) async fn run_to_end(verb: &str, config: &Path) -> Ended {
    end_of(command(verb, config)).await
}

/// Runs `edge-gateway WORDS` until it ends by itself.
pub(crate) async fn run_words(words: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-gateway"));
    command.args(words).stdin(Stdio::null()).kill_on_drop(true);
    end_of(command).await
}

async fn end_of(mut command: Command) -> Ended {
    let output = command.output();
    let output = timeout(PATIENCE, output).await.expect("it ends by itself").unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

impl Drop for GatewayProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            print_tail(&self.log);
        }
    }
}

fn print_tail(log: &Path) {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    println!("the gateway's log ends with:");
    for line in &lines[lines.len().saturating_sub(40)..] {
        println!("  {line}");
    }
}
