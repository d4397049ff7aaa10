//! The file or block device behind a disk: opened, measured, and locked so that no two VMs write to it. Data
//! goes through the host's page cache; a flush makes it durable. Reads, writes and flushes block for as long as the host's
//! file system wants: they are for the disk's threads ([`super::worker`]), not for the event loop.
//!
//! The guest gets the block sizes of the block device, so that it does not make the page cache read what it is to write; of a file it
//! gets sectors of 512 bytes, and the file system's block as the physical one.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use umbra_shadow::block::SECTOR_BYTES;

use super::worker::Backing;
use super::{extent, format};
use crate::base::file_lock::lock;
use crate::config::Disk;
use crate::vm::virtio::disk::offer::{ID_SIZE, Offer, SECTOR};

nix::ioctl_read_bad!(
    /// Bytes of a logical block, an `int`.
    block_logical,
    nix::request_code_none!(0x12, 104),
    libc::c_int
);
nix::ioctl_read_bad!(
    /// Bytes of a physical block, an `unsigned int`.
    block_physical,
    nix::request_code_none!(0x12, 123),
    libc::c_uint
);
nix::ioctl_read_bad!(
    /// Bytes of the best transfer, an `unsigned int`; 0: unknown.
    block_optimal,
    nix::request_code_none!(0x12, 121),
    libc::c_uint
);

/// Largest logical block, in bytes: a page; Linux takes no larger one of a virtio disk.
const LARGEST_LOGICAL: u32 = 4096;

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
    /// Blocks that no guest can have.
    #[error("disk {}: its blocks have {bytes} bytes; a guest can have blocks of 512 to 4096", path.display())]
    Blocks {
        /// The path.
        path: PathBuf,
        /// Bytes of a logical block.
        bytes: u32,
    },
    /// Less than a block.
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

impl Error {
    /// Whether what is at the path can be no disk. One that is not there, or that another VM has, may be had later.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Kind(_) | Self::Format { .. } | Self::Blocks { .. } | Self::Empty(_))
    }
}

/// Sizes of a disk's blocks, and its best transfer, in bytes.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    logical: u32,
    physical: u32,
    optimal: u32,
}

/// An open disk.
#[derive(Debug)]
pub struct Image {
    file: File,
    is_device: bool,
    /// Bytes that the guest sees.
    seen: AtomicU64,
    read_only: bool,
    /// It can let go of sectors.
    discards: bool,
    blocks: Blocks,
}

impl Image {
    /// Opens and locks `disk`.
    pub fn open(disk: &Disk) -> Result<Self, Error> {
        let (path, read_only) = (disk.path.as_path(), disk.read_only);
        let access = if read_only { "reading" } else { "reading and writing" };
        let opened = OpenOptions::new().read(true).write(!read_only).open(path);
        let mut file = opened.map_err(|source| Error::Open { path: path.into(), access, source })?;
        let other = |operation| move |source| Error::Other { path: path.into(), operation, source };
        let metadata = file.metadata().map_err(other("look at it"))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Kind(path.into()));
        }
        lock(&file, read_only).map_err(|source| match source.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Error::InUse(path.into()),
            _ => other("lock it")(source),
        })?;
        let size = file.seek(SeekFrom::End(0)).map_err(other("find its size"))?;
        if let Some(format) = format::find(&file, size).map_err(other("read its first and last sector"))? {
            return Err(Error::Format { path: path.into(), format });
        }
        let is_device = kind.is_block_device();
        let blocks = if is_device {
            Blocks::of_device(&file).map_err(other("ask for the size of its blocks"))?
        } else {
            Blocks::of_file(metadata.blksize())
        };
        let block = u64::from(blocks.logical);
        if !(blocks.logical.is_power_of_two() && (SECTOR_BYTES..=LARGEST_LOGICAL.into()).contains(&block)) {
            return Err(Error::Blocks { path: path.into(), bytes: blocks.logical });
        }
        if size < block {
            return Err(Error::Empty(path.into()));
        }
        let rest = size % block;
        if rest > 0 {
            tracing::warn!("disk {}: its last {rest} bytes are no whole block and left out", path.display());
        }
        let discards =
            !read_only && if is_device { extent::can_discard(metadata.rdev()) } else { extent::can_punch(&file, size) };
        Ok(Self { file, is_device, seen: AtomicU64::new(size - rest), read_only, discards, blocks })
    }

    /// Bytes of the file that may be written to; 0: it is a block device, or only read.
    pub fn written(&self) -> u64 {
        if self.is_device || self.read_only { 0 } else { self.seen.load(Ordering::Relaxed) }
    }

    /// What the guest is offered, without an identifier.
    pub fn offer(&self) -> Offer {
        let Blocks { logical, physical, optimal } = self.blocks;
        Offer {
            sectors: self.seen.load(Ordering::Relaxed) / SECTOR_BYTES,
            read_only: self.read_only,
            logical_block: logical,
            physical_block: physical,
            offset: 0,
            optimal_io: optimal,
            discards: self.discards,
            queues: 1,
            id: [0; ID_SIZE],
        }
    }
}

impl Blocks {
    fn of_device(device: &File) -> io::Result<Self> {
        let (mut logical, mut physical, mut optimal) = (0, 0, 0);
        let fd = device.as_raw_fd();
        // SAFETY: the kernel writes one number each, which live through the calls.
        unsafe {
            block_logical(fd, &raw mut logical)?;
            block_physical(fd, &raw mut physical)?;
            block_optimal(fd, &raw mut optimal)?;
        }
        let logical = u32::try_from(logical).unwrap_or(0);
        Ok(Self { logical, physical: sane_physical(physical, logical), optimal })
    }

    /// A file on a file system with blocks of `block` bytes.
    fn of_file(block: u64) -> Self {
        let logical = SECTOR;
        // A network file system reports its best transfer here: that is no block.
        let block = u32::try_from(block).unwrap_or(0);
        let physical = if block <= LARGEST_LOGICAL { sane_physical(block, logical) } else { LARGEST_LOGICAL };
        Self { logical, physical, optimal: 0 }
    }
}

/// A physical block that fits to the logical one.
fn sane_physical(physical: u32, logical: u32) -> u32 {
    if physical.is_power_of_two() && physical >= logical { physical } else { logical }
}

impl Image {
    /// Bytes of the file or block device now.
    fn size(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    /// The bytes of `bytes` that are in whole blocks, which are what the guest sees.
    fn in_blocks(&self, bytes: u64) -> u64 {
        let block = u64::from(self.blocks.logical);
        bytes / block * block
    }

    /// The reason for `error` at the bytes before `end`, where that is that somebody has made the file or block device smaller under the
    /// guest. The kernel says of a write behind the end of a block device that there is no room, as if some could come.
    fn reason(&self, error: io::Error, end: u64) -> io::Error {
        match self.size() {
            Ok(size) if size < end => {
                io::Error::other(format!("it has become smaller under the guest, and has {size} bytes"))
            }
            _ => error,
        }
    }
}

impl Backing for Image {
    fn read(&self, position: u64, into: &mut [u8]) -> io::Result<()> {
        let read = self.file.read_exact_at(into, position);
        read.map_err(|error| self.reason(error, position.saturating_add(into.len() as u64)))
    }

    fn write(&self, position: u64, bytes: &[u8]) -> io::Result<()> {
        let written = self.file.write_all_at(bytes, position);
        // A file becomes as large again as it was.
        let end = if self.is_device { position.saturating_add(bytes.len() as u64) } else { 0 };
        written.map_err(|error| self.reason(error, end))
    }

    fn discard(&self, position: u64, length: u64) -> io::Result<()> {
        let discard = if self.is_device { extent::discard } else { extent::punch };
        discard(&self.file, position, length)
    }

    fn zeroes(&self, position: u64, length: u64, unmap: bool) -> io::Result<()> {
        // The kernel leaves out what is behind the end, and says nothing.
        let end = position.saturating_add(length);
        if self.size()? < end {
            return Err(self.reason(ErrorKind::UnexpectedEof.into(), end));
        }
        extent::zeroes(&self.file, position, length, unmap)
    }

    fn resize(&self, bytes: Option<u64>) -> Result<u64, String> {
        let why = |what: &str, error: io::Error| format!("{what}: {error}");
        let there = self.size().map_err(|error| why("find its size", error))?;
        let block = u64::from(self.blocks.logical);
        let wanted = bytes.unwrap_or(there);
        let before = self.seen.load(Ordering::Relaxed);
        if wanted < before {
            return Err(format!("it has {before} bytes, and cannot be made smaller while its guest runs"));
        }
        if bytes.is_some() && !wanted.is_multiple_of(block) {
            return Err(format!("{wanted} bytes are no whole blocks of {block}"));
        }
        if wanted > there {
            if self.is_device || self.read_only {
                let what = if self.is_device { "block device" } else { "file, which is only read," };
                return Err(format!("its {what} has {there} bytes: make that larger first"));
            }
            self.file.set_len(wanted).map_err(|error| why("make its file larger", error))?;
        }
        let seen = self.in_blocks(wanted);
        self.seen.store(seen, Ordering::Relaxed);
        Ok(seen)
    }

    fn grown(&self) -> Option<u64> {
        let bytes = self.in_blocks(self.size().ok()?);
        (bytes > self.seen.load(Ordering::Relaxed)).then_some(bytes)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }
}
