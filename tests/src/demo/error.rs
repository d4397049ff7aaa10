//! Why a demonstration, or a scenario, did not come to its end: in one line for its reader, and in full for a file.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::assets::AssetError;
use crate::bench::BenchError;
use crate::lossy_disk::LossyDiskError;
use crate::peer::PeerError;
use crate::probe::client::ClientError;
use crate::wav::WavError;

/// Letters of a command's last line that a headline shows.
const SHOWN: usize = 200;

/// Why there was no demonstration. (One that failed has a [`super::DemoResult`] whose `ok` is false.)
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Something is not installed or built.
    #[error(transparent)]
    Assets(#[from] AssetError),
    /// The test host.
    #[error(transparent)]
    Bench(#[from] BenchError),
    /// A lossy disk.
    #[error(transparent)]
    LossyDisk(#[from] LossyDiskError),
    /// The peer.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// A recording.
    #[error(transparent)]
    Wav(#[from] WavError),
    /// A script.
    #[error("a script could not be run")]
    Exec(#[source] ClientError),
    /// A command in the place ended with another status than 0.
    #[error("`{script}` ended with status {status}; it printed:\n{said}")]
    Command {
        /// The command.
        script: String,
        /// Its status.
        status: i32,
        /// Its output's end.
        said: String,
    },
    /// Something was waited for, and nothing moved.
    #[error("{what}; nothing has moved for {limit:.0?}\n{said}")]
    Still {
        /// What was waited for.
        what: String,
        /// For how long nothing has moved.
        limit: Duration,
        /// What was printed until then.
        said: String,
    },
    /// Umbra did not do what was asked.
    #[error("{what}; it said:\n{said}")]
    Umbra {
        /// What was seen.
        what: String,
        /// Its output.
        said: String,
    },
    /// The player did not play on.
    #[error("{name} in the guest plays no more:\n{said}")]
    Player {
        /// Which.
        name: &'static str,
        /// How it ended, if it has, and what the guest knows of it.
        said: String,
    },
    /// The real device cannot be used.
    #[error("{0}")]
    Device(String),
    /// A file operation.
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
    /// The part of the work in which something failed.
    #[error("{stage}")]
    During {
        /// As the end of a sentence that begins with "failed": "while the guest started".
        stage: String,
        /// What failed.
        #[source]
        source: Box<DemoError>,
    },
}

impl DemoError {
    /// The test host or the guest in it did not answer, or not as it should: on an emulated machine perhaps for no fault of
    /// Umbra's.
    pub fn may_be_emulation(&self) -> bool {
        match self {
            Self::During { source, .. } => source.may_be_emulation(),
            Self::Bench(BenchError::Assets(_) | BenchError::Speed(_)) => false,
            Self::Umbra { .. } | Self::Command { .. } | Self::Still { .. } | Self::Player { .. } => true,
            Self::Exec(_) | Self::Bench(_) => true,
            Self::Assets(_)
            | Self::LossyDisk(_)
            | Self::Peer(_)
            | Self::Wav(_)
            | Self::Device(_)
            | Self::File { .. } => false,
        }
    }

    /// What failed, in one line and in the reader's words; [`Self::in_full`] has the rest.
    pub fn headline(&self) -> String {
        match self {
            Self::During { stage, source } => format!("{stage}: {}", source.headline()),
            Self::Command { said, status, .. } => {
                let last = said.lines().rev().map(str::trim).find(|line| !line.is_empty());
                let last = last.map_or_else(|| format!("status {status}"), |line| line.chars().take(SHOWN).collect());
                format!("a command failed: {last}")
            }
            Self::Still { what, limit, .. } => format!("{what} (nothing has moved for {:.0} s)", limit.as_secs_f64()),
            Self::Umbra { what, .. } => what.clone(),
            Self::Player { name, .. } => format!("{name} in the guest plays no more"),
            Self::Bench(error) => error.headline(),
            other => chain(other).lines().next().unwrap_or_default().to_owned(),
        }
    }

    /// Everything that is known of it: for a file.
    pub fn in_full(&self) -> String {
        chain(self)
    }

    /// With more of what was said.
    #[must_use]
    pub fn with(mut self, more: &str) -> Self {
        let said = match &mut self {
            Self::Command { said, .. }
            | Self::Still { said, .. }
            | Self::Umbra { said, .. }
            | Self::Player { said, .. } => said,
            _ => return self,
        };
        said.push('\n');
        said.push_str(more);
        self
    }

    pub(crate) fn file(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File { operation, path: path.into(), source }
    }
}

/// An error with its causes, which are not repeated where the error has shown them.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(&format!(": {inner_text}"));
        }
        cause = inner.source();
    }
    text
}

/// Says in which part of the work something failed.
pub(super) trait During<T> {
    /// `stage` ends a sentence that begins with "failed".
    fn during(self, stage: impl FnOnce() -> String) -> Result<T, DemoError>;
}

impl<T, E: Into<DemoError>> During<T> for Result<T, E> {
    fn during(self, stage: impl FnOnce() -> String) -> Result<T, DemoError> {
        self.map_err(|error| DemoError::During { stage: stage(), source: Box::new(error.into()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_headline_is_one_line_without_lists() {
        let said = "PID USER COMMAND\n 1 0 init\numbra-probe: no answer from 10.77.0.1 within 20s\n";
        let command = DemoError::Command { script: "ps; umbra-probe ...".into(), status: 1, said: said.into() };
        let failed = Err::<(), _>(command).during(|| "at crash 2 of 3 (kernel panic)".into()).unwrap_err();
        assert_eq!(
            failed.headline(),
            "at crash 2 of 3 (kernel panic): a command failed: umbra-probe: no answer from 10.77.0.1 within 20s"
        );
        assert!(failed.in_full().contains("1 0 init"), "the file has it all");
        assert!(failed.may_be_emulation());
        let player = DemoError::Player { name: "mpg123", said: "x\ny".into() }.with("umbra: z");
        assert_eq!(player.headline(), "mpg123 in the guest plays no more");
        assert!(player.in_full().ends_with("y\numbra: z"));
    }
}
