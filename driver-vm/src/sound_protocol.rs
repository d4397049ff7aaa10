//! The sound protocol: binary messages over the virtio-console ports [`SOUND_PORT`]`.N`, one port a guest device.
//!
//! A message is a header of [`HEADER_BYTES`] and a body of at most [`MAX_BODY`] bytes, all little-endian: length of the
//! body (4 bytes), kind (1), zero (1), stream (2), generation (4), epoch (4). Invariant: what [`decode`] gives back has
//! every field in range; a message that has not is an error, and ends the link. Whether it is true is for the shadow
//! to judge. Samples longer than a message are split by [`encode`].

use thiserror::Error;
use umbra_shadow::Generation;
use umbra_shadow::sound::params::{MAX_CHANNELS, MAX_STREAMS};
use umbra_shadow::sound::{Card, Direction, Epoch, Format, FromCard, Params, Rate, StreamId, StreamInfo, ToCard};

/// Names of the virtio-console ports that carry this protocol begin so; the index of the guest's end follows.
pub const SOUND_PORT: &str = "org.umbra.sound";

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;

/// Largest body: a twentieth of a second of the fattest stream; bounds what a receiver must buffer.
pub const MAX_BODY: usize = 64 * 1024;

/// Longest name of a card, in bytes.
pub const MAX_NAME: usize = 80;

const SET_PARAMS: u8 = 1;
const PREPARE: u8 = 2;
const PLAY: u8 = 3;
const START: u8 = 4;
const STOP: u8 = 5;
const RELEASE: u8 = 6;
const CARD: u8 = 0x81;
const POSITION: u8 = 0x82;
const CAPTURED: u8 = 0x83;
const XRUN: u8 = 0x84;
const FAILED: u8 = 0x85;

/// Bytes of one stream in a `CARD` body.
const STREAM_BYTES: usize = 20;
/// Bytes of a `SET_PARAMS` body.
const PARAMS_BYTES: usize = 12;

/// What the sound service of a driver VM sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromService {
    /// First message: the card is there, and this is what it can do.
    Card(Card),
    /// About a stream.
    Stream(FromCard),
    /// The card cannot be used; the sentence says why. The driver VM counts as failed.
    Failed(String),
}

/// A message that is none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// Longer than any message.
    #[error("a message of {0} bytes (limit {MAX_BODY})")]
    TooLong(u32),
    /// No such kind, in this direction.
    #[error("a message of unknown kind {0:#x}")]
    UnknownKind(u8),
    /// The body does not fit the kind, or a field is out of range.
    #[error("a {kind} message with a wrong {field}")]
    Field {
        /// Which message.
        kind: &'static str,
        /// Which field.
        field: &'static str,
    },
    /// A generation that is none or another one.
    #[error("a message of generation {0}")]
    Generation(u32),
}

/// One message, taken apart but for its body.
#[derive(Clone, Copy, Debug)]
struct Raw<'a> {
    kind: u8,
    stream: StreamId,
    epoch: Epoch,
    body: &'a [u8],
}

/// Takes the next message off the front of `buffer`: the message and its length, or `None` while it is incomplete.
fn split(buffer: &[u8], generation: Generation) -> Result<Option<(Raw<'_>, usize)>, ProtocolError> {
    let Some(header) = buffer.get(..HEADER_BYTES) else { return Ok(None) };
    let length = u32::from_le_bytes(array(header, 0));
    let body_bytes = usize::try_from(length).ok().filter(|l| *l <= MAX_BODY).ok_or(ProtocolError::TooLong(length))?;
    let from = u32::from_le_bytes(array(header, 8));
    if from != generation.get() {
        return Err(ProtocolError::Generation(from));
    }
    if header[5] != 0 {
        return Err(ProtocolError::Field { kind: "any", field: "reserved byte" });
    }
    let end = HEADER_BYTES + body_bytes;
    let Some(body) = buffer.get(HEADER_BYTES..end) else { return Ok(None) };
    let stream = StreamId(u16::from_le_bytes(array(header, 6)));
    let epoch = Epoch(u32::from_le_bytes(array(header, 12)));
    Ok(Some((Raw { kind: header[4], stream, epoch, body }, end)))
}

/// `N` bytes of `bytes` from `at`; zeros past its end.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    for (to, from) in array.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    array
}

fn header(buffer: &mut Vec<u8>, kind: u8, stream: StreamId, generation: Generation, epoch: Epoch, body: &[u8]) {
    // Bodies are built here and split to fit: at most MAX_BODY bytes.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(&[kind, 0]);
    buffer.extend_from_slice(&stream.0.to_le_bytes());
    buffer.extend_from_slice(&generation.get().to_le_bytes());
    buffer.extend_from_slice(&epoch.0.to_le_bytes());
    buffer.extend_from_slice(body);
}

/// Appends a message of the host to `buffer`.
pub fn encode(message: &ToCard, generation: Generation, buffer: &mut Vec<u8>) {
    let none = Epoch(0);
    match message {
        ToCard::SetParams { stream, params } => {
            let mut body = Vec::with_capacity(PARAMS_BYTES);
            body.extend_from_slice(&[params.format.number(), params.rate.number(), params.channels, 0]);
            body.extend_from_slice(&params.period_bytes.to_le_bytes());
            body.extend_from_slice(&params.buffer_bytes.to_le_bytes());
            header(buffer, SET_PARAMS, *stream, generation, none, &body);
        }
        ToCard::Prepare { stream, epoch } => header(buffer, PREPARE, *stream, generation, *epoch, &[]),
        ToCard::Play { stream, epoch, samples } => {
            for part in samples.chunks(MAX_BODY) {
                header(buffer, PLAY, *stream, generation, *epoch, part);
            }
        }
        ToCard::Start { stream } => header(buffer, START, *stream, generation, none, &[]),
        ToCard::Stop { stream } => header(buffer, STOP, *stream, generation, none, &[]),
        ToCard::Release { stream } => header(buffer, RELEASE, *stream, generation, none, &[]),
    }
}

/// Appends a message of the service to `buffer`.
pub fn encode_service(message: &FromService, generation: Generation, buffer: &mut Vec<u8>) {
    let nothing = (StreamId(0), Epoch(0));
    match message {
        FromService::Card(card) => header(buffer, CARD, nothing.0, generation, nothing.1, &card_body(card)),
        FromService::Failed(what) => {
            let text = &what.as_bytes()[..what.len().min(MAX_BODY)];
            header(buffer, FAILED, nothing.0, generation, nothing.1, text);
        }
        FromService::Stream(FromCard::Position { stream, epoch, heard }) => {
            header(buffer, POSITION, *stream, generation, *epoch, &heard.to_le_bytes());
        }
        FromService::Stream(FromCard::Captured { stream, epoch, samples }) => {
            for part in samples.chunks(MAX_BODY) {
                header(buffer, CAPTURED, *stream, generation, *epoch, part);
            }
        }
        FromService::Stream(FromCard::Xrun { stream, epoch }) => {
            header(buffer, XRUN, *stream, generation, *epoch, &[]);
        }
    }
}

fn card_body(card: &Card) -> Vec<u8> {
    let mut name = card.name.as_bytes();
    while name.len() > MAX_NAME || std::str::from_utf8(name).is_err() {
        name = &name[..name.len() - 1];
    }
    let mut body = vec![u8::try_from(name.len()).unwrap_or(0)];
    body.extend_from_slice(name);
    for info in card.streams.iter().take(MAX_STREAMS) {
        body.extend_from_slice(&info.formats.to_le_bytes());
        body.extend_from_slice(&info.rates.to_le_bytes());
        let direction = u8::from(info.direction == Direction::Capture);
        body.extend_from_slice(&[direction, info.channels_min, info.channels_max, 0]);
    }
    body
}

/// Takes the next message of the service off the front of `buffer`: the message and how many bytes it took;
/// `None` while it is incomplete.
///
/// # Errors
/// When it is no message of a service of `generation`.
pub fn decode_service(buffer: &[u8], generation: Generation) -> Result<Option<(FromService, usize)>, ProtocolError> {
    let Some((raw, length)) = split(buffer, generation)? else { return Ok(None) };
    let (stream, epoch) = (raw.stream, raw.epoch);
    let message = match raw.kind {
        CARD => FromService::Card(card(raw.body)?),
        POSITION => {
            let heard = u64::from_le_bytes(exact(raw.body, "position")?);
            FromService::Stream(FromCard::Position { stream, epoch, heard })
        }
        CAPTURED => {
            if raw.body.is_empty() {
                return Err(ProtocolError::Field { kind: "captured", field: "length" });
            }
            FromService::Stream(FromCard::Captured { stream, epoch, samples: raw.body.to_vec() })
        }
        XRUN => {
            exact::<0>(raw.body, "xrun")?;
            FromService::Stream(FromCard::Xrun { stream, epoch })
        }
        FAILED => FromService::Failed(printable(raw.body)),
        kind => return Err(ProtocolError::UnknownKind(kind)),
    };
    Ok(Some((message, length)))
}

/// Takes the next message of the host off the front of `buffer`, as [`decode_service`].
///
/// # Errors
/// When it is no message of a host to `generation`.
pub fn decode(buffer: &[u8], generation: Generation) -> Result<Option<(ToCard, usize)>, ProtocolError> {
    let Some((raw, length)) = split(buffer, generation)? else { return Ok(None) };
    let (stream, epoch) = (raw.stream, raw.epoch);
    let empty = |kind| exact::<0>(raw.body, kind).map(|_| ());
    let message = match raw.kind {
        SET_PARAMS => ToCard::SetParams { stream, params: params(raw.body)? },
        PREPARE => {
            empty("prepare")?;
            ToCard::Prepare { stream, epoch }
        }
        PLAY => ToCard::Play { stream, epoch, samples: raw.body.to_vec() },
        START => {
            empty("start")?;
            ToCard::Start { stream }
        }
        STOP => {
            empty("stop")?;
            ToCard::Stop { stream }
        }
        RELEASE => {
            empty("release")?;
            ToCard::Release { stream }
        }
        kind => return Err(ProtocolError::UnknownKind(kind)),
    };
    Ok(Some((message, length)))
}

fn exact<const N: usize>(body: &[u8], kind: &'static str) -> Result<[u8; N], ProtocolError> {
    body.try_into().map_err(|_| ProtocolError::Field { kind, field: "length" })
}

fn params(body: &[u8]) -> Result<Params, ProtocolError> {
    let wrong = |field| ProtocolError::Field { kind: "parameters", field };
    let bytes: [u8; PARAMS_BYTES] = exact(body, "parameters")?;
    let params = Params {
        format: Format::from_number(bytes[0]).ok_or(wrong("format"))?,
        rate: Rate::from_number(bytes[1]).ok_or(wrong("rate"))?,
        channels: bytes[2],
        period_bytes: u32::from_le_bytes(array(&bytes, 4)),
        buffer_bytes: u32::from_le_bytes(array(&bytes, 8)),
    };
    if !params.sizes_fit() {
        return Err(wrong("size"));
    }
    Ok(params)
}

fn card(body: &[u8]) -> Result<Card, ProtocolError> {
    let wrong = |field| ProtocolError::Field { kind: "card", field };
    let (&length, rest) = body.split_first().ok_or(wrong("length"))?;
    let (name, streams) = rest.split_at_checked(usize::from(length)).ok_or(wrong("name"))?;
    if name.len() > MAX_NAME {
        return Err(wrong("name"));
    }
    if !streams.len().is_multiple_of(STREAM_BYTES) || streams.len() > MAX_STREAMS * STREAM_BYTES {
        return Err(wrong("number of streams"));
    }
    let streams = streams.chunks_exact(STREAM_BYTES).map(|chunk| {
        let direction = match chunk[16] {
            0 => Direction::Playback,
            1 => Direction::Capture,
            _ => return Err(wrong("direction")),
        };
        let (formats, rates) = (u64::from_le_bytes(array(chunk, 0)), u64::from_le_bytes(array(chunk, 8)));
        Ok(StreamInfo { direction, formats, rates, channels_min: chunk[17], channels_max: chunk[18] })
    });
    let card = Card { name: printable(name), streams: streams.collect::<Result<_, _>>()? };
    if !card.is_sane() || card.streams.iter().any(|s| s.channels_max > MAX_CHANNELS) {
        return Err(wrong("stream"));
    }
    Ok(card)
}

/// Text of a driver VM as it may go to a log or a terminal.
fn printable(bytes: &[u8]) -> String {
    const LONGEST: usize = 400;
    let text = String::from_utf8_lossy(bytes);
    text.chars().take(LONGEST).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn generation() -> Generation {
        Generation::new(3).unwrap()
    }

    fn a_card() -> Card {
        let info = StreamInfo {
            direction: Direction::Capture,
            formats: Format::S16.bit() | Format::S32.bit(),
            rates: Rate::from_hz(44_100).unwrap().bit(),
            channels_min: 2,
            channels_max: 2,
        };
        Card {
            name: "HDA Intel – PCH".into(),
            streams: vec![StreamInfo { direction: Direction::Playback, ..info }, info],
        }
    }

    fn host_messages() -> Vec<ToCard> {
        let (stream, epoch) = (StreamId(1), Epoch(77));
        let params = Params {
            format: Format::S24In3,
            rate: Rate::from_hz(96_000).unwrap(),
            channels: 6,
            period_bytes: 1800,
            buffer_bytes: 7200,
        };
        vec![
            ToCard::SetParams { stream, params },
            ToCard::Prepare { stream, epoch },
            ToCard::Play { stream, epoch, samples: (0..200).collect() },
            ToCard::Start { stream },
            ToCard::Stop { stream },
            ToCard::Release { stream },
        ]
    }

    fn service_messages() -> Vec<FromService> {
        let (stream, epoch) = (StreamId(0), Epoch(9));
        vec![
            FromService::Card(a_card()),
            FromService::Stream(FromCard::Position { stream, epoch, heard: 1 << 40 }),
            FromService::Stream(FromCard::Captured { stream, epoch, samples: vec![3; 100] }),
            FromService::Stream(FromCard::Xrun { stream, epoch }),
            FromService::Failed("no card".into()),
        ]
    }

    #[test]
    fn messages_come_back_as_they_went_one_by_one() {
        let mut buffer = Vec::new();
        for message in host_messages() {
            encode(&message, generation(), &mut buffer);
        }
        for message in host_messages() {
            let (decoded, length) = decode(&buffer, generation()).unwrap().unwrap();
            assert_eq!(decoded, message);
            buffer.drain(..length);
        }
        for message in service_messages() {
            encode_service(&message, generation(), &mut buffer);
        }
        for message in service_messages() {
            let (decoded, length) = decode_service(&buffer, generation()).unwrap().unwrap();
            assert_eq!(decoded, message);
            buffer.drain(..length);
        }
        assert!(buffer.is_empty());
    }

    #[test]
    fn long_samples_are_split() {
        let samples: Vec<u8> = (0..=255).cycle().take(3 * MAX_BODY + 5).collect();
        let mut buffer = Vec::new();
        let play = ToCard::Play { stream: StreamId(0), epoch: Epoch(1), samples: samples.clone() };
        encode(&play, generation(), &mut buffer);
        let mut seen = Vec::new();
        while let Some((ToCard::Play { samples, .. }, length)) = decode(&buffer, generation()).unwrap() {
            seen.extend(samples);
            buffer.drain(..length);
        }
        assert_eq!(seen, samples);
    }

    #[test]
    fn another_generation_is_refused() {
        let mut buffer = Vec::new();
        encode(&ToCard::Start { stream: StreamId(0) }, Generation::FIRST, &mut buffer);
        assert_eq!(decode(&buffer, generation()), Err(ProtocolError::Generation(1)));
    }

    #[test]
    fn a_length_without_bound_is_refused_before_its_body_comes() {
        let header = [0xff, 0xff, 0xff, 0x7f, PLAY, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(decode(&header, generation()), Err(ProtocolError::TooLong(0x7fff_ffff)));
    }

    proptest! {
        /// Any bytes are a message within bounds, none yet, or an error; never a panic.
        #[test]
        fn any_bytes_are_survived(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in any::<u8>(), fit in any::<bool>()) {
            if fit && bytes.len() >= HEADER_BYTES {
                let body = u32::try_from(bytes.len() - HEADER_BYTES).unwrap();
                bytes[..4].copy_from_slice(&body.to_le_bytes());
                bytes[4..6].copy_from_slice(&[[1, 2, 3, 4, 5, 6, 0x81, 0x82, 0x83, 0x84, 0x85][usize::from(kind) % 11], 0]);
                bytes[8..12].copy_from_slice(&3u32.to_le_bytes());
            }
            if let Ok(Some((message, length))) = decode_service(&bytes, generation()) {
                prop_assert!(length <= bytes.len());
                if let FromService::Card(card) = message {
                    prop_assert!(card.is_sane());
                }
            }
            if let Ok(Some((ToCard::SetParams { params, .. }, _))) = decode(&bytes, generation()) {
                prop_assert!(params.sizes_fit());
            }
        }
    }
}
