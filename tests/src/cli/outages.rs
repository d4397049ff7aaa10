//! `umbra-bench outages`.

use std::process::ExitCode;

use super::{say, write_json};
use crate::measure::outages::{self, OutagesSpec};

/// Arguments of `umbra-bench outages`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The NIC model: e1000e, rtl8139, igb. May be repeated.
    #[arg(long = "nic", value_name = "MODEL", default_value = "e1000e")]
    nics: Vec<String>,
    /// Crashes of each.
    #[arg(long, default_value_t = 30)]
    crashes: u32,
    /// Bare re-initialisations of each.
    #[arg(long, default_value_t = 10)]
    reinits: u32,
    /// `warm`, `snapshot` or `cold`.
    #[arg(long, default_value = "warm")]
    standby: String,
    /// `kill -9` of the driver VM's process in place of a kernel panic.
    #[arg(long)]
    kill: bool,
    /// A hot spare of this model, on the same network: the driver VM of each NIC is crashed with it armed.
    #[arg(long, value_name = "MODEL", conflicts_with = "standby")]
    spare: Option<String>,
}

/// Runs the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut all = Vec::new();
    for nic in &args.nics {
        let spec = OutagesSpec {
            nic: nic.as_str().into(),
            crashes: args.crashes,
            reinits: args.reinits,
            standby: args.standby.clone(),
            kill: args.kill,
            spare: args.spare.as_deref().map(Into::into),
        };
        let outages = outages::run(&spec, &say)?;
        print!("{}", outages.table());
        all.push(outages);
    }
    write_json("outages.json", &all)?;
    Ok(ExitCode::SUCCESS)
}
