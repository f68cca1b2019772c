//! edge-gateway: MQTT in, a durable log, store-and-forward out.
//!
//! [`Gateway`] is the wiring: [`Gateway::start`] opens the store, binds every address and connects the parts;
//! [`Gateway::run`] runs them until it is told to stop, and stops them in the order in which data
//! flows, so that nothing that was taken is left behind.
//!
//! # Code map
//! - [`config`]: TOML to validated settings, every problem at once.
//! - [`mqtt`]: the front. Listener, codec seam, connection (shell), session (pure), downlink.
//! - [`access`]: who is let in and what they may do. Users, tokens, rules.
//! - [`ingest`]: from an accepted publish to a durable event. Device key, partition, rings, ack
//!   ledger (pure), committer (the one thread that writes).
//! - `storage` (package): the durable log. `bridge` (package): sinks and delivery.
//!   `packing`: sealed log files packed anew in the background.
//! - [`admin`]: metrics, health, status over HTTP.
//! - [`inspection`]: what a store holds and whether it is whole, for the tools and the admin endpoint.
//! - [`cli`]: one module per verb. [`text`]: numbers for people. [`addresses`]: the ready line.
//!
//! # When something panics
//! Panics unwind. One in a connection or a sink ends that task only, and is logged. One in the
//! committer ends the process with an error: nothing could be acked any more.

pub mod access;
pub mod addresses;
pub mod admin;
pub mod cli;
pub mod config;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod gateway;
pub mod ingest;
pub mod inspection;
pub mod mqtt;
mod packing;
pub mod text;

pub use addresses::Addresses;
pub use gateway::{Gateway, Reload, RunError, StartError};

/// Chooses ring as the one TLS provider of the process. Calling it again changes nothing.
pub fn install_tls_provider() {
    // The error is another provider that was installed before: then that one serves.
    rustls::crypto::ring::default_provider().install_default().ok();
}
