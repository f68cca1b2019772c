//! Who subscribes to what, and what a client gets of an event.
//!
//! Owns: the table of filters with their subscribers; the groups of shared subscriptions, and whose
//! turn it is in each.
//! Invariant: a client gets a message once, however many of its filters match it (see [`Manner`]); once
//! more for each shared subscription that chose it (MQTT 5, 4.8.2). A filter is in the trie exactly as
//! long as it has subscribers.
//! Deliberately absent: networks, locks, and what has become of a message (see `downlink`).

mod trie;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytestring::ByteString;
use storage::{Attribute, Attributes, StoredEvent};

use super::sessions::Kept;
use super::topic;
use trie::Trie;

/// Distinct filters, at most.
pub const FILTERS_MAX: usize = 10_000;

/// Levels of a filter, at most: the trie is as deep as that, and walked recursively.
pub const FILTER_LEVELS_MAX: usize = 128;

/// Attribute of an event whose publisher must not get it back ([MQTT-3.8.3-3]): its client id.
pub const PUBLISHER: u8 = 64;

/// The table is full, or the filter is too deep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// What a client asked for with one subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Highest QoS to deliver with.
    pub qos: u8,
    /// Not what the client itself published [MQTT-3.8.3-3].
    pub no_local: bool,
    /// Keep the publisher's retain flag [MQTT-3.3.1-13].
    pub retain_as_published: bool,
    /// Subscription identifier.
    pub id: Option<u32>,
}

/// How a client gets a message that matches one or more of its subscriptions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manner {
    /// The publisher's QoS, but no more than the highest that a matching subscription was granted
    /// [MQTT-3.3.4-2].
    pub qos: u8,
    /// Retain flag: the publisher's where a matching subscription asks for that [MQTT-3.3.1-13], set on
    /// what was retained [MQTT-3.3.1-8].
    pub retain: bool,
    /// Identifiers of all matching subscriptions that have one [MQTT-3.3.4-4].
    pub ids: Vec<u32>,
}

impl Manner {
    /// How a client gets a retained message for a new subscription; `None` if it is not to have it.
    pub fn of_retained(
        attributes: &Attributes,
        options: Options,
        client_id: &ByteString,
    ) -> Option<Self> {
        let published = Published::of(attributes);
        let mut manner = Self { retain: true, ..Self::default() };
        manner.add(&published, options);
        published.is_for(options, client_id).then_some(manner)
    }

    /// Adds what one more matching subscription asks for.
    fn add(&mut self, published: &Published<'_>, options: Options) {
        self.qos = self.qos.max(published.qos.min(options.qos));
        self.retain |= published.retain && options.retain_as_published;
        self.ids.extend(options.id);
    }
}

/// What of an event decides about its delivery.
#[derive(Default)]
struct Published<'a> {
    qos: u8,
    retain: bool,
    by: Option<&'a [u8]>,
}

impl<'a> Published<'a> {
    fn of(attributes: &'a Attributes) -> Self {
        let mut published = Self::default();
        for attribute in attributes.iter() {
            match attribute {
                Attribute::QoS(qos) => published.qos = qos,
                Attribute::Retain => published.retain = true,
                Attribute::Unknown(PUBLISHER, id) => published.by = Some(id),
                _ => {}
            }
        }
        published
    }

    /// Whether a subscription of this client takes it.
    fn is_for(&self, options: Options, client_id: &ByteString) -> bool {
        !options.no_local || self.by != Some(client_id.as_bytes())
    }
}

/// Who subscribes.
#[derive(Clone, Debug)]
pub enum Reader {
    /// A connection whose session ends with it.
    Connection {
        /// Names its stream (see `streams`), never reused.
        number: u64,
        /// Place of its stream.
        slot: usize,
        /// Its client.
        client_id: ByteString,
    },
    /// A session that outlives its connections.
    Session(Arc<Kept>),
}

/// Tells readers apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Connection(u64),
    Session(u64),
}

impl Reader {
    fn key(&self) -> Key {
        match self {
            Self::Connection { number, .. } => Key::Connection(*number),
            Self::Session(kept) => Key::Session(kept.number()),
        }
    }

    fn client_id(&self) -> &ByteString {
        match self {
            Self::Connection { client_id, .. } => client_id,
            Self::Session(kept) => kept.client_id(),
        }
    }

    fn is_online(&self) -> bool {
        match self {
            Self::Connection { .. } => true,
            Self::Session(kept) => kept.is_online(),
        }
    }
}

/// A reader's part in a filter.
#[derive(Debug)]
struct Subscriber {
    reader: Reader,
    options: Options,
    /// What stands before this offset was published before it, and is not for it: the follower may be
    /// behind.
    from: u64,
}

#[derive(Debug)]
struct Filter {
    subscribers: Vec<Subscriber>,
    /// Of a shared subscription, whose messages go to one each: whose turn it is.
    turn: Option<usize>,
}

impl Filter {
    /// Which subscriber of a shared subscription gets the event at this offset: in turn, those without a
    /// connection only where none has one.
    fn choose(&mut self, offset: u64) -> Option<&Subscriber> {
        let (len, from) = (self.subscribers.len(), self.turn?);
        let mut able =
            (0..len).map(|i| (from + i) % len).filter(|&at| self.subscribers[at].from <= offset);
        let at = able
            .clone()
            .find(|&at| self.subscribers[at].reader.is_online())
            .or_else(|| able.next())?;
        self.turn = Some((at + 1) % len);
        Some(&self.subscribers[at])
    }
}

/// The table of filters.
#[derive(Debug, Default)]
pub struct Subscriptions {
    trie: Trie,
    filters: Vec<Option<Filter>>,
    by_text: HashMap<ByteString, usize>,
    /// Counts filters that have come and gone: what a topic matches stands until it moves.
    changes: Arc<AtomicU64>,
    matched: Vec<usize>,
}

impl Subscriptions {
    /// Whether nobody subscribes to anything.
    pub fn is_empty(&self) -> bool {
        self.by_text.is_empty()
    }

    /// The count of filters that have come and gone.
    pub fn changes(&self) -> Arc<AtomicU64> {
        self.changes.clone()
    }

    /// Whether anybody subscribes to a topic.
    pub fn has_any(&mut self, topic: &str) -> bool {
        self.trie.matches(topic, &mut self.matched);
        !self.matched.is_empty()
    }

    /// Adds a reader to a valid filter, or changes what it asked for. What stands before offset `from`
    /// is not for it; gives that offset, which stays that of the first time.
    ///
    /// # Errors
    /// [`Full`] past [`FILTERS_MAX`] or [`FILTER_LEVELS_MAX`].
    pub fn subscribe(
        &mut self,
        text: &str,
        reader: &Reader,
        options: Options,
        from: u64,
    ) -> Result<u64, Full> {
        let filter = self.filter(text)?;
        let known = filter.subscribers.iter_mut().find(|known| known.reader.key() == reader.key());
        if let Some(known) = known {
            known.options = options;
            return Ok(known.from);
        }
        filter.subscribers.push(Subscriber { reader: reader.clone(), options, from });
        Ok(from)
    }

    /// The filter of this text, a new one if need be.
    fn filter(&mut self, text: &str) -> Result<&mut Filter, Full> {
        let at = match self.by_text.get(text) {
            Some(&at) => at,
            None => self.new_filter(text)?,
        };
        self.filters[at].as_mut().ok_or(Full)
    }

    fn new_filter(&mut self, text: &str) -> Result<usize, Full> {
        if self.by_text.len() >= FILTERS_MAX || text.split('/').count() > FILTER_LEVELS_MAX {
            return Err(Full);
        }
        let free = self.filters.iter().position(Option::is_none);
        let at = free.unwrap_or(self.filters.len());
        let (filter, turn) = match topic::shared(text) {
            Some((_, filter)) => (filter, Some(0)),
            None => (text, None),
        };
        self.trie.insert(filter, at);
        self.by_text.insert(ByteString::from(text), at);
        let new = Some(Filter { subscribers: Vec::new(), turn });
        match free {
            Some(free) => self.filters[free] = new,
            None => self.filters.push(new),
        }
        self.changes.fetch_add(1, Ordering::Relaxed);
        Ok(at)
    }

    /// Takes a reader off a filter.
    pub fn unsubscribe(&mut self, text: &str, reader: &Reader) {
        let Some(&at) = self.by_text.get(text) else { return };
        let Some(filter) = &mut self.filters[at] else { return };
        filter.subscribers.retain(|subscriber| subscriber.reader.key() != reader.key());
        if filter.subscribers.is_empty() {
            self.trie.remove(topic::shared(text).map_or(text, |(_, filter)| filter), at);
            self.filters[at] = None;
            self.by_text.remove(text);
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Who gets an event, and how: hands each to `give`.
    pub fn address(&mut self, stored: &StoredEvent, mut give: impl FnMut(&Reader, Manner)) {
        self.trie.matches(&stored.event.topic, &mut self.matched);
        if self.matched.is_empty() {
            return;
        }
        let published = Published::of(&stored.event.attributes);
        let mut readers: Vec<(&Reader, Manner)> = Vec::new();
        // Where each reader is among them. With one filter nobody comes twice.
        let mut places: HashMap<Key, usize> = HashMap::new();
        let overlap = self.matched.len() > 1;
        for &at in &self.matched {
            let filter = self.filters[at].as_ref().filter(|filter| filter.turn.is_none());
            for subscriber in filter.iter().flat_map(|filter| &filter.subscribers) {
                let Subscriber { reader, options, from } = subscriber;
                if stored.offset < *from || !published.is_for(*options, reader.client_id()) {
                    continue;
                }
                let next = readers.len();
                let place =
                    if overlap { *places.entry(reader.key()).or_insert(next) } else { next };
                if place == next {
                    readers.push((reader, Manner::default()));
                }
                readers[place].1.add(&published, *options);
            }
        }
        for (reader, manner) in readers {
            give(reader, manner);
        }
        for &at in &self.matched {
            let Some(filter) = &mut self.filters[at] else { continue };
            if let Some(Subscriber { reader, options, .. }) = filter.choose(stored.offset) {
                let mut manner = Manner::default();
                manner.add(&published, *options);
                give(reader, manner);
            }
        }
    }
}

#[cfg(test)]
mod tests;
