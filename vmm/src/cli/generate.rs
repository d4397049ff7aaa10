//! `umbra generate`: shell completions and man pages out of the commands' own definitions, so that they never differ.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

/// Arguments of `umbra generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder that gets `completions/` and `man/`.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

/// Writes all of them.
///
/// # Errors
///
/// The folder cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let (completions, man) = (args.folder.join("completions"), args.folder.join("man"));
    for folder in [&completions, &man] {
        fs::create_dir_all(folder).with_context(|| format!("make the folder {}", folder.display()))?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut super::Cli::command(), "umbra", &completions)
            .with_context(|| format!("write completions into {}", completions.display()))?;
    }
    clap_mangen::generate_to(super::Cli::command(), &man)
        .with_context(|| format!("write man pages into {}", man.display()))?;
    super::print(&format!("{}: completions for bash, zsh and fish, and man pages", args.folder.display()))
}
