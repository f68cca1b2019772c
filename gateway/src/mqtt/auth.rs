//! Who is let in. There are no users yet: a client has a certificate, or is anonymous.

use std::net::IpAddr;

use bytestring::ByteString;
use rmqtt_codec::v5;

use super::reason::{self, Violation};

/// Who is at the other end, as far as the listener knows.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it comes from, for the log.
    pub name: String,
    /// The address that it comes from, if it has one.
    pub address: Option<IpAddr>,
    /// The user name in its certificate, which was checked.
    pub user: Option<ByteString>,
    /// Whether its listener lets in clients without credentials.
    pub allow_anonymous: bool,
}

/// Decides on a CONNECT.
///
/// # Errors
/// [`Violation`] with the reason to refuse it with.
pub fn admit(connect: &v5::Connect, peer: &Peer) -> Result<(), Violation> {
    if connect.auth_method.is_some() {
        let why = "enhanced authentication is not supported";
        return Err(Violation::new(reason::BAD_AUTHENTICATION_METHOD, why));
    }
    if peer.user.is_some() || peer.allow_anonymous {
        Ok(())
    } else if connect.username.is_some() || connect.password.is_some() {
        Err(Violation::new(reason::BAD_CREDENTIALS, "unknown user or wrong password"))
    } else {
        Err(Violation::new(
            reason::NOT_AUTHORIZED,
            "this listener does not let in anonymous clients",
        ))
    }
}
