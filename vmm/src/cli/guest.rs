//! `umbra start`, `stop`, `reboot` and `nmi` of one guest of a running machine; the others go on.

use std::time::{Duration, Instant};

use anyhow::bail;

use super::connection::{Connection, UNEXPECTED, end_of_wait};
use crate::config::DiskSize;
use crate::record::status::{GuestStateName, GuestStatus};
use crate::supervisor::front::protocol::{Request, Response, StopHow};

/// Interval at which the machine is asked for the guest's state.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Arguments of `umbra start`.
#[derive(Debug, clap::Args)]
pub struct StartArgs {
    /// The guest, which is off or has failed.
    guest: String,
    /// The machine, where several run.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
}

/// Arguments of `umbra reboot`.
#[derive(Debug, clap::Args)]
pub struct RebootArgs {
    /// The guest.
    guest: String,
    /// Kill it instead of pressing its power button.
    #[arg(long, short)]
    force: bool,
    /// Seconds to wait for it to power off.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    /// The machine, where several run.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
}

/// Arguments of `umbra resize`.
#[derive(Debug, clap::Args)]
pub struct ResizeArgs {
    /// The guest.
    guest: String,
    /// Its disk: vda is the first of the machine file, vdb the second.
    #[arg(value_parser = disk_number)]
    disk: u16,
    /// The new size, as 20G or a number of bytes; without it, the size that the file or block device has now.
    #[arg(value_name = "SIZE")]
    size: Option<DiskSize>,
    /// The machine, where several run.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
}

/// Arguments of `umbra nmi`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "What comes of it is the guest's: a stock Linux prints a line, with `kernel.unknown_nmi_panic=1` it panics, and \
                  with kdump it writes a dump."
)]
pub struct NmiArgs {
    /// The guest.
    guest: String,
    /// The machine, where several run.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
}

/// The number of a disk, from its name in the guest.
fn disk_number(name: &str) -> Result<u16, String> {
    let letters = name.strip_prefix("vd").filter(|letters| letters.len() == 1);
    let letter = letters.and_then(|letters| letters.bytes().next()).filter(u8::is_ascii_lowercase);
    letter.map(|letter| u16::from(letter - b'a')).ok_or_else(|| "a disk is named vda, vdb, ... vdz".into())
}

/// Makes a disk on a file larger, and waits until the guest sees it.
///
/// # Errors
///
/// No machine answers, there is no such disk, it would be smaller, or the host cannot make it so large.
pub fn resize(args: &ResizeArgs) -> anyhow::Result<()> {
    let mut machine = Connection::open(args.name.as_deref())?;
    // A file system may take its time.
    machine.wait_for_ever()?;
    let bytes = args.size.map(|size| size.0);
    let request = Request::Resize { name: args.guest.clone(), disk: args.disk, bytes };
    let Response::Resized { bytes, .. } = machine.ask(&request)? else { bail!(UNEXPECTED) };
    super::print(&format!("{} has {bytes} bytes", args.guest))
}

/// Injects a non-maskable interrupt into a guest.
///
/// # Errors
///
/// No machine answers, there is no such guest, or it does not run.
pub fn nmi(args: &NmiArgs) -> anyhow::Result<()> {
    let mut machine = Connection::open(args.name.as_deref())?;
    done(&mut machine, &Request::Nmi { name: args.guest.clone() })?;
    super::print(&format!("{}: a non-maskable interrupt was injected", args.guest))
}

/// Starts a guest and waits until its vCPUs run.
///
/// # Errors
///
/// No machine answers, there is no such guest, it is not off, or it fails.
pub fn start(args: &StartArgs) -> anyhow::Result<()> {
    let mut machine = Connection::open(args.name.as_deref())?;
    done(&mut machine, &Request::StartGuest { name: args.guest.clone() })?;
    wait_until_running(&mut machine, &args.guest)
}

/// Has a guest power off, starts it again, and waits until its vCPUs run.
///
/// # Errors
///
/// No machine answers, there is no such guest, it does not power off in time, or it fails.
pub fn reboot(args: &RebootArgs) -> anyhow::Result<()> {
    let mut machine = Connection::open(args.name.as_deref())?;
    let before = look(&mut machine, &args.guest)?.pid;
    let how = if args.force { StopHow::Kill } else { StopHow::PowerButton };
    done(&mut machine, &Request::RebootGuest { name: args.guest.clone(), how })?;
    let what = "has not powered off; `umbra reboot --force` kills it";
    wait_for(&mut machine, &args.guest, (args.timeout, what), |guest| guest.pid != before || before.is_none())?;
    wait_until_running(&mut machine, &args.guest)
}

/// `umbra stop GUEST`: has it power off, or kills it, and waits until it is off; the machine's answer.
///
/// # Errors
///
/// No machine answers, there is no such guest, or it does not power off in time.
pub fn stop(machine: &mut Connection, guest: &str, how: StopHow, timeout: u64) -> anyhow::Result<Response> {
    let response = done(machine, &Request::StopGuest { name: guest.into(), how })?;
    let what = "has not powered off; `umbra stop --force GUEST` kills it";
    // A machine ends with its last guest.
    match wait_for(machine, guest, (timeout, what), is_over) {
        Err(error) if error.is::<super::connection::Ended>() => {}
        result => drop(result?),
    }
    Ok(response)
}

fn is_over(guest: &GuestStatus) -> bool {
    matches!(guest.state, GuestStateName::Off | GuestStateName::Failed)
}

fn wait_until_running(machine: &mut Connection, name: &str) -> anyhow::Result<()> {
    let what = "does not run yet; `umbra status` shows what it waits for";
    let guest = wait_for(machine, name, (60, what), |guest| guest.state == GuestStateName::Running || is_over(guest))?;
    match guest.reason {
        Some(why) => bail!("{name} failed: {why}"),
        None if is_over(&guest) => bail!("{name} is off again"),
        None => super::print(&format!("{name} runs")),
    }
}

fn done(machine: &mut Connection, request: &Request) -> anyhow::Result<Response> {
    match machine.ask(request)? {
        response @ Response::Done { .. } => Ok(response),
        _ => bail!(UNEXPECTED),
    }
}

fn look(machine: &mut Connection, name: &str) -> anyhow::Result<GuestStatus> {
    match machine.status(Some(name))?.guests.pop() {
        Some(guest) => Ok(guest),
        None => bail!("{} has no guest named {name}", machine.name),
    }
}

/// Polls until the guest is as `wanted`. The error after `seconds` names the guest and says `what`.
fn wait_for(
    machine: &mut Connection,
    name: &str,
    (seconds, what): (u64, &str),
    wanted: impl Fn(&GuestStatus) -> bool,
) -> anyhow::Result<GuestStatus> {
    let until = end_of_wait(seconds);
    loop {
        let guest = look(machine, name)?;
        if wanted(&guest) {
            return Ok(guest);
        }
        if Instant::now() >= until {
            bail!("{name} {what}");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
