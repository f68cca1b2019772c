//! Dead letters as the store's users see them.
//!
//! Owns: the calls with which forwarders write, deliver again and settle dead letters, and people
//! look at them, requeue and drop them. Each is durable on return.

use std::sync::atomic::Ordering;

use super::Store;
use crate::dead_letter::{DeadLetter, KeptLetter, Picked};
use crate::{Loss, StateError};

/// Rows that one transaction looks at, so that it holds up nobody else for long.
const ROWS_MAX: usize = 1_000;

impl Store {
    /// Writes dead letters. Call it before the cursor passes them. Gives what the bound
    /// ([`StoreOptions::dead_letter_bytes_max`](super::StoreOptions::dead_letter_bytes_max)) has
    /// dropped for it, the oldest of the same sink.
    ///
    /// # Errors
    /// [`StateError`] if they could not be made durable.
    pub fn put_dead_letters(&self, letters: &[DeadLetter]) -> Result<Vec<Loss>, StateError> {
        let bytes_max = self.shared.options.dead_letter_bytes_max;
        let now_us = self.shared.now_us.load(Ordering::Relaxed);
        self.shared.state.change_letters(now_us, |change| {
            let mut losses = Vec::new();
            // Of one sink, as a rule.
            for letters in letters.chunk_by(|one, other| one.sink == other.sink) {
                letters.iter().try_for_each(|letter| change.put(letter))?;
                losses.extend(change.keep_within(&letters[0].sink, bytes_max)?);
            }
            Ok(losses)
        })
    }

    /// Dead letters of a sink from an offset on.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn dead_letters(
        &self,
        sink: &str,
        from: u64,
        max: usize,
    ) -> Result<Vec<KeptLetter>, StateError> {
        Ok(self.corrected(self.shared.state.dead_letters(sink, from, max)?))
    }

    /// The oldest dead letters of a sink that are to be delivered again, at least one if there is
    /// any, else at most `events_max` and about `size_bytes_max` event bytes.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn requeued(
        &self,
        sink: &str,
        events_max: usize,
        size_bytes_max: usize,
    ) -> Result<Vec<KeptLetter>, StateError> {
        Ok(self.corrected(self.shared.state.requeued(sink, events_max, size_bytes_max)?))
    }

    /// The times of what was refused before the clock was set are known by now, too.
    fn corrected(&self, mut letters: Vec<KeptLetter>) -> Vec<KeptLetter> {
        let projection = self.shared.progress.projection();
        for kept in &mut letters {
            projection.boots.correct(&mut kept.letter.event);
        }
        letters
    }

    /// Marks dead letters of a sink to be delivered again: those that are `wanted`, among a thousand
    /// from an offset on. They stay dead letters until [`Store::settle_requeued`].
    ///
    /// # Errors
    /// [`StateError`]; then none was marked.
    pub fn requeue(
        &self,
        sink: &str,
        from: u64,
        wanted: &dyn Fn(&DeadLetter) -> bool,
        now_us: u64,
    ) -> Result<Picked, StateError> {
        self.shared.state.change_letters(now_us, |change| {
            let (offsets, next) = change.find(sink, from, ROWS_MAX, wanted)?;
            let mut events = 0;
            for offset in offsets {
                events += u64::from(change.requeue(sink, offset)?);
            }
            Ok(Picked { events, next })
        })
    }

    /// Drops dead letters of a sink: those that are `wanted`, among a thousand from an offset on. The
    /// loss ledger has them when they go. One that is just being delivered again may still arrive.
    ///
    /// # Errors
    /// [`StateError`]; then none was dropped.
    pub fn drop_dead_letters(
        &self,
        sink: &str,
        from: u64,
        wanted: &dyn Fn(&DeadLetter) -> bool,
        now_us: u64,
    ) -> Result<Picked, StateError> {
        self.shared.state.change_letters(now_us, |change| {
            let (offsets, next) = change.find(sink, from, ROWS_MAX, wanted)?;
            change.drop_letters(sink, &offsets)?;
            Ok(Picked { events: offsets.len() as u64, next })
        })
    }

    /// What became of letters that [`Store::requeued`] gave: those that were delivered are dead
    /// letters no longer; those that were refused again stay, no longer marked, with their attempts
    /// added up.
    ///
    /// # Errors
    /// [`StateError`]; then nothing is settled, and they are delivered once more.
    pub fn settle_requeued(
        &self,
        sink: &str,
        delivered: &[KeptLetter],
        refused: &[DeadLetter],
    ) -> Result<(), StateError> {
        let now_us = self.shared.now_us.load(Ordering::Relaxed);
        self.shared.state.change_letters(now_us, |change| {
            for kept in delivered {
                let offset = kept.letter.event.offset;
                change.delivered(sink, offset, kept.requeued_us.unwrap_or_default())?;
            }
            refused.iter().try_for_each(|letter| change.refused_again(letter))
        })
    }
}
