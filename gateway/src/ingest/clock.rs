//! The clocks of this machine, in the unit of the log.
//!
//! Owns: the time of the wall ([`now_us`]), how long the machine is up and in which boot, whether the
//! wall clock was set, and which time an event gets (`Times`, pure).
//! Invariant: an event is stamped by a clock that nobody sets: the uptime, on top of what the time
//! seemed to be when the process began. The committer puts it where the wall clock stands by then. So a
//! clock that is set between the two moves no event against another, and the uptime of every event is
//! exact.
//! Deliberately absent: what is made of it later (see [`storage::clock`]).

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// Before this, 2024, a clock was never set: it stands where the hardware begins to count.
pub const SET_US: u64 = 1_704_067_200_000_000;

/// Less than this is how a clock runs, and not that somebody has set it.
const STEP_US: u64 = 1_000;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Now, in microseconds since the Unix epoch; 0 on a machine whose clock stands before it.
pub fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Seconds from one time to another; none where the clock was not set then, and says that it was long.
pub fn waited_s(since_us: u64, now_us: u64) -> u64 {
    let told = since_us >= SET_US;
    if told { now_us.saturating_sub(since_us) / 1_000_000 } else { 0 }
}

/// How long the machine is up, its sleep included, in microseconds.
fn uptime_us() -> u64 {
    let up = clock_gettime(ClockId::Boottime);
    // Neither is negative.
    up.tv_sec.cast_unsigned() * 1_000_000 + up.tv_nsec.cast_unsigned() / 1_000
}

/// The clocks of this machine, since the process began.
#[derive(Clone, Debug)]
pub struct MachineClock {
    boot: u64,
    /// What the wall clock less the uptime was when the process began.
    base_us: i64,
    synchronised_file: Option<PathBuf>,
}

impl MachineClock {
    /// The wall clock counts as set while this file is there; without one, always. Where its folder is
    /// not there either, nothing on this machine would ever write it, and the clock counts as set, too.
    pub fn new(synchronised_file: Option<PathBuf>) -> Self {
        // Without the kernel's word this process is a boot of its own.
        let boot = std::fs::read_to_string(BOOT_ID).ok().and_then(|text| boot_of(&text));
        let boot = boot.unwrap_or_else(|| fastrand::u64(1..));
        Self { boot, base_us: offset_us(), synchronised_file }
    }

    /// Time for an event that is read now: see the module.
    pub fn received_us(&self) -> u64 {
        uptime_us().saturating_add_signed(self.base_us)
    }

    /// Where the wall clock stands. Asks the file system.
    pub fn read(&self) -> storage::Clock {
        storage::Clock {
            boot: self.boot,
            offset_us: offset_us(),
            synchronised: now_us() >= SET_US && self.is_told(),
        }
    }

    fn is_told(&self) -> bool {
        let Some(file) = &self.synchronised_file else {
            return true;
        };
        file.exists() || file.parent().is_some_and(|folder| !folder.exists())
    }
}

fn offset_us() -> i64 {
    now_us().cast_signed().saturating_sub(uptime_us().cast_signed())
}

/// The first half of the kernel's id of this boot.
fn boot_of(text: &str) -> Option<u64> {
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    let digits = Some(digits).filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(&digits, 16).ok().filter(|&boot| boot != 0)
}

/// Which time an event gets.
#[derive(Clone, Debug)]
pub(super) struct Times {
    base_us: i64,
    told: storage::Clock,
    is_new: bool,
}

impl Times {
    pub(super) fn new(clock: &MachineClock) -> Self {
        let offset_us = clock.base_us;
        Self {
            base_us: offset_us,
            told: storage::Clock { boot: clock.boot, offset_us, synchronised: false },
            is_new: true,
        }
    }

    /// Whether it was never looked at.
    pub(super) fn is_new(&self) -> bool {
        self.is_new
    }

    /// The wall clock was looked at. Gives where it stands, the first time and where it was set since or
    /// one learnt whether it is.
    pub(super) fn look(&mut self, clock: storage::Clock) -> Option<storage::Clock> {
        let is_new = std::mem::take(&mut self.is_new);
        let stepped = self.told.offset_us.abs_diff(clock.offset_us) >= STEP_US;
        if !is_new && !stepped && self.told.synchronised == clock.synchronised {
            return None;
        }
        // Else it goes on where it was: how it runs against the uptime adds up to a step some day.
        let offset_us = if stepped { clock.offset_us } else { self.told.offset_us };
        self.told = storage::Clock { offset_us, ..clock };
        Some(self.told)
    }

    /// The time of the wall clock at a time that [`MachineClock::received_us`] gave.
    pub(super) fn wall_us(&self, received_us: u64) -> u64 {
        received_us.saturating_add_signed(self.told.offset_us.saturating_sub(self.base_us))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_is_half_of_what_the_kernel_says() {
        assert_eq!(boot_of("0123abcd-4567-89ef-0000-000000000000\n"), Some(0x0123_abcd_4567_89ef));
        for none in ["", "00000000-0000-0000-1111-111111111111", "no id"] {
            assert_eq!(boot_of(none), None, "{none}");
        }
    }

    #[test]
    fn nothing_waits_for_decades_because_the_clock_is_set() {
        assert_eq!(waited_s(SET_US, SET_US + 2_500_000), 2);
        assert_eq!(waited_s(SET_US + 2_500_000, SET_US), 0);
        assert_eq!(waited_s(60_000_000, SET_US), 0);
    }

    #[test]
    fn time_goes_on_and_the_uptime_with_it() {
        let clock = MachineClock::new(None);
        let (before, read) = (clock.received_us(), clock.read());
        assert!(read.synchronised && read.boot != 0);
        assert!(clock.received_us() >= before);
        let apart = before.abs_diff(now_us());
        assert!(apart < 60_000_000, "{apart} µs from the wall clock");
    }

    #[test]
    fn a_file_says_whether_the_clock_was_set() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("synchronized");
        let is_set = |file: PathBuf| MachineClock::new(Some(file)).read().synchronised;
        assert!(!is_set(file.clone()));
        std::fs::write(&file, b"").unwrap();
        assert!(is_set(file));
        assert!(is_set(dir.path().join("no service/synchronized")), "nobody would ever tell");
    }

    #[test]
    fn events_follow_the_clock_when_it_is_set_and_not_when_it_drifts() {
        let machine = MachineClock { boot: 1, base_us: 100, synchronised_file: None };
        let mut times = Times::new(&machine);
        let clock = |offset_us, synchronised| storage::Clock { boot: 1, offset_us, synchronised };
        assert_eq!(times.look(clock(600, false)), Some(clock(100, false)), "the first word");
        assert_eq!(times.look(clock(700, false)), None);
        assert_eq!(times.wall_us(150), 150);
        assert_eq!(
            times.look(clock(600, true)),
            Some(clock(100, true)),
            "one learnt that it is set"
        );
        assert_eq!(times.look(clock(5_000_100, true)), Some(clock(5_000_100, true)));
        assert_eq!(times.wall_us(150), 5_000_150);
        assert_eq!(times.look(clock(-50, true)), Some(clock(-50, true)), "and it is set back");
        assert_eq!((times.wall_us(150), times.wall_us(7)), (0, 0));
    }
}
