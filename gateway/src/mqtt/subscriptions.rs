//! Which filters are subscribed to, and which of them a topic matches.
//!
//! Owns: the trie of filters, and per filter what the follower has published for it and how far its
//! subscribers have taken that.
//! Invariant: a filter is in the trie exactly as long as it has subscribers; its slot is the lowest
//! free one, so that whatever is kept per slot stays as small as the most filters there ever were.
//! Deliberately absent: what a subscriber asked for (its connection knows), networks, locks.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytestring::ByteString;

/// Distinct filters, at most.
pub const FILTERS_MAX: usize = 10_000;

/// Levels of a filter, at most: the trie is as deep as that, and walked recursively.
pub const FILTER_LEVELS_MAX: usize = 128;

/// The table is full, or the filter is too deep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// How far one subscriber has taken what was published for a filter, in bytes.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    /// Everything before this position has been taken, or is lost to this subscriber.
    pub fn set(&self, position: u64) {
        self.0.store(position, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A subscriber's part in a filter.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Place of the filter, reused after it has gone.
    pub slot: usize,
    /// Name of this life of the filter, never reused.
    pub number: u64,
    /// Where this subscriber says how far it is.
    pub progress: Progress,
}

#[derive(Debug)]
struct Filter {
    number: u64,
    text: ByteString,
    /// Bytes published for it so far.
    position: u64,
    /// Messages published for it so far.
    seq: u64,
    subscribers: Vec<Subscriber>,
}

impl Filter {
    fn new(number: u64, text: &str) -> Self {
        let (text, subscribers) = (ByteString::from(text), Vec::new());
        Self { number, text, position: 0, seq: 0, subscribers }
    }
}

#[derive(Debug)]
struct Subscriber {
    connection: u64,
    progress: Progress,
    /// Too slow, and not waited for until it has caught up.
    behind: bool,
}

/// What goes out for one filter: its place in the row of messages of this filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Place of the filter.
    pub slot: usize,
    /// Name of this life of the filter.
    pub number: u64,
    /// Bytes published for it before.
    pub position: u64,
    /// Messages published for it before.
    pub seq: u64,
}

/// The table of filters.
#[derive(Debug, Default)]
pub struct Subscriptions {
    root: Node,
    slots: Vec<Option<Filter>>,
    by_text: HashMap<ByteString, usize>,
    last_number: u64,
}

#[derive(Debug, Default)]
struct Node {
    children: HashMap<Box<str>, Node>,
    /// Filter that ends here.
    here: Option<usize>,
    /// Filter that ends with `#` below here.
    below: Option<usize>,
}

impl Node {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.here.is_none() && self.below.is_none()
    }
}

impl Subscriptions {
    /// Whether nobody subscribes to anything.
    pub fn is_empty(&self) -> bool {
        self.by_text.is_empty()
    }

    /// Adds a connection to a valid filter. A second call for the same pair is the caller's to avoid.
    ///
    /// # Errors
    /// [`Full`] past [`FILTERS_MAX`] or [`FILTER_LEVELS_MAX`].
    pub fn add(&mut self, text: &str, connection: u64) -> Result<Entry, Full> {
        let slot = match self.by_text.get(text) {
            Some(&slot) => slot,
            None => self.insert(text)?,
        };
        let number = self.last_number;
        let filter = self.slots[slot].get_or_insert_with(|| Filter::new(number, text));
        let progress = Progress::default();
        progress.set(filter.position);
        filter.subscribers.push(Subscriber {
            connection,
            progress: progress.clone(),
            behind: false,
        });
        Ok(Entry { slot, number: filter.number, progress })
    }

    /// Gives a new filter its slot, number and place in the trie.
    fn insert(&mut self, text: &str) -> Result<usize, Full> {
        if self.by_text.len() >= FILTERS_MAX || text.split('/').count() > FILTER_LEVELS_MAX {
            return Err(Full);
        }
        let slot = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.last_number += 1;
        *end_of(&mut self.root, text) = Some(slot);
        self.by_text.insert(ByteString::from(text), slot);
        Ok(slot)
    }

    /// Takes a connection off the filter in `slot`.
    pub fn remove(&mut self, slot: usize, connection: u64) {
        let Some(Some(filter)) = self.slots.get_mut(slot) else {
            return;
        };
        filter.subscribers.retain(|subscriber| subscriber.connection != connection);
        if filter.subscribers.is_empty() {
            prune(&mut self.root, &filter.text);
            self.by_text.remove(&filter.text);
            self.slots[slot] = None;
        }
    }

    /// Slots of the filters that match a topic, each once.
    pub fn matches(&self, topic: &str, slots: &mut Vec<usize>) {
        slots.clear();
        // [MQTT-4.7.2-1]
        walk(&self.root, Some(topic), !topic.starts_with('$'), slots);
    }

    /// Takes the next turn of a filter for a message of `size_bytes`.
    pub fn turn(&mut self, slot: usize, size_bytes: u64) -> Option<Turn> {
        let filter = self.slots.get_mut(slot)?.as_mut()?;
        let turn = Turn { slot, number: filter.number, position: filter.position, seq: filter.seq };
        filter.position += size_bytes;
        filter.seq += 1;
        Some(turn)
    }

    /// Whether every subscriber of these filters that keeps up has taken all but `bytes_max`.
    pub fn in_reach(&mut self, slots: &[usize], bytes_max: u64) -> bool {
        let mut all = true;
        self.each_subscriber(slots, |subscriber, untaken| {
            let near = untaken <= bytes_max;
            subscriber.behind &= !near;
            all &= near || subscriber.behind;
        });
        all
    }

    /// Waits no more for the subscribers of these filters that are further behind.
    pub fn leave_behind(&mut self, slots: &[usize], bytes_max: u64) {
        self.each_subscriber(slots, |subscriber, untaken| {
            subscriber.behind = untaken > bytes_max;
        });
    }

    fn each_subscriber(&mut self, slots: &[usize], mut f: impl FnMut(&mut Subscriber, u64)) {
        for &slot in slots {
            let Some(Some(filter)) = self.slots.get_mut(slot) else {
                continue;
            };
            for subscriber in &mut filter.subscribers {
                let untaken = filter.position.saturating_sub(subscriber.progress.get());
                f(subscriber, untaken);
            }
        }
    }
}

/// The place for the slot of a filter, with the nodes on the way to it.
fn end_of<'a>(root: &'a mut Node, filter: &str) -> &'a mut Option<usize> {
    let mut node = root;
    for level in filter.split('/') {
        if level == "#" {
            return &mut node.below;
        }
        node = node.children.entry(level.into()).or_default();
    }
    &mut node.here
}

/// Takes a filter out, and the nodes that only it needed.
fn prune(node: &mut Node, filter: &str) {
    let (level, rest) = match filter.split_once('/') {
        Some((level, rest)) => (level, Some(rest)),
        None => (filter, None),
    };
    if level == "#" {
        node.below = None;
        return;
    }
    let Some(child) = node.children.get_mut(level) else {
        return;
    };
    match rest {
        Some(rest) => prune(child, rest),
        None => child.here = None,
    }
    if child.is_empty() {
        node.children.remove(level);
    }
}

/// Visits every node at most once: each is reached over one path only.
fn walk(node: &Node, topic: Option<&str>, wildcards: bool, slots: &mut Vec<usize>) {
    if wildcards {
        // `a/#` matches `a` itself too (4.7.1.2).
        slots.extend(node.below);
    }
    let Some(topic) = topic else {
        slots.extend(node.here);
        return;
    };
    let (level, rest) = match topic.split_once('/') {
        Some((level, rest)) => (level, Some(rest)),
        None => (topic, None),
    };
    if let Some(child) = node.children.get(level) {
        walk(child, rest, true, slots);
    }
    if wildcards && let Some(child) = node.children.get("+") {
        walk(child, rest, true, slots);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The specification, word by word, for one filter and one topic.
    fn matches_by_the_book(filter: &str, topic: &str) -> bool {
        if topic.starts_with('$') && filter.starts_with(['#', '+']) {
            return false;
        }
        let filter: Vec<_> = filter.split('/').collect();
        let topic: Vec<_> = topic.split('/').collect();
        for (i, level) in filter.iter().enumerate() {
            match (*level, topic.get(i)) {
                ("#", _) => return true,
                ("+", Some(_)) => {}
                (level, Some(other)) if level == *other => {}
                _ => return false,
            }
        }
        filter.len() == topic.len()
    }

    fn matched(table: &Subscriptions, topic: &str) -> Vec<String> {
        let mut slots = Vec::new();
        table.matches(topic, &mut slots);
        let text = |slot: &usize| table.slots[*slot].as_ref().unwrap().text.to_string();
        let mut filters: Vec<_> = slots.iter().map(text).collect();
        filters.sort();
        filters
    }

    fn level() -> impl Strategy<Value = String> {
        prop_oneof![Just(""), Just("a"), Just("b"), Just("é"), Just("$x"), Just("\u{1F600}")]
            .prop_map(String::from)
    }

    fn topic() -> impl Strategy<Value = String> {
        prop::collection::vec(level(), 1..5)
            .prop_map(|levels| levels.join("/"))
            .prop_filter("at least one character", |topic| !topic.is_empty())
    }

    fn filter() -> impl Strategy<Value = String> {
        let level = prop_oneof![3 => level(), 1 => Just("+".to_owned())];
        (prop::collection::vec(level, 0..4), any::<bool>())
            .prop_map(|(mut levels, below)| {
                if below {
                    levels.push("#".to_owned());
                }
                levels.join("/")
            })
            .prop_filter("at least one character", |filter| !filter.is_empty())
    }

    proptest! {
        #[test]
        fn the_trie_matches_as_the_book_says(
            filters in prop::collection::btree_set(filter(), 0..12),
            gone in prop::collection::vec(any::<bool>(), 12),
            topics in prop::collection::vec(topic(), 1..12),
        ) {
            let mut table = Subscriptions::default();
            let entries: Vec<_> =
                filters.iter().map(|filter| table.add(filter, 1).unwrap()).collect();
            let mut left = Vec::new();
            for ((filter, entry), gone) in filters.iter().zip(&entries).zip(&gone) {
                if *gone {
                    table.remove(entry.slot, 1);
                } else {
                    left.push(filter.clone());
                }
            }
            for topic in &topics {
                let expected: Vec<_> =
                    left.iter().filter(|f| matches_by_the_book(f, topic)).cloned().collect();
                prop_assert_eq!(matched(&table, topic), expected, "topic {}", topic);
            }
            for entry in &entries {
                table.remove(entry.slot, 1);
            }
            prop_assert!(table.is_empty() && table.root.is_empty());
        }
    }

    #[test]
    fn a_leading_wildcard_does_not_match_a_dollar_topic_mqtt_4_7_2_1() {
        let mut table = Subscriptions::default();
        for filter in ["#", "+/x", "$dev/#", "$dev/+"] {
            table.add(filter, 1).unwrap();
        }
        assert_eq!(matched(&table, "$dev/x"), ["$dev/#", "$dev/+"]);
        assert_eq!(matched(&table, "dev/x"), ["#", "+/x"]);
    }

    #[test]
    fn slots_are_reused_and_numbers_are_not() {
        let mut table = Subscriptions::default();
        let first = table.add("a", 1).unwrap();
        table.add("b", 1).unwrap();
        table.remove(first.slot, 1);
        let again = table.add("c", 1).unwrap();
        assert_eq!(again.slot, first.slot);
        assert_ne!(again.number, first.number);
    }

    #[test]
    fn a_filter_stays_until_its_last_subscriber_goes() {
        let mut table = Subscriptions::default();
        let entry = table.add("a/+", 1).unwrap();
        assert_eq!(table.add("a/+", 2).unwrap().slot, entry.slot);
        table.remove(entry.slot, 1);
        assert_eq!(matched(&table, "a/b"), ["a/+"]);
        table.remove(entry.slot, 2);
        assert!(table.is_empty());
    }

    #[test]
    fn a_filter_that_is_too_deep_is_refused() {
        let mut table = Subscriptions::default();
        assert_eq!(table.add(&"/".repeat(FILTER_LEVELS_MAX), 1).unwrap_err(), Full);
        assert!(table.is_empty());
        let mut slots = Vec::new();
        table.add(&"+/".repeat(FILTER_LEVELS_MAX - 1), 1).unwrap();
        table.matches(&"/".repeat(60_000), &mut slots);
        assert!(slots.is_empty());
    }

    #[test]
    fn only_subscribers_that_keep_up_are_waited_for() {
        let mut table = Subscriptions::default();
        let entry = table.add("a", 1).unwrap();
        let slots = [entry.slot];
        table.turn(entry.slot, 100).unwrap();
        assert!(table.in_reach(&slots, 100));
        table.turn(entry.slot, 1).unwrap();
        assert!(!table.in_reach(&slots, 100));
        table.leave_behind(&slots, 100);
        assert!(table.in_reach(&slots, 100), "left behind");
        entry.progress.set(101);
        assert!(table.in_reach(&slots, 100), "caught up");
        table.turn(entry.slot, 101).unwrap();
        assert!(!table.in_reach(&slots, 100), "waited for again");
    }
}
