//! Another size of a disk on a file: the guest's process measures or extends the file, tells the guest, and answers; the client that asked
//! waits for that, and for nothing longer than the process.
//!
//! Before that the process, which can make no file larger, is let write as much as is asked for, or as the file has: the file that it has
//! open, wherever that is by now, measured in a thread, as its file system may hang.

use std::io;

use umbra_shadow::DeviceId;

use super::front::protocol::Response;
use super::guest::GuestState;
use super::ids::GuestId;
use super::run::Supervisor;
use crate::record::events::Event;
use crate::wire::messages::ToVm;
use crate::wire::spawn::let_files_grow;

/// Why a disk has no other size.
const ENDED: &str = "the guest has ended before its disk had another size";

/// What a client has asked for.
#[derive(Debug)]
struct Asked {
    guest: GuestId,
    /// The process that has the file.
    pid: u32,
    device: DeviceId,
    bytes: Option<u64>,
    client: u64,
}

impl Supervisor {
    /// Client `client` asks for another size of disk `disk` of the guest `name`.
    ///
    /// # Errors
    /// There is no such disk, or it is on no file; for people.
    pub(super) fn resize(&mut self, name: &str, disk: u16, bytes: Option<u64>, client: u64) -> Result<(), String> {
        let n = self.guest_named(name)?;
        let guest = &mut self.guests[n];
        let device = DeviceId::block(disk);
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
            self.pass_on_size(&asked);
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
            self.clients.answer(asked.client, &Response::Error { what });
        }
    }

    fn resize_measured(&mut self, asked: &Asked, length: io::Result<Option<u64>>) -> Result<(), String> {
        let process = self.guests[asked.guest].process.as_ref();
        if process.is_none_or(|process| process.pid() != asked.pid) {
            return Err(ENDED.into());
        }
        let length = length.map_err(|error| format!("its file cannot be measured: {error}"))?;
        if let Some(Err(error)) = length.map(|length| let_files_grow(asked.pid, asked.bytes.unwrap_or(length))) {
            return Err(format!(
                "its process cannot be let write so much (RLIMIT_FSIZE): {error}; the supervisor needs CAP_SYS_RESOURCE, also in a \
                 unit's CapabilityBoundingSet"
            ));
        }
        self.pass_on_size(asked);
        Ok(())
    }

    fn pass_on_size(&mut self, &Asked { guest, device, bytes, client, .. }: &Asked) {
        self.guests[guest].resizing.push_back((client, device));
        self.tell_guest(guest, &ToVm::Resize { device, bytes });
    }

    /// A guest's process has done what was asked for first of those that wait, or says why not.
    pub(super) fn on_resized(&mut self, n: GuestId, device: DeviceId, result: Result<u64, String>) {
        let guest = &mut self.guests[n];
        let name = guest.name.clone();
        let waiting = guest.resizing.iter().position(|(_, asked)| *asked == device);
        let Some((client, _)) = waiting.and_then(|at| guest.resizing.remove(at)) else { return };
        let response = match result {
            Ok(bytes) => {
                self.events.tell(&Event::DiskResized { guest: name.clone(), device, bytes });
                Response::Resized { name, disk: device.index, bytes }
            }
            Err(what) => Response::Error { what: format!("{name}.{device}: {what}") },
        };
        self.clients.answer(client, &response);
    }

    /// The process of guest `n` is gone: nobody answers those who wait.
    pub(super) fn resizes_no_more(&mut self, n: GuestId) {
        for (client, device) in std::mem::take(&mut self.guests[n].resizing) {
            let what = format!("{}.{device}: {ENDED}", self.guests[n].name);
            self.clients.answer(client, &Response::Error { what });
        }
    }
}
