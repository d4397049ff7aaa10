//! Files of the host that a process with mounts of its own has open. In the host's they would count as used by nobody: who unmounts their
//! file system, or takes its disk away, is to be told that it is in use.
//!
//! Invariant: who holds files waits for no file system: they are found in a thread, which one that hangs holds up alone.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use super::lock::lock;

/// What is found, with the path at which it was.
#[derive(Debug, Default)]
struct Found {
    files: Vec<(PathBuf, Arc<File>)>,
    /// Paths at which nobody has looked yet.
    left: usize,
}

/// Keeps the file systems of some files mounted. Cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct Held(Arc<(Mutex<Found>, Condvar)>);

impl Held {
    /// Those of the files at `paths`, a moment later; what cannot be found holds nothing.
    pub fn new<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Self {
        let find = |path: &Path| OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).ok();
        Self::found_by(find, paths.into_iter().map(Path::to_path_buf).collect())
    }

    fn found_by(find: impl Fn(&Path) -> Option<File> + Send + 'static, paths: Vec<PathBuf>) -> Self {
        let held = Self::default();
        lock(&held.0.0).left = paths.len();
        let to = Arc::downgrade(&held.0);
        let look = move || {
            for path in paths {
                let file = find(&path);
                let Some(found) = to.upgrade() else { return };
                let mut state = lock(&found.0);
                state.files.extend(file.map(|file| (path, Arc::new(file))));
                state.left -= 1;
                found.1.notify_all();
            }
        };
        if let Err(error) = thread::Builder::new().name("hold".into()).spawn(look) {
            tracing::warn!("file systems that are used do not count as used: {error}");
            lock(&held.0.0).left = 0;
        }
        held
    }

    /// The file that was at `path`, wherever it is by now (it can be measured, and not be read); none if there was none. Waits for its file
    /// system.
    pub fn wait_for(&self, path: &Path) -> Option<Arc<File>> {
        let file = |found: &Found| found.files.iter().find(|(at, _)| at == path).map(|(_, file)| Arc::clone(file));
        let (state, changed) = &*self.0;
        let is_open = |found: &mut Found| file(found).is_none() && found.left > 0;
        let found = changed.wait_while(lock(state), is_open).unwrap_or_else(PoisonError::into_inner);
        file(&found)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc::channel;

    use nix::errno::Errno;
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::base::testing::as_root;

    #[test]
    fn a_file_system_that_hangs_holds_nobody_up_and_what_it_answers_too_late_is_closed() {
        let (answer, answers) = channel::<File>();
        let answers = Mutex::new(answers);
        let find = move |_: &Path| lock(&answers).recv().ok();
        let paths = ["one", "two", "three"].map(PathBuf::from);
        let held = Held::found_by(find, paths.to_vec());
        let file = || tempfile::tempfile().unwrap();
        answer.send(file()).unwrap();
        let first = held.wait_for(&paths[0]).unwrap();
        drop(held);
        while Arc::strong_count(&first) > 1 {
            thread::yield_now();
        }
        answer.send(file()).unwrap();
        // The thread ends with the second file, and nobody looks for the third.
        while answer.send(file()).is_ok() {
            thread::yield_now();
        }
    }

    #[test]
    fn a_file_system_is_in_use_as_long_as_a_file_of_it_is_held() {
        // The mounts are those of a thread of its own.
        as_root(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            let dir = tempfile::tempdir().unwrap();
            mount(Some("umbra"), dir.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            let disk = dir.path().join("disk");
            File::create(&disk).unwrap();
            let held = Held::new([Path::new("/nowhere"), disk.as_path()]);
            assert!(held.wait_for(&disk).is_some() && held.wait_for(Path::new("/nowhere")).is_none());
            assert_eq!(umount2(dir.path(), MntFlags::empty()), Err(Errno::EBUSY));
            drop(held);
            // The thread that looked may be about to let go.
            while let Err(error) = umount2(dir.path(), MntFlags::empty()) {
                assert_eq!(error, Errno::EBUSY);
                thread::yield_now();
            }
        });
    }
}
