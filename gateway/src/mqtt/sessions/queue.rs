//! The messages that wait for one client, in order. Pure.
//!
//! Owns: packet ids and the state of every message of QoS 1 and 2 of a session that outlives its
//! connection.
//! Invariant: a message is sent only after it is durable; its packet id is its own from the moment it
//! is taken until its exchange is over, so that after a crash it is sent again under the same one.
//! Bound: messages and bytes. Past it either the oldest that was never sent makes room, or the new
//! one is not taken.

use std::collections::VecDeque;

use super::super::rows::{Message, Queued};

/// Bounds of one queue, and what happens at them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Messages, at most. Below the number of packet ids, so that there is always a free one.
    pub messages_max: usize,
    /// Bytes of messages, at most.
    pub bytes_max: usize,
    /// Whether the oldest message that was never sent makes room, or the new one is not taken.
    pub drops_oldest: bool,
}

#[derive(Debug)]
struct Entry {
    /// Place in the order, for ever.
    place: u64,
    queued: Queued,
    durable: bool,
    /// It may have been sent before: DUP.
    sent: bool,
}

impl Entry {
    fn size_bytes(&self) -> usize {
        self.queued.message.as_ref().map_or(0, Message::size_bytes)
    }
}

/// What the queue has for its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// Its place.
    pub place: u64,
    /// The message. One without content only waits for its PUBREL.
    pub queued: Queued,
    /// It may have been sent before.
    pub dup: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Queue {
    entries: VecDeque<Entry>,
    next_place: u64,
    last_id: u16,
    size_bytes: usize,
    /// What stands before this place was sent over the connection that is there now.
    sent_to: u64,
}

impl Queue {
    /// Takes what the store has of it, in the order of the places.
    pub fn restore(&mut self, place: u64, queued: Queued) {
        self.next_place = self.next_place.max(place + 1);
        self.last_id = queued.packet_id;
        // Nobody remembers whether it was sent.
        let entry = Entry { place, queued, durable: true, sent: true };
        self.size_bytes += entry.size_bytes();
        self.entries.push_back(entry);
    }

    /// Messages in it.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of its messages.
    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    /// Places of all messages.
    pub fn places(&self) -> impl Iterator<Item = u64> {
        self.entries.iter().map(|entry| entry.place)
    }

    /// Takes a message at the end, with a free packet id. Gives its place and itself, and puts the
    /// places of messages that made room into `dropped`; `None` if it was not taken.
    pub fn push(
        &mut self,
        mut queued: Queued,
        limits: &QueueLimits,
        dropped: &mut Vec<u64>,
    ) -> Option<(u64, Queued)> {
        let size_bytes = queued.message.as_ref().map_or(0, Message::size_bytes);
        if size_bytes > limits.bytes_max {
            return None;
        }
        while self.entries.len() >= limits.messages_max
            || self.size_bytes + size_bytes > limits.bytes_max
        {
            if !limits.drops_oldest {
                return None;
            }
            let oldest = self.entries.iter().position(|entry| !entry.sent)?;
            dropped.push(self.remove(oldest));
        }
        queued.packet_id = self.free_id()?;
        let place = self.next_place;
        self.next_place += 1;
        self.size_bytes += size_bytes;
        let entry = Entry { place, queued: queued.clone(), durable: false, sent: false };
        self.entries.push_back(entry);
        Some((place, queued))
    }

    fn free_id(&mut self) -> Option<u16> {
        if self.entries.len() >= usize::from(u16::MAX) {
            return None;
        }
        loop {
            self.last_id = self.last_id.checked_add(1).unwrap_or(1);
            // Ids are given in turn, so that the first is free unless the range was once around.
            if !self.entries.iter().any(|entry| entry.queued.packet_id == self.last_id) {
                return Some(self.last_id);
            }
        }
    }

    fn remove(&mut self, at: usize) -> u64 {
        let Some(entry) = self.entries.remove(at) else { return 0 };
        self.size_bytes -= entry.size_bytes();
        entry.place
    }

    fn at(&self, place: u64) -> Option<usize> {
        self.entries.binary_search_by_key(&place, |entry| entry.place).ok()
    }

    fn by_id(&self, packet_id: u16) -> Option<usize> {
        self.entries.iter().position(|entry| entry.queued.packet_id == packet_id)
    }

    /// Messages that are not known to be durable.
    pub fn unsettled(&self) -> impl Iterator<Item = (u64, &Queued)> {
        self.entries.iter().filter(|entry| !entry.durable).map(|entry| (entry.place, &entry.queued))
    }

    /// The message at this place is durable.
    pub fn durable(&mut self, place: u64) {
        if let Some(at) = self.at(place) {
            self.entries[at].durable = true;
        }
    }

    /// There is a new connection: everything is to be sent again, from the front [MQTT-4.4.0-1].
    pub fn connected(&mut self) {
        self.sent_to = 0;
    }

    /// The next message to send, once it is durable. Call [`Queue::sent`] or [`Queue::drop_at`].
    pub fn next(&self) -> Option<Next> {
        let at = self.entries.partition_point(|entry| entry.place < self.sent_to);
        let entry = self.entries.get(at).filter(|entry| entry.durable)?;
        Some(Next { place: entry.place, queued: entry.queued.clone(), dup: entry.sent })
    }

    /// The message at this place was sent.
    pub fn sent(&mut self, place: u64) {
        self.sent_to = place + 1;
        if let Some(at) = self.at(place) {
            self.entries[at].sent = true;
        }
    }

    /// Gives up the message at this place: it has expired, or its client does not take it.
    pub fn drop_at(&mut self, place: u64) {
        if let Some(at) = self.at(place) {
            self.remove(at);
        }
    }

    /// The exchange of this packet id is over: gives the place.
    pub fn acked(&mut self, packet_id: u16) -> Option<u64> {
        let at = self.by_id(packet_id)?;
        Some(self.remove(at))
    }

    /// The client has the QoS 2 message of this packet id: gives the place, and what is left of it.
    pub fn received(&mut self, packet_id: u16) -> Option<(u64, Queued)> {
        let at = self.by_id(packet_id)?;
        let size_bytes = self.entries[at].size_bytes();
        self.size_bytes -= size_bytes;
        let entry = &mut self.entries[at];
        entry.queued.message = None;
        Some((entry.place, entry.queued.clone()))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use storage::Attributes;

    use super::super::super::subscriptions::Manner;
    use super::*;

    const LIMITS: QueueLimits = QueueLimits { messages_max: 3, bytes_max: 40, drops_oldest: true };

    fn message(payload: &'static [u8]) -> Queued {
        let message = Message {
            received_us: 0,
            topic: "t".into(),
            attributes: Attributes::default(),
            payload: Bytes::from_static(payload),
        };
        let manner = Manner { qos: 1, ..Manner::default() };
        Queued { packet_id: 0, manner, message: Some(message) }
    }

    fn push(queue: &mut Queue, payload: &'static [u8], limits: &QueueLimits) -> Option<u64> {
        queue.push(message(payload), limits, &mut Vec::new()).map(|(place, _)| place)
    }

    fn payload(next: &Next) -> &[u8] {
        &next.queued.message.as_ref().unwrap().payload
    }

    #[test]
    fn nothing_is_sent_before_it_is_durable() {
        let mut queue = Queue::default();
        let first = push(&mut queue, b"1", &LIMITS).unwrap();
        let second = push(&mut queue, b"2", &LIMITS).unwrap();
        assert_eq!(queue.next(), None);
        queue.durable(second);
        assert_eq!(queue.next(), None, "order holds");
        queue.durable(first);
        assert_eq!(payload(&queue.next().unwrap()), b"1");
    }

    #[test]
    fn at_its_bound_the_oldest_that_was_never_sent_makes_room_or_the_new_one_is_not_taken() {
        let mut queue = Queue::default();
        for payload in [&b"1"[..], b"2", b"3"] {
            let place = push(&mut queue, payload, &LIMITS).unwrap();
            queue.durable(place);
        }
        let first = queue.next().unwrap();
        queue.sent(first.place);
        let keeps = QueueLimits { drops_oldest: false, ..LIMITS };
        assert_eq!(push(&mut queue, b"4", &keeps), None);
        let mut dropped = Vec::new();
        queue.push(message(b"4"), &LIMITS, &mut dropped).unwrap();
        assert_eq!(dropped, [1], "the first was sent, and may be acked any moment");
        assert_eq!(queue.len(), 3);
        assert_eq!(push(&mut queue, &[0; 41], &LIMITS), None, "larger than all of it");
        push(&mut queue, &[0; 36], &LIMITS).unwrap();
        assert_eq!(queue.places().collect::<Vec<_>>(), [0, 4]);
    }

    #[test]
    fn after_a_reconnect_everything_unacked_is_sent_again_marked_mqtt_4_4_0_1() {
        let mut queue = Queue::default();
        for payload in [&b"1"[..], b"2", b"3"] {
            let place = push(&mut queue, payload, &LIMITS).unwrap();
            queue.durable(place);
        }
        let ids: Vec<u16> = std::iter::from_fn(|| {
            let next = queue.next()?;
            assert!(!next.dup);
            queue.sent(next.place);
            Some(next.queued.packet_id)
        })
        .take(2)
        .collect();
        assert_eq!(queue.acked(ids[0]), Some(0));
        assert_eq!(queue.acked(ids[0]), None);
        queue.connected();
        let again = queue.next().unwrap();
        assert_eq!((again.queued.packet_id, again.dup, payload(&again)), (ids[1], true, &b"2"[..]));
        queue.sent(again.place);
        assert!(!queue.next().unwrap().dup, "this one was never sent");
    }

    #[test]
    fn a_received_message_keeps_its_id_until_it_is_over() {
        let mut queue = Queue::default();
        let (place, queued) = queue.push(message(b"1"), &LIMITS, &mut Vec::new()).unwrap();
        queue.durable(place);
        queue.sent(place);
        let (_, left) = queue.received(queued.packet_id).unwrap();
        assert_eq!((left.packet_id, left.message), (queued.packet_id, None));
        assert_eq!(queue.size_bytes(), 0);
        queue.connected();
        assert_eq!(queue.next().unwrap().queued.message, None);
        assert_eq!(queue.acked(queued.packet_id), Some(place));
        assert!(queue.is_empty());
    }

    #[test]
    fn packet_ids_of_waiting_messages_are_never_given_twice() {
        let mut queue = Queue::default();
        let limits = QueueLimits { messages_max: 2, bytes_max: 100, drops_oldest: false };
        let (_, stuck) = queue.push(message(b"stuck"), &limits, &mut Vec::new()).unwrap();
        for _ in 0..=u16::MAX {
            let (_, queued) = queue.push(message(b""), &limits, &mut Vec::new()).unwrap();
            assert_ne!(queued.packet_id, stuck.packet_id);
            assert_ne!(queued.packet_id, 0);
            queue.acked(queued.packet_id).unwrap();
        }
    }
}
