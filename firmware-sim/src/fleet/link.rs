//! One MQTT connection of one device, over rumqttc's event loop, MQTT 3.1.1 or 5.
//!
//! Invariants: a link uses the packet ids and the DUP flags that the outbox chose; answers come
//! in the order in which the broker gave them; a link that gave an error is of no more use.
//! Deliberately absent: reconnecting and resending. Session state in the broker is not asked for
//! (clean session): the outbox knows what is unacked, and rumqttc silently drops what waited in
//! its channel when a broker has lost the session, so its own resending could not be trusted.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use rumqttc::{mqttbytes::QoS, v5};
use v5::mqttbytes::v5::{PubAckReason, PublishProperties};

/// MQTT version of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    V311,
    V5,
}

/// A connection that failed or was lost, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct LinkError(String);

impl LinkError {
    #[allow(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
    pub(super) fn new(reason: impl ToString) -> Self {
        Self(reason.to_string())
    }
}

/// How to connect.
#[derive(Clone, Debug)]
pub(super) struct LinkOptions {
    /// `host:port`.
    pub(super) broker: String,
    pub(super) client_id: String,
    pub(super) version: Version,
    pub(super) keep_alive: Duration,
    pub(super) in_flight_max: u16,
}

/// What to publish, at QoS 1.
#[derive(Debug)]
pub(super) struct Publish<'a> {
    pub(super) topic: &'a str,
    /// In `1..=window`.
    pub(super) packet_id: u16,
    pub(super) dup: bool,
    pub(super) payload: Bytes,
    pub(super) content_type: &'static str,
}

/// What the broker said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// PUBACK for this packet id.
    Acked(u16),
    /// MQTT 5: a PUBACK with an error; the broker did not take the event.
    Rejected,
}

/// An established connection.
pub(super) enum Link {
    V311(V311),
    V5(V5),
}

impl Link {
    /// Connects, and gives the number of packet ids that may be in flight.
    pub(super) async fn connect(options: LinkOptions) -> Result<(Self, u16), LinkError> {
        let (host, port) = options
            .broker
            .rsplit_once(':')
            .and_then(|(host, port)| Some((host, port.parse().ok()?)))
            .ok_or_else(|| LinkError::new(format!("{:?} is not host:port", options.broker)))?;
        match options.version {
            Version::V311 => {
                let link = V311::connect(&options, host, port).await?;
                Ok((Self::V311(link), options.in_flight_max))
            }
            Version::V5 => {
                let (link, window) = V5::connect(&options, host, port).await?;
                Ok((Self::V5(link), window))
            }
        }
    }

    /// Puts a publish into the connection's buffer. Not cancel safe: a link whose publish was
    /// dropped half way is of no more use.
    pub(super) async fn publish(&mut self, publish: Publish<'_>) -> Result<(), LinkError> {
        match self {
            Self::V311(link) => link.publish(publish).await,
            Self::V5(link) => link.publish(publish),
        }
    }

    /// Sends what [`Link::publish`] put into the buffer.
    pub(super) async fn flush(&mut self) -> Result<(), LinkError> {
        match self {
            Self::V311(link) => link.flush().await,
            // Its event loop does so on its own.
            Self::V5(_) => Ok(()),
        }
    }

    /// Waits for the broker's next answer, and keeps the connection alive meanwhile. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Answer, LinkError> {
        loop {
            let answer = match self {
                Self::V311(link) => {
                    V311::answer(&link.events.poll().await.map_err(LinkError::new)?)
                }
                Self::V5(link) => {
                    let event = link.events.poll().await.map_err(LinkError::new)?;
                    link.answer(&event)
                }
            };
            if let Some(answer) = answer {
                return Ok(answer);
            }
        }
    }

    /// An answer that was read already; also after the error that ended the link.
    pub(super) fn ready(&mut self) -> Option<Answer> {
        match self {
            Self::V311(link) => {
                let events = &mut link.events.state.events;
                std::iter::from_fn(|| events.pop_front()).find_map(|event| V311::answer(&event))
            }
            Self::V5(link) => loop {
                let event = link.events.state.events.pop_front()?;
                if let Some(answer) = link.answer(&event) {
                    return Some(answer);
                }
            },
        }
    }

    /// Says good-bye, so that the broker publishes no will and logs no error.
    pub(super) async fn disconnect(self) -> Result<(), LinkError> {
        match self {
            Self::V311(mut link) => {
                let network = link.events.network.as_mut().ok_or_else(closed)?;
                network.write(rumqttc::Packet::Disconnect).await.map_err(LinkError::new)?;
                link.flush().await
            }
            Self::V5(mut link) => {
                // Not through the channel: rumqttc does not look there while its window is full.
                link.events.pending.push_back(v5::Request::Disconnect);
                loop {
                    let event = link.events.poll().await.map_err(LinkError::new)?;
                    if event == v5::Event::Outgoing(rumqttc::Outgoing::Disconnect) {
                        return Ok(());
                    }
                }
            }
        }
    }
}

fn closed() -> LinkError {
    LinkError::new("the connection is closed")
}

/// MQTT 3.1.1. Publishes go through rumqttc's state and straight into its network buffer, not
/// through its request channel: so a whole window leaves in one write.
pub(super) struct V311 {
    events: Box<rumqttc::EventLoop>,
}

impl V311 {
    async fn connect(options: &LinkOptions, host: &str, port: u16) -> Result<Self, LinkError> {
        let mut mqtt = rumqttc::MqttOptions::new(&options.client_id, host, port);
        mqtt.set_keep_alive(options.keep_alive).set_clean_session(true);
        mqtt.set_inflight(options.in_flight_max);
        let mut events = Box::new(rumqttc::EventLoop::new(mqtt, 1));
        events.network_options.set_tcp_nodelay(true);
        match events.poll().await.map_err(LinkError::new)? {
            rumqttc::Event::Incoming(rumqttc::Packet::ConnAck(_)) => Ok(Self { events }),
            other => Err(LinkError::new(format!("expected CONNACK, got {other:?}"))),
        }
    }

    async fn publish(&mut self, publish: Publish<'_>) -> Result<(), LinkError> {
        let mut packet = rumqttc::Publish::new(publish.topic, QoS::AtLeastOnce, Vec::new());
        packet.pkid = publish.packet_id;
        packet.dup = publish.dup;
        packet.payload = publish.payload;
        let request = rumqttc::Request::Publish(packet);
        let packet = self.events.state.handle_outgoing_packet(request).map_err(LinkError::new)?;
        let packet = packet.ok_or_else(|| LinkError::new("packet id in use"))?;
        let network = self.events.network.as_mut().ok_or_else(closed)?;
        network.write(packet).await.map_err(LinkError::new)
    }

    async fn flush(&mut self) -> Result<(), LinkError> {
        self.events.network.as_mut().ok_or_else(closed)?.flush().await.map_err(LinkError::new)
    }

    fn answer(event: &rumqttc::Event) -> Option<Answer> {
        match event {
            rumqttc::Event::Incoming(rumqttc::Packet::PubAck(ack)) => Some(Answer::Acked(ack.pkid)),
            _ => None,
        }
    }
}

/// MQTT 5. Its network buffer is private, so new events go through rumqttc's channel, and resends,
/// which carry the DUP flag, through its list of pending requests, which it serves first.
///
/// rumqttc numbers packets by itself here; `ids` leads back to the numbers of the outbox. They do
/// not meet an id in use, because the outbox keeps its window over the span of what is unacked.
pub(super) struct V5 {
    client: v5::AsyncClient,
    events: Box<v5::EventLoop>,
    /// The outbox's ids of what rumqttc has not numbered yet, in order.
    queued: VecDeque<u16>,
    /// The outbox's id by rumqttc's, less one.
    ids: Vec<u16>,
}

impl V5 {
    async fn connect(
        options: &LinkOptions,
        host: &str,
        port: u16,
    ) -> Result<(Self, u16), LinkError> {
        let mut mqtt = v5::MqttOptions::new(&options.client_id, host, port);
        mqtt.set_keep_alive(options.keep_alive).set_clean_start(true);
        // Without this limit rumqttc makes room for 65,535 publishes in each client.
        mqtt.set_outgoing_inflight_upper_limit(options.in_flight_max);
        let mut network = mqtt.network_options();
        network.set_tcp_nodelay(true);
        mqtt.set_network_options(network);
        let capacity = usize::from(options.in_flight_max);
        let (client, events) = v5::AsyncClient::new(mqtt, capacity);
        let mut events = Box::new(events);
        match events.poll().await.map_err(LinkError::new)? {
            v5::Event::Incoming(v5::Incoming::ConnAck(ack)) => {
                let receive_max = ack.properties.and_then(|properties| properties.receive_max);
                let window = receive_max.unwrap_or(u16::MAX).clamp(1, options.in_flight_max);
                let ids = vec![0; usize::from(window)];
                Ok((Self { client, events, queued: VecDeque::new(), ids }, window))
            }
            other => Err(LinkError::new(format!("expected CONNACK, got {other:?}"))),
        }
    }

    fn publish(&mut self, publish: Publish<'_>) -> Result<(), LinkError> {
        let Publish { topic, packet_id, dup, payload, content_type } = publish;
        let qos = v5::mqttbytes::QoS::AtLeastOnce;
        let properties = PublishProperties {
            content_type: Some(content_type.to_owned()),
            ..PublishProperties::default()
        };
        if dup {
            let mut packet = v5::mqttbytes::v5::Publish::new(topic, qos, payload, Some(properties));
            packet.dup = true;
            self.events.pending.push_back(v5::Request::Publish(packet));
        } else {
            self.client
                .try_publish_with_properties(topic, qos, false, payload, properties)
                .map_err(LinkError::new)?;
        }
        self.queued.push_back(packet_id);
        Ok(())
    }

    fn answer(&mut self, event: &v5::Event) -> Option<Answer> {
        match event {
            v5::Event::Outgoing(rumqttc::Outgoing::Publish(id)) => {
                let slot = self.ids.get_mut(usize::from(*id).wrapping_sub(1));
                if let (Some(slot), Some(outbox_id)) = (slot, self.queued.pop_front()) {
                    *slot = outbox_id;
                }
                None
            }
            v5::Event::Incoming(v5::Incoming::PubAck(ack)) => match ack.reason {
                PubAckReason::Success | PubAckReason::NoMatchingSubscribers => {
                    let id = self.ids.get(usize::from(ack.pkid).wrapping_sub(1))?;
                    Some(Answer::Acked(*id))
                }
                _ => Some(Answer::Rejected),
            },
            _ => None,
        }
    }
}
