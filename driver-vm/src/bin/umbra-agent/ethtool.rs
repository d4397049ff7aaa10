//! Features (offloads) of an interface by their names, as `ethtool -k` shows them, and the self-test of `ethtool -t`
//! (linux/ethtool.h, `SIOCETHTOOL`).

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use umbra_driver_vm::calls::Calls;

const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_TEST: u32 = 0x1a;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
/// The set of the names of self-tests.
const ETH_SS_TEST: u32 = 0;
/// The set of feature names.
const ETH_SS_FEATURES: u32 = 4;
/// Length of one name.
const ETH_GSTRING_LEN: usize = 32;
/// Features are 64 today; the bound keeps a strange answer small.
const MAX_FEATURES: usize = 1024;
/// `ETH_TEST_FL_OFFLINE`: with those tests that interrupt the traffic.
const OFFLINE: u32 = 1;
/// Words of `struct ethtool_get_features_block`: available, requested, active, never_changed.
const GET_BLOCK: usize = 4;

/// The features of one interface.
#[derive(Debug)]
pub struct Features {
    socket: OwnedFd,
    calls: Calls,
    interface: String,
    bits: BTreeMap<String, usize>,
}

impl Features {
    /// Asks an interface for the names of its features. Requests are counted among `calls`.
    ///
    /// # Errors
    /// When the interface or the request is unknown to the kernel.
    pub fn of(calls: &Calls, interface: &str) -> Result<Self, Errno> {
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        let mut new = Self { socket, calls: calls.clone(), interface: interface.into(), bits: BTreeMap::new() };
        let count = new.count(ETH_SS_FEATURES)?;
        let mut names = vec![0u32; 3 + count * ETH_GSTRING_LEN / 4];
        names[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, u32::try_from(count).unwrap_or(0)]);
        new.ioctl(&mut names)?;
        let bytes: Vec<u8> = names[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
        for (bit, name) in bytes.chunks_exact(ETH_GSTRING_LEN).enumerate() {
            let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
            new.bits.insert(String::from_utf8_lossy(&name[..end]).into_owned(), bit);
        }
        Ok(new)
    }

    /// Whether a feature is on; `false` too for one that the kernel does not know.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn is_on(&self, name: &str) -> Result<bool, Errno> {
        let Some(&bit) = self.bits.get(name) else { return Ok(false) };
        let mut features = vec![0u32; 2 + self.blocks() * GET_BLOCK];
        features[..2].copy_from_slice(&[ETHTOOL_GFEATURES, u32::try_from(self.blocks()).unwrap_or(0)]);
        self.ioctl(&mut features)?;
        let active = features.get(2 + bit / 32 * GET_BLOCK + 2).copied().unwrap_or(0);
        Ok(active >> (bit % 32) & 1 == 1)
    }

    /// Turns features on or off where the driver can; unknown names and fixed features are passed over.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn set(&self, wanted: &[(&str, bool)]) -> Result<(), Errno> {
        // Blocks of `struct ethtool_set_features_block`: valid, requested.
        let mut features = vec![0u32; 2 + self.blocks() * 2];
        features[..2].copy_from_slice(&[ETHTOOL_SFEATURES, u32::try_from(self.blocks()).unwrap_or(0)]);
        for (name, on) in wanted {
            if let Some(&bit) = self.bits.get(*name) {
                let block = 2 + bit / 32 * 2;
                features[block] |= 1 << (bit % 32);
                features[block + 1] |= u32::from(*on) << (bit % 32);
            }
        }
        self.ioctl(&mut features)
    }

    /// Has the driver test the NIC, offline, and waits for it.
    ///
    /// # Errors
    /// When the driver has no such test.
    pub fn self_test(&self) -> Result<(), Errno> {
        // cmd, flags, reserved, count; a result of 64 bits for each test. The kernel writes as many as the driver has.
        let mut test = vec![0u32; 4 + self.count(ETH_SS_TEST)? * 2];
        test[..2].copy_from_slice(&[ETHTOOL_TEST, OFFLINE]);
        self.ioctl(&mut test)
    }

    /// How many strings are in a set of the interface's.
    fn count(&self, set: u32) -> Result<usize, Errno> {
        // cmd, reserved, mask of sets (64 bits), count
        let mut info = [ETHTOOL_GSSET_INFO, 0, 1 << set, 0, 0];
        self.ioctl(&mut info)?;
        Ok(usize::try_from(info[4]).unwrap_or(0).min(MAX_FEATURES))
    }

    fn blocks(&self) -> usize {
        self.bits.len().div_ceil(32)
    }

    fn ioctl(&self, data: &mut [u32]) -> Result<(), Errno> {
        // SAFETY: all-zero bytes are a valid `ifreq`, a plain C struct.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays 0; interface names are shorter.
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name[..room].iter_mut().zip(self.interface.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_data = data.as_mut_ptr().cast();
        // SAFETY: the request points to `data`, which outlives the call and has the room that its own counts say:
        // the callers above size it by the count that they put in, and the kernel writes no more than that.
        let call = || unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        Errno::result(self.calls.make(call)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_has_features() {
        let features = Features::of(&Calls::default(), "lo").unwrap();
        assert!(features.is_on("loopback").unwrap());
        assert!(!features.is_on("no-such-feature").unwrap());
        assert!(Features::of(&Calls::default(), "no-such-if").is_err());
    }
}
