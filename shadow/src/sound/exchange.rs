//! What goes between the shadow and the rest: to and from a card's driver VM, and back to the guest.
//!
//! Each `Prepare` begins a new epoch of its stream. Positions count frames from the start of the epoch, and
//! messages of an older epoch are dropped by its number: what a card says of samples that the guest has already
//! taken back is nobody's business.

use super::params::Params;

/// The number of a stream: its index in [`Card::streams`](super::params::Card::streams).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u16);

/// One preparation of a stream, counted from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u32);

/// Names a message of the guest (its descriptor chain); the device that queued it knows which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u32);

/// To the driver VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToCard {
    /// Open the stream with these parameters, or change them.
    SetParams {
        /// Which stream.
        stream: StreamId,
        /// The parameters.
        params: Params,
    },
    /// Begin an epoch: forget samples of the one before.
    Prepare {
        /// Which stream.
        stream: StreamId,
        /// The epoch's number.
        epoch: Epoch,
    },
    /// Samples to play, whole frames, behind those before.
    Play {
        /// Which stream.
        stream: StreamId,
        /// Which epoch.
        epoch: Epoch,
        /// The samples.
        samples: Vec<u8>,
    },
    /// Let samples flow.
    Start {
        /// Which stream.
        stream: StreamId,
    },
    /// Halt; samples that were not heard are kept.
    Stop {
        /// Which stream.
        stream: StreamId,
    },
    /// Close the stream.
    Release {
        /// Which stream.
        stream: StreamId,
    },
}

/// From the driver VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromCard {
    /// How far the card has played.
    Position {
        /// Which stream.
        stream: StreamId,
        /// Which epoch.
        epoch: Epoch,
        /// Frames heard since the start of the epoch.
        heard: u64,
    },
    /// Samples that the card recorded, whole frames.
    Captured {
        /// Which stream.
        stream: StreamId,
        /// Which epoch.
        epoch: Epoch,
        /// The samples.
        samples: Vec<u8>,
    },
    /// The stream stands still and has never moved, while the card moves others: an output without a monitor, say. It was stopped.
    Stuck {
        /// Which stream.
        stream: StreamId,
        /// Which epoch.
        epoch: Epoch,
    },
    /// The card ran out of samples, or of room for them; it goes on by itself.
    Xrun {
        /// Which stream.
        stream: StreamId,
        /// Which epoch.
        epoch: Epoch,
    },
}

/// How a message of the guest ended (`VIRTIO_SND_S_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Played, recorded, or given back at a release.
    Ok,
    /// The message itself is wrong, or the stream takes none now.
    BadMessage,
    /// The card is gone for good.
    IoError,
}

/// A message that goes back to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// The message.
    pub token: Token,
    /// How it ended.
    pub outcome: Outcome,
    /// Bytes of the stream that the card has still to play (`latency_bytes`).
    pub latency_bytes: u32,
    /// What was recorded; empty for playback.
    pub samples: Vec<u8>,
}

/// What a call of the shadow asks its caller to do, in order.
#[derive(Debug, Default)]
pub struct Out {
    /// Messages for the driver VM.
    pub to_card: Vec<ToCard>,
    /// Messages for the guest.
    pub done: Vec<Done>,
}

/// A driver VM reported what cannot be: it counts as failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A stream that the card does not have, or of the other direction.
    #[error("a message for stream {0}, which is no stream of that kind")]
    NoSuchStream(u16),
    /// A position behind the one before.
    #[error("stream {stream}: the position went back from {before} to {now}")]
    PositionBack {
        /// Which stream.
        stream: u16,
        /// The last one.
        before: u64,
        /// The new one.
        now: u64,
    },
    /// A position past what was handed over.
    #[error("stream {stream}: {heard} frames heard of {handed} handed over")]
    PositionAhead {
        /// Which stream.
        stream: u16,
        /// The position.
        heard: u64,
        /// Frames handed over in this epoch.
        handed: u64,
    },
    /// More was heard than the sample rate allows.
    #[error("stream {stream}: {heard} frames heard in {ms} ms")]
    TooFast {
        /// Which stream.
        stream: u16,
        /// The reported position, frames.
        heard: u64,
        /// Time since the stream started, ms.
        ms: u64,
    },
    /// Samples that are no whole frames, or an epoch that never was.
    #[error("stream {0}: a message that fits neither its parameters nor its epoch")]
    Malformed(u16),
    /// A running stream that did not move.
    #[error("stream {stream}: no progress for {ms} ms")]
    Stalled {
        /// Which stream.
        stream: u16,
        /// Time without progress, ms.
        ms: u64,
    },
    /// Another card than at first, which cannot do what the guest was promised.
    #[error("the card that the new driver VM reports ({0}) lacks what the guest was offered at first")]
    OtherCard(String),
}
