//! How fast one client may publish, in all and over a route: two buckets each, of events and of bytes.
//! Pure; time is an argument.
//!
//! Invariant: over any time a client is read no faster than its rate, but for one second's worth that
//! it may have saved up, and the last publish, which is taken whole and paid for afterwards. Nothing
//! is dropped: who is over its rate is not read for a while, and slows down by itself.
//! A client that comes back finds its pace as it left it ([`Paces`]).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytestring::ByteString;

/// What a client may have saved up.
const BURST: Duration = Duration::from_secs(1);

/// Clients that are gone and whose pace is remembered, at most. It matters for a second, or until
/// what they took is paid for.
const REMEMBERED_MAX: usize = 4096;

/// What a listener or a route allows each client. 0: as much as it likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Publishes per second.
    pub events: u64,
    /// Bytes of topics and payloads per second.
    pub bytes: u64,
}

/// One client's buckets: each the time at which what was taken will have been paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    rate: Rate,
    events_paid: Instant,
    bytes_paid: Instant,
}

impl Pace {
    /// With a second's worth saved up.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, events_paid: now, bytes_paid: now }
    }

    /// A publish was taken.
    pub fn take(&mut self, bytes: usize, now: Instant) {
        charge(&mut self.events_paid, 1, self.rate.events, now);
        charge(&mut self.bytes_paid, bytes as u64, self.rate.bytes, now);
    }

    /// When the next publish may be taken; `None`: now.
    pub fn opens_at(&self, now: Instant) -> Option<Instant> {
        // What the last one cost is not among what was saved.
        let opens = self.events_paid.max(self.bytes_paid).checked_sub(BURST)?;
        (opens > now).then_some(opens)
    }

    fn is_paid(&self, now: Instant) -> bool {
        self.events_paid.max(self.bytes_paid) <= now
    }
}

fn charge(paid: &mut Instant, n: u64, per_second: u64, now: Instant) {
    // A packet has far fewer bytes than would overflow this.
    if let Some(nanos) = n.saturating_mul(1_000_000_000).checked_div(per_second) {
        *paid = (*paid).max(now) + Duration::from_nanos(nanos);
    }
}

/// The paces of one client: what its listener allows, and each route that sets a rate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientPace {
    listener: Pace,
    /// By the route's place in the configuration; those that were published over.
    routes: Vec<(usize, Pace)>,
}

impl ClientPace {
    fn new(rate: Rate, now: Instant) -> Self {
        Self { listener: Pace::new(rate, now), routes: Vec::new() }
    }

    /// A publish was taken, over whichever route.
    pub fn take(&mut self, bytes: usize, now: Instant) {
        self.listener.take(bytes, now);
    }

    /// It came over this route, which allows so much.
    pub fn take_over_route(&mut self, route: usize, rate: Rate, bytes: usize, now: Instant) {
        if rate == Rate::default() {
            return;
        }
        let at = self.routes.iter().position(|(known, _)| *known == route);
        let at = at.unwrap_or_else(|| {
            self.routes.push((route, Pace::new(rate, now)));
            self.routes.len() - 1
        });
        self.routes[at].1.take(bytes, now);
    }

    /// When the next publish may be taken; `None`: now. Nobody knows before it is read over which
    /// route it comes, and one that waits is in front of all behind it: the slowest pace holds.
    pub fn opens_at(&self, now: Instant) -> Option<Instant> {
        self.all().filter_map(|pace| pace.opens_at(now)).max()
    }

    fn is_paid(&self, now: Instant) -> bool {
        self.all().all(|pace| pace.is_paid(now))
    }

    fn all(&self) -> impl Iterator<Item = &Pace> {
        [&self.listener].into_iter().chain(self.routes.iter().map(|(_, pace)| pace))
    }
}

/// The paces of clients that are gone, so that nobody gains by coming back.
#[derive(Debug, Default)]
pub struct Paces(Mutex<HashMap<ByteString, ClientPace>>);

impl Paces {
    /// The pace of a client that comes; `None` where neither its listener nor any route sets a rate.
    pub fn enter(
        &self,
        client_id: &ByteString,
        rate: Rate,
        routes_limit: bool,
        now: Instant,
    ) -> Option<ClientPace> {
        if rate == Rate::default() && !routes_limit {
            return None;
        }
        let left = self.lock().remove(client_id);
        Some(left.map_or_else(
            || ClientPace::new(rate, now),
            |left| ClientPace { listener: Pace { rate, ..left.listener }, ..left },
        ))
    }

    /// A client has gone. When too many are remembered, it is not.
    pub fn leave(&self, client_id: &ByteString, pace: ClientPace, now: Instant) {
        if pace.is_paid(now) {
            return;
        }
        let mut paces = self.lock();
        if paces.len() >= REMEMBERED_MAX {
            paces.retain(|_, pace| !pace.is_paid(now));
        }
        if paces.len() < REMEMBERED_MAX {
            paces.insert(client_id.clone(), pace);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ByteString, ClientPace>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_second_is_saved_up_and_then_the_rate_holds() {
        let now = Instant::now();
        let mut pace = Pace::new(Rate { events: 10, bytes: 0 }, now);
        for taken in 0..10 {
            assert_eq!(pace.opens_at(now), None, "{taken}");
            pace.take(1 << 20, now);
        }
        assert_eq!(pace.opens_at(now), None, "the tenth was the last of the second");
        pace.take(0, now);
        assert_eq!(pace.opens_at(now), Some(now + 100 * MS));
        assert_eq!(pace.opens_at(now + 100 * MS), None);
    }

    #[test]
    fn a_large_publish_is_taken_whole_and_paid_for() {
        let now = Instant::now();
        let mut pace = Pace::new(Rate { events: 0, bytes: 1000 }, now);
        pace.take(5000, now);
        assert_eq!(pace.opens_at(now), Some(now + 4000 * MS));
        assert_eq!(pace.opens_at(now + 4000 * MS), None);
    }

    #[test]
    fn coming_back_gains_nothing() {
        let (paces, now) = (Paces::default(), Instant::now());
        let rate = Rate { events: 0, bytes: 1000 };
        let id = ByteString::from_static("d");
        let mut pace = paces.enter(&id, rate, false, now).unwrap();
        pace.take(5000, now);
        paces.leave(&id, pace.clone(), now);
        assert_eq!(paces.enter(&id, rate, false, now).as_ref(), Some(&pace));
        paces.leave(&id, pace.clone(), now + 5000 * MS);
        let anew = Some(ClientPace::new(rate, now));
        assert_eq!(paces.enter(&id, rate, false, now), anew, "it was paid for");
        assert_eq!(paces.enter(&id, Rate::default(), false, now), None);

        for n in 0..2 * REMEMBERED_MAX {
            paces.leave(&ByteString::from(n.to_string()), pace.clone(), now);
        }
        assert_eq!(paces.lock().len(), REMEMBERED_MAX);
        pace.take(6000, now + 5000 * MS);
        paces.leave(&id, pace, now + 5000 * MS);
        assert_eq!(paces.lock().len(), 1, "those who have paid make room");
    }

    #[test]
    fn each_route_has_a_pace_of_its_own_and_the_slowest_holds() {
        let (paces, now) = (Paces::default(), Instant::now());
        let id = ByteString::from_static("d");
        let (slow, fast) = (Rate { events: 1, bytes: 0 }, Rate { events: 100, bytes: 0 });
        let mut pace = paces.enter(&id, Rate::default(), true, now).unwrap();
        for _ in 0..100 {
            pace.take(1, now);
            pace.take_over_route(0, Rate::default(), 1, now);
            pace.take_over_route(1, fast, 1, now);
        }
        assert_eq!(pace.opens_at(now), None, "a second's worth was saved up");
        pace.take_over_route(1, fast, 1, now);
        assert_eq!(pace.opens_at(now), Some(now + 10 * MS));
        pace.take_over_route(7, slow, 1, now);
        pace.take_over_route(7, slow, 1, now);
        assert_eq!(pace.opens_at(now), Some(now + 1000 * MS));
        paces.leave(&id, pace.clone(), now);
        assert_eq!(paces.enter(&id, Rate::default(), true, now), Some(pace));
    }

    proptest! {
        /// However a client's publishes come, in no stretch of time does it get more than the rate,
        /// one second's worth, and one publish.
        #[test]
        fn the_rate_holds_over_any_time(
            per_second in 1_u64..1000,
            steps in prop::collection::vec((0_u64..300, 1_usize..2000), 1..200),
        ) {
            let begin = Instant::now();
            let mut now = begin;
            let mut pace = Pace::new(Rate { events: 0, bytes: per_second }, now);
            let mut taken: Vec<(Instant, u64)> = Vec::new();
            for (wait_ms, bytes) in steps {
                now += Duration::from_millis(wait_ms);
                if pace.opens_at(now).is_none() {
                    pace.take(bytes, now);
                    taken.push((now, bytes as u64));
                }
            }
            for first in 0..taken.len() {
                let mut sum = 0;
                for (at, bytes) in &taken[first..] {
                    // Before this one.
                    let allowed = per_second as f64 * ((*at - taken[first].0).as_secs_f64() + 1.0);
                    prop_assert!(sum as f64 <= allowed + 1.0, "{sum} in {:?}", *at - taken[first].0);
                    sum += bytes;
                }
            }
        }
    }
}
