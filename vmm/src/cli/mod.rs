//! The command line: one file a subcommand, each with its `Args` and a `run` that returns the error for [`main`] to print.
//!
//! Exit statuses: 0 done, 1 failed (one line on stderr that says why), 2 wrong usage, and those of [`exit`]; `docs/programs.md` lists
//! them. The chain of an error's causes is printed here and nowhere else.

pub mod bind;
pub mod client;
mod connection;
pub mod console;
pub mod doctor;
pub mod events;
mod exit;
pub mod generate;
mod guest;
pub mod image;
pub mod list;
mod logging;
mod past;
pub mod reload;
pub mod report;
pub mod run;
pub mod show_confine;
pub mod sleep;
pub mod snapshots;
pub mod vm;
pub mod wait;
mod watch;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::base::error::chain;
use crate::base::untrusted_text::{self, block};
use crate::record::schema::Versioned;
use crate::supervisor::RunError;
use crate::vm::confine::{self, OfRoot};
use exit::Exit;

/// A virtual machine monitor whose guests survive the crash of their device drivers.
#[derive(Debug, Parser)]
#[command(name = "umbra", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a machine: guests, and the driver VMs that serve them.
    Run(Box<run::Args>),
    /// Show a running machine: guests, driver VMs, their state, the last outage.
    Status(client::StatusArgs),
    /// List the machines that run, and how they are.
    List(list::Args),
    /// Wait until a machine, a driver VM or a guest is as it should be.
    Wait(wait::Args),
    /// Print a machine's events as JSON lines.
    Events(events::Args),
    /// Write a machine's past failures as one HTML page.
    Report(report::Args),
    /// Make a driver VM crash for real, to see its guests survive it.
    Crash(client::CrashArgs),
    /// Restart a driver VM under its running guests, from a new image if one is named.
    Restart(client::RestartArgs),
    /// Try a quarantined driver VM again.
    Resume(client::ResumeArgs),
    /// Read the machine file again: take over what can change as the machine runs, say what cannot.
    Reload(reload::Args),
    /// Have the driver VMs give their devices up before the host sleeps; guests are masked.
    Sleep(sleep::Args),
    /// Have the driver VMs be reborn when the host is awake.
    Wake(sleep::Args),
    /// End a running machine, or one of its guests.
    Stop(client::StopArgs),
    /// Start a guest that is off or has failed.
    Start(guest::StartArgs),
    /// Have a guest power off and start it again.
    Reboot(guest::RebootArgs),
    /// Make a disk of a running guest larger.
    Resize(guest::ResizeArgs),
    /// Look at a guest's serial console, and type there; Ctrl-] leaves.
    Console(console::Args),
    /// Inject a non-maskable interrupt into a guest: its kernel reports where it is, or crashes.
    Nmi(guest::NmiArgs),
    /// Check the host: what works, what is missing, how to fix it.
    Doctor(doctor::Args),
    /// Make a driver VM image, or unpack a kernel.
    Image(image::Args),
    /// List the snapshots that driver VMs are restored from, or remove some.
    Snapshots(snapshots::Args),
    /// Print what the threads of a VM's process may ask of the kernel, and why.
    Confine(show_confine::Args),
    /// Take a PCI function from the host's driver, for a VM.
    Bind(bind::BindArgs),
    /// Give a PCI function back to the host's driver.
    Unbind(bind::UnbindArgs),
    /// Write shell completions and man pages into a folder (`make packaging`).
    #[command(hide = true)]
    Generate(generate::Args),
    /// Be the process of one VM (started by `umbra run`).
    #[command(hide = true)]
    Vm(vm::Args),
}

impl Command {
    /// What the process's logs are about.
    fn subject(&self) -> &str {
        match self {
            Self::Run(_) => "supervisor",
            Self::Vm(args) => args.name.as_deref().unwrap_or("vm"),
            _ => "umbra",
        }
    }

    /// Who writes the process's log: a thread, where an event loop must not wait for it.
    fn log_written_by(&self) -> logging::WrittenBy {
        match self {
            Self::Run(_) | Self::Vm(_) => logging::WrittenBy::Thread,
            _ => logging::WrittenBy::Caller,
        }
    }
}

/// Runs the command that the process was started for.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    if let Command::Vm(args) = &command
        && let Err(error) = confine::begin(args.confine, OfRoot { user: args.user, namespaces: args.namespaces })
    {
        let _ = writeln!(std::io::stderr(), "umbra: {}", chain(&error));
        return ExitCode::FAILURE;
    }
    let refused = logging::init(command.subject(), command.log_written_by());
    // A VM's process has the supervisor's environment, which has been told.
    if let Some(what) = refused.filter(|_| !matches!(command, Command::Vm(_))) {
        tracing::warn!("{what}");
    }
    let result = match command {
        Command::Run(args) => run::run(*args),
        Command::Status(args) => client::status(&args),
        Command::List(args) => list::run(&args),
        Command::Wait(args) => wait::run(&args),
        Command::Events(args) => events::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Crash(args) => client::crash(&args),
        Command::Restart(args) => client::restart(&args),
        Command::Resume(args) => client::resume(&args),
        Command::Reload(args) => reload::run(&args),
        Command::Sleep(args) => sleep::sleep(&args),
        Command::Wake(args) => sleep::wake(&args),
        Command::Stop(args) => client::stop(&args),
        Command::Start(args) => guest::start(&args),
        Command::Reboot(args) => guest::reboot(&args),
        Command::Resize(args) => guest::resize(&args),
        Command::Console(args) => console::run(&args),
        Command::Nmi(args) => guest::nmi(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Image(args) => image::run(&args),
        Command::Snapshots(args) => snapshots::run(&args),
        Command::Confine(args) => show_confine::run(&args),
        Command::Bind(args) => bind::bind(&args),
        Command::Unbind(args) => bind::unbind(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Vm(args) => vm::run(args),
    };
    // The last line is the error's.
    logging::finish();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let status = ExitCode::from(exit::status_of(&error));
            // Once is enough.
            let is_told = matches!(error.downcast_ref(), Some(RunError::Vm { reported: true, .. }));
            if is_told || error.downcast_ref().is_some_and(Exit::is_silent) {
                return status;
            }
            // With stderr gone, the exit code has to do.
            // A VM may have had a word in it.
            let _ = writeln!(std::io::stderr(), "umbra: {}", block(&format!("{error:#}")));
            status
        }
    }
}

/// Prints `text` on stdout, as a line or more.
fn print(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout().lock(), "{}", text.trim_end())?;
    Ok(())
}

/// Prints `value` on stdout as JSON, with its `schema`.
fn print_json<T: serde::Serialize>(value: &T) -> anyhow::Result<()> {
    print(&untrusted_text::json(&serde_json::to_string_pretty(&Versioned::new(value))?))
}

/// The reader of our output went away, as in `umbra status | head -1`: no error of ours.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}
