//! What somebody does to a damaged store, with the gateway stopped.
//!
//! Owns: the loss ledger's rows for what cannot be read, and a state database made anew where the old
//! one is damaged. No log file is removed or written: a damaged batch stays where it is, passed over by
//! every read, and everything around it is kept. Once its range stands in the ledger, the sums of the
//! sinks that needed it add up again.
//! Deliberately absent: deciding what is damaged (see `verify`), and what of a damaged state can be
//! trusted (see `state`).

use std::ops::Range;
use std::sync::Arc;

use super::open::{database_error, take_lock};
use super::{Store, StoreOptions, Writer};
use crate::disk::{FileDisk, SharedDisk};
use crate::log::{self, first_head};
use crate::state::{self, State};
use crate::{Loss, LossReason, OpenError, StateError};

/// What [`Store::rebuild_state`] brought back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebuiltState {
    /// First stored event: from here on the log says what is so.
    pub first_offset: u64,
    /// Dead letters that the damaged state database still had.
    pub dead_letters: u64,
    /// Rows of its loss ledger.
    pub losses: u64,
}

impl Store {
    /// Makes the state database anew, after [`OpenError::DamagedState`]: from what the log files say,
    /// with the dead letters and losses that can still be read. Cursors and keys that only the damaged
    /// one knew are gone: a sink whose cursor is not in the log begins at the first stored event.
    ///
    /// # Errors
    /// See [`OpenError`]; also if no log file says whose it is.
    pub fn rebuild_state(options: &StoreOptions) -> Result<RebuiltState, OpenError> {
        let folder = |source| OpenError::Folder { path: options.dir.clone(), source };
        let disk = FileDisk::prepare(options.dir.clone(), log::FOLDER).map_err(folder)?;
        let _lock = take_lock(&options.dir)?;
        Self::rebuild_state_on(&(Arc::new(disk) as SharedDisk))
    }

    /// As [`Store::rebuild_state`], on any disk.
    pub(super) fn rebuild_state_on(disk: &SharedDisk) -> Result<RebuiltState, OpenError> {
        let head = first_head(disk).map_err(|error| database_error(error.path, &error.error))?;
        let rebuilt = state::rebuild(disk, &head)
            .map_err(|error| database_error(State::path(disk), &error))?;
        Ok(RebuiltState {
            first_offset: head.tail.position.offset,
            dead_letters: rebuilt.dead_letters,
            losses: rebuilt.losses,
        })
    }
}

impl Writer {
    /// Writes the loss of ranges that cannot be read: a row for every sink that still needed some of
    /// it, and one for the store itself, so that a later walk knows it from new damage.
    ///
    /// # Errors
    /// [`StateError`]; then no row was written.
    pub fn record_unreadable(
        &mut self,
        ranges: &[Range<u64>],
        now_us: u64,
    ) -> Result<Vec<Loss>, StateError> {
        let mut losses = Vec::new();
        {
            let projection = self.shared.progress.projection();
            for range in ranges {
                let loss = |sink: Option<&str>, from: u64| {
                    let lost = from.max(range.start)..range.end;
                    Loss::new(sink.map(str::to_owned), lost, 0, LossReason::Corrupt, now_us)
                };
                losses.push(loss(None, range.start));
                let sinks = projection.cursors.all().iter();
                let needing = sinks.filter(|(_, cursor)| cursor.offset < range.end);
                losses.extend(needing.map(|(sink, cursor)| loss(Some(sink), cursor.offset)));
            }
        }
        self.shared.state.put_losses(&losses)?;
        Ok(losses)
    }
}
