//! Messages as JSON lines, read from a peer that is not trusted: a line is bounded by [`MAX_LINE`], and what does not
//! parse is an error that the caller treats as a protocol violation.
//!
//! Pure: bytes in, messages out. After an error the reader is of no further use; the connection is to be closed.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::protocol::MAX_LINE;

/// A line broke the protocol.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// No end of line within the bound.
    #[error("a line is longer than {MAX_LINE} bytes")]
    TooLong,
    /// Not a message.
    #[error("a line is no valid message")]
    Malformed(#[from] serde_json::Error),
}

/// Cuts a stream of bytes into messages.
#[derive(Debug, Default)]
pub struct LineReader {
    buffer: Vec<u8>,
    /// Where the line that is not yet handed out starts.
    start: usize,
    /// No end of line before here.
    scanned: usize,
}

impl LineReader {
    /// An empty reader.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the peer. Ask for messages until there is none before feeding more: then no more than
    /// [`MAX_LINE`] and these bytes are held.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message; `None` when more bytes are needed. Empty lines are skipped.
    ///
    /// # Errors
    /// When the line is too long or no message of this type.
    pub fn next_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, LineError> {
        loop {
            let end = self.buffer[self.scanned..].iter().position(|&b| b == b'\n').map(|n| self.scanned + n);
            let length = end.unwrap_or(self.buffer.len()) - self.start;
            if length > MAX_LINE {
                return Err(LineError::TooLong);
            }
            let Some(end) = end else {
                self.scanned = self.buffer.len();
                return Ok(None);
            };
            let line = &self.buffer[self.start..end];
            (self.start, self.scanned) = (end + 1, end + 1);
            if !line.is_empty() {
                return Ok(Some(serde_json::from_slice(line)?));
            }
        }
    }
}

/// A message as a line.
///
/// # Errors
/// When it would be longer than [`MAX_LINE`], or cannot be written as JSON.
pub fn to_line(message: &impl Serialize) -> Result<Vec<u8>, LineError> {
    let mut line = serde_json::to_vec(message)?;
    if line.len() > MAX_LINE {
        return Err(LineError::TooLong);
    }
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{CrashKind, DevicePlace, FromAgent, Mac, NetEnd, NetPlan, Offloads, RxMode, ToAgent};
    use proptest::prelude::*;

    fn macs(max: usize) -> impl Strategy<Value = Vec<Mac>> {
        proptest::collection::vec(any::<[u8; 6]>().prop_map(Mac), 0..=max)
    }

    fn mode() -> impl Strategy<Value = RxMode> {
        let vlans = proptest::option::of(proptest::collection::vec(0u16..4096, 0..20));
        (any::<bool>(), any::<bool>(), macs(64), macs(64), vlans).prop_map(
            |(promiscuous, all_multicast, unicast, multicast, vlans)| RxMode {
                promiscuous,
                all_multicast,
                unicast,
                multicast,
                vlans,
            },
        )
    }

    fn message() -> impl Strategy<Value = ToAgent> {
        let end = (any::<[u8; 6]>(), mode()).prop_map(|(mac, mode)| NetEnd {
            device_mac: Mac(mac),
            mode,
            offloads: Offloads::default(),
        });
        prop_oneof![
            (proptest::collection::vec(end, 0..3), proptest::option::of(any::<u16>()))
                .prop_map(|(ends, mtu)| ToAgent::ConfigureNet(NetPlan { ends, mtu, device: DevicePlace::ToCome })),
            (any::<u16>(), mode()).prop_map(|(end, mode)| ToAgent::SetRxMode { end, mode }),
            Just(ToAgent::Crash { kind: CrashKind::Panic }),
        ]
    }

    fn drain<T: DeserializeOwned>(reader: &mut LineReader) -> Result<Vec<T>, LineError> {
        let mut found = Vec::new();
        while let Some(message) = reader.next_message()? {
            found.push(message);
        }
        Ok(found)
    }

    proptest! {
        #[test]
        fn messages_come_back_however_the_stream_is_cut(
            messages in proptest::collection::vec(message(), 0..5),
            cuts in proptest::collection::vec(1usize..3000, 1..20),
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(|m| to_line(m).unwrap()).collect();
            let mut reader = LineReader::new();
            let mut found = Vec::new();
            let (mut rest, mut cut) = (&stream[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at((*cut.next().unwrap()).min(rest.len()));
                reader.feed(now);
                found.extend(drain::<ToAgent>(&mut reader).unwrap());
                rest = later;
            }
            prop_assert_eq!(found, messages);
        }

        #[test]
        fn arbitrary_bytes_neither_panic_nor_pile_up(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..4096), 0..30),
        ) {
            let mut reader = LineReader::new();
            for chunk in chunks {
                reader.feed(&chunk);
                if drain::<FromAgent>(&mut reader).is_err() { break; }
                prop_assert!(reader.buffer.len() <= MAX_LINE + chunk.len());
            }
        }
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_bound() {
        let mut reader = LineReader::new();
        reader.feed(&vec![b' '; MAX_LINE]);
        assert!(matches!(reader.next_message::<FromAgent>(), Ok(None)));
        reader.feed(b" ");
        assert!(matches!(reader.next_message::<FromAgent>(), Err(LineError::TooLong)));
    }

    #[test]
    fn unknown_messages_and_fields_are_refused() {
        for line in [&b"{\"type\":\"dance\"}\n"[..], b"{\"type\":\"crash\",\"kind\":\"panic\",\"x\":1}\n", b"\xff\n"] {
            let mut reader = LineReader::new();
            reader.feed(line);
            assert!(matches!(reader.next_message::<ToAgent>(), Err(LineError::Malformed(_))));
        }
    }
}
