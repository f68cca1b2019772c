//! What CONNECT and CONNACK agree on.
//!
//! Invariant: no session begins whose CONNACK the client does not take [MQTT-3.1.2-24].

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use rmqtt_codec::types::Publish;
use rmqtt_codec::v5;

use super::super::codec::{self, Connect, Version, Welcome};
use super::super::reason::{self, Violation};
use super::deliveries::DOWNLINK_IN_FLIGHT_MAX;
use super::inbound::Inbound;
use super::outbound::Window;
use super::{Limits, Session, TOPIC_ALIAS_MAX, Will};

/// Longest client id taken, in bytes.
pub const CLIENT_ID_BYTES_MAX: usize = 1024;

/// Session expiry that means never.
pub const NEVER_S: u32 = u32::MAX;

impl Session {
    /// Agrees to a CONNECT. `random` names a client that does not name itself.
    /// [`Session::welcome`] says so.
    ///
    /// # Errors
    /// The reason for which it is refused.
    pub fn open(
        connect: Connect,
        limits: &Limits,
        random: u64,
        now: Instant,
    ) -> Result<Self, Violation> {
        let Connect { version, is_v31, packet: connect } = connect;
        let id = &connect.client_id;
        let nameless = id.is_empty();
        if id.len() > CLIENT_ID_BYTES_MAX {
            return Err(Violation::new(reason::CLIENT_ID_NOT_VALID, "client id too long"));
        }
        if nameless && version == Version::V3 && !connect.clean_start {
            // [MQTT-3.1.3-8] of 3.1.1
            let why = "an empty client id without clean session";
            return Err(Violation::new(reason::CLIENT_ID_NOT_VALID, why));
        }
        // Copies: a slice of the read buffer would keep all of it for as long as the session lives.
        let client_id = if nameless {
            ByteString::from(format!("auto-{random:016x}"))
        } else {
            ByteString::from(&**id)
        };
        // In 3.1.1 the flag says both: begin anew, and end with the connection.
        let expiry_s = match version {
            Version::V3 if connect.clean_start => 0,
            Version::V3 => NEVER_S,
            Version::V5 => connect.session_expiry_interval_secs,
        };
        let keep_alive_s = match limits.keep_alive_s_max {
            max if version == Version::V5
                && max > 0
                && !(1..=max).contains(&connect.keep_alive) =>
            {
                max
            }
            _ => connect.keep_alive,
        };
        let receive_max = connect.receive_max.map_or(u16::MAX, NonZeroU16::get);
        let session = Self {
            version,
            client_id,
            nameless,
            is_v31,
            clean_start: connect.clean_start,
            expiry_s,
            expiry_asked_s: expiry_s,
            keeps: false,
            limits: *limits,
            packet_bytes_max: connect.max_packet_size.map_or(usize::MAX, |max| max.get() as usize),
            wants_reasons: connect.request_problem_info,
            // [MQTT-3.1.2-22]: one and a half times; 0 turns it off.
            keep_alive: (keep_alive_s > 0)
                .then(|| Duration::from_millis(u64::from(keep_alive_s) * 1500)),
            keep_alive_told_s: (keep_alive_s != connect.keep_alive).then_some(keep_alive_s),
            heard: now,
            will: connect.last_will.map(|will| will_of(version, will)),
            aliases: Vec::new(),
            told: Vec::new(),
            // [MQTT-3.1.2-26], [MQTT-3.1.2-27]
            told_max: usize::from(connect.topic_alias_max.min(TOPIC_ALIAS_MAX)),
            inbound: Inbound::default(),
            turns: VecDeque::new(),
            turns_due: 0,
            window: Window::new(receive_max.min(DOWNLINK_IN_FLIGHT_MAX)),
        };
        // [MQTT-3.1.2-24]; the expiry is told where it is not what was asked for.
        let told = session.welcome_of(false, (expiry_s > 0).then_some(expiry_s));
        if codec::welcome_len(version, &told) > session.packet_bytes_max {
            return Err(Violation::new(reason::PACKET_TOO_LARGE, "it takes no CONNACK"));
        }
        Ok(session)
    }

    fn welcome_of(&self, session_present: bool, session_expiry_s: Option<u32>) -> Welcome {
        Welcome {
            session_present: session_present && !self.is_v31,
            assigned_client_id: self.nameless.then(|| self.client_id.clone()),
            session_expiry_s,
            keep_alive_s: self.keep_alive_told_s,
            receive_max: self.limits.in_flight_max,
            packet_bytes_max: self.limits.packet_bytes_max as u32,
            topic_alias_max: TOPIC_ALIAS_MAX,
        }
    }

    /// Appends the CONNACK. `expiry_s` is what the client gets of the expiry that it asked for;
    /// `keeps` says whether messages and receipts are kept in the store, and `before` is what the
    /// session has from earlier connections.
    pub fn welcome(
        &mut self,
        before: Option<Inbound>,
        keeps: bool,
        expiry_s: u32,
        out: &mut BytesMut,
    ) {
        let told = (expiry_s != self.expiry_asked_s).then_some(expiry_s);
        let welcome = self.welcome_of(before.is_some(), told);
        codec::put_welcome(out, self.version, &welcome);
        self.inbound = before.unwrap_or_default();
        self.expiry_s = expiry_s;
        self.keeps = keeps;
    }
}

/// The will as the PUBLISH that it becomes.
fn will_of(version: Version, will: v5::LastWill) -> Will {
    let delay_s = will.will_delay_interval_sec.unwrap_or(0);
    let properties = v5::PublishProperties {
        correlation_data: will.correlation_data,
        message_expiry_interval: will.message_expiry_interval,
        content_type: will.content_type,
        user_properties: will.user_properties,
        is_utf8_payload: will.is_utf8_payload.unwrap_or(false),
        response_topic: will.response_topic,
        ..v5::PublishProperties::default()
    };
    let publish = Box::new(Publish {
        dup: false,
        retain: will.retain,
        qos: will.qos,
        topic: ByteString::from(&*will.topic),
        packet_id: None,
        payload: Bytes::copy_from_slice(&will.message),
        properties: (version == Version::V5).then_some(properties),
    });
    Will { publish, delay_s }
}
