//! MQTT 3.1.1 and 5 by hand over any stream: for tests that look at single answers.

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use super::PATIENCE;

/// A client that says what it is told to.
pub(crate) struct Raw<S> {
    pub(crate) stream: S,
    v5: bool,
}

/// What a CONNECT says.
#[derive(Clone, Copy, Default)]
pub(crate) struct Hello<'a> {
    pub(crate) client_id: &'a str,
    pub(crate) user: Option<&'a str>,
    pub(crate) password: Option<&'a str>,
}

fn field(data: &str) -> Vec<u8> {
    [&(data.len() as u16).to_be_bytes(), data.as_bytes()].concat()
}

fn packet(first: u8, content: &[u8]) -> Vec<u8> {
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

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    /// Connects; the code of the CONNACK, or `None` if there is none.
    pub(crate) async fn connect(stream: S, v5: bool, hello: Hello<'_>) -> (Self, Option<u8>) {
        let mut raw = Self { stream, v5 };
        let flags =
            0x02 | u8::from(hello.user.is_some()) << 7 | u8::from(hello.password.is_some()) << 6;
        let mut content = [&field("MQTT")[..], &[if v5 { 5 } else { 4 }, flags, 0, 0]].concat();
        content.extend(raw.no_properties());
        content.extend(field(hello.client_id));
        content.extend(hello.user.map(field).unwrap_or_default());
        content.extend(hello.password.map(field).unwrap_or_default());
        raw.send(&packet(0x10, &content)).await;
        let code = raw.packet().await.map(|connack| {
            assert_eq!(connack[0], 0x20, "{connack:x?}");
            connack[3]
        });
        (raw, code)
    }

    /// As [`Raw::connect`], for a client that is let in.
    pub(crate) async fn welcome(stream: S, v5: bool, hello: Hello<'_>) -> Self {
        let (raw, code) = Self::connect(stream, v5, hello).await;
        assert_eq!(code, Some(0));
        raw
    }

    /// Publishes with QoS 1: the code of the PUBACK, or `None` if the connection was closed.
    pub(crate) async fn publish(&mut self, topic: &str, payload: &str) -> Option<u8> {
        let content = [&field(topic)[..], &[0, 1], self.no_properties(), payload.as_bytes()];
        self.publish_packet(&content.concat()).await
    }

    /// As [`Raw::publish`] in MQTT 5, with a user property.
    pub(crate) async fn publish_with(
        &mut self,
        topic: &str,
        name: &str,
        value: &str,
    ) -> Option<u8> {
        let property = [&[0x26][..], &field(name), &field(value)].concat();
        let content = [&field(topic)[..], &[0, 1, property.len() as u8], &property];
        self.publish_packet(&content.concat()).await
    }

    async fn publish_packet(&mut self, content: &[u8]) -> Option<u8> {
        self.send(&packet(0x32, content)).await;
        let answer = self.packet().await?;
        if answer[0] == 0xE0 {
            return None;
        }
        assert_eq!((answer[0], &answer[2..4]), (0x40, &[0, 1][..]), "{answer:x?}");
        // Taken, and nobody subscribes: that is a success.
        Some(answer.get(4).copied().filter(|code| *code != 0x10).unwrap_or(0))
    }

    /// Publishes with QoS 1 as fast as it can, and reads the acks afterwards, in their order.
    pub(crate) async fn flood(&mut self, topic: &str, count: u16) {
        let publish = |id: u16| {
            let content = [&field(topic)[..], &id.to_be_bytes(), self.no_properties()];
            packet(0x32, &content.concat())
        };
        let publishes: Vec<u8> = (1..=count).flat_map(publish).collect();
        self.send(&publishes).await;
        for id in 1..=count {
            let ack = self.packet().await.expect("an ack");
            let unheard = ack.get(4).is_none_or(|code| *code == 0x10);
            assert!(ack[0] == 0x40 && ack[2..4] == id.to_be_bytes() && unheard, "{ack:x?}");
        }
    }

    /// Subscribes with QoS 1: the code of the SUBACK.
    pub(crate) async fn subscribe(&mut self, filter: &str) -> u8 {
        let content = [&[0, 2][..], self.no_properties(), &field(filter), &[1]];
        self.send(&packet(0x82, &content.concat())).await;
        let answer = self.packet().await.expect("a SUBACK");
        assert_eq!((answer[0], &answer[2..4]), (0x90, &[0, 2][..]), "{answer:x?}");
        *answer.last().unwrap()
    }

    /// A ping that is answered.
    pub(crate) async fn ping(&mut self) {
        self.send(&[0xC0, 0]).await;
        assert_eq!(self.packet().await.as_deref(), Some(&[0xD0, 0][..]));
    }

    async fn send(&mut self, bytes: &[u8]) {
        // Whether the gateway has closed by now, the next read says.
        timeout(PATIENCE, async {
            self.stream.write_all(bytes).await.ok();
            self.stream.flush().await.ok();
        })
        .await
        .expect("it is read");
    }

    /// The next packet whole; `None` when the gateway has closed.
    pub(crate) async fn packet(&mut self) -> Option<Vec<u8>> {
        let first = timeout(PATIENCE, self.stream.read_u8()).await.expect("an answer").ok()?;
        let (mut packet, mut remaining) = (vec![first], 0);
        for i in 0..4 {
            let byte = self.stream.read_u8().await.ok()?;
            packet.push(byte);
            remaining |= usize::from(byte & 0x7f) << (7 * i);
            if byte & 0x80 == 0 {
                break;
            }
        }
        let mut content = vec![0; remaining];
        timeout(PATIENCE, self.stream.read_exact(&mut content)).await.expect("a whole one").ok()?;
        packet.extend(content);
        Some(packet)
    }

    fn no_properties(&self) -> &'static [u8] {
        if self.v5 { &[0] } else { &[] }
    }
}
