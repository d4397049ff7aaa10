//! `umbra-probe`: the small program inside machines under test, and the bench's peer outside.
//!
//! Time limits are multiplied by what the environment says of this machine (`UMBRA_PATIENCE`), lengths of transfers are not.
//! Arguments are few and their caller is a script of this crate; the usage line is the documentation.

use std::error::Error;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use umbra_tests::probe::patience::scaled;
use umbra_tests::probe::wire::{PORT_NAME, Reply};
use umbra_tests::probe::{
    client::Client, disk, flush, frames, idle_vcpu, io, kill, mute, net, port, reinit, serve, storm,
};

const USAGE: &str =
    "usage: umbra-probe serve [PORT] | exec SOCKET SCRIPT [SECONDS] | tick ADDRESS [MS] | send ADDRESS SECONDS
        | receive ADDRESS SECONDS | ping ADDRESS COUNT | first-answer ADDRESS SECONDS
        | kill-at STAGE EVENTS | reinit ADDRESS/LENGTH PEER | reinit-disk | storm FUNCTION SECONDS
        | mute FUNCTION SECONDS | flush DISK SECONDS | hold-vcpu
        | frames INTERFACE ADDRESS...
        | disk DISK SECONDS SEED | io DISK read|write BYTES DEPTH SECONDS | hostile SEED |\n        hostile-guest SEED LIFE";

/// Longest time until a port appears.
const PORT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("umbra-probe: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<ExitCode, Box<dyn Error>> {
    match *words {
        ["serve"] => serve::serve(port::open(PORT_NAME, scaled(PORT))?)?,
        ["serve", name] => serve::serve(port::open(name, scaled(PORT))?)?,
        ["exec", socket, script] => return exec(socket, script, scaled(Duration::from_secs(600))),
        ["exec", socket, script, limit] => return exec(socket, script, scaled(seconds(limit)?)),
        ["peer", nics, ref wires @ ..] => {
            let stdin: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned()?;
            let control = UnixStream::from(stdin);
            let nics = if nics == "here" { None } else { Some(nics.parse()?) };
            umbra_tests::peer::main(&control, nics, wires == [umbra_tests::peer::ONE_WIRE])?;
        }
        ["tick", peer] => net::tick(peer.parse()?, net::TICK_EVERY)?,
        ["tick", peer, every] => net::tick(peer.parse()?, Duration::from_millis(every.parse()?))?,
        ["send", peer, length] => print(&net::send(peer.parse()?, seconds(length)?)?)?,
        ["receive", peer, length] => print(&net::receive(peer.parse()?, seconds(length)?)?)?,
        ["ping", peer, count] => print(&net::ping(peer.parse()?, count.parse()?)?)?,
        ["first-answer", peer, limit] => {
            let peer: Ipv4Addr = peer.parse()?;
            print(&net::first_answer(peer, scaled(seconds(limit)?))?.as_secs_f64())?;
        }
        ["reinit", address, peer] => print(&reinit::reinit(address, peer.parse()?)?)?,
        ["reinit-disk"] => print(&reinit::reinit_disk()?)?,
        ["storm", function, length] => print(&storm::storm(function, scaled(seconds(length)?))?)?,
        ["mute", function, length] => print(&mute::mute(function, scaled(seconds(length)?))?)?,
        ["flush", disk, length] => print(&flush::flush(Path::new(disk), seconds(length)?)?)?,
        ["disk", disk, length, seed] => {
            let found = disk::check(Path::new(disk), seconds(length)?, seed.parse()?);
            print(&found)?;
            return Ok(if found.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        ["io", disk, access @ ("read" | "write"), bytes, depth, length] => {
            let load = io::Load { writes: access == "write", bytes: bytes.parse()?, depth: depth.parse()? };
            print(&io::run(Path::new(disk), load, seconds(length)?)?)?;
        }
        ["hostile", seed] => umbra_tests::hostile::vm::main(seed.parse()?)?,
        ["hostile-guest", seed, life] => umbra_tests::hostile::vm::in_guest(seed.parse()?, life.parse()?),
        ["frames", interface, ref to @ ..] => {
            let to = to.iter().map(|address| frames::address(address)).collect::<Result<Vec<_>, _>>()?;
            frames::send(interface, &to)?;
        }
        ["hold-vcpu"] => match idle_vcpu::hold()? {},
        ["kill-at", stage, events] => print(&kill::kill_at(stage, Path::new(events))?)?,
        _ => {
            eprintln!("{USAGE}");
            return Ok(ExitCode::from(2));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn seconds(text: &str) -> Result<Duration, Box<dyn Error>> {
    Ok(Duration::try_from_secs_f64(text.parse()?)?)
}

fn print(result: &impl serde::Serialize) -> Result<(), Box<dyn Error>> {
    println!("{}", serde_json::to_string(result)?);
    Ok(())
}

/// Runs a script; it is given up when it has printed nothing for `limit`.
fn exec(socket: &str, script: &str, limit: Duration) -> Result<ExitCode, Box<dyn Error>> {
    let mut run = Client::connect(Path::new(socket), limit)?.start(script)?;
    loop {
        let mut printed = false;
        let ended = run.poll_some(limit, |reply| match reply {
            Reply::Stdout { text, .. } => {
                printed = true;
                print!("{text}");
                let _ = std::io::stdout().flush();
            }
            Reply::Stderr { text, .. } => {
                printed = true;
                eprint!("{text}");
            }
            Reply::Hello { .. } | Reply::Exit { .. } => {}
        })?;
        if ended {
            break;
        }
        if !printed {
            return Err(format!("the script in the guest did not end, and printed nothing for {limit:?}").into());
        }
    }
    Ok(ExitCode::from(u8::try_from(run.output().status).unwrap_or(255)))
}
