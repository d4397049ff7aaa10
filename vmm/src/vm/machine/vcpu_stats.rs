//! What KVM counts of vCPUs (KVM API, `KVM_GET_STATS_FD`): read from a file of each, which costs the vCPUs nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

use crate::wire::messages::VcpuCounts;

/// `KVM_GET_STATS_FD`, `_IO(KVMIO, 0xce)`; Linux 5.14 and later.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// Bytes of `struct kvm_stats_header`, and of `struct kvm_stats_desc` before the name.
const HEADER_LEN: usize = 24;
const DESCRIPTOR_LEN: usize = 16;
/// Most of either that a kernel may say: ten times what Linux 6.12 has.
const MAX_DESCRIPTORS: usize = 1024;
const MAX_NAME: usize = 256;

/// The counters of a VM's vCPUs; empty where the kernel has none.
#[derive(Debug, Default)]
pub struct VcpuStats(Vec<Stats>);

impl VcpuStats {
    /// Those of `vcpus`.
    pub fn of(vcpus: &[VcpuFd]) -> Self {
        let open = |vcpu: &VcpuFd| Stats::open(vcpu);
        Self(vcpus.iter().map(open).collect::<io::Result<_>>().unwrap_or_else(|error| {
            tracing::debug!(%error, "this kernel has no counters of vCPUs");
            Vec::new()
        }))
    }

    /// Sums of what is known.
    pub fn counts(&self) -> VcpuCounts {
        let mut sums = BTreeMap::<&str, u64>::new();
        for stats in &self.0 {
            for (name, at) in &stats.places {
                *sums.entry(name).or_default() += stats.value(*at);
            }
        }
        let sums = serde_json::to_value(sums).unwrap_or_default();
        serde_json::from_value(sums).unwrap_or_default()
    }
}

/// The counters of one vCPU.
#[derive(Debug)]
struct Stats {
    file: File,
    /// Names of those that are of interest, and where they are in the file.
    places: Vec<(String, u64)>,
}

impl Stats {
    fn open(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the ioctl takes no argument.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, for us alone.
        let file = unsafe { File::from_raw_fd(fd) };
        let mut header = [0; HEADER_LEN];
        file.read_exact_at(&mut header, 0)?;
        let [name_len, count] = [4, 8].map(|at| word(&header, at) as usize);
        let [descriptors, data] = [16, 20].map(|at| u64::from(word(&header, at)));
        if count > MAX_DESCRIPTORS || name_len > MAX_NAME {
            return Err(io::Error::other("counters of vCPUs in an unknown form"));
        }
        let mut all = vec![0; count * (DESCRIPTOR_LEN + name_len)];
        file.read_exact_at(&mut all, descriptors)?;
        let known = serde_json::to_value(VcpuCounts::default()).unwrap_or_default();
        let places = places(&all, name_len).filter(|(name, _)| known.get(name).is_some());
        let places = places.map(|(name, at)| (name, data + u64::from(at))).collect();
        Ok(Self { file, places })
    }

    /// 0 if the kernel does not say.
    fn value(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, at).map_or(0, |()| u64::from_le_bytes(bytes))
    }
}

/// Names and places (behind the begin of the data) of those of a single value; the names have `name_len` bytes, zeros behind them.
fn places(descriptors: &[u8], name_len: usize) -> impl Iterator<Item = (String, u32)> {
    descriptors.chunks_exact(DESCRIPTOR_LEN + name_len).filter_map(|descriptor| {
        let (fields, name) = descriptor.split_at(DESCRIPTOR_LEN);
        let single = u16::from_le_bytes([fields[6], fields[7]]) == 1;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        single.then(|| (String::from_utf8_lossy(name).into_owned(), word(fields, 8)))
    })
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn descriptor(name: &str, size: u16, offset: u32) -> Vec<u8> {
        let mut bytes = vec![0; 6];
        bytes.extend(size.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name.as_bytes());
        bytes.resize(DESCRIPTOR_LEN + 48, 0);
        bytes
    }

    #[test]
    fn single_values_are_found_and_histograms_passed_over() {
        let all = [descriptor("exits", 1, 40), descriptor("halt_poll_hist", 32, 48), descriptor("halt_exits", 1, 8)];
        let found: Vec<_> = places(&all.concat(), 48).collect();
        assert_eq!(found, [("exits".into(), 40), ("halt_exits".into(), 8)]);
    }

    #[test]
    fn the_kernel_has_each_counter() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else { return };
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let stats = VcpuStats::of(std::slice::from_ref(&vcpu));
        let Some(first) = stats.0.first() else { return };
        let mut found: Vec<_> = first.places.iter().map(|(name, _)| name.as_str()).collect();
        found.sort_unstable();
        let known = serde_json::to_value(VcpuCounts::default()).unwrap();
        let mut wanted: Vec<_> = known.as_object().unwrap().keys().map(String::as_str).collect();
        wanted.sort_unstable();
        assert_eq!(found, wanted);
        assert_eq!(stats.counts(), VcpuCounts::default(), "it has not run");
    }
}
