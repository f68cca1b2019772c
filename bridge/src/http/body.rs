//! What a request carries: body and headers of every format.
//!
//! Deliberately absent: what they say of an event (`cloudevents`).

use std::fmt::Write as _;
use std::io::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use storage::StoredEvent;

use super::tracks::Piece;
use crate::cloudevents::{Context, Envelope, Framing};
use crate::config::{Compression, HttpFormat};

/// Names the event of a raw request: its id, `gateway/epoch/partition/seq`.
pub(super) const EVENT: HeaderName = HeaderName::from_static("edge-gateway-event");

/// zstd's fastest ordinary level: an event costs CPU on a small board.
const ZSTD_LEVEL: i32 = 1;

/// Writes a piece: body, and headers that describe it.
pub(super) fn write(
    format: HttpFormat,
    compression: Compression,
    envelope: &Envelope,
    piece: &Piece,
) -> (HeaderMap, Vec<u8>) {
    let stream = piece.stream();
    let all = piece.events();
    let first = piece.first();
    let mut headers = HeaderMap::new();
    let mut body = Vec::new();
    let content_type = match format {
        HttpFormat::CloudEventsBatch => {
            envelope.write_all(&mut body, all, stream, Framing::Array);
            HeaderValue::from_static("application/cloudevents-batch+json")
        }
        HttpFormat::NdJson => {
            envelope.write_all(&mut body, all, stream, Framing::Lines);
            HeaderValue::from_static("application/x-ndjson")
        }
        HttpFormat::JsonArray => {
            write_payloads(&mut body, all);
            HeaderValue::from_static("application/json")
        }
        HttpFormat::CloudEvent => {
            envelope.write(&mut body, first, stream, Framing::Array);
            HeaderValue::from_static("application/cloudevents+json")
        }
        HttpFormat::CloudEventBinary => {
            let context = Context::of(&first.event);
            let scratch = &mut Vec::new();
            envelope.for_each_attribute(first, &context, stream, scratch, |name, value| {
                let name = format!("ce-{}", name.plain());
                let name = HeaderName::try_from(name).expect("attributes are names");
                headers.insert(name, percent_encoded(value));
            });
            body.extend_from_slice(&first.event.payload);
            media_type(&context)
        }
        HttpFormat::Raw => {
            let id = envelope.id(first).to_string();
            headers.insert(EVENT, percent_encoded(&id));
            body.extend_from_slice(&first.event.payload);
            media_type(&Context::of(&first.event))
        }
    };
    headers.insert(CONTENT_TYPE, content_type);
    let body = match compression {
        Compression::None => body,
        Compression::Gzip => {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            gzip(&body)
        }
        Compression::Zstd => {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("zstd"));
            zstd::bulk::compress(&body, ZSTD_LEVEL).expect("zstd has room for its own bound")
        }
    };
    (headers, body)
}

/// A JSON array of payloads: JSON as it is, everything else as a base64 string.
fn write_payloads<'a>(out: &mut Vec<u8>, events: impl Iterator<Item = &'a StoredEvent>) {
    let mut before = b'[';
    for stored in events {
        out.push(before);
        before = b',';
        let payload = &stored.event.payload;
        if Context::of(&stored.event).is_json {
            out.extend_from_slice(payload);
        } else {
            out.push(b'"');
            out.extend_from_slice(BASE64.encode(payload).as_bytes());
            out.push(b'"');
        }
    }
    out.push(b']');
}

/// The payload's media type; one that no header can carry is as good as none.
fn media_type(context: &Context<'_>) -> HeaderValue {
    HeaderValue::from_str(context.content_type)
        .unwrap_or(HeaderValue::from_static("application/octet-stream"))
}

/// CloudEvents HTTP binding 1.0, section 3.1.3.2: space, quote, percent sign and whatever is not
/// printable ASCII.
fn percent_encoded(value: &str) -> HeaderValue {
    let mut text = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'"' | b'%' | ..=0x20 | 0x7f.. => {
                let _ = write!(text, "%{byte:02X}");
            }
            _ => text.push(byte.into()),
        }
    }
    HeaderValue::try_from(text).expect("printable ASCII")
}

fn gzip(body: &[u8]) -> Vec<u8> {
    let out = Vec::with_capacity(body.len() / 4);
    let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::fast());
    encoder.write_all(body).and_then(|()| encoder.finish()).expect("a Vec takes every write")
}
