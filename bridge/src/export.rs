//! Events as a text for whoever asked for them: the same CloudEvents as an HTTP sink sends.
//!
//! Owns: [`letters`], and what stands between pieces, so that the whole is one NDJSON text or one JSON array however
//! it was cut.
//! Deliberately absent: which events, and where they go.

use storage::{DeadLetter, StoredEvent};

use crate::cloudevents::{Envelope, Framing};
use crate::origin::Origin;

/// Writes one text, piece by piece.
#[derive(Clone, Debug)]
pub struct Export {
    envelope: Envelope,
    framing: Framing,
    begun: bool,
}

impl Export {
    /// A text of events of this gateway, each of the CloudEvents type `event_type`.
    pub fn new(origin: &Origin, event_type: &str, framing: Framing) -> Self {
        Self { envelope: Envelope::new(origin, event_type), framing, begun: false }
    }

    /// Appends the next events.
    pub fn write(&mut self, out: &mut Vec<u8>, events: &[StoredEvent]) {
        if events.is_empty() {
            return;
        }
        let start = out.len();
        self.envelope.write_all(out, events.iter(), None, self.framing);
        if self.framing == Framing::Array {
            // The pieces are one array: it opens once and is closed at the end.
            out.pop();
            if self.begun {
                out[start] = b',';
            }
        }
        self.begun = true;
    }

    /// Appends what belongs after the last event.
    pub fn finish(self, out: &mut Vec<u8>) {
        match (self.framing, self.begun) {
            (Framing::Lines, _) => {}
            (Framing::Array, true) => out.extend_from_slice(b"]\n"),
            (Framing::Array, false) => out.extend_from_slice(b"[]\n"),
        }
    }
}

/// Appends dead letters, a CloudEvent a line, each with its sink, reason, attempts and times as
/// extension attributes (`deadlettersink`, `deadletterreason`, `deadletterattempts`,
/// `deadletterfirsttime`, `deadletterlasttime`).
pub fn letters<'a>(
    origin: &Origin,
    event_type: &str,
    out: &mut Vec<u8>,
    letters: impl IntoIterator<Item = &'a DeadLetter>,
) {
    let envelope = Envelope::new(origin, event_type);
    letters.into_iter().for_each(|letter| envelope.write_letter(out, letter));
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use storage::{Attributes, Event};

    use super::*;

    fn events(count: u64) -> Vec<StoredEvent> {
        (0..count)
            .map(|offset| StoredEvent {
                offset,
                seq: offset,
                event: Event {
                    partition: 0,
                    received_us: 0,
                    device_key: "dev".into(),
                    topic: "t".into(),
                    attributes: Attributes::default(),
                    payload: offset.to_string().into_bytes().into(),
                },
                stamp: None,
            })
            .collect()
    }

    fn written(framing: Framing, pieces: &[&[StoredEvent]]) -> String {
        let origin = Origin { gateway: "edge-01".into(), epoch: 1 };
        let (mut export, mut out) = (Export::new(&origin, "t", framing), Vec::new());
        for piece in pieces {
            export.write(&mut out, piece);
        }
        export.finish(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn however_it_is_cut_a_batch_is_one_array() {
        let events = events(5);
        let whole = written(Framing::Array, &[&events]);
        for cut in 0..=5 {
            let pieces = [&events[..cut], &[], &events[cut..]];
            assert_eq!(written(Framing::Array, &pieces), whole);
        }
        let array: Vec<Value> = serde_json::from_str(&whole).unwrap();
        assert_eq!(
            array.iter().map(|e| e["data"].as_u64()).collect::<Vec<_>>(),
            [0, 1, 2, 3, 4].map(Some)
        );
        assert_eq!(written(Framing::Array, &[]), "[]\n");
    }

    #[test]
    fn a_dead_letter_is_its_event_and_what_became_of_it() {
        let letter = DeadLetter {
            sink: "cloud".into(),
            event: events(1).remove(0),
            reason: "400: \"no\"\nsuch unit".into(),
            attempts: 3,
            first_us: 1_700_000_000_000_000,
            last_us: 1_700_000_001_000_000,
        };
        let origin = Origin { gateway: "edge-01".into(), epoch: 1 };
        let mut out = Vec::new();
        letters(&origin, "t", &mut out, [&letter, &letter]);
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().count(), 2);
        let line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(line["id"], "edge-01/0000000000000001/0/0");
        assert_eq!(line["deadlettersink"], "cloud");
        assert_eq!(line["deadletterreason"], letter.reason);
        assert_eq!(line["deadletterattempts"], 3);
        assert_eq!(line["deadletterfirsttime"], "2023-11-14T22:13:20.000000Z");
        assert_eq!(line["deadletterlasttime"], "2023-11-14T22:13:21.000000Z");
    }

    #[test]
    fn a_line_is_an_event_and_no_events_are_no_lines() {
        let events = events(3);
        let text = written(Framing::Lines, &[&events[..1], &events[1..]]);
        assert_eq!(text.lines().count(), 3);
        assert!(text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
        assert_eq!(written(Framing::Lines, &[]), "");
    }
}
