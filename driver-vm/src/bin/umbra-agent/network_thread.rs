//! The network thread: everything that calls into the kernel's network stack, apart from the main loop, because any such call
//! may wait for the stack's lock (rtnl, one for all interfaces) while a driver holds it for its own recovery. The main loop sends
//! orders and hears reports, waits for neither, and watches at each beat that no call takes too long.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use umbra_driver_vm::calls::{CallWatch, Calls};
use umbra_driver_vm::protocol::{DevicePlace, FromAgent, HEARTBEAT_MS, NetPlan};

use crate::due::Due;
use crate::netlink::Netlink;
use crate::network::{Ends, Network, Nic};
use crate::orders::{Mailbox, Orders};
use crate::{kernel_log, system};

/// Interval at which carrier and, until they are there, devices are looked for, beside the kernel's notifications: those of a link
/// that goes down come up to a second late, and looking costs little.
const LOOK: Duration = Duration::from_millis(250);
/// The same while the device is still to come: all that happens then is notified.
const LOOK_IDLE: Duration = Duration::from_secs(2);
/// Looks between two checks of the NIC's queues, which makes one check a second; a queue counts as stuck after many checks.
const LOOKS_PER_CHECK: u64 = 4;

/// Longest time of one call, in seconds. No driver's recovery is known to hold the lock for that long (firmware downloads and
/// self-tests take 5 to 10 s); the kernel has the same limit for a task that waits for a lock (`hung_task_timeout_secs`).
const PATIENCE_S: u64 = 30;
/// [`PATIENCE_S`] in beats.
const BEATS: u64 = PATIENCE_S * 1000 / HEARTBEAT_MS;

/// A device of the plan has not appeared in time.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Missing(&'static str);

/// What the network thread has to say.
#[derive(Debug)]
pub enum Report {
    /// Messages for the host, to be written together.
    Say(Vec<FromAgent>),
    /// A message for the host; the thread goes on when it has been handed over.
    SayFirst(FromAgent, SyncSender<()>),
    /// It has ended, for this reason.
    Failed(anyhow::Error),
}

/// The network thread, as the main loop has it.
#[derive(Debug)]
pub struct NetworkThread {
    ends: usize,
    mailbox: Arc<Mailbox>,
    reports: Receiver<Report>,
    wake: Arc<EventFd>,
    calls: Calls,
    watch: CallWatch,
}

impl NetworkThread {
    /// Starts the thread with its plan.
    ///
    /// # Errors
    /// When there is no thread or event descriptor to be had.
    pub fn start(plan: NetPlan, due: Due) -> anyhow::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = Arc::new(EventFd::from_flags(flags).context("cannot make an event descriptor")?);
        let mailbox = Arc::new(Mailbox::new().context("cannot make an event descriptor")?);
        let (sender, reports) = channel();
        let (ends, calls) = (plan.ends.len(), Calls::default());
        let reporter = Reporter { sender, wake: Arc::clone(&wake) };
        let (orders, its_calls) = (Arc::clone(&mailbox), calls.clone());
        std::thread::Builder::new()
            .name("network".into())
            .spawn(move || run((plan, due), orders, its_calls, &reporter))
            .context("cannot start a thread")?;
        Ok(Self { ends, mailbox, reports, wake, calls, watch: CallWatch::default() })
    }

    /// Orders something.
    pub fn order(&self, change: impl FnOnce(&mut Orders)) {
        self.mailbox.order(change);
    }

    /// Orders something for an end of the plan.
    ///
    /// # Errors
    /// When the plan has no such end.
    pub fn order_for(&self, end: u16, change: impl FnOnce(&mut Orders)) -> anyhow::Result<()> {
        if usize::from(end) >= self.ends {
            bail!("there is no end {end}");
        }
        self.order(change);
        Ok(())
    }

    /// Readable when there is a report.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next report, if there is one.
    ///
    /// # Errors
    /// When the thread has ended without a word.
    pub fn next_report(&mut self) -> anyhow::Result<Option<Report>> {
        let _ = self.wake.read(); // before the reports, so that none stays unseen
        match self.reports.try_recv() {
            Ok(report) => Ok(Some(report)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => bail!("the network thread has ended"),
        }
    }

    /// Looks whether the thread gets on, once a beat.
    ///
    /// # Errors
    /// When it has been in one call for too long.
    pub fn check(&mut self) -> anyhow::Result<()> {
        if self.watch.look(&self.calls) >= BEATS {
            bail!("the network stack has been locked (rtnl) for {PATIENCE_S} s: a call into it does not return");
        }
        Ok(())
    }
}

/// The way to the main loop.
#[derive(Debug)]
struct Reporter {
    sender: Sender<Report>,
    wake: Arc<EventFd>,
}

impl Reporter {
    fn report(&self, report: Report) {
        // A main loop that is gone is writing its last words.
        let _ = self.sender.send(report);
        let _ = self.wake.write(1);
    }

    fn say(&self, message: FromAgent) {
        self.report(Report::Say(vec![message]));
    }

    /// Says something that the host has to know before what comes next, which may be this VM's death.
    fn say_first(&self, message: FromAgent) {
        let (sender, handed_over) = sync_channel(1);
        self.report(Report::SayFirst(message, sender));
        let _ = handed_over.recv();
    }
}

fn run(plan: (NetPlan, Due), mailbox: Arc<Mailbox>, calls: Calls, reporter: &Reporter) {
    system::go_first(system::NETWORK_PRIORITY);
    let error = match Worker::new(plan, mailbox, calls, reporter) {
        Ok(mut worker) => loop {
            if let Err(error) = worker.turn() {
                break error;
            }
        },
        Err(error) => error,
    };
    reporter.report(Report::Failed(error));
}

/// What the thread works with.
struct Worker<'a> {
    mailbox: Arc<Mailbox>,
    reporter: &'a Reporter,
    calls: Calls,
    requests: Netlink,
    changes: Netlink,
    /// When a device that has not appeared counts as missing.
    due: Due,
    state: State,
    looks: u64,
    next_look: Instant,
}

#[derive(Debug)]
enum State {
    /// Not all devices are there yet.
    Awaited { plan: NetPlan, nic: Option<Nic>, ends: Option<Ends> },
    /// Frames are forwarded.
    Forwarding { network: Network, carrier: bool },
}

impl<'a> Worker<'a> {
    fn new(
        (plan, mut due): (NetPlan, Due),
        mailbox: Arc<Mailbox>,
        calls: Calls,
        reporter: &'a Reporter,
    ) -> anyhow::Result<Self> {
        let now = Instant::now();
        if plan.device == DevicePlace::Present {
            due.expect(now);
        }
        Ok(Self {
            mailbox,
            reporter,
            requests: Netlink::requests(calls.clone()).context("cannot talk to the kernel's network")?,
            changes: Netlink::link_changes(calls.clone()).context("cannot hear of link changes")?,
            calls,
            due,
            state: State::Awaited { plan, nic: None, ends: None },
            looks: 0,
            next_look: now,
        })
    }

    fn turn(&mut self) -> anyhow::Result<()> {
        self.wait()?;
        if self.changes.drain() {
            self.look_at_carrier()?;
        }
        let orders = self.mailbox.take();
        self.obey(orders)?;
        self.advance()?;
        self.look()
    }

    fn wait(&self) -> anyhow::Result<()> {
        let limit = self.next_look.saturating_duration_since(Instant::now());
        // Rounded up: a wait that ends early would only turn the loop once more.
        let millis = u16::try_from(limit.as_millis() + 1).unwrap_or(u16::MAX);
        let waited = [self.mailbox.descriptor(), self.changes.descriptor()];
        let mut polled = waited.map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN));
        match poll(&mut polled, PollTimeout::from(millis)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait for events"),
        }
    }

    fn obey(&mut self, orders: Orders) -> anyhow::Result<()> {
        if orders.loaded {
            self.due.loaded(Instant::now());
        }
        if orders.device_has_come {
            let now = Instant::now();
            self.due.expect(now);
            self.next_look = now;
        }
        match &mut self.state {
            State::Forwarding { network, .. } => {
                for (end, mode) in orders.modes {
                    network.set_mode(&mut self.requests, end, mode)?;
                }
                for (end, offloads) in orders.offloads {
                    network.set_offloads(&self.calls, end, offloads)?;
                }
                if orders.stall {
                    network.stall(&mut self.requests)?;
                }
            }
            // Not forwarding yet: the plan is changed, and applied when the devices are there. There is nothing to stall.
            State::Awaited { plan, nic, ends } => {
                let asked = !orders.modes.is_empty();
                for (end, mode) in orders.modes {
                    let end = plan.ends.get_mut(usize::from(end)).with_context(|| format!("there is no end {end}"))?;
                    end.mode = mode;
                }
                if let (true, Some(nic), [end]) = (asked, nic, &plan.ends[..]) {
                    nic.receive(&mut self.requests, &end.mode)?;
                }
                for (end, offloads) in orders.offloads {
                    if let Some(ends) = ends {
                        ends.set_offloads(&self.calls, end, offloads)?;
                    }
                    let end = plan.ends.get_mut(usize::from(end)).with_context(|| format!("there is no end {end}"))?;
                    end.offloads = offloads;
                }
            }
        }
        Ok(())
    }

    /// Goes on as far as the devices that are there allow.
    fn advance(&mut self) -> anyhow::Result<()> {
        let State::Awaited { plan, nic, ends } = &mut self.state else { return Ok(()) };
        // Before the NIC, which in a standby comes last: then there is nothing left to do but to join them.
        if ends.is_none() && self.due.is_loaded() {
            *ends = Ends::find(&mut self.requests, plan)?;
        }
        if nic.is_none() {
            // What is asked of its driver may be its death, which the host then knows the cause of.
            let tell = || self.reporter.say_first(FromAgent::NicFound { uptime_ms: system::uptime_ms() });
            *nic = Nic::find(&mut self.requests, plan, tell)?;
            if let Some(nic) = nic {
                self.reporter.say(FromAgent::Nic {
                    driver: nic.driver.clone(),
                    interface: nic.name.clone(),
                    mac: nic.permanent,
                    mtu: u16::try_from(nic.mtu).unwrap_or(u16::MAX),
                    uptime_ms: system::uptime_ms(),
                });
            }
        }
        if let (Some(_), Some(there)) = (&nic, &mut *ends)
            && there.are_settled(&mut self.requests)?
            && let (Some(nic), Some(ends)) = (nic.take(), ends.take())
        {
            let network = Network::join(&mut self.requests, nic, ends, plan)?;
            return self.forwarding(network);
        }
        if self.due.is_over(Instant::now()) {
            let nic_is_there = nic.is_some();
            let what = if nic_is_there { "a virtio-net end has not come up" } else { "the NIC has not appeared" };
            return Err(Missing(what).into());
        }
        Ok(())
    }

    fn forwarding(&mut self, network: Network) -> anyhow::Result<()> {
        let carrier = network.carrier(&mut self.requests)?;
        let news = carrier_news(&self.calls, &network, carrier);
        self.reporter.report(Report::Say(vec![FromAgent::Forwarding { uptime_ms: system::uptime_ms() }, news]));
        self.state = State::Forwarding { network, carrier };
        kernel_log::info("forwarding");
        Ok(())
    }

    fn look_at_carrier(&mut self) -> anyhow::Result<()> {
        if let State::Forwarding { network, carrier } = &mut self.state {
            let up = network.carrier(&mut self.requests)?;
            if up != *carrier {
                *carrier = up;
                self.reporter.say(carrier_news(&self.calls, network, up));
            }
        }
        Ok(())
    }

    /// What is looked at from time to time.
    fn look(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if now < self.next_look {
            return Ok(());
        }
        let idle = matches!(self.state, State::Awaited { .. }) && !self.due.is_expected();
        self.next_look = now + if idle { LOOK_IDLE } else { LOOK };
        self.looks += 1;
        self.look_at_carrier()?;
        if let State::Forwarding { network, carrier } = &mut self.state {
            network.look_at_ends(&mut self.requests)?;
            let carrier = *carrier;
            if self.looks.is_multiple_of(LOOKS_PER_CHECK) {
                self.calls.make(|| network.check_queues(carrier))?;
            }
        }
        Ok(())
    }
}

/// What is said of a carrier that has come or gone.
fn carrier_news(calls: &Calls, network: &Network, up: bool) -> FromAgent {
    let mode = if up { calls.make(|| network.link_mode()) } else { None };
    FromAgent::Carrier { up, mode, uptime_ms: system::uptime_ms() }
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};
    use umbra_driver_vm::protocol::{Mac, NetEnd, Offloads, RxMode};

    use super::*;

    /// Runs `test` in a network namespace of its own, which takes root's rights.
    fn in_namespace(test: impl FnOnce() + Send + 'static) {
        if std::env::var("UMBRA_SKIP_ROOT").is_ok_and(|value| value == "1") {
            eprintln!("skipped: UMBRA_SKIP_ROOT=1");
            return;
        }
        let run = move || {
            let ready = unshare(CloneFlags::CLONE_NEWNET).is_ok();
            assert!(ready, "this test needs root; UMBRA_SKIP_ROOT=1 leaves it out");
            test();
        };
        std::thread::spawn(run).join().unwrap();
    }

    #[test]
    fn what_the_guest_asks_for_between_the_nic_and_its_end_reaches_the_nic() {
        in_namespace(|| {
            let (sender, _reports) = channel();
            let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
            let reporter = Reporter { sender, wake: Arc::new(EventFd::from_flags(flags).unwrap()) };
            let end =
                NetEnd { device_mac: Mac([2, 0, 0, 0, 0, 1]), mode: RxMode::default(), offloads: Offloads::default() };
            let plan = NetPlan { ends: vec![end], mtu: None, device: DevicePlace::Present };
            let due = Due::after_boot(Duration::ZERO);
            let mut worker =
                Worker::new((plan, due), Arc::new(Mailbox::new().unwrap()), Calls::default(), &reporter).unwrap();
            let there = Nic::loopback(&mut worker.requests);
            let State::Awaited { nic, .. } = &mut worker.state else { unreachable!() };
            *nic = Some(there);
            let bridges = RxMode { promiscuous: true, all_multicast: true, ..RxMode::default() };
            let mut orders = Orders::default();
            orders.set_mode(0, bridges.clone());
            worker.obey(orders).unwrap();
            let State::Awaited { plan, nic: Some(nic), .. } = &worker.state else { unreachable!() };
            assert_eq!(plan.ends[0].mode, bridges);
            assert!(nic.is_set_to(&bridges), "{nic:?}");
        });
    }
}
