//! Reads CloudEvents 1.0 in JSON, or an event beside its payload, as far as the ledger wants them.
//!
//! Invariant: a body is taken whole or refused with the reason and the position of the first bad
//! event. Text with control characters is refused, as CloudEvents 1.0 section 3.1 does
//! ("String"), so that a row stays on its line.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, de::IgnoredAny};

use super::{Arrived, sequence::Row};
use crate::{
    ledger::Place,
    payload::{self, Identity},
};

#[derive(Deserialize)]
struct CloudEvent {
    specversion: String,
    id: String,
    source: String,
    r#type: String,
    sequence: Option<String>,
    #[serde(default)]
    lane: String,
    #[serde(default)]
    stream: String,
    #[serde(default)]
    requeued: bool,
    data: Option<Data>,
    data_base64: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Data {
    Fleet(Identity),
    Text(String),
    Other(IgnoredAny),
}

/// A body of `application/cloudevents-batch+json`.
pub(super) fn read_batch(body: &[u8]) -> Result<Vec<Arrived>, String> {
    let events: Vec<CloudEvent> =
        serde_json::from_slice(body).map_err(|error| error.to_string())?;
    events
        .into_iter()
        .enumerate()
        .map(|(at, event)| read(event).map_err(|reason| format!("event {at}: {reason}")))
        .collect()
}

/// A body of `application/x-ndjson`: one structured event a line; empty lines are nothing.
pub(super) fn read_lines(body: &[u8]) -> Result<Vec<Arrived>, String> {
    body.split(|byte| *byte == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.trim_ascii().is_empty())
        .map(|(at, line)| read_one(line).map_err(|reason| format!("line {}: {reason}", at + 1)))
        .collect()
}

/// A body of `application/cloudevents+json`.
pub(super) fn read_one(body: &[u8]) -> Result<Arrived, String> {
    read(serde_json::from_slice(body).map_err(|error| error.to_string())?)
}

/// A payload whose event's id, and source if it is said, stand beside it (binary mode, or bare).
pub(super) fn read_payload(
    id: &str,
    source: &str,
    payload: &[u8],
    row: Row,
) -> Result<Arrived, String> {
    for (name, value) in [("id", id), ("source", source)] {
        if value.contains(char::is_control) || value.is_empty() && name == "id" {
            return Err(format!("{name} is empty or has control characters"));
        }
    }
    let (device, origin) = match payload::identify(payload) {
        Some((device, _)) if device.contains(char::is_control) => {
            return Err("device has control characters".to_owned());
        }
        Some((device, origin)) => (device, Some(origin)),
        None => (source.to_owned(), None),
    };
    Ok(Arrived { device, origin, place: place(id), id: id.to_owned(), row })
}

fn read(event: CloudEvent) -> Result<Arrived, String> {
    let CloudEvent { specversion, id, source, r#type, sequence, .. } = event;
    let row = Row::of(&event.lane, &event.stream, event.requeued);
    if specversion != "1.0" {
        return Err(format!("specversion {specversion:?} is not 1.0"));
    }
    for (name, value) in [("id", &id), ("source", &source), ("type", &r#type)] {
        if value.is_empty() || value.contains(char::is_control) {
            return Err(format!("{name} is empty or has control characters"));
        }
    }
    let identity = match (event.data, event.data_base64) {
        (Some(_), Some(_)) => return Err("both data and data_base64".to_owned()),
        (Some(Data::Fleet(identity)), None) => {
            let origin = identity.origin();
            Some((identity.device, origin))
        }
        (Some(Data::Text(text)), None) => payload::identify(text.as_bytes()),
        (None, Some(text)) => {
            let bytes = BASE64_STANDARD.decode(text).map_err(|e| format!("data_base64: {e}"))?;
            payload::identify(&bytes)
        }
        (Some(Data::Other(_)) | None, None) => None,
    };
    let place = place(&id);
    if let (Some(place), Some(sequence)) = (place, &sequence)
        && sequence.parse() != Ok(place.seq)
    {
        return Err(format!("sequence {sequence:?} is not the one in id {id:?}"));
    }
    let (device, origin) = match identity {
        Some((device, _)) if device.contains(char::is_control) => {
            return Err("device has control characters".to_owned());
        }
        Some((device, origin)) => (device, Some(origin)),
        None => (source, None),
    };
    Ok(Arrived { device, origin, place, id, row })
}

/// Partition and sequence number out of an id of the form `gateway/epoch/partition/seq`.
pub(super) fn place(id: &str) -> Option<Place> {
    let mut parts = id.rsplitn(4, '/');
    let place = Place { seq: parts.next()?.parse().ok()?, partition: parts.next()?.parse().ok()? };
    let _epoch = parts.next()?;
    parts.next().map(|_gateway| place)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::Origin;

    const JSON: &str = r#"{"specversion":"1.0","id":"edge-01/00ab/3/17","type":"t",
        "source":"edge-01/dev-000001","sequence":"00000000000000000017","partitionkey":"dev-000001",
        "data":{"device":"dev-000001","boot":9,"seq":4,"t":1}}"#;

    #[test]
    fn an_event_from_a_fleet_is_read_in_each_form() {
        let expected = Arrived {
            device: "dev-000001".to_owned(),
            origin: Some(Origin { boot: 9, seq: 4 }),
            place: Some(Place { partition: 3, seq: 17 }),
            id: "edge-01/00ab/3/17".to_owned(),
            row: Row::Plain,
        };
        assert_eq!(read_one(JSON.as_bytes()).as_ref(), Ok(&expected));
        let batch = format!("[{JSON},{JSON}]");
        assert_eq!(read_batch(batch.as_bytes()), Ok(vec![expected.clone(), expected.clone()]));
        let line = JSON.replace('\n', "");
        let lines = format!("{line}\r\n\n{line}\n");
        assert_eq!(read_lines(lines.as_bytes()), Ok(vec![expected.clone(), expected.clone()]));
        let payload = r#"{"device":"dev-000001","boot":9,"seq":4}"#;
        let data = format!("\"data_base64\":{:?}", BASE64_STANDARD.encode(payload));
        let (head, _) = JSON.split_once("\"data\"").unwrap();
        assert_eq!(read_one(format!("{head}{data}}}").as_bytes()).as_ref(), Ok(&expected));
        let data = format!("\"data\":{payload:?}");
        assert_eq!(read_one(format!("{head}{data}}}").as_bytes()), Ok(expected));
    }

    #[test]
    fn an_event_of_another_kind_is_taken_without_an_origin() {
        for data in ["21.5", "\"on\"", "{\"x\":1}", "[1]", "null"] {
            let event = format!(
                r#"{{"specversion":"1.0","id":"x","type":"t","source":"s","data":{data}}}"#
            );
            let arrived = read_one(event.as_bytes()).unwrap();
            assert_eq!((arrived.device.as_str(), arrived.origin, arrived.place), ("s", None, None));
        }
    }

    #[test]
    fn a_bad_event_is_refused_with_its_position() {
        for (bad, reason) in [
            (JSON.replace("1.0", "0.3"), "specversion"),
            (JSON.replace("00017", "00018"), "sequence"),
            (JSON.replace("edge-01/00ab", "edge\\n01/00ab"), "control"),
            (JSON.replace("\"data\"", "\"data_base64\":\"!\",\"x\""), "data_base64"),
            ("{}".to_owned(), "missing"),
        ] {
            let refused = read_batch(format!("[{JSON},{bad}]").as_bytes()).unwrap_err();
            assert!(refused.contains(reason), "{refused}");
        }
        let refused = read_lines(b"\n{}\n").unwrap_err();
        assert!(refused.starts_with("line 2"), "{refused}");
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (read_batch(&body), read_lines(&body), read_one(&body));
        }

        #[test]
        fn places_are_read_from_the_right(gateway in "[a-z/]{1,8}", partition: u16, seq: u64) {
            let id = format!("{gateway}/0123456789abcdef/{partition}/{seq}");
            prop_assert_eq!(place(&id), Some(Place { partition, seq }));
        }
    }

    #[test]
    fn ids_of_other_forms_have_no_place() {
        for id in ["", "a/b/1", "1/2", "a/b/c/1", "a/b/1/c", "a/b/65536/1"] {
            assert_eq!(place(id), None, "{id}");
        }
    }
}
