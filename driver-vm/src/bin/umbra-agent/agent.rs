//! The main loop: one thread, which waits for the host, the threads of network and disks, the sound service and the module loader, and
//! beats. When it is stuck, so are the heartbeats; that is their point.
//!
//! Invariant: nothing here waits for a driver, for the network stack or for a process. What may has a thread of its own, and says so
//! by a descriptor.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use umbra_driver_vm::protocol::{
    BlockPlan, CrashKind, DevicePlace, Entropy, FromAgent, HEARTBEAT_MS, NetPlan, ToAgent,
};

use crate::block::BlockThread;
use crate::block::pool::Pool;
use crate::due::Due;
use crate::modules::Loading;
use crate::network_thread::{Missing, NetworkThread, Report};
use crate::port::Port;
use crate::self_test;
use crate::sound::{self, Service};
use crate::{kernel_log, pci, symbols, system, unused};

/// Interval at which a host that has closed its end is looked for again; poll(2) cannot wait for it.
const HOST_AWAY: Duration = Duration::from_millis(20);
/// Longest wait until the host has read the last message.
const LAST_WORDS: Duration = Duration::from_secs(1);
const BEAT: Duration = Duration::from_millis(HEARTBEAT_MS);

/// The agent.
#[derive(Debug)]
pub struct Agent {
    port: Port,
    /// For the host, which is to see the kernel's death begin.
    panic_entries: Vec<u64>,
    /// Which life this is, once the host has said so.
    generation: Option<u32>,
    host_away: bool,
    loading: Loading,
    task: Task,
    /// Memory for the data of disks, if this VM was started with it and no plan has taken it.
    pool: Option<Pool>,
    /// When devices that have not appeared count as missing.
    due: Due,
    beats: u64,
    next_beat: Instant,
}

/// What the host wants of this VM.
#[derive(Debug)]
enum Task {
    /// The host has not said yet.
    Idle,
    /// A network.
    Network(NetworkThread),
    /// The sound service.
    Sound(Service),
    /// The disk service.
    Block(BlockThread),
}

impl Agent {
    /// Opens what the loop needs and greets the host. `pool` is kept for the disk service.
    ///
    /// # Errors
    /// When the control port is missing.
    pub fn start(loading: Loading, pool: Option<Pool>) -> anyhow::Result<Self> {
        let port = Port::open()?;
        let (task, next_beat) = (Task::Idle, Instant::now() + BEAT);
        let (generation, host_away, beats) = (None, false, 0);
        let due = Due::after_boot(Duration::from_millis(system::uptime_ms()));
        let panic_entries = symbols::panic_entries();
        let mut new = Self { port, panic_entries, generation, host_away, loading, task, pool, due, beats, next_beat };
        new.port.send(&FromAgent::Ready { loaded: false, unused: Vec::new() })?;
        Ok(new)
    }

    /// Works until something fails; reports that to the host and returns it.
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
        let was_done = self.loading.done();
        for failure in self.loading.collect() {
            kernel_log::error(&failure);
        }
        if self.loading.done() && !was_done {
            self.due.loaded(Instant::now());
            self.say_loaded()?;
            match &self.task {
                Task::Network(network) => network.order(|orders| orders.loaded = true),
                Task::Block(block) => block.order(|orders| orders.loaded = true),
                Task::Idle | Task::Sound(_) => {}
            }
        }
        self.port.flush()?;
        self.host_away = !self.port.receive()?;
        while let Some(message) = self.port.next_message().context("the host sent nonsense")? {
            self.obey(message)?;
        }
        match self.task {
            Task::Idle => {}
            Task::Network(_) => self.hear_network()?,
            Task::Sound(_) => self.advance_sound()?,
            Task::Block(_) => self.hear_block()?,
        }
        self.beat()
    }

    fn wait(&self) -> anyhow::Result<()> {
        let mut limit = self.next_beat.saturating_duration_since(Instant::now());
        let read = PollFlags::POLLIN;
        let mut waited: Vec<(BorrowedFd<'_>, PollFlags)> = Vec::new();
        if !self.loading.done() {
            waited.push((self.loading.descriptor(), read));
        }
        match &self.task {
            Task::Idle => {}
            Task::Network(network) => waited.push((network.descriptor(), read)),
            Task::Sound(service) => waited.push((service.descriptor(), read)),
            Task::Block(block) => waited.push((block.descriptor(), read)),
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

    /// All modules are loaded. A VM that waits for its device and does not know yet which life it is may be saved next: it gives up what
    /// memory it can.
    fn say_loaded(&mut self) -> anyhow::Result<()> {
        self.port.send(&match self.generation {
            Some(_) => FromAgent::Loaded { uptime_ms: system::uptime_ms() },
            None => {
                let unused = if system::awaits_device() { unused::give_up() } else { Vec::new() };
                FromAgent::Ready { loaded: true, unused }
            }
        })
    }

    /// From here on this life differs from others that were restored from the same snapshot.
    fn begin(&mut self, generation: u32, entropy: &Entropy, unix_ns: u64) -> anyhow::Result<()> {
        if self.generation.replace(generation).is_some() {
            anyhow::bail!("the host began a life that has begun");
        }
        // Before anything else, as anything may draw random numbers.
        system::add_entropy(entropy);
        system::set_clock(unix_ns);
        self.next_beat = Instant::now() + BEAT;
        let (kernel, uptime_ms) = (system::release(), system::uptime_ms());
        let panic_entries = std::mem::take(&mut self.panic_entries);
        self.port.send(&FromAgent::Hello { generation, kernel, uptime_ms, panic_entries })?;
        if self.loading.done() { self.say_loaded() } else { Ok(()) }
    }

    fn obey(&mut self, message: ToAgent) -> anyhow::Result<()> {
        let Some(generation) = self.generation else {
            let ToAgent::Begin { generation, entropy, unix_ns } = message else {
                anyhow::bail!("the host gave an order before it said which life this is");
            };
            return self.begin(generation, &entropy, unix_ns);
        };
        match (message, &mut self.task) {
            (ToAgent::Begin { generation, entropy, unix_ns }, _) => self.begin(generation, &entropy, unix_ns)?,
            (ToAgent::ConfigureNet(plan), Task::Idle) => self.start_network(plan)?,
            (ToAgent::ConfigureSound { ends, device }, Task::Idle) => {
                if device == DevicePlace::Present {
                    self.due.expect(Instant::now());
                }
                self.task = Task::Sound(Service::start(generation, ends)?);
            }
            (ToAgent::ConfigureBlock(plan), Task::Idle) => self.start_block(plan, generation)?,
            (ToAgent::Rest, Task::Block(block)) => block.order(|orders| orders.rest = true),
            (ToAgent::Rest, _) => anyhow::bail!("the host wants disks at rest that are none"),
            (ToAgent::ConfigureNet(_) | ToAgent::ConfigureSound { .. } | ToAgent::ConfigureBlock(_), _) => {
                anyhow::bail!("the host sent a second plan")
            }
            (ToAgent::SetRxMode { end, mode }, Task::Network(network)) => {
                network.order_for(end, |orders| orders.set_mode(end, mode))?;
            }
            (ToAgent::SetOffloads { end, offloads }, Task::Network(network)) => {
                network.order_for(end, |orders| orders.set_offloads(end, offloads))?;
            }
            (ToAgent::SetRxMode { .. } | ToAgent::SetOffloads { .. }, Task::Idle | Task::Sound(_) | Task::Block(_)) => {
                anyhow::bail!("the host sent settings for a network that is none")
            }
            (ToAgent::Rescan, _) => self.device_has_come()?,
            (ToAgent::Crash { kind }, _) => self.crash(kind)?,
        }
        Ok(())
    }

    fn start_network(&mut self, plan: NetPlan) -> anyhow::Result<()> {
        let network = NetworkThread::start(plan, self.due.clone())?;
        let (loaded, device_has_come) = (self.loading.done(), self.due.is_expected());
        network.order(|orders| (orders.loaded, orders.device_has_come) = (loaded, device_has_come));
        self.task = Task::Network(network);
        Ok(())
    }

    fn start_block(&mut self, plan: BlockPlan, generation: u32) -> anyhow::Result<()> {
        if plan.device == DevicePlace::Present {
            self.due.expect(Instant::now());
        }
        self.due.allow(Duration::from_secs(plan.appear_within_s.into()));
        let block = BlockThread::start(plan, generation, self.due.clone(), self.pool.take())?;
        let (loaded, device_has_come) = (self.loading.done(), self.due.is_expected());
        block.order(|orders| (orders.loaded, orders.device_has_come) = (loaded, device_has_come));
        self.task = Task::Block(block);
        Ok(())
    }

    /// The device has come: from now on it has to appear within its time.
    fn device_has_come(&mut self) -> anyhow::Result<()> {
        self.due.expect(Instant::now());
        match &self.task {
            Task::Network(network) => network.order(|orders| orders.device_has_come = true),
            Task::Block(block) => block.order(|orders| orders.device_has_come = true),
            Task::Idle | Task::Sound(_) => {}
        }
        pci::device_has_come()
    }

    /// Fails in the way that the host asks for.
    fn crash(&self, kind: CrashKind) -> anyhow::Result<()> {
        match (kind, &self.task) {
            (CrashKind::Panic, _) => system::panic(),
            (CrashKind::AgentHang, _) => system::hang(),
            (CrashKind::Reboot, _) => system::restart(),
            (CrashKind::Spin, _) => system::spin(),
            (CrashKind::OutOfMemory, _) => system::take_all_memory(),
            (CrashKind::Unbind, _) => pci::unbind_all(),
            (CrashKind::Stall, Task::Network(network)) => {
                network.order(|orders| orders.stall = true);
                Ok(())
            }
            (CrashKind::Stall, Task::Sound(service)) => service.stall(),
            (CrashKind::Stall, Task::Block(block)) => {
                block.order(|orders| orders.stall = true);
                Ok(())
            }
            (CrashKind::LockNetwork, _) => self_test::start(),
            // There is nothing to stall. A lock-up is the host's part.
            (CrashKind::Stall, Task::Idle) | (CrashKind::LockUp, _) => Ok(()),
        }
    }

    /// Passes on what the network thread has to say.
    fn hear_network(&mut self) -> anyhow::Result<()> {
        loop {
            let Task::Network(network) = &mut self.task else { return Ok(()) };
            match network.next_report()? {
                None => return Ok(()),
                Some(Report::Say(messages)) => self.port.send_all(&messages)?,
                Some(Report::SayFirst(message, handed_over)) => {
                    self.port.send(&message)?;
                    // The thread waits for this alone; if it has ended, the next report says why.
                    let _ = handed_over.send(());
                }
                Some(Report::Failed(error)) if error.is::<Missing>() => return Err(self.missing(&error.to_string())),
                Some(Report::Failed(error)) => return Err(error),
            }
        }
    }

    fn advance_sound(&mut self) -> anyhow::Result<()> {
        let overdue = self.due.is_over(Instant::now());
        let Task::Sound(service) = &mut self.task else { return Ok(()) };
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

    /// Passes on what the disk service has to say, and watches that its disks come: opening one may never return.
    fn hear_block(&mut self) -> anyhow::Result<()> {
        let overdue = self.due.is_over(Instant::now());
        let Task::Block(block) = &mut self.task else { return Ok(()) };
        while let Some(message) = block.next_report()? {
            self.port.send(&message)?;
        }
        match block.missing() {
            Some(what) if overdue => Err(self.missing(&what)),
            _ => Ok(()),
        }
    }

    /// The error for a missing device, which ends the driver VM.
    fn missing(&self, what: &str) -> anyhow::Error {
        let mut what = format!("{what}: {}", pci::describe());
        for failure in self.loading.failures() {
            what.push_str(&format!("; {failure}"));
        }
        anyhow::anyhow!(what)
    }

    fn beat(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if now < self.next_beat {
            return Ok(());
        }
        self.next_beat = now + BEAT;
        if self.generation.is_none() {
            return Ok(());
        }
        self.beats += 1;
        match &mut self.task {
            Task::Network(network) => network.check()?,
            Task::Sound(service) => service.check()?,
            Task::Idle | Task::Block(_) => {}
        }
        let available_memory = system::available_memory();
        self.port.send(&FromAgent::Heartbeat { sequence: self.beats, available_memory })
    }

    /// Reports to the host why this is the end, and waits a moment for it to read that.
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
