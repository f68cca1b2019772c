//! What somebody does to a damaged store, with the gateway stopped.
//!
//! Owns: the loss ledger's rows for what cannot be read. Nothing is removed and no file is written
//! anew: a damaged batch stays where it is, passed over by every read, and everything around it is
//! kept. Once its range stands in the ledger, the sums of the sinks that needed it add up again.
//! Deliberately absent: deciding what is damaged (see `verify`).

use std::ops::Range;

use super::{Loss, LossReason, StateError, Writer};

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
