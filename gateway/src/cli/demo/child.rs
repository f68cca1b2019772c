//! The gateway under demonstration: this same program as a child process, so that it can be killed
//! for real.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::Addresses;

/// How long a gateway may take until it is ready, or until it has drained.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running child gateway. Dropping it kills it.
pub(super) struct ChildGateway {
    process: Child,
    pub(super) addresses: Addresses,
}

impl ChildGateway {
    /// Starts `edge-gateway run` and waits for its ready line. Its log is appended to `log`.
    pub(super) async fn start(config: &Path, log: &Path) -> anyhow::Result<Self> {
        let program = own_program()?;
        let stderr = File::options().create(true).append(true).open(log)?;
        let mut process = Command::new(program)
            .arg("run")
            .arg("--config")
            .arg(config)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(stderr)
            // Ctrl-C in the terminal is for the demo, which then ends its child itself.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the gateway")?;
        let stdout = process.stdout.take().ok_or_else(|| anyhow!("the gateway has no stdout"))?;
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(PATIENCE, lines.next_line())
            .await
            .context("the gateway was not ready in time")??;
        let Some(addresses) = line.as_deref().and_then(Addresses::from_ready_line) else {
            // By now its stdout is closed, and its log says why.
            let said = std::fs::read_to_string(log).unwrap_or_default();
            bail!(
                "the gateway did not start: {}",
                said.lines().last().unwrap_or("it does not say why")
            );
        };
        Ok(Self { process, addresses })
    }

    /// SIGKILL: no goodbye, no flush.
    pub(super) async fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill().await.context("cannot kill the gateway")
    }

    /// SIGTERM: drains, flushes, and ends with exit code 0.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        let id = self.process.id().and_then(|id| i32::try_from(id).ok());
        let id = id.and_then(rustix::process::Pid::from_raw).context("the gateway is gone")?;
        rustix::process::kill_process(id, rustix::process::Signal::TERM)?;
        let ended = tokio::time::timeout(PATIENCE, self.process.wait())
            .await
            .context("the gateway did not end in time after SIGTERM")??;
        if !ended.success() {
            bail!("the gateway ended with {ended} after SIGTERM");
        }
        Ok(())
    }

    /// Whether it ended by itself, which it should not.
    pub(super) fn died(&mut self) -> Option<std::process::ExitStatus> {
        self.process.try_wait().ok().flatten()
    }
}

fn own_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("cannot find the path of this program")
}
