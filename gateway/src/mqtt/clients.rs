//! Who is connected under which client id: a second connection takes over from the first.
//!
//! Invariant: at most one connection per client id is past [`Clients::enter`] [MQTT-3.1.4-3]. What a
//! user holds, no other user takes over, and nobody who has not said who it is: a client id alone is
//! no right to end another's connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytestring::ByteString;
use tokio_util::sync::CancellationToken;

/// The connected clients. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Clients(Arc<Mutex<HashMap<ByteString, Holder>>>);

#[derive(Clone, Debug, Default)]
struct Holder {
    user: Option<ByteString>,
    /// Told to the holder: somebody else takes over.
    taken_over: CancellationToken,
    /// Told by the holder: it is gone.
    gone: CancellationToken,
}

/// The right to a client id; given back when dropped.
#[derive(Debug)]
pub struct Seat {
    clients: Clients,
    client_id: ByteString,
    holder: Holder,
}

impl Clients {
    /// Takes the client id, from whoever holds it, once that connection has gone; `None` if it is
    /// another user's. Not cancel safe: a third connection that waits for this one would pass while
    /// the first is still there.
    pub async fn enter(&self, client_id: &ByteString, user: Option<&ByteString>) -> Option<Seat> {
        let holder = Holder { user: user.cloned(), ..Holder::default() };
        let before = {
            let mut clients = self.lock();
            let held = clients.get(client_id).and_then(|holder| holder.user.as_ref());
            if held.is_some() && held != user {
                return None;
            }
            let before = clients.insert(client_id.clone(), holder.clone());
            before.inspect(|before| before.taken_over.cancel())
        };
        // From here on the seat is held, so that a third connection can take over from this one even
        // while it waits.
        let seat = Seat { clients: self.clone(), client_id: client_id.clone(), holder };
        if let Some(before) = before {
            before.gone.cancelled().await;
        }
        Some(seat)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ByteString, Holder>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Resolves when another connection takes over. Cancel safe.
    pub async fn taken_over(&self) {
        self.holder.taken_over.cancelled().await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut clients = self.clients.lock();
        // Whoever took over has its own entry there by now.
        if !self.holder.taken_over.is_cancelled() {
            clients.remove(&self.client_id);
        }
        drop(clients);
        self.holder.gone.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    #[tokio::test]
    async fn the_second_waits_until_the_first_has_gone_mqtt_3_1_4_3() {
        let clients = Clients::default();
        let id = ByteString::from_static("dev");
        let first = clients.enter(&id, None).await.unwrap();
        let mut second = pin!(clients.enter(&id, None));
        assert!(second.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        first.taken_over().await;
        drop(first);
        let second = second.await.unwrap();
        assert_eq!(clients.lock().len(), 1);
        drop(second);
        assert!(clients.lock().is_empty());
    }

    #[tokio::test]
    async fn a_third_takes_over_from_one_that_still_waits() {
        let clients = Clients::default();
        let id = ByteString::from_static("dev");
        let first = clients.enter(&id, None).await.unwrap();
        {
            let mut second = pin!(clients.enter(&id, None));
            assert!(second.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            let mut third = pin!(clients.enter(&id, None));
            assert!(third.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            drop(first);
            let second = second.await.unwrap();
            second.taken_over().await;
            drop(second);
            drop(third.await);
        }
        assert!(clients.lock().is_empty());
    }

    #[tokio::test]
    async fn a_users_client_id_is_not_for_others_to_take_over() {
        let clients = Clients::default();
        let id = ByteString::from_static("dev");
        let [alice, bob] = ["alice", "bob"].map(ByteString::from_static);
        let anybodys = clients.enter(&id, None).await.unwrap();
        let mut hers = pin!(clients.enter(&id, Some(&alice)));
        assert!(hers.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        drop(anybodys);
        let hers = hers.await.unwrap();
        assert!(clients.enter(&id, Some(&bob)).await.is_none());
        assert!(clients.enter(&id, None).await.is_none());
        assert!(!hers.holder.taken_over.is_cancelled());
        drop(hers);
        assert!(clients.enter(&id, Some(&bob)).await.is_some());
    }
}
