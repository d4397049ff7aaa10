//! A bench's folder: what is copied into it before the boot, and how its logs are read.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{BenchError, BenchSpec};
use crate::assets::Assets;

/// Makes the folder of a bench anew. That of the bench before with this name, a failed attempt perhaps, is beside it then, as
/// `NAME.before`; without its programs and images.
pub(super) fn fresh(out: &Path, spec: &BenchSpec) -> Result<PathBuf, BenchError> {
    let dir = out.join(&spec.name);
    if dir.exists() {
        put_aside(&dir).map_err(|e| BenchError::file("clear", &dir, e))?;
    }
    let share = dir.join("share");
    fs::create_dir_all(&share).map_err(|e| BenchError::file("make", &share, e))?;
    for (n, disk) in spec.storage.iter().enumerate().filter(|(_, disk)| disk.nbd.is_none()) {
        let path = dir.join(format!("disk{n}.raw"));
        let make = || fs::File::create(&path)?.set_len(disk.bytes);
        make().map_err(|e| BenchError::file("make", &path, e))?;
    }
    dir.canonicalize().map_err(|e| BenchError::file("find", &dir, e))
}

/// Renames `dir` to `NAME.before`, in the place of what is there, without what only takes room.
fn put_aside(dir: &Path) -> io::Result<()> {
    let mut before = dir.to_owned();
    before.as_mut_os_string().push(".before");
    if before.exists() {
        fs::remove_dir_all(&before)?;
    }
    fs::rename(dir, &before)?;
    let logs =
        |path: &Path| path.extension().is_some_and(|end| ["log", "jsonl", "toml", "json"].iter().any(|e| end == *e));
    for entry in fs::read_dir(before.join("share")).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => fs::remove_dir_all(path)?,
            path if !logs(&path) => fs::remove_file(path)?,
            _ => {}
        }
    }
    Ok(())
}

/// Copies the workspace's programs, the kernel for guests and the caller's files into the shared folder.
pub(super) fn fill_share(share: &Path, assets: &Assets, spec: &BenchSpec) -> Result<(), BenchError> {
    for (from, name) in assets.shared() {
        place(&from, &share.join(name))?;
    }
    for from in &spec.files {
        place(from, &share.join(from.file_name().unwrap_or_default()))?;
    }
    Ok(())
}

/// Copies a file, or a folder with what is in it.
pub(super) fn place(from: &Path, to: &Path) -> Result<(), BenchError> {
    if from.is_dir() {
        fs::create_dir_all(to).map_err(|e| BenchError::file("make", to, e))?;
        for entry in fs::read_dir(from).map_err(|e| BenchError::file("list", from, e))? {
            let entry = entry.map_err(|e| BenchError::file("list", from, e))?;
            place(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    fs::copy(from, to).map(drop).map_err(|e| BenchError::file("copy", from, e))
}

/// The last `lines` lines of a log, without escape sequences of terminals.
pub(super) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let shown = all.iter().skip(all.len().saturating_sub(lines));
    shown.map(|line| line.replace(|c: char| c.is_control() && c != '\t', "") + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logs_of_the_bench_before_are_kept_once() {
        let out = tempfile::tempdir().unwrap();
        let spec = BenchSpec::new("x");
        for run in ["first", "second", "third"] {
            let dir = fresh(out.path(), &spec).unwrap();
            fs::write(dir.join("console.log"), run).unwrap();
            for name in ["web.log", "events.jsonl", "vmlinux"] {
                fs::write(dir.join("share").join(name), run).unwrap();
            }
            fs::create_dir(dir.join("share/image")).unwrap();
        }
        let before = out.path().join("x.before");
        assert_eq!(fs::read_to_string(before.join("console.log")).unwrap(), "second");
        let mut left: Vec<_> =
            fs::read_dir(before.join("share")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["events.jsonl", "web.log"]);
        assert_eq!(fs::read_to_string(out.path().join("x/console.log")).unwrap(), "third");
    }
}
