//! Memory: resident size of each process, and the smallest driver VM.

use std::time::Duration;

use super::results::Memory;
use crate::assets::Say;
use crate::demo::DemoError;
use crate::demo::machine::{Machine, MachineSpec};
use crate::demo::place::Place;

/// Step of the search, MiB.
const STEP_MIB: u32 = 8;
/// Where the search starts, MiB: this is known to be enough.
const ENOUGH_MIB: u32 = 128;
/// Less than this no distribution kernel boots in, MiB.
const HOPELESS_MIB: u32 = 32;

/// The memory of the supervisor and of each VM's process.
pub(super) fn resident(machine: &mut Machine, place: &mut Place) -> Result<Vec<Memory>, DemoError> {
    let status = machine.status(place)?;
    let mut processes = vec![("supervisor".to_owned(), String::new(), status["pid"].as_u64())];
    for (kind, list) in [("guest", "guests"), ("driver VM", "drivers")] {
        for vm in status[list].as_array().into_iter().flatten() {
            let name = vm["name"].as_str().unwrap_or_default();
            processes.push((format!("{kind} {name}"), name.to_owned(), vm["pid"].as_u64()));
            processes.push((format!("standby of {name}"), name.to_owned(), vm["standby"]["pid"].as_u64()));
            let second = vm["standby"]["second"]["pid"].as_u64();
            processes.push((format!("second standby of {name}"), name.to_owned(), second));
        }
    }
    let mut all = Vec::new();
    for (process, vm, pid) in processes {
        let Some(pid) = pid else { continue };
        let text = place.expect(&format!("cat /proc/{pid}/status /proc/{pid}/smaps"), Duration::from_secs(10))?;
        all.push(Memory { process, ..of(&text, &vm) });
    }
    Ok(all)
}

/// What a process has, whose `/proc/PID/status` and then `smaps` are in `text`: as far as it is that of the VM `vm`, in a memfd with its
/// name and, for a driver VM, its generation, it is the VM's.
fn of(text: &str, vm: &str) -> Memory {
    let of_vm = format!("/memfd:umbra-{vm}");
    let (mut memory, mut is_vm_s) = (Memory::default(), false);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let kib = second.parse::<u64>().unwrap_or(0);
        match first {
            "VmPTE:" => memory.page_tables_kib = kib,
            // VFIO counts what it pins as locked.
            "VmLck:" | "VmPin:" => memory.pinned_kib += kib,
            "Rss:" if is_vm_s => memory.vm_kib += kib,
            "Pss:" if !is_vm_s => memory.rest_kib += kib,
            range if range.contains('-') => {
                let name = words.nth(3).and_then(|name| name.strip_prefix(&of_vm));
                is_vm_s = !vm.is_empty() && name.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
            }
            _ => {}
        }
    }
    memory
}

/// Bisects; `None` when not even [`ENOUGH_MIB`] is enough.
pub(super) fn smallest(place: &mut Place, spec: &MachineSpec, say: Say<'_>) -> Result<Option<u32>, DemoError> {
    let (mut too_small, mut enough) = (HOPELESS_MIB / STEP_MIB, ENOUGH_MIB / STEP_MIB + 1);
    while enough - too_small > 1 {
        let middle = too_small.midpoint(enough);
        let mib = middle * STEP_MIB;
        let spec = MachineSpec { driver_memory: format!("{mib}M"), restart_limit: 1, ..spec.clone() };
        let boots = match Machine::start(place, &spec) {
            Ok(machine) => {
                machine.stop(place)?;
                true
            }
            Err(DemoError::Umbra { .. } | DemoError::Still { .. } | DemoError::Command { .. }) => {
                place.run("umbra stop --force; sleep 1", Duration::from_secs(40))?;
                false
            }
            Err(e) => return Err(e),
        };
        say(&format!("    {mib} MiB: {}", if boots { "boots" } else { "does not boot" }));
        if boots { enough = middle } else { too_small = middle }
    }
    Ok((enough * STEP_MIB <= ENOUGH_MIB).then_some(enough * STEP_MIB))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_has_is_told_apart() {
        let text = "Name:\tumbra\nVmPeak:\t  300 kB\nVmLck:\t   131072 kB\nVmPin:\t       0 kB\nVmPTE:\t     120 kB\n\
            7f00-7f01 rw-s 00000000 00:01 3    /memfd:umbra-nic0.5 (deleted)\nSize: 200 kB\nRss:   98304 kB\nPss: 90000 kB\n\
            7f01-7f02 rw-s 00000000 00:01 3    /memfd:umbra-nic01.5 (deleted)\nRss:   8 kB\nPss: 4 kB\n\
            7f02-7f03 r-xp 00000000 00:02 9    /bin/umbra\nRss:   2048 kB\nPss: 512 kB\nPss_Dirty: 9 kB\n\
            7f03-7f04 rw-p 00000000 00:00 0 \nRss:   100 kB\nPss: 100 kB\n";
        let all =
            Memory { process: String::new(), vm_kib: 98304, pinned_kib: 131_072, page_tables_kib: 120, rest_kib: 616 };
        assert_eq!(of(text, "nic0"), all);
        assert_eq!(of(text, "").vm_kib, 0, "a supervisor has no VM");
        assert_eq!(of(text, "web").rest_kib, 90_616, "the memory of another VM counts by its part");
    }
}
