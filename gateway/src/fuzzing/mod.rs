//! What is fuzzed: one function per target, from bytes to a verdict. A panic is a finding.
//!
//! Owns: the bodies of the targets in `fuzz/`, which libFuzzer drives, and the deterministic run over
//! their committed corpus and its mutations, which is part of `cargo test`.
//! Deliberately absent: generators from outside. [`Input`] is all the structure that bytes are given,
//! so that a finding is a file that any later version can read.
//!
//! Compiled for tests and with the feature `fuzzing` only: nothing of it is in the binary.

mod codec;
mod configuration;
mod session;

pub use codec::codec;
pub use configuration::configuration;
pub use session::session;

/// Bytes, taken one after the other as decisions.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// The next byte; `None` at the end.
    fn next(&mut self) -> Option<u8> {
        self.0.split_off_first().copied()
    }

    /// The next byte, 0 at the end.
    fn byte(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    /// A choice among `n`, 1 to 256.
    fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) * n / 256
    }

    /// What is left.
    fn rest(self) -> &'a [u8] {
        self.0
    }
}

#[cfg(test)]
mod tests;
