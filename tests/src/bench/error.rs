//! What can go wrong with a bench, said so that the reader need not open a log to begin with.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Output;
use super::brake::SpeedError;
use crate::assets::AssetError;
use crate::peer::PeerError;
use crate::probe::client::ClientError;

/// A bench's failure.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Something that the bench needs is not there.
    #[error(transparent)]
    Assets(#[from] AssetError),
    /// The network could not be made.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The brake's variable.
    #[error(transparent)]
    Speed(#[from] SpeedError),
    /// A file or process operation.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The test host did not come up, or went down.
    #[error("the test host is not running: {what}\n--- end of {} ---\n{tail}", log.display())]
    Boot {
        /// What was seen.
        what: String,
        /// The console's last lines.
        tail: String,
        /// The whole console.
        log: PathBuf,
    },
    /// The test host stands still in its boot.
    #[error("the test host does not come up: its console has printed nothing for {limit:.0?}\n--- end of {} ---\n{tail}", log.display())]
    Silent {
        /// For how long nothing was printed.
        limit: Duration,
        /// The console's last lines.
        tail: String,
        /// The whole console.
        log: PathBuf,
    },
    /// A script did not end as scripts do.
    #[error("in the test host, `{script}`\n--- end of the test host's console ---\n{tail}")]
    Script {
        /// Its first line.
        script: String,
        /// What happened.
        #[source]
        source: ClientError,
        /// The console's last lines.
        tail: String,
    },
    /// A script ended with another status than 0.
    #[error("in the test host, `{script}` ended with status {}; it printed:\n{}{}", output.status, output.stdout, output.stderr)]
    Status {
        /// Its first line.
        script: String,
        /// All of it.
        output: Output,
    },
}

impl BenchError {
    /// What failed, in one line.
    pub fn headline(&self) -> String {
        match self {
            Self::Boot { what, .. } => format!("the test host is not running: {what}"),
            Self::Silent { limit, .. } => format!("the test host stands still in its boot: nothing for {limit:.0?}"),
            Self::Script { source: ClientError::Deadline { limit, .. }, .. } => {
                format!("a command in the test host does not end (nothing has moved for {:.0} s)", limit.as_secs_f64())
            }
            Self::Script { source: ClientError::Gone { .. }, .. } => "the test host went away".into(),
            Self::Script { .. } => "the test host does not answer".into(),
            Self::Status { output, .. } => {
                let last = output.stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
                format!("a command in the test host ended with status {}: {}", output.status, last.trim())
            }
            other => other.to_string().lines().next().unwrap_or_default().to_owned(),
        }
    }

    pub(crate) fn file(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File { operation, path: path.into(), source }
    }
}

/// The first line of a script that says something.
pub(super) fn first_line(script: &str) -> String {
    let lines = script.lines().map(str::trim);
    let mut telling = lines.filter(|l| {
        !l.is_empty()
            && !l.starts_with("set ")
            && !l.starts_with(". /etc")
            && !l.starts_with("export UMBRA_PATIENCE")
            && *l != "cd /share"
    });
    telling.next().unwrap_or_default().to_owned()
}
