//! Who is let in, in MQTT's words: from a CONNECT to what `access` decides, and back to a reason.

use std::net::IpAddr;

use bytestring::ByteString;
use rmqtt_codec::v5;

use super::listener::Newcomer;
use super::pace::Rate;
use super::reason::{self, Violation};
use crate::access::{Access, Grant, Refusal, Request};

/// Who is at the other end, as far as the listener knows.
#[derive(Debug)]
pub struct Peer {
    /// Where it comes from, for the log.
    pub name: String,
    /// The address that it comes from, if it has one.
    pub address: Option<IpAddr>,
    /// The user name in its certificate, which was checked.
    pub user: Option<ByteString>,
    /// Its place in its listener, which it may have to give up until it is let in.
    pub(super) newcomer: Option<Newcomer>,
    /// Whether its listener lets in clients without credentials.
    pub allow_anonymous: bool,
    /// How fast its listener lets it publish.
    pub rate: Rate,
}

/// Decides on a CONNECT, and on its will, which is a publish to come.
///
/// # Errors
/// [`Violation`] with the reason to refuse it with.
pub async fn admit(
    connect: &v5::Connect,
    peer: &Peer,
    access: &Access,
) -> Result<Grant, Violation> {
    if connect.auth_method.is_some() {
        let why = "enhanced authentication is not supported";
        return Err(Violation::new(reason::BAD_AUTHENTICATION_METHOD, why));
    }
    let request = Request {
        address: peer.address,
        certified: peer.user.as_ref(),
        allow_anonymous: peer.allow_anonymous,
        client_id: &connect.client_id,
        user: connect.username.as_deref(),
        password: connect.password.as_ref(),
    };
    let refused = |refusal| violation(refusal, request.user);
    let grant = access.admit(&request).await.map_err(refused)?;
    if let Some(will) = &connect.last_will
        && !grant.may_publish(&will.topic)
    {
        return Err(Violation::new(reason::NOT_AUTHORIZED, "the will's topic is not allowed"));
    }
    Ok(grant)
}

/// The text is for the log and for the client: the user name is the client's own word.
fn violation(refusal: Refusal, user: Option<&str>) -> Violation {
    let code = match refusal {
        Refusal::Anonymous => reason::NOT_AUTHORIZED,
        Refusal::Credentials | Refusal::Token(_) | Refusal::OtherClient => reason::BAD_CREDENTIALS,
        Refusal::Busy => reason::SERVER_BUSY,
    };
    let user = user.map(|user| &user[..user.floor_char_boundary(64)]);
    let named = user.map_or(String::new(), |user| format!(" (user {user:?})"));
    Violation { code, why: format!("{refusal}{named}").into() }
}
