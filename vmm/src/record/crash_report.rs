//! The crash report of one life of a driver VM: `reports/NAME-genN.json`, and the same for people in `.txt`.
//!
//! Written once the life is fenced, and again with the rest of the time line when its successor is live.

use std::fmt::{self, Write as _};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use umbra_shadow::DeviceId;

use super::parts::RecoveryParts;
use super::schema::Versioned;
use super::timeline::Mark;
use super::words;
use crate::base::untrusted_text::{self, block, line};
use crate::lifecycle::NoticedBy;
use crate::wire::messages::{LinkEnd, MaskedCounts};

/// Reports kept per driver VM: few, because the run directory is mostly in memory.
const KEEP: u32 = 32;

/// Most reports that wait for room on the disk; the oldest are dropped first.
const WAITING: usize = 64;

/// Reports that could not be written: they wait here until they can.
#[derive(Debug, Default)]
pub struct PendingReports {
    waiting: Vec<CrashReport>,
}

impl PendingReports {
    /// Writes `report` into `dir`, or keeps it.
    ///
    /// # Errors
    ///
    /// The report has to wait. The error is there only if no other report waited already, so that it is reported once.
    pub fn write(&mut self, dir: &Path, report: &CrashReport) -> Result<PathBuf, Option<io::Error>> {
        let same = |kept: &CrashReport| kept.driver == report.driver && kept.generation == report.generation;
        let first = self.waiting.is_empty();
        self.waiting.retain(|kept| !same(kept));
        match report.write(dir) {
            Ok(path) => Ok(path),
            Err(error) => {
                if self.waiting.len() >= WAITING {
                    self.waiting.remove(0);
                }
                self.waiting.push(report.clone());
                Err(first.then_some(error))
            }
        }
    }

    /// Tries again to write the reports that wait; returns the driver VMs and paths of those that are written now.
    pub fn retry(&mut self, dir: &Path) -> Vec<(String, PathBuf)> {
        let mut written = Vec::new();
        while let Some(path) = self.waiting.first().and_then(|report| report.write(dir).ok()) {
            written.push((self.waiting.remove(0).driver, path));
        }
        written
    }

    /// Whether any waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// A crash report.
#[derive(Clone, Debug, Serialize)]
pub struct CrashReport {
    /// Name of the driver VM.
    pub driver: String,
    /// Generation of the life that ended.
    pub generation: u32,
    /// PCI address of the device.
    pub device: String,
    /// Kernel driver, if the agent had said.
    pub kernel_driver: Option<String>,
    /// Kernel release, if the agent had said.
    pub kernel: Option<String>,
    /// How the failure was noticed.
    pub source: NoticedBy,
    /// What happened, for people.
    pub reason: String,
    /// The kernel's own line about it, out of the console.
    pub kernel_says: Option<String>,
    /// How the process ended, in words.
    pub exit: String,
    /// What the policy made of it.
    pub verdict: Verdict,
    /// Failures since the start, this one included.
    pub failures: u64,
    /// The guests' devices that lost their driver VM.
    pub masks: Vec<Mask>,
    /// From the mask to live, ms; none while it lasts.
    pub outage_ms: Option<f64>,
    /// How long each part of the recovery took, ms.
    pub parts: RecoveryParts,
    /// What became of the frames, summed over the guests.
    pub frames: MaskedCounts,
    /// The steps of failure and recovery, in the order of their times.
    pub timeline: Vec<Mark>,
    /// Registers of the driver VM's vCPUs, where there was time to read them.
    pub registers: String,
    /// The last 64 KiB of the life's console.
    pub console_tail: String,
}

/// What follows a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The next life.
    Restart,
    /// No next life: the bound on restarts is reached, or the device or the process hangs.
    Quarantine,
}

impl fmt::Display for Verdict {
    /// The word of reports.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A guest's device that lost its driver VM.
#[derive(Clone, Debug, Serialize)]
pub struct Mask {
    /// The guest's name.
    pub guest: String,
    /// The device, written as `net0` or `sound0`.
    #[serde(with = "words::device")]
    pub device: DeviceId,
    /// When, `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// Why the link was lost, written as `closed`, or as the words of the rule that the driver VM broke.
    #[serde(with = "words::cause")]
    pub cause: LinkEnd,
}

/// The line in which a Linux console says why it died, without its time stamp.
pub fn kernel_says(console: &str) -> Option<String> {
    const SIGNS: [&str; 7] = [
        "Kernel panic - not syncing:",
        "BUG:",
        "Oops:",
        "general protection fault",
        "watchdog:",
        "invalid opcode:",
        ": nobody cared",
    ];
    let panic = console.lines().find(|line| line.contains(SIGNS[0]));
    let line = panic.or_else(|| console.lines().find(|line| SIGNS.iter().any(|sign| line.contains(sign))))?;
    let line = match line.split_once("] ") {
        Some((stamp, rest)) if stamp.starts_with('[') => rest,
        _ => line,
    };
    Some(line.trim().chars().take(200).collect())
}

impl CrashReport {
    /// What the failed life has left.
    pub(crate) fn take_evidence(&mut self, exit: String, registers: String, console_tail: String) {
        self.kernel_says = kernel_says(&console_tail);
        (self.exit, self.registers, self.console_tail) = (exit, registers, console_tail);
    }

    /// Writes both files into `dir` and forgets the oldest. Returns the path of the one for people.
    ///
    /// # Errors
    ///
    /// They cannot be written; what is there is whole.
    pub fn write(&self, dir: &Path) -> io::Result<PathBuf> {
        let file = |generation: u32, kind: &str| dir.join(format!("{}-gen{generation}.{kind}", self.driver));
        self.forget_the_oldest(dir);
        let json = serde_json::to_string_pretty(&Versioned::new(self)).map_err(io::Error::other)?;
        replace(&file(self.generation, "json"), untrusted_text::json(&json).as_bytes())?;
        let text = file(self.generation, "txt");
        replace(&text, self.to_string().as_bytes())?;
        Ok(text)
    }

    /// Removes the driver VM's reports in `dir` that are [`KEEP`] generations older than this one. Not every generation has failed.
    fn forget_the_oldest(&self, dir: &Path) {
        let Some(old) = self.generation.checked_sub(KEEP) else { return };
        let prefix = format!("{}-gen", self.driver);
        let generation = |path: &Path| path.file_stem()?.to_str()?.strip_prefix(&prefix)?.parse::<u32>().ok();
        let files = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        for path in files.filter(|path| generation(path).is_some_and(|generation| generation <= old)) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Writes a file whole or not at all.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let result = fs::write(&new, bytes).and_then(|()| fs::rename(&new, path));
    if result.is_err() {
        let _ = fs::remove_file(&new);
    }
    result
}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown = "unknown";
        writeln!(f, "{} generation {} failed: {}", self.driver, self.generation, line(&self.reason))?;
        if let Some(said) = &self.kernel_says {
            writeln!(f, "kernel:    {}", line(said))?;
        }
        let said = |text: &Option<String>| text.as_deref().map_or_else(|| unknown.into(), line);
        writeln!(f, "device:    {}, driver {}", self.device, said(&self.kernel_driver))?;
        writeln!(f, "release:   {}", said(&self.kernel))?;
        writeln!(f, "noticed:   {:?}; {}", self.source, line(&self.exit))?;
        writeln!(f, "then:      {} (failure {} since the start)", self.verdict, self.failures)?;
        match self.outage_ms {
            Some(ms) => writeln!(f, "outage:    {ms:.0} ms ({})", self.parts)?,
            None => writeln!(f, "outage:    not over when this was written")?,
        }
        let MaskedCounts { logged, replayed, dropped, unknown } = self.frames;
        writeln!(f, "frames:    {logged} logged, {replayed} sent, {dropped} dropped, {unknown} of unknown fate")?;
        for mask in &self.masks {
            writeln!(f, "masked:    {}.{} ({})", mask.guest, mask.device, line(&mask.cause.to_string()))?;
        }
        writeln!(f, "\ntime line")?;
        for mark in &self.timeline {
            let mut step = String::new();
            write!(step, "{:?}", mark.step)?;
            writeln!(f, "  {:>12.3} ms  {}  {step}", mark.ms, mark.time)?;
        }
        if !self.registers.is_empty() {
            writeln!(f, "\nregisters\n{}", block(self.registers.trim_end()))?;
        }
        writeln!(f, "\nconsole (the end)\n{}", block(self.console_tail.trim_end()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn report(generation: u32) -> CrashReport {
        CrashReport {
            driver: "nic0".into(),
            generation,
            device: "0000:03:00.0".into(),
            kernel_driver: Some("e1000e".into()),
            kernel: None,
            source: NoticedBy::Panic,
            reason: "kernel panic".into(),
            kernel_says: None,
            exit: "its process was killed by signal 9 (SIGKILL)".into(),
            verdict: Verdict::Restart,
            failures: 1,
            masks: Vec::new(),
            outage_ms: None,
            parts: RecoveryParts::default(),
            frames: MaskedCounts::default(),
            timeline: Vec::new(),
            registers: String::new(),
            console_tail: "Kernel panic - not syncing: sysrq triggered crash".into(),
        }
    }

    #[test]
    fn the_kernel_s_own_words_are_found() {
        let console = "[    1.0] e1000e: BUG: trouble\n[   12.345678] Kernel panic - not syncing: sysrq triggered crash\n\
                       [   12.4] CPU: 0\n[ 12.9] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---\n";
        let said = kernel_says(console).unwrap();
        assert!(said.contains("Kernel panic - not syncing: sysrq triggered crash"), "{said}");
        assert_eq!(kernel_says("[    1.0] BUG: trouble\n").unwrap(), "BUG: trouble");
        assert_eq!(kernel_says("all is well"), None);
    }

    #[test]
    fn the_report_for_people_has_nothing_that_a_terminal_obeys_and_the_other_is_exact() {
        let said = "Kernel panic - not syncing: \u{1b}[31mRED\u{1b}]0;OWNED\u{7}\u{9b}2J\u{202e}";
        let mask =
            Mask { guest: "web".into(), device: DeviceId::net(0), at_ns: 1, cause: LinkEnd::Broken(said.into()) };
        let report = CrashReport {
            kernel_driver: Some(said.into()),
            kernel: Some(said.into()),
            reason: said.into(),
            kernel_says: Some(said.into()),
            masks: vec![mask],
            registers: format!("rip 0\n{said}"),
            console_tail: format!("one\n\ttwo\n{said}"),
            ..report(1)
        };
        let dir = tempfile::tempdir().unwrap();
        report.write(dir.path()).unwrap();
        let obeyed = |c: char| c.is_control() && !"\n\t".contains(c) || c == '\u{202e}';
        let text = fs::read_to_string(dir.path().join("nic0-gen1.txt")).unwrap();
        assert!(!text.contains(obeyed) && text.contains("one\n\ttwo\nKernel panic"), "{text}");
        assert_eq!(text.matches("\\x1b[31mRED").count(), 7, "{text}");
        let json = fs::read_to_string(dir.path().join("nic0-gen1.json")).unwrap();
        assert!(!json.contains(obeyed), "{json}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["reason"], said);
    }

    #[test]
    fn both_files_are_written_and_the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        for generation in 1..=KEEP + 2 {
            report(generation).write(dir.path()).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2 * KEEP as usize);
        let json = fs::read(dir.path().join(format!("nic0-gen{}.json", KEEP + 2))).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["source"], "panic");
        let text = fs::read_to_string(dir.path().join("nic0-gen3.txt")).unwrap();
        assert!(text.starts_with("nic0 generation 3 failed: kernel panic\n"), "{text}");
    }

    #[test]
    fn generations_that_never_failed_leave_no_report_behind() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("nic0-gen1-gen2.json"), "of the driver VM nic0-gen1").unwrap();
        for generation in (1..=10 * KEEP).step_by(3) {
            report(generation).write(dir.path()).unwrap();
        }
        assert!(fs::read_dir(dir.path()).unwrap().count() <= 2 * KEEP as usize);
        assert!(dir.path().join("nic0-gen1-gen2.json").exists());
    }

    #[test]
    fn a_report_without_room_waits_is_told_once_and_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("reports");
        let mut shelf = PendingReports::default();
        assert!(matches!(shelf.write(&folder, &report(1)), Err(Some(_))));
        assert!(matches!(shelf.write(&folder, &report(1)), Err(None)), "the same once more");
        assert!(matches!(shelf.write(&folder, &report(2)), Err(None)));
        assert!(shelf.retry(&folder).is_empty() && !shelf.is_empty());
        fs::create_dir(&folder).unwrap();
        let written = shelf.retry(&folder);
        assert_eq!(written.len(), 2, "{written:?}");
        assert!(shelf.is_empty() && folder.join("nic0-gen1.json").exists() && folder.join("nic0-gen2.txt").exists());
        assert!(shelf.write(&folder, &report(3)).is_ok());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_and_no_panic() {
        assert!(report(1).write(Path::new("/proc/no/such")).is_err());
    }
}
