//! MQTT over WebSocket: section 6. Handshake and frames by hand, as everything here.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use crate::harness::wire::{BOTH, Connect, Version, packet, properties};
use crate::server::{Server, name};

const LISTENER: &str =
    "[[listener]]\ntype = \"websocket\"\nbind = \"127.0.0.1:0\"\nin_flight_max = 20";

/// First byte of a frame that is not continued.
const TEXT: u8 = 0x81;
const BINARY: u8 = 0x82;

struct WebSocket(TcpStream);

impl WebSocket {
    /// The connection, and the server's answer to the handshake.
    fn open(server: &Arc<Server>, protocols: &str) -> (Self, String) {
        let mut stream = server.dial(1);
        let request = format!(
            "GET /mqtt HTTP/1.1\r\nHost: gateway\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             {protocols}\r\n"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        (Self(stream), String::from_utf8(head).unwrap().to_ascii_lowercase())
    }

    fn agreed(server: &Arc<Server>) -> Self {
        let (socket, answer) = Self::open(server, "Sec-WebSocket-Protocol: mqttv3.1, mqtt\r\n");
        assert!(answer.starts_with("http/1.1 101 "), "{answer}");
        assert!(answer.contains("\r\nsec-websocket-protocol: mqtt\r\n"), "{answer}");
        socket
    }

    /// A frame of up to 125 bytes, masked as a client has to.
    fn send(&mut self, first: u8, data: &[u8]) {
        let mask = [0xA5, 0x5A, 0x0F, 0xF0];
        let masked = data.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask);
        let head = [&[first, 0x80 | u8::try_from(data.len()).unwrap()][..], &mask].concat();
        self.0.write_all(&head.into_iter().chain(masked).collect::<Vec<u8>>()).unwrap();
    }

    /// Bytes of MQTT from however many frames, all of which are binary.
    fn expect(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let mut head = [0; 2];
            self.0.read_exact(&mut head).unwrap();
            assert_eq!((head[0], head[1] & 0x80), (BINARY, 0), "[MQTT-6.0.0-1]");
            let mut data = vec![0; usize::from(head[1])];
            self.0.read_exact(&mut data).unwrap();
            assert!(bytes.starts_with(&data), "{data:x?}, not {bytes:x?}");
            bytes = &bytes[data.len()..];
        }
    }

    /// Nothing but the end of the WebSocket comes.
    fn expect_closed(mut self) {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).ok();
        assert!(rest.is_empty() || rest[0] == 0x88, "{rest:x?}");
    }
}

/// CONNECT, and a SUBSCRIBE whose SUBACK is known to the byte.
fn packets(version: Version, client_id: &str) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let connect = Connect::new(version, name(version, client_id)).bytes();
    let none = properties(version, &[]);
    let subscribe = packet(0x82, [&[0, 7][..], &none, &[0, 1, b't', 0]].concat());
    let suback = packet(0x90, [&[0, 7][..], &none, &[0]].concat());
    (connect, subscribe, suback)
}

fn connack(server: &Arc<Server>, version: Version) -> Vec<u8> {
    // The same as over TCP.
    server.enter(&Connect::new(version, name(version, "over-tcp"))).1
}

#[test]
fn mqtt_6_0_0_1_a_frame_that_is_not_binary_ends_the_connection() {
    let server = Server::start(LISTENER);
    for version in BOTH {
        let (connect, subscribe, _) = packets(version, "text");
        let mut first = WebSocket::agreed(&server);
        first.send(TEXT, &connect);
        first.expect_closed();
        let mut later = WebSocket::agreed(&server);
        later.send(BINARY, &connect);
        later.expect(&connack(&server, version));
        later.send(TEXT, &subscribe);
        later.expect_closed();
    }
}

#[test]
fn mqtt_6_0_0_2_packets_need_not_align_with_frames() {
    let server = Server::start(LISTENER);
    for version in BOTH {
        let (connect, subscribe, suback) = packets(version, "frames");
        let all = [&connect[..], &subscribe, &[0xC0, 0]].concat();
        let answers = [&connack(&server, version)[..], &suback, &[0xD0, 0]].concat();
        for len in [1, 3, 7, all.len()] {
            let mut socket = WebSocket::agreed(&server);
            for part in all.chunks(len) {
                socket.send(BINARY, part);
            }
            socket.expect(&answers);
        }
    }
}

#[test]
fn mqtt_6_0_0_3_and_4_the_subprotocol_is_mqtt() {
    let server = Server::start(LISTENER);
    for version in BOTH {
        let mut socket = WebSocket::agreed(&server);
        socket.send(BINARY, &packets(version, "protocol").0);
        socket.expect(&connack(&server, version));
    }
    for protocols in ["", "Sec-WebSocket-Protocol: chat, mqttv3.1\r\n"] {
        let (_, answer) = WebSocket::open(&server, protocols);
        assert!(answer.starts_with("http/1.1 400 "), "{answer}");
    }
}
