//! Network clients for a machine under test; the other ends are in [`crate::peer`].
//!
//! Results are one JSON line on standard output, so that a script's caller reads them without guessing.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::peer::ports;

/// First bytes of a tick, to tell it from stray datagrams.
pub const TICK_MAGIC: [u8; 4] = *b"tick";
/// Magic, sequence number, sender's clock in microseconds.
pub const TICK_LEN: usize = 20;
/// Time between two ticks: an outage is known to this much.
pub const TICK_EVERY: Duration = Duration::from_millis(10);

/// A transfer's outcome, measured where the bytes arrived.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bulk {
    /// Bytes that arrived.
    pub bytes: u64,
    /// First to last byte, seconds.
    pub seconds: f64,
}

impl Bulk {
    /// Megabits a second.
    pub fn mbit_s(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a figure for humans")]
        let bits = self.bytes as f64 * 8.0;
        bits / self.seconds.max(1e-9) / 1e6
    }
}

/// Round trips, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundTrips {
    /// Requests sent.
    pub sent: u32,
    /// Requests without an answer within a second.
    pub lost: u32,
    /// Best.
    pub min_us: u64,
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Worst.
    pub max_us: u64,
}

/// Sends a tick `every` so long to the peer until killed; errors of single sends are what is being measured. It never waits for
/// room, so that only a machine without a processor is late.
///
/// # Errors
/// No socket.
pub fn tick(peer: Ipv4Addr, every: Duration) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_nonblocking(true)?;
    let to = SocketAddr::from((peer, ports::TICKS));
    let start = Instant::now();
    let mut due = Duration::ZERO;
    for seq in 0u64.. {
        let now = start.elapsed();
        if now < due {
            thread::sleep(due - now);
        }
        due += every;
        let sent_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut datagram = [0; TICK_LEN];
        datagram[..4].copy_from_slice(&TICK_MAGIC);
        datagram[4..12].copy_from_slice(&seq.to_le_bytes());
        datagram[12..].copy_from_slice(&sent_us.to_le_bytes());
        let _ = socket.send_to(&datagram, to);
    }
    Ok(())
}

/// Sends as fast as it can for `length`; the peer measures.
///
/// # Errors
/// What the connection says.
pub fn send(peer: Ipv4Addr, length: Duration) -> io::Result<Bulk> {
    let mut stream = TcpStream::connect((peer, ports::SINK))?;
    let chunk = vec![0x5a; 128 << 10];
    let start = Instant::now();
    while start.elapsed() < length {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    serde_json::from_str(&answer).map_err(io::Error::other)
}

/// Receives as fast as it can what the peer sends for `length`.
///
/// # Errors
/// What the connection says.
pub fn receive(peer: Ipv4Addr, length: Duration) -> io::Result<Bulk> {
    let mut stream = TcpStream::connect((peer, ports::SOURCE))?;
    let ms = u32::try_from(length.as_millis()).unwrap_or(u32::MAX);
    stream.write_all(&ms.to_le_bytes())?;
    drain(&mut stream)
}

/// Reads to the end and measures; used at both ends.
///
/// # Errors
/// What the connection says.
pub fn drain(stream: &mut TcpStream) -> io::Result<Bulk> {
    let mut buffer = vec![0; 256 << 10];
    let mut bytes = 0;
    let mut first = None;
    let mut last = Instant::now();
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                last = Instant::now();
                first.get_or_insert(last);
                bytes += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let seconds = first.map_or(0.0, |first| last.duration_since(first).as_secs_f64());
    Ok(Bulk { bytes, seconds })
}

/// So many pings in a row without an answer are no bad luck.
const MOST_LOST: u32 = 10;

/// Sends `count` datagrams to the peer's echo, one after the other.
///
/// # Errors
/// No socket, or not one answer.
pub fn ping(peer: Ipv4Addr, count: u32) -> io::Result<RoundTrips> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect((peer, ports::ECHO))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let (mut times, mut answered) = (Vec::new(), 0);
    for n in 0..count {
        if n - answered > MOST_LOST {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{MOST_LOST} pings to {peer} without an answer"),
            ));
        }
        let start = Instant::now();
        let mut datagram = [0; 64];
        datagram[..4].copy_from_slice(&n.to_le_bytes());
        let _ = socket.send(&datagram);
        let mut answer = [0; 64];
        while let Ok(len) = socket.recv(&mut answer) {
            if len >= 4 && answer[..4] == n.to_le_bytes() {
                answered = n;
                times.push(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
                break;
            }
        }
        thread::sleep(Duration::from_millis(2));
    }
    times.sort_unstable();
    let at = |percent: usize| times.get((times.len().saturating_sub(1)) * percent / 100).copied();
    match (at(0), at(50), at(99), at(100)) {
        (Some(min_us), Some(p50_us), Some(p99_us), Some(max_us)) => {
            let answered = u32::try_from(times.len()).unwrap_or(u32::MAX);
            Ok(RoundTrips { sent: count, lost: count - answered, min_us, p50_us, p99_us, max_us })
        }
        _ => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {peer}"))),
    }
}

/// Waits until the peer's echo answers; how long that took.
///
/// # Errors
/// `TimedOut` after `limit`.
pub fn first_answer(peer: Ipv4Addr, limit: Duration) -> io::Result<Duration> {
    let start = Instant::now();
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(TICK_EVERY))?;
    let mut answer = [0; 64];
    while start.elapsed() < limit {
        if socket.send_to(&[0; 64], (peer, ports::ECHO)).is_err() {
            thread::sleep(TICK_EVERY);
            continue;
        }
        if socket.recv(&mut answer).is_ok() {
            return Ok(start.elapsed());
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {peer} within {limit:?}")))
}
