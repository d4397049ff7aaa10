//! `umbra list`: all machines that run, and how they are.

use serde::Serialize;

use super::connection::Connection;
use crate::base::untrusted_text;
use crate::lifecycle::StateName;
use crate::record::health::Health;
use crate::record::status::{GuestStateName, Status};
use crate::record::status_text::{Column, or_dash, table};
use crate::supervisor::start::rundir;

/// Arguments of `umbra list`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print the list as JSON.
    #[arg(long)]
    json: bool,
}

/// The whole answer, as `--json` has it.
#[derive(Debug, Serialize)]
pub struct Listing {
    /// The machines that run, by name.
    pub machines: Vec<Machine>,
}

/// A machine that runs.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// What it has answered; absent if it has not.
    #[serde(flatten)]
    pub answer: Option<Answer>,
    /// Why it has not answered.
    pub error: Option<String>,
}

/// What a machine has answered.
#[derive(Debug, Serialize)]
pub struct Answer {
    /// Number of the supervisor's process.
    pub pid: u32,
    /// Guests.
    pub guests: usize,
    /// Guests that run.
    pub guests_running: usize,
    /// Driver VMs.
    pub drivers: usize,
    /// Driver VMs that serve.
    pub drivers_live: usize,
    /// How it is, and why.
    #[serde(flatten)]
    pub health: Health,
}

/// Lists the machines below the run directory.
///
/// # Errors
///
/// Nothing can be printed.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let base = rundir::base();
    let machines = rundir::running(&base).into_iter().map(|(name, stream)| {
        let status = Connection::over(name.clone(), stream).and_then(|mut machine| machine.status(None));
        Machine::new(name, status)
    });
    let listing = Listing { machines: machines.collect() };
    if args.json {
        return super::print_json(&listing);
    }
    if listing.machines.is_empty() {
        return super::print(&format!("no machine is running (nothing in {})", base.display()));
    }
    super::print(&listing.text())
}

impl Machine {
    fn new(name: String, status: anyhow::Result<Status>) -> Self {
        let (answer, error) = match status {
            Ok(status) => (Some(Answer::new(&status)), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        Self { name, answer, error }
    }

    fn state(&self) -> String {
        match &self.answer {
            None => untrusted_text::line(&format!("unknown: {}", self.error.as_deref().unwrap_or_default())),
            Some(Answer { health, .. }) => match health.reasons.as_slice() {
                [] => health.health.to_string(),
                [why] => format!("{}: {why}", health.health),
                [why, more @ ..] => format!("{}: {why} (and {} more)", health.health, more.len()),
            },
        }
    }
}

impl Answer {
    fn new(status: &Status) -> Self {
        Self {
            pid: status.pid,
            guests: status.guests.len(),
            guests_running: status.guests.iter().filter(|guest| guest.state == GuestStateName::Running).count(),
            drivers: status.drivers.len(),
            drivers_live: status.drivers.iter().filter(|driver| driver.state == StateName::Live).count(),
            health: Health::of(status),
        }
    }
}

impl Listing {
    fn text(&self) -> String {
        let columns: [Column<Machine>; 5] = [
            ("MACHINE", |machine| machine.name.clone()),
            ("PROCESS", |machine| or_dash(machine.answer.as_ref().map(|it| it.pid))),
            ("GUESTS", |machine| {
                or_dash(machine.answer.as_ref().map(|it| format!("{} of {} running", it.guests_running, it.guests)))
            }),
            ("DRIVER VMS", |machine| {
                or_dash(machine.answer.as_ref().map(|it| format!("{} of {} live", it.drivers_live, it.drivers)))
            }),
            ("HEALTH", Machine::state),
        ];
        table(&columns, &self.machines)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::record::status::testing::status;

    #[test]
    fn each_machine_has_a_line_even_if_it_does_not_answer() {
        let mut bad = status();
        bad.guests[0].state = GuestStateName::Failed;
        bad.drivers[0].state = StateName::Booting;
        let machines = vec![
            Machine::new("good".into(), Ok(status())),
            Machine::new("bad".into(), Ok(bad)),
            Machine::new("mute".into(), Err(anyhow::anyhow!("too many clients"))),
        ];
        let listing = Listing { machines };
        let expected = "\
MACHINE  PROCESS  GUESTS          DRIVER VMS   HEALTH
good     1        1 of 1 running  1 of 1 live  ok
bad      1        0 of 1 running  0 of 1 live  failed: web has failed (and 1 more)
mute     -        -               -            unknown: too many clients
";
        assert_eq!(listing.text(), expected);
        let json = serde_json::to_value(&listing).unwrap();
        assert_eq!(json["machines"][1]["health"], "failed");
        assert_eq!(json["machines"][1]["reasons"][1], "nic0 is booting");
        assert_eq!(
            (&json["machines"][2]["pid"], &json["machines"][2]["error"]),
            (&().into(), &"too many clients".into())
        );
    }
}
