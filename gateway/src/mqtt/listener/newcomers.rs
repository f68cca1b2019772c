//! Who has connected and is not let in yet, by the network that they come from: a listener that is
//! full makes room from here.
//!
//! Invariant: whoever is let in keeps its place. Among the others a full listener is shared fairly: a
//! network that holds more places than another gives up its oldest to it, so that one address which
//! opens thousands of connections and says nothing keeps out nobody else. Within a network nobody
//! gives way: those who came first are nearer to the end of their handshakes.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::access::network_of;

/// Where somebody comes from; `None` over a Unix socket.
type Network = Option<u64>;

/// A listener's newcomers. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Newcomers(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// In the order in which they came, each with what ends it.
    by_network: HashMap<Network, BTreeMap<u64, CancellationToken>>,
}

/// One of them, until it is let in or gone.
#[derive(Debug)]
pub(crate) struct Newcomer {
    newcomers: Newcomers,
    network: Network,
    number: u64,
}

impl Newcomers {
    /// Somebody has connected. `end` is cancelled if it has to make room.
    pub(super) fn enter(&self, address: Option<IpAddr>, end: CancellationToken) -> Newcomer {
        let network = address.map(network_of);
        let mut state = self.lock();
        state.next += 1;
        let number = state.next;
        state.by_network.entry(network).or_default().insert(number, end);
        drop(state);
        Newcomer { newcomers: self.clone(), network, number }
    }

    /// Makes room for somebody from `address`; `false` if no network has more newcomers than it
    /// would have itself.
    pub(super) fn make_room(&self, address: Option<IpAddr>) -> bool {
        let mut state = self.lock();
        let own = state.by_network.get(&address.map(network_of)).map_or(0, BTreeMap::len);
        let largest = state.by_network.iter_mut().max_by_key(|(_, newcomers)| newcomers.len());
        let Some((_, newcomers)) = largest.filter(|(_, newcomers)| newcomers.len() > own + 1)
        else {
            return false;
        };
        newcomers.pop_first().is_some_and(|(_, end)| {
            end.cancel();
            true
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Newcomer {
    /// It is let in, and keeps its place from now on; `false` if it had to make room just before.
    pub(crate) fn is_let_in(&self) -> bool {
        let mut state = self.newcomers.lock();
        let Some(newcomers) = state.by_network.get_mut(&self.network) else { return false };
        let was_there = newcomers.remove(&self.number).is_some();
        if newcomers.is_empty() {
            state.by_network.remove(&self.network);
        }
        was_there
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        self.is_let_in();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_network_gives_up_its_oldest_and_nobody_who_was_let_in() {
        let [one, two] = [1, 2].map(|last| Some(IpAddr::from([192, 0, 2, last])));
        let newcomers = Newcomers::default();
        let ends: Vec<_> = (0..4).map(|_| CancellationToken::new()).collect();
        let mut crowd: Vec<_> = ends.iter().map(|e| newcomers.enter(one, e.clone())).collect();
        assert!(crowd[0].is_let_in(), "its place is its own from here on");
        assert!(!newcomers.make_room(one), "nobody gives way to its like");

        assert!(newcomers.make_room(two));
        let ended = |n: usize| ends[n].is_cancelled();
        assert_eq!([0, 1, 2, 3].map(ended), [false, true, false, false]);
        assert!(!crowd[1].is_let_in(), "too late");
        let other = newcomers.enter(two, CancellationToken::new());
        assert!(!newcomers.make_room(two), "two each would be no fairer");
        assert!(newcomers.make_room(None));
        assert!(!newcomers.make_room(None), "one each");
        drop((crowd.split_off(1), other));
        assert!(newcomers.lock().by_network.is_empty());
    }
}
