//! The property lists that the codec crate reads otherwise than the specification.
//!
//! Deliberately absent: everything that it reads well, which is most of it.

/// Properties (MQTT 5, 2.2.2.2) of a PUBLISH or of a will.
mod id {
    pub(super) const PAYLOAD_FORMAT: u8 = 0x01;
    pub(super) const MESSAGE_EXPIRY: u8 = 0x02;
    pub(super) const CONTENT_TYPE: u8 = 0x03;
    pub(super) const RESPONSE_TOPIC: u8 = 0x08;
    pub(super) const CORRELATION_DATA: u8 = 0x09;
    pub(super) const SUBSCRIPTION_ID: u8 = 0x0B;
    pub(super) const WILL_DELAY: u8 = 0x18;
    pub(super) const TOPIC_ALIAS: u8 = 0x23;
    pub(super) const USER_PROPERTY: u8 = 0x26;
}

/// What a property list stands in.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// A PUBLISH with this first byte: behind topic and packet id.
    Publish { first: u8 },
    /// A CONNECT from its properties on: behind them and the client id.
    Will,
}

/// A message may expire at once (3.3.2.3.3), but the codec takes an interval of 0 for malformed. It is
/// raised to 1: the message may leave for its subscribers within the second in which it came.
///
/// A list that is cut short or has other properties is left for the codec to refuse.
pub(super) fn raise_expiry(content: &mut [u8], place: Place) {
    const AT_ONCE: [u8; 5] = [id::MESSAGE_EXPIRY, 0, 0, 0, 0];
    if content.windows(AT_ONCE.len()).any(|window| window == AT_ONCE)
        && let Some(at) = find_expiry(content, place)
        && content[at..].starts_with(&AT_ONCE)
    {
        content[at + 4] = 1;
    }
}

/// Where the message expiry stands.
fn find_expiry(content: &[u8], place: Place) -> Option<usize> {
    let mut at = 0;
    match place {
        Place::Publish { first } => {
            skip_field(content, &mut at)?;
            at += if first & 0x06 == 0 { 0 } else { 2 };
        }
        Place::Will => {
            let len = variable(content, &mut at)?;
            at += len;
            skip_field(content, &mut at)?;
        }
    }
    let len = variable(content, &mut at)?;
    let end = at + len;
    while at < end {
        let property = *content.get(at)?;
        if property == id::MESSAGE_EXPIRY {
            return Some(at);
        }
        at += 1;
        match property {
            id::PAYLOAD_FORMAT => at += 1,
            id::TOPIC_ALIAS => at += 2,
            id::WILL_DELAY => at += 4,
            id::CONTENT_TYPE | id::RESPONSE_TOPIC | id::CORRELATION_DATA => {
                skip_field(content, &mut at)?;
            }
            id::USER_PROPERTY => {
                skip_field(content, &mut at)?;
                skip_field(content, &mut at)?;
            }
            id::SUBSCRIPTION_ID => drop(variable(content, &mut at)?),
            _ => return None,
        }
    }
    None
}

/// Steps over a string or binary field with its two bytes of length.
fn skip_field(content: &[u8], at: &mut usize) -> Option<()> {
    let len = content.get(*at..*at + 2)?;
    *at += 2 + usize::from(u16::from_be_bytes([len[0], len[1]]));
    Some(())
}

/// A variable byte integer.
fn variable(content: &[u8], at: &mut usize) -> Option<usize> {
    let mut value = 0;
    for i in 0..4 {
        let byte = *content.get(*at)?;
        *at += 1;
        value |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
