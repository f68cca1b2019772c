//! What a device has yet to get acknowledged: a bounded queue that allocates nothing.
//!
//! Invariant: items leave in the order in which they came in, and an item is forgotten only when
//! its ack arrives. After a lost connection everything unacked is sent again, in order, before
//! anything new. When full, the newest is refused and counted: the device keeps the oldest.
//! Deliberately absent: what an item is, and when to reconnect.

use heapless::Deque;

/// A bounded queue of unacked items, at most `N`, with an in-flight window over its front.
///
/// The window is over the *span* from the oldest unacked item to the newest sent one. So packet
/// ids can go round within `1..=window` and never meet one that is in use, even when a broker
/// acks out of order.
#[derive(Debug)]
pub struct Outbox<T, const N: usize> {
    /// Oldest first. An item acked out of order leaves its slot empty until those before it are.
    slots: Deque<Slot<T>, N>,
    /// How many slots from the front were handed out on this connection.
    handed_out: usize,
    /// Packet id of the front slot, less one.
    front: u16,
    window: u16,
    unacked: usize,
    refused: u64,
}

#[derive(Debug)]
struct Slot<T> {
    item: Option<T>,
    /// Handed out at least once, on this connection or an earlier one.
    sent_before: bool,
}

/// An item to be sent now.
#[derive(Debug, PartialEq, Eq)]
pub struct Outgoing<'a, T> {
    /// MQTT packet id, in `1..=window`.
    pub packet_id: u16,
    /// Sent before, on an earlier connection: the MQTT DUP flag.
    pub dup: bool,
    /// The item.
    pub item: &'a T,
}

impl<T, const N: usize> Outbox<T, N> {
    /// An empty outbox with a window of one.
    pub const fn new() -> Self {
        Self { slots: Deque::new(), handed_out: 0, front: 0, window: 1, unacked: 0, refused: 0 }
    }

    /// Takes an item.
    ///
    /// # Errors
    /// Gives it back when the outbox is full, and counts it.
    pub fn enqueue(&mut self, item: T) -> Result<(), T> {
        if self.slots.is_full() {
            self.refused += 1;
            return Err(item);
        }
        let slot = Slot { item: Some(item), sent_before: false };
        let pushed = self.slots.push_back(slot);
        debug_assert!(pushed.is_ok(), "there was room");
        self.unacked += 1;
        Ok(())
    }

    /// A new connection begins: at most `window` packet ids may be in use (0 counts as 1), and
    /// all that is unacked is to be sent again.
    pub fn on_connect(&mut self, window: u16) {
        self.on_disconnect();
        self.window = window.max(1);
    }

    /// The connection is gone, and with it the packet ids: all that is unacked is to be sent
    /// again, in order.
    pub fn on_disconnect(&mut self) {
        self.handed_out = 0;
        self.front = 0;
    }

    /// Hands out the next item, unless the window is full or nothing is waiting.
    pub fn next_to_send(&mut self) -> Option<Outgoing<'_, T>> {
        while self.handed_out < usize::from(self.window) {
            let at = self.handed_out;
            let slot = self.slots.get(at)?;
            self.handed_out += 1;
            // Acked out of order on an earlier connection: nothing to send.
            if slot.item.is_none() {
                continue;
            }
            let packet_id = self.packet_id(at);
            let slot = self.slots.get_mut(at)?;
            let dup = core::mem::replace(&mut slot.sent_before, true);
            let item = slot.item.as_ref()?;
            return Some(Outgoing { packet_id, dup, item });
        }
        None
    }

    /// Takes the ack of `packet_id` and gives the item that it acknowledges; `None` for an id that
    /// is not in flight.
    pub fn acked(&mut self, packet_id: u16) -> Option<T> {
        if packet_id == 0 || packet_id > self.window {
            return None;
        }
        let at = usize::from((packet_id - 1 + self.window - self.front) % self.window);
        if at >= self.handed_out {
            return None;
        }
        let item = self.slots.get_mut(at)?.item.take()?;
        self.unacked -= 1;
        while self.slots.pop_front_if(|slot| slot.item.is_none()).is_some() {
            self.front = (self.front + 1) % self.window;
            self.handed_out = self.handed_out.saturating_sub(1);
        }
        Some(item)
    }

    /// Number of unacked items.
    pub fn len(&self) -> usize {
        self.unacked
    }

    /// Whether everything is acked.
    pub fn is_empty(&self) -> bool {
        self.unacked == 0
    }

    /// How many items were refused because the outbox was full.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// The unacked items, oldest first, and whether each was sent before.
    pub fn iter(&self) -> impl Iterator<Item = (&T, bool)> {
        self.slots.iter().filter_map(|slot| Some((slot.item.as_ref()?, slot.sent_before)))
    }

    fn packet_id(&self, at: usize) -> u16 {
        // `at` is below the window, which is a u16; the sum of two such fits a u32.
        ((u32::from(self.front) + at as u32) % u32::from(self.window)) as u16 + 1
    }
}

impl<T, const N: usize> Default for Outbox<T, N> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const N: usize = 8;

    #[test]
    fn when_full_the_newest_is_refused_and_counted() {
        let mut outbox = Outbox::<u32, 2>::new();
        assert_eq!(outbox.enqueue(1), Ok(()));
        assert_eq!(outbox.enqueue(2), Ok(()));
        assert_eq!(outbox.enqueue(3), Err(3));
        assert_eq!(outbox.refused(), 1);
        assert_eq!(outbox.iter().map(|(item, _)| *item).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn after_a_lost_connection_the_unacked_go_again_in_order_as_duplicates() {
        let mut outbox = Outbox::<u32, N>::new();
        outbox.on_connect(3);
        for item in 0..5 {
            outbox.enqueue(item).unwrap();
        }
        let sent: Vec<_> =
            core::iter::from_fn(|| outbox.next_to_send().map(|o| (o.packet_id, o.dup, *o.item)))
                .collect();
        assert_eq!(sent, [(1, false, 0), (2, false, 1), (3, false, 2)]);
        assert_eq!(outbox.acked(2), Some(1));
        assert_eq!(outbox.next_to_send(), None, "the oldest unacked item holds the window");
        outbox.on_disconnect();
        outbox.on_connect(10);
        let sent: Vec<_> =
            core::iter::from_fn(|| outbox.next_to_send().map(|o| (o.packet_id, o.dup, *o.item)))
                .collect();
        assert_eq!(sent, [(1, true, 0), (3, true, 2), (4, false, 3), (5, false, 4)]);
    }

    #[test]
    fn an_ack_of_an_id_that_is_not_in_flight_is_nothing() {
        let mut outbox = Outbox::<u32, N>::new();
        outbox.on_connect(4);
        outbox.enqueue(7).unwrap();
        for id in [0, 1, 4, 5, u16::MAX] {
            assert_eq!(outbox.acked(id), None);
        }
        assert_eq!(outbox.next_to_send().map(|o| o.packet_id), Some(1));
        assert_eq!(outbox.acked(1), Some(7));
        assert_eq!(outbox.acked(1), None);
        assert!(outbox.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Op {
        Enqueue,
        Send,
        /// Ack the n-th of those in flight.
        Ack(usize),
        Disconnect,
        Connect(u16),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => Just(Op::Enqueue),
            4 => Just(Op::Send),
            4 => (0..N).prop_map(Op::Ack),
            1 => Just(Op::Disconnect),
            1 => (0..12_u16).prop_map(Op::Connect),
        ]
    }

    proptest! {
        /// Against a list of the unacked: nothing is forgotten or invented, resends keep the
        /// order, and an id in use is never handed out again.
        #[test]
        fn it_does_what_a_list_would(ops in proptest::collection::vec(op(), 1..200)) {
            let mut outbox = Outbox::<u32, N>::new();
            let mut unacked = std::collections::BTreeSet::new();
            let mut sent_ever = std::collections::BTreeSet::new();
            let mut in_flight = BTreeMap::<u16, u32>::new();
            let mut last_on_connection = None;
            let mut next = 0;
            for op in ops {
                match op {
                    Op::Enqueue => {
                        if outbox.enqueue(next).is_ok() {
                            unacked.insert(next);
                        } else {
                            prop_assert!(!unacked.is_empty());
                        }
                        next += 1;
                    }
                    Op::Send => if let Some(Outgoing { packet_id, dup, item }) = outbox.next_to_send() {
                        let item = *item;
                        prop_assert!(last_on_connection < Some(item));
                        last_on_connection = Some(item);
                        let oldest_waiting =
                            unacked.iter().find(|item| !in_flight.values().any(|i| i == *item));
                        prop_assert_eq!(oldest_waiting, Some(&item));
                        prop_assert_eq!(dup, !sent_ever.insert(item));
                        prop_assert_eq!(in_flight.insert(packet_id, item), None);
                    },
                    Op::Ack(n) => {
                        let id = in_flight.keys().copied().nth(n);
                        let item = id.and_then(|id| in_flight.remove(&id));
                        prop_assert_eq!(id.and_then(|id| outbox.acked(id)), item);
                        item.map(|item| unacked.remove(&item));
                    }
                    Op::Disconnect | Op::Connect(_) => {
                        in_flight.clear();
                        last_on_connection = None;
                        match op {
                            Op::Connect(window) => outbox.on_connect(window),
                            _ => outbox.on_disconnect(),
                        }
                    }
                }
                prop_assert_eq!(outbox.len(), unacked.len());
                prop_assert_eq!(outbox.iter().map(|(item, _)| *item).collect::<Vec<_>>(),
                    unacked.iter().copied().collect::<Vec<_>>());
            }
        }
    }
}
