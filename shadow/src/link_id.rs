//! The number of one connection between a guest's device and a driver VM. A life of a driver VM may be connected to a
//! guest's device several times: the guest reboots, hangs, or comes later.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Generation;

/// One connection of one end, ordered by life, then by attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LinkId {
    /// The driver VM's life.
    pub generation: Generation,
    /// Number of the connection within that life, from 1. Numbers never repeat; some may be left out.
    pub attempt: u32,
}

impl LinkId {
    /// The first connection of a life.
    pub fn first(generation: Generation) -> Self {
        Self { generation, attempt: 1 }
    }

    /// Above every connection of a life.
    pub fn last(generation: Generation) -> Self {
        Self { generation, attempt: u32::MAX }
    }

    /// The connection after this one, of the same life. The count saturates: 2^32 reboots are not reached.
    pub fn next(self) -> Self {
        Self { attempt: self.attempt.saturating_add(1), ..self }
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.attempt)
    }
}
