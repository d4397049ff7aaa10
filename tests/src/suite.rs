//! `make test`: runs the test runner, shows all that it says, and closes with what its many targets do not say together: how many
//! attempts scenarios needed, which tests failed, and one line of counts.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Names the file to which scenarios add how many attempts they needed; set for the test runner.
pub const ATTEMPTS_VARIABLE: &str = "UMBRA_ATTEMPTS_FILE";

/// What a scenario needed; a line of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needed {
    /// Target and test.
    pub scenario: String,
    /// Attempts until it passed, or was given up.
    pub attempts: u32,
    /// It passed.
    pub ok: bool,
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
        let first = needed.iter().filter(|needed| needed.ok && needed.attempts == 1).count();
        let mut lines = vec![format!("==> {} targets in {:.1} min", self.targets, took.as_secs_f64() / 60.0)];
        if !needed.is_empty() {
            lines.push(format!(
                "attempts: {first} of {} scenarios in a test host passed at the first one",
                needed.len()
            ));
        }
        for Needed { scenario, attempts, ok } in needed.iter().filter(|needed| !needed.ok || needed.attempts > 1) {
            let how = if *ok { "passed at attempt" } else { "failed at attempt" };
            lines.push(format!("  {scenario}: {how} {attempts}"));
        }
        lines.extend(self.failures.iter().map(|name| format!("failed: {name}")));
        lines.push(format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped));
        lines
    }
}

/// What a file of attempts says.
fn read(path: &Path) -> Vec<Needed> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Runs the test runner `command`, shows what it prints, and prints the closing lines; its status.
///
/// # Errors
/// It cannot be started, or its output not be read or shown.
pub fn run(command: &[String], attempts: &Path) -> io::Result<ExitStatus> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let _ = fs::remove_file(attempts);
    if let Some(dir) = attempts.parent() {
        fs::create_dir_all(dir)?;
    }
    let start = Instant::now();
    let mut runner = Command::new(program);
    runner.args(arguments).env(ATTEMPTS_VARIABLE, attempts).stdout(Stdio::piped());
    let mut runner = runner.spawn()?;
    let mut counts = Counts::default();
    if let Some(mut output) = runner.stdout.take() {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match output.read(&mut buffer)? {
                0 => break,
                n => {
                    counts.take(&buffer[..n]);
                    let mut shown = io::stdout().lock();
                    shown.write_all(&buffer[..n])?;
                    shown.flush()?;
                }
            }
        }
    }
    let status = runner.wait()?;
    println!();
    for line in counts.closing_lines(&read(attempts), start.elapsed()) {
        println!("{line}");
    }
    Ok(status)
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
        let needed = |scenario: &str, attempts, ok| Needed { scenario: scenario.into(), attempts, ok };
        let needed = [needed("x: a", 1, true), needed("x: b", 2, true), needed("y: c", 3, false)];
        assert_eq!(
            counts.closing_lines(&needed, Duration::from_secs(90)),
            [
                "==> 2 targets in 1.5 min",
                "attempts: 1 of 3 scenarios in a test host passed at the first one",
                "  x: b: passed at attempt 2",
                "  y: c: failed at attempt 3",
                "failed: b::c",
                "41 passed, 1 failed, 3 skipped",
            ]
        );
    }

    #[test]
    fn the_runner_s_status_is_the_suite_s_and_its_scenarios_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let script = format!("echo '{{\"scenario\":\"x\",\"attempts\":2,\"ok\":true}}' >${ATTEMPTS_VARIABLE}; exit 7");
        let attempts = dir.path().join("sub/attempts.jsonl");
        let status = run(&["sh".into(), "-c".into(), script], &attempts).unwrap();
        assert_eq!(status.code(), Some(7));
        assert_eq!(read(&attempts), [Needed { scenario: "x".into(), attempts: 2, ok: true }]);
    }
}
