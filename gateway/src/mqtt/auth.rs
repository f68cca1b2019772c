//! Who is let in. There are no users yet: a listener lets everybody in, or nobody.

use rmqtt_codec::v5;

use super::reason::{self, Violation};

/// Decides on a CONNECT.
///
/// # Errors
/// [`Violation`] with the reason to refuse it with.
pub fn admit(connect: &v5::Connect, allow_anonymous: bool) -> Result<(), Violation> {
    if connect.auth_method.is_some() {
        let why = "enhanced authentication is not supported";
        return Err(Violation::new(reason::BAD_AUTHENTICATION_METHOD, why));
    }
    if allow_anonymous {
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
