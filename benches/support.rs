//! What durability costs at least, and what an event is without a format of its own.

use std::io;

use redb::StorageBackend;
use storage::Event;

const SIZE_BYTES: usize = 64 << 20;

/// What durability costs at least: one write and one fdatasync per batch, into blocks that exist.
///
/// The file is written once in full and then overwritten in a circle, because fresh blocks cost the
/// file system's own journal a flush as well. This is the fastest way to be durable on a file
/// system, and it is no log: it can neither be read nor recovered.
pub(crate) struct RawFile {
    file: Box<dyn StorageBackend>,
    at: usize,
    batch: Vec<u8>,
}

impl RawFile {
    /// Writes every block of a new file once.
    pub(crate) fn new(file: Box<dyn StorageBackend>) -> io::Result<Self> {
        file.set_len(SIZE_BYTES as u64)?;
        // Page by page: the system counts a write by the unit in which the page cache holds it.
        let block = [0; 4096];
        for at in (0..SIZE_BYTES).step_by(block.len()) {
            file.write(at as u64, &block)?;
        }
        file.sync_data()?;
        Ok(Self { file, at: 0, batch: Vec::new() })
    }

    /// Writes the events as they are, and syncs. Durable on return. Gives the bytes written.
    pub(crate) fn append(&mut self, events: &[Event]) -> io::Result<usize> {
        self.batch.clear();
        for event in events {
            put_record(event, &mut self.batch);
        }
        if self.at + self.batch.len() > SIZE_BYTES {
            self.at = 0;
        }
        self.file.write(self.at as u64, &self.batch)?;
        self.file.sync_data()?;
        self.at += self.batch.len();
        Ok(self.batch.len())
    }
}

/// An event as plain bytes: what a store without a format of its own keeps of it.
pub(crate) fn put_record(event: &Event, out: &mut Vec<u8>) {
    let parts: [&[u8]; 4] = [
        event.device_key.as_bytes(),
        event.topic.as_bytes(),
        event.attributes.as_bytes(),
        &event.payload,
    ];
    out.extend_from_slice(&event.received_us.to_le_bytes());
    for part in parts {
        out.extend_from_slice(&(part.len() as u32).to_le_bytes());
        out.extend_from_slice(part);
    }
}
