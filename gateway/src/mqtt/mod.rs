//! The MQTT front: 3.1, 3.1.1 and 5 on one port, QoS 0 and 1, subscriptions.
//!
//! Owns: everything between a socket and a ring, and between the durable log and a subscriber.
//! Invariant: a PUBACK leaves only after its event's completion came from the committer, in the
//! order in which the PUBLISHes came.
//! Deliberately absent, until later: QoS 2 and retained messages (refused by the book), sessions
//! that outlive their connection (session present is always 0, and v5 is told an expiry of 0), shared subscriptions and enhanced authentication (refused by the book).
//!
//! # Code map
//! - [`codec`]: bytes and packets, with every rule about single packets; [`reason`], [`topic`].
//! - [`session`]: the protocol as a pure state machine; [`auth`]: what [`crate::access`] decides, in
//!   MQTT's words.
//! - [`conn`]: one task per connection; [`clients`]: one connection per client id.
//! - [`pace`]: how fast a client may publish (pure).
//! - [`listener`]: accepting, TLS, WebSocket, limits, shutdown. [`Front`] is what the wiring holds.
//! - [`subscriptions`], [`envelope`], [`downlink`]: from the log to the subscribers.
//!
//! # Bounds
//! Per connection: one packet of `packet_bytes_max` in the read buffer, [`conn::OUT_BYTES_MAX`] and
//! one delivery in the other, `in_flight_max` publishes held or unacked,
//! [`session::DOWNLINK_IN_FLIGHT_MAX`] deliveries unacked, [`session::TOPIC_ALIAS_MAX`] aliases,
//! [`downlink::SUBSCRIPTIONS_MAX`] filters. Over all: `connections_max`, `held_bytes_max`,
//! [`subscriptions::FILTERS_MAX`] filters, each with half a megabyte of the local bus at most beside
//! its largest message.
//!
//! # Choices where the specification leaves one
//! - A publish that no route takes, or to `$SYS/` or `$share/`: v5 answers 0x90. v3 has no negative
//!   ack and must not get a positive one, so that the connection is closed and the log names the
//!   topic; at QoS 0 the publish is dropped and counted, in both versions.
//! - Retained publishes: v5 is told that there is no retain (0x9A). v3 has no word for that: the
//!   event is stored with its flag, and nothing is kept for later subscribers.
//! - Overlapping subscriptions: one copy for each, with its own QoS and subscription identifier
//!   [MQTT-3.3.4-2], [MQTT-3.3.5-1 of 3.1.1].
//! - Credentials are not looked at where a certificate has decided, or where neither users nor tokens
//!   are configured and the listener lets in anonymous clients.
//! - A publish that the rules do not allow: v5 answers 0x87. v3 is closed, as above.
//! - Who lost rights by a change of the configuration is disconnected (v5: 0x98), so that nothing of
//!   what it had lives on.
//! - Wills are published when the gateway shuts down, too: their connections end without the client's
//!   DISCONNECT. A will delay never applies, as the session ends with the connection.
//! - A client that does not read: its packets are read no more while [`conn::OUT_BYTES_MAX`] wait,
//!   it misses messages of its subscriptions (counted), and is closed after [`conn::WRITE_STALL`].

pub mod auth;
pub mod clients;
pub mod codec;
pub mod conn;
pub mod downlink;
pub mod envelope;
pub mod listener;
pub mod pace;
pub mod reason;
pub mod session;
pub mod stats;
pub mod subscriptions;
pub mod topic;
#[cfg(test)]
pub(crate) mod wire;

pub use conn::{Held, Shared};
pub use downlink::Downlink;
pub use listener::Front;
pub use listener::tls::{Tls, TlsError};
pub use stats::FrontStats;
