//! `umbra image`: builds a driver VM image from a kernel package or the running system's kernel, or just unpacks a
//! kernel. Says what it took and how large the result is. With `--renew`, builds the images of machines again ([`renew`]).

mod renew;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use umbra_guest_images::cache::Cache;
use umbra_guest_images::image::{Device, Image, Recipe};
use umbra_guest_images::kernel::{Kernel, cached_vmlinux};

use super::exit::{self, Exit};
use crate::base::pci_address::Bdf;
use crate::base::untrusted_text::{block, json};
use crate::host::HostDevice;

/// Name of the agent's binary.
const AGENT: &str = "umbra-agent";
/// Name of the sound service's binary.
const SOUND_SERVICE: &str = "umbra-sound";
/// Where firmware is, besides the kernel's own package.
const SYSTEM_FIRMWARE: &str = "/lib/firmware";

/// Build a driver VM image for a device or a driver, or unpack a kernel.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(after_help = "Examples:
  umbra image --pci 0000:01:00.0 -o nic0.image            the running kernel, the driver of that device
  umbra image --driver e1000e --kernel-deb linux-image-6.12.deb -o nic0.image
  umbra image --pci 0000:02:00.0 -o disk0.image           a controller of disks, and the drivers of the disks behind it
  umbra image --vmlinux /boot/vmlinuz-6.12.0 -o vmlinux   only unpack a kernel
  umbra image --renew /etc/umbra/web.toml                 build its images again, of the kernel that runs now")]
pub struct Args {
    /// PCI function whose driver is taken, as 0000:01:00.0; may be repeated
    #[arg(long, value_name = "ADDRESS")]
    pub pci: Vec<Bdf>,
    /// Driver (kernel module) to take, as e1000e; may be repeated
    #[arg(long, value_name = "MODULE")]
    pub driver: Vec<String>,
    /// Debian package with the kernel; repeat it where image and modules are packaged apart [default: the running
    /// kernel, from /boot and /lib/modules]
    #[arg(long, value_name = "FILE")]
    pub kernel_deb: Vec<PathBuf>,
    /// Unpacked folder with the kernel (boot/vmlinuz-*, lib/modules/*)
    #[arg(long, value_name = "DIR", conflicts_with = "kernel_deb")]
    pub kernel_dir: Option<PathBuf>,
    /// Release of an installed kernel, as 6.12.0-1-amd64 [default: the running one]
    #[arg(long, value_name = "RELEASE", conflicts_with_all = ["kernel_deb", "kernel_dir", "vmlinux"])]
    pub release: Option<String>,
    /// The agent's binary [default: umbra-agent beside this program]
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,
    /// The sound service's binary, for sound cards [default: umbra-sound beside this program]
    #[arg(long, value_name = "FILE")]
    pub sound_service: Option<PathBuf>,
    /// Folder with firmware files, searched before /lib/firmware; may be repeated
    #[arg(long, value_name = "DIR")]
    pub firmware: Vec<PathBuf>,
    /// Only unpack vmlinux from this bzImage to the output file
    #[arg(long, value_name = "BZIMAGE",
          conflicts_with_all = ["pci", "driver", "kernel_deb", "kernel_dir", "agent", "firmware"])]
    pub vmlinux: Option<PathBuf>,
    /// Build the images of this machine's driver VMs again, those of the system's kernel; may be repeated
    #[arg(long, value_name = "MACHINE.toml",
          conflicts_with_all = ["pci", "driver", "kernel_deb", "kernel_dir", "firmware", "vmlinux", "json", "output"])]
    pub renew: Vec<PathBuf>,
    /// Where the result goes: a folder, or a file with --vmlinux
    #[arg(short, long, value_name = "PATH", required_unless_present = "renew")]
    pub output: Option<PathBuf>,
    /// Print what is in the image as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// One chain that says what is missing or wrong and what to do.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let cache = Cache::of_user();
    if !args.renew.is_empty() {
        return renew::machines(args, &cache);
    }
    let Some(output) = &args.output else { bail!("say where the result goes: --output PATH") };
    if let Some(image) = &args.vmlinux {
        return unpack(image, output, &cache);
    }
    if args.pci.is_empty() && args.driver.is_empty() {
        let what = "say for what: --pci ADDRESS (as 0000:01:00.0) or --driver MODULE (as e1000e)";
        bail!(Exit::new(exit::USAGE, what.into()));
    }
    if let Some(folder) = args.firmware.iter().find(|folder| !folder.is_dir()) {
        bail!("there is no folder {} with firmware", folder.display());
    }
    let devices = args.pci.iter().map(|address| device(*address)).collect::<anyhow::Result<_>>()?;
    let agent = agent(args.agent.as_deref())?;
    let source = source_of(&args.kernel_deb, args.kernel_dir.as_deref());
    let kernel = match (&args.kernel_deb[..], &args.kernel_dir) {
        ([], None) => Kernel::installed(Path::new("/"), args.release.as_deref(), &cache)?,
        ([], Some(dir)) => Kernel::from_dir(dir, &cache)?,
        (packages, _) => Kernel::from_debs(packages, &cache)?,
    };
    let mut firmware = args.firmware.clone();
    firmware.push(SYSTEM_FIRMWARE.into());
    let sound = sound_service(args.sound_service.as_deref())?;
    let recipe = Recipe { kernel, drivers: args.driver.clone(), devices, agent, sound, firmware };
    let image = recipe.build(output, &cache)?;
    if args.json {
        print(&json(&serde_json::to_string_pretty(&image.manifest)?))
    } else {
        // Names in it are the package's.
        print(&block(&report(&image, &source, &recipe.agent, output)?))
    }
}

fn unpack(image: &Path, output: &Path, cache: &Cache) -> anyhow::Result<()> {
    let vmlinux = cached_vmlinux(image, cache)?;
    let bytes = umbra_guest_images::files::read(&vmlinux)?;
    umbra_guest_images::files::write_atomically(output, &bytes)?;
    print(&format!("{}: {}, from {}", output.display(), size(bytes.len() as u64), image.display()))
}

/// Looks a PCI function up in sysfs.
fn device(address: Bdf) -> anyhow::Result<Device> {
    let device = HostDevice::find(address)?;
    if let Some(why) = device.unserved_as(true) {
        bail!("{address} {}", why.why());
    }
    Ok(Device { name: address.to_string(), modalias: device.modalias()? })
}

fn agent(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = given {
        if !path.is_file() {
            bail!("there is no agent at {}", path.display());
        }
        return Ok(path.into());
    }
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let beside = program.with_file_name(AGENT);
    if !beside.is_file() {
        bail!(
            "the driver VM's agent is not at {}; build it (`cargo build --release -p umbra-driver-vm`) or name it with \
             --agent",
            beside.display()
        );
    }
    Ok(beside)
}

fn sound_service(given: Option<&Path>) -> anyhow::Result<Option<PathBuf>> {
    if let Some(path) = given {
        if !path.is_file() {
            bail!("there is no sound service at {}", path.display());
        }
        return Ok(Some(path.into()));
    }
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    Ok(Some(program.with_file_name(SOUND_SERVICE)).filter(|beside| beside.is_file()))
}

fn source_of(packages: &[PathBuf], dir: Option<&Path>) -> String {
    match dir {
        Some(dir) => dir.display().to_string(),
        None if packages.is_empty() => "the running system".into(),
        None => packages.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "),
    }
}

fn report(image: &Image, source: &str, agent: &Path, output: &Path) -> anyhow::Result<String> {
    let manifest = &image.manifest;
    let mut text = String::new();
    writeln!(text, "kernel    {} from {source}", manifest.kernel)?;
    for device in &manifest.devices {
        writeln!(text, "device    {} ({})", device.name, device.modalias)?;
    }
    writeln!(text, "driver    {}", manifest.drivers.join(", "))?;
    let modules: Vec<_> = manifest.modules.iter().map(|m| m.name.as_str()).collect();
    let sum = manifest.modules.iter().map(|m| m.size).sum();
    writeln!(text, "modules   {} ({})", modules.join(" "), size(sum))?;
    let firmware = if manifest.firmware.is_empty() { "none".into() } else { manifest.firmware.join(" ") };
    writeln!(text, "firmware  {firmware}")?;
    if !manifest.firmware_missing.is_empty() {
        let missing = manifest.firmware_missing.join(" ");
        writeln!(text, "          not found, the driver may do without: {missing}")?;
    }
    let agent_size = fs::metadata(agent).map_or(0, |meta| meta.len());
    writeln!(text, "agent     {} ({})", agent.display(), size(agent_size))?;
    let (vmlinux, initramfs) = (manifest.vmlinux.size, manifest.initramfs.size);
    write!(
        text,
        "image     {}: {} (vmlinux {}, initramfs {})",
        output.display(),
        size(vmlinux + initramfs),
        size(vmlinux),
        size(initramfs)
    )?;
    Ok(text)
}

/// A size for people.
pub(super) fn size(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    let with_tenths = |unit, name| format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit);
    match bytes {
        GIB.. => with_tenths(GIB, "GiB"),
        MIB..GIB => with_tenths(MIB, "MiB"),
        _ => format!("{} KiB", bytes.div_ceil(1024)),
    }
}

/// Prints one answer; a closed pipe is an error, not a panic.
fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    writeln!(std::io::stdout(), "{text}").context("cannot write to standard output")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(1), "1 KiB");
        assert_eq!(size((3 << 20) + (1 << 19)), "3.5 MiB");
        assert_eq!(size(2 << 30), "2.0 GiB");
    }

    #[test]
    fn an_address_is_read_as_everywhere_else() {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            image: Args,
        }
        let pci = |address| Cli::try_parse_from(["image", "-o", "x", "--pci", address]).map(|cli| cli.image.pci);
        for wrong in ["eth0", "../../etc", "0000:01:00.0/.."] {
            assert!(pci(wrong).unwrap_err().to_string().contains("is no PCI address"), "{wrong}");
        }
        let addresses = ["FFFF:FF:1F.7", "0a:00.0"].map(|address| pci(address).unwrap()[0].to_string());
        assert_eq!(addresses, ["ffff:ff:1f.7", "0000:0a:00.0"], "as sysfs writes them");
        let error = device(pci("FFFF:FF:1F.7").unwrap()[0]).unwrap_err().to_string();
        assert!(error.contains("no PCI device ffff:ff:1f.7"), "{error}");
    }

    #[test]
    fn a_folder_of_firmware_that_is_not_there_is_told() {
        let args = Args { output: Some("x".into()), driver: vec!["e1000e".into()], ..Args::default() };
        let error = run(&Args { firmware: vec!["/no/such/folder".into()], ..args }).unwrap_err().to_string();
        assert_eq!(error, "there is no folder /no/such/folder with firmware");
    }

    #[test]
    fn nothing_asked_for_says_what_can_be() {
        let error = run(&Args { output: Some("x".into()), ..Args::default() }).unwrap_err();
        assert!(error.to_string().contains("--pci"));
    }
}
