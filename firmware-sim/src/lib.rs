//! The device side of edge-gateway: what runs on a sensor, and a fleet of them.
//!
//! The core (`frame`, `sensor`, `outbox`, `device`) is `no_std` and allocates nothing: it compiles
//! for a Cortex-M4F. Everything that needs an operating system is behind the feature `fleet`.
#![cfg_attr(not(any(feature = "fleet", test)), no_std)]

pub mod device;
pub mod frame;
pub mod outbox;
pub mod sensor;

#[cfg(feature = "fleet")]
pub mod audit;
#[cfg(feature = "fleet")]
pub mod collect;
#[cfg(feature = "fleet")]
pub mod fleet;
#[cfg(feature = "fleet")]
pub mod ledger;
#[cfg(feature = "fleet")]
pub mod payload;
