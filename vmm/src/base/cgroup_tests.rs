//! Texts of the kernel, and groups that are made in the tree of this host.

use std::process::{Child, Command};

use super::*;
use crate::base::testing::as_root;

const BOUNDS: Bounds = Bounds { memory: 64 << 20, swap: 0, threads: 10, cpu_percent: None };

#[test]
fn the_group_of_a_process_is_read_from_its_file() {
    let group = |text: &str| group_of(text);
    assert_eq!(group("0::/system.slice/umbra@web.service\n"), Some("system.slice/umbra@web.service".into()));
    assert_eq!(group("12:memory:/a\n1:name=systemd:/b\n0::/c\n"), Some("c".into()), "beside version 1");
    assert_eq!(group("0::/\n"), Some("".into()));
    for none in ["", "3:cpu:/a\n", "0::/../other\n", "0::/..\n", "0::/a (deleted)\n"] {
        assert_eq!(group(none), None, "{none:?}");
    }
}

#[test]
fn the_tree_is_where_it_is_mounted_with_this_process_in_it() {
    let v1 = "31 30 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n";
    let unified = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    let found = |mounts: &str, own: &str| mounted(mounts, own.as_ref());
    assert_eq!(found(&format!("{v1}{unified}"), "a/b"), Some(("/sys/fs/cgroup/unified".into(), "a/b".into())));
    assert_eq!(found(v1, "a"), None);
    // A container that has a part of its host's tree, and no namespace.
    let part = "41 31 0:38 /pod/one /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
    assert_eq!(found(part, "pod/one/x"), Some(("/sys/fs/cgroup".into(), "x".into())));
    assert_eq!(found(part, "pod/two"), None, "outside of what is mounted");
    assert_eq!(found("41 31 0:38 /../.. /sys/fs/cgroup rw - cgroup2 cgroup rw\n", ""), None);
    for nonsense in ["", " - cgroup2", "1 2 3 / - cgroup2 x y\n", "1 2 3 x /y rw - cgroup2 x y\n"] {
        assert_eq!(found(nonsense, ""), None, "{nonsense:?}");
    }
}

#[test]
fn events_are_counted_by_their_whole_key() {
    let events = "low 0\nhigh 0\nmax 97\noom 1\noom_kill 3\noom_group_kill 1\n";
    assert_eq!([count(events, "oom"), count(events, "oom_kill"), count(events, "m"), count("", "oom")], [1, 3, 0, 0]);
}

#[test]
fn an_attribute_is_read() {
    let file = tempfile::tempdir().unwrap();
    assert_eq!(attribute(file.path(), "user.delegate"), None);
    assert!(!is_delegated(file.path()));
    let path = CString::new(file.path().as_os_str().as_bytes()).unwrap();
    let set = |name: &CString, text: &str| {
        // SAFETY: both strings end with a zero byte; the value is read for as long as it is.
        unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), text.as_ptr().cast(), text.len(), 0) == 0 }
    };
    let name = CString::new("user.delegate").unwrap();
    if !set(&name, "1") {
        eprintln!("skipped: the file system of temporary files has no attributes");
        return;
    }
    assert!(is_delegated(file.path()));
    assert!(set(&name, "0") && !is_delegated(file.path()));
}

/// A group of the test's own in the tree of this host, which is taken away with all that is in it.
struct Ground {
    tree: Tree,
    path: PathBuf,
}

impl Ground {
    /// `None`: there is no tree that can be written to.
    fn new(name: &str) -> Option<Self> {
        let tree = Tree::find("/".as_ref())?;
        let path = PathBuf::from(format!("/umbra-test-{name}-{}", std::process::id()));
        if let Err(error) = fs::create_dir(tree.group(&path)) {
            eprintln!("skipped: no control group of version 2 can be made: {error}");
            return None;
        }
        Some(Self { tree, path })
    }

    fn open(&self) -> Result<Cgroups, Error> {
        Cgroups::open(self.tree.clone(), Place::In(&self.path, "m"))
    }

    /// The groups of the machine.
    fn groups(&self) -> Vec<String> {
        let entries = fs::read_dir(self.tree.group(&self.path).join("m")).into_iter().flatten().flatten();
        let dirs = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        let mut names: Vec<_> = dirs.map(|dir| dir.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let dir = self.tree.group(&self.path);
        for group in self.groups() {
            let _ = fs::remove_dir(dir.join("m").join(group));
        }
        let _ = fs::remove_dir(dir.join("m"));
        let removed = fs::remove_dir(&dir);
        assert!(removed.is_ok() || std::thread::panicking(), "{}: {removed:?}", dir.display());
    }
}

/// A process that sleeps in `group`.
fn sleeper(group: &Group, mut entrance: File) -> Child {
    let child = Command::new("sleep").arg("600").spawn().unwrap();
    entrance.write_all(child.id().to_string().as_bytes()).unwrap();
    assert!(group.has(child.id()));
    child
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn groups_come_and_go_with_their_processes() {
    as_root(|| {
        let Some(ground) = Ground::new("lives") else { return };
        let groups = ground.open().unwrap();
        assert_eq!(groups.path(), ground.path.join("m"));
        let (web, entrance) = groups.make("web", &BOUNDS).unwrap();
        assert_eq!(web.path(), ground.path.join("m/vm-web"));
        assert!(!web.has(std::process::id()), "who makes it is not in it");
        assert!(web.has(u32::MAX), "of one that has gone nothing is known");
        let child = sleeper(&web, entrance);
        let (next, _) = groups.make("web", &BOUNDS).unwrap();
        assert_eq!(ground.groups(), ["vm-web", "vm-web-2"]);
        drop(next);
        // Its process is still there: it goes when that has gone.
        drop(web);
        assert_eq!(ground.groups(), ["vm-web"]);
        end(child);
        let (db, _) = groups.make("db", &BOUNDS).unwrap();
        assert_eq!(ground.groups(), ["vm-db"]);
        // The last who holds a group leaves everything as it was.
        drop(groups);
        assert_eq!(ground.groups(), ["vm-db"]);
        drop(db);
        assert!(!ground.tree.group(&ground.path).join("m").exists());
    });
}

#[test]
fn what_a_killed_process_left_is_removed_by_the_next_but_what_lives() {
    as_root(|| {
        let Some(ground) = Ground::new("stale") else { return };
        let groups = ground.open().unwrap();
        let (old, entrance) = groups.make("old", &BOUNDS).unwrap();
        let child = sleeper(&old, entrance);
        let (gone, _) = groups.make("gone", &BOUNDS).unwrap();
        let other = ground.tree.group(&ground.path).join("m/other");
        fs::create_dir(&other).unwrap();
        // As if this process had been killed here.
        std::mem::forget((old, gone));
        std::mem::forget(groups);
        let again = ground.open().unwrap();
        assert_eq!(ground.groups(), ["other", "vm-old"]);
        end(child);
        drop(again);
        let last = ground.open().unwrap();
        assert_eq!(ground.groups(), ["other"], "somebody else's");
        drop(last);
    });
}

#[test]
fn a_group_that_is_not_there_is_named() {
    as_root(|| {
        let Some(tree) = Tree::find("/".as_ref()) else { return };
        let error = Cgroups::open(tree, Place::In("/umbra-no-such-group".as_ref(), "m")).unwrap_err();
        assert!(chain(&error).contains("umbra-no-such-group/cgroup.controllers: No such file"), "{}", chain(&error));
    });
}

/// The group that the process of the next test is to be a service in.
const SERVICE: &str = "UMBRA_TEST_SERVICE";

#[test]
fn where_a_group_is_delegated_this_process_goes_into_a_leaf_and_back() {
    if let Some(service) = std::env::var_os(SERVICE) {
        return in_a_service(service.as_ref());
    }
    as_root(|| {
        let Some(ground) = Ground::new("delegated") else { return };
        let name = "base::cgroup::tests::where_a_group_is_delegated_this_process_goes_into_a_leaf_and_back";
        let mut this = Command::new(std::env::current_exe().unwrap());
        let run = this.args(["--exact", name]).env(SERVICE, ground.tree.group(&ground.path)).output().unwrap();
        let said = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success() && said.contains("1 passed"), "{said}");
    });
}

fn in_a_service(service: &Path) {
    let find = || Tree::find("/".as_ref()).unwrap();
    write(service, PROCESSES, SELF).unwrap();
    let error = Cgroups::open(find(), Place::Delegated).unwrap_err();
    assert!(matches!(error, Error::NotDelegated(_)), "{error}");
    let path = CString::new(service.as_os_str().as_bytes()).unwrap();
    let name = CString::new("user.delegate").unwrap();
    // SAFETY: both strings end with a zero byte; the value is read for as long as it is.
    assert_eq!(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), b"1".as_ptr().cast(), 1, 0) }, 0);
    let own = || group_of(&fs::read_to_string("/proc/self/cgroup").unwrap()).unwrap();
    for _ in 0..2 {
        let groups = Cgroups::open(find(), Place::Delegated).unwrap();
        assert!(own().ends_with(LEAF) && service.ends_with(groups.path().strip_prefix("/").unwrap()));
        // Another one in the leaf, as a run that follows on a crash, or where systemd puts the process into the leaf.
        let second = Cgroups::open(find(), Place::Delegated).unwrap();
        assert_eq!(second.path(), groups.path());
        let (group, _) = second.make("web", &BOUNDS).unwrap();
        drop(second);
        assert!(group.dir.exists() && own().ends_with(LEAF));
        drop(group);
        drop(groups);
        assert!(!own().ends_with(LEAF) && !service.join(LEAF).exists());
    }
    // With that of another machine nothing of it is taken away.
    let groups = Cgroups::open(find(), Place::Delegated).unwrap();
    let (handed_down, other) = (service.join(HANDED_DOWN), service.join("vm-other"));
    let before = fs::read_to_string(&handed_down).unwrap();
    fs::create_dir(&other).unwrap();
    drop(groups);
    assert!(own().ends_with(LEAF) && fs::read_to_string(&handed_down).unwrap() == before);
    fs::remove_dir(&other).unwrap();
    for controller in before.split_whitespace() {
        write(service, HANDED_DOWN, &format!("-{controller}")).unwrap();
    }
    write(service, PROCESSES, SELF).unwrap();
    fs::remove_dir(service.join(LEAF)).unwrap();
}
