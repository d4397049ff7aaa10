//! What is in the cache, for people: each file with its description, whether this program would use it, and the removal of those that it
//! would not.
//!
//! Invariant: a file is judged by its first page and by who may write to it; that the rest is whole is found out when it is restored.

use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::Error;
use super::cache::{Cache, SNAPSHOT, UNFINISHED, check, is_being_written, on_disk, open_to_read};
use super::description::Description;
use super::format::Summary;
use super::key::HostFacts;
use crate::base::error::chain;

/// A file of the cache.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its path.
    pub path: PathBuf,
    /// What it takes on the disk, bytes.
    pub bytes: u64,
    /// When it was taken or restored last.
    pub used: SystemTime,
    /// What it is of; `None`: that cannot be read.
    pub description: Option<Description>,
    /// How it is.
    pub state: FileState,
}

/// How a file of the cache is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileState {
    /// The program that asks would use it.
    Usable,
    /// It would not, for this reason.
    Unusable(String),
    /// It is being written.
    BeingWritten,
    /// Who wrote it has ended before it was whole.
    Leftover,
}

impl Cache {
    /// All files, those first that were used last. `host` is the program that asks, and its host.
    ///
    /// # Errors
    /// Others may write to the folder, or it cannot be looked at. One that is not there is empty.
    pub fn list(&self, host: &HostFacts) -> Result<Vec<Listed>, Error> {
        match self.check() {
            Err(Error::Folder { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            result => result?,
        }
        self.name_finished();
        let snapshots = self.files(SNAPSHOT).into_iter().map(|(path, metadata)| {
            let (description, state) = judge(&path, &metadata, host);
            listed(path, &metadata, (description, state))
        });
        let unfinished = self.files(UNFINISHED).into_iter().map(|(path, metadata)| {
            let state = if is_being_written(&path) { FileState::BeingWritten } else { FileState::Leftover };
            listed(path, &metadata, (None, state))
        });
        let mut all: Vec<_> = snapshots.chain(unfinished).collect();
        all.sort_by(|one, other| other.used.cmp(&one.used).then_with(|| one.path.cmp(&other.path)));
        Ok(all)
    }

    /// Removes what the program that asks would not use and what was left unfinished, or `all` that nobody writes just now. Returns
    /// what was removed.
    ///
    /// # Errors
    /// As [`Self::list`], or a file cannot be removed.
    pub fn prune(&self, host: &HostFacts, all: bool) -> Result<Vec<Listed>, Error> {
        let goes = |listed: &Listed| match listed.state {
            FileState::Usable => all,
            FileState::Unusable(_) | FileState::Leftover => true,
            FileState::BeingWritten => false,
        };
        let gone: Vec<_> = self.list(host)?.into_iter().filter(goes).collect();
        for Listed { path, .. } in &gone {
            match fs::remove_file(path) {
                // Somebody else was faster.
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::Folder { path: path.clone(), source });
                }
                _ => {}
            }
        }
        Ok(gone)
    }
}

fn listed(path: PathBuf, metadata: &Metadata, (description, state): (Option<Description>, FileState)) -> Listed {
    let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    Listed { path, bytes: on_disk(metadata), used, description, state }
}

/// What the snapshot at `path` is of, and whether it would be used.
fn judge(path: &Path, metadata: &Metadata, host: &HostFacts) -> (Option<Description>, FileState) {
    let unusable = |why: String| FileState::Unusable(why);
    if let Err(error) = check(path, metadata) {
        return (None, unusable(chain(&error)));
    }
    let opened = open_to_read(path).map_err(|source| Error::Folder { path: path.into(), source });
    let summary = match opened.and_then(|file| Ok(Summary::read(&file)?)) {
        Ok(summary) => summary,
        Err(error) => return (None, unusable(chain(&error))),
    };
    let named = path.file_stem().is_some_and(|name| name.to_string_lossy() == summary.key.to_string());
    match Description::decode(&summary.description) {
        None => (None, unusable("it does not say what it is of".into())),
        Some(description) if !named => (Some(description), unusable("it has the name of another snapshot".into())),
        Some(description) => {
            let state = description.unusable(host).map_or(FileState::Usable, unusable);
            (Some(description), state)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::super::format::{Key, Writer};
    use super::*;
    use crate::vm::snapshot::key::Build;

    fn host(version: &str, kernel: &str) -> HostFacts {
        HostFacts { program: (version.into(), Build::Checksum(7)), kernel: [kernel.into(), "#1".into()] }
    }

    fn write(cache: &Cache, n: u8, by: HostFacts) -> PathBuf {
        let (key, image) = (Key([n; 32]), format!("image{n}"));
        let description = Description { image, by, ..Description::default() }.encode();
        let file = cache.begin(&key).unwrap();
        Writer::new(&file).finish(&key, 1 << 20, (b"{}", &description)).unwrap();
        drop(file);
        cache.open(&key).unwrap().unwrap();
        cache.folder().join(format!("{key}.{SNAPSHOT}"))
    }

    /// A cache with a snapshot in each state, by its number, and a leftover.
    fn cache(folder: &Path) -> Cache {
        let cache = Cache::at(&folder.join("cache"));
        for n in [0, 3, 4, 5] {
            write(&cache, n, host("1", "6.1"));
        }
        write(&cache, 1, host("2", "6.1"));
        write(&cache, 2, host("1", "6.2"));
        let path = |n: u8| cache.folder().join(format!("{}.{SNAPSHOT}", Key([n; 32])));
        fs::set_permissions(path(3), fs::Permissions::from_mode(0o622)).unwrap();
        File::options().write(true).open(path(4)).unwrap().write_all_at(b"x", 60).unwrap();
        fs::rename(path(5), path(6)).unwrap();
        fs::write(path(7), "short").unwrap();
        fs::write(cache.folder().join(format!("{}.9.{UNFINISHED}", Key([8; 32]))), "half").unwrap();
        fs::write(cache.folder().join("a file of somebody else"), "").unwrap();
        cache
    }

    #[test]
    fn each_file_is_listed_with_what_it_is_of_and_why_it_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let mut listed = cache.list(&host("1", "6.1")).unwrap();
        listed.sort_by(|one, other| one.path.cmp(&other.path));
        let expected = [
            (Some("image0"), ""),
            (Some("image1"), "another build of umbra (version 2)"),
            (Some("image2"), "another kernel of the host (6.2)"),
            (None, "others may write to it"),
            (None, "its header is damaged"),
            (Some("image5"), "the name of another snapshot"),
            (None, "it is no snapshot"),
            (None, "leftover"),
        ];
        assert_eq!(listed.len(), expected.len());
        for (listed, (image, why)) in listed.iter().zip(expected) {
            assert_eq!(listed.description.as_ref().map(|of| of.image.as_str()), image, "{listed:?}");
            match &listed.state {
                FileState::Usable => assert_eq!(why, ""),
                FileState::Unusable(said) => assert!(!why.is_empty() && said.contains(why), "{said}"),
                FileState::Leftover => assert_eq!(why, "leftover"),
                FileState::BeingWritten => panic!("{listed:?}"),
            }
        }
    }

    #[test]
    fn what_is_of_no_use_is_removed_and_all_where_that_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let host = host("1", "6.1");
        assert_eq!(cache.prune(&host, false).unwrap().len(), 7);
        let left = cache.list(&host).unwrap();
        assert_eq!(left.iter().map(|left| left.state.clone()).collect::<Vec<_>>(), [FileState::Usable]);
        assert!(cache.prune(&host, false).unwrap().is_empty());
        // What is being written stays in any case.
        let file = cache.begin(&Key([1; 32])).unwrap();
        assert_eq!(cache.prune(&host, true).unwrap().len(), 1);
        assert_eq!(cache.list(&host).unwrap()[0].state, FileState::BeingWritten);
        Writer::new(&file).finish(&Key([1; 32]), 1 << 20, (b"{}", b"{}")).unwrap();
        drop(file);
        assert!(cache.folder().join("a file of somebody else").exists());
        assert_eq!(cache.list(&host).unwrap().len(), 1);
    }

    #[test]
    fn a_folder_that_is_not_there_is_empty_and_one_that_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache"));
        assert!(cache.list(&host("1", "6.1")).unwrap().is_empty());
        write(&cache, 0, host("1", "6.1"));
        fs::set_permissions(cache.folder(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(cache.list(&host("1", "6.1")), Err(Error::OthersMayWrite(_))));
        assert!(matches!(cache.prune(&host("1", "6.1"), true), Err(Error::OthersMayWrite(_))));
    }
}
