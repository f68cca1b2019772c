//! MQTT 3.1.1 and 5 by the book: raw bytes at a real gateway process, one test per normative
//! statement that concerns a server, named after it. Numbers are those of MQTT 5 unless a name says
//! 3.1.1; most tests run in both versions.
//!
//! The tests of this target share one gateway and have client ids and topics of their own.

mod harness;

#[path = "conformance/connect.rs"]
mod connect;
#[path = "conformance/hostile.rs"]
mod hostile;
#[path = "conformance/packets.rs"]
mod packets;
#[path = "conformance/publish.rs"]
mod publish;
#[path = "conformance/server.rs"]
mod server;
#[path = "conformance/sessions.rs"]
mod sessions;
#[path = "conformance/statements.rs"]
mod statements;
#[path = "conformance/subscribe.rs"]
mod subscribe;
#[path = "conformance/websocket.rs"]
mod websocket;
#[path = "conformance/wills.rs"]
mod wills;
