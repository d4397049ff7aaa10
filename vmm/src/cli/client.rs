//! `umbra status`, `crash`, `restart`, `resume` and `stop`: requests to a running machine.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use umbra_driver_vm::protocol::CrashKind;

use super::connection::{Connection, UNEXPECTED};
use super::exit::{self, Exit};
use crate::base::untrusted_text;
use crate::record::health::{Health, Level};
use crate::supervisor::front::protocol::{Request, Response, StopHow};

/// Arguments of `umbra status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Only this guest or driver VM.
    vm: Option<String>,
    /// Show it again and again, with the latest events below, until the machine ends.
    #[arg(long, short)]
    watch: bool,
    /// Seconds between two looks with --watch.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval, requires = "watch")]
    interval: Duration,
    /// Say whether all is well, and why not: exit status 0, 1 where something is on its way, 2 where something was given up.
    #[arg(long, conflicts_with = "watch")]
    check: bool,
    #[command(flatten)]
    common: Common,
}

/// Shortest interval of `umbra status --watch`: each look is work for the machine, between two of its own.
const SHORTEST_INTERVAL: f64 = 0.01;

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| *seconds >= SHORTEST_INTERVAL);
    let interval = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    interval.ok_or_else(|| format!("a number of seconds, from {SHORTEST_INTERVAL}"))
}

/// Arguments of `umbra crash`.
#[derive(Debug, clap::Args)]
pub struct CrashArgs {
    /// The driver VM.
    driver: String,
    /// In which way it is to fail.
    #[arg(long, value_enum, default_value_t = CrashKind::Panic)]
    kind: CrashKind,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `umbra restart`.
#[derive(Debug, clap::Args)]
pub struct RestartArgs {
    /// The driver VM.
    driver: String,
    /// The image to go on with: another driver, kernel or firmware. One that fails within half a minute is given up for
    /// the old one.
    #[arg(long, value_name = "FOLDER")]
    image: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `umbra resume`.
#[derive(Debug, clap::Args)]
pub struct ResumeArgs {
    /// The driver VM.
    driver: String,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `umbra stop`.
#[derive(Debug, clap::Args)]
pub struct StopArgs {
    /// Only this guest; the machine goes on while it has another one.
    guest: Option<String>,
    /// Kill the VMs instead of pressing the guests' power buttons.
    #[arg(long, short)]
    force: bool,
    /// Seconds to wait for the guests to power off.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    #[command(flatten)]
    common: Common,
}

/// Arguments of all three.
#[derive(Debug, clap::Args)]
struct Common {
    /// The machine, where several run.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Shows a machine's status.
///
/// # Errors
///
/// No machine answers, or it has no VM of the given name.
pub fn status(args: &StatusArgs) -> anyhow::Result<()> {
    if args.check {
        return check(args);
    }
    let mut machine = Connection::open(args.common.name.as_deref())?;
    if args.watch {
        return super::watch::watch(&mut machine, args.vm.as_deref(), args.common.json, args.interval);
    }
    let status = machine.status(args.vm.as_deref())?;
    if args.common.json {
        return super::print_json(&status);
    }
    super::print(&status.to_string())
}

/// `umbra status --check`: what is not as it should be, and a status for it. A machine that does not answer does not serve.
fn check(args: &StatusArgs) -> anyhow::Result<()> {
    let status = Connection::open(args.common.name.as_deref()).and_then(|mut it| it.status(args.vm.as_deref()));
    let status = status.map_err(|error| Exit::new(exit::FAILED, format!("{error:#}")))?;
    let checked = Checked { name: status.name.clone(), health: Health::of(&status) };
    if args.common.json {
        super::print_json(&checked)?;
    } else {
        super::print(&checked.to_string())?;
    }
    match checked.health.health {
        Level::Ok => Ok(()),
        Level::Degraded => Err(Exit::silent(exit::DEGRADED).into()),
        Level::Failed => Err(Exit::silent(exit::FAILED).into()),
    }
}

/// What `umbra status --check` prints.
#[derive(serde::Serialize)]
struct Checked {
    name: String,
    #[serde(flatten)]
    health: Health,
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.name, self.health.health)?;
        self.health.reasons.iter().try_for_each(|why| writeln!(f, "  {}", untrusted_text::line(why)))
    }
}

/// Makes a driver VM fail for real.
///
/// # Errors
///
/// No machine answers, or there is nothing to crash.
pub fn crash(args: &CrashArgs) -> anyhow::Result<()> {
    let mut machine = Connection::open(args.common.name.as_deref())?;
    let request = Request::Crash { name: args.driver.clone(), kind: args.kind };
    let response = machine.ask(&request)?;
    let Response::Crashing { name, generation, .. } = &response else { bail!(UNEXPECTED) };
    if args.common.json {
        return super::print_json(&response);
    }
    super::print(&format!("{name}: generation {generation} is told to crash"))
}

/// Restarts a driver VM and waits until it serves again.
///
/// # Errors
///
/// No machine answers, or the new driver VM does not come up: the old image is in use then.
pub fn restart(args: &RestartArgs) -> anyhow::Result<()> {
    let image = args.image.as_ref().map(std::path::absolute).transpose().context("find the image's folder")?;
    await_life(&args.common, &Request::Restart { name: args.driver.clone(), image }, "masked")
}

/// Ends a quarantine and waits until the driver VM serves again.
///
/// # Errors
///
/// No machine answers, or the driver VM is not quarantined, or fails again.
pub fn resume(args: &ResumeArgs) -> anyhow::Result<()> {
    await_life(&args.common, &Request::Resume { name: args.driver.clone() }, "away")
}

/// Sends `request` and waits for the driver VM's next life, which its guests were without for a time (`how`).
fn await_life(common: &Common, request: &Request, how: &str) -> anyhow::Result<()> {
    let mut machine = Connection::open(common.name.as_deref())?;
    // A boot has its own bounds, which the machine keeps.
    machine.wait_for_ever()?;
    let response = machine.ask(request)?;
    let Response::Restarted { name, generation, outage_ms, no_snapshot } = &response else { bail!(UNEXPECTED) };
    if common.json {
        return super::print_json(&response);
    }
    let masked = outage_ms.map_or_else(String::new, |ms| format!(", {ms:.0} ms {how}"));
    let saved = no_snapshot.as_ref().map_or_else(String::new, |why| {
        let why = untrusted_text::line(why);
        format!(
            "\n{name}: there is no snapshot of it, so that its next failure costs a boot, until one can be taken: {why}"
        )
    });
    super::print(&format!("{name}: generation {generation} serves{masked}{saved}"))
}

/// Ends a machine and waits for the end.
///
/// # Errors
///
/// No machine answers, or its guests do not react.
pub fn stop(args: &StopArgs) -> anyhow::Result<()> {
    let mut machine = Connection::open(args.common.name.as_deref())?;
    let how = if args.force { StopHow::Kill } else { StopHow::PowerButton };
    if let Some(guest) = &args.guest {
        let response = super::guest::stop(&mut machine, guest, how, args.timeout)?;
        return if args.common.json { super::print_json(&response) } else { super::print(&format!("{guest} is off")) };
    }
    let response = machine.ask(&Request::Stop { how })?;
    machine.wait_for_the_end(args.timeout)?;
    if args.common.json {
        return super::print_json(&response);
    }
    super::print(&format!("{} has ended", machine.name))
}
