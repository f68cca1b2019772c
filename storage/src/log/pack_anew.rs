//! A sealed file written anew, its events packed into full batches.
//!
//! Owns: the one way in which a file that is there gets another content: a whole new file takes its
//! name. Invariant: the new one holds the same events under the same numbers, which is checked
//! against the head row of the file after it.

use super::{
    BATCHES, Batch, Bytes, Encoder, Event, HEAD, Head, Log, LogError, OpenFile, Ordering, Position,
    Tail, UNFINISHED, name,
};

/// Events that are packed at once; what is left of one such piece begins a batch of its own.
const EVENTS_MAX: usize = 8_192;
const EVENT_BYTES_MAX: usize = 4 << 20;

impl Log {
    /// Writes the file that starts at `first` anew; the next file starts at `end`. Says whether the
    /// new one took its place: not if anything in the old one is damaged, or nothing is gained.
    pub(crate) fn pack_anew(
        &self,
        first: u64,
        end: u64,
        encoder: &mut Encoder,
    ) -> Result<bool, LogError> {
        let heads = (self.summary(first), self.summary(end));
        let (Ok(head), Ok(next)) = heads else {
            return Ok(false);
        };
        let (Ok(head), Ok(next)) = (head.head, next.head) else {
            return Ok(false);
        };
        let packed = self.pack(&head, &next, encoder);
        let smaller = self.disk.used_bytes(UNFINISHED) < self.disk.used_bytes(&name(first));
        if !matches!(packed, Ok(true)) || !smaller {
            self.disk.remove(UNFINISHED).map_err(|e| self.error(first, redb::Error::Io(e)))?;
            return packed.map(|_| false);
        }
        self.disk
            .rename(UNFINISHED, &name(first))
            .map_err(|e| self.error(first, redb::Error::Io(e)))?;
        self.forget(first);
        if let Some(file) = self.files().list.iter().find(|file| file.first == first) {
            file.size_bytes.store(self.disk.used_bytes(&name(first)), Ordering::Relaxed);
        }
        Ok(true)
    }

    /// Writes the events between two head rows to the unfinished file. Says whether all were sound.
    fn pack(&self, head: &Head, next: &Head, encoder: &mut Encoder) -> Result<bool, LogError> {
        let first = head.tail.position.offset;
        let mut tail = head.tail.clone();
        let new = OpenFile::create(&*self.disk, UNFINISHED, self.active_cache_bytes)
            .map_err(|error| self.error(first, error))?;
        let mut sound = true;
        let written = new.write(|transaction| {
            transaction.open_table(HEAD)?.insert((), head.encode().as_slice())?;
            let mut table = transaction.open_table(BATCHES)?;
            let mut flush = |events: &mut Vec<Event>, tail: &mut Tail| {
                let mut left = &events[..];
                while !left.is_empty() {
                    let packed = encoder.pack(left, &[], tail);
                    let row = [packed.head, packed.body].concat();
                    table.insert(packed.position.key(), row.as_slice())?;
                    left = &left[packed.events..];
                }
                events.clear();
                Ok::<_, redb::Error>(())
            };
            let (mut events, mut size_bytes) = (Vec::new(), 0);
            let mut from = Some(head.tail.position);
            while let Some(position) = from {
                let walked = self.walk(position..next.tail.position, |position, row| {
                    let batch = Batch::decode(Bytes::copy_from_slice(row));
                    let Some(batch) = batch.ok().filter(|b| b.head().position() == position) else {
                        sound = false;
                        return;
                    };
                    for event in batch.events(0) {
                        let Ok(event) = event else {
                            sound = false;
                            return;
                        };
                        size_bytes += event.event.size_bytes();
                        events.push(event.event);
                    }
                });
                match walked {
                    Ok(next) if sound => from = next,
                    // What is damaged is for `repair`, not for us.
                    _ => {
                        sound = false;
                        return Ok(());
                    }
                }
                if events.len() >= EVENTS_MAX || size_bytes >= EVENT_BYTES_MAX {
                    flush(&mut events, &mut tail)?;
                    size_bytes = 0;
                }
            }
            flush(&mut events, &mut tail)
        });
        written.map_err(|error| self.error(first, error))?;
        // Batches without events are gone, so the end may have had further ones at its offset.
        tail.position = Position { ordinal: next.tail.position.ordinal, ..tail.position };
        Ok(sound && tail == next.tail)
    }
}
