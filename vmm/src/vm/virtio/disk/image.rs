//! The file or block device behind a disk: opened, measured, and locked so that no two VMs write to it. Data
//! goes through the host's page cache; a flush makes it durable. Reads, writes and flushes block for as long as the host's
//! file system wants: they are for the disk's threads ([`super::worker`]), not for the event loop.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::request::{Limits, SECTOR};
use super::worker::Backing;
use crate::config::Disk;

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

    /// Size and permission.
    pub fn limits(&self) -> Limits {
        Limits { sectors: self.sectors, read_only: self.read_only }
    }
}

impl Backing for Image {
    fn read(&self, position: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, position)
    }

    fn write(&self, position: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, position)
    }

    fn flush(&self) -> io::Result<()> {
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
