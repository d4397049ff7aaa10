//! `umbra-bench demo`.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;

use crate::assets::target_dir;
use crate::demo::{self, DemoSpec, hardware::Wire};

/// Arguments of `umbra-bench demo`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The NIC model in the bench: e1000e, rtl8139, igb, e1000.
    #[arg(long, default_value = "e1000e", value_name = "MODEL")]
    nic: String,
    /// How often each driver VM is crashed; from 20 on with kill -9 and a crash during replay, from 40 on by all kinds of
    /// failures in turn.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=200))]
    crashes: u32,
    /// Have the next failure come so many seconds after a recovery, and not wait for a standby.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=60))]
    every: Option<u64>,
    /// Size of the download, MiB.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=4096))]
    mib: u64,
    /// The sound card that a song is played on meanwhile: hda, es1370, ac97, none. Not with --pci.
    #[arg(long, default_value = "hda", value_name = "MODEL")]
    sound: String,
    /// A disk controller on which a database commits meanwhile, and whose cache is lost at each crash of its driver VM: nvme, ich9-ahci,
    /// none. Not with --pci.
    #[arg(long, default_value = "none", value_name = "MODEL")]
    disk: String,
    /// Use this NIC of this machine instead of the bench.
    #[arg(long, value_name = "ADDRESS")]
    pci: Option<String>,
    /// With --pci: the guest's address and prefix length, as 192.168.1.77/24.
    #[arg(long, default_value = "dhcp", value_name = "IP", requires = "pci")]
    guest: String,
    /// With --pci: this machine's address as the guest reaches it; that of the default route when not given.
    #[arg(long, value_name = "IP", requires = "pci")]
    peer: Option<Ipv4Addr>,
}

/// Runs the demo.
///
/// # Errors
/// It could not be run to its end.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let hardware = match &args.pci {
        None => None,
        Some(pci) => {
            let own =
                || own_address().context("this machine has no address that a guest could reach; name one: --peer IP");
            let peer = args.peer.map_or_else(own, Ok)?;
            Some(Wire { pci: pci.clone(), guest: args.guest.clone(), peer })
        }
    };
    let sound = (hardware.is_none() && args.sound != "none").then(|| args.sound.as_str().into());
    let disk = (hardware.is_none() && args.disk != "none").then(|| args.disk.as_str().into());
    let spec = DemoSpec {
        nic: args.nic.as_str().into(),
        crashes: args.crashes,
        pause: args.every.map(Duration::from_secs),
        bytes: args.mib << 20,
        sound,
        disk,
        hardware,
    };
    let dir = target_dir().join("demo");
    let say = |line: &str| println!("{line}");
    let Ok(result) = demo::run_attempts(&spec, &dir, &say) else { return Ok(ExitCode::FAILURE) };
    println!("written to {}", dir.join("result.json").display());
    Ok(if result.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The address that this machine would speak from to the world. Nothing is sent.
fn own_address() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(address) if !address.is_unspecified() => Some(address),
        _ => None,
    }
}
