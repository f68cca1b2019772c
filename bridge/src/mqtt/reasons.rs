//! What an MQTT broker's refusals mean: every reason code and every error of a connection, sorted.
//!
//! rumqttc 0.25 does not see a DISCONNECT that leaves out its properties, as some brokers send it: then
//! all that is known is that the connection ended, which is worth a try.

use std::error::Error as _;
use std::fmt::Write as _;

use rumqttc::v5::mqttbytes::Error as CodecError;
use rumqttc::v5::mqttbytes::v5::{ConnectReturnCode, DisconnectReasonCode, PubAck, PubAckReason};
use rumqttc::v5::{ConnectionError, StateError};

use super::flights::Cause;
use crate::sink::Failure;

const RETRY: Failure = Failure::Retry { after: None };

/// What a PUBACK refuses; `None` when it takes the event.
pub(super) fn refused(ack: &PubAck) -> Option<Cause> {
    let (failure, advice) = match ack.reason {
        // Taken, if by nobody: that is for the broker to know.
        PubAckReason::Success | PubAckReason::NoMatchingSubscribers => return None,
        PubAckReason::UnspecifiedError
        | PubAckReason::ImplementationSpecificError
        | PubAckReason::PacketIdentifierInUse
        | PubAckReason::QuotaExceeded => (RETRY, ""),
        PubAckReason::NotAuthorized => (Failure::Hold, "; allow this user to publish there"),
        PubAckReason::TopicNameInvalid | PubAckReason::PayloadFormatInvalid => {
            (Failure::Reject, "")
        }
    };
    let said = ack.properties.as_ref().and_then(|properties| properties.reason_string.as_deref());
    Some(cause(failure, format!("PUBACK {:?}", ack.reason), said, advice))
}

/// Why a connection ended.
pub(super) fn ended(error: &ConnectionError) -> Cause {
    match error {
        ConnectionError::ConnectionRefused(code) => connect_refused(*code),
        ConnectionError::MqttState(StateError::ServerDisconnect { reason_code, reason_string }) => {
            disconnected(*reason_code, reason_string.as_deref())
        }
        // A refusal in words that the protocol does not have, of something that is on the wire.
        ConnectionError::MqttState(StateError::Deserialization(
            CodecError::InvalidReason(code) | CodecError::InvalidConnectReturnCode(code),
        )) => cause(Failure::Suspect, format!("reason code {code:#x}"), None, ""),
        ConnectionError::Io(error)
        | ConnectionError::MqttState(
            StateError::Io(error) | StateError::Deserialization(CodecError::Io(error)),
        ) => cause(RETRY, error.to_string(), None, ""),
        ConnectionError::Timeout(_) => cause(RETRY, "the broker did not answer".into(), None, ""),
        error => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(error) = source {
                let more = error.to_string();
                // Some of its errors quote their cause.
                if !text.contains(&more) {
                    let _ = write!(text, ": {more}");
                }
                source = error.source();
            }
            cause(RETRY, text, None, "")
        }
    }
}

fn connect_refused(code: ConnectReturnCode) -> Cause {
    use ConnectReturnCode as Code;
    let (failure, advice) = match code {
        Code::BadUserNamePassword
        | Code::NotAuthorized
        | Code::BadAuthenticationMethod
        | Code::Banned => (
            Failure::Hold,
            "; check username and password, they are read again before the next try",
        ),
        Code::BadClientId | Code::ClientIdentifierNotValid => (Failure::Hold, "; set client_id"),
        Code::RefusedProtocolVersion | Code::UnsupportedProtocolVersion => {
            (Failure::Hold, "; this sink needs a broker that speaks MQTT 5")
        }
        Code::UseAnotherServer | Code::ServerMoved => {
            (Failure::Hold, "; set url to where it moved")
        }
        _ => (RETRY, ""),
    };
    cause(failure, format!("CONNACK {code:?}"), None, advice)
}

fn disconnected(code: DisconnectReasonCode, said: Option<&str>) -> Cause {
    use DisconnectReasonCode as Code;
    let (failure, advice) = match code {
        Code::MalformedPacket
        | Code::PacketTooLarge
        | Code::PayloadFormatInvalid
        | Code::TopicNameInvalid => (Failure::Suspect, ""),
        Code::NotAuthorized => (Failure::Hold, "; allow this user to publish there"),
        Code::SessionTakenOver => (
            Failure::Hold,
            "; another client has the same client_id, or another gateway the same id",
        ),
        Code::QoSNotSupported => (Failure::Hold, "; this sink needs a broker with QoS 1"),
        Code::UseAnotherServer | Code::ServerMoved => {
            (Failure::Hold, "; set url to where it moved")
        }
        _ => (RETRY, ""),
    };
    cause(failure, format!("DISCONNECT {code:?}"), said, advice)
}

fn cause(failure: Failure, mut reason: String, said: Option<&str>, advice: &str) -> Cause {
    /// Characters of what the broker says that are quoted.
    const QUOTE_CHARS_MAX: usize = 200;
    if let Some(said) = said {
        let clean = said.chars().map(|c| if c.is_control() { ' ' } else { c });
        reason.push_str(": ");
        reason.extend(clean.take(QUOTE_CHARS_MAX));
    }
    reason.push_str(advice);
    Cause { failure, reason }
}
