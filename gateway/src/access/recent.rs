//! Passwords that were checked of late, so that a fleet that reconnects at once costs one check each
//! and not one per connection: a bounded memory of digests.
//!
//! Invariant: no password is kept, only a digest under a key that is made at start and never leaves
//! the process; at most [`Recent::capacity`] of them, each for its time.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use ring::hmac;

/// A user name and a password, as they are remembered.
pub(super) type Digest = [u8; 32];

/// Makes digests.
#[derive(Debug)]
pub(super) struct Digester(hmac::Key);

impl Digester {
    /// With a key of its own.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub(super) fn new() -> std::io::Result<Self> {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &ring::rand::SystemRandom::new());
        key.map(Self).map_err(|_| std::io::Error::other("the system gives no random bytes"))
    }

    /// The digest of what a client has sent.
    pub(super) fn digest(&self, user: &str, password: &[u8]) -> Digest {
        let mut context = hmac::Context::with_key(&self.0);
        // The length keeps ("ab", "c") apart from ("a", "bc").
        context.update(&(user.len() as u64).to_le_bytes());
        context.update(user.as_bytes());
        context.update(password);
        context.sign().as_ref().try_into().expect("SHA-256 has 32 bytes")
    }
}

/// Digests, each remembered for a time.
#[derive(Debug)]
pub(super) struct Recent {
    until: HashMap<Digest, Instant>,
    /// In the order of their ends, which is the order in which they came.
    order: VecDeque<(Instant, Digest)>,
    keep: Duration,
    capacity: usize,
}

impl Recent {
    /// Remembers at most `capacity` digests for `keep` each.
    pub(super) fn new(keep: Duration, capacity: usize) -> Self {
        Self { until: HashMap::new(), order: VecDeque::new(), keep, capacity }
    }

    /// Whether the digest is remembered.
    pub(super) fn knows(&self, digest: &Digest, now: Instant) -> bool {
        self.until.get(digest).is_some_and(|until| now < *until)
    }

    /// Remembers it from now on; when there are too many, the oldest go.
    pub(super) fn remember(&mut self, digest: Digest, now: Instant) {
        if self.keep.is_zero() {
            return;
        }
        let until = now + self.keep;
        self.until.insert(digest, until);
        self.order.push_back((until, digest));
        while self.order.len() > self.capacity
            || self.order.front().is_some_and(|(until, _)| *until <= now)
        {
            let Some((until, digest)) = self.order.pop_front() else { break };
            // Unless it was remembered anew.
            if self.until.get(&digest) == Some(&until) {
                self.until.remove(&digest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Duration = Duration::from_mins(1);

    #[test]
    fn digests_tell_users_and_passwords_apart() {
        let digester = Digester::new().unwrap();
        assert_eq!(digester.digest("ab", b"c"), digester.digest("ab", b"c"));
        assert_ne!(digester.digest("ab", b"c"), digester.digest("a", b"bc"));
        assert_ne!(digester.digest("ab", b"c"), Digester::new().unwrap().digest("ab", b"c"));
    }

    #[test]
    fn what_is_remembered_ends_and_stays_within_its_bound() {
        let mut recent = Recent::new(KEEP, 3);
        let now = Instant::now();
        recent.remember([0; 32], now);
        assert!(recent.knows(&[0; 32], now) && !recent.knows(&[1; 32], now));
        assert!(!recent.knows(&[0; 32], now + KEEP));
        for n in 1..=200 {
            recent.remember([n; 32], now + Duration::from_millis(n.into()));
            assert!(recent.until.len() <= 3 && recent.order.len() <= 3);
        }
        assert!(recent.knows(&[198; 32], now + KEEP) && !recent.knows(&[197; 32], now));
        // Anew: the first entry's end is not the end of the second.
        recent.remember([198; 32], now + KEEP / 2);
        recent.remember([201; 32], now + KEEP / 2);
        assert!(recent.knows(&[198; 32], now + KEEP));

        let mut off = Recent::new(Duration::ZERO, 3);
        off.remember([0; 32], now);
        assert!(!off.knows(&[0; 32], now));
    }
}
