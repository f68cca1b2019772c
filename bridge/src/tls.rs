//! TLS towards an upstream that is not HTTP.
//!
//! Owns: making a rustls configuration of the files in [`TlsConfig`]. Trusted are the system's
//! authorities, or those of `ca_file`. The provider is the process's default, which the binary installs.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::config::{TlsConfig, TlsIdentity};

/// Reads the files and makes the configuration. Blocks.
///
/// # Errors
/// What stands in the way, and the remedy.
pub(crate) fn client(config: &TlsConfig) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    match &config.ca_file {
        Some(path) => {
            for certificate in certificates("tls.ca_file", path)? {
                roots.add(certificate).map_err(|error| {
                    format!("tls.ca_file: {} holds what is no authority: {error}", path.display())
                })?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(
                    "this system has no authorities to trust; install ca-certificates, or set \
                     tls.ca_file"
                        .to_owned(),
                );
            }
        }
    }
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let client = match &config.identity {
        None => builder.with_no_client_auth(),
        Some(TlsIdentity { cert_file, key_file }) => {
            let chain = certificates("tls.cert_file", cert_file)?;
            let key = PrivateKeyDer::from_pem_file(key_file)
                .map_err(|error| format!("tls.key_file: {}: {error}", key_file.display()))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| {
                let (cert, key) = (cert_file.display(), key_file.display());
                format!("tls: {cert} and {key} do not belong together: {error}")
            })?
        }
    };
    Ok(Arc::new(client))
}

fn certificates(key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path);
    match read.and_then(Iterator::collect::<Result<Vec<_>, _>>) {
        Ok(certificates) if certificates.is_empty() => {
            Err(format!("{key}: {} holds no certificate", path.display()))
        }
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(format!("{key}: {}: {error}", path.display())),
    }
}
