//! The card: waits until its driver has made it, and finds out what it can do.

use std::fs;
use std::path::Path;

use alsa::pcm::{Access, Format as AlsaFormat, HwParams, PCM};
use alsa::{Ctl, Direction as AlsaDirection};
use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use umbra_shadow::sound::{Card, Direction, Format, Rate, StreamInfo};

use crate::config::{CAPTURE, CONTROL, PLAYBACK};

/// Where devices appear, and those of cards: a folder that comes with the first of them.
const DEV: &str = "/dev";
const SND: &str = "/dev/snd";
/// Most channels offered: what a guest's buffer is made for.
const MAX_CHANNELS: u8 = 8;

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

impl Found {
    /// What most cards are, once they are there.
    pub const USUAL: Self = Self { card: 0, playback: Some(0), capture: Some(0) };

    /// True if every device of this one has the number that it has in `other`.
    pub fn is_like(&self, other: &Self) -> bool {
        let same = |ours: Option<u32>, theirs| ours.is_none() || ours == theirs;
        self.card == other.card && same(self.playback, other.playback) && same(self.capture, other.capture)
    }
}

/// Waits for a card with a device that plays or records, without end: a standby waits for its turn.
pub fn wait() -> anyhow::Result<Found> {
    let watch = Inotify::init(InitFlags::IN_CLOEXEC).context("cannot watch for a card")?;
    watch.add_watch(DEV, AddWatchFlags::IN_CREATE).context("cannot watch for a card")?;
    loop {
        // Before the look, so that nothing is missed; the same again changes nothing.
        match watch.add_watch(SND, AddWatchFlags::IN_CREATE) {
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(error) => return Err(error).context("cannot watch for a card's devices"),
        }
        if let Some(found) = find(Path::new(SND)) {
            return Ok(found);
        }
        match watch.read_events() {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for a card"),
        }
    }
}

/// The lowest devices of the lowest card in `folder`: on cards with several, the analogue ones come first. A card has
/// all its devices when it has its control device, which ALSA registers last (`include/sound/core.h`); one of HDA whose
/// codec's driver comes late gets its devices behind it, so there has to be one of those, too.
fn find(folder: &Path) -> Option<Found> {
    let (mut devices, mut cards) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        devices.extend(pcm_name(name));
        cards.extend(name.strip_prefix("controlC").and_then(|number| number.parse::<u32>().ok()));
    }
    let card = devices.iter().map(|(card, ..)| *card).filter(|card| cards.contains(card)).min()?;
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

/// What the card can do, and its devices, open as they are now; streams in the order playback, capture.
pub fn describe(found: &Found) -> anyhow::Result<(Card, Vec<PCM>)> {
    let name = Ctl::new(CONTROL, false).and_then(|ctl| Ok(ctl.card_info()?.get_longname()?.to_owned()));
    let (mut streams, mut open) = (Vec::new(), Vec::new());
    let devices = [(found.playback, PLAYBACK, Direction::Playback), (found.capture, CAPTURE, Direction::Capture)];
    for (_, name, direction) in devices.into_iter().filter(|(device, ..)| device.is_some()) {
        if let Some((info, pcm)) = stream(name, direction)? {
            streams.push(info);
            open.push(pcm);
        }
    }
    let card = Card { name: name.unwrap_or_else(|_| "sound card".into()), streams };
    if !card.is_sane() {
        bail!("the card {:?} has no stream in a format that can be passed on", card.name);
    }
    Ok((card, open))
}

/// What a PCM device can do; `None` if nothing that can be passed on.
fn stream(name: &str, direction: Direction) -> anyhow::Result<Option<(StreamInfo, PCM)>> {
    let pcm = PCM::new(name, alsa_direction(direction), true).with_context(|| format!("cannot open {name}"))?;
    let params = HwParams::any(&pcm).with_context(|| format!("cannot ask what {name} can do"))?;
    params.set_access(Access::RWInterleaved).with_context(|| format!("{name} cannot be written to"))?;
    let formats = Format::ALL.into_iter().filter(|format| params.test_format(alsa_format(*format)).is_ok());
    let channels = (1..=MAX_CHANNELS).filter(|n| params.test_channels((*n).into()).is_ok());
    let (formats, channels): (Vec<_>, Vec<_>) = (formats.collect(), channels.collect());
    drop(params);
    let rates = |format, channels| rates(&pcm, format, channels).unwrap_or(0);
    let offer = offer(&formats, &channels, rates).map(|(formats, rates, channels_min, channels_max)| StreamInfo {
        direction,
        formats,
        rates,
        channels_min,
        channels_max,
    });
    Ok(offer.filter(StreamInfo::is_sane).map(|info| (info, pcm)))
}

/// The rates of a format with so many channels.
fn rates(pcm: &PCM, format: Format, channels: u8) -> alsa::Result<u64> {
    let params = HwParams::any(pcm)?;
    params.set_access(Access::RWInterleaved)?;
    params.set_format(alsa_format(format))?;
    params.set_channels(channels.into())?;
    Ok(Rate::all().filter(|rate| params.test_rate(rate.hz()).is_ok()).map(Rate::bit).sum())
}

/// Formats, rates, fewest and most channels of which every combination works, as a guest takes an offer: many channels
/// go, then rates, then formats that have none. `rates` gives those of a format with so many channels.
fn offer(formats: &[Format], channels: &[u8], rates: impl Fn(Format, u8) -> u64) -> Option<(u64, u64, u8, u8)> {
    let of = |count: u8| formats.iter().map(|format| rates(*format, count)).collect::<Vec<u64>>();
    // Stereo is what everybody plays.
    let first = if channels.contains(&2) { 2 } else { *channels.first()? };
    let best = of(first);
    let usable = |other: &[u64]| best.iter().zip(other).all(|(best, other)| best & !other == 0);
    let works = |count: u8| channels.contains(&count) && usable(&of(count));
    let max = (first + 1..=MAX_CHANNELS).take_while(|count| works(*count)).last().unwrap_or(first);
    let min = (1..first).rev().take_while(|count| works(*count)).last().unwrap_or(first);
    let common = best.iter().filter(|rates| **rates != 0).fold(u64::MAX, |common, rates| common & rates);
    let bits = formats.iter().zip(&best).filter(|(_, rates)| **rates != 0).map(|(format, _)| format.bit()).sum();
    Some((bits, common, min, max)).filter(|_| bits != 0 && common != 0)
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

    const S: [Format; 2] = [Format::S16, Format::S32];

    #[test]
    fn what_is_offered_works_in_every_combination() {
        let stereo_and_mono = offer(&S, &[1, 2], |_, _| 0b1100);
        assert_eq!(stereo_and_mono, Some((S[0].bit() | S[1].bit(), 0b1100, 1, 2)));
        // A card for cinemas: 2, 4, 6 or 8 channels, the latter slowly.
        let even = offer(&S, &[2, 4, 6, 8], |_, channels| if channels > 4 { 0b100 } else { 0b1100 });
        assert_eq!(even, Some((S[0].bit() | S[1].bit(), 0b1100, 2, 2)));
        let three = offer(&S, &[2, 3, 4], |_, channels| if channels > 3 { 0b100 } else { 0b1100 });
        assert_eq!(three.map(|(.., min, max)| (min, max)), Some((2, 3)));
        let formats_differ = offer(&S, &[2], |format, _| if format == Format::S32 { 0b100 } else { 0b1100 });
        assert_eq!(formats_differ, Some((S[0].bit() | S[1].bit(), 0b100, 2, 2)));
        assert_eq!(offer(&S, &[2], |format, _| u64::from(format == Format::S16)), Some((S[0].bit(), 1, 2, 2)));
        assert_eq!(offer(&S, &[], |_, _| 1), None);
        assert_eq!(offer(&S, &[6], |_, _| 0), None);
    }

    #[test]
    fn a_card_is_there_with_its_control_device_and_one_that_plays_or_records() {
        let folder = std::env::temp_dir().join(format!("umbra-sound-{}", std::process::id()));
        assert_eq!(find(&folder), None);
        fs::create_dir(&folder).unwrap();
        let found = ["timer", "pcmC0D0p", "pcmC0D3p", "pcmC0D0c", "controlC0"].map(|name| {
            fs::write(folder.join(name), "").unwrap();
            find(&folder)
        });
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found, [None, None, None, None, Some(Found::USUAL)]);
    }

    #[test]
    fn device_names_are_taken_apart() {
        assert_eq!(pcm_name("pcmC0D13p"), Some((0, 13, Direction::Playback)));
        assert_eq!(pcm_name("pcmC1D0c"), Some((1, 0, Direction::Capture)));
        for other in ["controlC0", "timer", "pcmC0D0", "pcmCxD0p", "pcmC0p", "seq"] {
            assert_eq!(pcm_name(other), None);
        }
    }
}
