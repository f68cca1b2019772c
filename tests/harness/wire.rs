//! Raw MQTT: packets written by hand and a blocking socket, so that nothing is shared with what is
//! tested.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use super::PATIENCE;

/// Protocol version of a raw client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    V31,
    V311,
    V5,
}

pub(crate) use Version::{V5, V31, V311};

/// The two current ones.
pub(crate) const BOTH: [Version; 2] = [V311, V5];

impl Version {
    pub(crate) fn is_v5(self) -> bool {
        self == V5
    }
}

/// A string or binary field with its length.
pub(crate) fn field(data: impl AsRef<[u8]>) -> Vec<u8> {
    let data = data.as_ref();
    [&u16::try_from(data.len()).unwrap().to_be_bytes(), data].concat()
}

/// A variable byte integer in its shortest form.
pub(crate) fn variable(mut value: usize) -> Vec<u8> {
    let mut out = Vec::new();
    while value > 127 {
        out.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap());
    out
}

/// A packet with its length.
pub(crate) fn packet(first: u8, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    [&[first][..], &variable(content.len()), content].concat()
}

/// A property list with its length; nothing before v5.
pub(crate) fn properties(version: Version, list: &[u8]) -> Vec<u8> {
    if version.is_v5() { [variable(list.len()), list.to_vec()].concat() } else { Vec::new() }
}

/// CONNECT, field by field.
#[derive(Clone, Debug)]
pub(crate) struct Connect {
    pub(crate) version: Version,
    pub(crate) flags: u8,
    pub(crate) keep_alive: u16,
    pub(crate) properties: Vec<u8>,
    pub(crate) client_id: String,
    /// What follows the client id.
    pub(crate) rest: Vec<u8>,
}

impl Connect {
    /// A clean start.
    pub(crate) fn new(version: Version, client_id: impl Into<String>) -> Self {
        Self {
            version,
            flags: 0x02,
            keep_alive: 0,
            properties: Vec::new(),
            client_id: client_id.into(),
            rest: Vec::new(),
        }
    }

    /// A session that is kept for an hour (v5), or as long as the server does.
    pub(crate) fn kept(version: Version, client_id: impl Into<String>) -> Self {
        let properties = if version.is_v5() { vec![0x11, 0, 0, 0x0E, 0x10] } else { Vec::new() };
        Self { flags: 0, properties, ..Self::new(version, client_id) }
    }

    pub(crate) fn will(mut self, flags: u8, list: &[u8], topic: &str, payload: &str) -> Self {
        self.flags |= 0x04 | flags;
        self.rest = [properties(self.version, list), field(topic), field(payload)].concat();
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let (name, level) = match self.version {
            V31 => ("MQIsdp", 3),
            V311 => ("MQTT", 4),
            V5 => ("MQTT", 5),
        };
        self.bytes_as(name, level)
    }

    pub(crate) fn bytes_as(&self, name: &str, level: u8) -> Vec<u8> {
        let head = [&field(name)[..], &[level, self.flags], &self.keep_alive.to_be_bytes()];
        let content = [
            head.concat(),
            properties(self.version, &self.properties),
            field(&self.client_id),
            self.rest.clone(),
        ];
        packet(0x10, content.concat())
    }
}

/// PUBLISH. `first` is the first byte; an id is written where it asks for one.
pub(crate) fn publish(
    version: Version,
    first: u8,
    topic: &str,
    id: u16,
    list: &[u8],
    payload: &str,
) -> Vec<u8> {
    let id = if first & 6 == 0 { Vec::new() } else { id.to_be_bytes().to_vec() };
    let content = [field(topic), id, properties(version, list), payload.as_bytes().to_vec()];
    packet(first, content.concat())
}

pub(crate) fn subscribe(version: Version, id: u16, filters: &[(&str, u8)]) -> Vec<u8> {
    subscribe_with(version, id, &[], filters)
}

pub(crate) fn subscribe_with(
    version: Version,
    id: u16,
    list: &[u8],
    filters: &[(&str, u8)],
) -> Vec<u8> {
    let filters = filters.iter().flat_map(|(filter, o)| [field(filter), vec![*o]].concat());
    let filters: Vec<u8> = filters.collect();
    packet(0x82, [&id.to_be_bytes()[..], &properties(version, list), &filters].concat())
}

pub(crate) fn unsubscribe(version: Version, id: u16, filters: &[&str]) -> Vec<u8> {
    let filters: Vec<u8> = filters.iter().flat_map(field).collect();
    packet(0xA2, [&id.to_be_bytes()[..], &properties(version, &[]), &filters].concat())
}

/// PUBACK, PUBREC, PUBREL (0x62) or PUBCOMP with success.
pub(crate) fn ack(first: u8, id: u16) -> Vec<u8> {
    packet(first, id.to_be_bytes())
}

/// A PUBLISH taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) first: u8,
    pub(crate) topic: String,
    pub(crate) id: u16,
    pub(crate) properties: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Message {
    pub(crate) fn of(version: Version, packet: &[u8]) -> Self {
        assert_eq!(packet.first().map(|first| first & 0xF0), Some(0x30), "no PUBLISH: {packet:x?}");
        let first = packet[0];
        let head = 1 + packet[1..].iter().take_while(|byte| **byte & 0x80 != 0).count() + 1;
        let mut rest = &packet[head..];
        let topic_len = usize::from(u16::from_be_bytes([rest[0], rest[1]]));
        let topic = String::from_utf8(rest[2..2 + topic_len].to_vec()).unwrap();
        rest = &rest[2 + topic_len..];
        let mut id = 0;
        if first & 6 != 0 {
            id = u16::from_be_bytes([rest[0], rest[1]]);
            rest = &rest[2..];
        }
        let mut properties = Vec::new();
        if version.is_v5() {
            let len = usize::from(rest[0]);
            assert!(len < 128, "a short property list");
            properties = rest[1..=len].to_vec();
            rest = &rest[1 + len..];
        }
        Self { first, topic, id, properties, payload: rest.to_vec() }
    }

    pub(crate) fn qos(&self) -> u8 {
        (self.first >> 1) & 3
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.payload).unwrap()
    }
}

/// A blocking connection.
pub(crate) struct Raw {
    pub(crate) version: Version,
    stream: TcpStream,
}

impl Raw {
    pub(crate) fn open(address: SocketAddr, version: Version) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { version, stream })
    }

    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next packet whole; `None` when the server has closed.
    pub(crate) fn try_packet(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let mut packet = vec![0];
        match self.stream.read(&mut packet) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error),
        }
        let mut remaining = 0;
        for i in 0..4 {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            packet.push(byte[0]);
            remaining |= usize::from(byte[0] & 0x7f) << (7 * i);
            if byte[0] & 0x80 == 0 {
                break;
            }
        }
        let head = packet.len();
        packet.resize(head + remaining, 0);
        self.stream.read_exact(&mut packet[head..])?;
        Ok(Some(packet))
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).unwrap();
    }

    /// The next packet; empty when the server has closed.
    pub(crate) fn packet(&mut self) -> Vec<u8> {
        self.try_packet().expect("a packet or the end").unwrap_or_default()
    }

    pub(crate) fn expect(&mut self, bytes: &[u8]) {
        let packet = self.packet();
        assert_eq!(packet, bytes, "expected {bytes:x?}, not {packet:x?}");
    }

    /// The next packet is an ack of this kind and id that says success. A PUBACK of v5 may say beside that nobody subscribes.
    pub(crate) fn expect_ack(&mut self, first: u8, id: u16) {
        let packet = self.packet();
        let unheard = [&[0x40, 3][..], &id.to_be_bytes(), &[0x10]].concat();
        if !(first == 0x40 && self.version.is_v5() && packet == unheard) {
            assert_eq!(packet, ack(first, id));
        }
    }

    /// The next packet is an ack of v5 that refuses, and says why.
    pub(crate) fn expect_refusal(&mut self, first: u8, id: u16, code: u8) {
        let packet = self.packet();
        let [high, low] = id.to_be_bytes();
        assert_eq!((packet[0], &packet[2..5]), (first, &[high, low, code][..]), "{packet:x?}");
        // A property list with a reason string and nothing else.
        let why = packet.get(9..).unwrap_or_default();
        let said = [&[packet.len() as u8 - 6, 0x1F, 0, why.len() as u8][..], why].concat();
        assert!(!why.is_empty() && packet[5..] == said, "no reason string: {packet:x?}");
        std::str::from_utf8(why).expect("text");
    }

    pub(crate) fn message(&mut self) -> Message {
        let packet = self.packet();
        Message::of(self.version, &packet)
    }

    pub(crate) fn expect_closed(&mut self) {
        self.expect(&[]);
    }

    /// v5 is told why, then the connection is closed; before v5 it is closed.
    pub(crate) fn expect_end(&mut self, code: u8) {
        if self.version.is_v5() {
            let disconnect = self.packet();
            assert_eq!(disconnect.first(), Some(&0xE0), "no DISCONNECT: {disconnect:x?}");
            assert_eq!(disconnect[2], code, "another reason: {disconnect:x?}");
        }
        self.expect_closed();
    }

    /// As [`Raw::expect_end`], where one of several reasons will do.
    pub(crate) fn expect_end_of(&mut self, codes: &[u8]) {
        if self.version.is_v5() {
            let disconnect = self.packet();
            assert_eq!(disconnect.first(), Some(&0xE0), "no DISCONNECT: {disconnect:x?}");
            assert!(codes.contains(&disconnect[2]), "another reason: {disconnect:x?}");
        }
        self.expect_closed();
    }

    /// Nothing was said before the answer to this.
    pub(crate) fn ping(&mut self) {
        self.send(&[0xC0, 0]);
        self.expect(&[0xD0, 0]);
    }

    pub(crate) fn subscribe(&mut self, filter: &str, options: u8) {
        self.send(&subscribe(self.version, 9, &[(filter, options)]));
        let suback = self.packet();
        assert_eq!((suback[0], *suback.last().unwrap()), (0x90, options & 3), "{suback:x?}");
    }

    /// Our side ends, without a word.
    pub(crate) fn cut(self) {
        self.stream.shutdown(Shutdown::Both).ok();
    }
}
