//! `umbra-bench run`, `shell` and `setup`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};

use super::say;
use crate::assets::Assets;
use crate::bench::{Bench, BenchSpec, Model, Storage};
use crate::probe::wire::Reply;

/// What the test host is made of.
#[derive(Clone, Debug, clap::Args)]
pub struct MachineArgs {
    /// A NIC model of QEMU's: e1000e, igb, rtl8139, e1000, ... May be repeated.
    #[arg(long = "nic", value_name = "MODEL")]
    nics: Vec<String>,
    /// A sound card model: hda, es1370, ac97. May be repeated.
    #[arg(long = "sound", value_name = "MODEL")]
    sound: Vec<String>,
    /// A disk controller with an empty disk: nvme, virtio-blk-pci, ... May be repeated.
    #[arg(long = "storage", value_name = "MODEL")]
    storage: Vec<String>,
    /// CPUs of the test host.
    #[arg(long, default_value_t = 2)]
    cpus: u8,
    /// Memory of the test host, MiB.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// A file or folder to copy to /share in the test host. May be repeated.
    #[arg(long = "file", value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Also build the driver VM image for each NIC and disk controller and put it at /share/DRIVER.
    #[arg(long)]
    images: bool,
    /// Names the folder with logs and captures: target/bench/NAME.
    #[arg(long, default_value = "run")]
    name: String,
}

impl MachineArgs {
    fn spec(&self) -> BenchSpec {
        let mut spec = BenchSpec::new(&self.name);
        if !self.nics.is_empty() {
            spec.nics = self.nics.iter().map(|name| Model::from(name.as_str())).collect();
        }
        spec.sound = self.sound.iter().map(|name| Model::from(name.as_str())).collect();
        let disk = |name: &String| Storage::empty(name, 256 << 20);
        spec.storage = self.storage.iter().map(disk).collect();
        spec.cpus = self.cpus;
        spec.memory_mib = self.memory;
        spec.files.clone_from(&self.files);
        spec
    }

    fn boot(&self, mut spec: BenchSpec) -> anyhow::Result<Bench> {
        let assets = Assets::prepare(&say)?;
        if self.images {
            let models = spec.nics.iter().chain(spec.storage.iter().map(|disk| &disk.model));
            let images = models.map(|model| assets.driver_image(model)).collect::<Result<Vec<_>, _>>()?;
            spec.files.extend(images);
        }
        let nics: Vec<_> = spec.nics.iter().map(ToString::to_string).collect();
        say(&format!("booting the test host with {}", nics.join(", ")));
        let start = Instant::now();
        let bench = Bench::boot(spec, &assets)?;
        say(&format!("up after {:.1} s; logs in {}", start.elapsed().as_secs_f64(), bench.dir().display()));
        Ok(bench)
    }
}

/// Arguments of `umbra-bench run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// A script to run.
    #[arg(long, value_name = "FILE", conflicts_with = "command", required_unless_present = "command")]
    script: Option<PathBuf>,
    /// Seconds after which the script is given up.
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// A command to run instead of a script.
    #[arg(last = true)]
    command: Vec<String>,
}

/// `umbra-bench setup`.
///
/// # Errors
/// What is missing.
pub fn setup() -> anyhow::Result<ExitCode> {
    let assets = Assets::prepare(&say)?;
    println!("kernel package  {}", assets.package().display());
    println!("test host       {} and {}", assets.kernel().display(), assets.host_initramfs().display());
    println!("QEMU            {}", assets.qemu().display());
    Ok(ExitCode::SUCCESS)
}

/// `umbra-bench run`.
///
/// # Errors
/// The test host did not come up, or the script did not end in time.
pub fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let script = match &args.script {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?,
        None => args.command.join(" "),
    };
    let mut bench = args.machine.boot(args.machine.spec())?;
    let mut run = bench.start(&script)?;
    let limit = Duration::from_secs(args.limit);
    let start = Instant::now();
    while start.elapsed() < limit {
        let ended = run.poll_each(Duration::from_secs(1), |reply| match reply {
            Reply::Stdout { text, .. } => {
                print!("{text}");
                let _ = std::io::stdout().flush();
            }
            Reply::Stderr { text, .. } => eprint!("{text}"),
            Reply::Hello { .. } | Reply::Exit { .. } => {}
        });
        match ended {
            Ok(true) => {
                let status = u8::try_from(run.output().status).unwrap_or(255);
                let dir = bench.shutdown()?;
                say(&format!("files of the script in {}", dir.join("share").display()));
                return Ok(ExitCode::from(status));
            }
            Ok(false) => {}
            Err(e) => bail!("{e}\n--- end of the test host's console ---\n{}", bench.tail()),
        }
    }
    bail!("the script did not end within {} s; last lines of the test host's console:\n{}", args.limit, bench.tail())
}

/// `umbra-bench shell`.
///
/// # Errors
/// No terminal, or the test host did not come up.
pub fn shell(mut args: MachineArgs) -> anyhow::Result<ExitCode> {
    if !std::io::stdin().is_terminal() {
        bail!("`shell` needs a terminal; use `run` in scripts");
    }
    args.name = "shell".into();
    let mut spec = args.spec();
    spec.shell = true;
    say("a shell in the test host: $NIC0 is the first NIC's address, `vfio $NIC0` binds it, `exit` powers off");
    let _terminal = Terminal::keep();
    args.boot(spec)?.wait()?;
    Ok(ExitCode::SUCCESS)
}

/// Restores the terminal when dropped: QEMU does so itself unless it is killed.
struct Terminal(Option<Termios>);

impl Terminal {
    fn keep() -> Self {
        Self(tcgetattr(std::io::stdin()).ok())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(state) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, state);
        }
    }
}
