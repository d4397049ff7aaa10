//! Where metrics are served: a Unix socket or a loopback port, never the network.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// `/run/umbra/metrics.sock` or `127.0.0.1:9464`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A Unix socket, for the user who runs the machine alone.
    Socket(PathBuf),
    /// A port of the loopback interface, for all users of the host.
    Port(SocketAddr),
}

/// A text that is no such place.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// Neither.
    #[error(
        "{0:?} is neither the path of a socket (with a slash) nor a loopback address with a port, as \"127.0.0.1:9464\""
    )]
    Neither(String),
    /// Others could reach it.
    #[error(
        "{0} is not a loopback address: metrics are for this host alone (127.0.0.1 or [::1]); let a proxy carry them on"
    )]
    NotLoopback(SocketAddr),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Port(address)),
            Ok(address) => Err(AddressError::NotLoopback(address)),
            Err(_) if text.contains('/') => Ok(Self::Socket(text.into())),
            Err(_) => Err(AddressError::Neither(text.into())),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Port(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sockets_and_loopback_ports_are_places_for_metrics() {
        for good in ["/run/m.sock", "./m.sock", "127.0.0.1:9464", "[::1]:9464"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        assert!(matches!("0.0.0.0:9464".parse::<Address>(), Err(AddressError::NotLoopback(_))));
        for bad in ["", "9464", "localhost:9464", "metrics.sock"] {
            assert!(matches!(bad.parse::<Address>(), Err(AddressError::Neither(_))), "{bad}");
        }
    }
}
