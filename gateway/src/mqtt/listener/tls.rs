//! TLS of one listener: its certificate, the authorities of its clients, and who a client is.
//!
//! Invariant: what is in use is whole. New files replace the old ones only when all of them can be
//! read and fit together; connections keep what they began with.
//! Deliberately absent: the handshake itself, which is the connection's.

use std::fmt::Display;
use std::io::{self, BufRead as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use bytestring::ByteString;
use rustls::RootCertStore;
use rustls::crypto::ring::Ticketer;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ServerConfig, VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::TlsAcceptor;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::config::{ClientIdentity, TlsConfig};

/// Why a listener's TLS cannot be set up. Each text names the key, the file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds none of what it should.
    #[error("listener.tls.{key}: {}: {why}", path.display())]
    File {
        /// Key of the configuration.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// There are no keys to resume sessions with.
    #[error("listener.tls: the system gives no random bytes: {0}")]
    Tickets(rustls::Error),
    /// Certificate and key cannot be used together.
    #[error(
        "listener.tls: the certificate {} and the key {} do not fit: {source}",
        cert_file.display(),
        key_file.display()
    )]
    Pair {
        /// File of the certificate.
        cert_file: PathBuf,
        /// File of the key.
        key_file: PathBuf,
        /// What rustls says.
        source: rustls::Error,
    },
}

/// What new connections of a listener use.
#[derive(Debug)]
pub struct Tls {
    current: RwLock<Current>,
}

#[derive(Clone, Debug)]
struct Current {
    config: Arc<ServerConfig>,
    identity: ClientIdentity,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn load(config: &TlsConfig) -> Result<Self, TlsError> {
        Ok(Self { current: RwLock::new(Current::load(config)?) })
    }

    /// Reads the files again; connections that come from now on use them.
    ///
    /// # Errors
    /// See [`TlsError`]; then what was in use stays in use.
    pub fn reload(&self, config: &TlsConfig) -> Result<(), TlsError> {
        let new = Current::load(config)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// What the next connection is to use: for its handshake, and for what its certificate says.
    pub fn acceptor(&self) -> (TlsAcceptor, ClientIdentity) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        (TlsAcceptor::from(current.config.clone()), current.identity)
    }
}

impl Current {
    fn load(files: &TlsConfig) -> Result<Self, TlsError> {
        let TlsConfig { cert_file, key_file, client_ca_file, client_identity } = files;
        let chain = certificates("cert_file", cert_file)?;
        let key = PrivateKeyDer::from_pem_reader(&mut open("key_file", key_file)?)
            .map_err(|wrong| unreadable("key_file", key_file, &wrong, "private key"))?;
        // Named, not the process's default: this must work wherever it is called from.
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions();
        let pair = |source| TlsError::Pair {
            cert_file: cert_file.clone(),
            key_file: key_file.clone(),
            source,
        };
        let builder = builder.map_err(pair)?;
        let builder = match client_ca_file {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let roots = Arc::new(authorities(path)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
                let why = |wrong: VerifierBuilderError| file_error("client_ca_file", path, &wrong);
                builder.with_client_cert_verifier(verifier.map_err(why)?)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(pair)?;
        // What a device needs to resume is with the device, however many there are. The keys of it
        // are made anew with everything else here: a certificate that is not trusted any more is not
        // resumed.
        config.ticketer = Ticketer::new().map_err(TlsError::Tickets)?;
        Ok(Self { config: Arc::new(config), identity: *client_identity })
    }
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("client_ca_file", path)? {
        roots.add(certificate).map_err(|wrong| file_error("client_ca_file", path, &wrong))?;
    }
    Ok(roots)
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let mut file = open(key, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_reader_iter(&mut file).collect();
    let found = found.map_err(|wrong| unreadable(key, path, &wrong, "certificate"))?;
    if found.is_empty() {
        return Err(unreadable(key, path, &pem::Error::NoItemsFound, "certificate"));
    }
    Ok(found)
}

/// Opens a file for reading, with the system's word when it cannot.
fn open(key: &'static str, path: &Path) -> Result<io::BufReader<std::fs::File>, TlsError> {
    let mut file = std::fs::File::open(path).map(io::BufReader::new);
    // A folder opens as a file does, and fails at the first read.
    if let Ok(opened) = &mut file
        && let Err(error) = opened.fill_buf()
    {
        file = Err(error);
    }
    file.map_err(|error| file_error(key, path, &format!("cannot be read: {error}")))
}

fn unreadable(key: &'static str, path: &Path, wrong: &pem::Error, what: &str) -> TlsError {
    let why = match wrong {
        pem::Error::NoItemsFound => {
            format!("holds no {what}; it must be a PEM file, with -----BEGIN lines")
        }
        wrong => format!("is no PEM file: {wrong}"),
    };
    file_error(key, path, &why)
}

fn file_error(key: &'static str, path: &Path, why: &dyn Display) -> TlsError {
    TlsError::File { key, path: path.to_owned(), why: why.to_string() }
}

/// The user name in a client's certificate; `None` if it has none, or more than one common name.
pub fn user_of(certificate: &CertificateDer<'_>, identity: ClientIdentity) -> Option<ByteString> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let name = match identity {
        ClientIdentity::None => None,
        ClientIdentity::CommonName => {
            let mut names = certificate.subject().iter_common_name();
            let name = names.next()?.as_str().ok()?;
            names.next().is_none().then_some(name)
        }
        ClientIdentity::AltName => {
            let names = &certificate.subject_alternative_name().ok()??.value.general_names;
            names.iter().find_map(|name| match name {
                GeneralName::DNSName(name)
                | GeneralName::URI(name)
                | GeneralName::RFC822Name(name) => Some(*name),
                _ => None,
            })
        }
    };
    name.filter(|name| !name.is_empty()).map(ByteString::from)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, Issuer, KeyPair, SanType};

    use super::*;

    fn certificate(params: &CertificateParams) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    fn der(params: &CertificateParams) -> CertificateDer<'static> {
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    fn files(dir: &Path) -> TlsConfig {
        TlsConfig {
            cert_file: dir.join("cert.pem"),
            key_file: dir.join("key.pem"),
            client_ca_file: None,
            client_identity: ClientIdentity::CommonName,
        }
    }

    #[test]
    fn a_name_is_taken_from_where_the_configuration_says() {
        let mut params = CertificateParams::new(vec!["dev-7.plant".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::OrganizationName, "Plant");
        params.distinguished_name.push(DnType::CommonName, "dev-7");
        let both = der(&params);
        assert_eq!(user_of(&both, ClientIdentity::CommonName).as_deref(), Some("dev-7"));
        assert_eq!(user_of(&both, ClientIdentity::AltName).as_deref(), Some("dev-7.plant"));
        assert_eq!(user_of(&both, ClientIdentity::None), None);

        let mut nameless = CertificateParams::new(Vec::new()).unwrap();
        nameless.distinguished_name = rcgen::DistinguishedName::new();
        nameless.subject_alt_names = vec![
            SanType::IpAddress([127, 0, 0, 1].into()),
            SanType::URI("spiffe://plant/dev-7".try_into().unwrap()),
        ];
        let nameless = der(&nameless);
        assert_eq!(user_of(&nameless, ClientIdentity::CommonName), None);
        let uri = user_of(&nameless, ClientIdentity::AltName);
        assert_eq!(uri.as_deref(), Some("spiffe://plant/dev-7"));
        let no_certificate = CertificateDer::from(b"not DER".to_vec());
        assert_eq!(user_of(&no_certificate, ClientIdentity::CommonName), None);
    }

    #[test]
    fn files_that_do_not_fit_are_named_and_leave_the_old_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let config = files(dir.path());
        let missing = Tls::load(&config).unwrap_err().to_string();
        assert!(missing.contains("listener.tls.cert_file: "), "{missing}");
        assert!(missing.contains("cert.pem: cannot be read: No such file"), "{missing}");

        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let (cert, key) = certificate(&params);
        std::fs::write(&config.cert_file, &cert).unwrap();
        std::fs::write(&config.key_file, "nothing").unwrap();
        let keyless = Tls::load(&config).unwrap_err().to_string();
        assert!(keyless.contains("key_file") && keyless.contains("no private key"), "{keyless}");
        std::fs::write(&config.key_file, &key).unwrap();
        let tls = Tls::load(&config).unwrap();

        let before = tls.current.read().unwrap().config.clone();
        let (_, other_key) = certificate(&params);
        std::fs::write(&config.key_file, &other_key).unwrap();
        let wrong = tls.reload(&config).unwrap_err();
        assert!(matches!(wrong, TlsError::Pair { .. }), "{wrong}");
        assert!(Arc::ptr_eq(&before, &tls.current.read().unwrap().config));
        std::fs::write(&config.key_file, &key).unwrap();
        tls.reload(&config).unwrap();
        assert!(!Arc::ptr_eq(&before, &tls.current.read().unwrap().config));

        let folder = TlsConfig { client_ca_file: Some(dir.path().to_owned()), ..config.clone() };
        let wrong = tls.reload(&folder).unwrap_err().to_string();
        assert!(wrong.contains("client_ca_file"), "{wrong}");
        // An authority that is a plain certificate is one all the same: it vouches for itself.
        let own = TlsConfig { client_ca_file: Some(config.cert_file.clone()), ..config };
        tls.reload(&own).unwrap();
    }

    #[test]
    fn a_chain_is_taken_whole() {
        let authority_key = KeyPair::generate().unwrap();
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority_pem = authority.self_signed(&authority_key).unwrap().pem();
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let leaf = params.signed_by(&key, &issuer).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = files(dir.path());
        std::fs::write(&config.cert_file, leaf.pem() + &authority_pem).unwrap();
        std::fs::write(&config.key_file, key.serialize_pem()).unwrap();
        assert_eq!(certificates("cert_file", &config.cert_file).unwrap().len(), 2);
        Tls::load(&config).unwrap();
    }
}
