//! `umbra-bench wav`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use crate::wav::analysis::Analysis;
use crate::wav::{Wav, picture};

/// Arguments of `umbra-bench wav`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The recording: a WAV file that an emulated sound card wrote.
    recording: PathBuf,
    /// What should have been heard: a WAV file of the same rate.
    source: PathBuf,
    /// Draw the waveform with its silences marked, as SVG.
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
}

/// Judges a recording; prints the judgement as JSON.
///
/// # Errors
/// A file cannot be read or written.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (heard, source) = (Wav::read(&args.recording)?, Wav::read(&args.source)?);
    anyhow::ensure!(heard.rate == source.rate, "the files have {} and {} Hz", heard.rate, source.rate);
    let analysis = Analysis::of(&heard, &source);
    if let Some(path) = &args.picture {
        let title = args.recording.display().to_string();
        std::fs::write(path, picture::svg(&heard, &analysis, &title))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{}", serde_json::to_string_pretty(&analysis)?);
    Ok(ExitCode::SUCCESS)
}
