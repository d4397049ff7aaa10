//! Strikes a driver VM at a stage of its way up. Between "carrier" and "live", when the splitter replays its log, are a few
//! milliseconds, too few for a watcher outside the test host.

use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::patience::scaled;
use crate::demo::events::{Event, Follow};

/// Longest time without any event.
const PATIENCE: Duration = Duration::from_secs(120);

/// Follows the events file from its end, finds the process of the next life as soon as its agent speaks, and kills it when
/// it has come to the stage `wanted`. Returns the generation.
///
/// # Errors
/// Nothing was told for [`PATIENCE`] before a new life came, or `umbra status` knows no process.
pub fn kill_at(wanted: &str, events: &Path) -> Result<u32, Box<dyn Error>> {
    let mut follow = Follow::new(events.into());
    while follow.take().is_some() {}
    let stage = |event: &Event, name: &str| event.event == "driver-stage" && event.text("stage") == name;
    // A standby that is ready has said hello long before.
    await_event(&mut follow, |event| stage(event, "hello") || event.event == "driver-adopted")?;
    let pid = driver_pid()?;
    let event = await_event(&mut follow, |event| stage(event, wanted))?;
    kill(pid, Signal::SIGKILL)?;
    Ok(event.generation)
}

fn await_event(follow: &mut Follow, wanted: impl Fn(&Event) -> bool) -> Result<Event, Box<dyn Error>> {
    let (mut start, patience) = (Instant::now(), scaled(PATIENCE));
    while start.elapsed() < patience {
        match follow.take() {
            Some(event) if wanted(&event) => return Ok(event),
            Some(_) => start = Instant::now(),
            None => thread::sleep(Duration::from_micros(200)),
        }
    }
    Err("no new driver VM came up in time".into())
}

fn driver_pid() -> Result<Pid, Box<dyn Error>> {
    let output = Command::new("umbra").args(["status", "--json"]).output()?;
    let status: Value = serde_json::from_slice(&output.stdout)?;
    let pid = status["drivers"][0]["pid"].as_i64().ok_or("umbra status knows no process of the driver VM")?;
    Ok(Pid::from_raw(i32::try_from(pid)?))
}
