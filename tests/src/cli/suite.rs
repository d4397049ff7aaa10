//! `umbra-bench suite`.

use std::process::ExitCode;

use anyhow::Context;

use crate::assets::target_dir;
use crate::suite;

/// Arguments of `umbra-bench suite`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The test runner and its arguments, as `-- cargo test`.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Runs the suite; ends with the runner's status.
///
/// # Errors
/// The runner cannot be started.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let attempts = target_dir().join("bench/attempts.jsonl");
    let status =
        suite::run(&args.command, &attempts).with_context(|| format!("cannot run {}", args.command.join(" ")))?;
    // A runner that a signal ended has no status.
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
