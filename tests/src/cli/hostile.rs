//! `umbra-bench hostile`.

use std::process::ExitCode;

use super::{say, write_json};
use crate::hostile::campaign::{self, Attacker, HostileSpec};

/// Arguments of `umbra-bench hostile`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Who attacks: the driver VM of another NIC, or a guest that shares a NIC with the honest one.
    #[arg(long, value_enum, default_value_t = Attacker::DriverVm)]
    by: Attacker,
    /// The model of the attacked NIC: rtl8139, e1000e, igb.
    #[arg(long, value_name = "MODEL", default_value = "rtl8139")]
    nic: String,
    /// Time for which lives attack.
    #[arg(long, default_value_t = 600)]
    seconds: u32,
    /// Determines what each life does.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs it; fails if an attacker achieved something.
///
/// # Errors
/// It could not be run to its end.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let spec = HostileSpec { by: args.by, nic: args.nic.as_str().into(), seconds: args.seconds, seed: args.seed };
    let result = campaign::run(&spec, &say)?;
    println!("{}", result.table());
    write_json("hostile.json", &result)?;
    Ok(if result.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
