//! The disk service (`umbra_driver_vm::block_protocol`): a thread of its own, because opening a disk, or whatever else is asked of its
//! driver, may take any time. The main loop sends orders and hears reports, and waits for neither.
//!
//! ```text
//!   plan ──> ring and pool ──> search ──> open, set up, ports ──> Disks ──> service (session, ring, port)
//! ```

mod discover;
pub mod pool;
mod port;
mod resets;
mod ring;
mod search;
mod service;
mod session;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::eventfd::{EfdFlags, EventFd};
use umbra_driver_vm::block_protocol::{BLOCK_PORT, Hello, MAX_DEPTH, PoolRange};
use umbra_driver_vm::protocol::{BlockPlan, FromAgent};
use umbra_shadow::Generation;
use umbra_shadow::block::WriteCache;

use self::discover::ChosenDisk;
use self::pool::{Pool, Share};
use self::resets::Resets;
use self::ring::Ring;
use self::search::{Missing, Search};
use self::service::{BlockService, MAX_ACTIONS};
use self::session::{Offer, Sessions};
use crate::due::Due;
use crate::orders::{Mailbox, Orders};
use crate::{kernel_log, system};

/// Interval at which ports and disks are looked for that are about to be there: they come while modules are still being loaded. A driver
/// VM that has fewer ports than ends is failed by the main loop, as one whose disk does not come.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
const PORTS: &str = "/sys/class/virtio-ports";
/// `_IO(0x12, 97)` of `linux/fs.h`: forget what is cached of the device.
const BLKFLSBUF: libc::Ioctl = 0x1261;

/// The disk service, as the main loop has it.
#[derive(Debug)]
pub struct BlockThread {
    mailbox: Arc<Mailbox>,
    reports: Receiver<anyhow::Result<FromAgent>>,
    wake: Arc<EventFd>,
    missing: Missing,
    has_disks: bool,
}

impl BlockThread {
    /// Starts the thread with its plan; `pool` is what was reserved for it at the start of this VM.
    ///
    /// # Errors
    /// When there is no thread or event descriptor to be had.
    pub fn start(plan: BlockPlan, generation: u32, due: Due, pool: Option<Pool>) -> anyhow::Result<Self> {
        let generation = Generation::new(generation).context("a life has the number 0")?;
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = Arc::new(EventFd::from_flags(flags).context("cannot make an event descriptor")?);
        let mailbox = Arc::new(Mailbox::new().context("cannot make an event descriptor")?);
        let (sender, reports) = channel();
        let missing = Missing::default();
        let (its_mailbox, its_missing) = (Arc::clone(&mailbox), missing.clone());
        let reporter = Reporter { sender, wake: Arc::clone(&wake) };
        let work = move || {
            let error = match prepare(&plan, generation, due, pool, &its_mailbox, &its_missing) {
                Ok((service, disks)) => {
                    reporter.report(Ok(disks));
                    service.run(|message| reporter.report(Ok(message)))
                }
                Err(error) => error,
            };
            reporter.report(Err(error));
        };
        std::thread::Builder::new().name("block".into()).spawn(work).context("cannot start a thread")?;
        Ok(Self { mailbox, reports, wake, missing, has_disks: false })
    }

    /// Orders something.
    pub fn order(&self, change: impl FnOnce(&mut Orders)) {
        self.mailbox.order(change);
    }

    /// Readable when there is a report.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next message for the host, if there is one.
    ///
    /// # Errors
    /// When the service has ended; the error says why.
    pub fn next_report(&mut self) -> anyhow::Result<Option<FromAgent>> {
        let _ = self.wake.read(); // before the reports, so that none stays unseen
        match self.reports.try_recv() {
            Ok(report) => {
                let report = report?;
                self.has_disks |= matches!(report, FromAgent::Disks { .. });
                Ok(Some(report))
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => bail!("the disk service has ended"),
        }
    }

    /// What is missing until the disks are there, in a sentence's form.
    pub fn missing(&self) -> Option<String> {
        (!self.has_disks).then(|| self.missing.get())
    }
}

/// The way to the main loop.
struct Reporter {
    sender: Sender<anyhow::Result<FromAgent>>,
    wake: Arc<EventFd>,
}

impl Reporter {
    fn report(&self, report: anyhow::Result<FromAgent>) {
        // A main loop that is gone is writing its last words.
        let _ = self.sender.send(report);
        let _ = self.wake.write(1);
    }
}

/// Everything up to the service itself, and the report of the disks. The ports are open when it is made.
fn prepare(
    plan: &BlockPlan,
    generation: Generation,
    due: Due,
    pool: Option<Pool>,
    mailbox: &Arc<Mailbox>,
    missing: &Missing,
) -> anyhow::Result<(BlockService, FromAgent)> {
    // Until the disks are there: a recovery does not wait for ordinary threads.
    system::go_first(system::NETWORK_PRIORITY);
    let ends = plan.ends.len();
    let pool = Pool::for_ends(ends, pool)?;
    let shares = pool.shares(ends);
    let ring = Ring::new(pool, u32::try_from(ends)?.saturating_mul(MAX_ACTIONS))?;
    let mut chosen = Search::new(plan, due, mailbox, missing)?.run()?;
    let files = open_all(&chosen, missing)?;
    for (chosen, _) in chosen.iter_mut().zip(&plan.ends).filter(|(_, end)| end.has_cache) {
        discover::tell_of_cache(Path::new("/sys"), &chosen.name).map_err(anyhow::Error::msg)?;
        chosen.disk.cache = WriteCache::Volatile;
    }
    let disks = chosen.iter().map(|chosen| chosen.disk.clone()).collect();
    let driver = chosen.first().map_or_else(String::new, |first| first.driver.clone());
    let pieces: Vec<_> = shares.iter().map(|share| ring.pool().locate(*share)).collect::<anyhow::Result<_>>()?;
    let mut service = BlockService::new(ring, Resets::follow(), Arc::clone(mailbox))?;
    for (end, (chosen, (share, pool))) in chosen.into_iter().zip(shares.into_iter().zip(pieces)).enumerate() {
        let disk = files.get(&chosen.name).cloned().context("a disk that was not opened")?;
        missing.set(format!("there is no console port {BLOCK_PORT}.{end}"));
        let opener = port::opener(wait_for_port(end));
        let patience = Duration::from_millis(plan.ends[end].io_timeout_ms.into());
        service.add(opener, sessions(chosen, share, pool, generation), disk, patience)?;
    }
    system::go_with_others();
    Ok((service, FromAgent::Disks { driver, disks, uptime_ms: system::uptime_ms() }))
}

fn sessions(chosen: ChosenDisk, share: Share, pool: Vec<PoolRange>, generation: Generation) -> Sessions {
    let depth = chosen.queue_depth.clamp(1, MAX_DEPTH);
    Sessions::new(Offer { hello: Hello { disk: chosen.disk, pool, depth }, share }, generation)
}

fn wait_for_port(end: usize) -> PathBuf {
    loop {
        match port::find(Path::new(PORTS), end) {
            Some(device) if device.exists() => return device,
            _ => std::thread::sleep(LOOK_AGAIN),
        }
    }
}

/// The device file of a disk.
fn node(name: &str) -> PathBuf {
    // The kernel's way to have a folder in a name.
    Path::new("/dev").join(name.replace('!', "/"))
}

/// Opens each disk, once.
fn open_all(chosen: &[ChosenDisk], missing: &Missing) -> anyhow::Result<BTreeMap<String, Arc<File>>> {
    let mut files = BTreeMap::new();
    for disk in chosen {
        if !files.contains_key(&disk.name) {
            missing.set(format!("the disk {} is there, and its driver does not answer", disk.name));
            set_scheduler(disk);
            let is_read_only = |other: &ChosenDisk| other.name != disk.name || other.disk.identity.read_only;
            let file = open_when_ready(disk, chosen.iter().all(is_read_only), missing)?;
            files.insert(disk.name.clone(), Arc::new(file));
        }
    }
    Ok(files)
}

/// Nothing but a spindle gains from an order of requests other than the guest's, which has a scheduler of its own.
fn set_scheduler(disk: &ChosenDisk) {
    let place = Path::new("/sys/class/block").join(&disk.name).join("queue/scheduler");
    if !disk.disk.rotational
        && let Err(error) = fs::write(&place, "none")
    {
        kernel_log::error(&format!("{} keeps its I/O scheduler: {error}", disk.name));
    }
}

/// Opens a disk as soon as that can be done: it is in sysfs a moment before the kernel has it ready. One that never is, the main loop
/// notices.
fn open_when_ready(disk: &ChosenDisk, read_only: bool, missing: &Missing) -> anyhow::Result<File> {
    let node = node(&disk.name);
    loop {
        let error = match open(&node, read_only) {
            Ok(file) => return Ok(file),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::ENXIO | libc::ENODEV | libc::ENOENT | libc::ENOMEDIUM) => {
                missing.set(format!("the disk {} is there, and cannot be opened: {error}", disk.name));
                std::thread::sleep(LOOK_AGAIN);
            }
            _ => return Err(error).with_context(|| format!("cannot open the disk {}", node.display())),
        }
    }
}

/// Opens a disk past the page cache: what is done is with the device, and a flush is the device's.
fn open(node: &Path, read_only: bool) -> std::io::Result<File> {
    let flags = libc::O_DIRECT | libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(node)?;
    // What the kernel has read for the partition table: while pages of the device are cached, each write has to look for its own.
    // SAFETY: this one takes no argument.
    unsafe { libc::ioctl(file.as_raw_fd(), BLKFLSBUF) };
    Ok(file)
}
