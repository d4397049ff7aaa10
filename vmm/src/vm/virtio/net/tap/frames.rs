//! Frames between a TAP descriptor and a guest's queues, straight from and to the guest's buffers. Each frame
//! has a virtio-net header of 12 bytes in front on both sides (virtio 1.2, section 5.1.6). A guest's header is copied and
//! checked before the host's kernel sees it: that would cut a frame into as many segments as the header says.

use std::io;
use std::os::fd::RawFd;

use thiserror::Error;
use umbra_splitter::copy::{gather, scatter};
use umbra_splitter::header::{HEADER_LEN, Header, MAX_FRAME, Offloads};
use umbra_splitter::queue::{Chain, Ring, RingFault, Virtqueue};
use vm_memory::VolatileSlice;

/// Most frames moved before other devices get their turn.
const BUDGET: usize = 128;
/// Most buffers that one received frame is spread over.
const MAX_BUFFERS: u16 = 64;
/// Room for any frame with its header.
const ROOM: usize = HEADER_LEN + MAX_FRAME;
/// Most vectors of one system call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;
/// Offset of the number of buffers in the header.
const NUM_BUFFERS: usize = 10;

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing more to move on the host's side (receive), or in the queue (transmit).
    Idle,
    /// No buffer of the guest is left.
    NoBuffers,
    /// The budget is used up: there may be more.
    Budget,
}

/// Why frames stopped.
#[derive(Debug, Error)]
pub(super) enum Error {
    /// The guest's driver broke a rule.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// The interface is gone.
    #[error("the TAP interface cannot be read any more")]
    Gone(#[source] io::Error),
}

/// Received frames, host to guest.
pub(super) struct Receiver {
    /// The guest takes a frame in several buffers.
    pub(super) mergeable: bool,
    /// Frames that did not fit into the buffers there were.
    pub(super) dropped: u64,
    bounce: Vec<u8>,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self { mergeable: false, dropped: 0, bounce: vec![0; ROOM] }
    }

    /// Moves what waits at `tap` into the guest's buffers.
    pub(super) fn receive(&mut self, tap: RawFd, queue: &mut Virtqueue) -> Result<End, Error> {
        let end = self.fill(tap, queue);
        queue.notify()?;
        end
    }

    fn fill(&mut self, tap: RawFd, queue: &mut Virtqueue) -> Result<End, Error> {
        let mut ring = queue.open()?;
        let mut chain = Chain::default();
        let mut heads = Vec::new();
        for _ in 0..BUDGET {
            if ring.available()? == 0 && !ring.listen(0)? {
                return Ok(End::NoBuffers);
            }
            let limit = if self.mergeable { MAX_BUFFERS } else { 1 };
            let room = collect(&mut ring, limit, &mut chain, &mut heads)?;
            if heads.is_empty() {
                continue;
            }
            match self.read(tap, &chain, room) {
                Ok(length) if length <= room => hand_over(&mut ring, &chain, &heads, length)?,
                Ok(_) => self.dropped += 1,
                Err(error) if is_retry(&error) => return Ok(End::Idle),
                Err(error) => return Err(Error::Gone(error)),
            }
        }
        Ok(End::Budget)
    }

    /// Reads a frame into the guest's buffers; into our own where those might be too small.
    fn read(&mut self, tap: RawFd, chain: &Chain<'_>, room: usize) -> io::Result<usize> {
        if room >= ROOM {
            return vectored(tap, chain.writable().iter().copied(), libc::readv);
        }
        // SAFETY: the buffer is ours and as long as said.
        let length = unsafe { libc::read(tap, self.bounce.as_mut_ptr().cast(), self.bounce.len()) };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        if length <= room {
            scatter(&self.bounce[..length], chain.writable(), 0);
        }
        Ok(length)
    }
}

/// Gathers chains until any frame fits, at most `limit`; returns the room in them. The heads come with the room of
/// each. A chain that is wrong ends the gathering; as the first it is given back empty, and there is none.
fn collect<'m>(
    ring: &mut Ring<'m>,
    limit: u16,
    chain: &mut Chain<'m>,
    heads: &mut Vec<(u16, usize)>,
) -> Result<usize, RingFault> {
    *chain = Chain::default();
    heads.clear();
    let mut room = 0;
    for ahead in 0..ring.available()?.min(limit) {
        let head = ring.head(ahead)?;
        if let Err(fault) = ring.walk_on(head, chain) {
            tracing::debug!("a receive buffer is given back: {fault}");
            if ahead == 0 {
                ring.take(1);
                ring.complete(head, 0)?;
            }
            break;
        }
        heads.push((head, chain.writable_len() - room));
        room = chain.writable_len();
        if room >= ROOM {
            break;
        }
    }
    Ok(room)
}

/// Gives the frame of `length` bytes (header included) to the guest with as many buffers as it fills.
fn hand_over(ring: &mut Ring<'_>, chain: &Chain<'_>, heads: &[(u16, usize)], length: usize) -> Result<(), RingFault> {
    let mut left = length;
    let mut used = 0u16;
    for &(head, room) in heads {
        let bytes = left.min(room);
        // At most `ROOM`.
        ring.put_used(head, u32::try_from(bytes).unwrap_or(0))?;
        used += 1;
        left -= bytes;
        if left == 0 {
            break;
        }
    }
    scatter(&used.to_le_bytes(), chain.writable(), NUM_BUFFERS);
    ring.take(used);
    ring.publish()
}

/// Sent frames, guest to host.
pub(super) struct Sender {
    /// The offloads that the guest's driver may ask for.
    pub(super) negotiated: Offloads,
    /// Frames that were malformed.
    pub(super) malformed: u64,
    /// The interface was found to be gone.
    gone: Option<io::Error>,
}

impl Sender {
    pub(super) fn new() -> Self {
        Self { negotiated: Offloads::empty(), malformed: 0, gone: None }
    }

    /// Moves what the guest sends to `tap`. Frames that the host refuses (interface down) are lost, as on a cable that is
    /// pulled.
    ///
    /// # Errors
    /// The interface is gone, or the guest's driver broke a rule.
    pub(super) fn transmit(&mut self, tap: RawFd, queue: &mut Virtqueue) -> Result<End, Error> {
        let end = self.drain(tap, queue);
        queue.notify()?;
        match self.gone.take() {
            Some(error) => Err(Error::Gone(error)),
            None => Ok(end?),
        }
    }

    fn drain(&mut self, tap: RawFd, queue: &mut Virtqueue) -> Result<End, RingFault> {
        let mut ring = queue.open()?;
        let mut chain = Chain::default();
        for _ in 0..BUDGET {
            if ring.available()? == 0 && !ring.listen(0)? {
                return Ok(End::Idle);
            }
            let head = ring.head(0)?;
            if let Err(fault) = ring.walk(head, &mut chain) {
                tracing::debug!("a frame is dropped: {fault}");
                self.malformed += 1;
            } else {
                self.send(tap, &chain);
            }
            ring.take(1);
            ring.complete(head, 0)?;
        }
        Ok(End::Budget)
    }

    /// Sends one frame behind a header of our own, which the guest cannot change after the check.
    fn send(&mut self, tap: RawFd, chain: &Chain<'_>) {
        let mut header = [0; HEADER_LEN];
        gather(chain.readable(), 0, &mut header);
        let len = chain.readable_len().saturating_sub(HEADER_LEN);
        match Header::check(header, len, self.negotiated) {
            Ok(checked) => header = checked.to_bytes(0),
            Err(fault) => {
                tracing::debug!("a frame is dropped: {fault}");
                self.malformed += 1;
                return;
            }
        }
        let frame = behind(chain.readable(), HEADER_LEN);
        let whole = std::iter::once(VolatileSlice::from(&mut header[..])).chain(frame);
        if let Err(error) = vectored(tap, whole, libc::writev) {
            tracing::trace!("a frame is refused: {error}");
            // What the kernel says of a descriptor whose interface was removed.
            if error.raw_os_error() == Some(libc::EBADFD) {
                self.gone = Some(error);
            }
        }
    }
}

/// What is behind the first `skip` bytes of `slices`.
fn behind<'m>(slices: &[VolatileSlice<'m>], mut skip: usize) -> impl Iterator<Item = VolatileSlice<'m>> {
    slices.iter().filter_map(move |slice| {
        let passed = skip.min(slice.len());
        skip -= passed;
        slice.offset(passed).ok().filter(|rest| !rest.is_empty())
    })
}

type Call = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int) -> libc::ssize_t;

/// One `readv` or `writev` on the guest's own buffers, as many of them as the kernel takes.
fn vectored<'m>(fd: RawFd, slices: impl Iterator<Item = VolatileSlice<'m>>, call: Call) -> io::Result<usize> {
    let guards: Vec<_> = slices.take(MAX_VECTORS).map(|slice| slice.ptr_guard_mut()).collect();
    let vectors: Vec<_> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: each vector is a slice of guest memory, or of memory that our caller holds, mapped as long as the guards live; the
    // guest may change its own meanwhile, which the kernel takes as it comes.
    let length = unsafe { call(fd, vectors.as_ptr(), count) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
