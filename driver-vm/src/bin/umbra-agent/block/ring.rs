//! The way to the disk: an io_uring with the pool as its one fixed buffer, and a thread for discards, for which kernels before 6.12
//! have no operation of the ring.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::Context;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::pool::Pool;

/// Entries of the submission queue: a batch of records of every end but the most; a fuller one is submitted in parts.
const SUBMISSIONS: u32 = 256;
/// Number of the pool among the ring's fixed buffers.
const POOL: u16 = 0;
/// `_IO(0x12, 119)` of `linux/fs.h`.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// `_IOR(0x12, 114, size_t)` of `linux/fs.h`.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;

/// A name that comes back with the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub u64);

/// Bytes on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub length: u64,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read to a place in the pool.
    Read {
        /// From where.
        at: Extent,
        /// Place, from the start of the pool.
        place: usize,
    },
    /// Write from a place in the pool.
    Write {
        /// To where.
        at: Extent,
        /// Place, from the start of the pool.
        place: usize,
    },
    /// Write zeroes, without deallocating. The kernel does it by writing where the device has no command for it.
    Zero(Extent),
    /// Deallocate in such a way that zeroes are read. The kernel refuses where the device has no command for it.
    Punch(Extent),
    /// Discard.
    Discard(Extent),
    /// Make stable what is done.
    Flush,
}

impl Action {
    /// Whether a disk that is in order may take long for it.
    pub fn is_slow(&self) -> bool {
        !matches!(self, Self::Read { .. } | Self::Write { .. })
    }
}

/// The ring, for use by one thread.
pub struct Ring {
    ring: IoUring,
    pool: Pool,
    discards: Discards,
}

impl Ring {
    /// A ring for at most `in_flight` actions at once.
    ///
    /// # Errors
    /// When the kernel refuses it, its buffer or a thread.
    pub fn new(pool: Pool, in_flight: u32) -> anyhow::Result<Self> {
        let completions = in_flight.max(SUBMISSIONS).next_power_of_two();
        let mut plain = IoUring::builder();
        plain.setup_cqsize(completions).setup_clamp();
        let mut quick = plain.clone();
        // Since Linux 6.0.
        quick.setup_single_issuer().setup_coop_taskrun();
        let ring = quick.build(SUBMISSIONS).or_else(|_| plain.build(SUBMISSIONS)).context("cannot make an io_uring")?;
        // SAFETY: the pool stays mapped as long as the ring: `Ring` owns both, and what the kernel has pinned outlives the mapping.
        unsafe { ring.submitter().register_buffers(&[pool.as_buffer()]) }
            .context("cannot pin the pool for the io_uring")?;
        Ok(Self { ring, pool, discards: Discards::start()? })
    }

    /// The memory that data pass through.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Become readable when there are results, which is to be watched edge-triggered: nothing takes the second back.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        // SAFETY: the ring's descriptor is open as long as the ring, which the result borrows.
        let ring = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        [ring, self.discards.wake.as_fd()]
    }

    /// Takes an action; it begins with [`Self::submit`] at the latest.
    ///
    /// # Errors
    /// When it reaches past the pool, or the kernel takes no actions.
    pub fn push(&mut self, token: Token, file: &Arc<File>, action: Action) -> anyhow::Result<()> {
        let Some(entry) = self.entry(file, action)? else {
            let Action::Discard(at) = action else { return Ok(()) };
            return self.discards.order(Discard { token, file: Arc::clone(file), at });
        };
        let entry = entry.user_data(token.0);
        while self.ring.submission().is_full() {
            self.submit()?;
        }
        // SAFETY: the entry's buffer is a part of the pool, which lives as long as the ring; the kernel holds the file by itself.
        unsafe { self.ring.submission().push(&entry) }.context("the submission queue of the io_uring is full")
    }

    /// The ring's entry for an action; none for a discard.
    fn entry(&self, file: &File, action: Action) -> anyhow::Result<Option<squeue::Entry>> {
        let fd = Fd(file.as_raw_fd());
        let piece = |at: Extent, place: usize| -> anyhow::Result<_> {
            let address =
                self.pool.address(place, usize::try_from(at.length)?).context("a place that is not in the pool")?;
            Ok((address, u32::try_from(at.length)?))
        };
        let allocate =
            |at: Extent, mode: libc::c_int| opcode::Fallocate::new(fd, at.length).offset(at.start).mode(mode).build();
        Ok(Some(match action {
            Action::Read { at, place } => {
                let (address, length) = piece(at, place)?;
                opcode::ReadFixed::new(fd, address, length, POOL).offset(at.start).build()
            }
            Action::Write { at, place } => {
                let (address, length) = piece(at, place)?;
                opcode::WriteFixed::new(fd, address, length, POOL).offset(at.start).build()
            }
            // As `blkdev_fallocate` has them (Linux 6.1 and 6.12): the first never deallocates, the second never writes.
            Action::Zero(at) => allocate(at, libc::FALLOC_FL_ZERO_RANGE),
            Action::Punch(at) => allocate(at, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            Action::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            Action::Discard(_) => return Ok(None),
        }))
    }

    /// Begins all that was taken.
    ///
    /// # Errors
    /// When the kernel takes no actions.
    pub fn submit(&mut self) -> anyhow::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // Memory is short for a moment: results free some.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::yield_now()
                }
                Err(error) => return Err(error).context("the io_uring takes no orders"),
            }
        }
        Ok(())
    }

    /// Takes the results that are there: as a system call has them, negative for an error.
    pub fn results(&mut self, results: &mut Vec<(Token, i32)>) {
        results.extend(self.ring.completion().map(|entry| (Token(entry.user_data()), entry.result())));
        self.discards.results(results);
    }
}

struct Discard {
    token: Token,
    file: Arc<File>,
    at: Extent,
}

/// The thread for discards.
struct Discards {
    orders: Sender<Discard>,
    results: Receiver<(Token, i32)>,
    wake: Arc<EventFd>,
}

impl Discards {
    fn start() -> anyhow::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = Arc::new(EventFd::from_flags(flags).context("cannot make an event descriptor")?);
        let (orders, taken) = channel::<Discard>();
        let (sender, results) = channel();
        let its_wake = Arc::clone(&wake);
        let work = move || {
            for Discard { token, file, at } in taken {
                let result = discard(&file, at);
                // Who is gone needs no result.
                let _ = sender.send((token, result));
                let _ = its_wake.write(1);
            }
        };
        std::thread::Builder::new().name("discard".into()).spawn(work).context("cannot start a thread")?;
        Ok(Self { orders, results, wake })
    }

    fn order(&self, order: Discard) -> anyhow::Result<()> {
        self.orders.send(order).ok().context("the thread for discards has ended")
    }

    fn results(&self, results: &mut Vec<(Token, i32)>) {
        results.extend(self.results.try_iter());
    }
}

/// Discards; the result as a system call has it. In a file it is a hole.
fn discard(file: &File, at: Extent) -> i32 {
    let is_device = file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
    let done = if is_device {
        let range = [at.start, at.length];
        // SAFETY: the argument is two numbers of 64 bits, as this call wants, and outlives it.
        Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, &raw const range) })
    } else {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (Ok(start), Ok(length)) = (i64::try_from(at.start), i64::try_from(at.length)) else { return -libc::EINVAL };
        // SAFETY: there is no pointer among the arguments.
        Errno::result(unsafe { libc::fallocate(file.as_raw_fd(), mode, start, length) })
    };
    done.map_or_else(|error| -(error as i32), |_| 0)
}

/// Bytes of a disk, as its driver has it now; of a file in its place.
///
/// # Errors
/// When the kernel does not say.
pub fn size(file: &File) -> std::io::Result<u64> {
    let metadata = file.metadata()?;
    if !metadata.file_type().is_block_device() {
        return Ok(metadata.len());
    }
    let mut bytes = 0_u64;
    // SAFETY: the argument is a place for a number of 64 bits, as this call wants, and outlives it.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) })?;
    Ok(bytes)
}

/// A result as a number of bytes, or an error.
pub fn outcome(result: i32) -> Result<u64, Errno> {
    u64::try_from(result).map_err(|_| Errno::from_raw(result.saturating_neg()))
}
