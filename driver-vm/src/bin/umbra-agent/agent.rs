//! The main loop: one thread, which waits for the host, the kernel's link notifications and the module loader, and
//! beats. When it is stuck, so are the heartbeats; that is their point.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use umbra_driver_vm::protocol::{CrashKind, DevicePlace, FromAgent, HEARTBEAT_MS, NetPlan, ToAgent};

use crate::modules::Loading;
use crate::netlink::Netlink;
use crate::network::{Ends, Network, Nic};
use crate::port::Port;
use crate::sound::{self, Service};
use crate::{kernel_log, pci, system};

/// How long the devices may take to appear, after the plan or, where the device comes later, the search for it: the slowest
/// probes seen take about 5 s.
const DEVICES_WITHIN: Duration = Duration::from_secs(10);
/// How often a host that has closed its end is looked for again; poll(2) cannot wait for it.
const HOST_AWAY: Duration = Duration::from_millis(20);
/// How long a last message may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);
const BEAT: Duration = Duration::from_millis(HEARTBEAT_MS);
/// The transmit queue is looked at once a second; it takes many to stand still.
const BEATS_PER_LOOK: u64 = 1000 / HEARTBEAT_MS;

/// The agent.
#[derive(Debug)]
pub struct Agent {
    port: Port,
    host_away: bool,
    requests: Netlink,
    changes: Netlink,
    loading: Loading,
    state: State,
    /// When a device that has not appeared is missing.
    deadline: Option<Instant>,
    beats: u64,
    next_beat: Instant,
}

#[derive(Debug)]
enum State {
    /// The host has not said yet what to do.
    Idle,
    /// Not all devices are there yet.
    Awaited { plan: NetPlan, nic: Option<Nic>, ends: Option<Ends> },
    /// The sound service is at work.
    Sound(Service),
    /// Frames are forwarded.
    Forwarding { network: Network, carrier: bool },
}

impl Agent {
    /// Opens what the loop needs and greets the host.
    ///
    /// # Errors
    /// When the control port or netlink is missing.
    pub fn start(loading: Loading) -> anyhow::Result<Self> {
        let port = Port::open()?;
        let requests = Netlink::requests().context("cannot talk to the kernel's network")?;
        let changes = Netlink::link_changes().context("cannot hear of link changes")?;
        let (state, next_beat) = (State::Idle, Instant::now() + BEAT);
        let deadline = None;
        let mut new = Self { port, host_away: false, requests, changes, loading, state, deadline, beats: 0, next_beat };
        new.port.send(&FromAgent::Hello {
            generation: system::generation(),
            kernel: system::release(),
            uptime_ms: system::uptime_ms(),
        })?;
        Ok(new)
    }

    /// Works until something fails; tells the host.
    pub fn run(mut self) -> anyhow::Error {
        loop {
            if let Err(error) = self.turn() {
                self.last_words(&error);
                return error;
            }
        }
    }

    fn turn(&mut self) -> anyhow::Result<()> {
        self.wait()?;
        if self.changes.drain() {
            self.look_at_carrier()?;
        }
        let was_done = self.loading.done();
        for failure in self.loading.collect() {
            kernel_log::error(&failure);
        }
        if self.loading.done() && !was_done {
            self.port.send(&FromAgent::Loaded { uptime_ms: system::uptime_ms() })?;
        }
        self.port.flush()?;
        self.host_away = !self.port.receive()?;
        while let Some(message) = self.port.next_message().context("the host sent nonsense")? {
            if message == ToAgent::Rescan {
                self.deadline = Some(Instant::now() + DEVICES_WITHIN);
            }
            self.obey(message)?;
        }
        self.advance()?;
        self.beat()
    }

    fn wait(&self) -> anyhow::Result<()> {
        let mut limit = self.next_beat.saturating_duration_since(Instant::now());
        let read = PollFlags::POLLIN;
        let mut waited: Vec<(BorrowedFd<'_>, PollFlags)> = vec![(self.changes.descriptor(), read)];
        if !self.loading.done() {
            waited.push((self.loading.descriptor(), read));
        }
        if let State::Sound(service) = &self.state {
            waited.push((service.descriptor(), read));
        }
        if self.host_away {
            limit = limit.min(HOST_AWAY);
        } else {
            let write = if self.port.wants_to_write() { PollFlags::POLLOUT } else { PollFlags::empty() };
            waited.push((self.port.descriptor(), read | write));
        }
        // Rounded up: a wait that ends early would only turn the loop once more.
        let millis = u16::try_from(limit.as_millis() + 1).unwrap_or(u16::MAX);
        let mut polled: Vec<_> = waited.into_iter().map(|(fd, flags)| PollFd::new(fd, flags)).collect();
        match poll(&mut polled, PollTimeout::from(millis)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait for events"),
        }
    }

    fn obey(&mut self, message: ToAgent) -> anyhow::Result<()> {
        match (message, &mut self.state) {
            (ToAgent::ConfigureNet(plan), State::Idle) => {
                self.expect(plan.device);
                self.state = State::Awaited { plan, nic: None, ends: None };
            }
            (ToAgent::ConfigureSound { ends, device }, State::Idle) => {
                self.expect(device);
                self.state = State::Sound(Service::start(system::generation(), ends)?);
            }
            (ToAgent::ConfigureNet(_) | ToAgent::ConfigureSound { .. }, _) => {
                anyhow::bail!("the host sent a second plan")
            }
            (ToAgent::SetRxMode { end, mode }, State::Forwarding { network, .. }) => {
                network.set_mode(&mut self.requests, end, mode)?;
            }
            (ToAgent::SetOffloads { end, offloads }, State::Forwarding { network, .. }) => {
                network.set_offloads(end, offloads)?;
            }
            // Not forwarding yet: the plan is changed, and applied when the devices are there.
            (ToAgent::SetRxMode { end, mode }, State::Awaited { plan, .. }) => {
                let end = plan.ends.get_mut(usize::from(end)).with_context(|| format!("there is no end {end}"))?;
                end.mode = mode;
            }
            (ToAgent::SetOffloads { end, offloads }, State::Awaited { plan, ends, .. }) => {
                if let Some(ends) = ends {
                    ends.set_offloads(end, offloads)?;
                }
                let end = plan.ends.get_mut(usize::from(end)).with_context(|| format!("there is no end {end}"))?;
                end.offloads = offloads;
            }
            (ToAgent::SetRxMode { .. } | ToAgent::SetOffloads { .. }, State::Idle | State::Sound(_)) => {
                anyhow::bail!("the host sent settings for a network that is none")
            }
            (ToAgent::Rescan, _) => pci::device_has_come()?,
            (ToAgent::Crash { kind: CrashKind::Stall }, State::Forwarding { network, .. }) => {
                network.stall(&mut self.requests)?;
            }
            (ToAgent::Crash { kind: CrashKind::Stall }, State::Sound(service)) => service.stall()?,
            (ToAgent::Crash { kind }, _) => crash(kind),
        }
        Ok(())
    }

    /// A device that is in the VM has to appear from now on.
    fn expect(&mut self, device: DevicePlace) {
        if device == DevicePlace::Present {
            self.deadline = Some(Instant::now() + DEVICES_WITHIN);
        }
    }

    fn is_overdue(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline < Instant::now())
    }

    /// Goes on as far as the devices that are there allow.
    fn advance(&mut self) -> anyhow::Result<()> {
        match &self.state {
            State::Sound(_) => self.advance_sound(),
            State::Awaited { .. } => self.advance_network(),
            State::Idle | State::Forwarding { .. } => Ok(()),
        }
    }

    fn advance_sound(&mut self) -> anyhow::Result<()> {
        let overdue = self.is_overdue();
        let State::Sound(service) = &mut self.state else { return Ok(()) };
        if let Some(card) = service.card()? {
            let (driver, uptime_ms) = (sound::driver(), system::uptime_ms());
            return self.port.send(&FromAgent::Sound { driver, card, uptime_ms });
        }
        // The service itself waits for ever.
        if overdue && !service.has_card() {
            return Err(self.missing("the sound card has not appeared"));
        }
        Ok(())
    }

    fn advance_network(&mut self) -> anyhow::Result<()> {
        let (overdue, loaded) = (self.is_overdue(), self.loading.done());
        let State::Awaited { plan, nic, ends } = &mut self.state else { return Ok(()) };
        // Before the NIC, which in a standby comes last: then there is nothing left to do but to join them.
        if ends.is_none() && loaded {
            *ends = Ends::find(&mut self.requests, plan)?;
        }
        if nic.is_none() {
            // What is asked of its driver may be its death, which the host then knows the cause of.
            let tell = || self.port.send(&FromAgent::NicFound { uptime_ms: system::uptime_ms() });
            *nic = Nic::find(&mut self.requests, plan, tell)?;
            if let Some(nic) = nic {
                self.port.send(&FromAgent::Nic {
                    driver: nic.driver.clone(),
                    interface: nic.name.clone(),
                    mac: nic.permanent,
                    mtu: u16::try_from(nic.mtu).unwrap_or(u16::MAX),
                    uptime_ms: system::uptime_ms(),
                })?;
            }
        }
        if let (Some(_), Some(there)) = (&nic, &mut *ends)
            && there.are_up(&mut self.requests)?
            && let (Some(nic), Some(ends)) = (nic.take(), ends.take())
        {
            let network = Network::join(&mut self.requests, nic, ends, plan)?;
            return self.forwarding(network);
        }
        if overdue {
            let nic_is_there = nic.is_some();
            return Err(self.missing(if nic_is_there {
                "a virtio-net end has not come up"
            } else {
                "the NIC has not appeared"
            }));
        }
        Ok(())
    }

    /// Why this is the end: a device is missing.
    fn missing(&self, what: &str) -> anyhow::Error {
        let mut what = format!("{what}: {}", pci::describe());
        for failure in self.loading.failures() {
            what.push_str(&format!("; {failure}"));
        }
        anyhow::anyhow!(what)
    }

    fn forwarding(&mut self, network: Network) -> anyhow::Result<()> {
        let carrier = network.carrier(&mut self.requests)?;
        let uptime_ms = system::uptime_ms();
        self.port.send_all(&[FromAgent::Forwarding { uptime_ms }, FromAgent::Carrier { up: carrier, uptime_ms }])?;
        self.state = State::Forwarding { network, carrier };
        kernel_log::info("forwarding");
        Ok(())
    }

    fn look_at_carrier(&mut self) -> anyhow::Result<()> {
        if let State::Forwarding { network, carrier } = &mut self.state {
            let up = network.carrier(&mut self.requests)?;
            if up != *carrier {
                *carrier = up;
                self.port.send(&FromAgent::Carrier { up, uptime_ms: system::uptime_ms() })?;
            }
        }
        Ok(())
    }

    fn beat(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if now < self.next_beat {
            return Ok(());
        }
        self.next_beat = now + BEAT;
        self.beats += 1;
        // Notifications of a link that goes down come up to a second late; looking costs little.
        self.look_at_carrier()?;
        if let State::Forwarding { network, carrier } = &mut self.state
            && self.beats.is_multiple_of(BEATS_PER_LOOK)
        {
            network.check_transmit(*carrier)?;
        }
        let available_memory = system::available_memory();
        self.port.send(&FromAgent::Heartbeat { sequence: self.beats, available_memory })
    }

    /// Tells the host why this is the end, and gives it a moment to read.
    fn last_words(&mut self, error: &anyhow::Error) {
        let deadline = Instant::now() + LAST_WORDS;
        let mut sent = self.port.send(&FromAgent::Failed { what: format!("{error:#}") });
        while sent.is_ok() && self.port.wants_to_write() && Instant::now() < deadline {
            std::thread::sleep(HOST_AWAY);
            sent = self.port.flush();
        }
        std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
    }
}

fn crash(kind: CrashKind) {
    match kind {
        CrashKind::Panic => system::panic(),
        CrashKind::AgentHang => system::hang(),
        CrashKind::Reboot => system::restart(),
        CrashKind::Spin => system::spin(),
        // The host's part.
        CrashKind::LockUp => {}
        CrashKind::OutOfMemory => system::take_all_memory(),
        CrashKind::Unbind => pci::unbind_all(),
        // There is no forwarding to stall.
        CrashKind::Stall => {}
    }
}
