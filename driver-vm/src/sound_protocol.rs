//! The sound protocol: binary messages over the virtio-console ports [`SOUND_PORT`]`.N`, one port a guest device.
//!
//! A message is a header of [`HEADER_BYTES`] and a body of at most [`MAX_BODY`] bytes, all little-endian: length of the
//! body (4 bytes), kind (1), zero (1), stream (2), generation (4), attempt (4), epoch (4). Generation and attempt are the
//! [`LinkId`] of the session that the message belongs to. Invariant: what [`decode`] gives back has every field in range;
//! a message that has not is an error, and ends the link. Whether it is true is for the shadow to judge. Samples longer
//! than a message are split by [`encode`].
//!
//! A session begins with the host's [`FromHost::Begin`], the first message on its stream. The service answers it with
//! [`FromService::Card`] and says nothing before. A message of an earlier session of the same life is no error: it may
//! have waited in the driver VM's kernel. [`Taken::Earlier`] has it skipped, [`MAX_EARLIER_BYTES`] at most.

use thiserror::Error;
use umbra_shadow::sound::params::{MAX_CHANNELS, MAX_STREAMS};
use umbra_shadow::sound::{Card, Direction, Epoch, Format, FromCard, Params, Rate, StreamId, StreamInfo, ToCard};
use umbra_shadow::{Generation, LinkId};

/// Beginning of the names of the virtio-console ports that carry this protocol; the index of the guest's end follows.
pub const SOUND_PORT: &str = "org.umbra.sound";

/// Bytes of a header.
pub const HEADER_BYTES: usize = 20;

/// Largest body, in bytes: a twentieth of a second of the fattest stream; bounds what a receiver must buffer.
pub const MAX_BODY: usize = 64 * 1024;

/// Most bytes of earlier sessions that one session skips. A console port holds less: 128 requests of at most 32 KiB on
/// their way to the host, one more of 1 MiB in the VM's process, and a socket's buffer.
pub const MAX_EARLIER_BYTES: usize = 8 << 20;

/// Longest name of a card, in bytes.
pub const MAX_NAME: usize = 80;

const SET_PARAMS: u8 = 1;
const PREPARE: u8 = 2;
const PLAY: u8 = 3;
const START: u8 = 4;
const STOP: u8 = 5;
const RELEASE: u8 = 6;
const BEGIN: u8 = 7;
const CARD: u8 = 0x81;
const POSITION: u8 = 0x82;
const CAPTURED: u8 = 0x83;
const XRUN: u8 = 0x84;
const FAILED: u8 = 0x85;
const STUCK: u8 = 0x86;

/// Bytes of one stream in a `CARD` body.
const STREAM_BYTES: usize = 20;
/// Bytes of a `SET_PARAMS` body.
const PARAMS_BYTES: usize = 12;

/// What the host sends to a sound service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromHost {
    /// First message: a session begins, and whatever was of an earlier one at this port is over.
    Begin,
    /// About a stream.
    Stream(ToCard),
}

impl From<ToCard> for FromHost {
    fn from(message: ToCard) -> Self {
        Self::Stream(message)
    }
}

/// What was taken off the front of a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken<M> {
    /// A message of the session.
    Message(M),
    /// A message of an earlier session of the same life.
    Earlier,
}

/// What the sound service of a driver VM sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromService {
    /// The answer to [`FromHost::Begin`]: the card is there, and this is what it can do.
    Card(Card),
    /// About a stream.
    Stream(FromCard),
    /// The card cannot be used; the sentence says why. The driver VM counts as failed.
    Failed(String),
}

/// Why bytes are no message of the protocol.
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
    /// Of another life, or of a session that has not begun: generation and attempt.
    #[error("a message of session {0}.{1}")]
    Session(u32, u32),
}

/// One message, taken apart but for its body.
#[derive(Clone, Copy, Debug)]
struct Raw<'a> {
    kind: u8,
    stream: StreamId,
    attempt: u32,
    epoch: Epoch,
    body: &'a [u8],
}

/// Takes the next message off the front of `buffer`: the message and its length, or `None` while it is incomplete.
fn split(buffer: &[u8], generation: Generation) -> Result<Option<(Raw<'_>, usize)>, ProtocolError> {
    let Some(header) = buffer.get(..HEADER_BYTES) else { return Ok(None) };
    let length = u32::from_le_bytes(array(header, 0));
    let body_bytes = usize::try_from(length).ok().filter(|l| *l <= MAX_BODY).ok_or(ProtocolError::TooLong(length))?;
    let (from, attempt) = (u32::from_le_bytes(array(header, 8)), u32::from_le_bytes(array(header, 12)));
    if from != generation.get() || attempt == 0 {
        return Err(ProtocolError::Session(from, attempt));
    }
    if header[5] != 0 {
        return Err(ProtocolError::Field { kind: "any", field: "reserved byte" });
    }
    let end = HEADER_BYTES + body_bytes;
    let Some(body) = buffer.get(HEADER_BYTES..end) else { return Ok(None) };
    let stream = StreamId(u16::from_le_bytes(array(header, 6)));
    let epoch = Epoch(u32::from_le_bytes(array(header, 16)));
    Ok(Some((Raw { kind: header[4], stream, attempt, epoch, body }, end)))
}

/// `N` bytes of `bytes` from `at`; zeros past its end.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    for (to, from) in array.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    array
}

fn header(buffer: &mut Vec<u8>, link: LinkId, kind: u8, (stream, epoch): (StreamId, Epoch), body: &[u8]) {
    // Bodies are built here and split to fit: at most MAX_BODY bytes.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(&[kind, 0]);
    buffer.extend_from_slice(&stream.0.to_le_bytes());
    buffer.extend_from_slice(&link.generation.get().to_le_bytes());
    buffer.extend_from_slice(&link.attempt.to_le_bytes());
    buffer.extend_from_slice(&epoch.0.to_le_bytes());
    buffer.extend_from_slice(body);
}

/// Appends a message of the host's session `link` to `buffer`.
pub fn encode(message: &FromHost, link: LinkId, buffer: &mut Vec<u8>) {
    let none = Epoch(0);
    let FromHost::Stream(message) = message else { return header(buffer, link, BEGIN, (StreamId(0), none), &[]) };
    match message {
        ToCard::SetParams { stream, params } => {
            let mut body = Vec::with_capacity(PARAMS_BYTES);
            body.extend_from_slice(&[params.format.number(), params.rate.number(), params.channels, 0]);
            body.extend_from_slice(&params.period_bytes.to_le_bytes());
            body.extend_from_slice(&params.buffer_bytes.to_le_bytes());
            header(buffer, link, SET_PARAMS, (*stream, none), &body);
        }
        ToCard::Prepare { stream, epoch } => header(buffer, link, PREPARE, (*stream, *epoch), &[]),
        ToCard::Play { stream, epoch, samples } => {
            for part in samples.chunks(MAX_BODY) {
                header(buffer, link, PLAY, (*stream, *epoch), part);
            }
        }
        ToCard::Start { stream } => header(buffer, link, START, (*stream, none), &[]),
        ToCard::Stop { stream } => header(buffer, link, STOP, (*stream, none), &[]),
        ToCard::Release { stream } => header(buffer, link, RELEASE, (*stream, none), &[]),
    }
}

/// Appends a message of the service in session `link` to `buffer`.
pub fn encode_service(message: &FromService, link: LinkId, buffer: &mut Vec<u8>) {
    let nothing = (StreamId(0), Epoch(0));
    match message {
        FromService::Card(card) => header(buffer, link, CARD, nothing, &card_body(card)),
        FromService::Failed(what) => {
            header(buffer, link, FAILED, nothing, &what.as_bytes()[..what.len().min(MAX_BODY)]);
        }
        FromService::Stream(FromCard::Position { stream, epoch, heard }) => {
            header(buffer, link, POSITION, (*stream, *epoch), &heard.to_le_bytes());
        }
        FromService::Stream(FromCard::Captured { stream, epoch, samples }) => {
            for part in samples.chunks(MAX_BODY) {
                header(buffer, link, CAPTURED, (*stream, *epoch), part);
            }
        }
        FromService::Stream(FromCard::Stuck { stream, epoch }) => {
            header(buffer, link, STUCK, (*stream, *epoch), &[]);
        }
        FromService::Stream(FromCard::Xrun { stream, epoch }) => {
            header(buffer, link, XRUN, (*stream, *epoch), &[]);
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

/// Takes the next message of the service in session `link` off the front of `buffer`, and gives how many bytes it took;
/// `None` while it is incomplete.
///
/// # Errors
/// When it is no message of a service of that life, or of a session that has not begun.
pub fn decode_service(buffer: &[u8], link: LinkId) -> Result<Option<(Taken<FromService>, usize)>, ProtocolError> {
    let Some((raw, length)) = split(buffer, link.generation)? else { return Ok(None) };
    if raw.attempt < link.attempt {
        return Ok(Some((Taken::Earlier, length)));
    }
    if raw.attempt > link.attempt {
        return Err(ProtocolError::Session(link.generation.get(), raw.attempt));
    }
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
        STUCK => {
            exact::<0>(raw.body, "stuck")?;
            FromService::Stream(FromCard::Stuck { stream, epoch })
        }
        XRUN => {
            exact::<0>(raw.body, "xrun")?;
            FromService::Stream(FromCard::Xrun { stream, epoch })
        }
        FAILED => FromService::Failed(printable(raw.body)),
        kind => return Err(ProtocolError::UnknownKind(kind)),
    };
    Ok(Some((Taken::Message(message), length)))
}

/// Takes the next message of the host off the front of `buffer`, with the session that it belongs to and how many bytes
/// it took; `None` while it is incomplete. `current` is the attempt at work, `None` before the first [`FromHost::Begin`]:
/// until then everything else is of an earlier session.
///
/// # Errors
/// When it is no message of a host to the driver VM of `generation`, or belongs to a session that has not begun.
pub fn decode(
    buffer: &[u8],
    generation: Generation,
    current: Option<u32>,
) -> Result<Option<(Taken<FromHost>, LinkId, usize)>, ProtocolError> {
    let Some((raw, length)) = split(buffer, generation)? else { return Ok(None) };
    let link = LinkId { generation, attempt: raw.attempt };
    let begins = raw.kind == BEGIN;
    let earlier = current.map_or(!begins, |current| raw.attempt < current);
    if earlier {
        return Ok(Some((Taken::Earlier, link, length)));
    }
    // Each session begins once, and nothing of it comes before.
    if begins == (current == Some(raw.attempt)) {
        return Err(ProtocolError::Session(generation.get(), raw.attempt));
    }
    let message = if begins {
        exact::<0>(raw.body, "begin")?;
        FromHost::Begin
    } else {
        FromHost::Stream(to_card(&raw)?)
    };
    Ok(Some((Taken::Message(message), link, length)))
}

fn to_card(raw: &Raw<'_>) -> Result<ToCard, ProtocolError> {
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
    Ok(message)
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

    fn link(attempt: u32) -> LinkId {
        LinkId { generation: Generation::new(3).unwrap(), attempt }
    }

    /// As the service reads in session 3.2.
    fn host_message(buffer: &[u8]) -> Result<Option<(Taken<FromHost>, LinkId, usize)>, ProtocolError> {
        decode(buffer, link(2).generation, Some(2))
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
            FromService::Stream(FromCard::Stuck { stream, epoch }),
            FromService::Stream(FromCard::Xrun { stream, epoch }),
            FromService::Failed("no card".into()),
        ]
    }

    #[test]
    fn messages_come_back_as_they_went_one_by_one() {
        let mut buffer = Vec::new();
        for message in host_messages() {
            encode(&message.into(), link(2), &mut buffer);
        }
        for message in host_messages() {
            let (decoded, of, length) = host_message(&buffer).unwrap().unwrap();
            assert_eq!((decoded, of), (Taken::Message(message.into()), link(2)));
            buffer.drain(..length);
        }
        for message in service_messages() {
            encode_service(&message, link(2), &mut buffer);
        }
        for message in service_messages() {
            let (decoded, length) = decode_service(&buffer, link(2)).unwrap().unwrap();
            assert_eq!(decoded, Taken::Message(message));
            buffer.drain(..length);
        }
        assert!(buffer.is_empty());
    }

    #[test]
    fn long_samples_are_split() {
        let samples: Vec<u8> = (0..=255).cycle().take(3 * MAX_BODY + 5).collect();
        let mut buffer = Vec::new();
        let play = ToCard::Play { stream: StreamId(0), epoch: Epoch(1), samples: samples.clone() };
        encode(&play.into(), link(2), &mut buffer);
        let mut seen = Vec::new();
        while let Some((Taken::Message(FromHost::Stream(ToCard::Play { samples, .. })), _, length)) =
            host_message(&buffer).unwrap()
        {
            seen.extend(samples);
            buffer.drain(..length);
        }
        assert_eq!(seen, samples);
    }

    fn bytes(message: impl Into<FromHost>, link: LinkId) -> Vec<u8> {
        let mut buffer = Vec::new();
        encode(&message.into(), link, &mut buffer);
        buffer
    }

    #[test]
    fn another_life_is_refused() {
        let start = ToCard::Start { stream: StreamId(0) };
        let other = LinkId { generation: Generation::FIRST, attempt: 2 };
        assert_eq!(host_message(&bytes(start, other)), Err(ProtocolError::Session(1, 2)));
        let mut buffer = Vec::new();
        encode_service(&FromService::Card(a_card()), other, &mut buffer);
        assert_eq!(decode_service(&buffer, link(2)), Err(ProtocolError::Session(1, 2)));
    }

    #[test]
    fn what_is_left_of_an_earlier_session_is_skipped_and_a_later_one_has_to_begin() {
        let start = || ToCard::Start { stream: StreamId(0) };
        let skipped = |attempt| Ok(Some((Taken::Earlier, link(attempt), HEADER_BYTES)));
        let begun = |attempt| Ok(Some((Taken::Message(FromHost::Begin), link(attempt), HEADER_BYTES)));
        assert_eq!(host_message(&bytes(start(), link(1))), skipped(1));
        assert_eq!(host_message(&bytes(FromHost::Begin, link(1))), skipped(1));
        assert_eq!(host_message(&bytes(FromHost::Begin, link(2))), Err(ProtocolError::Session(3, 2)), "twice");
        assert_eq!(host_message(&bytes(start(), link(3))), Err(ProtocolError::Session(3, 3)), "not begun");
        assert_eq!(host_message(&bytes(FromHost::Begin, link(7))), begun(7));
        let before_any = |bytes: &[u8]| decode(bytes, link(1).generation, None);
        assert_eq!(before_any(&bytes(start(), link(9))), skipped(9));
        assert_eq!(before_any(&bytes(FromHost::Begin, link(1))), begun(1));
        assert_eq!(before_any(&bytes(FromHost::Begin, link(0))), Err(ProtocolError::Session(3, 0)));

        let mut buffer = Vec::new();
        encode_service(&FromService::Card(a_card()), link(2), &mut buffer);
        assert_eq!(decode_service(&buffer, link(3)), Ok(Some((Taken::Earlier, buffer.len()))));
        assert_eq!(decode_service(&buffer, link(1)), Err(ProtocolError::Session(3, 2)));
    }

    #[test]
    fn a_length_without_bound_is_refused_before_its_body_comes() {
        let header = [0xff, 0xff, 0xff, 0x7f, PLAY, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(host_message(&header), Err(ProtocolError::TooLong(0x7fff_ffff)));
    }

    proptest! {
        /// Any bytes are a message within bounds, none yet, or an error; never a panic.
        #[test]
        fn any_bytes_are_survived(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in any::<u8>(), fit in any::<bool>()) {
            if fit && bytes.len() >= HEADER_BYTES {
                let body = u32::try_from(bytes.len() - HEADER_BYTES).unwrap();
                bytes[..4].copy_from_slice(&body.to_le_bytes());
                bytes[4..6].copy_from_slice(&[[1, 2, 3, 4, 5, 6, 7, 0x81, 0x82, 0x83, 0x84, 0x85][usize::from(kind) % 12], 0]);
                bytes[8..12].copy_from_slice(&3u32.to_le_bytes());
                bytes[12..16].copy_from_slice(&u32::from(1 + kind % 3).to_le_bytes());
            }
            if let Ok(Some((message, length))) = decode_service(&bytes, link(2)) {
                prop_assert!(length <= bytes.len());
                if let Taken::Message(FromService::Card(card)) = message {
                    prop_assert!(card.is_sane());
                }
            }
            if let Ok(Some((message, _, length))) = host_message(&bytes) {
                prop_assert!(length <= bytes.len());
                if let Taken::Message(FromHost::Stream(ToCard::SetParams { params, .. })) = message {
                    prop_assert!(params.sizes_fit());
                }
            }
        }
    }
}
