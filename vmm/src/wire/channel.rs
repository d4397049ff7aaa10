//! A message channel between two processes: one JSON document a datagram on a `SOCK_SEQPACKET` socket pair,
//! with file descriptors attached (`SCM_RIGHTS`).
//!
//! Messages are whole or not at all; every received descriptor is close-on-exec and owned at once, so that none leaks on an
//! error path, and none that was not asked for is closed by the receiver's own thread. A peer that ends is
//! [`Incoming::Closed`], no signal (`MSG_NOSIGNAL`).

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr, sendmsg, shutdown, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use umbra_splitter::untrusted::{self, Elsewhere};

/// Longest message in bytes: the register dump of many vCPUs fits in; below the default socket buffer (208 KiB).
pub const MAX_MESSAGE: usize = 128 * 1024;

/// Most descriptors one message carries.
pub const MAX_FDS: usize = 8;

/// Longest time that a sender waits for a peer whose socket buffer is full, in milliseconds. A peer that does not read for that
/// long is stuck.
const SEND_TIMEOUT_MS: u16 = 2_000;

/// Errors of a channel.
#[derive(Debug, Error)]
pub enum Error {
    /// No socket pair.
    #[error("create a socket pair for a control channel")]
    Pair(#[source] Errno),
    /// The message cannot be written as JSON.
    #[error("encode a control message")]
    Encode(#[source] serde_json::Error),
    /// The message is longer than [`MAX_MESSAGE`].
    #[error("a control message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(usize),
    /// The peer's buffer stayed full for as long as the sender would wait.
    #[error("the other end of the control channel does not read")]
    Full,
    /// The peer is gone.
    #[error("the other end of the control channel is closed")]
    Closed,
    /// `sendmsg` failed.
    #[error("send a control message")]
    Send(#[source] Errno),
    /// `recvmsg` failed.
    #[error("receive a control message")]
    Receive(#[source] Errno),
    /// Not a message of the expected kind.
    #[error("decode a control message")]
    Decode(#[source] serde_json::Error),
    /// More descriptors than belong to any message in this direction.
    #[error("a control message came with {sent} file descriptors, of {most} that are allowed")]
    Descriptors {
        /// Descriptors that came with it, at least.
        sent: usize,
        /// Most descriptors that may come.
        most: usize,
    },
}

impl Error {
    /// Whether the peer has broken a rule of the channel.
    pub fn is_fault(&self) -> bool {
        matches!(self, Self::TooLong(_) | Self::Decode(_) | Self::Descriptors { .. })
    }
}

/// What a receive brought.
#[derive(Debug)]
pub enum Incoming<T> {
    /// A message and the descriptors that came with it.
    Message(T, Vec<OwnedFd>),
    /// Nothing waits (only from [`Channel::try_receive`]).
    Empty,
    /// The peer is gone; nothing will come any more.
    Closed,
}

/// One end of a channel. A thread closes it: what lies in it unread is the peer's.
#[derive(Debug)]
pub struct Channel(Elsewhere<OwnedFd>);

impl Channel {
    /// Makes a channel: this end, and the other for the peer, both close-on-exec.
    pub fn pair() -> Result<(Self, OwnedFd), Error> {
        let made = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        made.map(|(ours, theirs)| (Self::from_fd(ours), theirs)).map_err(Error::Pair)
    }

    /// Takes the end that was inherited or received as `fd`.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(Elsewhere::new(fd))
    }

    /// Sends `message` with `fds` attached. Waits a bounded time for a peer with a full buffer.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.send_waiting(message, fds, SEND_TIMEOUT_MS)
    }

    /// Sends `message` with `fds` attached, or fails at once with [`Error::Full`].
    pub fn send_now<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.send_waiting(message, fds, 0)
    }

    fn send_waiting<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>], timeout_ms: u16) -> Result<(), Error> {
        let bytes = serde_json::to_vec(message).map_err(Error::Encode)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(Error::TooLong(bytes.len()));
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            match sendmsg::<UnixAddr>(self.0.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait_writable(timeout_ms)?,
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(Error::Closed),
                Err(errno) => return Err(Error::Send(errno)),
            }
        }
    }

    /// Waits for a message. Never returns [`Incoming::Empty`].
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Incoming<T>, Error> {
        self.receive_with(MsgFlags::empty(), MAX_FDS)
    }

    /// Takes a message if one waits.
    pub fn try_receive<T: DeserializeOwned>(&self) -> Result<Incoming<T>, Error> {
        self.receive_with(MsgFlags::MSG_DONTWAIT, MAX_FDS)
    }

    /// Takes a message if one waits, from a peer that has no descriptors to send: with one it is [`Error::Descriptors`].
    pub fn try_receive_bare<T: DeserializeOwned>(&self) -> Result<Incoming<T>, Error> {
        self.receive_with(MsgFlags::MSG_DONTWAIT, 0)
    }

    fn receive_with<T: DeserializeOwned>(&self, flags: MsgFlags, most: usize) -> Result<Incoming<T>, Error> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut reset = false;
        let got = loop {
            match untrusted::receive(&*self.0, &mut buffer, flags) {
                Ok(got) => break got,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Incoming::Empty),
                // A peer that ended without reading everything; the kernel says so once, before what it had sent.
                Err(Errno::ECONNRESET) if !reset => reset = true,
                Err(Errno::ECONNRESET) => return Ok(Incoming::Closed),
                Err(errno) => return Err(Error::Receive(errno)),
            }
        };
        let sent = got.descriptors.count();
        if sent > most {
            return Err(Error::Descriptors { sent, most });
        }
        if got.truncated {
            return Err(Error::TooLong(got.length));
        }
        // Messages are never empty, so nothing is the end.
        if got.length == 0 {
            return Ok(Incoming::Closed);
        }
        let message = serde_json::from_slice(&buffer[..got.length]).map_err(Error::Decode)?;
        Ok(Incoming::Message(message, got.descriptors.take()))
    }

    fn wait_writable(&self, timeout_ms: u16) -> Result<(), Error> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, PollTimeout::from(timeout_ms)) {
            Ok(0) => Err(Error::Full),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(Error::Send(errno)),
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // At once; it is closed a moment later. Fails only if the peer was faster.
        let _ = shutdown(self.as_raw_fd(), Shutdown::Both);
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use umbra_shadow::DeviceId;

    use crate::wire::messages::ToVm;

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::from_fd(theirs);
        let (mut near, far) = UnixStream::pair().unwrap();
        ours.send(&ToVm::Quarantine { device: DeviceId::net(7) }, &[far.as_fd()]).unwrap();
        drop(far);

        let Incoming::Message(ToVm::Quarantine { device: DeviceId { index: 7, .. } }, mut fds) =
            theirs.receive::<ToVm>().unwrap()
        else {
            panic!("another message");
        };
        let mut far = UnixStream::from(fds.pop().unwrap());
        assert!(fds.is_empty());
        near.write_all(b"x").unwrap();
        let mut byte = [0];
        far.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn messages_keep_their_bounds() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::from_fd(theirs);
        ours.send(&1u32, &[]).unwrap();
        ours.send(&"x".repeat(100_000), &[]).unwrap();
        assert!(matches!(theirs.try_receive::<u32>().unwrap(), Incoming::Message(1, _)));
        assert!(matches!(theirs.try_receive::<String>().unwrap(), Incoming::Message(s, _) if s.len() == 100_000));
        assert!(matches!(theirs.try_receive::<String>().unwrap(), Incoming::Empty));
    }

    #[test]
    fn too_long_a_message_is_refused() {
        let (ours, _theirs) = Channel::pair().unwrap();
        assert!(matches!(ours.send(&"x".repeat(MAX_MESSAGE), &[]), Err(Error::TooLong(_))));
    }

    #[test]
    fn the_end_of_the_peer_is_seen_by_both_directions() {
        let (ours, theirs) = Channel::pair().unwrap();
        drop(theirs);
        assert!(matches!(ours.receive::<u32>().unwrap(), Incoming::Closed));
        assert!(matches!(ours.send(&1u32, &[]), Err(Error::Closed)));
    }

    #[test]
    fn the_last_words_of_a_peer_that_did_not_listen_are_heard() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::from_fd(theirs);
        ours.send(&1u32, &[]).unwrap();
        theirs.send(&2u32, &[]).unwrap();
        drop(theirs);
        assert!(matches!(ours.try_receive::<u32>().unwrap(), Incoming::Message(2, _)));
        assert!(matches!(ours.try_receive::<u32>().unwrap(), Incoming::Closed));
    }

    #[test]
    fn a_message_of_another_kind_is_an_error() {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.send(&"no number", &[]).unwrap();
        assert!(matches!(Channel::from_fd(theirs).receive::<u32>(), Err(Error::Decode(_))));
    }

    /// Sends 1 with `count` descriptors of the end of a pipe for writing; returns the other end.
    fn send_pipe(channel: &Channel, count: usize) -> OwnedFd {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        channel.send(&1u32, &vec![writer.as_fd(); count]).unwrap();
        reader
    }

    /// Waits until nobody has the end for writing any more.
    fn wait_closed(reader: &OwnedFd) {
        let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 20_000_u16).unwrap(), 1, "a descriptor has leaked");
    }

    #[test]
    fn descriptors_that_belong_to_no_message_are_a_fault_and_none_leaks() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::from_fd(theirs);
        for count in [MAX_FDS + 1, 253] {
            let reader = send_pipe(&theirs, count);
            let error = ours.try_receive::<u32>().unwrap_err();
            assert!(matches!(error, Error::Descriptors { sent, most: MAX_FDS } if sent == count), "{error}");
            wait_closed(&reader);
        }
        let reader = send_pipe(&theirs, 1);
        let error = ours.try_receive_bare::<u32>().unwrap_err();
        assert!(error.is_fault() && error.to_string().contains("1 file descriptors, of 0"), "{error}");
        wait_closed(&reader);
        ours.send(&1u32, &[]).unwrap();
        assert!(matches!(theirs.try_receive_bare::<u32>().unwrap(), Incoming::Message(1, fds) if fds.is_empty()));
    }

    #[test]
    fn descriptors_of_what_is_no_message_are_closed() {
        let (ours, theirs) = Channel::pair().unwrap();
        let reader = send_pipe(&Channel::from_fd(theirs), 1);
        assert!(matches!(ours.try_receive::<String>(), Err(Error::Decode(_))));
        wait_closed(&reader);
    }

    #[test]
    fn a_descriptor_whose_close_blocks_holds_up_nobody() {
        const LINGER_S: i32 = 60;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (deaf, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[0; 65536]).is_ok() {}
        let linger = libc::linger { l_onoff: 1, l_linger: LINGER_S };
        nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger).unwrap();
        let (ours, theirs) = Channel::pair().unwrap();
        Channel::from_fd(theirs).send(&1u32, &[stream.as_fd()]).unwrap();
        // Not the last of its descriptors: one is on its way.
        drop(stream);
        let start = std::time::Instant::now();
        assert!(matches!(ours.try_receive_bare::<u32>(), Err(Error::Descriptors { .. })));
        assert!(start.elapsed().as_secs() < 40, "it was closed by this thread");
        drop(deaf);
    }
}
