//! `umbra-bench measure-disk`.

use std::process::ExitCode;

use super::{say, write_json};
use crate::measure::disk::{self, DiskSpec};

/// Arguments of `umbra-bench measure-disk`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The controller's model: nvme, ich9-ahci, virtio-blk-pci. May be repeated.
    #[arg(long = "disk", value_name = "MODEL", default_value = "nvme")]
    disks: Vec<String>,
    /// Seconds for each measurement.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// How often each path is measured; the order is reversed each time. 0: outages alone.
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Crashes for the outage figures.
    #[arg(long, default_value_t = 5)]
    crashes: u32,
}

/// Runs the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut all = Vec::new();
    for model in &args.disks {
        let spec =
            DiskSpec { disk: model.as_str().into(), seconds: args.seconds, rounds: args.rounds, crashes: args.crashes };
        let figures = disk::run(&spec, &say)?;
        print!("{}", figures.table());
        all.push(figures);
    }
    write_json("disks.json", &all)?;
    Ok(ExitCode::SUCCESS)
}
