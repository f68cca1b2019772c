//! The gateway that the tests share: started by the first that needs it, killed by the last that has
//! it, so that nothing is left behind.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::ops::{Deref, DerefMut};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use gateway::Addresses;
use tempfile::TempDir;

use crate::harness::PATIENCE;
use crate::harness::wire::{Connect, Raw, Version};

/// A running gateway.
pub(crate) struct Server {
    process: Child,
    addresses: Vec<SocketAddr>,
    _folder: TempDir,
}

static RUNNING: Mutex<Weak<Server>> = Mutex::new(Weak::new());

/// The gateway.
pub(crate) fn server() -> Arc<Server> {
    let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    running.upgrade().unwrap_or_else(|| {
        let server = Server::start("");
        *running = Arc::downgrade(&server);
        server
    })
}

impl Server {
    /// One of a test's own, with more configuration.
    pub(crate) fn start(more: &str) -> Arc<Self> {
        let folder = tempfile::Builder::new().prefix("edge-gateway-test-").tempdir().unwrap();
        let config = folder.path().join("gateway.toml");
        let data_dir = toml::Value::String(folder.path().join("data").display().to_string());
        let text = format!(
            "[gateway]\nid = \"test\"\ndata_dir = {data_dir}\n[admin]\nbind = \"127.0.0.1:0\"\n\
             [[listener]]\nbind = \"127.0.0.1:0\"\nin_flight_max = 20\n{more}\n"
        );
        std::fs::write(&config, text).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_edge-gateway"))
            .args(["run", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(folder.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let addresses = Addresses::from_ready_line(line.trim_end()).expect("it gets ready");
        Arc::new(Self { process, addresses: addresses.mqtt, _folder: folder })
    }

    /// A connection that has said nothing yet.
    pub(crate) fn open(self: &Arc<Self>, version: Version) -> Client {
        Client { raw: Raw::open(self.addresses[0], version).unwrap(), _server: self.clone() }
    }

    /// A stream to the listener of this number.
    pub(crate) fn dial(&self, listener: usize) -> TcpStream {
        let stream = TcpStream::connect(self.addresses[listener]).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// Connects; gives the CONNACK, too.
    pub(crate) fn enter(self: &Arc<Self>, connect: &Connect) -> (Client, Vec<u8>) {
        let mut raw = self.open(connect.version);
        raw.send(&connect.bytes());
        let connack = raw.packet();
        assert_eq!((connack[0], connack[3]), (0x20, 0), "not let in: {connack:x?}");
        (raw, connack)
    }

    /// Connects with a clean start.
    pub(crate) fn client(self: &Arc<Self>, version: Version, client_id: &str) -> Client {
        self.enter(&Connect::new(version, name(version, client_id))).0
    }
}

/// A connection; its gateway lives as long as it.
pub(crate) struct Client {
    raw: Raw,
    _server: Arc<Server>,
}

impl Client {
    /// Our side ends, without a word.
    pub(crate) fn cut(self) {
        self.raw.cut();
    }
}

impl Deref for Client {
    type Target = Raw;

    fn deref(&self) -> &Raw {
        &self.raw
    }
}

impl DerefMut for Client {
    fn deref_mut(&mut self) -> &mut Raw {
        &mut self.raw
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// A name that is a test's own in each version.
pub(crate) fn name(version: Version, name: &str) -> String {
    format!("{name}-{version:?}")
}
