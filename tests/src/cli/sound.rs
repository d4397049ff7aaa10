//! `umbra-bench sound`.

use std::process::ExitCode;

use super::{say, write_json};
use crate::demo::attempts;
use crate::measure::sound::{self, SoundMeasureSpec};

/// Arguments of `umbra-bench sound`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The card: hda, es1370, ac97. May be repeated.
    #[arg(long = "model", value_name = "MODEL", default_value = "hda")]
    models: Vec<String>,
    /// What becomes of the song during an outage.
    #[arg(long, default_value = "skip", value_parser = ["skip", "hold"])]
    policy: String,
    /// Crashes in one song; 0 for no such song.
    #[arg(long, default_value_t = 3)]
    crashes: u32,
    /// Seconds of undisturbed playback beside a busy guest, through the driver VM and straight; 0 for none.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Runs the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut all = Vec::new();
    for model in &args.models {
        let (model, policy) = (model.as_str().into(), args.policy.clone());
        let spec = SoundMeasureSpec { model, policy, crashes: args.crashes, seconds: args.seconds };
        let results = attempts::in_test_host(&say, |_| true, |_| sound::run(&spec, &say))?;
        print!("{}", results.table());
        all.push(results);
    }
    write_json("sound.json", &all)?;
    Ok(ExitCode::SUCCESS)
}
