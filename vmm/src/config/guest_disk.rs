//! `[[guest.NAME.disk]]`: a disk on a file or block device of the host, or one that a driver VM serves; and the rules for both.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use umbra_driver_vm::protocol::DiskPart;
use umbra_shadow::block::{CachePolicy, MAX_SERIAL, SECTOR_BYTES};

use super::check::{Place, Problem, check_path};
use super::memory::{self, Size};
use super::{Guest, Machine};

/// Seconds that a disk of a driver VM may answer nothing to reads and writes. By default above the 7 s that hard disks try to read a
/// sector, and below the 30 s after which the kernel of the driver VM resets a controller by itself.
const DEFAULT_IO_TIMEOUT_S: u32 = 10;
const IO_TIMEOUT_S: RangeInclusive<u32> = 5..=90;

/// `[[guest.NAME.disk]]`: exactly one of `path` and `driver`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestDisk {
    /// A raw image file or a block device of the host.
    pub path: Option<PathBuf>,
    /// A driver VM that holds a storage controller: the name of a `[driver.NAME]` table.
    pub driver: Option<String>,
    /// Which of the controller's disks, by its serial number or WWID; not given: it has one.
    pub serial: Option<String>,
    /// A partition of that disk, by its number in the partition table, from 1.
    pub partition: Option<u32>,
    /// Beginning of the guest's part of that disk; 0 where only `length` is given.
    pub start: Option<DiskSize>,
    /// Length of the guest's part of that disk; up to its end where only `start` is given.
    pub length: Option<DiskSize>,
    /// How the disk's write cache is treated; as the driver VM reports it when not given.
    pub cache: Option<CachePolicy>,
    /// Longest time without an answer to reads and writes before the driver VM counts as failed, s; 10 when not given.
    pub io_timeout_s: Option<u32>,
    /// What becomes of a write for which the host's file system has no room.
    pub on_full: Option<OnFull>,
    /// The guest cannot write to it.
    #[serde(default)]
    pub read_only: bool,
}

/// What becomes of a write for which the host's file system has no room: the key `on_full` of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// It fails.
    #[default]
    Error,
    /// It waits, and with it the disk, until there is room.
    Pause,
}

/// A disk on a file of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// A raw image file or a block device.
    pub path: PathBuf,
    /// The guest cannot write to it.
    #[serde(default)]
    pub read_only: bool,
    /// What becomes of a write for which there is no room.
    #[serde(default)]
    pub on_full: OnFull,
}

impl GuestDisk {
    /// A disk on the file `path`.
    pub fn on_file(path: PathBuf, read_only: bool) -> Self {
        Self { path: Some(path), read_only, ..Self::default() }
    }

    /// The disk on a file of the host, if it is one.
    pub fn file(&self) -> Option<Disk> {
        let on_full = self.on_full.unwrap_or_default();
        Some(Disk { path: self.path.clone()?, read_only: self.read_only, on_full })
    }

    /// How its write cache is treated.
    pub fn cache_or_default(&self) -> CachePolicy {
        self.cache.unwrap_or_default()
    }

    /// Longest time without an answer to reads and writes before its driver VM counts as failed, ms.
    pub fn io_timeout_ms(&self) -> u32 {
        self.io_timeout_s.unwrap_or(DEFAULT_IO_TIMEOUT_S).saturating_mul(1000)
    }

    /// The guest's part of the driver VM's disk.
    pub fn part(&self) -> DiskPart {
        let sectors = |size: Option<DiskSize>| size.map_or(0, |size| size.0 / SECTOR_BYTES);
        match (self.partition, self.start, self.length) {
            (Some(partition), ..) => DiskPart::Partition(partition),
            (None, None, None) => DiskPart::Whole,
            (None, start, length) => DiskPart::Range { start: sectors(start), sectors: sectors(length) },
        }
    }

    /// Whether both can be on one disk of their driver VM, as far as the machine file says: a disk without `serial` is the only one of
    /// its controller.
    fn may_be_on_the_disk_of(&self, other: &Self) -> bool {
        self.serial.is_none() || other.serial.is_none() || self.serial == other.serial
    }
}

/// Whether two parts of one disk have sectors in common, as far as the machine file says: where a partition lies is not known.
fn overlap(one: DiskPart, other: DiskPart) -> bool {
    let end = |start: u64, sectors: u64| if sectors == 0 { u64::MAX } else { start.saturating_add(sectors) };
    match (one, other) {
        (DiskPart::Whole, _) | (_, DiskPart::Whole) => true,
        (DiskPart::Partition(one), DiskPart::Partition(other)) => one == other,
        (DiskPart::Range { start: a, sectors: n }, DiskPart::Range { start: b, sectors: m }) => {
            a < end(b, m) && b < end(a, n)
        }
        (DiskPart::Partition(_), DiskPart::Range { .. }) | (DiskPart::Range { .. }, DiskPart::Partition(_)) => false,
    }
}

impl Machine {
    /// The guests' disks that `driver` serves: guest, index of the disk among all disks of that guest, the disk.
    pub fn disks_of<'a>(&'a self, driver: &'a str) -> impl Iterator<Item = (&'a str, usize, &'a GuestDisk)> {
        self.guest.iter().flat_map(move |(name, guest)| {
            let disks = guest.disk.iter().enumerate();
            disks
                .filter(move |(_, disk)| disk.driver.as_deref() == Some(driver))
                .map(move |(n, disk)| (name.as_str(), n, disk))
        })
    }

    /// Whether `driver` serves disks.
    pub fn serves_disks(&self, driver: &str) -> bool {
        self.disks_of(driver).next().is_some()
    }

    pub(super) fn check_disks(&self, place: &Place, guest: &Guest) -> Result<(), Problem> {
        for (n, disk) in guest.disk.iter().enumerate() {
            let place = place.index("disk", n);
            match (&disk.path, &disk.driver) {
                (None, None) => {
                    return place.problem(
                        "needs `path = \"...\"` (a raw image or a block device) or `driver = \"...\"` (a driver VM)",
                    );
                }
                (Some(_), Some(_)) => {
                    return place.key("driver").problem("`path` and `driver` exclude each other");
                }
                (Some(_), None) => self.check_file(&place, disk)?,
                (None, Some(driver)) => {
                    self.check_driver_name(&place.key("driver"), driver)?;
                    check_driven(&place, disk)?;
                }
            }
        }
        Ok(())
    }

    /// A disk that one guest writes is nobody else's.
    fn check_file(&self, place: &Place, disk: &GuestDisk) -> Result<(), Problem> {
        let given = [
            ("serial", disk.serial.is_some()),
            ("partition", disk.partition.is_some()),
            ("start", disk.start.is_some()),
            ("length", disk.length.is_some()),
            ("cache", disk.cache.is_some()),
            ("io_timeout_s", disk.io_timeout_s.is_some()),
        ];
        if let Some((key, _)) = given.iter().find(|(_, given)| *given) {
            return place.key(key).problem(format!("only a disk of a driver VM (`driver = \"...\"`) has `{key}`"));
        }
        let Some(path) = &disk.path else { return Ok(()) };
        let place = place.key("path");
        check_path(&place, path)?;
        let same = self.guest.values().flat_map(|g| &g.disk).filter(|other| other.path.as_ref() == Some(path));
        if !disk.read_only && same.count() > 1 {
            return place.problem(format!(
                "{path:?} is a disk twice; only disks that are `read_only = true` everywhere can be shared"
            ));
        }
        Ok(())
    }

    /// No two guests' disks are on the same sectors of a disk of `driver`, unless both only read.
    pub(super) fn check_parts(&self, driver: &str) -> Result<(), Problem> {
        let disks: Vec<_> = self.disks_of(driver).collect();
        for (k, (name, n, disk)) in disks.iter().enumerate() {
            let clash = disks.iter().take(k).find(|(_, _, other)| {
                let writes = !(disk.read_only && other.read_only);
                writes && disk.may_be_on_the_disk_of(other) && overlap(disk.part(), other.part())
            });
            let Some((other, m, _)) = clash else { continue };
            let place = Place::of("guest", name).index("disk", *n);
            let first = Place::of("guest", other).index("disk", *m);
            let what = format!(
                "{first} has these sectors of the same disk already: give each its own `serial`, `partition`, or `start` and `length` \
                 (or `read_only = true` on both)"
            );
            return place.problem_with(&first, what);
        }
        Ok(())
    }
}

fn check_driven(place: &Place, disk: &GuestDisk) -> Result<(), Problem> {
    if disk.on_full.is_some() {
        return place.key("on_full").problem("only a disk on a file (`path = \"...\"`) has `on_full`");
    }
    if let Some(serial) = &disk.serial {
        let is_sound = serial.chars().all(|c| c.is_ascii_graphic() || c == ' ');
        if serial.is_empty() || serial.len() > MAX_SERIAL || !is_sound {
            let what = format!("a serial number has 1 to {MAX_SERIAL} printable ASCII characters");
            return place.key("serial").problem(what);
        }
    }
    if disk.io_timeout_s.is_some_and(|s| !IO_TIMEOUT_S.contains(&s)) {
        let (least, most) = (IO_TIMEOUT_S.start(), IO_TIMEOUT_S.end());
        return place.key("io_timeout_s").problem(format!(
            "{least} to {most} seconds: a disk in order may take some for a bad sector, and after 120 s a guest says that a task hangs"
        ));
    }
    if disk.partition == Some(0) {
        return place.key("partition").problem("partitions are numbered from 1");
    }
    for (key, given) in [("start", disk.start), ("length", disk.length)] {
        if given.is_some() && disk.partition.is_some() {
            return place.key(key).problem(format!("`partition` and `{key}` exclude each other"));
        }
    }
    let (start, length) = (disk.start.unwrap_or_default(), disk.length);
    match length {
        Some(DiskSize(0)) => place.key("length").problem("a disk has at least 512 bytes"),
        Some(DiskSize(length)) if start.0.checked_add(length).is_none() => {
            place.key("length").problem("no disk is that long")
        }
        _ => Ok(()),
    }
}

/// A place or a length on a disk in bytes, a multiple of 512; in files `"64K"`, `"10G"`, or a number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskSize(pub u64);

/// Why a text is no size of a disk.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DiskSizeError {
    /// No number, or an unknown unit.
    #[error("{0:?} is no size on a disk (a number of bytes, or one with K, M, G or T behind it, as \"10G\")")]
    Syntax(String),
    /// Does not fit into 64 bits.
    #[error("{0:?} is longer than any disk")]
    TooLarge(String),
    /// Not a whole number of sectors.
    #[error("{0} bytes is no multiple of a sector's 512 bytes")]
    NotWholeSectors(u64),
}

impl Size for DiskSize {
    const EXAMPLE: &'static str = "a size on a disk, as \"10G\" or a number of bytes";

    fn of_bytes(bytes: u64) -> Result<Self, DiskSizeError> {
        if bytes.is_multiple_of(SECTOR_BYTES) { Ok(Self(bytes)) } else { Err(DiskSizeError::NotWholeSectors(bytes)) }
    }
}

impl FromStr for DiskSize {
    type Err = DiskSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::of_bytes(memory::parse_bytes(text, DiskSizeError::Syntax, DiskSizeError::TooLarge)?)
    }
}

impl fmt::Display for DiskSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        memory::show_bytes(self.0, f)
    }
}

impl Serialize for DiskSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DiskSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        memory::deserialize_size(deserializer)
    }
}

#[cfg(test)]
#[path = "guest_disk_tests.rs"]
mod tests;
