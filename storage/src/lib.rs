//! The durable log of edge-gateway, on redb.
//!
//! Owns: the rolling log files, the state database beside them, the lock on the data folder.
//! Invariant: nothing at or beyond the watermark is readable, and nothing below it is ever lost
//! except by a named policy that first writes the loss ledger.
//! Deliberately absent: MQTT, networks, tokio, metrics, clocks. Time is an argument, outcomes are
//! return values.
//!
//! # Code map
//! - [`event`]: what is stored ([`Event`], [`StoredEvent`]) and what it is called ([`EventId`]);
//!   [`control`]: changes of state that ride beside events; [`clock`]: when an event came, and how
//!   well that is known.
//! - `batch`: the packed, checksummed unit of append; `codec`: how its body is compressed; `head`: what a file takes over from the one
//!   before; `row`: the plain encoding under both. Pure codecs.
//! - `journal`: what lets commits run ahead of their sync, under redb.
//! - `log`: rolling files of batches; `state`: checkpoint, dead letters and loss ledger beside them;
//!   [`disk`]: the files under both, and the seam where tests fail, fill up or cut the power and
//!   benches count and slow down; `ballast`: room kept for a full disk; `frozen`: a disk that is
//!   only looked at.
//! - `cursor`, [`passed`], `retention`: what is still needed and what may go, pure; [`dead_letter`],
//!   [`loss_ledger`]: the record of what was refused and of what went.
//! - [`store`]: [`Store`] (shared handle, reads) and [`Writer`] (the one writer), which put them
//!   together. Beside them, for tools: [`store::inspect`] (a look that changes nothing),
//!   [`store::seek`], [`store::verify`] and [`store::balance`], over sets of offsets (`ranges`);
//!   [`store::compact`] and `repair` change it.

mod ballast;
mod batch;
pub mod clock;
mod codec;
pub mod control;
mod cursor;
pub mod dead_letter;
pub mod disk;
pub mod error;
pub mod event;
mod frozen;
mod head;
mod journal;
mod log;
pub mod loss_ledger;
pub mod passed;
mod ranges;
mod retention;
mod row;
#[cfg(test)]
mod sim;
mod state;
pub mod store;

pub use clock::{Clock, Stamp, TimeQuality};
pub use codec::Compression;
pub use control::Control;
pub use dead_letter::{DeadLetter, DeadLetterStats, KeptLetter, Picked};
pub use error::{CommitError, OpenError, ReadError, StateError};
pub use event::{Attribute, Attributes, Event, EventId, Lane, StoredEvent};
pub use loss_ledger::{Loss, LossReason};
pub use passed::{Ahead, Lanes, Passed, SinkProgress, Spent};
pub use store::balance::{Balance, Balancer, SinkBalance};
pub use store::compact::Compacted;
pub use store::inspect::FileStats;
pub use store::packer::Packer;
pub use store::repair::RebuiltState;
pub use store::seek::Place;
pub use store::verify::{Damage, Finding, Progress, Verification, Verifier};
pub use store::{
    AtQuota, Committed, JournalMode, Mark, Read, RetentionReport, SinkRetention, Store,
    StoreOptions, StoreStats, Writer,
};
