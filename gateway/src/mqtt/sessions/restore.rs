//! What a restart finds of sessions and wills.
//!
//! # Time
//! While the process runs, expiry and will delay count on the monotonic clock. Over a restart only
//! the wall clock is there, and it is not believed where it stands before [`SET_US`] or has gone
//! back; whatever it says, a client gets [`GRACE`] to come back, so that nothing ends by mistake.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use storage::{StateError, Store};

use super::super::rows::{self, Queued, SessionRow};
use super::super::session::Inbound;
use super::kept::Kept;
use super::wills::Will;
use super::{Sessions, lasting, lock};
use crate::ingest::clock::SET_US;

/// What every session and will gets after a restart before it ends.
pub const GRACE: Duration = Duration::from_secs(10);

impl Sessions {
    /// Takes what the store has of sessions and wills. Before the first connection. Reads the disk.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn load(&self, store: &Store, now: Instant, now_us: u64) -> Result<(), StateError> {
        let shared = &*self.0;
        let mut by_number: HashMap<u64, (Arc<Kept>, Vec<u16>)> = HashMap::new();
        for (client_id, row) in store.states(rows::SESSIONS)? {
            let (Some(client_id), Some(row)) = (rows::text(&client_id), SessionRow::decode(row))
            else {
                tracing::error!("the row of a session is damaged: left out");
                continue;
            };
            let kept = self.kept(client_id, row.user, row.number, row.expiry_s);
            kept.lock().ends_at = left(row.expiry_s, row.ended_us, now_us).map(|left| now + left);
            by_number.insert(row.number, (kept, Vec::new()));
        }
        let mut orphans = Vec::new();
        let mut owned = |namespace| -> Result<Vec<_>, StateError> {
            let mut rows = Vec::new();
            for (key, value) in store.states(namespace)? {
                match rows::split_key(&key) {
                    Some((number, rest)) if by_number.contains_key(&number) => {
                        rows.push((number, rest, value));
                    }
                    _ => orphans.push(rows::delete(namespace, key)),
                }
            }
            Ok(rows)
        };
        let (receipts, subscriptions, queues) =
            (owned(rows::RECEIPTS)?, owned(rows::SUBSCRIPTIONS)?, owned(rows::QUEUES)?);
        for (number, rest, _) in receipts {
            if let (Some((_, ids)), Some(id)) = (by_number.get_mut(&number), rest.first_chunk()) {
                ids.push(u16::from_be_bytes(*id));
            }
        }
        let mut serve_from = u64::MAX;
        for (number, rest, value) in subscriptions {
            let (filter, row) = (rows::text(&rest), rows::decode_subscription(value));
            if let (Some((kept, _)), Some(filter), Some((options, from))) =
                (by_number.get(&number), filter, row)
                && shared.downlink.watch(&filter, kept, options, from).is_ok()
            {
                kept.lock().subscriptions.insert(filter, options);
                serve_from = serve_from.min(from);
            }
        }
        for (number, rest, value) in queues {
            if let (Some((kept, _)), Some(place), Some(queued)) =
                (by_number.get(&number), rest.first_chunk(), Queued::decode(value))
            {
                let place = u64::from_be_bytes(*place);
                kept.change(&mut kept.lock(), |queue| queue.restore(place, queued));
            }
        }
        let served = store.state(rows::SERVED, b"")?;
        let served = served.as_ref().and_then(|served| served.first_chunk());
        let served = served.map_or(0, |served| u64::from_le_bytes(*served));
        if serve_from < u64::MAX {
            shared.downlink.serve_from(serve_from.max(served));
        }
        shared.last_number.store(by_number.keys().copied().max().unwrap_or(0), Ordering::Relaxed);
        let mut by_client = lock(&shared.by_client);
        for (kept, receipts) in by_number.into_values() {
            kept.lock().inbound = Some(Inbound::restored(receipts));
            by_client.insert(kept.client_id.clone(), kept);
        }
        drop(by_client);
        self.load_wills(store, now)?;
        if !orphans.is_empty() {
            shared.ingest.submit(orphans, None);
        }
        Ok(())
    }

    /// Their connections ended with the process.
    fn load_wills(&self, store: &Store, now: Instant) -> Result<(), StateError> {
        let mut wills = lock(&self.0.wills);
        for (client_id, row) in store.states(rows::WILLS)? {
            let (Some(client_id), Some(stored)) = (rows::text(&client_id), rows::decode_will(row))
            else {
                tracing::error!("the row of a will is damaged: left out");
                continue;
            };
            let delay = Duration::from_secs(stored.delay_s.into()).max(GRACE);
            wills.insert(client_id, Will { stored, due: now + delay });
        }
        Ok(())
    }
}

/// What is left of a session's time after a restart: see "Time" above. `None`: it never ends.
fn left(expiry_s: u32, ended_us: u64, now_us: u64) -> Option<Duration> {
    let expiry = lasting(expiry_s)?;
    let told = ended_us >= SET_US && now_us >= ended_us;
    // It was connected when the process ended, or nobody knows how long ago that was.
    let passed = if told { Duration::from_micros(now_us - ended_us) } else { Duration::ZERO };
    Some(expiry.saturating_sub(passed).max(GRACE.min(expiry)))
}

#[cfg(test)]
mod tests;
