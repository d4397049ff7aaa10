//! Advisory locks of whole files that belong to the open file, not to the process (fcntl(2), open file description locks).

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};

/// Locks `file`, for all who read it or for one who writes to it.
///
/// # Errors
/// `EAGAIN` or `EACCES` where somebody else's lock is in the way.
pub fn lock(file: &File, shared: bool) -> io::Result<()> {
    // The kernel's own definitions are shorts; the values fit. Start, length and whence 0: all of it.
    let l_type = i16::try_from(if shared { libc::F_RDLCK } else { libc::F_WRLCK }).unwrap_or_default();
    let all = libc::flock { l_type, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_SETLK(&all)).map(drop).map_err(io::Error::from)
}
