//! A network namespace with TAP interfaces, made without root where the kernel allows it.
//!
//! Invariant: nothing outside the new namespace changes; everything in it goes with the process.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::peer_address;

/// The bridge of NICs on one network, and the calls that make it (linux/sockios.h).
const BRIDGE: &str = "wire";
const SIOCBRADDBR: libc::Ioctl = 0x89a0;
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// Enters a new network namespace; when not root, a user namespace first.
///
/// # Errors
/// A sentence that says which setting forbids it.
pub(super) fn enter() -> Result<(), String> {
    let uid = nix::unistd::geteuid();
    let gid = nix::unistd::getegid();
    let flags =
        if uid.is_root() { CloneFlags::CLONE_NEWNET } else { CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET };
    unshare(flags).map_err(|e| {
        format!(
            "cannot make a network namespace for the bench: {e}; run as root, or allow user namespaces (sysctl \
             kernel.unprivileged_userns_clone=1, on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0; in a \
             container: --privileged, or --cap-add=NET_ADMIN,SYS_ADMIN --device=/dev/net/tun)"
        )
    })?;
    if !uid.is_root() {
        let map = |file: &str, text: String| {
            fs::write(format!("/proc/self/{file}"), text).map_err(|e| format!("{file}: {e}"))
        };
        map("setgroups", "deny".into())?;
        map("uid_map", format!("0 {uid} 1"))?;
        map("gid_map", format!("0 {gid} 1"))?;
    }
    up("lo").map_err(|e| format!("cannot bring up lo in the bench's namespace: {e}"))
}

/// Makes the TAP interface for NIC `nic`, without an address.
///
/// # Errors
/// A sentence for the user.
pub(super) fn tap(nic: usize) -> Result<File, String> {
    let name = format!("nic{nic}");
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").map_err(|e| {
        format!(
            "cannot open /dev/net/tun: {e}; the bench needs it (modprobe tun; in a container: --device=/dev/net/tun)"
        )
    })?;
    let mut request = request(&name);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(|e| e.to_string())?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if done < 0 {
        return Err(format!("cannot make TAP interface {name}: {}", io::Error::last_os_error()));
    }
    without_ipv6(&name);
    up(&name).map_err(|e| format!("cannot set up {name}: {e}"))?;
    Ok(file)
}

/// A peer that solicits routers would put frames on the wire that no test asked for.
fn without_ipv6(name: &str) {
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
}

/// Gives the interface of NIC `nic` the peer's address on its network.
///
/// # Errors
/// A sentence for the user.
pub(super) fn address_of(nic: usize) -> Result<(), String> {
    let name = format!("nic{nic}");
    address(&name, peer_address(nic)).map_err(|e| format!("cannot set up {name}: {e}"))
}

/// Fixes the address on the wire of `host`, on the network of NIC 0.
pub(super) fn neighbour(host: Ipv4Addr, mac: [u8; 6]) -> io::Result<()> {
    /// Flags (linux/if_arp.h): complete, permanent.
    const ATF_COM: libc::c_int = 2;
    const ATF_PERM: libc::c_int = 4;
    // SAFETY: all-zero is a valid arpreq: a C struct of integers and arrays.
    let mut entry: libc::arpreq = unsafe { std::mem::zeroed() };
    entry.arp_pa = inet(host)?;
    entry.arp_ha.sa_family = libc::ARPHRD_ETHER;
    for (to, from) in entry.arp_ha.sa_data.iter_mut().zip(mac) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    entry.arp_flags = ATF_COM | ATF_PERM;
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: SIOCSARP reads one arpreq, which outlives the call.
    let done = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSARP, &raw const entry) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Joins the interfaces of `nics` NICs by a bridge, which has the peer's address on the network of the first.
///
/// # Errors
/// A sentence for the user.
pub(super) fn bridge(nics: usize) -> Result<(), String> {
    let make = || -> io::Result<()> {
        let name = CString::new(BRIDGE)?;
        let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        // SAFETY: SIOCBRADDBR reads a string that ends with NUL and outlives the call.
        if unsafe { libc::ioctl(any.as_raw_fd(), SIOCBRADDBR, name.as_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        for nic in 0..nics {
            let port = nix::net::if_::if_nametoindex(format!("nic{nic}").as_str())?;
            let mut request = request(BRIDGE);
            request.ifr_ifru.ifru_ifindex = i32::try_from(port).map_err(io::Error::other)?;
            control(&mut request, SIOCBRADDIF)?;
        }
        without_ipv6(BRIDGE);
        address(BRIDGE, peer_address(0))?;
        up(BRIDGE)
    };
    make().map_err(|e| format!("cannot make a bridge in the bench's namespace: {e} (modprobe bridge)"))
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid ifreq: a C struct of integers and arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = CString::new(name).unwrap_or_default();
    for (to, &from) in request.ifr_name.iter_mut().zip(name.as_bytes().iter().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request
}

fn control(request: &mut libc::ifreq, what: libc::Ioctl) -> io::Result<()> {
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: the SIOC* calls used here read and write one ifreq, which outlives the call.
    let done = unsafe { libc::ioctl(any.as_raw_fd(), what, std::ptr::from_mut(request)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn up(name: &str) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(io::Error::other)?;
    control(&mut request, libc::SIOCSIFFLAGS)
}

fn address(name: &str, address: Ipv4Addr) -> io::Result<()> {
    for (value, what) in [(address, libc::SIOCSIFADDR), (Ipv4Addr::new(255, 255, 255, 0), libc::SIOCSIFNETMASK)] {
        let mut request = request(name);
        request.ifr_ifru.ifru_addr = inet(value)?;
        control(&mut request, what)?;
    }
    Ok(())
}

fn inet(address: Ipv4Addr) -> io::Result<libc::sockaddr> {
    let inet = libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).map_err(io::Error::other)?,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: sockaddr and sockaddr_in have the same size, and any bytes are a valid sockaddr.
    Ok(unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(inet) })
}
