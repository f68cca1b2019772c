//! The sockets that a listener accepts from: TCP, and Unix sockets with their file.
//!
//! Invariant: a file that is no socket is never removed, and neither is a socket that somebody
//! listens on; what this gateway leaves behind when it is killed is no obstacle to the next start.

use std::fs::Permissions;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};

use crate::config::Bind;

/// Connections that the system keeps until they are accepted, if its own limit allows: a fleet that
/// comes back at once should not have to knock twice, which takes a second each time.
const BACKLOG: u32 = 4096;

/// A bound socket.
#[derive(Debug)]
pub(super) enum Socket {
    /// On an address.
    Tcp(TcpListener),
    /// On a file.
    Unix(UnixListener, SocketFile),
}

/// An accepted connection.
#[derive(Debug)]
pub(super) enum Accepted {
    /// Over TCP, from this address.
    Tcp(TcpStream, SocketAddr),
    /// Over a Unix socket.
    Unix(UnixStream),
}

impl Socket {
    /// Binds. `unix_mode` are the permissions of a Unix socket's file: whoever may write to it may
    /// connect.
    ///
    /// # Errors
    /// What the system says: the address is in use, or not ours; the file is something else.
    pub(super) async fn bind(bind: &Bind, unix_mode: u32) -> io::Result<Self> {
        match bind {
            Bind::Tcp(address) => {
                let socket =
                    if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
                // What a gateway before this one has left is no obstacle.
                socket.set_reuseaddr(true)?;
                socket.bind(*address)?;
                Ok(Self::Tcp(socket.listen(BACKLOG)?))
            }
            Bind::Unix(path) => {
                remove_stale(path).await?;
                let listener = UnixListener::bind(path)?;
                let file = SocketFile::of(path)?;
                std::fs::set_permissions(path, Permissions::from_mode(unix_mode))?;
                Ok(Self::Unix(listener, file))
            }
        }
    }

    /// Where it is bound, with the port that the system gave.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn bound(&self) -> io::Result<Bind> {
        Ok(match self {
            Self::Tcp(listener) => Bind::Tcp(listener.local_addr()?),
            Self::Unix(_, file) => Bind::Unix(file.path.clone()),
        })
    }

    /// The next connection. Cancel safe.
    ///
    /// # Errors
    /// What the system says; worth another try after a rest.
    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                listener.accept().await.map(|(stream, peer)| Accepted::Tcp(stream, peer))
            }
            Self::Unix(listener, _) => {
                listener.accept().await.map(|(stream, _)| Accepted::Unix(stream))
            }
        }
    }
}

impl Accepted {
    /// Where it comes from, for the log.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Tcp(_, peer) => peer.to_string(),
            Self::Unix(_) => "unix".to_owned(),
        }
    }

    /// The address that it comes from, if it has one.
    pub(super) fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(_, peer) => Some(peer.ip()),
            Self::Unix(_) => None,
        }
    }
}

/// Removes what a process that was killed has left: a socket that nobody listens on.
async fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"))
        }
        Ok(_) => match UnixStream::connect(path).await {
            Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)
            }
            Err(error) => Err(error),
        },
    }
}

/// The file of a Unix socket, removed at the end unless it is another one's by then.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            std::fs::remove_file(&self.path).ok();
        }
    }
}

/// Device and inode.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_living_one_or_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mqtt.sock");
        let bind = Bind::Unix(path.clone());
        // What a killed process leaves: std removes nothing.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = Socket::bind(&bind, 0o600).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(socket.bound().unwrap(), bind);

        let error = Socket::bind(&bind, 0o600).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(socket);
        assert!(!path.exists(), "it cleans up behind itself");

        std::fs::write(&path, "mine").unwrap();
        let error = Socket::bind(&bind, 0o600).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }

    #[tokio::test]
    async fn the_end_of_one_leaves_the_socket_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mqtt.sock");
        let old = Socket::bind(&Bind::Unix(path.clone()), 0o600).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        let _new = Socket::bind(&Bind::Unix(path.clone()), 0o600).await.unwrap();
        drop(old);
        assert!(path.exists());
    }
}
