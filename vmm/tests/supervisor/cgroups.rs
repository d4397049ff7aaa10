//! Control groups of the processes of a machine, in the tree of this host.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Instant;

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::base::cgroup::Tree;
use umbra_vmm::lifecycle::StateName;
use umbra_vmm::record::status::CgroupStatus;

use crate::cases::{Case, cases};
use crate::machine::{PATIENCE, TestMachine, make, run_elsewhere};

/// All of them.
pub const ALL: &[Case] = cases![
    each_process_has_a_control_group_that_goes_with_it,
    control_groups_of_a_killed_supervisor_go_at_the_next_start,
    a_control_group_that_is_named_and_not_there_holds_nobody_up,
];

/// A group of the test's own.
struct Ground {
    dir: PathBuf,
    path: String,
}

impl Ground {
    /// Has `machine` make its groups in a new one. `None`: this host has no tree that can be written to.
    fn new(machine: &TestMachine, name: &str) -> Option<Self> {
        let tree = Tree::find("/".as_ref())?;
        let path = format!("/umbra-test-{name}-{}", std::process::id());
        let (top, dir) = (tree.group("/".as_ref()), tree.group(path.as_ref()));
        if let Err(error) = fs::create_dir(&dir) {
            eprintln!("skipped: no control group of version 2 can be made: {error}");
            return None;
        }
        let root = machine.dir.path();
        symlink(top, root.join("tree")).unwrap();
        fs::create_dir_all(root.join("proc/self")).unwrap();
        fs::write(root.join("proc/self/cgroup"), "0::/\n").unwrap();
        fs::write(root.join("proc/self/mountinfo"), "30 23 0:26 / /tree rw - cgroup2 cgroup2 rw\n").unwrap();
        name_group(machine, &path);
        Some(Self { dir, path })
    }

    /// The groups of the machine that have processes, and those that have none.
    fn groups(&self) -> (BTreeSet<String>, BTreeSet<String>) {
        let entries = fs::read_dir(self.dir.join("m")).into_iter().flatten().flatten();
        let dirs = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        let of = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
        dirs.map(of).partition(|name| has_processes(&self.dir.join("m").join(name)))
    }

    /// Waits until the groups of the machine are these.
    fn wait_for(&self, wanted: &[&str]) {
        let wanted: BTreeSet<_> = wanted.iter().map(|&name| name.to_owned()).collect();
        let until = Instant::now() + PATIENCE;
        while self.groups() != (wanted.clone(), BTreeSet::new()) {
            assert!(Instant::now() < until, "{:?} and not {wanted:?}", self.groups());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let (with, without) = self.groups();
        for name in with.union(&without) {
            let _ = fs::remove_dir(self.dir.join("m").join(name));
        }
        let _ = fs::remove_dir(self.dir.join("m"));
        let _ = fs::remove_dir(&self.dir);
    }
}

fn has_processes(group: &Path) -> bool {
    fs::read_to_string(group.join("cgroup.procs")).is_ok_and(|text| !text.is_empty())
}

/// Names the group in the file of `machine`.
fn name_group(machine: &TestMachine, path: &str) {
    let file = machine.dir.path().join("m.toml");
    let text = format!("cgroup = \"{path}\"\n{}", fs::read_to_string(&file).unwrap());
    fs::write(file, text).unwrap();
}

/// Waits until `generation` serves and another one waits; the groups of the guest and of these two, as the machine and the kernel have it.
fn groups(machine: &TestMachine, ground: &Ground, generation: u32) -> [String; 3] {
    let driver = machine.wait_live_with_standby(generation);
    let guest = machine.wait_for_guest("web", "its process", |guest| guest.pid.is_some());
    let standby = driver.standby.unwrap();
    let of = |pid: Option<u32>, group: Option<CgroupStatus>| {
        let group = group.expect("a group").path;
        let text = fs::read_to_string(format!("/proc/{}/cgroup", pid.unwrap())).unwrap();
        assert!(text.lines().any(|line| line == format!("0::{group}")), "{group}: {text}");
        group.strip_prefix(&format!("{}/m/", ground.path)).unwrap().to_owned()
    };
    [of(guest.pid, guest.cgroup), of(driver.pid, driver.cgroup), of(standby.pid, standby.cgroup)]
}

fn each_process_has_a_control_group_that_goes_with_it() {
    let mut machine = make("", "", "");
    let Some(ground) = Ground::new(&machine, "each") else { return };
    machine.start_again();
    assert_eq!(groups(&machine, &ground, 1), ["vm-web", "vm-nic0.1", "vm-nic0.2"]);
    machine.crash(CrashKind::Panic);
    assert_eq!(groups(&machine, &ground, 2), ["vm-web", "vm-nic0.2", "vm-nic0.3"]);
    ground.wait_for(&["vm-web", "vm-nic0.2", "vm-nic0.3"]);
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    assert!(!own.contains("umbra-test"), "the supervisor stays where it is: {own}");
    machine.stop();
    assert!(!ground.dir.join("m").exists(), "{:?}", ground.groups());
}

fn control_groups_of_a_killed_supervisor_go_at_the_next_start() {
    let machine = make("", "", "");
    let Some(ground) = Ground::new(&machine, "killed") else { return };
    let mut machine = run_elsewhere(machine);
    groups(&machine, &ground, 1);
    machine.crash(CrashKind::Panic);
    groups(&machine, &ground, 2);
    machine.kill_supervisor();
    machine.start_again();
    assert_eq!(groups(&machine, &ground, 1), ["vm-web", "vm-nic0.1", "vm-nic0.2"]);
    ground.wait_for(&["vm-web", "vm-nic0.1", "vm-nic0.2"]);
    machine.stop();
    assert!(!ground.dir.join("m").exists(), "{:?}", ground.groups());
}

fn a_control_group_that_is_named_and_not_there_holds_nobody_up() {
    let mut machine = make("", "", "");
    name_group(&machine, "/umbra-no-such-group");
    machine.start_again();
    let driver = machine.wait_for("its first life", |driver| driver.state == StateName::Live);
    let guest = machine.wait_for_guest("web", "its process", |guest| guest.pid.is_some());
    assert_eq!((driver.cgroup, guest.cgroup), (None, None));
    machine.stop();
}
