//! `umbra-bench disks`.

use std::process::ExitCode;

use super::{say, write_json};
use crate::disks::database::Database;
use crate::disks::trial::{self, MODELS, ModelResult, TrialSpec, WriterKind};

/// Arguments of `umbra-bench disks`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// QEMU's models of controllers, with commas; all: those that are known to work.
    #[arg(long, value_name = "MODELS", default_value = "nvme", value_delimiter = ',')]
    models: Vec<String>,
    /// Crashes of each, all kinds in turns.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    crashes: u32,
    /// A database on ext4 in place of the checker: SQLite with this journal, or PostgreSQL. Rows are counted, not blocks.
    #[arg(long)]
    database: Option<Database>,
    /// fio in place of the checker: requests of 512 bytes to 1 MiB, verified by their checksums.
    #[arg(long, conflicts_with = "database")]
    fio: bool,
    /// The counter-check: the disks say that they have no volatile cache, and lose it all the same. Succeeds where a loss is found.
    #[arg(long, conflicts_with_all = ["database", "fio"])]
    hide_cache: bool,
}

/// Runs it; fails if something was lost, or a guest noticed something; with `--hide-cache` if no loss was noticed.
///
/// # Errors
/// The test host does not boot.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let all = args.models.iter().any(|model| model == "all");
    let models = if all { MODELS.map(str::to_owned).to_vec() } else { args.models.clone() };
    let writer = match args.database {
        Some(database) => WriterKind::Database(database),
        None if args.fio => WriterKind::Fio,
        None => WriterKind::Checker,
    };
    let hides_cache = args.hide_cache;
    let results = trial::run(&TrialSpec { models, crashes: args.crashes, writer, hides_cache }, &say)?;
    println!("{}", ModelResult::head());
    results.iter().for_each(|result| println!("{}", result.line()));
    write_json("disks.json", &results)?;
    let is_as_wanted = if hides_cache { ModelResult::has_a_loss } else { ModelResult::is_sound };
    Ok(if results.iter().all(is_as_wanted) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
