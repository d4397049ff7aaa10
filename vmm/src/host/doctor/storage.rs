//! Which disks of a storage controller the host uses itself: mounted, swap, or below something that holds them (LVM, RAID, encryption);
//! or somebody has them whom no list names: a guest, a ZFS pool, another mount namespace.
//! Taking the controller from its driver would take them away from under the host.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::Root;
use crate::base::file_lock::is_locked;
use crate::host::sysfs::HostDevice;

/// The uses that the host makes of the function's disks, each as `nvme0n1p2 (mounted at /)`.
pub fn in_use(root: &Root, device: &HostDevice) -> Vec<String> {
    let Ok(directory) = fs::canonicalize(device.directory()) else { return Vec::new() };
    let host = Host::look(root);
    let below: Vec<_> = host.blocks.iter().filter(|block| block.is_below(&directory)).collect();
    let uses: Vec<_> = below.iter().flat_map(|block| host.uses(block)).collect();
    if !uses.is_empty() {
        return uses;
    }
    // What no list of this process's namespace has.
    let taken = below.iter().filter(|block| is_taken(&block.file(root)));
    taken.map(|block| format!("{} (a guest, a pool or a container has it)", block.name)).collect()
}

/// Whether somebody has the block device `file` for himself: the kernel, as for ZFS and for what is mounted in another namespace, or a
/// process by a lock, as the disk of a guest. Not known where this user may not read it. The kernel says who has a device by refusing it
/// alone, so it is had here for some microseconds, in which a `mount` of a disk that nobody uses fails.
fn is_taken(file: &Path) -> bool {
    let opened = File::options().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(file);
    match opened {
        Ok(file) => is_locked(&file),
        Err(error) => error.kind() == ErrorKind::ResourceBusy,
    }
}

/// A block device: a disk, a partition, or what is made of some.
struct Block {
    name: String,
    /// Its folder in sysfs.
    folder: PathBuf,
    /// Major and minor number, as `259:2`.
    number: String,
}

impl Block {
    /// Whether it is a disk of the function at `directory`, or a partition of one.
    fn is_below(&self, directory: &Path) -> bool {
        self.folder.starts_with(directory) || self.paths().any(|path| path.starts_with(directory))
    }

    /// The paths to a disk that NVMe has by several (`nvme0n1` by `nvme0c1n1`), which are below the controllers; the disk itself is below
    /// none.
    fn paths(&self) -> impl Iterator<Item = PathBuf> {
        let disk = self.folder.ancestors().find(|folder| folder.join("multipath").is_dir()).map(Path::to_owned);
        let links = disk.and_then(|disk| fs::read_dir(disk.join("multipath")).ok()).into_iter().flatten().flatten();
        links.filter_map(|link| fs::canonicalize(link.path()).ok())
    }

    /// Its file in `/dev`; sysfs has `!` for the slash of a name.
    fn file(&self, root: &Root) -> PathBuf {
        root.join(&format!("dev/{}", self.name.replace('!', "/")))
    }

    fn holders(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.join("holders")).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

/// What the host has, and what it uses.
struct Host {
    blocks: Vec<Block>,
    /// Number, name of the source, mount point.
    mounts: Vec<(String, String, String)>,
    swaps: BTreeSet<String>,
    /// Members of mounted Btrfs file systems, whose mounts name one of them at the most.
    btrfs: BTreeSet<String>,
}

impl Host {
    fn look(root: &Root) -> Self {
        let list = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten();
        let block = |entry: fs::DirEntry| {
            let folder = fs::canonicalize(entry.path()).ok()?;
            let number = fs::read_to_string(folder.join("dev")).unwrap_or_default().trim().to_owned();
            Some(Block { name: entry.file_name().to_string_lossy().into_owned(), folder, number })
        };
        let mut blocks: Vec<_> = list(root.join("sys/class/block")).filter_map(block).collect();
        blocks.sort_by(|one, other| one.name.cmp(&other.name));
        let mounts = root.read("proc/self/mountinfo").unwrap_or_default();
        let swaps = root.read("proc/swaps").unwrap_or_default();
        let members = list(root.join("sys/fs/btrfs")).flat_map(|entry| list(entry.path().join("devices")));
        Self {
            blocks,
            mounts: mounts.lines().filter_map(|line| mount(root, line)).collect(),
            swaps: swaps
                .lines()
                .skip(1)
                .filter_map(|line| Some(name_of(root, line.split_whitespace().next()?)))
                .collect(),
            btrfs: members.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect(),
        }
    }

    fn uses(&self, block: &Block) -> Vec<String> {
        let Block { name, number, .. } = block;
        let mounted = self.mounts.iter().find(|(of, source, _)| of == number || source == name);
        let mounted = mounted.map(|(.., point)| format!("{name} (mounted at {point})"));
        let swap = self.swaps.contains(name).then(|| format!("{name} (swap)"));
        let btrfs =
            (mounted.is_none() && self.btrfs.contains(name)).then(|| format!("{name} (in a Btrfs file system)"));
        let holders = block.holders();
        let held = (!holders.is_empty()).then(|| format!("{name} (held by {})", holders.join(", ")));
        [mounted, swap, btrfs, held].into_iter().flatten().collect()
    }
}

/// A line of `mountinfo` (proc(5)): number, name of the source, mount point.
fn mount(root: &Root, line: &str) -> Option<(String, String, String)> {
    let (mount, source) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    let (number, point) = (fields.next()?, fields.nth(1)?);
    let source = source.split(' ').nth(1)?;
    // What is not a path (`tmpfs`) must not be taken for a block device of that name.
    let source = if source.starts_with('/') { name_of(root, source) } else { String::new() };
    Some((number.into(), source, point.into()))
}

/// The kernel's name of a block device (`dm-0`) by any path to it (`/dev/mapper/root`).
fn name_of(root: &Root, path: &str) -> String {
    let path = root.join(path.trim_start_matches('/'));
    let path = fs::canonicalize(&path).unwrap_or(path);
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::base::file_lock::lock;

    const SSD: &str = "0000:01:00.0";
    const HBA: &str = "0000:02:00.0";
    const SPARE: &str = "0000:03:00.0";

    /// A host with an SSD of three partitions, a controller with two disks, and one whose disk nobody uses.
    struct FakeHost(tempfile::TempDir);

    impl FakeHost {
        fn new() -> Self {
            let this = Self(tempfile::tempdir().unwrap());
            for bdf in [SSD, HBA, SPARE] {
                let device = this.path(&format!("sys/devices/pci0000:00/{bdf}"));
                let devices = this.path("sys/bus/pci/devices");
                fs::create_dir_all(&device).unwrap();
                fs::create_dir_all(&devices).unwrap();
                symlink(device, devices.join(bdf)).unwrap();
            }
            this.block(&format!("sys/devices/pci0000:00/{SSD}/nvme/nvme0/nvme0n1"), "259:0");
            for n in 1..4 {
                let path = format!("sys/devices/pci0000:00/{SSD}/nvme/nvme0/nvme0n1/nvme0n1p{n}");
                this.block(&path, &format!("259:{n}"));
            }
            this.block(&format!("sys/devices/pci0000:00/{HBA}/ata1/host0/sda"), "8:0");
            this.block(&format!("sys/devices/pci0000:00/{HBA}/ata2/host1/sdb"), "8:16");
            this.block(&format!("sys/devices/pci0000:00/{SPARE}/ata3/host2/sdc"), "8:32");
            this.block("sys/devices/virtual/block/dm-0", "253:0");
            this.write("proc/swaps", "Filename Type Size Used Priority\n");
            this
        }

        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn write(&self, path: &str, text: &str) {
            fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
            fs::write(self.path(path), text).unwrap();
        }

        fn block(&self, path: &str, number: &str) {
            self.write(&format!("{path}/dev"), &format!("{number}\n"));
            let class = self.path("sys/class/block");
            fs::create_dir_all(&class).unwrap();
            symlink(self.path(path), class.join(Path::new(path).file_name().unwrap())).unwrap();
        }

        fn in_use(&self, bdf: &str) -> Vec<String> {
            let device = HostDevice::find_below(&self.path("sys/bus/pci"), bdf.parse().unwrap()).unwrap();
            in_use(&Root::at(self.0.path().into()), &device)
        }
    }

    #[test]
    fn mounted_and_swap_partitions_are_in_use_and_other_disks_are_not() {
        let host = FakeHost::new();
        host.write(
            "proc/self/mountinfo",
            "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n\
             23 22 0:21 / /dev/shm rw - tmpfs sdc rw\n24 22 0:30 / /data rw - btrfs /dev/sda rw\nnonsense\n",
        );
        host.write("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1p3 partition 1 0 -2\n");
        for member in ["sda", "sdb"] {
            host.write(&format!("sys/fs/btrfs/uuid/devices/{member}"), "");
        }
        assert_eq!(host.in_use(SSD), ["nvme0n1p2 (mounted at /)", "nvme0n1p3 (swap)"]);
        assert_eq!(host.in_use(HBA), ["sda (mounted at /data)", "sdb (in a Btrfs file system)"]);
        assert!(host.in_use(SPARE).is_empty());
    }

    #[test]
    fn what_holds_a_disk_uses_it_by_whatever_name_that_is_known() {
        let host = FakeHost::new();
        assert!(host.in_use(HBA).is_empty());
        fs::create_dir_all(host.path(&format!("sys/devices/pci0000:00/{HBA}/ata1/host0/sda/holders/dm-0"))).unwrap();
        assert_eq!(host.in_use(HBA), ["sda (held by dm-0)"]);
        host.write("dev/sdb", "");
        host.write("dev/disk/by-id/x", "");
        fs::remove_file(host.path("dev/disk/by-id/x")).unwrap();
        symlink(host.path("dev/sdb"), host.path("dev/disk/by-id/x")).unwrap();
        host.write("proc/self/mountinfo", "22 1 0:40 / /srv rw - xfs /dev/disk/by-id/x rw\n");
        assert_eq!(host.in_use(HBA), ["sda (held by dm-0)", "sdb (mounted at /srv)"]);
    }

    #[test]
    fn a_disk_that_a_guest_has_is_in_use() {
        let host = FakeHost::new();
        host.write("dev/sdc", "");
        let file = File::options().write(true).open(host.path("dev/sdc")).unwrap();
        assert!(host.in_use(SPARE).is_empty());
        lock(&file, false).unwrap();
        assert_eq!(host.in_use(SPARE), ["sdc (a guest, a pool or a container has it)"]);
    }

    #[test]
    fn a_disk_that_nvme_has_by_several_paths_is_a_disk_of_each_controller() {
        let host = FakeHost::new();
        let head = "sys/devices/virtual/nvme-subsystem/nvme-subsys1/nvme1n1";
        host.block(head, "259:9");
        host.block(&format!("{head}/nvme1n1p1"), "259:10");
        host.block(&format!("sys/devices/pci0000:00/{SPARE}/nvme/nvme1/nvme1c1n1"), "259:11");
        fs::create_dir_all(host.path(&format!("{head}/multipath"))).unwrap();
        symlink(
            host.path(&format!("sys/devices/pci0000:00/{SPARE}/nvme/nvme1/nvme1c1n1")),
            host.path(&format!("{head}/multipath/nvme1c1n1")),
        )
        .unwrap();
        host.write("proc/self/mountinfo", "22 1 259:10 / /home rw - ext4 /dev/nvme1n1p1 rw\n");
        assert_eq!(host.in_use(SPARE), ["nvme1n1p1 (mounted at /home)"]);
    }
}
