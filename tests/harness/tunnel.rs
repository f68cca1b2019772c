//! A tunnel from a plain port to a listener that wants more than a plain port: the fleet speaks MQTT
//! over TCP only, and so every fleet can come over TLS, WebSocket or a Unix socket.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::BytesMut;
use futures_util::{SinkExt as _, StreamExt as _};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

/// The way to the gateway.
#[derive(Clone)]
pub(crate) enum Way {
    Tls(SocketAddr, Arc<ClientConfig>),
    WebSocket(SocketAddr),
    SecureWebSocket(SocketAddr, Arc<ClientConfig>),
    Unix(PathBuf),
}

/// Open until it is dropped.
pub(crate) struct Tunnel {
    pub(crate) addr: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Tunnel {
    pub(crate) async fn open(way: Way) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let way = way.clone();
                // An error ends the one connection that has it, as it would without a tunnel.
                connections.spawn(async move { Box::pin(dig(near, way)).await.ok() });
                while connections.try_join_next().is_some() {}
            }
        });
        Self { addr, _tasks: tasks }
    }
}

async fn dig(mut near: TcpStream, way: Way) -> anyhow::Result<()> {
    near.set_nodelay(true)?;
    match way {
        Way::Unix(path) => {
            copy_bidirectional(&mut near, &mut UnixStream::connect(path).await?).await?;
        }
        Way::Tls(addr, config) => {
            copy_bidirectional(&mut near, &mut tls(addr, config).await?).await?;
        }
        Way::WebSocket(addr) => frames(near, TcpStream::connect(addr).await?).await?,
        Way::SecureWebSocket(addr, config) => frames(near, tls(addr, config).await?).await?,
    }
    Ok(())
}

/// A TLS connection to a listener.
pub(crate) async fn tls(
    addr: SocketAddr,
    config: Arc<ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(addr).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(config).connect(name, stream).await
}

/// Carries bytes in frames, cut where the reads were.
async fn frames<S>(mut near: TcpStream, far: S) -> anyhow::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut request = "ws://localhost/mqtt".into_client_request()?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", "mqtt".parse()?);
    let (mut far, answer) = tokio_tungstenite::client_async(request, far).await?;
    anyhow::ensure!(answer.headers()["Sec-WebSocket-Protocol"] == "mqtt");
    let mut buf = BytesMut::new();
    loop {
        tokio::select! {
            read = near.read_buf(&mut buf) => match read? {
                0 => return Ok(far.close(None).await?),
                _ => far.send(Message::Binary(buf.split().freeze())).await?,
            },
            message = far.next() => match message {
                Some(Ok(Message::Binary(bytes))) => near.write_all(&bytes).await?,
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => anyhow::bail!("the gateway sent {other:?}"),
            },
        }
    }
}
