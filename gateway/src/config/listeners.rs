//! `[[listener]]`: reads where devices connect, and how they are let in there.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::reader::Section;
use super::{GIB, KIB, MIB, SECOND, read_address};
use crate::mqtt::pace::Rate;

/// What a Unix socket's name begins with.
const UNIX: &str = "unix:";

/// `[[listener]]`.
#[derive(Clone, Debug)]
pub struct ListenerConfig {
    /// Where it listens.
    pub bind: Bind,
    /// What carries the MQTT packets.
    pub transport: Transport,
    /// `[listener.tls]`.
    pub tls: Option<TlsConfig>,
    /// Permissions of a Unix socket's file.
    pub unix_mode: u32,
    /// Whether a CONNECT without credentials is let in.
    pub allow_anonymous: bool,
    /// Connections at once, at most.
    pub connections_max: usize,
    /// Time from accept to a whole CONNECT, at most: the handshakes of TLS and WebSocket are part
    /// of it.
    pub connect_timeout: Duration,
    /// Largest packet in bytes, fixed header included.
    pub packet_bytes_max: usize,
    /// QoS 1 and 2 publishes of one connection under way, at most; v5 clients are told so as Receive
    /// Maximum.
    pub in_flight_max: u16,
    /// How fast one client may publish.
    pub client_rate: Rate,
}

/// Where a listener listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bind {
    /// Address and port; port 0 takes one from the system.
    Tcp(SocketAddr),
    /// File of a Unix socket.
    Unix(PathBuf),
}

impl Bind {
    /// Whether only this machine can reach it.
    fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }

    /// Whether two listeners cannot both have it.
    fn collides(&self, other: &Self) -> bool {
        self == other && !matches!(self, Self::Tcp(address) if address.port() == 0)
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

/// What carries the MQTT packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// The stream itself.
    Mqtt,
    /// Binary frames of a WebSocket on the path `/mqtt`.
    WebSocket,
}

/// `[listener.tls]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// PEM file with the certificate chain, the listener's own certificate first.
    pub cert_file: PathBuf,
    /// PEM file with its private key.
    pub key_file: PathBuf,
    /// PEM file with the authorities that sign clients' certificates. With it, every client must
    /// have one.
    pub client_ca_file: Option<PathBuf>,
    /// Where in a client's certificate its user name stands.
    pub client_identity: ClientIdentity,
}

/// Where in a client's certificate its user name stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientIdentity {
    /// The common name of the subject.
    CommonName,
    /// The first subject alternative name that is a DNS name, a URI or an e-mail address.
    AltName,
    /// Nowhere: clients say who they are in CONNECT.
    None,
}

/// `knows_users`: there are users or tokens to log in with.
pub(super) fn read(root: &Section<'_, '_>, knows_users: bool) -> Vec<ListenerConfig> {
    let sections = root.sections("listener");
    let mut listeners: Vec<ListenerConfig> = Vec::new();
    for section in &sections {
        let listener = read_listener(section, knows_users);
        if listeners.iter().any(|other| other.bind.collides(&listener.bind)) {
            section.problem("bind", format!("{} is taken by another listener", listener.bind));
        }
        listeners.push(listener);
    }
    if listeners.is_empty() {
        // No [[listener]] at all: one on loopback, read like an empty table so that the defaults
        // stand in one place.
        listeners.push(read_listener(&root.absent("listener"), knows_users));
    }
    listeners
}

fn read_listener(section: &Section<'_, '_>, knows_users: bool) -> ListenerConfig {
    let transports = [("mqtt", Transport::Mqtt), ("websocket", Transport::WebSocket)];
    let transport = section.choice("type", &transports, Transport::Mqtt);
    let bind = read_bind(section);
    let unix_mode = read_mode(section, &bind);
    let tls = section.has("tls").then(|| read_tls(&section.section("tls")));
    if tls.is_some() && matches!(bind, Bind::Unix(_)) {
        section.problem("tls", "cannot stand beside a Unix socket, which never leaves the machine");
    }
    let allow_anonymous = section.boolean("allow_anonymous", bind.is_local());
    let knows_certificates = tls.as_ref().is_some_and(|tls| {
        tls.client_ca_file.is_some() && tls.client_identity != ClientIdentity::None
    });
    if !(allow_anonymous || knows_users || knows_certificates) {
        section.problem(
            if section.has("allow_anonymous") { "allow_anonymous" } else { "bind" },
            "nobody could connect: anonymous access is on by default only where the network cannot \
             reach; name users (auth.users_file), give clients certificates \
             (listener.tls.client_ca_file), or set allow_anonymous = true if the network is trusted",
        );
    }
    ListenerConfig {
        bind,
        transport,
        tls,
        unix_mode,
        allow_anonymous,
        connections_max: section.integer("connections_max", 1..=1_000_000, 10_000) as usize,
        connect_timeout: section.time("connect_timeout", SECOND..=600 * SECOND, 10 * SECOND),
        packet_bytes_max: section.size("packet_bytes_max", KIB..=64 * MIB, 256 * KIB) as usize,
        in_flight_max: section.integer("in_flight_max", 1..=65_535, 1_024) as u16,
        client_rate: read_rate(section),
    }
}

/// How fast a client may publish, over a listener or a route.
pub(super) fn read_rate(section: &Section<'_, '_>) -> Rate {
    Rate {
        events: section.integer("events_per_second_max", 0..=1_000_000, 0),
        bytes: section.size("bytes_per_second_max", 0..=GIB, 0),
    }
}

fn read_bind(section: &Section<'_, '_>) -> Bind {
    let default = SocketAddr::from(([127, 0, 0, 1], 1883));
    let unix = section.string("bind").and_then(|bind| bind.strip_prefix(UNIX).map(PathBuf::from));
    match unix {
        None => Bind::Tcp(read_address(section, "bind", default)),
        Some(path) => {
            if !path.is_absolute() {
                let right = "must name the file from the root on, as in \"unix:/run/mqtt.sock\"";
                section.problem("bind", right);
            }
            Bind::Unix(path)
        }
    }
}

fn read_mode(section: &Section<'_, '_>, bind: &Bind) -> u32 {
    const DEFAULT: u32 = 0o660;
    let Some(text) = section.string("unix_mode") else {
        return DEFAULT;
    };
    if matches!(bind, Bind::Tcp(_)) {
        section.problem("unix_mode", "is for Unix sockets only: bind = \"unix:/run/mqtt.sock\"");
    }
    match u32::from_str_radix(&text, 8) {
        Ok(mode) if mode <= 0o777 => mode,
        _ => {
            let right = format!("must be octal permissions such as \"0660\", not {text:?}");
            section.problem("unix_mode", right);
            DEFAULT
        }
    }
}

fn read_tls(section: &Section<'_, '_>) -> TlsConfig {
    let identities = [
        ("cn", ClientIdentity::CommonName),
        ("san", ClientIdentity::AltName),
        ("none", ClientIdentity::None),
    ];
    let client_ca_file = section.string("client_ca_file").map(PathBuf::from);
    let client_identity =
        section.choice("client_identity", &identities, ClientIdentity::CommonName);
    if section.has("client_identity") && client_ca_file.is_none() {
        section.missing("client_ca_file", "the authorities that sign the clients' certificates");
    }
    TlsConfig {
        cert_file: section.required("cert_file", "the PEM file of the certificate chain").into(),
        key_file: section.required("key_file", "the PEM file of its private key").into(),
        client_ca_file,
        client_identity,
    }
}
