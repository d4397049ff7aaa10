//! `make test`: runs the test runner, shows all that it says, and closes with what its many targets do not say together: how many
//! attempts scenarios needed, which took longest, which tests failed, and one line of counts.
//!
//! Several runners share the work: as many as the machine has room for take turns at the runs of one list, and one more has, beside them,
//! what needs little of the machine. What all but the first say is shown line by line, each with a mark.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Names the file to which scenarios add how many attempts they needed; set for the test runner.
pub const ATTEMPTS_VARIABLE: &str = "UMBRA_ATTEMPTS_FILE";

/// What a scenario needed; a line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Needed {
    /// Target and test.
    pub scenario: String,
    /// Why each attempt that failed did, and after how long.
    pub failures: Vec<String>,
    /// It passed at the next one.
    pub ok: bool,
    /// All attempts together, seconds.
    pub seconds: f64,
}

/// What marks the lines of the runner at `place`, from 0; the first one's have no mark.
fn mark(place: usize) -> String {
    match place {
        0 => String::new(),
        1 => "beside | ".into(),
        place => format!("beside {place} | "),
    }
}

/// Longest scenarios that the closing lines name.
const LONGEST: usize = 5;

/// This process is one of a suite's.
pub fn is_running() -> bool {
    std::env::var_os(ATTEMPTS_VARIABLE).is_some()
}

impl Needed {
    /// Adds itself to the suite's file, where a suite is being run.
    pub fn note(&self) {
        let Some(path) = std::env::var_os(ATTEMPTS_VARIABLE) else { return };
        let line = serde_json::to_string(self).unwrap_or_default() + "\n";
        let file = fs::OpenOptions::new().append(true).create(true).open(path);
        // A suite whose folder is full fails by itself.
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }
}

/// What the runner's own lines have told (libtest: `test NAME ... FAILED`, `test result: ok. 3 passed; 0 failed; 1 ignored; ...`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    targets: u32,
    passed: u64,
    failed: u64,
    skipped: u64,
    /// Tests that failed.
    failures: Vec<String>,
    /// The begin of a line that has not ended.
    partial: Vec<u8>,
}

impl Counts {
    /// Takes part of the runner's output.
    pub fn take(&mut self, output: &[u8]) {
        self.partial.extend_from_slice(output);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.line(String::from_utf8_lossy(&line).trim_end());
        }
    }

    /// Takes what another runner counted.
    fn add(&mut self, other: Self) {
        self.targets += other.targets;
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
    }

    fn line(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        }
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else {
            return;
        };
        self.targets += 1;
        for count in counts.split(';') {
            let mut words = count.split_whitespace();
            let (Some(Ok(number)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.skipped += number,
                _ => {}
            }
        }
    }

    /// The suite's last lines; the very last one is a line of counts that a CI reads.
    pub fn closing_lines(&self, needed: &[Needed], took: Duration) -> Vec<String> {
        let first = needed.iter().filter(|needed| needed.ok && needed.failures.is_empty()).count();
        let mut lines = vec![format!("==> {} targets in {:.1} min", self.targets, took.as_secs_f64() / 60.0)];
        if !needed.is_empty() {
            lines.push(format!(
                "attempts: {first} of {} scenarios in a test host passed at the first one",
                needed.len()
            ));
            lines.push(format!("the longest: {}", longest(needed)));
        }
        for Needed { scenario, failures, ok, .. } in needed.iter().filter(|needed| !needed.failures.is_empty()) {
            let (how, attempt) = if *ok { ("passed", failures.len() + 1) } else { ("failed", failures.len()) };
            lines.push(format!("  {scenario}: {how} at attempt {attempt}"));
            lines.extend((1..).zip(failures).map(|(attempt, why)| format!("    attempt {attempt} failed {why}")));
        }
        lines.extend(self.failures.iter().map(|name| format!("failed: {name}")));
        lines.push(format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped));
        lines
    }
}

/// The scenarios that took longest, in one line.
fn longest(needed: &[Needed]) -> String {
    let mut needed: Vec<_> = needed.iter().collect();
    needed.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let named = needed.iter().take(LONGEST).map(|needed| format!("{} {:.0} s", needed.scenario, needed.seconds));
    named.collect::<Vec<_>>().join(", ")
}

/// What a file of attempts says.
fn read(path: &Path) -> Vec<Needed> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Runs the test runner with each of `runs`, `lanes` of them side by side, and one after the other those `beside` them; shows what they
/// print, and prints the closing lines. The status of one that failed.
///
/// # Errors
/// A runner cannot be started, or its output not be read or shown.
pub fn run(
    runs: &[Vec<String>],
    lanes: usize,
    beside: &[Vec<String>],
    attempts: &Path,
) -> io::Result<Option<ExitStatus>> {
    let _ = fs::remove_file(attempts);
    if let Some(dir) = attempts.parent() {
        fs::create_dir_all(dir)?;
    }
    let start = Instant::now();
    let shown = Mutex::new(Shown::on(io::stdout()));
    let (runs, beside) = (Mutex::new(runs.iter()), Mutex::new(beside.iter()));
    let (shown, attempts, lanes) = (&shown, attempts, lanes.max(1));
    let lists = std::iter::repeat_n(&runs, lanes).chain([&beside]);
    let (counts, failed) = thread::scope(|scope| {
        let lane = |(place, list)| scope.spawn(move || work_off(list, attempts, place, shown));
        let lanes: Vec<_> = lists.enumerate().map(lane).collect();
        let (mut counts, mut failed) = (Counts::default(), None);
        for lane in lanes {
            let (more, status) = lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            counts.add(more);
            failed = failed.or(status);
        }
        Ok::<_, io::Error>((counts, failed))
    })?;
    println!();
    for line in counts.closing_lines(&read(attempts), start.elapsed()) {
        println!("{line}");
    }
    Ok(failed)
}

/// Runs what is left of a list, one after the other: what these counted, and the status of the first of them that failed.
fn work_off<W: Write>(
    list: &Mutex<std::slice::Iter<'_, Vec<String>>>,
    attempts: &Path,
    place: usize,
    shown: &Mutex<Shown<W>>,
) -> io::Result<(Counts, Option<ExitStatus>)> {
    let (mut counts, mut line, mut failed) = (Counts::default(), Vec::new(), None);
    loop {
        let Some(command) = lock(list).next() else { return Ok((counts, failed)) };
        let status = runner(command, attempts, &mut |more| {
            counts.take(more);
            if place == 0 {
                return lock(shown).first(more);
            }
            for part in more.split_inclusive(|&byte| byte == b'\n') {
                line.extend_from_slice(part);
                if line.ends_with(b"\n") {
                    lock(shown).another(place, &line)?;
                    line.clear();
                }
            }
            Ok(())
        })?;
        failed = failed.or(Some(status).filter(|status| !status.success()));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the runners' output is shown.
struct Shown<W> {
    out: W,
    /// The first runner has begun a line.
    is_within_line: bool,
}

impl<W: Write> Shown<W> {
    fn on(out: W) -> Self {
        Self { out, is_within_line: false }
    }

    /// What the first runner says, as it is.
    fn first(&mut self, output: &[u8]) -> io::Result<()> {
        self.is_within_line = output.last().map_or(self.is_within_line, |&byte| byte != b'\n');
        self.out.write_all(output)?;
        self.out.flush()
    }

    /// A line of the one at `place`, on a line of its own.
    fn another(&mut self, place: usize, line: &[u8]) -> io::Result<()> {
        let begin: &[u8] = if std::mem::take(&mut self.is_within_line) { b"\n" } else { b"" };
        self.out.write_all(&[begin, mark(place).as_bytes(), line].concat())?;
        self.out.flush()
    }
}

/// Runs the test runner `command`, whose standard output goes to `said`.
fn runner(
    command: &[String],
    attempts: &Path,
    said: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<ExitStatus> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut runner = Command::new(program);
    runner.args(arguments).env(ATTEMPTS_VARIABLE, attempts).stdout(Stdio::piped());
    let mut runner = runner.spawn()?;
    if let Some(mut output) = runner.stdout.take() {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match output.read(&mut buffer)? {
                0 => break,
                n => said(&buffer[..n])?,
            }
        }
    }
    runner.wait()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "running 2 tests\ntest a ... ok\ntest b::c ... FAILED\n\nfailures:\n\ntest result: FAILED. 1 passed; 1 failed; \
                          3 ignored; 0 measured; 0 filtered out; finished in 0.10s\n\nrunning 1 test\ntest d ... ok\n\ntest result: ok. \
                          40 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 2.00s\n";

    #[test]
    fn the_last_line_is_one_of_counts_over_all_targets() {
        let mut counts = Counts::default();
        for piece in OUTPUT.as_bytes().chunks(7) {
            counts.take(piece);
        }
        let needed =
            |scenario: &str, failures, ok, seconds| Needed { scenario: scenario.into(), failures, ok, seconds };
        let (why, once_more) = ("after 9 s (no link)".to_owned(), "after 8 s (no song)".to_owned());
        let needed = [
            needed("x: a", vec![], true, 7.0),
            needed("x: b", vec![why.clone()], true, 60.6),
            needed("y: c", vec![why, once_more], false, 30.0),
        ];
        assert_eq!(
            counts.closing_lines(&needed, Duration::from_secs(90)),
            [
                "==> 2 targets in 1.5 min",
                "attempts: 1 of 3 scenarios in a test host passed at the first one",
                "the longest: x: b 61 s, y: c 30 s, x: a 7 s",
                "  x: b: passed at attempt 2",
                "    attempt 1 failed after 9 s (no link)",
                "  y: c: failed at attempt 2",
                "    attempt 1 failed after 9 s (no link)",
                "    attempt 2 failed after 8 s (no song)",
                "failed: b::c",
                "41 passed, 1 failed, 3 skipped",
            ]
        );
    }

    #[test]
    fn a_line_of_another_runner_is_a_line_of_its_own() {
        let mut shown = Shown::on(Vec::new());
        shown.first(b"test a ... ").unwrap();
        shown.another(1, b"test b ... ok\n").unwrap();
        shown.another(2, b"\n").unwrap();
        shown.first(b"ok\n").unwrap();
        shown.another(1, b"running 1 test\n").unwrap();
        let text = String::from_utf8(shown.out).unwrap();
        assert_eq!(text, "test a ... \nbeside | test b ... ok\nbeside 2 | \nok\nbeside | running 1 test\n");
    }

    fn shell(script: &str) -> Vec<String> {
        ["sh", "-c", script].map(str::to_owned).to_vec()
    }

    #[test]
    fn the_runner_s_status_is_the_suite_s_and_its_scenarios_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let needed =
            Needed { scenario: "x".into(), failures: vec!["after 1 s (no link)".into()], ok: true, seconds: 1.5 };
        let line = serde_json::to_string(&needed).unwrap();
        let script = format!("echo '{line}' >>${ATTEMPTS_VARIABLE}; exit 7");
        let attempts = dir.path().join("sub/attempts.jsonl");
        let failed = run(&[shell(&script)], 1, &[], &attempts).unwrap();
        assert_eq!(failed.and_then(|status| status.code()), Some(7));
        assert_eq!(read(&attempts), [needed]);
    }

    #[test]
    fn runners_run_side_by_side_and_each_may_fail_the_suite() {
        let dir = tempfile::tempdir().unwrap();
        let attempts = dir.path().join("attempts.jsonl");
        // Each ends only when it has seen the others.
        let meet = |name: &str, status: u8| {
            let dir = dir.path().display();
            let all = format!("[ -e {dir}/one -a -e {dir}/two -a -e {dir}/beside ]");
            shell(&format!("touch {dir}/{name}; until {all}; do sleep 0.01; done; exit {status}"))
        };
        let all = |one, two, beside| {
            let runs = [meet("one", one), meet("two", two), shell("exit 0")];
            let beside = [meet("beside", beside), shell(&format!("[ -e {}/one ]", dir.path().display()))];
            run(&runs, 2, &beside, &attempts).unwrap().and_then(|status| status.code())
        };
        assert_eq!(all(0, 0, 0), None);
        assert_eq!(all(3, 0, 0), Some(3));
        assert_eq!(all(0, 4, 0), Some(4));
        assert_eq!(all(0, 0, 5), Some(5));
        assert!(run(&[shell("true")], 1, &[vec!["/no/such/runner".into()]], &attempts).is_err());
    }

    #[test]
    fn one_runner_takes_all_runs_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let said = dir.path().join("said");
        let runs = ["a", "b", "c"].map(|name| shell(&format!("echo {name} >>{}", said.display())));
        assert_eq!(run(&runs, 1, &[], &dir.path().join("attempts.jsonl")).unwrap(), None);
        assert_eq!(fs::read_to_string(said).unwrap(), "a\nb\nc\n");
    }
}
