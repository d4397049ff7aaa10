//! Unix sockets whose other end is not trusted: a process of a guest or driver VM that may have been taken over, or any client.
//!
//! Such a peer can send file descriptors, whether they are asked for or not, and to close the last descriptor of a file may take
//! for ever: FUSE asks the file system's process first, NFS its server, and a TCP socket may linger. Invariants: the process owns
//! every descriptor that the kernel has installed in it, also where the kernel says that there were more (`MSG_CTRUNC`), so that
//! none leaks; and no thread but one made for it closes any of them. That holds for those which nobody takes, for those
//! which a read without room for them would have dropped ([`Stream`]), and for those which still lie unread in a
//! socket when that is closed ([`Elsewhere`]).

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem::{ManuallyDrop, MaybeUninit, size_of};
use std::net::Shutdown;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::ptr;

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

use crate::threads::{self, Purpose};

/// Most descriptors that the kernel lets a message have (`SCM_MAX_FD`, `include/net/scm.h`).
const SCM_MAX_FD: usize = 253;

/// Room for them behind their header, in units that are aligned as a header has to be.
const CONTROL: usize = (size_of::<libc::cmsghdr>() + SCM_MAX_FD * size_of::<RawFd>()).div_ceil(size_of::<usize>());

/// What was received.
#[derive(Debug)]
pub struct Datagram {
    /// Bytes of it in the buffer.
    pub length: usize,
    /// The buffer was too short for it.
    pub truncated: bool,
    /// What came with it.
    pub descriptors: Descriptors,
}

/// Received descriptors. Those that are not taken are closed by a thread, when this is dropped.
#[derive(Debug, Default)]
pub struct Descriptors {
    fds: Vec<OwnedFd>,
    /// There were more, for which this process has no room.
    more: bool,
}

impl Descriptors {
    /// How many were sent, at least.
    pub fn count(&self) -> usize {
        self.fds.len() + usize::from(self.more)
    }

    /// Takes those that are there.
    pub fn take(mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        if !self.fds.is_empty() {
            drop(Elsewhere::new(std::mem::take(&mut self.fds)));
        }
    }
}

/// Something that a thread of its own drops, because it is a socket with an untrusted peer, or came through one.
#[derive(Debug)]
pub struct Elsewhere<T: Send + 'static>(ManuallyDrop<T>);

impl<T: Send + 'static> Elsewhere<T> {
    /// From now on `what` is dropped elsewhere.
    pub fn new(what: T) -> Self {
        Self(ManuallyDrop::new(what))
    }
}

impl<T: Send + 'static> Deref for Elsewhere<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Send + 'static> DerefMut for Elsewhere<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: Send + 'static> Drop for Elsewhere<T> {
    fn drop(&mut self) {
        // SAFETY: `self` is not used any more.
        let what = ManuallyDrop::new(unsafe { ManuallyDrop::take(&mut self.0) });
        // Without a thread for it it stays open, which is better than to stand still: a closure that is not run drops nothing.
        let close = move || drop(ManuallyDrop::into_inner(what));
        if let Err(error) = threads::spawn(Purpose::Brief, "close", close) {
            tracing::warn!(%error, "a socket, or what came through it, stays open");
        }
    }
}

/// A non-blocking stream that carries bytes alone: with a descriptor it is at its end, by an error. Its peer sees the end of it when
/// it is dropped.
#[derive(Debug)]
pub struct Stream(Elsewhere<UnixStream>);

impl Stream {
    /// The stream `socket`, which becomes non-blocking.
    ///
    /// # Errors
    /// When the socket cannot be made so.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        let stream = Self(Elsewhere::new(socket));
        stream.0.set_nonblocking(true)?;
        Ok(stream)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // At once; it is closed a moment later. Fails only if the peer was faster.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = receive(&*self.0, buffer, MsgFlags::empty())?;
        match got.descriptors.count() {
            0 => Ok(got.length),
            count => {
                let what = format!("{count} file descriptors came on a stream that carries none");
                Err(io::Error::new(ErrorKind::InvalidData, what))
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Receives a datagram, or bytes of a stream, into `buffer`.
///
/// # Errors
/// Those of `recvmsg`.
pub fn receive(socket: &impl AsRawFd, buffer: &mut [u8], flags: MsgFlags) -> Result<Datagram, Errno> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc::channel;
    use std::time::{Duration, Instant};

    use nix::sys::socket::{ControlMessage, UnixAddr, sendmsg, setsockopt, sockopt};

    use super::*;

    /// Time that closing the descriptor of [`Lingering`] takes, and a part of it that a call which does not close it stays below on
    /// any machine.
    const LINGER_S: i32 = 60;
    const AT_ONCE: Duration = Duration::from_secs(40);

    /// The peer of a TCP socket whose last close lingers: it reads nothing.
    struct Lingering(#[expect(dead_code, reason = "stays open")] TcpStream);

    /// Sends a byte with the only descriptor of a TCP socket that lingers.
    fn send_lingering(to: &UnixStream) -> Lingering {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (deaf, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[0; 65536]).is_ok() {}
        setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: LINGER_S }).unwrap();
        let raw = [stream.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<UnixAddr>(to.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None).unwrap();
        Lingering(deaf)
    }

    fn pair() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Stream::new(ours).unwrap(), theirs)
    }

    #[test]
    fn a_stream_carries_bytes_and_its_end() {
        let (mut ours, mut theirs) = pair();
        let mut buffer = [0; 8];
        assert_eq!(ours.read(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
        theirs.write_all(b"hello").unwrap();
        assert_eq!((ours.read(&mut buffer).unwrap(), &buffer[..5]), (5, &b"hello"[..]));
        ours.write_all(b"there").unwrap();
        theirs.read_exact(&mut buffer[..5]).unwrap();
        assert_eq!(&buffer[..5], b"there");
        drop(theirs);
        assert_eq!(ours.read(&mut buffer).unwrap(), 0);
        drop(ours);
    }

    #[test]
    fn reading_closes_no_descriptor_that_came_along() {
        let (mut ours, theirs) = pair();
        let _deaf = send_lingering(&theirs);
        let start = Instant::now();
        assert_eq!(ours.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::InvalidData);
        assert!(start.elapsed() < AT_ONCE, "it was closed by this thread");
    }

    #[test]
    fn closing_a_stream_closes_no_descriptor_that_nobody_has_read() {
        let (ours, theirs) = pair();
        let _deaf = send_lingering(&theirs);
        drop(theirs);
        let start = Instant::now();
        drop(ours);
        assert!(start.elapsed() < AT_ONCE, "it was closed by this thread");
    }

    #[test]
    fn what_is_dropped_elsewhere_is_dropped() {
        let (sender, receiver) = channel::<()>();
        drop(Elsewhere::new(sender));
        assert!(receiver.recv().is_err());
    }
}
