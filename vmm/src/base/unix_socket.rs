//! Listening at a path, in the place of a socket that a dead process left there, and of nothing else.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use thiserror::Error;

/// Why nobody listens at a path.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Something of the user's is there, which is left alone.
    #[error("{} exists and is no socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// Somebody listens there.
    #[error("another process listens at {}; stop it or choose another path", .0.display())]
    InUse(PathBuf),
    /// Another failure.
    #[error("listen at {}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Listens at `path`.
///
/// # Errors
/// When the path is taken, or cannot be had.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let io = |source| ListenError::Io { path: path.into(), source };
    match UnixListener::bind(path) {
        Err(taken) if taken.kind() == ErrorKind::AddrInUse => {}
        bound => return bound.map_err(io),
    }
    if !fs::symlink_metadata(path).map_err(io)?.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.into()));
    }
    match find_listener(path) {
        Ok(()) => Err(ListenError::InUse(path.into())),
        Err(refused) if refused.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(io)?;
            UnixListener::bind(path).map_err(io)
        }
        Err(error) => Err(io(error)),
    }
}

/// Looks for somebody who listens at `path`, without waiting until that one takes a connection.
fn find_listener(path: &Path) -> io::Result<()> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?;
    match connect(socket.as_raw_fd(), &UnixAddr::new(path)?) {
        // So many wait there already that it would have to be waited for a place.
        Ok(()) | Err(Errno::EAGAIN) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Removes the socket at `path` if nobody listens there any more. What cannot be removed stays: [`listen`] replaces it.
pub fn remove_stale(path: &Path) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let refuses = || find_listener(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    if is_socket && refuses() {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_removed_once_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let (path, file) = (dir.path().join("s"), dir.path().join("f"));
        let listener = listen(&path).unwrap();
        remove_stale(&path);
        assert!(path.exists(), "somebody listens");
        drop(listener);
        fs::write(&file, "my data").unwrap();
        for path in [&path, &file, &dir.path().join("none")] {
            remove_stale(path);
        }
        assert!(!path.exists() && file.exists());
    }

    #[test]
    fn a_socket_of_the_dead_is_replaced_and_one_of_the_living_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let living = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(ListenError::InUse(_))));
        drop(living);
        listen(&path).unwrap();
    }

    #[test]
    fn a_listener_that_takes_nobody_is_there_and_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("busy");
        let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        nix::sys::socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
        let waits = || {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
            connect(client.as_raw_fd(), &UnixAddr::new(&path).unwrap()).map(|()| client)
        };
        let clients: Vec<_> = std::iter::from_fn(|| waits().ok()).collect();
        assert!(!clients.is_empty() && waits().is_err());
        assert!(matches!(listen(&path), Err(ListenError::InUse(_))));
        remove_stale(&path);
        assert!(path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("diary");
        fs::write(&path, "my data").unwrap();
        let error = listen(&path).unwrap_err().to_string();
        assert!(error.ends_with("diary exists and is no socket; remove it or choose another path"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "my data");
        let missing = dir.path().join("no/such/folder");
        assert!(matches!(listen(&missing), Err(ListenError::Io { .. })));
    }
}
