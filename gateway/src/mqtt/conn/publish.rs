//! What a connection does with a publish: who may, by which route, and on to its ring.
//!
//! Invariant: a publish ends in a ring, in the hold behind those before it, or refused and counted.
//! Deliberately absent: acks (`session`), and the routes themselves (`ingest::device_key`).

use bytes::Bytes;
use bytestring::ByteString;
use rmqtt_codec::types::{Publish, QoS};
use rmqtt_codec::v5;
use storage::{Attribute, Attributes, Control, Event, Lane};

use super::super::codec::Version;
use super::super::reason::{self, Violation};
use super::super::session::Publishing;
use super::super::stats::FrontStats;
use super::super::subscriptions::PUBLISHER;
use super::super::topic;
use super::Conn;
use super::end::End;
use crate::config::RouteLimits;
use crate::ingest::device_key::DeviceFrom;
use crate::ingest::event_id::EventIdFrom;
use crate::ingest::{Admission, Identity, Pending, Ticket, partition};

/// What the last topic led to: devices mostly publish to one.
pub(super) struct Device {
    topic: ByteString,
    key: ByteString,
    partition: u16,
    /// The user property of each publish that names another key.
    property: Option<String>,
    content_type: Option<ByteString>,
    event_type: Option<ByteString>,
    lane: Lane,
    /// Whether anybody subscribes to the topic, as long as `Downlink::changes` says this.
    heard: (u64, bool),
    /// Where the id of an event stands.
    event_id: Option<EventIdFrom>,
    /// The route, and what may come over it.
    route: usize,
    limits: RouteLimits,
    /// Attributes of a publish that says nothing beyond its QoS: 0, 1 and 2.
    plain: [Attributes; 3],
}

impl Conn<'_> {
    /// Stores a publish, or holds it, or refuses it.
    pub(super) fn publish(&mut self, publishing: Publishing) -> Result<(), Violation> {
        let Publishing { publish, number, receipt } = publishing;
        if !self.may_publish(&publish.topic) {
            FrontStats::add(&self.shared.stats.denied, 1);
            let why = format!("topic {:?} is not allowed to this client", shorten(&publish.topic));
            return self
                .refuse(number, Violation { code: reason::NOT_AUTHORIZED, why: why.into() });
        }
        if !self.resolve(&publish.topic) {
            let why = format!("topic {:?} is not taken by any route", shorten(&publish.topic));
            return self.refuse(number, Violation { code: reason::TOPIC_INVALID, why: why.into() });
        }
        if !self.is_within_limits(&publish, number)? || !self.admits(number)? {
            return Ok(());
        }
        if let (Some(number), None) = (number, receipt)
            && self.session.version() == Version::V5
            && !self.is_heard()
        {
            self.session.unheard(number);
        }
        let retain = publish.retain;
        let event = self.event(*publish);
        let identity = self.identity(&event, receipt.is_some());
        let riders = if retain || receipt.is_some() { self.riders(&event, receipt) } else { None };
        let pending = Pending {
            event,
            read_at: self.now,
            ticket: number.map(|number| Ticket { mailbox: self.mailbox.clone(), number }),
            riders,
            identity,
        };
        // [`Conn::digest`] announces it.
        if !self.hold.queue.is_empty() {
            self.hold.push_back(pending);
        } else if let Err(pending) = self.shared.ingest.push_unannounced(pending) {
            self.hold.push_back(pending);
        }
        Ok(())
    }

    /// Whether its route takes a publish as large as this; refuses it if not. Charges what it takes of
    /// the client's pace over the route.
    fn is_within_limits(
        &mut self,
        publish: &Publish,
        number: Option<u64>,
    ) -> Result<bool, Violation> {
        let device = self.device.as_ref().expect("resolved before");
        let RouteLimits { client_rate, payload_bytes_max } = device.limits;
        let route = device.route;
        if let Some(pace) = &mut self.pace {
            let bytes = publish.topic.len() + publish.payload.len();
            pace.take_over_route(route, client_rate, bytes, self.paced_at);
        }
        if !self.fits(publish) {
            let why = format!(
                "a payload of {} bytes on topic {:?}, where the route takes {payload_bytes_max}",
                publish.payload.len(),
                shorten(&publish.topic),
            );
            let violation = Violation { code: reason::QUOTA_EXCEEDED, why: why.into() };
            self.refuse(number, violation)?;
            return Ok(false);
        }
        Ok(true)
    }

    /// Whether the route that was resolved last takes a payload as large as this.
    pub(super) fn fits(&self, publish: &Publish) -> bool {
        let device = self.device.as_ref().expect("resolved before");
        let bytes_max = device.limits.payload_bytes_max;
        bytes_max == 0 || publish.payload.len() <= bytes_max
    }

    /// What tells an event from its resends, where the route says so and the event has it.
    fn identity(&self, event: &Event, has_receipt: bool) -> Option<Identity> {
        let from = self.device.as_ref()?.event_id.as_ref()?;
        let id = from.of(event);
        if id.is_none() {
            FrontStats::add(&self.shared.stats.publishes_without_id, 1);
        }
        // The receipt comes first.
        Some(Identity { id: id?, riders: usize::from(has_receipt && self.kept.is_some()) })
    }

    /// What has to be durable with an event: its receipt, and what it retains.
    fn riders(&self, event: &Event, receipt: Option<u16>) -> Option<Box<[Control]>> {
        let receipt = receipt.and_then(|id| self.kept.as_ref().map(|kept| kept.receipt(id)));
        let riders: Box<[Control]> =
            receipt.into_iter().chain(self.shared.retained.rider(event)).collect();
        (!riders.is_empty()).then_some(riders)
    }

    /// Whether the store takes a publish now; refuses it if not.
    fn admits(&mut self, number: Option<u64>) -> Result<bool, Violation> {
        if self.shared.ingest.admission() == Admission::Refuse {
            self.refused_full |= number.is_some();
            let why = "the store is full and takes no more";
            self.refuse(number, Violation::new(reason::QUOTA_EXCEEDED, why))?;
            return Ok(false);
        }
        if self.refused_full {
            FrontStats::add(&self.shared.stats.publishes_refused, 1);
            let why = "the store takes events again: connect, and send again what was refused";
            if let Some(number) = number {
                self.session.forget(number);
            }
            return Err(Violation::new(reason::QUOTA_EXCEEDED, why));
        }
        Ok(true)
    }

    fn refuse(&mut self, number: Option<u64>, violation: Violation) -> Result<(), Violation> {
        FrontStats::add(&self.shared.stats.publishes_refused, 1);
        if let Some(unlogged) = self.shared.log_limit.allows(self.now) {
            let client = self.session.client_id();
            tracing::warn!(%client, why = %violation.why, unlogged, "publish refused");
        }
        self.session.refuse(number, violation, &mut self.out)
    }

    /// Whether the rules let it publish to a topic: those that led to the last device did.
    fn may_publish(&self, topic: &ByteString) -> bool {
        self.device.as_ref().is_some_and(|device| device.topic == *topic)
            || self.grant.may_publish(topic)
    }

    /// Finds the device of a topic; `false` if nothing takes it.
    pub(super) fn resolve(&mut self, name: &ByteString) -> bool {
        if self.device.as_ref().is_some_and(|device| device.topic == *name) {
            return true;
        }
        self.device = self.device_of(name);
        self.device.is_some()
    }

    fn device_of(&self, name: &ByteString) -> Option<Device> {
        if topic::is_reserved(name) {
            return None;
        }
        // A copy: a slice of the read buffer would keep all of it.
        let topic = ByteString::from(&**name);
        let resolved = self.shared.routes.resolve(&topic, self.session.client_id())?;
        let [content_type, event_type] =
            [resolved.content_type, resolved.event_type].map(|text| text.map(ByteString::from));
        let key = match resolved.device {
            DeviceFrom::Topic | DeviceFrom::ClientId | DeviceFrom::Property(_) => None,
            DeviceFrom::Username => self.grant.user(),
            DeviceFrom::Certificate => self.grant.certified(),
        };
        let key = key.cloned().unwrap_or(resolved.device_key);
        let property = match resolved.device {
            DeviceFrom::Property(name) => Some(name.clone()),
            _ => None,
        };
        let plain = [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce].map(|qos| {
            Attributes::encode(
                [Attribute::QoS(qos.value()), Attribute::Lane(resolved.lane)]
                    .into_iter()
                    .chain(content_type.as_deref().map(Attribute::ContentType))
                    .chain(event_type.as_deref().map(Attribute::EventType)),
            )
        });
        Some(Device {
            partition: partition::of(&key, self.shared.ingest.partitions()),
            key,
            property,
            heard: (u64::MAX, false),
            topic,
            content_type,
            event_type,
            lane: resolved.lane,
            event_id: resolved.event_id.cloned(),
            route: resolved.route,
            limits: resolved.limits,
            plain,
        })
    }

    /// Whether a publish to the topic that was resolved last is for anybody: an upstream, or a
    /// subscriber.
    fn is_heard(&mut self) -> bool {
        if self.shared.has_sinks {
            return true;
        }
        let downlink = &self.shared.downlink;
        let device = self.device.as_mut().expect("resolved before");
        let changes = downlink.changes();
        if device.heard.0 != changes {
            device.heard = (changes, downlink.has_subscriber(&device.topic));
        }
        device.heard.1
    }

    /// The event of a publish whose topic was resolved last.
    pub(super) fn event(&mut self, mut publish: Publish) -> Event {
        // An event keeps its part of the read buffer, and with it all of the buffer. Where other
        // packets fill most of that, a few bytes would hold thousands: then it gets a copy.
        if self.chatter_bytes > publish.payload.len() {
            publish.payload = Bytes::copy_from_slice(&publish.payload);
        }
        self.chatter_bytes = self.chatter_bytes.saturating_sub(publish.payload.len());
        let device = self.device.as_ref().expect("resolved before");
        let attributes = if publish.retain
            || self.marks_publisher
            || publish.properties.as_ref().is_some_and(|p| !says_nothing(p))
        {
            self.attributes(&publish, device)
        } else {
            device.plain[usize::from(publish.qos.value())].clone()
        };
        let (device_key, partition) = match &device.property {
            Some(name) => device_of_property(&publish, name).map(|key| {
                let partition = partition::of(&key, self.shared.ingest.partitions());
                (key, partition)
            }),
            None => None,
        }
        .unwrap_or_else(|| (device.key.clone(), device.partition));
        Event {
            partition,
            received_us: self.received_us,
            device_key,
            topic: device.topic.clone(),
            attributes,
            payload: publish.payload,
        }
    }

    fn attributes(&self, publish: &Publish, device: &Device) -> Attributes {
        let none = v5::PublishProperties::default();
        let said = publish.properties.as_ref().unwrap_or(&none);
        let content_type = said.content_type.as_deref().or(device.content_type.as_deref());
        let user = said.user_properties.iter().map(|(n, v)| Attribute::UserProperty(n, v));
        let expiry = said.message_expiry_interval.map(|s| Attribute::MessageExpiry(s.get()));
        let publisher = self.session.client_id().as_bytes();
        Attributes::encode(
            [Attribute::QoS(publish.qos.value()), Attribute::Lane(device.lane)]
                .into_iter()
                .chain(device.event_type.as_deref().map(Attribute::EventType))
                .chain(publish.retain.then_some(Attribute::Retain))
                .chain(content_type.map(Attribute::ContentType))
                .chain(said.is_utf8_payload.then_some(Attribute::Utf8Payload))
                .chain(said.response_topic.as_deref().map(Attribute::ResponseTopic))
                .chain(said.correlation_data.as_deref().map(Attribute::CorrelationData))
                .chain(expiry)
                .chain(user)
                .chain(self.marks_publisher.then_some(Attribute::Unknown(PUBLISHER, publisher))),
        )
    }

    /// Pushes what is held as far as there is room, or refuses it if that is the policy by now.
    pub(super) fn push_held(&mut self) -> Result<(), End> {
        while let Some(pending) = self.hold.pop_front() {
            let number = pending.ticket.as_ref().map(|ticket| ticket.number);
            if self.admits(number)?
                && let Err(pending) = self.shared.ingest.try_push(pending)
            {
                self.hold.push_front(pending);
                break;
            }
        }
        Ok(())
    }
}

/// The device key in a user property; the first of that name, if it is not empty.
fn device_of_property(publish: &Publish, name: &str) -> Option<ByteString> {
    let said = &publish.properties.as_ref()?.user_properties;
    let (_, key) = said.iter().find(|(property, _)| *property == name)?;
    // A copy: a slice of the read buffer would keep all of it.
    (!key.is_empty()).then(|| ByteString::from(&**key))
}

fn says_nothing(properties: &v5::PublishProperties) -> bool {
    properties.user_properties.is_empty()
        && properties.content_type.is_none()
        && !properties.is_utf8_payload
        && properties.response_topic.is_none()
        && properties.correlation_data.is_none()
        && properties.message_expiry_interval.is_none()
}

/// Enough of a text from the network for a log line.
pub(super) fn shorten(text: &str) -> &str {
    &text[..text.floor_char_boundary(200)]
}
