//! What is kept of an attempt that failed: everything that was said, and the logs of the test host and of the guest, which the next
//! attempt would overwrite.

use std::fs;
use std::path::{Path, PathBuf};

/// The file with all that was said.
const FAILURE: &str = "failure.txt";
/// Files of the test host, and what each is.
const LOGS: [(&str, &str); 2] = [("console.log", "the test host's console"), ("qemu.log", "what QEMU said")];
/// Files of the shared folder, by the ends of their names.
const SHARED: [&str; 4] = ["machine.toml", "events.jsonl", ".log", "report.html"];

/// Removes what earlier demonstrations have left in `dir`.
pub(super) fn clear(dir: &Path) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("attempt-")) {
        let _ = fs::remove_dir_all(entry.path());
    }
}

/// Keeps what tells of the failure of an attempt, in a folder of its own below `dir`; the lines that say where it is. `from` is the
/// folder of the test host.
pub(super) fn keep(dir: &Path, attempt: u32, failure: &str, from: &Path) -> Vec<String> {
    let to = dir.join(format!("attempt-{attempt}"));
    let mut lines = vec![format!("evidence in {}:", to.display())];
    let mut told = |name: &str, what: &str| lines.push(format!("  {name:<14} {what}"));
    if fs::create_dir_all(&to).is_err() {
        return vec![format!("the evidence could not be written to {}", to.display()), failure.to_owned()];
    }
    if fs::write(to.join(FAILURE), failure).is_ok() {
        told(FAILURE, "all that was said");
    }
    for (name, what) in LOGS {
        if copy(&from.join(name), &to) {
            told(name, what);
        }
    }
    let shared = fs::read_dir(from.join("share")).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut shared: Vec<PathBuf> =
        shared.filter(|path| SHARED.iter().any(|end| path.to_string_lossy().ends_with(end))).collect();
    shared.sort();
    for path in shared.iter().filter(|path| copy(path, &to)) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        told(&name, of_shared(&name));
    }
    lines
}

fn of_shared(name: &str) -> &'static str {
    match name {
        "machine.toml" => "the machine as `umbra run` had it",
        "events.jsonl" => "what Umbra told (docs/recovery.md)",
        "report.html" => "the page of all failures",
        _ => "a guest's console",
    }
}

fn copy(from: &Path, to: &Path) -> bool {
    from.is_file() && fs::copy(from, to.join(from.file_name().unwrap_or_default())).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_kept_beside_what_was_said() {
        let dir = tempfile::tempdir().unwrap();
        let (from, out) = (dir.path().join("bench"), dir.path().join("demo"));
        fs::create_dir_all(from.join("share")).unwrap();
        fs::write(from.join("console.log"), "up").unwrap();
        fs::write(from.join("share/web.log"), "guest").unwrap();
        fs::write(from.join("share/umbra"), "program").unwrap();
        let lines = keep(&out, 2, "all of it", &from);
        let kept = out.join("attempt-2");
        assert_eq!(fs::read_to_string(kept.join("failure.txt")).unwrap(), "all of it");
        assert_eq!(fs::read_to_string(kept.join("web.log")).unwrap(), "guest");
        assert!(kept.join("console.log").exists() && !kept.join("umbra").exists());
        assert_eq!(lines.len(), 4, "{lines:?}");
        clear(&out);
        assert!(!kept.exists());
    }
}
