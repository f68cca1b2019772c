//! The MQTT sink: publishes to a broker over MQTT 5 at QoS 1, several in flight.
//!
//! Owns: the connection, and the [`Flights`] of what was handed to it. How an event becomes a PUBLISH
//! is in `publish`, what refusals mean in `reasons`.
//!
//! - One connection, one packet after the other: a broker takes them in that order. Only a publish
//!   that the broker itself refuses and that is to be sent again can be overtaken, by those that were
//!   on the wire behind it; with `in_flight_max = 1` not even that one.
//! - A connection's state is never repaired: after any error the client is thrown away, with whatever
//!   it would have sent again by itself, and what was not acked is answered for. The next request
//!   makes a new one. Sessions are clean: the log is our memory, not the broker's.
//! - The watchdog throws it away as well: nothing moved for `request_timeout` though something was
//!   owed.
//!
//! Deliberately absent: retained messages, QoS 2 (the log sends again after a lost ack, so it would
//! save nothing), and subscribing.

mod flights;
mod publish;
mod reasons;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, ConnectionError, Event, EventLoop, MqttOptions, StateError};
use rumqttc::{Outgoing, TlsConfiguration, Transport};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use self::flights::{Cause, Flights, Place};
use self::publish::{Message, Publisher};
use crate::cloudevents::Envelope;
use crate::config::{MqttConfig, SinkConfig};
use crate::sink::{Failure, Request, RequestId, Sink, Window};
use crate::{secret, tls};

const WINDOW: Window = Window { requests_max: 16, events_max: 2_000, bytes_max: 4 * 1024 * 1024 };

/// A silent connection is asked so often whether it is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Largest packet that a broker may send us: we subscribe to nothing.
const INCOMING_BYTES_MAX: u32 = 64 * 1024;

/// Publishes requests to an MQTT broker.
pub(crate) struct MqttSink {
    config: MqttConfig,
    client_id: String,
    publisher: Publisher,
    request_timeout: Duration,
    client: Option<AsyncClient>,
    /// The connection at work: one task, away while there is none.
    connection: JoinSet<()>,
    shared: Arc<Shared>,
    /// When the flights were last seen to move, and how far they were.
    alive: (Instant, u64),
}

struct Shared {
    flights: Mutex<Flights>,
    changed: Notify,
    /// Largest packet that the broker takes, as far as it has said.
    packet_bytes_max: AtomicUsize,
}

impl Shared {
    fn flights(&self) -> MutexGuard<'_, Flights> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn broke(&self, cause: Cause) {
        self.flights().broke(cause);
        self.changed.notify_one();
    }
}

impl MqttSink {
    /// A sink of this name; its client id is the gateway's and its own, unless one is set.
    pub(crate) fn new(config: MqttConfig, envelope: Envelope, sink: &SinkConfig) -> Self {
        let client_id = config
            .client_id
            .clone()
            .unwrap_or_else(|| format!("{}-{}", envelope.gateway(), sink.name));
        let publisher = Publisher {
            envelope,
            topic: config.topic.clone(),
            user_properties: config.user_properties,
        };
        let shared = Shared {
            flights: Mutex::default(),
            changed: Notify::new(),
            packet_bytes_max: AtomicUsize::new(usize::MAX),
        };
        Self {
            config,
            client_id,
            publisher,
            request_timeout: sink.request_timeout,
            client: None,
            connection: JoinSet::new(),
            shared: Arc::new(shared),
            alive: (Instant::now(), 0),
        }
    }

    /// Begins a connection; what is wrong with it is reported into the flights.
    fn connect(&mut self) -> AsyncClient {
        let mut options = MqttOptions::new(&self.client_id, &self.config.host, self.config.port);
        options
            .set_keep_alive(KEEP_ALIVE)
            .set_clean_start(true)
            .set_connection_timeout(self.request_timeout.as_secs().max(1))
            .set_max_packet_size(Some(INCOMING_BYTES_MAX))
            .set_outgoing_inflight_upper_limit(self.config.in_flight_max);
        let mut network = options.network_options();
        network.set_tcp_nodelay(true);
        options.set_network_options(network);
        // Twice the window: the client lets go of what was acked a moment later.
        let (client, events) = AsyncClient::new(options, 2 * WINDOW.events_max);
        let (config, shared) = (self.config.clone(), Arc::clone(&self.shared));
        self.connection.spawn(async move {
            let read = tokio::task::spawn_blocking(move || Secrets::read(&config)).await;
            match read {
                Ok(Ok(secrets)) => follow(secrets.give(events), &shared).await,
                Ok(Err(reason)) => shared.broke(Cause { failure: Failure::Hold, reason }),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        });
        self.client = Some(client.clone());
        client
    }

    /// When the watchdog bites: a request timeout after the last sign of life.
    fn deadline(&mut self) -> Option<Instant> {
        let flights = self.shared.flights();
        if flights.moves() != self.alive.1 || flights.is_empty() {
            self.alive = (Instant::now(), flights.moves());
        }
        (!flights.is_empty()).then(|| self.alive.0 + self.request_timeout)
    }
}

impl Sink for MqttSink {
    fn window(&self) -> Window {
        WINDOW
    }

    fn begin(&mut self, request: Request) {
        {
            let mut flights = self.shared.flights();
            if flights.is_empty() {
                // The watchdog does not count the idle time before.
                self.alive = (Instant::now(), flights.moves());
            }
            flights.admit(request.id, request.events.len());
            if flights.is_broken() {
                return;
            }
        }
        let client = self.client.clone().unwrap_or_else(|| self.connect());
        for (index, stored) in request.events.iter().enumerate() {
            let place = Place { request: request.id, index };
            let most = self.shared.packet_bytes_max.load(Ordering::Relaxed);
            let message = match self.publisher.publish(stored, request.stream) {
                Ok(message) if message.size_bytes > most => Err(too_large(most)),
                written => written,
            };
            let mut flights = self.shared.flights();
            let is_complete = match message {
                Ok(Message { topic, payload, properties, .. }) => {
                    // Before the client has it: its report may come at once.
                    flights.handed(place);
                    let qos = QoS::AtLeastOnce;
                    let taken =
                        client.try_publish_with_properties(topic, qos, false, payload, properties);
                    // The window is well under its capacity: a client that takes no more is gone.
                    if taken.is_err() {
                        let reason = "the connection has ended".to_owned();
                        flights.broke(Cause { failure: Failure::Retry { after: None }, reason });
                    }
                    flights.is_broken()
                }
                Err(reason) => flights.refused(place, reason),
            };
            if is_complete {
                self.shared.changed.notify_one();
            }
        }
    }

    async fn answer(&mut self) -> (RequestId, crate::sink::Answer) {
        loop {
            if self.shared.flights().is_broken() {
                self.client = None;
                self.connection.abort_all();
                while let Some(ended) = self.connection.join_next().await {
                    // A bug of ours: it ends this sink's task and no other.
                    if let Err(error) = ended
                        && error.is_panic()
                    {
                        std::panic::resume_unwind(error.into_panic());
                    }
                }
                self.shared.flights().settle();
            }
            if let Some(answered) = self.shared.flights().take_answer() {
                return answered;
            }
            match self.deadline() {
                Some(deadline) if deadline <= Instant::now() => {
                    let reason =
                        format!("the broker did not answer within {:?}", self.request_timeout);
                    self.shared.broke(Cause { failure: Failure::Retry { after: None }, reason });
                }
                Some(deadline) => {
                    let changed = self.shared.changed.notified();
                    // Either way the loop looks again.
                    let _ = tokio::time::timeout_at(deadline.into(), changed).await;
                }
                None => self.shared.changed.notified().await,
            }
        }
    }
}

/// What is read from files and the environment for one connection.
struct Secrets {
    credentials: Option<(String, String)>,
    transport: Transport,
}

impl Secrets {
    fn read(config: &MqttConfig) -> Result<Self, String> {
        let credentials = match &config.credentials {
            None => None,
            Some((username, None)) => Some((username.clone(), String::new())),
            Some((username, Some(password))) => {
                let password = secret::read(password, "password")?;
                Some((username.clone(), password.reveal().to_owned()))
            }
        };
        let transport = match &config.tls {
            None => Transport::Tcp,
            Some(files) => Transport::Tls(TlsConfiguration::Rustls(tls::client(files)?)),
        };
        Ok(Self { credentials, transport })
    }

    fn give(self, mut events: EventLoop) -> EventLoop {
        if let Some((username, password)) = self.credentials {
            events.options.set_credentials(username, password);
        }
        events.options.set_transport(self.transport);
        events
    }
}

/// Drives a connection until it is of no more use, and reports what it does.
async fn follow(mut events: EventLoop, shared: &Shared) {
    loop {
        let event = events.poll().await;
        let mut flights = shared.flights();
        match event {
            Ok(Event::Outgoing(Outgoing::Publish(packet_id))) => flights.sent(packet_id),
            Ok(Event::Incoming(Packet::PubAck(ack))) => {
                if flights.acked(ack.pkid, reasons::refused(&ack)) {
                    shared.changed.notify_one();
                }
            }
            Ok(Event::Incoming(Packet::ConnAck(ack))) => {
                let most = ack.properties.and_then(|properties| properties.max_packet_size);
                let most = most.map_or(usize::MAX, |most| most as usize);
                shared.packet_bytes_max.store(most, Ordering::Relaxed);
                // A broker that wants no keep-alive says 0, which the client takes for "at once".
                if events.options.keep_alive().is_zero() {
                    events.options.set_keep_alive(KEEP_ALIVE);
                }
            }
            Ok(_) => {}
            Err(error) => {
                if let ConnectionError::MqttState(StateError::Deserialization(
                    rumqttc::v5::mqttbytes::Error::OutgoingPacketTooLarge { max, .. },
                )) = &error
                {
                    // It was handed over before the broker had said what it takes.
                    flights.next_refused(too_large(*max as usize));
                }
                flights.broke(reasons::ended(&error));
                shared.changed.notify_one();
            }
        }
        if flights.is_broken() {
            return;
        }
    }
}

fn too_large(most: usize) -> String {
    format!("it is larger than the broker takes ({most} bytes)")
}

#[cfg(test)]
mod tests;
