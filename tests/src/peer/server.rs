//! The peer process: `umbra-probe peer NICS`, started by [`super::Peer`] with a socket as its standard input.
//! `umbra-probe peer here` stays in the network of this machine: the demo on real hardware has its wire there.

use std::io::{self, IoSlice, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::PoisonError;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::download::Download;
use super::ticks::Ticks;
use super::{Reply, Request, bulk, download, flood, netns, ping, ticks};
use crate::probe::wire::{Lines, write_line};

/// Serves until the bench closes the socket.
///
/// # Errors
/// What the socket says; failures to set up go to the bench as [`Reply::Failed`].
pub fn main(control: &UnixStream, nics: Option<usize>, one_wire: bool) -> io::Result<()> {
    let (download, recorded) = match set_up(control, nics, one_wire) {
        Ok(services) => services,
        Err(what) => return write_line(control, &Reply::Failed { what }),
    };
    let mut lines = Lines::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = Read::read(&mut &*control, &mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        let mut requests = Vec::new();
        lines.push(&buffer[..n], |request: Request| requests.push(request));
        for request in requests {
            write_line(control, &answer(&request, &download, &recorded))?;
        }
    }
}

fn set_up(control: &UnixStream, nics: Option<usize>, one_wire: bool) -> Result<(Download, Ticks), String> {
    if nics.is_some() {
        netns::enter()?;
    }
    let taps = (0..nics.unwrap_or(0)).map(netns::tap).collect::<Result<Vec<_>, _>>()?;
    if one_wire {
        netns::bridge(taps.len())?;
    } else {
        (0..taps.len()).try_for_each(netns::address_of)?;
    }
    let services = (|| {
        bulk::serve()?;
        ticks::echo()?;
        Ok((download::serve()?, ticks::record()?))
    })()
    .map_err(|e: io::Error| format!("the bench's peer cannot listen: {e}"))?;
    let descriptors: Vec<_> = taps.iter().map(AsRawFd::as_raw_fd).collect();
    let mut line = serde_json::to_vec(&Reply::Ready).map_err(|e| e.to_string())?;
    line.push(b'\n');
    sendmsg::<()>(
        control.as_raw_fd(),
        &[IoSlice::new(&line)],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::empty(),
        None,
    )
    .map_err(|e| format!("cannot hand over the TAP interfaces: {e}"))?;
    Ok(services)
}

fn answer(request: &Request, download: &Download, recorded: &Ticks) -> Reply {
    let state = || download.lock().unwrap_or_else(PoisonError::into_inner);
    let failed =
        |what: &str, error: io::Error| Reply::Failed { what: format!("the bench's peer cannot {what}: {error}") };
    match *request {
        Request::Offer { bytes, rate, allow } => state().offer(bytes, rate, allow),
        Request::Allow { bytes } => state().allow = bytes,
        Request::MarkStall => state().progress.longest_stall_ms = 0,
        Request::Ping { host, mac } => {
            if let Err(error) = ping::begin(host, mac, recorded) {
                return failed(&format!("ask {host}"), error);
            }
        }
        Request::Flood { host, mac, millis } => {
            return match flood::send(host, mac, Duration::from_millis(millis)) {
                Ok(datagrams) => Reply::Flooded { datagrams },
                Err(error) => failed(&format!("flood {host}"), error),
            };
        }
        Request::Progress => return Reply::Progress(state().progress.clone()),
        Request::TakeTicks => {
            return ticks::take(&mut recorded.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
    Reply::Done
}
