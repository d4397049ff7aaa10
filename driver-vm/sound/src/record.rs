//! A stream that records: what the card has goes to the host at each look.

use std::time::Instant;

use alsa::Direction as AlsaDirection;
use alsa::pcm::PCM;
use anyhow::Context;
use umbra_shadow::sound::{Epoch, FromCard, Params, StreamId};

use crate::config::CAPTURE;
use crate::fault::Fault;
use crate::playback::open;
use crate::standstill::Standstill;

/// Most bytes taken at one look.
const CHUNK: usize = 64 * 1024;

/// A capture stream.
pub struct Record {
    id: StreamId,
    params: Option<Params>,
    epoch: Epoch,
    pcm: Option<PCM>,
    /// The device, open since the card was described.
    spare: Option<PCM>,
    running: bool,
    standstill: Standstill,
}

impl Record {
    pub fn new(id: StreamId, spare: Option<PCM>, standstill: Standstill) -> Self {
        Self { id, params: None, epoch: Epoch(0), pcm: None, spare, running: false, standstill }
    }

    pub fn runs(&self) -> bool {
        self.running
    }

    /// The session is over: closes the stream.
    pub fn give_up(self) -> Self {
        Self::new(self.id, self.spare, self.standstill)
    }

    /// Nobody wants to record just now: lets the card rest.
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
        let Some(params) = &self.params else { return Err(Fault::Session("prepare before parameters".into())) };
        if self.pcm.is_none() {
            self.pcm = Some(open(CAPTURE, AlsaDirection::Capture, self.spare.take(), params)?);
        }
        Ok(self.halt()?)
    }

    pub fn start(&mut self) -> Result<(), Fault> {
        let Some(pcm) = &self.pcm else { return Err(Fault::Session("start before prepare".into())) };
        pcm.start().context("cannot start recording")?;
        self.running = true;
        self.standstill.begin();
        Ok(())
    }

    pub fn stop(&mut self) -> anyhow::Result<()> {
        self.standstill.rest();
        self.halt()
    }

    fn halt(&mut self) -> anyhow::Result<()> {
        self.running = false;
        let Some(pcm) = &self.pcm else { return Ok(()) };
        pcm.drop().context("cannot stop recording")?;
        pcm.prepare().context("cannot prepare recording")
    }

    pub fn release(&mut self) {
        self.running = false;
        self.pcm = None;
    }

    /// `behind`: the host reads slowly. What is recorded stays with the card then, which loses it when that lasts.
    pub fn tick(&mut self, behind: bool, said: &mut Vec<FromCard>) -> anyhow::Result<()> {
        let (Some(pcm), Some(params), true) = (&self.pcm, &self.params, self.running) else { return Ok(()) };
        if behind {
            self.standstill.rest();
            return Ok(());
        }
        let before = said.len();
        let frame = params.frame_bytes() as usize;
        let mut samples = vec![0; CHUNK - CHUNK % frame];
        match pcm.io_bytes().readi(&mut samples) {
            Ok(0) => {}
            Ok(frames) => {
                samples.truncate(frames * frame);
                said.push(FromCard::Captured { stream: self.id, epoch: self.epoch, samples });
            }
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) if error.errno() == libc::EPIPE => {
                said.push(FromCard::Xrun { stream: self.id, epoch: self.epoch });
                pcm.prepare().and_then(|()| pcm.start()).context("cannot go on recording after an overrun")?;
            }
            Err(error) => return Err(error).context("the card does not give samples"),
        }
        if self.standstill.look(said.len() > before, Instant::now())? {
            said.push(FromCard::Stuck { stream: self.id, epoch: self.epoch });
            return self.halt();
        }
        Ok(())
    }
}
