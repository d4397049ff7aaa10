//! Descriptors that are the first to be closed when the process is killed.
//!
//! Linux closes the files of a process that ends from the highest number to the lowest (`task_work_run` takes the last
//! one that was added first). Those of KVM take their time, and `vfio-pci` resets a device that nobody else holds when it is
//! closed, which takes 100 ms and more. What others notice the death by has to go before that. Where a kernel does it
//! otherwise nothing is lost but that time.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, fcntl};

/// Lowest number of the duplicate: above all descriptors that a VM's process opens, below the usual limit of 1024.
const HIGH: i32 = 900;

/// Another descriptor for the same file, which is closed early; an ordinary one where the limit is too low.
pub(crate) fn high_duplicate(file: impl AsFd) -> std::io::Result<OwnedFd> {
    let file = file.as_fd();
    let high = fcntl(file, FcntlArg::F_DUPFD_CLOEXEC(HIGH));
    let raw = high.or_else(|_| fcntl(file, FcntlArg::F_DUPFD_CLOEXEC(3)))?;
    // SAFETY: the kernel has just made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_twin_is_high_and_the_same_file() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let high = high_duplicate(&theirs).unwrap();
        assert!(high.as_raw_fd() >= HIGH);
        drop(theirs);
        nix::unistd::write(&high, b"x").unwrap();
        drop(high);
        let mut got = Vec::new();
        ours.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"x");
    }
}
