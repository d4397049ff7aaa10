//! File operations whose errors name the operation and the path, and atomic replacement: a file or folder appears
//! whole under its name or not at all, also after a power cut.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// A file operation failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}{}", path.display(), advice(source))]
pub struct FileError {
    /// What was tried, as `read`.
    pub operation: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ": no space is left there; nothing was changed, free some space and try again"
        }
        _ => "",
    }
}

/// Attaches operation and path to an I/O error.
pub fn context<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FileError + 'a {
    move |source| FileError { operation, path: path.into(), source }
}

/// Reads a whole file.
///
/// # Errors
/// When it cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    fs::read(path).map_err(context("read", path))
}

/// Reads a whole file of at most `limit` bytes.
///
/// # Errors
/// When it cannot be read, or is larger.
pub fn read_up_to(path: &Path, limit: usize) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(context("read", path))?;
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(context("read", path))?;
    if bytes.len() > limit {
        return Err(context("read", path)(io::Error::other(format!("it is larger than {limit} bytes"))));
    }
    Ok(bytes)
}

/// Reads a whole text file; invalid UTF-8 is replaced.
///
/// # Errors
/// When it cannot be read.
pub fn read_text(path: &Path) -> Result<String, FileError> {
    read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Makes a folder and those above it.
///
/// # Errors
/// When it cannot be made.
pub fn make_dir(path: &Path) -> Result<(), FileError> {
    fs::create_dir_all(path).map_err(context("make the folder", path))
}

/// Writes a file in one step: beside its place first, then renamed.
///
/// # Errors
/// When writing fails; the old file, if any, is then untouched.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let parent = parent_of(path);
    make_dir(parent)?;
    let write = || {
        let mut file = tempfile::Builder::new().prefix(".umbra-").tempfile_in(parent)?;
        file.write_all(bytes)?;
        file.as_file().sync_data()?;
        fs::set_permissions(file.path(), readable_by_all())?;
        file.persist(path).map_err(|e| e.error)?;
        Ok(())
    };
    write().map_err(context("write", path))
}

/// Fills a new folder with `fill` and then puts it at `path` in one step; a folder that was there goes away.
///
/// # Errors
/// When filling or renaming fails; what was at `path` is then untouched.
pub fn replace_dir<E: From<FileError>>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let parent = parent_of(path);
    make_dir(parent)?;
    let prefix = format!(".umbra-{}.", path.file_name().unwrap_or_default().to_string_lossy());
    remove_left_over(parent, &prefix);
    let make = || {
        let temporary = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent)?;
        Ok::<_, io::Error>((lock(temporary.path())?, temporary))
    };
    // The lock ends with this process, however it ends.
    let (_lock, temporary) = make().map_err(context("make a folder in", parent))?;
    fs::set_permissions(temporary.path(), searchable_by_all()).map_err(context("set permissions of", path))?;
    fill(temporary.path())?;
    sync(temporary.path()).map_err(context("write", path))?;
    if fs::rename(temporary.path(), path).is_ok() {
        let _ = temporary.keep(); // it is at its place; its old name is free
        return Ok(());
    }
    // Something is there: exchange the two; dropping `temporary` then removes the old one.
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    renameat2(AT_FDCWD, temporary.path(), AT_FDCWD, path, RenameFlags::RENAME_EXCHANGE)
        .map_err(|e| context("replace", path)(e.into()))?;
    Ok(())
}

/// Has the disk keep what is in a folder, whoever wrote it: file by file it would take a kernel's modules minutes.
fn sync(folder: &Path) -> io::Result<()> {
    Ok(nix::unistd::syncfs(fs::File::open(folder)?)?)
}

/// Removes the folders in `parent` that another [`replace_dir`] was filling when its process was killed (Ctrl-C).
fn remove_left_over(parent: &Path, prefix: &str) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)) {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir && lock(&entry.path()).is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Locks a folder that nobody else has locked.
fn lock(folder: &Path) -> io::Result<Flock<fs::File>> {
    let folder = fs::File::open(folder)?;
    Flock::lock(folder, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn readable_by_all() -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o644)
}

fn searchable_by_all() -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o755)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Bytes of a file that a power cut would take, in pages; none where the kernel cannot say (`cachestat`, Linux 6.5).
    fn unwritten_pages(path: &Path) -> Option<u64> {
        const CACHESTAT: nix::libc::c_long = 451;
        let (file, whole, mut pages) = (fs::File::open(path).unwrap(), [0_u64; 2], [0_u64; 5]);
        // SAFETY: the kernel reads `whole` (offset, length) and writes `pages` (cached, dirty, under writeback, evicted, recently so),
        // which are as large as its structures.
        let answer = unsafe {
            nix::libc::syscall(CACHESTAT, std::os::fd::AsRawFd::as_raw_fd(&file), whole.as_ptr(), pages.as_mut_ptr(), 0)
        };
        (answer == 0).then(|| pages[1] + pages[2])
    }

    #[test]
    fn what_is_in_a_new_folder_survives_a_power_cut() {
        // On a disk: all of a tmpfs is lost.
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, [1; 1 << 20]).unwrap();
        if unwritten_pages(&file).is_none_or(|pages| pages == 0) {
            return eprintln!("skipped: this kernel or file system does not show what it has not written");
        }
        let place = dir.path().join("image");
        replace_dir(&place, |new| {
            fs::create_dir(new.join("in"))
                .and_then(|()| fs::copy(&file, new.join("in/vmlinux")))
                .map_err(context("copy", new))?;
            Ok::<_, FileError>(())
        })
        .unwrap();
        assert_eq!(unwritten_pages(&place.join("in/vmlinux")), Some(0));
    }

    #[test]
    fn a_folder_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("image");
        for content in ["one", "two"] {
            replace_dir(&place, |new| fs::write(new.join(content), content).map_err(context("write", new))).unwrap();
            assert_eq!(names(&place), [content]);
        }
        assert_eq!(names(dir.path()), ["image"]);
    }

    #[test]
    fn what_a_killed_process_was_filling_goes_and_what_another_one_fills_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (killed, filled) = (dir.path().join(".umbra-image.killed"), dir.path().join(".umbra-image.filled"));
        let others = [dir.path().join(".umbra-other.killed"), dir.path().join(".image.backup")];
        for folder in [&killed, &filled, &others[0], &others[1]] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("file"), "").unwrap();
        }
        let _fills = lock(&filled).unwrap();
        replace_dir(&dir.path().join("image"), |_| Ok::<_, FileError>(())).unwrap();
        assert_eq!(names(dir.path()), [".image.backup", ".umbra-image.filled", ".umbra-other.killed", "image"]);
    }

    #[test]
    fn a_failed_fill_leaves_the_old_folder_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("image");
        fs::create_dir(&place).unwrap();
        fs::write(place.join("old"), "").unwrap();
        let failed = replace_dir(&place, |new| {
            fs::write(new.join("half"), "").unwrap();
            Err(context("write", new)(io::ErrorKind::StorageFull.into()))
        });
        assert!(failed.unwrap_err().to_string().contains("no space is left"));
        assert_eq!(names(&place), ["old"]);
        assert_eq!(names(dir.path()), ["image"]);
    }
}
