//! OAuth 2 client credentials (RFC 6749, section 4.4).
//!
//! Owns: asking a token endpoint ([`Endpoint`]), also for sinks that are not HTTP; and for those that
//! are, the access token ([`Tokens`]), which is fetched when one is needed and kept until most of its
//! life is over or an upstream refuses it.
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
use crate::sink::{Answer, Failed, Failure, Which};

/// A token is used for so many tenths of its life: clocks differ, and requests take time.
const LIFE_TENTHS: u32 = 9;
/// Longest answer of a token endpoint.
const TOKEN_BYTES_MAX: usize = 64 * 1024;

/// A token endpoint, and who we are there.
pub(crate) struct Endpoint {
    config: OAuth2Config,
    /// Section of the configuration that it stands in, for errors.
    section: &'static str,
    /// `Authorization` of this client at the token endpoint.
    credentials: HeaderValue,
}

/// Gives access tokens.
pub(super) struct Tokens {
    endpoint: Endpoint,
    /// One fetches, the others wait for it.
    cached: Mutex<Option<Token>>,
}

#[derive(Clone)]
struct Token {
    bearer: HeaderValue,
    /// `None`: until it is refused.
    fresh_until: Option<Instant>,
}

/// What a token endpoint granted.
#[derive(Deserialize)]
pub(crate) struct Granted {
    pub(crate) access_token: String,
    token_type: Option<String>,
    /// Life of the token in seconds, if it was said.
    pub(crate) expires_in: Option<u64>,
}

impl Endpoint {
    pub(super) fn new(config: OAuth2Config, section: &'static str, client_secret: &Secret) -> Self {
        // Section 2.3.1: both halves are form-encoded first.
        let pair =
            format!("{}:{}", form_encoded(&config.client_id), form_encoded(client_secret.reveal()));
        let mut credentials = HeaderValue::try_from(format!("Basic {}", BASE64.encode(pair)))
            .expect("base64 is printable");
        credentials.set_sensitive(true);
        Self { config, section, credentials }
    }

    /// Asks for a token; says nothing of what is in it. `Err` is what that means for whoever needs one.
    pub(crate) async fn ask(&self, client: &Client) -> Result<Granted, Failed> {
        let mut form = "grant_type=client_credentials".to_owned();
        for (name, value) in [("scope", &self.config.scope), ("audience", &self.config.audience)] {
            if let Some(value) = value {
                let _ = write!(form, "&{name}={}", form_encoded(value));
            }
        }
        let answered = client
            .post(&self.config.token_url)
            .header(AUTHORIZATION, self.credentials.clone())
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(ACCEPT, "application/json")
            .body(form)
            .send()
            .await;
        let retry = |error| self.failed(Failure::Retry { after: None }, &super::chain(error));
        let response = answered.map_err(retry)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = answer::body(response, TOKEN_BYTES_MAX).await.map_err(retry)?;
        if !status.is_success() {
            let now = std::time::SystemTime::now();
            return Err(self.refused(answer::sort(status, &headers, &answer::quote(&body), now)));
        }
        granted(&body).map_err(|why| self.useless(why))
    }

    /// What the refusal of a token means for the events: none of them is to blame.
    fn refused(&self, answer: Answer) -> Failed {
        let said = answer.failed.into_iter().next().expect("a refusal says why");
        match said.failure {
            Failure::Retry { .. } => self.failed(said.failure, &said.reason),
            _ => {
                let remedy = "check client_id, client_secret and scope";
                self.failed(Failure::Hold, &format!("{}; {remedy}", said.reason))
            }
        }
    }

    fn useless(&self, why: &str) -> Failed {
        self.failed(Failure::Hold, &format!("the answer {why}; check token_url"))
    }

    fn failed(&self, failure: Failure, reason: &str) -> Failed {
        let reason = format!("{}.token_url: {reason}", self.section);
        Failed { which: Which::All, failure, reason }
    }
}

impl Tokens {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, cached: Mutex::new(None) }
    }

    /// The value of an `Authorization` header; `Err` is what to answer without one.
    pub(super) async fn bearer(&self, client: &Client) -> Result<HeaderValue, Answer> {
        let mut cached = self.cached.lock().await;
        if let Some(token) = &*cached
            && token.fresh_until.is_none_or(|until| Instant::now() < until)
        {
            return Ok(token.bearer.clone());
        }
        let asked = Instant::now();
        let granted = self.endpoint.ask(client).await;
        let token = granted.and_then(|granted| {
            Token::of(&granted, asked).map_err(|why| self.endpoint.useless(why))
        });
        let token = token.map_err(|failed| Answer { failed: vec![failed] })?;
        Ok(cached.insert(token).bearer.clone())
    }

    /// The upstream has refused this one.
    pub(super) async fn refused(&self, bearer: &HeaderValue) {
        let mut cached = self.cached.lock().await;
        if cached.as_ref().is_some_and(|token| token.bearer == *bearer) {
            *cached = None;
        }
    }
}

/// Reads what a token endpoint granted.
fn granted(body: &[u8]) -> Result<Granted, &'static str> {
    let granted: Granted = serde_json::from_slice(body).map_err(|_| "holds no access token")?;
    if granted.token_type.as_ref().is_some_and(|kind| !kind.eq_ignore_ascii_case("bearer")) {
        return Err("holds a token that is no bearer token");
    }
    Ok(granted)
}

impl Token {
    /// Of what was asked for at `now`.
    fn of(granted: &Granted, now: Instant) -> Result<Self, &'static str> {
        let mut bearer = HeaderValue::try_from(format!("Bearer {}", granted.access_token))
            .map_err(|_| "holds a token that a header cannot carry")?;
        bearer.set_sensitive(true);
        let life = granted.expires_in.map(Duration::from_secs);
        let life = life.and_then(|life| life.checked_mul(LIFE_TENTHS));
        Ok(Self { bearer, fresh_until: life.and_then(|life| now.checked_add(life / 10)) })
    }
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
        let token = |body: &str| Token::of(&granted(body.as_bytes())?, now);
        let life = |body: &str| {
            let token = token(body).ok()?;
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
        assert!(token(&huge).is_ok());
    }

    #[test]
    fn forms_are_encoded_as_browsers_do() {
        assert_eq!(form_encoded("a b:c/ö*~"), "a+b%3Ac%2F%C3%B6*%7E");
    }
}
