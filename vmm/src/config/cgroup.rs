//! Bounds of what the processes of VMs may take of the host: `cgroup` of a machine, `cpu_max` of a guest or driver VM.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use super::MAX_CPUS;

/// In which control group those of the VMs are made: `"auto"`, `"off"`, or a path from the top of the tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cgroup {
    /// In that which is delegated to the supervisor; where none is, there are none.
    #[default]
    Auto,
    /// There are none.
    Off,
    /// In this one, as `/umbra`.
    In(PathBuf),
}

/// Neither a word nor a path.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no control group: write \"auto\", \"off\", or its path from the top of the tree, as \"/umbra\"")]
pub struct CgroupError(String);

impl Cgroup {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl FromStr for Cgroup {
    type Err = CgroupError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = || text.trim_matches('/').split('/');
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            // The top itself always has processes.
            _ if text.starts_with('/') && parts().all(|part| !["", ".", ".."].contains(&part)) => {
                Ok(Self::In(text.into()))
            }
            _ => Err(CgroupError(text.into())),
        }
    }
}

impl fmt::Display for Cgroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::In(path) => path.display().fmt(f),
        }
    }
}

/// Most processor time that the process of a VM may take: `"150%"` is one and a half processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuMax(u32);

/// Least share, percent: less than a millisecond at a time cannot be given.
const LEAST: u32 = 5;
/// Most: as many processors as a VM can have, and as many for its other threads.
const MOST: u32 = 200 * MAX_CPUS as u32;

/// No share.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no share of processors: write percent of one, from \"{LEAST}%\" to \"{MOST}%\", as \"150%\"")]
pub struct CpuMaxError(String);

impl CpuMax {
    /// Percent of one processor.
    pub fn percent(self) -> u32 {
        self.0
    }
}

impl FromStr for CpuMax {
    type Err = CpuMaxError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_suffix('%').filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()));
        let percent = digits.and_then(|digits| digits.parse().ok()).filter(|percent| (LEAST..=MOST).contains(percent));
        percent.map(Self).ok_or_else(|| CpuMaxError(text.into()))
    }
}

impl fmt::Display for CpuMax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

/// In files these are texts.
macro_rules! as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

as_text!(Cgroup);
as_text!(CpuMax);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_a_word_or_a_path_below_the_top() {
        assert_eq!("auto".parse(), Ok(Cgroup::Auto));
        assert_eq!("off".parse(), Ok(Cgroup::Off));
        assert_eq!("/umbra/vms".parse(), Ok(Cgroup::In("/umbra/vms".into())));
        for text in ["", "on", "umbra", "/", "//", "/a/../b", "/a//b", "/./a"] {
            assert_eq!(text.parse::<Cgroup>(), Err(CgroupError(text.into())));
        }
        for text in ["auto", "off", "/umbra"] {
            assert_eq!(text.parse::<Cgroup>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_share_is_percent_of_a_processor() {
        assert_eq!("150%".parse::<CpuMax>().map(CpuMax::percent), Ok(150));
        assert_eq!("5%".parse::<CpuMax>().unwrap().to_string(), "5%");
        for text in ["", "%", "150", "4%", "12801%", "1.5%", "-5%", "+50%", "50 %", "99999999999%"] {
            assert_eq!(text.parse::<CpuMax>(), Err(CpuMaxError(text.into())));
        }
    }
}
