//! What the processes of VMs are started with: whose they are, and which namespaces they get.

use std::path::{Path, PathBuf};

use crate::base::cgroup::Cgroups;
use crate::base::error::chain;
use crate::base::namespaces;
use crate::base::pid_namespace::PidNamespaces;
use crate::base::vm_users::{OF_VMS, VmUsers};
use crate::config::Confine;
use crate::wire::spawn::Program;

/// The program at `path`, as it is started for each VM of a machine that is confined so; `root` is the host's root folder. What the host
/// does not allow is warned of.
pub fn of_vms(path: PathBuf, confine: Confine, root: &Path, cgroups: Option<Cgroups>) -> Program {
    let users = users_of_vms(root, confine);
    let namespaces =
        if_root_may(namespaces::available, confine, "processes of VMs keep the host's namespaces and root folder");
    let pid_namespaces = if_root_may(PidNamespaces::find, confine, "processes of VMs see the host's other processes");
    Program { path, confine, users, namespaces: namespaces.is_some(), pid_namespaces, cgroups }
}

/// Whom the processes of VMs are handed to, by the files below `root`: where root starts them, and there is somebody.
fn users_of_vms(root: &Path, confine: Confine) -> Option<VmUsers> {
    let users = nix::unistd::geteuid().is_root().then(|| VmUsers::find(root)).flatten()?;
    if let (Err(error), Confine::On) = (users.range(), confine) {
        tracing::warn!("processes of VMs have no users of their own and go on as {OF_VMS}: {}", chain(error));
    }
    Some(users)
}

/// What `find` finds of namespaces for the processes of VMs: where root starts them, and may. `without`: how they are else.
fn if_root_may<T>(find: fn() -> Result<T, namespaces::Error>, confine: Confine, without: &str) -> Option<T> {
    let found = nix::unistd::geteuid().is_root().then(find)?;
    if let (Err(error), Confine::On) = (&found, confine) {
        tracing::warn!("{without}: {}", chain(error));
    }
    found.ok()
}
