//! A stream that plays. The guest's samples wait here; the card gets as many as its buffer takes, and they are kept
//! until they are heard, so that a stop and a start lose nothing.

use std::collections::VecDeque;
use std::time::Instant;

use alsa::pcm::{Access, HwParams, PCM, State};
use alsa::{Direction as AlsaDirection, ValueOr};
use anyhow::Context;
use umbra_shadow::sound::params::MAX_BUFFER_BYTES;
use umbra_shadow::sound::{Epoch, FromCard, HELD_MAX_BYTES, Params, StreamId};

use crate::card::alsa_format;
use crate::config::PLAYBACK;
use crate::fault::Fault;
use crate::standstill::Standstill;

/// Periods a second that the card is asked for; the guest's own do not matter to it.
const PERIODS_PER_SECOND: u32 = 100;
/// Longest buffer that the card is asked for, in milliseconds: what a hiccup of the driver VM may last.
const CARD_BUFFER_MS: u32 = 200;
/// Periods of the card's buffer that are left empty: cards that report by whole periods are now and then ahead of
/// themselves (AC97), and what they are about to play must not be overwritten.
const HEADROOM_PERIODS: u64 = 2;

/// Frames of a buffer of `buffer` frames that are left empty; no more than half of one that has few periods, which could not be played
/// otherwise.
fn headroom(period: u64, buffer: u64) -> u64 {
    (HEADROOM_PERIODS * period).min(buffer / 2)
}

/// Silence before a stream's first samples where several guests are mixed, in periods. dmix begins where the card is just now; what the
/// card has fetched ahead by then (QEMU's HDA codec: 512 frames, 11 ms) is mixed in too late, and heard when its buffer comes round again.
const LEAD_PERIODS: u64 = 2;

/// Frames of that in a buffer of `buffer` frames; no more than half of what is filled of one that has few periods, so that samples find
/// room behind them.
fn lead(period: u64, buffer: u64) -> u64 {
    (LEAD_PERIODS * period).min((buffer - headroom(period, buffer)) / 2)
}

/// Most that waits: what the host may replay at once.
const MAX_WAITING: usize = HELD_MAX_BYTES + 2 * MAX_BUFFER_BYTES as usize;

/// Sets a PCM device up for `params`; opens it unless it is open as `spare`.
pub fn open(name: &str, direction: AlsaDirection, spare: Option<PCM>, params: &Params) -> anyhow::Result<PCM> {
    let opened = spare.map_or_else(|| PCM::new(name, direction, true), Ok);
    let pcm = opened.with_context(|| format!("cannot open {name}"))?;
    let rate = params.rate.hz();
    let period = alsa::pcm::Frames::from(rate.div_ceil(PERIODS_PER_SECOND));
    let buffer = alsa::pcm::Frames::from(rate / 1000 * CARD_BUFFER_MS);
    let set_up = || -> alsa::Result<()> {
        let hardware = HwParams::any(&pcm)?;
        hardware.set_access(Access::RWInterleaved)?;
        hardware.set_format(alsa_format(params.format))?;
        hardware.set_channels(params.channels.into())?;
        hardware.set_rate_resample(false)?;
        hardware.set_rate(rate, ValueOr::Nearest)?;
        hardware.set_period_size_near(period, ValueOr::Nearest)?;
        hardware.set_buffer_size_near(buffer)?;
        pcm.hw_params(&hardware)?;
        drop(hardware);
        let software = pcm.sw_params_current()?;
        // Started by hand.
        software.set_start_threshold(software.get_boundary()?)?;
        pcm.sw_params(&software)
    };
    set_up().with_context(|| {
        format!("{name} does not take {rate} Hz, {:?}, {} channels", params.format, params.channels)
    })?;
    Ok(pcm)
}

/// A playback stream.
pub struct Playback {
    id: StreamId,
    params: Option<Params>,
    epoch: Epoch,
    pcm: Option<PCM>,
    /// The device, open since the card was described.
    spare: Option<PCM>,
    /// It is one of several streams that are mixed.
    mixed: bool,
    /// Frames of the card's periods, and of its buffer.
    period: u64,
    buffer: u64,
    running: bool,
    standstill: Standstill,
    /// The card ran out of samples.
    dry: bool,
    /// Samples not yet heard.
    waiting: VecDeque<u8>,
    /// Frames heard in this epoch, and frames that the card has, behind them.
    heard: u64,
    in_card: u64,
    /// Frames of silence that the card has before those.
    lead: u64,
    reported: u64,
}

impl Playback {
    pub fn new(id: StreamId, spare: Option<PCM>, mixed: bool, standstill: Standstill) -> Self {
        Self {
            id,
            mixed,
            standstill,
            params: None,
            epoch: Epoch(0),
            pcm: None,
            spare,
            period: 0,
            buffer: 0,
            running: false,
            dry: false,
            waiting: VecDeque::new(),
            heard: 0,
            in_card: 0,
            lead: 0,
            reported: 0,
        }
    }

    pub fn runs(&self) -> bool {
        self.running
    }

    /// The session is over: closes the stream and forgets its samples.
    pub fn give_up(self) -> Self {
        Self::new(self.id, self.spare, self.mixed, self.standstill)
    }

    /// Nobody wants to play just now: lets the card rest.
    pub fn rest(&mut self) {
        self.spare = None;
    }

    pub fn set_params(&mut self, params: Params) {
        self.release();
        self.params = Some(params);
    }

    pub fn prepare(&mut self, epoch: Epoch) -> Result<(), Fault> {
        self.running = false;
        self.epoch = epoch;
        self.waiting.clear();
        (self.heard, self.reported) = (0, 0);
        let Some(params) = &self.params else { return Err(Fault::Session("prepare before parameters".into())) };
        if self.pcm.is_none() {
            let pcm = open(PLAYBACK, AlsaDirection::Playback, self.spare.take(), params)?;
            let sizes = pcm.hw_params_current().and_then(|set| Ok((set.get_period_size()?, set.get_buffer_size()?)));
            let (period, buffer) = sizes.unwrap_or((0, 0));
            self.period = u64::try_from(period).unwrap_or(0);
            self.buffer = u64::try_from(buffer).unwrap_or(0);
            self.pcm = Some(pcm);
        }
        Ok(self.reset_card()?)
    }

    /// Puts the card into the state before a start.
    fn reset_card(&mut self) -> anyhow::Result<()> {
        let Some(pcm) = &self.pcm else { return Ok(()) };
        if pcm.state() != State::Prepared || self.in_card + self.lead > 0 {
            pcm.drop().context("cannot stop the card")?;
            pcm.prepare().context("cannot prepare the card")?;
        }
        (self.in_card, self.lead) = (0, 0);
        self.dry = false;
        Ok(())
    }

    pub fn play(&mut self, epoch: Epoch, samples: &[u8], said: &mut Vec<FromCard>) -> Result<(), Fault> {
        if epoch != self.epoch {
            return Ok(());
        }
        if self.waiting.len() + samples.len() > MAX_WAITING {
            return Err(Fault::Session("the host sends more than it may".into()));
        }
        self.waiting.extend(samples);
        if self.running {
            self.feed(said)?;
        }
        Ok(())
    }

    pub fn start(&mut self, said: &mut Vec<FromCard>) -> anyhow::Result<()> {
        self.reset_card()?;
        self.running = true;
        self.standstill.begin();
        self.feed(said)
    }

    pub fn stop(&mut self, said: &mut Vec<FromCard>) -> anyhow::Result<()> {
        self.tick(said)?;
        self.running = false;
        self.standstill.rest();
        self.reset_card()
    }

    pub fn release(&mut self) {
        self.running = false;
        self.pcm = None;
        (self.in_card, self.lead) = (0, 0);
        self.waiting.clear();
    }

    pub fn tick(&mut self, said: &mut Vec<FromCard>) -> anyhow::Result<()> {
        if !self.running {
            return Ok(());
        }
        let before = self.in_card + self.lead;
        self.look()?;
        let moved = self.in_card + self.lead < before;
        if !moved && self.in_card == 0 {
            self.standstill.rest();
        } else if self.standstill.look(moved, Instant::now())? {
            self.running = false;
            said.push(FromCard::Stuck { stream: self.id, epoch: self.epoch });
            return self.reset_card();
        }
        self.feed(said)?;
        if self.heard != self.reported {
            self.reported = self.heard;
            said.push(FromCard::Position { stream: self.id, epoch: self.epoch, heard: self.heard });
        }
        Ok(())
    }

    /// Finds out how far the card is.
    fn look(&mut self) -> anyhow::Result<()> {
        let (Some(pcm), Some(params)) = (&self.pcm, &self.params) else { return Ok(()) };
        if self.in_card == 0 {
            return Ok(());
        }
        let left = match pcm.avail_update().and_then(|_| pcm.delay()) {
            Ok(delay) => u64::try_from(delay).unwrap_or(0),
            Err(error) if error.errno() == libc::EPIPE => {
                self.dry = true;
                0
            }
            Err(error) => return Err(error).context("the card does not say where it is"),
        };
        self.lead = left.saturating_sub(self.in_card).min(self.lead);
        let heard = self.in_card.saturating_sub(left);
        self.heard += heard;
        self.in_card -= heard;
        self.waiting.drain(..params.bytes(heard).min(self.waiting.len()));
        Ok(())
    }

    /// Gives the card what it takes. It was dry though there are samples: they came late, or this service did.
    fn feed(&mut self, said: &mut Vec<FromCard>) -> anyhow::Result<()> {
        let (Some(pcm), Some(params)) = (&self.pcm, &self.params) else { return Ok(()) };
        if params.bytes(self.in_card) >= self.waiting.len() {
            return Ok(());
        }
        if self.dry {
            pcm.prepare().context("cannot prepare the card after an underrun")?;
            self.dry = false;
            if self.heard > 0 {
                said.push(FromCard::Xrun { stream: self.id, epoch: self.epoch });
            }
        }
        if self.mixed && self.in_card + self.lead == 0 && pcm.state() == State::Prepared {
            let silence = vec![0; params.bytes(lead(self.period, self.buffer))];
            self.lead = write(pcm, &silence)?;
        }
        let given = params.bytes(self.in_card);
        let (bytes, frame) = (self.waiting.make_contiguous(), params.frame_bytes() as usize);
        let whole = bytes.len() - bytes.len() % frame;
        let room = match pcm.avail_update() {
            Ok(frames) => u64::try_from(frames).unwrap_or(0).saturating_sub(headroom(self.period, self.buffer)),
            // Ran dry just now; the next look sees it.
            Err(error) if error.errno() == libc::EPIPE => return Ok(()),
            Err(error) => return Err(error).context("the card does not say how much it takes"),
        };
        let end = whole.min(given + params.bytes(room));
        if end == given {
            return Ok(());
        }
        self.in_card += write(pcm, &bytes[given..end])?;
        if pcm.state() == State::Prepared && self.in_card > 0 {
            pcm.start().context("cannot start the card")?;
        }
        Ok(())
    }
}

/// Gives the card what it takes of `bytes`, whole frames; how many frames those were. None if it has run dry just now, which the next
/// look sees.
fn write(pcm: &PCM, bytes: &[u8]) -> anyhow::Result<u64> {
    match pcm.io_bytes().writei(bytes) {
        Ok(frames) => Ok(frames as u64),
        Err(error) if matches!(error.errno(), libc::EAGAIN | libc::EPIPE) => Ok(0),
        Err(error) => Err(error).context("the card does not take samples"),
    }
}

#[cfg(test)]
mod tests {
    use super::{headroom, lead};

    #[test]
    fn a_card_of_two_periods_gets_samples() {
        assert_eq!(headroom(480, 9_600), 960);
        assert_eq!(headroom(480, 960), 480);
        assert_eq!(lead(480, 9_600), 960, "where it has room");
        for periods in 2..=20 {
            let buffer = 480 * periods;
            let room = buffer - headroom(480, buffer) - lead(480, buffer);
            assert!(room >= 240, "{room} frames behind the silence, of {periods} periods");
        }
    }
}
