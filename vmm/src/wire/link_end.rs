//! Why a guest's splitter lost a link: what follows from it is decided by the variant, never by the words.

use serde::{Deserialize, Serialize};

/// Why a guest's splitter lost a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkEnd {
    /// The other end closed it: its process is gone, or it gave the connection up.
    Closed,
    /// The other end has taken nothing for too long though something waits, in words.
    Stalled(String),
    /// The other end broke a rule, in words.
    Broken(String),
    /// A disk has answered with an error that may be its driver's, in words.
    Suspect(String),
    /// It is not the disk that the guest was given, or it has lost what was flushed to it: in what it differs, in words.
    OtherDisk(String),
}

impl std::fmt::Display for LinkEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Stalled(what) | Self::Broken(what) | Self::Suspect(what) | Self::OtherDisk(what) => f.write_str(what),
        }
    }
}
