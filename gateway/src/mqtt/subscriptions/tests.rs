use bytes::Bytes;
use proptest::prelude::*;
use storage::Event;

use super::*;

const PLAIN: Options = Options { qos: 0, no_local: false, retain_as_published: false, id: None };

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

fn reader(number: u64) -> Reader {
    let client_id = ByteString::from(format!("client-{number}"));
    Reader::Connection { number, slot: number as usize, client_id }
}

fn event(topic: &str, offset: u64, attributes: Vec<Attribute<'_>>) -> StoredEvent {
    StoredEvent {
        offset,
        seq: 0,
        event: Event {
            partition: 0,
            received_us: 0,
            device_key: "dev".into(),
            topic: topic.into(),
            attributes: Attributes::encode(attributes),
            payload: Bytes::new(),
        },
        stamp: None,
    }
}

/// Who gets an event, by slot, and how.
fn addressed(table: &mut Subscriptions, event: &StoredEvent) -> Vec<(usize, Manner)> {
    let mut all = Vec::new();
    table.address(event, |reader, manner| match reader {
        Reader::Connection { slot, .. } => all.push((*slot, manner)),
        Reader::Session(_) => unreachable!("no session subscribes here"),
    });
    all
}

fn matched(table: &mut Subscriptions, topic: &str) -> Vec<String> {
    table.has_any(topic);
    let matched = &table.matched;
    let texts = table.by_text.iter().filter(|(_, at)| matched.contains(at));
    let mut filters: Vec<_> = texts.map(|(text, _)| text.to_string()).collect();
    assert_eq!(filters.len(), matched.len(), "each once");
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

fn options() -> impl Strategy<Value = Options> {
    (0u8..3, any::<bool>(), any::<bool>(), prop::option::of(1u32..4)).prop_map(
        |(qos, no_local, retain_as_published, id)| Options {
            qos,
            no_local,
            retain_as_published,
            id,
        },
    )
}

proptest! {
    #[test]
    fn the_trie_matches_as_the_book_says(
        filters in prop::collection::btree_set(filter(), 0..12),
        gone in prop::collection::vec(any::<bool>(), 12),
        topics in prop::collection::vec(topic(), 1..12),
    ) {
        let mut table = Subscriptions::default();
        let mut left = Vec::new();
        for filter in &filters {
            table.subscribe(filter, &reader(1), PLAIN, 0).unwrap();
        }
        for (filter, gone) in filters.iter().zip(&gone) {
            if *gone {
                table.unsubscribe(filter, &reader(1));
            } else {
                left.push(filter.clone());
            }
        }
        for topic in &topics {
            let expected: Vec<_> =
                left.iter().filter(|f| matches_by_the_book(f, topic)).cloned().collect();
            prop_assert_eq!(matched(&mut table, topic), expected, "topic {}", topic);
        }
        for filter in &filters {
            table.unsubscribe(filter, &reader(1));
        }
        prop_assert!(table.is_empty() && table.trie.is_empty());
    }

    /// Against a model that asks every subscription of every client by itself.
    #[test]
    fn each_client_gets_a_message_once_for_all_of_its_subscriptions(
        asked in prop::collection::btree_map((filter(), 0u64..3), options(), 0..16),
        topic in topic(),
        qos in 0u8..3,
        retain in any::<bool>(),
        publisher in 0u64..3,
    ) {
        let mut table = Subscriptions::default();
        for ((filter, client), options) in &asked {
            table.subscribe(filter, &reader(*client), *options, 0).unwrap();
        }
        let publisher_id = format!("client-{publisher}");
        let mut attributes =
            vec![Attribute::QoS(qos), Attribute::Unknown(PUBLISHER, publisher_id.as_bytes())];
        attributes.extend(retain.then_some(Attribute::Retain));
        let mut got = addressed(&mut table, &event(&topic, 0, attributes));
        got.sort_by_key(|(slot, _)| *slot);
        for (_, manner) in &mut got {
            manner.ids.sort_unstable();
        }
        let mut expected = Vec::new();
        for client in 0..3 {
            let of_client = |((filter, other), options): (&(String, u64), &Options)| {
                let matches = *other == client
                    && matches_by_the_book(filter, &topic)
                    && !(options.no_local && client == publisher);
                matches.then_some(*options)
            };
            let all: Vec<Options> = asked.iter().filter_map(of_client).collect();
            let Some(granted) = all.iter().map(|options| options.qos).max() else { continue };
            let mut ids: Vec<u32> = all.iter().filter_map(|options| options.id).collect();
            ids.sort_unstable();
            let kept = all.iter().any(|options| options.retain_as_published);
            let manner = Manner { qos: granted.min(qos), retain: retain && kept, ids };
            expected.push((client as usize, manner));
        }
        prop_assert_eq!(got, expected);
    }
}

#[test]
fn a_leading_wildcard_does_not_match_a_dollar_topic_mqtt_4_7_2_1() {
    let mut table = Subscriptions::default();
    for filter in ["#", "+/x", "$dev/#", "$dev/+"] {
        table.subscribe(filter, &reader(1), PLAIN, 0).unwrap();
    }
    assert_eq!(matched(&mut table, "$dev/x"), ["$dev/#", "$dev/+"]);
    assert_eq!(matched(&mut table, "dev/x"), ["#", "+/x"]);
}

#[test]
fn a_filter_stays_until_its_last_subscriber_goes() {
    let mut table = Subscriptions::default();
    table.subscribe("a/+", &reader(1), PLAIN, 0).unwrap();
    table.subscribe("a/+", &reader(2), PLAIN, 0).unwrap();
    table.unsubscribe("a/+", &reader(1));
    assert_eq!(matched(&mut table, "a/b"), ["a/+"]);
    table.unsubscribe("a/+", &reader(2));
    assert!(table.is_empty());
}

#[test]
fn a_filter_that_is_too_deep_is_refused() {
    let mut table = Subscriptions::default();
    let deep = "/".repeat(FILTER_LEVELS_MAX);
    assert_eq!(table.subscribe(&deep, &reader(1), PLAIN, 0), Err(Full));
    assert!(table.is_empty());
    let filter = "+/".repeat(FILTER_LEVELS_MAX - 1);
    table.subscribe(&filter, &reader(1), PLAIN, 0).unwrap();
    assert!(!table.has_any(&"/".repeat(60_000)));
}

#[test]
fn what_was_published_before_a_subscription_is_not_for_it() {
    let mut table = Subscriptions::default();
    table.subscribe("a", &reader(1), PLAIN, 5).unwrap();
    table.subscribe("#", &reader(1), Options { id: Some(1), ..PLAIN }, 7).unwrap();
    let ids = |table: &mut Subscriptions, offset| {
        addressed(table, &event("a", offset, vec![])).into_iter().map(|(_, manner)| manner.ids)
    };
    assert_eq!(ids(&mut table, 4).count(), 0);
    assert_eq!(ids(&mut table, 5).collect::<Vec<_>>(), [Vec::<u32>::new()]);
    assert_eq!(ids(&mut table, 7).collect::<Vec<_>>(), [vec![1]]);
    assert_eq!(table.subscribe("a", &reader(1), PLAIN, 9), Ok(5), "that of the first time");
}

#[test]
fn the_members_of_a_group_take_turns_mqtt_4_8_2() {
    let mut table = Subscriptions::default();
    for member in 1..=3 {
        table.subscribe("$share/g/a/+", &reader(member), PLAIN, 0).unwrap();
    }
    let slots = |table: &mut Subscriptions| {
        let mut slots: Vec<_> =
            addressed(table, &event("a/b", 0, vec![])).into_iter().map(|(slot, _)| slot).collect();
        slots.sort_unstable();
        slots
    };
    let chosen: Vec<_> = (0..6).map(|_| slots(&mut table)).collect();
    assert_eq!(chosen, [[1], [2], [3], [1], [2], [3]]);
    // Another group, and a subscription of its own: a copy for each.
    table.subscribe("$share/other/a/#", &reader(4), PLAIN, 0).unwrap();
    table.subscribe("a/b", &reader(4), PLAIN, 0).unwrap();
    assert_eq!(slots(&mut table), [1, 4, 4]);
    // Who joined after a message leaves it to the others.
    table.subscribe("$share/g/a/+", &reader(5), PLAIN, 1).unwrap();
    table.unsubscribe("$share/g/a/+", &reader(2));
    assert_eq!(slots(&mut table), [3, 4, 4]);
    assert_eq!(slots(&mut table), [1, 4, 4]);
    for (text, member) in [("$share/g/a/+", 1), ("$share/g/a/+", 3), ("$share/g/a/+", 5)] {
        table.unsubscribe(text, &reader(member));
    }
    table.unsubscribe("$share/other/a/#", &reader(4));
    table.unsubscribe("a/b", &reader(4));
    assert!(table.is_empty() && table.trie.is_empty());
}
