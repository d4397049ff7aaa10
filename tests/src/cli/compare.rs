//! `umbra-bench compare`.

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
    let spec = CompareSpec {
        builds: args.builds.iter().map(|text| build(text)).collect(),
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

/// A build, and the line for its driver VM or its guest's disk.
fn build(text: &str) -> Build {
    let (folder, line) = text.split_once(':').unwrap_or((text, ""));
    let (driver_line, disk_line) = line.strip_prefix("disk:").map_or((line, ""), |line| ("", line));
    Build { folder: folder.into(), driver_line: driver_line.into(), disk_line: disk_line.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_the_driver_vm_s_unless_it_says_otherwise() {
        let lines = |text| (build(text).driver_line, build(text).disk_line);
        let of = |driver: &str, disk: &str| (driver.to_owned(), disk.to_owned());
        assert_eq!(lines("new"), of("", ""));
        assert_eq!(lines("new:cmdline = \"a:b\""), of("cmdline = \"a:b\"", ""));
        assert_eq!(lines("new:disk:cache = \"through\""), of("", "cache = \"through\""));
        assert_eq!(build("new:disk:x").folder, std::path::Path::new("new"));
    }
}
