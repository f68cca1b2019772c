//! The state database as the store tools see it.
//!
//! Owns: counting dead letters that are sound, without keeping them, and copying what the file holds
//! to a smaller one.

use std::sync::Arc;

use super::{Bytes, DEAD_LETTERS, Open, State, StateError, closed, rewrite, state_error, table};
use crate::dead_letter::DeadLetter;
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

    /// Copies what the file holds to a new one that takes its name.
    pub(crate) fn copy_anew(&self) -> Result<(), StateError> {
        let mut open = self.lock();
        if matches!(*open, Open::Closed) {
            return Err(closed());
        }
        // Closed first, so that what is copied is what the next open would find.
        *open = Open::Suspect(None);
        let file = rewrite(&self.disk).map_err(|error| state_error(&error))?;
        *open = Open::Yes(Arc::new(file));
        Ok(())
    }
}
