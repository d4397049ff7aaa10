//! Advisory locks of whole files that belong to the open file, not to the process (fcntl(2), open file description locks).

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};

/// Locks `file`, for all who read it or for one who writes to it.
///
/// # Errors
/// `EAGAIN` or `EACCES` where somebody else's lock is in the way.
pub fn lock(file: &File, shared: bool) -> io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&all(shared))).map(drop).map_err(io::Error::from)
}

/// Whether somebody else has `file` locked for writing. Takes no lock itself: who wants one just now gets it.
pub fn is_locked(file: &File) -> bool {
    let mut in_the_way = all(true);
    let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut in_the_way)).is_ok();
    asked && i32::from(in_the_way.l_type) != libc::F_UNLCK
}

/// A lock of the whole file: start, length and whence are 0.
fn all(shared: bool) -> libc::flock {
    // The kernel's own definitions are shorts; the values fit.
    let l_type = i16::try_from(if shared { libc::F_RDLCK } else { libc::F_WRLCK }).unwrap_or_default();
    libc::flock { l_type, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn asking_for_a_lock_takes_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (asks, takes) = (open(), open());
        assert!(!is_locked(&asks));
        lock(&takes, false).unwrap();
        assert!(is_locked(&asks) && !is_locked(&takes));
        lock(&takes, true).unwrap();
        assert!(!is_locked(&asks), "readers bear each other");
    }
}
