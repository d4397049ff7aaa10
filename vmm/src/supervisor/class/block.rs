//! Disks: what is different from the network. A guest with a disk is started when the disk is known, and its device goes live by itself,
//! as soon as the disk service has greeted it.
//!
//! Invariants: the disk that a guest was given first is the guest's while the machine runs, and a driver VM that brings another one
//! serves it nothing and is not tried again by itself. Before a deliberate reset of a controller its disks come to rest
//! (`supervisor::rest`).

use umbra_driver_vm::block_protocol::BLOCK_PORT;
use umbra_driver_vm::protocol::{BlockEnd, BlockPlan, ToAgent};
use umbra_shadow::block::{CachePolicy, Counts, Disk, Mismatch, SECTOR_BYTES, WriteCache};
use umbra_shadow::{Class, DeviceId, Generation};

use super::{OfClass, Traits};
use crate::base::time::Time;
use crate::config::{GuestDisk, MemorySize};
use crate::lifecycle::NoticedBy;
use crate::record::events::Event;
use crate::record::status;
use crate::record::timeline::LifeStage;
use crate::supervisor::driver::{DriverVm, EndRef, Life};
use crate::supervisor::guest::GuestVm;
use crate::supervisor::ids::{DriverId, GuestId, Table};
use crate::supervisor::run::Supervisor;
use crate::wire::messages::{DeviceStatus, DiskBackend, LinkEnd, PortBackend, PortEnd};

pub(super) const TRAITS: Traits = Traits {
    // Its session with the disk service.
    begins_with_device: true,
    greets: true,
    has_carrier: false,
    // A controller carries out what it was given, and no more.
    runs_on: false,
    // Its volatile cache.
    rests: true,
    starts_over: false,
    noun: "disk",
    // The pool, 16 MiB in pages of 2 MiB: a piece of it is in one place of the memory, whatever its length.
    cmdline: " hugepages=8",
};

/// What a guest's disk alone has.
#[derive(Debug)]
pub(in crate::supervisor) struct GuestBlock {
    spec: GuestDisk,
    /// Memory of its driver VM.
    driver_memory: MemorySize,
    /// The disk as its first driver VM reported it; the guest's while the machine runs.
    pub(super) disk: Option<Disk>,
}

impl GuestBlock {
    pub(super) fn new(spec: GuestDisk, driver_memory: MemorySize) -> Self {
        Self { spec, driver_memory, disk: None }
    }

    /// `None` until the disk is known.
    pub(super) fn backend(&self) -> Option<DiskBackend> {
        let (disk, cache) = (self.disk.clone()?, self.spec.cache_or_default());
        let io_timeout_ms = self.spec.io_timeout_ms();
        Some(DiskBackend::Split { disk, cache, driver_memory: self.driver_memory, io_timeout_ms })
    }

    /// What the agent is to serve: the disk by its serial number once that is known, whatever name the kernel gives it.
    fn end(&self) -> BlockEnd {
        let serial = self.disk.as_ref().map(|disk| disk.identity.serial.clone()).or_else(|| self.spec.serial.clone());
        let has_cache = self.spec.cache_or_default() == CachePolicy::Volatile;
        let (part, io_timeout_ms) = (self.spec.part(), self.spec.io_timeout_ms());
        BlockEnd { serial, part, read_only: self.spec.read_only, has_cache, io_timeout_ms }
    }

    /// Takes `found` for the guest's disk, if there was none before.
    ///
    /// # Errors
    /// It is another disk: in what it differs.
    fn identify(&mut self, found: &Disk) -> Result<(), Mismatch> {
        self.disk.get_or_insert_with(|| found.clone()).identity.check(&found.identity)
    }

    pub(super) fn status(
        &self,
        index: usize,
        driver: Option<String>,
        said: Option<&DeviceStatus>,
    ) -> status::BlockStatus {
        let identity = self.disk.as_ref().map(|disk| &disk.identity);
        let mut status = status::BlockStatus {
            index,
            driver,
            serial: identity.map(|identity| identity.serial.clone()),
            bytes: identity.map(|identity| identity.window.sectors.saturating_mul(SECTOR_BYTES)),
            volatile_cache: self.disk.as_ref().map(|disk| disk.cache == WriteCache::Volatile),
            cache: self.spec.cache_or_default(),
            mode: status::DeviceMode::Unknown,
            kept_bytes: 0,
            owed_bytes: 0,
            pending: 0,
            sums: Counts::default(),
        };
        if let Some(DeviceStatus::Block { mode, kept_bytes, owed_bytes, pending, sums }) = said {
            status.mode = (*mode).into();
            (status.kept_bytes, status.owed_bytes) = (*kept_bytes, *owed_bytes);
            (status.pending, status.sums) = (*pending, *sums);
        }
        status
    }
}

/// The driver VM's end `n`: a port, whose queues the guest's process serves.
pub(super) fn end_backend(n: usize) -> PortBackend {
    PortBackend { name: format!("{BLOCK_PORT}.{n}"), end: PortEnd::VhostUser }
}

/// What the life `life` of `driver` is to serve.
pub(super) fn plan(guests: &Table<GuestId, GuestVm>, driver: &DriverVm, life: &Life) -> ToAgent {
    let end = |EndRef { guest, device }: EndRef| Some(guests[guest].block(device)?.end());
    let ends = driver.ends.rows().into_iter().filter_map(end).collect();
    // Before the life's own time to boot is over, so that its agent says what is missing.
    let appear_within_s = driver.spec.restart.boot_timeout_s / 4 * 3;
    ToAgent::ConfigureBlock(BlockPlan { ends, appear_within_s, device: life.purpose.device() })
}

/// A disk in a few words.
fn in_words(disk: &Disk) -> String {
    let sectors = disk.identity.window.sectors;
    format!("{} ({} MiB)", disk.identity.serial.trim(), sectors.saturating_mul(SECTOR_BYTES) >> 20)
}

impl GuestVm {
    fn block(&self, device: DeviceId) -> Option<&GuestBlock> {
        match &self.devices.get(&device)?.of {
            OfClass::Block(block) => Some(block),
            OfClass::Net(_) | OfClass::Sound(_) => None,
        }
    }

    fn block_mut(&mut self, device: DeviceId) -> Option<&mut GuestBlock> {
        match &mut self.devices.get_mut(&device)?.of {
            OfClass::Block(block) => Some(block),
            OfClass::Net(_) | OfClass::Sound(_) => None,
        }
    }
}

impl Supervisor {
    /// The agent of driver VM `n` says that its disks are ready, one for each end.
    pub(in crate::supervisor) fn on_disks(&mut self, n: DriverId, kernel_driver: String, disks: &[Disk]) {
        let now = Time::now();
        let driver = &mut self.drivers[n];
        let fit = driver.class() == Class::Block && disks.len() == driver.ends.len();
        if !fit || !disks.iter().all(Disk::is_sane) {
            return self.fail_driver(n, NoticedBy::Agent, "it reports disks that cannot be", now);
        }
        let words: Vec<_> = disks.iter().map(in_words).collect();
        let detail = format!("{kernel_driver} {}", words.join(", "));
        driver.kernel_driver = Some(kernel_driver);
        self.stage(n, LifeStage::Disks, now, detail);
        let mut others = Vec::new();
        let ends: Vec<_> = self.drivers[n].ends.numbered().map(|(end, at)| (end, *at)).collect();
        for ((end, EndRef { guest, device }), disk) in ends.into_iter().zip(disks) {
            let Some(block) = self.guests[guest].block_mut(device) else { continue };
            if let Err(mismatch) = block.identify(disk) {
                others.push((end, mismatch));
            }
        }
        match others.first() {
            // Nobody could be served.
            Some((end, mismatch)) if others.len() == disks.len() => {
                let what = format!("{}: {mismatch}", self.end_name(n, *end));
                let source = self.other_disk_by(n, NoticedBy::Agent);
                return self.fail_driver(n, source, what, now);
            }
            _ => {
                for (end, mismatch) in others {
                    self.bar_end(n, end, &LinkEnd::OtherDisk(mismatch.to_string()));
                }
            }
        }
        self.serves_without_carrier(n);
    }

    /// How it counts that driver VM `n` has brought another disk, which was noticed `by`. An image that is on trial is given up for it,
    /// as for any failure: it may name the disk otherwise.
    pub(in crate::supervisor) fn other_disk_by(&self, n: DriverId, by: NoticedBy) -> NoticedBy {
        if self.drivers[n].tries_an_image() { by } else { NoticedBy::Identity }
    }

    pub(super) fn on_block_live(
        &mut self,
        (guest, device): (GuestId, DeviceId),
        generation: Generation,
        counts: Counts,
    ) {
        let Some((d, end)) = self.serving((guest, device), generation) else { return };
        tracing::debug!(driver = self.drivers[d].name, %device, ?counts, "disk live");
        let (again, told) = self.guests[guest]
            .devices
            .get(&device)
            .map_or((false, false), |device| (device.was_live, device.is_live_with(generation)));
        // Once: a guest's process could repeat it without end.
        if !told && (again || counts != Counts::default()) {
            self.events.tell(&Event::BlockLive {
                guest: self.guests[guest].name.clone(),
                device,
                driver: self.drivers[d].name.clone(),
                generation: generation.get(),
                requests: counts,
            });
        }
        self.went_live(d, end, generation);
    }
}
