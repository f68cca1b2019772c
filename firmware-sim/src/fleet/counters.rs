//! What a fleet has done so far: written by every device, read at any time.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest latency that is told apart from longer ones.
const LATENCY_US_MAX: u64 = 3_600_000_000;

/// Shared by the devices of a fleet.
#[derive(Debug)]
pub(super) struct Counters {
    pub(super) produced: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) resent: AtomicU64,
    pub(super) acked: AtomicU64,
    pub(super) rejected: AtomicU64,
    pub(super) connected: AtomicU64,
    pub(super) reconnects: AtomicU64,
    latencies_us: Mutex<Histogram<u64>>,
    last_error: Mutex<Option<String>>,
}

/// A fleet's counters at one moment. Each is exact, but they are not of the very same moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FleetCounters {
    /// Events that the devices measured and kept.
    pub produced: u64,
    /// Events that devices dropped because their outbox was full. They have no sequence number,
    /// and stand in no ledger.
    pub refused: u64,
    /// Events published at least once.
    pub sent: u64,
    /// Publishes of an event that had been published before.
    pub resent: u64,
    /// Events acked.
    pub acked: u64,
    /// Events sent and not acked yet.
    pub unacked: u64,
    /// Acks with an error (MQTT 5): the device closes its connection and sends again later.
    pub rejected: u64,
    /// Devices with a connection now.
    pub connected: u64,
    /// Connections made after the first of each device.
    pub reconnects: u64,
    /// Latencies of the acks since the start.
    pub ack_latency: AckLatency,
    /// Why the latest connection failed or was lost.
    pub last_error: Option<String>,
}

/// Quantiles of the time from an event's first publish to its ack, without the
/// time that its device was disconnected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AckLatency {
    /// Median, in microseconds.
    pub p50_us: u64,
    /// 90 % are at most this, in microseconds.
    pub p90_us: u64,
    /// 99 % are at most this, in microseconds.
    pub p99_us: u64,
    /// 99.9 % are at most this, in microseconds.
    pub p999_us: u64,
    /// Longest, in microseconds.
    pub max_us: u64,
}

impl Counters {
    pub(super) fn new() -> Self {
        let latencies = Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("valid bounds");
        Self {
            produced: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            resent: AtomicU64::new(0),
            acked: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            connected: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
            latencies_us: Mutex::new(latencies),
            last_error: Mutex::new(None),
        }
    }

    pub(super) fn acked(&self, latency: Duration) {
        self.acked.fetch_add(1, Relaxed);
        let latency_us = u64::try_from(latency.as_micros()).unwrap_or(LATENCY_US_MAX);
        self.latencies_us
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .saturating_record(latency_us.max(1));
    }

    pub(super) fn failed(&self, reason: String) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }

    pub(super) fn read(&self) -> FleetCounters {
        // Acked before sent, so that the difference cannot be negative.
        let acked = self.acked.load(Relaxed);
        let sent = self.sent.load(Relaxed);
        let ack_latency = {
            let latencies = self.latencies_us.lock().unwrap_or_else(PoisonError::into_inner);
            AckLatency {
                p50_us: latencies.value_at_quantile(0.5),
                p90_us: latencies.value_at_quantile(0.9),
                p99_us: latencies.value_at_quantile(0.99),
                p999_us: latencies.value_at_quantile(0.999),
                max_us: latencies.max(),
            }
        };
        FleetCounters {
            produced: self.produced.load(Relaxed),
            refused: self.refused.load(Relaxed),
            sent,
            resent: self.resent.load(Relaxed),
            acked,
            unacked: sent.saturating_sub(acked),
            rejected: self.rejected.load(Relaxed),
            connected: self.connected.load(Relaxed),
            reconnects: self.reconnects.load(Relaxed),
            ack_latency,
            last_error: self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}
