//! The fixed ports' part of a snapshot. The keyboard controller and the reset control have no state; the SCI's level is the
//! interrupt controllers'.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Legacy;
use super::serial::SerialState;
use crate::base::lock::lock;
use crate::vm::snapshot::device::{self, StateError};

/// What is saved.
#[derive(Debug, Serialize, Deserialize)]
pub struct LegacyState {
    serial: SerialState,
    power: Value,
    cmos: Value,
}

impl Legacy {
    /// The state of all devices on fixed ports; no vCPU runs.
    ///
    /// # Errors
    /// The guest has panicked, or waits for input that it has not read.
    pub fn save(&self) -> Result<LegacyState, StateError> {
        if self.pvpanic.told() {
            return Err(StateError::new("pvpanic", "has said that the guest has panicked"));
        }
        let serial = lock(&self.serial).save().map_err(|what| StateError::new("the serial line", what))?;
        let power = device::save("ACPI power management", &*lock(&self.power))?;
        Ok(LegacyState { serial, power, cmos: device::save("CMOS", &*lock(&self.cmos))? })
    }

    /// Takes a saved state; no vCPU has run.
    ///
    /// # Errors
    /// It is none of these devices'.
    pub fn restore(&self, state: LegacyState) -> Result<(), StateError> {
        *lock(&self.power) = device::restore("ACPI power management", state.power)?;
        *lock(&self.cmos) = device::restore("CMOS", state.cmos)?;
        lock(&self.serial).restore(&state.serial);
        Ok(())
    }
}
