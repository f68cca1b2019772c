//! The dead letters' tables: the letters, and which of them are to be delivered again.
//!
//! Owns: what the letters of a sink come to ([`Counts`]), their bound, and each change of them: put,
//! marked, settled, dropped, every one in a transaction of its own with what it writes into the loss
//! ledger.
//! Invariant: a letter leaves its table for one of three reasons only: it was delivered, it stands in
//! the loss ledger, or it is replaced by what the same sink said of the same event later.
//! Deliberately absent: delivering them (`bridge`).

use std::collections::BTreeMap;
use std::sync::PoisonError;

use bytes::Bytes;
use redb::{AccessGuard, ReadableTable, Table, WriteTransaction};

use super::{DEAD_LETTERS, REQUEUED, State, StateError, losses, table};
use crate::dead_letter::{DeadLetter, DeadLetterStats, KeptLetter};
use crate::loss_ledger::{Loss, LossReason};

/// What the dead letters of each sink come to.
pub(crate) type Counts = BTreeMap<String, DeadLetterStats>;

/// The tables, open to be changed.
pub(crate) struct Change<'t> {
    letters: Table<'t, (&'static str, u64), &'static [u8]>,
    requeued: Table<'t, (&'static str, u64), u64>,
    transaction: &'t WriteTransaction,
    counts: Counts,
    now_us: u64,
}

impl State {
    /// Changes dead letters in one transaction.
    pub(crate) fn change_letters<T>(
        &self,
        now_us: u64,
        change: impl FnOnce(&mut Change<'_>) -> Result<T, redb::Error>,
    ) -> Result<T, StateError> {
        let mut counts = self.dead_letters.lock().unwrap_or_else(PoisonError::into_inner);
        // Counted anew if this fails: it may or may not be on the disk.
        let counted = match counts.take() {
            Some(counted) => counted,
            None => self.count_letters()?,
        };
        let (done, counted) = self.write(|transaction| {
            let mut open = Change {
                letters: transaction.open_table(DEAD_LETTERS)?,
                requeued: transaction.open_table(REQUEUED)?,
                transaction,
                counts: counted,
                now_us,
            };
            let done = change(&mut open)?;
            Ok((done, open.counts))
        })?;
        *counts = Some(counted);
        Ok(done)
    }

    /// Dead letters of a sink from an offset on.
    pub(crate) fn dead_letters(
        &self,
        sink: &str,
        from: u64,
        max: usize,
    ) -> Result<Vec<KeptLetter>, StateError> {
        let mut found = Vec::new();
        self.read(|transaction| {
            let Some(letters) = table(transaction.open_table(DEAD_LETTERS))? else {
                return Ok(());
            };
            let requeued = table(transaction.open_table(REQUEUED))?;
            for row in letters.range((sink, from)..=(sink, u64::MAX))? {
                if found.len() == max {
                    break;
                }
                let (key, value) = row?;
                let offset = key.value().1;
                let Some(letter) = decode(sink, offset, &value) else { continue };
                let mark = requeued.as_ref().map(|table| table.get((sink, offset))).transpose()?;
                let requeued_us = mark.flatten().map(|mark| mark.value());
                found.push(KeptLetter { letter, requeued_us });
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The oldest dead letters of a sink that are to be delivered again, at least one if there is any.
    pub(crate) fn requeued(
        &self,
        sink: &str,
        events_max: usize,
        size_bytes_max: usize,
    ) -> Result<Vec<KeptLetter>, StateError> {
        let (mut found, mut size_bytes) = (Vec::new(), 0);
        self.read(|transaction| {
            let (Some(letters), Some(requeued)) = (
                table(transaction.open_table(DEAD_LETTERS))?,
                table(transaction.open_table(REQUEUED))?,
            ) else {
                return Ok(());
            };
            for row in requeued.range((sink, 0)..=(sink, u64::MAX))? {
                let (key, mark) = row?;
                let offset = key.value().1;
                let Some(value) = letters.get((sink, offset))? else { continue };
                let Some(letter) = decode(sink, offset, &value) else { continue };
                size_bytes += letter.event.event.size_bytes();
                if !found.is_empty() && (found.len() >= events_max || size_bytes > size_bytes_max) {
                    break;
                }
                found.push(KeptLetter { letter, requeued_us: Some(mark.value()) });
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// What the dead letters of each sink come to. Only the first call reads them all.
    pub(crate) fn count_dead_letters(&self) -> Result<Vec<(String, DeadLetterStats)>, StateError> {
        let mut counts = self.dead_letters.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.is_none() {
            *counts = Some(self.count_letters()?);
        }
        let counts = counts.iter().flatten().filter(|(_, stats)| stats.events > 0);
        Ok(counts.map(|(sink, &stats)| (sink.clone(), stats)).collect())
    }

    fn count_letters(&self) -> Result<Counts, StateError> {
        let mut counts = Counts::new();
        self.read(|transaction| {
            if let Some(letters) = table(transaction.open_table(DEAD_LETTERS))? {
                for row in letters.iter()? {
                    let (key, value) = row?;
                    let stats = counts.entry(key.value().0.to_owned()).or_default();
                    stats.events += 1;
                    stats.size_bytes += value.value().len() as u64;
                }
            }
            if let Some(requeued) = table(transaction.open_table(REQUEUED))? {
                for row in requeued.iter()? {
                    counts.entry(row?.0.value().0.to_owned()).or_default().requeued += 1;
                }
            }
            Ok(())
        })?;
        Ok(counts)
    }
}

impl Change<'_> {
    /// Writes a letter, in the place of one of the same event.
    pub(crate) fn put(&mut self, letter: &DeadLetter) -> Result<(), redb::Error> {
        let row = letter.encode();
        let before = self.letters.insert((letter.sink.as_str(), letter.event.offset), &row[..])?;
        let stats = self.counts.entry(letter.sink.clone()).or_default();
        match before {
            Some(before) => stats.size_bytes -= before.value().len() as u64,
            None => stats.events += 1,
        }
        stats.size_bytes += row.len() as u64;
        Ok(())
    }

    /// Drops the oldest letters of a sink until the rest is within the bound; gives the rows that
    /// this made in the loss ledger.
    pub(crate) fn keep_within(
        &mut self,
        sink: &str,
        bytes_max: u64,
    ) -> Result<Vec<Loss>, redb::Error> {
        let mut gone = Vec::new();
        while self.counts.get(sink).is_some_and(|stats| stats.size_bytes > bytes_max) {
            let oldest = {
                let mut range = self.letters.range((sink, 0)..=(sink, u64::MAX))?;
                range.next().transpose()?.map(|(key, _)| key.value().1)
            };
            let Some(offset) = oldest else { break };
            gone.push((offset, self.remove(sink, offset)?));
        }
        self.lose(sink, &gone, LossReason::DeadLetterLimit)
    }

    /// Marks a letter to be delivered again; whether it is one, and was not marked.
    pub(crate) fn requeue(&mut self, sink: &str, offset: u64) -> Result<bool, redb::Error> {
        if self.letters.get((sink, offset))?.is_none()
            || self.requeued.get((sink, offset))?.is_some()
        {
            return Ok(false);
        }
        self.requeued.insert((sink, offset), self.now_us)?;
        self.counts.entry(sink.to_owned()).or_default().requeued += 1;
        Ok(true)
    }

    /// A letter that was marked at `requeued_us` has been delivered: it is one no longer.
    pub(crate) fn delivered(
        &mut self,
        sink: &str,
        offset: u64,
        requeued_us: u64,
    ) -> Result<(), redb::Error> {
        let marked = self.requeued.get((sink, offset))?.map(|mark| mark.value());
        // Marked again meanwhile, or not at all: then this is not the letter that was delivered.
        if marked == Some(requeued_us) {
            self.remove(sink, offset)?;
        }
        Ok(())
    }

    /// A letter that was to be delivered again was refused again: its attempts add up.
    pub(crate) fn refused_again(&mut self, again: &DeadLetter) -> Result<(), redb::Error> {
        let (sink, offset) = (again.sink.as_str(), again.event.offset);
        let stored = {
            let row = self.letters.get((sink, offset))?;
            row.and_then(|row| decode(sink, offset, &row))
        };
        // Dropped meanwhile: it stands in the loss ledger.
        let Some(stored) = stored else { return Ok(()) };
        self.put(&DeadLetter {
            reason: again.reason.clone(),
            attempts: stored.attempts.saturating_add(again.attempts),
            last_us: again.last_us,
            ..stored
        })?;
        self.unmark(sink, offset)
    }

    /// Letters of a sink from an offset on that are wanted, with the next offset to look at, if there
    /// may be more: it looks at `max` rows at most.
    pub(crate) fn find(
        &self,
        sink: &str,
        from: u64,
        max: usize,
        wanted: &dyn Fn(&DeadLetter) -> bool,
    ) -> Result<(Vec<u64>, Option<u64>), redb::Error> {
        let (mut found, mut last) = (Vec::new(), None);
        let mut rows = self.letters.range((sink, from)..=(sink, u64::MAX))?;
        for row in rows.by_ref().take(max) {
            let (key, value) = row?;
            let offset = key.value().1;
            last = Some(offset);
            if decode(sink, offset, &value).is_some_and(|letter| wanted(&letter)) {
                found.push(offset);
            }
        }
        let more = rows.next().transpose()?.is_some();
        Ok((found, last.filter(|_| more).map(|last| last + 1)))
    }

    /// Drops letters, after the loss ledger has them; gives its rows.
    pub(crate) fn drop_letters(
        &mut self,
        sink: &str,
        offsets: &[u64],
    ) -> Result<Vec<Loss>, redb::Error> {
        let mut gone = Vec::with_capacity(offsets.len());
        for &offset in offsets {
            gone.push((offset, self.remove(sink, offset)?));
        }
        self.lose(sink, &gone, LossReason::DroppedByHand)
    }

    /// Takes a letter out; its event bytes, 0 where they cannot be told.
    fn remove(&mut self, sink: &str, offset: u64) -> Result<u64, redb::Error> {
        let (row_bytes, event_bytes) = {
            let Some(row) = self.letters.remove((sink, offset))? else { return Ok(0) };
            let letter = decode(sink, offset, &row);
            let event_bytes = letter.map_or(0, |letter| letter.event.event.size_bytes() as u64);
            (row.value().len() as u64, event_bytes)
        };
        let stats = self.counts.entry(sink.to_owned()).or_default();
        stats.events -= 1;
        stats.size_bytes -= row_bytes;
        self.unmark(sink, offset)?;
        Ok(event_bytes)
    }

    fn unmark(&mut self, sink: &str, offset: u64) -> Result<(), redb::Error> {
        if self.requeued.remove((sink, offset))?.is_some() {
            self.counts.entry(sink.to_owned()).or_default().requeued -= 1;
        }
        Ok(())
    }

    /// Writes what is gone into the loss ledger, neighbours as one row.
    fn lose(
        &self,
        sink: &str,
        gone: &[(u64, u64)],
        reason: LossReason,
    ) -> Result<Vec<Loss>, redb::Error> {
        let mut losses: Vec<Loss> = Vec::new();
        for &(offset, size_bytes) in gone {
            let offsets = match losses.pop() {
                Some(last) if last.offsets.end == offset => {
                    let size_bytes = last.size_bytes + size_bytes;
                    let offsets = last.offsets.start..offset + 1;
                    losses.push(Loss::new(last.sink, offsets, size_bytes, reason, self.now_us));
                    continue;
                }
                last => {
                    losses.extend(last);
                    offset..offset + 1
                }
            };
            losses.push(Loss::new(Some(sink.into()), offsets, size_bytes, reason, self.now_us));
        }
        losses::put(self.transaction, &losses)?;
        Ok(losses)
    }
}

fn decode(sink: &str, offset: u64, row: &AccessGuard<'_, &'static [u8]>) -> Option<DeadLetter> {
    let letter = DeadLetter::decode(sink, offset, Bytes::copy_from_slice(row.value()));
    if letter.is_err() {
        tracing::error!(sink, offset, "a dead letter is damaged: left out");
    }
    letter.ok()
}
