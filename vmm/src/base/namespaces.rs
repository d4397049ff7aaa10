//! Namespaces of a process's own: a root folder with nothing in it, and no network. What the process has open stays as it is: files,
//! sockets, TAP interfaces (which stay in the network that they were opened in).
//!
//! ```text
//!   split_off      mounts, IPC and host name become the process's own, at first as the host's are; a network without interfaces is made
//!   enter_network  the calling thread, and those that it starts, have that network
//!   empty_root     the root folder of all threads is an empty one, which nobody can write to
//! ```
//! One path stays: `/proc/self/fd`, because what kind of file a descriptor is can be read there alone.

use std::fs::{File, Permissions, create_dir_all};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread::Builder;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, chroot, pivot_root};
use thiserror::Error;

/// The calling thread's network.
const NETWORK: &str = "/proc/thread-self/ns/net";
/// Where the empty root is made: a folder that each host has, and in which nothing is opened any more by then.
const PLACE: &str = "/dev";
/// The calling thread's mounts.
const MOUNTS: &str = "/proc/thread-self/mountinfo";
/// Of the process; in the empty root too.
const DESCRIPTORS: &str = "/proc/self/fd";

/// What the kernel does not grant.
#[derive(Clone, Copy, Debug, Error)]
#[error("{operation}")]
pub struct Error {
    operation: &'static str,
    #[source]
    source: Errno,
}

pub(super) fn failed(operation: &'static str) -> impl Fn(Errno) -> Error {
    move |source| Error { operation, source }
}

pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}

/// Namespaces that a process has split off.
#[derive(Debug)]
pub struct Namespaces {
    network: OwnedFd,
}

impl Namespaces {
    /// To be called before any other thread is started: mounts are the calling thread's, and of those that it starts.
    ///
    /// # Errors
    /// Without `CAP_SYS_ADMIN`, or where a filter of system calls is in the way.
    pub fn split_off() -> Result<Self, Error> {
        let open = || File::open(NETWORK).map_err(|error| errno(&error));
        let host = open().map_err(failed("open the host's network namespace"))?;
        unshare(CloneFlags::CLONE_NEWNET).map_err(failed("make a network namespace (unshare)"))?;
        let network = open().map_err(failed("open the own network namespace"))?;
        // Until all is set up the host's interfaces are opened by their names.
        setns(host, CloneFlags::CLONE_NEWNET).map_err(failed("go back to the host's network namespace (setns)"))?;
        let rest = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
        unshare(rest).map_err(failed("make namespaces of mounts, IPC and host name (unshare)"))?;
        change_mount("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE).map_err(failed("take the mounts from the host's"))?;
        Ok(Self { network: network.into() })
    }

    /// The calling thread, and those that it starts, have no network.
    ///
    /// # Errors
    /// As [`Self::split_off`].
    pub fn enter_network(&self) -> Result<(), Error> {
        setns(&self.network, CloneFlags::CLONE_NEWNET).map_err(failed("enter the own network namespace (setns)"))
    }

    /// From here on no thread of the process finds a file by its name, but its own descriptors.
    ///
    /// # Errors
    /// As [`Self::split_off`].
    pub fn empty_root(&self) -> Result<(), Error> {
        let attributes = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let data = Some("mode=0555,size=4k,nr_inodes=8");
        mount(Some("umbra"), PLACE, Some("tmpfs"), attributes, data).map_err(failed("mount an empty folder"))?;
        let place = format!("{PLACE}{DESCRIPTORS}");
        create_dir_all(&place).map_err(|error| errno(&error)).map_err(failed("make the folder of descriptors"))?;
        // Another user's threads look there, whatever root's umask is. The last part is a mount's, whose owner the process is.
        for folder in Path::new(&place).ancestors().skip(1).take_while(|folder| *folder != Path::new(PLACE)) {
            let open = std::fs::set_permissions(folder, Permissions::from_mode(0o555));
            open.map_err(|error| errno(&error)).map_err(failed("let all enter the folder of descriptors"))?;
        }
        let bound = mount(Some(DESCRIPTORS), place.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>);
        bound.map_err(failed("mount the folder of descriptors"))?;
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | attributes;
        change_mount(PLACE, read_only).map_err(failed("have the empty folder only read"))?;
        chdir(PLACE).map_err(failed("enter the empty folder"))?;
        match pivot_root(".", ".") {
            // The folder before lies upon the new one.
            Ok(()) => umount2(".", MntFlags::MNT_DETACH).map_err(failed("take the host's files away (umount2)")),
            // The host runs from its initial RAM disk, which cannot be taken away: it is hidden.
            Err(Errno::EINVAL) => {
                let mounts = std::fs::read_to_string(MOUNTS).map_err(|error| errno(&error));
                let mounts = mounts.map_err(failed("read the list of mounts"))?;
                // Whoever unmounts one of them in the host would find it in use. The newest first; what lies below the folder stays.
                for mounted in
                    places(&mounts).rev().filter(|place| *place != "/" && !Path::new(place).starts_with(PLACE))
                {
                    umount2(mounted, MntFlags::MNT_DETACH).map_err(failed("take the host's mounts away (umount2)"))?;
                }
                mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
                    .and_then(|()| chroot("."))
                    .map_err(failed("hide the host's files"))
            }
            Err(error) => Err(failed("change the root folder (pivot_root)")(error)),
        }?;
        chdir("/").map_err(failed("enter the new root folder"))
    }
}

/// The places of the mounts in a list of them (proc_pid_mountinfo(5)), which keeps their order. One with a space in its path, which is
/// escaped there, is none.
fn places(mounts: &str) -> impl DoubleEndedIterator<Item = &str> {
    mounts.lines().filter_map(|line| line.split(' ').nth(4)).filter(|place| !place.contains('\\'))
}

fn change_mount(place: &str, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&str>, place, None::<&str>, flags, None::<&str>)
}

/// Whether processes that this one starts can have all that: a thread tries it.
///
/// # Errors
/// They cannot; why.
pub fn available() -> Result<(), Error> {
    let no_thread = failed("start a thread");
    let tried = Builder::new().name("namespaces".into()).spawn(|| {
        let own = Namespaces::split_off()?;
        own.enter_network()?;
        own.empty_root()
    });
    tried.map_err(|_| no_thread(Errno::EAGAIN))?.join().unwrap_or_else(|_| Err(no_thread(Errno::EINTR)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ffi::CStr;
    use std::io::Read;
    use std::net::TcpStream;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::base::testing::as_root;

    fn names(folder: &str) -> Vec<String> {
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// A thread in an empty root finds nothing there, nor does one that it starts.
    fn find_nothing() {
        let own = Namespaces::split_off().unwrap();
        let file = Arc::new(File::from(memfd_create("open", MFdFlags::empty()).unwrap()));
        own.enter_network().unwrap();
        own.empty_root().unwrap();
        look(&file);
        std::thread::spawn(move || look(&file)).join().unwrap();
    }

    fn look(file: &File) {
        for (folder, name) in [("/", "proc"), ("/..", "proc"), ("/proc", "self"), ("/proc/self", "fd")] {
            assert_eq!(names(folder), [name], "{folder}");
        }
        assert_eq!(names("/proc/self/fd/../../.."), ["proc"]);
        for folder in ["/", "/proc", "/proc/self"] {
            assert_eq!(std::fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o555, "{folder}");
        }
        let link = std::fs::read_link(format!("{DESCRIPTORS}/{}", file.as_raw_fd())).unwrap();
        assert!(link.to_str().unwrap().contains("(deleted)"), "{link:?}");
        assert_eq!(std::fs::create_dir("/new").unwrap_err().raw_os_error(), Some(libc::EROFS));
        assert_eq!(std::env::current_dir().unwrap().to_str(), Some("/"));
        let connected = TcpStream::connect("127.0.0.1:1").unwrap_err();
        assert_eq!(connected.raw_os_error(), Some(libc::ENETUNREACH));
    }

    #[test]
    fn nothing_is_found_but_descriptors_and_no_network() {
        as_root(|| {
            // Of this thread alone.
            unshare(CloneFlags::CLONE_FS).unwrap();
            nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
            find_nothing();
        });
        // All that was this thread's alone.
        assert!(names("/proc").len() > 1 && names("/").len() > 1);
    }

    /// Tells by an event (inotify(7)) when the file system that is mounted there is gone for all.
    fn watch_root(place: &CStr) -> File {
        // SAFETY: the call takes no pointers; the descriptor is nobody else's.
        let watch = unsafe { File::from_raw_fd(libc::inotify_init1(libc::IN_NONBLOCK)) };
        // SAFETY: the path ends with a zero.
        let added = unsafe { libc::inotify_add_watch(watch.as_raw_fd(), place.as_ptr(), libc::IN_DELETE_SELF) };
        assert!(added >= 0, "{}", io::Error::last_os_error());
        watch
    }

    /// As in the test host of the bench: the first mount of all is the root folder, and cannot be changed for another.
    #[test]
    fn a_host_that_runs_from_its_initial_ram_disk_is_hidden() {
        as_root(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            change_mount("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE).unwrap();
            let here = File::open("/proc/thread-self/ns/mnt").unwrap();
            umount2("/", MntFlags::MNT_DETACH).unwrap();
            setns(here, CloneFlags::CLONE_NEWNS).unwrap();
            for folder in ["/proc", "/dev"] {
                create_dir_all(folder).unwrap();
            }
            mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), None::<&str>).unwrap();
            assert_eq!(pivot_root("/proc", "/proc"), Err(Errno::EINVAL), "a root folder as any other");
            create_dir_all("/mnt").unwrap();
            mount(Some("umbra"), "/mnt", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            let mut watch = watch_root(c"/mnt");
            let ((hidden, is_hidden), (end, ends)) = (channel(), channel::<()>());
            let process = std::thread::spawn(move || {
                find_nothing();
                hidden.send(()).unwrap();
                let _ = ends.recv();
            });
            is_hidden.recv().unwrap();
            umount2("/mnt", MntFlags::empty()).unwrap();
            watch.read_exact(&mut [0; size_of::<libc::inotify_event>()]).expect("it is in use");
            drop(end);
            process.join().unwrap();
        });
    }

    #[test]
    fn who_has_no_right_to_it_is_told_what_fails() {
        as_root(|| {
            const NOBODY: libc::uid_t = 65534;
            available().unwrap();
            // SAFETY: the raw call changes the user of this thread alone, which ends with the test.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) }, 0);
            let error = available().unwrap_err();
            assert_eq!(error.to_string(), "make a network namespace (unshare)");
            assert_eq!(error.source, Errno::EPERM);
        });
    }
}
