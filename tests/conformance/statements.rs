//! Every normative statement of both versions, whom it binds, and that a test shows it.
//!
//! A test shows a statement when its name begins with the number, or when the statement stands in its
//! text, like `[MQTT-3.1.2-8]`: beside what shows it. Numbers are those of MQTT 5; those of 3.1.1 end
//! with `of 3.1.1` where that version alone is meant. A test shows it for each version that its text
//! runs: `V5`, `V311` or `BOTH`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use Whose::{As, Client, Server, Unseen};

/// Whom a statement binds.
#[derive(Clone, Copy, Debug)]
enum Whose {
    /// The server, or a client whom the server judges by it.
    Server,
    /// As the statement of MQTT 5 with this number, which 3.1.1 shares.
    As(&'static str),
    /// The client, and a server cannot tell.
    Client,
    /// The server; nothing of it is to be seen on the wire of this one.
    Unseen(&'static str),
}

/// Section, its statements, whom they bind.
type Statements = (&'static str, RangeInclusive<u8>, Whose);

const NO_PROPERTY: &str = "no such acknowledgement of this server has a property";
const OWN_PROPERTY: &str = "this server sends no user property of its own";
const SUPPORTED: &str = "for a server without it: this one has QoS 2, retained messages, wildcards";
const NO_METHOD: &str = "no authentication method is supported, so that no exchange begins";

/// Appendix B of MQTT 5.
const MQTT_5: &[Statements] = &[
    ("1.5.4", 1..=3, Server),
    ("1.5.5", 1..=1, Server),
    ("1.5.7", 1..=1, Server),
    ("2.1.3", 1..=1, Server),
    ("2.2.1", 2..=6, Server),
    ("2.2.2", 1..=1, Server),
    ("3.1.0", 1..=2, Server),
    ("3.1.2", 1..=19, Server),
    ("3.1.2", 20..=20, Client),
    ("3.1.2", 21..=29, Server),
    ("3.1.2", 30..=30, Client),
    ("3.1.3", 1..=12, Server),
    ("3.1.4", 1..=6, Server),
    ("3.2.0", 1..=2, Server),
    ("3.2.2", 1..=3, Server),
    ("3.2.2", 4..=5, Client),
    ("3.2.2", 6..=8, Server),
    ("3.2.2", 9..=10, Unseen(SUPPORTED)),
    ("3.2.2", 11..=11, Client),
    ("3.2.2", 12..=13, Unseen(SUPPORTED)),
    ("3.2.2", 14..=14, Client),
    ("3.2.2", 15..=17, Server),
    ("3.2.2", 18..=18, Client),
    ("3.2.2", 19..=19, Server),
    ("3.2.2", 20..=20, Unseen(OWN_PROPERTY)),
    ("3.2.2", 21..=21, Client),
    ("3.2.2", 22..=22, Server),
    ("3.3.1", 1..=13, Server),
    ("3.3.2", 1..=9, Server),
    ("3.3.2", 10..=10, Client),
    ("3.3.2", 11..=20, Server),
    ("3.3.4", 1..=7, Server),
    ("3.3.4", 8..=8, Client),
    ("3.3.4", 9..=10, Server),
    ("3.4.2", 1..=2, Server),
    ("3.4.2", 3..=3, Unseen(OWN_PROPERTY)),
    ("3.5.2", 1..=2, Server),
    ("3.5.2", 3..=3, Unseen(OWN_PROPERTY)),
    ("3.6.1", 1..=1, Server),
    ("3.6.2", 1..=1, Server),
    ("3.6.2", 2..=3, Unseen(NO_PROPERTY)),
    ("3.7.2", 1..=1, Server),
    ("3.7.2", 2..=3, Unseen(NO_PROPERTY)),
    ("3.8.1", 1..=1, Server),
    ("3.8.3", 1..=5, Server),
    ("3.8.4", 1..=8, Server),
    ("3.9.2", 1..=2, Unseen(NO_PROPERTY)),
    ("3.9.3", 1..=2, Server),
    ("3.10.1", 1..=1, Server),
    ("3.10.3", 1..=2, Server),
    ("3.10.4", 1..=6, Server),
    ("3.11.2", 1..=2, Unseen(NO_PROPERTY)),
    ("3.11.3", 1..=2, Server),
    ("3.12.4", 1..=1, Server),
    ("3.14.0", 1..=1, Server),
    ("3.14.1", 1..=1, Server),
    ("3.14.2", 1..=3, Server),
    ("3.14.2", 4..=4, Unseen(OWN_PROPERTY)),
    ("3.14.4", 1..=3, Server),
    ("3.15.1", 1..=1, Server),
    ("3.15.2", 1..=3, Unseen(NO_METHOD)),
    ("4.1.0", 1..=2, Server),
    ("4.2", 1..=1, Server),
    ("4.3.1", 1..=1, Server),
    ("4.3.2", 1..=5, Server),
    ("4.3.3", 1..=13, Server),
    ("4.4.0", 1..=2, Server),
    ("4.5.0", 1..=1, Server),
    ("4.5.0", 2..=2, Client),
    // Said of the client; this server keeps to it as well.
    ("4.6.0", 1..=4, Server),
    ("4.6.0", 5..=6, Server),
    ("4.7.0", 1..=1, Server),
    ("4.7.1", 1..=2, Server),
    ("4.7.2", 1..=1, Server),
    ("4.7.3", 1..=4, Server),
    ("4.8.2", 1..=6, Server),
    ("4.9.0", 1..=3, Server),
    ("4.12.0", 1..=1, Server),
    ("4.12.0", 2..=5, Unseen(NO_METHOD)),
    ("4.12.0", 6..=7, Server),
    ("4.12.1", 1..=1, Client),
    ("4.12.1", 2..=2, Unseen(NO_METHOD)),
    ("4.13.1", 1..=1, Server),
    ("4.13.2", 1..=1, Server),
    ("6.0.0", 1..=4, Server),
];

/// Appendix B of MQTT 3.1.1.
const MQTT_3_1_1: &[Statements] = &[
    ("1.5.3", 1..=1, As("1.5.4-1")),
    ("1.5.3", 2..=2, As("1.5.4-2")),
    ("1.5.3", 3..=3, As("1.5.4-3")),
    ("2.2.2", 1..=2, As("2.1.3-1")),
    ("2.3.1", 1..=1, As("2.2.1-3")),
    ("2.3.1", 2..=3, Client),
    ("2.3.1", 4..=4, As("2.2.1-4")),
    ("2.3.1", 5..=5, As("2.2.1-2")),
    ("2.3.1", 6..=6, As("2.2.1-5")),
    ("2.3.1", 7..=7, As("2.2.1-6")),
    ("3.1.0", 1..=1, As("3.1.0-1")),
    ("3.1.0", 2..=2, As("3.1.0-2")),
    ("3.1.2", 1..=1, As("3.1.2-1")),
    ("3.1.2", 2..=2, As("3.1.2-2")),
    ("3.1.2", 3..=3, As("3.1.2-3")),
    ("3.1.2", 4..=4, As("3.1.2-5")),
    ("3.1.2", 5..=5, As("4.5.0-1")),
    ("3.1.2", 6..=6, As("3.1.2-4")),
    ("3.1.2", 7..=7, Server),
    ("3.1.2", 8..=8, As("3.1.2-8")),
    ("3.1.2", 9..=9, As("3.1.2-9")),
    ("3.1.2", 10..=10, As("3.1.2-10")),
    ("3.1.2", 11..=11, As("3.1.2-11")),
    ("3.1.2", 12..=12, Server),
    ("3.1.2", 13..=13, As("3.1.2-11")),
    ("3.1.2", 14..=14, As("3.1.2-12")),
    ("3.1.2", 15..=15, As("3.1.2-13")),
    ("3.1.2", 16..=16, As("3.1.2-14")),
    ("3.1.2", 17..=17, As("3.1.2-15")),
    ("3.1.2", 18..=18, As("3.1.2-16")),
    ("3.1.2", 19..=19, As("3.1.2-17")),
    ("3.1.2", 20..=20, As("3.1.2-18")),
    ("3.1.2", 21..=21, As("3.1.2-19")),
    ("3.1.2", 22..=22, Server),
    ("3.1.2", 23..=23, Client),
    ("3.1.2", 24..=24, As("3.1.2-22")),
    ("3.1.3", 1..=1, As("3.1.3-1")),
    ("3.1.3", 2..=2, As("3.1.3-2")),
    ("3.1.3", 3..=3, As("3.1.3-3")),
    ("3.1.3", 4..=4, As("3.1.3-4")),
    ("3.1.3", 5..=5, As("3.1.3-5")),
    ("3.1.3", 6..=6, As("3.1.3-6")),
    ("3.1.3", 7..=8, Server),
    ("3.1.3", 9..=9, As("3.1.3-8")),
    ("3.1.3", 10..=10, As("3.1.3-11")),
    ("3.1.3", 11..=11, As("3.1.3-12")),
    ("3.1.4", 1..=1, As("3.1.4-1")),
    ("3.1.4", 2..=2, As("3.1.4-3")),
    ("3.1.4", 3..=3, As("3.1.4-4")),
    ("3.1.4", 4..=4, As("3.1.4-5")),
    ("3.1.4", 5..=5, As("3.1.4-6")),
    ("3.2.0", 1..=1, As("3.2.0-1")),
    ("3.2.2", 1..=1, As("3.2.2-2")),
    ("3.2.2", 2..=3, As("3.2.2-3")),
    ("3.2.2", 4..=4, As("3.2.2-6")),
    ("3.2.2", 5..=5, As("3.2.2-7")),
    ("3.2.2", 6..=6, Server),
    ("3.3.1", 1..=1, As("3.3.1-1")),
    ("3.3.1", 2..=2, As("3.3.1-2")),
    ("3.3.1", 3..=3, As("3.3.1-3")),
    ("3.3.1", 4..=4, As("3.3.1-4")),
    ("3.3.1", 5..=5, As("3.3.1-5")),
    ("3.3.1", 6..=6, As("3.3.1-9")),
    ("3.3.1", 7..=7, As("3.3.1-5")),
    ("3.3.1", 8..=9, Server),
    ("3.3.1", 10..=10, As("3.3.1-6")),
    ("3.3.1", 11..=11, As("3.3.1-7")),
    ("3.3.1", 12..=12, As("3.3.1-8")),
    ("3.3.2", 1..=1, As("3.3.2-1")),
    ("3.3.2", 2..=2, As("3.3.2-2")),
    ("3.3.2", 3..=3, As("3.3.2-3")),
    ("3.3.4", 1..=1, As("3.3.4-1")),
    ("3.3.5", 1..=1, As("3.3.4-2")),
    ("3.3.5", 2..=2, Server),
    ("3.6.1", 1..=1, As("3.6.1-1")),
    ("3.8.1", 1..=1, As("3.8.1-1")),
    ("3.8.3", 1..=1, As("3.8.3-1")),
    ("3.8.3", 2..=2, Unseen(SUPPORTED)),
    ("3.8.3", 3..=3, As("3.8.3-2")),
    ("3.8.3", 4..=4, As("3.8.3-5")),
    ("3.8.4", 1..=1, As("3.8.4-1")),
    ("3.8.4", 2..=2, As("3.8.4-2")),
    ("3.8.4", 3..=3, As("3.8.4-3")),
    ("3.8.4", 4..=4, As("3.8.4-5")),
    ("3.8.4", 5..=5, As("3.8.4-6")),
    ("3.8.4", 6..=6, As("3.8.4-8")),
    ("3.9.3", 1..=1, As("3.9.3-1")),
    ("3.9.3", 2..=2, As("3.9.3-2")),
    ("3.10.1", 1..=1, As("3.10.1-1")),
    ("3.10.3", 1..=1, As("3.10.3-1")),
    ("3.10.3", 2..=2, As("3.10.3-2")),
    ("3.10.4", 1..=1, As("3.10.4-1")),
    ("3.10.4", 2..=2, As("3.10.4-2")),
    ("3.10.4", 3..=3, As("3.10.4-3")),
    ("3.10.4", 4..=4, As("3.10.4-4")),
    ("3.10.4", 5..=5, As("3.10.4-5")),
    ("3.10.4", 6..=6, As("3.10.4-6")),
    ("3.12.4", 1..=1, As("3.12.4-1")),
    ("3.14.1", 1..=1, As("3.14.1-1")),
    ("3.14.4", 1..=2, Client),
    ("3.14.4", 3..=3, As("3.14.4-3")),
    ("4.1.0", 1..=2, As("4.1.0-1")),
    ("4.3.1", 1..=1, As("4.3.1-1")),
    ("4.3.2", 1..=1, As("4.3.2-1")),
    ("4.3.2", 2..=2, As("4.3.2-5")),
    ("4.3.3", 1..=1, As("4.3.3-1")),
    ("4.3.3", 2..=2, As("4.3.3-10")),
    ("4.4.0", 1..=1, As("4.4.0-1")),
    ("4.5.0", 1..=1, As("4.5.0-1")),
    ("4.5.0", 2..=2, Client),
    ("4.6.0", 1..=1, As("4.6.0-1")),
    ("4.6.0", 2..=2, As("4.6.0-2")),
    ("4.6.0", 3..=3, As("4.6.0-3")),
    ("4.6.0", 4..=4, As("4.6.0-4")),
    ("4.6.0", 5..=5, As("4.6.0-6")),
    ("4.6.0", 6..=6, As("4.6.0-5")),
    ("4.7.1", 1..=1, As("4.7.0-1")),
    ("4.7.1", 2..=2, As("4.7.1-1")),
    ("4.7.1", 3..=3, As("4.7.1-2")),
    ("4.7.2", 1..=1, As("4.7.2-1")),
    ("4.7.3", 1..=1, As("4.7.3-1")),
    ("4.7.3", 2..=2, As("4.7.3-2")),
    ("4.7.3", 3..=3, As("4.7.3-3")),
    ("4.7.3", 4..=4, As("4.7.3-4")),
    ("4.8.0", 1..=1, As("4.13.1-1")),
    ("4.8.0", 2..=2, Unseen("no packet makes an error that passes; a full disk does: `bad_input`")),
    ("6.0.0", 1..=1, As("6.0.0-1")),
    ("6.0.0", 2..=2, As("6.0.0-2")),
    ("6.0.0", 3..=3, As("6.0.0-3")),
    ("6.0.0", 4..=4, As("6.0.0-4")),
    ("7.0.0", 1..=1, Unseen("its client side is the MQTT sink: `upstreams`")),
    (
        "7.0.0",
        2..=2,
        Unseen("no test of this target uses an extension, and so all of them show it"),
    ),
    ("7.1.1", 1..=1, As("4.2-1")),
    ("7.1.2", 1..=1, Client),
];

const SOURCES: [&str; 8] = [
    include_str!("connect.rs"),
    include_str!("hostile.rs"),
    include_str!("packets.rs"),
    include_str!("publish.rs"),
    include_str!("sessions.rs"),
    include_str!("subscribe.rs"),
    include_str!("websocket.rs"),
    include_str!("wills.rs"),
];

/// Behind the number of a statement of 3.1.1 that MQTT 5 does not share.
const OF_3_1_1: &str = " of 3.1.1";

/// What the tests of this target show, by version.
#[derive(Default)]
struct Shown {
    v5: BTreeSet<String>,
    v311: BTreeSet<String>,
}

impl Shown {
    /// Reads every test. Items end with a brace at the left margin.
    fn read() -> Self {
        let mut shown = Self::default();
        for item in SOURCES.iter().flat_map(|source| source.split("\n}\n")) {
            let Some((_, test)) = item.split_once("#[test]\nfn ") else { continue };
            let name = test.split('(').next().unwrap();
            let runs = |version: &str| {
                item.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == version)
            };
            for number in in_name(name).into_iter().chain(in_text(item)) {
                if let Some(number) = number.strip_suffix(OF_3_1_1) {
                    shown.v311.insert(format!("{number}{OF_3_1_1}"));
                    continue;
                }
                if runs("BOTH") || runs("V5") {
                    shown.v5.insert(number.clone());
                }
                if runs("BOTH") || runs("V311") {
                    shown.v311.insert(number);
                }
            }
        }
        shown
    }
}

/// Statements in a test's name: `mqtt_`, section and number; more of them behind `and` and `to`.
fn in_name(name: &str) -> Vec<String> {
    let mut words = name.split('_').skip(1).peekable();
    let mut numbers = |at_most: usize| {
        let mut numbers = Vec::new();
        while let Some(number) = words.peek().and_then(|word| word.parse::<u8>().ok()) {
            numbers.push(number);
            words.next();
        }
        assert!(numbers.len() <= at_most, "{name}: no statement has a number like this");
        (numbers, words.next_if(|word| ["and", "to", "of"].contains(word)))
    };
    let (mut first, mut link) = numbers(4);
    let mut found = Vec::new();
    let text = |n: &[u8]| format!("{}.{}.{}-{}", n[0], n[1], n[2], n[3]);
    if first.len() == 4 {
        found.push(text(&first));
        while let Some(word) = link {
            let (next, after) = numbers(4);
            match (word, &next[..]) {
                ("of", [3, 1, 1]) => found.iter_mut().for_each(|number| number.push_str(OF_3_1_1)),
                ("and", [n]) => found.push(text(&[first[0], first[1], first[2], *n])),
                ("to", [last]) => {
                    let range = first[3] + 1..=*last;
                    found.extend(range.map(|n| text(&[first[0], first[1], first[2], n])));
                }
                ("and", [_, _, _, _]) => found.push(text(&next)),
                _ => break,
            }
            first[3] = *next.last().unwrap();
            if next.len() == 4 {
                first = next;
            }
            link = after;
        }
    }
    found
}

/// Statements in a test's text.
fn in_text(text: &str) -> impl Iterator<Item = String> {
    let tags = text.split("[MQTT-").skip(1).filter_map(|rest| rest.split_once(']'));
    tags.map(|(number, _)| number.to_owned())
}

/// `SECTION-NUMBER` of each statement, and whom it binds.
fn each(version: &[Statements]) -> BTreeMap<String, Whose> {
    let mut each = BTreeMap::new();
    for (section, numbers, whose) in version {
        for number in numbers.clone() {
            let before = each.insert(format!("{section}-{number}"), *whose);
            assert!(before.is_none(), "{section}-{number} is there twice");
        }
    }
    each
}

#[test]
fn every_statement_that_binds_a_server_has_a_test() {
    let (v5, v311, shown) = (each(MQTT_5), each(MQTT_3_1_1), Shown::read());
    let mut missing = Vec::new();
    for (version, statements) in [("5", &v5), ("3.1.1", &v311)] {
        let (mut servers, mut clients, mut unseen) = (0, 0, 0);
        for (number, whose) in statements {
            let is_shown = match whose {
                Server if version == "5" => shown.v5.contains(number),
                Server => shown.v311.contains(&format!("{number}{OF_3_1_1}")),
                As(of_5) => {
                    assert!(v5.contains_key(*of_5), "{number}: MQTT 5 has no {of_5}");
                    shown.v311.contains(*of_5)
                }
                Client => {
                    clients += 1;
                    continue;
                }
                Unseen(why) => {
                    println!("MQTT {version} {number} is not tested: {why}");
                    unseen += 1;
                    continue;
                }
            };
            servers += 1;
            if !is_shown {
                missing.push(format!("MQTT {version} {number}"));
            }
        }
        let all = statements.len();
        println!(
            "MQTT {version}: {all} statements, {servers} tested, {unseen} not to be seen, {clients} of clients"
        );
    }
    assert!(missing.is_empty(), "no test shows {missing:#?}");
}

/// A number that nobody has given away would count for nothing.
#[test]
fn tests_name_statements_that_there_are() {
    let (v5, v311, shown) = (each(MQTT_5), each(MQTT_3_1_1), Shown::read());
    for number in shown.v5.union(&shown.v311) {
        match number.strip_suffix(OF_3_1_1) {
            Some(number) => assert!(v311.contains_key(number), "3.1.1 has no {number}"),
            None => assert!(v5.contains_key(number), "MQTT 5 has no {number}"),
        }
    }
}
