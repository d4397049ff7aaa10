//! `umbra events`: the events of a machine as JSON lines, of one that runs and of one that has ended.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

use super::connection::Connection;
use super::past::{self, Which};
use crate::base::untrusted_text;
use crate::record::log::EVENT_LOG;
use crate::record::log::EventLog;

/// Arguments of `umbra events`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Each line is a JSON object; docs/events.md lists the events and their fields. `text` is the sentence for people:\n\
        \x20 umbra events | jq -r 'select(.text) | .time + \" \" + .text'"
)]
pub struct Args {
    /// Go on with the events to come, until the machine ends.
    #[arg(long, short)]
    follow: bool,
    /// Of the run with this number (`umbra report --list`), which may be long over.
    #[arg(long, value_name = "NUMBER", conflicts_with = "follow")]
    run: Option<u32>,
    /// The machine, where there are several.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
}

/// An event's number.
#[derive(Deserialize)]
struct Numbered {
    seq: u64,
}

/// Prints the past, and with `--follow` what comes.
///
/// # Errors
///
/// There is no such machine, or its events cannot be read.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let machine = past::find(args.name.as_deref(), args.run.map_or(Which::Last, Which::Number))?;
    let log = machine.folder.join(EVENT_LOG);
    let mut after = 0;
    for path in [EventLog::older(&log), log] {
        after = after.max(print_file(&path)?);
    }
    let Some(stream) = machine.stream else { return Ok(()) };
    // What the file does not have: what came since, and what waits for room on the disk.
    Connection::over(machine.name, stream)?.events(after, args.follow, print)
}

/// Prints the lines of `path`; returns the number of the last.
fn print_file(path: &Path) -> anyhow::Result<u64> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        result => result.with_context(|| format!("read the events in {}", path.display()))?,
    };
    // What a power cut has left of a line is left out below.
    let text = String::from_utf8_lossy(&text);
    let mut last = 0;
    // A line that is being written now comes from the machine itself.
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        if let Ok(Numbered { seq }) = serde_json::from_str(line) {
            last = seq;
            print(line)?;
        }
    }
    Ok(last)
}

fn print(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", untrusted_text::json(line))?;
    Ok(out.flush()?)
}
