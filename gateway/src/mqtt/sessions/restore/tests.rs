use super::*;
use crate::mqtt::session::NEVER_S;

const NOW_US: u64 = SET_US + 1_000_000_000_000;
const HOUR_S: u32 = 3_600;

#[test]
fn what_is_left_of_a_session_after_a_restart() {
    let hour = Duration::from_secs(HOUR_S.into());
    let ago = |seconds: u64| NOW_US - seconds * 1_000_000;
    let left = |ended_us| left(HOUR_S, ended_us, NOW_US).unwrap();
    assert_eq!(left(ago(600)), Duration::from_mins(50));
    assert_eq!(left(0), hour, "it was connected when the process ended");
    assert_eq!(left(ago(2 * 3600)), GRACE, "its client gets a moment to come back");
    assert_eq!(super::left(5, ago(3600), NOW_US), Some(Duration::from_secs(5)));
    assert_eq!(super::left(NEVER_S, ago(3600), NOW_US), None);
}

#[test]
fn no_session_ends_by_a_clock_that_jumps() {
    let hour = Some(Duration::from_secs(HOUR_S.into()));
    assert_eq!(left(HOUR_S, NOW_US + 1_000_000, NOW_US), hour, "it has gone back");
    assert_eq!(left(HOUR_S, 5_000_000, NOW_US), hour, "it was not set when the session was left");
    assert_eq!(left(HOUR_S, NOW_US, 5_000_000), hour, "it is not set now");
}
