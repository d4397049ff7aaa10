//! Answers those who ask for the metrics, with as much of HTTP/1.1 as that takes, in a thread of its own.
//!
//! One client at a time. Each has a second in all, and a few kilobytes for its request: a hostile client delays the next one by
//! that second, and the supervisor never.

use std::fs;
use std::io::{self, ErrorKind, PipeWriter, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;

use super::Metrics;
use crate::base::unix_socket::{self, ListenError};
use crate::config::metrics_address::Address;

/// Time of one client, from the first byte of its request to the last byte of the answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longest request, in bytes.
const MAX_REQUEST: usize = 8 << 10;
/// The format, as the OpenMetrics specification (1.0.0) names it.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Metrics cannot be served.
#[derive(Debug, Error)]
pub enum ServerError {
    /// Something is there already.
    #[error("metrics = \"{0}\" is in use by another program: choose another place")]
    InUse(Address),
    /// The path cannot be listened at.
    #[error("metrics")]
    Path(#[from] ListenError),
    /// Another failure.
    #[error("serve metrics at {address}")]
    Listen {
        /// The configured address.
        address: Address,
        /// Why not.
        source: io::Error,
    },
}

/// The thread that answers; ends when dropped.
#[derive(Debug)]
pub struct Server {
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
    socket: Option<PathBuf>,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Server {
    /// Listens at `address` and answers with `metrics`.
    ///
    /// # Errors
    ///
    /// The place is taken or not allowed.
    pub fn start(address: &Address, metrics: Metrics) -> Result<Self, ServerError> {
        let fail = |source: io::Error| match source.kind() {
            ErrorKind::AddrInUse => ServerError::InUse(address.clone()),
            _ => ServerError::Listen { address: address.clone(), source },
        };
        let (listener, socket) = match address {
            Address::Port(port) => (TcpListener::bind(port).map(Listener::Tcp).map_err(fail)?, None),
            Address::Socket(path) => {
                let listener = unix_socket::listen(path)?;
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(fail)?;
                (Listener::Unix(listener), Some(path.clone()))
            }
        };
        listener.set_nonblocking().map_err(fail)?;
        let (ended, stop) = io::pipe().map_err(fail)?;
        let thread = thread::Builder::new().name("metrics".into()).spawn(move || {
            while wait(listener.as_fd(), ended.as_fd()) {
                listener.answer_one(&metrics);
            }
        });
        Ok(Self { stop: Some(stop), thread: Some(thread.map_err(fail)?), socket })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(path) = &self.socket {
            let _ = fs::remove_file(path);
        }
    }
}

/// Waits for a client; false when it is time to end.
fn wait(listener: BorrowedFd<'_>, ended: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(listener, PollFlags::POLLIN), PollFd::new(ended, PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) => !fds[1].any().unwrap_or(true),
        Err(errno) => errno == nix::errno::Errno::EINTR,
    }
}

impl Listener {
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }

    /// Accepts and answers one client. What goes wrong is the client's affair.
    fn answer_one(&self, metrics: &Metrics) {
        let answered = match self {
            Self::Unix(listener) => listener.accept().and_then(|(stream, _)| answer(stream, metrics)),
            Self::Tcp(listener) => listener.accept().and_then(|(stream, _)| answer(stream, metrics)),
        };
        if let Err(error) = answered {
            tracing::debug!(%error, "a client of the metrics");
            // Too many open files, for one: do not spin over it.
            if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::InvalidData) {
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// A stream whose calls end in time.
trait Timed: Read + Write {
    fn limit(&self, time: Duration) -> io::Result<()>;
}

impl Timed for UnixStream {
    fn limit(&self, time: Duration) -> io::Result<()> {
        self.set_nonblocking(false)?;
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

impl Timed for TcpStream {
    fn limit(&self, time: Duration) -> io::Result<()> {
        self.set_nonblocking(false)?;
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

fn answer(mut stream: impl Timed, metrics: &Metrics) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    let left = || match until.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::Error::from(ErrorKind::TimedOut)),
        left => Ok(left),
    };
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        stream.limit(left()?)?;
        let mut chunk = [0; 1024];
        match stream.read(&mut chunk)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => request.extend_from_slice(&chunk[..n]),
        }
        if request.len() > MAX_REQUEST {
            return Err(ErrorKind::InvalidData.into());
        }
    }
    let response = respond(&request, metrics);
    let mut rest = response.as_bytes();
    while !rest.is_empty() {
        stream.limit(left()?)?;
        let n = stream.write(rest)?;
        rest = &rest[n..];
    }
    Ok(())
}

/// The answer to a request's first line.
fn respond(request: &[u8], metrics: &Metrics) -> String {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let words: Vec<_> = String::from_utf8_lossy(line).split(' ').map(String::from).collect();
    let path = words.get(1).map(|path| path.split('?').next().unwrap_or_default());
    let (status, kind, body) = match (words.first().map(String::as_str), path) {
        (Some("GET"), Some("/metrics" | "/")) => ("200 OK", CONTENT_TYPE, metrics.text()),
        (Some("GET"), Some(_)) => ("404 Not Found", "text/plain", "the metrics are at /metrics\n".into()),
        _ => ("405 Method Not Allowed", "text/plain", "only GET /metrics is answered\n".into()),
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

    fn ask(path: &Path, request: &str) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn the_metrics_are_served_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sock");
        let address = Address::Socket(path.clone());
        let server = Server::start(&address, Metrics::new("m")).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let answer = ask(&path, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("# EOF\n"), "{answer}");
        assert!(answer.contains(CONTENT_TYPE));
        assert!(ask(&path, "GET /etc/passwd HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(&path, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert!(matches!(Server::start(&address, Metrics::new("n")), Err(ServerError::Path(ListenError::InUse(_)))));
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_process_s_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sock");
        drop(UnixListener::bind(&path).unwrap());
        drop(Server::start(&Address::Socket(path.clone()), Metrics::new("m")).unwrap());
        fs::write(&path, "precious").unwrap();
        assert!(Server::start(&Address::Socket(path.clone()), Metrics::new("m")).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_client_that_says_too_much_or_nothing_is_left_after_a_second() {
        let server = Server::start(&"127.0.0.1:0".parse().unwrap(), Metrics::new("m")).unwrap();
        drop(server);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sock");
        let _server = Server::start(&Address::Socket(path.clone()), Metrics::new("m")).unwrap();
        let mut flood = UnixStream::connect(&path).unwrap();
        let _ = flood.write_all(&[b'x'; 4 * MAX_REQUEST]);
        let _silent = UnixStream::connect(&path).unwrap();
        // It would be asked in vain for ever behind a silent one that is waited for.
        assert!(ask(&path, "GET / HTTP/1.0\r\n\r\n").contains("200 OK"));
    }
}
