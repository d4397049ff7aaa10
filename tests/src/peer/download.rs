//! An HTTP server with one file of any size, made on the fly, handed out at a pace and never further than allowed.
//!
//! The content is a function of the offset, so that both the size and the checksum are known without a file. The
//! bench raises the allowance as crashes are survived: the download lasts exactly as long as the demonstration.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::{Progress, ports};
use crate::random::Random;

/// Bytes a second where the caller does not care: 64 MiB take 16 s.
pub const DEFAULT_RATE: u64 = 4 << 20;

/// The file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Size in bytes.
    pub bytes: u64,
}

impl Content {
    /// Fills `out` with what stands at `offset`, a multiple of 8 (SplitMix64 of the word's number).
    pub fn fill(offset: u64, out: &mut [u8]) {
        for (word, bytes) in (offset / 8..).zip(out.chunks_mut(8)) {
            bytes.copy_from_slice(&Random::from_nth(word).next().to_le_bytes()[..bytes.len()]);
        }
    }

    /// The SHA-256 of the whole file, as `sha256sum` prints it.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        let mut chunk = vec![0; CHUNK];
        let mut offset = 0;
        while offset < self.bytes {
            let len = usize::try_from(self.bytes - offset).unwrap_or(CHUNK).min(CHUNK);
            Self::fill(offset, &mut chunk[..len]);
            hash.update(&chunk[..len]);
            offset += len as u64;
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Bytes written at once: a good part of a socket buffer, and 8 ms at the default rate.
const CHUNK: usize = 32 << 10;

/// What is offered and how far it got.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) bytes: u64,
    pub(super) rate: u64,
    pub(super) allow: u64,
    pub(super) progress: Progress,
    last_advance: Option<Instant>,
}

impl State {
    pub(super) fn offer(&mut self, bytes: u64, rate: u64, allow: u64) {
        *self = Self { bytes, rate: rate.max(1), allow, ..Self::default() };
    }

    fn note(&mut self, sent: u64, acknowledged: u64) {
        let now = Instant::now();
        let waited = self.last_advance.map_or(Duration::ZERO, |last| now - last);
        if acknowledged > self.progress.acknowledged || sent == acknowledged {
            let ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
            self.progress.longest_stall_ms = self.progress.longest_stall_ms.max(ms);
            self.last_advance = Some(now);
        }
        self.progress.sent = sent;
        self.progress.acknowledged = acknowledged;
    }
}

pub(super) type Download = Arc<Mutex<State>>;

pub(super) fn serve() -> io::Result<Download> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ports::HTTP))?;
    let download = Download::default();
    let state = download.clone();
    thread::Builder::new().name("http".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = state.clone();
            thread::spawn(move || {
                let result = answer(stream, &state);
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                match result {
                    Ok(()) => state.progress.complete += 1,
                    Err(e) if is_reset(&e) => state.progress.resets += 1,
                    Err(_) => {}
                }
            });
        }
    })?;
    Ok(download)
}

fn is_reset(e: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut};
    matches!(e.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | TimedOut)
}

fn answer(mut stream: TcpStream, shared: &Download) -> io::Result<()> {
    let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let bytes = {
        let mut state = lock();
        state.progress.connections += 1;
        state.last_advance = Some(Instant::now());
        state.bytes
    };
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {bytes}\r\nConnection: close\r\n\r\n")?;
    let mut chunk = vec![0; CHUNK];
    let (mut sent, mut paid, mut last) = (0, 0.0, Instant::now());
    while sent < bytes {
        let (rate, allow) = {
            let state = lock();
            (state.rate, state.allow)
        };
        #[expect(clippy::cast_precision_loss, reason = "a pace, not an account")]
        let earned = rate as f64 * last.elapsed().as_secs_f64();
        last = Instant::now();
        // At most a tenth of a second may be caught up, so that the end of an outage is no burst.
        #[expect(clippy::cast_precision_loss, reason = "a pace, not an account")]
        let most = (rate as f64 / 10.0).max(CHUNK as f64);
        paid = f64::min(paid + earned, most);
        let len = usize::try_from((bytes - sent).min(allow.saturating_sub(sent))).unwrap_or(CHUNK).min(CHUNK) & !7;
        let len = if bytes - sent < CHUNK as u64 && allow >= bytes {
            usize::try_from(bytes - sent).unwrap_or(0)
        } else {
            len
        };
        #[expect(clippy::cast_precision_loss, reason = "a pace, not an account")]
        if len == 0 || paid < len as f64 {
            lock().note(sent, sent.saturating_sub(unacknowledged(&stream)));
            thread::sleep(Duration::from_millis(2));
            continue;
        }
        #[expect(clippy::cast_precision_loss, reason = "a pace, not an account")]
        {
            paid -= len as f64;
        }
        Content::fill(sent, &mut chunk[..len]);
        stream.write_all(&chunk[..len])?;
        sent += len as u64;
        lock().note(sent, sent.saturating_sub(unacknowledged(&stream)));
    }
    finish(&stream, sent, shared)
}

/// Waits until all is acknowledged and the client has closed, or the connection broke.
fn finish(stream: &TcpStream, sent: u64, shared: &Download) -> io::Result<()> {
    stream.shutdown(std::net::Shutdown::Write)?;
    loop {
        let left = unacknowledged(stream);
        shared.lock().unwrap_or_else(PoisonError::into_inner).note(sent, sent.saturating_sub(left));
        if let Some(e) = stream.take_error()? {
            return Err(e);
        }
        if left == 0 {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes in the kernel's send queue: not sent, or sent and not acknowledged.
fn unacknowledged(stream: &TcpStream) -> u64 {
    let mut left: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (the same request as TIOCOUTQ) writes one int, which outlives the call.
    let done = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut left) };
    if done < 0 { 0 } else { u64::try_from(left).unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_does_not_depend_on_how_it_is_cut() {
        let mut whole = vec![0; 1000];
        Content::fill(0, &mut whole);
        let mut part = vec![0; 200];
        Content::fill(400, &mut part);
        assert_eq!(whole[400..600], part);
        assert_ne!(whole[..8], whole[8..16]);
    }

    #[test]
    fn a_download_stops_at_the_allowance_and_reports_progress() {
        let content = Content { bytes: 100_003 };
        let download = serve().unwrap();
        download.lock().unwrap().offer(content.bytes, 100 << 20, 50_000);
        let mut stream = TcpStream::connect(("127.0.0.1", ports::HTTP)).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            io::Read::read_to_end(&mut stream, &mut all).map(|_| all)
        });
        let start = Instant::now();
        while download.lock().unwrap().progress.sent < 50_000 {
            assert!(start.elapsed() < Duration::from_secs(60), "the allowance is not reached");
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(300));
        assert_eq!(download.lock().unwrap().progress.sent, 50_000);
        download.lock().unwrap().allow = u64::MAX;
        let all = reader.join().unwrap().unwrap();
        let body = all.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
        let hash: String = Sha256::digest(&all[body..]).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hash, content.sha256());
    }
}
