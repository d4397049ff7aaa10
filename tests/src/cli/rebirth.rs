//! `umbra-bench rebirth`.

use std::process::ExitCode;

use super::{say, write_json};
use crate::measure::rebirth::{self, RebirthSpec};

/// Arguments of `umbra-bench rebirth`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The NIC model: e1000e, rtl8139, igb. May be repeated.
    #[arg(long = "nic", value_name = "MODEL", default_value = "e1000e")]
    nics: Vec<String>,
    /// Failures of each kind.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(2..))]
    crashes: u32,
}

/// Runs the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut all = Vec::new();
    for nic in &args.nics {
        let measured = rebirth::run(&RebirthSpec { nic: nic.as_str().into(), crashes: args.crashes }, &say)?;
        print!("{}", measured.table());
        all.push(measured);
    }
    write_json("rebirth.json", &all)?;
    Ok(ExitCode::SUCCESS)
}
