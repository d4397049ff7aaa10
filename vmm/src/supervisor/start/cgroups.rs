//! Where the control groups of a machine's VMs are made, if anywhere.

use std::path::Path;

use crate::base::cgroup::{Cgroups, Error, Place, Tree};
use crate::base::error::chain;
use crate::config::{Cgroup, Machine};

/// Gets ready the group in which those of the VMs of `machine`, which has this name, are made, on the host whose files are below `root`.
/// `None`: they have none, which the log says; they run all the same.
pub(in crate::supervisor) fn open(machine: &Machine, name: &str, root: &Path) -> Option<Cgroups> {
    const NONE: &str = "processes of VMs have no bounds of memory and processor time";
    let place = match &machine.cgroup {
        Cgroup::Off => return None,
        Cgroup::Auto => Place::Delegated,
        Cgroup::In(path) => Place::In(path, name),
    };
    let opened = Tree::find(root).ok_or(Error::NoTree).and_then(|tree| Cgroups::open(tree, place));
    match opened {
        Ok(groups) => {
            let lacks = groups.lacks().join(", ");
            if !lacks.is_empty() {
                tracing::warn!("control groups of VMs, in {}, have no controller {lacks}", groups.path().display());
            }
            Some(groups)
        }
        // What nobody has asked for, and most hosts lack where no service manager starts a machine.
        Err(error @ (Error::NoTree | Error::NotDelegated(_)))
            if place == Place::Delegated && !names_shares(machine) =>
        {
            tracing::info!("{NONE}: {}", chain(&error));
            None
        }
        Err(error) => {
            tracing::warn!("{NONE}: {}", chain(&error));
            None
        }
    }
}

/// Whether a VM is to have a share of the processors.
fn names_shares(machine: &Machine) -> bool {
    let guests = machine.guest.values().map(|guest| guest.cpu_max);
    guests.chain(machine.driver.values().map(|driver| driver.cpu_max)).any(|share| share.is_some())
}
