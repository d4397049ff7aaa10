//! Snapshots of driver VMs: one that is booted, has its modules loaded and has met neither plan, device nor guest is saved once, and
//! later lives are restored from it by a fresh process.
//!
//! ```text
//!   a VM that waits ---pause, save---> file (format, cache) ---read, check---> memory, KVM's state, devices ---> a VM that waits
//!                       (take)                                   (restore)
//! ```
//! The file is opened before the VM runs, because its process can open none afterwards, and is given up unused once the VM meets somebody.
//!
//! Invariants: a snapshot that is missing, damaged, of something else or refused by KVM costs a cold boot, never more;
//! no vCPU runs between the first and the last byte that is saved, nor before all is restored; a restored VM finds a generation ID
//! that no VM has had, and an event that says so. What the VM has been told by its host, or has of a guest, makes a device refuse to
//! be saved. Which VM a snapshot is of is its key ([`key`]).

pub mod cache;
pub mod description;
pub mod device;
pub mod format;
pub mod key;
pub mod list;
pub mod memory;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use umbra_driver_vm::protocol::MemoryRange;
use vm_memory::GuestMemoryMmap;

use self::cache::Cache;
use self::description::Description;
use self::device::StateError;
use self::format::{Contents, FormatError, Key, MAX_STATE, Run, Writer};
use self::key::{HostFacts, OfVm};
use super::interrupt;
use super::machine::generation_id;
use super::machine::kvm;
use super::machine::legacy::LegacyState;
use super::machine::state::{self, ChipsState, MachineState};
use super::machine::unused::{self, Unused};
use super::machine::vcpu::Vcpus;
use super::machine::vm::Vm;
use super::pci::bus::BusState;
use crate::wire::messages::VmSpec;

/// Errors of taking, keeping or restoring a snapshot.
#[derive(Debug, Error)]
pub enum Error {
    /// The file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// KVM's part.
    #[error(transparent)]
    Machine(#[from] state::Error),
    /// KVM itself.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Interrupts.
    #[error(transparent)]
    Interrupts(#[from] interrupt::Error),
    /// The VM generation ID.
    #[error(transparent)]
    GenerationId(#[from] generation_id::Error),
    /// What the VM has given up of its memory.
    #[error(transparent)]
    Unused(#[from] unused::Error),
    /// A device's part.
    #[error(transparent)]
    Device(#[from] StateError),
    /// There is no folder to look in.
    #[error("there is no folder for snapshots: set {folder}, XDG_CACHE_HOME or HOME", folder = cache::FOLDER)]
    NoFolder,
    /// The folder or a file in it.
    #[error("use {path}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Who may write a snapshot may run anything in a driver VM.
    #[error("{}: others may write to it, or it is another user's", .0.display())]
    OthersMayWrite(PathBuf),
    /// The file cannot be written.
    #[error("write the snapshot")]
    Write(#[source] io::Error),
    /// The VM's memory, or a fact about the host.
    #[error("the VM's memory")]
    Memory(#[source] io::Error),
    /// This program's own file cannot be read.
    #[error("read this program's own file")]
    Program(#[source] io::Error),
    /// The state is no state.
    #[error("its state cannot be understood")]
    State(#[source] serde_json::Error),
    /// The state of the VM is larger than any snapshot's.
    #[error("the state has {0} bytes, more than the {MAX_STATE} of a snapshot")]
    TooLarge(usize),
    /// Lives from it do not live.
    #[error("lives that were restored from it have ended before they said hello")]
    Useless,
    /// Somebody has removed the file meanwhile.
    #[error("its file was removed while it was written")]
    Removed,
    /// Something more urgent came.
    #[error("something more urgent came")]
    Interrupted,
}

/// All of a VM but its memory.
#[derive(Serialize, Deserialize)]
struct VmState {
    machine: MachineState,
    legacy: LegacyState,
    pci: BusState,
    /// What it has given up of its memory.
    unused: Vec<MemoryRange>,
}

/// Where the snapshot of a VM is, or would be.
#[derive(Clone, Debug)]
pub struct Place {
    cache: Cache,
    key: Key,
    memory: u64,
    description: Box<Description>,
}

/// The file that a snapshot is taken to, open.
#[derive(Debug)]
pub struct Begun {
    place: Place,
    file: File,
}

/// A snapshot that was found: its file, and what was read of it.
pub struct Found {
    file: File,
    runs: Vec<Run>,
    state: VmState,
}

impl Place {
    /// The place of the snapshot of the VM of `spec`; `None`: it has no snapshots.
    ///
    /// # Errors
    /// There is no folder, or KVM does not say what it can do.
    pub fn of(spec: &VmSpec) -> Result<Option<Self>, Error> {
        let (Some(vm), Some(of)) = (OfVm::new(spec), &spec.snapshot_of) else { return Ok(None) };
        let host = HostFacts::now()?;
        let key = key::key(&kvm::open()?, &host, vm)?;
        let description = Box::new(Description::new(spec, of, host));
        Ok(Some(Self { cache: Cache::of_environment()?, key, memory: spec.memory.0, description }))
    }

    /// Makes the folder, if it is not there.
    ///
    /// # Errors
    /// It cannot be made, or others may write to it: no snapshot can be taken then.
    pub fn prepare(&self) -> Result<(), Error> {
        self.cache.prepare()
    }

    /// Opens the file that the snapshot is taken to.
    ///
    /// # Errors
    /// As [`Self::prepare`], or the file cannot be made: no snapshot can be taken then.
    pub fn begin(self) -> Result<Begun, Error> {
        let file = self.cache.begin(&self.key)?;
        Ok(Begun { place: self, file })
    }

    /// Looks for the snapshot; `None`: there is none.
    ///
    /// # Errors
    /// There is one that cannot be used.
    pub fn find(&self) -> Result<Option<Found>, Error> {
        let Some(file) = self.cache.open(&self.key)? else { return Ok(None) };
        let contents = Contents::read(&file, &self.key, self.memory)?;
        cache::was_used(&file);
        let state = serde_json::from_slice(&contents.state).map_err(Error::State)?;
        Ok(Some(Found { file, runs: contents.runs, state }))
    }
}

impl Begun {
    /// Takes a snapshot of `vm`, whose `vcpus` run before and after. Between two pieces of its memory `go_on` is asked
    /// whether to. Returns the bytes of the file. Opens nothing.
    ///
    /// # Errors
    /// Nothing is kept of it then; the VM goes on.
    pub fn take(self, vm: &Vm, vcpus: &Vcpus, go_on: &mut dyn FnMut() -> bool) -> Result<u64, Error> {
        let taken = self.write(vm, vcpus, go_on);
        if taken.is_err() {
            // It takes no room until it is removed.
            let _ = self.file.set_len(0);
        }
        taken
    }

    fn write(&self, vm: &Vm, vcpus: &Vcpus, go_on: &mut dyn FnMut() -> bool) -> Result<u64, Error> {
        let mut paused = vcpus.pause()?;
        let machine = MachineState { vcpus: std::mem::take(&mut paused.vcpus), chips: ChipsState::take(&vm.fd)? };
        let (legacy, pci, unused) = (vm.bus.legacy.save()?, vm.bus.pci.save()?, vm.unused.ranges());
        let state = VmState { machine, legacy, pci, unused };
        let state = serde_json::to_vec(&state).map_err(Error::State)?;
        if state.len() as u64 > MAX_STATE {
            return Err(Error::TooLarge(state.len()));
        }
        let mut writer = Writer::new(&self.file);
        memory::save((&vm.memory, &vm.unused), &mut writer, go_on)?;
        let (size, description) = (memory::size(&vm.memory), self.place.description.encode());
        let length = writer.finish(&self.place.key, size, (&state, &description)).map_err(Error::Write)?;
        // Another host that uses the folder has taken it for something that was left behind.
        let is_gone = self.file.metadata().is_ok_and(|metadata| metadata.nlink() == 0);
        if is_gone { Err(Error::Removed) } else { Ok(length) }
    }
}

impl Found {
    /// Fills `memory`, which holds zeros.
    ///
    /// # Errors
    /// The file is damaged; the memory has to be cleared ([`memory::clear`]).
    pub fn fill(&self, memory: &GuestMemoryMmap) -> Result<(), Error> {
        memory::fill(memory, &self.runs, &self.file)
    }

    /// What the VM with `memory` has given up of that.
    ///
    /// # Errors
    /// It cannot be true.
    pub fn unused(&self, memory: &GuestMemoryMmap) -> Result<Unused, Error> {
        Ok(Unused::restored(memory, self.state.unused.clone())?)
    }

    /// Puts all but the memory into `vm`, which has its devices and memory, and into its `vcpus`, none of which has run; and gives it
    /// another generation ID.
    ///
    /// # Errors
    /// KVM or a device refuses; the VM is of no use then.
    pub fn restore(self, vm: &Vm, vcpus: &[VcpuFd]) -> Result<(), Error> {
        let state = self.state;
        state.machine.restore(&vm.fd, vcpus)?;
        tracing::debug!("KVM has its state");
        // Behind the interrupt controllers: what devices signal now must not be overwritten.
        vm.bus.legacy.restore(state.legacy)?;
        vm.interrupts.at_once(|| vm.bus.pci.restore(state.pci))??;
        vm.bus.pci.restored();
        generation_id::renew(&vm.memory)?;
        // Behind the interrupt controllers and the registers: they would take the event back.
        vm.bus.legacy.change_generation_id();
        Ok(())
    }
}
