//! What a PCM stream can be and is: sample formats, rates, channels, period and buffer.
//!
//! Numbers of formats and rates are virtio's (virtio 1.2, section 5.14.6.6.2), in masks and on the wire. Only
//! linear formats are known here: a silent sample of each must be known, and its size.

use serde::{Deserialize, Serialize};

/// Largest buffer that a stream may ask for, in bytes: what Linux asks for at 8 channels, 32 bits and 192 kHz
/// fits in four times. Bounds what a guest can make the host keep: no more than that waits of a stream, however large its own buffer.
pub const MAX_BUFFER_BYTES: u32 = 4 << 20;

/// Most channels of a stream: what virtio's channel maps can name.
pub const MAX_CHANNELS: u8 = 18;

/// Most streams of a card: a bound against a driver VM that reports an absurd card.
pub const MAX_STREAMS: usize = 8;

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// Which way samples flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the guest to the card.
    Playback,
    /// From the card to the guest.
    Capture,
}

/// A linear sample format, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Unsigned 8 bits.
    U8,
    /// Signed 16 bits.
    S16,
    /// Signed 24 bits in three bytes.
    S24In3,
    /// Signed 24 bits in the low bits of four bytes.
    S24,
    /// Signed 32 bits.
    S32,
    /// 32-bit floating point, -1 to 1.
    Float,
}

impl Format {
    /// Every format, in the order of preference of a card's first look.
    pub const ALL: [Self; 6] = [Self::U8, Self::S16, Self::S24In3, Self::S24, Self::S32, Self::Float];

    /// virtio's number (`VIRTIO_SND_PCM_FMT_*`).
    pub fn number(self) -> u8 {
        match self {
            Self::U8 => 4,
            Self::S16 => 5,
            Self::S24In3 => 11,
            Self::S24 => 15,
            Self::S32 => 17,
            Self::Float => 19,
        }
    }

    /// The format with virtio's number `number`.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.number() == number)
    }

    /// Its bit in a mask of formats.
    pub fn bit(self) -> u64 {
        1 << self.number()
    }

    /// Bytes of one sample of one channel.
    pub fn sample_bytes(self) -> u32 {
        match self {
            Self::U8 => 1,
            Self::S16 => 2,
            Self::S24In3 => 3,
            Self::S24 | Self::S32 | Self::Float => 4,
        }
    }

    /// The byte that silence is made of.
    pub fn silence(self) -> u8 {
        match self {
            Self::U8 => 0x80,
            _ => 0,
        }
    }
}

/// A sample rate, by virtio's number (`VIRTIO_SND_PCM_RATE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u8);

impl Rate {
    /// The rates in Hz, at virtio's numbers.
    const HZ: [u32; 14] =
        [5512, 8000, 11025, 16000, 22050, 32000, 44100, 48000, 64000, 88200, 96000, 176_400, 192_000, 384_000];

    /// Every rate.
    pub fn all() -> impl Iterator<Item = Self> {
        (0u8..).take(Self::HZ.len()).map(Self)
    }

    /// The rate with virtio's number `number`.
    pub fn from_number(number: u8) -> Option<Self> {
        (usize::from(number) < Self::HZ.len()).then_some(Self(number))
    }

    /// The rate of `hz` samples a second.
    pub fn from_hz(hz: u32) -> Option<Self> {
        Self::all().find(|rate| rate.hz() == hz)
    }

    /// virtio's number.
    pub fn number(self) -> u8 {
        self.0
    }

    /// Its bit in a mask of rates.
    pub fn bit(self) -> u64 {
        1 << self.0
    }

    /// Samples a second.
    pub fn hz(self) -> u32 {
        Self::HZ[usize::from(self.0)]
    }
}

/// What one stream of a card can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamInfo {
    /// Which way it goes.
    pub direction: Direction,
    /// Mask of [`Format::bit`].
    pub formats: u64,
    /// Mask of [`Rate::bit`].
    pub rates: u64,
    /// Fewest channels.
    pub channels_min: u8,
    /// Most channels.
    pub channels_max: u8,
}

impl StreamInfo {
    /// True if a guest can use such a stream at all: at least one known format, rate and number of channels.
    pub fn is_sane(&self) -> bool {
        let formats: u64 = Format::ALL.iter().map(|f| f.bit()).sum();
        let rates: u64 = Rate::all().map(Rate::bit).sum();
        self.formats != 0
            && self.formats & !formats == 0
            && self.rates != 0
            && self.rates & !rates == 0
            && self.channels_min > 0
            && self.channels_min <= self.channels_max
            && self.channels_max <= MAX_CHANNELS
    }

    /// True if a stream of this kind does all that `other` does.
    pub fn covers(&self, other: &Self) -> bool {
        self.direction == other.direction
            && other.formats & !self.formats == 0
            && other.rates & !self.rates == 0
            && self.channels_min <= other.channels_min
            && self.channels_max >= other.channels_max
    }
}

/// A card as its driver VM reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// The card's name, for people.
    pub name: String,
    /// Its streams; the index is the stream's number.
    pub streams: Vec<StreamInfo>,
}

impl Card {
    /// True if it has streams, not too many, and each is usable.
    pub fn is_sane(&self) -> bool {
        !self.streams.is_empty() && self.streams.len() <= MAX_STREAMS && self.streams.iter().all(StreamInfo::is_sane)
    }

    /// True if this card can stand in for `other`.
    pub fn covers(&self, other: &Self) -> bool {
        self.streams.len() >= other.streams.len()
            && self.streams.iter().zip(&other.streams).all(|(new, old)| new.covers(old))
    }
}

/// The parameters that a stream runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Sample format.
    pub format: Format,
    /// Sample rate.
    pub rate: Rate,
    /// Channels.
    pub channels: u8,
    /// Bytes of a period.
    pub period_bytes: u32,
    /// Bytes of the guest's buffer: a multiple of the period.
    pub buffer_bytes: u32,
}

impl Params {
    /// True if a stream of kind `info` can run so, and the sizes fit each other.
    pub fn fit(&self, info: &StreamInfo) -> bool {
        info.formats & self.format.bit() != 0
            && info.rates & self.rate.bit() != 0
            && (info.channels_min..=info.channels_max).contains(&self.channels)
            && self.sizes_fit()
    }

    /// True if the buffer holds whole periods and the period whole frames, within [`MAX_BUFFER_BYTES`].
    pub fn sizes_fit(&self) -> bool {
        self.channels > 0
            && self.channels <= MAX_CHANNELS
            && self.period_bytes > 0
            && self.period_bytes.is_multiple_of(self.frame_bytes())
            && self.buffer_bytes > 0
            && self.buffer_bytes.is_multiple_of(self.period_bytes)
            && self.buffer_bytes <= MAX_BUFFER_BYTES
    }

    /// Bytes of a frame: one sample of each channel.
    pub fn frame_bytes(&self) -> u32 {
        self.format.sample_bytes() * u32::from(self.channels)
    }

    /// Frames in `bytes` bytes, rounded down.
    pub fn frames(&self, bytes: usize) -> u64 {
        bytes as u64 / u64::from(self.frame_bytes())
    }

    /// Bytes of `frames` frames.
    pub fn bytes(&self, frames: u64) -> usize {
        usize::try_from(frames.saturating_mul(u64::from(self.frame_bytes()))).unwrap_or(usize::MAX)
    }

    /// Frames of a period.
    pub fn period_frames(&self) -> u64 {
        self.frames(self.period_bytes as usize)
    }

    /// How long `frames` frames last, in nanoseconds, rounded up: after that time they are over.
    pub fn nanos(&self, frames: u64) -> u64 {
        let nanos = (u128::from(frames) * NANOS_PER_SECOND).div_ceil(u128::from(self.rate.hz()));
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }

    /// How long the guest's buffer lasts, in nanoseconds.
    pub fn buffer_nanos(&self) -> u64 {
        self.nanos(self.frames(self.buffer_bytes as usize))
    }

    /// Frames that pass in `nanos` nanoseconds, rounded down.
    pub fn frames_in(&self, nanos: u64) -> u64 {
        let frames = u128::from(nanos) * u128::from(self.rate.hz()) / NANOS_PER_SECOND;
        u64::try_from(frames).unwrap_or(u64::MAX)
    }

    /// Silence for `bytes` bytes.
    pub fn silence(&self, bytes: usize) -> Vec<u8> {
        vec![self.format.silence(); bytes]
    }
}
