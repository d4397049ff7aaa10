//! The number of one life (incarnation) of a driver VM. Every message that concerns a driver VM carries it;
//! a message of an older generation is dropped by this number.

use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

/// One life of a driver VM, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(NonZeroU32);

impl Generation {
    /// The first life.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// Returns generation `n`, or `None` for 0.
    pub fn new(n: u32) -> Option<Self> {
        NonZeroU32::new(n).map(Self)
    }

    /// The number, from 1.
    pub fn get(self) -> u32 {
        self.0.get()
    }

    /// The life after this one. The count saturates: 2^32 reboots are not reached.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
