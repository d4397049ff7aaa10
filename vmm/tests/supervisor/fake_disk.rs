//! The disk's part of the fake VMs: a guest with disks of driver VMs, and the disks that a driver VM's agent reports. What goes wrong is in
//! the kernel command lines, as in [`super::fake_vm`].

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use umbra_driver_vm::protocol::{BlockPlan, DiskPart, FromAgent};
use umbra_shadow::block::{Counts, Disk, Identity, ModeName, Window, WriteCache};
use umbra_shadow::{DeviceId, LinkId};
use umbra_vmm::base::time::Time;
use umbra_vmm::config::Console;
use umbra_vmm::wire::channel::{Channel, Incoming};
use umbra_vmm::wire::messages::{
    DeviceStatus, DiskBackend, FromVm, LinkEnd, OutageCounts, PortBackend, ToVm, VmEnd, VmSpec,
};

/// Sectors of the whole disk.
const SECTORS: u64 = 1 << 20;

/// The disks of this guest that driver VMs serve.
pub fn disks_of(spec: &VmSpec) -> Vec<DeviceId> {
    let split = (0..).zip(&spec.disks).filter(|(_, disk)| matches!(disk, DiskBackend::Split { .. }));
    split.map(|(n, _)| DeviceId::block(n)).collect()
}

/// Whether the VM with these ports is a driver VM of disks.
pub fn is_driver(ports: &[PortBackend]) -> bool {
    ports.iter().any(|port| port.name.starts_with("org.umbra.block."))
}

/// A guest: live as soon as a driver VM is there, masked when that is lost. Notes all that it is told in its console's file.
pub fn guest(spec: &VmSpec, channel: &Channel, disks: &[DeviceId]) {
    let Console::File(path) = &spec.console else { return };
    let mut log = OpenOptions::new().create(true).append(true).open(path).unwrap();
    writeln!(log, "disks: {:?}", spec.disks).unwrap();
    let mut links: Vec<(DeviceId, LinkId, OwnedFd)> = Vec::new();
    if spec.cmdline.contains("grows") {
        for _ in 0..3 {
            channel.send(&FromVm::Grown { device: DeviceId::block(0) }, &[]).unwrap();
        }
    }
    loop {
        let mut fds = vec![PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
        fds.extend(links.iter().map(|(.., fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        poll(&mut fds, 10_000_u16).unwrap();
        if let Some(lost) = fds[1..].iter().position(|fd| fd.any().unwrap()) {
            let (device, link, _) = links.remove(lost);
            lose(channel, device, link, LinkEnd::Closed);
            continue;
        }
        if !fds[0].any().unwrap() {
            continue;
        }
        let Incoming::Message(message, mut fds) = channel.receive::<ToVm>().unwrap() else { return };
        writeln!(log, "{message:?}").unwrap();
        match message {
            ToVm::Attach { device, link } => {
                let generation = link.generation;
                if spec.cmdline.contains(&format!("other-content={generation} ")) {
                    lose(channel, device, link, LinkEnd::OtherDisk("another disk: a block differs".into()));
                    continue;
                }
                links.push((device, link, fds.remove(0)));
                let again = generation.get() > 1;
                let counts = Counts { kept_in_flight: 2 * u64::from(again), ..Counts::default() };
                let (at, outage) = (Time::now().0, OutageCounts::Block(counts));
                channel.send(&FromVm::Live { device, generation, at, outage }, &[]).unwrap();
                if spec.cmdline.contains(&format!("suspects={link} ")) {
                    let (device, link, _) = links.pop().unwrap();
                    // The other guest is connected by then, and the agent has said what it has to say.
                    thread::sleep(Duration::from_millis(500));
                    lose(channel, device, link, LinkEnd::Suspect("an I/O error without a cause".into()));
                }
            }
            ToVm::Quiesce { .. } if spec.cmdline.contains("never-rests ") => {}
            ToVm::Quiesce { device } => {
                rest(spec, &mut log);
                let stable = !spec.cmdline.contains("cannot-rest ");
                channel.send(&FromVm::AtRest { device, stable }, &[]).unwrap();
            }
            ToVm::Resize { .. } if spec.cmdline.contains("never-resizes ") => {}
            ToVm::Resize { device, bytes } => {
                let wanted = bytes.filter(|_| !spec.cmdline.contains("grows-in-vain "));
                let result = wanted.ok_or_else(|| "it cannot be measured".into());
                channel.send(&FromVm::Resized { device, result }, &[]).unwrap();
            }
            ToVm::QueryStatus => {
                for device in disks {
                    let (kept_bytes, owed_bytes, pending, sums) = (4096, 0, 1, Counts::default());
                    let mode = if links.is_empty() { ModeName::Masking } else { ModeName::Passive };
                    let status = DeviceStatus::Block { mode, kept_bytes, owed_bytes, pending, sums };
                    channel.send(&FromVm::Status { device: *device, status }, &[]).unwrap();
                }
            }
            ToVm::Finish => {
                let (at, how) = (Time::now().0, VmEnd::Killed);
                channel.send(&FromVm::Ended { at, how, registers: String::new() }, &[]).unwrap();
                return;
            }
            ToVm::Nmi => channel.send(&FromVm::Panicked { at: Time::now().0 }, &[]).unwrap(),
            ToVm::PowerButton => {
                let (at, how) = (Time::now().0, VmEnd::PowerOff);
                channel.send(&FromVm::Ended { at, how, registers: String::new() }, &[]).unwrap();
                return;
            }
            _ => {}
        }
    }
}

/// Takes as long as a disk may.
fn rest(spec: &VmSpec, log: &mut File) {
    if spec.cmdline.contains("rests-slowly ") {
        thread::sleep(Duration::from_millis(300));
    }
    writeln!(log, "at rest").unwrap();
}

fn lose(channel: &Channel, device: DeviceId, link: LinkId, cause: LinkEnd) {
    channel.send(&FromVm::Lost { device, link, at: Time::now().0, cause }, &[]).unwrap();
}

/// What the agent of this life says of errors of its disks.
pub fn errors(told: impl Fn(&str) -> bool) -> impl Iterator<Item = FromAgent> {
    let errors = [(0, "errs-at-0"), (1, "errs-at-1")].into_iter().filter(move |(_, what)| told(what));
    errors.map(|(end, _)| FromAgent::DiskError { end, attempt: 1, errno: 5 })
}

/// What the agent of this life reports for `plan`.
pub fn report(spec: &VmSpec, plan: &BlockPlan, told: impl Fn(&str) -> bool) -> FromAgent {
    assert!(spec.cmdline.contains(" hugepages=8 "), "{}", spec.cmdline);
    println!("[    3.0] {} is to serve {plan:?}", spec.name);
    let disk = |(n, end): (usize, &umbra_driver_vm::protocol::BlockEnd)| {
        let other = told("other-disk") || told(&format!("other-disk-of-{n}"));
        let serial = if other { "another".into() } else { end.serial.clone().unwrap_or_else(|| "S1".into()) };
        let window = match end.part {
            DiskPart::Whole => Window { start: 0, sectors: SECTORS },
            DiskPart::Partition(n) => Window { start: u64::from(n) << 11, sectors: 1 << 11 },
            DiskPart::Range { start, sectors } => Window { start, sectors },
        };
        let logical_block = if told("odd-disks") { 700 } else { 512 };
        let identity = Identity { serial, sectors: SECTORS, logical_block, read_only: end.read_only, window };
        let cache = WriteCache::Volatile;
        Disk { identity, cache, physical_block: 4096, optimal_io: 0, discards: true, rotational: false }
    };
    let disks = plan.ends.iter().enumerate().map(disk).collect();
    FromAgent::Disks { driver: "nvme".into(), disks, uptime_ms: 3 }
}
