//! A TAP interface of the host: opened, given a virtio-net header of 12 bytes a frame, and set to the offloads that the guest
//! takes. Names are checked before the kernel sees them.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{c_char, c_int, c_uint, c_ulong, ifreq};
use thiserror::Error;
use umbra_splitter::header::{HEADER_LEN, Offloads};

const CLONE_DEVICE: &str = "/dev/net/tun";

/// Errors of opening a TAP interface; each says what to do.
#[derive(Debug, Error)]
pub enum Error {
    /// Not a name for an interface.
    #[error("TAP {0:?}: no name for a network interface (1 to 15 characters without '/' or spaces)")]
    Name(String),
    /// The host's kernel has no TUN/TAP driver.
    #[error("TAP {interface}: {CLONE_DEVICE} is missing; load the driver with `modprobe tun`")]
    NoDriver {
        /// The interface.
        interface: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Neither the device nor the interface is the user's.
    #[error(
        "TAP {interface}: permission denied; make it for your user once, as root: \
         `ip tuntap add {interface} mode tap user $USER && ip link set {interface} up`, or run with CAP_NET_ADMIN"
    )]
    Permission {
        /// The interface.
        interface: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Another process has it open.
    #[error("TAP {interface}: in use by another process; each guest needs an interface of its own")]
    Busy {
        /// The interface.
        interface: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// An interface of another kind has the name.
    #[error(
        "TAP {interface}: an interface of that name exists but is no TAP with one queue; choose another name, or \
         make it with `ip tuntap add {interface} mode tap`"
    )]
    Kind {
        /// The interface.
        interface: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("TAP {interface}: {operation}")]
    Other {
        /// The interface.
        interface: String,
        /// What was tried.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Whether no TAP can have the name.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Name(_) | Self::Kind { .. })
    }
}

/// An open TAP interface.
#[derive(Debug)]
pub struct Tap {
    file: File,
    interface: String,
}

impl Tap {
    /// Opens `interface`, making it if it does not exist, and brings it up with `mtu` if permission allows.
    pub fn open(interface: &str, mtu: u16) -> Result<Self, Error> {
        let name = interface.to_owned();
        let mut request = request(interface).ok_or_else(|| Error::Name(name.clone()))?;
        let open = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(CLONE_DEVICE);
        let file = open.map_err(|source| match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => Error::Permission { interface: name.clone(), source },
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Error::NoDriver { interface: name.clone(), source },
            _ => Error::Other { interface: name.clone(), operation: "open /dev/net/tun", source },
        })?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // The kernel's own definition is a short; the flags fit.
        request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
        control(&file, libc::TUNSETIFF, &mut request).map_err(|source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Error::Permission { interface: name.clone(), source },
            Some(libc::EBUSY) => Error::Busy { interface: name.clone(), source },
            Some(libc::EINVAL) => Error::Kind { interface: name.clone(), source },
            _ => Error::Other { interface: name.clone(), operation: "attach to the interface (TUNSETIFF)", source },
        })?;
        let mut length = c_int::try_from(HEADER_LEN).unwrap_or_default();
        control(&file, libc::TUNSETVNETHDRSZ, &mut length).map_err(|source| Error::Other {
            interface: name.clone(),
            operation: "set the size of the virtio-net header (TUNSETVNETHDRSZ)",
            source,
        })?;
        if let Err(error) = bring_up(&name, mtu) {
            tracing::debug!("TAP {name}: left as it is: {error}");
        }
        Ok(Self { file, interface: name })
    }

    /// The interface's name.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Opens `interface` if it exists: it is not made.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn find(interface: &str, mtu: u16) -> Result<Option<Self>, Error> {
        let Ok(name) = CString::new(interface) else { return Ok(None) };
        // SAFETY: the name ends with a zero and lives through the call.
        let is_there = unsafe { libc::if_nametoindex(name.as_ptr()) } != 0;
        if is_there { Self::open(interface, mtu).map(Some) } else { Ok(None) }
    }

    /// Sets which offloads frames towards the guest may use.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let bits = [
            (Offloads::CHECKSUM, libc::TUN_F_CSUM),
            (Offloads::TSO4, libc::TUN_F_TSO4),
            (Offloads::TSO6, libc::TUN_F_TSO6),
        ];
        let wanted = bits.iter().filter(|(offload, _)| offloads.contains(*offload));
        let flags: c_uint = wanted.map(|(_, flag)| flag).sum();
        // SAFETY: TUNSETOFFLOAD takes its argument by value; the file is open.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(flags)) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The interface `interface`, which is open as `file`.
    pub fn from_file(interface: &str, file: File) -> Self {
        Self { file, interface: interface.into() }
    }

    /// Gives the descriptor up.
    pub fn into_file(self) -> File {
        self.file
    }

    /// The descriptor that frames are read from and written to.
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// An interface request for `name`, else zero; `None` if it is no name.
fn request(name: &str) -> Option<ifreq> {
    let wrong = name.is_empty() || name == "." || name == ".." || name.len() >= libc::IFNAMSIZ;
    // '%' would make the kernel choose a number.
    if wrong || name.bytes().any(|b| b <= b' ' || matches!(b, b'/' | b':' | b'%' | 0x7F..)) {
        return None;
    }
    // SAFETY: a structure of integers and a union of such, for which zero is a value.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    Some(request)
}

fn control<T>(file: &impl AsRawFd, operation: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: the callers in this file pass the structure that `operation` reads and writes, which lives through
    // the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), operation, std::ptr::from_mut(argument)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn bring_up(name: &str, mtu: u16) -> io::Result<()> {
    // SAFETY: no memory is passed; the result is checked below.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, owned by nothing else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let make = || request(name).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput));
    let mut current = make()?;
    control(&socket, libc::SIOCGIFMTU, &mut current)?;
    // SAFETY: SIOCGIFMTU has filled this member of the union.
    if unsafe { current.ifr_ifru.ifru_mtu } != c_int::from(mtu) {
        let mut change = make()?;
        change.ifr_ifru.ifru_mtu = mtu.into();
        control(&socket, libc::SIOCSIFMTU, &mut change)?;
    }
    let mut flags = make()?;
    control(&socket, libc::SIOCGIFFLAGS, &mut flags)?;
    // SAFETY: SIOCGIFFLAGS has filled this member of the union.
    let now = c_int::from(unsafe { flags.ifr_ifru.ifru_flags });
    if now & libc::IFF_UP == 0 {
        // 16 bits as the kernel has them.
        #[allow(clippy::cast_possible_truncation)]
        {
            flags.ifr_ifru.ifru_flags = (now | libc::IFF_UP) as i16;
        }
        control(&socket, libc::SIOCSIFFLAGS, &mut flags)?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use nix::sched::{CloneFlags, unshare};
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

    use super::*;
    use crate::base::testing::as_root;

    /// Removes an interface (rtnetlink(7)).
    pub(crate) fn remove(name: &str) {
        let name = CString::new(name).unwrap();
        // SAFETY: the name ends with a zero and lives through the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        assert_ne!(index, 0);
        let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).unwrap();
        let header =
            [32_u32.to_ne_bytes(), [libc::RTM_DELLINK.to_ne_bytes(), flags.to_ne_bytes()].concat().try_into().unwrap()];
        let request = [header.concat(), vec![0; 12], index.to_ne_bytes().into(), vec![0; 8]].concat();
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), SockProtocol::NetlinkRoute).unwrap();
        send(socket.as_raw_fd(), &request, MsgFlags::empty()).unwrap();
        let mut answer = [0; 64];
        recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).unwrap();
        assert_eq!(answer[16..20], [0; 4], "the interface cannot be removed");
    }

    /// Runs `test` in a network namespace of its own, which takes root's rights.
    pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
        as_root(move || {
            let ready = unshare(CloneFlags::CLONE_NEWNET).is_ok() && Path::new(CLONE_DEVICE).exists();
            assert!(ready, "this test needs root and {CLONE_DEVICE}; UMBRA_SKIP_ROOT=1 leaves it out");
            test();
        });
    }

    #[test]
    fn interface_is_made_brought_up_and_given_back() {
        in_namespace(|| {
            let tap = Tap::open("umbra-t0", 1400).unwrap();
            tap.set_offloads(Offloads::all()).unwrap();
            // This thread's namespace, not the process's.
            let device = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            assert!(device.contains("umbra-t0"), "{device}");
            let busy = Tap::open("umbra-t0", 1400).unwrap_err();
            assert!(matches!(busy, Error::Busy { .. }), "{busy}");
            assert!(busy.to_string().contains("umbra-t0: in use"), "{busy}");
            drop(tap);
            let device = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            assert!(!device.contains("umbra-t0"));
        });
    }

    #[test]
    fn a_user_without_the_right_is_told_how_to_get_it() {
        in_namespace(|| {
            const NOBODY: libc::uid_t = 65534;
            // SAFETY: the raw call changes the user of this thread alone, which ends with the test.
            let done = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
            assert_eq!(done, 0);
            let error = Tap::open("umbra-t1", 1500).unwrap_err();
            assert!(matches!(error, Error::Permission { .. }), "{error}");
            assert!(error.to_string().contains("TAP umbra-t1: permission denied"), "{error}");
            assert!(error.to_string().contains("ip tuntap add umbra-t1 mode tap user"), "{error}");
        });
    }

    #[test]
    fn interface_of_another_kind_is_refused() {
        in_namespace(|| {
            let error = Tap::open("lo", 1500).unwrap_err();
            assert!(error.to_string().contains("is no TAP"), "{error}");
        });
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "a name", "x/y", "tap%d", "sixteen-letters-", ".."] {
            assert!(matches!(Tap::open(name, 1500), Err(Error::Name(_))), "{name}");
        }
    }
}
