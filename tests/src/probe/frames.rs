//! Sends Ethernet frames as they are, for what no socket of the Internet protocols sends.

use std::error::Error;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// `EtherType` of the frames: for local experiments (IEEE 802).
pub const ETHER_TYPE: u16 = 0x88b5;
/// Bytes of a frame, without its check sequence: the shortest.
const LENGTH: usize = 60;
/// Of each destination: one may be lost on its way.
const EACH: usize = 5;

/// Sends five frames each from `interface` to every one of `destinations`.
///
/// # Errors
/// There is no such interface, or it takes none.
pub fn send(interface: &str, destinations: &[[u8; 6]]) -> Result<(), Box<dyn Error>> {
    let index = i32::try_from(nix::net::if_::if_nametoindex(interface)?)?;
    let raw = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all-zero is a valid sockaddr_ll: a C struct of integers and an array.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    (to.sll_family, to.sll_ifindex) = (libc::sa_family_t::try_from(libc::AF_PACKET)?, index);
    let size = libc::socklen_t::try_from(size_of_val(&to))?;
    for destination in destinations {
        let mut frame = [0; LENGTH];
        frame[..6].copy_from_slice(destination);
        frame[6..12].copy_from_slice(&source_of(interface)?);
        frame[12..14].copy_from_slice(&ETHER_TYPE.to_be_bytes());
        for _ in 0..EACH {
            // SAFETY: the frame and the address outlive the call, with the lengths that it is given.
            let sent = unsafe {
                libc::sendto(raw.as_raw_fd(), frame.as_ptr().cast(), LENGTH, 0, (&raw const to).cast(), size)
            };
            if sent < 0 {
                return Err(io::Error::last_os_error().into());
            }
        }
    }
    Ok(())
}

fn source_of(interface: &str) -> Result<[u8; 6], Box<dyn Error>> {
    address(std::fs::read_to_string(format!("/sys/class/net/{interface}/address"))?.trim())
}

/// An address as `02:00:00:00:00:01`.
///
/// # Errors
/// It is none.
pub fn address(text: &str) -> Result<[u8; 6], Box<dyn Error>> {
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
    bytes.try_into().map_err(|_| format!("{text} is no address of six bytes").into())
}
