//! Rewriting what takes more room than it needs, with the gateway stopped.
//!
//! What pays: commits of few events leave small batches, each with a head of its own, and pages that
//! redb copied on write and did not give back; sealed files are packed anew, with the same events
//! under the same numbers. The state database is copied without what was removed from it. The file
//! that is appended to stays as it is.
//!
//! Invariant: a file is replaced only by one that ends exactly where the next one begins (offset,
//! sequence numbers, event bytes, receive time) and that takes less room; one that is damaged is left
//! alone. A crash leaves the old file or the new one.

use super::Writer;
use crate::batch::Encoder;
use crate::log::Packing;
use crate::{CommitError, StateError};

/// What [`Writer::compact`] gained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Sealed log files.
    pub files: u32,
    /// Of these, rewritten.
    pub rewritten: u32,
    /// Bytes of log and state before.
    pub before_bytes: u64,
    /// Bytes of log and state after.
    pub after_bytes: u64,
}

impl Writer {
    /// Rewrites sealed log files and the state database where that makes them smaller.
    ///
    /// # Errors
    /// [`CommitError`] if a file could not be written; what was done before stays done.
    pub fn compact(&mut self) -> Result<Compacted, CommitError> {
        let used_bytes = |w: &Self| w.shared.log.used_bytes() + w.shared.state.used_bytes();
        let before_bytes = used_bytes(self);
        // A journal must not be replayed into files that have the names of those it knew.
        self.shared.log.empty_journal().map_err(|error| self.failed(error))?;
        // Control records in sealed files are in the checkpoint from here on.
        self.checkpoint(&[]).map_err(|error| self.state_failed(error))?;
        let mut done = Compacted { before_bytes, ..Compacted::default() };
        let spans = self.shared.log.spans(self.tail.position.offset);
        let mut encoder = Encoder::new(self.shared.options.partitions);
        for pair in spans.windows(2) {
            let [file, next] = pair else { continue };
            done.files += 1;
            let (first, end) = (file.offsets.start, next.offsets.start);
            let compression = self.shared.options.compression;
            let packing = Packing { compression, if_smaller: true, goes_on: &|| true };
            let packed = self.shared.log.pack_anew(first, end, &mut encoder, &packing)?;
            done.rewritten += u32::from(packed);
        }
        let copied: Result<(), StateError> = self.shared.state.copy_anew();
        copied.map_err(|error| self.state_failed(error))?;
        done.after_bytes = used_bytes(self);
        Ok(done)
    }
}
