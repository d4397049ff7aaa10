//! One life of a driver VM: its process, its agent and its console, and the one place where they are read.
//!
//! A life reads what it says and knows no reason of failure; its role makes of it what it means (`present.rs`, `standby.rs`,
//! `dying.rs`).
//! Invariant: each word is taken in the role that the life has when its turn comes, because the word before it may have changed
//! that: a standby is adopted, a spare takes over.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::poll::PollFlags;
use umbra_driver_vm::protocol::{DevicePlace, FromAgent, LinkMode, MAX_LINE, MAX_PANIC_ENTRIES, ToAgent};
use umbra_guest_images::image::Image;
use umbra_shadow::Generation;
use umbra_splitter::untrusted;

use super::begin::Begin;
use super::console::{Console, Fatal};
use super::{DriverVm, EndLink, StandbyVm};
use crate::base::error::chain;
use crate::base::lines::{LineError, Lines};
use crate::base::time::Time;
use crate::lifecycle::{Endpoint, Input, Rank};
use crate::supervisor::bounds::{self, AgentAllowance};
use crate::supervisor::class::carrier::Flaps;
use crate::supervisor::class::settings::Settings;
use crate::supervisor::ids::{DriverId, Table};
use crate::supervisor::run::Supervisor;
use crate::supervisor::vcpu_answers::VcpuAnswers;
use crate::wire::channel::Incoming;
use crate::wire::messages::{FromVm, ToVm};
use crate::wire::spawn::{Exit, VmProcess};

/// Messages of one process that are handled at a turn of the loop: one that floods must not starve the rest.
pub(in crate::supervisor) const AT_ONCE: usize = 64;

/// Messages of a process that has ended that are handled at once: more than its socket holds. The smallest takes some 800 bytes there, of
/// 208 KiB by default (`net.core.wmem_default`).
pub(in crate::supervisor) const AT_ITS_END: usize = 4096;

/// News of its snapshot that a life has to say: that it was found, refused, taken and so on are two or three.
const MOST_NEWS: u32 = 8;

/// What a process is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervisor) enum Purpose {
    /// It has the device from its start.
    Serve,
    /// It gets the device as soon as both can: until then it may be restored from a snapshot, which has met none, while the life before is
    /// fenced.
    ServeSoon,
    /// It waits for the device.
    Wait,
    /// It waits with the spare's device.
    WaitWithSpare,
    /// It is to leave a snapshot, if there is none, and waits for nothing. It becomes the present life only if that fails meanwhile.
    Save,
}

impl Purpose {
    /// Where the device of such a life is when the agent gets its plan.
    pub(in crate::supervisor) fn device(self) -> DevicePlace {
        match self {
            Self::Serve | Self::WaitWithSpare => DevicePlace::Present,
            Self::Wait | Self::ServeSoon | Self::Save => DevicePlace::ToCome,
        }
    }

    /// It is started without a device.
    pub(in crate::supervisor) fn awaits_device(self) -> bool {
        self.device() == DevicePlace::ToCome
    }
}

/// What a life is to its driver VM at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::supervisor) enum LifeRole {
    /// It serves, or is to: it has the device.
    Present,
    /// It waits to be the next one, or the one behind that.
    Standby(Rank),
    /// It has failed, and says its last words.
    Dying,
}

/// The lives that wait, in the order in which they are taken.
pub(in crate::supervisor) const RANKS: [Rank; 2] = [Rank::First, Rank::Second];

/// What of a life is ready to be read, in the order of reading: what it has said comes before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::supervisor) enum Part {
    Control,
    Agent,
    Console,
    Exit,
}

/// What was heard of a life.
#[derive(Debug)]
pub(in crate::supervisor) enum Heard {
    /// A message of its process.
    Process(FromVm),
    /// Its process closed the control channel: it ends, which may take a while (it gives back memory and device first).
    ControlClosed,
    /// A message of its agent.
    Agent(FromAgent),
    /// Its process broke a rule of the control channel, which is not heard any more; a clause for people, as the next.
    ControlBroken(String),
    /// Its agent sent what is no message, or too much. What comes behind that is not heard.
    Nonsense(String),
    /// There is no agent any more.
    AgentLost(LineError),
    /// Its kernel has begun to say so on the console; once in a life.
    Fatal(Fatal),
    /// Its process has ended, and all that it had printed is read.
    Exited(Exit),
}

/// A life of a driver VM.
#[derive(Debug)]
pub(in crate::supervisor) struct Life {
    pub(in crate::supervisor) generation: Generation,
    /// What it was started from.
    pub(in crate::supervisor) image: Arc<Image>,
    pub(in crate::supervisor) process: VmProcess,
    /// Until it is closed or broken.
    agent: Option<Lines<untrusted::Stream>>,
    /// What the agent may still say.
    allowance: AgentAllowance,
    /// Whether there may be more on the console.
    talking: bool,
    /// Whether the control channel is still of use.
    listening: bool,
    /// What its process has said of its snapshot so far, in messages.
    news: u32,
    /// Its connection with each guest's device, by end.
    pub(in crate::supervisor) links: Table<Endpoint, EndLink>,
    /// pvpanic: its kernel has said what it had to say.
    pub(in crate::supervisor) panicked: bool,
    pub(in crate::supervisor) registers: String,
    pub(in crate::supervisor) vcpus: VcpuAnswers,
    pub(in crate::supervisor) purpose: Purpose,
    /// Whether its agent knows which life it is.
    pub(in crate::supervisor) begin: Begin,
    /// It leaves its snapshot before it begins, if it boots, and gets its device then.
    pub(in crate::supervisor) leaves_snapshot: bool,
    /// What guests ask for and its agent was not sent yet.
    pub(in crate::supervisor) settings: Settings,
    /// Recent changes of its carrier: too many are a failure.
    pub(in crate::supervisor) flaps: Flaps,
    /// As what its NIC's link has come up.
    pub(in crate::supervisor) link_mode: Option<LinkMode>,
}

impl Life {
    /// Has its process tell of a vCPU that comes to one of `entries`, where its agent says that its kernel begins to die. A process that
    /// takes no message hears of it by the text of the panic.
    pub(super) fn watch_for_panic(&self, mut entries: Vec<u64>) {
        entries.truncate(MAX_PANIC_ENTRIES);
        if !entries.is_empty()
            && let Err(error) = self.process.channel().send_now(&ToVm::WatchForPanic { entries }, &[])
        {
            tracing::debug!(error = chain(&error), "tell a driver VM's process where its kernel begins to die");
        }
    }

    /// A life that begins: nothing is heard yet, and none of its `ends` is connected.
    pub(super) fn new(
        (generation, image, purpose, begin): (Generation, Arc<Image>, Purpose, Begin),
        process: VmProcess,
        agent: untrusted::Stream,
        ends: usize,
    ) -> Self {
        Self {
            generation,
            image,
            process,
            agent: Some(Lines::new(agent, MAX_LINE)),
            allowance: AgentAllowance::default(),
            talking: true,
            listening: true,
            news: 0,
            links: (0..ends).map(|_| EndLink::default()).collect(),
            panicked: false,
            registers: String::new(),
            vcpus: VcpuAnswers::default(),
            purpose,
            begin,
            leaves_snapshot: false,
            settings: Settings::default(),
            flaps: Flaps::default(),
            link_mode: None,
        }
    }

    /// What there is to wait for.
    fn watched(&self) -> impl Iterator<Item = (Part, BorrowedFd<'_>, PollFlags)> {
        let control = self.listening.then(|| (Part::Control, self.process.channel().as_fd(), PollFlags::POLLIN));
        let agent = self.agent.as_ref().map(|agent| {
            let more = if agent.has_unsent() { PollFlags::POLLOUT } else { PollFlags::empty() };
            (Part::Agent, agent.stream().as_fd(), PollFlags::POLLIN | more)
        });
        let pipe = self.process.console().filter(|_| self.talking);
        let console = pipe.map(|pipe| (Part::Console, pipe.as_fd(), PollFlags::POLLIN));
        let exit = (Part::Exit, self.process.pidfd(), PollFlags::POLLIN);
        control.into_iter().chain(agent).chain(console).chain([exit])
    }

    /// Reads what `part` has to say, as far as a turn of the loop allows; what it prints goes to `console`. Never waits.
    pub(super) fn hear(&mut self, part: Part, console: &mut Console) -> Vec<Heard> {
        match part {
            Part::Control => self.hear_control(AT_ONCE),
            Part::Agent => self.hear_agent(),
            Part::Console => self.hear_console(console).into_iter().collect(),
            Part::Exit => self.hear_exit(console),
        }
    }

    fn hear_control(&mut self, most: usize) -> Vec<Heard> {
        let mut heard = Vec::new();
        for _ in 0..most {
            if !self.listening {
                break;
            }
            match bounds::hear(&self.process) {
                Ok(Incoming::Message(FromVm::Vcpus(counts), _)) => self.vcpus.keep(counts),
                Ok(Incoming::Message(FromVm::Snapshot { .. }, _)) if self.news >= MOST_NEWS => {}
                Ok(Incoming::Message(message, _)) => {
                    self.news += u32::from(matches!(message, FromVm::Snapshot { .. }));
                    if matches!(message, FromVm::Running { .. }) {
                        self.process.runs();
                    }
                    heard.push(Heard::Process(message));
                }
                Ok(Incoming::Empty) => break,
                Ok(Incoming::Closed) => {
                    self.listening = false;
                    heard.push(Heard::ControlClosed);
                }
                Err(error) => {
                    // Nothing that comes behind that is believed, or read: each message could cost a thread.
                    self.listening = false;
                    heard.push(Heard::ControlBroken(format!("its process: {error}")));
                }
            }
        }
        heard
    }

    fn hear_agent(&mut self) -> Vec<Heard> {
        let Some(agent) = &mut self.agent else { return Vec::new() };
        let flushed = agent.flush();
        let (lines, error) = agent.receive();
        let mut heard = Vec::new();
        let said = lines.iter().map(|line| line.len() + 1).sum();
        if let Err(what) = self.allowance.take(said, Time::now()) {
            // It is not listened to any more.
            self.agent = None;
            return vec![Heard::Nonsense(what)];
        }
        for line in lines {
            match bounds::heard(&line) {
                Ok(message) => heard.push(Heard::Agent(message)),
                Err(what) => {
                    heard.push(Heard::Nonsense(what));
                    return heard;
                }
            }
        }
        if let Some(error) = error.or(flushed.err()) {
            self.agent = None;
            heard.push(Heard::AgentLost(error));
        }
        heard
    }

    fn hear_console(&mut self, console: &mut Console) -> Option<Heard> {
        let pipe = self.process.console()?;
        let before = console.fatal();
        self.talking = console.read(pipe);
        console.fatal().filter(|_| before.is_none()).map(Heard::Fatal)
    }

    fn hear_exit(&mut self, console: &mut Console) -> Vec<Heard> {
        let Some(status) = self.process.ended() else { return self.hear_control(AT_ONCE) };
        let mut heard = self.hear_control(AT_ITS_END);
        self.drain(console);
        heard.push(Heard::Exited(status));
        heard
    }

    /// Reads all that is printed already.
    pub(super) fn drain(&self, console: &mut Console) {
        if let Some(pipe) = self.process.console() {
            console.drain(pipe);
        }
    }

    /// Sends `message` to the agent, if there is one.
    pub(super) fn send(&mut self, message: &ToAgent) -> Result<(), LineError> {
        let Some(agent) = &mut self.agent else { return Ok(()) };
        agent.send(&encode(message)?)
    }

    /// Whether there is an agent, and it has read all that it was sent.
    pub(in crate::supervisor) fn agent_reads(&self) -> bool {
        self.agent.as_ref().is_some_and(|agent| !agent.has_unsent())
    }

    /// Whether its agent waits for what becomes of its snapshot.
    pub(in crate::supervisor) fn is_to_be_saved(&self) -> bool {
        self.begin == Begin::Asked
    }

    /// The agent is of no use any more.
    pub(in crate::supervisor) fn drop_agent(&mut self) {
        self.agent = None;
    }
}

/// A message as a line that the agent accepts.
pub(in crate::supervisor) fn encode(message: &ToAgent) -> Result<String, LineError> {
    let line = serde_json::to_string(message).map_err(|error| LineError::Io(error.into()))?;
    if line.len() > MAX_LINE { Err(LineError::TooLong(MAX_LINE)) } else { Ok(line) }
}

impl DriverVm {
    /// The life that waits with this rank, or is dropped.
    pub(in crate::supervisor) fn waiting(&self, rank: Rank) -> Option<&StandbyVm> {
        match rank {
            Rank::First => self.standby.as_ref(),
            Rank::Second => self.second.as_ref(),
        }
    }

    /// The place of the life that waits with this rank.
    pub(in crate::supervisor) fn waiting_mut(&mut self, rank: Rank) -> &mut Option<StandbyVm> {
        match rank {
            Rank::First => &mut self.standby,
            Rank::Second => &mut self.second,
        }
    }

    /// All lives that have a process and a role.
    pub(in crate::supervisor) fn lives(&self) -> impl Iterator<Item = (LifeRole, &Life)> {
        let present = self.life.iter().map(|life| (LifeRole::Present, life));
        let waiting = RANKS.into_iter().filter_map(|rank| Some((LifeRole::Standby(rank), &self.waiting(rank)?.life)));
        present.chain(waiting).chain(self.dying.iter().map(|dying| (LifeRole::Dying, &dying.life)))
    }

    /// What there is to wait for of all its lives, but for those parts that are of no interest in their role.
    pub(in crate::supervisor) fn watched_lives(
        &self,
    ) -> impl Iterator<Item = (LifeRole, Part, BorrowedFd<'_>, PollFlags)> {
        let heeded = move |role, part| match role {
            LifeRole::Present => true,
            LifeRole::Standby(_) => self.life_of(role).is_some() || matches!(part, Part::Console | Part::Exit),
            LifeRole::Dying => part != Part::Agent,
        };
        let all =
            self.lives().flat_map(|(role, life)| life.watched().map(move |(part, fd, flags)| (role, part, fd, flags)));
        all.filter(move |(role, part, ..)| heeded(*role, *part))
    }

    /// The life in this role, if its agent and its ends are of use: those of a dropped standby and of a dying life are not.
    pub(in crate::supervisor) fn life_of(&self, role: LifeRole) -> Option<&Life> {
        match role {
            LifeRole::Present => self.life.as_ref(),
            LifeRole::Standby(rank) => {
                self.waiting(rank).filter(|standby| standby.dropped.is_none()).map(|standby| &standby.life)
            }
            LifeRole::Dying => None,
        }
    }

    /// As [`Self::life_of`].
    pub(in crate::supervisor) fn life_of_mut(&mut self, role: LifeRole) -> Option<&mut Life> {
        match role {
            LifeRole::Present => self.life.as_mut(),
            LifeRole::Standby(rank) => self
                .waiting_mut(rank)
                .as_mut()
                .filter(|standby| standby.dropped.is_none())
                .map(|standby| &mut standby.life),
            LifeRole::Dying => None,
        }
    }

    /// Sends `message` to the agent of the life in this role, if there is one.
    pub(in crate::supervisor) fn send(&mut self, role: LifeRole, message: &ToAgent) -> Result<(), LineError> {
        self.life_of_mut(role).map_or(Ok(()), |life| life.send(message))
    }

    /// What the life in this role has to say, and which generation it is.
    fn hear(&mut self, role: LifeRole, part: Part) -> Option<(Generation, Vec<Heard>)> {
        let (life, console) = match role {
            LifeRole::Present => (self.life.as_mut()?, &mut self.console),
            LifeRole::Standby(rank) => {
                self.waiting_mut(rank).as_mut().map(|standby| (&mut standby.life, &mut standby.console))?
            }
            LifeRole::Dying => self.dying.as_mut().map(|dying| (&mut dying.life, &mut dying.console))?,
        };
        Some((life.generation, life.hear(part, console)))
    }

    fn role_of(&self, generation: Generation) -> Option<LifeRole> {
        self.lives().find(|(_, life)| life.generation == generation).map(|(role, _)| role)
    }
}

impl Supervisor {
    /// Hears `part` of the life that driver VM `n` has in this role.
    pub(in crate::supervisor) fn hear(&mut self, n: DriverId, role: LifeRole, part: Part) {
        let Some((generation, words)) = self.drivers[n].hear(role, part) else { return };
        for heard in words {
            match self.drivers[n].role_of(generation) {
                Some(LifeRole::Present) => self.on_present(n, heard),
                Some(LifeRole::Standby(rank)) => {
                    if let Some(why) = self.on_standby((n, rank), heard) {
                        return self.drive(n, Input::StandbyFailed(rank, why));
                    }
                }
                Some(LifeRole::Dying) => self.on_dying(n, heard),
                None => return,
            }
        }
        if let Some(role) = self.drivers[n].role_of(generation).filter(|_| part == Part::Agent) {
            self.send_settings(n, role);
        }
    }
}
