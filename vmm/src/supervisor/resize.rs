//! Another size of a disk on a file: the guest's process measures or extends the file, tells the guest, and answers; the client that asked
//! waits for that, and for nothing longer than the process.

use umbra_shadow::DeviceId;

use super::front::protocol::Response;
use super::guest::GuestState;
use super::ids::GuestId;
use super::run::Supervisor;
use crate::record::events::Event;
use crate::wire::messages::ToVm;
use crate::wire::spawn::let_files_grow;

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
        // Its process is kept from making files larger. Without a size the disk is as large as its file is.
        let disk = guest.spec.disk[usize::from(disk)].file().filter(|disk| !disk.read_only);
        let file = disk.and_then(|disk| std::fs::metadata(disk.path).ok()).filter(std::fs::Metadata::is_file);
        let grows = file.map(|file| let_files_grow(process.pid(), bytes.unwrap_or(file.len())));
        if let Some(Err(error)) = grows {
            return Err(format!(
                "{name}.{device}: its process cannot be let write so much (RLIMIT_FSIZE): {error}; the supervisor needs \
                 CAP_SYS_RESOURCE, also in a unit's CapabilityBoundingSet"
            ));
        }
        guest.resizing.push_back((client, device));
        self.tell_guest(n, &ToVm::Resize { device, bytes });
        Ok(())
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
            let what =
                format!("{}.{device}: the guest has ended before its disk had another size", self.guests[n].name);
            self.clients.answer(client, &Response::Error { what });
        }
    }
}
