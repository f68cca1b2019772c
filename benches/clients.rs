//! Clients of MQTT 3.1.1 over TCP, TLS and WebSocket, each from an address of its choice, as raw bytes:
//! what makes the connections must cost as little as it can. Also the listeners that they connect to.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use anyhow::ensure;
use rcgen::{CertificateParams, KeyPair};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;

/// What a client connects over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Tcp,
    Tls,
    WebSocket,
}

/// The ways in the order of their listeners.
pub(crate) const WAYS: [(&str, Way); 3] =
    [("tcp", Way::Tcp), ("tls", Way::Tls), ("websocket", Way::WebSocket)];

/// `[[listener]]` for each way, `more` in each, with a new certificate in `dir`.
pub(crate) fn listeners(dir: &Path, more: &str) -> anyhow::Result<String> {
    let key = KeyPair::generate()?;
    let signed = CertificateParams::new(vec!["localhost".to_owned()])?.self_signed(&key)?;
    let (cert_file, key_file) = (certificate_file(dir), dir.join("key.pem"));
    std::fs::write(&cert_file, signed.pem())?;
    std::fs::write(&key_file, key.serialize_pem())?;
    let tls = format!(
        "[listener.tls]\ncert_file = \"{}\"\nkey_file = \"{}\"\n",
        cert_file.display(),
        key_file.display()
    );
    let listener = |(_, way): (&str, Way)| {
        let kind = if way == Way::WebSocket { "websocket" } else { "mqtt" };
        let tls = if way == Way::Tls { &*tls } else { "" };
        format!("[[listener]]\ntype = \"{kind}\"\nbind = \"127.0.0.1:0\"\n{more}{tls}")
    };
    Ok(WAYS.map(listener).concat())
}

fn certificate_file(dir: &Path) -> std::path::PathBuf {
    dir.join("cert.pem")
}

pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Opens connections to one listener, from one address.
#[derive(Clone)]
pub(crate) struct Opener {
    way: Way,
    broker: SocketAddr,
    source: Ipv4Addr,
    tls: TlsConnector,
}

impl Opener {
    /// `dir` is where [`listeners`] has put the certificate.
    pub(crate) fn new(
        way: Way,
        broker: SocketAddr,
        source: Ipv4Addr,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(certificate_file(dir))?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Every handshake is a whole one, as those of thousands of devices after an outage.
        config.resumption = Resumption::disabled();
        Ok(Self { way, broker, source, tls: TlsConnector::from(Arc::new(config)) })
    }

    /// A connection without a byte on it.
    pub(crate) async fn connect(&self) -> anyhow::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((self.source, 0).into())?;
        // Whoever comes and goes thousands of times a second must leave no ports behind.
        socket.set_zero_linger()?;
        let stream = socket.connect(self.broker).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// A connection that is past the handshakes below MQTT, with the CONNECT sent and answered by a
    /// code.
    pub(crate) async fn open(&self, connect: &[u8]) -> anyhow::Result<(Box<dyn Stream>, u8)> {
        let stream = self.connect().await?;
        let mut stream: Box<dyn Stream> = match self.way {
            Way::Tls => {
                let secured = self.tls.connect(ServerName::try_from("localhost")?, stream);
                Box::new(Box::pin(secured).await?)
            }
            Way::Tcp | Way::WebSocket => Box::new(stream),
        };
        let mut answer = [0; 6];
        let mut expected = 4;
        if self.way == Way::WebSocket {
            upgrade(&mut *stream).await?;
            // One masked frame, the mask of which is zero; one that is not masked comes back.
            stream.write_all(&[0x82, 0x80 | connect.len() as u8, 0, 0, 0, 0]).await?;
            expected = 6;
        }
        stream.write_all(connect).await?;
        stream.read_exact(&mut answer[..expected]).await?;
        let connack = &answer[expected - 4..expected];
        ensure!(connack[..2] == [0x20, 2], "no CONNACK: {connack:x?}");
        Ok((stream, connack[3]))
    }
}

async fn upgrade(stream: &mut dyn Stream) -> anyhow::Result<()> {
    let request = "GET /mqtt HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n\
                   Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                   Sec-WebSocket-Protocol: mqtt\r\n\r\n";
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await?);
    }
    Ok(())
}

/// CONNECT of MQTT 3.1.1 with a clean session; user name and password, if there is a user.
pub(crate) fn connect_packet(
    client_id: &str,
    keep_alive_s: u16,
    user: Option<(&str, &str)>,
) -> Vec<u8> {
    let flags = if user.is_some() { 0xC2 } else { 0x02 };
    let mut content = [&b"\0\x04MQTT\x04"[..], &[flags], &keep_alive_s.to_be_bytes()].concat();
    let (name, password) = user.unzip();
    for field in [Some(client_id), name, password].into_iter().flatten() {
        content.extend((field.len() as u16).to_be_bytes());
        content.extend(field.as_bytes());
    }
    assert!(content.len() < 126, "a remaining length of one byte, a frame with a length of one");
    [&[0x10, content.len() as u8][..], &content].concat()
}
