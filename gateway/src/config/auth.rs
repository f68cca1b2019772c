//! `[auth]` and `[[acl]]`: reads who is let in, and what they may do.

use std::path::PathBuf;
use std::time::Duration;

use super::reader::Section;
use super::{DAY, SECOND};
use crate::access::acl::wrong_pattern;

/// `[auth]`.
#[derive(Clone, Debug)]
pub struct AuthConfig {
    /// File with users and the hashes of their passwords.
    pub users_file: Option<PathBuf>,
    /// How long a password that was right needs no other check. Zero: every log-in is checked.
    pub credential_cache: Duration,
    /// `[auth.jwt]`.
    pub jwt: Option<JwtConfig>,
}

impl AuthConfig {
    /// Whether anybody can log in with a password or a token.
    pub(super) fn knows_users(&self) -> bool {
        self.users_file.is_some() || self.jwt.is_some()
    }
}

/// `[auth.jwt]`.
#[derive(Clone, Debug)]
pub struct JwtConfig {
    /// What tokens are signed with.
    pub keys: JwtKeys,
    /// The claim that names the user.
    pub user_claim: String,
    /// What `iss` must be.
    pub issuer: Option<String>,
    /// What `aud` must be, or hold.
    pub audience: Option<String>,
    /// How far clocks may be apart.
    pub leeway: Duration,
}

/// What tokens are signed with.
#[derive(Clone, Debug)]
pub enum JwtKeys {
    /// File with the key of HS256.
    Hmac(PathBuf),
    /// PEM file with the public key of RS256 or ES256.
    Public(PathBuf),
    /// JSON file with a set of keys.
    Jwks(PathBuf),
}

/// `[[acl]]`.
#[derive(Clone, Debug)]
pub struct AclConfig {
    /// User names that it is for; none: everybody.
    pub users: Vec<String>,
    /// Topics that they may publish to: filters, with `%c` for the client id and `%u` for the user.
    pub publish: Vec<String>,
    /// Filters that they may subscribe to, and every narrower one.
    pub subscribe: Vec<String>,
    /// Topics that are kept back from them: neither these filters nor narrower ones may be subscribed
    /// to, and of wider ones these topics are not delivered.
    pub deny_subscribe: Vec<String>,
}

pub(super) fn read(section: &Section<'_, '_>) -> AuthConfig {
    AuthConfig {
        users_file: section.string("users_file").map(PathBuf::from),
        credential_cache: section.time("credential_cache", Duration::ZERO..=DAY, 300 * SECOND),
        jwt: section.has("jwt").then(|| read_jwt(&section.section("jwt"))).flatten(),
    }
}

fn read_jwt(section: &Section<'_, '_>) -> Option<JwtConfig> {
    type Keys = fn(PathBuf) -> JwtKeys;
    let kinds: [(&'static str, Keys); 3] = [
        ("hmac_key_file", JwtKeys::Hmac),
        ("public_key_file", JwtKeys::Public),
        ("jwks_file", JwtKeys::Jwks),
    ];
    let mut given = Vec::new();
    for (key, keys) in kinds {
        given.extend(section.string(key).map(|path| (key, keys(path.into()))));
    }
    match &given[..] {
        [] => section.missing(
            "jwks_file",
            "what tokens are signed with: or hmac_key_file, or public_key_file",
        ),
        [_] => {}
        [.., (key, _)] => {
            section.problem(
                key,
                "only one of hmac_key_file, public_key_file and jwks_file may be set",
            );
        }
    }
    let config = JwtConfig {
        user_claim: section.string("user_claim").unwrap_or("sub".to_owned()),
        issuer: section.string("issuer"),
        audience: section.string("audience"),
        leeway: section.time("leeway", Duration::ZERO..=600 * SECOND, 30 * SECOND),
        keys: given.pop()?.1,
    };
    Some(config)
}

pub(super) fn read_acl(root: &Section<'_, '_>) -> Vec<AclConfig> {
    let mut rules = Vec::new();
    for section in root.sections("acl") {
        let patterns = |key: &'static str| {
            let patterns = section.strings(key);
            for wrong in patterns.iter().filter_map(|pattern| wrong_pattern(pattern)) {
                section.problem(key, wrong);
            }
            patterns
        };
        let (publish, subscribe) = (patterns("publish"), patterns("subscribe"));
        let deny_subscribe = patterns("deny_subscribe");
        if publish.is_empty() && subscribe.is_empty() && deny_subscribe.is_empty() {
            section.missing("publish", "topics that may be published to, or set subscribe");
        }
        if section.has("users") && section.strings("users").is_empty() {
            section.problem("users", "is for nobody; name users, or leave it out for everybody");
        }
        let users = section.strings("users");
        rules.push(AclConfig { users, publish, subscribe, deny_subscribe });
    }
    rules
}
