//! Where the demo runs: a test host in the nested bench, or this machine with real hardware.
//!
//! Both are reached through the same exec protocol; here its server is a thread of this process.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::DemoError;
use crate::assets::Assets;
use crate::bench::guest::Guest;
use crate::bench::patience::{Stall, scaled, whole_factor};
use crate::bench::{Bench, Output};
use crate::peer::Peer;
use crate::probe::client::{Client, Run};
use crate::probe::serve::serve;

/// See the module.
pub enum Place {
    /// A test host.
    Bench(Box<Bench>),
    /// This machine.
    Here(Here),
}

/// This machine as a place.
pub struct Here {
    client: Client,
    peer: Peer,
    dir: PathBuf,
    programs: PathBuf,
}

impl Here {
    /// Starts the peer and the exec server; files go to `dir`.
    ///
    /// # Errors
    /// No folder, or a port of the peer is in use.
    pub fn new(assets: &Assets, dir: &Path) -> Result<Self, DemoError> {
        std::fs::create_dir_all(dir).map_err(|e| DemoError::file("make", dir, e))?;
        let dir = dir.canonicalize().map_err(|e| DemoError::file("find", dir, e))?;
        let peer = Peer::here(&assets.probe())?;
        let failed = |e| DemoError::file("make a socket pair in", &dir, e);
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        thread::spawn(move || serve(File::from(OwnedFd::from(theirs))));
        let client = Client::new(ours).map_err(failed)?;
        for (from, name) in assets.shared() {
            std::fs::copy(&from, dir.join(name)).map_err(|e| DemoError::file("copy", &from, e))?;
        }
        let programs = assets.probe().parent().unwrap_or(&dir).to_owned();
        Ok(Self { client, peer, dir, programs })
    }
}

/// Longest silence of a script that another wait watches.
const LONG: Duration = Duration::from_secs(24 * 3600);

/// Time between two looks at what a script has done.
const LOOK: Duration = Duration::from_millis(50);

/// Lines of a failed script's output that are shown.
const SHOWN_LINES: usize = 25;

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
}

impl Place {
    /// The folder for files in and out, on this machine.
    pub fn share(&self) -> PathBuf {
        match self {
            Self::Bench(bench) => bench.share(),
            Self::Here(here) => here.dir.clone(),
        }
    }

    /// The same folder's name in the place.
    pub fn share_inside(&self) -> String {
        match self {
            Self::Bench(_) => "/share".into(),
            Self::Here(here) => here.dir.display().to_string(),
        }
    }

    /// A quick folder in the place, for kernels and images.
    pub fn work(&self) -> String {
        match self {
            Self::Bench(_) => "/tmp/umbra-bench".into(),
            Self::Here(here) => here.dir.join("work").display().to_string(),
        }
    }

    /// The command that copies a file or folder into [`Self::work`].
    pub fn copy(&self) -> &'static str {
        match self {
            Self::Bench(_) => "fetch",
            Self::Here(_) => "cp -r",
        }
    }

    /// The machine at the other end of the wire.
    pub fn peer(&mut self) -> &mut Peer {
        match self {
            Self::Bench(bench) => bench.peer(),
            Self::Here(here) => &mut here.peer,
        }
    }

    /// Starts a script.
    ///
    /// # Errors
    /// The place is gone.
    pub fn start(&mut self, script: &str) -> Result<Run, DemoError> {
        match self {
            Self::Bench(bench) => Ok(bench.start(script)?),
            Self::Here(here) => {
                let (patience, programs) = (whole_factor(), here.programs.display());
                let script = format!("export UMBRA_PATIENCE={patience} PATH={programs}:$PATH\n{script}");
                here.client.start(&script).map_err(DemoError::Exec)
            }
        }
    }

    /// Runs a script.
    ///
    /// # Errors
    /// It was given up, because nothing was printed for `limit` (scaled to this machine), or the place is gone.
    pub fn run(&mut self, script: &str, limit: Duration) -> Result<Output, DemoError> {
        match self {
            Self::Bench(bench) => Ok(bench.run_for(script, limit)?),
            Self::Here(_) => self.start(script)?.wait(scaled(limit)).map_err(DemoError::Exec),
        }
    }

    /// Runs a script that has to succeed; its standard output.
    ///
    /// # Errors
    /// As [`Self::run`], or another status than 0.
    pub fn expect(&mut self, script: &str, limit: Duration) -> Result<String, DemoError> {
        let output = self.run(script, limit)?;
        if output.ok() {
            return Ok(output.stdout);
        }
        let said = last_lines(&format!("{}{}", output.stdout, output.stderr));
        Err(DemoError::Command { script: script.into(), status: output.status, said })
    }

    /// Runs a script in a guest of the place; it has to succeed.
    ///
    /// # Errors
    /// As [`Self::expect`].
    pub fn in_guest(&mut self, name: &str, script: &str, limit: Duration) -> Result<String, DemoError> {
        self.expect(&Guest::command(name, script, limit), limit + Duration::from_secs(10))
    }

    /// Starts a script in a guest of the place, where [`Self::in_guest`] may run others meanwhile. One at a time: it has a port
    /// of its own, with one client. Its caller watches how it goes on: it may be silent for long.
    ///
    /// # Errors
    /// The place is gone.
    pub fn start_in_guest(&mut self, name: &str, script: &str) -> Result<Run, DemoError> {
        self.start(&Guest::long_command(name, script, LONG))
    }

    /// Waits for the end of a script that was started; gives it up when for `limit`, scaled to this machine, what `moved` tells has
    /// not changed.
    ///
    /// # Errors
    /// It was given up ([`DemoError::Still`]), or the place is gone.
    pub fn await_end<T: PartialEq>(
        &mut self,
        run: &mut Run,
        limit: Duration,
        mut moved: impl FnMut(&mut Self) -> Result<T, DemoError>,
    ) -> Result<(), DemoError> {
        let mut stall = Stall::new(limit);
        while !run.poll(LOOK).map_err(DemoError::Exec)? {
            let printed = run.output().stdout.len() + run.output().stderr.len();
            if stall.is_over((printed, moved(self)?)) {
                let said = format!("{}{}", run.output().stdout, run.output().stderr);
                return Err(DemoError::Still { what: "a script does not end".into(), limit: stall.limit(), said });
            }
        }
        Ok(())
    }

    /// What the sound cards of a test host play.
    pub fn wav(&self) -> PathBuf {
        match self {
            Self::Bench(bench) => bench.wav(),
            Self::Here(here) => here.dir.join("sound.wav"),
        }
    }

    /// The last lines of the console, where there is one.
    pub fn tail(&self) -> String {
        match self {
            Self::Bench(bench) => bench.tail(),
            Self::Here(_) => String::new(),
        }
    }
}
