//! Sealed files packed anew in the background, while the gateway runs.
//!
//! Owns: which files are due. One that a crash left behind is written anew, so that it is not repaired
//! in memory again each time somebody opens it. Where compression is configured, one that has to stay is
//! compressed: a sink is behind, or it is kept for replay. What every sink has got goes as it is.
//!
//! Why not before the commit: the committing thread would wait for it, for data that mostly is gone a
//! second later. The price is a second write of what stays, a third to a half of the first.
//!
//! Invariants:
//! - only what the checkpoint has passed: control records in the file are in it already, and no replay
//!   after a crash comes back here;
//! - only what no journal holds any more, which could be replayed into a file of the same name;
//! - a crash leaves the old file or the new one.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::{ReadError, Store};
use crate::batch::Encoder;
use crate::codec::Compression;
use crate::log::Packing;

/// See the module.
pub struct Packer {
    store: Store,
    encoder: Encoder,
    /// First offsets of files with which nothing more is to be done in this life of the process.
    done: BTreeSet<u64>,
}

impl Store {
    /// Packs this store's files. One at a time is enough.
    pub fn packer(&self) -> Packer {
        let encoder = Encoder::new(self.shared.options.partitions);
        Packer { store: self.clone(), encoder, done: BTreeSet::new() }
    }
}

impl Packer {
    /// Packs the next file that is due, unless `goes_on` says no meanwhile; it is asked often. Says
    /// whether a file was packed.
    ///
    /// # Errors
    /// [`ReadError`] if the file cannot be read or the new one not written; it stays as it is.
    pub fn step(&mut self, goes_on: &dyn Fn() -> bool) -> Result<bool, ReadError> {
        let shared = &*self.store.shared;
        let (log, options) = (&shared.log, &shared.options);
        let covered = shared.covered.load(Ordering::Acquire);
        let floor = shared.progress.projection().cursors.floor();
        let kept = options.retain_bytes > 0 || options.retain_age_us > 0;
        let spans = log.spans(shared.progress.mark().watermark);
        let first = spans.first().map_or(0, |span| span.offsets.start);
        self.done.retain(|&done| done >= first);
        for pair in spans.windows(2) {
            let [file, next] = pair else { continue };
            let (first, end) = (file.offsets.start, next.offsets.start);
            // Control records without events may stand at its very end.
            if end >= covered || !goes_on() {
                break;
            }
            let stays = kept || floor.is_none_or(|floor| floor < end);
            if !stays || self.done.contains(&first) || !log.is_settled(first) {
                continue;
            }
            let unclean = log.is_unclean(first);
            let compress = options.compression != Compression::None
                && log.packed_with(first)? != Some(options.compression);
            if !unclean && !compress {
                self.done.insert(first);
                continue;
            }
            let compression = options.compression;
            let packing = Packing { compression, if_smaller: !unclean, goes_on };
            let packed = log.pack_anew(first, end, &mut self.encoder, &packing)?;
            if packed || goes_on() {
                self.done.insert(first);
            }
            if packed {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
