//! Route netlink (RFC 3549, rtnetlink(7)): one request at a time with its acknowledgement, and a second kind of socket
//! for notifications of link changes. Messages are built and read as bytes; lengths in what comes back are checked.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use umbra_driver_vm::calls::Calls;

const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// Top bits of an attribute's type are flags.
const TYPE_MASK: u16 = 0x3fff;
/// Message types of the protocol itself.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Attribute of an error that holds the kernel's words.
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Notification group of link changes, as a bit.
const RTMGRP_LINK: u32 = 1;
/// Longest message from the kernel: a link with all its statistics has about 2 KiB.
const MAX_MESSAGE: usize = 32 * 1024;

/// A request that the kernel refused, or that could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket failed.
    #[error("netlink socket")]
    Socket(#[from] Errno),
    /// The kernel refused.
    #[error("{error}{}", words.as_ref().map(|w| format!(" ({w})")).unwrap_or_default())]
    Refused {
        /// The error number.
        error: Errno,
        /// The kernel's own words, where it has any.
        words: Option<String>,
    },
}

impl NetlinkError {
    /// The error number.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Socket(error) | Self::Refused { error, .. } => *error,
        }
    }
}

/// A message to be sent.
#[derive(Clone, Debug)]
pub struct Request {
    bytes: Vec<u8>,
    open: Vec<usize>,
}

impl Request {
    /// A request of `kind` (`RTM_*`) with `flags` besides request and acknowledge, and the family's fixed header.
    pub fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK).unwrap_or(0);
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self { bytes, open: Vec::new() }
    }

    /// Adds an attribute.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Adds a string attribute.
    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// Opens a nested attribute: what is added until [`Request::end`] is in it.
    pub fn nest(mut self, kind: u16) -> Self {
        self.open.push(self.bytes.len());
        self.attribute(kind | NESTED, &[])
    }

    /// Closes the innermost nested attribute.
    pub fn end(mut self) -> Self {
        if let Some(start) = self.open.pop() {
            let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
            self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        }
        self
    }

    fn finish(&mut self, sequence: u32) {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }
}

/// A message from the kernel.
#[derive(Clone, Debug)]
pub struct Message {
    /// `RTM_*`.
    pub kind: u16,
    /// Fixed header and attributes.
    pub payload: Vec<u8>,
}

/// The attributes in `bytes`: type without flags, and value.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?) & TYPE_MASK;
        let value = rest.get(ATTRIBUTE_HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A socket to the kernel's route netlink.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
    calls: Calls,
}

impl Netlink {
    /// A socket for requests, which are counted among `calls`.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn requests(calls: Calls) -> Result<Self, NetlinkError> {
        let new = Self::open(SockFlag::SOCK_CLOEXEC, 0, calls)?;
        // The kernel's words for a refusal; a kernel before 4.12 does not know the option and says the number alone.
        let on: libc::c_int = 1;
        // SAFETY: the descriptor is open and the value is a c_int that outlives the call.
        let _ = unsafe {
            libc::setsockopt(
                new.socket.as_raw_fd(),
                libc::SOL_NETLINK,
                libc::NETLINK_EXT_ACK,
                std::ptr::from_ref(&on).cast(),
                4,
            )
        };
        Ok(new)
    }

    /// A socket that hears of link changes; it does not block.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn link_changes(calls: Calls) -> Result<Self, NetlinkError> {
        Self::open(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, RTMGRP_LINK, calls)
    }

    fn open(flags: SockFlag, groups: u32, calls: Calls) -> Result<Self, NetlinkError> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; MAX_MESSAGE], calls })
    }

    /// Where this socket's requests are counted.
    pub fn calls(&self) -> &Calls {
        &self.calls
    }

    /// For polling.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a request and waits for its acknowledgement; what the kernel answered before it.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn call(&mut self, request: Request) -> Result<Vec<Message>, NetlinkError> {
        // The kernel waits for its lock within send(2) or recv(2), whichever of them begins the answer.
        self.calls.clone().make(|| self.exchange(request))
    }

    fn exchange(&mut self, mut request: Request) -> Result<Vec<Message>, NetlinkError> {
        self.sequence += 1;
        request.finish(self.sequence);
        send(self.socket.as_raw_fd(), &request.bytes, MsgFlags::empty())?;
        let mut answers = Vec::new();
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            for (sequence, message) in messages(&self.buffer[..length]) {
                match message.kind {
                    _ if sequence != self.sequence => {} // left over from a request that failed half-way
                    NLMSG_ERROR => return acknowledged(&message.payload).map(|()| answers),
                    NLMSG_DONE => return Ok(answers),
                    _ => answers.push(message),
                }
            }
        }
    }

    /// Throws away all waiting notifications; true if there were any (or some were lost).
    pub fn drain(&mut self) -> bool {
        let mut any = false;
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(_) | Err(Errno::ENOBUFS) => any = true, // ENOBUFS: some were lost; the caller looks for itself
                Err(Errno::EINTR) => {}
                Err(_) => return any,
            }
        }
    }
}

fn messages(bytes: &[u8]) -> impl Iterator<Item = (u32, Message)> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(*rest.first_chunk()?)).ok()?;
        let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
        let sequence = u32::from_ne_bytes(*rest.get(8..)?.first_chunk()?);
        let payload = rest.get(HEADER..length)?.to_vec();
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((sequence, Message { kind, payload }))
    })
}

/// Reads an `nlmsgerr`: error number, the header of the request (all of it where it failed), then attributes.
fn acknowledged(payload: &[u8]) -> Result<(), NetlinkError> {
    let number = payload.first_chunk().map_or(-libc::EPROTO, |b| i32::from_ne_bytes(*b));
    if number == 0 {
        return Ok(());
    }
    let request = payload.get(4..8).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_ne_bytes(*b));
    let behind = 4 + usize::try_from(request).unwrap_or(0).next_multiple_of(4);
    let words = attributes(payload.get(behind..).unwrap_or_default())
        .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
        .map(|(_, text)| String::from_utf8_lossy(text).trim_end_matches('\0').to_owned());
    Err(NetlinkError::Refused { error: Errno::from_raw(-number), words })
}

impl From<NetlinkError> for io::Error {
    fn from(error: NetlinkError) -> Self {
        error.errno().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_attributes_have_their_whole_length() {
        let mut request = Request::new(libc::RTM_NEWLINK, 0, &[0; 16]).text(3, "br0").nest(18).text(1, "bridge").end();
        request.finish(7);
        let (sequence, message) = messages(&request.bytes).next().unwrap();
        assert_eq!((sequence, message.kind), (7, libc::RTM_NEWLINK));
        let found: Vec<_> = attributes(&message.payload[16..]).collect();
        assert_eq!(found[0], (3, &b"br0\0"[..]));
        assert_eq!(attributes(found[1].1).collect::<Vec<_>>(), [(1, &b"bridge\0"[..])]);
    }

    #[test]
    fn cut_messages_end_the_iteration() {
        let mut request = Request::new(libc::RTM_NEWLINK, 0, &[0; 16]).text(3, "eth0");
        request.finish(1);
        for cut in 0..request.bytes.len() {
            assert_eq!(messages(&request.bytes[..cut]).count(), 0);
        }
        assert_eq!(attributes(&[0, 0, 0, 0]).count(), 0);
    }

    #[test]
    fn the_kernel_says_what_it_refuses() {
        let mut netlink = Netlink::requests(Calls::default()).unwrap();
        let mut fixed = [0u8; 16];
        fixed[4..8].copy_from_slice(&0x7fff_fff0_i32.to_ne_bytes());
        let error = netlink.call(Request::new(libc::RTM_GETLINK, 0, &fixed)).unwrap_err();
        assert_eq!(error.errno(), Errno::ENODEV);
    }
}
