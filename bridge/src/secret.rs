//! Reading secrets from where the configuration says they are.
//!
//! Invariant: an error names the place of a secret, never the secret.
//! Deliberately absent: keeping them. Who needs one reads it again after it was refused, so that a
//! rotated secret is picked up without a restart.

use crate::config::{Secret, SecretSource};

/// Reads a secret. Blocks: files are read.
///
/// # Errors
/// Why it cannot be read, in one line that begins with `what`.
pub(crate) fn read(source: &SecretSource, what: &str) -> Result<Secret, String> {
    let (text, place) = match source {
        SecretSource::Inline(secret) => return Ok(secret.clone()),
        SecretSource::File(path) => {
            let place = path.display().to_string();
            let text = std::fs::read_to_string(path)
                .map_err(|error| format!("{what}: cannot read {place}: {error}"))?;
            (text.lines().next().unwrap_or_default().to_owned(), place)
        }
        SecretSource::Env(name) => {
            let place = format!("the environment variable {name}");
            let text = std::env::var(name)
                .map_err(|error| format!("{what}: cannot read {place}: {error}"))?;
            (text, place)
        }
    };
    if text.is_empty() {
        return Err(format!("{what}: {place} is empty"));
    }
    Ok(Secret::new(text))
}
