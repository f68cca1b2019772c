//! The MQTT front: 3.1, 3.1.1 and 5 on one port.
//!
//! Owns: everything between a socket and a ring, and between the durable log and a subscriber.
//! Invariant: a PUBACK or PUBREC leaves only after its event's completion came from the committer, a
//! PUBCOMP only after the end of its receipt is durable, each in the order of what it answers.
//! Deliberately absent, until later: enhanced authentication (refused by the book).
//!
//! # Code map
//! - [`codec`]: bytes and packets, with every rule about single packets; [`reason`], [`topic`].
//! - [`session`]: the protocol as a pure state machine; [`auth`]: what [`crate::access`] decides, in
//!   MQTT's words.
//! - [`conn`]: one task per connection; [`clients`]: one connection per client id.
//! - [`pace`]: how fast a client may publish (pure).
//! - [`listener`]: accepting, TLS, WebSocket, limits, shutdown. [`Front`] is what the wiring holds.
//! - [`sessions`]: what outlives connections: subscriptions, receipts, waiting messages, wills;
//!   [`retained`]: the last message of each topic; [`rows`]: how both lie in the store.
//! - [`subscriptions`], [`envelope`], [`downlink`]: from the log to the subscribers.
//!
//! # Bounds
//! Per connection: one packet of `packet_bytes_max` in the read buffer, [`conn::OUT_BYTES_MAX`] and
//! one delivery in the other, `in_flight_max` publishes held or unacked and (v3) four times as many
//! QoS 2 receipts, [`session::DOWNLINK_IN_FLIGHT_MAX`] deliveries unacked,
//! [`session::TOPIC_ALIAS_MAX`] aliases, [`downlink::SUBSCRIPTIONS_MAX`] filters. Over all:
//! `connections_max`, `held_bytes_max`, the bounds of `[sessions]` and `[retained]`,
//! [`subscriptions::FILTERS_MAX`] filters; per connection that subscribes, half a megabyte of the local
//! bus at most beside its largest message, of which a message that goes to many is there once.
//!
//! # Choices where the specification leaves one
//! - A publish that no route takes, or to `$SYS/` or `$share/`: v5 answers 0x90. v3 has no negative
//!   ack and must not get a positive one, so that the connection is closed and the log names the
//!   topic; at QoS 0 the publish is dropped and counted, in both versions.
//! - A retained publish past the bounds of `[retained]` is stored and acked as any other, and is not
//!   retained: what was retained before is not the last any more, and goes.
//! - Overlapping subscriptions: one copy, in all versions, with the highest QoS and all identifiers
//!   [MQTT-3.3.4-2], [MQTT-3.3.5-1 of 3.1.1]; the publisher's retain flag if one of them asks for it. A
//!   retained message that is due to a new subscription comes for that one alone.
//! - After an UNSUBSCRIBE messages still come that were on their way to the client [MQTT-3.10.4-2].
//! - Shared subscriptions, in all versions: each message goes to one member, in turns among those that
//!   are connected; where none is, a member whose session is kept gets it when it is back.
//! - A PUBACK of v5 says 0x10 where no sink is configured and nobody subscribes: the event is stored,
//!   and for nobody yet.
//! - Names with control characters or non-characters are refused (MQTT 5, 1.5.4): client ids, user
//!   names, topics and filters. Other strings may have them.
//! - A subscription identifier in a client's PUBLISH is ignored; several are a protocol error.
//! - An answer that does not fit the QoS of its message ends the connection; one to no message that
//!   is known does not, as after a restart of either side.
//! - A v5 client that takes topic aliases gets its first topics by alias.
//! - After a connection is ended what the client still sends is read and dropped, for two seconds at
//!   most, so that it sees why.
//! - A SUBSCRIBE takes its turn behind the publishes that came before it on its connection: whoever
//!   retains a message and subscribes finds it.
//! - A session's messages of QoS 1 and 2 are sent from its durable queue also while it is connected;
//!   messages of QoS 0 do not wait for who is away.
//! - Credentials are not looked at where a certificate has decided, or where neither users nor tokens
//!   are configured and the listener lets in anonymous clients.
//! - A publish that the rules do not allow: v5 answers 0x87. v3 is closed, as above.
//! - Who lost rights by a change of the configuration is disconnected (v5: 0x98), so that nothing of
//!   what it had lives on. A session that is kept loses, when its client is back, the subscriptions that
//!   the rules do not allow any more, and what waits for it of their topics; a will that they do not
//!   allow when it is due is not published.
//! - A session that is kept belongs to the user whose client began it. Another user, or an anonymous
//!   client, with its client id is refused (0x87; 3.1.1: 5), clean start or not: it would read what
//!   waits there, or end it. The session of an anonymous client is nobody's: a user gets a new one.
//! - Wills are published when the gateway shuts down, too: their connections end without the client's
//!   DISCONNECT. After a crash a will waits for [`sessions::GRACE`] at least, in which its client may
//!   come back.
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
pub mod retained;
pub mod rows;
pub mod session;
pub mod sessions;
pub mod stats;
pub mod subscriptions;
pub mod topic;
#[cfg(test)]
pub(crate) mod wire;

pub use conn::{Bounds, Held, Shared};
pub use downlink::Downlink;
pub use listener::Front;
pub use listener::tls::{Tls, TlsError};
pub use retained::Retained;
pub use stats::FrontStats;
