//! Where the past of a machine is: that of the run that goes on, or that ended last, in the run directory; older ones, and what was before
//! the host's boot, in the state directory.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::bail;

use crate::record::archive::{self, Kept};
use crate::record::history;
use crate::supervisor::start::rundir::{self, RunDirError};

/// Which run of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// The one that goes on, or else ended last.
    Last,
    /// The one before it.
    Previous,
    /// That with this number.
    Number(u32),
}

/// The past of a run.
pub(super) struct Past {
    /// The machine's name.
    pub name: String,
    /// The folder of its events and crash reports.
    pub folder: PathBuf,
    /// The control socket, if it is the run that goes on.
    pub stream: Option<UnixStream>,
}

/// Finds a run of the machine `name`; without a name of the only one.
///
/// # Errors
/// There is none, there are several machines, or nothing is kept of that run.
pub(super) fn find(name: Option<&str>, which: Which) -> anyhow::Result<Past> {
    if let Which::Number(number) = which {
        let (name, runs) = kept(name)?;
        let Some(run) = runs.into_iter().find(|run| run.number == number) else {
            bail!("no run {number} of {name} is kept; `umbra report --list --name {name}` lists those that are");
        };
        return Ok(Past { name, folder: run.folder, stream: None });
    }
    let machine = match rundir::find(&rundir::base(), name) {
        Ok(machine) => machine,
        Err(error @ (RunDirError::NotRunning { .. } | RunDirError::NoneKnown(_))) => {
            // Since the host's boot it has not run.
            let Ok((name, runs)) = kept(name) else { return Err(error.into()) };
            let back = if which == Which::Previous { 2 } else { 1 };
            let Some(run) = runs.len().checked_sub(back).and_then(|n| runs.get(n)) else {
                bail!("no run of {name} before the last one is kept");
            };
            return Ok(Past { name, folder: run.folder.clone(), stream: None });
        }
        Err(error) => return Err(error.into()),
    };
    let folder = history::folder(&machine.path, which == Which::Previous);
    Ok(Past { name: machine.name, folder, stream: machine.stream.filter(|_| which == Which::Last) })
}

/// What is kept of the machine `name`; without a name of the one that runs, or else of the only one.
///
/// # Errors
/// Nothing is, or there are several.
pub(super) fn kept(name: Option<&str>) -> anyhow::Result<(String, Vec<Kept>)> {
    let Some(base) = archive::base() else { bail!("there is no folder of past runs; set {}", archive::FOLDER) };
    let name = match name {
        Some(name) => name.to_owned(),
        None => only(&base)?,
    };
    // A name is one folder's, and never another place.
    let runs = if archive::machines(&base).contains(&name) { archive::runs(&base.join(&name)) } else { Vec::new() };
    if runs.is_empty() {
        bail!("nothing is kept of a machine named {name} (in {})", base.display());
    }
    Ok((name, runs))
}

fn only(base: &Path) -> anyhow::Result<String> {
    if let [(name, _)] = &rundir::running(&rundir::base())[..] {
        return Ok(name.clone());
    }
    match &archive::machines(base)[..] {
        [] => bail!("nothing is kept of any machine (in {})", base.display()),
        [name] => Ok(name.clone()),
        names => bail!("runs of several machines are kept ({}); choose one with --name", names.join(", ")),
    }
}
