//! The sound service of a driver VM: started by the agent, one thread a guest.
//!
//! It waits for the card, in a standby for as long as there is none, with everything done that can be done without;
//! says on standard output (one JSON line, for the agent) what it can do, unmutes it, and then plays and records for the
//! hosts at the console ports `org.umbra.sound.N`, each of which is told of the card when its session begins. Nothing is
//! played before the levels are set. Several guests are mixed by alsa-lib's dmix. Sessions come and go, and one at fault
//! ends alone. Any failure of the card ends the service with a sentence: the driver VM has then failed.

mod card;
mod config;
mod fault;
mod mixer;
mod playback;
mod port;
mod record;
mod session;
mod standstill;
mod startup;
#[cfg(test)]
mod tests;
mod watch;

use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use anyhow::Context;
use umbra_shadow::Generation;

use port::Port;
use session::Session;

/// Bytes of a session's stack: all of it is locked into memory.
const STACK: usize = 256 * 1024;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("--version") {
        println!("umbra-sound {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("umbra-sound: {error:#}");
            // The agent takes that for the end, also where a thread that hangs in the kernel keeps this process from ending.
            // SAFETY: nothing uses the standard output from here on.
            unsafe { libc::close(libc::STDOUT_FILENO) };
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let (generation, guests) = arguments()?;
    let paths = port::wait(guests)?;
    config::prepare(paths.len())?;
    be_punctual();
    let (sender, ended) = mpsc::channel();
    let mut ports = Vec::new();
    for path in paths {
        ports.push((Port::open(&path, generation)?, thread(sender.clone())?));
    }

    let found = card::wait()?;
    startup::begin();
    config::adapt(&found, ports.len())?;
    let (card, mut open) = card::describe(&found)?;
    startup::mark("described");
    let mixed = ports.len() > 1;
    if mixed {
        // Each has to open dmix itself.
        open.clear();
    }
    let (mut watched, movement) = (Vec::new(), Arc::default());
    for (port, thread) in ports {
        let session = Session::new(port, &card, std::mem::take(&mut open), mixed, &movement);
        watched.push(session.calls());
        // Fails only if the thread has ended, which says why.
        let _ = thread.send(session);
    }
    let line = serde_json::to_string(&card).context("cannot describe the card")?;
    let say = |line: &str| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{line}").and_then(|()| out.flush()).context("cannot tell the agent")
    };
    say(&line)?;
    // Beside what the hosts have to say.
    let levels = move || match mixer::set_levels() {
        Ok(()) => {
            startup::mark("levels set");
            session::allow_sound();
        }
        // Fails only when this program ends.
        Err(error) => drop(sender.send(error)),
    };
    std::thread::Builder::new()
        .name("levels".into())
        .stack_size(STACK)
        .spawn(levels)
        .context("cannot start a thread")?;
    // A guest's end that gives up ends the service: the host starts over with a new driver VM.
    Err(watch::watch(&ended, &watched, watch::LOOK, || say("")))
}

/// A thread that runs a guest's end as soon as it gets it.
fn thread(ended: mpsc::Sender<anyhow::Error>) -> anyhow::Result<mpsc::Sender<Session>> {
    let (sender, session) = mpsc::channel::<Session>();
    let run = move || session.recv().ok().and_then(|session| ended.send(session.run()).ok());
    let builder = std::thread::Builder::new().name("session".into()).stack_size(STACK);
    builder.spawn(run).context("cannot start a thread")?;
    Ok(sender)
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
