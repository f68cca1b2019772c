//! Retained messages: the last one of each topic, for those who subscribe later.
//!
//! Owns: which topics have one, and how many there may be. The messages themselves are rows of the
//! store: the row changes in the commit of the event that brings it, so that what is retained is
//! exactly what the log says, in its order.
//! Invariant: a topic with a row is in the index; one in the index may have none, for a moment or
//! because its commit failed, and is then found out when somebody asks.
//! Bound: topics and bytes. A message past it is stored and forwarded as any other, and not retained;
//! it is counted.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytestring::ByteString;
use storage::{Attribute, Control, Event, StateError, Store};

use super::rows::{self, Message};
use super::topic;

/// Where rows are read.
type Rows = Arc<dyn Fn(u16, &[u8]) -> Option<bytes::Bytes> + Send + Sync>;

/// The retained messages. Cheap to clone.
#[derive(Clone)]
pub struct Retained(Arc<Shared>);

struct Shared {
    index: Mutex<Index>,
    messages_max: usize,
    bytes_max: usize,
    rows: Rows,
    refused: AtomicU64,
}

#[derive(Default)]
struct Index {
    /// Bytes of each topic's message.
    by_topic: BTreeMap<ByteString, usize>,
    size_bytes: usize,
}

impl Index {
    fn remove(&mut self, topic: &str) {
        self.size_bytes -= self.by_topic.remove(topic).unwrap_or(0);
    }
}

impl Retained {
    /// For at most so many messages and bytes, whose rows `rows` reads.
    pub fn new(
        messages_max: usize,
        bytes_max: usize,
        rows: impl Fn(u16, &[u8]) -> Option<bytes::Bytes> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Shared {
            index: Mutex::default(),
            messages_max,
            bytes_max,
            rows: Arc::new(rows),
            refused: AtomicU64::new(0),
        }))
    }

    /// Takes what the store has. Reads the disk.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn load(&self, store: &Store) -> Result<(), StateError> {
        let mut index = self.lock();
        for (topic, row) in store.states(rows::RETAINED)? {
            if let (Some(topic), Some(message)) = (rows::text(&topic), Message::decode(row)) {
                let size_bytes = message.size_bytes();
                index.size_bytes += size_bytes;
                index.by_topic.insert(topic, size_bytes);
            }
        }
        Ok(())
    }

    /// Number of topics with a retained message.
    pub fn len(&self) -> usize {
        self.lock().by_topic.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Messages that were not retained because there were too many.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    /// What has to be durable with an event: the new row of its topic, or its end
    /// [MQTT-3.3.1-6]. Nothing for an event without the retain flag.
    pub fn rider(&self, event: &Event) -> Option<Control> {
        if !event.attributes.iter().any(|attribute| attribute == Attribute::Retain) {
            return None;
        }
        let key = rows::name_key(&event.topic);
        let mut index = self.lock();
        if event.payload.is_empty() {
            index.remove(&event.topic);
            return Some(rows::delete(rows::RETAINED, key));
        }
        let message = Message::of(event);
        let size_bytes = message.size_bytes();
        let before = index.by_topic.get(&event.topic).copied();
        let messages = index.by_topic.len() + usize::from(before.is_none());
        let bytes = index.size_bytes - before.unwrap_or(0) + size_bytes;
        if messages > self.0.messages_max || bytes > self.0.bytes_max {
            self.0.refused.fetch_add(1, Ordering::Relaxed);
            // The one before is not the last any more.
            index.remove(&event.topic);
            return before.map(|_| rows::delete(rows::RETAINED, key));
        }
        index.size_bytes = bytes;
        index.by_topic.insert(message.topic.clone(), size_bytes);
        Some(rows::put(rows::RETAINED, key, message.encode()))
    }

    /// Topics with a retained message that match a filter, in their order.
    pub fn matching(&self, filter: &str) -> Vec<ByteString> {
        let index = self.lock();
        if !filter.contains(['+', '#']) {
            return index
                .by_topic
                .get_key_value(filter)
                .map(|(t, _)| t.clone())
                .into_iter()
                .collect();
        }
        // `a/#` matches `a` too: the slash is not part of what all have in common.
        let literal = &filter[..filter.find(['+', '#']).unwrap_or(0)];
        let literal = literal.strip_suffix('/').unwrap_or(literal);
        let from = ByteString::from(literal);
        index
            .by_topic
            .range(from..)
            .map(|(topic, _)| topic)
            .take_while(|topic| topic.starts_with(literal))
            .filter(|topic| topic::matches(filter, topic))
            .cloned()
            .collect()
    }

    /// The retained message of a topic, as of the last durable commit. Reads the disk.
    pub fn get(&self, topic: &str) -> Option<Message> {
        Message::decode((self.0.rows)(rows::RETAINED, topic.as_bytes())?)
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.0.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use storage::Attributes;

    use super::*;

    fn event(topic: &str, payload: &'static [u8]) -> Event {
        Event {
            partition: 0,
            received_us: 0,
            device_key: "dev".into(),
            topic: topic.into(),
            attributes: Attributes::encode([Attribute::Retain]),
            payload: Bytes::from_static(payload),
        }
    }

    fn retained(messages_max: usize, bytes_max: usize) -> Retained {
        Retained::new(messages_max, bytes_max, |_, _| None)
    }

    #[test]
    fn the_last_message_of_a_topic_counts_and_an_empty_one_ends_it_mqtt_3_3_1_6() {
        let retained = retained(10, 1000);
        let mut plain = event("a", b"x");
        plain.attributes = Attributes::default();
        assert_eq!(retained.rider(&plain), None);
        assert!(matches!(retained.rider(&event("a", b"1")), Some(Control::Put { .. })));
        assert!(matches!(retained.rider(&event("a", b"22")), Some(Control::Put { .. })));
        assert_eq!(retained.len(), 1);
        assert!(matches!(retained.rider(&event("a", b"")), Some(Control::Delete { .. })));
        assert_eq!((retained.len(), retained.lock().size_bytes), (0, 0));
    }

    #[test]
    fn past_its_bounds_a_message_is_counted_and_not_retained() {
        let retained = retained(2, 30);
        for topic in ["a", "b"] {
            assert!(retained.rider(&event(topic, b"1")).is_some());
        }
        assert_eq!(retained.rider(&event("c", b"1")), None, "too many");
        assert!(retained.rider(&event("b", b"2")).is_some(), "it replaces one");
        let too_large = retained.rider(&event("a", &[0; 40]));
        assert!(matches!(too_large, Some(Control::Delete { .. })), "the old one is not the last");
        assert_eq!((retained.len(), retained.refused()), (1, 2));
    }

    #[test]
    fn filters_find_their_topics() {
        let retained = retained(100, 10_000);
        for topic in ["a", "a/b", "a/b/c", "ab", "b/b", "$x/b", "é/b"] {
            retained.rider(&event(topic, b"1"));
        }
        let found = |filter: &str| {
            retained.matching(filter).into_iter().map(|t| t.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(found("a/b"), ["a/b"]);
        assert_eq!(found("a/#"), ["a", "a/b", "a/b/c"]);
        assert_eq!(found("+/b"), ["a/b", "b/b", "é/b"]);
        assert_eq!(found("a/+"), ["a/b"]);
        assert_eq!(found("#").len(), 6, "not $x [MQTT-4.7.2-1]");
        assert_eq!(found("$x/#"), ["$x/b"]);
        assert_eq!(found("nothing"), [""; 0]);
    }
}
