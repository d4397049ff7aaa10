//! One guest's end of the service: the host's sessions with it, one after the other. In a session the host's messages come
//! in, and the card's positions go out every few milliseconds. A session ends with the host's end of the port, with a
//! later one that begins, or with a fault of the host; its streams are closed with it, and nobody else hears of it.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use alsa::pcm::PCM;
use umbra_driver_vm::calls::Calls;
use umbra_driver_vm::sound_protocol::{FromHost, FromService};
use umbra_shadow::sound::{Card, Direction, FromCard, StreamId, ToCard};

use crate::fault::Fault;
use crate::playback::Playback;
use crate::port::{Came, Port};
use crate::record::Record;
use crate::standstill::{Movement, Standstill};
use crate::startup;

/// How often a running stream is looked at. It bounds how old a position report is, and with it what policy `hold`
/// may play twice.
const TICK: Duration = Duration::from_millis(4);
/// Shortest time between two looks at the streams. A host whose messages are small and many makes a turn of each: it does not get a
/// position with each, which it would take for a flood.
const LOOK: Duration = Duration::from_millis(1);
/// How long nothing happens before the devices that were opened ahead are closed.
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

impl Stream {
    fn runs(&self) -> bool {
        match self {
            Self::Playback(stream) => stream.runs(),
            Self::Record(stream) => stream.runs(),
        }
    }

    fn rest(&mut self) {
        match self {
            Self::Playback(stream) => stream.rest(),
            Self::Record(stream) => stream.rest(),
        }
    }

    fn give_up(self) -> Self {
        match self {
            Self::Playback(stream) => Self::Playback(stream.give_up()),
            Self::Record(stream) => Self::Record(stream.give_up()),
        }
    }

    fn tick(&mut self, behind: bool, said: &mut Vec<FromCard>) -> anyhow::Result<()> {
        match self {
            Self::Playback(stream) => stream.tick(said),
            Self::Record(stream) => stream.tick(behind, said),
        }
    }
}

/// The end of one guest.
pub struct Session {
    port: Port,
    card: Card,
    streams: Vec<Stream>,
    looked: Instant,
    calls: Calls,
}

impl Session {
    /// The end at `port`, of `card`, whose devices are `open`, in the order of its streams, or not; `mixed` with those of other guests. All
    /// ends have one `movement`.
    pub fn new(port: Port, card: &Card, open: Vec<PCM>, mixed: bool, movement: &Arc<Movement>) -> Self {
        let mut open = open.into_iter();
        let standstill = |direction| Standstill::new(direction, movement, mixed);
        let streams = (0u16..).zip(&card.streams).map(|(n, info)| match info.direction {
            Direction::Playback => {
                Stream::Playback(Playback::new(StreamId(n), open.next(), mixed, standstill(info.direction)))
            }
            Direction::Capture => Stream::Record(Record::new(StreamId(n), open.next(), standstill(info.direction))),
        });
        let streams = streams.collect();
        Self { port, card: card.clone(), streams, looked: Instant::now(), calls: Calls::default() }
    }

    /// Its thread's work, each piece a call: whether the thread gets on.
    pub fn calls(&self) -> Calls {
        self.calls.clone()
    }

    /// Works until the card fails; tells the host.
    pub fn run(mut self) -> anyhow::Error {
        let (mut next, calls) = (Instant::now(), self.calls());
        loop {
            let error = match self.turn(&mut next) {
                Ok(()) => continue,
                Err(Fault::Session(why)) => match calls.make(|| self.hang_up(&why)) {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                Err(Fault::Service(error)) => error,
            };
            let _ = self.port.send(&FromService::Failed(format!("{error:#}")));
            return error;
        }
    }

    /// Waits until `next`, or until the host has something to say; obeys, and looks at the streams.
    pub fn turn(&mut self, next: &mut Instant) -> Result<(), Fault> {
        let now = Instant::now();
        if self.runs() {
            // Ticks that were missed are not made up for, and an idle sleep is over.
            *next = (*next + TICK).clamp(now, now + TICK);
        } else {
            *next = now + IDLE;
        }
        let came = self.port.wait(next.saturating_duration_since(now))?;
        self.calls().make(|| self.work(came))
    }

    /// The host has something to say (it `came`), or time has passed.
    fn work(&mut self, came: bool) -> Result<(), Fault> {
        if !came && !self.runs() {
            self.rest();
        }
        self.port.flush()?;
        if self.port.receive()? == Came::End {
            if self.port.is_touched() {
                self.end()?;
            }
            return Ok(());
        }
        while let Some(message) = self.port.next_message()? {
            self.obey(message)?;
            // Threads of one real-time priority do not share time by themselves: a host that sends without end must not
            // keep another guest's card from being fed.
            std::thread::yield_now();
        }
        let now = Instant::now();
        if now.duration_since(self.looked) < LOOK {
            return Ok(());
        }
        self.looked = now;
        let mut said = Vec::new();
        let behind = self.port.is_behind();
        for stream in &mut self.streams {
            stream.tick(behind, &mut said)?;
        }
        self.say(said)
    }

    /// The host's session is at fault: tells it why, and ends it.
    fn hang_up(&mut self, why: &str) -> anyhow::Result<()> {
        startup::log(&format!("a session is ended: {why}"));
        // A host that does not read is not told.
        let _ = self.port.send(&FromService::Failed(why.into()));
        self.end()
    }

    /// The session is over.
    fn end(&mut self) -> anyhow::Result<()> {
        self.give_up();
        self.port.reopen()
    }

    fn give_up(&mut self) {
        self.streams = std::mem::take(&mut self.streams).into_iter().map(Stream::give_up).collect();
    }

    fn runs(&self) -> bool {
        self.streams.iter().any(Stream::runs)
    }

    /// Nothing happens: what the start kept ready is not needed.
    fn rest(&mut self) {
        startup::end();
        self.streams.iter_mut().for_each(Stream::rest);
    }

    fn obey(&mut self, message: FromHost) -> Result<(), Fault> {
        match message {
            FromHost::Begin => {
                self.give_up();
                self.port.send(&FromService::Card(self.card.clone()))
            }
            FromHost::Stream(message) => self.move_stream(message),
        }
    }

    fn move_stream(&mut self, message: ToCard) -> Result<(), Fault> {
        let (ToCard::SetParams { stream: id, .. }
        | ToCard::Prepare { stream: id, .. }
        | ToCard::Play { stream: id, .. }
        | ToCard::Start { stream: id }
        | ToCard::Stop { stream: id }
        | ToCard::Release { stream: id }) = message;
        let index = usize::from(id.0);
        let (Some(stream), Some(info)) = (self.streams.get_mut(index), self.card.streams.get(index)) else {
            return Err(Fault::Session(format!("the card has no stream {}", id.0)));
        };
        let mut said = Vec::new();
        let starts = matches!(message, ToCard::Start { .. });
        if starts {
            startup::mark("prepared");
            LEVELS.wait();
        }
        match (message, stream) {
            (ToCard::SetParams { params, .. }, _) if !params.fit(info) => {
                return Err(Fault::Session(format!("parameters that the card was not offered with: {params:?}")));
            }
            (ToCard::SetParams { params, .. }, Stream::Playback(stream)) => stream.set_params(params),
            (ToCard::SetParams { params, .. }, Stream::Record(stream)) => stream.set_params(params),
            (ToCard::Prepare { epoch, .. }, Stream::Playback(stream)) => stream.prepare(epoch)?,
            (ToCard::Prepare { epoch, .. }, Stream::Record(stream)) => stream.prepare(epoch)?,
            (ToCard::Play { epoch, samples, .. }, Stream::Playback(stream)) => {
                stream.play(epoch, &samples, &mut said)?;
            }
            (ToCard::Play { .. }, Stream::Record(_)) => {
                return Err(Fault::Session("samples for a stream that records".into()));
            }
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

    fn say(&mut self, said: Vec<FromCard>) -> Result<(), Fault> {
        said.into_iter().try_for_each(|message| {
            if let FromCard::Stuck { stream, .. } = message {
                startup::log(&format!("stream {} of a guest stands still, while the card moves others", stream.0));
            }
            self.port.send(&FromService::Stream(message))
        })
    }
}
