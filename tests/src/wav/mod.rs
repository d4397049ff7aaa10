//! What a sound card played, judged from outside: the WAV file that the emulated card wrote.
//!
//! Only 16-bit PCM, which is what QEMU writes. A file whose header was never completed (the machine was ended hard)
//! is read to its end.

pub mod analysis;
pub mod picture;
pub mod song;
pub mod tone;

use std::path::{Path, PathBuf};

use thiserror::Error;

/// Errors of reading a WAV file.
#[derive(Debug, Error)]
pub enum WavError {
    /// It cannot be read.
    #[error("cannot read the recording {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is something else.
    #[error("{path} is no recording that can be judged: {what}")]
    Format {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// One sample of the left and right channel.
pub type Frame = [i16; 2];

/// A recording in stereo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wav {
    /// Frames a second.
    pub rate: u32,
    /// The frames.
    pub frames: Vec<Frame>,
}

impl Wav {
    /// Reads a file.
    ///
    /// # Errors
    /// When it is missing or none of the kind.
    pub fn read(path: &Path) -> Result<Self, WavError> {
        let bytes = std::fs::read(path).map_err(|source| WavError::Read { path: path.into(), source })?;
        Self::parse(&bytes).map_err(|what| WavError::Format { path: path.into(), what })
    }

    fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        let (riff, mut rest) = bytes.split_at_checked(12).ok_or("it is too short")?;
        if !riff.starts_with(b"RIFF") || !riff.ends_with(b"WAVE") {
            return Err("it is no WAV file");
        }
        let (mut rate, mut channels) = (0, 0);
        while let Some((head, body)) = rest.split_at_checked(8) {
            let size = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
            if head.starts_with(b"data") {
                // A size of 0, or one past the end, is a header that was not completed.
                let data = if size == 0 { body } else { &body[..size.min(body.len())] };
                return Ok(Self { rate, frames: frames(data, channels)? });
            }
            let body_of_chunk = body.get(..size).ok_or("a chunk is cut off")?;
            if head.starts_with(b"fmt ") && size >= 16 {
                channels = u16::from_le_bytes([body_of_chunk[2], body_of_chunk[3]]);
                rate = u32::from_le_bytes([body_of_chunk[4], body_of_chunk[5], body_of_chunk[6], body_of_chunk[7]]);
                if u16::from_le_bytes([body_of_chunk[14], body_of_chunk[15]]) != 16 {
                    return Err("its samples are not 16 bits wide");
                }
            }
            rest = body.get(size.next_multiple_of(2)..).unwrap_or_default();
        }
        Err("it has no samples")
    }

    /// Writes a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let size = u32::try_from(self.frames.len() * 4).map_err(std::io::Error::other)?;
        let mut bytes = Vec::with_capacity(44 + self.frames.len() * 4);
        bytes.extend_from_slice(b"RIFF");
        bytes.extend_from_slice(&(36 + size).to_le_bytes());
        bytes.extend_from_slice(b"WAVEfmt ");
        // Length of the chunk, PCM, two channels; bytes a second and a frame; bits a sample.
        bytes.extend_from_slice(&16u32.to_le_bytes());
        bytes.extend([1u16, 2].into_iter().flat_map(u16::to_le_bytes));
        bytes.extend([self.rate, self.rate * 4].into_iter().flat_map(u32::to_le_bytes));
        bytes.extend([4u16, 16].into_iter().flat_map(u16::to_le_bytes));
        bytes.extend_from_slice(b"data");
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend(self.frames.iter().flatten().flat_map(|sample| sample.to_le_bytes()));
        std::fs::write(path, bytes)
    }

    /// Seconds of `frames` frames.
    pub fn seconds(&self, frames: usize) -> f64 {
        frames as f64 / f64::from(self.rate.max(1))
    }
}

fn frames(data: &[u8], channels: u16) -> Result<Vec<Frame>, &'static str> {
    let sample = |bytes: &[u8], n: usize| i16::from_le_bytes([bytes[2 * n], bytes[2 * n + 1]]);
    match channels {
        1 => Ok(data.chunks_exact(2).map(|b| [sample(b, 0); 2]).collect()),
        2 => Ok(data.chunks_exact(4).map(|b| [sample(b, 0), sample(b, 1)]).collect()),
        _ => Err("it is neither mono nor stereo"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u32, samples: &[i16]) -> Vec<u8> {
        let mut bytes = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x02\0\x80\xbb\0\0\0\0\0\0\x04\0\x10\0data".to_vec();
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend(samples.iter().flat_map(|s| s.to_le_bytes()));
        bytes
    }

    #[test]
    fn a_file_is_read_with_or_without_its_size() {
        for size in [0, 8, u32::MAX] {
            let wav = Wav::parse(&file(size, &[1, -2, 3, -4])).unwrap();
            assert_eq!((wav.rate, wav.frames), (48_000, vec![[1, -2], [3, -4]]));
        }
        assert_eq!(Wav::parse(&file(4, &[1, -2, 3, -4])).unwrap().frames.len(), 1);
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let wav = Wav { rate: 44_100, frames: vec![[1, -2], [i16::MAX, i16::MIN]] };
        wav.write(&dir.path().join("a")).unwrap();
        assert_eq!(Wav::read(&dir.path().join("a")).unwrap(), wav);
    }

    #[test]
    fn other_files_are_refused() {
        for other in [&b"RIFF"[..], b"RIFF\0\0\0\0AVI xxxx", b"RIFF\0\0\0\0WAVEfmt \xff\0\0\0"] {
            Wav::parse(other).unwrap_err();
        }
    }
}
