//! `umbra sleep` and `umbra wake`: what a host does before and after it suspends (`packaging/umbra-sleep.service`).

use std::thread;
use std::time::Duration;

use anyhow::bail;
use serde::Serialize;

use super::connection::{Connection, UNEXPECTED};
use crate::supervisor::front::protocol::{Request, Response};
use crate::supervisor::start::rundir;

/// Longest wait for a machine: its disks come to rest (30 s), a killed process ends and a device is reset (75 s each); the rest is for a
/// busy host. One that has not answered by then is frozen or hangs, and the host sleeps all the same.
const PATIENCE: Duration = Duration::from_secs(240);

/// Arguments of both.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// All machines that run, also if that is none.
    #[arg(long, conflicts_with = "name")]
    all: bool,
    /// The machine, where several run.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
    /// Print the answers as JSON.
    #[arg(long)]
    json: bool,
}

/// What was asked of the machines.
#[derive(Debug, Serialize)]
struct Asked {
    machines: Vec<Machine>,
}

/// What a machine has answered.
#[derive(Debug, Serialize)]
struct Machine {
    name: String,
    /// Time until its devices were free, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    ms: Option<f64>,
    /// Why it did not do it.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Has driver VMs give their devices up, and waits until they have.
///
/// # Errors
///
/// No machine answers, or one does not do it.
pub fn sleep(args: &Args) -> anyhow::Result<()> {
    ask(args, &Request::Sleep)
}

/// Has the driver VMs of a machine that sleeps be reborn.
///
/// # Errors
///
/// As [`sleep`].
pub fn wake(args: &Args) -> anyhow::Result<()> {
    ask(args, &Request::Wake)
}

/// Sends `request` to each machine, to all of them at once.
fn ask(args: &Args, request: &Request) -> anyhow::Result<()> {
    let connections = if args.all {
        let open = |(name, stream)| (String::clone(&name), Connection::over(name, stream));
        rundir::running(&rundir::base()).into_iter().map(open).collect()
    } else {
        let machine = Connection::open(args.name.as_deref())?;
        vec![(machine.name.clone(), Ok(machine))]
    };
    let machines: Vec<_> = thread::scope(|scope| {
        let asked = connections.into_iter().map(|(name, machine)| {
            let answer = scope.spawn(move || machine.and_then(|machine| ask_one(machine, request)));
            (name, answer)
        });
        let asked: Vec<_> = asked.collect();
        let answers = asked.into_iter().map(|(name, answer)| {
            let answer = answer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let error = answer.as_ref().err().map(|error| format!("{error:#}"));
            Machine { name, ms: answer.ok().flatten(), error }
        });
        answers.collect()
    });
    let asked = Asked { machines };
    if args.json {
        super::print_json(&asked)?;
    } else {
        super::print(&asked.text(request))?;
    }
    let failed: Vec<_> = asked.machines.iter().filter_map(|machine| machine.error.as_ref()).collect();
    match failed[..] {
        [] => Ok(()),
        [only] => bail!("{only}"),
        [first, ..] => bail!("{} machines did not do it; the first: {first}", failed.len()),
    }
}

/// The time that a machine needed until its devices were free; `None` where it was asked to wake.
fn ask_one(mut machine: Connection, request: &Request) -> anyhow::Result<Option<f64>> {
    machine.wait_at_most(PATIENCE)?;
    match machine.ask(request)? {
        Response::Asleep { ms } => Ok(Some(ms)),
        Response::Awake { .. } => Ok(None),
        _ => bail!(UNEXPECTED),
    }
}

impl Asked {
    fn text(&self, request: &Request) -> String {
        let line = |machine: &Machine| match (request, machine.ms) {
            (Request::Wake, _) => format!("{}: awake", machine.name),
            (_, Some(ms)) => format!("{}: asleep after {ms:.0} ms", machine.name),
            (_, None) => format!("{}: asleep", machine.name),
        };
        let done = self.machines.iter().filter(|machine| machine.error.is_none());
        match self.machines.is_empty() {
            true => "no machine is running".into(),
            false => done.map(line).collect::<Vec<_>>().join("\n"),
        }
    }
}
