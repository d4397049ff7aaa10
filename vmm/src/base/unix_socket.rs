//! Listening at a path, in the place of a socket that a dead process left there, and of nothing else.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

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
    match UnixStream::connect(path) {
        Ok(_) => Err(ListenError::InUse(path.into())),
        Err(refused) if refused.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(io)?;
            UnixListener::bind(path).map_err(io)
        }
        Err(error) => Err(io(error)),
    }
}

/// Removes the socket at `path` if nobody listens there any more. What cannot be removed stays: [`listen`] replaces it.
pub fn remove_stale(path: &Path) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let refuses = || UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
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
