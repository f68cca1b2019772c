//! Where an event's own id stands, by which a resend is told from a new event.
//!
//! Owns: the syntax of `route.event_id` ([`EventIdFrom`]) and taking the id out of an event, as a hash
//! of 128 bits. Of a payload it reads as much as it must to find the field, without building a tree.
//! Invariant: it looks at the event alone, so that what was stored gives the same id again after a
//! restart.
//! Deliberately absent: which ids were seen (see `dedup`).

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use storage::{Attribute, Event};
use twox_hash::XxHash3_128;

/// Where the id of an event stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventIdFrom {
    /// A user property of the publish, of this name (MQTT 5).
    Property(String),
    /// A field of the payload, which is JSON.
    Json(Pointer),
}

/// A JSON pointer (RFC 6901): the names on the way to a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pointer(Vec<String>);

impl EventIdFrom {
    /// Reads `route.event_id`.
    ///
    /// # Errors
    /// What would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(name) = text.strip_prefix("property:").filter(|name| !name.is_empty()) {
            return Ok(Self::Property(name.to_owned()));
        }
        text.strip_prefix("json:").and_then(Pointer::parse).map(Self::Json).ok_or_else(|| {
            format!(
                "must be \"property:NAME\", a user property (MQTT 5), or \"json:/POINTER\", a field \
                 of the payload (RFC 6901; ~0 stands for '~' and ~1 for '/'), not {text:?}"
            )
        })
    }

    /// A hash of the event's id; nothing if it has none there. A text must not be empty, and a number
    /// must be an integer of 64 bits: of others two could look alike.
    pub fn of(&self, event: &Event) -> Option<u128> {
        match self {
            Self::Property(name) => event.attributes.iter().find_map(|attribute| match attribute {
                Attribute::UserProperty(n, value) if n == name => text(value),
                _ => None,
            }),
            Self::Json(Pointer(names)) => {
                let mut json = serde_json::Deserializer::from_slice(&event.payload);
                let found = At(names).deserialize(&mut json).ok()?;
                // What follows shows whether it is JSON at all.
                json.end().ok().and(found)
            }
        }
    }
}

fn text(id: &str) -> Option<u128> {
    (!id.is_empty()).then(|| XxHash3_128::oneshot(id.as_bytes()))
}

/// Of 9 bytes, which the texts `1` and `-1` are not.
fn number(id: i128) -> u128 {
    XxHash3_128::oneshot(&id.to_le_bytes()[..9])
}

impl Pointer {
    fn parse(text: &str) -> Option<Self> {
        // The whole document is no id.
        let names = text.strip_prefix('/')?.split('/');
        names.map(unescaped).collect::<Option<_>>().map(Self)
    }
}

fn unescaped(name: &str) -> Option<String> {
    let mut parts = name.split('~');
    let mut out = parts.next()?.to_owned();
    for part in parts {
        let rest = part.strip_prefix('0').map(|rest| ('~', rest));
        let (stands_for, rest) = rest.or_else(|| Some(('/', part.strip_prefix('1')?)))?;
        out.push(stands_for);
        out.push_str(rest);
    }
    Some(out)
}

/// What is found at the end of these names.
struct At<'a>(&'a [String]);

impl<'de> DeserializeSeed<'de> for At<'_> {
    type Value = Option<u128>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for At<'_> {
    type Value = Option<u128>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let Some((name, rest)) = self.0.split_first() else {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(None);
        };
        let mut found = None;
        // The last of a name that stands there twice, as most readers take it.
        while let Some(is_it) = map.next_key_seed(Named(name))? {
            if is_it {
                found = map.next_value_seed(At(rest))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let (index, rest) = match self.0.split_first() {
            Some((name, rest)) => (index(name), rest),
            None => (None, &[][..]),
        };
        let mut found = None;
        for at in 0.. {
            if index == Some(at) {
                let Some(element) = seq.next_element_seed(At(rest))? else { break };
                found = element;
            } else if seq.next_element::<IgnoredAny>()?.is_none() {
                break;
            }
        }
        Ok(found)
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(if self.0.is_empty() { text(value) } else { None })
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(self.0.is_empty().then(|| number(value.into())))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(self.0.is_empty().then(|| number(value.into())))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

/// RFC 6901, 4: no leading zeros, and no sign.
fn index(name: &str) -> Option<usize> {
    let plain = name == "0" || !name.starts_with('0') && name.bytes().all(|b| b.is_ascii_digit());
    name.parse().ok().filter(|_| plain)
}

/// Whether a key is this name.
struct Named<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Named<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, key: D) -> Result<bool, D::Error> {
        key.deserialize_str(self)
    }
}

impl Visitor<'_> for Named<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<bool, E> {
        Ok(key == self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;
    use storage::Attributes;

    use super::*;

    fn event(payload: &[u8], properties: &[(&str, &str)]) -> Event {
        let properties = properties.iter().map(|(n, v)| Attribute::UserProperty(n, v));
        Event {
            partition: 0,
            received_us: 0,
            device_key: "d".into(),
            topic: "t".into(),
            attributes: Attributes::encode(properties),
            payload: payload.to_vec().into(),
        }
    }

    fn of(from: &str, payload: &str) -> Option<u128> {
        EventIdFrom::parse(from).expect("a place").of(&event(payload.as_bytes(), &[]))
    }

    #[test]
    fn a_place_is_a_property_or_a_pointer() {
        let json = |names: &[&str]| {
            EventIdFrom::Json(Pointer(names.iter().map(|&name| name.to_owned()).collect()))
        };
        for (text, place) in [
            ("property:id", EventIdFrom::Property("id".into())),
            ("json:/id", json(&["id"])),
            ("json:/", json(&[""])),
            ("json:/a/0/~1~0~01", json(&["a", "0", "/~~1"])),
        ] {
            assert_eq!(EventIdFrom::parse(text), Ok(place), "{text}");
        }
        for wrong in ["", "id", "property:", "json:", "json:id", "json:/a~", "json:/a~2", "JSON:/a"]
        {
            let error = EventIdFrom::parse(wrong).expect_err(wrong);
            assert!(error.contains("json:/POINTER"), "{error}");
        }
    }

    #[test]
    fn the_first_property_of_the_name_is_the_id() {
        let place = EventIdFrom::parse("property:id").expect("a place");
        let id = |properties: &[(&str, &str)]| place.of(&event(b"", properties));
        assert_eq!(id(&[("ID", "0"), ("id", "a"), ("id", "b")]), text("a"));
        assert_eq!(id(&[("id", "")]), None);
        assert_eq!(id(&[]), None);
    }

    #[test]
    fn a_field_is_found_where_the_pointer_says() {
        let payload = r#"{"v": [1.5, {"b": {"id": "x"}, "id": 7}], "id": "\u0041", "/~": "s"}"#;
        for (from, id) in [
            ("json:/id", text("A")),
            ("json:/v/1/id", Some(number(7))),
            ("json:/v/1/b/id", text("x")),
            ("json:/~1~0", text("s")),
            ("json:/v/01/id", None),
            ("json:/v/+1/id", None),
            ("json:/v/-", None),
            ("json:/v/2", None),
            ("json:/v/0", None),
            ("json:/v", None),
            ("json:/v/1/b", None),
            ("json:/v/1/b/id/id", None),
            ("json:/ID", None),
        ] {
            assert_eq!(of(from, payload), id, "{from}");
        }
        assert_eq!(of("json:/0", r#"["a"]"#), text("a"));
        assert_eq!(of("json:/id", r#"{"id": "a", "id": "b"}"#), text("b"));
    }

    #[test]
    fn what_could_be_mistaken_for_another_is_no_id() {
        for payload in [
            "",
            "no JSON",
            r#"{"id": "a""#,
            r#"{"id": "a"} x"#,
            r#"{"id": ""}"#,
            r#"{"id": 1.0}"#,
            r#"{"id": 18446744073709551616}"#,
            r#"{"id": null}"#,
            r#"{"id": true}"#,
        ] {
            assert_eq!(of("json:/id", payload), None, "{payload}");
        }
        let ids = ["1", "-1", "\"1\"", "\"-1\"", "18446744073709551615", "9223372036854775807"];
        let mut hashes: Vec<_> = ids
            .iter()
            .map(|id| of("json:/id", &format!("{{\"id\":{id}}}")).expect("an id"))
            .collect();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), ids.len());
    }

    proptest! {
        /// What serde_json's own pointer finds in a tree is found without one.
        #[test]
        fn it_finds_what_a_tree_would(
            json in prop_oneof![
                Just(r#"{"a":{"b":"c","0":[["d"],2]},"":{"":"e"},"x~":{"y/":3}}"#),
                Just(r#"[["a",{"b":[]}],-5,"f"]"#),
            ],
            pointer in "(/(a|b|0|1||x~0|y~1)){1,4}",
        ) {
            let tree: Value = serde_json::from_str(json).expect("JSON");
            let expected = match tree.pointer(&pointer) {
                Some(Value::String(id)) => text(id),
                Some(Value::Number(id)) => id.as_i64().map(|id| number(id.into())),
                _ => None,
            };
            prop_assert_eq!(of(&format!("json:{pointer}"), json), expected);
        }

        #[test]
        fn no_payload_makes_it_panic(payload: Vec<u8>) {
            let place = EventIdFrom::parse("json:/a/0").expect("a place");
            place.of(&event(&payload, &[]));
        }
    }
}
