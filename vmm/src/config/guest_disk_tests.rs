//! Disks in machine files: on files and behind driver VMs, whole and in parts, and each mistake with its line.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::config::MemorySize;

/// A machine whose guest has `disks`, each served by `disk0` unless it says otherwise.
fn text(disks: &[&str]) -> String {
    let mut text = String::from("[guest.db]\nkernel = \"k\"\n");
    for disk in disks {
        text += &format!("[[guest.db.disk]]\n{disk}\n");
    }
    text + "[driver.disk0]\ndevice = \"0000:03:00.0\"\nimage = \"i\"\n"
}

fn parse(text: &str) -> Result<Machine, String> {
    Machine::parse(text, Path::new("dir/m.toml")).map_err(|error| error.to_string())
}

const WHOLE: &str = "driver = \"disk0\"";

#[test]
fn a_disk_behind_a_driver_vm_is_read_with_its_part_and_its_driver_vm_s_memory() {
    let part = "driver = \"disk0\"\nserial = \"S4EV NF0M\"\nstart = \"1M\"\nlength = 1536\ncache = \"through\"\nread_only = true\n";
    let part = &format!("{part}io_timeout_s = 30");
    let machine = parse(&text(&["path = \"root.raw\"\non_full = \"pause\"", part])).unwrap();
    let disks = &machine.guest["db"].disk;
    assert_eq!(disks[0].file(), Some(Disk { path: "dir/root.raw".into(), read_only: false, on_full: OnFull::Pause }));
    assert_eq!((disks[1].file(), disks[1].cache_or_default()), (None, CachePolicy::Through));
    assert_eq!(disks[1].part(), DiskPart::Range { start: 2048, sectors: 3 });
    assert_eq!((disks[1].io_timeout_ms(), GuestDisk::default().io_timeout_ms()), (30_000, 10_000));
    let served: Vec<_> = machine.disks_of("disk0").map(|(guest, n, disk)| (guest, n, disk.read_only)).collect();
    assert_eq!(served, [("db", 1, true)], "counted among all disks of the guest");
    assert_eq!(machine.driver["disk0"].memory, Some(MemorySize(192 << 20)));
    let own = parse(&(text(&[WHOLE]) + "memory = \"256M\"\n")).unwrap();
    assert_eq!(own.driver["disk0"].memory_or_default(), MemorySize(256 << 20));
    assert_eq!(Machine::parse(&machine.to_string(), Path::new("m.toml")).unwrap(), machine, "written and read back");
}

#[test]
fn parts_are_whole_disks_partitions_or_ranges() {
    for (keys, part) in [
        ("", DiskPart::Whole),
        ("partition = 3", DiskPart::Partition(3)),
        ("start = 512", DiskPart::Range { start: 1, sectors: 0 }),
        ("length = \"10G\"", DiskPart::Range { start: 0, sectors: 10 << 21 }),
    ] {
        let machine = parse(&text(&[&format!("{WHOLE}\n{keys}")])).unwrap();
        assert_eq!(machine.guest["db"].disk[0].part(), part);
        assert_eq!(machine.guest["db"].disk[0].cache_or_default(), CachePolicy::Auto);
    }
}

#[test]
fn each_mistake_of_a_disk_is_named_with_its_line() {
    for (disk, line, what) in [
        ("read_only = true", 3, "needs `path"),
        ("path = \"a\"\ndriver = \"disk0\"", 5, "exclude each other"),
        ("driver = \"disk1\"", 4, "nothing defines [driver.disk1]; did you mean \"disk0\"?"),
        ("path = \"a\"\nserial = \"s\"", 5, "only a disk of a driver VM"),
        ("path = \"a\"\npartition = 1", 5, "has `partition`"),
        ("path = \"a\"\nstart = 512", 5, "has `start`"),
        ("path = \"a\"\nlength = 512", 5, "has `length`"),
        ("path = \"a\"\ncache = \"auto\"", 5, "has `cache`"),
        ("path = \"a\"\nio_timeout_s = 10", 5, "has `io_timeout_s`"),
        ("driver = \"disk0\"\non_full = \"pause\"", 5, "only a disk on a file"),
        ("path = \"a\"\non_full = \"wait\"", 5, "`pause`"),
        ("driver = \"disk0\"\nio_timeout_s = 4", 5, "5 to 90 seconds"),
        ("driver = \"disk0\"\nio_timeout_s = 91", 5, "5 to 90 seconds"),
        ("driver = \"disk0\"\nserial = \"\"", 5, "1 to 128 printable"),
        ("driver = \"disk0\"\nserial = \"\u{e9}\"", 5, "1 to 128 printable"),
        ("driver = \"disk0\"\npartition = 0", 5, "numbered from 1"),
        ("driver = \"disk0\"\npartition = 1\nstart = 512", 6, "`partition` and `start` exclude"),
        ("driver = \"disk0\"\npartition = 1\nlength = 512", 6, "`partition` and `length` exclude"),
        ("driver = \"disk0\"\nlength = 0", 5, "at least 512 bytes"),
        ("driver = \"disk0\"\nstart = 9223372036854775296\nlength = \"9000000T\"", 6, "no disk is that long"),
        ("driver = \"disk0\"\nstart = \"1\"", 5, "no multiple of a sector's 512 bytes"),
        ("driver = \"disk0\"\nstart = \"1 G\"", 5, "no size on a disk"),
        ("driver = \"disk0\"\nstart = \"99999999T\"", 5, "longer than any disk"),
        ("driver = \"disk0\"\nstart = 1.5", 5, "a size on a disk, as"),
        ("driver = \"disk0\"\ncache = \"none\"", 5, "`volatile`"),
        ("driver = \"disk0\"\nslot = 1", 5, "unknown field `slot`"),
    ] {
        let error = parse(&text(&[disk])).unwrap_err();
        // The header of the table opens the line before its keys in some messages.
        let right = error.contains(what) && error.starts_with(&format!("dir/m.toml:{line}: "));
        assert!(right, "{disk:?} should say {what:?} in line {line}: {error}");
    }
}

#[test]
fn two_guests_disks_never_share_sectors_that_one_of_them_writes() {
    let disk = |keys: &str| format!("{WHOLE}\n{keys}");
    for (one, other, clash) in [
        ("", "", true),
        ("", "partition = 1", true),
        ("serial = \"a\"", "serial = \"a\"", true),
        ("serial = \"a\"", "serial = \"b\"", false),
        // A disk without a serial number is the only one of its controller.
        ("serial = \"a\"", "", true),
        ("partition = 1", "partition = 1", true),
        ("partition = 1", "partition = 2", false),
        // Where a partition lies is known in the driver VM alone.
        ("partition = 1", "start = 512", false),
        ("length = 1024", "start = 1024", false),
        ("length = 1536", "start = 1024", true),
        ("start = 1024", "start = 2048\nlength = 512", true),
        ("start = 1024\nlength = 512", "start = 1536\nlength = 512", false),
        ("read_only = true", "read_only = true", false),
        ("read_only = true", "", true),
    ] {
        let parsed = parse(&text(&[&disk(one), &disk(other)]));
        assert_eq!(parsed.is_err(), clash, "{one:?} {other:?}: {parsed:?}");
        if let Err(error) = parsed {
            let said = error.contains("guest.db.disk[0] has these sectors of the same disk already");
            assert!(said && error.ends_with("(line 3)"), "{error}");
        }
    }
}

#[test]
fn a_driver_vm_holds_devices_of_one_class() {
    let error = parse(&text(&["driver = \"disk0\"\n[[guest.db.net]]\ndriver = \"disk0\""])).unwrap_err();
    let said = "dir/m.toml:3: guest.db.disk[0]: [driver.disk0] serves guest.db.net[0] already, and a driver VM holds one device: \
                give a storage controller a [driver.NAME] of its own (line 5)";
    assert_eq!(error, said);
    let error = parse(&text(&["driver = \"disk0\"\n[[guest.db.sound]]\ndriver = \"disk0\""])).unwrap_err();
    assert!(error.contains("serves guest.db.sound[0] already"), "{error}");
}

#[test]
fn what_a_nic_alone_has_is_refused_for_disks() {
    let with = |key: &str| parse(&(text(&[WHOLE]) + key)).unwrap_err();
    let error = with("spare = \"0000:04:00.0\"");
    assert!(
        error.contains("driver.disk0.spare: a storage controller has no spare: only a NIC can have one"),
        "{error}"
    );
    let error = with("spare_after_ms = 5");
    assert!(error.contains("spare_after_ms: a storage controller has no spare"), "{error}");
}

proptest! {
    #[test]
    fn sizes_are_shown_as_they_are_read(sectors in 0..u64::MAX / SECTOR_BYTES) {
        let size = DiskSize(sectors * SECTOR_BYTES);
        prop_assert_eq!(size.to_string().parse(), Ok(size));
    }

    #[test]
    fn ranges_overlap_where_they_have_a_sector_in_common(a in 0_u64..40, n in 0_u64..9, b in 0_u64..40, m in 0_u64..9) {
        let covers = |start: u64, sectors: u64, at: u64| at >= start && (sectors == 0 || at < start + sectors);
        let common = (0..100).any(|at| covers(a, n, at) && covers(b, m, at));
        let range = |start, sectors| DiskPart::Range { start, sectors };
        prop_assert_eq!(overlap(range(a, n), range(b, m)), common);
    }
}
