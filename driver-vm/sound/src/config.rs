//! alsa-lib's configuration: three names of our own for the one card there is, instead of the distribution's files,
//! which take longer to read than the card takes to probe.

use std::fs;

use anyhow::Context;

use crate::card::Found;

/// Where the configuration is, for alsa-lib.
const PATH: &str = "/run/umbra-asound.conf";
/// Its names.
pub const PLAYBACK: &str = "playback";
pub const CAPTURE: &str = "capture";
pub const CONTROL: &str = "card";
/// Where dmix and dsnoop keep their socket: compiled into alsa-lib. The image has no such folder.
const SOCKETS: &str = "/tmp";
/// Keys of dmix's and dsnoop's shared memory; any will do in a VM of our own.
const DMIX_KEY: u32 = 0x756d_6201;
const DSNOOP_KEY: u32 = 0x756d_6202;

/// The name under which dmix and dsnoop open the card's timer, which wakes them.
const TIMER: &str = "timer.hw {
  @args [ CLASS SCLASS CARD DEV SUBDEV ]
  @args.CLASS { type integer }
  @args.SCLASS { type integer }
  @args.CARD { type integer }
  @args.DEV { type integer }
  @args.SUBDEV { type integer }
  type hw class $CLASS sclass $SCLASS card $CARD device $DEV subdevice $SUBDEV
}
";

/// Prepares all that can be before there is a card. To be called before alsa-lib is, and before there are threads.
pub fn prepare(guests: usize) -> anyhow::Result<()> {
    // SAFETY: there is one thread yet.
    unsafe { std::env::set_var("ALSA_CONFIG_PATH", PATH) };
    write(&Found::USUAL, guests)?;
    alsa::config::update().context("cannot read ALSA's configuration")?;
    Ok(())
}

/// Brings it in line with the card that came.
pub fn adapt(found: &Found, guests: usize) -> anyhow::Result<()> {
    if found.is_like(&Found::USUAL) {
        return Ok(());
    }
    write(found, guests)?;
    alsa::config::update_free_global().context("cannot forget ALSA's configuration")
}

/// Writes it, for `guests` guests: mixed by dmix where there are several.
fn write(found: &Found, guests: usize) -> anyhow::Result<()> {
    let Found { card, playback, capture } = found;
    let mut text = format!("ctl.{CONTROL} {{ type hw card {card} }}\n");
    for (name, device, shared) in [(PLAYBACK, playback, ("dmix", DMIX_KEY)), (CAPTURE, capture, ("dsnoop", DSNOOP_KEY))]
    {
        let Some(device) = device else { continue };
        if guests <= 1 {
            text += &format!("pcm.{name} {{ type hw card {card} device {device} }}\n");
            continue;
        }
        let (kind, key) = shared;
        text += &format!("pcm.{name}_card {{ type hw card {card} device {device} }}\n");
        // 48 kHz is the one rate that every card has; guests convert what else they play. 100 ms of buffer in
        // periods of 10 ms.
        text += &format!(
            "pcm.{name} {{ type {kind} ipc_key {key} slave {{ pcm \"{name}_card\" format S16_LE rate 48000 channels 2 \
             period_size 480 buffer_size 4800 }} }}\n"
        );
    }
    if guests > 1 {
        text += TIMER;
        fs::create_dir_all(SOCKETS).with_context(|| format!("cannot make {SOCKETS}"))?;
    }
    fs::write(PATH, text).with_context(|| format!("cannot write {PATH}"))
}
