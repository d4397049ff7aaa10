//! `umbra-bench rebirth`.

use std::process::ExitCode;

use super::{say, write_json};
use crate::measure::rebirth::{self, Device, RebirthSpec};

/// Arguments of `umbra-bench rebirth`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The NIC model: e1000e, rtl8139, igb. May be repeated; e1000e if no device is named.
    #[arg(long = "nic", value_name = "MODEL")]
    nics: Vec<String>,
    /// A sound card's model: hda, es1370, ac97. May be repeated.
    #[arg(long = "sound", value_name = "MODEL")]
    cards: Vec<String>,
    /// Failures of each kind.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(2..))]
    crashes: u32,
    /// VMs' processes have control groups, with their bounds.
    #[arg(long)]
    cgroups: bool,
}

/// Runs the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let nics = args.nics.iter().map(|nic| Device::Nic(nic.as_str().into()));
    let mut devices: Vec<_> = nics.chain(args.cards.iter().map(|card| Device::Card(card.as_str().into()))).collect();
    if devices.is_empty() {
        devices.push(Device::Nic("e1000e".into()));
    }
    let mut all = Vec::new();
    for device in devices {
        let measured = rebirth::run(&RebirthSpec { device, crashes: args.crashes, cgroups: args.cgroups }, &say)?;
        print!("{}", measured.table());
        all.push(measured);
    }
    write_json("rebirth.json", &all)?;
    Ok(ExitCode::SUCCESS)
}
