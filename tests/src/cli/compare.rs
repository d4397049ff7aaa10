//! `umbra-bench compare`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{say, write_json};
use crate::demo::attempts;
use crate::measure::compare::{self, Build, CompareSpec, Device};

/// Arguments of `umbra-bench compare`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Folders with `umbra`, `umbra-agent`, `umbra-probe` and `umbra-sound`, one for each build; the first is what the others are
    /// compared with. `FOLDER:LINE` adds a line to its driver VM in the machine file, as `new:cmdline = "init_on_alloc=1"`;
    /// `FOLDER:disk:LINE` to its guest's disk, as `new:disk:cache = "through"`.
    #[arg(required = true, num_args = 2..=6, value_name = "FOLDER[:LINE]")]
    builds: Vec<String>,
    /// The NIC model: e1000e, rtl8139, igb.
    #[arg(long = "nic", value_name = "MODEL", default_value = "e1000e")]
    nic: String,
    /// Disk controllers of this model in place of NICs: nvme, ich9-ahci, ...
    #[arg(long, value_name = "MODEL", conflicts_with = "nic")]
    disk: Option<String>,
    /// The disks are those of the test host's own driver, without a driver VM.
    #[arg(long, requires = "disk")]
    host_driver: bool,
    /// The disks say that they have no volatile cache, and flushes cost nothing.
    #[arg(long, requires = "disk")]
    hide_cache: bool,
    /// Rounds; every other one in reversed order.
    #[arg(long, default_value_t = 4)]
    rounds: u32,
    /// Seconds for each transfer.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Crashes of each driver VM after the rounds, for outages with a ready standby.
    #[arg(long, default_value_t = 0, conflicts_with = "host_driver")]
    crashes: u32,
}

impl Args {
    fn device(&self) -> Device {
        match &self.disk {
            None => Device::Nic(self.nic.as_str().into()),
            Some(disk) if self.host_driver => Device::HostDisk(disk.as_str().into()),
            Some(disk) => Device::Disk(disk.as_str().into()),
        }
    }
}

/// Runs the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let build = |text: &String| {
        let (folder, line) = text.split_once(':').unwrap_or((text, ""));
        let disk_line = line.strip_prefix("disk:");
        let driver_line = if disk_line.is_some() { "" } else { line };
        let (driver_line, disk_line) = (driver_line.into(), disk_line.unwrap_or_default().into());
        Build { folder: PathBuf::from(folder), driver_line, disk_line }
    };
    let spec = CompareSpec {
        builds: args.builds.iter().map(build).collect(),
        device: args.device(),
        hides_cache: args.hide_cache,
        rounds: args.rounds,
        seconds: args.seconds,
        crashes: args.crashes,
    };
    let results = attempts::in_test_host(&say, |_| true, |_| compare::run(&spec, &say))?;
    print!("{}", results.table());
    write_json("compare.json", &results)?;
    Ok(ExitCode::SUCCESS)
}
