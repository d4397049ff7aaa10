//! `umbra status`, `umbra crash` and `umbra stop`: requests to a running machine.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use umbra_driver_vm::protocol::CrashKind;

use crate::supervisor::control::{Request, Response, StopHow};
use crate::supervisor::rundir;

/// How long a machine may take to answer; its loop never waits for anything.
const ANSWER: Duration = Duration::from_secs(10);

/// Arguments of `umbra status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Only this guest or driver VM.
    vm: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `umbra crash`.
#[derive(Debug, clap::Args)]
pub struct CrashArgs {
    /// The driver VM.
    driver: String,
    /// In which way it is to fail.
    #[arg(long, value_enum, default_value_t = Kind::Panic)]
    kind: Kind,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `umbra stop`.
#[derive(Debug, clap::Args)]
pub struct StopArgs {
    /// Kill the VMs instead of pressing the guests' power buttons.
    #[arg(long, short)]
    force: bool,
    /// Seconds to wait for the guests to power off.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    #[command(flatten)]
    common: Common,
}

/// Arguments of all three.
#[derive(Debug, clap::Args)]
struct Common {
    /// The machine, where several run.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Ways to fail.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    /// A kernel panic.
    Panic,
    /// The agent stops answering, the kernel lives on.
    AgentHang,
    /// A reboot without a panic.
    Reboot,
}

impl From<Kind> for CrashKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Panic => Self::Panic,
            Kind::AgentHang => Self::AgentHang,
            Kind::Reboot => Self::Reboot,
        }
    }
}

/// Shows a machine's status.
///
/// # Errors
///
/// No machine answers, or it has no VM of the given name.
pub fn status(args: &StatusArgs) -> anyhow::Result<()> {
    let mut machine = Connection::open(&args.common)?;
    let Response::Status(mut status) = machine.ask(&Request::Status)? else { bail!(UNEXPECTED) };
    if let Some(vm) = &args.vm
        && !status.retain(vm)
    {
        bail!("{} has no guest or driver VM named {vm}", machine.name);
    }
    if args.common.json {
        return super::print_json(&status);
    }
    super::print(&status.to_string())
}

/// Makes a driver VM fail for real.
///
/// # Errors
///
/// No machine answers, or there is nothing to crash.
pub fn crash(args: &CrashArgs) -> anyhow::Result<()> {
    let mut machine = Connection::open(&args.common)?;
    let request = Request::Crash { name: args.driver.clone(), kind: args.kind.into() };
    let response = machine.ask(&request)?;
    let Response::Crashing { name, generation, .. } = &response else { bail!(UNEXPECTED) };
    if args.common.json {
        return super::print_json(&response);
    }
    super::print(&format!("{name}: generation {generation} is told to crash"))
}

/// Ends a machine and waits for the end.
///
/// # Errors
///
/// No machine answers, or its guests do not react.
pub fn stop(args: &StopArgs) -> anyhow::Result<()> {
    let mut machine = Connection::open(&args.common)?;
    let how = if args.force { StopHow::Kill } else { StopHow::PowerButton };
    let response = machine.ask(&Request::Stop { how })?;
    machine.wait_for_the_end(Duration::from_secs(args.timeout))?;
    if args.common.json {
        return super::print_json(&response);
    }
    super::print(&format!("{} has ended", machine.name))
}

/// What a machine of another version might answer.
const UNEXPECTED: &str = "the machine gave an answer that this version does not know; is it of another version?";

/// A connection to a machine.
struct Connection {
    name: String,
    stream: BufReader<UnixStream>,
}

impl Connection {
    fn open(common: &Common) -> anyhow::Result<Self> {
        let (name, stream) = rundir::connect(&rundir::base(), common.name.as_deref())?;
        stream.set_read_timeout(Some(ANSWER)).context("talk to the machine")?;
        Ok(Self { name, stream: BufReader::new(stream) })
    }

    /// Sends a request and waits for its answer; an error of the machine's is an error here.
    fn ask(&mut self, request: &Request) -> anyhow::Result<Response> {
        let what = || format!("talk to the machine {}", self.name);
        let request = format!("{}\n", serde_json::to_string(request).with_context(what)?);
        self.stream.get_mut().write_all(request.as_bytes()).with_context(what)?;
        let mut line = String::new();
        self.stream.read_line(&mut line).with_context(what)?;
        if line.is_empty() {
            bail!("the machine {} ended before it answered", self.name);
        }
        match serde_json::from_str(&line).context(UNEXPECTED)? {
            Response::Error { what } => bail!(what),
            response => Ok(response),
        }
    }

    /// Waits until the machine closes the connection, which it does at its end.
    fn wait_for_the_end(&mut self, patience: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "the guests of {} have not powered off after {} s; `umbra stop --force` kills them",
                    self.name,
                    patience.as_secs()
                );
            }
            self.stream.get_ref().set_read_timeout(Some(left)).context("wait for the machine")?;
            match self.stream.read_line(&mut String::new()) {
                Ok(0) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(()),
                Ok(_) | Err(_) => {}
            }
        }
    }
}
