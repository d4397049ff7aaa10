//! `umbra-bench suite`.

use std::process::ExitCode;

use anyhow::Context;

use crate::assets::target_dir;
use crate::suite;

/// Arguments of `umbra-bench suite`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Arguments of the first run of the runner, as `--first "--workspace"`.
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true, default_value = "")]
    first: String,
    /// Arguments of a second run at the same time, as `--beside "--test braked"`; of several, one follows the other.
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true)]
    beside: Vec<String>,
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
    let beside: Vec<_> = args.beside.iter().map(|more| with(&args.command, more)).collect();
    let status = suite::run(&with(&args.command, &args.first), &beside, &attempts)
        .with_context(|| format!("cannot run {}", args.command.join(" ")))?;
    // A runner that a signal ended has no status.
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The runner with `more` arguments before those of the tests themselves.
fn with(command: &[String], more: &str) -> Vec<String> {
    let tests = command.iter().position(|argument| argument == "--").unwrap_or(command.len());
    let more = more.split_whitespace().map(str::to_owned);
    command[..tests].iter().cloned().chain(more).chain(command[tests..].iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_of_a_run_come_before_those_of_the_tests() {
        let command: Vec<String> = ["cargo", "test", "--", "--test-threads=1"].map(Into::into).into();
        let expected = ["cargo", "test", "--test", "braked", "--", "--test-threads=1"];
        assert_eq!(with(&command, "--test braked"), expected);
        assert_eq!(with(&command[..2], "--test braked"), expected[..4]);
    }
}
