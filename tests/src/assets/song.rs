//! Songs to play: encoded by lame, with what mpg123 makes of them, to compare recordings with.
//!
//! A song has a length, or it goes on for as long as it is fed: then it is cut into pieces of whole frames of MPEG audio (ISO
//! 11172-3, 2.4.1) that a feeder hands to the player one after the other, round after round. No frame uses bits of the one
//! before it (`--nores`), and the song's last frame is encoded beside its first, so that a round ends without a seam.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use umbra_guest_images::cache::{Cache, sha256};
use umbra_guest_images::initramfs::Initramfs;

use super::AssetError;
use super::sound::{PLAYER_COMMAND, failed, run};
use crate::wav::{Wav, song::song};

/// Bits a second, thousands.
const KBIT_S: u32 = 128;
/// Samples of a frame of layer III.
const FRAME_SAMPLES: usize = 1152;
/// Frames of a piece: 2 s at 44.1 kHz.
const PIECE_FRAMES: usize = 77;
/// Frames before the round that is cut out: the encoder begins with silence.
const LEAD_FRAMES: usize = 16;
/// Frames behind it, which the encoder looks ahead to.
const TAIL_FRAMES: usize = 16;
/// Folder of the pieces in a guest.
pub const PIECES_INSIDE: &str = "/song";

/// A song as a file to play, and as it should be heard.
#[derive(Clone, Debug)]
pub struct Song {
    /// An archive with `/song.mp3`, or with pieces in [`PIECES_INSIDE`], to be put behind an initramfs.
    pub archive: PathBuf,
    /// What an undisturbed card plays; of a song in pieces, one round.
    pub reference: PathBuf,
    /// The pieces, in order; none of a song with a length.
    pub pieces: Vec<PathBuf>,
}

impl Song {
    /// This song in pieces as it is heard when `count` of them have been played; its reference is written to `reference`.
    ///
    /// # Errors
    /// It cannot be decoded.
    pub fn played(&self, count: usize, reference: &Path) -> Result<Self, AssetError> {
        decode(self.pieces.iter().cycle().take(count), reference)?;
        Ok(Self { reference: reference.into(), ..self.clone() })
    }
}

fn key(rate: u32, seconds: u32) -> String {
    let made_of = format!("{}{}", include_str!("../wav/song.rs"), include_str!("song.rs"));
    format!("{rate}-{seconds}-{}", &sha256(made_of.as_bytes())[..16])
}

/// `seconds` of the song at `rate`.
pub(super) fn make(cache: &Cache, rate: u32, seconds: u32) -> Result<Song, AssetError> {
    let dir = cache.dir("songs", &key(rate, seconds), |dir| {
        let (mp3, reference) = (dir.join("song.mp3"), dir.join("reference.wav"));
        encode(&song(rate, seconds), &[], &mp3)?;
        run(Command::new(PLAYER_COMMAND).args(["-q", "-w"]).arg(&reference).arg(&mp3))?;
        let mut archive = Initramfs::new();
        archive.add_host_file(&mp3, "song.mp3")?;
        write(&dir.join("song.cpio"), &archive.to_bytes()?)
    })?;
    checked(Song { archive: dir.join("song.cpio"), reference: dir.join("reference.wav"), pieces: Vec::new() })
}

/// A song at `rate` that repeats itself after `seconds` or a little less, in pieces.
pub(super) fn make_in_pieces(cache: &Cache, rate: u32, seconds: u32) -> Result<Song, AssetError> {
    let dir = cache.dir("songs", &format!("pieces-{}", key(rate, seconds)), |dir| {
        let mut round = song(rate, seconds).frames;
        round.truncate(round.len() / FRAME_SAMPLES * FRAME_SAMPLES);
        let count = round.len() / FRAME_SAMPLES;
        let more = (LEAD_FRAMES + TAIL_FRAMES) * FRAME_SAMPLES;
        let repeated = Wav { rate, frames: round.iter().cycle().take(round.len() + more).copied().collect() };
        let mp3 = dir.join("song.mp3");
        // No frame that tells of the others: a player would take it for sound in the middle of the stream.
        encode(&repeated, &["--cbr", "--nores", "-t"], &mp3)?;
        let bytes = fs::read(&mp3).map_err(|e| AssetError::file("read", &mp3, e))?;
        let frames = frames(&bytes, rate);
        let wrong = || AssetError::Program {
            command: format!("lame of {}", mp3.display()),
            what: format!("{} frames of MPEG audio came out, and {} are needed", frames.len(), count + LEAD_FRAMES),
        };
        let round = frames.get(LEAD_FRAMES..LEAD_FRAMES + count).ok_or_else(wrong)?;
        let mut archive = Initramfs::new();
        let mut pieces = Vec::new();
        for (n, piece) in round.chunks(PIECE_FRAMES).enumerate() {
            let (path, piece) = (dir.join(format!("piece-{n:04}.mp3")), piece.concat());
            archive.add_file(&format!("{PIECES_INSIDE}/{n:04}"), 0o644, piece.clone());
            write(&path, &piece)?;
            pieces.push(path);
        }
        decode(pieces.iter(), &dir.join("reference.wav"))?;
        write(&dir.join("song.cpio"), &archive.to_bytes()?)
    })?;
    let entries = fs::read_dir(&dir).map_err(|e| AssetError::file("list", &dir, e))?;
    let is_piece = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("piece-"));
    let mut pieces: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(is_piece).collect();
    pieces.sort();
    checked(Song { archive: dir.join("song.cpio"), reference: dir.join("reference.wav"), pieces })
}

/// A reference that is none would make every comparison fail, with a misleading story.
fn checked(song: Song) -> Result<Song, AssetError> {
    Wav::read(&song.reference)?;
    Ok(song)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), AssetError> {
    fs::write(path, bytes).map_err(|e| AssetError::file("write", path, e))
}

fn encode(wav: &Wav, options: &[&str], mp3: &Path) -> Result<(), AssetError> {
    let plain = mp3.with_extension("wav");
    wav.write(&plain).map_err(|e| AssetError::file("write", &plain, e))?;
    run(Command::new("lame").args(["--quiet", "-b", &KBIT_S.to_string()]).args(options).arg(&plain).arg(mp3))?;
    fs::remove_file(&plain).map_err(|e| AssetError::file("remove", &plain, e))
}

/// What the player makes of these pieces as one stream, as a recording.
fn decode<'a>(pieces: impl Iterator<Item = &'a PathBuf>, to: &Path) -> Result<(), AssetError> {
    let mut command = Command::new(PLAYER_COMMAND);
    command.args(["-q", "-w"]).arg(to).arg("-").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut player = command.spawn().map_err(|e| failed(&command, e.to_string()))?;
    if let Some(mut stream) = player.stdin.take() {
        for piece in pieces {
            let bytes = fs::read(piece).map_err(|e| AssetError::file("read", piece, e))?;
            stream.write_all(&bytes).map_err(|e| failed(&command, e.to_string()))?;
        }
    }
    let status = player.wait().map_err(|e| failed(&command, e.to_string()))?;
    if status.success() { Ok(()) } else { Err(failed(&command, status.to_string())) }
}

/// The frames of a stream of one bit rate and sample rate.
fn frames(stream: &[u8], rate: u32) -> Vec<&[u8]> {
    let mut rest = stream;
    let mut frames = Vec::new();
    while let Some(length) = frame_length(rest, rate) {
        let Some((frame, behind)) = rest.split_at_checked(length) else { break };
        frames.push(frame);
        rest = behind;
    }
    frames
}

/// Length of the frame of layer III of MPEG-1 that begins here, bytes (ISO 11172-3, 2.4.2.3 and 2.4.3.1).
fn frame_length(at: &[u8], rate: u32) -> Option<usize> {
    let header = at.get(..4)?;
    // The sync word, MPEG-1, layer III; with or without a checksum.
    if header[0] != 0xff || header[1] & 0xfe != 0xfa {
        return None;
    }
    let padding = header[2] >> 1 & 1;
    usize::try_from(144 * KBIT_S * 1000 / rate).ok().map(|length| length + usize::from(padding))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_found_by_their_headers() {
        // 417 bytes at 128 kbit/s and 44.1 kHz, 418 with padding.
        let mut stream = vec![0xff, 0xfb, 0x90, 0x00];
        stream.resize(417, 1);
        stream.extend([0xff, 0xfb, 0x92, 0x00]);
        stream.resize(417 + 418, 2);
        stream.extend([0xff, 0xfb, 0x90, 0x00, 3]);
        let lengths: Vec<_> = frames(&stream, 44_100).iter().map(|frame| frame.len()).collect();
        assert_eq!(lengths, [417, 418], "the last one is cut off");
        assert!(frames(b"no MPEG audio", 44_100).is_empty());
    }
}
