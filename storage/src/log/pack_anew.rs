//! A sealed file written anew: its events packed into full batches, compressed where that is wanted,
//! and closed cleanly where the old one was left by a crash.
//!
//! Owns: the one way in which a file that is there gets another content: a whole new file takes its
//! name. Invariants: the new one holds the same events under the same numbers, which is checked against
//! the head row of the file after it; nothing is left in a journal that would be replayed into it; what
//! is trimmed meanwhile does not come back.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::sealed::Source;
use super::{BATCHES, HEAD, Log, LogError, PACKED, name};
use crate::batch::{Batch, Encoder};
use crate::clock::Clock;
use crate::codec::Compression;
use crate::disk::OpenFile;
use crate::event::Event;
use crate::head::{Head, Position, Tail};

/// What the new file is called until it takes the old one's name.
pub(super) const UNFINISHED: &str = "log/packing";

/// Events that are packed at once; what is left of one such piece begins a batch of its own.
const EVENTS_MAX: usize = 8_192;
const EVENT_BYTES_MAX: usize = 4 << 20;

/// Events whose times are of one clock, as it gave them.
struct Run {
    clock: Option<Clock>,
    events: Vec<Event>,
}

/// How a file is to be packed.
pub(crate) struct Packing<'a> {
    pub(crate) compression: Compression,
    /// Whether the old file stays if the new one takes no less room.
    pub(crate) if_smaller: bool,
    /// Asked between two pieces.
    pub(crate) goes_on: &'a dyn Fn() -> bool,
}

impl Log {
    /// Whether no journal holds anything of a sealed file any more.
    pub(crate) fn is_settled(&self, first: u64) -> bool {
        let journal = self.files().journal.clone();
        journal.is_none_or(|journal| journal.has_let_go(first)) && !self.rings().hold_something()
    }

    /// Whether a file has to be repaired in memory whenever it is opened.
    pub(crate) fn is_unclean(&self, first: u64) -> bool {
        self.unclean().contains(&first)
    }

    /// With what a sealed file was packed, if it was.
    pub(crate) fn packed_with(&self, first: u64) -> Result<Option<Compression>, LogError> {
        let number = self.with_sealed(first, |source| match source {
            Source::Salvage(_) => Ok(None),
            Source::Tree(file) => file.read(|transaction| match transaction.open_table(PACKED) {
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
                table => Ok(table?.get(())?.map(|number| number.value())),
            }),
        });
        Ok(number?.and_then(Compression::of))
    }

    /// How many files were packed anew: what a walk has seen of one may lie otherwise since.
    pub(crate) fn packed(&self) -> u64 {
        *self.packed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the file that starts at `first` anew; the next file starts at `end`. Says whether the
    /// new one took its place: not if anything in the old one is damaged, or nothing is gained.
    pub(crate) fn pack_anew(
        &self,
        first: u64,
        end: u64,
        encoder: &mut Encoder,
        packing: &Packing<'_>,
    ) -> Result<bool, LogError> {
        let mut count = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let heads = (self.summary(first), self.summary(end));
        let (Ok(head), Ok(next)) = heads else {
            return Ok(false);
        };
        let (Ok(head), Ok(next)) = (head.head, next.head) else {
            return Ok(false);
        };
        let packed = self.pack(&head, &next, encoder, packing);
        let smaller = self.disk.used_bytes(UNFINISHED) < self.disk.used_bytes(&name(first));
        // Held over the rename, so that a file that is trimmed does not get its name back.
        let files = self.files();
        let file = files.list.iter().find(|file| file.first == first);
        let (Ok(true), Some(file), true) = (&packed, file, smaller || !packing.if_smaller) else {
            drop(files);
            self.disk.remove(UNFINISHED).map_err(|e| self.error(first, redb::Error::Io(e)))?;
            return packed.map(|_| false);
        };
        self.disk
            .rename(UNFINISHED, &name(first))
            .map_err(|e| self.error(first, redb::Error::Io(e)))?;
        file.size_bytes.store(self.disk.used_bytes(&name(first)), Ordering::Relaxed);
        drop(files);
        self.forget(first);
        self.unclean().remove(&first);
        self.distrusted().remove(&first);
        *count += 1;
        Ok(true)
    }

    /// Writes the events between two head rows to the unfinished file. Says whether all were sound.
    fn pack(
        &self,
        head: &Head,
        next: &Head,
        encoder: &mut Encoder,
        packing: &Packing<'_>,
    ) -> Result<bool, LogError> {
        let first = head.tail.position.offset;
        let mut tail = head.tail.clone();
        let new = OpenFile::create(&*self.disk, UNFINISHED, self.active_cache_bytes)
            .map_err(|error| self.error(first, error))?;
        let mut sound = true;
        let written = new.write(|transaction| {
            transaction.open_table(HEAD)?.insert((), head.encode().as_slice())?;
            transaction.open_table(PACKED)?.insert((), packing.compression.number())?;
            let mut table = transaction.open_table(BATCHES)?;
            let mut flush = |runs: &mut Vec<Run>, tail: &mut Tail| {
                for Run { clock, events } in runs.drain(..) {
                    encoder.set_clock(clock);
                    let mut left = &events[..];
                    while !left.is_empty() {
                        let packed = match packing.compression {
                            Compression::None => encoder.pack(left, &[], tail),
                            compression => encoder.pack_compressed(left, compression, tail),
                        };
                        let row = [packed.head, packed.body].concat();
                        table.insert(packed.position.key(), row.as_slice())?;
                        left = &left[packed.events..];
                    }
                }
                Ok::<_, redb::Error>(())
            };
            let (mut runs, mut count, mut size_bytes) = (Vec::<Run>::new(), 0, 0);
            let mut from = Some(head.tail.position);
            while let Some(position) = from {
                let walked = self.walk(position..next.tail.position, |position, row| {
                    let batch = Batch::decode(Bytes::copy_from_slice(row));
                    let Some(batch) = batch.ok().filter(|b| b.head().position() == position) else {
                        sound = false;
                        return;
                    };
                    let clock = batch.clock();
                    if runs.last().is_none_or(|run| run.clock != clock) {
                        runs.push(Run { clock, events: Vec::new() });
                    }
                    let run = runs.last_mut().expect("there is one now");
                    for event in batch.events(0) {
                        let Ok(stored) = event else {
                            sound = false;
                            return;
                        };
                        count += 1;
                        size_bytes += stored.event.size_bytes();
                        let received_us = stored.received_us();
                        run.events.push(Event { received_us, ..stored.event });
                    }
                });
                match walked {
                    Ok(next) if sound && (packing.goes_on)() => from = next,
                    // What is damaged is for `repair`, not for us.
                    _ => {
                        sound = false;
                        return Ok(());
                    }
                }
                if count >= EVENTS_MAX || size_bytes >= EVENT_BYTES_MAX {
                    flush(&mut runs, &mut tail)?;
                    (count, size_bytes) = (0, 0);
                }
            }
            flush(&mut runs, &mut tail)
        });
        written.map_err(|error| self.error(first, error))?;
        let sound = new.close_reusable().is_some_and(|new| new.is_sound()) && sound;
        // Batches without events are gone, so the end may have had further ones at its offset.
        tail.position = Position { ordinal: next.tail.position.ordinal, ..tail.position };
        Ok(sound && tail == next.tail)
    }
}
