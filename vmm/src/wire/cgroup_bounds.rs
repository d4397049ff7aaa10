//! What the process of a VM may take of the host where it has a control group of its own: enough for all that it does, so that only one
//! that has got out of hand, or was taken over, meets the bounds.

use std::path::PathBuf;
use std::thread;

use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};

use super::vm_spec::{DiskBackend, NetBackend, VmSpec};
use crate::base::cgroup::{Bounds, Group};
use crate::config::CpuMax;

/// Memory of each process beside its VM's, bytes: program, heap, stacks, buffers, and the cache of files that it reads or writes once
/// (kernel, initial RAM disk, snapshot), which the kernel takes back first. 256 MiB: a hundred times what a driver VM was seen to take
/// without such a cache.
const PROCESS: u64 = 256 << 20;
/// A VM's memory is this many times what the kernel needs to map it: page tables of process, KVM and IOMMU. 16: with pages of 4 KiB, and
/// KVM's own tables in place of the processor's, it is some 30.
const MAPPED: u64 = 16;
/// Cache of a guest's disks on files, bytes. Beyond it the kernel takes back what was read, and lets writes wait for the disk: 1 GiB, of
/// which it has a fifth wait to be written.
const CACHE: u64 = 1 << 30;
/// What the shadow of a disk keeps of writes, at most (`umbra_shadow::block::Limits`), with as much for what is under way.
const SHADOW: u64 = 128 << 20;

/// Threads of each process beside those of its vCPUs and devices.
const THREADS: u32 = 64;
/// Threads of a device: two of a disk, one for each link that is being set up, of lives that serve, wait and end.
const THREADS_OF_DEVICE: u32 = 8;

/// The file system of an initial RAM disk (`RAMFS_MAGIC`).
const RAMFS: FsType = FsType(0x8584_58f6);

/// The bounds of the process of `spec`, whose VM may have `cpu_max` of the processors.
pub fn of(spec: &VmSpec, cpu_max: Option<CpuMax>) -> Bounds {
    let mut memory = spec.memory.0 + spec.memory.0 / MAPPED + PROCESS;
    // Memory is counted for whoever touches a page first: here what is a driver VM's.
    for net in &spec.nets {
        if let NetBackend::Split { driver_memory, .. } = net {
            memory += driver_memory.0;
        }
    }
    for disk in &spec.disks {
        if let DiskBackend::Split { driver_memory, .. } = disk {
            memory += driver_memory.0 + SHADOW;
        }
    }
    if spec.disks.iter().any(|disk| matches!(disk, DiskBackend::File(_))) {
        memory += CACHE;
    }
    if spec.snapshot_of.is_some() {
        // Where snapshots are kept in memory.
        memory += spec.memory.0;
    }
    let devices = spec.disks.len() + spec.nets.len() + spec.sounds.len() + spec.ports.len();
    let devices = u32::try_from(devices).unwrap_or(u32::MAX);
    Bounds {
        memory,
        // As much of the VM may be swapped out as without a group, and nothing beside it.
        swap: spec.memory.0,
        threads: (THREADS + u32::from(spec.cpus)).saturating_add(devices.saturating_mul(THREADS_OF_DEVICE)),
        cpu_percent: cpu_max.map(CpuMax::percent),
    }
}

/// Lifts the bound of memory of `group` if one of the files at `disks` is itself in memory, which counts for whoever writes to it. A thread
/// looks: a file system that hangs holds nobody up.
pub fn lift_for_disks_in_memory(group: &Group, disks: Vec<PathBuf>) {
    if disks.is_empty() || group.memory_max().is_none() {
        return;
    }
    let lift = group.lifter();
    let is_in_memory =
        |disk: PathBuf| statfs(&disk).is_ok_and(|found| [TMPFS_MAGIC, RAMFS].contains(&found.filesystem_type()));
    let look = move || {
        if disks.into_iter().any(is_in_memory) {
            lift();
        }
    };
    if let Err(error) = thread::Builder::new().name("disks".into()).spawn(look) {
        tracing::warn!("whether disks are files in memory is not looked at: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Disk, MemorySize, OnFull};

    const MIB: u64 = 1 << 20;

    fn spec() -> VmSpec {
        let text = r#"{"name":"web","kernel":"k","initrd":[],"cmdline":"","cpus":2,"memory":"512M","console":"off",
            "disks":[],"nets":[],"ports":[],"passthrough":[]}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_vm_may_take_its_memory_and_what_serving_it_takes() {
        let alone = of(&spec(), None);
        assert_eq!(alone, Bounds { memory: (512 + 32 + 256) * MIB, swap: 512 * MIB, threads: 66, cpu_percent: None });
        let mut served = spec();
        served.nets = vec![NetBackend::Split {
            mac: umbra_driver_vm::protocol::Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            driver_memory: MemorySize(128 * MIB),
            neighbours: Vec::new(),
            allow_any_source: false,
            has_spare: false,
        }];
        let served = of(&served, "150%".parse().ok());
        assert_eq!((served.memory - alone.memory, served.threads - alone.threads), (128 * MIB, 8));
        assert_eq!(served.cpu_percent, Some(150));
        let mut with_file = spec();
        with_file.disks = vec![DiskBackend::File(Disk { path: "d".into(), read_only: false, on_full: OnFull::Error })];
        assert_eq!(of(&with_file, None).memory - alone.memory, 1024 * MIB);
    }
}
