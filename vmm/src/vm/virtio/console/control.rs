//! Messages of the console's control queues (virtio 1.2, section 5.3.6.2): bytes to enum and back, pure.

/// Bytes of a control message: port (32 bits), event, value (16 each); a name follows without a terminator.
pub const MESSAGE_SIZE: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Driver to device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromDriver {
    /// The driver is ready for ports (or, false, has failed).
    DeviceReady(bool),
    /// The driver is ready to use a port (or, false, has failed).
    PortReady {
        /// The port.
        port: u32,
        /// Ready.
        ready: bool,
    },
    /// A program in the guest has opened or closed the port.
    PortOpen {
        /// The port.
        port: u32,
        /// Opened.
        open: bool,
    },
    /// An event that this device has no use for.
    Unknown(u16),
}

impl FromDriver {
    /// Parses a message.
    pub fn parse(bytes: [u8; MESSAGE_SIZE]) -> Self {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = bytes;
        let port = u32::from_le_bytes([p0, p1, p2, p3]);
        let value = u16::from_le_bytes([v0, v1]) != 0;
        match u16::from_le_bytes([e0, e1]) {
            DEVICE_READY => Self::DeviceReady(value),
            PORT_READY => Self::PortReady { port, ready: value },
            PORT_OPEN => Self::PortOpen { port, open: value },
            other => Self::Unknown(other),
        }
    }
}

/// Device to driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToDriver {
    /// There is a port.
    Add(u32),
    /// The port is a console: hvc0 in Linux.
    Console(u32),
    /// A port and its name.
    Name(u32, String),
    /// The host's end was connected or disconnected.
    Open(u32, bool),
}

impl ToDriver {
    /// The message as the driver reads it.
    pub fn bytes(&self) -> Vec<u8> {
        let (port, event, value, name) = match self {
            Self::Add(port) => (*port, PORT_ADD, 1, ""),
            Self::Console(port) => (*port, CONSOLE_PORT, 1, ""),
            Self::Name(port, name) => (*port, PORT_NAME, 1, name.as_str()),
            Self::Open(port, open) => (*port, PORT_OPEN, u16::from(*open), ""),
        };
        let mut bytes = Vec::with_capacity(MESSAGE_SIZE + name.len());
        bytes.extend(port.to_le_bytes());
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_have_the_layout_of_the_specification() {
        assert_eq!(FromDriver::parse([0, 0, 0, 0, 0, 0, 1, 0]), FromDriver::DeviceReady(true));
        assert_eq!(FromDriver::parse([2, 1, 0, 0, 6, 0, 0, 0]), FromDriver::PortOpen { port: 258, open: false });
        assert_eq!(ToDriver::Name(3, "ab".into()).bytes(), [3, 0, 0, 0, 7, 0, 1, 0, b'a', b'b']);
        assert_eq!(ToDriver::Open(1, true).bytes(), [1, 0, 0, 0, 6, 0, 1, 0]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message(bytes: [u8; MESSAGE_SIZE]) {
            let event = u16::from_le_bytes([bytes[4], bytes[5]]);
            let unknown = FromDriver::parse(bytes) == FromDriver::Unknown(event);
            prop_assert_eq!(unknown, ![0, 3, 6].contains(&event));
        }
    }
}
