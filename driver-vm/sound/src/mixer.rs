//! Levels: cards power up muted. What plays is set to 0 dB, or as close below as it goes; the loops from inputs to
//! outputs are muted; what records is switched on at 0 dB. alsa-lib writes only what differs.

use alsa::Round;
use alsa::mixer::{Mixer, Selem, SelemChannelId};
use anyhow::Context;

use crate::config::CONTROL;

/// Names of controls that lead from an input, or a beeper, to the output.
const LOOPS: [&str; 10] = ["mic", "line in", "cd", "aux", "phone", "video", "beep", "loopback", "3d", "pc speaker"];
/// Boosts amplify beyond 0 dB.
const BOOST: &str = "boost";

/// Sets every control of the card.
pub fn set_levels() -> anyhow::Result<()> {
    let mixer = Mixer::new(CONTROL, false).context("cannot open the mixer")?;
    for element in mixer.iter() {
        let Some(control) = Selem::new(element) else { continue };
        let name = control.get_id().get_name().unwrap_or_default().to_lowercase();
        // A control that does not do as told is none that decides whether anything is heard: cards differ.
        let _ = if name.contains(BOOST) { lowest(&control) } else { set(&control, is_loop(&name)) };
    }
    Ok(())
}

fn is_loop(name: &str) -> bool {
    // "Line" alone is an input, "Line Out" is not.
    name == "line" || LOOPS.iter().any(|input| name.starts_with(input))
}

fn set(control: &Selem<'_>, mute: bool) -> alsa::Result<()> {
    if control.has_playback_switch() {
        control.set_playback_switch_all(i32::from(!mute))?;
    }
    if control.has_capture_switch() {
        control.set_capture_switch_all(1)?;
    }
    if control.has_playback_volume() {
        if mute {
            control.set_playback_volume_all(control.get_playback_volume_range().0)?;
        } else if has_zero(control.get_playback_db_range()) {
            control.set_playback_db_all(alsa::mixer::MilliBel(0), Round::Floor)?;
        } else {
            control.set_playback_volume_all(control.get_playback_volume_range().1)?;
        }
    }
    if control.has_capture_volume() {
        let (_, highest) = control.get_capture_volume_range();
        if has_zero(control.get_capture_db_range()) {
            control.set_capture_db_all(alsa::mixer::MilliBel(0), Round::Floor)?;
        } else {
            for channel in SelemChannelId::all().iter().filter(|c| control.has_capture_channel(**c)) {
                control.set_capture_volume(*channel, highest)?;
            }
        }
    }
    Ok(())
}

/// True if 0 dB is within a range; a range of nothing is a card that does not say.
fn has_zero((low, high): (alsa::mixer::MilliBel, alsa::mixer::MilliBel)) -> bool {
    low.0 < high.0 && low.0 <= 0 && high.0 >= 0
}

fn lowest(control: &Selem<'_>) -> alsa::Result<()> {
    if control.has_playback_volume() {
        control.set_playback_volume_all(control.get_playback_volume_range().0)?;
    }
    Ok(())
}
