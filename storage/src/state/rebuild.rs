//! A state database made anew from the log, where the old one is damaged.
//!
//! Owns: what is taken from where. Identity and numbers come from the head row of the first log file;
//! replaying the log from there, which the next open does, brings back every cursor and key that the
//! stored files tell of. Dead letters and the loss ledger, whose rows have checksums of their own, are
//! taken from the damaged file as far as it can be read. A letter that was to be delivered again is one
//! that waits for that to be asked once more.
//! Invariant: nothing without a checksum is taken over. A sink whose cursor is not in the log begins
//! at the first stored event: it may get some again, and misses none.
//!
//! Deliberately absent: the decision to do it. The damaged file is kept beside the new one.

use redb::ReadableTable;

use super::{
    Bytes, DEAD_LETTERS, Head, LOSSES, META, META_HEAD, META_START, NAME, OpenFile, SharedDisk,
    create, losses, table,
};
use crate::dead_letter::DeadLetter;
use crate::loss_ledger::Loss;

/// What the damaged file is called afterwards.
const DAMAGED: &str = "state.damaged";

/// What a new state database has from the old one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rebuilt {
    pub(crate) dead_letters: u64,
    pub(crate) losses: u64,
}

/// Makes the state database of a log whose first file begins with `head`.
pub(crate) fn rebuild(disk: &SharedDisk, head: &Head) -> Result<Rebuilt, redb::Error> {
    let (letters, losses) = readable(disk);
    disk.rename(NAME, DAMAGED).map_err(redb::Error::Io)?;
    create(disk, |transaction| {
        let mut meta = transaction.open_table(META)?;
        meta.insert(META_HEAD, head.encode().as_slice())?;
        let start = head.tail.position.offset.to_le_bytes();
        meta.insert(META_START, start.as_slice())?;
        let mut table = transaction.open_table(DEAD_LETTERS)?;
        for letter in &letters {
            table.insert((letter.sink.as_str(), letter.event.offset), &letter.encode()[..])?;
        }
        losses::put(transaction, &losses)
    })?;
    Ok(Rebuilt { dead_letters: letters.len() as u64, losses: losses.len() as u64 })
}

/// The dead letters and losses of a damaged file, up to the first page that cannot be read.
fn readable(disk: &SharedDisk) -> (Vec<DeadLetter>, Vec<Loss>) {
    let (mut letters, mut losses) = (Vec::new(), Vec::new());
    let Ok(file) = OpenFile::overlaid(&**disk, NAME, super::CACHE_BYTES) else {
        return (letters, losses);
    };
    let end = |error: redb::Error| {
        tracing::warn!(%error, "the rest of a table of the state database cannot be read");
    };
    file.read(|transaction| {
        if let Some(table) = table(transaction.open_table(DEAD_LETTERS))? {
            for row in table.iter()? {
                let (key, value) = row?;
                let (sink, offset) = key.value();
                let row = Bytes::copy_from_slice(value.value());
                letters.extend(DeadLetter::decode(sink, offset, row));
            }
        }
        Ok(())
    })
    .unwrap_or_else(end);
    file.read(|transaction| {
        if let Some(table) = table(transaction.open_table(LOSSES))? {
            for row in table.iter()? {
                let (key, value) = row?;
                losses.extend(Loss::decode(key.value(), value.value()));
            }
        }
        Ok(())
    })
    .unwrap_or_else(end);
    (letters, losses)
}
