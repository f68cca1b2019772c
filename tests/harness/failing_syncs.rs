//! A disk whose syncs fail, under the real binary: strace takes the place of the system for `fsync` and
//! `fdatasync` of a running process, and answers EIO. It needs neither root nor a disk of its own, and
//! begins and ends at any moment.
//!
//! Deliberately absent: what becomes of pages that a failed sync covered. Here they stay where they are;
//! the simulated disk of `storage` takes them away.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::time::timeout;

use super::PATIENCE;

/// Syncs of a process fail as long as it is held.
pub(crate) struct FailingSyncs {
    /// Killed when dropped, which lets go of the process.
    _strace: Child,
    /// Kept open: strace says when threads come.
    _stderr: BufReader<ChildStderr>,
    log: PathBuf,
}

impl FailingSyncs {
    /// Every sync of a process fails from now on. What was done is recorded in `log`.
    ///
    /// # Errors
    /// Why strace is no use here.
    pub(crate) async fn all(process: u32, log: &Path) -> Result<Self, String> {
        Self::inject(process, &["--follow-forks"], "fsync,fdatasync:error=EIO", log).await
    }

    /// As [`FailingSyncs::all`], but only the next `fdatasync` of the thread of this name.
    ///
    /// # Errors
    /// Why strace is no use here.
    pub(crate) async fn next_of(process: u32, thread: &str, log: &Path) -> Result<Self, String> {
        Self::inject(thread_of(process, thread), &[], "fdatasync:error=EIO:when=1", log).await
    }

    async fn inject(task: u32, more: &[&str], what: &str, log: &Path) -> Result<Self, String> {
        let mut strace = Command::new("strace");
        strace.args(more).arg("--absolute-timestamps=unix,us").arg("--output").arg(log);
        strace.arg(format!("--inject={what}")).arg(format!("--attach={task}"));
        strace.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut strace = strace.spawn().map_err(|error| format!("cannot run strace: {error}"))?;
        let mut line = String::new();
        let mut stderr = BufReader::new(strace.stderr.take().unwrap());
        timeout(PATIENCE, stderr.read_line(&mut line))
            .await
            .expect("strace says something")
            .unwrap();
        if !line.contains(" attached") {
            return Err(line.trim_end().to_owned());
        }
        Ok(Self { _strace: strace, _stderr: stderr, log: log.to_owned() })
    }

    /// When syncs have failed, in microseconds since the Unix epoch: the moments at which they were
    /// asked for.
    pub(crate) fn failed_us(&self) -> Vec<u64> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        // `[TASK ]SECONDS.MICROSECONDS fdatasync(3) = -1 EIO (Input/output error) (INJECTED)`
        let failed = log.lines().filter(|line| line.contains("(INJECTED)"));
        failed
            .map(|line| {
                let at = line.split_whitespace().find(|word| word.contains('.')).unwrap();
                at.replace('.', "").parse().unwrap_or_else(|_| panic!("no time in {line:?}"))
            })
            .collect()
    }
}

fn thread_of(process: u32, name: &str) -> u32 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let named = tasks.map(Result::unwrap).find(|task| {
        let comm = std::fs::read_to_string(task.path().join("comm"));
        comm.is_ok_and(|comm| comm.trim_end() == name)
    });
    let task = named.unwrap_or_else(|| panic!("there is no thread {name:?}"));
    task.file_name().into_string().unwrap().parse().unwrap()
}
