//! The state database as who checks it sees it.
//!
//! Owns: counting dead letters that are sound, without keeping them.

use super::{Bytes, DEAD_LETTERS, DeadLetter, State, StateError, table};
use crate::ranges::Ranges;

/// The dead letters of a sink.
#[derive(Default)]
pub(crate) struct Letters {
    /// Offsets of the events that are there, whole.
    pub(crate) sound: Ranges,
    /// Rows that fail their checksum.
    pub(crate) damaged: u64,
}

impl State {
    /// Looks through all dead letters of a sink.
    pub(crate) fn check_dead_letters(&self, sink: &str) -> Result<Letters, StateError> {
        let mut letters = Letters::default();
        self.read(|transaction| {
            let Some(table) = table(transaction.open_table(DEAD_LETTERS))? else {
                return Ok(());
            };
            for row in table.range((sink, 0)..=(sink, u64::MAX))? {
                let (key, value) = row?;
                let offset = key.value().1;
                let row = Bytes::copy_from_slice(value.value());
                match DeadLetter::decode(sink, offset, row) {
                    Ok(_) => letters.sound.insert(offset..offset + 1),
                    Err(_) => letters.damaged += 1,
                }
            }
            Ok(())
        })?;
        Ok(letters)
    }
}
