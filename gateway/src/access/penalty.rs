//! How long an address waits before its next log-in is looked at, after some of its own have failed:
//! a pure table of fixed size. Also which slot of such a table an address has ([`Networks`]).
//!
//! Invariant: the wait never exceeds [`DELAY_MAX`], and the table never grows. Addresses that share a
//! slot share their wait, which costs a stranger's fleet some seconds at most.

use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Wait after the first failure; it doubles with each.
pub(super) const DELAY_MIN: Duration = Duration::from_millis(250);

/// Longest wait.
pub(super) const DELAY_MAX: Duration = Duration::from_secs(5);

/// So much time without a failure makes one undone.
const FORGIVEN: Duration = Duration::from_secs(20);

const SLOTS: usize = 1024;

/// Gives each address a slot that nobody outside can foresee.
#[derive(Debug, Default)]
pub(super) struct Networks(RandomState);

impl Networks {
    /// The slot of an address among so many. A network's worth of IPv6 addresses counts as one:
    /// whoever has one has them all.
    pub(super) fn slot_of(&self, address: IpAddr, slots: usize) -> usize {
        (self.0.hash_one(network_of(address)) % slots as u64) as usize
    }
}

/// What an address is counted as: itself, or all of an IPv6 network.
pub(crate) fn network_of(address: IpAddr) -> u64 {
    match address.to_canonical() {
        IpAddr::V4(address) => u64::from(address.to_bits()),
        IpAddr::V6(address) => (address.to_bits() >> 64) as u64,
    }
}

/// Failed log-ins of late, by address.
#[derive(Debug)]
pub(super) struct Penalties {
    slots: Box<[Option<Slot>]>,
    networks: Networks,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    failures: u32,
    last: Instant,
}

impl Default for Penalties {
    fn default() -> Self {
        Self { slots: vec![None; SLOTS].into(), networks: Networks::default() }
    }
}

impl Penalties {
    /// How long the address has to wait.
    pub(super) fn delay(&self, address: IpAddr, now: Instant) -> Duration {
        match self.slots[self.networks.slot_of(address, SLOTS)]
            .map_or(0, |slot| slot.failures_left(now))
        {
            0 => Duration::ZERO,
            failures => DELAY_MIN.saturating_mul(1 << (failures - 1).min(16)).min(DELAY_MAX),
        }
    }

    /// A log-in from the address has failed.
    pub(super) fn failed(&mut self, address: IpAddr, now: Instant) {
        let at = self.networks.slot_of(address, SLOTS);
        let before = self.slots[at].map_or(0, |slot| slot.failures_left(now));
        // Beyond the longest wait there is nothing to add.
        self.slots[at] = Some(Slot { failures: (before + 1).min(6), last: now });
    }
}

impl Slot {
    fn failures_left(self, now: Instant) -> u32 {
        let quiet = now.saturating_duration_since(self.last).as_secs() / FORGIVEN.as_secs();
        self.failures.saturating_sub(u32::try_from(quiet).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_slow_their_address_and_time_forgives_them() {
        let mut penalties = Penalties::default();
        let (address, now) = (IpAddr::from([192, 0, 2, 1]), Instant::now());
        assert_eq!(penalties.delay(address, now), Duration::ZERO);
        let mut delays = Vec::new();
        for _ in 0..8 {
            penalties.failed(address, now);
            delays.push(penalties.delay(address, now).as_millis());
        }
        assert_eq!(delays, [250, 500, 1000, 2000, 4000, 5000, 5000, 5000]);
        assert_eq!(penalties.delay(address, now + FORGIVEN).as_millis(), 4000);
        assert_eq!(penalties.delay(address, now + 6 * FORGIVEN), Duration::ZERO);
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_address() {
        let mut penalties = Penalties::default();
        let now = Instant::now();
        penalties.failed("2001:db8::1".parse().unwrap(), now);
        assert_eq!(penalties.delay("2001:db8::2".parse().unwrap(), now), DELAY_MIN);
        penalties.failed("192.0.2.7".parse().unwrap(), now);
        let mapped = "::ffff:192.0.2.7".parse().unwrap();
        assert_eq!(penalties.delay(mapped, now), DELAY_MIN);
    }
}
