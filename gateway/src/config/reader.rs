//! Reads a TOML document key by key, collecting every problem instead of stopping at the first.
//!
//! Owns: [`Section`], a table that is being read, and [`Problem`], a mistake with its place.
//! Invariant: asking for a key makes it known; what nobody asked for is an unknown key, and its
//! message suggests the nearest known one. A value that is wrong yields its default, so that reading
//! goes on and the rest is checked too; [`Reader::finish`] then refuses the whole.
//! Deliberately absent: what the keys mean (see the parent module).

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::units;

/// Looks up an environment variable.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// One mistake in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// File it stands in.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Dotted key, empty for mistakes of syntax.
    pub key: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.file, self.line)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// One document that is being read.
pub(super) struct Reader<'a> {
    file: &'a str,
    text: &'a str,
    env: Env<'a>,
    problems: RefCell<Vec<Problem>>,
    /// Every key that was asked for, in dotted form without array indices.
    asked: RefCell<BTreeSet<String>>,
}

impl<'a> Reader<'a> {
    /// Starts reading. `file` names the document in messages.
    pub(super) fn new(file: &'a str, text: &'a str, env: Env<'a>) -> Self {
        Self { file, text, env, problems: RefCell::default(), asked: RefCell::default() }
    }

    /// Parses the document; mistakes of syntax become problems.
    pub(super) fn parse(&self) -> Spanned<DeTable<'a>> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            self.problem(error.span().unwrap_or(0..0), String::new(), error.message().to_owned());
        }
        table
    }

    /// The root as a section.
    pub(super) fn root<'s>(&'s self, table: &'s Spanned<DeTable<'a>>) -> Section<'s, 'a> {
        Section::new(self, String::new(), Some(table.get_ref()), table.span())
    }

    /// Every key that was asked for.
    pub(super) fn asked(&self) -> BTreeSet<String> {
        self.asked.borrow().clone()
    }

    /// Ends reading.
    ///
    /// # Errors
    /// Every problem found, in the order of the lines.
    pub(super) fn finish(self) -> Result<(), Vec<Problem>> {
        let mut problems = self.problems.into_inner();
        problems.sort_by_key(|p| p.line);
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    fn problem(&self, span: Range<usize>, key: String, message: String) {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = 1 + before.matches('\n').count();
        self.problems.borrow_mut().push(Problem { file: self.file.to_owned(), line, key, message });
    }
}

/// A table that is being read. Dropping it reports the keys that nobody asked for.
pub(super) struct Section<'s, 'a> {
    reader: &'s Reader<'a>,
    path: String,
    table: Option<&'s DeTable<'a>>,
    span: Range<usize>,
    known: RefCell<Vec<&'static str>>,
    open: Cell<bool>,
}

impl<'s, 'a> Section<'s, 'a> {
    fn new(
        reader: &'s Reader<'a>,
        path: String,
        table: Option<&'s DeTable<'a>>,
        span: Range<usize>,
    ) -> Self {
        Self { reader, path, table, span, known: RefCell::default(), open: Cell::new(false) }
    }

    /// Whether the key is in the document. Makes it known.
    pub(super) fn has(&self, key: &'static str) -> bool {
        self.get(key).is_some()
    }

    /// Reports a problem with a key, at its place if it is there, else at the table's.
    pub(super) fn problem(&self, key: &str, message: impl Into<String>) {
        let span = self.find(key).map_or(self.span.clone(), |(key, _)| key.span());
        self.reader.problem(span, self.path_of(key), message.into());
    }

    /// Reports that the key must be there.
    pub(super) fn missing(&self, key: &str, what: &str) {
        self.problem(key, format!("is missing; set it to {what}"));
    }

    /// A text, with `${NAME}` replaced from the environment.
    pub(super) fn string(&self, key: &'static str) -> Option<String> {
        let (name, value) = self.get(key)?;
        let Some(text) = value.get_ref().as_str() else {
            self.wrong_type(name, key, value, "a text in quotes");
            return None;
        };
        match interpolate(text, self.reader.env) {
            Ok(text) => Some(text),
            Err(message) => {
                self.problem(key, message);
                None
            }
        }
    }

    /// A list of texts, with `${NAME}` replaced from the environment; an absent one is empty.
    pub(super) fn strings(&self, key: &'static str) -> Vec<String> {
        let Some((name, value)) = self.get(key) else {
            return Vec::new();
        };
        let Some(array) = value.get_ref().as_array() else {
            self.wrong_type(name, key, value, "a list of texts, as in [\"a\", \"b\"]");
            return Vec::new();
        };
        let texts = array.iter().filter_map(|item| {
            let Some(text) = item.get_ref().as_str() else {
                self.wrong_type(name, key, item, "a list of texts in quotes");
                return None;
            };
            interpolate(text, self.reader.env).map_err(|message| self.problem(key, message)).ok()
        });
        texts.collect()
    }

    /// A text that must be there and must not be empty.
    pub(super) fn required(&self, key: &'static str, what: &str) -> String {
        if !self.has(key) {
            self.missing(key, what);
            return String::new();
        }
        match self.string(key) {
            Some(text) if text.is_empty() => {
                self.problem(key, format!("must not be empty; set it to {what}"));
                text
            }
            text => text.unwrap_or_default(),
        }
    }

    /// `true` or `false`.
    pub(super) fn boolean(&self, key: &'static str, default: bool) -> bool {
        let Some((name, value)) = self.get(key) else {
            return default;
        };
        value.get_ref().as_bool().unwrap_or_else(|| {
            self.wrong_type(name, key, value, "true or false");
            default
        })
    }

    /// A whole number within a range.
    pub(super) fn integer(
        &self,
        key: &'static str,
        range: RangeInclusive<u64>,
        default: u64,
    ) -> u64 {
        let form = format!("a whole number from {} to {}", range.start(), range.end());
        self.number(key, &form, range, default, |text| text.parse().ok())
    }

    /// A size in bytes within a range.
    pub(super) fn size(&self, key: &'static str, range: RangeInclusive<u64>, default: u64) -> u64 {
        let (low, high) = (units::size(*range.start()), units::size(*range.end()));
        let form = format!("{}, from {low} to {high}", units::SIZE_FORM);
        self.number(key, &form, range, default, units::parse_size)
    }

    /// A time within a range.
    pub(super) fn time(
        &self,
        key: &'static str,
        range: RangeInclusive<Duration>,
        default: Duration,
    ) -> Duration {
        let (low, high) = (units::time(*range.start()), units::time(*range.end()));
        let form = format!("{}, from {low} to {high}", units::TIME_FORM);
        let ms = |t: Duration| u64::try_from(t.as_millis()).unwrap_or(u64::MAX);
        let parse = |text: &str| units::parse_time(text).map(ms);
        let range = ms(*range.start())..=ms(*range.end());
        Duration::from_millis(self.number(key, &form, range, ms(default), parse))
    }

    fn number(
        &self,
        key: &'static str,
        form: &str,
        range: RangeInclusive<u64>,
        default: u64,
        parse: impl Fn(&str) -> Option<u64>,
    ) -> u64 {
        let Some((_, value)) = self.get(key) else {
            return default;
        };
        let number = match value.get_ref() {
            DeValue::Integer(n) => u64::from_str_radix(n.as_str(), n.radix()).ok(),
            DeValue::String(_) => self.string(key).and_then(|text| parse(&text)),
            _ => None,
        };
        match number {
            Some(n) if range.contains(&n) => n,
            _ => {
                self.problem(key, format!("must be {form}, not {}", written(value)));
                default
            }
        }
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(
        &self,
        key: &'static str,
        choices: &[(&str, T)],
        default: T,
    ) -> T {
        let Some((_, value)) = self.get(key) else {
            return default;
        };
        let text = self.string(key);
        if let Some((_, choice)) = choices.iter().find(|(name, _)| Some(*name) == text.as_deref()) {
            return *choice;
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let nearest = text.as_deref().and_then(|text| nearest(text, &names));
        let hint = nearest.map_or(String::new(), |n| format!("; did you mean {n:?}?"));
        let names: Vec<String> = names.iter().map(|n| format!("{n:?}")).collect();
        self.problem(key, format!("must be {}, not {}{hint}", names.join(" or "), written(value)));
        default
    }

    /// A table below this one; an absent one reads as empty.
    pub(super) fn section(&self, key: &'static str) -> Section<'s, 'a> {
        let (table, span) = match self.get(key) {
            None => (None, self.span.clone()),
            Some((name, value)) => match value.get_ref().as_table() {
                Some(table) => (Some(table), name.span()),
                None => {
                    self.wrong_type(name, key, value, &format!("a table: [{}]", self.path_of(key)));
                    (None, name.span())
                }
            },
        };
        Section::new(self.reader, self.path_of(key), table, span)
    }

    /// The tables of an array of tables, `[[key]]`.
    pub(super) fn sections(&self, key: &'static str) -> Vec<Section<'s, 'a>> {
        let Some((name, value)) = self.get(key) else {
            return Vec::new();
        };
        let path = self.path_of(key);
        let Some(array) = value.get_ref().as_array() else {
            self.wrong_type(name, key, value, &format!("an array of tables: [[{path}]]"));
            return Vec::new();
        };
        let tables = array.iter().filter_map(|item| match item.get_ref().as_table() {
            Some(table) => Some(Section::new(self.reader, path.clone(), Some(table), item.span())),
            None => {
                self.wrong_type(name, key, item, &format!("a table: [[{path}]]"));
                None
            }
        });
        tables.collect()
    }

    /// A table that is not there, read for its defaults. Its keys are known all the same.
    pub(super) fn absent(&self, key: &'static str) -> Section<'s, 'a> {
        Section::new(self.reader, self.path_of(key), None, self.span.clone())
    }

    /// Says nothing of keys that nobody asked for: what they mean cannot be told.
    pub(super) fn ignore_rest(&self) {
        self.open.set(true);
    }

    /// The table's own pairs of key and text, for tables with free keys.
    pub(super) fn free_strings(&self) -> Vec<(String, String)> {
        self.open.set(true);
        let Some(table) = self.table else {
            return Vec::new();
        };
        let pairs = table.iter().filter_map(|(name, value)| {
            let key = name.get_ref().as_ref();
            let Some(text) = value.get_ref().as_str() else {
                self.wrong_type(name, key, value, "a text in quotes");
                return None;
            };
            match interpolate(text, self.reader.env) {
                Ok(text) => Some((key.to_owned(), text)),
                Err(message) => {
                    self.problem(key, message);
                    None
                }
            }
        });
        pairs.collect()
    }

    fn get(
        &self,
        key: &'static str,
    ) -> Option<(&'s Spanned<toml::de::DeString<'a>>, &'s Spanned<DeValue<'a>>)> {
        self.known.borrow_mut().push(key);
        self.reader.asked.borrow_mut().insert(self.path_of(key));
        self.find(key)
    }

    fn find(
        &self,
        key: &str,
    ) -> Option<(&'s Spanned<toml::de::DeString<'a>>, &'s Spanned<DeValue<'a>>)> {
        self.table?.iter().find(|(name, _)| name.get_ref() == key)
    }

    fn path_of(&self, key: &str) -> String {
        match (self.path.as_str(), key) {
            ("", key) => key.to_owned(),
            (path, "") => path.to_owned(),
            (path, key) => format!("{path}.{key}"),
        }
    }

    fn wrong_type(
        &self,
        name: &Spanned<toml::de::DeString<'a>>,
        key: &str,
        value: &Spanned<DeValue<'a>>,
        right: &str,
    ) {
        let message = format!("must be {right}, not {}", written(value));
        self.reader.problem(name.span(), self.path_of(key), message);
    }
}

impl Drop for Section<'_, '_> {
    fn drop(&mut self) {
        let (Some(table), false) = (self.table, self.open.get()) else {
            return;
        };
        let known = self.known.borrow();
        for (name, _) in table.iter().filter(|(name, _)| !known.contains(&name.get_ref().as_ref()))
        {
            let message = match nearest(name.get_ref(), &known) {
                Some(nearest) => format!("unknown key; did you mean {nearest:?}?"),
                None => {
                    let mut known = known.clone();
                    known.sort_unstable();
                    known.dedup();
                    format!("unknown key; known here: {}", known.join(", "))
                }
            };
            self.reader.problem(name.span(), self.path_of(name.get_ref()), message);
        }
    }
}

/// The known word that the given one was most likely meant to be.
fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let score = |k: &&&str| strsim::jaro_winkler(word, k);
    let best = known.iter().max_by(|a, b| score(a).total_cmp(&score(b)))?;
    (strsim::jaro_winkler(word, best) > 0.8).then_some(*best)
}

/// A value as it stands in the document, for messages.
fn written(value: &Spanned<DeValue<'_>>) -> String {
    match value.get_ref() {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(n) => n.to_string(),
        DeValue::Float(n) => n.to_string(),
        DeValue::Boolean(b) => b.to_string(),
        DeValue::Datetime(t) => t.to_string(),
        DeValue::Array(_) => "an array".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

/// Replaces `${NAME}`; `$$` is a dollar sign.
fn interpolate(text: &str, env: Env<'_>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(after) = rest.strip_prefix('{') {
            let Some((name, after)) = after.split_once('}') else {
                return Err("has a ${ without its }; write $$ for a dollar sign".to_owned());
            };
            let Some(value) = env(name) else {
                return Err(format!("names the environment variable {name}, which is not set"));
            };
            out.push_str(&value);
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str, read: impl Fn(&Section<'_, '_>)) -> Vec<String> {
        let env = |name: &str| (name == "HOME_PORT").then(|| "1883".to_owned());
        let reader = Reader::new("t.toml", text, &env);
        let table = reader.parse();
        read(&reader.root(&table));
        drop(table);
        match reader.finish() {
            Ok(()) => Vec::new(),
            Err(problems) => problems.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn every_problem_is_reported_with_its_line_and_remedy() {
        let text =
            "[ingest]\npartitons = 4\nring = \"x\"\nrate = 99\nwait = \"soon\"\nbig = \"1GiB\"\n";
        let found = problems(text, |root| {
            let s = root.section("ingest");
            assert_eq!(s.integer("partitions", 1..=1024, 16), 16);
            assert_eq!(s.integer("ring", 1..=8, 7), 7);
            assert_eq!(s.integer("rate", 1..=8, 7), 7);
            assert_eq!(s.size("big", 0..=4096, 9), 9);
            let soon = Duration::from_secs(1);
            assert_eq!(s.time("wait", Duration::ZERO..=soon, soon), soon);
        });
        assert_eq!(
            found,
            [
                "t.toml:2: ingest.partitons: unknown key; did you mean \"partitions\"?",
                "t.toml:3: ingest.ring: must be a whole number from 1 to 8, not \"x\"",
                "t.toml:4: ingest.rate: must be a whole number from 1 to 8, not 99",
                "t.toml:5: ingest.wait: must be a time such as \"250ms\", \"30s\", \"5m\", \"1h\", \
                 \"7d\" or a number of milliseconds, from 0ms to 1s, not \"soon\"",
                "t.toml:6: ingest.big: must be a size such as \"512MiB\", \"8GB\" or a number of \
                 bytes, from 0B to 4KiB, not \"1GiB\"",
            ]
        );
    }

    #[test]
    fn a_mistake_of_syntax_is_a_problem_with_its_line() {
        let found = problems("a = 1\nb = \n", |root| {
            root.integer("a", 0..=9, 0);
            root.integer("b", 0..=9, 0);
        });
        assert!(found[0].starts_with("t.toml:2: "), "{found:?}");
    }

    #[test]
    fn the_environment_is_read_in_values() {
        assert!(
            problems("a = \"127.0.0.1:${HOME_PORT}\"\nb = \"$$1\"", |root| {
                assert_eq!(root.string("a").as_deref(), Some("127.0.0.1:1883"));
                assert_eq!(root.string("b").as_deref(), Some("$1"));
            })
            .is_empty()
        );
        let found = problems("a = \"${NOPE}\"\nb = \"${open\"", |root| {
            root.string("a");
            root.string("b");
        });
        assert_eq!(found.len(), 2);
        assert!(found[0].contains("NOPE"), "{found:?}");
    }

    #[test]
    fn a_wrong_word_names_the_right_ones() {
        let found = problems("mode = \"hodl\"", |root| {
            assert_eq!(root.choice("mode", &[("hold", 1), ("refuse", 2)], 1), 1);
        });
        assert_eq!(
            found,
            [
                "t.toml:1: mode: must be \"hold\" or \"refuse\", not \"hodl\"; did you mean \"hold\"?"
            ]
        );
    }

    #[test]
    fn a_table_in_the_wrong_shape_is_named() {
        let found = problems("[listener]\nbind = \"x\"", |root| {
            assert!(root.sections("listener").is_empty());
        });
        assert_eq!(
            found,
            ["t.toml:1: listener: must be an array of tables: [[listener]], not a table"]
        );
    }
}
