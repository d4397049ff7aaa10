//! The sound service: a program of its own, because alsa-lib wants to be linked dynamically. The agent starts it, passes
//! on what it says of the card, and takes its end for the driver VM's failure.

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use umbra_driver_vm::protocol::HEARTBEAT_MS;
use umbra_shadow::sound::Card;

/// Where the image has it.
const PROGRAM: &str = "/bin/umbra-sound";
/// Longest description of a card, in bytes.
const MAX_LINE: usize = 16 * 1024;
/// Time in which the process of a service that has closed its output has to end; later its end is reported without its status. A
/// few heartbeats.
const ENDS_WITHIN: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(5);
/// Heartbeats without a word of a service that has its card, after which it hangs: ten seconds, and it says every second that it lives.
/// Heartbeats, not time: where these come late, so may its word.
const SILENT: u64 = 10_000 / HEARTBEAT_MS;

/// The running service.
#[derive(Debug)]
pub struct Service {
    child: Child,
    output: ChildStdout,
    line: Vec<u8>,
    described: bool,
    /// Heartbeats since its last word.
    silent: u64,
}

impl Service {
    /// Starts it, for `ends` guests.
    ///
    /// # Errors
    /// When it is not in the image.
    pub fn start(generation: u32, ends: u16) -> anyhow::Result<Self> {
        let child = Command::new(PROGRAM)
            .args([generation.to_string(), ends.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| {
                format!("cannot start the sound service {PROGRAM}; is this image one for a sound card?")
            })?;
        Self::watch(child)
    }

    fn watch(mut child: Child) -> anyhow::Result<Self> {
        let output = child.stdout.take().context("the sound service has no output")?;
        let errors = child.stderr.as_ref().context("the sound service has no error output")?;
        for pipe in [output.as_fd(), errors.as_fd()] {
            fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("cannot watch the sound service")?;
        }
        Ok(Self { child, output, line: Vec::new(), described: false, silent: 0 })
    }

    /// Stops it where it is, so that nobody feeds the card: a failure to be noticed by the host.
    ///
    /// # Errors
    /// When it is gone.
    pub fn stall(&self) -> anyhow::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, Signal::SIGSTOP).context("cannot stop the sound service")
    }

    /// For polling.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }

    /// Whether the service has described its card.
    pub fn has_card(&self) -> bool {
        self.described
    }

    /// To be called at each heartbeat.
    ///
    /// # Errors
    /// When the service hangs. Where guests share a card, nobody else is believed that says so.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.silent = if self.described { self.silent + 1 } else { 0 };
        if self.silent > SILENT {
            bail!("the sound service hangs");
        }
        Ok(())
    }

    /// The card, once, when the service has described it.
    ///
    /// # Errors
    /// When the service has ended; the error says why.
    pub fn card(&mut self) -> anyhow::Result<Option<Card>> {
        let mut chunk = [0; 1024];
        loop {
            match self.output.read(&mut chunk) {
                Ok(0) => return Err(self.end()),
                Ok(length) => {
                    self.silent = 0;
                    if !self.described {
                        self.line.extend_from_slice(&chunk[..length]);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("cannot hear the sound service"),
            }
            if self.line.len() > MAX_LINE {
                bail!("the sound service talks too much");
            }
        }
        if self.described || !self.line.ends_with(b"\n") {
            return Ok(None);
        }
        self.described = true;
        let card = serde_json::from_slice(&self.line).context("the sound service does not describe its card")?;
        self.line.clear();
        Ok(Some(card))
    }

    /// The service has ended: why? Its process may end later, as when the kernel waits for the card to be closed.
    fn end(&mut self) -> anyhow::Error {
        let deadline = Instant::now() + ENDS_WITHIN;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status.to_string(),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK),
                Ok(None) => break "its process has not".into(),
                Err(error) => break error.to_string(),
            }
        };
        let mut said = Vec::new();
        if let Some(errors) = &mut self.child.stderr {
            // It does not block: what has been read by the time that there is no more is kept.
            let _ = errors.read_to_end(&mut said);
        }
        let said = String::from_utf8_lossy(&said);
        anyhow::anyhow!("the sound service ended ({status}): {}", said.lines().last().unwrap_or_default())
    }
}

/// The kernel driver of the first card.
pub fn driver() -> String {
    let card = fs::read_dir("/sys/class/sound")
        .into_iter()
        .flatten()
        .flatten()
        .find(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with("card")));
    let driver = card.and_then(|card| fs::read_link(card.path().join("device/driver")).ok());
    driver.and_then(|path| Some(path.file_name()?.to_str()?.to_owned())).unwrap_or_else(|| "unknown".into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn error_of(script: &str) -> (String, Service) {
        let mut command = Command::new("sh");
        let child = command.args(["-c", script]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut service = Service::watch(child).unwrap();
        loop {
            match service.card() {
                Ok(card) => assert_eq!(card, None),
                Err(error) => return (error.to_string(), service),
            }
            std::thread::sleep(LOOK);
        }
    }

    #[test]
    fn a_service_that_ends_is_reported_with_its_last_words() {
        let (error, _) = error_of("echo 'first' >&2; echo 'no card' >&2; exit 3");
        assert_eq!(error, "the sound service ended (exit status: 3): no card");
    }

    #[test]
    fn one_that_is_silent_for_long_hangs() {
        let script = r#"printf '{"name":"made up","streams":[]}\n'; while read -r _; do echo; done"#;
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut ask = child.stdin.take().unwrap();
        let mut service = Service::watch(child).unwrap();
        for _ in 0..=2 * SILENT {
            service.check().unwrap();
        }
        while service.card().unwrap().is_none() {
            std::thread::sleep(LOOK);
        }
        for _ in 0..3 {
            (0..SILENT).for_each(|_| service.check().unwrap());
            std::io::Write::write_all(&mut ask, b"\n").unwrap();
            while service.silent > 0 {
                assert_eq!(service.card().unwrap(), None);
                std::thread::sleep(LOOK);
            }
        }
        (0..SILENT).for_each(|_| service.check().unwrap());
        assert_eq!(service.check().unwrap_err().to_string(), "the sound service hangs");
        drop(ask);
        service.child.wait().unwrap();
    }

    #[test]
    fn one_that_cannot_end_is_reported_all_the_same() {
        let (error, mut service) = error_of("echo 'no card' >&2; exec >&-; exec sleep 1000");
        assert_eq!(error, "the sound service ended (its process has not): no card");
        service.child.kill().unwrap();
        service.child.wait().unwrap();
    }
}
