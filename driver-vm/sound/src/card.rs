//! The card: waits until its driver has made it, and finds out what it can do.

use std::fs;
use std::time::{Duration, Instant};

use alsa::pcm::{Access, Format as AlsaFormat, HwParams, PCM};
use alsa::{Ctl, Direction as AlsaDirection};
use anyhow::{Context, bail};
use umbra_shadow::sound::{Card, Direction, Format, Rate, StreamInfo};

use crate::config::{CAPTURE, CONTROL, PLAYBACK};

/// How long the card may take to appear: codecs are probed behind the driver's back.
const APPEARS_WITHIN: Duration = Duration::from_secs(10);
/// How often it is looked for.
const POLL: Duration = Duration::from_millis(2);
/// The devices of a card appear one by one; when none has come for so long, they are all there.
const SETTLED: Duration = Duration::from_millis(20);
/// Most channels offered: what a guest's buffer is made for.
const MAX_CHANNELS: u32 = 8;

/// A card and its first PCM devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Number of the card.
    pub card: u32,
    /// Number of the device that plays.
    pub playback: Option<u32>,
    /// Number of the device that records.
    pub capture: Option<u32>,
}

/// Waits for a card with a device that plays or records.
pub fn wait() -> anyhow::Result<Found> {
    let started = Instant::now();
    let mut last: Option<(Found, Instant)> = None;
    loop {
        match (find(), last) {
            (Some(found), Some((before, since))) if found == before => {
                if since.elapsed() >= SETTLED {
                    return Ok(found);
                }
            }
            (Some(found), _) => last = Some((found, Instant::now())),
            (None, _) if started.elapsed() > APPEARS_WITHIN => {
                bail!("no sound card has appeared within {} s", APPEARS_WITHIN.as_secs());
            }
            (None, _) => {}
        }
        std::thread::sleep(POLL);
    }
}

/// The lowest devices of the lowest card in `/dev/snd`: on cards with several, the analogue ones come first.
fn find() -> Option<Found> {
    let mut devices: Vec<(u32, u32, Direction)> = Vec::new();
    for entry in fs::read_dir("/dev/snd").ok()?.flatten() {
        devices.extend(entry.file_name().to_str().and_then(pcm_name));
    }
    let card = devices.iter().map(|(card, ..)| *card).min()?;
    let lowest = |wanted| {
        let ours = devices.iter().filter(|(number, _, direction)| *number == card && *direction == wanted);
        ours.map(|(_, device, _)| *device).min()
    };
    Some(Found { card, playback: lowest(Direction::Playback), capture: lowest(Direction::Capture) })
}

/// Takes a name like `pcmC0D1p` apart.
fn pcm_name(name: &str) -> Option<(u32, u32, Direction)> {
    let (card, rest) = name.strip_prefix("pcmC")?.split_once('D')?;
    let (device, direction) = match (rest.strip_suffix('p'), rest.strip_suffix('c')) {
        (Some(device), _) => (device, Direction::Playback),
        (_, Some(device)) => (device, Direction::Capture),
        _ => return None,
    };
    Some((card.parse().ok()?, device.parse().ok()?, direction))
}

/// What the card can do; its streams in the order playback, capture.
pub fn describe(found: &Found) -> anyhow::Result<Card> {
    let name = Ctl::new(CONTROL, false).and_then(|ctl| Ok(ctl.card_info()?.get_longname()?.to_owned()));
    let mut streams = Vec::new();
    if found.playback.is_some() {
        streams.extend(stream(PLAYBACK, Direction::Playback)?);
    }
    if found.capture.is_some() {
        streams.extend(stream(CAPTURE, Direction::Capture)?);
    }
    let card = Card { name: name.unwrap_or_else(|_| "sound card".into()), streams };
    if !card.is_sane() {
        bail!("the card {:?} has no stream in a format that can be passed on", card.name);
    }
    Ok(card)
}

/// What a PCM device can do; `None` if nothing that can be passed on.
fn stream(name: &str, direction: Direction) -> anyhow::Result<Option<StreamInfo>> {
    let pcm = PCM::new(name, alsa_direction(direction), true).with_context(|| format!("cannot open {name}"))?;
    let params = HwParams::any(&pcm).with_context(|| format!("cannot ask what {name} can do"))?;
    params.set_access(Access::RWInterleaved).with_context(|| format!("{name} cannot be written to"))?;
    let formats = Format::ALL.into_iter().filter(|format| params.test_format(alsa_format(*format)).is_ok());
    let rates = Rate::all().filter(|rate| params.test_rate(rate.hz()).is_ok());
    let channels = (1..=MAX_CHANNELS).filter(|n| params.test_channels(*n).is_ok());
    let channels: Vec<u8> = channels.filter_map(|n| u8::try_from(n).ok()).collect();
    let (Some(min), Some(max)) = (channels.first(), channels.last()) else { return Ok(None) };
    let info = StreamInfo {
        direction,
        formats: formats.map(Format::bit).sum(),
        rates: rates.map(Rate::bit).sum(),
        channels_min: *min,
        channels_max: *max,
    };
    Ok(Some(info).filter(StreamInfo::is_sane))
}

pub fn alsa_direction(direction: Direction) -> AlsaDirection {
    match direction {
        Direction::Playback => AlsaDirection::Playback,
        Direction::Capture => AlsaDirection::Capture,
    }
}

pub fn alsa_format(format: Format) -> AlsaFormat {
    match format {
        Format::U8 => AlsaFormat::U8,
        Format::S16 => AlsaFormat::S16LE,
        Format::S24In3 => AlsaFormat::S243LE,
        Format::S24 => AlsaFormat::S24LE,
        Format::S32 => AlsaFormat::S32LE,
        Format::Float => AlsaFormat::FloatLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_taken_apart() {
        assert_eq!(pcm_name("pcmC0D13p"), Some((0, 13, Direction::Playback)));
        assert_eq!(pcm_name("pcmC1D0c"), Some((1, 0, Direction::Capture)));
        for other in ["controlC0", "timer", "pcmC0D0", "pcmCxD0p", "pcmC0p", "seq"] {
            assert_eq!(pcm_name(other), None);
        }
    }
}
