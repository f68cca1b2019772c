//! MQTT over WebSocket: the opening handshake, and a stream of bytes over binary frames.
//!
//! Invariant: only binary frames carry MQTT, and anything else ends the connection [MQTT-6.0.0-1];
//! packets need not align with frames [MQTT-6.0.0-2]. No frame is larger than
//! [`frame_bytes_max`], so that a client cannot make us gather more than that.
//! Deliberately absent: compression (no extension is agreed on) and the address in
//! `X-Forwarded-For`, which anybody can write.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::{Sink as _, Stream as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::header::SEC_WEBSOCKET_PROTOCOL;
use tokio_tungstenite::tungstenite::http::{HeaderValue, StatusCode};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, accept_hdr_async_with_config};

/// Where WebSocket clients of MQTT connect.
pub(super) const PATH: &str = "/mqtt";

/// The subprotocol that they must offer, and are answered [MQTT-6.0.0-3], [MQTT-6.0.0-4].
pub(super) const SUBPROTOCOL: &str = "mqtt";

/// Bytes of a connection's read buffer below its frames.
const READ_BYTES: usize = 4 * 1024;

/// Smallest limit of a frame: clients put many small packets into one.
const FRAME_BYTES_MIN: usize = 64 * 1024;

/// Largest frame that we send.
const SEND_BYTES_MAX: usize = 16 * 1024;

/// Largest frame, and message of several, that is taken where packets have `packet_bytes_max`.
pub(super) fn frame_bytes_max(packet_bytes_max: usize) -> usize {
    packet_bytes_max.max(FRAME_BYTES_MIN)
}

/// Bytes over the binary frames of a WebSocket.
pub(super) struct WsStream<S> {
    socket: WebSocketStream<S>,
    /// What is left of the frame that was read last.
    rest: Bytes,
}

/// Answers the opening handshake. A request for another path, or without our subprotocol, is refused
/// with the reason in its answer.
///
/// # Errors
/// Why there is no WebSocket.
pub(super) async fn accept<S>(stream: S, packet_bytes_max: usize) -> io::Result<WsStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let frame_bytes_max = frame_bytes_max(packet_bytes_max);
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        .write_buffer_size(0)
        .max_write_buffer_size(4 * SEND_BYTES_MAX)
        .max_message_size(Some(frame_bytes_max))
        .max_frame_size(Some(frame_bytes_max));
    let socket = accept_hdr_async_with_config(stream, agree, Some(config)).await;
    Ok(WsStream { socket: socket.map_err(to_io)?, rest: Bytes::new() })
}

#[expect(clippy::result_large_err, reason = "the signature is the callback's")]
fn agree(request: &Request, mut response: Response) -> Result<Response, ErrorResponse> {
    if request.uri().path() != PATH {
        let why = format!("MQTT is at {PATH}, not at {}\n", request.uri().path());
        return Err(refusal(StatusCode::NOT_FOUND, why));
    }
    let offered = request.headers().get_all(SEC_WEBSOCKET_PROTOCOL).iter();
    let mut offered = offered.filter_map(|list| list.to_str().ok()).flat_map(|l| l.split(','));
    if !offered.any(|protocol| protocol.trim() == SUBPROTOCOL) {
        let why = format!("offer the WebSocket subprotocol {SUBPROTOCOL:?}\n");
        return Err(refusal(StatusCode::BAD_REQUEST, why));
    }
    let ours = HeaderValue::from_static(SUBPROTOCOL);
    response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, ours);
    Ok(response)
}

fn refusal(code: StatusCode, why: String) -> ErrorResponse {
    let mut refusal = ErrorResponse::new(Some(why));
    *refusal.status_mut() = code;
    refusal
}

fn to_io(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        error => io::Error::other(error.to_string()),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WsStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                // What follows a close frame is the end.
                None | Some(Ok(Message::Close(_)) | Err(Error::ConnectionClosed)) => {
                    return Poll::Ready(Ok(()));
                }
                Some(Ok(Message::Text(_) | Message::Frame(_))) => {
                    let why = "a WebSocket frame that is not binary";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
                }
                Some(Err(error)) => return Poll::Ready(Err(to_io(error))),
            }
        }
        let n = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WsStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(to_io)?;
        let n = buf.len().min(SEND_BYTES_MAX);
        let frame = Message::Binary(Bytes::copy_from_slice(&buf[..n]));
        Pin::new(&mut self.socket).start_send(frame).map_err(to_io)?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(to_io)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.socket).poll_close(cx)) {
            // Closed by both sides by now.
            Ok(()) | Err(Error::ConnectionClosed) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(to_io(error))),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

    fn request(path: &str, protocol: &str) -> String {
        format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n{protocol}\r\n"
        )
    }

    /// A masked frame, written by hand so that it shares nothing with what it tests.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [1, 2, 3, 4];
        let length = match payload.len() {
            n @ ..126 => vec![0x80 | n as u8],
            n => [&[0xFE][..], &(n as u16).to_be_bytes()].concat(),
        };
        let masked = payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask);
        [&[first][..], &length, &mask].concat().into_iter().chain(masked).collect()
    }

    async fn head(client: &mut DuplexStream) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        String::from_utf8(head).unwrap()
    }

    async fn opened() -> (DuplexStream, WsStream<DuplexStream>) {
        let (mut client, server) = duplex(64 * 1024);
        let offer = "Sec-WebSocket-Protocol: chat, mqtt\r\n";
        client.write_all(request(PATH, offer).as_bytes()).await.unwrap();
        let stream = accept(server, 1024).await.unwrap();
        let head = head(&mut client).await.to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 101 "), "{head}");
        assert!(head.contains("sec-websocket-protocol: mqtt\r\n"), "{head}");
        (client, stream)
    }

    #[tokio::test]
    async fn another_path_or_subprotocol_is_refused_with_a_reason_mqtt_6_0_0_3() {
        let protocol = "Sec-WebSocket-Protocol: mqtt\r\n";
        for (path, protocol, code) in [
            ("/", protocol, "404"),
            (PATH, "", "400"),
            (PATH, "Sec-WebSocket-Protocol: mqttv3.1, chat\r\n", "400"),
        ] {
            let (mut client, server) = duplex(64 * 1024);
            client.write_all(request(path, protocol).as_bytes()).await.unwrap();
            assert!(accept(server, 1024).await.is_err());
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
        }
    }

    #[tokio::test]
    async fn packets_and_frames_need_not_align_mqtt_6_0_0_2() {
        let (mut client, mut stream) = opened().await;
        for part in [&b"one"[..], b"", b" two"] {
            client.write_all(&frame(0x82, part)).await.unwrap();
        }
        // A ping between two pieces of one message.
        client.write_all(&frame(0x02, b", th")).await.unwrap();
        client.write_all(&frame(0x89, b"?")).await.unwrap();
        client.write_all(&frame(0x80, b"ree")).await.unwrap();
        let mut read = [0; 14];
        stream.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"one two, three");
        let mut pong = [0; 3];
        client.read_exact(&mut pong).await.unwrap();
        assert_eq!(&pong, &[0x8A, 1, b'?']);

        stream.write_all(b"ack").await.unwrap();
        stream.flush().await.unwrap();
        let mut sent = [0; 5];
        client.read_exact(&mut sent).await.unwrap();
        assert_eq!(&sent, b"\x82\x03ack", "one binary frame, not masked");
    }

    #[tokio::test]
    async fn a_text_frame_ends_the_connection_mqtt_6_0_0_1() {
        let (mut client, mut stream) = opened().await;
        client.write_all(&frame(0x81, b"text")).await.unwrap();
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_frame_beyond_the_limit_is_not_gathered() {
        let (mut client, mut stream) = opened().await;
        let length = (frame_bytes_max(1024) as u64 + 1).to_be_bytes();
        client.write_all(&[&[0x82, 0xFF][..], &length, &[0; 4]].concat()).await.unwrap();
        let error = stream.read_u8().await.unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }

    #[tokio::test]
    async fn a_close_frame_is_the_end_and_is_answered() {
        let (mut client, mut stream) = opened().await;
        client.write_all(&frame(0x88, &1000_u16.to_be_bytes())).await.unwrap();
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
        stream.shutdown().await.unwrap();
        let mut close = [0; 4];
        client.read_exact(&mut close).await.unwrap();
        assert_eq!(close, [0x88, 2, 3, 0xE8]);
    }
}
