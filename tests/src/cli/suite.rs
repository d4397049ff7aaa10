//! `umbra-bench suite`.

use std::process::ExitCode;

use anyhow::Context;

use crate::assets::target_dir;
use crate::suite;

/// Arguments of `umbra-bench suite`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Arguments of a second run of the runner, at the same time, as `--beside "--test braked"`.
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true)]
    beside: Option<String>,
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
    let beside = args.beside.as_deref().map(|more| beside(&args.command, more)).unwrap_or_default();
    let status = suite::run(&args.command, &beside, &attempts)
        .with_context(|| format!("cannot run {}", args.command.join(" ")))?;
    // A runner that a signal ended has no status.
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The runner with `more` arguments before those of the tests themselves.
fn beside(command: &[String], more: &str) -> Vec<String> {
    let tests = command.iter().position(|argument| argument == "--").unwrap_or(command.len());
    let more = more.split_whitespace().map(str::to_owned);
    command[..tests].iter().cloned().chain(more).chain(command[tests..].iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_of_the_second_run_come_before_those_of_the_tests() {
        let command: Vec<String> = ["cargo", "test", "--", "--test-threads=1"].map(Into::into).into();
        let expected = ["cargo", "test", "--test", "braked", "--", "--test-threads=1"];
        assert_eq!(beside(&command, "--test braked"), expected);
        assert_eq!(beside(&command[..2], "--test braked"), expected[..4]);
    }
}
