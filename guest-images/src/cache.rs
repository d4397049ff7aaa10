//! What is slow to make, kept by content: unpacked packages, module indices, unpacked kernels.
//!
//! An entry is found by a digest of what it was made from, so a changed source makes a new entry and nothing ever
//! needs to be invalidated. The folder may be deleted at any time. Entries appear whole (see [`crate::files`]), so
//! several processes may share it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{env, fs};

use sha2::{Digest, Sha256};

use crate::files::{self, FileError, context};

/// A cache folder.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

/// Environment variable that names the cache folder.
pub const CACHE_VARIABLE: &str = "UMBRA_CACHE";

impl Cache {
    /// Uses `dir`, which is made when first needed.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The user's cache: `$UMBRA_CACHE`, else `umbra` in `$XDG_CACHE_HOME`, `~/.cache` or `/var/cache`.
    pub fn of_user() -> Self {
        let from = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let dir = from(CACHE_VARIABLE)
            .or_else(|| from("XDG_CACHE_HOME").map(|dir| dir.join("umbra")))
            .or_else(|| from("HOME").map(|dir| dir.join(".cache/umbra")))
            .unwrap_or_else(|| "/var/cache/umbra".into());
        Self::at(dir)
    }

    /// The folder `kind/key`, filled by `make` if it is not there yet.
    ///
    /// # Errors
    /// When `make` fails or the cache cannot be written.
    pub fn dir<E: From<FileError>>(
        &self,
        kind: &str,
        key: &str,
        make: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let place = self.dir.join(kind).join(key);
        if !place.is_dir() {
            files::replace_dir(&place, make)?;
        }
        Ok(place)
    }

    /// The file `kind/key`, with the bytes of `make` if it is not there yet.
    ///
    /// # Errors
    /// When `make` fails or the cache cannot be written.
    pub fn file<E: From<FileError>>(
        &self,
        kind: &str,
        key: &str,
        make: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<PathBuf, E> {
        let place = self.dir.join(kind).join(key);
        if !place.is_file() {
            files::write_atomically(&place, &make()?)?;
        }
        Ok(place)
    }

    /// The SHA-256 of a file. Remembered by the file's identity (inode, size, time), so a large file is read once.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn digest(&self, path: &Path) -> Result<String, FileError> {
        let meta = fs::metadata(path).map_err(context("read", path))?;
        let identity = format!("{} {} {} {}.{}", meta.dev(), meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec());
        let memo = self.file("digests", &sha256(identity.as_bytes()), || digest_file(path).map(String::into_bytes))?;
        files::read_text(&memo)
    }
}

/// The SHA-256 of `bytes`, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn digest_file(path: &Path) -> Result<String, FileError> {
    let mut file = fs::File::open(path).map_err(context("read", path))?;
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher).map_err(context("read", path))?;
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let make = || Ok::<_, FileError>(b"x".to_vec());
        let first = cache.file("kind", "key", make).unwrap();
        let again = cache.file("kind", "key", || -> Result<_, FileError> { panic!("made twice") }).unwrap();
        assert_eq!(first, again);
    }

    #[test]
    fn a_changed_file_has_another_digest() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        let file = dir.path().join("file");
        fs::write(&file, "abc").unwrap();
        let first = cache.digest(&file).unwrap();
        assert_eq!(first, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        fs::write(&file, "abcd").unwrap();
        assert_ne!(cache.digest(&file).unwrap(), first);
    }
}
