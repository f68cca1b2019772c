//! Where a running gateway listens, and the ready line that says so.
//!
//! Scripts read the ports from `edge-gateway ready: mqtt=ADDR [mqtt=ADDR ...] [unix=FILE ...]
//! admin=ADDR`.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Addresses a gateway has bound, ports from the system resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// One per `[[listener]]` with an address, in the order of the configuration.
    pub mqtt: Vec<SocketAddr>,
    /// One per `[[listener]]` on a Unix socket, in the order of the configuration.
    pub unix: Vec<PathBuf>,
    /// The admin endpoint.
    pub admin: SocketAddr,
}

const READY: &str = "edge-gateway ready: ";

impl Addresses {
    /// The one line on stdout that says that the gateway takes connections.
    pub fn ready_line(&self) -> String {
        format!("{READY}{self}")
    }

    /// Reads [`Addresses::ready_line`].
    pub fn from_ready_line(line: &str) -> Option<Self> {
        let (mut mqtt, mut unix) = (Vec::new(), Vec::new());
        let mut admin = None;
        for part in line.strip_prefix(READY)?.split_whitespace() {
            let (name, place) = part.split_once('=')?;
            match name {
                "mqtt" => mqtt.push(place.parse().ok()?),
                "unix" => unix.push(place.into()),
                "admin" => admin = Some(place.parse().ok()?),
                _ => {}
            }
        }
        Some(Self { mqtt, unix, admin: admin? })
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for address in &self.mqtt {
            write!(f, "mqtt={address} ")?;
        }
        for file in &self.unix {
            write!(f, "unix={} ", file.display())?;
        }
        write!(f, "admin={}", self.admin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_line_reads_back() {
        let addresses = Addresses {
            mqtt: vec![([127, 0, 0, 1], 1883).into(), ([0, 0, 0, 0], 1884).into()],
            unix: vec!["/run/edge-gateway/mqtt.sock".into()],
            admin: ([127, 0, 0, 1], 9641).into(),
        };
        assert_eq!(Addresses::from_ready_line(&addresses.ready_line()), Some(addresses));
        assert_eq!(Addresses::from_ready_line("edge-gateway: the port is in use"), None);
    }
}
