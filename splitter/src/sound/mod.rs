//! The sound splitter: between a guest's sound device and the sound service of its driver VM, with a shadow beside.
//!
//! It masks at once when the link ends, whoever notices first, and replays as soon as the service at the next link has reported its
//! card, be it the service of the next driver VM or of the same again; no order is needed. Time is given by the caller, who calls
//! [`SoundSplitter::tick`] at [`SoundSplitter::deadline`], [`SoundSplitter::service`] when the link can be read or written, and
//! takes the guest's finished messages from [`SoundSplitter::take_done`] after each call. Invariant: nothing waits for the driver
//! VM.

pub mod link;

use std::os::unix::net::UnixStream;

use umbra_driver_vm::sound_protocol::FromService;
use umbra_shadow::sound::{Card, Command, Counts, Done, Mode, Out, Policy, Refusal, SoundShadow, StreamId, Token};
use umbra_shadow::{Generation, LinkId};

use crate::untrusted::Stream;
use link::{Link, LinkError};

/// What the splitter reports to the supervisor.
#[derive(Debug)]
pub enum Notice {
    /// The driver VM of this generation plays. Since the shadow began to mask: what became of samples.
    Live(Generation, Counts),
    /// This link has ended; the shadow masks.
    Lost(LinkId, LinkError),
}

/// Takes notices; it must neither block nor call the splitter.
pub type Listener = Box<dyn FnMut(Notice) + Send>;

/// The splitter of one sound device.
pub struct SoundSplitter {
    shadow: SoundShadow,
    link: Option<Link>,
    /// The service has reported its card.
    greeted: bool,
    /// [`Notice::Live`] is owed for this generation.
    announce: Option<Generation>,
    /// Links that have ended; kept until the event loop has forgotten them.
    retired: Vec<Link>,
    done: Vec<Done>,
    /// The counts when the shadow began to mask.
    counted: Counts,
    listener: Listener,
}

impl SoundSplitter {
    /// For a guest that sees `card`. It masks until the first link.
    pub fn new(card: Card, policy: Policy, listener: Listener) -> Self {
        Self {
            shadow: SoundShadow::new(card, policy),
            link: None,
            greeted: false,
            announce: None,
            retired: Vec::new(),
            done: Vec::new(),
            counted: Counts::default(),
            listener,
        }
    }

    /// The shadow.
    pub fn shadow(&self) -> &SoundShadow {
        &self.shadow
    }

    /// The link to watch, if there is one.
    pub fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }

    /// Links to watch no longer; they close when dropped.
    pub fn take_retired(&mut self) -> Vec<Link> {
        std::mem::take(&mut self.retired)
    }

    /// The guest's messages that are done, in order.
    pub fn take_done(&mut self) -> Vec<Done> {
        std::mem::take(&mut self.done)
    }

    /// When [`Self::tick`] is due.
    pub fn deadline(&self) -> Option<u64> {
        self.shadow.deadline()
    }

    /// A new link: to a new driver VM, or to the same one again. It takes the place of an older one that is there; it is
    /// dropped if that one is not older.
    pub fn attach(&mut self, id: LinkId, socket: UnixStream, now: u64) {
        let socket = Stream::new(socket);
        if self.link.as_ref().is_some_and(|old| old.id() >= id) {
            return;
        }
        self.retire();
        self.deliver(now, |this, out| this.begin_mask(now, out));
        match socket {
            Ok(socket) => {
                (self.link, self.greeted) = (Some(Link::new(socket, id)), false);
                // Sends its first word.
                self.deliver(now, |_, _| ());
            }
            Err(error) => (self.listener)(Notice::Lost(id, LinkError::Io(error))),
        }
    }

    /// The driver VM of `generation` has failed, says the supervisor.
    pub fn mask(&mut self, generation: Generation, now: u64) {
        if self.link.as_ref().is_some_and(|link| link.id().generation == generation) {
            self.retire();
            self.deliver(now, |this, out| this.begin_mask(now, out));
        }
    }

    /// There will be no further driver VM.
    pub fn quarantine(&mut self, now: u64) {
        self.retire();
        self.deliver(now, |this, out| {
            this.begin_mask(now, out);
            this.shadow.die(out);
        });
    }

    /// The guest's driver has reset its device.
    pub fn reset(&mut self, now: u64) {
        self.done.clear();
        self.deliver(now, |this, out| this.shadow.reset(out));
    }

    /// A control request of the guest.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn command(&mut self, stream: StreamId, command: Command, now: u64) -> Result<(), Refusal> {
        let mut answer = Ok(());
        self.deliver(now, |this, out| answer = this.shadow.command(stream, command, now, out));
        answer
    }

    /// Samples of the guest.
    pub fn play(&mut self, stream: StreamId, token: Token, samples: Vec<u8>, now: u64) {
        self.deliver(now, |this, out| this.shadow.play(stream, token, samples, now, out));
    }

    /// Room of the guest for samples.
    pub fn record(&mut self, stream: StreamId, token: Token, bytes: usize, now: u64) {
        self.deliver(now, |this, out| this.shadow.record(stream, token, bytes, now, out));
    }

    /// The guest has taken from its queues `all` that it got back, as far as it shows, or not: what it has not taken it cannot have
    /// seen. To be told before anything else that happens at `now`.
    pub fn taken(&mut self, all: bool, now: u64) {
        self.shadow.taken(all, now);
    }

    /// Does what is due.
    pub fn tick(&mut self, now: u64) {
        let mut result = Ok(());
        self.deliver(now, |this, out| result = this.shadow.tick(now, out));
        if let Err(violation) = result {
            self.lose(violation.into(), now);
        }
    }

    /// Reads and writes the link.
    pub fn service(&mut self, now: u64) {
        let Some(link) = &mut self.link else { return };
        let generation = link.id().generation;
        let (messages, mut error) = link.receive(now);
        for message in messages {
            if let Err(wrong) = self.hear(generation, message, now) {
                error = Some(wrong);
                break;
            }
        }
        match error {
            Some(error) => self.lose(error, now),
            None => self.deliver(now, |_, _| ()),
        }
    }

    fn hear(&mut self, generation: Generation, message: FromService, now: u64) -> Result<(), LinkError> {
        let mut result = Ok(());
        match message {
            FromService::Card(card) if !self.greeted => {
                self.greeted = true;
                self.deliver(now, |this, out| result = this.shadow.replay(generation, &card, now, out));
                self.announce = Some(generation);
            }
            FromService::Card(_) => return Err(LinkError::Order),
            FromService::Failed(what) => return Err(LinkError::Service(what)),
            FromService::Stream(_) if !self.greeted => return Err(LinkError::Order),
            FromService::Stream(message) => {
                self.deliver(now, |this, out| result = this.shadow.from_card(generation, message, now, out));
            }
        }
        Ok(result?)
    }

    /// Runs `act` and delivers what it asks for; a link that cannot take it is lost.
    fn deliver(&mut self, now: u64, act: impl FnOnce(&mut Self, &mut Out)) {
        let mut out = Out::default();
        act(self, &mut out);
        self.done.append(&mut out.done);
        let mut result = Ok(());
        if let Some(link) = &mut self.link {
            result = out.to_card.into_iter().try_for_each(|message| link.send(message)).and_then(|()| link.flush());
        }
        if let Err(error) = result {
            self.lose(error, now);
        }
        self.announce_live();
    }

    fn announce_live(&mut self) {
        if let (Mode::Passive(generation), Some(owed)) = (self.shadow.mode(), self.announce)
            && generation == owed
        {
            self.announce = None;
            (self.listener)(Notice::Live(generation, since(self.shadow.counts(), self.counted)));
        }
    }

    /// Masks. What becomes of samples from here on is of this outage; a recovery that fails is part of it.
    fn begin_mask(&mut self, now: u64, out: &mut Out) {
        let told = self.announce.take().is_none();
        if told && matches!(self.shadow.mode(), Mode::Passive(_)) {
            self.counted = self.shadow.counts();
        }
        self.shadow.mask(now, out);
    }

    fn lose(&mut self, error: LinkError, now: u64) {
        let Some(link) = self.link.take() else { return };
        let id = link.id();
        self.retired.push(link);
        let mut out = Out::default();
        self.begin_mask(now, &mut out);
        self.done.append(&mut out.done);
        (self.listener)(Notice::Lost(id, error));
    }

    fn retire(&mut self) {
        self.retired.extend(self.link.take());
    }
}

fn since(now: Counts, before: Counts) -> Counts {
    Counts {
        frames_skipped: now.frames_skipped - before.frames_skipped,
        frames_silent: now.frames_silent - before.frames_silent,
        frames_overrun: now.frames_overrun - before.frames_overrun,
        kept_alive: now.kept_alive - before.kept_alive,
        xruns: now.xruns - before.xruns,
    }
}

#[cfg(test)]
mod tests;
