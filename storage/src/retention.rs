//! Retention: which log files may go. Pure.
//!
//! Invariant: a file goes only from the front, only sealed, and only if every configured sink is
//! past it, or if nobody was ever to have it; dropping more than that is a policy of its own (see
//! [`crate::AtQuota::DropOldest`]) with rows in the loss ledger.

use crate::log::Span;

/// What decides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Whether any sink is configured.
    pub(crate) sinks: bool,
    /// Keep at least this many bytes of what may go; 0 for no such wish.
    pub(crate) retain_bytes: u64,
    /// Keep what may go at least this long in microseconds; 0 for no such wish.
    pub(crate) retain_age_us: u64,
}

impl Rules {
    /// Whether a file that may go is wanted all the same. `newer_bytes` is what the log holds
    /// after it, `age_us` how long ago its last event came.
    ///
    /// A store without sinks and without a wish keeps everything, up to its quota.
    pub(crate) fn keeps(&self, newer_bytes: u64, age_us: impl FnOnce() -> u64) -> bool {
        if self.retain_bytes == 0 && self.retain_age_us == 0 {
            return !self.sinks;
        }
        newer_bytes < self.retain_bytes || (self.retain_age_us > 0 && age_us() < self.retain_age_us)
    }
}

/// How many files of the front may go, up to `files_max`. `floor` is the offset below which no sink needs anything,
/// `age_us` tells how long ago the last event of a file came. The last file is never counted.
pub(crate) fn expendable(
    spans: &[Span],
    floor: u64,
    rules: Rules,
    files_max: usize,
    age_us: impl Fn(&Span) -> u64,
) -> usize {
    let mut newer_bytes: u64 = spans.iter().map(|span| span.size_bytes).sum();
    let sealed = spans.len().saturating_sub(1);
    let mut count = 0;
    for span in &spans[..sealed.min(files_max)] {
        newer_bytes -= span.size_bytes;
        if span.offsets.end > floor || rules.keeps(newer_bytes, || age_us(span)) {
            break;
        }
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    const EAGER: Rules = Rules { sinks: true, retain_bytes: 0, retain_age_us: 0 };

    /// Files of 10 events and 100 bytes; the last event of each came at ten times its number.
    fn spans(files: u64) -> Vec<Span> {
        (0..files).map(|n| Span { offsets: n * 10..(n + 1) * 10, size_bytes: 100 }).collect()
    }

    fn gone(files: u64, floor: u64, rules: Rules, now_us: u64) -> usize {
        expendable(&spans(files), floor, rules, 9, |span| now_us - span.offsets.end)
    }

    #[test]
    fn no_more_go_at_once_than_asked_for() {
        let count = |files_max| expendable(&spans(6), 60, EAGER, files_max, |_| 0);
        assert_eq!([0, 1, 3, 5, 9].map(count), [0, 1, 3, 5, 5]);
    }

    #[test]
    fn only_whole_files_behind_every_cursor_go_and_never_the_last() {
        let counts = [0, 9, 10, 29, 30, 40].map(|floor| gone(4, floor, EAGER, 100));
        assert_eq!(counts, [0, 0, 1, 2, 3, 3]);
        assert_eq!(gone(0, 0, EAGER, 100), 0);
    }

    #[test]
    fn a_file_stays_while_either_wish_is_unmet() {
        let by_bytes = Rules { retain_bytes: 150, ..EAGER };
        assert_eq!(gone(4, 40, by_bytes, 100), 2);
        let by_age = Rules { retain_age_us: 75, ..EAGER };
        assert_eq!(gone(4, 40, by_age, 100), 2);
        assert_eq!(gone(4, 40, Rules { retain_age_us: 85, ..by_bytes }, 100), 1);
    }

    #[test]
    fn a_store_without_sinks_keeps_everything_unless_told_how_long() {
        let local = Rules { sinks: false, ..EAGER };
        assert_eq!(gone(4, 40, local, 100), 0);
        assert_eq!(gone(4, 40, Rules { retain_bytes: 150, ..local }, 100), 2);
    }
}
