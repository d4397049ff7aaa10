//! The disks of this VM, as sysfs shows them, and which of them the ends of a plan mean. A disk is found by what it says of itself, never
//! by its name in `/dev`, which is given in the order of probing.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use umbra_driver_vm::protocol::{BlockEnd, DiskPart};
use umbra_shadow::block::disk::MAX_SERIAL;
use umbra_shadow::block::{Disk, Identity, SectorRange, Window, WriteCache};

/// Block devices that no controller has: beginnings of their names.
const NO_DISKS: [&str; 8] = ["loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd"];
/// Parts of an SD card or eMMC that are block devices of their own: ends of their names, without their number.
const CARD_PARTS: [&str; 3] = ["boot0", "boot1", "rpmb"];
/// Head of the pages of vital product data that name a unit (SPC-4, section 7.8): code, page, length.
const VPD_HEAD: usize = 4;

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundDisk {
    /// The kernel's name, as `nvme0n1`.
    pub name: String,
    /// What it says of itself: the first is its identity, the others are known to users as well. At least one.
    pub serials: Vec<String>,
    /// Driver of its controller.
    pub driver: String,
    /// Sectors.
    pub sectors: u64,
    /// Orders that its queue takes at once.
    pub queue_depth: u16,
    /// Its partitions, by number.
    pub partitions: BTreeMap<u32, Window>,
    /// All but the window, which is the whole disk here.
    pub disk: Disk,
}

/// What an end of a plan gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChosenDisk {
    /// The kernel's name of the disk.
    pub name: String,
    /// Driver of its controller.
    pub driver: String,
    /// Orders that its queue takes at once.
    pub queue_depth: u16,
    /// The disk, with the guest's part.
    pub disk: Disk,
}

/// Why an end has no disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoDisk {
    /// It may come yet; what is missing, in a sentence's form.
    NotYet(String),
    /// It will not come; why.
    Never(String),
}

/// The disks below `sys` (`/sys`), by name.
pub fn disks(sys: &Path) -> Vec<FoundDisk> {
    let blocks = fs::read_dir(sys.join("class/block")).into_iter().flatten().flatten();
    let mut found: Vec<_> = blocks.filter_map(|block| FoundDisk::at(&fs::canonicalize(block.path()).ok()?)).collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// What each of `ends` gets of these disks. Until `settled` further disks may appear, and what is said without a full name may mean one of
/// them.
///
/// # Errors
/// For the first end that gets nothing.
pub fn choose(found: &[FoundDisk], ends: &[BlockEnd], settled: bool) -> Result<Vec<ChosenDisk>, NoDisk> {
    let chosen = ends.iter().map(|end| choose_one(found, end, settled)).collect::<Result<Vec<_>, _>>()?;
    match chosen.iter().enumerate().find(|(n, disk)| chosen[..*n].iter().any(|other| disk.shares_with(other))) {
        Some((end, disk)) => Err(NoDisk::Never(format!(
            "end {end} has sectors of the disk {} that another one has as well, and one of them writes",
            disk.name
        ))),
        None => Ok(chosen),
    }
}

impl ChosenDisk {
    /// Whether a sector is in both parts, and not only read.
    fn shares_with(&self, other: &Self) -> bool {
        let (mine, its) = (&self.disk.identity, &other.disk.identity);
        let range = |identity: &Identity| SectorRange::new(identity.window.start, identity.window.sectors);
        let overlap = range(mine).zip(range(its)).is_some_and(|(mine, its)| mine.overlaps(its));
        self.name == other.name && overlap && !(mine.read_only && its.read_only)
    }
}

/// Tells the driver of disk `name` below `sys` (`/sys`) that it has a volatile cache. Only the driver of SCSI disks, USB's among them, can
/// be told (`Documentation/ABI/testing/sysfs-class-scsi_disk`, "cache_type").
///
/// # Errors
/// When it would send no flush all the same, in a sentence's form.
pub fn tell_of_cache(sys: &Path, name: &str) -> Result<(), String> {
    let place = sys.join("class/block").join(name);
    let entries = fs::read_dir(place.join("device/scsi_disk")).into_iter().flatten().flatten();
    for disk in entries {
        // Whether it helped is seen below.
        let _ = fs::write(disk.path().join("cache_type"), "temporary write back");
    }
    match read(&place.join("queue/write_cache")).as_deref() {
        Some("write back") => Ok(()),
        _ => Err(format!(
            "the disk {name} is to have a volatile cache (`cache = \"volatile\"`), and its driver cannot be told so: it would send no \
             flush"
        )),
    }
}

fn choose_one(found: &[FoundDisk], end: &BlockEnd, settled: bool) -> Result<ChosenDisk, NoDisk> {
    let wanted = end.serial.as_deref().map(printable);
    let is_meant = |disk: &&FoundDisk| wanted.as_ref().is_none_or(|wanted| disk.serials.contains(wanted));
    let meant: Vec<_> = found.iter().filter(is_meant).collect();
    let which = wanted.as_ref().map_or_else(String::new, |wanted| format!(" {wanted:?}"));
    let disk = match meant[..] {
        [] => return Err(NoDisk::NotYet(format!("the disk{which} has not appeared ({})", list(found)))),
        // A second name, as the serial number of an NVMe disk that has several namespaces, may be that of others to come.
        [disk] if settled || wanted.as_ref() == disk.serials.first() => disk,
        [_] => return Err(NoDisk::NotYet(format!("it is not known yet whether other disks{which} will appear"))),
        _ => {
            let meant: Vec<_> = meant.into_iter().cloned().collect();
            let what =
                format!("several disks are meant by `disk`{which}: name one by its serial number ({})", list(&meant));
            return Err(NoDisk::Never(what));
        }
    };
    let window = disk.window(end.part)?;
    let read_only = disk.disk.identity.read_only || end.read_only;
    let identity = Identity { window, read_only, ..disk.disk.identity.clone() };
    let chosen = Disk { identity, ..disk.disk.clone() };
    if !chosen.is_sane() {
        return Err(NoDisk::Never(format!("the disk {} is none that a guest can have: {chosen:?}", disk.name)));
    }
    let (name, driver) = (disk.name.clone(), disk.driver.clone());
    Ok(ChosenDisk { name, driver, queue_depth: disk.queue_depth, disk: chosen })
}

fn list(disks: &[FoundDisk]) -> String {
    let names: Vec<_> = disks.iter().map(|disk| format!("{} is {}", disk.name, disk.serials.join(" or "))).collect();
    if names.is_empty() { "there is none".into() } else { names.join(", ") }
}

impl FoundDisk {
    /// The disk at this place in sysfs; none if it is no disk, or not whole yet.
    fn at(place: &Path) -> Option<Self> {
        let name = place.file_name()?.to_str()?.to_owned();
        let is_part_of_card = name.starts_with("mmcblk") && CARD_PARTS.iter().any(|part| name.ends_with(part));
        let is_partition = place.join("partition").exists();
        let is_hidden = read(&place.join("hidden")).is_some_and(|hidden| hidden == "1");
        if is_partition || is_part_of_card || is_hidden || NO_DISKS.iter().any(|other| name.starts_with(other)) {
            return None;
        }
        // A card reader without a card has no sectors.
        let sectors = number(&place.join("size")).filter(|sectors| *sectors > 0)?;
        let queue = |name: &str| number(&place.join("queue").join(name));
        let bytes = |name: &str| queue(name).and_then(|bytes| u32::try_from(bytes).ok());
        let logical_block = bytes("logical_block_size")?;
        let serials = serials(place, sectors);
        let identity = Identity {
            serial: serials.first()?.clone(),
            sectors,
            logical_block,
            read_only: number(&place.join("ro"))? != 0,
            window: Window { start: 0, sectors },
        };
        let is_volatile = read(&place.join("queue/write_cache"))? == "write back";
        let disk = Disk {
            identity,
            cache: if is_volatile { WriteCache::Volatile } else { WriteCache::None },
            physical_block: bytes("physical_block_size")?.max(logical_block),
            optimal_io: bytes("optimal_io_size").unwrap_or(0),
            discards: queue("discard_max_bytes").unwrap_or(0) > 0,
            rotational: queue("rotational") == Some(1),
        };
        let queue_depth = queue("nr_requests").and_then(|depth| u16::try_from(depth).ok()).unwrap_or(u16::MAX).max(1);
        let (driver, partitions) = (driver(place), partitions(place));
        Some(Self { name, serials, driver, sectors, queue_depth, partitions, disk })
    }

    /// Where a part is.
    fn window(&self, part: DiskPart) -> Result<Window, NoDisk> {
        let (name, all) = (&self.name, self.sectors);
        match part {
            DiskPart::Whole => Ok(Window { start: 0, sectors: all }),
            DiskPart::Partition(number) => self.partitions.get(&number).copied().ok_or_else(|| {
                let there: Vec<_> = self.partitions.keys().map(u32::to_string).collect();
                let there = if there.is_empty() { "none".into() } else { there.join(", ") };
                NoDisk::NotYet(format!("the disk {name} has no partition {number} (it has {there})"))
            }),
            DiskPart::Range { start, sectors } => {
                let sectors = if sectors == 0 { all.saturating_sub(start) } else { sectors };
                let is_there = sectors > 0 && start.checked_add(sectors).is_some_and(|end| end <= all);
                let what = || format!("{sectors} sectors from {start} are not all on the disk {name}, which has {all}");
                is_there.then_some(Window { start, sectors }).ok_or_else(|| NoDisk::Never(what()))
            }
        }
    }
}

/// What a disk says of itself, the most telling first.
fn serials(place: &Path, sectors: u64) -> Vec<String> {
    let device = place.join("device");
    let of_files = ["wwid", "device/wwid", "serial", "device/cid", "device/serial"].map(|name| read(&place.join(name)));
    // A name of the unit, where the kernel has it as a page of the disk's (SCSI).
    let of_page = fs::read(device.join("vpd_pg80")).ok().and_then(|page| page.get(VPD_HEAD..).map(<[u8]>::to_vec));
    let of_page = of_page.map(|serial| String::from_utf8_lossy(&serial).into_owned());
    let of_bus = fs::canonicalize(&device).ok().and_then(|device| usb_serial(&device));
    let all = of_files.into_iter().chain([of_page, of_bus]).flatten();
    let mut serials: Vec<String> = Vec::new();
    for serial in all.map(|serial| printable(&serial)).filter(|serial| !serial.is_empty()) {
        if !serials.contains(&serial) {
            serials.push(serial);
        }
    }
    if serials.is_empty() {
        let model = read(&device.join("model")).or_else(|| read(&device.join("name")));
        serials.push(printable(&format!("{} {sectors}", model.unwrap_or_else(|| "unnamed".into()))));
    }
    serials
}

/// The serial number of the USB device that a disk belongs to.
fn usb_serial(device: &Path) -> Option<String> {
    let usb = device.ancestors().find(|ancestor| ancestor.join("idVendor").exists())?;
    read(&usb.join("serial"))
}

/// A name as it is reported: printable, its spaces single, not too long.
fn printable(name: &str) -> String {
    let words: Vec<_> = name.split(|c: char| c.is_whitespace() || c == '\0').filter(|word| !word.is_empty()).collect();
    let shown =
        words.join(" ").chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect::<String>();
    shown.chars().take(MAX_SERIAL).collect()
}

/// The driver of the controller: that of the PCI function, or of the virtio device on it.
fn driver(place: &Path) -> String {
    let name_of = |link: PathBuf| Some(fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned());
    let device = fs::canonicalize(place.join("device")).unwrap_or_default();
    let on_bus = |bus: &str| {
        let is_on = |ancestor: &&Path| name_of(ancestor.join("subsystem")).is_some_and(|name| name == bus);
        device.ancestors().filter(is_on).find_map(|ancestor| name_of(ancestor.join("driver")))
    };
    on_bus("virtio")
        .or_else(|| on_bus("pci"))
        .or_else(|| name_of(device.join("driver")))
        .unwrap_or_else(|| "unknown".into())
}

/// The partitions that the kernel has read.
fn partitions(place: &Path) -> BTreeMap<u32, Window> {
    let parts = fs::read_dir(place).into_iter().flatten().flatten().map(|part| part.path());
    let partition = |part: PathBuf| {
        let index = u32::try_from(number(&part.join("partition"))?).ok()?;
        Some((index, Window { start: number(&part.join("start"))?, sectors: number(&part.join("size"))? }))
    };
    parts.filter_map(partition).collect()
}

fn read(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn number(file: &Path) -> Option<u64> {
    read(file)?.parse().ok()
}
