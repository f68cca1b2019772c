//! What a sink sends with: the client, and whatever is read from files and the environment.
//!
//! Owns: building it ([`Link::build`]), the `Authorization` of a request, and its signature.
//!
//! `Edge-Gateway-Signature: t=<seconds>,v1=<hex>` proves a body: `v1` is the HMAC-SHA256 with the
//! shared key over the seconds (since the Unix epoch, of this sending), a full stop, and the body as it
//! was sent, that is after compression. A receiver checks that, and that `t` is not long ago.
//!
//! TLS takes the process's default rustls provider, which the binary installs. Roots are the
//! system's (`ca-certificates` on Debian, or `SSL_CERT_FILE`) or `tls.ca_file`, read when the client is
//! built: nothing is fetched and nothing is baked in. A system without roots holds an `https` sink;
//! plain `http` needs none.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Certificate, Client, Identity, Proxy, Url};
use ring::hmac;

use super::chain;
use super::oauth::{Endpoint, Tokens};
#[cfg(feature = "kafka")]
use crate::config::OAuth2Config;
use crate::config::{HttpAuth, HttpConfig, HttpProxy, HttpVersion, TlsConfig, TlsIdentity};
use crate::secret;
use crate::sink::Answer;

pub(super) const SIGNATURE: HeaderName = HeaderName::from_static("edge-gateway-signature");
const USER_AGENT: &str = concat!("edge-gateway/", env!("CARGO_PKG_VERSION"));

/// A client with its secrets.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) client: Client,
    /// The configured ones, and a fixed `Authorization`.
    headers: HeaderMap,
    tokens: Option<Arc<Tokens>>,
    signing_key: Option<hmac::Key>,
}

impl Link {
    /// Reads secrets and certificates, and builds the client. Blocks.
    ///
    /// # Errors
    /// What stands in the way, and the remedy.
    pub(super) fn build(config: &HttpConfig, request_timeout: Duration) -> Result<Self, String> {
        let mut headers = HeaderMap::new();
        for (name, value) in &config.headers {
            match (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                (Ok(name), Ok(value)) => headers.append(name, value),
                _ => return Err(format!("headers: {name:?} or its value is no HTTP header")),
            };
        }
        let (mut fixed, mut tokens) = (None, None);
        match &config.auth {
            HttpAuth::None => {}
            HttpAuth::Bearer(token) => {
                fixed = Some(format!("Bearer {}", secret::read(token, "auth")?.reveal()));
            }
            HttpAuth::Basic { username, password } => {
                let pair = format!("{username}:{}", secret::read(password, "auth")?.reveal());
                fixed = Some(format!("Basic {}", BASE64.encode(pair)));
            }
            HttpAuth::OAuth2(oauth2) => {
                let client_secret = secret::read(&oauth2.client_secret, "oauth2")?;
                let endpoint = Endpoint::new(oauth2.clone(), "oauth2", &client_secret);
                tokens = Some(Arc::new(Tokens::new(endpoint)));
            }
        }
        if let Some(text) = fixed {
            let mut value = HeaderValue::try_from(text).map_err(|_| {
                "auth: the secret has characters that a header cannot carry".to_owned()
            })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let signing_key = match &config.signing_key {
            None => None,
            Some(source) => {
                let key = secret::read(source, "signing_key")?;
                Some(hmac::Key::new(hmac::HMAC_SHA256, key.reveal().as_bytes()))
            }
        };
        let client = client(config, request_timeout)?;
        Ok(Self { client, headers, tokens, signing_key })
    }

    /// The headers that every request has.
    pub(super) fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// A token for one request, where tokens are used; `Err` is what to answer without one.
    pub(super) async fn token(&self) -> Result<Option<HeaderValue>, Answer> {
        match &self.tokens {
            Some(tokens) => tokens.bearer(&self.client).await.map(Some),
            None => Ok(None),
        }
    }

    /// The upstream has refused this token.
    pub(super) async fn token_refused(&self, token: &HeaderValue) {
        if let Some(tokens) = &self.tokens {
            tokens.refused(token).await;
        }
    }

    /// The signature of a body that is sent now, where bodies are signed.
    pub(super) fn sign(&self, body: &[u8], now: SystemTime) -> Option<HeaderValue> {
        let key = self.signing_key.as_ref()?;
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut context = hmac::Context::with_key(key);
        context.update(format!("{seconds}.").as_bytes());
        context.update(body);
        let mut text = format!("t={seconds},v1=");
        for byte in context.sign().as_ref() {
            let _ = write!(text, "{byte:02x}");
        }
        Some(HeaderValue::try_from(text).expect("hexadecimal"))
    }
}

/// A token endpoint for a sink that is not HTTP, and the client to ask it with. Blocks. `section` is
/// where it stands in the configuration, for errors.
///
/// # Errors
/// What stands in the way, and the remedy.
#[cfg(feature = "kafka")]
pub(crate) fn endpoint(
    config: &OAuth2Config,
    section: &'static str,
    timeout: Duration,
) -> Result<(Endpoint, Client), String> {
    let client_secret = secret::read(&config.client_secret, section)?;
    let client = client(&HttpConfig::new(&config.token_url), timeout)?;
    Ok((Endpoint::new(config.clone(), section, &client_secret), client))
}

fn client(config: &HttpConfig, request_timeout: Duration) -> Result<Client, String> {
    let parse = |key: &str, text: &str| {
        Url::parse(text).map_err(|error| format!("{key} is not a valid address: {error}"))
    };
    let url = parse("url", &config.url)?;
    let mut is_plain = url.scheme() == "http";
    let mut is_local = is_loopback(&url);
    if let HttpAuth::OAuth2(oauth2) = &config.auth {
        let token_url = parse("oauth2.token_url", &oauth2.token_url)?;
        is_plain &= token_url.scheme() == "http";
        is_local &= is_loopback(&token_url);
    }
    let mut builder = Client::builder()
        .user_agent(USER_AGENT)
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .timeout(request_timeout);
    builder = match config.version {
        HttpVersion::Auto => builder,
        HttpVersion::Http1 => builder.http1_only(),
        HttpVersion::Http2 => builder.http2_prior_knowledge(),
    };
    builder = match &config.proxy {
        Some(proxy) => {
            is_plain &= !proxy.url.starts_with("https:");
            builder.proxy(proxy_of(proxy)?)
        }
        None if is_local => builder.no_proxy(),
        None => builder,
    };
    let TlsConfig { ca_file, identity } = &config.tls;
    if let Some(path) = ca_file {
        let certificates = Certificate::from_pem_bundle(&read_pem("tls.ca_file", path)?)
            .ok()
            .filter(|certificates| !certificates.is_empty())
            .ok_or_else(|| format!("tls.ca_file: {} holds no certificate", path.display()))?;
        builder = builder.tls_certs_only(certificates);
    } else if is_plain {
        // Nothing will be verified, so a system without roots is no obstacle.
        builder = builder.tls_certs_only([]);
    }
    if let Some(TlsIdentity { cert_file, key_file }) = identity {
        let mut pem = read_pem("tls.cert_file", cert_file)?;
        pem.push(b'\n');
        pem.extend(read_pem("tls.key_file", key_file)?);
        let identity = Identity::from_pem(&pem).map_err(|_| {
            let (cert, key) = (cert_file.display(), key_file.display());
            format!("tls: {cert} and {key} must hold a certificate and its private key, as PEM")
        })?;
        builder = builder.identity(identity);
    }
    builder.build().map_err(|error| {
        format!(
            "cannot build the client: {}; is the package ca-certificates installed?",
            chain(error)
        )
    })
}

fn read_pem(key: &str, path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{key}: cannot read {}: {error}", path.display()))
}

fn proxy_of(HttpProxy { url, credentials }: &HttpProxy) -> Result<Proxy, String> {
    let proxy = Proxy::all(url).map_err(|error| format!("proxy: {}", chain(error)))?;
    match credentials {
        None => Ok(proxy),
        Some((username, password)) => {
            let password = secret::read(password, "proxy_password")?;
            Ok(proxy.basic_auth(username, password.reveal()))
        }
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost" | "[::1]") => true,
        Some(host) => host.parse().is_ok_and(|ip: std::net::Ipv4Addr| ip.is_loopback()),
        None => false,
    }
}
