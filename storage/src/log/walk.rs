//! The log as it lies on the disk, for who checks it rather than reads it: head rows and batches
//! as they are, sound or not.
//!
//! Owns: walking a file in pieces, so that nobody who appends waits for a walk.
//! Deliberately absent: any judgement of what is found.

use std::ops::{ControlFlow, Range};
use std::path::PathBuf;

use super::sealed::{batches, head_row, rows};
use super::{Log, LogError, name};
use crate::head::{BadHead, Head, Position};

/// A walk lets go of its file after this many bytes: while it looks at the one that is appended to,
/// the log cannot start a new one.
const PIECE_BYTES: usize = 1 << 20;

/// What a file says of itself, without a look at its batches.
pub(crate) struct Summary {
    pub(crate) head: Result<Head, BadHead>,
    /// Rows of its table of batches.
    pub(crate) batches: u64,
}

impl Log {
    /// Path of the file that starts at an offset.
    pub(crate) fn path_of(&self, first: u64) -> PathBuf {
        self.disk.path(&name(first))
    }

    /// The head row of the file that starts at `first`, and how much is in it.
    pub(crate) fn summary(&self, first: u64) -> Result<Summary, LogError> {
        self.with_file(first, |source, _| {
            Ok(Summary { head: head_row(source)?, batches: batches(source)? })
        })
    }

    /// Calls `f` with the rows of the file that holds `range.start`, up to about a piece of them.
    /// Returns where to go on, or nothing at the end.
    pub(crate) fn walk(
        &self,
        range: Range<Position>,
        mut f: impl FnMut(Position, &[u8]),
    ) -> Result<Option<Position>, LogError> {
        let (mut size_bytes, mut last, mut from) = (0, None, range.start);
        self.with_file(range.start.offset, |source, _| {
            rows(source, from, range.end, |position, row| {
                if size_bytes > PIECE_BYTES {
                    last = Some(position);
                    return ControlFlow::Break(());
                }
                size_bytes += row.len();
                f(position, row);
                from = position.after(0);
                ControlFlow::Continue(())
            })
        })?;
        Ok(last)
    }
}
