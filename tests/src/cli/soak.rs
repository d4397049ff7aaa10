//! `umbra-bench soak`.

use std::process::ExitCode;

use super::{say, write_json};
use crate::measure::soak::{self, SoakSpec};

/// Arguments of `umbra-bench soak`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The NIC model: e1000e, rtl8139, igb.
    #[arg(long, value_name = "MODEL", default_value = "e1000e")]
    nic: String,
    /// The sound card: hda, es1370, ac97.
    #[arg(long, value_name = "MODEL", default_value = "hda")]
    sound: String,
    /// How long.
    #[arg(long, default_value_t = 3600)]
    seconds: u32,
    /// Idle loops in the test host, which has two processors.
    #[arg(long, default_value_t = 2)]
    loops: u32,
}

/// Runs it; fails if there was an alarm.
///
/// # Errors
/// It could not be run to its end.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (nic, sound) = (args.nic.as_str().into(), args.sound.as_str().into());
    let result = soak::run(&SoakSpec { nic, sound, seconds: args.seconds, loops: args.loops }, &say)?;
    println!("{}", result.line());
    write_json("soak.json", &result)?;
    Ok(if result.alarms.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
