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

/// Resident and anonymous memory of the supervisor and of each VM's process.
pub(super) fn resident(machine: &mut Machine, place: &mut Place) -> Result<Vec<Memory>, DemoError> {
    let status = machine.status(place)?;
    let mut processes = vec![("supervisor".to_owned(), status["pid"].as_u64())];
    for (kind, list) in [("guest", "guests"), ("driver VM", "drivers")] {
        for vm in status[list].as_array().into_iter().flatten() {
            let name = vm["name"].as_str().unwrap_or_default();
            processes.push((format!("{kind} {name}"), vm["pid"].as_u64()));
            processes.push((format!("standby of {name}"), vm["standby"]["pid"].as_u64()));
        }
    }
    let mut all = Vec::new();
    for (process, pid) in processes {
        let Some(pid) = pid else { continue };
        let text = place.expect(&format!("cat /proc/{pid}/status"), Duration::from_secs(10))?;
        let kib = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        all.push(Memory { process, resident_kib: kib("VmRSS:"), guest_memory_kib: kib("RssShmem:") });
    }
    Ok(all)
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
