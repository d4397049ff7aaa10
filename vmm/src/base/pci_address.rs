//! Addresses of PCI functions: [`Bdf`] on the host (domain, bus, device and function, written as `lspci -D`
//! and sysfs write them), [`Slot`] on a VM's only bus.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The address of a PCI function of the host, as `0000:03:00.0`.
///
/// `03:00.0` is accepted too and means domain 0. Domains that the kernel makes itself, as behind Intel's VMD, begin at 10000 and have
/// as many digits as they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// Devices on a bus (5 bits of the address).
pub const DEVICES: u8 = 32;
/// Functions of a device (3 bits).
const FUNCTIONS: u8 = 8;

/// A text that is no PCI address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no PCI address: expected DOMAIN:BUS:DEVICE.FUNCTION as 0000:03:00.0 (`lspci -D` lists them)")]
pub struct ParseBdfError(String);

impl Bdf {
    /// The address made of its parts; `None` where the device is above 31 or the function above 7.
    pub fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        (device < DEVICES && function < FUNCTIONS).then_some(Self { domain, bus, device, function })
    }

    fn parse(text: &str) -> Option<Self> {
        let (rest, function) = text.rsplit_once('.')?;
        let mut parts = rest.rsplit(':');
        let (device, bus) = (parts.next()?, parts.next()?);
        let domain = parts.next().unwrap_or("0000");
        let widths = (1..=8).contains(&domain.len()) && bus.len() <= 2 && device.len() <= 2 && function.len() == 1;
        // `from_str_radix` would take a sign.
        let digits = text.bytes().all(|b| b.is_ascii_hexdigit() || b == b':' || b == b'.');
        if parts.next().is_some() || !widths || !digits {
            return None;
        }
        Self::new(
            u32::from_str_radix(domain, 16).ok()?,
            u8::from_str_radix(bus, 16).ok()?,
            u8::from_str_radix(device, 16).ok()?,
            function.parse().ok()?,
        )
    }
}

impl FromStr for Bdf {
    type Err = ParseBdfError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text).ok_or_else(|| ParseBdfError(text.into()))
    }
}

impl TryFrom<String> for Bdf {
    type Error = ParseBdfError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Bdf> for String {
    fn from(bdf: Bdf) -> Self {
        bdf.to_string()
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

/// A device number on a VM's root bus, 0 to 31. Slot 0 is the host bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u8);

impl Slot {
    /// Slot `number`, or `None` from 32 on.
    pub fn new(number: u8) -> Option<Self> {
        (number < DEVICES).then_some(Self(number))
    }

    /// The slot's number, 0 to 31.
    pub fn get(self) -> u8 {
        self.0
    }

    /// All slots, the host bridge's first.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..DEVICES).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_they_are_written() {
        for text in ["0000:03:00.0", "ffff:ff:1f.7", "0001:0a:1c.3", "10000:e1:00.0", "ffffffff:00:00.0"] {
            assert_eq!(text.parse::<Bdf>().unwrap().to_string(), text);
        }
        assert_eq!("3:0.1".parse::<Bdf>().unwrap().to_string(), "0000:03:00.1");
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "eth0",
            "0000:03:00",
            "0000:03:20.0",
            "0000:03:00.8",
            "0:0:0:0.0",
            "+1:02:03.0",
            "100000000:1:2.3",
            ":0.0",
        ] {
            assert!(text.parse::<Bdf>().is_err(), "{text}");
        }
    }
}
