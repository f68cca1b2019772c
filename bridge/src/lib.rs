//! The way out of edge-gateway: sinks and delivery.
//!
//! Owns: one forwarder per sink, each with its own cursor, budgets and failures.
//! Invariant: a cursor is the end of the contiguous prefix that the upstream has acknowledged, or
//! that the dead letters hold; the outage of one sink never touches another.
//! Deliberately absent: MQTT ingest, redb types, metrics (outcomes are in [`SinkStatus`]).
//!
//! # Code map
//! - [`config`]: validated settings of a sink.
//! - `sink`: the trait, and how an upstream's answers are sorted.
//! - `delivery` (pure): what is in flight, acked, to be retried, bisected, dead-lettered.
//! - `streams` (pure): several of them over one sink, and whose turn it is; [`filter`]: what a sink
//!   is to have; [`shaper`]: when it may send, and how much; `reach` (pure): how far all of them are.
//! - `parked` (pure): devices that wait behind a refused event, where a sink is told so.
//! - `requeue` (pure): dead letters on their way to their sink again; [`replay`]: asking a sink to
//!   send stored events again.
//! - [`forwarder`]: the shell around them; `retry`: backoff; `breaker`: what shows of it.
//! - `http`, `kafka`, `mqtt`, `file`: the sinks; `cloudevents`: how an event looks upstream,
//!   with whose name (`origin`); `export`: the same as one text, for tools.
//! - [`Template`]: topics made from events; `secret`: reading what must not reach a log; `tls`:
//!   certificates for what is not HTTP.

mod breaker;
mod cloudevents;
pub mod config;
mod delivery;
mod export;
#[cfg(test)]
mod fake;
mod file;
pub mod filter;
pub mod forwarder;
mod http;
#[cfg(feature = "kafka")]
mod kafka;
mod mqtt;
mod origin;
mod parked;
mod reach;
pub mod replay;
mod requeue;
mod retry;
mod secret;
pub mod shaper;
mod sink;
mod streams;
mod template;
mod tls;

pub use breaker::Circuit;
pub use cloudevents::Framing;
pub use export::{Export, letters as export_letters};
pub use forwarder::{Forwarder, SinkState, SinkStatus};
pub use origin::Origin;
pub use replay::Replays;
pub use streams::{ReplayProgress, StreamStatus};
pub use template::Template;
