//! `umbra report`: a machine's past as one HTML page.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;
use umbra_guest_images::files;

use super::image::size;
use super::past::{self, Which};
use crate::base::wall;
use crate::record::archive::Kept;
use crate::record::history::{self, Outcome, PastFailure, page};
use crate::record::status_text::{Column, or_dash, table};

/// Arguments of `umbra report`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  umbra report                    umbra-report.html, of the machine that runs, or has run\n\
        \x20 umbra report --list             the runs that are kept, each with its number\n\
        \x20 umbra report --run 7            of one of them\n\
        \x20 umbra report -o - | less        to standard output\n  umbra report saved/reports      of a copied folder"
)]
pub struct Args {
    /// A folder of reports, in place of a machine's own.
    #[arg(value_name = "FOLDER", conflicts_with_all = ["name", "previous", "run", "list"])]
    folder: Option<PathBuf>,
    /// The page's file; `-` is standard output.
    #[arg(long, short, value_name = "FILE", default_value = "umbra-report.html")]
    output: PathBuf,
    /// The machine, where there are several.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
    /// Of the run before this one.
    #[arg(long)]
    previous: bool,
    /// Of the run with this number, which --list shows.
    #[arg(long, value_name = "NUMBER", conflicts_with = "previous")]
    run: Option<u32>,
    /// List the runs that are kept, and write no page.
    #[arg(long, conflicts_with_all = ["previous", "run"])]
    list: bool,
    /// Print that list as JSON.
    #[arg(long, requires = "list")]
    json: bool,
}

/// The list of `--list`, as `--json` has it.
#[derive(Debug, Serialize)]
pub struct Listing {
    /// The machine's name.
    pub machine: String,
    /// Its runs, the oldest first.
    pub runs: Vec<Row>,
}

/// A run that is kept.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Its number.
    pub run: u32,
    /// The folder of its events and crash reports.
    pub folder: PathBuf,
    /// Time of its first event, UTC.
    pub from: String,
    /// Time of its last event.
    pub until: String,
    /// From the first event to the last, seconds.
    pub seconds: f64,
    /// Failures of its driver VMs.
    pub failures: usize,
    /// The longest outage of a guest's device, ms.
    pub longest_outage_ms: Option<f64>,
    /// Bytes of its files.
    pub bytes: u64,
}

impl Row {
    /// What is kept of `machine`'s `run`; `None`: its events cannot be read.
    fn new(run: &Kept, machine: &str) -> Option<Self> {
        let history = history::read(&run.folder, machine).ok()?;
        let outage = |failure: &PastFailure| match failure.outcome {
            Outcome::Live(_, outage_ms) => outage_ms,
            _ => None,
        };
        Some(Self {
            run: run.number,
            folder: run.folder.clone(),
            longest_outage_ms: history.failures.iter().filter_map(outage).max_by(f64::total_cmp),
            failures: history.failures.len(),
            from: history.from,
            until: history.until,
            seconds: history.seconds,
            bytes: run.bytes(),
        })
    }
}

const COLUMNS: [Column<Row>; 6] = [
    ("RUN", |row| row.run.to_string()),
    ("BEGAN", |row| row.from.clone()),
    ("LASTED", |row| lasted(row.seconds)),
    ("FAILURES", |row| row.failures.to_string()),
    ("LONGEST OUTAGE", |row| or_dash(row.longest_outage_ms.map(|ms| format!("{ms:.0} ms")).as_ref())),
    ("SIZE", |row| size(row.bytes)),
];

fn lasted(seconds: f64) -> String {
    match seconds {
        0.0..120.0 => format!("{seconds:.0} s"),
        120.0..7200.0 => format!("{:.0} min", seconds / 60.0),
        7200.0..172_800.0 => format!("{:.0} h", seconds / 3600.0),
        _ => format!("{:.0} days", seconds / 86_400.0),
    }
}

/// Prints the list of the runs that are kept.
fn list(args: &Args) -> anyhow::Result<()> {
    let (machine, runs) = past::kept(args.name.as_deref())?;
    let rows = runs.iter().filter_map(|run| Row::new(run, &machine));
    let listing = Listing { runs: rows.collect(), machine };
    if args.json {
        return super::print_json(&listing);
    }
    super::print(&table(&COLUMNS, &listing.runs))
}

/// Writes the page.
///
/// # Errors
///
/// There is no machine's past, or the page cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if args.list {
        return list(args);
    }
    let (name, folder) = match &args.folder {
        Some(folder) => (name_of(folder), folder.clone()),
        None => {
            let which = if args.previous { Which::Previous } else { args.run.map_or(Which::Last, Which::Number) };
            let past = past::find(args.name.as_deref(), which)?;
            (past.name, past.folder)
        }
    };
    let history = history::read(&folder, &name)?;
    let page = page::page(&history, &wall::now());
    if args.output == Path::new("-") {
        return super::print(&page);
    }
    write(&args.output, &page).with_context(|| format!("write {}", args.output.display()))?;
    let many = match history.failures.len() {
        1 => "1 failure".into(),
        n => format!("{n} failures"),
    };
    super::print(&format!("{}: {many} of {name}, {} KiB", args.output.display(), page.len().div_ceil(1024)))
}

/// A saved folder's machine: the folder `reports` is in the machine's own.
fn name_of(folder: &Path) -> String {
    let named = if folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("reports")) {
        folder.parent().and_then(Path::file_name)
    } else {
        folder.file_name()
    };
    named.map_or_else(|| "machine".into(), |name| name.to_string_lossy().into_owned())
}

/// Whole or not at all: a full disk leaves the page of before.
fn write(path: &Path, page: &str) -> std::io::Result<()> {
    // A device or a pipe cannot be replaced.
    if fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
        return fs::write(path, page);
    }
    files::write_atomically(path, page.as_bytes()).map_err(|error| error.source)
}
