//! The folder of snapshots: `UMBRA_SNAPSHOT_DIR`, else `/var/cache/umbra/snapshots` for root, else
//! `$XDG_CACHE_HOME/umbra/snapshots` (`~/.cache/umbra/snapshots`).
//!
//! Invariants: what is in it was written by this user alone, because a VM runs what a snapshot holds: a folder or file that
//! somebody else owns, or that others may write to, is refused. A file is there whole or not at all (written beside and renamed).
//! There are at most [`MAX_FILES`]; the oldest go first.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::unistd::geteuid;

use super::Error;
use super::format::Key;

/// Environment variable: the folder.
pub const FOLDER: &str = "UMBRA_SNAPSHOT_DIR";
/// Snapshots that are kept: some images and shapes, a few hundred MiB.
const MAX_FILES: usize = 8;
/// Ends of file names: of a snapshot, and of one that is being written.
const SNAPSHOT: &str = "snapshot";
const UNFINISHED: &str = "unfinished";
/// An unfinished file of this age has nobody who finishes it.
const ABANDONED: Duration = Duration::from_secs(3600);

/// The folder, which need not exist.
#[derive(Clone, Debug)]
pub struct Cache(PathBuf);

impl Cache {
    /// The folder that the environment names.
    ///
    /// # Errors
    /// It names none, and there is no home.
    pub fn of_environment() -> Result<Self, Error> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(folder) = set(FOLDER) {
            return Ok(Self(folder));
        }
        if geteuid().is_root() {
            return Ok(Self("/var/cache/umbra/snapshots".into()));
        }
        let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        base.map(|base| Self(base.join("umbra/snapshots"))).ok_or(Error::NoFolder)
    }

    /// The folder at `path`.
    pub fn at(path: &Path) -> Self {
        Self(path.into())
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.0.join(format!("{key}.{SNAPSHOT}"))
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

    /// Writes the snapshot with `key` by `write`, and makes room for it.
    ///
    /// # Errors
    /// Nothing is left of it then.
    pub fn create(&self, key: &Key, write: impl FnOnce(&File) -> Result<(), Error>) -> Result<(), Error> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Folder { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0).map_err(failed(&self.0))?;
        self.check()?;
        let unfinished = self.0.join(format!("{key}.{}.{UNFINISHED}", std::process::id()));
        let open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished);
        let file = open.map_err(failed(&unfinished))?;
        let written = write(&file);
        drop(file);
        let done = written.and_then(|()| fs::rename(&unfinished, self.path(key)).map_err(failed(&unfinished)));
        if done.is_err() {
            // A file that cannot be removed is removed when it is old.
            let _ = fs::remove_file(&unfinished);
        }
        self.make_room();
        done
    }

    fn check(&self) -> Result<(), Error> {
        let metadata = fs::symlink_metadata(&self.0);
        let metadata = metadata.map_err(|source| Error::Folder { path: self.0.clone(), source })?;
        check(&self.0, &metadata)
    }

    /// Removes what is too much. What cannot be removed stays.
    fn make_room(&self) {
        let Ok(entries) = fs::read_dir(&self.0) else { return };
        let mut snapshots = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            let Some(changed) = entry.metadata().ok().and_then(|metadata| metadata.modified().ok()) else { continue };
            match path.extension().and_then(|end| end.to_str()) {
                Some(SNAPSHOT) => snapshots.push((changed, path)),
                Some(UNFINISHED) if SystemTime::now().duration_since(changed).is_ok_and(|age| age > ABANDONED) => {
                    let _ = fs::remove_file(path);
                }
                _ => {}
            }
        }
        snapshots.sort();
        let too_many = snapshots.len().saturating_sub(MAX_FILES);
        for (_, path) in snapshots.drain(..too_many) {
            let _ = fs::remove_file(path);
        }
    }
}

/// An error if somebody else could have written what is at `path`.
fn check(path: &Path, metadata: &Metadata) -> Result<(), Error> {
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
    use std::os::unix::fs::PermissionsExt;

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
        assert_eq!(fs::read_dir(&cache.0).unwrap().count(), 0, "nothing is left of a failure");
        cache.create(&KEY, write).unwrap();
        let metadata = cache.open(&KEY).unwrap().unwrap().metadata().unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (5, 0o600));
        assert_eq!(fs::metadata(&cache.0).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache"));
        cache.create(&KEY, write).unwrap();
        for (path, mode) in [(cache.0.clone(), 0o770), (cache.path(&KEY), 0o602)] {
            let before = fs::metadata(&path).unwrap().permissions();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = cache.open(&KEY).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{}: others", path.display())), "{error}");
            if path == cache.0 {
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
        assert_eq!(fs::read_dir(&cache.0).unwrap().count(), 0);
    }
}
