//! `umbra wait`: returns when a machine, a driver VM or a guest is as a script needs it.

use std::time::{Duration, Instant};

use anyhow::bail;

use super::connection::{Connection, Dropped, Ended, end_of_wait};
use super::exit::{self, Exit};
use crate::base::untrusted_text;
use crate::lifecycle::StateName;
use crate::record::health::{Health, Level};
use crate::record::status::{DriverStatus, GuestStateName, GuestStatus, Status};
use crate::supervisor::start::rundir::{self, RunDirError};

/// Interval at which the machine is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Arguments of `umbra wait`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit status: 0 as soon as it is so, 124 when the time is over, 1 when it cannot come about any more, 2 for wrong usage.\n\
        A machine that does not run yet is waited for as well.\n\n\
        Examples:\n  umbra wait live                 # all driver VMs serve\n  umbra wait standby nic0\n  \
        umbra wait off web --timeout 300 || umbra stop web --force"
)]
pub struct Args {
    /// What is waited for.
    #[arg(value_enum)]
    condition: Condition,
    /// Of this driver VM or guest alone; without it, of all that the machine has.
    vm: Option<String>,
    /// Seconds to wait.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    /// The machine, where several run.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
}

/// What can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Condition {
    /// The driver VM serves.
    Live,
    /// What is to take over from the driver VM is ready: a standby, a snapshot, or a spare with a carrier.
    Standby,
    /// The guest's vCPUs run.
    Running,
    /// The guest is off, or has failed.
    Off,
    /// All is well, as `umbra status --check` has it.
    Ok,
}

/// Waits.
///
/// # Errors
///
/// The time is over, or it cannot come about.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let until = end_of_wait(args.timeout);
    let mut machine = None;
    loop {
        let lacks = match look(&mut machine, args)? {
            None => return Ok(()),
            Some(lacks) => untrusted_text::line(&lacks),
        };
        if Instant::now() >= until {
            bail!(Exit::new(exit::TIMED_OUT, format!("after {} s: {lacks}", args.timeout)));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Looks at the machine, which is connected to first if it runs. What is lacking; nothing, once it is as it should be.
fn look(machine: &mut Option<Connection>, args: &Args) -> anyhow::Result<Option<String>> {
    let connected = match machine {
        Some(connected) => connected,
        None => match rundir::connect(&rundir::base(), args.name.as_deref()) {
            Ok((name, stream)) => machine.insert(Connection::over(name, stream)?),
            Err(error @ (RunDirError::NotRunning { .. } | RunDirError::NoneRunning(_))) => {
                return not_there(args, &error);
            }
            Err(error) => return Err(error.into()),
        },
    };
    match connected.status(None) {
        Ok(status) => lacking(args.condition, args.vm.as_deref(), &status),
        // It was silent for too long.
        Err(error) if error.is::<Dropped>() => connected.reopen().map(|()| Some(error.to_string())),
        // A machine ends with its last guest.
        Err(error) if error.is::<Ended>() && args.condition == Condition::Off => Ok(None),
        Err(error) => Err(error),
    }
}

/// The machine does not run: of one that has run, all guests are off.
fn not_there(args: &Args, error: &RunDirError) -> anyhow::Result<Option<String>> {
    let has_run = rundir::find(&rundir::base(), args.name.as_deref()).is_ok_and(|found| found.stream.is_none());
    if args.condition == Condition::Off && has_run { Ok(None) } else { Ok(Some(error.to_string())) }
}

/// What `status` lacks to be as it should.
///
/// # Errors
///
/// There is nothing of which that could become true.
fn lacking(condition: Condition, vm: Option<&str>, status: &Status) -> anyhow::Result<Option<String>> {
    let driver = |lacks: fn(&DriverStatus) -> Option<String>| {
        let chosen = chosen(&status.drivers, vm, "driver VM", |driver| &driver.name)?;
        anyhow::Ok(chosen.into_iter().find_map(lacks))
    };
    let guest = |lacks: fn(&GuestStatus) -> Option<String>| {
        let chosen = chosen(&status.guests, vm, "guest", |guest| &guest.name)?;
        anyhow::Ok(chosen.into_iter().find_map(lacks))
    };
    match condition {
        Condition::Live => driver(|driver| {
            let reason = driver.reason.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
            (driver.state != StateName::Live).then(|| format!("{} is {}{reason}", driver.name, driver.state))
        }),
        Condition::Standby => {
            let cold = |driver: &&DriverStatus| driver.standby.is_none();
            let drivers = chosen(&status.drivers, vm, "driver VM", |driver| &driver.name)?;
            if drivers.iter().all(cold) {
                let names: Vec<_> = drivers.iter().map(|driver| driver.name.as_str()).collect();
                bail!("nothing waits for a failure of {}: that is standby = \"cold\"", names.join(", "));
            }
            Ok(drivers.into_iter().find_map(lacks_standby))
        }
        Condition::Running => guest(|guest| {
            let reason = guest.reason.as_ref().map_or_else(String::new, |why| format!(": {why}"));
            (guest.state != GuestStateName::Running).then(|| format!("{} is {}{reason}", guest.name, guest.state))
        }),
        Condition::Off => guest(|guest| {
            let over = matches!(guest.state, GuestStateName::Off | GuestStateName::Failed);
            (!over).then(|| format!("{} is {}", guest.name, guest.state))
        }),
        Condition::Ok => {
            if let Some(vm) = vm {
                bail!("`ok` is of the whole machine: leave {vm} away, or wait until it is live or running");
            }
            let Health { health, reasons } = Health::of(status);
            Ok((health != Level::Ok).then(|| reasons.join("; ")))
        }
    }
}

fn lacks_standby(driver: &DriverStatus) -> Option<String> {
    let standby = driver.standby.as_ref()?;
    let reason = standby.reason.as_ref().map_or_else(String::new, |why| format!(": {why}"));
    (!standby.state.is_ready()).then(|| format!("the standby of {} is {}{reason}", driver.name, standby.state))
}

/// The one named `vm` of `all`, or all.
fn chosen<'a, T>(all: &'a [T], vm: Option<&str>, kind: &str, name: fn(&T) -> &String) -> anyhow::Result<Vec<&'a T>> {
    let chosen: Vec<_> = all.iter().filter(|it| vm.is_none_or(|vm| name(it) == vm)).collect();
    if !chosen.is_empty() {
        return Ok(chosen);
    }
    let names: Vec<_> = all.iter().map(|it| name(it).as_str()).collect();
    match (vm, names.as_slice()) {
        (_, []) => bail!("this machine has no {kind}"),
        (vm, names) => bail!("there is no {kind} named {}; there is {}", vm.unwrap_or_default(), names.join(", ")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::lifecycle::StandbyStage;
    use crate::record::status::testing::status;

    #[test]
    fn what_is_lacking_is_said() {
        let lacks = |condition, vm, status: &Status| lacking(condition, vm, status).unwrap();
        let mut status = status();
        for condition in [Condition::Live, Condition::Standby, Condition::Running, Condition::Ok] {
            assert_eq!(lacks(condition, None, &status), None);
        }
        assert_eq!(lacks(Condition::Off, Some("web"), &status).unwrap(), "web is running");
        status.drivers[0].state = StateName::Booting;
        status.drivers[0].standby.as_mut().unwrap().state = StandbyStage::Due;
        status.guests[0].state = GuestStateName::Failed;
        status.guests[0].reason = Some("killed".into());
        assert_eq!(lacks(Condition::Live, None, &status).unwrap(), "nic0 is booting (kernel panic)");
        assert_eq!(lacks(Condition::Standby, Some("nic0"), &status).unwrap(), "the standby of nic0 is due");
        assert_eq!(lacks(Condition::Running, None, &status).unwrap(), "web is failed: killed");
        assert_eq!(lacks(Condition::Off, None, &status), None);
        assert_eq!(lacks(Condition::Ok, None, &status).unwrap(), "web has failed: killed; nic0 is booting");
    }

    #[test]
    fn what_cannot_come_about_is_an_error_at_once() {
        let mut status = status();
        status.drivers[0].standby = None;
        for (condition, vm, said) in [
            (Condition::Live, Some("web"), "there is no driver VM named web; there is nic0"),
            (Condition::Off, Some("nic0"), "there is no guest named nic0; there is web"),
            (Condition::Standby, None, "nothing waits for a failure of nic0: that is standby = \"cold\""),
            (
                Condition::Ok,
                Some("web"),
                "`ok` is of the whole machine: leave web away, or wait until it is live or running",
            ),
        ] {
            assert_eq!(lacking(condition, vm, &status).unwrap_err().to_string(), said);
        }
        status.drivers.clear();
        let said = lacking(Condition::Live, None, &status).unwrap_err().to_string();
        assert_eq!(said, "this machine has no driver VM");
    }
}
