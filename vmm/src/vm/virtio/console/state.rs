//! The console's part of a snapshot: which ports the guest's driver knows and has open.
//!
//! Invariant: what has been said to the guest over a port is said to that life alone. A console whose guest has been told anything has no
//! snapshot, so that a life that is restored has neither plan nor secret of the one that was saved.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Console;
use super::port::{End, Port};

/// What is saved.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    driver_ready: bool,
    ports: Vec<PortState>,
}

/// What is saved of a port.
#[derive(Debug, Serialize, Deserialize)]
struct PortState {
    name: String,
    ready: bool,
    open: bool,
    announced: bool,
}

impl Console {
    pub(super) fn save_state(&self) -> Result<Value, String> {
        if self.broken {
            return Err("waits for a reset".into());
        }
        if !self.pending.is_empty() {
            return Err("has messages for its driver that wait".into());
        }
        if let Some(port) = self.ports.iter().find(|port| port.told || !port.to_host.is_empty()) {
            let what = if port.told { "has told its guest something" } else { "has words of its guest that wait" };
            return Err(format!("{what} (port {})", port.name));
        }
        let was_connected = |port: &&Port| matches!(&port.end, End::VhostUser(front) if front.was_connected());
        if let Some(port) = self.ports.iter().find(was_connected) {
            return Err(format!("has been connected with a guest (port {})", port.name));
        }
        let ports = self.ports.iter().map(|port| PortState {
            name: port.name.clone(),
            ready: port.ready,
            open: port.open,
            announced: port.announced,
        });
        let state = State { driver_ready: self.driver_ready, ports: ports.collect() };
        serde_json::to_value(state).map_err(|error| error.to_string())
    }

    pub(super) fn restore_state(&mut self, state: Value) -> Result<(), String> {
        let state: State = serde_json::from_value(state).map_err(|error| format!("has another state: {error}"))?;
        if !state.ports.iter().map(|port| &port.name).eq(self.ports.iter().map(|port| &port.name)) {
            return Err("has other ports than when it was saved".into());
        }
        self.driver_ready = state.driver_ready;
        for (port, saved) in self.ports.iter_mut().zip(state.ports) {
            (port.ready, port.open, port.announced) = (saved.ready, saved.open, saved.announced);
        }
        Ok(())
    }
}
