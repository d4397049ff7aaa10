//! Records ticks as they arrive, and echoes datagrams.
//!
//! The arrival times are what outages are measured by: a tick that a splitter kept in its log and sent later counts
//! at the time it arrived here, not when the guest sent it.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Reply, ports};
use crate::probe::net::{TICK_LEN, TICK_MAGIC};

/// Ticks kept until they are asked for: 100 a second for three hours.
const MAX_TICKS: usize = 1 << 20;

/// Most ticks of one answer: some 100 bytes each in JSON, far below the longest line (`probe::wire::MAX_LINE`). A demo on a slow
/// machine asks for its ticks after many minutes, when there are tens of thousands.
const AT_ONCE: usize = 8192;

/// One arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tick {
    /// Who sent it.
    pub from: Ipv4Addr,
    /// Its number.
    pub seq: u64,
    /// The sender's clock, microseconds.
    pub sent_us: u64,
    /// When it arrived: `CLOCK_MONOTONIC` of the machine that runs the bench, microseconds.
    pub arrived_us: u64,
}

pub(super) type Ticks = Arc<Mutex<VecDeque<Tick>>>;

pub(super) fn record() -> io::Result<Ticks> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ports::TICKS))?;
    let ticks = Ticks::default();
    let kept = ticks.clone();
    thread::Builder::new().name("ticks".into()).spawn(move || {
        let mut datagram = [0; 64];
        while let Ok((len, from)) = socket.recv_from(&mut datagram) {
            let arrived_us = now_us();
            let IpAddr::V4(from) = from.ip() else { continue };
            let Some((seq, sent_us)) = parse(&datagram[..len]) else { continue };
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() == MAX_TICKS {
                kept.pop_front();
            }
            kept.push_back(Tick { from, seq, sent_us, arrived_us });
        }
    })?;
    Ok(ticks)
}

/// Takes the oldest of the ticks that were `kept`.
pub(super) fn take(kept: &mut VecDeque<Tick>) -> Reply {
    let ticks: Vec<_> = kept.drain(..kept.len().min(AT_ONCE)).collect();
    Reply::Ticks { ticks, more: !kept.is_empty() }
}

/// `CLOCK_MONOTONIC`, microseconds: the same clock in the bench and its peer.
pub fn now_us() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

fn parse(datagram: &[u8]) -> Option<(u64, u64)> {
    let datagram: &[u8; TICK_LEN] = datagram.try_into().ok()?;
    let rest = datagram.strip_prefix(&TICK_MAGIC)?;
    let (seq, sent) = rest.split_at(8);
    Some((u64::from_le_bytes(seq.try_into().ok()?), u64::from_le_bytes(sent.try_into().ok()?)))
}

pub(super) fn echo() -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ports::ECHO))?;
    thread::Builder::new().name("echo".into()).spawn(move || {
        let mut datagram = [0; 2048];
        loop {
            if let Ok((len, from)) = socket.recv_from(&mut datagram) {
                let _ = socket.send_to(&datagram[..len], from);
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::wire::{Lines, write_line};

    #[test]
    fn ticks_of_hours_are_all_handed_over_in_lines_that_are_accepted() {
        let tick =
            |seq| Tick { from: Ipv4Addr::new(255, 255, 255, 255), seq, sent_us: u64::MAX, arrived_us: u64::MAX - seq };
        let mut kept: VecDeque<_> = (0..200_000).map(tick).collect();
        let (mut lines, mut taken) = (Lines::default(), Vec::new());
        loop {
            let mut line = Vec::new();
            write_line(&mut line, &take(&mut kept)).unwrap();
            let mut reply = None;
            lines.push(&line, |read| reply = Some(read));
            let Some(Reply::Ticks { ticks, more }) = reply else { panic!("an answer of {} bytes is lost", line.len()) };
            taken.extend(ticks);
            if !more {
                break;
            }
        }
        assert_eq!((taken.len(), taken.last().unwrap().seq), (200_000, 199_999));
    }
}
