//! Which filters are subscribed to, and which of them a topic matches.
//!
//! Owns: the trie of filters, and per filter what the follower has published for it and how far its
//! subscribers have taken that; the groups of shared subscriptions, and whose turn it is in each.
//! Invariant: a filter is in the trie exactly as long as it has subscribers; its slot is the lowest
//! free one, so that whatever is kept per slot stays as small as the most filters there ever were.
//! Deliberately absent: networks, locks, and what a connection asked for (it knows); sessions that
//! outlive theirs are told what they asked for by their entry here.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytestring::ByteString;

use super::downlink::Options;
use super::sessions::Kept;
use super::topic;

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
    watchers: Vec<Watcher>,
    /// It is one member's part in this group, and not in the trie itself.
    group: Option<usize>,
}

impl Filter {
    fn new(number: u64, text: &str, group: Option<usize>) -> Self {
        Self {
            number,
            text: ByteString::from(text),
            position: 0,
            seq: 0,
            subscribers: Vec::new(),
            watchers: Vec::new(),
            group,
        }
    }

    fn is_unused(&self) -> bool {
        self.subscribers.is_empty() && self.watchers.is_empty()
    }
}

/// A session that outlives its connections, and what it asked for.
#[derive(Clone, Debug)]
pub struct Watcher {
    /// The session.
    pub kept: Arc<Kept>,
    /// What it asked for.
    pub options: Options,
    /// What stands before this offset is not for it.
    pub from: u64,
}

/// A shared subscription: each message goes to one member.
#[derive(Debug)]
struct Group {
    /// As subscribed to, `$share` included.
    text: ByteString,
    members: Vec<Member>,
    /// Whose turn it is.
    next: usize,
}

#[derive(Clone, Debug)]
enum Member {
    /// A connection, by the slot that is its own.
    Slot(usize),
    Kept(Watcher),
}

/// Who gets a message of a group.
#[derive(Clone, Debug)]
pub enum Choice {
    /// The connection whose slot this is.
    Slot(usize),
    /// This session.
    Kept(Watcher),
}

/// What a topic matches.
#[derive(Debug, Default)]
pub struct Matched {
    /// Slots of filters, each once.
    pub slots: Vec<usize>,
    /// Groups, each once.
    pub groups: Vec<usize>,
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
    groups: Vec<Option<Group>>,
    group_by_text: HashMap<ByteString, usize>,
    last_number: u64,
    /// Counts filters that have come and gone: what a topic matches stands until it moves.
    changes: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Node {
    children: HashMap<Box<str>, Node>,
    /// Filter that ends here.
    here: Option<usize>,
    /// Filter that ends with `#` below here.
    below: Option<usize>,
    /// As `here` and `below`, of shared subscriptions.
    groups_here: Vec<usize>,
    groups_below: Vec<usize>,
}

impl Node {
    fn is_empty(&self) -> bool {
        self.children.is_empty()
            && self.here.is_none()
            && self.below.is_none()
            && self.groups_here.is_empty()
            && self.groups_below.is_empty()
    }
}

impl Subscriptions {
    /// Whether nobody subscribes to anything.
    pub fn is_empty(&self) -> bool {
        self.by_text.is_empty() && self.group_by_text.is_empty()
    }

    /// The count of filters that have come and gone.
    pub fn changes(&self) -> Arc<AtomicU64> {
        self.changes.clone()
    }

    /// Whether anybody subscribes to a topic.
    pub fn has_any(&self, topic: &str) -> bool {
        let mut matched = Matched::default();
        self.matches(topic, &mut matched);
        !(matched.slots.is_empty() && matched.groups.is_empty())
    }

    /// Adds a connection to a valid filter. A second call for the same pair is the caller's to avoid.
    ///
    /// # Errors
    /// [`Full`] past [`FILTERS_MAX`] or [`FILTER_LEVELS_MAX`].
    pub fn add(&mut self, text: &str, connection: u64) -> Result<Entry, Full> {
        let slot = if topic::shared(text).is_some() {
            let group = self.group_of(text)?;
            let slot = self.new_slot(text, Some(group));
            self.members(group).push(Member::Slot(slot));
            slot
        } else {
            self.slot_of(text)?
        };
        let Some(filter) = &mut self.slots[slot] else { return Err(Full) };
        let progress = Progress::default();
        progress.set(filter.position);
        filter.subscribers.push(Subscriber {
            connection,
            progress: progress.clone(),
            behind: false,
        });
        Ok(Entry { slot, number: filter.number, progress })
    }

    /// Adds a session to a valid filter, or changes what it asked for. Gives the offset at which the
    /// subscription begins: that of the first time.
    ///
    /// # Errors
    /// As [`Subscriptions::add`].
    pub fn watch(&mut self, text: &str, watcher: Watcher) -> Result<u64, Full> {
        if let Some(known) = self.watcher(text, &watcher.kept) {
            known.options = watcher.options;
            return Ok(known.from);
        }
        let from = watcher.from;
        if topic::shared(text).is_some() {
            let group = self.group_of(text)?;
            self.members(group).push(Member::Kept(watcher));
        } else {
            let slot = self.slot_of(text)?;
            let Some(filter) = &mut self.slots[slot] else { return Err(Full) };
            filter.watchers.push(watcher);
        }
        Ok(from)
    }

    /// A session's part in a filter.
    fn watcher(&mut self, text: &str, kept: &Arc<Kept>) -> Option<&mut Watcher> {
        if let Some(&group) = self.group_by_text.get(text) {
            return self.members(group).iter_mut().find(|m| m.is(kept))?.watcher();
        }
        let slot = *self.by_text.get(text)?;
        let watchers = &mut self.slots[slot].as_mut()?.watchers;
        watchers.iter_mut().find(|watcher| Arc::ptr_eq(&watcher.kept, kept))
    }

    /// Takes a session off a filter.
    pub fn unwatch(&mut self, text: &str, kept: &Arc<Kept>) {
        if let Some(&group) = self.group_by_text.get(text) {
            self.members(group).retain(|member| !member.is(kept));
            self.drop_unused_group(group);
        } else if let Some(&slot) = self.by_text.get(text) {
            if let Some(filter) = &mut self.slots[slot] {
                filter.watchers.retain(|other| !Arc::ptr_eq(&other.kept, kept));
            }
            self.drop_unused(slot);
        }
    }

    /// The slot of a filter, a new one if need be.
    fn slot_of(&mut self, text: &str) -> Result<usize, Full> {
        if let Some(&slot) = self.by_text.get(text) {
            return Ok(slot);
        }
        self.has_room_for(text)?;
        let slot = self.new_slot(text, None);
        let (node, below) = end_of(&mut self.root, text);
        *(if below { &mut node.below } else { &mut node.here }) = Some(slot);
        self.changes.fetch_add(1, Ordering::Relaxed);
        self.by_text.insert(ByteString::from(text), slot);
        Ok(slot)
    }

    fn has_room_for(&self, text: &str) -> Result<(), Full> {
        let full = self.by_text.len() + self.group_by_text.len() >= FILTERS_MAX;
        if full || text.split('/').count() > FILTER_LEVELS_MAX { Err(Full) } else { Ok(()) }
    }

    fn new_slot(&mut self, text: &str, group: Option<usize>) -> usize {
        self.last_number += 1;
        let filter = Some(Filter::new(self.last_number, text, group));
        place(&mut self.slots, filter)
    }

    /// The group of a shared subscription, a new one if need be.
    fn group_of(&mut self, text: &str) -> Result<usize, Full> {
        if let Some(&group) = self.group_by_text.get(text) {
            return Ok(group);
        }
        let (_, filter) = topic::shared(text).ok_or(Full)?;
        self.has_room_for(text)?;
        let text = ByteString::from(text);
        let new = Some(Group { text: text.clone(), members: Vec::new(), next: 0 });
        let group = place(&mut self.groups, new);
        let (node, below) = end_of(&mut self.root, filter);
        (if below { &mut node.groups_below } else { &mut node.groups_here }).push(group);
        self.changes.fetch_add(1, Ordering::Relaxed);
        self.group_by_text.insert(text, group);
        Ok(group)
    }

    fn members(&mut self, group: usize) -> &mut Vec<Member> {
        let group = self.groups[group].as_mut();
        &mut group.expect("a group is there as long as its text is").members
    }

    /// Takes a connection off the filter in `slot`.
    pub fn remove(&mut self, slot: usize, connection: u64) {
        if let Some(Some(filter)) = self.slots.get_mut(slot) {
            filter.subscribers.retain(|subscriber| subscriber.connection != connection);
            self.drop_unused(slot);
        }
    }

    fn drop_unused(&mut self, slot: usize) {
        let Some(filter) = self.slots[slot].take_if(|filter| filter.is_unused()) else {
            return;
        };
        if let Some(group) = filter.group {
            self.members(group).retain(|m| !matches!(m, Member::Slot(own) if *own == slot));
            self.drop_unused_group(group);
        } else {
            prune(&mut self.root, &filter.text, &|node, below| {
                *(if below { &mut node.below } else { &mut node.here }) = None;
            });
            self.changes.fetch_add(1, Ordering::Relaxed);
            self.by_text.remove(&filter.text);
        }
    }

    fn drop_unused_group(&mut self, group: usize) {
        let Some(unused) = self.groups[group].take_if(|group| group.members.is_empty()) else {
            return;
        };
        if let Some((_, filter)) = topic::shared(&unused.text) {
            prune(&mut self.root, filter, &|node, below| {
                let groups = if below { &mut node.groups_below } else { &mut node.groups_here };
                groups.retain(|other| *other != group);
            });
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
        self.group_by_text.remove(&unused.text);
    }

    /// What a topic matches.
    pub fn matches(&self, topic: &str, matched: &mut Matched) {
        matched.slots.clear();
        matched.groups.clear();
        // [MQTT-4.7.2-1]
        walk(&self.root, Some(topic), !topic.starts_with('$'), matched);
    }

    /// The sessions that subscribe to the filter in `slot`.
    pub fn watchers(&self, slot: usize) -> &[Watcher] {
        self.slots.get(slot).and_then(Option::as_ref).map_or(&[], |filter| &filter.watchers)
    }

    /// Who is next in a group: its members in turn, those without a connection only where none has
    /// one.
    pub fn choose(&mut self, group: usize) -> Option<Choice> {
        let group = self.groups.get_mut(group)?.as_mut()?;
        let len = group.members.len();
        let in_turn = |from: usize| (0..len).map(move |i| (from + i) % len);
        let at = in_turn(group.next)
            .find(|&at| group.members[at].is_online())
            .or_else(|| in_turn(group.next).next())?;
        group.next = (at + 1) % len;
        Some(match &group.members[at] {
            Member::Slot(slot) => Choice::Slot(*slot),
            Member::Kept(watcher) => Choice::Kept(watcher.clone()),
        })
    }

    /// Takes the next turn of a filter for a message of `size_bytes`, if any connection subscribes.
    pub fn turn(&mut self, slot: usize, size_bytes: u64) -> Option<Turn> {
        let filter = self.slots.get_mut(slot)?.as_mut()?;
        if filter.subscribers.is_empty() {
            return None;
        }
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

impl Member {
    fn is(&self, kept: &Arc<Kept>) -> bool {
        matches!(self, Self::Kept(watcher) if Arc::ptr_eq(&watcher.kept, kept))
    }

    fn watcher(&mut self) -> Option<&mut Watcher> {
        match self {
            Self::Slot(_) => None,
            Self::Kept(watcher) => Some(watcher),
        }
    }

    fn is_online(&self) -> bool {
        match self {
            Self::Slot(_) => true,
            Self::Kept(watcher) => watcher.kept.is_online(),
        }
    }
}

/// Puts something into the lowest free place.
fn place<T>(places: &mut Vec<Option<T>>, new: Option<T>) -> usize {
    let free = places.iter().position(Option::is_none).unwrap_or_else(|| {
        places.push(None);
        places.len() - 1
    });
    places[free] = new;
    free
}

/// The node at the end of a filter, with those on the way to it, and whether the filter ends with
/// `#` below it.
fn end_of<'a>(root: &'a mut Node, filter: &str) -> (&'a mut Node, bool) {
    let mut node = root;
    for level in filter.split('/') {
        if level == "#" {
            return (node, true);
        }
        node = node.children.entry(level.into()).or_default();
    }
    (node, false)
}

/// Takes a filter out at its end, and the nodes that only it needed.
fn prune(node: &mut Node, filter: &str, take_out: &dyn Fn(&mut Node, bool)) {
    let (level, rest) = match filter.split_once('/') {
        Some((level, rest)) => (level, Some(rest)),
        None => (filter, None),
    };
    if level == "#" {
        return take_out(node, true);
    }
    let Some(child) = node.children.get_mut(level) else {
        return;
    };
    match rest {
        Some(rest) => prune(child, rest, take_out),
        None => take_out(child, false),
    }
    if child.is_empty() {
        node.children.remove(level);
    }
}

/// Visits every node at most once: each is reached over one path only.
fn walk(node: &Node, topic: Option<&str>, wildcards: bool, matched: &mut Matched) {
    if wildcards {
        // `a/#` matches `a` itself too (4.7.1.2).
        matched.slots.extend(node.below);
        matched.groups.extend(&node.groups_below);
    }
    let Some(topic) = topic else {
        matched.slots.extend(node.here);
        matched.groups.extend(&node.groups_here);
        return;
    };
    let (level, rest) = match topic.split_once('/') {
        Some((level, rest)) => (level, Some(rest)),
        None => (topic, None),
    };
    if let Some(child) = node.children.get(level) {
        walk(child, rest, true, matched);
    }
    if wildcards && let Some(child) = node.children.get("+") {
        walk(child, rest, true, matched);
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
        let mut matched = Matched::default();
        table.matches(topic, &mut matched);
        let text = |slot: &usize| table.slots[*slot].as_ref().unwrap().text.to_string();
        let mut filters: Vec<_> = matched.slots.iter().map(text).collect();
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
        let mut matched = Matched::default();
        table.add(&"+/".repeat(FILTER_LEVELS_MAX - 1), 1).unwrap();
        table.matches(&"/".repeat(60_000), &mut matched);
        assert!(matched.slots.is_empty());
    }

    #[test]
    fn the_members_of_a_group_take_turns_mqtt_4_8_2() {
        let mut table = Subscriptions::default();
        let members: Vec<_> =
            (1..=3).map(|member| table.add("$share/g/a/+", member).unwrap()).collect();
        table.add("$share/other/a/#", 4).unwrap();
        let mut matched = Matched::default();
        let mut chosen = Vec::new();
        for _ in 0..6 {
            table.matches("a/b", &mut matched);
            assert_eq!((matched.slots.len(), matched.groups.len()), (0, 2));
            let group = table.group_by_text["$share/g/a/+"];
            match table.choose(group) {
                Some(Choice::Slot(slot)) => chosen.push(slot),
                other => panic!("{other:?}"),
            }
        }
        let slots: Vec<_> = members.iter().map(|entry| entry.slot).collect();
        assert_eq!(chosen, [&slots[..], &slots].concat());
        for (member, entry) in (1..=3).zip(&members) {
            table.remove(entry.slot, member);
        }
        table.matches("a/b", &mut matched);
        assert_eq!(matched.groups.len(), 1);
        table.remove(members.len(), 4);
        assert!(table.is_empty() && table.root.is_empty());
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
