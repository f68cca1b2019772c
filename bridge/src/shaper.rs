//! When a sink may send, and how much: a byte rate, windows of the day, a budget for the month. Pure.
//!
//! Owns: [`Shaping`] (the settings), and the `Shaper` that keeps count.
//!
//! - *rate*: a token bucket of one second's worth. A request goes while there is anything in it, and
//!   what it takes beyond that is waited for after it, so that no request is too large to go.
//! - *windows*: outside of them nothing goes but alarms.
//! - *budget*: event bytes of every request that was begun in this month, repeated ones too. What has
//!   been sent when it is used up may pass it by what was in flight. Then nothing goes, or alarms
//!   only, until the month ends.
//!
//! Days, months and windows are UTC: a gateway's time zone is nobody's promise. What counts are event
//! bytes, as in every other limit; what is around them on the wire is more.
//! Deliberately absent: making the count durable, which rides with the cursor.

use std::time::{Duration, Instant};

use storage::Spent;

use crate::cloudevents::civil_from_days;
use crate::delivery::Moment;

/// The wall clock may be set: nothing sleeps for longer than this without looking at it.
const LOOK_AFTER_MAX: Duration = Duration::from_mins(1);
const DAY_SECONDS: u64 = 86_400;

/// When a sink may send, and how much.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shaping {
    /// Event bytes a second, on average; 0 for no limit.
    pub rate_bytes_per_second: u64,
    /// When it may send; none for always.
    pub windows: Vec<DayWindow>,
    /// Event bytes in a month; 0 for no limit.
    pub budget_bytes_month: u64,
    /// What happens once they are used up.
    pub at_budget: AtBudget,
}

/// What happens once a budget is used up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtBudget {
    /// Nothing is sent until the month ends.
    #[default]
    Hold,
    /// Nothing but alarms.
    AlarmsOnly,
}

/// A window of the day, UTC; one that ends before it begins goes over midnight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DayWindow {
    /// First minute of the day.
    from: u64,
    /// First minute that is not in it.
    to: u64,
}

/// A text is no window of the day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be from and to, as in \"22:00-06:00\" (UTC), and not the same")]
pub struct DayWindowError;

impl DayWindow {
    /// Reads `HH:MM-HH:MM`.
    ///
    /// # Errors
    /// [`DayWindowError`].
    pub fn parse(text: &str) -> Result<Self, DayWindowError> {
        let minute = |text: &str| {
            let (hour, minute) = text.split_once(':')?;
            let number = |text: &str, max: u64| {
                let digits = text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
                text.parse().ok().filter(|&n: &u64| digits && n <= max)
            };
            Some(number(hour, 23)? * 60 + number(minute, 59)?)
        };
        let (from, to) = text.split_once('-').ok_or(DayWindowError)?;
        match (minute(from), minute(to)) {
            (Some(from), Some(to)) if from != to => Ok(Self { from, to }),
            _ => Err(DayWindowError),
        }
    }

    /// Seconds until it is open; 0 while it is.
    fn opens_in(self, second_of_day: u64) -> u64 {
        let (from, to) = (self.from * 60, self.to * 60);
        let open = if from < to {
            (from..to).contains(&second_of_day)
        } else {
            !(to..from).contains(&second_of_day)
        };
        if open { 0 } else { (from + DAY_SECONDS - second_of_day) % DAY_SECONDS }
    }
}

/// What may go now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    Open,
    AlarmsOnly(Closed),
    Shut(Closed),
}

impl Gate {
    /// Whether an event may go.
    pub(crate) fn lets(self, alarm: bool) -> bool {
        match self {
            Self::Open => true,
            Self::AlarmsOnly(_) => alarm,
            Self::Shut(_) => false,
        }
    }

    /// Why it is not open, if it is not.
    pub(crate) fn closed(self) -> Option<Closed> {
        match self {
            Self::Open => None,
            Self::AlarmsOnly(closed) | Self::Shut(closed) => Some(closed),
        }
    }
}

/// Why a gate is not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed {
    /// When to look again.
    pub(crate) until: Instant,
    /// Told to people; nothing for a pause that only makes the rate.
    pub(crate) reason: Option<&'static str>,
}

/// Keeps count of what a sink sends.
#[derive(Debug)]
pub(crate) struct Shaper {
    shaping: Shaping,
    /// What may be sent at once, as of `filled_at`; less than nothing after a large request.
    tokens: f64,
    filled_at: Option<Instant>,
    spent: Spent,
}

impl Shaper {
    /// Goes on with what was spent before.
    pub(crate) fn new(shaping: Shaping, spent: Spent) -> Self {
        Self { tokens: shaping.rate_bytes_per_second as f64, shaping, filled_at: None, spent }
    }

    /// What was spent of the budget, if there is one.
    pub(crate) fn spent(&self) -> Spent {
        self.spent
    }

    /// What may go now.
    pub(crate) fn gate(&self, now: Moment) -> Gate {
        let seconds = now.unix_us / 1_000_000;
        let closed = |seconds: u64, reason| {
            let after = Duration::from_secs(seconds).min(LOOK_AFTER_MAX);
            Closed { until: now.at + after, reason: Some(reason) }
        };
        let Shaping { windows, budget_bytes_month, at_budget, .. } = &self.shaping;
        if let Some(wait) = self.tokens_in(now) {
            return Gate::Shut(Closed { until: now.at + wait, reason: None });
        }
        let month = month_of(seconds);
        if *budget_bytes_month > 0
            && self.spent.month == month
            && self.spent.size_bytes >= *budget_bytes_month
        {
            let left = (1..=31).find(|days| month_of(seconds + days * DAY_SECONDS) != month);
            let left = left.unwrap_or(31) * DAY_SECONDS - seconds % DAY_SECONDS;
            return match at_budget {
                AtBudget::Hold => {
                    Gate::Shut(closed(left, "the budget of the month is used up: nothing is sent"))
                }
                AtBudget::AlarmsOnly => Gate::AlarmsOnly(closed(
                    left,
                    "the budget of the month is used up: only alarms are sent",
                )),
            };
        }
        let opens_in = windows.iter().map(|window| window.opens_in(seconds % DAY_SECONDS)).min();
        match opens_in {
            None | Some(0) => Gate::Open,
            Some(wait) => {
                Gate::AlarmsOnly(closed(wait, "outside of its windows: only alarms are sent"))
            }
        }
    }

    /// How long until there is anything in the bucket, if there is nothing.
    fn tokens_in(&self, now: Moment) -> Option<Duration> {
        let tokens = self.filled(now);
        let rate = self.shaping.rate_bytes_per_second as f64;
        (rate > 0.0 && tokens <= 0.0).then(|| Duration::from_secs_f64((1.0 - tokens) / rate))
    }

    fn filled(&self, now: Moment) -> f64 {
        let rate = self.shaping.rate_bytes_per_second as f64;
        let since = self.filled_at.map_or(Duration::ZERO, |at| now.at.duration_since(at));
        (self.tokens + since.as_secs_f64() * rate).min(rate)
    }

    /// A request of so many event bytes was begun.
    pub(crate) fn sent(&mut self, size_bytes: usize, now: Moment) {
        if self.shaping.rate_bytes_per_second > 0 {
            self.tokens = self.filled(now) - size_bytes as f64;
            self.filled_at = Some(now.at);
        }
        if self.shaping.budget_bytes_month > 0 {
            let month = month_of(now.unix_us / 1_000_000);
            // A clock that was set back does not give the month's budget again.
            if month > self.spent.month {
                self.spent = Spent { month, size_bytes: 0 };
            }
            self.spent.size_bytes += size_bytes as u64;
        }
    }
}

/// Months since January 1970 of a second since then.
fn month_of(seconds: u64) -> u32 {
    let (year, month, _) = civil_from_days(seconds / DAY_SECONDS);
    ((year - 1970) * 12 + month - 1) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-01-31 23:00:00 UTC.
    const LATE_JANUARY_US: u64 = 1_769_900_400_000_000;

    fn at(unix_us: u64) -> Moment {
        Moment { at: Instant::now(), unix_us }
    }

    fn later(now: Moment, by: Duration) -> Moment {
        Moment { at: now.at + by, unix_us: now.unix_us + by.as_micros() as u64 }
    }

    fn is_open(shaper: &Shaper, now: Moment) -> bool {
        shaper.gate(now) == Gate::Open
    }

    #[test]
    fn windows_may_go_over_midnight() {
        let hours = |text: &str| {
            let window = DayWindow::parse(text).unwrap();
            (0..24).filter(|hour| window.opens_in(hour * 3_600) == 0).collect::<Vec<_>>()
        };
        assert_eq!(hours("02:00-05:00"), [2, 3, 4]);
        assert_eq!(hours("22:00-03:00"), [0, 1, 2, 22, 23]);
        let window = DayWindow::parse("22:30-03:00").unwrap();
        assert_eq!(window.opens_in(3 * 3_600), 19 * 3_600 + 1_800);
        assert_eq!(DayWindow::parse("06:15-02:00").unwrap().opens_in(5 * 3_600), 4_500);
        for wrong in ["", "22:00", "22:00-22:00", "24:00-01:00", "1:00-2:00", "01:60-02:00", "a-b"]
        {
            assert_eq!(DayWindow::parse(wrong), Err(DayWindowError), "{wrong}");
        }
    }

    #[test]
    fn outside_of_its_windows_only_alarms_go() {
        let windows = ["22:00-23:30", "05:00-06:00"].map(|w| DayWindow::parse(w).unwrap()).into();
        let shaper = Shaper::new(Shaping { windows, ..Shaping::default() }, Spent::default());
        let now = at(LATE_JANUARY_US);
        assert!(is_open(&shaper, now));
        let now = later(now, Duration::from_mins(40));
        let Gate::AlarmsOnly(closed) = shaper.gate(now) else { panic!("it is 23:40") };
        assert_eq!(closed.until, now.at + LOOK_AFTER_MAX, "the clock may be set");
        let now = later(now, Duration::from_secs(5 * 3_600 + 1_199));
        let Gate::AlarmsOnly(closed) = shaper.gate(now) else { panic!("it is 04:59:59") };
        assert_eq!(closed.until, now.at + Duration::from_secs(1));
        assert!(is_open(&shaper, later(now, Duration::from_secs(1))));
    }

    #[test]
    fn a_budget_lasts_until_the_month_ends_also_over_a_restart() {
        let shaping = Shaping { budget_bytes_month: 1_000, ..Shaping::default() };
        let mut shaper = Shaper::new(shaping.clone(), Spent::default());
        let now = at(LATE_JANUARY_US);
        shaper.sent(999, now);
        assert!(is_open(&shaper, now));
        shaper.sent(50, now);
        assert!(matches!(shaper.gate(now), Gate::Shut(_)));
        let mut shaper = Shaper::new(shaping.clone(), shaper.spent());
        assert!(matches!(shaper.gate(now), Gate::Shut(_)));
        let alarms = Shaping { at_budget: AtBudget::AlarmsOnly, ..shaping };
        assert!(matches!(Shaper::new(alarms, shaper.spent()).gate(now), Gate::AlarmsOnly(_)));
        let february = later(now, Duration::from_hours(1));
        assert!(is_open(&shaper, february));
        shaper.sent(7, february);
        assert_eq!(shaper.spent(), Spent { month: 56 * 12 + 1, size_bytes: 7 });
        shaper.sent(7, now);
        assert_eq!(shaper.spent().size_bytes, 14, "a clock that was set back gives nothing again");
    }

    proptest! {
        #[test]
        fn no_second_gets_more_than_the_rate_and_one_request(
            rate in 1_u64..100_000, sizes in prop::collection::vec(1_usize..50_000, 1..200),
        ) {
            let shaping = Shaping { rate_bytes_per_second: rate, ..Shaping::default() };
            let mut shaper = Shaper::new(shaping, Spent::default());
            let start = at(LATE_JANUARY_US);
            let (mut now, mut sent) = (start, 0);
            let largest = *sizes.iter().max().unwrap();
            for size in sizes {
                if let Gate::Shut(closed) = shaper.gate(now) {
                    prop_assert!(closed.until > now.at && closed.reason.is_none());
                    now = later(now, closed.until - now.at);
                    prop_assert!(is_open(&shaper, now), "it opens when it says");
                }
                shaper.sent(size, now);
                sent += size;
                let allowed = rate as f64 * (1.0 + (now.at - start.at).as_secs_f64());
                prop_assert!(sent as f64 <= allowed + largest as f64 + 2.0);
            }
            // Nor is it much slower.
            let needed = (sent as f64 / rate as f64).max(0.0);
            prop_assert!((now.at - start.at).as_secs_f64() <= needed + 1.0);
        }
    }
}
