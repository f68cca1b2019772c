//! A disk that is slow, stands still or fails, under the real binary: `disk.c`, in front of the C library.
//! It needs neither root nor a disk of its own, and its orders change at any moment.
//!
//! Deliberately absent: what becomes of pages that a failed sync covered. Here they stay where they are;
//! the simulated disk of `storage` takes them away.

use std::fs;
use std::path::{Path, PathBuf};

use tokio::process::Command;

use super::{Bench, GatewayProcess, command, skip};

/// The disk of one gateway, which works until something else is said.
pub(crate) struct Disk {
    library: PathBuf,
    orders: PathBuf,
    sync_ms: u32,
}

impl Disk {
    /// `None` where there is no C compiler: then the test is skipped.
    pub(crate) async fn new(bench: &Bench, test: &str) -> Option<Self> {
        let (library, orders) = (bench.path("disk.so"), bench.path("disk"));
        fs::create_dir(&orders).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-Wall", "-Werror", "-shared", "-fPIC", "-o"]).arg(&library);
        cc.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/harness/disk.c"));
        match cc.status().await {
            Ok(built) => assert!(built.success(), "cc does not build it"),
            Err(error) => {
                skip(test, &format!("cannot run cc: {error}"));
                return None;
            }
        }
        Some(Self { library, orders, sync_ms: 0 })
    }

    /// Every sync takes so long, and what the real disk takes.
    pub(crate) fn with_sync_ms(self, sync_ms: u32) -> Self {
        Self { sync_ms, ..self }
    }

    /// Starts the gateway on it.
    pub(crate) async fn start(&self, bench: &Bench) -> GatewayProcess {
        let mut command = command("run", &bench.path("gateway.toml"));
        command.env("LD_PRELOAD", &self.library).env("DISK_ORDERS", &self.orders);
        command.env("SYNC_MS", self.sync_ms.to_string());
        GatewayProcess::start_as(command, &bench.path("gateway.log")).await
    }

    /// It stands still: no sync ends until [`Disk::go_on`].
    pub(crate) fn stall(&self) {
        fs::write(self.orders.join("stall"), "").unwrap();
    }

    pub(crate) fn go_on(&self) {
        fs::remove_file(self.orders.join("stall")).unwrap();
    }

    /// Every sync fails from now on.
    pub(crate) fn fail(&self) {
        self.fail_for("");
    }

    /// The next sync of the thread of this name fails.
    pub(crate) fn fail_once(&self, thread: &str) {
        self.fail_for(thread);
    }

    fn fail_for(&self, thread: &str) {
        // Whole at once: the name of nobody means everybody.
        fs::write(self.orders.join("fail.new"), thread).unwrap();
        fs::rename(self.orders.join("fail.new"), self.orders.join("fail")).unwrap();
    }

    /// When syncs have failed, in microseconds since the Unix epoch.
    pub(crate) fn failed_us(&self) -> Vec<u64> {
        let failed = fs::read_to_string(self.orders.join("failed")).unwrap_or_default();
        failed.lines().map(|line| line.parse().unwrap()).collect()
    }
}
