//! The loss ledger's table.
//!
//! Owns: writing rows so that one that is written twice is one, and merging rows when there are too
//! many (see `loss_ledger`), in the transaction that wrote the last of them.

use redb::{ReadableTable, ReadableTableMetadata, Table, WriteTransaction};

use super::{LOSSES, META, META_START, State, StateError, table};
use crate::loss_ledger::{self, Loss, LossKey};

impl State {
    pub(crate) fn put_losses(&self, losses: &[Loss]) -> Result<(), StateError> {
        self.write(|transaction| put(transaction, losses))
    }

    /// Rows of the loss ledger, oldest first.
    pub(crate) fn losses(&self) -> Result<Vec<Loss>, StateError> {
        let mut losses = Vec::new();
        self.read(|transaction| {
            if let Some(table) = table(transaction.open_table(LOSSES))? {
                losses = read(&table)?;
            }
            Ok(())
        })?;
        losses.sort_by_key(|loss| loss.at_us);
        Ok(losses)
    }

    pub(crate) fn count_losses(&self) -> Result<u64, StateError> {
        self.read(|transaction| {
            table(transaction.open_table(LOSSES))?.map_or(Ok(0), |table| Ok(table.len()?))
        })
    }
}

/// Writes rows. One that was written before keeps its time, and what it says more.
pub(super) fn put(transaction: &WriteTransaction, losses: &[Loss]) -> Result<(), redb::Error> {
    if losses.is_empty() {
        return Ok(());
    }
    let mut table = transaction.open_table(LOSSES)?;
    for loss in losses {
        let stored = table.get(loss.key())?;
        let stored = stored.and_then(|row| Loss::decode(loss.key(), row.value()).ok());
        if stored.is_none_or(|stored| !stored.covers(loss)) {
            table.insert(loss.key(), loss.encode().as_slice())?;
        }
    }
    if table.len()? > loss_ledger::ROWS_MAX as u64 {
        let meta = transaction.open_table(META)?;
        let start = meta.get(META_START)?.and_then(|row| row.value().try_into().ok());
        merge(&mut table, start.map_or(0, u64::from_le_bytes))?;
    }
    Ok(())
}

/// Puts merged rows in the place of those that are there.
fn merge(
    table: &mut Table<'_, LossKey<'static>, &'static [u8]>,
    start: u64,
) -> Result<(), redb::Error> {
    let merged = loss_ledger::merge(read(table)?, start);
    // Damaged rows, which nobody can read, go with the others.
    table.retain(|_, _| false)?;
    for loss in merged {
        table.insert(loss.key(), loss.encode().as_slice())?;
    }
    Ok(())
}

fn read(
    table: &impl ReadableTable<LossKey<'static>, &'static [u8]>,
) -> Result<Vec<Loss>, redb::Error> {
    let mut losses = Vec::new();
    for row in table.iter()? {
        let (key, value) = row?;
        let Ok(loss) = Loss::decode(key.value(), value.value()) else {
            tracing::error!("a row of the loss ledger is damaged: left out");
            continue;
        };
        losses.push(loss);
    }
    Ok(losses)
}
