//! `umbra report`: a machine's past as one HTML page.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::base::wall;
use crate::record::history::{self, page};
use crate::supervisor::start::rundir;

/// Arguments of `umbra report`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  umbra report                    umbra-report.html, of the machine that runs, or has run\n\
        \x20 umbra report -o - | less        to standard output\n  umbra report saved/reports      of a copied folder"
)]
pub struct Args {
    /// A folder of reports, in place of a machine's own.
    #[arg(value_name = "FOLDER", conflicts_with_all = ["name", "previous"])]
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
}

/// Writes the page.
///
/// # Errors
///
/// There is no machine's past, or the page cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let (name, folder) = match &args.folder {
        Some(folder) => (name_of(folder), folder.clone()),
        None => {
            let machine = rundir::find(&rundir::base(), args.name.as_deref())?;
            (machine.name, history::folder(&machine.path, args.previous))
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
    let new = path.with_extension("html.new");
    let written = fs::write(&new, page).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}
