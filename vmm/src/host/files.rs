//! The three files of an open function: container (the I/O page table), group, device. Whoever holds a duplicate keeps the
//! device open: `vfio-pci` resets it when the first is opened and when the last is closed, and not in between.
//!
//! The supervisor keeps those of each driver VM's device ([`DeviceFiles::open`]) and hands duplicates to the process of
//! each life; [`DeviceFiles::fence`] takes from a life what its process may not have given back. The invariant: bus
//! mastering is cleared before memory is unmapped.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL,
    VFIO_GROUP_FLAGS_VIABLE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_TYPE, VFIO_TYPE1v2_IOMMU, vfio_group_status,
    vfio_iommu_type1_dma_map,
};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val};

use super::error::Error;
use super::info;
use super::irq::{self, Index};
use super::region::COMMAND;
use super::sysfs::HostDevice;
use crate::base::pci_address::Bdf;
use crate::base::pci_config::COMMAND_BUS_MASTER;

/// `_IO(VFIO_TYPE, VFIO_BASE + n)`.
macro_rules! request {
    ($n:literal) => {
        nix::request_code_none!(VFIO_TYPE, VFIO_BASE + $n)
    };
}
const VFIO_GET_API_VERSION: libc::c_ulong = request!(0);
const VFIO_CHECK_EXTENSION: libc::c_ulong = request!(1);
const VFIO_SET_IOMMU: libc::c_ulong = request!(2);
const VFIO_GROUP_GET_STATUS: libc::c_ulong = request!(3);
const VFIO_GROUP_SET_CONTAINER: libc::c_ulong = request!(4);
const VFIO_GROUP_GET_DEVICE_FD: libc::c_ulong = request!(6);
const VFIO_DEVICE_RESET: libc::c_ulong = request!(11);
const VFIO_IOMMU_MAP_DMA: libc::c_ulong = request!(13);
const VFIO_IOMMU_UNMAP_DMA: libc::c_ulong = request!(14);

/// Where the files of IOMMU groups are, by number.
pub(crate) const VFIO: &str = "/dev/vfio";

/// An open function. Fields are closed in this order, as the kernel wants it.
#[derive(Debug)]
pub struct DeviceFiles {
    bdf: Bdf,
    device: File,
    group: Arc<OwnedFd>,
    container: Arc<OwnedFd>,
}

/// A container, and the groups that are in it.
#[derive(Debug, Default)]
pub(crate) struct Opener {
    container: Option<Arc<OwnedFd>>,
    groups: BTreeMap<u32, Arc<OwnedFd>>,
}

impl DeviceFiles {
    /// Checks and opens a function, in a container of its own. The host's kernel resets it, if it can.
    pub fn open(host: &HostDevice) -> Result<Self, Error> {
        Opener::default().open(host)
    }

    /// The files of `bdf` as [`Self::to_send`] gave them; `None` if they are not three.
    pub fn received(bdf: Bdf, fds: Vec<OwnedFd>) -> Option<Self> {
        let [container, group, device] = <[OwnedFd; 3]>::try_from(fds).ok()?;
        Some(Self { bdf, device: device.into(), group: Arc::new(group), container: Arc::new(container) })
    }

    /// What a process needs to have the function as well.
    pub fn to_send(&self) -> [BorrowedFd<'_>; 3] {
        [self.container.as_fd(), self.group.as_fd(), self.device.as_fd()]
    }

    /// The function.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// The device file.
    pub(crate) fn device(&self) -> &File {
        &self.device
    }

    /// The group file.
    pub(crate) fn group(&self) -> &Arc<OwnedFd> {
        &self.group
    }

    /// Ends all that the function does for a life: its DMA, its interrupts, its view of that life's memory. What cannot be
    /// done is logged: the function is gone, or had nothing left. Returns whether no memory is left in its reach: kernels
    /// before 5.19 or so let nobody but the process that mapped it unmap it; what is left then goes when the files are closed.
    pub fn fence(&self) -> bool {
        let start = Instant::now();
        if let Err(error) = self.stop_dma() {
            tracing::debug!("{}: clear bus mastering: {error}", self.bdf);
        }
        for index in [Index::Intx, Index::Msi, Index::Msix, Index::Error, Index::Request] {
            if let Err(error) = irq::set(&self.device, index, irq::TRIGGER, &[]) {
                tracing::trace!("{}: switch {index:?} off: {error}", self.bdf);
            }
        }
        let unmapped = self.unmap_all();
        let clean = unmapped.is_ok() && !self.is_mapped();
        tracing::debug!(?unmapped, clean, "{}: fenced in {:?}", self.bdf, start.elapsed());
        clean
    }

    /// Whether any memory is mapped. Found out by a request to map everything, which always fails: with the kernel's first
    /// complaint, that something is mapped already; or with a later one, that the addresses of interrupts lie in between or that
    /// there is nothing to map.
    fn is_mapped(&self) -> bool {
        const EVERYTHING: u64 = 1 << 46;
        const PAGE: usize = 4096;
        // SAFETY: the first pages of a process are never mapped (`vm.mmap_min_addr`), so the kernel can map nothing.
        let mapped = unsafe { self.map(0, EVERYTHING, std::ptr::without_provenance_mut(PAGE)) };
        mapped.is_err_and(|error| error.raw_os_error() == Some(libc::EEXIST))
    }

    /// Resets the function, by the first method in the kernel's order that succeeds.
    pub(crate) fn reset(&self) -> io::Result<()> {
        // SAFETY: the request takes no argument.
        done(unsafe { ioctl(&self.device, VFIO_DEVICE_RESET) })
    }

    /// Clears the bus master bit.
    pub(crate) fn stop_dma(&self) -> io::Result<()> {
        let at = info::region(&self.device, VFIO_PCI_CONFIG_REGION_INDEX)?.offset + u64::from(COMMAND);
        let mut command = [0; 2];
        self.device.read_exact_at(&mut command, at)?;
        let cleared = u16::from_le_bytes(command) & !COMMAND_BUS_MASTER;
        self.device.write_all_at(&cleared.to_le_bytes(), at)
    }

    /// Lets the functions of the container reach `size` bytes at `address` of this process, under the address `iova`.
    ///
    /// # Safety
    ///
    /// Until they are unmapped, the bytes stay mapped here, and are accessed as what a device may write to at any time.
    pub(crate) unsafe fn map(&self, iova: u64, size: u64, address: *mut u8) -> io::Result<()> {
        let request = vfio_iommu_type1_dma_map {
            argsz: argsz::<vfio_iommu_type1_dma_map>(),
            flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: address as u64,
            iova,
            size,
        };
        // SAFETY: the request is of the size that it names; what it maps is the caller's promise.
        done(unsafe { ioctl_with_ref(&*self.container, VFIO_IOMMU_MAP_DMA, &request) })
    }

    /// Takes all memory from the container's functions, whichever process mapped it. How much it was.
    pub(crate) fn unmap_all(&self) -> io::Result<u64> {
        /// `vfio_iommu_type1_dma_unmap` without a bitmap.
        #[repr(C)]
        struct Unmap {
            argsz: u32,
            flags: u32,
            iova: u64,
            size: u64,
        }
        let mut request = Unmap { argsz: argsz::<Unmap>(), flags: VFIO_DMA_UNMAP_FLAG_ALL, iova: 0, size: 0 };
        // SAFETY: the request is of the size that it names, and the kernel writes nothing but its `size`.
        done(unsafe { ioctl_with_mut_ref(&*self.container, VFIO_IOMMU_UNMAP_DMA, &mut request) })?;
        Ok(request.size)
    }
}

impl Opener {
    /// Opens a function in this container.
    pub(crate) fn open(&mut self, host: &HostDevice) -> Result<DeviceFiles, Error> {
        host.check_ready()?;
        let (bdf, start) = (host.bdf(), Instant::now());
        let number = host.required_group()?;
        let container = match &self.container {
            Some(container) => Arc::clone(container),
            None => Arc::new(open_container()?),
        };
        let group = match self.groups.get(&number) {
            Some(group) => Arc::clone(group),
            None => {
                let group = Arc::new(open_group(host, number)?);
                self.join(host, &group, &container)?;
                self.groups.insert(number, Arc::clone(&group));
                group
            }
        };
        self.container = Some(Arc::clone(&container));
        let failed = |source| Error::Vfio { operation: "open the device", bdf, source };
        let name = std::ffi::CString::new(bdf.to_string()).map_err(|error| failed(error.into()))?;
        // SAFETY: the kernel reads the name to its end.
        let fd = unsafe { ioctl_with_ptr(&*group, VFIO_GROUP_GET_DEVICE_FD, name.as_ptr()) };
        if fd < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made this descriptor; nobody else knows its number.
        let device = unsafe { File::from_raw_fd(fd) };
        tracing::debug!("{bdf}: opened (reset by {:?}) in {:?}", host.reset().best(), start.elapsed());
        Ok(DeviceFiles { bdf, device, group, container })
    }

    /// Puts a group into the container; the first one makes that an I/O page table.
    fn join(&self, host: &HostDevice, group: &OwnedFd, container: &OwnedFd) -> Result<(), Error> {
        let bdf = host.bdf();
        let failed = |source| Error::Vfio { operation: "open the IOMMU group", bdf, source };
        let fd = container.as_raw_fd();
        // SAFETY: the kernel reads a descriptor's number.
        done(unsafe { ioctl_with_ref(group, VFIO_GROUP_SET_CONTAINER, &fd) }).map_err(failed)?;
        if !self.groups.is_empty() {
            return Ok(());
        }
        // SAFETY: the request takes a number.
        let set = done(unsafe { ioctl_with_val(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU.into()) });
        set.map_err(|source| match source.raw_os_error() {
            Some(libc::EPERM) => Error::UnsafeInterrupts(bdf),
            _ => failed(source),
        })
    }
}

fn open_container() -> Result<OwnedFd, Error> {
    let path = Path::new(VFIO).join("vfio");
    let container = open_file(&path).map_err(|source| match source.kind() {
        ErrorKind::PermissionDenied => Error::Permission { path: path.clone() },
        ErrorKind::NotFound => Error::NoVfio,
        _ if source.raw_os_error() == Some(libc::ENODEV) => Error::NoVfio,
        _ => Error::Sysfs { operation: "open", path: path.clone(), source },
    })?;
    // SAFETY: the requests take no argument, or a number.
    let (version, type1) = unsafe {
        (
            ioctl(&container, VFIO_GET_API_VERSION),
            ioctl_with_val(&container, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU.into()),
        )
    };
    // Without an IOMMU the kernel offers no type 1 driver.
    if u32::try_from(version) == Ok(VFIO_API_VERSION) && type1 == 1 { Ok(container) } else { Err(Error::NoVfio) }
}

fn open_group(host: &HostDevice, number: u32) -> Result<OwnedFd, Error> {
    let bdf = host.bdf();
    let path: PathBuf = Path::new(VFIO).join(number.to_string());
    let group = open_file(&path).map_err(|source| match source.kind() {
        _ if source.raw_os_error() == Some(libc::EBUSY) => Error::GroupBusy { bdf, group: number },
        ErrorKind::PermissionDenied => Error::NotOurs { bdf, path: path.clone() },
        _ => Error::Vfio { operation: "open the IOMMU group", bdf, source },
    })?;
    let mut status = vfio_group_status { argsz: argsz::<vfio_group_status>(), flags: 0 };
    // SAFETY: the structure is of the size that it names.
    done(unsafe { ioctl_with_mut_ref(&group, VFIO_GROUP_GET_STATUS, &mut status) }).map_err(|source| Error::Vfio {
        operation: "open the IOMMU group",
        bdf,
        source,
    })?;
    if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
        let others = host.group_obstacles().unwrap_or_default();
        return Err(Error::GroupNotViable { bdf, group: number, others });
    }
    Ok(group)
}

fn open_file(path: &Path) -> io::Result<OwnedFd> {
    // Close-on-exec, as all that Rust opens.
    OpenOptions::new().read(true).write(true).open(path).map(OwnedFd::from)
}

/// The outcome of an ioctl that returns nothing else.
pub(crate) fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What a request says of its size.
pub(crate) fn argsz<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> OwnedFd {
        open_file(Path::new("/dev/null")).unwrap()
    }

    #[test]
    fn files_that_are_sent_are_those_that_are_received() {
        let bdf: Bdf = "0000:01:00.0".parse().unwrap();
        let sent = DeviceFiles::received(bdf, vec![null(), null(), null()]).unwrap();
        let copies = sent.to_send().map(|fd| fd.try_clone_to_owned().unwrap());
        let numbers = copies.each_ref().map(AsRawFd::as_raw_fd);
        let got = DeviceFiles::received(bdf, copies.into()).unwrap();
        assert_eq!(got.to_send().map(|fd| fd.as_raw_fd()), numbers);
        assert!(DeviceFiles::received(bdf, vec![null()]).is_none());
        assert_eq!(got.unmap_all().unwrap_err().raw_os_error(), Some(libc::ENOTTY), "no container");
        assert!(!got.fence());
    }
}
