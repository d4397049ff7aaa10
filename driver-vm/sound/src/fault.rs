//! Whose fault it is that a session cannot go on: the host's end of one guest, or the card that all guests share.

/// Why a session cannot go on.
#[derive(Debug)]
pub enum Fault {
    /// The host at this port broke the protocol, floods or does not read: its session ends, and the next one may begin.
    Session(String),
    /// The card, or the driver VM itself: the service ends.
    Service(anyhow::Error),
}

impl From<anyhow::Error> for Fault {
    fn from(error: anyhow::Error) -> Self {
        Self::Service(error)
    }
}
