//! A VM process's way to whoever started it: the supervisor on the control socket, or, for trying a VM by hand
//! from a spec file, the log.

use crate::wire::channel::Channel;
use crate::wire::messages::FromVm;

/// Where this process reports to. Threads share it.
#[derive(Debug)]
pub enum Host {
    /// A supervisor.
    Supervisor(Channel),
    /// Nobody: messages go to the log.
    Log,
}

impl Host {
    /// Sends `message`. A supervisor that is gone is noticed by the event loop, not here.
    pub fn tell(&self, message: &FromVm) {
        match self {
            Self::Supervisor(channel) => {
                if let Err(error) = channel.send(message, &[]) {
                    tracing::debug!(%error, ?message, "tell the supervisor");
                }
            }
            Self::Log => tracing::info!(?message, "a message for a supervisor"),
        }
    }
}
