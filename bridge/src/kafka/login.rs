//! TLS and SASL: what librdkafka is told, and tokens for OAUTHBEARER.
//!
//! Invariant: secrets are read when a client is made, and those of a token again when it is asked for,
//! so that a rotated one is picked up without a restart; an error names its place, never the secret.
//! Deliberately absent: whether a build can do it (the configuration is refused where it cannot).

use std::path::Path;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64_URL;
use rdkafka::client::OAuthToken as Token;
use rdkafka::config::ClientConfig;
use serde::Deserialize;
use tokio::runtime::Handle;

use crate::config::{KafkaConfig, KafkaSasl, KafkaTls, OAuthToken, ScramHash};
use crate::http::endpoint;
use crate::secret;
use crate::sink::Failure;

/// Life of a token that is made here, and of one that does not say how long it lives.
const TOKEN_LIFE: Duration = Duration::from_mins(30);
/// How long a token endpoint may take: a thread of librdkafka's waits for it.
const ASKING_MAX: Duration = Duration::from_secs(10);

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

/// A token for OAUTHBEARER. Blocks: a file may be read, or a token endpoint asked, on `runtime`.
///
/// # Errors
/// What it means for the sink, with one line; neither the token nor a secret is in it.
pub(super) fn token(
    source: &OAuthToken,
    now: SystemTime,
    runtime: &Handle,
) -> Result<Token, (Failure, String)> {
    let hold = |reason| (Failure::Hold, reason);
    let now_s = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut life_s = TOKEN_LIFE.as_secs();
    let token = match source {
        OAuthToken::Kept(source) => secret::read(source, "sasl").map_err(hold)?.reveal().to_owned(),
        OAuthToken::Endpoint(config) => {
            let (endpoint, client) = endpoint(config, "sasl", ASKING_MAX).map_err(hold)?;
            let granted = runtime
                .block_on(endpoint.ask(&client))
                .map_err(|failed| (failed.failure, failed.reason))?;
            life_s = granted.expires_in.unwrap_or(life_s);
            granted.access_token
        }
        OAuthToken::Unsecured(subject) => {
            let subject = serde_json::Value::from(subject.as_str());
            let expires = now_s + life_s;
            let claims = format!(r#"{{"sub":{subject},"iat":{now_s},"exp":{expires}}}"#);
            let head = BASE64_URL.encode(r#"{"alg":"none"}"#);
            format!("{head}.{}.", BASE64_URL.encode(claims))
        }
    };
    let Claims { sub, exp } = claims(&token).unwrap_or_default();
    let expires_s = exp.map_or(now_s.saturating_add(life_s), |exp| exp as u64);
    if expires_s <= now_s {
        return Err(hold("sasl: the token has expired; is it still renewed?".to_owned()));
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
    use crate::config::{OAuth2Config, Secret, SecretSource};
    use crate::fake;

    /// As librdkafka asks: on a thread that is none of the runtime's.
    async fn token(source: OAuthToken, now_s: u64) -> Result<Token, (Failure, String)> {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now_s);
        let runtime = Handle::current();
        let asking = move || super::token(&source, now, &runtime);
        tokio::task::spawn_blocking(asking).await.expect("no panic")
    }

    #[tokio::test]
    async fn a_token_made_here_names_its_subject_and_its_end() {
        let made = token(OAuthToken::Unsecured("g\"w".into()), 1_000).await.unwrap();
        assert_eq!(made.principal_name, "g\"w");
        assert_eq!(made.lifetime_ms, (1_000 + 30 * 60) * 1000);
        assert!(made.token.ends_with('.'), "unsecured: no signature");
    }

    #[tokio::test]
    async fn a_kept_token_lives_as_long_as_it_says() {
        let kept = |claims: &str| {
            let token = format!("h.{}.s", BASE64_URL.encode(claims));
            OAuthToken::Kept(SecretSource::Inline(Secret::new(token)))
        };
        let read = token(kept(r#"{"sub":"gw","exp":5000.5}"#), 1_000).await.unwrap();
        assert_eq!((&*read.principal_name, read.lifetime_ms), ("gw", 5_000_000));
        let wrong = token(kept(r#"{"exp":999}"#), 1_000).await.err().unwrap().1;
        assert!(wrong.contains("expired"), "{wrong}");
        let opaque = OAuthToken::Kept(SecretSource::Inline(Secret::new("opaque")));
        assert_eq!(token(opaque, 0).await.unwrap().lifetime_ms, 30 * 60 * 1000);
        let missing = OAuthToken::Kept(SecretSource::File("/nonexistent/token".into()));
        assert!(token(missing, 0).await.err().unwrap().1.contains("/nonexistent/token"));
    }

    #[tokio::test]
    async fn a_token_endpoint_is_asked_and_says_how_long_its_token_lives() {
        let upstream = fake::Upstream::start(|_| fake::reply(500)).await;
        let source = || {
            OAuthToken::Endpoint(OAuth2Config {
                token_url: upstream.url.clone(),
                client_id: "edge-01".into(),
                client_secret: SecretSource::Inline(Secret::new("hunter2")),
                scope: Some("kafka".into()),
                audience: None,
            })
        };
        let grants = |granted: String| {
            upstream.behave(move |asked| {
                assert_eq!(asked.body, b"grant_type=client_credentials&scope=kafka");
                // edge-01:hunter2
                assert_eq!(asked.header("authorization"), "Basic ZWRnZS0wMTpodW50ZXIy");
                (fake::reply(200).0, Vec::new(), granted.clone())
            });
        };
        let (failure, _) = token(source(), 1_000).await.err().unwrap();
        assert_eq!(failure, Failure::Retry { after: None });

        grants(r#"{"access_token":"opaque","token_type":"Bearer","expires_in":100}"#.into());
        let opaque = token(source(), 1_000).await.unwrap();
        assert_eq!((&*opaque.token, opaque.lifetime_ms), ("opaque", 1_100_000));
        // What the token says of itself is what the brokers go by.
        let web = format!("h.{}.s", BASE64_URL.encode(r#"{"sub":"gw","exp":1050}"#));
        grants(format!(r#"{{"access_token":"{web}","expires_in":100}}"#));
        let web = token(source(), 1_000).await.unwrap();
        assert_eq!((&*web.principal_name, web.lifetime_ms), ("gw", 1_050_000));

        upstream.behave(|_| fake::reply(401));
        let (failure, reason) = token(source(), 1_000).await.err().unwrap();
        assert_eq!(failure, Failure::Hold);
        assert!(reason.starts_with("sasl.token_url: ") && reason.contains("client_secret"));
        assert!(!reason.contains("hunter2"), "{reason}");
    }
}
