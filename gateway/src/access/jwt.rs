//! JSON Web Tokens as passwords: RS256 and ES256 with public keys, HS256 with a shared one.
//!
//! Owns: reading keys, and checking a token's signature and claims.
//! Invariant: a key serves one algorithm, the one that it was made for, whatever a token says of
//! itself; a token without an end is none.
//! Deliberately absent: fetching keys over the network, other algorithms, encrypted tokens.

use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey};
use ring::{digest, hmac};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Deserialize;
use serde_json::{Map, Value};
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::users::NAME_BYTES_MAX;
use crate::config::{JwtConfig, JwtKeys};

/// Longest token that is looked at, in bytes.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;

/// Shortest shared key, in bytes: what HS256 makes of it [RFC 7518, 3.2].
pub const HMAC_BYTES_MIN: usize = 32;

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("auth.jwt: {}: {why}", path.display())]
pub struct KeyError {
    path: PathBuf,
    why: String,
}

/// Why a token is not one of ours. The texts go to the client and hold nothing of the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not three parts of base64url with JSON in them.
    #[error("the token is malformed")]
    Malformed,
    /// No key of ours made it.
    #[error("the token is not signed with a known key")]
    Signature,
    /// `exp` has passed, or is not there.
    #[error("the token has expired, or says no end")]
    Expired,
    /// `nbf` is to come.
    #[error("the token is not valid yet")]
    Early,
    /// `iss` or `aud` is not as configured.
    #[error("the token is from another issuer, or for another audience")]
    Stranger,
    /// The claim with the user name is not a text of fitting length.
    #[error("the token names no user")]
    Nameless,
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The user.
    pub user: String,
    /// The one client id that may use it, if it names one.
    pub client_id: Option<String>,
    /// Its end, in seconds since the Unix epoch, the leeway included.
    pub until: u64,
    /// Which key has signed it.
    pub key: KeyPrint,
}

/// Tells keys apart.
pub type KeyPrint = [u8; 32];

/// Checks tokens.
pub struct Verifier {
    keys: Vec<Key>,
    config: JwtConfig,
}

struct Key {
    id: Option<String>,
    print: KeyPrint,
    material: Material,
}

enum Material {
    Hmac(hmac::Key),
    /// A DER-encoded `RSAPublicKey`.
    Rsa(Vec<u8>),
    RsaComponents {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// An uncompressed point of P-256.
    P256(Vec<u8>),
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    /// Extensions that must be understood: none is.
    crit: Option<Value>,
}

#[derive(Deserialize)]
struct Jwks {
    keys: Vec<Jwk>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
    k: Option<String>,
}

impl Verifier {
    /// Reads the keys.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn load(config: &JwtConfig) -> Result<Self, KeyError> {
        let (path, keys): (&Path, Result<Vec<Key>, String>) = match &config.keys {
            JwtKeys::Hmac(path) => (path, read(path).and_then(|secret| hmac_key(&secret))),
            JwtKeys::Public(path) => (path, public_key(path)),
            JwtKeys::Jwks(path) => (path, read(path).and_then(|json| jwks(&json))),
        };
        let keys = keys.map_err(|why| KeyError { path: path.to_owned(), why })?;
        Ok(Self { keys, config: config.clone() })
    }

    /// Whether a password has the shape of a token.
    pub fn is_token(password: &[u8]) -> bool {
        password.starts_with(b"eyJ") && password.split(|byte| *byte == b'.').count() == 3
    }

    /// Checks a token at `now`, in seconds since the Unix epoch.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn check(&self, token: &[u8], now: u64) -> Result<Token, TokenError> {
        let token = std::str::from_utf8(token).map_err(|_| TokenError::Malformed)?;
        if token.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::Malformed);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(TokenError::Malformed)?;
        let header: Header = json(header)?;
        let signature = decode(signature)?;
        if header.crit.is_some() {
            return Err(TokenError::Malformed);
        }
        let key = self.keys.iter().find(|key| {
            let named = match (&header.kid, &key.id) {
                (Some(said), Some(id)) => said == id,
                _ => true,
            };
            named && key.material.has_signed(&header.alg, signed.as_bytes(), &signature)
        });
        let key = key.ok_or(TokenError::Signature)?;
        self.accept(&json(claims)?, now, key.print)
    }

    fn accept(
        &self,
        claims: &Map<String, Value>,
        now: u64,
        key: KeyPrint,
    ) -> Result<Token, TokenError> {
        let leeway = self.config.leeway.as_secs();
        let seconds = |claim: &str| claims.get(claim).map(|value| value.as_f64().unwrap_or(-1.0));
        let until = match seconds("exp") {
            Some(exp) if exp >= 0.0 => (exp as u64).saturating_add(leeway),
            _ => return Err(TokenError::Expired),
        };
        if until <= now {
            return Err(TokenError::Expired);
        }
        match seconds("nbf") {
            Some(nbf) if nbf < 0.0 => return Err(TokenError::Malformed),
            Some(nbf) if nbf as u64 > now.saturating_add(leeway) => return Err(TokenError::Early),
            _ => {}
        }
        let is_from = |issuer| claims.get("iss").and_then(Value::as_str) == Some(issuer);
        let is_for = |audience: &str| match claims.get("aud") {
            Some(Value::String(one)) => one == audience,
            Some(Value::Array(many)) => many.iter().any(|one| one.as_str() == Some(audience)),
            _ => false,
        };
        let JwtConfig { issuer, audience, user_claim, .. } = &self.config;
        if !issuer.as_deref().is_none_or(is_from) || !audience.as_deref().is_none_or(is_for) {
            return Err(TokenError::Stranger);
        }
        let user = claims.get(user_claim).and_then(Value::as_str);
        let user = user.filter(|user| !user.is_empty() && user.len() <= NAME_BYTES_MAX);
        let client_id = match claims.get("client_id") {
            None => None,
            Some(Value::String(id)) => Some(id.clone()),
            Some(_) => return Err(TokenError::Malformed),
        };
        Ok(Token { user: user.ok_or(TokenError::Nameless)?.to_owned(), client_id, until, key })
    }

    /// Whether a key is still among ours.
    pub fn has_key(&self, print: &KeyPrint) -> bool {
        self.keys.iter().any(|key| key.print == *print)
    }
}

impl Key {
    fn new(id: Option<String>, material: Material, parts: &[&[u8]]) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in parts {
            context.update(part);
        }
        let print = context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes");
        Self { id, print, material }
    }
}

impl Material {
    fn has_signed(&self, algorithm: &str, signed: &[u8], signature: &[u8]) -> bool {
        let rsa = &signature::RSA_PKCS1_2048_8192_SHA256;
        match (self, algorithm) {
            (Self::Hmac(key), "HS256") => hmac::verify(key, signed, signature).is_ok(),
            (Self::Rsa(key), "RS256") => {
                UnparsedPublicKey::new(rsa, key).verify(signed, signature).is_ok()
            }
            (Self::RsaComponents { n, e }, "RS256") => {
                RsaPublicKeyComponents { n, e }.verify(rsa, signed, signature).is_ok()
            }
            (Self::P256(point), "ES256") => {
                let algorithm = &signature::ECDSA_P256_SHA256_FIXED;
                UnparsedPublicKey::new(algorithm, point).verify(signed, signature).is_ok()
            }
            _ => false,
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("cannot be read: {error}"))
}

fn hmac_key(secret: &[u8]) -> Result<Vec<Key>, String> {
    // An editor's line end is not part of the key.
    let secret = secret.strip_suffix(b"\n").unwrap_or(secret);
    shared_key(None, secret).map(|key| vec![key])
}

fn shared_key(id: Option<String>, secret: &[u8]) -> Result<Key, String> {
    if secret.len() < HMAC_BYTES_MIN {
        let len = secret.len();
        return Err(format!("a key for HS256 has {HMAC_BYTES_MIN} bytes at least, not {len}"));
    }
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    Ok(Key::new(id, Material::Hmac(key), &[secret]))
}

fn public_key(path: &Path) -> Result<Vec<Key>, String> {
    let pem = read(path)?;
    let der = SubjectPublicKeyInfoDer::from_pem_slice(&pem).map_err(|_| {
        "holds no public key; it must be a PEM file that begins with -----BEGIN PUBLIC KEY-----"
    })?;
    let (_, info) =
        SubjectPublicKeyInfo::from_der(&der).map_err(|_| "its public key is damaged".to_owned())?;
    let key = info.subject_public_key.data.to_vec();
    // By what identifies the algorithm [RFC 3279, 2.3.1], [RFC 5480, 2.1.1].
    let material = match info.algorithm.algorithm.to_id_string().as_str() {
        "1.2.840.113549.1.1.1" => Material::Rsa(key),
        "1.2.840.10045.2.1" if is_point(&key) => Material::P256(key),
        _ => return Err("its public key is neither RSA nor of the curve P-256".to_owned()),
    };
    Ok(vec![Key::new(None, material, &[&der])])
}

/// Whether this is an uncompressed point of a curve of 256 bits.
fn is_point(bytes: &[u8]) -> bool {
    bytes.len() == 65 && bytes[0] == 4
}

fn jwks(json: &[u8]) -> Result<Vec<Key>, String> {
    let set: Jwks = serde_json::from_slice(json)
        .map_err(|wrong| format!("is no JWKS, {{\"keys\": [...]}}: {wrong}"))?;
    let mut keys = Vec::new();
    for (number, jwk) in (1..).zip(set.keys) {
        // Keys for other ends stand in such files by right.
        if jwk.purpose.as_deref().is_some_and(|purpose| purpose != "sig") {
            continue;
        }
        let key = jwk_key(jwk).map_err(|why| format!("key {number}: {why}"))?;
        keys.extend(key);
    }
    if keys.is_empty() {
        return Err("holds no key for RS256, ES256 or HS256".to_owned());
    }
    Ok(keys)
}

/// `None` for a kind of key that is not used here.
fn jwk_key(jwk: Jwk) -> Result<Option<Key>, String> {
    let part = |name: &str, part: Option<String>| {
        let decoded = part.and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
        decoded.ok_or_else(|| format!("{name:?} must be base64url without padding"))
    };
    let is_for = |algorithm| jwk.alg.as_deref().is_none_or(|said| said == algorithm);
    match (jwk.kty.as_str(), jwk.crv.as_deref()) {
        ("RSA", _) if is_for("RS256") => {
            let (mut n, e) = (part("n", jwk.n)?, part("e", jwk.e)?);
            n.drain(..n.iter().take_while(|byte| **byte == 0).count());
            let parts = [n.clone(), e.clone()];
            let material = Material::RsaComponents { n, e };
            Ok(Some(Key::new(jwk.kid, material, &[&parts[0], &parts[1]])))
        }
        ("EC", Some("P-256")) if is_for("ES256") => {
            let point = [&[4][..], &part("x", jwk.x)?, &part("y", jwk.y)?].concat();
            if !is_point(&point) {
                return Err("\"x\" and \"y\" must be 32 bytes each".to_owned());
            }
            Ok(Some(Key::new(jwk.kid, Material::P256(point.clone()), &[&point])))
        }
        ("oct", _) if is_for("HS256") => shared_key(jwk.kid, &part("k", jwk.k)?).map(Some),
        _ => Ok(None),
    }
}

fn decode(part: &str) -> Result<Vec<u8>, TokenError> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed)
}

fn json<T: serde::de::DeserializeOwned>(part: &str) -> Result<T, TokenError> {
    serde_json::from_slice(&decode(part)?).map_err(|_| TokenError::Malformed)
}

/// How long a token that ends at `until` has left.
pub fn left(until: u64, now: u64) -> Duration {
    Duration::from_secs(until.saturating_sub(now))
}

#[cfg(test)]
mod tests {
    use rcgen::KeyPair;
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
    use serde_json::json;

    use super::*;

    const NOW: u64 = 1_800_000_000;
    const SECRET: &[u8] = b"a shared key of thirty-two bytes";

    fn encode(bytes: impl AsRef<[u8]>) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn sign(header: &Value, claims: &Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
        let signed = format!("{}.{}", encode(header.to_string()), encode(claims.to_string()));
        let signature = encode(sign(signed.as_bytes()));
        format!("{signed}.{signature}").into_bytes()
    }

    fn hs256(claims: &Value) -> Vec<u8> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET);
        sign(&json!({"alg": "HS256"}), claims, |bytes| hmac::sign(&key, bytes).as_ref().to_vec())
    }

    fn verifier(keys: JwtKeys) -> Verifier {
        Verifier::load(&config(keys)).unwrap()
    }

    fn config(keys: JwtKeys) -> JwtConfig {
        JwtConfig {
            keys,
            user_claim: "sub".to_owned(),
            issuer: None,
            audience: None,
            leeway: Duration::from_secs(30),
        }
    }

    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, text: impl AsRef<[u8]>) -> PathBuf {
            let path = self.0.path().join("keys");
            std::fs::write(&path, text).unwrap();
            path
        }

        fn shared(&self) -> Verifier {
            verifier(JwtKeys::Hmac(self.write(SECRET)))
        }
    }

    #[test]
    fn claims_decide_within_the_leeway() {
        let mut verifier = Files::new().shared();
        let check = |verifier: &Verifier, claims: Value| {
            let token = hs256(&claims);
            assert!(Verifier::is_token(&token));
            verifier.check(&token, NOW).map(|token| token.user)
        };
        let user = || Ok("dev-7".to_owned());
        for (claims, expected) in [
            (json!({"sub": "dev-7", "exp": NOW + 60}), user()),
            (json!({"sub": "dev-7", "exp": NOW - 29}), user()),
            (json!({"sub": "dev-7", "exp": NOW - 30}), Err(TokenError::Expired)),
            (json!({"sub": "dev-7"}), Err(TokenError::Expired)),
            (json!({"sub": "dev-7", "exp": "never"}), Err(TokenError::Expired)),
            (json!({"sub": "dev-7", "exp": NOW + 60, "nbf": NOW + 30}), user()),
            (json!({"sub": "dev-7", "exp": NOW + 60, "nbf": NOW + 31}), Err(TokenError::Early)),
            (json!({"sub": "dev-7", "exp": NOW + 60, "nbf": []}), Err(TokenError::Malformed)),
            (json!({"sub": "", "exp": NOW + 60}), Err(TokenError::Nameless)),
            (json!({"sub": 7, "exp": NOW + 60}), Err(TokenError::Nameless)),
            (json!({"sub": "d", "exp": NOW + 60, "client_id": 7}), Err(TokenError::Malformed)),
            (json!([]), Err(TokenError::Malformed)),
        ] {
            assert_eq!(check(&verifier, claims.clone()), expected, "{claims}");
        }
        verifier.config.issuer = Some("plant".to_owned());
        verifier.config.audience = Some("edge".to_owned());
        for (iss, aud, expected) in [
            ("plant", json!("edge"), user()),
            ("plant", json!(["cloud", "edge"]), user()),
            ("other", json!("edge"), Err(TokenError::Stranger)),
            ("plant", json!("cloud"), Err(TokenError::Stranger)),
            ("plant", json!(null), Err(TokenError::Stranger)),
        ] {
            let claims = json!({"sub": "dev-7", "exp": NOW + 60, "iss": iss, "aud": aud});
            assert_eq!(check(&verifier, claims.clone()), expected, "{claims}");
        }
    }

    #[test]
    fn a_token_that_was_touched_is_none() {
        let verifier = Files::new().shared();
        let token = hs256(&json!({"sub": "dev-7", "exp": NOW + 60}));
        verifier.check(&token, NOW).unwrap();
        for at in 0..token.len() {
            let mut touched = token.clone();
            touched[at] = if touched[at] == b'A' { b'B' } else { b'A' };
            assert!(verifier.check(&touched, NOW).is_err(), "byte {at}");
        }
        for wrong in [&b""[..], b"..", b"eyJ.eyJ", b"\xff.\xff.\xff", &token[..token.len() - 1]] {
            assert!(verifier.check(wrong, NOW).is_err(), "{wrong:?}");
        }
        assert_eq!(verifier.check(&[b'.'; TOKEN_BYTES_MAX + 1], NOW), Err(TokenError::Malformed));
    }

    /// The classic: "none", or a public key used as the secret of HS256.
    #[test]
    fn a_token_does_not_choose_its_algorithm() {
        let files = Files::new();
        let key = KeyPair::generate().unwrap();
        let public = verifier(JwtKeys::Public(files.write(key.public_key_pem())));
        let claims = json!({"sub": "root", "exp": NOW + 60});
        let none = sign(&json!({"alg": "none"}), &claims, |_| Vec::new());
        assert_eq!(public.check(&none, NOW), Err(TokenError::Signature));
        for secret in [key.public_key_raw(), key.public_key_pem().as_bytes()] {
            let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
            let forged = sign(&json!({"alg": "HS256"}), &claims, |bytes| {
                hmac::sign(&secret, bytes).as_ref().to_vec()
            });
            assert_eq!(public.check(&forged, NOW), Err(TokenError::Signature));
        }
        let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET);
        let critical = sign(&json!({"alg": "HS256", "crit": ["b64"]}), &claims, |bytes| {
            hmac::sign(&key, bytes).as_ref().to_vec()
        });
        assert_eq!(Files::new().shared().check(&critical, NOW), Err(TokenError::Malformed));
    }

    #[test]
    fn es256_by_pem_and_by_jwks_with_key_ids() {
        let files = Files::new();
        let pair = KeyPair::generate().unwrap();
        let random = SystemRandom::new();
        let signer = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P256_SHA256_FIXED_SIGNING,
            pair.serialized_der(),
            &random,
        )
        .unwrap();
        let claims = json!({"sub": "dev-7", "exp": NOW + 60, "client_id": "c7"});
        let token = |kid: Option<&str>| {
            let mut header = json!({"alg": "ES256"});
            if let Some(kid) = kid {
                header["kid"] = json!(kid);
            }
            sign(&header, &claims, |bytes| signer.sign(&random, bytes).unwrap().as_ref().to_vec())
        };
        let by_pem = verifier(JwtKeys::Public(files.write(pair.public_key_pem())));
        let checked = by_pem.check(&token(Some("any")), NOW).unwrap();
        assert_eq!(checked.client_id.as_deref(), Some("c7"));
        assert!(by_pem.has_key(&checked.key));
        assert_eq!((checked.until, left(checked.until, NOW)), (NOW + 90, Duration::from_secs(90)));

        let point = pair.public_key_raw();
        let jwk = json!({"keys": [
            {"kty": "OKP", "crv": "Ed25519", "x": "AA"},
            {"kty": "oct", "kid": "shared", "k": encode(SECRET)},
            {"kty": "EC", "crv": "P-256", "kid": "ours", "use": "sig",
             "x": encode(&point[1..33]), "y": encode(&point[33..])},
        ]});
        let by_set = verifier(JwtKeys::Jwks(files.write(jwk.to_string())));
        by_set.check(&token(Some("ours")), NOW).unwrap();
        by_set.check(&token(None), NOW).unwrap();
        assert_eq!(by_set.check(&token(Some("theirs")), NOW), Err(TokenError::Signature));
        by_set.check(&hs256(&claims), NOW).unwrap();
        assert!(!by_set.has_key(&checked.key), "another file, another key to whoever compares");
    }

    /// RFC 7515, appendix A.2: a signature that others have made.
    #[test]
    fn rs256_of_the_rfc_is_verified() {
        const N: &str = "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ";
        const TOKEN: &[u8] = b"eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw";
        let files = Files::new();
        let set = json!({"keys": [{"kty": "RSA", "n": N, "e": "AQAB", "alg": "RS256"}]});
        let mut config = config(JwtKeys::Jwks(files.write(set.to_string())));
        config.user_claim = "iss".to_owned();
        let verifier = Verifier::load(&config).unwrap();
        assert_eq!(verifier.check(TOKEN, 1_300_819_380).unwrap().user, "joe");
        assert_eq!(verifier.check(TOKEN, NOW), Err(TokenError::Expired));
    }

    #[test]
    fn keys_that_cannot_be_used_are_named() {
        let files = Files::new();
        let wrong = |keys: JwtKeys| Verifier::load(&config(keys)).err().unwrap().to_string();
        let missing = wrong(JwtKeys::Hmac("/nowhere/key".into()));
        assert!(missing.starts_with("auth.jwt: /nowhere/key: cannot be read"), "{missing}");
        assert!(wrong(JwtKeys::Hmac(files.write("short\n"))).contains("32 bytes at least, not 5"));
        assert!(wrong(JwtKeys::Public(files.write("text"))).contains("BEGIN PUBLIC KEY"));
        assert!(wrong(JwtKeys::Jwks(files.write("[]"))).contains("is no JWKS"));
        let useless = r#"{"keys": [{"kty": "EC", "crv": "P-256", "use": "enc"}]}"#;
        assert!(wrong(JwtKeys::Jwks(files.write(useless))).contains("holds no key"));
        let broken = r#"{"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}]}"#;
        assert!(wrong(JwtKeys::Jwks(files.write(broken))).contains("key 1: "));
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let p384 = wrong(JwtKeys::Public(files.write(p384.public_key_pem())));
        assert!(p384.contains("P-256"), "{p384}");
    }
}
