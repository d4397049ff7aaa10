//! `umbra-bench suite`.

use std::process::ExitCode;

use anyhow::Context;

use crate::assets::target_dir;
use crate::{bench, suite};

/// Arguments of `umbra-bench suite`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Arguments of a run of the runner, as `--run "--workspace --test disk"`; of several, as many run side by side as the machine has
    /// places for test hosts.
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true)]
    run: Vec<String>,
    /// Arguments of a run beside these, as `--beside "--test braked"`; of several, one follows the other.
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true)]
    beside: Vec<String>,
    /// The test runner and its arguments, as `-- cargo test`.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Runs the suite; ends with the status of a runner that failed.
///
/// # Errors
/// The runner cannot be started.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let attempts = target_dir().join("bench/attempts.jsonl");
    let commands = |list: &[String]| list.iter().map(|more| with(&args.command, more)).collect::<Vec<_>>();
    let failed = suite::run(&commands(&args.run), bench::places(), &commands(&args.beside), &attempts)
        .with_context(|| format!("cannot run {}", args.command.join(" ")))?;
    let Some(failed) = failed else { return Ok(ExitCode::SUCCESS) };
    // A runner that a signal ended has no status.
    Ok(failed.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
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
