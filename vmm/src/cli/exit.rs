//! Exit statuses that say more than "failed". `docs/programs.md` lists them all.

use crate::config::{Problem, SpecError};
use crate::supervisor::RunError;

/// Wrong usage that the parser of the command line cannot see; as its own.
pub(super) const USAGE: u8 = 2;
/// `umbra status --check`: something is not there now, and is expected to come.
pub(super) const DEGRADED: u8 = 1;
/// `umbra status --check`: something was given up, or the machine does not answer.
pub(super) const FAILED: u8 = 2;
/// The machine file, or what it names, is wrong (`EX_CONFIG` of sysexits.h): to start it again as it is would be in vain.
const CONFIGURATION: u8 = 78;
/// `umbra wait`: the time is over; as timeout(1) has it.
pub(super) const TIMED_OUT: u8 = 124;

/// The status of a command that failed by `error`.
pub(super) fn status_of(error: &anyhow::Error) -> u8 {
    let is_configuration = error.is::<SpecError>()
        || error.is::<Problem>()
        || error.downcast_ref().is_some_and(RunError::is_configuration);
    match error.downcast_ref::<Exit>() {
        Some(exit) => exit.status,
        None if is_configuration => CONFIGURATION,
        None => 1,
    }
}

/// A command's end with a status of its own.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(super) struct Exit {
    status: u8,
    what: String,
}

impl Exit {
    /// Ends with `status` and a line on stderr that says `what` is the matter.
    pub(super) fn new(status: u8, what: String) -> Self {
        Self { status, what }
    }

    /// Ends with `status`; what there is to say is on stdout already.
    pub(super) fn silent(status: u8) -> Self {
        Self { status, what: String::new() }
    }

    pub(super) fn is_silent(&self) -> bool {
        self.what.is_empty()
    }
}
