//! `umbra run`: a machine from a file, or one guest from flags.

use std::path::PathBuf;

use anyhow::{Context, bail};

use super::exit::{self, Exit};
use crate::config::metrics_address::Address;
use crate::config::{Console, Driver, Guest, GuestDisk, Machine, MemorySize, Net};
use crate::record::archive;
use crate::record::events::Verbosity;
use crate::record::file;
use crate::supervisor::front::notify::Notify;
use crate::supervisor::start::rundir;
use crate::supervisor::{self, MachineFile, Options, Until};

/// Arguments of `umbra run`.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "umbra run [OPTIONS] MACHINE.toml\n       umbra run [OPTIONS] --kernel KERNEL [--initrd INITRD] \
        [--disk DISK] [--tap TAP] ...",
    after_help = "Examples:\n  umbra run machine.toml\n  umbra run --kernel vmlinuz --initrd initrd.img --disk debian.raw --tap tap0 \
                  --cmdline 'console=ttyS0 root=/dev/vda1'\n  umbra run --kernel vmlinuz --initrd initrd.img \
                  --nic 0000:03:00.0 --image images/e1000e\n\n\
                  With flags, the guest's console is on this terminal; Ctrl-A x leaves."
)]
pub struct Args {
    /// The machine file (docs/configuration.md).
    #[arg(value_name = "MACHINE.toml", conflicts_with_all = ["kernel", "initrd", "cmdline", "disk", "disk_read_only", "tap",
        "memory", "cpus", "passthrough", "nic", "image", "console"])]
    machine: Option<PathBuf>,
    /// The machine's name, for `umbra status` and the run directory; the file's name without `.toml` if not given.
    #[arg(long)]
    name: Option<String>,
    /// Do not print events.
    #[arg(long, short)]
    quiet: bool,
    /// Add events to this file, one JSON object a line (docs/events.md); each run's first has the number 1.
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Serve metrics there: a socket's path, or a loopback address as 127.0.0.1:9464 (docs/observe.md).
    #[arg(long, value_name = "PLACE")]
    metrics: Option<Address>,
    /// Run on when all guests have ended, until `umbra stop`: they can be started again (`umbra start GUEST`).
    #[arg(long, conflicts_with = "prepare")]
    keep: bool,
    /// Start no guest: make the snapshots from which the driver VMs will be restored (docs/standby.md), and end. For before a first
    /// start, and after an upgrade of Umbra or of the host's kernel. The devices must be free, as for any run.
    #[arg(long, conflicts_with = "check")]
    prepare: bool,
    /// Bind the machine's devices to vfio-pci first, as `umbra bind` does; what the host uses is not taken.
    #[arg(long, conflicts_with = "check")]
    bind: bool,
    /// Check the machine's text, print the machine with its defaults, and start nothing.
    #[arg(long)]
    check: bool,
    /// With --check: whether this host has what the machine needs, as `umbra doctor MACHINE.toml` says it.
    #[arg(long, requires = "check")]
    host: bool,
    #[command(flatten)]
    guest: GuestArgs,
}

/// One guest, from flags.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "A guest from flags, in place of a file")]
struct GuestArgs {
    /// Kernel: a bzImage or an unpacked vmlinux.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Initial RAM disk; may be given several times.
    #[arg(long, requires = "kernel")]
    initrd: Vec<PathBuf>,
    /// Kernel command line [default: console=ttyS0].
    #[arg(long, requires = "kernel")]
    cmdline: Option<String>,
    /// Disk: a raw image or a block device; may be given several times.
    #[arg(long, requires = "kernel")]
    disk: Vec<PathBuf>,
    /// Disk that the guest cannot write to; comes behind those of --disk.
    #[arg(long, value_name = "DISK", requires = "kernel")]
    disk_read_only: Vec<PathBuf>,
    /// Network device on a TAP interface of the host; may be given several times.
    #[arg(long, requires = "kernel")]
    tap: Vec<String>,
    /// Memory, as 512M or 2G [default: 512M].
    #[arg(long, requires = "kernel")]
    memory: Option<MemorySize>,
    /// Number of vCPUs [default: 1].
    #[arg(long, requires = "kernel")]
    cpus: Option<u8>,
    /// Give this PCI function straight to the guest (no driver VM); may be given several times.
    #[arg(long, value_name = "BDF", requires = "kernel")]
    passthrough: Vec<String>,
    /// Network device on the NIC at this PCI address, through a driver VM; may be given several times.
    #[arg(long, value_name = "BDF", requires_all = ["kernel", "image"])]
    nic: Vec<String>,
    /// The driver VM's image, from `umbra image`: one for all --nic, or one for each in order.
    #[arg(long, value_name = "DIR", requires = "nic")]
    image: Vec<PathBuf>,
    /// Write the guest's console to this file in place of the terminal.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    console: Option<PathBuf>,
}

/// Name of the guest that flags describe, and of its machine if no other is given.
const GUEST: &str = "guest";

/// Runs the machine to its end.
///
/// # Errors
///
/// It could not be started, or a guest ended badly.
pub fn run(args: Args) -> anyhow::Result<()> {
    let (mut machine, stem, file) = match args.machine {
        Some(path) => {
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            (Machine::read(&path)?, stem, Some(MachineFile { path, metrics: args.metrics.clone() }))
        }
        None => (args.guest.machine()?, GUEST.into(), None),
    };
    machine.metrics = args.metrics.or(machine.metrics);
    if args.host {
        return super::doctor::machine(&machine, false);
    }
    if args.check {
        return super::print(&machine.to_string());
    }
    if args.bind {
        super::bind::bind_machine(&machine)?;
    }
    let events =
        args.events.map(|path| file::open(&path).with_context(|| format!("open the events file {}", path.display())));
    supervisor::run(
        &machine,
        Options {
            name: args.name.unwrap_or(stem),
            base: rundir::base(),
            state: archive::base(),
            verbosity: if args.quiet { Verbosity::Quiet } else { Verbosity::Sentences },
            events: events.transpose()?,
            // The very program that runs now, even if the file has been replaced since.
            program: "/proc/self/exe".into(),
            host: supervisor::Host::default(),
            notify: Notify::from_env(),
            until: match (args.prepare, args.keep) {
                (true, _) => Until::Prepared,
                (false, true) => Until::Stopped,
                (false, false) => Until::GuestsEnd,
            },
            file,
        },
    )?;
    if args.prepare && !args.quiet {
        super::print("the snapshots of this machine's driver VMs are there: `umbra snapshots` lists them")?;
    }
    Ok(())
}

impl GuestArgs {
    /// The machine that the flags describe.
    fn machine(self) -> anyhow::Result<Machine> {
        let Some(kernel) = self.kernel else {
            let what = "give a machine file, or a guest with --kernel (`umbra run --help` has examples)";
            bail!(Exit::new(exit::USAGE, what.into()));
        };
        let (images, nics) = (self.image.len(), self.nic.len());
        if images > 1 && images != nics {
            let what = format!("{images} images for {nics} NICs: give --image once for all, or once for each --nic");
            bail!(Exit::new(exit::USAGE, what));
        }
        let mut guest = Guest::new(kernel);
        guest.initrd = self.initrd;
        guest.console = self.console.map_or(Console::Terminal, Console::File);
        guest.cmdline = self.cmdline.unwrap_or(guest.cmdline);
        guest.memory = self.memory.unwrap_or(guest.memory);
        guest.cpus = self.cpus.unwrap_or(guest.cpus);
        guest.passthrough = self.passthrough;
        guest.disk.extend(self.disk.into_iter().map(|path| GuestDisk::on_file(path, false)));
        guest.disk.extend(self.disk_read_only.into_iter().map(|path| GuestDisk::on_file(path, true)));
        guest.net.extend(self.tap.into_iter().map(|tap| Net { tap: Some(tap), ..Net::default() }));
        let mut machine = Machine::default();
        for (n, (nic, image)) in self.nic.into_iter().zip(self.image.iter().cycle()).enumerate() {
            let name = format!("nic{n}");
            guest.net.push(Net { driver: Some(name.clone()), ..Net::default() });
            machine.driver.insert(name, Driver::new(nic, image.clone()));
        }
        machine.guest.insert(GUEST.into(), guest);
        machine.check()?;
        Ok(machine)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        run: Args,
    }

    fn machine(words: &str) -> anyhow::Result<Machine> {
        let args = Cli::try_parse_from(["run"].into_iter().chain(words.split_whitespace()))?;
        args.run.guest.machine()
    }

    #[test]
    fn flags_describe_the_same_machine_as_a_file() {
        let words =
            "--kernel /k --initrd /i --disk /d --tap tap0 --memory 1G --cpus 2 --nic 0000:03:00.0 --image /e1000e";
        let file = "[guest.guest]\nkernel = \"/k\"\ninitrd = [\"/i\"]\nmemory = \"1G\"\ncpus = 2\nconsole = \"terminal\"\n\
                    disk = [{ path = \"/d\" }]\nnet = [{ tap = \"tap0\" }, { driver = \"nic0\" }]\n\
                    [driver.nic0]\ndevice = \"0000:03:00.0\"\nimage = \"/e1000e\"\n";
        assert_eq!(machine(words).unwrap(), Machine::parse(file, "m.toml".as_ref()).unwrap());
    }

    #[test]
    fn flags_are_checked_as_a_file_is() {
        for (words, what) in [
            ("", "give a machine file"),
            ("--kernel k --nic 03:00.0", "--image"),
            ("--kernel k --image i", "--nic"),
            ("--tap tap0", "--kernel"),
            ("--kernel k --memory lots", "no memory size"),
            ("--kernel k --cpus 0", "1 to 64 vCPUs"),
            ("--kernel k --nic 03:00.0 --nic 04:00.0 --nic 05:00.0 --image i --image j", "2 images for 3 NICs"),
            ("--kernel k --nic 03:00.0 --passthrough 0000:03:00.0 --image i", "is used by"),
            ("--kernel k m.toml", "cannot be used with"),
        ] {
            let error = machine(words).unwrap_err().to_string();
            assert!(error.contains(what), "{words}: {error}");
        }
    }
}
