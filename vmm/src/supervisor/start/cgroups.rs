//! Where the control groups of a machine's VMs are made, if anywhere.

use std::path::Path;

use crate::base::cgroup::{Cgroups, Error, Place, Tree};
use crate::base::error::chain;
use crate::config::{Cgroup, Machine};
use crate::supervisor::RunError;

/// Gets ready the group in which those of the VMs of `machine`, which has this name, are made, on the host whose files are below `root`.
/// `None`: they have none, which the log says.
///
/// # Errors
/// The machine file names a group that cannot be used.
pub(in crate::supervisor) fn open(machine: &Machine, name: &str, root: &Path) -> Result<Option<Cgroups>, RunError> {
    let place = match &machine.cgroup {
        Cgroup::Off => return Ok(None),
        Cgroup::Auto => Place::Delegated,
        Cgroup::In(path) => Place::In(path, name),
    };
    let opened = Tree::find(root).ok_or(Error::NoTree).and_then(|tree| Cgroups::open(tree, place));
    match (opened, place) {
        (Ok(groups), _) => {
            let lacks = groups.lacks().join(", ");
            if !lacks.is_empty() {
                tracing::warn!("control groups of VMs, in {}, have no controller {lacks}", groups.path().display());
            }
            Ok(Some(groups))
        }
        (Err(source), Place::In(group, _)) => Err(RunError::Cgroup { group: group.into(), source }),
        (Err(error), Place::Delegated) => {
            let is_usual = matches!(error, Error::NoTree | Error::NotDelegated(_)) && !names_shares(machine);
            if is_usual {
                tracing::info!("processes of VMs have no bounds of memory and processor time: {}", chain(&error));
            } else {
                tracing::warn!("processes of VMs have no bounds of memory and processor time: {}", chain(&error));
            }
            Ok(None)
        }
    }
}

/// Whether a VM is to have a share of the processors.
fn names_shares(machine: &Machine) -> bool {
    let guests = machine.guest.values().map(|guest| guest.cpu_max);
    guests.chain(machine.driver.values().map(|driver| driver.cpu_max)).any(|share| share.is_some())
}
