//! The wait for the disks of a plan: they are looked for when the kernel says that a block device has come, and from time to time.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use umbra_driver_vm::protocol::{BlockPlan, DevicePlace};

use super::discover::{self, ChosenDisk, NoDisk};
use crate::due::Due;
use crate::orders::Mailbox;

/// Interval at which disks are looked for beside the kernel's events, which may be lost when many come at once.
const LOOK: Duration = Duration::from_millis(250);
/// The same while the controller is still to come.
const LOOK_IDLE: Duration = Duration::from_secs(2);
/// The group of the kernel's own events (`lib/kobject_uevent.c`).
const KERNEL_EVENTS: u32 = 1;
/// Longest event that is read; what is in it does not matter.
const MAX_EVENT: usize = 4096;

/// What is missing at the moment, for the main loop, which watches the time.
#[derive(Clone, Debug, Default)]
pub struct Missing(Arc<Mutex<String>>);

impl Missing {
    /// In a sentence's form.
    pub fn get(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says what is waited for now.
    pub fn set(&self, what: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }
}

/// A search.
pub struct Search<'a> {
    plan: &'a BlockPlan,
    due: Due,
    mailbox: &'a Mailbox,
    missing: &'a Missing,
    events: OwnedFd,
    /// Since when the same disks are there, and their number.
    settling: Option<(Instant, usize)>,
}

impl<'a> Search<'a> {
    /// For the disks of `plan`.
    ///
    /// # Errors
    /// When the kernel's events cannot be heard.
    pub fn new(plan: &'a BlockPlan, mut due: Due, mailbox: &'a Mailbox, missing: &'a Missing) -> anyhow::Result<Self> {
        if plan.device == DevicePlace::Present {
            due.expect(Instant::now());
        }
        missing.set("the disk has not appeared".into());
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let events = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)
            .context("cannot hear the kernel's events")?;
        bind(events.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS)).context("cannot hear the kernel's events")?;
        Ok(Self { plan, due, mailbox, missing, events, settling: None })
    }

    /// Waits until each end has its disk.
    ///
    /// # Errors
    /// When one can get none. A disk that does not come is the main loop's to notice.
    pub fn run(mut self) -> anyhow::Result<Vec<ChosenDisk>> {
        loop {
            self.drain_events();
            let orders = self.mailbox.take();
            let now = Instant::now();
            if orders.loaded {
                self.due.loaded(now);
            }
            if orders.device_has_come {
                self.due.expect(now);
            }
            if self.due.is_expected()
                && let Some(chosen) = self.look(now)?
            {
                return Ok(chosen);
            }
            self.wait()?;
        }
    }

    fn look(&mut self, now: Instant) -> anyhow::Result<Option<Vec<ChosenDisk>>> {
        let found = discover::disks(Path::new("/sys"));
        let since = match self.settling {
            Some((since, count)) if count == found.len() => since,
            _ => now,
        };
        self.settling = Some((since, found.len()));
        let settled = self.due.is_loaded() && now.duration_since(since) >= self.due.settling();
        match discover::choose(&found, &self.plan.ends, settled) {
            Ok(chosen) => match chosen.iter().find(|disk| !super::node(&disk.name).exists()) {
                None => return Ok(Some(chosen)),
                Some(disk) => self.missing.set(format!("the disk {} has no device file", disk.name)),
            },
            Err(NoDisk::NotYet(what)) => self.missing.set(what),
            Err(NoDisk::Never(what)) => bail!(what),
        }
        Ok(None)
    }

    fn wait(&self) -> anyhow::Result<()> {
        let look = if self.due.is_expected() { LOOK } else { LOOK_IDLE };
        let waited = [self.mailbox.descriptor(), self.events.as_fd()];
        let mut polled = waited.map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN));
        match poll(&mut polled, PollTimeout::try_from(look).unwrap_or(PollTimeout::ZERO)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait for disks"),
        }
    }

    /// Takes the events that are there: each is a reason to look.
    fn drain_events(&self) {
        let mut event = [0u8; MAX_EVENT];
        loop {
            // SAFETY: the buffer is as long as the call is told, and outlives it.
            let length = unsafe { libc::recv(self.events.as_raw_fd(), event.as_mut_ptr().cast(), event.len(), 0) };
            // ENOBUFS: events were lost; there is one look for all of them.
            if length < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::ENOBUFS) {
                return;
            }
        }
    }
}
