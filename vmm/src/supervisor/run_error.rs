//! Why a machine did not run to a good end.

use nix::errno::Errno;
use thiserror::Error;

use super::start::leftover::LeftoverError;
use super::start::preflight::PreflightError;
use super::start::rundir::RunDirError;
use crate::record::metrics::ServerError;
use crate::wire::spawn::SpawnError;

/// Why a machine did not run to a good end.
#[derive(Debug, Error)]
pub enum RunError {
    /// Something that it needs is not there.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// No run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// No signals.
    #[error("watch signals (signalfd)")]
    Signals(#[source] Errno),
    /// A run that only makes snapshots has none to make.
    #[error(
        "there is nothing to prepare: no driver VM of this machine is restored from a snapshot (that takes `snapshots = true`, the \
         default, and no `spare`)"
    )]
    NothingToPrepare,
    /// Metrics cannot be served.
    #[error(transparent)]
    Metrics(#[from] ServerError),
    /// The run before was killed and is not gone.
    #[error(transparent)]
    Leftover(#[from] LeftoverError),
    /// A guest's process cannot be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// `poll` failed.
    #[error("wait for events (poll)")]
    Poll(#[source] Errno),
    /// A VM could not be started or a guest ended badly; the sentence names it.
    #[error("{what}")]
    Vm {
        /// The sentence.
        what: String,
        /// It was printed as an event already, word for word.
        reported: bool,
        /// What the VM is made of is wrong.
        configuration: bool,
    },
}

/// Why a VM makes the run a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::supervisor) struct WhyFailed {
    /// The sentence.
    pub(in crate::supervisor) what: String,
    /// What the VM is made of is wrong: another start would come to the same end.
    pub(in crate::supervisor) configuration: bool,
}

impl From<String> for WhyFailed {
    fn from(what: String) -> Self {
        Self { what, configuration: false }
    }
}

impl From<&str> for WhyFailed {
    fn from(what: &str) -> Self {
        what.to_owned().into()
    }
}

impl RunError {
    /// Whether what the machine is made of is wrong, so that another start would come to the same end.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Preflight(why) => why.is_configuration(),
            Self::Vm { configuration, .. } => *configuration,
            Self::RunDir(RunDirError::BadName(_)) | Self::NothingToPrepare => true,
            _ => false,
        }
    }
}
