//! TLS and SASL: what librdkafka is told, and tokens for OAUTHBEARER.
//!
//! Invariant: secrets are read when a client is made, and a token again when it is asked for, so that
//! a rotated one is picked up without a restart; an error names its place, never the secret.
//! Deliberately absent: whether a build can do it (the configuration is refused where it cannot).

use std::path::Path;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64_URL;
use rdkafka::client::OAuthToken as Token;
use rdkafka::config::ClientConfig;
use serde::Deserialize;

use crate::config::{KafkaConfig, KafkaSasl, KafkaTls, OAuthToken, ScramHash};
use crate::secret;

/// Life of a token that is made here, and of one that does not say how long it lives.
const TOKEN_LIFE: Duration = Duration::from_mins(30);

/// Sets what has to do with security.
///
/// # Errors
/// A secret cannot be read: one line, with its place.
pub(super) fn apply(config: &KafkaConfig, client: &mut ClientConfig) -> Result<(), String> {
    let protocol = match (&config.tls, &config.sasl) {
        (None, None) => "plaintext",
        (Some(_), None) => "ssl",
        (None, Some(_)) => "sasl_plaintext",
        (Some(_), Some(_)) => "sasl_ssl",
    };
    client.set("security.protocol", protocol);
    if let Some(KafkaTls { ca_file, identity }) = &config.tls {
        if let Some(ca_file) = ca_file {
            client.set("ssl.ca.location", text(ca_file));
        }
        if let Some((cert_file, key_file)) = identity {
            client.set("ssl.certificate.location", text(cert_file));
            client.set("ssl.key.location", text(key_file));
        }
    }
    let Some(sasl) = &config.sasl else { return Ok(()) };
    let mechanism = match sasl {
        KafkaSasl::Plain { .. } => "PLAIN",
        KafkaSasl::Scram { hash: ScramHash::Sha256, .. } => "SCRAM-SHA-256",
        KafkaSasl::Scram { hash: ScramHash::Sha512, .. } => "SCRAM-SHA-512",
        KafkaSasl::OAuthBearer(_) => "OAUTHBEARER",
    };
    client.set("sasl.mechanism", mechanism);
    if let KafkaSasl::Plain { username, password } | KafkaSasl::Scram { username, password, .. } =
        sasl
    {
        client.set("sasl.username", username);
        client.set("sasl.password", secret::read(password, "sasl")?.reveal());
    }
    Ok(())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A token for OAUTHBEARER. Blocks: a file may be read.
///
/// # Errors
/// One line; the token itself is not in it.
pub(super) fn token(source: &OAuthToken, now: SystemTime) -> Result<Token, String> {
    let now_s = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let token = match source {
        OAuthToken::Kept(source) => secret::read(source, "sasl")?.reveal().to_owned(),
        OAuthToken::Unsecured(subject) => {
            let subject = serde_json::Value::from(subject.as_str());
            let expires = now_s + TOKEN_LIFE.as_secs();
            let claims = format!(r#"{{"sub":{subject},"iat":{now_s},"exp":{expires}}}"#);
            let head = BASE64_URL.encode(r#"{"alg":"none"}"#);
            format!("{head}.{}.", BASE64_URL.encode(claims))
        }
    };
    let Claims { sub, exp } = claims(&token).unwrap_or_default();
    let expires_s = exp.map_or(now_s + TOKEN_LIFE.as_secs(), |exp| exp as u64);
    if expires_s <= now_s {
        return Err("sasl: the token has expired; is it still renewed?".to_owned());
    }
    let lifetime_ms = expires_s.saturating_mul(1000).try_into().unwrap_or(i64::MAX);
    Ok(Token { token, principal_name: sub.unwrap_or_default(), lifetime_ms })
}

#[derive(Default, Deserialize)]
struct Claims {
    sub: Option<String>,
    /// Seconds since the Unix epoch; RFC 7519 allows a fraction.
    exp: Option<f64>,
}

/// What a JSON Web Token says of itself; a token may also be of another kind.
fn claims(token: &str) -> Option<Claims> {
    let payload = token.split('.').nth(1)?;
    serde_json::from_slice(&BASE64_URL.decode(payload.trim_end_matches('=')).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Secret, SecretSource};

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_token_made_here_names_its_subject_and_its_end() {
        let made = token(&OAuthToken::Unsecured("g\"w".into()), at(1_000)).unwrap();
        assert_eq!(made.principal_name, "g\"w");
        assert_eq!(made.lifetime_ms, (1_000 + 30 * 60) * 1000);
        assert!(made.token.ends_with('.'), "unsecured: no signature");
    }

    #[test]
    fn a_kept_token_lives_as_long_as_it_says() {
        let kept = |claims: &str| {
            let token = format!("h.{}.s", BASE64_URL.encode(claims));
            OAuthToken::Kept(SecretSource::Inline(Secret::new(token)))
        };
        let read = token(&kept(r#"{"sub":"gw","exp":5000.5}"#), at(1_000)).unwrap();
        assert_eq!((&*read.principal_name, read.lifetime_ms), ("gw", 5_000_000));
        let wrong = token(&kept(r#"{"exp":999}"#), at(1_000)).err().unwrap();
        assert!(wrong.contains("expired"), "{wrong}");
        let opaque = OAuthToken::Kept(SecretSource::Inline(Secret::new("opaque")));
        assert_eq!(token(&opaque, at(0)).unwrap().lifetime_ms, 30 * 60 * 1000);
        let missing = OAuthToken::Kept(SecretSource::File("/nonexistent/token".into()));
        assert!(token(&missing, at(0)).err().unwrap().contains("/nonexistent/token"));
    }
}
