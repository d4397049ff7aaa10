//! Files of the host that a process with mounts of its own has open. In the host's they would count as used by nobody: who unmounts their
//! file system, or takes its disk away, is to be told that it is in use.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Keeps the file systems of some files mounted.
#[derive(Debug, Default)]
pub struct Held(#[expect(dead_code, reason = "they are held")] Vec<File>);

impl Held {
    /// Those of the files at `paths`; what cannot be found holds nothing.
    pub fn new<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Self {
        let find = |path| OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).ok();
        Self(paths.into_iter().filter_map(find).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use nix::errno::Errno;
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::base::testing::as_root;

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
            let held = Held::new([disk.as_path(), Path::new("/nowhere")]);
            assert_eq!(umount2(dir.path(), MntFlags::empty()), Err(Errno::EBUSY));
            drop(held);
            umount2(dir.path(), MntFlags::empty()).unwrap();
        });
    }
}
