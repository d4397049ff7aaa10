//! `umbra-bench compare`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{say, write_json};
use crate::demo::attempts;
use crate::measure::compare::{self, Build, CompareSpec};

/// Arguments of `umbra-bench compare`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Folders with `umbra`, `umbra-agent`, `umbra-probe` and `umbra-sound`, one for each build; the first is what the others are
    /// compared with. `FOLDER:LINE` adds a line to its driver VM in the machine file, as `new:cmdline = "init_on_alloc=1"`.
    #[arg(required = true, num_args = 2..=6, value_name = "FOLDER[:LINE]")]
    builds: Vec<String>,
    /// The NIC model: e1000e, rtl8139, igb.
    #[arg(long = "nic", value_name = "MODEL", default_value = "e1000e")]
    nic: String,
    /// Rounds; every other one in reversed order.
    #[arg(long, default_value_t = 4)]
    rounds: u32,
    /// Seconds for each transfer.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
}

/// Runs the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let build = |text: &String| {
        let (folder, line) = text.split_once(':').unwrap_or((text, ""));
        Build { folder: PathBuf::from(folder), line: line.into() }
    };
    let spec = CompareSpec {
        builds: args.builds.iter().map(build).collect(),
        nic: args.nic.as_str().into(),
        rounds: args.rounds,
        seconds: args.seconds,
    };
    let results = attempts::in_test_host(&say, |_| true, |_| compare::run(&spec, &say))?;
    print!("{}", results.table());
    write_json("compare.json", &results)?;
    Ok(ExitCode::SUCCESS)
}
