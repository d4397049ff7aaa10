//! The folder of snapshots: `UMBRA_SNAPSHOT_DIR`, else `/var/cache/umbra/snapshots` for root, else
//! `$XDG_CACHE_HOME/umbra/snapshots` (`~/.cache/umbra/snapshots`).
//!
//! Invariants: what is in it was written by this user alone, because a VM runs what a snapshot holds: a folder or file that
//! somebody else owns, or that others may write to, is refused. A file is there whole or not at all (written beside and renamed).
//! There are at most [`MAX_FILES`], of [`MAX_BYTES`] on the disk; those go first that were taken or restored longest ago. Who writes a
//! file has it locked (`flock(2)`): one that is unfinished and not locked was left behind.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::unistd::geteuid;

use super::Error;
use super::format::Key;

/// Environment variable: the folder.
pub const FOLDER: &str = "UMBRA_SNAPSHOT_DIR";
/// Snapshots that are kept: some images and shapes, a few hundred MiB.
const MAX_FILES: usize = 8;
/// What they take on the disk at most, in bytes of allocated blocks: some 30 snapshots of small driver VMs, four of large ones. The one
/// that was written last stays, however large it is.
pub const MAX_BYTES: u64 = 2 << 30;
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
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(folder) = set(FOLDER) {
            return Ok(Self::at(&folder));
        }
        if geteuid().is_root() {
            return Ok(Self::at(Path::new("/var/cache/umbra/snapshots")));
        }
        let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        base.map(|base| Self::at(&base.join("umbra/snapshots"))).ok_or(Error::NoFolder)
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
        let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        self.check()?;
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

    /// Writes the snapshot with `key` by `write`, and makes room for it.
    ///
    /// # Errors
    /// Nothing is left of it then.
    pub fn create(&self, key: &Key, write: impl FnOnce(&File) -> Result<(), Error>) -> Result<(), Error> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Folder { path, source }
        };
        self.prepare()?;
        let unfinished = self.folder.join(format!("{key}.{}.{UNFINISHED}", std::process::id()));
        let open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished);
        let file = open.map_err(failed(&unfinished))?;
        if let Err(error) = file.lock() {
            // The file system knows no locks: who removes leftovers meanwhile removes this one too.
            tracing::debug!(%error, "lock the snapshot that is written");
        }
        let (written, whole) = (write(&file), self.path(key));
        let done = written.and_then(|()| fs::rename(&unfinished, &whole).map_err(failed(&unfinished)));
        if done.is_err() {
            // A file that cannot be removed now is a leftover.
            let _ = fs::remove_file(&unfinished);
        }
        drop(file);
        self.make_room(&whole);
        done
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

    /// Removes what is too much besides `newest`, and what was left unfinished. What cannot be removed stays.
    fn make_room(&self, newest: &Path) {
        for (path, _) in self.files(UNFINISHED) {
            if !is_being_written(&path) {
                let _ = fs::remove_file(path);
            }
        }
        let used = |metadata: &Metadata| metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let mut snapshots = self.files(SNAPSHOT);
        let newest = snapshots.iter().position(|(path, _)| path == newest).map(|at| snapshots.swap_remove(at));
        snapshots.sort_by_key(|(_, metadata)| std::cmp::Reverse(used(metadata)));
        let (mut files, mut bytes) =
            newest.iter().fold((0, 0), |(files, bytes), (_, metadata)| (files + 1, bytes + on_disk(metadata)));
        for (path, metadata) in snapshots {
            files += 1;
            bytes += on_disk(&metadata);
            if files > MAX_FILES || bytes > self.max_bytes {
                let _ = fs::remove_file(path);
            }
        }
    }
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
    let open = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    open.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
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
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;

    const KEY: Key = Key([0xab; 32]);

    fn write(mut file: &File) -> Result<(), Error> {
        file.write_all(b"whole").map_err(Error::Write)
    }

    #[test]
    fn a_snapshot_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("a/b"));
        assert!(cache.open(&KEY).unwrap().is_none());
        assert!(cache.create(&KEY, |_| Err(Error::Interrupted)).is_err());
        assert!(cache.open(&KEY).unwrap().is_none());
        assert_eq!(fs::read_dir(&cache.folder).unwrap().count(), 0, "nothing is left of a failure");
        cache.create(&KEY, write).unwrap();
        let metadata = cache.open(&KEY).unwrap().unwrap().metadata().unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (5, 0o600));
        assert_eq!(fs::metadata(&cache.folder).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache"));
        cache.create(&KEY, write).unwrap();
        for (path, mode) in [(cache.folder.clone(), 0o770), (cache.path(&KEY), 0o602)] {
            let before = fs::metadata(&path).unwrap().permissions();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = cache.open(&KEY).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{}: others", path.display())), "{error}");
            if path == cache.folder {
                assert!(cache.create(&KEY, write).is_err());
            }
            fs::set_permissions(&path, before).unwrap();
        }
        assert!(cache.open(&KEY).unwrap().is_some());
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
        for n in 0..u8::try_from(MAX_FILES).unwrap() + 3 {
            cache.create(&Key([n; 32]), write).unwrap();
            let old = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(n));
            // The one that is written next is the newest.
            File::options().write(true).open(cache.path(&Key([n; 32]))).unwrap().set_modified(old).unwrap();
        }
        let left: Vec<_> = (0..16).filter(|n| cache.open(&Key([*n; 32])).unwrap().is_some()).collect();
        assert_eq!(left, (3..11).collect::<Vec<u8>>());
    }

    /// Those of the first `n` that are there.
    fn left(cache: &Cache, n: u8) -> Vec<u8> {
        (0..n).filter(|n| cache.open(&Key([*n; 32])).unwrap().is_some()).collect()
    }

    #[test]
    fn a_bound_of_bytes_holds_for_all_but_the_one_that_was_just_written() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache { folder: dir.path().join("cache"), max_bytes: 1 << 20 };
        let write = |n: u8, bytes: usize| {
            // A hole takes no room.
            let content = |file: &File| file.write_all_at(&vec![n; bytes], 1 << 30).map_err(Error::Write);
            cache.create(&Key([n; 32]), content).unwrap();
            let old = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(n));
            File::options().write(true).open(cache.path(&Key([n; 32]))).unwrap().set_modified(old).unwrap();
        };
        (0..4).for_each(|n| write(n, 240 << 10));
        assert_eq!(left(&cache, 5), [0, 1, 2, 3]);
        // The first is restored: it is not the oldest any more.
        was_used(&cache.open(&Key([0; 32])).unwrap().unwrap());
        write(4, 300 << 10);
        assert_eq!(left(&cache, 5), [0, 2, 3, 4]);
        write(1, 3 << 20);
        assert_eq!(left(&cache, 5), [1], "however large it is");
    }

    #[test]
    fn what_was_left_unfinished_goes_and_what_is_being_written_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache"));
        cache.create(&KEY, write).unwrap();
        let left = cache.folder.join(format!("{KEY}.1.{UNFINISHED}"));
        fs::write(&left, "half").unwrap();
        cache
            .create(&Key([1; 32]), |file| {
                let unfinished = cache.files(UNFINISHED);
                let written: Vec<_> = unfinished.iter().map(|(path, _)| is_being_written(path)).collect();
                assert!(written.len() == 2 && written.contains(&true) && !is_being_written(&left));
                // Somebody else finishes meanwhile.
                cache.create(&Key([2; 32]), write).unwrap();
                write(file)
            })
            .unwrap();
        assert_eq!((cache.files(SNAPSHOT).len(), cache.files(UNFINISHED).len()), (3, 0));
    }

    #[test]
    fn a_full_disk_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache"));
        let full = |_: &File| {
            let mut full = File::options().write(true).open("/dev/full").unwrap();
            full.write_all(b"x").map_err(Error::Write)
        };
        let error = cache.create(&KEY, full).unwrap_err();
        assert!(crate::base::error::chain(&error).contains("No space left"), "{error}");
        assert_eq!(fs::read_dir(&cache.folder).unwrap().count(), 0);
    }
}
