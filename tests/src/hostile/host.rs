//! The test host as it is before and after: files, processes, what the supervisor holds, and what the kernel has said.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Serialize;

use super::campaign::HONEST;
use crate::demo::DemoError;
use crate::demo::machine::{Machine, NIC_DRIVER};
use crate::demo::place::Place;

const STEP: Duration = Duration::from_secs(120);

/// Descriptors that the supervisor may hold more than before: those of a life that comes and of one that goes.
const MORE_DESCRIPTORS: u64 = 40;
/// Memory that it may hold more, KiB: logs, reports, and what an allocator keeps.
const MORE_MEMORY_KIB: u64 = 64 << 10;

/// What would tell of a fault in the host's kernel.
const KERNEL_FAULTS: &str =
    "BUG:|Oops|WARNING:|general protection|Call Trace|KASAN|hung_task|segfault|protection fault";

/// The state of the test host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct HostState {
    /// Digests and names of the files of the root file system.
    #[serde(skip)]
    files: BTreeSet<String>,
    /// Numbers and command lines of processes, but for the kernel's threads and the supervisor's children.
    #[serde(skip)]
    processes: BTreeSet<String>,
    /// The guest, its driver VM, and the supervisor.
    pids: [u64; 3],
    /// Of the supervisor.
    pub(super) descriptors: u64,
    /// Resident memory of the supervisor, KiB.
    pub(super) memory_kib: u64,
    /// Lines of the kernel that tell of a fault.
    faults: BTreeSet<String>,
}

impl HostState {
    pub(super) fn take(place: &mut Place, machine: &mut Machine) -> Result<Self, DemoError> {
        let (guest, driver) = (machine.guest_pid(place, HONEST)?, machine.driver_pid(place, NIC_DRIVER)?);
        let parent = place.expect(&format!("awk '/^PPid/ {{print $2}}' /proc/{guest}/status"), STEP)?;
        let parent: u64 = parent.trim().parse().unwrap_or(0);
        let lines = |text: String| text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
        // But for what the run itself keeps of what happens in it.
        let find = "find / -xdev -path /var/lib/umbra -prune -o -type f -exec md5sum {} +";
        let files = lines(place.expect(find, STEP)?);
        // This shell, and what it starts, are new each time.
        let script = format!(
            "for p in /proc/[0-9]*; do set -- $(awk '/^PPid/ {{print $2}}' $p/status 2>/dev/null) x
             [ $1 = 2 -o $1 = {parent} -o $1 = $$ -o $p = /proc/$$ ] || {{ printf '%s ' $p; tr '\\0\\n' '  ' <$p/cmdline; echo; }}
             done 2>/dev/null | grep -v 'awk \\|umbra-probe exec\\|/etc/umbra/bench.sh'"
        );
        let processes = lines(place.expect(&script, STEP)?);
        let held = place.expect(
            &format!("ls /proc/{parent}/fd | wc -l; awk '/^VmRSS/ {{print $2}}' /proc/{parent}/status"),
            STEP,
        )?;
        let mut held = held.split_whitespace().map(|number| number.parse().unwrap_or(0));
        let faults = lines(place.expect(&format!("dmesg | grep -E '{KERNEL_FAULTS}' || true"), STEP)?);
        let (descriptors, memory_kib) = (held.next().unwrap_or(0), held.next().unwrap_or(0));
        Ok(Self { files, processes, pids: [guest, driver, parent], descriptors, memory_kib, faults })
    }

    /// What must not have changed, and has in `after`.
    pub(super) fn differs_from(&self, after: &Self) -> Vec<String> {
        let mut breaches = Vec::new();
        for (what, before, after) in [
            ("file", &self.files, &after.files),
            ("process", &self.processes, &after.processes),
            ("line of the host's kernel", &self.faults, &after.faults),
        ] {
            breaches.extend(before.difference(after).map(|line| format!("a {what} is gone: {line}")));
            breaches.extend(after.difference(before).map(|line| format!("a {what} is new: {line}")));
        }
        if self.pids != after.pids {
            breaches.push(format!("guest, driver VM, supervisor were {:?}, and are {:?}", self.pids, after.pids));
        }
        for (what, before, after, more) in [
            ("descriptors", self.descriptors, after.descriptors, MORE_DESCRIPTORS),
            ("KiB of memory", self.memory_kib, after.memory_kib, MORE_MEMORY_KIB),
        ] {
            if after > before + more {
                breaches.push(format!("the supervisor holds {after} {what}, and held {before}"));
            }
        }
        breaches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_is_told_and_a_little_more_memory_is_not() {
        let set = |lines: &[&str]| lines.iter().map(|&line| line.to_owned()).collect();
        let before =
            HostState { files: set(&["1 /a", "2 /b"]), pids: [1, 2, 3], memory_kib: 100, ..HostState::default() };
        let mut after = HostState { memory_kib: 200, ..before.clone() };
        assert!(before.differs_from(&after).is_empty());
        after.files = set(&["1 /a", "3 /b"]);
        after.pids[0] = 9;
        after.descriptors = 1000;
        let told = before.differs_from(&after).join("; ");
        for part in ["gone: 2 /b", "new: 3 /b", "[9, 2, 3]", "1000 descriptors"] {
            assert!(told.contains(part), "{part}: {told}");
        }
    }
}
