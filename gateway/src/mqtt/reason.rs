//! Reason codes, and the ways in which a connection ends.
//!
//! Owns: the numbers of MQTT 5 section 2.4 that this server sends, their 3.1.1 counterparts in
//! CONNACK, and [`Violation`], the one error of the protocol's pure parts.
//! Deliberately absent: codes of enhanced authentication.

use std::borrow::Cow;

/// Malformed packet.
pub const MALFORMED: u8 = 0x81;
/// Protocol error.
pub const PROTOCOL_ERROR: u8 = 0x82;
/// Implementation specific error.
pub const IMPLEMENTATION_SPECIFIC: u8 = 0x83;
/// Unsupported protocol version.
pub const UNSUPPORTED_VERSION: u8 = 0x84;
/// Client identifier not valid.
pub const CLIENT_ID_NOT_VALID: u8 = 0x85;
/// Bad user name or password.
pub const BAD_CREDENTIALS: u8 = 0x86;
/// Not authorized.
pub const NOT_AUTHORIZED: u8 = 0x87;
/// Server unavailable.
pub const SERVER_UNAVAILABLE: u8 = 0x88;
/// Server busy.
pub const SERVER_BUSY: u8 = 0x89;
/// Server shutting down.
pub const SHUTTING_DOWN: u8 = 0x8B;
/// Bad authentication method.
pub const BAD_AUTHENTICATION_METHOD: u8 = 0x8C;
/// Keep alive timeout.
pub const KEEP_ALIVE_TIMEOUT: u8 = 0x8D;
/// Session taken over.
pub const TAKEN_OVER: u8 = 0x8E;
/// Topic filter invalid.
pub const FILTER_INVALID: u8 = 0x8F;
/// Topic name invalid.
pub const TOPIC_INVALID: u8 = 0x90;
/// Packet identifier in use.
pub const PACKET_ID_IN_USE: u8 = 0x91;
/// Packet identifier not found.
pub const PACKET_ID_NOT_FOUND: u8 = 0x92;
/// Receive maximum exceeded.
pub const RECEIVE_MAX_EXCEEDED: u8 = 0x93;
/// Topic alias invalid.
pub const TOPIC_ALIAS_INVALID: u8 = 0x94;
/// Packet too large.
pub const PACKET_TOO_LARGE: u8 = 0x95;
/// Quota exceeded.
pub const QUOTA_EXCEEDED: u8 = 0x97;
/// Administrative action.
pub const ADMINISTRATIVE_ACTION: u8 = 0x98;
/// From here on a code says that something was not done.
pub const FAILURE: u8 = 0x80;
/// Success; as a SUBACK code: granted QoS 0.
pub const SUCCESS: u8 = 0x00;
/// PUBACK and PUBREC: taken, and nobody subscribes to it.
pub const NO_MATCHING_SUBSCRIBERS: u8 = 0x10;
/// UNSUBACK: no subscription existed.
pub const NO_SUBSCRIPTION_EXISTED: u8 = 0x11;

/// The CONNACK return code of 3.1.1 that says the same as a v5 reason code, where there is one:
/// the others close the connection without a word [MQTT-3.1.4-1].
pub fn connack_v3(code: u8) -> Option<u8> {
    match code {
        SUCCESS => Some(0),
        UNSUPPORTED_VERSION => Some(1),
        CLIENT_ID_NOT_VALID => Some(2),
        SERVER_UNAVAILABLE | SERVER_BUSY | SHUTTING_DOWN => Some(3),
        BAD_CREDENTIALS => Some(4),
        NOT_AUTHORIZED => Some(5),
        _ => None,
    }
}

/// Why the server ends a connection: told to v5 clients in CONNACK or DISCONNECT, and logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// MQTT 5 reason code.
    pub code: u8,
    /// The same in words, for the log and for the reason string.
    pub why: Cow<'static, str>,
}

impl Violation {
    /// A violation with a fixed text.
    pub const fn new(code: u8, why: &'static str) -> Self {
        Self { code, why: Cow::Borrowed(why) }
    }

    pub(crate) const fn malformed(why: &'static str) -> Self {
        Self::new(MALFORMED, why)
    }

    pub(crate) const fn protocol(why: &'static str) -> Self {
        Self::new(PROTOCOL_ERROR, why)
    }
}
