//! The transport's part of a snapshot: registers, vectors and queues. A device's own part is a value of its own making.
//!
//! Invariant: after `restore` and `restored` every queue that ran runs again, where it stood, and its driver is interrupted once:
//! an interrupt that was on its way when the state was taken may be lost, and drivers accept one without work.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::registers::CommonState;
use super::{About, Status, VirtioPci};
use crate::base::lock::lock;
use crate::vm::pci::device::BarChange;
use crate::vm::pci::msix::MsixState;
use crate::vm::snapshot::device::{self, StateError};
use crate::vm::virtio::device::QueueState;

/// What is saved.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    config: Vec<u8>,
    msix: MsixState,
    common: CommonState,
    /// Of the queues that run: next available and next used index.
    queues: Vec<Option<(u16, u16)>>,
    device: Value,
}

impl VirtioPci {
    pub(super) fn save_state(&mut self) -> Result<Value, StateError> {
        if self.common.status().contains(Status::NEEDS_RESET) || lock(&self.device).needs_reset() {
            return Err(StateError::new(&self.name, "waits for a reset"));
        }
        if self.line.is_some() {
            return Err(StateError::new(&self.name, "has a driver without MSI-X"));
        }
        let device = lock(&self.device).save().map_err(|what| StateError::new(&self.name, what))?;
        let mut queues = Vec::new();
        for index in 0..self.common.queue_count() {
            let position = self.position(index)?;
            queues.push(position);
        }
        let state =
            State { config: self.config.image(), msix: self.msix.save(), common: self.common.save(), queues, device };
        device::save(&self.name, &state)
    }

    /// Where queue `index` stands, if it runs. It is stopped for it, and started again: so the device has nothing of the queue left
    /// in hand.
    fn position(&mut self, index: u16) -> Result<Option<(u16, u16)>, StateError> {
        if !self.queues[usize::from(index)].running {
            return Ok(None);
        }
        let state = self.stop_queue(index);
        self.start_or_fail(index, state);
        match state {
            Some(QueueState { next_avail, next_used }) if self.queues[usize::from(index)].running => {
                Ok(Some((next_avail, next_used)))
            }
            _ => Err(StateError::new(&self.name, format!("does not say where queue {index} stands"))),
        }
    }

    pub(super) fn restore_state(&mut self, state: Value) -> Result<Vec<BarChange>, StateError> {
        let state: State = device::restore(&self.name, state)?;
        let other = |what: &str| StateError::new(&self.name, format!("has other {what} than when it was saved"));
        if !self.common.restore(&state.common) || state.queues.len() != self.queues.len() {
            return Err(other("queues or features"));
        }
        let changes = self.config.restore(&state.config).ok_or_else(|| other("registers"))?;
        if !self.msix.restore(&state.msix) {
            return Err(other("interrupt vectors"));
        }
        self.set_config_vector();
        {
            let mut device = lock(&self.device);
            if self.common.status().contains(Status::FEATURES_OK) {
                device.set_features(self.common.accepted());
            }
            device.restore(state.device).map_err(|what| StateError::new(&self.name, what))?;
        }
        for (index, position) in (0u16..).zip(state.queues) {
            let Some((next_avail, next_used)) = position else { continue };
            self.start_or_fail(index, Some(QueueState { next_avail, next_used }));
            if !self.queues[usize::from(index)].running {
                return Err(StateError::new(&self.name, format!("cannot go on with queue {index}")));
            }
        }
        Ok(changes)
    }

    /// Interrupts the driver once for each queue that runs.
    pub(super) fn interrupt_all(&self) {
        for (index, kick) in (0u16..).zip(&self.queues) {
            if let Some(registers) = self.common.queue(index).filter(|_| kick.running) {
                // Fails only when 2^64 - 2 interrupts wait: then one waits anyway.
                let _ = self.call(About::Queue, registers.vector).write(1);
            }
        }
    }
}
