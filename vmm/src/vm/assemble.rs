//! Makes the VM of a spec, up to the point from which its vCPUs can run: restored from its snapshot where that is wanted and can be
//! done, else with its kernel loaded.
//!
//! Invariant: a restore that fails leaves nothing behind that the boot after it could notice: the memory holds zeros again, and each
//! inherited descriptor is open under its number.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use event_manager::EventManager;
use kvm_ioctls::VcpuFd;
use nix::fcntl::{FcntlArg, fcntl};
use vm_memory::GuestMemoryMmap;

use super::devices::{self, Devices};
use super::host::Host;
use super::machine::memory::{self, Pace};
use super::machine::unused::Unused;
use super::machine::vm::Vm;
use super::process::{Error, Subscriber};
use super::snapshot::{self, Found, Place};
use crate::base::error::chain;
use crate::wire::messages::{FromVm, PortEnd, SnapshotNews, VmSpec};

/// A VM that can run.
pub(super) struct Assembled {
    pub(super) vm: Vm,
    pub(super) devices: Devices,
    pub(super) events: EventManager<Subscriber>,
    pub(super) vcpus: Vec<VcpuFd>,
    /// Where its snapshot may be taken to; `None` where it has none, or was restored from it.
    pub(super) snapshot: Option<Place>,
}

/// Makes the VM of `spec`, whose passed-through function has `files` if it is open already. `None`: its process was started for its
/// snapshot alone, and there is one, from which the VM could be restored, or no place for one.
pub(super) fn assemble(spec: &VmSpec, files: Vec<OwnedFd>, host: &Arc<Host>) -> Result<Option<Assembled>, Error> {
    let memory = memory::create(&spec.name, spec.memory.0).map_err(super::machine::vm::Error::from)?;
    let tell = |news| host.tell(&FromVm::Snapshot { news });
    let place = Place::of(spec);
    if let Some(why) = spec.only_saves.then(|| lacks_place(&place)).flatten() {
        // A boot would be for nothing.
        tell(SnapshotNews::NotTaken(why));
        return Ok(None);
    }
    let place = match restored((spec, place), &memory, host) {
        Ok(Attempt::None) => None,
        Ok(Attempt::Restored(_)) if spec.only_saves => {
            tell(SnapshotNews::There);
            return Ok(None);
        }
        Ok(Attempt::Restored(assembled)) => {
            tell(SnapshotNews::Restored);
            return Ok(Some(*assembled));
        }
        Ok(Attempt::Missing(place)) => {
            tell(SnapshotNews::Missing);
            Some(place)
        }
        Err(Refused { place, why }) => {
            tell(SnapshotNews::Refused(chain(&*why)));
            snapshot::memory::clear(&memory).map_err(snapshot::Error::Memory)?;
            place
        }
    };
    if !spec.passthrough.is_empty() || spec.awaits_device {
        memory::collapse(&memory, &Unused::default(), if spec.has_time { Pace::Gentle } else { Pace::Steady });
    }
    tracing::debug!("memory is there");
    let vm = Vm::new(spec, memory, Unused::default())?;
    let mut events = EventManager::<Subscriber>::new().map_err(Error::Events)?;
    let devices = devices::add(&vm, (spec, files), host, &mut events)?;
    tracing::debug!("devices are there");
    let vcpus = vm.load(spec)?;
    Ok(Some(Assembled { vm, devices, events, vcpus, snapshot: place }))
}

enum Attempt {
    /// The VM has no snapshots.
    None,
    Restored(Box<Assembled>),
    Missing(Place),
}

/// Why a VM is not restored; the place of a better snapshot, if there is one.
struct Refused {
    place: Option<Place>,
    why: Box<Error>,
}

/// Why no snapshot can be kept at `place`, as far as that shows before one is written.
fn lacks_place(place: &Result<Option<Place>, snapshot::Error>) -> Option<String> {
    match place {
        Ok(Some(place)) => place.prepare().err().map(|why| chain(&why)),
        Ok(None) => Some("this VM has no snapshots".into()),
        Err(why) => Some(chain(why)),
    }
}

fn restored(
    (spec, place): (&VmSpec, Result<Option<Place>, snapshot::Error>),
    memory: &GuestMemoryMmap,
    host: &Arc<Host>,
) -> Result<Attempt, Refused> {
    let place = place.map_err(|why| Refused { place: None, why: Box::new(why.into()) })?;
    let Some(place) = place else { return Ok(Attempt::None) };
    let refused = |why| Refused { place: Some(place.clone()), why: Box::new(why) };
    if spec.snapshot_of.as_ref().is_some_and(|of| of.useless) {
        return Err(refused(snapshot::Error::Useless.into()));
    }
    let Some(found) = place.find().map_err(|why| refused(why.into()))? else { return Ok(Attempt::Missing(place)) };
    let ports = KeptOpen::of(spec).map_err(|why| refused(snapshot::Error::Memory(why).into()))?;
    match restore(spec, found, memory, host) {
        Ok(assembled) => Ok(Attempt::Restored(Box::new(assembled))),
        Err(why) => {
            ports.put_back();
            Err(refused(why))
        }
    }
}

fn restore(spec: &VmSpec, found: Found, memory: &GuestMemoryMmap, host: &Arc<Host>) -> Result<Assembled, Error> {
    let unused = found.unused(memory)?;
    memory::collapse(memory, &unused, if spec.has_time { Pace::Swift } else { Pace::Urgent });
    tracing::debug!("memory is there");
    found.fill(memory)?;
    tracing::debug!("memory is filled");
    let vm = Vm::new(spec, memory.clone(), unused)?;
    let mut events = EventManager::<Subscriber>::new().map_err(Error::Events)?;
    let devices = devices::add(&vm, (spec, Vec::new()), host, &mut events)?;
    let vcpus = vm.create_vcpus()?;
    tracing::debug!("devices and vCPUs are there");
    found.restore(&vm, &vcpus)?;
    tracing::debug!("they are as they were saved");
    Ok(Assembled { vm, devices, events, vcpus, snapshot: None })
}

/// Duplicates of the descriptors that the spec names, which the devices of a VM take and close.
struct KeptOpen(Vec<(RawFd, OwnedFd)>);

impl KeptOpen {
    fn of(spec: &VmSpec) -> io::Result<Self> {
        let named = spec.ports.iter().filter_map(|port| match port.end {
            PortEnd::Fd(number) => Some(number),
            PortEnd::Listen(_) | PortEnd::Attached | PortEnd::VhostUser => None,
        });
        let keep = |number: RawFd| {
            // SAFETY: the borrow ends with the call, which asks whether the number is open and duplicates it.
            let fd = unsafe { BorrowedFd::borrow_raw(number.max(0)) };
            fcntl(fd, FcntlArg::F_GETFD)?;
            Ok((number, fd.try_clone_to_owned()?))
        };
        named.map(keep).collect::<io::Result<_>>().map(Self)
    }

    /// Every number is open again, as it was.
    fn put_back(self) {
        for (number, fd) in self.0 {
            // SAFETY: the number belongs to who started this process and named it in the spec; the devices that had taken it are gone.
            if unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) } < 0 {
                tracing::error!(number, "put a descriptor back: {}", io::Error::last_os_error());
            }
        }
    }
}
