//! What a sample looks like as an MQTT payload, and how its origin is read back upstream.
//!
//! Two forms: compact JSON, and the binary frame. The JSON form:
//!
//! ```json
//! {"device":"dev-000123","boot":1718000000,"seq":42,"t":1718000012345678,"clock":"wall",
//!  "kind":"temperature","readings":{"celsius":21.53,"humidity_percent":48.1}}
//! ```
//!
//! Invariant: [`identify`] of what [`Payload::render`] gave is the sample's device and origin.
//! Deliberately absent: reading the values back; the upstream side only counts.

use std::fmt::Write;

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::{
    frame::{Clock, Frame},
    ledger::Origin,
};

/// Form of a fleet's payloads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Payload {
    /// Compact JSON, about 140 bytes.
    #[default]
    Json,
    /// The binary frame, at most [`crate::frame::FRAME_BYTES_MAX`] bytes.
    Frame,
}

impl Payload {
    /// The payload for a frame. `buffer` is memory to be used again; it is left empty.
    pub fn render(self, frame: &Frame, buffer: &mut BytesMut) -> Bytes {
        match self {
            Self::Json => {
                // A BytesMut takes everything.
                let _ = render_json(frame, buffer);
                buffer.split().freeze()
            }
            Self::Frame => {
                buffer.extend_from_slice(&frame.encode());
                buffer.split().freeze()
            }
        }
    }

    /// RFC 2046 media type of the payload.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Frame => "application/octet-stream",
        }
    }
}

fn render_json(frame: &Frame, out: &mut BytesMut) -> std::fmt::Result {
    let sample = &frame.sample;
    let clock = match sample.clock {
        Clock::Boot => "boot",
        Clock::Wall => "wall",
    };
    write!(
        out,
        r#"{{"device":"{}","boot":{},"seq":{},"t":{},"clock":"{clock}","kind":"{}","readings":{{"#,
        frame.device,
        frame.boot,
        sample.seq,
        sample.time_us,
        sample.kind.name(),
    )?;
    let names = sample.kind.reading_names();
    for (at, (name, value)) in names.iter().zip(&sample.readings).enumerate() {
        let comma = if at == 0 { "" } else { "," };
        write!(out, r#"{comma}"{name}":{value}"#)?;
    }
    out.write_str("}}")
}

/// Device and origin, as the JSON form holds them.
#[derive(Debug, Deserialize)]
pub(crate) struct Identity {
    pub(crate) device: String,
    boot: u32,
    seq: u64,
}

impl Identity {
    /// Which event of its device it is.
    pub(crate) fn origin(&self) -> Origin {
        Origin { boot: self.boot, seq: self.seq }
    }
}

/// Whose event a payload is; `None` when no fleet made it.
pub fn identify(payload: &[u8]) -> Option<(String, Origin)> {
    if let Ok(frame) = Frame::parse(payload) {
        let origin = Origin { boot: frame.boot, seq: frame.sample.seq };
        return Some((frame.device.to_string(), origin));
    }
    let identity: Identity = serde_json::from_slice(payload).ok()?;
    let origin = identity.origin();
    Some((identity.device, origin))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        frame::{DeviceId, Readings, Sample},
        sensor::{Kind, Sensor},
    };

    fn frame(kind: Kind, seed: u32) -> Frame {
        let readings = Sensor::new(kind, seed).read(1_718_000_000_000_000, u64::from(seed) << 20);
        let sample = Sample { seq: 42, time_us: 7, clock: Clock::Boot, kind, readings };
        Frame { device: DeviceId(123), boot: 5, sample }
    }

    #[test]
    fn both_forms_are_identified() {
        for (seed, kind) in (0..50).flat_map(|seed| Kind::ALL.map(|kind| (seed, kind))) {
            for payload in [Payload::Json, Payload::Frame] {
                let bytes = payload.render(&frame(kind, seed), &mut BytesMut::new());
                let origin = Origin { boot: 5, seq: 42 };
                assert_eq!(identify(&bytes), Some(("dev-000123".to_owned(), origin)));
            }
        }
    }

    #[test]
    fn the_json_form_is_valid_json_with_named_readings() {
        let mut frame = frame(Kind::Temperature, 1);
        frame.sample.readings = Readings::from_slice(&[21.53, 48.1]).unwrap();
        let bytes = Payload::Json.render(&frame, &mut BytesMut::new());
        assert_eq!(
            str::from_utf8(&bytes).unwrap(),
            r#"{"device":"dev-000123","boot":5,"seq":42,"t":7,"clock":"boot","kind":"temperature","readings":{"celsius":21.53,"humidity_percent":48.1}}"#
        );
        serde_json::from_slice::<serde_json::Value>(&bytes).unwrap();
    }

    #[test]
    fn what_no_fleet_made_has_no_origin() {
        for payload in [&b""[..], b"21.5", b"{\"device\":\"a\"}", b"\xED\x6E", b"[1]"] {
            assert_eq!(identify(payload), None);
        }
    }
}
