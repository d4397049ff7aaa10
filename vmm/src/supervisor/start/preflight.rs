//! What a machine needs from the host, checked before anything is started: the first thing that is missing is reported, with what
//! to do about it, and nothing is left behind.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};
use thiserror::Error;
use umbra_guest_images::image::{Image, ImageError};

use super::groups::{Claim, Groups, Use};
use crate::base::pci_address::{Bdf, ParseBdfError};
use crate::config::{Confine, Console, Disk, Guest, GuestDisk, Machine, MemorySize};
use crate::host;
use crate::host::DeviceFiles;
use crate::host::sysfs::HostDevice;
use crate::supervisor::driver::device::Open;

/// Where the host's things are.
#[derive(Clone, Debug)]
pub struct Host {
    /// The device file of KVM.
    pub kvm: PathBuf,
    /// The PCI bus in sysfs.
    pub pci: PathBuf,
    /// How a function is opened.
    pub open: Open,
    /// Whether the kernel filters system calls.
    pub filters_system_calls: fn() -> bool,
    /// The folder that has the files of its users.
    pub root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        let filters_system_calls = host::seccomp::filters_system_calls;
        Self {
            kvm: "/dev/kvm".into(),
            pci: "/sys/bus/pci".into(),
            open: DeviceFiles::open,
            filters_system_calls,
            root: "/".into(),
        }
    }
}

/// Something that a machine needs is not there.
#[derive(Debug, Error)]
pub enum PreflightError {
    /// No KVM.
    #[error(
        "/dev/kvm is not there: load `kvm_intel` or `kvm_amd` (and switch virtualisation on in the firmware; in a VM, \
         nested virtualisation in its host)"
    )]
    NoKvm,
    /// No permission for KVM.
    #[error("/dev/kvm cannot be opened ({0}): run as root, or join the group that owns it (mostly `kvm`)")]
    KvmDenied(io::Error),
    /// No seccomp.
    #[error(
        "this kernel filters no system calls (seccomp), so that the processes of VMs cannot be confined: boot a kernel with \
         CONFIG_SECCOMP_FILTER, or do without by `confine = \"off\"` in the machine file"
    )]
    NoFilters,
    /// A file of a guest.
    #[error("{guest}: {what} {}", path.display())]
    File {
        /// The guest.
        guest: String,
        /// What it is to be.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A folder in which a VM's process is to make a file.
    #[error(
        "{guest}: {what} {} needs the folder {}, which is not there: make it, or name another place in the machine file",
        path.display(), folder.display()
    )]
    Folder {
        /// The guest.
        guest: String,
        /// What is to be there.
        what: String,
        /// The path.
        path: PathBuf,
        /// The path without its last part.
        folder: PathBuf,
    },
    /// A driver VM's image.
    #[error("{driver}")]
    Image {
        /// The driver VM.
        driver: String,
        /// What is wrong.
        source: ImageError,
    },
    /// No PCI address.
    #[error(transparent)]
    Address(#[from] ParseBdfError),
    /// A device.
    #[error("{user}")]
    Device {
        /// Who is to have it.
        user: String,
        /// What is wrong.
        source: host::Error,
    },
    /// Two processes cannot open one group.
    #[error(
        "{} and {} are both in IOMMU group {}, which one VM alone can have, and a driver VM serves one device: move one of the \
         cards to another slot, or take another one (`umbra doctor` lists the cards, `umbra doctor {}` says what is in its group)",
        .0.0, .0.1, .0.2, .0.1.device
    )]
    SharedGroup(Box<(Claim, Claim, u32)>),
    /// Passed-through devices need all of the VM's memory locked.
    #[error(
        "{user} needs {needed} of locked memory for its device, the limit is {limit}: raise it (`ulimit -l`, \
         LimitMEMLOCK= of the service), or run as root"
    )]
    LockedMemory {
        /// The guest or driver VM that has the device.
        user: String,
        /// Memory that has to be locked.
        needed: MemorySize,
        /// The limit, in words.
        limit: String,
    },
}

impl PreflightError {
    /// Whether the machine file, or what it names, is wrong. What the host lacks may come: a module, a device that is bound later in the
    /// boot, a file system that is mounted then.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Image { .. } | Self::Address(_) | Self::SharedGroup(_) | Self::NoFilters => true,
            Self::Device { source: host::Error::Unserved { .. }, .. } => true,
            Self::NoKvm
            | Self::KvmDenied(_)
            | Self::File { .. }
            | Self::Folder { .. }
            | Self::Device { .. }
            | Self::LockedMemory { .. } => false,
        }
    }
}

/// What the checks found.
#[derive(Debug)]
pub(in crate::supervisor) struct Checked {
    /// Device and image of each driver VM.
    pub(in crate::supervisor) drivers: BTreeMap<String, (HostDevice, Image)>,
    /// The spare device of each driver VM that has one.
    pub(in crate::supervisor) spares: BTreeMap<String, HostDevice>,
}

impl Checked {
    /// Checks what `machine` needs.
    pub(in crate::supervisor) fn new(machine: &Machine, host: &Host) -> Result<Self, PreflightError> {
        check_kvm(&host.kvm)?;
        if machine.confine != Confine::Off && !(host.filters_system_calls)() {
            return Err(PreflightError::NoFilters);
        }
        let mut groups = Groups::default();
        for (name, guest) in &machine.guest {
            check_guest(name, guest, host, &mut groups)?;
        }
        let (mut drivers, mut spares) = (BTreeMap::new(), BTreeMap::new());
        for (name, driver) in &machine.driver {
            let image =
                Image::open(&driver.image).map_err(|source| PreflightError::Image { driver: name.clone(), source })?;
            let disks = machine.serves_disks(name);
            let device = check_served(name, (&driver.device, disks), host)?;
            groups.claim(&device, Use::Device(name.clone()))?;
            if let Some(spare) = &driver.spare {
                let spare = check_served(&format!("{name}, its spare"), (spare, disks), host)?;
                groups.claim(&spare, Use::Spare(name.clone()))?;
                spares.insert(name.clone(), spare);
            }
            check_locked_memory(name, driver.memory_or_default())?;
            drivers.insert(name.clone(), (device, image));
        }
        Ok(Self { drivers, spares })
    }
}

fn check_kvm(kvm: &Path) -> Result<(), PreflightError> {
    match OpenOptions::new().read(true).write(true).open(kvm) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(PreflightError::KvmDenied(error)),
        Err(_) => Err(PreflightError::NoKvm),
    }
}

fn check_guest(name: &str, guest: &Guest, host: &Host, groups: &mut Groups) -> Result<(), PreflightError> {
    if let Some(first) = file_errors(name, guest).into_iter().next() {
        return Err(first);
    }
    for address in &guest.passthrough {
        let device = check_device(name, address, host)?;
        groups.claim(&device, Use::Passthrough(name.into()))?;
        check_locked_memory(name, guest.memory)?;
    }
    Ok(())
}

/// What cannot be opened of a guest's files, or made of those that its process makes.
pub(super) fn file_errors(name: &str, guest: &Guest) -> Vec<PreflightError> {
    let kernel = ("cannot read the kernel", guest.kernel.clone(), check_readable(&guest.kernel));
    let initrds = guest.initrd.iter().map(|path| ("cannot read the initrd", path.clone(), check_readable(path)));
    let disks = guest.disk.iter().filter_map(GuestDisk::file).map(|disk| {
        let opened = check_disk(&disk);
        ("cannot open the disk", disk.path, opened)
    });
    let opened = [kernel].into_iter().chain(initrds).chain(disks);
    let failed = opened.filter_map(|(what, path, opened)| Some((what, path, opened.err()?)));
    let failed = failed.map(|(what, path, source)| PreflightError::File { guest: name.into(), what, path, source });
    failed.chain(missing_folders(name, guest)).collect()
}

/// Of the console's file and the ports' sockets.
fn missing_folders(name: &str, guest: &Guest) -> Vec<PreflightError> {
    let console =
        if let Console::File(path) = &guest.console { Some(("the console's file".into(), path)) } else { None };
    let sockets = guest.port.iter().map(|port| (format!("the socket of the port {}", port.name), &port.socket));
    let missing = console.into_iter().chain(sockets).filter_map(|(what, path)| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir())?;
        Some(PreflightError::Folder { guest: name.into(), what, path: path.clone(), folder: folder.into() })
    });
    missing.collect()
}

fn check_readable(path: &Path) -> io::Result<()> {
    // Before it is opened: a FIFO would be waited for.
    let meta = fs::metadata(path)?;
    if meta.is_dir() {
        return Err(io::Error::from(io::ErrorKind::IsADirectory));
    }
    if !meta.is_file() {
        return Err(io::Error::other("it is a pipe, a socket or a device, and no file"));
    }
    File::open(path).map(drop)
}

fn check_disk(disk: &Disk) -> io::Result<()> {
    // As above.
    let kind = fs::metadata(&disk.path)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a file nor a block device"));
    }
    OpenOptions::new().read(true).write(!disk.read_only).open(&disk.path).map(drop)
}

fn check_device(user: &str, address: &str, host: &Host) -> Result<HostDevice, PreflightError> {
    let bdf: Bdf = address.parse()?;
    let ready = HostDevice::find_below(&host.pci, bdf).and_then(|device| device.check_ready().map(|()| device));
    ready.map_err(|source| PreflightError::Device { user: user.into(), source })
}

/// As [`check_device`], for one that a driver VM is to serve, as one of `disks` or not.
fn check_served(user: &str, (address, disks): (&str, bool), host: &Host) -> Result<HostDevice, PreflightError> {
    let bdf: Bdf = address.parse()?;
    let why = HostDevice::find_below(&host.pci, bdf).ok().and_then(|device| device.unserved_as(disks));
    match why {
        Some(why) => Err(PreflightError::Device { user: user.into(), source: host::Error::Unserved { bdf, why } }),
        None => check_device(user, address, host),
    }
}

/// The kernel counts a VM's pinned memory against the limit, unless the process may lock as it likes.
pub(super) fn check_locked_memory(user: &str, needed: MemorySize) -> Result<(), PreflightError> {
    let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((u64::MAX, u64::MAX));
    if nix::unistd::geteuid().is_root() || limit >= needed.0 {
        return Ok(());
    }
    let limit = MemorySize(limit).to_string();
    Err(PreflightError::LockedMemory { user: user.into(), needed, limit })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Port;

    #[test]
    fn what_is_no_file_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let disk = [GuestDisk::on_file(fifo.clone(), true), GuestDisk::on_file("/dev/zero".into(), false)].into();
        let guest = Guest { initrd: vec!["/dev/zero".into(), dir.path().into()], disk, ..Guest::new(fifo) };
        let errors: Vec<_> = file_errors("web", &guest).iter().map(|error| crate::base::error::chain(error)).collect();
        assert_eq!(errors.len(), 5, "{errors:?}");
        assert!(errors[3..].iter().all(|what| what.ends_with("neither a file nor a block device")), "{errors:?}");
        assert!(errors[..2].iter().all(|what| what.ends_with("a socket or a device, and no file")), "{errors:?}");
        assert!(errors[2].ends_with("is a directory"), "{errors:?}");
    }

    #[test]
    fn a_folder_for_sockets_and_the_console_has_to_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel");
        std::fs::write(&kernel, "x").unwrap();
        let port = |folder: &Path| Port { name: "agent".into(), socket: folder.join("agent.sock") };
        let away = dir.path().join("away");
        let guest = |folder: &Path| Guest {
            console: Console::File(folder.join("web.log")),
            port: vec![port(folder)],
            ..Guest::new(kernel.clone())
        };
        let errors: Vec<_> = file_errors("web", &guest(&away)).iter().map(ToString::to_string).collect();
        let needs = format!("needs the folder {}, which is not there: make it", away.display());
        let of = [format!("the console's file {}", away.join("web.log").display())];
        let of = of.into_iter().chain([format!("the socket of the port agent {}", away.join("agent.sock").display())]);
        for (error, of) in errors.iter().zip(of) {
            assert!(error.starts_with(&format!("web: {of} {needs}")), "{error}");
        }
        assert_eq!(errors.len(), 2);
        assert!(file_errors("web", &guest(dir.path())).is_empty());
        assert!(file_errors("web", &guest(Path::new(""))).is_empty(), "the working directory");
    }

    #[test]
    fn without_filters_a_machine_starts_only_if_it_says_that_it_does_without() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let checked = |confine, filters_system_calls| {
            let text = format!("{confine}\n[guest.web]\nkernel = {:?}\n", file.path());
            let machine = Machine::parse(&text, "m.toml".as_ref()).unwrap();
            Checked::new(&machine, &Host { kvm: file.path().into(), filters_system_calls, ..Host::default() })
        };
        for confine in ["", "confine = \"log\""] {
            let error = checked(confine, || false).unwrap_err();
            assert!(matches!(error, PreflightError::NoFilters) && error.is_configuration(), "{error}");
            assert!(error.to_string().contains("`confine = \"off\"` in the machine file"), "{error}");
            checked(confine, || true).unwrap();
        }
        checked("confine = \"off\"", || false).unwrap();
    }
}
