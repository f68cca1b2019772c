//! Which filters a topic matches. Pure.
//!
//! Invariant: a node is there exactly as long as a filter needs it.
//! Deliberately absent: what a filter is to whom: it is a number here.

use std::collections::HashMap;

/// Filters by their levels.
#[derive(Debug, Default)]
pub(super) struct Trie {
    root: Node,
}

#[derive(Debug, Default)]
struct Node {
    children: HashMap<Box<str>, Node>,
    /// Filters that end here.
    here: Vec<usize>,
    /// Filters that end with `#` below here.
    below: Vec<usize>,
}

impl Node {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.here.is_empty() && self.below.is_empty()
    }
}

impl Trie {
    /// Enters a valid filter under a number. Several may have the same text.
    pub(super) fn insert(&mut self, filter: &str, number: usize) {
        let mut node = &mut self.root;
        for level in filter.split('/') {
            if level == "#" {
                return node.below.push(number);
            }
            node = node.children.entry(level.into()).or_default();
        }
        node.here.push(number);
    }

    /// Takes a filter out, and the nodes that only it needed.
    pub(super) fn remove(&mut self, filter: &str, number: usize) {
        prune(&mut self.root, filter, number);
    }

    /// Puts the numbers of all filters that a topic matches into `matched`, each once.
    pub(super) fn matches(&self, topic: &str, matched: &mut Vec<usize>) {
        matched.clear();
        // [MQTT-4.7.2-1]
        walk(&self.root, Some(topic), !topic.starts_with('$'), matched);
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.root.is_empty()
    }
}

fn split(levels: &str) -> (&str, Option<&str>) {
    match levels.split_once('/') {
        Some((level, rest)) => (level, Some(rest)),
        None => (levels, None),
    }
}

fn prune(node: &mut Node, filter: &str, number: usize) {
    let (level, rest) = split(filter);
    if level == "#" {
        return node.below.retain(|other| *other != number);
    }
    let Some(child) = node.children.get_mut(level) else { return };
    match rest {
        Some(rest) => prune(child, rest, number),
        None => child.here.retain(|other| *other != number),
    }
    if child.is_empty() {
        node.children.remove(level);
    }
}

/// Visits every node at most once: each is reached over one path only.
fn walk(node: &Node, topic: Option<&str>, wildcards: bool, matched: &mut Vec<usize>) {
    if wildcards {
        // `a/#` matches `a` itself too (4.7.1.2).
        matched.extend(&node.below);
    }
    let Some(topic) = topic else {
        return matched.extend(&node.here);
    };
    let (level, rest) = split(topic);
    if let Some(child) = node.children.get(level) {
        walk(child, rest, true, matched);
    }
    if wildcards && let Some(child) = node.children.get("+") {
        walk(child, rest, true, matched);
    }
}
