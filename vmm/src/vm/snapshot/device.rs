//! What a snapshot holds of a device: a value of the device's own making, which only the same kind of device reads.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

/// A device that cannot be saved, or whose saved state it cannot take.
#[derive(Debug, Error)]
#[error("{device} {what}")]
pub struct StateError {
    device: String,
    what: String,
}

impl StateError {
    /// `device`, as in logs, and what is the matter with it: `is connected with a guest`.
    pub fn new(device: &str, what: impl Into<String>) -> Self {
        Self { device: device.into(), what: what.into() }
    }

    /// A device of a kind that has no snapshots.
    pub fn no_snapshots(device: &str) -> Self {
        Self::new(device, "is a device of which no snapshot can be taken")
    }
}

/// The value of `state`.
///
/// # Errors
/// Never for a structure of numbers, strings and lists.
pub fn save(device: &str, state: &impl Serialize) -> Result<Value, StateError> {
    serde_json::to_value(state).map_err(|error| StateError::new(device, format!("cannot be written: {error}")))
}

/// The state that `value` holds.
///
/// # Errors
/// It is that of another kind of device.
pub fn restore<T: DeserializeOwned>(device: &str, value: Value) -> Result<T, StateError> {
    serde_json::from_value(value).map_err(|error| StateError::new(device, format!("has another state: {error}")))
}
