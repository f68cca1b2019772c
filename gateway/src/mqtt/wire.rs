//! Raw packets for tests: written by hand, so that they share nothing with what they test.

use bytes::BytesMut;

use super::codec::Version;

pub(crate) const V3: Version = Version::V3;
pub(crate) const V5: Version = Version::V5;
pub(crate) const BOTH: [Version; 2] = [V3, V5];

pub(crate) fn field(data: impl AsRef<[u8]>) -> Vec<u8> {
    let data = data.as_ref();
    [&(data.len() as u16).to_be_bytes(), data].concat()
}

/// A packet with its length in the shortest form.
pub(crate) fn packet(first: u8, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    let mut out = vec![first];
    let mut len = content.len();
    while len > 127 {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend(content);
    out
}

/// A property list with its length, of less than 128 bytes; nothing in v3.
pub(crate) fn properties(version: Version, list: &[u8]) -> Vec<u8> {
    match version {
        Version::V3 => Vec::new(),
        Version::V5 => [&[u8::try_from(list.len()).unwrap()], list].concat(),
    }
}

/// CONNECT: what each field says is the tests' choice.
#[derive(Clone)]
pub(crate) struct ConnectPacket {
    pub version: Version,
    pub flags: u8,
    pub keep_alive: u16,
    pub properties: Vec<u8>,
    /// What follows the client id.
    pub rest: Vec<u8>,
    pub client_id: &'static str,
}

impl ConnectPacket {
    pub(crate) fn new(version: Version) -> Self {
        Self {
            version,
            flags: 0x02,
            keep_alive: 0,
            properties: Vec::new(),
            rest: Vec::new(),
            client_id: "dev",
        }
    }

    pub(crate) fn will(mut self, qos: u8, topic: &str, payload: &str) -> Self {
        self.flags |= 0x04 | qos << 3;
        self.rest = [properties(self.version, &[]), field(topic), field(payload)].concat();
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let level = if self.version == V3 { 4 } else { 5 };
        let head = [&field("MQTT")[..], &[level, self.flags], &self.keep_alive.to_be_bytes()];
        packet(
            0x10,
            [
                head.concat(),
                properties(self.version, &self.properties),
                field(self.client_id),
                self.rest.clone(),
            ]
            .concat(),
        )
    }
}

pub(crate) fn connect(version: Version) -> Vec<u8> {
    ConnectPacket::new(version).bytes()
}

/// PUBLISH of QoS 0 (no id) or 1.
pub(crate) fn publish(version: Version, topic: &str, id: Option<u16>, payload: &str) -> Vec<u8> {
    publish_with(version, if id.is_some() { 0x32 } else { 0x30 }, topic, id, &[], payload)
}

pub(crate) fn publish_with(
    version: Version,
    first: u8,
    topic: &str,
    id: Option<u16>,
    list: &[u8],
    payload: &str,
) -> Vec<u8> {
    let id = id.map(u16::to_be_bytes);
    let id = id.as_ref().map_or(&[][..], |id| id);
    packet(first, [&field(topic)[..], id, &properties(version, list), payload.as_bytes()].concat())
}

pub(crate) fn subscribe(version: Version, id: u16, filters: &[(&str, u8)]) -> Vec<u8> {
    let filters: Vec<u8> =
        filters.iter().flat_map(|(filter, o)| [field(filter), vec![*o]].concat()).collect();
    packet(0x82, [&id.to_be_bytes()[..], &properties(version, &[]), &filters].concat())
}

pub(crate) fn unsubscribe(version: Version, id: u16, filters: &[&str]) -> Vec<u8> {
    let filters: Vec<u8> = filters.iter().flat_map(field).collect();
    packet(0xA2, [&id.to_be_bytes()[..], &properties(version, &[]), &filters].concat())
}

pub(crate) fn puback(id: u16) -> Vec<u8> {
    packet(0x40, id.to_be_bytes())
}

pub(crate) fn buf(bytes: impl AsRef<[u8]>) -> BytesMut {
    BytesMut::from(bytes.as_ref())
}
