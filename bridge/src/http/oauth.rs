//! OAuth 2 client credentials (RFC 6749, section 4.4).
//!
//! Owns: the access token, which is fetched when one is needed and kept until most of its life is
//! over or an upstream refuses it.
//! Deliberately absent: refresh tokens, which this grant has none of.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::Client;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::answer;
use crate::config::{OAuth2Config, Secret};
use crate::sink::{Answer, Failure};

/// A token is used for so many tenths of its life: clocks differ, and requests take time.
const LIFE_TENTHS: u32 = 9;
/// Longest answer of a token endpoint.
const TOKEN_BYTES_MAX: usize = 64 * 1024;

/// Gives access tokens.
pub(super) struct Tokens {
    config: OAuth2Config,
    /// `Authorization` of this client at the token endpoint.
    credentials: HeaderValue,
    /// One fetches, the others wait for it.
    cached: Mutex<Option<Token>>,
}

#[derive(Clone)]
struct Token {
    bearer: HeaderValue,
    /// `None`: until it is refused.
    fresh_until: Option<Instant>,
}

#[derive(Deserialize)]
struct Granted {
    access_token: String,
    token_type: Option<String>,
    expires_in: Option<u64>,
}

impl Tokens {
    pub(super) fn new(config: OAuth2Config, client_secret: &Secret) -> Self {
        // Section 2.3.1: both halves are form-encoded first.
        let pair =
            format!("{}:{}", form_encoded(&config.client_id), form_encoded(client_secret.reveal()));
        let mut credentials = HeaderValue::try_from(format!("Basic {}", BASE64.encode(pair)))
            .expect("base64 is printable");
        credentials.set_sensitive(true);
        Self { config, credentials, cached: Mutex::new(None) }
    }

    /// The value of an `Authorization` header; `Err` is what to answer without one.
    pub(super) async fn bearer(&self, client: &Client) -> Result<HeaderValue, Answer> {
        let mut cached = self.cached.lock().await;
        if let Some(token) = &*cached
            && token.fresh_until.is_none_or(|until| Instant::now() < until)
        {
            return Ok(token.bearer.clone());
        }
        let token = self.fetch(client).await?;
        Ok(cached.insert(token).bearer.clone())
    }

    /// The upstream has refused this one.
    pub(super) async fn refused(&self, bearer: &HeaderValue) {
        let mut cached = self.cached.lock().await;
        if cached.as_ref().is_some_and(|token| token.bearer == *bearer) {
            *cached = None;
        }
    }

    async fn fetch(&self, client: &Client) -> Result<Token, Answer> {
        let mut form = "grant_type=client_credentials".to_owned();
        for (name, value) in [("scope", &self.config.scope), ("audience", &self.config.audience)] {
            if let Some(value) = value {
                let _ = write!(form, "&{name}={}", form_encoded(value));
            }
        }
        let asked = Instant::now();
        let answered = client
            .post(&self.config.token_url)
            .header(AUTHORIZATION, self.credentials.clone())
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(ACCEPT, "application/json")
            .body(form)
            .send()
            .await;
        let retry = |error| {
            let reason = format!("oauth2.token_url: {}", super::chain(error));
            Answer::failed(Failure::Retry { after: None }, reason)
        };
        let response = answered.map_err(retry)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = answer::body(response, TOKEN_BYTES_MAX).await.map_err(retry)?;
        if !status.is_success() {
            return Err(refusal(answer::sort(
                status,
                &headers,
                &answer::quote(&body),
                std::time::SystemTime::now(),
            )));
        }
        grant(&body, asked).map_err(|why| {
            let reason = format!("oauth2.token_url: the answer {why}; check token_url");
            Answer::failed(Failure::Hold, reason)
        })
    }
}

/// What the refusal of a token means for the events: none of them is to blame.
fn refusal(answer: Answer) -> Answer {
    let failed = answer.failed.into_iter().map(|mut failed| {
        failed.reason = format!("oauth2.token_url: {}", failed.reason);
        if !matches!(failed.failure, Failure::Retry { .. }) {
            failed.failure = Failure::Hold;
            failed.reason.push_str("; check client_id, client_secret and scope");
        }
        failed
    });
    Answer { failed: failed.collect() }
}

/// Reads what the token endpoint granted, asked for at `now`. Says nothing of what is in it.
fn grant(body: &[u8], now: Instant) -> Result<Token, &'static str> {
    let Granted { access_token, token_type, expires_in } =
        serde_json::from_slice(body).map_err(|_| "holds no access token")?;
    if token_type.is_some_and(|kind| !kind.eq_ignore_ascii_case("bearer")) {
        return Err("holds a token that is no bearer token");
    }
    let mut bearer = HeaderValue::try_from(format!("Bearer {access_token}"))
        .map_err(|_| "holds a token that a header cannot carry")?;
    bearer.set_sensitive(true);
    let life = expires_in.and_then(|seconds| Duration::from_secs(seconds).checked_mul(LIFE_TENTHS));
    Ok(Token { bearer, fresh_until: life.and_then(|life| now.checked_add(life / 10)) })
}

/// `application/x-www-form-urlencoded`, one value.
fn form_encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' ' => out.push('+'),
            b'-' | b'_' | b'.' | b'*' => out.push(byte.into()),
            _ if byte.is_ascii_alphanumeric() => out.push(byte.into()),
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_used_for_nine_tenths_of_its_life() {
        let now = Instant::now();
        let life = |body: &str| {
            let token = grant(body.as_bytes(), now).ok()?;
            Some(token.fresh_until.map(|until| (until - now).as_secs()))
        };
        assert_eq!(
            life(r#"{"access_token":"a","token_type":"Bearer","expires_in":100}"#),
            Some(Some(90))
        );
        assert_eq!(life(r#"{"access_token":"a"}"#), Some(None));
        for bad in
            ["", "{}", r#"{"access_token":"a","token_type":"mac"}"#, r#"{"access_token":"\n"}"#]
        {
            assert_eq!(life(bad), None, "{bad}");
        }
        // A life beyond all clocks is as good as none said.
        let huge = format!(r#"{{"access_token":"a","expires_in":{}}}"#, u64::MAX);
        assert!(grant(huge.as_bytes(), now).is_ok());
    }

    #[test]
    fn forms_are_encoded_as_browsers_do() {
        assert_eq!(form_encoded("a b:c/ö*~"), "a+b%3Ac%2F%C3%B6*%7E");
    }
}
