//! `umbra-bench measure`.

use std::process::ExitCode;

use super::{say, write_json};
use crate::demo::attempts;
use crate::measure::{self, MeasureSpec};

/// Arguments of `umbra-bench measure`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The NIC model: e1000e, rtl8139, igb. May be repeated.
    #[arg(long = "nic", value_name = "MODEL", default_value = "e1000e")]
    nics: Vec<String>,
    /// Rounds of all paths; every other one in reversed order.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds for each transfer.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Crashes for the outage figures.
    #[arg(long, default_value_t = 3)]
    crashes: u32,
    /// Also look for the smallest memory that the driver VM boots in (takes a few minutes).
    #[arg(long)]
    smallest: bool,
}

/// Runs the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut all = Vec::new();
    for nic in &args.nics {
        let spec = MeasureSpec {
            nic: nic.as_str().into(),
            rounds: args.rounds,
            seconds: args.seconds,
            crashes: args.crashes,
            smallest: args.smallest,
        };
        let results = attempts::in_test_host(&say, |_| true, |_| measure::run(&spec, &say))?;
        print!("{}", results.table());
        all.push(results);
    }
    write_json("results.json", &all)?;
    Ok(ExitCode::SUCCESS)
}
