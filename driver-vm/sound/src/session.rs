//! One guest's session: the host's messages in, the card's positions out, every few milliseconds.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use alsa::pcm::PCM;
use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use umbra_driver_vm::sound_protocol::FromService;
use umbra_shadow::sound::{Card, Direction, FromCard, StreamId, ToCard};

use crate::playback::Playback;
use crate::port::Port;
use crate::record::Record;
use crate::startup;

/// How often a running stream is looked at. It bounds how old a position report is, and with it what policy `hold`
/// may play twice.
const TICK: Duration = Duration::from_millis(4);
/// How long an idle session sleeps; a host that has closed its end is looked for again, as poll(2) cannot wait for it.
const IDLE: Duration = Duration::from_millis(500);

/// Set when the card's levels are.
static LEVELS: OnceLock<()> = OnceLock::new();

/// The card's levels are set: what is started from now on, or waits for it, is heard.
pub fn allow_sound() {
    LEVELS.get_or_init(|| ());
}

enum Stream {
    Playback(Playback),
    Record(Record),
}

pub struct Session {
    port: Port,
    streams: Vec<Stream>,
}

impl Session {
    /// Greets the host at `port` with `card`, whose devices are `open`, in the order of its streams, or not.
    pub fn greet(mut port: Port, card: &Card, open: Vec<PCM>) -> anyhow::Result<Self> {
        port.send(&FromService::Card(card.clone()))?;
        let mut open = open.into_iter();
        let streams = (0u16..).zip(&card.streams).map(|(n, info)| match info.direction {
            Direction::Playback => Stream::Playback(Playback::new(StreamId(n), open.next())),
            Direction::Capture => Stream::Record(Record::new(StreamId(n), open.next())),
        });
        let streams = streams.collect();
        Ok(Self { port, streams })
    }

    /// Works until something fails; tells the host.
    pub fn run(mut self) -> anyhow::Error {
        let mut next = Instant::now();
        loop {
            if let Err(error) = self.turn(&mut next) {
                let _ = self.port.send(&FromService::Failed(format!("{error:#}")));
                return error;
            }
        }
    }

    fn turn(&mut self, next: &mut Instant) -> anyhow::Result<()> {
        let now = Instant::now();
        if self.runs() {
            // Ticks that were missed are not made up for, and an idle sleep is over.
            *next = (*next + TICK).clamp(now, now + TICK);
        } else {
            *next = now + IDLE;
        }
        if self.wait(*next)? == 0 && !self.runs() {
            self.rest();
        }
        self.port.flush()?;
        if !self.port.receive()? {
            std::thread::sleep(TICK);
        }
        while let Some(message) = self.port.next_message()? {
            self.obey(message)?;
        }
        let mut said = Vec::new();
        for stream in &mut self.streams {
            match stream {
                Stream::Playback(stream) => stream.tick(&mut said)?,
                Stream::Record(stream) => stream.tick(&mut said)?,
            }
        }
        self.say(said)
    }

    fn runs(&self) -> bool {
        self.streams.iter().any(|stream| match stream {
            Stream::Playback(stream) => stream.runs(),
            Stream::Record(stream) => stream.runs(),
        })
    }

    /// Nothing happens: what the start kept ready is not needed.
    fn rest(&mut self) {
        startup::end();
        for stream in &mut self.streams {
            match stream {
                Stream::Playback(stream) => stream.rest(),
                Stream::Record(stream) => stream.rest(),
            }
        }
    }

    /// How many of the things that are waited for have happened.
    fn wait(&self, until: Instant) -> anyhow::Result<usize> {
        let write = if self.port.wants_to_write() { PollFlags::POLLOUT } else { PollFlags::empty() };
        let mut polled = [PollFd::new(self.port.descriptor(), PollFlags::POLLIN | write)];
        let millis = until.saturating_duration_since(Instant::now()).as_millis();
        match poll(&mut polled, PollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))) {
            Ok(ready) => Ok(usize::try_from(ready).unwrap_or(0)),
            Err(Errno::EINTR) => Ok(1),
            Err(error) => Err(error).context("cannot wait for the host"),
        }
    }

    fn obey(&mut self, message: ToCard) -> anyhow::Result<()> {
        let (ToCard::SetParams { stream: id, .. }
        | ToCard::Prepare { stream: id, .. }
        | ToCard::Play { stream: id, .. }
        | ToCard::Start { stream: id }
        | ToCard::Stop { stream: id }
        | ToCard::Release { stream: id }) = message;
        let Some(stream) = self.streams.get_mut(usize::from(id.0)) else { bail!("the card has no stream {}", id.0) };
        let mut said = Vec::new();
        let starts = matches!(message, ToCard::Start { .. });
        if starts {
            startup::mark("prepared");
            LEVELS.wait();
        }
        match (message, stream) {
            (ToCard::SetParams { params, .. }, Stream::Playback(stream)) => stream.set_params(params),
            (ToCard::SetParams { params, .. }, Stream::Record(stream)) => stream.set_params(params),
            (ToCard::Prepare { epoch, .. }, Stream::Playback(stream)) => stream.prepare(epoch)?,
            (ToCard::Prepare { epoch, .. }, Stream::Record(stream)) => stream.prepare(epoch)?,
            (ToCard::Play { epoch, samples, .. }, Stream::Playback(stream)) => {
                stream.play(epoch, &samples, &mut said)?;
            }
            (ToCard::Play { .. }, Stream::Record(_)) => bail!("samples for a stream that records"),
            (ToCard::Start { .. }, Stream::Playback(stream)) => stream.start(&mut said)?,
            (ToCard::Start { .. }, Stream::Record(stream)) => stream.start()?,
            (ToCard::Stop { .. }, Stream::Playback(stream)) => stream.stop(&mut said)?,
            (ToCard::Stop { .. }, Stream::Record(stream)) => stream.stop()?,
            (ToCard::Release { .. }, Stream::Playback(stream)) => stream.release(),
            (ToCard::Release { .. }, Stream::Record(stream)) => stream.release(),
        }
        if starts {
            startup::mark("started");
            startup::end();
        }
        self.say(said)
    }

    fn say(&mut self, said: Vec<FromCard>) -> anyhow::Result<()> {
        said.into_iter().try_for_each(|message| self.port.send(&FromService::Stream(message)))
    }
}
