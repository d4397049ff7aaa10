//! The exec server: reads [`Request`]s from a port, runs scripts side by side, streams their output back.
//!
//! Each script is a process group of its own, so that killing a run takes what it started along. The server never
//! ends by itself: a machine under test without it cannot be asked anything.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::wire::{Lines, Reply, Request, write_line};

type Running = Arc<Mutex<HashMap<u64, Pid>>>;

/// Serves `port` until reading fails.
///
/// # Errors
/// What the port says.
pub fn serve(port: File) -> io::Result<()> {
    let mut reader = port.try_clone()?;
    let (replies, outbox) = channel::<Reply>();
    thread::Builder::new().name("replies".into()).spawn(move || {
        for reply in outbox {
            // A client that went away is no reason to end: the next one says hello.
            let _ = write_line(&port, &reply);
        }
    })?;
    let running = Running::default();
    let mut lines = Lines::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match reader.read(&mut buffer) {
            // Nobody is connected at the host's end.
            Ok(0) => thread::sleep(Duration::from_millis(20)),
            Ok(n) => lines.push(&buffer[..n], |request| handle(request, &replies, &running)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn handle(request: Request, replies: &Sender<Reply>, running: &Running) {
    match request {
        Request::Hello { token } => {
            let _ = replies.send(Reply::Hello { token });
        }
        Request::Run { id, script } => {
            if let Err(e) = start(id, &script, replies.clone(), running.clone()) {
                let text = format!("cannot start /bin/sh: {e}\n");
                let _ = replies.send(Reply::Stderr { id, text });
                let _ = replies.send(Reply::Exit { id, status: 127 });
            }
        }
        Request::Kill { id } => {
            let group = running.lock().unwrap_or_else(PoisonError::into_inner).get(&id).copied();
            if let Some(group) = group {
                let _ = killpg(group, Signal::SIGKILL);
            }
        }
    }
}

fn start(id: u64, script: &str, replies: Sender<Reply>, running: Running) -> io::Result<()> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    running.lock().unwrap_or_else(PoisonError::into_inner).insert(id, group);
    let out = child.stdout.take();
    let err = child.stderr.take();
    thread::Builder::new().name(format!("run-{id}")).spawn(move || {
        let errors = err.map(|err| {
            let replies = replies.clone();
            thread::spawn(move || pump(err, &replies, |text| Reply::Stderr { id, text }))
        });
        if let Some(out) = out {
            pump(out, &replies, |text| Reply::Stdout { id, text });
        }
        if let Some(errors) = errors {
            let _ = errors.join();
        }
        let status = status_of(&mut child);
        running.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        let _ = replies.send(Reply::Exit { id, status });
    })?;
    Ok(())
}

fn status_of(child: &mut Child) -> i32 {
    match child.wait() {
        Ok(status) => status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(255),
        Err(_) => 255,
    }
}

fn pump(mut from: impl Read, replies: &Sender<Reply>, reply: impl Fn(String) -> Reply) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                let _ = replies.send(reply(String::from_utf8_lossy(&buffer[..n]).into_owned()));
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
