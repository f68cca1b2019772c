//! How an event looks upstream: CloudEvents 1.0, structured JSON, written straight into a buffer, and
//! the attributes one by one for what carries them beside the payload (binary mode).
//!
//! Owns: the mapping of an event to CloudEvents attributes. Payload bytes pass through untouched:
//! JSON is embedded as it is, everything else is base64.
//!
//! | attribute | value |
//! | --- | --- |
//! | `id` | `gateway/epoch/partition/seq` ([`EventId`]) |
//! | `source` | `/gateway/device key`, each percent-encoded (an RFC 3986 absolute-path reference) |
//! | `type` | the route's `event_type`, else the sink's |
//! | `subject` | MQTT topic |
//! | `time` | the publish's user property `time` if that is RFC 3339, else the time of receipt |
//! | `datacontenttype` | the publish's or route's; else `application/json` if the payload is JSON; else `application/octet-stream` |
//! | `partitionkey` | device key |
//! | `sequence` | sequence number in 20 digits, so that it sorts as text |
//! | `recordedtime` | time of receipt, only where `time` is the device's |
//! | `traceparent` | the publish's user property, if it is one (W3C Trace Context) |
//! | `lane` | `alarm` or `backfill`, as the route says; absent for live events |
//! | `stream` | `live` or `backfill`, where a sink has more than one stream, and `replay`; order holds per device, lane and stream |
//! | `timequality` | where the gateway's clock was not set when the event came: `corrected` if it was later, and the time of receipt is the right one; else `unsynchronised` |
//! | `bootid` | with `timequality`: which boot of the gateway's machine, in 16 hexadecimal digits |
//! | `uptimemicros` | with `timequality`: how long the machine was up, in microseconds; what no clock has touched |
//! | `requeued` | `true` on an event that was a dead letter: it stands outside the order of its device |
//!
//! Deliberately absent: where attributes go in binary mode (each sink).

use std::io::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::IgnoredAny;
use storage::{Attribute, DeadLetter, Event, EventId, Lane, StoredEvent, TimeQuality};

use crate::origin::Origin;
use crate::sink::Mark;

const JSON: &str = "application/json";
const OCTET_STREAM: &str = "application/octet-stream";

/// The bytes that JSON puts around an event, about; for sizing buffers.
pub(crate) const ENVELOPE_BYTES: usize = 400;

/// Writes the events of one sink.
#[derive(Clone, Debug)]
pub(crate) struct Envelope {
    gateway: String,
    epoch: u64,
    /// `/gateway/`, percent-encoded.
    source_prefix: Vec<u8>,
    event_type: String,
}

/// How events follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// A JSON array.
    Array,
    /// One a line. JSON that contains line breaks goes as base64, so that its bytes stay as they
    /// are and a line stays a line.
    Lines,
}

impl Envelope {
    pub(crate) fn new(origin: &Origin, event_type: &str) -> Self {
        let mut source_prefix = vec![b'/'];
        percent_encode(&mut source_prefix, &origin.gateway);
        source_prefix.push(b'/');
        Self {
            gateway: origin.gateway.clone(),
            epoch: origin.epoch,
            source_prefix,
            event_type: event_type.to_owned(),
        }
    }

    /// Writes events one after the other, in the stream that they come in.
    pub(crate) fn write_all<'a>(
        &self,
        out: &mut Vec<u8>,
        events: impl Iterator<Item = &'a StoredEvent> + Clone,
        stream: Option<Mark>,
        framing: Framing,
    ) {
        out.reserve(events.clone().map(|e| e.event.size_bytes() + ENVELOPE_BYTES).sum());
        match framing {
            Framing::Array => {
                let mut before = b'[';
                for event in events {
                    out.push(before);
                    self.write(out, event, stream, framing);
                    before = b',';
                }
                out.push(b']');
            }
            Framing::Lines => {
                for event in events {
                    self.write(out, event, stream, framing);
                    out.push(b'\n');
                }
            }
        }
    }

    /// Writes a dead letter: its event as it would have gone upstream, and as extensions of it what
    /// became of it. One a line.
    pub(crate) fn write_letter(&self, out: &mut Vec<u8>, letter: &DeadLetter) {
        self.write(out, &letter.event, None, Framing::Lines);
        out.pop();
        for (name, value) in
            [("deadlettersink", &letter.sink), ("deadletterreason", &letter.reason)]
        {
            out.extend_from_slice(format!(",\"{name}\":").as_bytes());
            write_string(out, value);
        }
        out.extend_from_slice(format!(",\"deadletterattempts\":{}", letter.attempts).as_bytes());
        for (name, us) in
            [("deadletterfirsttime", letter.first_us), ("deadletterlasttime", letter.last_us)]
        {
            out.extend_from_slice(format!(",\"{name}\":\"").as_bytes());
            write_time(out, us);
            out.push(b'"');
        }
        out.extend_from_slice(b"}\n");
    }

    /// Writes one event, in the stream that it comes in.
    pub(crate) fn write(
        &self,
        out: &mut Vec<u8>,
        stored: &StoredEvent,
        stream: Option<Mark>,
        framing: Framing,
    ) {
        let event = &stored.event;
        let context = Context::of(event);
        out.extend_from_slice(br#"{"specversion":"1.0","id":"#);
        write_string(out, &self.id(stored).to_string());
        // Percent-encoded: nothing in it needs escaping.
        out.extend_from_slice(br#","source":""#);
        self.write_source(out, event);
        out.extend_from_slice(br#"","type":"#);
        write_string(out, self.event_type(event));
        if !event.topic.is_empty() {
            out.extend_from_slice(br#","subject":"#);
            write_string(out, &event.topic);
        }
        out.extend_from_slice(br#","time":""#);
        match context.time {
            Some(time) => out.extend_from_slice(time.as_bytes()),
            None => write_time(out, stored.received_us()),
        }
        out.push(b'"');
        if context.time.is_some() {
            out.extend_from_slice(br#","recordedtime":""#);
            write_time(out, stored.received_us());
            out.push(b'"');
        }
        if !event.device_key.is_empty() {
            out.extend_from_slice(br#","partitionkey":"#);
            write_string(out, &event.device_key);
        }
        out.extend_from_slice(br#","sequence":""#);
        write_decimal(out, stored.seq, 20);
        out.push(b'"');
        if let Some(traceparent) = context.traceparent {
            out.extend_from_slice(br#","traceparent":"#);
            write_string(out, traceparent);
        }
        // Names of our own, here and below: nothing in them needs escaping.
        if context.lane != Lane::Live {
            out.extend_from_slice(br#","lane":""#);
            out.extend_from_slice(context.lane.name().as_bytes());
            out.push(b'"');
        }
        if let Some(stream) = stream {
            out.extend_from_slice(br#","stream":""#);
            out.extend_from_slice(stream.name().as_bytes());
            out.push(b'"');
        }
        if context.requeued {
            out.extend_from_slice(br#","requeued":true"#);
        }
        for (name, value) in clock_extensions(stored).into_iter().flatten() {
            out.extend_from_slice(format!(",\"{}\":\"{value}\"", name.plain()).as_bytes());
        }
        out.extend_from_slice(br#","datacontenttype":"#);
        write_string(out, context.content_type);
        let breaks = || event.payload.iter().any(|b| matches!(b, b'\n' | b'\r'));
        if context.is_json && !(framing == Framing::Lines && breaks()) {
            out.extend_from_slice(br#","data":"#);
            out.extend_from_slice(&event.payload);
        } else {
            out.extend_from_slice(br#","data_base64":""#);
            write_base64(out, &event.payload);
            out.push(b'"');
        }
        out.push(b'}');
    }

    /// Gives the attributes of an event with their values, for binary mode; `datacontenttype` is not
    /// among them, as every transport has a place of its own for it. What has to be written first is
    /// written into `scratch`.
    pub(crate) fn for_each_attribute(
        &self,
        stored: &StoredEvent,
        context: &Context<'_>,
        stream: Option<Mark>,
        scratch: &mut Vec<u8>,
        mut give: impl FnMut(Name, &str),
    ) {
        fn text(scratch: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) -> &str {
            scratch.clear();
            write(scratch);
            str::from_utf8(scratch).expect("attributes are text")
        }
        let event = &stored.event;
        let id = |out: &mut Vec<u8>| write!(out, "{}", self.id(stored)).expect("it grows");
        give(Name("ce_specversion"), "1.0");
        give(Name("ce_id"), text(scratch, id));
        give(Name("ce_source"), text(scratch, |out| self.write_source(out, event)));
        give(Name("ce_type"), self.event_type(event));
        if !event.topic.is_empty() {
            give(Name("ce_subject"), &event.topic);
        }
        if let Some(time) = context.time {
            give(Name("ce_time"), time);
        }
        let received = text(scratch, |out| write_time(out, stored.received_us()));
        let recorded = if context.time.is_some() { "ce_recordedtime" } else { "ce_time" };
        give(Name(recorded), received);
        if !event.device_key.is_empty() {
            give(Name::PARTITION_KEY, &event.device_key);
        }
        give(Name::SEQUENCE, text(scratch, |out| write_decimal(out, stored.seq, 20)));
        if let Some(traceparent) = context.traceparent {
            give(Name("ce_traceparent"), traceparent);
        }
        if context.lane != Lane::Live {
            give(Name("ce_lane"), context.lane.name());
        }
        if let Some(stream) = stream {
            give(Name("ce_stream"), stream.name());
        }
        if context.requeued {
            give(Name("ce_requeued"), "true");
        }
        for (name, value) in clock_extensions(stored).into_iter().flatten() {
            give(name, &value);
        }
    }

    pub(crate) fn id(&self, stored: &StoredEvent) -> EventId<'_> {
        EventId {
            gateway: &self.gateway,
            epoch: self.epoch,
            partition: stored.event.partition,
            seq: stored.seq,
        }
    }

    pub(crate) fn write_source(&self, out: &mut Vec<u8>, event: &Event) {
        out.extend_from_slice(&self.source_prefix);
        percent_encode(out, &event.device_key);
    }

    pub(crate) fn gateway(&self) -> &str {
        &self.gateway
    }

    /// The event's own type, else the sink's.
    pub(crate) fn event_type<'a>(&'a self, event: &'a Event) -> &'a str {
        event.attributes.event_type().unwrap_or(&self.event_type)
    }
}

/// Name of an attribute, kept as Kafka's headers have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name(&'static str);

impl Name {
    /// Device key.
    pub(crate) const PARTITION_KEY: Self = Self("ce_partitionkey");
    /// Sequence number.
    pub(crate) const SEQUENCE: Self = Self("ce_sequence");

    /// As the specification has it.
    pub(crate) fn plain(self) -> &'static str {
        &self.0["ce_".len()..]
    }

    /// As a header of Kafka's has it.
    #[cfg(feature = "kafka")]
    pub(crate) fn prefixed(self) -> &'static str {
        self.0
    }
}

/// What is to be said of a clock that was not set when the event came. Of one that was, nothing: it
/// would be the same bytes on every event.
fn clock_extensions(stored: &StoredEvent) -> Option<[(Name, String); 3]> {
    let stamp = stored.stamp?;
    let quality = match stamp.quality {
        TimeQuality::Synchronised => return None,
        TimeQuality::Unsynchronised => "unsynchronised",
        TimeQuality::Corrected => "corrected",
    };
    Some([
        (Name("ce_timequality"), quality.to_owned()),
        (Name("ce_bootid"), format!("{:016x}", stamp.boot)),
        (Name("ce_uptimemicros"), stamp.uptime_us.to_string()),
    ])
}

/// What the publish itself says about its event.
pub(crate) struct Context<'a> {
    /// The device's time: RFC 3339.
    pub(crate) time: Option<&'a str>,
    pub(crate) traceparent: Option<&'a str>,
    /// It was a dead letter.
    pub(crate) requeued: bool,
    pub(crate) content_type: &'a str,
    pub(crate) lane: Lane,
    /// The payload is JSON, and may be called so.
    pub(crate) is_json: bool,
}

impl<'a> Context<'a> {
    pub(crate) fn of(event: &'a Event) -> Self {
        let (mut time, mut traceparent, mut content_type) = (None, None, None);
        let (mut requeued, mut lane) = (false, Lane::default());
        for attribute in event.attributes.iter() {
            match attribute {
                Attribute::ContentType(v) => content_type = content_type.or(Some(v)),
                Attribute::Lane(v) => lane = v,
                Attribute::UserProperty("time", v) if is_rfc3339(v) => time = Some(v),
                Attribute::UserProperty("traceparent", v) if is_traceparent(v) => {
                    traceparent = Some(v);
                }
                Attribute::Requeued => requeued = true,
                _ => {}
            }
        }
        let is_json = content_type.is_none_or(is_json_type) && is_json(&event.payload);
        let content_type = content_type.unwrap_or(if is_json { JSON } else { OCTET_STREAM });
        Self { time, traceparent, requeued, content_type, lane, is_json }
    }
}

/// `application/json`, or a structured syntax suffix `+json` (RFC 6839), whatever its parameters.
fn is_json_type(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim_ascii();
    let ends_with = |suffix: &str| {
        essence
            .len()
            .checked_sub(suffix.len())
            .and_then(|at| essence.get(at..))
            .is_some_and(|end| end.eq_ignore_ascii_case(suffix))
    };
    ends_with("/json") || ends_with("+json")
}

/// RFC 8259. The UTF-8 is checked first: serde_json does not look into strings that it skips.
fn is_json(payload: &[u8]) -> bool {
    str::from_utf8(payload).is_ok_and(|text| serde_json::from_str::<IgnoredAny>(text).is_ok())
}

/// RFC 3339 `date-time`; days are checked against 31, as a receiver's parser will know better.
fn is_rfc3339(text: &str) -> bool {
    let digits = |range: std::ops::Range<usize>, max: u32| {
        text.get(range).is_some_and(|part| {
            part.bytes().all(|b| b.is_ascii_digit()) && part.parse().is_ok_and(|n: u32| n <= max)
        })
    };
    let at = |place: usize, allowed: &[u8]| {
        text.as_bytes().get(place).is_some_and(|b| allowed.contains(b))
    };
    let date_time = digits(0..4, 9999)
        && at(4, b"-")
        && digits(5..7, 12)
        && at(7, b"-")
        && digits(8..10, 31)
        && at(10, b"Tt")
        && digits(11..13, 23)
        && at(13, b":")
        && digits(14..16, 59)
        && at(16, b":")
        && digits(17..19, 60);
    if !date_time {
        return false;
    }
    let mut place = 19;
    if at(place, b".") {
        let fraction = text[20..].bytes().take_while(u8::is_ascii_digit).count();
        if fraction == 0 {
            return false;
        }
        place = 20 + fraction;
    }
    if at(place, b"Zz") {
        return place + 1 == text.len();
    }
    at(place, b"+-")
        && digits(place + 1..place + 3, 23)
        && at(place + 3, b":")
        && digits(place + 4..place + 6, 59)
        && place + 6 == text.len()
}

/// W3C Trace Context, version 00.
fn is_traceparent(text: &str) -> bool {
    text.len() == 55
        && text.bytes().enumerate().all(|(place, byte)| match place {
            2 | 35 | 52 => byte == b'-',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        })
}

/// A JSON string with its quotes (RFC 8259, section 7).
fn write_string(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut clean_from = 0;
    for (place, &byte) in bytes.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[clean_from..place]);
        clean_from = place + 1;
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            _ => {
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
        }
    }
    out.extend_from_slice(&bytes[clean_from..]);
    out.push(b'"');
}

fn write_base64(out: &mut Vec<u8>, bytes: &[u8]) {
    let start = out.len();
    out.resize(start + bytes.len().div_ceil(3) * 4, 0);
    let written = BASE64.encode_slice(bytes, &mut out[start..]).expect("sized for it");
    out.truncate(start + written);
}

/// Keeps the unreserved characters of RFC 3986 and encodes every other byte.
fn percent_encode(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(byte);
        } else {
            out.push(b'%');
            out.push(HEX[usize::from(byte >> 4)]);
            out.push(HEX[usize::from(byte & 15)]);
        }
    }
}

/// A number in decimal, with leading zeros up to `digits`.
fn write_decimal(out: &mut Vec<u8>, mut value: u64, digits: usize) {
    let start = out.len();
    out.resize(start + digits, b'0');
    for place in (start..start + digits).rev() {
        out[place] = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// The last microsecond that fits the four-digit year of RFC 3339.
const TIME_US_MAX: u64 = 253_402_300_799_999_999;

/// RFC 3339 in UTC with microseconds, from microseconds since the Unix epoch.
pub(crate) fn write_time(out: &mut Vec<u8>, unix_us: u64) {
    let unix_us = unix_us.min(TIME_US_MAX);
    let (seconds, micros) = (unix_us / 1_000_000, unix_us % 1_000_000);
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_from_days(days);
    for (value, digits, after) in [
        (year, 4, b'-'),
        (month, 2, b'-'),
        (day, 2, b'T'),
        (second_of_day / 3_600, 2, b':'),
        (second_of_day / 60 % 60, 2, b':'),
        (second_of_day % 60, 2, b'.'),
        (micros, 6, b'Z'),
    ] {
        write_decimal(out, value, digits);
        out.push(after);
    }
}

/// Year, month and day of a number of days since 1970-01-01 in the proleptic Gregorian calendar:
/// years are counted from March, so that the leap day is the last of its year.
pub(crate) fn civil_from_days(days: u64) -> (u64, u64, u64) {
    const DAYS_BEFORE_1970: u64 = 719_468; // since 0000-03-01
    const ERA_DAYS: u64 = 146_097; // 400 years
    let days = days + DAYS_BEFORE_1970;
    let (era, day) = (days / ERA_DAYS, days % ERA_DAYS);
    let year_of_era = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let (month, next_year) =
        if month_from_march < 10 { (month_from_march + 3, 0) } else { (month_from_march - 9, 1) };
    (era * 400 + year_of_era + next_year, month, day_of_month)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;
    use storage::{Attributes, Stamp};

    use super::*;

    fn envelope() -> Envelope {
        let origin = Origin { gateway: "edge-01".into(), epoch: 0xab };
        Envelope::new(&origin, "edge.gateway.event")
    }

    fn stored(key: &str, topic: &str, attributes: &[Attribute<'_>], payload: &[u8]) -> StoredEvent {
        StoredEvent {
            offset: 7,
            seq: 42,
            event: Event {
                partition: 3,
                received_us: 1_700_000_000_123_456,
                device_key: key.into(),
                topic: topic.into(),
                attributes: Attributes::encode(attributes.iter().cloned()),
                payload: payload.to_vec().into(),
            },
            stamp: None,
        }
    }

    fn written(event: &StoredEvent, framing: Framing) -> String {
        let mut out = Vec::new();
        envelope().write_all(&mut out, [event].into_iter(), None, framing);
        String::from_utf8(out).expect("JSON is UTF-8")
    }

    fn line(event: &StoredEvent) -> Value {
        serde_json::from_str(&written(event, Framing::Lines)).expect("a line is JSON")
    }

    #[test]
    fn a_json_payload_is_embedded_untouched() {
        let payload = br#"{ "t" : 21.50, "t": "\u00e9" }"#;
        let text = written(&stored("dev-1", "devices/dev-1/t", &[], payload), Framing::Array);
        assert_eq!(
            text,
            concat!(
                r#"[{"specversion":"1.0","id":"edge-01/00000000000000ab/3/42","#,
                r#""source":"/edge-01/dev-1","type":"edge.gateway.event","#,
                r#""subject":"devices/dev-1/t","time":"2023-11-14T22:13:20.123456Z","#,
                r#""partitionkey":"dev-1","sequence":"00000000000000000042","#,
                r#""datacontenttype":"application/json","data":{ "t" : 21.50, "t": "\u00e9" }}]"#,
            )
        );
    }

    #[test]
    fn what_is_not_json_is_base64() {
        for (payload, content_type, expected) in [
            (&b"\x00\xff"[..], None, OCTET_STREAM),
            (b"", None, OCTET_STREAM),
            (b"21.5 C", None, OCTET_STREAM),
            (b"\"\xff\"", None, OCTET_STREAM),
            (b"{}{}", None, OCTET_STREAM),
            (b"21.5", Some("text/plain"), "text/plain"),
            (b"{", Some("application/json"), "application/json"),
        ] {
            let attributes: Vec<_> = content_type.map(Attribute::ContentType).into_iter().collect();
            let value = line(&stored("d", "t", &attributes, payload));
            assert_eq!(value["data_base64"], BASE64.encode(payload));
            assert_eq!(value["datacontenttype"], expected);
            assert!(value.get("data").is_none());
        }
        let declared = [Attribute::ContentType("application/senml+JSON; charset=utf-8")];
        assert_eq!(line(&stored("d", "t", &declared, b"[1]"))["data"][0], 1);
    }

    #[test]
    fn a_line_stays_a_line_and_the_bytes_stay_the_bytes() {
        let event = stored("d", "t", &[], b"{\n\"a\": 1\r\n}");
        let text = written(&event, Framing::Lines);
        assert_eq!(text.trim_end_matches('\n').lines().count(), 1);
        assert_eq!(line(&event)["data_base64"], BASE64.encode(b"{\n\"a\": 1\r\n}"));
        assert!(written(&event, Framing::Array).contains("{\n\"a\": 1\r\n}"));
    }

    #[test]
    fn a_batch_is_one_array_also_when_empty() {
        let mut out = Vec::new();
        envelope().write_all(&mut out, [].iter(), None, Framing::Array);
        out.clear();
        let event = stored("d", "t", &[], b"1");
        envelope().write_all(&mut out, [&event, &event].into_iter(), None, Framing::Array);
        let value: Value = serde_json::from_slice(&out).expect("an array");
        assert_eq!(value.as_array().map(Vec::len), Some(2));
    }

    #[test]
    fn the_device_s_time_is_the_time_and_the_receipt_is_recorded() {
        let time = [Attribute::UserProperty("time", "2023-11-14T23:00:00+01:00")];
        let value = line(&stored("d", "t", &time, b"1"));
        assert_eq!(value["time"], "2023-11-14T23:00:00+01:00");
        assert_eq!(value["recordedtime"], "2023-11-14T22:13:20.123456Z");
        let value = line(&stored("d", "t", &[Attribute::UserProperty("time", "noon")], b"1"));
        assert_eq!(value["time"], "2023-11-14T22:13:20.123456Z");
        assert!(value.get("recordedtime").is_none());
    }

    #[test]
    fn a_clock_that_was_not_set_is_told_of() {
        for (quality, told) in [
            (TimeQuality::Synchronised, None),
            (TimeQuality::Unsynchronised, Some("unsynchronised")),
            (TimeQuality::Corrected, Some("corrected")),
        ] {
            let stamp =
                Stamp { boot: 0xab, uptime_us: 12, received_us: 1_700_000_000_000_001, quality };
            let event = StoredEvent { stamp: Some(stamp), ..stored("d", "t", &[], b"1") };
            let value = line(&event);
            assert_eq!(value["time"], "2023-11-14T22:13:20.000001Z");
            assert_eq!(value.get("timequality").and_then(Value::as_str), told);
            let stands = |name| value.get(name).and_then(Value::as_str);
            assert_eq!(stands("bootid"), told.map(|_| "00000000000000ab"));
            assert_eq!(stands("uptimemicros"), told.map(|_| "12"));
            let mut binary = Vec::new();
            let (context, scratch) = (Context::of(&event.event), &mut Vec::new());
            envelope().for_each_attribute(&event, &context, None, scratch, |name, value| {
                binary.push((name.plain(), value.to_owned()));
            });
            let said = binary.iter().find(|(name, _)| *name == "timequality");
            assert_eq!(said.map(|(_, value)| &value[..]), told);
        }
    }

    #[test]
    fn rfc3339_is_told_from_its_likenesses() {
        for good in
            ["2023-11-14T22:13:20Z", "2023-11-14t22:13:60.1z", "0000-01-01T00:00:00.123-23:59"]
        {
            assert!(is_rfc3339(good), "{good}");
        }
        for bad in [
            "",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "2023-11-14T22:13:20.Z",
            "2023-11-14 22:13:20Z",
            "2023-11-14T22:13:20Zz",
            "2023-13-14T22:13:20Z",
            "2023-11-14T24:13:20Z",
            "+023-11-14T22:13:20Z",
            "2023-11-14T22:13:20+1:00",
            "2023-11-14T22:13:20+01:00\"",
            "2023-11-14T22:13:2\u{e9}Z",
        ] {
            assert!(!is_rfc3339(bad), "{bad}");
        }
    }

    #[test]
    fn a_trace_passes_through_if_it_is_one() {
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let value = line(&stored("d", "t", &[Attribute::UserProperty("traceparent", trace)], b"1"));
        assert_eq!(value["traceparent"], trace);
        let value = line(&stored("d", "t", &[Attribute::UserProperty("traceparent", "me")], b"1"));
        assert!(value.get("traceparent").is_none());
    }

    #[test]
    fn times_are_calendar_days() {
        for (unix_us, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399_999_999, "2000-02-28T23:59:59.999999Z"),
            (951_782_400_000_000, "2000-02-29T00:00:00.000000Z"),
            (1_709_251_199_000_001, "2024-02-29T23:59:59.000001Z"),
            (4_107_542_400_000_000, "2100-03-01T00:00:00.000000Z"),
            (u64::MAX, "9999-12-31T23:59:59.999999Z"),
        ] {
            let mut out = Vec::new();
            write_time(&mut out, unix_us);
            assert_eq!(str::from_utf8(&out), Ok(text));
        }
    }

    proptest! {
        #[test]
        fn a_written_time_is_rfc3339_and_sorts_as_text(a in 0..=TIME_US_MAX, b in 0..=TIME_US_MAX) {
            let text = |us| {
                let mut out = Vec::new();
                write_time(&mut out, us);
                String::from_utf8(out).unwrap()
            };
            prop_assert!(is_rfc3339(&text(a)));
            prop_assert_eq!(a.cmp(&b), text(a).cmp(&text(b)));
        }

        #[test]
        fn any_event_is_one_json_line_that_gives_it_back(
            key: String, topic: String, payload: Vec<u8>, content_type: Option<String>,
        ) {
            let attributes: Vec<_> =
                content_type.as_deref().map(Attribute::ContentType).into_iter().collect();
            let event = stored(&key, &topic, &attributes, &payload);
            let text = written(&event, Framing::Lines);
            prop_assert_eq!(text.find('\n'), Some(text.len() - 1));
            let value = line(&event);
            if !topic.is_empty() {
                prop_assert_eq!(&value["subject"], &topic);
            }
            if !key.is_empty() {
                prop_assert_eq!(&value["partitionkey"], &key);
            }
            prop_assert!(value["source"].as_str().unwrap().is_ascii());
            match value.get("data_base64") {
                Some(data) => {
                    prop_assert_eq!(BASE64.decode(data.as_str().unwrap()).unwrap(), payload);
                }
                None => prop_assert!(text.as_bytes().windows(payload.len()).any(|w| w == payload)),
            }
        }

        #[test]
        fn json_payloads_are_data(number: i64, words: Vec<String>) {
            let payload = serde_json::to_vec(&(number, &words)).unwrap();
            prop_assert_eq!(&line(&stored("d", "t", &[], &payload))["data"], &serde_json::json!([number, words]));
        }
    }
}
