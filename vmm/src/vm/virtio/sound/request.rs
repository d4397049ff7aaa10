//! Control requests of a sound device, bytes to enum and answers to bytes (virtio 1.2, section 5.14.6). Pure.
//!
//! Invariant: a [`Request`] names only what the protocol has; whether the card has it is for the shadow. Nothing here
//! is larger than what was read, and an answer no larger than a card's [`MAX_STREAMS`] streams.

use umbra_shadow::sound::params::{MAX_CHANNELS, MAX_STREAMS};
use umbra_shadow::sound::{Card, Command, Direction, Format, Outcome, Params, Rate, Refusal, StreamId, StreamInfo};

/// Longest control request: `struct virtio_snd_pcm_set_params`.
pub const MAX_REQUEST: usize = 24;

const JACK_INFO: u32 = 1;
const PCM_INFO: u32 = 0x0100;
const PCM_SET_PARAMS: u32 = 0x0101;
const PCM_PREPARE: u32 = 0x0102;
const PCM_RELEASE: u32 = 0x0103;
const PCM_START: u32 = 0x0104;
const PCM_STOP: u32 = 0x0105;
const CHMAP_INFO: u32 = 0x0200;
const JACK_REMAP: u32 = 2;

/// Sizes of the structures that describe items, and of a query for them.
const JACK_BYTES: usize = 24;
const PCM_BYTES: usize = 32;
const CHMAP_BYTES: usize = 24;
const QUERY_BYTES: usize = 16;
const SET_PARAMS_BYTES: usize = 24;
const PCM_REQUEST_BYTES: usize = 8;

/// Jack types in `hda_reg_defconf` (High Definition Audio 1.0a, section 7.3.3.31): bits 20 to 23.
const LINE_OUT: u32 = 0;
const MICROPHONE: u32 = 0xA << 20;
/// Channel positions (`VIRTIO_SND_CHMAP_*`): mono, then the usual order of front, rear, centre and side pairs.
const MONO: u8 = 2;
const POSITIONS: [u8; 8] = [3, 4, 5, 6, 7, 8, 9, 10];
/// `VIRTIO_SND_CHMAP_NA`: a channel that is nowhere in particular.
const NO_POSITION: u8 = 1;

/// Codes of an answer (`enum virtio_snd_status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Ok = 0x8000,
    /// A request that is malformed or comes at the wrong time.
    BadMessage = 0x8001,
    /// Not offered.
    NotSupported = 0x8002,
    /// The card is gone.
    IoError = 0x8003,
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoSuchStream | Refusal::WrongState(_) => Self::BadMessage,
            Refusal::Unsupported => Self::NotSupported,
            Refusal::Dead => Self::IoError,
        }
    }
}

impl From<Outcome> for Status {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Ok => Self::Ok,
            Outcome::BadMessage => Self::BadMessage,
            Outcome::IoError => Self::IoError,
        }
    }
}

/// What a query describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// Jacks: one a stream.
    Jack,
    /// Streams.
    Pcm,
    /// Channel maps: one a stream.
    ChannelMap,
}

/// A range of items to describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// What to describe.
    pub item: Item,
    /// Index of the first item.
    pub start: u32,
    /// Number of items.
    pub count: u32,
    /// Bytes that the driver has for each.
    pub size: u32,
}

/// A control request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Describe items.
    Describe(Query),
    /// Change a stream.
    Stream(StreamId, Command),
}

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// The status to answer with.
    pub fn parse(bytes: &[u8]) -> Result<Self, Status> {
        let command = |command| Ok(Self::Stream(stream(exact(bytes, PCM_REQUEST_BYTES)?)?, command));
        let describe = |item| Ok(Self::Describe(query(item, exact(bytes, QUERY_BYTES)?)));
        match word(bytes, 0).ok_or(Status::BadMessage)? {
            JACK_INFO => describe(Item::Jack),
            PCM_INFO => describe(Item::Pcm),
            CHMAP_INFO => describe(Item::ChannelMap),
            PCM_PREPARE => command(Command::Prepare),
            PCM_RELEASE => command(Command::Release),
            PCM_START => command(Command::Start),
            PCM_STOP => command(Command::Stop),
            PCM_SET_PARAMS => {
                let bytes = exact(bytes, SET_PARAMS_BYTES)?;
                Ok(Self::Stream(stream(bytes)?, Command::SetParams(params(bytes)?)))
            }
            // No jack offers the feature.
            JACK_REMAP => Err(Status::NotSupported),
            _ => Err(Status::BadMessage),
        }
    }
}

fn exact(bytes: &[u8], length: usize) -> Result<&[u8], Status> {
    (bytes.len() == length).then_some(bytes).ok_or(Status::BadMessage)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

fn query(item: Item, bytes: &[u8]) -> Query {
    let field = |at| word(bytes, at).unwrap_or(0);
    Query { item, start: field(4), count: field(8), size: field(12) }
}

fn stream(bytes: &[u8]) -> Result<StreamId, Status> {
    let number = word(bytes, 4).ok_or(Status::BadMessage)?;
    u16::try_from(number).map(StreamId).map_err(|_| Status::BadMessage)
}

/// `buffer_bytes`, `period_bytes`, `features`, `channels`, `format`, `rate`.
fn params(bytes: &[u8]) -> Result<Params, Status> {
    let field = |at| word(bytes, at).ok_or(Status::BadMessage);
    let byte = |at: usize| bytes.get(at).copied().ok_or(Status::BadMessage);
    if field(16)? != 0 {
        // No stream offers a feature.
        return Err(Status::NotSupported);
    }
    let params = Params {
        buffer_bytes: field(8)?,
        period_bytes: field(12)?,
        channels: byte(20)?,
        format: Format::from_number(byte(21)?).ok_or(Status::NotSupported)?,
        rate: Rate::from_number(byte(22)?).ok_or(Status::NotSupported)?,
    };
    params.sizes_fit().then_some(params).ok_or(Status::BadMessage)
}

/// Describes what `query` asks for, in as many bytes an item as it says.
///
/// # Errors
/// The status to answer with.
pub fn describe(card: &Card, query: Query) -> Result<Vec<u8>, Status> {
    let (start, count) = (query.start as usize, query.count as usize);
    let end = start.checked_add(count).ok_or(Status::BadMessage)?;
    let streams = card.streams.get(start..end).filter(|s| s.len() <= MAX_STREAMS).ok_or(Status::BadMessage)?;
    let mut answer = Vec::new();
    for info in streams {
        let item = match query.item {
            Item::Jack => jack(info),
            Item::Pcm => pcm(info),
            Item::ChannelMap => channel_map(info),
        };
        if query.size as usize != item.len() {
            return Err(Status::BadMessage);
        }
        answer.extend_from_slice(&item);
    }
    Ok(answer)
}

fn jack(info: &StreamInfo) -> Vec<u8> {
    let kind = match info.direction {
        Direction::Playback => LINE_OUT,
        Direction::Capture => MICROPHONE,
    };
    let mut item = Vec::with_capacity(JACK_BYTES);
    // hda_fn_nid, features, hda_reg_defconf, hda_reg_caps; connected.
    for field in [0, 0, kind, 0] {
        item.extend_from_slice(&field.to_le_bytes());
    }
    item.push(1);
    item.resize(JACK_BYTES, 0);
    item
}

fn pcm(info: &StreamInfo) -> Vec<u8> {
    let mut item = Vec::with_capacity(PCM_BYTES);
    // hda_fn_nid, features.
    item.extend_from_slice(&[0; 8]);
    item.extend_from_slice(&info.formats.to_le_bytes());
    item.extend_from_slice(&info.rates.to_le_bytes());
    item.extend_from_slice(&[direction(info), info.channels_min, info.channels_max]);
    item.resize(PCM_BYTES, 0);
    item
}

fn channel_map(info: &StreamInfo) -> Vec<u8> {
    let mut item = Vec::with_capacity(CHMAP_BYTES);
    item.extend_from_slice(&[0; 4]);
    let channels = info.channels_max.min(MAX_CHANNELS);
    item.extend_from_slice(&[direction(info), channels]);
    for channel in 0..usize::from(channels) {
        let place = POSITIONS.get(channel).copied().unwrap_or(NO_POSITION);
        item.push(if channels == 1 { MONO } else { place });
    }
    item.resize(CHMAP_BYTES, 0);
    item
}

fn direction(info: &StreamInfo) -> u8 {
    match info.direction {
        Direction::Playback => 0,
        Direction::Capture => 1,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn card() -> Card {
        let info = StreamInfo {
            direction: Direction::Playback,
            formats: Format::S16.bit(),
            rates: Rate::from_hz(48_000).unwrap().bit() | Rate::from_hz(44_100).unwrap().bit(),
            channels_min: 1,
            channels_max: 2,
        };
        Card { name: "made up".into(), streams: vec![info, StreamInfo { direction: Direction::Capture, ..info }] }
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    #[test]
    fn parameters_as_linux_sends_them() {
        // 48 kHz, S16, stereo: 4 periods of 1920 bytes.
        let mut bytes = words(&[PCM_SET_PARAMS, 1, 7680, 1920, 0]);
        bytes.extend_from_slice(&[2, 5, 7, 0]);
        let Ok(Request::Stream(StreamId(1), Command::SetParams(params))) = Request::parse(&bytes) else {
            panic!("{:?}", Request::parse(&bytes));
        };
        assert_eq!((params.rate.hz(), params.channels, params.format), (48_000, 2, Format::S16));
        assert_eq!((params.buffer_bytes, params.period_bytes), (7680, 1920));
    }

    #[test]
    fn parameters_that_fit_no_card_are_refused() {
        let cases = [
            (7680, 1921, 0, [2, 5, 7, 0], Status::BadMessage),
            (7681, 1920, 0, [2, 5, 7, 0], Status::BadMessage),
            (0, 0, 0, [2, 5, 7, 0], Status::BadMessage),
            (u32::MAX, 1, 0, [1, 4, 7, 0], Status::BadMessage),
            (7680, 1920, 0, [0, 5, 7, 0], Status::BadMessage),
            (7680, 1920, 0, [2, 200, 7, 0], Status::NotSupported),
            (7680, 1920, 0, [2, 5, 200, 0], Status::NotSupported),
            (7680, 1920, 1, [2, 5, 7, 0], Status::NotSupported),
        ];
        for (buffer, period, features, rest, status) in cases {
            let mut bytes = words(&[PCM_SET_PARAMS, 0, buffer, period, features]);
            bytes.extend_from_slice(&rest);
            assert_eq!(Request::parse(&bytes), Err(status), "{buffer} {period} {features} {rest:?}");
        }
    }

    #[test]
    fn the_card_describes_itself() {
        let ask = |code, start, count, size| match Request::parse(&words(&[code, start, count, size])) {
            Ok(Request::Describe(query)) => describe(&card(), query),
            other => panic!("{other:?}"),
        };
        let pcm = ask(PCM_INFO, 0, 2, 32).unwrap();
        assert_eq!(pcm.len(), 64);
        assert_eq!(pcm[8..16], Format::S16.bit().to_le_bytes());
        assert_eq!((pcm[24], pcm[25], pcm[26]), (0, 1, 2));
        assert_eq!(pcm[32 + 24], 1, "the second captures");
        assert_eq!(ask(JACK_INFO, 0, 2, 24).unwrap()[16], 1, "connected");
        assert_eq!(ask(CHMAP_INFO, 1, 1, 24).unwrap()[4..8], [1, 2, 3, 4], "capture, two channels, left and right");
        assert_eq!(ask(PCM_INFO, 0, 0, 32), Ok(vec![]));
        for (start, count, size) in [(0, 3, 32), (2, 1, 32), (u32::MAX, u32::MAX, 32), (0, 1, 31), (0, 2, u32::MAX)] {
            assert_eq!(ask(PCM_INFO, start, count, size), Err(Status::BadMessage), "{start} {count} {size}");
        }
    }

    proptest! {
        /// Any bytes are a request within bounds or a refusal, and no answer is larger than the card.
        #[test]
        fn any_bytes_are_survived(
            code in prop::sample::select(vec![
                JACK_INFO, JACK_REMAP, PCM_INFO, PCM_SET_PARAMS, PCM_PREPARE, PCM_RELEASE, PCM_START, PCM_STOP, CHMAP_INFO, 0x300,
            ]),
            rest in prop::collection::vec(any::<u8>(), 0..32),
            cut in 0usize..40,
        ) {
            let mut bytes = code.to_le_bytes().to_vec();
            bytes.extend_from_slice(&rest);
            bytes.truncate(cut);
            match Request::parse(&bytes) {
                Ok(Request::Describe(query)) => {
                    if let Ok(answer) = describe(&card(), query) {
                        prop_assert!(answer.len() <= 2 * PCM_BYTES);
                    }
                }
                Ok(Request::Stream(_, Command::SetParams(params))) => prop_assert!(params.sizes_fit()),
                Ok(Request::Stream(..)) | Err(_) => {}
            }
        }
    }
}
