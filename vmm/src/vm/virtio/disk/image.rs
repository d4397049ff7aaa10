//! The file or block device behind a disk: opened, measured, and locked so that no two VMs write to it. Data
//! goes through the host's page cache; [`Image::flush`] makes it durable.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::VolatileSlice;

use super::request::SECTOR;
use crate::config::Disk;

/// Most vectors of one system call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

/// Formats that would be corrupted as a raw disk: magic bytes at the start, and a name.
const FORMATS: [(&[u8], &str); 3] = [(b"QFI\xFB", "qcow2"), (b"KDMV", "vmdk"), (b"vhdxfile", "vhdx")];

/// Errors of opening a disk; each says what to do.
#[derive(Debug, Error)]
pub enum Error {
    /// Not there, or not permitted.
    #[error("disk {}: open it for {access}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// `reading` or `reading and writing`.
        access: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Neither file nor block device.
    #[error("disk {}: it is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Another VM has it.
    #[error("disk {}: in use by another process; stop that one, or give each VM read_only = true", .0.display())]
    InUse(PathBuf),
    /// Another format.
    #[error("disk {}: it is a {format} image; make a raw one: `qemu-img convert -O raw {} disk.img`", path.display(), path.display())]
    Format {
        /// The path.
        path: PathBuf,
        /// Name of the format.
        format: &'static str,
    },
    /// Less than a sector.
    #[error("disk {}: it is empty; make it as large as the disk is to be: `truncate -s 10G {}`", .0.display(), .0.display())]
    Empty(PathBuf),
    /// Anything else.
    #[error("disk {}: {operation}", path.display())]
    Other {
        /// The path.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// An open disk.
#[derive(Debug)]
pub struct Image {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Image {
    /// Opens and locks `disk`.
    pub fn open(disk: &Disk) -> Result<Self, Error> {
        let (path, read_only) = (disk.path.as_path(), disk.read_only);
        let access = if read_only { "reading" } else { "reading and writing" };
        let opened = OpenOptions::new().read(true).write(!read_only).open(path);
        let mut file = opened.map_err(|source| Error::Open { path: path.into(), access, source })?;
        let other = |operation| move |source| Error::Other { path: path.into(), operation, source };
        let kind = file.metadata().map_err(other("look at it"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Kind(path.into()));
        }
        lock(&file, read_only).map_err(|source| match source.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Error::InUse(path.into()),
            _ => other("lock it")(source),
        })?;
        check_format(&mut file, path)?;
        let size = file.seek(SeekFrom::End(0)).map_err(other("find its size"))?;
        if size < SECTOR {
            return Err(Error::Empty(path.into()));
        }
        if !size.is_multiple_of(SECTOR) {
            tracing::warn!(
                "disk {}: its last {} bytes are no whole sector and left out",
                path.display(),
                size % SECTOR
            );
        }
        Ok(Self { file, sectors: size / SECTOR, read_only })
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// It cannot be written to.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Fills `slices` from byte `position` on.
    pub(super) fn read(&self, position: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        transfer(&self.file, position, slices, libc::preadv)
    }

    /// Writes `slices` from byte `position` on.
    pub(super) fn write(&self, position: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        transfer(&self.file, position, slices, libc::pwritev)
    }

    /// Makes all that was written durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }
}

/// An advisory lock of the whole file that belongs to the open file, not to the process.
fn lock(file: &File, shared: bool) -> io::Result<()> {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    // The kernel's own definitions are shorts; the values fit. Start, length and whence 0: all of it.
    lock.l_type = i16::try_from(if shared { libc::F_RDLCK } else { libc::F_WRLCK }).unwrap_or_default();
    // SAFETY: the structure lives through the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn check_format(file: &mut File, path: &Path) -> Result<(), Error> {
    let mut start = Vec::new();
    let read = file.take(8).read_to_end(&mut start);
    read.map_err(|source| Error::Other { path: path.into(), operation: "read its first sector", source })?;
    match FORMATS.iter().find(|(magic, _)| start.starts_with(magic)) {
        Some(&(_, format)) => Err(Error::Format { path: path.into(), format }),
        None => Ok(()),
    }
}

type Call = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

/// Moves all of `slices`, in as many calls as it takes.
fn transfer(file: &File, mut position: u64, slices: &[VolatileSlice<'_>], call: Call) -> io::Result<()> {
    let mut slices = slices.to_vec();
    while !slices.is_empty() {
        let moved = match once(file, position, &slices, call) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        position += moved as u64;
        slices = rest(&slices, moved)?;
    }
    Ok(())
}

/// `slices` without their first `skip` bytes.
pub(super) fn rest<'m>(slices: &[VolatileSlice<'m>], mut skip: usize) -> io::Result<Vec<VolatileSlice<'m>>> {
    let mut left = Vec::with_capacity(slices.len());
    for slice in slices {
        let taken = skip.min(slice.len());
        skip -= taken;
        if taken < slice.len() {
            left.push(slice.offset(taken).map_err(io::Error::other)?);
        }
    }
    Ok(left)
}

/// The first `length` bytes of `slices`, or all.
pub(super) fn first<'m>(slices: &[VolatileSlice<'m>], mut length: usize) -> io::Result<Vec<VolatileSlice<'m>>> {
    let mut kept = Vec::with_capacity(slices.len());
    for slice in slices {
        let taken = length.min(slice.len());
        if taken == 0 {
            break;
        }
        length -= taken;
        kept.push(slice.subslice(0, taken).map_err(io::Error::other)?);
    }
    Ok(kept)
}

fn once(file: &File, position: u64, slices: &[VolatileSlice<'_>], call: Call) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().take(MAX_VECTORS).map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<_> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    let count = libc::c_int::try_from(vectors.len()).map_err(io::Error::other)?;
    let offset = libc::off_t::try_from(position).map_err(io::Error::other)?;
    // SAFETY: each vector is a slice of guest memory, mapped as long as the guards live; the guest may change it
    // meanwhile, which the kernel takes as it comes.
    let moved = unsafe { call(file.as_raw_fd(), vectors.as_ptr(), count, offset) };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}
