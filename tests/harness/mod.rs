//! What the whole-system tests stand on: the real binary as a child process, an upstream that can be
//! taken away, a fleet with ledgers, and the audit.
//!
//! Owns: processes and files of one test, all below one temporary folder, all gone at its end.
//! Invariant: nothing waits by sleeping. [`eventually`] polls for a condition within a bound that
//! only a broken gateway reaches; no test asserts a time.
//! Deliberately absent: looking inside the gateway. It is seen as its users see it: MQTT, the admin
//! endpoint, exit codes, stderr, and what arrives upstream.

#![allow(dead_code, unused_imports, reason = "each test target uses a part of it")]

mod bench;
mod client;
mod disk;
mod fault_proxy;
mod gateway_process;
pub(crate) mod kafka;
pub(crate) mod kafka_proxy;
pub(crate) mod pki;
pub(crate) mod raw;
pub(crate) mod tunnel;
pub(crate) mod wire;

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use firmware_sim::audit::{AuditReport, audit};

pub(crate) use bench::{Bench, http_sink, stable_address};
pub(crate) use client::Subscriber;
pub(crate) use disk::Disk;
pub(crate) use fault_proxy::{Fault, FaultProxy};
pub(crate) use gateway_process::{Ended, GatewayProcess, command, run_to_end, run_words, sink};

/// How long anything may take before the test gives up on it. Generous: machines are slow and shared.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// Polls until `look` gives something.
///
/// # Panics
/// After [`PATIENCE`], naming what did not happen.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(started.elapsed() < PATIENCE, "in {PATIENCE:?} this did not happen: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Seed of a test: `EDGE_GATEWAY_SEED`, or its own. Printed, so that a failure can be repeated.
pub(crate) fn seed(own: u64) -> u64 {
    let seed = number_from_env("EDGE_GATEWAY_SEED").unwrap_or(own);
    println!("seed {seed} (EDGE_GATEWAY_SEED={seed} repeats it)");
    seed
}

/// A number from the environment.
pub(crate) fn number_from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")))
}

/// Says loudly that a test did not run; fails it where nothing may be skipped.
pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}");
    assert!(std::env::var_os("EDGE_GATEWAY_REQUIRE_ALL").is_none(), "{line}");
    // Not captured as a test's prints are: a line that is for whoever runs the tests.
    writeln!(std::io::stderr(), "{line}").ok();
}

/// Audits a fleet that was drained: everything that it sent was acked, arrived, and in order.
///
/// # Panics
/// With the whole report, when anything is missing, out of order, or from elsewhere.
pub(crate) fn assert_balanced(sent: &Path, received: &Path) -> AuditReport {
    let report = audit(sent, received).unwrap();
    println!("{report}");
    assert!(report.sent > 0, "the fleet sent nothing: {report}");
    assert_eq!(report.lost, 0, "acked and lost: {report}");
    assert_eq!(report.out_of_order, 0, "out of order: {report}");
    assert_eq!(report.acked, report.sent, "a drained fleet has every ack: {report}");
    assert_eq!(report.delivered, report.sent, "everything arrives: {report}");
    assert_eq!((report.unknown, report.foreign), (0, 0), "only this fleet: {report}");
    report
}
