//! `umbra-bench disks`.

use std::process::ExitCode;

use super::{say, write_json};
use crate::disks::trial::{self, MODELS, ModelResult, TrialSpec};

/// Arguments of `umbra-bench disks`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// QEMU's models of controllers, with commas; all: those that are known to work.
    #[arg(long, value_name = "MODELS", default_value = "nvme", value_delimiter = ',')]
    models: Vec<String>,
    /// Crashes of each, all kinds in turns.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    crashes: u32,
}

/// Runs it; fails if something was lost, or a guest noticed something.
///
/// # Errors
/// The test host does not boot.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let all = args.models.iter().any(|model| model == "all");
    let models = if all { MODELS.map(str::to_owned).to_vec() } else { args.models.clone() };
    let results = trial::run(&TrialSpec { models, crashes: args.crashes }, &say)?;
    println!("{}", ModelResult::head());
    results.iter().for_each(|result| println!("{}", result.line()));
    write_json("disks.json", &results)?;
    Ok(if results.iter().all(ModelResult::is_sound) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
