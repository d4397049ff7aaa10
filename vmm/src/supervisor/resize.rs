//! Another size of a disk on a file: the guest's process measures or extends the file, tells the guest, and answers; the client that asked
//! waits for that, and for nothing longer than the process. Nobody needs to ask where the file or block device was made larger: the process
//! finds that out, says so, and has it measured in the same way.
//!
//! Before that the process, which can make no file larger, is let write as much as is asked for, or as the file has: the file that it has
//! open, wherever that is by now, measured in a thread, as its file system may hang.

use std::io;
use std::time::Duration;

use umbra_shadow::DeviceId;
use umbra_shadow::block::SECTOR_BYTES;

use super::front::protocol::Response;
use super::guest::GuestState;
use super::ids::GuestId;
use super::run::Supervisor;
use crate::base::time::Time;
use crate::record::events::Event;
use crate::wire::messages::ToVm;
use crate::wire::spawn::let_files_grow;

/// A guest's process is believed once in this time that a disk has grown. One that is sound looks more rarely.
const GROWTH: Duration = Duration::from_millis(500);

/// Why a disk has no other size.
const ENDED: &str = "the guest has ended before its disk had another size";

/// What a client has asked for, or nobody has to.
#[derive(Clone, Copy, Debug)]
struct Asked {
    guest: GuestId,
    /// The process that has the file.
    pid: u32,
    device: DeviceId,
    bytes: Option<u64>,
    client: Option<u64>,
}

/// A disk of which its process says that it has grown.
#[derive(Debug)]
pub(super) struct Grown {
    /// When it was last looked after.
    at: Time,
    /// It could not be done, which has been said.
    refused: bool,
}

impl Supervisor {
    /// Client `client` asks for another size of disk `disk` of the guest `name`.
    ///
    /// # Errors
    /// There is no such disk, or it is on no file; for people.
    pub(super) fn resize(&mut self, name: &str, disk: u16, bytes: Option<u64>, client: u64) -> Result<(), String> {
        let n = self.guest_named(name)?;
        self.resize_of(n, disk, bytes, Some(client))
    }

    /// The process of guest `n` says that the file or block device of a disk is larger than the guest sees.
    pub(super) fn on_grown(&mut self, n: GuestId, device: DeviceId) {
        let guest = &mut self.guests[n];
        let now = Time::now();
        let waits = |grown: &Grown| grown.refused || now.since(grown.at) < GROWTH;
        let is_on_file = guest.has_disk_on_file(device.index).unwrap_or(false);
        // What is said too early is said again.
        if !is_on_file || guest.state != GuestState::Running || guest.grown.get(&device).is_some_and(waits) {
            return;
        }
        guest.grown.insert(device, Grown { at: now, refused: false });
        if let Err(what) = self.resize_of(n, device.index, None, None) {
            self.answer_resize(n, device, None, Err(what));
        }
    }

    fn resize_of(&mut self, n: GuestId, disk: u16, bytes: Option<u64>, client: Option<u64>) -> Result<(), String> {
        let guest = &self.guests[n];
        let (name, device) = (guest.name.clone(), DeviceId::block(disk));
        if !guest.has_disk_on_file(disk)? {
            return Err(format!("{name}.{device} is a driver VM's disk, whose size is that of its controller's"));
        }
        let Some(process) = &guest.process else {
            return Err(format!("{name} is off; it sees the size of its file when it starts"));
        };
        if guest.state != GuestState::Running {
            return Err(format!("{name} is just starting; try again when it runs"));
        }
        let asked = Asked { guest: n, pid: process.pid(), device, bytes, client };
        let Some(disk) = guest.spec.disk[usize::from(disk)].file().filter(|disk| !disk.read_only) else {
            self.pass_on_size(asked);
            return Ok(());
        };
        let held = guest.held.clone();
        let begun = self.aside("measure", move || {
            let file = held.wait_for(&disk.path).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound));
            let length = file.and_then(|file| file.metadata()).map(|file| file.is_file().then_some(file.len()));
            Box::new(move |supervisor: &mut Supervisor| supervisor.on_measured(&asked, length))
        });
        begun.map_err(|error| format!("{name}.{device}: its file cannot be measured: {error}"))
    }

    /// The file of a disk has been measured: its bytes; `None`: it is no file, whose length has no limit.
    fn on_measured(&mut self, asked: &Asked, length: io::Result<Option<u64>>) {
        if let Err(what) = self.resize_measured(asked, length) {
            let what = format!("{}.{}: {what}", self.guests[asked.guest].name, asked.device);
            self.answer_resize(asked.guest, asked.device, asked.client, Err(what));
        }
    }

    fn resize_measured(&mut self, asked: &Asked, length: io::Result<Option<u64>>) -> Result<(), String> {
        let process = self.guests[asked.guest].process.as_ref();
        if process.is_none_or(|process| process.pid() != asked.pid) {
            return Err(ENDED.into());
        }
        let length = length.map_err(|error| format!("its file cannot be measured: {error}"))?;
        // No more than that is measured: what grows while it is, grows behind what the process may write.
        let bytes = asked.bytes.or(length.map(|length| length / SECTOR_BYTES * SECTOR_BYTES));
        let limit = length.and(bytes);
        if let Some(Err(error)) = limit.map(|bytes| let_files_grow(asked.pid, bytes)) {
            return Err(format!(
                "its process cannot be let write so much (RLIMIT_FSIZE): {error}; the supervisor needs CAP_SYS_RESOURCE, also in a \
                 unit's CapabilityBoundingSet"
            ));
        }
        self.pass_on_size(Asked { bytes, ..*asked });
        Ok(())
    }

    fn pass_on_size(&mut self, Asked { guest, device, bytes, client, .. }: Asked) {
        self.guests[guest].resizing.push_back((client, device));
        self.tell_guest(guest, &ToVm::Resize { device, bytes });
    }

    /// A guest's process has done what was asked for first of those that wait, or says why not.
    pub(super) fn on_resized(&mut self, n: GuestId, device: DeviceId, result: Result<u64, String>) {
        let guest = &mut self.guests[n];
        let waiting = guest.resizing.iter().position(|(_, asked)| *asked == device);
        let Some((client, _)) = waiting.and_then(|at| guest.resizing.remove(at)) else { return };
        let result = result.map_err(|what| format!("{}.{device}: {what}", guest.name));
        self.answer_resize(n, device, client, result);
    }

    /// Says what became of a disk's size, bytes, to the client that asked, or to people.
    fn answer_resize(&mut self, n: GuestId, device: DeviceId, client: Option<u64>, result: Result<u64, String>) {
        let guest = &mut self.guests[n];
        let name = guest.name.clone();
        if let Ok(bytes) = result {
            self.events.tell(&Event::DiskResized { guest: name.clone(), device, bytes });
        }
        match (client, result) {
            (Some(client), result) => {
                let disk = device.index;
                let answer = result.map(|bytes| Response::Resized { name, disk, bytes });
                self.clients.answer(client, &answer.unwrap_or_else(|what| Response::Error { what }));
            }
            (None, Err(what)) => {
                // Of a process that has ended, whose guest sees the size when it starts again, there is none.
                if let Some(grown) = guest.grown.get_mut(&device) {
                    grown.refused = true;
                    self.warn_of_guest(n, &format!("its file has grown, which the guest does not see: {what}"));
                }
            }
            (None, Ok(_)) => {}
        }
    }

    /// The process of guest `n` is gone: nobody answers those who wait.
    pub(super) fn resizes_no_more(&mut self, n: GuestId) {
        let guest = &mut self.guests[n];
        guest.grown.clear();
        for (client, device) in std::mem::take(&mut guest.resizing) {
            let what = format!("{}.{device}: {ENDED}", self.guests[n].name);
            if let Some(client) = client {
                self.clients.answer(client, &Response::Error { what });
            }
        }
    }
}
