//! A process that is measured, or that makes load: what it says, its CPU and its memory.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, ensure};

/// A child that is killed when dropped.
pub(crate) struct Process {
    /// Its stdin is open; the end of it is the end for those who wait for that.
    pub(crate) child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    /// Starts it.
    pub(crate) fn start(command: &mut Command) -> anyhow::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdout = BufReader::new(child.stdout.take().context("piped")?);
        Ok(Self { child, stdout })
    }

    /// The next line that it says.
    pub(crate) fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        ensure!(self.stdout.read_line(&mut line)? > 0, "a process has ended before it answered");
        Ok(line.trim_end().to_owned())
    }

    /// CPU time that it has used, in seconds.
    pub(crate) fn cpu_s(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // User and system time are the 12th and 13th field behind the name in brackets.
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let ticks: Vec<u64> = fields.skip(11).take(2).flat_map(str::parse).collect();
        ensure!(ticks.len() == 2, "cannot read {stat:?}");
        let per_second = rustix::param::clock_ticks_per_second() as f64;
        Ok((ticks[0] + ticks[1]) as f64 / per_second)
    }

    /// Its resident memory, in MB.
    pub(crate) fn rss_mb(&self) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"));
        let kib: f64 = kib.context("no VmRSS")?.trim().parse()?;
        Ok(kib * 1024.0 / 1e6)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
