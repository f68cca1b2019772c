//! A subscriber that writes what it receives as a received ledger.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use firmware_sim::ledger::{RECEIVED_HEADER, ReceivedRow};
use firmware_sim::payload::identify;
use rumqttc::{mqttbytes::QoS, v5};
use tokio::task::JoinSet;

use super::eventually;

const KEEP_ALIVE: Duration = Duration::from_secs(30);
const REQUESTS_MAX: usize = 16;

/// Subscribed until it is dropped.
pub(crate) struct Subscriber {
    seen: Arc<Mutex<Seen>>,
    _task: JoinSet<()>,
}

#[derive(Default)]
struct Seen {
    subscribed: bool,
    rows: u64,
    ledger: Vec<u8>,
}

impl Subscriber {
    /// Subscribes over MQTT 3.1.1 at QoS 1, and returns after the SUBACK.
    pub(crate) async fn v311(broker: SocketAddr, client_id: &str, filter: &str) -> Self {
        use rumqttc::{AsyncClient, Event, MqttOptions, Packet};
        let mut options = MqttOptions::new(client_id, broker.ip().to_string(), broker.port());
        options.set_keep_alive(KEEP_ALIVE);
        let (client, mut events) = AsyncClient::new(options, REQUESTS_MAX);
        client.subscribe(filter, QoS::AtLeastOnce).await.unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let shared = Arc::clone(&seen);
        let follow = async move {
            // Held here: without its client the event loop ends.
            let _client = client;
            loop {
                match events.poll().await {
                    Ok(Event::Incoming(Packet::SubAck(_))) => lock(&shared).subscribed = true,
                    Ok(Event::Incoming(Packet::Publish(publish))) => {
                        lock(&shared).record(&publish.payload);
                    }
                    Ok(_) => {}
                    Err(ended) => return println!("the MQTT 3.1.1 subscriber ended: {ended}"),
                }
            }
        };
        Self::subscribed(seen, follow).await
    }

    /// Subscribes over MQTT 5 at QoS 1, and returns after the SUBACK.
    pub(crate) async fn v5(broker: SocketAddr, client_id: &str, filter: &str) -> Self {
        use v5::mqttbytes::v5::Packet;
        use v5::{AsyncClient, Event, MqttOptions};
        let mut options = MqttOptions::new(client_id, broker.ip().to_string(), broker.port());
        options.set_keep_alive(KEEP_ALIVE);
        let (client, mut events) = AsyncClient::new(options, REQUESTS_MAX);
        client.subscribe(filter, v5::mqttbytes::QoS::AtLeastOnce).await.unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let shared = Arc::clone(&seen);
        let follow = async move {
            let _client = client;
            loop {
                match events.poll().await {
                    Ok(Event::Incoming(Packet::SubAck(_))) => lock(&shared).subscribed = true,
                    Ok(Event::Incoming(Packet::Publish(publish))) => {
                        lock(&shared).record(&publish.payload);
                    }
                    Ok(_) => {}
                    Err(ended) => return println!("the MQTT 5 subscriber ended: {ended}"),
                }
            }
        };
        Self::subscribed(seen, follow).await
    }

    async fn subscribed(
        seen: Arc<Mutex<Seen>>,
        follow: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let mut task = JoinSet::new();
        task.spawn(follow);
        let subscriber = Self { seen, _task: task };
        eventually("a SUBACK", async || lock(&subscriber.seen).subscribed.then_some(())).await;
        subscriber
    }

    /// Publishes received so far.
    pub(crate) fn received(&self) -> u64 {
        lock(&self.seen).rows
    }

    /// Writes what was received as a received ledger.
    pub(crate) fn write_ledger(&self, path: &Path) {
        let rows = &lock(&self.seen).ledger;
        let text = [RECEIVED_HEADER.as_bytes(), b"\n", rows].concat();
        std::fs::write(path, text).unwrap();
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Seen {
    fn record(&mut self, payload: &Bytes) {
        let (device, origin) = match identify(payload) {
            Some((device, origin)) => (device, Some(origin)),
            None => (String::new(), None),
        };
        ReceivedRow {
            arrival: self.rows,
            received_us: 0,
            device: Cow::Owned(device),
            origin,
            place: None,
            id: Cow::Borrowed(""),
        }
        .write_to(&mut self.ledger);
        self.rows += 1;
    }
}
