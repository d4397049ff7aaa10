//! `umbra image`.

/// Arguments of `umbra image`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs `umbra image`.
///
/// # Errors
///
/// What could not be made, and why.
pub fn run(_args: &Args) -> anyhow::Result<()> {
    anyhow::bail!("no image can be made by this build")
}
