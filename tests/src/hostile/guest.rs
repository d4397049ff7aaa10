//! The campaign of a hostile guest: root in it attacks by the guest's own devices, life after life, and the guest is killed and started
//! again after each attack. What it shares with the honest one, NIC and driver VM, has to stay as it is.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use super::campaign::{HONEST, HostileSpec, NOTHING, STEP, Tally, words};
use super::plan;
use super::vm::GIVES_UP;
use crate::assets::{Assets, Say};
use crate::bench::{Bench, BenchSpec, patience};
use crate::demo::DemoError;
use crate::demo::events::Event;
use crate::demo::machine::{Machine, MachineSpec};
use crate::demo::place::Place;
use crate::peer::{guest_address, peer_address};

/// The guest that attacks.
const HOSTILE: &str = "hostile";
/// What the program says last.
const UNSTOPPED: &str = "hostile: nothing has stopped";
/// Between two looks at what it says.
const LOOK: Duration = Duration::from_millis(100);
/// Longest silence while it boots.
const BOOT: Duration = Duration::from_secs(120);
/// Lives of driver VMs that begin or end: none may.
const OF_DRIVERS: [&str; 6] =
    ["driver-failed", "driver-starting", "driver-live", "standby-failed", "standby-starting", "quarantined"];

/// A test host with the NIC, and a machine with both guests on it.
pub(super) fn stage(spec: &HostileSpec, assets: &Assets, say: Say<'_>) -> Result<(Place, MachineSpec), DemoError> {
    let image = assets.driver_image(&spec.nic)?;
    let mut bench = BenchSpec::new("hostile").nics(&[spec.nic.name()]);
    bench.files = vec![image.clone()];
    say(&format!("booting the test host with {}; seed {}", spec.nic, spec.seed));
    let mut bench = Bench::boot(bench, assets)?;
    let device = bench.expect("vfio $NIC0 && printf %s $NIC0", STEP)?;
    let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut machine = MachineSpec::one_guest(&device, &name, "");
    machine.guests = (0..)
        .zip([HONEST, HOSTILE])
        .map(|(guest, name)| (name.into(), format!("{}/24", guest_address(0, guest))))
        .collect();
    // Registers that a driver holds can be mapped.
    machine.guest_options = "iomem=relaxed".into();
    Ok((Place::Bench(Box::new(bench)), machine))
}

/// Has the guest attack until the time is over and it is served once more.
pub(super) fn attack(
    spec: &HostileSpec,
    (place, machine): (&mut Place, &mut Machine),
    tally: &mut Tally,
    say: Say<'_>,
) -> Result<(), DemoError> {
    let (begin, length) = (Instant::now(), Duration::from_secs(spec.seconds.into()));
    for life in 0.. {
        place.in_guest(HOSTILE, &format!("umbra-probe first-answer {} 30", peer_address(0)), STEP)?;
        tally.served += 1;
        if begin.elapsed() >= length {
            break;
        }
        machine.drain();
        let before = (machine.seen.len(), console(place).len());
        let program = format!("(umbra-probe hostile-guest {} {life} </dev/null >/dev/null 2>&1 &)", spec.seed);
        place.in_guest(HOSTILE, &program, STEP)?;
        let (attack, _) = plan::of_guest(spec.seed, life);
        let said = await_end(place, machine, before);
        let is_said = |what: &str| said.contains(&format!("hostile: {what}"));
        if !is_said(&format!("life {life}: {attack:?}")) || is_said(&format!("{attack:?} cannot be done")) {
            tally.breaches.push(format!("life {life}: {attack:?} was not tried"));
        }
        let usual = if said.contains(UNSTOPPED) { NOTHING } else { "its own kernel" };
        let (by, reason) = machine.seen[before.0..].iter().find_map(stopped_by).unwrap_or((usual, String::new()));
        say(&format!("[{:5.0} s] life {life}: {attack:?}, stopped by {by}: {reason}", begin.elapsed().as_secs_f64()));
        tally.add(attack, by, &reason);
        place.expect(&format!("umbra reboot {HOSTILE} --force || umbra start {HOSTILE}"), BOOT)?;
        machine.await_event(BOOT, |event| event.event == "guest-running" && event.text("guest") == HOSTILE)?;
        let of_drivers = machine.seen[before.0..].iter().filter(|event| OF_DRIVERS.contains(&event.event.as_str()));
        tally.breaches.extend(of_drivers.map(|event| format!("{attack:?}: {}", words(event))));
    }
    Ok(())
}

/// Waits until the program has nothing more to do, its guest has ended, or nothing of it is heard any more; what the guest's console has
/// had since. Events and the console's bytes are counted from `before` on. An attack that is cut short on a slow machine does no harm.
fn await_end(place: &Place, machine: &mut Machine, before: (usize, usize)) -> String {
    let (begin, limit) = (Instant::now(), GIVES_UP * 3 * patience::whole_factor());
    loop {
        machine.drain();
        let console = console(place);
        // A console that was full has begun anew.
        let said = String::from_utf8_lossy(console.get(before.1..).unwrap_or(&console)).into_owned();
        let ended = machine.seen[before.0..].iter().any(|event| stopped_by(event).is_some());
        if ended || said.contains(UNSTOPPED) || begin.elapsed() >= limit {
            return said;
        }
        thread::sleep(LOOK);
    }
}

/// All that the hostile guest's console has; nothing before it has said something.
fn console(place: &Place) -> Vec<u8> {
    fs::read(place.share().join(format!("{HOSTILE}.log"))).unwrap_or_default()
}

/// What an event says of the end of an attack, if it does.
fn stopped_by(event: &Event) -> Option<(&'static str, String)> {
    let by = match event.event.as_str() {
        _ if event.text("guest") != HOSTILE => return None,
        "guest-ended" => "the guest's end",
        "guest-rebooted" => "the guest's reset",
        "masked" => "its link's end",
        _ => return None,
    };
    Some((by, format!("{}{}", event.text("how"), event.text("reason"))))
}
