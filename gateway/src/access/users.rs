//! The users file: `NAME:HASH` a line, hashes of argon2id in the PHC format.
//!
//! Owns: reading and writing it, and checking a password. Lines that begin with `#` are comments and
//! stay.
//! Invariant: a file that was read holds no hash that costs more than [`MEMORY_KIB_MAX`] and
//! [`PASSES_MAX`] to check; one that is written is whole or the old one, and readable by its owner
//! alone.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, Version};
use argon2::{PasswordHasher as _, PasswordVerifier as _};

/// What a hash costs that is made here: OWASP's choice for argon2id with 12 MiB, which a Raspberry Pi
/// has to spare.
const MEMORY_KIB: u32 = 12 * 1024;
const PASSES: u32 = 3;

/// Memory that checking one password may take, in KiB.
pub const MEMORY_KIB_MAX: u32 = 64 * 1024;

/// Passes over it, at most.
pub const PASSES_MAX: u32 = 16;

/// Longest password that is looked at, in bytes.
pub const PASSWORD_BYTES_MAX: usize = 1024;

/// Longest user name, in bytes.
pub const NAME_BYTES_MAX: usize = 256;

/// Why a users file cannot be used or changed.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// It cannot be read.
    #[error("cannot read the users file {}: {source}; edge-gateway passwd makes one", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line is wrong.
    #[error("{}:{line}: {why}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// It cannot be written; what was there is still there.
    #[error("cannot write the users file {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The password cannot be hashed.
    #[error("cannot hash the password: {0}")]
    Hash(argon2::password_hash::Error),
}

/// Users with their hashes.
#[derive(Debug, Default)]
pub struct Users {
    hashes: HashMap<String, String>,
}

impl Users {
    /// Reads a file.
    ///
    /// # Errors
    /// See [`UsersError`].
    pub fn read(path: &Path) -> Result<Self, UsersError> {
        let read_error = |source| UsersError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(read_error)?;
        let mut hashes = HashMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            let wrong = |why: String| UsersError::Line { path: path.to_owned(), line: number, why };
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            // A hash has no colon, so that a name may.
            let (name, hash) = line.trim_end().rsplit_once(':').ok_or_else(|| {
                wrong("must be NAME:HASH, as edge-gateway passwd writes it".to_owned())
            })?;
            if let Some(why) = wrong_name(name).or_else(|| wrong_hash(hash)) {
                return Err(wrong(why));
            }
            if hashes.insert(name.to_owned(), hash.to_owned()).is_some() {
                return Err(wrong(format!("{name:?} is in the file twice; keep one")));
            }
        }
        Ok(Self { hashes })
    }

    /// A user's hash, as it stands in the file.
    pub fn hash_of(&self, name: &str) -> Option<&str> {
        self.hashes.get(name).map(String::as_str)
    }
}

/// Whether the password is that of the hash. Takes tens of milliseconds and up to
/// [`MEMORY_KIB_MAX`]: not for async threads. Without a hash it takes as long and says no, so that
/// the time does not tell who is a user.
pub fn is_password(hash: Option<&str>, password: &[u8]) -> bool {
    match hash.map(PasswordHash::new) {
        Some(Ok(hash)) => Argon2::default().verify_password(password, &hash).is_ok(),
        _ => {
            let decoy = hasher().hash_password_with_salt(password, b"no user of ours.");
            std::hint::black_box(decoy.is_ok());
            false
        }
    }
}

/// Hashes a password with a random salt. Takes as long as checking it.
///
/// # Errors
/// [`UsersError::Hash`]: no randomness, no memory.
pub fn hash(password: &[u8]) -> Result<String, UsersError> {
    let hash = hasher().hash_password(password).map_err(UsersError::Hash)?;
    Ok(hash.to_string())
}

fn hasher() -> Argon2<'static> {
    let params = Params::new(MEMORY_KIB, PASSES, 1, None).expect("they are in range");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// Sets a user's hash in the file, which is made if there is none; `None` removes the user. `false`
/// if there was nobody to remove.
///
/// # Errors
/// See [`UsersError`]; then the file is as it was.
pub fn set(path: &Path, name: &str, hash: Option<&str>) -> Result<bool, UsersError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(source) => return Err(UsersError::Read { path: path.to_owned(), source }),
    };
    let mut found = false;
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let is_user =
            !line.starts_with('#') && line.rsplit_once(':').is_some_and(|(n, _)| n == name);
        found |= is_user;
        if !is_user {
            lines.push(line.to_owned());
        }
    }
    lines.extend(hash.map(|hash| format!("{name}:{hash}")));
    if hash.is_none() && !found {
        return Ok(false);
    }
    let text: String = lines.into_iter().map(|line| line + "\n").collect();
    replace(path, &text).map_err(|source| UsersError::Write { path: path.to_owned(), source })?;
    Ok(true)
}

/// Puts a whole file in the place of the old one, for its owner's eyes only.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = folder.join(name);
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        // Root may change what the gateway's own user must be able to read.
        if let Ok(old) = std::fs::metadata(path) {
            std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid()))?;
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(folder)?.sync_all()
    };
    write().inspect_err(|_| {
        std::fs::remove_file(&new).ok();
    })
}

/// Why this cannot be a user's name in the file; `None` if it can.
pub fn wrong_name(name: &str) -> Option<String> {
    let wrong = name.is_empty()
        || name.len() > NAME_BYTES_MAX
        || name.starts_with('#')
        || name != name.trim()
        || name.contains(char::is_control);
    wrong.then(|| {
        format!(
            "a user name has 1 to {NAME_BYTES_MAX} bytes, no '#' in front, no blanks around it and \
             no control characters; not {name:?}"
        )
    })
}

fn wrong_hash(text: &str) -> Option<String> {
    let Ok(hash) = PasswordHash::new(text) else {
        return Some("holds no hash; edge-gateway passwd writes one".to_owned());
    };
    let params = Params::try_from(&hash);
    let argon2id =
        hash.algorithm.as_str() == "argon2id" && hash.salt.is_some() && hash.hash.is_some();
    match params {
        Ok(params) if argon2id => {
            (params.m_cost() > MEMORY_KIB_MAX || params.t_cost() > PASSES_MAX).then(|| {
                format!(
                    "its hash takes more than {MEMORY_KIB_MAX} KiB or {PASSES_MAX} passes to check; \
                     set the password again with edge-gateway passwd"
                )
            })
        }
        _ => Some("its hash is not argon2id; set the password again with edge-gateway passwd".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A hash of "secret" that costs little.
    fn cheap() -> String {
        let params = Params::new(8, 1, 1, None).unwrap();
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        argon2.hash_password_with_salt(b"secret", b"some salt bytes.").unwrap().to_string()
    }

    #[test]
    fn a_password_is_known_by_its_hash_alone() {
        let hash = hash(b"secret").unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=12288,t=3,p=1$"), "{hash}");
        assert!(is_password(Some(&hash), b"secret") && !is_password(Some(&hash), b"Secret"));
        assert!(!is_password(None, b"secret"));
        assert!(is_password(Some(&cheap()), b"secret"));
    }

    #[test]
    fn users_come_and_go_and_the_rest_of_the_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users");
        assert!(matches!(Users::read(&path), Err(UsersError::Read { .. })));
        assert!(set(&path, "urn:dev:7", Some(&cheap())).unwrap());
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.insert_str(0, "# the plant's own\n\n");
        std::fs::write(&path, &text).unwrap();
        assert!(set(&path, "alice", Some(&cheap())).unwrap());
        let users = Users::read(&path).unwrap();
        assert_eq!(users.hash_of("urn:dev:7"), Some(&*cheap()));
        assert!(users.hash_of("alice").is_some() && users.hash_of("bob").is_none());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        let other = hash(b"other").unwrap();
        set(&path, "alice", Some(&other)).unwrap();
        assert_eq!(Users::read(&path).unwrap().hash_of("alice"), Some(&*other));
        assert!(set(&path, "alice", None).unwrap() && !set(&path, "alice", None).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
        let nowhere = dir.path().join("none/users");
        assert!(matches!(set(&nowhere, "a", Some("h")), Err(UsersError::Write { .. })));
    }

    #[test]
    fn a_wrong_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users");
        let cheap = cheap();
        let dear = cheap.replace("m=8,t=1", "m=1048576,t=1");
        let argon2d = cheap.replace("argon2id", "argon2d");
        for (line, why) in [
            ("alice", "NAME:HASH"),
            ("alice:secret", "no hash"),
            (&*format!("alice:{dear}"), "65536 KiB"),
            (&format!("alice:{argon2d}"), "not argon2id"),
            (&format!(":{cheap}"), "a user name has"),
            (&format!("first:{cheap}"), "twice"),
        ] {
            std::fs::write(&path, format!("# users\nfirst:{cheap}\n{line}\n")).unwrap();
            let error = Users::read(&path).unwrap_err().to_string();
            assert!(error.contains("users:3: ") && error.contains(why), "{line}: {error}");
            assert!(!error.contains("$argon2"), "a hash is not for a log: {error}");
        }
    }
}
