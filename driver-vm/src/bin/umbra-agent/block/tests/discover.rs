//! Disks of a sysfs that the test has written.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use umbra_driver_vm::protocol::{BlockEnd, DiskPart};

use super::super::discover::{ChosenDisk, FoundDisk, NoDisk, choose, disks, tell_of_cache};
use super::*;

const FUNCTION: &str = "devices/pci0000:00/0000:00:03.0";

struct Sysfs(TempDir);

/// Files of a disk that has nothing special about it.
const PLAIN: [(&str, &str); 10] = [
    ("size", "2048\n"),
    ("ro", "0\n"),
    ("queue/logical_block_size", "512\n"),
    ("queue/physical_block_size", "4096\n"),
    ("queue/optimal_io_size", "0\n"),
    ("queue/write_cache", "write back\n"),
    ("queue/rotational", "0\n"),
    ("queue/discard_max_bytes", "2199023255040\n"),
    ("queue/nr_requests", "1023\n"),
    ("hidden", "0\n"),
];

impl Sysfs {
    /// With a controller of this driver.
    fn new(driver: &str) -> Self {
        let sysfs = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(sysfs.path("class/block")).unwrap();
        sysfs.link(&format!("{FUNCTION}/subsystem"), "bus/pci");
        sysfs.link(&format!("{FUNCTION}/driver"), &format!("bus/pci/drivers/{driver}"));
        sysfs
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn link(&self, from: &str, to: &str) {
        fs::create_dir_all(self.path(to)).unwrap();
        fs::create_dir_all(self.path(from).parent().unwrap()).unwrap();
        symlink(self.path(to), self.path(from)).unwrap();
    }

    fn write(&self, place: &Path, files: &[(&str, &str)]) {
        for (name, contents) in files {
            fs::create_dir_all(place.join(name).parent().unwrap()).unwrap();
            fs::write(place.join(name), contents).unwrap();
        }
    }

    /// A disk of the device at `device`, below the function, with further files of its own and of the device.
    fn add(&self, name: &str, device: &str, files: &[(&str, &str)]) -> PathBuf {
        let device = format!("{FUNCTION}/{device}");
        let place = format!("{device}/block/{name}");
        fs::create_dir_all(self.path(&place)).unwrap();
        self.link(&format!("{place}/device"), &device);
        self.link(&format!("class/block/{name}"), &place);
        self.write(&self.path(&place), &PLAIN);
        self.write(&self.path(&place), files);
        self.path(&place)
    }

    fn add_partition(&self, disk: &str, device: &str, number: u32, start: u64, sectors: u64) {
        let name = format!("{disk}p{number}");
        let place = format!("{FUNCTION}/{device}/block/{disk}/{name}");
        let (number, start, sectors) = (number.to_string(), start.to_string(), sectors.to_string());
        self.write(&self.path(&place), &[("partition", &number), ("start", &start), ("size", &sectors), ("ro", "0")]);
        self.link(&format!("class/block/{name}"), &place);
    }

    fn disks(&self) -> Vec<FoundDisk> {
        disks(self.0.path())
    }

    /// The names and serial numbers of all disks.
    fn serials(&self) -> Vec<(String, Vec<String>)> {
        self.disks().into_iter().map(|disk| (disk.name, disk.serials)).collect()
    }
}

fn end(serial: Option<&str>, part: DiskPart) -> BlockEnd {
    BlockEnd { serial: serial.map(Into::into), part, read_only: false, has_cache: false, io_timeout_ms: 10_000 }
}

fn names(chosen: &[ChosenDisk]) -> Vec<&str> {
    chosen.iter().map(|chosen| &chosen.name[..]).collect()
}

#[test]
fn a_disk_is_reported_as_the_kernel_shows_it() {
    let sysfs = Sysfs::new("nvme");
    let own = [
        ("wwid", "eui.0025385b71b0a1c2\n"),
        ("device/serial", "S4EWNX0R123456       \n"),
        ("size", "1953525168\n"),
        ("queue/optimal_io_size", "131072\n"),
        ("queue/discard_max_bytes", "0\n"),
    ];
    sysfs.add("nvme0n1", "nvme/nvme0", &own);
    let found = sysfs.disks();
    let chosen = choose(&found, &[end(None, DiskPart::Whole)], true).unwrap();
    let window = Window { start: 0, sectors: 1_953_525_168 };
    let identity = Identity { serial: "eui.0025385b71b0a1c2".into(), ..disk(window.sectors, window).identity };
    let expected = Disk { identity, optimal_io: 131_072, discards: false, ..disk(1, window) };
    assert_eq!(chosen.len(), 1);
    assert_eq!(chosen[0].disk, expected);
    assert_eq!((&chosen[0].driver[..], chosen[0].queue_depth), ("nvme", 1023));

    let slow = [
        ("queue/write_cache", "write through"),
        ("queue/rotational", "1"),
        ("queue/logical_block_size", "4096"),
        ("ro", "1"),
    ];
    sysfs.add("sda", "ata1/host0/target0:0:0/0:0:0:0", &slow);
    let FoundDisk { disk, driver, .. } = sysfs.disks().remove(1);
    assert_eq!((disk.cache, disk.rotational, disk.identity.logical_block), (WriteCache::None, true, 4096));
    assert!(disk.identity.read_only && disk.physical_block == 4096 && driver == "nvme");
}

#[test]
fn every_bus_has_its_own_way_to_name_a_disk() {
    let sysfs = Sysfs::new("x");
    sysfs.add(
        "mmcblk0",
        "mmc0/mmc0:aaaa",
        &[("device/cid", "aa5859514d454d4f0000000000000001\n"), ("device/serial", "0x01")],
    );
    sysfs.add("mmcblk0boot0", "mmc0/mmc0:aaaa/boot", &[]);
    let ata = "t10.ATA     QEMU HARDDISK                           QM00005             \n";
    sysfs.add("sda", "host0/0:0:0:0", &[("device/wwid", ata), ("device/vpd_pg80", "\0\u{1}\0\u{4}QM00005 ")]);
    sysfs.write(&sysfs.path(&format!("{FUNCTION}/usb1/1-1")), &[("idVendor", "46f4"), ("serial", "4C530001\n")]);
    sysfs.add("sdb", "usb1/1-1/1-1:1.0/host1/1:0:0:0", &[]);
    sysfs.add("sdc", "host2/2:0:0:0", &[("device/model", "Virtual  disk   \n")]);
    sysfs.link(&format!("{FUNCTION}/virtio2/subsystem"), "bus/virtio");
    sysfs.link(&format!("{FUNCTION}/virtio2/driver"), "bus/virtio/drivers/virtio_blk");
    sysfs.add("vda", "virtio2", &[("serial", "v\u{e4}1")]);
    let expected = [
        ("mmcblk0", &["aa5859514d454d4f0000000000000001", "0x01"][..]),
        ("sda", &["t10.ATA QEMU HARDDISK QM00005", "QM00005"]),
        ("sdb", &["4C530001"]),
        ("sdc", &["Virtual disk 2048"]),
        ("vda", &["v?1"]),
    ];
    let expected = expected.map(|(name, serials)| (name.to_owned(), serials.iter().map(|s| (*s).to_owned()).collect()));
    assert_eq!(sysfs.serials(), expected);
    assert_eq!(sysfs.disks()[4].driver, "virtio_blk");
}

#[test]
fn what_is_no_disk_of_a_controller_is_passed_over() {
    let sysfs = Sysfs::new("nvme");
    for name in ["loop0", "ram0", "zram0", "dm-0", "sr0", "fd0"] {
        sysfs.add(name, name, &[]);
    }
    sysfs.add("nvme0c0n1", "nvme/nvme0/c", &[("hidden", "1\n")]);
    sysfs.add("sda", "empty", &[("size", "0\n")]);
    sysfs.add("nvme0n1", "nvme/nvme0", &[("wwid", "w")]);
    sysfs.add_partition("nvme0n1", "nvme/nvme0", 1, 64, 100);
    assert_eq!(sysfs.serials(), [("nvme0n1".into(), vec!["w".into()])]);
    let bare = tempfile::tempdir().unwrap();
    assert!(disks(bare.path()).is_empty());
}

#[test]
fn sectors_that_one_end_writes_are_no_other_s() {
    let sysfs = Sysfs::new("nvme");
    sysfs.add("nvme0n1", "nvme/nvme0/1", &[("wwid", "eui.1"), ("device/serial", "SER0"), ("size", "1000")]);
    sysfs.add_partition("nvme0n1", "nvme/nvme0/1", 2, 64, 100);
    let found = sysfs.disks();
    let by_name = |start, sectors| end(Some("eui.1"), DiskPart::Range { start, sectors });
    let partition = end(Some("SER0"), DiskPart::Partition(2));
    for (start, sectors, fits) in [(0, 64, true), (164, 0, true), (0, 65, false), (163, 8, false), (100, 4, false)] {
        let chosen = choose(&found, &[partition.clone(), by_name(start, sectors)], true);
        assert_eq!(chosen.is_ok(), fits, "{chosen:?}");
    }
    let read = BlockEnd { read_only: true, ..partition.clone() };
    assert!(choose(&found, &[read.clone(), read.clone()], true).is_ok(), "both only read");
    assert!(choose(&found, &[read, partition], true).is_err());
}

#[test]
fn a_driver_that_cannot_be_told_of_a_cache_is_no_driver_for_one() {
    let sysfs = Sysfs::new("sd");
    sysfs.add("sda", "host0/target0", &[("queue/write_cache", "write through\n")]);
    let error = tell_of_cache(sysfs.0.path(), "sda").unwrap_err();
    assert!(error.contains("cache = \"volatile\""), "{error}");
    sysfs.add("sdb", "host0/target1", &[("queue/write_cache", "write back\n")]);
    assert_eq!(tell_of_cache(sysfs.0.path(), "sdb"), Ok(()));
}

#[test]
fn disks_are_found_by_any_of_their_names_and_never_by_their_place() {
    let sysfs = Sysfs::new("nvme");
    sysfs.add("nvme0n1", "nvme/nvme0/1", &[("wwid", "eui.1"), ("device/serial", "SER0")]);
    sysfs.add("nvme0n2", "nvme/nvme0/2", &[("wwid", "eui.2"), ("device/serial", "SER0")]);
    sysfs.add("nvme1n1", "nvme/nvme1/1", &[("wwid", "eui.3"), ("device/serial", "SER  1 ")]);
    let found = sysfs.disks();
    let ends = [
        end(Some("eui.2"), DiskPart::Whole),
        end(Some(" SER 1"), DiskPart::Whole),
        end(Some("eui.1"), DiskPart::Whole),
    ];
    assert_eq!(names(&choose(&found, &ends, true).unwrap()), ["nvme0n2", "nvme1n1", "nvme0n1"]);
    let never = |serial| match choose(&found, &[end(serial, DiskPart::Whole)], true) {
        Err(NoDisk::Never(what)) => what,
        other => panic!("{other:?}"),
    };
    let several = never(None);
    assert!(several.contains("nvme0n1 is eui.1 or SER0") && several.contains("nvme1n1"), "{several}");
    let several = never(Some("SER0"));
    assert!(several.contains("nvme0n2 is eui.2") && !several.contains("nvme1n1"), "{several}");
    let missing = choose(&found, &[end(Some("nvme0n1"), DiskPart::Whole)], true);
    assert!(matches!(&missing, Err(NoDisk::NotYet(what)) if what.contains("eui.3")), "{missing:?}");
    assert!(
        matches!(choose(&[], &[end(None, DiskPart::Whole)], true), Err(NoDisk::NotYet(what)) if what.contains("none"))
    );
}

#[test]
fn only_a_disk_s_full_name_is_enough_before_all_are_there() {
    let sysfs = Sysfs::new("ahci");
    sysfs.add("sda", "host0/0", &[("device/wwid", "naa.5"), ("device/vpd_pg80", "\0\u{1}\0\u{2}S5")]);
    let found = sysfs.disks();
    let choice = |serial, settled| choose(&found, &[end(serial, DiskPart::Whole)], settled).map(|chosen| chosen.len());
    assert_eq!(choice(Some("naa.5"), false), Ok(1));
    for unclear in [None, Some("S5")] {
        assert!(matches!(choice(unclear, false), Err(NoDisk::NotYet(_))));
        assert_eq!(choice(unclear, true), Ok(1));
    }
}

#[test]
fn parts_are_where_the_partition_table_or_the_plan_has_them() {
    let sysfs = Sysfs::new("nvme");
    sysfs.add("nvme0n1", "nvme/nvme0", &[("wwid", "w"), ("queue/logical_block_size", "4096")]);
    sysfs.add_partition("nvme0n1", "nvme/nvme0", 1, 64, 128);
    sysfs.add_partition("nvme0n1", "nvme/nvme0", 15, 1024, 8);
    let found = sysfs.disks();
    let window = |part| choose(&found, &[end(None, part)], true).map(|chosen| chosen[0].disk.identity.window);
    assert_eq!(window(DiskPart::Partition(1)), Ok(Window { start: 64, sectors: 128 }));
    assert_eq!(window(DiskPart::Partition(15)), Ok(Window { start: 1024, sectors: 8 }));
    assert_eq!(window(DiskPart::Range { start: 2040, sectors: 8 }), Ok(Window { start: 2040, sectors: 8 }));
    assert_eq!(window(DiskPart::Range { start: 1024, sectors: 0 }), Ok(Window { start: 1024, sectors: 1024 }));
    let missing = window(DiskPart::Partition(2));
    assert!(
        matches!(&missing, Err(NoDisk::NotYet(what)) if what.contains("no partition 2 (it has 1, 15)")),
        "{missing:?}"
    );
    for (start, sectors) in [(2040, 16), (2048, 0), (4096, 0), (u64::MAX, 2), (1024, 4), (1, 8)] {
        let wrong = window(DiskPart::Range { start, sectors });
        assert!(matches!(wrong, Err(NoDisk::Never(_))), "{wrong:?}");
    }
}
