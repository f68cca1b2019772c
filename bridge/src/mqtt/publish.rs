//! How an event becomes a PUBLISH.
//!
//! The payload is untouched, the quality of service 1, the topic filled in from the template. With
//! `user_properties = "cloudevents"` the attributes are user properties and the media type is the
//! content type (CloudEvents MQTT binding 1.0, binary mode); with `"id"` only the id is.

use bytes::Bytes;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Publish, PublishProperties};
use rumqttc::valid_topic;
use storage::StoredEvent;

use crate::cloudevents::{Context, Envelope, Name};
use crate::config::UserProperties;
use crate::sink::Mark;
use crate::template::Template;

/// Longest text in a packet [MQTT-1.5.4].
const TEXT_BYTES_MAX: usize = u16::MAX as usize;
/// Largest packet of the protocol: its length has 28 bits [MQTT-2.1.4].
const PACKET_BYTES_MAX: usize = (1 << 28) - 1;

/// A PUBLISH, as the client takes it.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) topic: String,
    pub(super) payload: Bytes,
    pub(super) properties: PublishProperties,
    /// Bytes of its packet.
    pub(super) size_bytes: usize,
}

/// Writes the publishes of one sink.
pub(super) struct Publisher {
    pub(super) envelope: Envelope,
    pub(super) topic: Template,
    pub(super) user_properties: UserProperties,
}

impl Publisher {
    /// The publish of an event, in the stream that it comes in.
    ///
    /// # Errors
    /// Why there can be none.
    pub(super) fn publish(
        &self,
        stored: &StoredEvent,
        stream: Option<Mark>,
    ) -> Result<Message, String> {
        let event = &stored.event;
        let topic = self.topic.fill(event, &self.envelope);
        if topic.is_empty() || !valid_topic(&topic) || topic.contains('\0') {
            return Err(format!("{topic:?} is no topic to publish to"));
        }
        let context = Context::of(event);
        let mut user_properties = Vec::new();
        let mut content_type = None;
        match self.user_properties {
            UserProperties::CloudEvents => {
                let scratch = &mut Vec::new();
                let give = |name: Name, value: &str| {
                    user_properties.push((name.plain().to_owned(), value.to_owned()));
                };
                self.envelope.for_each_attribute(stored, &context, stream, scratch, give);
                content_type = Some(context.content_type.to_owned());
            }
            UserProperties::Id => {
                user_properties.push(("id".to_owned(), self.envelope.id(stored).to_string()));
            }
            UserProperties::None => {}
        }
        let texts = user_properties.iter().map(|(_, value)| value).chain(&content_type);
        if texts.chain([&topic]).any(|text| text.len() > TEXT_BYTES_MAX) {
            return Err("its topic or an attribute is too long for MQTT".to_owned());
        }
        let properties =
            PublishProperties { user_properties, content_type, ..PublishProperties::default() };
        let payload = event.payload.clone();
        let mut packet = Publish::new(&topic, QoS::AtLeastOnce, payload.clone(), Some(properties));
        // It has none yet, and would be counted short.
        packet.pkid = u16::MAX;
        let size_bytes = packet.size();
        if size_bytes > PACKET_BYTES_MAX {
            return Err("it is too large for MQTT".to_owned());
        }
        let properties = packet.properties.unwrap_or_default();
        Ok(Message { topic, payload, properties, size_bytes })
    }
}
