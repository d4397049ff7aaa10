//! The key of a snapshot: everything that a restored VM has to agree with, digested. Whatever differs, the snapshot is another
//! one, and the VM boots cold.

use std::io;

use kvm_ioctls::Kvm;
use serde::Serialize;
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
    /// The program: its version and its build, because a device may differ between two builds of a version.
    program: (&'static str, Build),
    /// The host's kernel, KVM with it: release and build.
    kernel: [String; 2],
    /// CPU model and features, as the first vCPU sees them.
    cpu: Vec<[u32; 7]>,
    /// The MSRs that KVM has.
    msrs: Vec<u32>,
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

/// The key of the snapshot of the VM of `spec`, whose image has the digest `image`.
///
/// # Errors
/// KVM does not say what it can do.
pub fn key(kvm: &Kvm, spec: &VmSpec, image: &str) -> Result<Key, Error> {
    // As the first vCPU sees it: what KVM says differs with the processor that asks (APIC ids).
    let cpuid = cpuid::for_vcpu(kvm, &cpuid::supported(kvm)?, 0, spec.cpus);
    let leaf = |e: &kvm_bindings::kvm_cpuid_entry2| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx];
    let utsname = nix::sys::utsname::uname().map_err(|error| Error::Memory(error.into()))?;
    let text = |value: &std::ffi::OsStr| value.to_string_lossy().into_owned();
    let ingredients = Ingredients {
        program: (env!("CARGO_PKG_VERSION"), program().map_err(Error::Program)?),
        kernel: [text(utsname.release()), text(utsname.version())],
        cpu: cpuid.as_slice().iter().map(leaf).collect(),
        msrs: state::msr_indices(kvm)?,
        image,
        cmdline: &spec.cmdline,
        cpus: spec.cpus,
        memory: spec.memory.0,
        nets: &spec.nets,
        ports: spec.ports.iter().map(|port| port.name.as_str()).collect(),
        awaited: &spec.awaited,
    };
    let text = serde_json::to_vec(&ingredients).map_err(|error| Error::Memory(error.into()))?;
    Ok(Key(Sha256::digest(text).into()))
}

/// Which build of this program it is.
#[derive(Debug, PartialEq, Eq, Serialize)]
enum Build {
    Id(Vec<u8>),
    /// A checksum of its file, where the linker left no build id.
    Checksum(u64),
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
