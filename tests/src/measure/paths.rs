//! The ways from a guest to the peer, side by side in one test host, each with a NIC and a guest of its own, measured in turns.

use std::time::Duration;

use super::qemu_guest;
use super::results::{PathFigures, Results};
use super::slice::{Kind, Slice};
use super::{MeasureSpec, STANDBY};
use crate::assets::Say;
use crate::demo::DemoError;
use crate::demo::machine::{Attach, Machine, MachineSpec, NIC_DRIVER};
use crate::demo::place::Place;
use crate::peer::{guest_address, peer_address};

/// How often the rounds are made until no driver VM fails meanwhile.
const ATTEMPTS: u32 = 3;

/// A way to the peer, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Through a driver VM.
    DriverVm,
    /// The NIC is the guest's own.
    Passthrough,
    /// What a user would pick instead.
    Tap,
    /// The same, with a thread of the kernel that moves frames.
    VhostNet,
}

impl Way {
    pub(super) const ALL: [Self; 4] = [Self::DriverVm, Self::Passthrough, Self::Tap, Self::VhostNet];

    fn title(self) -> &'static str {
        match self {
            Self::DriverVm => "driver VM",
            Self::Passthrough => "passthrough",
            Self::Tap => "QEMU, TAP and bridge",
            Self::VhostNet => "QEMU, vhost-net and bridge",
        }
    }

    /// The name of its guest.
    pub(super) fn guest(self) -> &'static str {
        match self {
            Self::DriverVm => super::GUEST,
            Self::Passthrough => "straight",
            Self::Tap => "tap",
            Self::VhostNet => "vhost",
        }
    }

    /// Which NIC it has.
    pub(super) fn nic(self) -> usize {
        self as usize
    }
}

/// The machine with the driver VM, ready to be started.
pub(super) fn machine(place: &mut Place, image: &str, restart_limit: u32) -> Result<MachineSpec, DemoError> {
    let nic = Way::DriverVm.nic();
    let device = device(place, nic)?;
    Ok(MachineSpec { restart_limit, ..MachineSpec::one_guest(&device, image, &address(nic)) })
}

/// Has all ways measured; the machines with the driver VM and with the NIC passed through, which run on.
pub(super) fn measure(
    (place, machine): (&mut Place, &MachineSpec),
    spec: &MeasureSpec,
    results: &mut Results,
    say: Say<'_>,
) -> Result<[Machine; 2], DemoError> {
    say("starting a guest on each path");
    let device = device(place, Way::Passthrough.nic())?;
    let name = Way::Passthrough.guest();
    let straight = MachineSpec {
        name: name.into(),
        attach: Attach::Passthrough,
        guests: vec![(name.into(), address(Way::Passthrough.nic()))],
        ..MachineSpec::one_guest(&device, "", "")
    };
    let mut machines = [Machine::start(place, machine)?, Machine::start(place, &straight)?];
    let mut others = Vec::new();
    for (way, vhost) in [(Way::Tap, "off"), (Way::VhostNet, "on")] {
        others.push(qemu_guest::start_with_nic(place, (way.guest(), way.nic()), vhost)?);
    }
    for way in Way::ALL {
        let reach = format!("umbra-probe first-answer {} 30", peer_address(way.nic()));
        place.in_guest(way.guest(), &reach, Duration::from_secs(60))?;
    }
    let mut slices = Vec::new();
    for attempt in 1..=ATTEMPTS {
        machines[0].await_standby(NIC_DRIVER, STANDBY)?;
        let before = machines[0].seen.len();
        slices = rounds(place, &mut machines, spec, say)?;
        machines[0].drain();
        let Some(failed) = machines[0].seen[before..].iter().find(|event| event.event == "driver-failed") else {
            break;
        };
        let what = format!("the driver VM failed meanwhile: {}", failed.text("reason"));
        if attempt == ATTEMPTS {
            return Err(DemoError::Umbra { what, said: machines[0].said() });
        }
        say(&format!("    {what}; measured again"));
    }
    let figures = |(way, slices): (Way, _)| PathFigures { name: way.title().into(), slices };
    results.paths = Way::ALL.into_iter().zip(slices).map(figures).collect();
    others.into_iter().try_for_each(|guest| guest.stop(place))?;
    Ok(machines)
}

/// Slices by way, in the order of the rounds.
fn rounds(
    place: &mut Place,
    [driver_vm, straight]: &mut [Machine; 2],
    spec: &MeasureSpec,
    say: Say<'_>,
) -> Result<Vec<Vec<Slice>>, DemoError> {
    let mut all = vec![Vec::new(); Way::ALL.len()];
    for round in 0..spec.rounds {
        say(&format!("round {} of {}", round + 1, spec.rounds));
        for kind in Kind::ALL {
            let mut ways = Way::ALL;
            if round % 2 == 1 {
                ways.reverse();
            }
            for way in ways {
                let machine = match way {
                    Way::DriverVm => Some(&mut *driver_vm),
                    Way::Passthrough => Some(&mut *straight),
                    Way::Tap | Way::VhostNet => None,
                };
                let slice = Slice::take((machine, place), (way.guest(), way.nic()), kind, spec.seconds)?;
                say(&format!("    {}: {} {:.0}", way.title(), kind.title(), slice.figure));
                all[way.nic()].push(slice);
            }
        }
    }
    Ok(all)
}

fn device(place: &mut Place, nic: usize) -> Result<String, DemoError> {
    place.expect(&format!("vfio $NIC{nic} && printf %s $NIC{nic}"), Duration::from_secs(30))
}

fn address(nic: usize) -> String {
    format!("{}/24", guest_address(nic, 0))
}
