//! `umbra vm`: the process of one VM. Hidden: `umbra run` starts it, with the control socket inherited.

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;

use anyhow::Context;

use crate::base::users::User;
use crate::config::Confine;
use crate::vm::group::Entering;
use crate::vm::process::{self, SpecFrom};

/// Arguments of `umbra vm`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM's name, for lists of processes.
    #[arg(long)]
    pub name: Option<String>,
    /// Descriptor number of the control socket (`SOCK_SEQPACKET`), which carries `wire::messages` messages.
    #[arg(long, required_unless_present = "spec", conflicts_with = "spec")]
    pub control: Option<i32>,
    /// A file with the VM's spec (`wire::messages::VmSpec`) in JSON, for trying a VM without a supervisor.
    #[arg(long)]
    pub spec: Option<PathBuf>,
    /// Descriptor number of the list of processes (`cgroup.procs`) of the control group that the process goes into.
    #[arg(long)]
    pub cgroup: Option<i32>,
    /// How the process is confined once its VM runs.
    #[arg(long, value_enum, default_value_t)]
    pub confine: Confine,
    /// Whom the process is handed to once its VM is built: `UID:GID`.
    #[arg(long)]
    pub user: Option<User>,
    /// It has namespaces of its own, and an empty root folder once its VM is built.
    #[arg(long)]
    pub namespaces: bool,
}

/// Runs one VM until it ends.
///
/// # Errors
///
/// What went wrong before there was a channel to report it to the supervisor.
pub fn run(args: Args) -> anyhow::Result<()> {
    let source = match (args.control, args.spec) {
        (Some(number), _) => SpecFrom::Control(inherited(number).context("the control socket")?),
        (None, Some(path)) => SpecFrom::File(path),
        (None, None) => anyhow::bail!("give --control or --spec"),
    };
    let entrance = args.cgroup.map(inherited).transpose().context("the control group")?;
    let entering = entrance.and_then(|entrance| {
        // Without it there are no bounds, as where there is no group.
        Entering::begin(entrance).inspect_err(|error| tracing::warn!("go into the control group: {error}")).ok()
    });
    Ok(process::main(source, entering)?)
}

/// The descriptor with this number, which this process was started with.
fn inherited(number: i32) -> anyhow::Result<OwnedFd> {
    nix::fcntl::fcntl(
        // SAFETY: borrowed for this call only; `fcntl` reports a number that is no descriptor.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(number.max(0)) },
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )
    .with_context(|| format!("the descriptor {number}"))?;
    // SAFETY: the descriptor is open, was inherited for this process, and nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
