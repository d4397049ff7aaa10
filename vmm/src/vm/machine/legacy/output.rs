//! Where the guest's console output goes: the terminal, a file or nowhere; and to the console's viewers. A thread writes; the guest,
//! which prints byte by byte, waits for nothing.
//!
//! The terminal is standard output, which others share: it is written to as it is (no `O_NONBLOCK`), by a descriptor of our
//! own, so that a write that is held holds no lock of the process either.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

use super::backlog::Backlog;
use crate::base::background_writer::{BackgroundWriter, PATIENCE, Pushed};
use crate::base::rotating_file::RotatingFile;
use crate::config::Console;

/// Bytes of output that wait for a slow terminal or disk: the whole boot log of a kernel.
const BUFFER: usize = 256 << 10;

/// Errors of the console's output.
#[derive(Debug, Error)]
pub enum Error {
    /// The console's file.
    #[error("open the console file {path}")]
    Open {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Standard output.
    #[error("duplicate standard output for the console")]
    Terminal(#[source] io::Error),
    /// No thread.
    #[error("start the thread that writes the console's output")]
    Thread(#[source] io::Error),
}

/// The console's output. Writing to it never waits and never fails.
#[derive(Debug)]
pub struct Output {
    writer: Option<BackgroundWriter>,
    backlog: Option<Arc<Backlog>>,
}

impl Output {
    /// Output to `console`.
    ///
    /// # Errors
    /// The file cannot be opened, or the thread cannot be started.
    pub fn open(console: &Console) -> Result<Self, Error> {
        match console {
            Console::Off => Ok(Self { writer: None, backlog: None }),
            Console::Terminal => {
                let terminal = io::stdout().as_fd().try_clone_to_owned().map_err(Error::Terminal)?;
                Self::to(File::from(terminal))
            }
            Console::File(path) => {
                Self::to(RotatingFile::open(path).map_err(|source| Error::Open { path: path.clone(), source })?)
            }
        }
    }

    /// Output to `place`.
    pub(super) fn to(place: impl Write + Send + 'static) -> Result<Self, Error> {
        let trouble = |error: &io::Error| tracing::warn!("the console's output cannot be written and is lost: {error}");
        let writer = BackgroundWriter::start("console", BUFFER, place, mark, trouble);
        writer.map(|writer| Self { writer: Some(writer), backlog: None }).map_err(Error::Thread)
    }

    /// Keeps what is printed in `backlog` as well.
    pub(super) fn with_backlog(self, backlog: Option<Arc<Backlog>>) -> Self {
        Self { backlog, ..self }
    }

    /// Waits a bounded time until all output is written; says how much was lost.
    pub fn finish(&self) {
        let Some(writer) = &self.writer else { return };
        writer.finish(PATIENCE);
        let lost = writer.lost();
        if lost > 0 {
            tracing::warn!("{lost} bytes of the console's output were lost in all");
        }
    }
}

/// What stands in the output in place of `lost` bytes.
fn mark(lost: u64) -> String {
    format!("\r\n[umbra: {lost} bytes of the console's output are lost here]\r\n")
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(backlog) = &self.backlog {
            backlog.push(bytes);
        }
        if let Some(writer) = &self.writer
            && writer.push(bytes) == Pushed::FirstLoss
        {
            tracing::warn!("the console's output is not taken as fast as the VM prints; what does not fit is lost");
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::base::rotating_file::MAX_FILE;

    #[test]
    fn a_file_is_bounded_and_keeps_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.log");
        let mut output = Output::open(&Console::File(path.clone())).unwrap();
        let line = [b'x'; 1024];
        for _ in 0..100 {
            (0..100).for_each(|_| output.write_all(&line).unwrap());
            output.finish();
        }
        output.write_all(b"the end").unwrap();
        output.finish();
        let sizes = [path.clone(), dir.path().join("web.log.1")].map(|path| std::fs::metadata(path).unwrap().len());
        assert!(sizes.iter().all(|size| *size <= MAX_FILE), "{sizes:?}");
        assert!(std::fs::read(&path).unwrap().ends_with(b"the end"));
    }

    #[test]
    fn a_full_disk_costs_the_output_alone() {
        let mut output = Output::open(&Console::File("/dev/full".into())).unwrap();
        output.write_all(b"lost").unwrap();
        output.finish();
        output.write_all(b"lost, too").unwrap();
        output.finish();
        assert_eq!(output.writer.as_ref().unwrap().lost(), 13);
    }
}
