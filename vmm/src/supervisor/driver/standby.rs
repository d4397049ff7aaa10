//! The standby's process: started at low priority, watched while it waits, given the device when its turn comes.
//!
//! It has its links to the guests from the start (their splitters keep them beside the serving ones), but for sound,
//! whose link is a plain stream that begins with its service. What it says is believed as little as what a serving
//! driver VM says; a fault costs it its place.

use std::fs;
use std::time::Duration;

use umbra_driver_vm::protocol::{FromAgent, ToAgent};
use umbra_shadow::Generation;

use super::console::Console;
use super::life::{Heard, LifeRole, Purpose};
use super::{DriverVm, StandbyVm};
use crate::base::time::{Time, milliseconds};
use crate::lifecycle::{Carrier, Input, NoticedBy, Rank, StandbyStage};
use crate::record::events::Event;
use crate::record::status::{CgroupStatus, SecondStatus, StandbyStatus};
use crate::record::timeline::{LifeStage, Milestone};
use crate::supervisor::bounds;
use crate::supervisor::ids::DriverId;
use crate::supervisor::run::Supervisor;
use crate::wire::messages::{FromVm, ToVm};
use crate::wire::spawn::{Exit, VmProcess, describe_exit};

/// Nice value of a standby that boots: guests that are served go before it.
const NICE: i32 = 10;

/// Grace period after a closed link of a standby. It is usually a side effect of its death, whose own event gives a better reason.
const SUSPICION: Duration = Duration::from_millis(100);

impl Supervisor {
    pub(in crate::supervisor) fn spawn_standby(&mut self, (n, rank): (DriverId, Rank), generation: Generation) {
        let driver = &mut self.drivers[n];
        self.events.tell(&Event::StandbyStarting { driver: driver.name.clone(), generation: generation.get() });
        let purpose = if driver.spare.is_some() { Purpose::WaitWithSpare } else { Purpose::Wait };
        self.launch_standby((n, rank), generation, purpose);
    }

    /// Starts a process beside the present life.
    pub(in crate::supervisor) fn launch_standby(
        &mut self,
        (n, rank): (DriverId, Rank),
        generation: Generation,
        purpose: Purpose,
    ) {
        let driver = &mut self.drivers[n];
        match driver.launch(&self.program, generation, (purpose, driver.next_image())) {
            Ok(life) => {
                if may_renice() && purpose != Purpose::ServeSoon && !driver.lifecycle.awaits_spare() {
                    renice(&life.process, NICE);
                }
                let (console, started) = (Console::in_memory(), Time::now());
                driver.clear(rank);
                *driver.waiting_mut(rank) = Some(StandbyVm {
                    life,
                    console,
                    started,
                    kernel: None,
                    kernel_driver: None,
                    available_memory: None,
                    restored: false,
                    ready: false,
                    dropped: None,
                    suspicion: None,
                });
                self.connect_ends(n);
            }
            Err(error) => self.drive(n, Input::StandbyFailed(rank, error.to_string())),
        }
    }

    /// The second standby is the first from now on, and is connected with the guests.
    pub(in crate::supervisor) fn move_up(&mut self, n: DriverId) {
        let driver = &mut self.drivers[n];
        driver.clear(Rank::First);
        driver.standby = driver.second.take();
        self.connect_ends(n);
    }

    pub(in crate::supervisor) fn drop_standby(&mut self, n: DriverId, rank: Rank, why: Option<String>) {
        let driver = &mut self.drivers[n];
        let mut dropped = None;
        if let Some(standby) = driver.waiting_mut(rank) {
            // What is left of it is cleared away when its end is seen.
            standby.life.process.kill();
            standby.dropped.get_or_insert(Time::now());
            dropped = Some(standby.life.generation);
        }
        let generation = dropped.map_or(0, Generation::get);
        if let Some(dropped) = dropped {
            if why.is_none() {
                driver.trust.unwanted(dropped);
            }
            if let Some(spare) = &mut driver.spare {
                spare.held.fence();
            }
        }
        if let Some(reason) = why {
            self.events.tell(&Event::StandbyFailed { driver: driver.name.clone(), generation, reason });
        }
        if dropped.is_none() {
            self.drive(n, Input::SpareFenced);
        }
    }

    /// The standby becomes the present life, and gets the device.
    pub(in crate::supervisor) fn adopt(&mut self, n: DriverId, generation: Generation) {
        let now = Time::now();
        let driver = &mut self.drivers[n];
        let Some(standby) = driver.standby.take_if(|standby| standby.life.generation == generation) else {
            return self.fail_driver(n, NoticedBy::Start, "the standby is gone", now);
        };
        let StandbyVm { life, console, started, kernel, ready, .. } = standby;
        let name = format!("{}.{generation}", driver.name);
        driver.console.take_over(&name, console);
        driver.timeline.mark(Milestone::Spawn, now);
        if kernel.is_some() {
            driver.timeline.mark(Milestone::Hello, now);
            driver.kernel = kernel;
        }
        if !ready {
            renice(&life.process, 0);
        }
        tracing::debug!(driver = driver.name, waited_ms = milliseconds(now.since(started)), "adopt the standby");
        (driver.life, driver.rest) = (Some(life), None);
        driver.present = Some(generation);
        let standby = if ready { StandbyStage::Ready } else { StandbyStage::Booting };
        let (name, device) = (driver.name.clone(), driver.device.bdf().to_string());
        let waited = driver.life.as_ref().is_some_and(|life| life.purpose != Purpose::ServeSoon);
        self.give_device(n);
        let generation = generation.get();
        self.events.tell(&match waited {
            true => Event::DriverAdopted { driver: name, generation, device, standby },
            false => Event::DriverStarting { driver: name, generation },
        });
    }

    pub(super) fn plug(&mut self, n: DriverId) {
        let driver = &self.drivers[n];
        let Some(life) = &driver.life else { return };
        let message = ToVm::Plug { device: driver.device.bdf().to_string() };
        let files = match driver.held.files() {
            Ok(files) => files.to_send(),
            Err(why) => return self.fail_driver(n, NoticedBy::Start, why, Time::now()),
        };
        if let Err(error) = life.process.channel().send_now(&message, &files) {
            self.fail_driver(n, NoticedBy::ProcessExit, format!("its process: {error}"), Time::now());
        }
    }

    /// The device is on the bus of the adopted standby: its kernel has to look for it.
    pub(in crate::supervisor) fn on_plugged(&mut self, n: DriverId, at: Time) {
        // The time line first: it shows whether the agent can be sent anything yet.
        self.drivers[n].timeline.mark(Milestone::Plugged, at);
        self.rescan(n);
        self.told_stage(n, LifeStage::Plugged, String::new());
    }

    /// Has the agent look for the device, once the device is there and the agent has said hello.
    pub(in crate::supervisor) fn rescan(&mut self, n: DriverId) {
        let driver = &mut self.drivers[n];
        let (plugged, hello) = (driver.timeline.at(Milestone::Plugged), driver.timeline.at(Milestone::Hello));
        if plugged.is_some() && hello.is_some() {
            self.tell_agent(n, &ToAgent::Rescan);
        }
    }

    /// The standby of driver VM `n` has said or done something; why it is given up, if it is. Of a dropped standby only the end is
    /// awaited.
    pub(super) fn on_standby(&mut self, (n, rank): (DriverId, Rank), heard: Heard) -> Option<String> {
        if self.drivers[n].waiting(rank)?.dropped.is_some() && !matches!(heard, Heard::Exited(_)) {
            return None;
        }
        match heard {
            Heard::Process(message) => self.on_standby_vm((n, rank), message),
            Heard::ControlClosed => Some(self.drivers[n].waiting(rank)?.life.process.describe_closed()),
            Heard::Agent(message) => self.on_standby_message((n, rank), message),
            Heard::ControlBroken(what) | Heard::Nonsense(what) => Some(what),
            Heard::AgentLost(error) => Some(format!("its agent's control stream: {error}")),
            // A standby whose kernel is dying must not be adopted.
            Heard::Fatal(fatal) => Some(fatal.in_words().into()),
            Heard::Exited(exit) => self.standby_gone((n, rank), exit),
        }
    }

    fn on_standby_vm(&mut self, (n, rank): (DriverId, Rank), message: FromVm) -> Option<String> {
        match message {
            FromVm::Panicking { .. } | FromVm::Panicked { .. } => Some("kernel panic".into()),
            FromVm::Failed { what, .. } => Some(what),
            FromVm::DeviceFailed { device, what, .. } => {
                if let Some(spare) = &mut self.drivers[n].spare {
                    spare.held.doubt();
                }
                Some(format!("device {device}: {what}"))
            }
            FromVm::Ended { .. } => Some("the VM ended".into()),
            FromVm::Disconnected { end, link, why } => {
                self.on_disconnected(n, LifeRole::Standby(rank), end, link, &why);
                None
            }
            FromVm::Snapshot { news } if rank == Rank::First && self.drivers[n].has_taker() => {
                self.on_taker_news(n, news)
            }
            FromVm::Snapshot { news } => {
                self.on_snapshot(n, LifeRole::Standby(rank), &news);
                None
            }
            // Without guests and without a device there is nothing else to say.
            _ => None,
        }
    }

    fn on_standby_message(&mut self, (n, rank): (DriverId, Rank), message: FromAgent) -> Option<String> {
        let driver = &mut self.drivers[n];
        let is_spare = driver.spare.is_some();
        let standby = driver.waiting_mut(rank).as_mut()?;
        match message {
            FromAgent::Ready { loaded, unused } => self.on_agent_ready((n, LifeRole::Standby(rank)), loaded, unused),
            FromAgent::Hello { generation, kernel, panic_entries, .. } => {
                if generation != standby.life.generation.get() {
                    return Some(format!("its agent says that it is generation {generation}"));
                }
                standby.kernel = Some(bounds::text(&kernel));
                standby.life.watch_for_panic(panic_entries);
                let generation = standby.life.generation;
                driver.trust.said_hello(generation);
                self.drive(n, Input::StandbyHello(rank));
            }
            // A spare is ready when it forwards.
            FromAgent::Loaded { .. } if !is_spare => {
                self.standby_ready(n, rank);
                self.drive(n, Input::StandbyLoaded(rank));
            }
            FromAgent::Nic { driver: name, .. } if is_spare => {
                standby.kernel_driver = Some(bounds::text(&name));
            }
            FromAgent::Forwarding { .. } => self.drive(n, Input::SpareForwarding),
            FromAgent::Carrier { up, mode, .. } => {
                standby.life.link_mode = mode;
                if standby.life.flaps.count(Time::now()) {
                    return Some(crate::supervisor::class::carrier::FLOOD.into());
                }
                self.drive(n, Input::SpareCarrier(if up { Carrier::Up } else { Carrier::Down }));
            }
            FromAgent::Heartbeat { available_memory, .. } => {
                standby.available_memory = Some(available_memory);
                self.drive(n, Input::StandbyHeartbeat(rank));
            }
            FromAgent::Failed { what } => return Some(bounds::text(&what)),
            // Without a device there is nothing else to say.
            _ => {}
        }
        None
    }

    pub(in crate::supervisor) fn standby_ready(&mut self, n: DriverId, rank: Rank) {
        let driver = &mut self.drivers[n];
        let Some(standby) = driver.waiting_mut(rank) else { return };
        standby.ready = true;
        renice(&standby.life.process, 0);
        let (generation, restored) = (standby.life.generation.get(), standby.restored);
        let boot_ms = milliseconds(Time::now().since(standby.started));
        if standby.life.purpose == Purpose::ServeSoon {
            // It is taken in a moment.
            return;
        }
        self.events.tell(&Event::StandbyReady { driver: driver.name.clone(), generation, boot_ms, restored });
    }

    /// A standby's process has ended, by itself or because it was dropped.
    fn standby_gone(&mut self, (n, rank): (DriverId, Rank), exit: Exit) -> Option<String> {
        let driver = &mut self.drivers[n];
        let standby = driver.waiting_mut(rank).take()?;
        if standby.dropped.is_some() {
            drop(standby);
            self.drive(n, Input::SpareFenced);
            return None;
        }
        let title = format!("{}.{} (a standby that died)", driver.name, standby.life.generation);
        let said = standby.console.tail();
        if standby.life.purpose == Purpose::Save {
            // Another one is tried; what does not help is reported by then.
            tracing::info!(driver = driver.name, said, "{title}");
        } else {
            tracing::warn!(driver = driver.name, said, "{title}");
        }
        Some(describe_exit(exit))
    }
}

impl DriverVm {
    /// Makes room for a life that waits with this rank: one that was dropped and has not ended yet is not waited for.
    fn clear(&mut self, rank: Rank) {
        if let Some(dropped) = self.waiting_mut(rank).take() {
            self.reap(dropped.life.process, false);
        }
    }

    /// Suspects the standby of having failed; gives it up later, unless a better reason comes.
    pub(in crate::supervisor) fn suspect_standby(&mut self, why: String) {
        if let Some(standby) = &mut self.standby {
            standby.suspicion.get_or_insert((Time::now() + SUSPICION, why));
        }
    }

    /// When the standby is to be given up on suspicion.
    pub(in crate::supervisor) fn suspicion_due(&self) -> Option<Time> {
        self.standby.as_ref().filter(|standby| standby.dropped.is_none())?.suspicion.as_ref().map(|(due, _)| *due)
    }

    /// Why the standby is given up at `now`, if nothing better has come.
    pub(in crate::supervisor) fn take_suspicion(&mut self, now: Time) -> Option<String> {
        self.suspicion_due().filter(|due| *due <= now)?;
        self.standby.as_mut()?.suspicion.take().map(|(_, why)| why)
    }

    fn second_status(&self) -> SecondStatus {
        let state = self.lifecycle.second_standby();
        let generation = state.generation();
        let process = self.second.as_ref().filter(|_| generation.is_some()).map(|vm| &vm.life.process);
        let (pid, uid) = (process.map(VmProcess::pid), process.and_then(VmProcess::uid));
        let cgroup = process.and_then(CgroupStatus::of);
        SecondStatus { state: state.stage(), generation: generation.map(Generation::get), pid, uid, cgroup }
    }

    pub(in crate::supervisor) fn standby_status(&self) -> Option<StandbyStatus> {
        let state = self.lifecycle.standby();
        let ahead = self.spare.is_some() || self.spec.standby != crate::config::Standby::Cold;
        let vm = self.standby.as_ref().filter(|_| state.generation().is_some());
        ahead.then(|| StandbyStatus {
            state: state.stage(),
            device: self.spare.as_ref().map(|spare| spare.device.bdf().to_string()),
            network: self.spare.as_ref().map(|spare| spare.network()),
            generation: state.generation().map(Generation::get),
            pid: vm.map(|vm| vm.life.process.pid()),
            uid: vm.and_then(|vm| vm.life.process.uid()),
            cgroup: vm.and_then(|vm| CgroupStatus::of(&vm.life.process)),
            second: (self.spec.standbys > 1).then(|| self.second_status()),
            age_s: vm.map(|vm| Time::now().since(vm.started).as_secs_f64()),
            reason: self.lifecycle.spare_is_held().or_else(|| self.lacks_snapshot()),
        })
    }
}

/// Whether what was made nice can be made as before.
fn may_renice() -> bool {
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NICE);
    // A limit of 20 is a nice value of 0 (getrlimit(2)).
    nix::unistd::geteuid().is_root() || limit.is_ok_and(|(soft, _)| soft >= 20)
}

/// Sets the nice value of all threads of a process; those that they start have it as well.
pub(in crate::supervisor) fn renice(process: &VmProcess, nice: i32) {
    renice_threads(process.pid(), nice, |_| true);
    if let Some(group) = process.group() {
        group.set_nice(nice);
    }
}

/// Sets the nice value of the vCPUs of `pid`.
pub(in crate::supervisor) fn renice_vcpus(pid: u32, nice: i32) {
    renice_threads(pid, nice, |name| name.starts_with("vcpu"));
}

fn renice_threads(pid: u32, nice: i32, wanted: impl Fn(&str) -> bool) {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return };
    for thread in threads.flatten() {
        let Some(id) = thread.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if !fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| wanted(&name)) {
            continue;
        }
        // SAFETY: the call takes no pointers; a thread that has just ended is an error without consequence.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, id, nice) };
    }
}
