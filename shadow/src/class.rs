//! Device classes, and how a device of a guest is named.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A device class: what one shadow serves, whatever the device's model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Network.
    Net,
    /// Sound.
    Sound,
}

impl Class {
    /// In lower case, as in names of devices.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Sound => "sound",
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
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.class.as_str(), self.index)
    }
}
