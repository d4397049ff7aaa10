//! A machine for `umbra run` with one driver VM and guests on it: the file, started and watched in a [`Place`].
//!
//! Scenarios use it as well as the demo. Images are copied to memory of the test host first: every cold start of a
//! driver VM reads them.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::DemoError;
use super::events::{Event, Follow};
use super::place::Place;
use crate::bench::guest::{self, SOCKETS};
use crate::bench::patience::{Stall, factor, whole_factor};
use crate::probe::client::Run;
use crate::probe::wire::{LONG_PORT_NAME, PORT_NAME};

/// Longest time in which a machine that starts may tell and print nothing, as on the reference machine; two minutes on an idle
/// one are unheard of.
const START_LIMIT: Duration = Duration::from_secs(150);
/// The same for a single command.
const STEP: Duration = Duration::from_secs(60);

/// `boot_timeout_s` of driver VMs on the reference machine: Umbra's own default.
const BOOT_S: f64 = 60.0;

/// The machine's name where there is one only.
const MACHINE: &str = "machine";

/// Names of the driver VMs.
pub const NIC_DRIVER: &str = "nic0";
/// That of a second NIC ([`SecondNic`]).
pub const SECOND_DRIVER: &str = "nic1";
/// That of the sound card.
pub const SOUND_DRIVER: &str = "snd0";
/// That of the disk controller.
pub const DISK_DRIVER: &str = "disk0";
/// Memory of the driver VM of a sound card.
const SOUND_MEMORY: &str = "128M";
/// That of a disk controller: 16 MiB more, for the pool of data.
const DISK_MEMORY: &str = "144M";

/// How the guests reach the NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// Through a driver VM.
    DriverVm,
    /// The NIC is the (only) guest's own.
    Passthrough,
    /// There is none.
    Without,
}

/// A sound card behind a driver VM `snd0`, which every guest has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SoundCard {
    /// Its PCI address in the place.
    pub device: String,
    /// Folder name of the driver VM image in the share.
    pub image: String,
    /// `skip` or `hold`.
    pub policy: String,
}

/// A second NIC behind a driver VM of its own, `nic1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecondNic {
    /// Its PCI address in the place.
    pub device: String,
    /// Folder name of the driver VM image in the share.
    pub image: String,
    /// The guest that has this NIC in place of the first.
    pub guest: String,
}

/// A disk controller behind a driver VM `disk0`; every guest has its disk, behind those that are files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskController {
    /// Its PCI address in the place.
    pub device: String,
    /// Folder name of the driver VM image in the share.
    pub image: String,
    /// More lines for each guest's disk, as `start = "64M"`; none for those that it has none for.
    pub options: Vec<String>,
}

/// What the machine is made of.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// The machine's name, and that of its files in the share.
    pub name: String,
    /// The program that runs it, as a shell in the place finds it.
    pub program: String,
    /// Lines for the machine itself, as `cgroup = "/umbra"`.
    pub options: String,
    /// The NIC's PCI address in the place.
    pub device: String,
    /// A second NIC on the same network, the spare.
    pub spare: Option<String>,
    /// Another NIC, of one of the guests.
    pub second: Option<SecondNic>,
    /// Folder name of the driver VM image in the share.
    pub image: String,
    /// Guests: name and address with prefix length; `dhcp` asks for one.
    pub guests: Vec<(String, String)>,
    /// With or without a driver VM.
    pub attach: Attach,
    /// Sound beside the network.
    pub sound: Option<SoundCard>,
    /// A disk controller beside the network.
    pub controller: Option<DiskController>,
    /// Guests that do not have the card.
    pub without_card: Vec<String>,
    /// How long a driver VM's image waits in its boot by itself, seconds: `boot_timeout_s` is longer by that.
    pub slow_boot_s: u32,
    /// More archives for the guests' initramfs, in the share.
    pub archives: Vec<String>,
    /// Files or block devices of the place, disks of every guest.
    pub disks: Vec<String>,
    /// Memory of each guest.
    pub guest_memory: String,
    /// More words for the guests' kernels.
    pub guest_options: String,
    /// `[driver.*.restart]` limit.
    pub restart_limit: u32,
    /// `[driver.*.restart]` interrupts_per_s.
    pub interrupts_per_s: u32,
    /// Memory of the driver VM.
    pub driver_memory: String,
    /// `warm`, `snapshot` or `cold`.
    pub standby: String,
    /// How many wait, where it is `warm`.
    pub standbys: u8,
    /// More lines for each driver VM, as `cmdline = "init_on_alloc=0"`.
    pub driver_options: String,
    /// Driver VMs are restored from snapshots.
    pub snapshots: bool,
    /// The folder of snapshots in the place, where it is not that of all test hosts.
    pub snapshot_folder: Option<String>,
}

impl MachineSpec {
    /// One guest `web` on `device`.
    pub fn one_guest(device: &str, image: &str, address: &str) -> Self {
        Self {
            name: MACHINE.into(),
            program: "umbra".into(),
            options: String::new(),
            device: device.into(),
            spare: None,
            second: None,
            image: image.into(),
            guests: vec![("web".into(), address.into())],
            attach: Attach::DriverVm,
            sound: None,
            controller: None,
            without_card: Vec::new(),
            slow_boot_s: 0,
            archives: Vec::new(),
            disks: Vec::new(),
            guest_memory: "256M".into(),
            guest_options: String::new(),
            restart_limit: 5,
            interrupts_per_s: 200_000,
            driver_memory: "128M".into(),
            standby: "warm".into(),
            standbys: 1,
            driver_options: String::new(),
            snapshots: true,
            snapshot_folder: None,
        }
    }

    /// The file for `umbra run`; `work` is a folder of the place with kernel and images.
    pub fn to_toml(&self, work: &str, share: &str) -> String {
        let patience = whole_factor();
        let mut text = self.options.clone();
        for (n, (name, address)) in self.guests.iter().enumerate() {
            let nic = match self.attach {
                Attach::DriverVm => format!("[[guest.{name}.net]]\ndriver = \"{}\"\n", self.nic_driver_of(name)),
                Attach::Passthrough => format!("passthrough = [\"{}\"]\n", self.device),
                Attach::Without => String::new(),
            };
            let archives: String = self.archives.iter().map(|name| format!(", \"{work}/{name}\"")).collect();
            let card = self.sound.as_ref().filter(|_| !self.without_card.contains(name)).map(|card| {
                format!("[[guest.{name}.sound]]\ndriver = \"{SOUND_DRIVER}\"\npolicy = \"{}\"\n", card.policy)
            });
            let sound = card.unwrap_or_default();
            let disk = |path: &String| format!("[[guest.{name}.disk]]\npath = \"{path}\"\n");
            let mut disks: String = self.disks.iter().map(disk).collect();
            if let Some(controller) = &self.controller {
                let options = controller.options.get(n).map_or("", String::as_str);
                disks.push_str(&format!("[[guest.{name}.disk]]\ndriver = \"{DISK_DRIVER}\"\n{options}"));
            }
            text.push_str(&format!(
                "[guest.{name}]\nkernel = \"{work}/vmlinux\"\ninitrd = [\"{work}/guest.cpio\"{archives}]\n\
                 cmdline = \"console=ttyS0 quiet ip4={address} umbra.patience={patience} {}\"\nmemory = \"{}\"\n\
                 console = {{ file = \"{share}/{name}.log\" }}\n\
                 {nic}{sound}{disks}\
                 [[guest.{name}.port]]\nname = \"{PORT_NAME}\"\nsocket = \"{}\"\n\
                 [[guest.{name}.port]]\nname = \"{LONG_PORT_NAME}\"\nsocket = \"{}\"\n\n",
                self.guest_options,
                self.guest_memory,
                guest::socket(name),
                guest::long_socket(name)
            ));
        }
        for driver in self.drivers() {
            let (device, image, memory) = match (&self.sound, &self.controller, &self.second, driver) {
                (Some(card), _, _, SOUND_DRIVER) => (&card.device, &card.image, SOUND_MEMORY),
                (_, Some(controller), _, DISK_DRIVER) => (&controller.device, &controller.image, DISK_MEMORY),
                (_, _, Some(nic), SECOND_DRIVER) => (&nic.device, &nic.image, self.driver_memory.as_str()),
                _ => (&self.device, &self.image, self.driver_memory.as_str()),
            };
            let spare = self.spare.as_ref().filter(|_| driver == NIC_DRIVER);
            let spare = spare.map(|spare| format!("spare = \"{spare}\"\n")).unwrap_or_default();
            text.push_str(&format!(
                "[driver.{driver}]\ndevice = \"{device}\"\nimage = \"{work}/{image}\"\nmemory = \"{memory}\"\n\
                 standby = \"{}\"\nstandbys = {}\nsnapshots = {}\n{spare}{}\n[driver.{driver}.restart]\nlimit = {}\ninterval_s = 3600\n\
                 backoff_ms = 100\nbackoff_max_ms = 200\n\
                 boot_timeout_s = {:.0}\ninterrupts_per_s = {}\n",
                self.standby,
                self.standbys,
                self.snapshots,
                self.driver_options,
                self.restart_limit,
                BOOT_S * factor() + f64::from(self.slow_boot_s),
                self.interrupts_per_s
            ));
        }
        text
    }

    /// Names of the driver VMs.
    pub fn drivers(&self) -> Vec<&'static str> {
        let nic = (self.attach == Attach::DriverVm).then_some(NIC_DRIVER);
        let second = self.second.as_ref().map(|_| SECOND_DRIVER);
        let sound = self.sound.as_ref().map(|_| SOUND_DRIVER);
        let controller = self.controller.as_ref().map(|_| DISK_DRIVER);
        nic.into_iter().chain(second).chain(sound).chain(controller).collect()
    }

    /// The driver VM of this guest's NIC.
    fn nic_driver_of(&self, guest: &str) -> &'static str {
        if self.second.as_ref().is_some_and(|nic| nic.guest == guest) { SECOND_DRIVER } else { NIC_DRIVER }
    }

    /// Files of the share that are read again and again.
    fn files(&self) -> Vec<&str> {
        let nic = (self.attach == Attach::DriverVm).then_some(self.image.as_str());
        let sound = self.archives.iter().chain(self.sound.iter().map(|card| &card.image)).map(String::as_str);
        let controller = self.controller.iter().map(|controller| controller.image.as_str());
        let nic = nic.into_iter().chain(self.second.iter().map(|nic| nic.image.as_str()));
        ["vmlinux", "guest.cpio"].into_iter().chain(nic).chain(sound).chain(controller).collect()
    }
}

/// A running machine.
pub struct Machine {
    name: String,
    program: String,
    run: Run,
    events: Follow,
    /// Folder with the guests' consoles.
    share: PathBuf,
    /// Everything it told so far.
    pub seen: Vec<Event>,
}

impl Machine {
    /// Writes the file, starts `umbra run` and waits until the driver VM is live and every guest answers.
    ///
    /// # Errors
    /// It ended, or did not come up in time; with what it said.
    pub fn start(place: &mut Place, spec: &MachineSpec) -> Result<Self, DemoError> {
        let mut machine = Self::launch(place, spec)?;
        machine.await_lives(&spec.drivers(), START_LIMIT)?;
        for (name, _) in &spec.guests {
            place.in_guest(name, "true", START_LIMIT)?;
        }
        Ok(machine)
    }

    /// Writes the file and starts `umbra run`; waits for nothing.
    ///
    /// # Errors
    /// The place did not do it.
    pub fn launch(place: &mut Place, spec: &MachineSpec) -> Result<Self, DemoError> {
        let (work, share, copy) = (place.work(), place.share_inside(), place.copy());
        let (name, program) = (&spec.name, &spec.program);
        let file = place.share().join(format!("{name}.toml"));
        std::fs::write(&file, spec.to_toml(&work, &share)).map_err(|e| DemoError::file("write", &file, e))?;
        let files = spec.files().join(" ");
        let events = if name == MACHINE { "events.jsonl".into() } else { format!("{name}.jsonl") };
        let consoles: String = spec.guests.iter().map(|(guest, _)| format!(" {share}/{guest}.log")).collect();
        place.expect(
            &format!(
                "mkdir -p {work} {SOCKETS} && for f in {files}; do [ -e {work}/$f ] || {copy} {share}/$f {work}/$f \
                || exit 1; done; rm -f {share}/{events}{consoles}"
            ),
            START_LIMIT,
        )?;
        let folder = spec.snapshot_folder.iter().map(|folder| format!("UMBRA_SNAPSHOT_DIR={folder} "));
        let folder: String = folder.collect();
        let run = place.start(&format!("{folder}{program} run {share}/{name}.toml --events {share}/{events} 2>&1"))?;
        let share = place.share();
        let events = Follow::new(share.join(events));
        Ok(Self { name: name.clone(), program: program.clone(), run, events, share, seen: Vec::new() })
    }

    /// Waits for an event that `wanted` accepts, among those not looked at yet.
    ///
    /// # Errors
    /// `umbra run` ended, or for `limit`, scaled to this machine, it and its guests told and printed nothing.
    pub fn await_event(&mut self, limit: Duration, wanted: impl Fn(&Event) -> bool) -> Result<Event, DemoError> {
        let mut stall = Stall::new(limit);
        while !stall.is_over(self.told()) {
            while let Some(event) = self.events.take() {
                self.seen.push(event.clone());
                if wanted(&event) {
                    return Ok(event);
                }
            }
            let ended = self.run.poll(Duration::from_millis(20)).map_err(DemoError::Exec)?;
            if ended {
                let said = self.said();
                let last = said.lines().last().unwrap_or("it said nothing").trim_start_matches("umbra: ");
                return Err(DemoError::Umbra { what: format!("`umbra run` ended ({last})"), said });
            }
        }
        let what = "Umbra did not tell what was waited for".into();
        Err(DemoError::Still { what, limit: stall.limit(), said: self.said() })
    }

    /// What it and its guests have told and printed, to see whether something goes on: events, and bytes of consoles.
    fn told(&self) -> (usize, usize, u64) {
        let files = std::fs::read_dir(&self.share).into_iter().flatten().flatten();
        let consoles = files.filter(|file| file.path().extension().is_some_and(|e| e == "log"));
        let bytes = consoles.filter_map(|file| Some(file.metadata().ok()?.len())).sum();
        (self.seen.len(), self.run.output().stdout.len(), bytes)
    }

    /// How long the boot of the standby of `driver` took, ms, if there is one and it is ready.
    pub fn standby_ready(&mut self, driver: &str) -> Option<f64> {
        self.drain();
        let news = |event: &&Event| {
            ["standby-starting", "standby-ready", "standby-failed", "driver-failed"].contains(&event.event.as_str())
                && event.text("driver") == driver
        };
        let last = self.seen.iter().rev().find(news)?;
        (last.event == "standby-ready").then(|| last.number("boot_ms")).flatten()
    }

    /// Waits until the standby of `driver` is ready.
    ///
    /// # Errors
    /// It is not within `limit`, or `umbra run` ended.
    pub fn await_standby(&mut self, driver: &str, limit: Duration) -> Result<(), DemoError> {
        if self.standby_ready(driver).is_none() {
            self.await_event(limit, |event| event.event == "standby-ready" && event.text("driver") == driver)?;
        }
        Ok(())
    }

    /// Does `act` at the first new event that `wanted` accepts; [`Self::await_event`] finds it, and what came with it, all the same.
    ///
    /// # Errors
    /// As [`Self::await_event`].
    pub fn at_event<T>(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
        act: impl FnOnce() -> T,
    ) -> Result<T, DemoError> {
        let seen = self.seen.len();
        self.await_event(limit, wanted)?;
        let done = act();
        self.events.put_back(self.seen.drain(seen..));
        Ok(done)
    }

    /// Takes the events that are there.
    pub fn drain(&mut self) {
        while let Some(event) = self.events.take() {
            self.seen.push(event);
        }
    }

    /// What `umbra run` printed.
    pub fn said(&self) -> String {
        self.run.output().stdout.clone()
    }

    /// `umbra status --json`.
    ///
    /// # Errors
    /// It failed or gave no JSON.
    pub fn status(&mut self, place: &mut Place) -> Result<Value, DemoError> {
        let text = place.expect(&format!("{} status --json --name {}", self.program, self.name), STEP)?;
        serde_json::from_str(&text)
            .map_err(|_| DemoError::Umbra { what: "`umbra status --json` gave no JSON".into(), said: text })
    }

    /// The process of guest `name`.
    ///
    /// # Errors
    /// Status says of none.
    pub fn guest_pid(&mut self, place: &mut Place, name: &str) -> Result<u64, DemoError> {
        let status = self.status(place)?;
        let guests = status["guests"].as_array().into_iter().flatten();
        let pid = guests.filter(|guest| guest["name"] == name).find_map(|guest| guest["pid"].as_u64());
        let what = format!("status has no process for {name}");
        pid.ok_or_else(|| DemoError::Umbra { what, said: status.to_string() })
    }

    /// The process of driver VM `name`.
    ///
    /// # Errors
    /// Status says of none.
    pub fn driver_pid(&mut self, place: &mut Place, name: &str) -> Result<u64, DemoError> {
        let status = self.status(place)?;
        let drivers = status["drivers"].as_array().into_iter().flatten();
        let pid = drivers.filter(|driver| driver["name"] == name).find_map(|driver| driver["pid"].as_u64());
        let what = format!("status has no process for {name}");
        pid.ok_or_else(|| DemoError::Umbra { what, said: status.to_string() })
    }

    /// Waits until driver VM `driver` serves, in a life not looked at yet.
    ///
    /// # Errors
    /// As [`Self::await_event`], or it was given up.
    pub fn await_live(&mut self, driver: &str, limit: Duration) -> Result<Event, DemoError> {
        let lives = self.await_lives(&[driver], limit)?;
        lives.into_iter().next().ok_or_else(|| DemoError::Umbra { what: "no driver VM".into(), said: self.said() })
    }

    /// Waits until all these driver VMs serve; each life's event, in the order in which they came.
    ///
    /// # Errors
    /// As [`Self::await_live`].
    pub fn await_lives(&mut self, drivers: &[&str], limit: Duration) -> Result<Vec<Event>, DemoError> {
        let (mut awaited, mut lives) = (drivers.to_vec(), Vec::new());
        while !awaited.is_empty() {
            let ends = |event: &Event| ["driver-live", "quarantined"].contains(&event.event.as_str());
            let event = self.await_event(limit, |event| ends(event) && awaited.contains(&event.text("driver")))?;
            if event.event == "quarantined" {
                let what = format!("the driver VM {} was given up", event.text("driver"));
                return Err(DemoError::Umbra { what, said: self.said() });
            }
            awaited.retain(|driver| *driver != event.text("driver"));
            lives.push(event);
        }
        Ok(lives)
    }

    /// Ends the machine. Its guests' init knows no power button, so they are switched off.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(mut self, place: &mut Place) -> Result<(), DemoError> {
        let _ = place.run(&format!("{} stop --force --name {}", self.program, self.name), STEP)?;
        place.await_end(&mut self.run, STEP, |_| Ok(())).map_err(|error| match error {
            DemoError::Still { limit, said, .. } => {
                DemoError::Still { what: "`umbra stop --force` does not end the machine".into(), limit, said }
            }
            other => other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_file_is_what_umbra_reads() {
        let mut spec = MachineSpec::one_guest("0000:01:00.0", "e1000e", "10.77.0.2/24");
        spec.guests.push(("db".into(), "10.77.0.3/24".into()));
        let machine = umbra_vmm::config::Machine::parse(&spec.to_toml("/work", "/share"), Path::new("x"))
            .unwrap_or_else(|e| panic!("{e}: {e:?}"));
        assert_eq!((machine.guest.len(), machine.driver.len()), (2, 1));
        spec.guests.pop();
        spec.attach = Attach::Passthrough;
        let machine = umbra_vmm::config::Machine::parse(&spec.to_toml("/work", "/share"), Path::new("x"))
            .unwrap_or_else(|e| panic!("{e}: {e:?}"));
        assert_eq!(machine.guest["web"].passthrough, ["0000:01:00.0"]);
        assert!(machine.driver.is_empty());
        spec.attach = Attach::DriverVm;
        let (device, image, policy) = ("0000:02:00.0".into(), "hda".into(), "hold".into());
        spec.sound = Some(SoundCard { device, image, policy });
        spec.archives = vec!["song.cpio".into()];
        spec.disks = vec!["/dev/slow".into()];
        let machine = umbra_vmm::config::Machine::parse(&spec.to_toml("/work", "/share"), Path::new("x"))
            .unwrap_or_else(|e| panic!("{e}: {e:?}"));
        assert_eq!((machine.guest["web"].sound.len(), machine.driver.len()), (1, 2));
        assert_eq!(machine.guest["web"].disk[0].path.as_deref(), Some(Path::new("/dev/slow")));
    }
}
