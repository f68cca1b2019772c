//! The balance at the end of the demo: what was sent, acked, stored and delivered.

use std::fmt;

use firmware_sim::audit::AuditReport;
use firmware_sim::fleet::FleetReport;
use serde::Serialize;

use super::DemoArgs;
use crate::admin::status::Status;
use crate::text::{count, table};

/// What `--json` prints. Scripts hold on to these names.
#[derive(Debug, Serialize)]
pub(super) struct Balance {
    devices: u32,
    seconds: u64,
    seed: u64,
    /// Events that devices published at least once.
    sent: u64,
    /// Events whose ack reached the device.
    acked: u64,
    /// Events in the gateway's log: a resend after a lost ack is stored again.
    stored: u64,
    /// Sent events that arrived upstream, each counted once.
    delivered: u64,
    /// Further arrivals of the same event.
    duplicates: u64,
    /// Acked, and never arrived.
    lost: u64,
    /// First arrivals after a later event of the same device.
    out_of_order: u64,
    /// SIGKILLs of the gateway.
    kills: u32,
    /// Outages of the upstream.
    outages: u32,
    /// Publish to ack as the devices see it, without the time that they were disconnected.
    ack_p50_ms: f64,
    /// As above, 99 %.
    ack_p99_ms: f64,
    /// Acked events per second while the fleet published.
    events_per_second: f64,
    /// Rows in the gateway's loss ledger.
    losses: u64,
}

impl Balance {
    pub(super) fn new(
        args: &DemoArgs,
        fleet: &FleetReport,
        status: &Status,
        audit: &AuditReport,
    ) -> Self {
        let latency = &fleet.counters.ack_latency;
        Self {
            devices: args.devices,
            seconds: args.seconds,
            seed: args.seed,
            sent: audit.sent,
            acked: audit.acked,
            stored: status.store.watermark,
            delivered: audit.delivered,
            duplicates: audit.duplicates,
            lost: audit.lost,
            out_of_order: audit.out_of_order,
            kills: 1,
            outages: 1,
            ack_p50_ms: latency.p50_us as f64 / 1_000.0,
            ack_p99_ms: latency.p99_us as f64 / 1_000.0,
            events_per_second: (audit.acked as f64 / args.seconds as f64).round(),
            losses: status.store.losses,
        }
    }

    /// Nothing acked was lost or reordered, and the gateway itself lost nothing by policy.
    pub(super) fn is_clean(&self) -> bool {
        self.lost == 0 && self.out_of_order == 0 && self.losses == 0
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |name: &str, n: u64, note: &str| vec![name.to_owned(), count(n), note.to_owned()];
        let rows = [
            row("sent", self.sent, "events published by the devices"),
            row("acked", self.acked, "each only when it was on disk"),
            row("stored", self.stored, "in the gateway's log, resends after a lost ack included"),
            row("delivered", self.delivered, "different events that arrived upstream"),
            row("duplicates", self.duplicates, "sent again after a lost ack or answer"),
            row("lost", self.lost, "acked and never arrived"),
            row("out of order", self.out_of_order, "judged per device, on first arrivals"),
        ];
        let verdict = if self.is_clean() {
            "Balanced: nothing acked was lost or reordered"
        } else {
            "NOT BALANCED: something acked was lost or reordered"
        };
        write!(
            f,
            "\n{}\n{verdict}, through {} outage and {} kill -9.\n\
             {}/s acked, publish to ack {:.1} ms median, {:.1} ms p99.",
            table(&rows),
            self.outages,
            self.kills,
            count(self.events_per_second as u64),
            self.ack_p50_ms,
            self.ack_p99_ms,
        )
    }
}
