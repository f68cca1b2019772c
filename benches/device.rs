//! As much of MQTT 3.1.1 as a device needs that publishes with QoS 1.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

/// DISCONNECT.
pub(crate) const DISCONNECT: [u8; 2] = [0xe0, 0];

/// Bytes of a PUBACK.
pub(crate) const PUBACK_BYTES: usize = 4;

/// A connection with a clean session.
pub(crate) fn connect(mqtt: SocketAddr, client_id: &str) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(mqtt)?;
    stream.set_nodelay(true)?;
    let mut connect = b"\x00\x04MQTT\x04\x02\x00\x00".to_vec();
    put_text(&mut connect, client_id);
    stream.write_all(&packet(0x10, &connect))?;
    stream.read_exact(&mut [0; 4])?;
    Ok(stream)
}

/// PUBLISH.
pub(crate) fn publish(topic: &str, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut publish = Vec::new();
    put_text(&mut publish, topic);
    publish.extend(id.to_be_bytes());
    publish.extend(payload);
    packet(0x32, &publish)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u16).to_be_bytes());
    out.extend(text.as_bytes());
}

fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    let mut left = body.len();
    loop {
        let more = if left > 127 { 0x80 } else { 0 };
        out.push((left % 128) as u8 | more);
        left /= 128;
        if left == 0 {
            break;
        }
    }
    out.extend(body);
    out
}
