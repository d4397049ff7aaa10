//! Device classes, and how a device of a guest is named.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A device class: what one shadow serves, whatever the device's model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Network.
    Net,
    /// Sound.
    Sound,
    /// Disks.
    Block,
}

impl Class {
    /// In lower case, as in names of devices.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Sound => "sound",
            Self::Block => "block",
        }
    }
}

/// A device of a guest, by its index among those of its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceId {
    /// Its class.
    pub class: Class,
    /// Its index, from 0.
    pub index: u16,
}

impl DeviceId {
    /// Network device `index`.
    pub fn net(index: u16) -> Self {
        Self { class: Class::Net, index }
    }

    /// Sound device `index`.
    pub fn sound(index: u16) -> Self {
        Self { class: Class::Sound, index }
    }

    /// Disk `index` among all disks of the guest, those on files of the host included: disk 0 is its `vda`.
    pub fn block(index: u16) -> Self {
        Self { class: Class::Block, index }
    }
}

/// A text that names no device of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoDevice;

impl fmt::Display for NoDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not the name of a device, as net0, sound0 or block0")
    }
}

impl std::error::Error for NoDevice {}

impl FromStr for DeviceId {
    type Err = NoDevice;

    /// Of a name as [`Self`] is shown: the class, then the index.
    fn from_str(name: &str) -> Result<Self, NoDevice> {
        let index_at = name.find(|c: char| c.is_ascii_digit()).ok_or(NoDevice)?;
        let (class, index) = name.split_at(index_at);
        let class = [Class::Net, Class::Sound, Class::Block]
            .into_iter()
            .find(|known| known.as_str() == class)
            .ok_or(NoDevice)?;
        Ok(Self { class, index: index.parse().map_err(|_| NoDevice)? })
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.class.as_str(), self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_back_from_its_name_and_nothing_else_is() {
        for device in [DeviceId::net(0), DeviceId::sound(12), DeviceId::block(3), DeviceId::net(u16::MAX)] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        for name in ["", "net", "0", "net65536", "disk0", "net0x", "net-1", "0net"] {
            assert_eq!(name.parse::<DeviceId>(), Err(NoDevice), "{name}");
        }
    }
}
