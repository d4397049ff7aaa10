//! The honest guest beside the attacker: ticks and downloads that have to be whole.

use std::time::Duration;

use serde::Serialize;

use super::campaign::HONEST;
use crate::demo::DemoError;
use crate::demo::guest_log::GuestLog;
use crate::demo::outage::{longest, longest_standstill};
use crate::demo::place::Place;
use crate::peer::{Content, guest_address, peer_address, ports};
use crate::probe::client::Run;

/// What is downloaded again and again, bytes, and how fast, bytes a second.
const CONTENT: Content = Content { bytes: 2 << 20 };
const RATE: u64 = 1 << 20;
const STEP: Duration = Duration::from_secs(60);

/// It, at work.
pub(super) struct Bystander {
    downloads: Run,
    log: GuestLog,
}

/// What the peer has seen of it, and what it noticed.
#[derive(Clone, Debug, Serialize)]
pub struct Seen {
    /// Ticks that arrived, one each 10 ms.
    pub ticks: usize,
    /// Ticks that did not.
    pub lost_ticks: u64,
    /// Longest time between two arrivals, and for which the guest itself sent none, ms.
    pub gap_ms: f64,
    /// See there.
    pub still_ms: f64,
    /// Downloads that were whole, and that were not.
    pub downloads: usize,
    /// See there.
    pub broken: usize,
    /// Connections that were reset.
    pub resets: u32,
    /// What the guest's kernel said, if it noticed something.
    pub noticed: Vec<String>,
}

impl Bystander {
    pub(super) fn start(place: &mut Place) -> Result<Self, DemoError> {
        let (peer, log) = (peer_address(0), GuestLog::read(place, HONEST)?);
        place.in_guest(HONEST, &format!("umbra-probe first-answer {peer} 30"), STEP)?;
        place.peer().take_ticks()?;
        let tick = format!("(umbra-probe tick {peer} 10 & echo $! >/tmp/tick) </dev/null >/dev/null 2>&1");
        place.in_guest(HONEST, &tick, STEP)?;
        place.peer().offer(CONTENT.bytes, RATE, u64::MAX)?;
        let url = format!("http://{peer}:{}/file", ports::HTTP);
        let get = format!("while [ ! -e /tmp/stop ]; do wget -q -O - {url} | sha256sum; done");
        Ok(Self { downloads: place.start_in_guest(HONEST, &get)?, log })
    }

    pub(super) fn finish(mut self, place: &mut Place) -> Result<Seen, DemoError> {
        place.in_guest(HONEST, "touch /tmp/stop; kill $(cat /tmp/tick)", STEP)?;
        place.await_end(&mut self.downloads, STEP, |_| Ok(()))?;
        let ticks = place.peer().take_ticks()?;
        let progress = place.peer().progress()?;
        let guest = guest_address(0, 0);
        let mut numbers: Vec<_> = ticks.iter().filter(|tick| tick.from == guest).map(|tick| tick.seq).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let sent = numbers.last().map_or(0, |last| last + 1);
        let whole = CONTENT.sha256();
        let (good, bad): (Vec<_>, Vec<_>) =
            self.downloads.output().stdout.lines().partition(|line| line.starts_with(&whole));
        let noticed = GuestLog::read(place, HONEST)?.since(&self.log);
        Ok(Seen {
            ticks: numbers.len(),
            lost_ticks: sent - numbers.len() as u64,
            gap_ms: longest(&ticks, guest, 0, u64::MAX).map_or(f64::INFINITY, |seen| seen.gap_ms),
            still_ms: longest_standstill(&ticks, guest).map_or(0.0, |still| still.ms),
            downloads: good.len(),
            broken: bad.len(),
            resets: progress.resets,
            noticed: if noticed.is_clean() { Vec::new() } else { noticed.lines },
        })
    }
}

impl Seen {
    /// What the guest must not have noticed.
    pub(super) fn breaches(&self) -> Vec<String> {
        let Self { ticks, lost_ticks, downloads, broken, resets, noticed, .. } = self;
        let mut breaches = Vec::new();
        let mut when = |is_wrong: bool, what: String| breaches.extend(is_wrong.then_some(what));
        when(
            *ticks == 0 || *lost_ticks > 0,
            format!("{lost_ticks} of the honest guest's ticks are lost, {ticks} are not"),
        );
        when(*downloads == 0 || *broken > 0, format!("{broken} of its downloads are broken, {downloads} are not"));
        when(*resets > 0, format!("{resets} of its connections were reset"));
        when(!noticed.is_empty(), format!("its kernel noticed: {noticed:?}"));
        breaches
    }
}
