//! The key of a snapshot: everything that a restored VM has to agree with, digested. Whatever differs, the snapshot is another
//! one, and the VM boots cold.

use std::io;

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Error;
use super::format::{Key, checksum};
use crate::base::build_id::build_id;
use crate::host::Snapshot as AwaitedFunction;
use crate::vm::machine::{cpuid, state};
use crate::wire::messages::{NetBackend, VmSpec};

/// What goes in.
#[derive(Serialize)]
struct Ingredients<'a> {
    host: &'a HostFacts,
    /// CPU model and features, as the first vCPU sees them.
    cpu: Vec<[u32; 7]>,
    /// The MSRs that KVM has.
    msrs: Vec<u32>,
    vm: OfVm<'a>,
}

/// What goes in of the program and its host's kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostFacts {
    /// The program: its version and its build, because a device may differ between two builds of a version.
    pub program: (String, Build),
    /// The host's kernel, KVM with it: release and build.
    pub kernel: [String; 2],
}

impl HostFacts {
    /// Those of this process.
    ///
    /// # Errors
    /// The program's own file cannot be read.
    pub fn now() -> Result<Self, Error> {
        let utsname = nix::sys::utsname::uname().map_err(|error| Error::Memory(error.into()))?;
        let text = |value: &std::ffi::OsStr| value.to_string_lossy().into_owned();
        let build = program().map_err(Error::Program)?;
        let kernel = [text(utsname.release()), text(utsname.version())];
        Ok(Self { program: (env!("CARGO_PKG_VERSION").into(), build), kernel })
    }
}

/// What goes in of the VM itself. The life's name, who waits for it and what becomes of it are no part of that: a life that is to serve
/// is restored from what one that waited has left.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct OfVm<'a> {
    /// Digest of kernel and initial RAM disks.
    image: &'a str,
    cmdline: &'a str,
    cpus: u8,
    memory: u64,
    nets: &'a [NetBackend],
    /// Console ports, by name.
    ports: Vec<&'a str>,
    awaited: &'a Option<AwaitedFunction>,
}

impl<'a> OfVm<'a> {
    /// Of the VM of `spec`; `None`: it has no snapshots.
    pub fn new(spec: &'a VmSpec) -> Option<Self> {
        Some(Self {
            image: &spec.snapshot_of.as_ref()?.digest,
            cmdline: &spec.cmdline,
            cpus: spec.cpus,
            memory: spec.memory.0,
            nets: &spec.nets,
            ports: spec.ports.iter().map(|port| port.name.as_str()).collect(),
            awaited: &spec.awaited,
        })
    }
}

/// The key of the snapshot of `vm` on `host`.
///
/// # Errors
/// KVM does not say what it can do.
pub fn key(kvm: &Kvm, host: &HostFacts, vm: OfVm<'_>) -> Result<Key, Error> {
    // As the first vCPU sees it: what KVM says differs with the processor that asks (APIC ids).
    let cpuid = cpuid::for_vcpu(kvm, &cpuid::supported(kvm)?, 0, vm.cpus);
    let leaf = |e: &kvm_bindings::kvm_cpuid_entry2| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx];
    let ingredients =
        Ingredients { host, cpu: cpuid.as_slice().iter().map(leaf).collect(), msrs: state::msr_indices(kvm)?, vm };
    let text = serde_json::to_vec(&ingredients).map_err(|error| Error::Memory(error.into()))?;
    Ok(Key(Sha256::digest(text).into()))
}

/// Which build of this program it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Build {
    /// What the linker has called it.
    Id(Vec<u8>),
    /// A checksum of its file, where the linker left no build id.
    Checksum(u64),
}

impl Default for Build {
    /// That of a description that does not name any.
    fn default() -> Self {
        Self::Id(Vec::new())
    }
}

fn program() -> io::Result<Build> {
    match build_id() {
        Some(id) => Ok(Build::Id(id)),
        None => Ok(Build::Checksum(checksum(&std::fs::read("/proc/self/exe")?))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_the_same_each_time_it_is_asked_for() {
        assert_eq!(program().unwrap(), program().unwrap());
        assert!(matches!(program().unwrap(), Build::Id(_)));
    }
}
