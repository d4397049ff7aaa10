//! The folder of snapshots: `UMBRA_SNAPSHOT_DIR`, else `/var/cache/umbra/snapshots` for root, else
//! `$XDG_CACHE_HOME/umbra/snapshots` (`~/.cache/umbra/snapshots`).
//!
//! Invariants: what is in it was written by this user alone, because a VM runs what a snapshot holds: a folder or file that
//! somebody else owns, or that others may write to, is refused. A file is there whole or not at all: it is written beside, by a process
//! that may have no way to name a file by then, and whoever uses the folder next gives it its name. There are at most [`MAX_FILES`], of
//! [`MAX_BYTES`] on the disk, then; those go first that were taken or restored longest ago. Who writes a file has it locked
//! (`flock(2)`): one that is not locked is whole, or was left behind.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::unistd::geteuid;

use super::Error;
use super::format::{FormatError, Key, Summary};
use crate::base::random::random;
use crate::base::user_folder;

/// Environment variable: the folder.
pub const FOLDER: &str = "UMBRA_SNAPSHOT_DIR";
/// Snapshots that are kept: one for each device of a few machines that share the folder, and some of images and builds before. With fewer
/// than there are driver VMs, each would take another's away.
const MAX_FILES: usize = 32;
/// What they take on the disk at most, in bytes of allocated blocks: some 30 snapshots of small driver VMs, four of large ones. The one
/// that was used last stays, however large it is.
pub const MAX_BYTES: u64 = 2 << 30;
/// Time after its last change at which an unfinished file of another host, or of another boot, was left behind: a snapshot takes
/// seconds, and one that waits longer for its VM to be ready is begun anew.
const WRITING: Duration = Duration::from_secs(3600);
/// Bytes of a block as `stat(2)` counts them.
const BLOCK: u64 = 512;
/// Ends of file names: of a snapshot, and of one that is being written.
pub(super) const SNAPSHOT: &str = "snapshot";
pub(super) const UNFINISHED: &str = "unfinished";

/// The folder, which need not exist.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
    /// [`MAX_BYTES`], but in tests.
    max_bytes: u64,
}

impl Cache {
    /// The folder that the environment names.
    ///
    /// # Errors
    /// It names none, and there is no home.
    pub fn of_environment() -> Result<Self, Error> {
        let folder =
            user_folder::of(FOLDER, "/var/cache/umbra/snapshots", ("XDG_CACHE_HOME", ".cache"), "umbra/snapshots");
        folder.map(|folder| Self::at(&folder)).ok_or(Error::NoFolder)
    }

    /// The folder at `path`.
    pub fn at(path: &Path) -> Self {
        Self { folder: path.into(), max_bytes: MAX_BYTES }
    }

    /// Its path.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(format!("{key}.{SNAPSHOT}"))
    }

    /// Opens the snapshot with `key`; `None`: there is none.
    ///
    /// # Errors
    /// It cannot be opened, or others could have written it.
    pub fn open(&self, key: &Key) -> Result<Option<File>, Error> {
        let path = self.path(key);
        let failed = |source| Error::Folder { path: path.clone(), source };
        match self.check() {
            Err(Error::Folder { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            checked => checked?,
        }
        self.tidy();
        let file = match open_to_read(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        check(&path, &file.metadata().map_err(failed)?)?;
        Ok(Some(file))
    }

    /// Makes the folder, if it is not there.
    ///
    /// # Errors
    /// It cannot be made, or others may write to it.
    pub fn prepare(&self) -> Result<(), Error> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.folder);
        made.map_err(|source| Error::Folder { path: self.folder.clone(), source })?;
        self.check()
    }

    /// Opens a file for the snapshot with `key`, empty. Closed once a [`super::format::Writer`] has finished it, it is the snapshot; closed
    /// before, it is nothing.
    ///
    /// # Errors
    /// As [`Self::prepare`], or there can be no file in the folder.
    pub fn begin(&self, key: &Key) -> Result<File, Error> {
        self.prepare()?;
        self.tidy();
        let path = unfinished(&self.folder, key)?;
        let failed = |source| Error::Folder { path: path.clone(), source };
        loop {
            let open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            let file = open.map_err(failed)?;
            if let Err(error) = file.lock() {
                // The file system knows no locks: who tidies up meanwhile removes this one too.
                tracing::debug!(%error, "lock the snapshot that is written");
            }
            // Who came before the lock has taken it for something that was left behind.
            if file.metadata().map_err(failed)?.nlink() > 0 {
                return Ok(file);
            }
        }
    }

    /// An error if others could write to the folder.
    pub(super) fn check(&self) -> Result<(), Error> {
        let metadata = fs::symlink_metadata(&self.folder);
        let metadata = metadata.map_err(|source| Error::Folder { path: self.folder.clone(), source })?;
        check(&self.folder, &metadata)
    }

    /// Its files with this end of the name. What cannot be looked at is left out.
    pub(super) fn files(&self, end: &str) -> Vec<(PathBuf, Metadata)> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let files = entries.filter_map(|entry| Some((entry.path(), entry.metadata().ok()?)));
        files.filter(|(path, _)| path.extension().is_some_and(|extension| extension == end)).collect()
    }

    /// What nobody writes any more, as far as this host knows, gets its name if it is whole; the rest is returned.
    pub(super) fn name_finished(&self) -> Vec<PathBuf> {
        let mut left = Vec::new();
        for (path, _) in self.files(UNFINISHED) {
            if is_being_written(&path) {
                continue;
            }
            match self.finished(&path) {
                // Somebody else may be faster.
                Some(whole) => drop(fs::rename(&path, whole)),
                None => left.push(path),
            }
        }
        left
    }

    /// The name of the unfinished file at `path`, if it is whole in fact.
    fn finished(&self, path: &Path) -> Option<PathBuf> {
        let file = open_to_read(path).ok()?;
        check(path, &file.metadata().ok()?).ok()?;
        let (key, _) = path.file_name()?.to_str()?.split_once('.')?;
        let whole = match Summary::read(&file) {
            Ok(summary) => summary.key.to_string() == key,
            // Another version of this program knows what it is.
            Err(FormatError::Version(_)) => true,
            Err(_) => false,
        };
        whole.then(|| self.folder.join(format!("{key}.{SNAPSHOT}")))
    }

    /// Gives names to what is finished; removes what was left unfinished, and what is too much. What cannot be removed stays.
    fn tidy(&self) {
        let boot = boot();
        for left in self.name_finished().iter().filter(|left| is_of(left, &boot) || is_old(left)) {
            let _ = fs::remove_file(left);
        }
        let now = SystemTime::now();
        let used = |metadata: &Metadata| used(metadata, now);
        let mut snapshots = self.files(SNAPSHOT);
        snapshots.sort_by_key(|(_, metadata)| std::cmp::Reverse(used(metadata)));
        let mut bytes = 0;
        for (n, (path, metadata)) in snapshots.into_iter().enumerate() {
            bytes += on_disk(&metadata);
            if n > 0 && (n >= MAX_FILES || bytes > self.max_bytes) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// The name of a file in `folder` for the snapshot with `key`, until it has its own: it says on which boot of which host it is written.
fn unfinished(folder: &Path, key: &Key) -> Result<PathBuf, Error> {
    let number = random::<4>().map_err(|source| Error::Folder { path: folder.into(), source })?;
    Ok(folder.join(format!("{key}.{}.{:08x}.{UNFINISHED}", boot(), u32::from_ne_bytes(number))))
}

/// What the kernel calls its boot.
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().into()
}

/// Whether the unfinished file at `path` was begun on `boot`. Of others the locks may not be seen: a folder can be on a network.
fn is_of(path: &Path, boot: &str) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').nth(1) == Some(boot)
}

/// When the snapshot with `metadata` was taken or restored last. What was, by its time, long after `now` was written under a clock that was
/// wrong: it counts as the oldest, or it would stay for ever, and what is taken now would go first.
fn used(metadata: &Metadata, now: SystemTime) -> SystemTime {
    let used = metadata.modified().ok().filter(|used| *used <= now + WRITING);
    used.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Whether nobody writes to the file at `path` any more, whatever its lock says.
fn is_old(path: &Path) -> bool {
    let modified = fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > WRITING))
}

/// Notes that the snapshot in `file` has been found and read: it is not the next one to go. A file that cannot be changed goes earlier.
pub(super) fn was_used(file: &File) {
    if let Err(error) = file.set_modified(SystemTime::now()) {
        tracing::debug!(%error, "note that a snapshot is used");
    }
}

/// What a file takes on the disk, bytes: a snapshot may have holes.
pub(super) fn on_disk(metadata: &Metadata) -> u64 {
    metadata.blocks() * BLOCK
}

/// Whether somebody has the unfinished file at `path` open to write it.
pub(super) fn is_being_written(path: &Path) -> bool {
    open_to_read(path).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Opens the file at `path`, which is no link and may be anything else.
pub(super) fn open_to_read(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

/// An error if somebody else could have written what is at `path`.
pub(super) fn check(path: &Path, metadata: &Metadata) -> Result<(), Error> {
    let ours = metadata.uid() == geteuid().as_raw();
    if !ours || metadata.mode() & 0o022 != 0 {
        return Err(Error::OthersMayWrite(path.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::super::format::Writer;

    use super::*;

    const KEY: Key = Key([0xab; 32]);

    /// Finishes a snapshot with `key` in `file`, with so many `bytes` of state.
    fn finish(file: &File, key: &Key, bytes: usize) {
        Writer::new(file).finish(key, 1 << 20, (&vec![7; bytes], b"")).unwrap();
    }

    fn create(cache: &Cache, key: &Key) {
        finish(&cache.begin(key).unwrap(), key, 10);
    }

    /// As if the snapshot number `n` was used in second `n`.
    fn age(cache: &Cache, n: u8) {
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(n));
        cache.open(&Key([n; 32])).unwrap().unwrap();
        File::options().write(true).open(cache.path(&Key([n; 32]))).unwrap().set_modified(old).unwrap();
    }

    fn names(cache: &Cache) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&cache.folder).unwrap().map(|file| file.unwrap().file_name()).collect();
        names.sort();
        names.iter().map(|name| name.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_snapshot_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("a/b"));
        assert!(cache.open(&KEY).unwrap().is_none());
        let file = cache.begin(&KEY).unwrap();
        // Whole but for its last byte, or of something else: it is nothing when its writer has ended.
        finish(&file, &KEY, 10);
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        drop(file);
        assert!(cache.open(&KEY).unwrap().is_none());
        let file = cache.begin(&KEY).unwrap();
        finish(&file, &Key([1; 32]), 10);
        drop(file);
        assert!(cache.open(&KEY).unwrap().is_none());
        assert!(names(&cache).is_empty(), "nothing is left of a failure");
        let file = cache.begin(&KEY).unwrap();
        finish(&file, &KEY, 10);
        assert!(cache.open(&KEY).unwrap().is_none(), "it is still being written");
        drop(file);
        let metadata = cache.open(&KEY).unwrap().unwrap().metadata().unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (4096 + 10, 0o600));
        assert_eq!(fs::metadata(&cache.folder).unwrap().mode() & 0o777, 0o700);
        assert_eq!(names(&cache), [format!("{KEY}.{SNAPSHOT}")]);
    }

    #[test]
    fn the_last_one_that_was_taken_of_a_vm_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        for bytes in [10, 20] {
            finish(&cache.begin(&KEY).unwrap(), &KEY, bytes);
            assert_eq!(cache.open(&KEY).unwrap().unwrap().metadata().unwrap().len(), 4096 + bytes as u64);
        }
        assert_eq!(names(&cache), [format!("{KEY}.{SNAPSHOT}")]);
    }

    #[test]
    fn what_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache"));
        create(&cache, &KEY);
        assert!(cache.open(&KEY).unwrap().is_some());
        for (path, mode) in [(cache.folder.clone(), 0o770), (cache.path(&KEY), 0o602)] {
            let before = fs::metadata(&path).unwrap().permissions();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = cache.open(&KEY).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{}: others", path.display())), "{error}");
            if path == cache.folder {
                assert!(cache.begin(&KEY).is_err());
            }
            fs::set_permissions(&path, before).unwrap();
        }
        assert!(cache.open(&KEY).unwrap().is_some());
        // One that others could have finished gets no name.
        let file = cache.begin(&Key([1; 32])).unwrap();
        finish(&file, &Key([1; 32]), 10);
        file.set_permissions(fs::Permissions::from_mode(0o602)).unwrap();
        drop(file);
        assert!(cache.open(&Key([1; 32])).unwrap().is_none());
    }

    #[test]
    fn a_link_to_a_file_elsewhere_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        fs::write(dir.path().join("elsewhere"), "x").unwrap();
        std::os::unix::fs::symlink("elsewhere", cache.path(&KEY)).unwrap();
        assert!(cache.open(&KEY).is_err());
    }

    #[test]
    fn the_oldest_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache"));
        let most = u8::try_from(MAX_FILES).unwrap();
        for n in 0..most + 3 {
            create(&cache, &Key([n; 32]));
            // The one that is written next is the newest.
            age(&cache, n);
        }
        assert_eq!(left(&cache, most + 8), (3..most + 3).collect::<Vec<u8>>());
    }

    #[test]
    fn a_clock_that_was_ahead_costs_no_snapshot_that_is_taken_now() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache"));
        let future = SystemTime::now() + Duration::from_secs(10 * 365 * 24 * 3600);
        let full = u8::try_from(MAX_FILES).unwrap();
        for n in 0..full {
            create(&cache, &Key([n; 32]));
            cache.open(&Key([n; 32])).unwrap().unwrap();
            File::options().write(true).open(cache.path(&Key([n; 32]))).unwrap().set_modified(future).unwrap();
        }
        create(&cache, &Key([full; 32]));
        for _ in 0..2 {
            assert!(cache.open(&Key([full; 32])).unwrap().is_some(), "the one that is of use");
        }
    }

    /// Those of the first `n` that are there.
    fn left(cache: &Cache, n: u8) -> Vec<u8> {
        (0..n).filter(|n| cache.open(&Key([*n; 32])).unwrap().is_some()).collect()
    }

    #[test]
    fn a_bound_of_bytes_holds_for_all_but_the_one_that_was_used_last() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache { folder: dir.path().join("cache"), max_bytes: 1 << 20 };
        let write = |n: u8, bytes: usize| {
            finish(&cache.begin(&Key([n; 32])).unwrap(), &Key([n; 32]), bytes);
            age(&cache, n);
        };
        (0..4).for_each(|n| write(n, 230 << 10));
        assert_eq!(left(&cache, 5), [0, 1, 2, 3]);
        // The first is restored: it is not the oldest any more.
        was_used(&cache.open(&Key([0; 32])).unwrap().unwrap());
        write(4, 280 << 10);
        assert_eq!(left(&cache, 5), [0, 2, 3, 4]);
        let file = cache.begin(&Key([1; 32])).unwrap();
        finish(&file, &Key([1; 32]), 3 << 20);
        // The clock that the kernel stamps files by is milliseconds behind the one that `was_used` reads.
        file.set_modified(SystemTime::now()).unwrap();
        drop(file);
        assert_eq!(left(&cache, 5), [1], "however large it is");
    }

    #[test]
    fn what_was_left_unfinished_goes_and_what_is_being_written_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache"));
        create(&cache, &KEY);
        let written = cache.begin(&Key([1; 32])).unwrap();
        let left = unfinished(&cache.folder, &Key([2; 32])).unwrap();
        fs::write(&left, "half").unwrap();
        // Of another host, whose locks are not seen.
        let others = [1, 3700].map(|age| {
            let path = cache.folder.join(format!("{}.another.{age}.{UNFINISHED}", Key([2; 32])));
            fs::write(&path, "half").unwrap();
            let then = SystemTime::now() - Duration::from_secs(age);
            File::options().write(true).open(&path).unwrap().set_modified(then).unwrap();
            path
        });
        assert!(!is_being_written(&left) && cache.files(UNFINISHED).len() == 4);
        // Somebody else finishes meanwhile.
        create(&cache, &Key([2; 32]));
        assert!(cache.open(&Key([2; 32])).unwrap().is_some());
        assert_eq!((cache.files(SNAPSHOT).len(), cache.files(UNFINISHED).len()), (2, 2));
        assert!(others[0].exists() && !others[1].exists() && !left.exists());
        finish(&written, &Key([1; 32]), 10);
        drop(written);
        assert!(cache.open(&Key([1; 32])).unwrap().is_some());
        assert_eq!((cache.files(SNAPSHOT).len(), cache.files(UNFINISHED).len()), (3, 1));
    }

    #[test]
    fn a_snapshot_of_another_version_is_kept_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let file = cache.begin(&KEY).unwrap();
        finish(&file, &KEY, 10);
        file.write_all_at(&[99], 8).unwrap();
        drop(file);
        assert!(cache.open(&KEY).unwrap().is_some());
    }
}
