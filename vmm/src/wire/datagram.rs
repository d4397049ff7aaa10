//! One datagram with the file descriptors that came with it, from a peer that is not trusted.
//!
//! Invariants: the process owns every descriptor that the kernel has installed in it, also where the kernel says that there
//! were more (`MSG_CTRUNC`), so that none leaks; and those that nobody takes are closed by a thread. To close the last
//! descriptor of a file may take for ever: FUSE asks the file system's process first, NFS its server, and a socket may
//! linger.

use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::thread;

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

/// Most descriptors that the kernel lets a message have (`SCM_MAX_FD`, `include/net/scm.h`).
const SCM_MAX_FD: usize = 253;

/// Room for them behind their header, in units that are aligned as a header has to be.
const CONTROL: usize = (size_of::<libc::cmsghdr>() + SCM_MAX_FD * size_of::<RawFd>()).div_ceil(size_of::<usize>());

/// What was received.
#[derive(Debug)]
pub(super) struct Datagram {
    /// Bytes of it in the buffer.
    pub(super) length: usize,
    /// The buffer was too short for it.
    pub(super) truncated: bool,
    /// What came with it.
    pub(super) descriptors: Descriptors,
}

/// Received descriptors. Those that are not taken are closed by a thread, when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Descriptors {
    fds: Vec<OwnedFd>,
    /// There were more, for which this process has no room.
    more: bool,
}

impl Descriptors {
    /// How many were sent, at least.
    pub(super) fn count(&self) -> usize {
        self.fds.len() + usize::from(self.more)
    }

    /// Takes those that are there.
    pub(super) fn take(mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        if self.fds.is_empty() {
            return;
        }
        let raw: Vec<RawFd> = self.fds.drain(..).map(std::os::fd::IntoRawFd::into_raw_fd).collect();
        // SAFETY: they were owned until the line before, and the closure is all that knows their numbers. If there is no
        // thread for it they stay open, which is better than to stand still.
        let close = move || raw.into_iter().for_each(|fd| drop(unsafe { OwnedFd::from_raw_fd(fd) }));
        if let Err(error) = thread::Builder::new().name("close".into()).spawn(close) {
            tracing::warn!(%error, "descriptors that were received stay open");
        }
    }
}

/// Receives a datagram into `buffer`.
pub(super) fn receive(socket: &OwnedFd, buffer: &mut [u8], flags: MsgFlags) -> Result<Datagram, Errno> {
    let mut control = [0_usize; CONTROL];
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a msghdr of zeros is one without anything.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = ptr::from_mut(&mut iov);
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    let flags = (flags | MsgFlags::MSG_CMSG_CLOEXEC).bits();
    // SAFETY: the header's pointers are to `iov` and `control`, and that of `iov` to `buffer`, with their lengths.
    let length = Errno::result(unsafe { libc::recvmsg(socket.as_raw_fd(), ptr::from_mut(&mut header), flags) })?;
    let descriptors = Descriptors { fds: installed(&header), more: header.msg_flags & libc::MSG_CTRUNC != 0 };
    let truncated = header.msg_flags & libc::MSG_TRUNC != 0;
    Ok(Datagram { length: usize::try_from(length).unwrap_or_default(), truncated, descriptors })
}

/// The descriptors that the kernel has installed with a message whose `header` it has filled in.
fn installed(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel has just filled in the header and its control buffer, which lives on in the caller, and the macros
    // stay within `msg_controllen`. Each number is that of a descriptor which it has made for this message alone.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(ptr::from_ref(header));
        while let Some(part) = message.as_ref() {
            if part.cmsg_level == libc::SOL_SOCKET && part.cmsg_type == libc::SCM_RIGHTS {
                let bytes = part.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                let data: *const RawFd = libc::CMSG_DATA(message).cast();
                fds.extend((0..bytes / size_of::<RawFd>()).map(|n| OwnedFd::from_raw_fd(data.add(n).read_unaligned())));
            }
            message = libc::CMSG_NXTHDR(ptr::from_ref(header), message);
        }
    }
    fds
}
