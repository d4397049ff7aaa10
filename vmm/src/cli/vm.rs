//! `umbra vm`: the process of one VM. Hidden: only `umbra run` starts it, with the control socket inherited.

/// Arguments of `umbra vm`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Descriptor number of the control socket (`SOCK_SEQPACKET`), which carries `process::ipc` messages.
    #[arg(long)]
    pub control: i32,
}

/// Runs one VM until it ends.
///
/// # Errors
///
/// What went wrong before the supervisor could be told.
pub fn run(args: &Args) -> anyhow::Result<()> {
    // `process::vm::main(args.control)` goes here.
    anyhow::bail!("no VM can be run on control socket {} by this build", args.control)
}
