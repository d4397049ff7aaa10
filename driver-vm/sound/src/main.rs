//! The sound service of a driver VM: started by the agent, one thread a guest.
//!
//! It waits for the card, unmutes it, says on standard output what it can do (one JSON line, for the agent), and then
//! plays and records for the hosts at the console ports `org.umbra.sound.N`. Several guests are mixed by alsa-lib's
//! dmix. Any failure of the card ends the service with a sentence: the driver VM has then failed.

mod card;
mod config;
mod mixer;
mod playback;
mod port;
mod record;
mod session;

use std::io::Write;
use std::process::ExitCode;
use std::sync::mpsc;

use anyhow::Context;
use umbra_shadow::Generation;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("umbra-sound: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let (generation, guests) = arguments()?;
    let found = card::wait()?;
    let ports = port::wait(guests)?;
    config::write(&found, ports.len())?;
    mixer::set_levels()?;
    let card = card::describe(&found)?;
    let line = serde_json::to_string(&card).context("cannot describe the card")?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("cannot tell the agent")?;
    be_punctual();
    let (sender, ended) = mpsc::channel();
    for path in ports {
        let (sender, card) = (sender.clone(), card.clone());
        let session = session::Session::open(&path, generation, card)?;
        std::thread::Builder::new()
            .name("session".into())
            .spawn(move || sender.send(session.run()))
            .context("cannot start a thread")?;
    }
    // The first session that ends, ends the service: the host starts over with a new driver VM.
    Err(ended.recv().context("no session")?)
}

/// The generation, and how many guests there are.
fn arguments() -> anyhow::Result<(Generation, usize)> {
    let number = |n| std::env::args().nth(n)?.parse::<u32>().ok();
    let generation = number(1).and_then(Generation::new);
    generation.zip(number(2).and_then(|n| usize::try_from(n).ok())).context("usage: umbra-sound GENERATION GUESTS")
}

/// Even latency: this service comes before everything else in the driver VM, and is never paged out. Works without.
fn be_punctual() {
    use nix::sys::mman::{MlockAllFlags, mlockall};
    let _ = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE);
    let priority = libc::sched_param { sched_priority: 10 };
    // SAFETY: `priority` is a valid parameter block that outlives the call; 0 is this thread, and those that it starts.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
}
