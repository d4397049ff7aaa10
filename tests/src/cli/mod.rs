//! The command line of `umbra-bench`.
//!
//! Exit codes: that of the script for `run`; otherwise 0 done, 1 failed, 2 wrong usage. Errors are printed here and
//! nowhere else, with their causes.

mod compare;
mod demo;
mod disks;
mod hostile;
mod measure;
mod measure_disk;
mod outages;
mod rebirth;
mod run;
mod soak;
mod sound;
mod suite;
mod wav;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::assets::target_dir;
use crate::bench::brake;

/// Boots a test host under QEMU with the devices you name, and runs scripts, the demo or the measurements in it.
#[derive(Debug, Parser)]
#[command(name = "umbra-bench", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fetch and build what the bench needs, and say what that is.
    Setup,
    /// Run a script or a command in a fresh test host; print its output, end with its status.
    Run(run::RunArgs),
    /// Show that a download and a song survive the crashes of their drivers.
    Demo(demo::Args),
    /// Crash the driver VMs of disk controllers under a checker, with loss of their caches; a table and JSON.
    Disks(disks::Args),
    /// Measure throughput, round trips, outages and memory; a table and JSON.
    Measure(measure::Args),
    /// Measure a disk behind a driver VM beside what one would have otherwise, and its outages; a table and JSON.
    MeasureDisk(measure_disk::Args),
    /// Measure builds of Umbra side by side in one test host, in turns: speed and what it takes; a table and JSON.
    Compare(compare::Args),
    /// Crash one driver VM many times: each outage and its parts, beside the bare re-initialisation; a table and JSON.
    Outages(outages::Args),
    /// Measure how soon driver VMs are there again, booted and restored, and the memory they hold; a table and JSON.
    Rebirth(rebirth::Args),
    /// Measure a song through crashes of the sound driver, silences and cost; a table and JSON.
    Sound(sound::Args),
    /// Load network and sound fully with nothing failing; every failure that Umbra sees is a false alarm.
    Soak(soak::Args),
    /// Have a driver VM attack, life after life, beside a guest that must not notice; a table of what stopped it and JSON.
    Hostile(hostile::Args),
    /// Run the test suite and close with the attempts that scenarios needed.
    Suite(suite::Args),
    /// Judge what a sound card played: pieces of the source, silences, samples lost and doubled, clicks.
    Wav(wav::Args),
    /// Give the terminal to a shell in a fresh test host.
    Shell(run::MachineArgs),
}

/// Runs the command that the process was started for.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    if let Err(error) = brake::speed() {
        eprintln!("umbra-bench: {error}");
        return ExitCode::from(2);
    }
    let result = match command {
        Command::Setup => run::setup(),
        Command::Run(args) => run::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Disks(args) => disks::run(&args),
        Command::Measure(args) => measure::run(&args),
        Command::MeasureDisk(args) => measure_disk::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Outages(args) => outages::run(&args),
        Command::Rebirth(args) => rebirth::run(&args),
        Command::Sound(args) => sound::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::Hostile(args) => hostile::run(&args),
        Command::Suite(args) => suite::run(&args),
        Command::Wav(args) => wav::run(&args),
        Command::Shell(args) => run::shell(args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("umbra-bench: {error:#}");
        ExitCode::FAILURE
    })
}

/// Writes `figures` as JSON to `name` in the folder of the bench, and says where that is.
fn write_json(name: &str, figures: &impl Serialize) -> anyhow::Result<()> {
    let path = target_dir().join("bench").join(name);
    std::fs::write(&path, serde_json::to_string_pretty(figures)? + "\n")?;
    println!("written to {}", path.display());
    Ok(())
}

/// Tells the user what is being done: a line on standard error, so that output stays clean.
pub(crate) fn say(what: &str) {
    eprintln!("    {what}");
}
