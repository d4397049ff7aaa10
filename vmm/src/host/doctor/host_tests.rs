//! What is found on hosts that are made of files in a folder.

use std::fs;

use super::super::Grade;
use super::*;

/// A made-up host.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        tree.file("proc/sys/kernel/osrelease", "6.12.1-test\n")
            .file("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu vmx\n")
    }

    fn file(self, path: &str, text: &str) -> Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn root(&self) -> Root {
        Root::at(self.0.path().into())
    }
}

fn text(finding: &Finding) -> String {
    format!("{} -> {}", finding.what, finding.remedy.as_deref().unwrap_or_default())
}

const ROOT: Caller = Caller {
    root: true,
    locked: 0,
    seccomp: true,
    landlock: Some(6),
    namespaces: Some(Ok(())),
    pid_namespaces: Some(Ok(())),
};

#[test]
fn a_host_with_everything_misses_nothing() {
    let tree = Tree::new()
        .file("dev/kvm", "")
        .file("dev/net/tun", "")
        .file("sys/kernel/iommu_groups/0/x", "")
        .file("sys/class/iommu/dmar0/x", "")
        .file("sys/bus/pci/drivers/vfio-pci/x", "")
        .file("etc/passwd", "umbra-vm:x:987:987::/:/bin/false\n")
        .file("etc/subuid", "umbra-vm:100000:65536\n")
        .file("etc/subgid", "umbra-vm:100000:65536\n")
        .file("proc/self/cgroup", "0::/\n")
        .file("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n")
        .file("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
        .file("sys/fs/cgroup/cgroup.type", "domain\n")
        .file("sys/fs/cgroup/cgroup.procs", "1\n")
        .file("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always [never] deny");
    let findings = findings(&tree.root(), ROOT);
    assert!(findings.iter().all(|finding| finding.grade == Grade::Good), "{findings:#?}");
    assert_eq!(iommu(&tree.root()).what, "on (Intel VT-d, 1 group)");
}

#[test]
fn a_bare_host_is_told_each_command() {
    let tree = Tree::new();
    let nobody =
        Caller { root: false, locked: 8 << 20, landlock: None, namespaces: None, pid_namespaces: None, ..ROOT };
    let findings = findings(&tree.root(), nobody);
    let of = |check: &str| findings.iter().find(|finding| finding.check == check).unwrap();
    assert!(text(of("KVM")).contains("`modprobe kvm_intel`"));
    assert!(text(of("IOMMU")).contains("`intel_iommu=on iommu=pt`"));
    assert!(text(of("vfio-pci")).contains("CONFIG_VFIO_PCI"));
    assert!(text(of("locked memory")).contains("8M may be locked"), "{}", text(of("locked memory")));
    assert_eq!(of("TAP").grade, Grade::Note, "only some guests need it");
    assert_eq!(super::super::missing(&findings), 4, "{findings:#?}");
}

#[test]
fn what_the_kernel_has_to_confine_processes_with_is_said() {
    let found = |seccomp, landlock| confinement(Caller { seccomp, landlock, ..ROOT });
    assert_eq!((found(true, Some(4)).grade, found(true, None).grade), (Grade::Good, Grade::Note));
    let finding = found(false, Some(4));
    assert!(finding.grade == Grade::Missing && text(&finding).contains("`confine = \"off\"`"), "{finding:?}");
}

#[test]
fn whose_the_processes_of_root_s_vms_are_is_said() {
    let nobody = Tree::new();
    assert!(user_of_vms(&nobody.root(), Caller { root: false, ..ROOT }).is_none());
    let said = |tree: &Tree, grade, words: &[&str]| {
        let finding = user_of_vms(&tree.root(), ROOT).unwrap();
        let text = text(&finding);
        assert!(finding.grade == grade && words.iter().all(|word| text.contains(word)), "{finding:?}");
    };
    let usermod = "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 umbra-vm`";
    said(&nobody, Grade::Note, &["stay root's", "`useradd --system ", usermod]);
    let one = nobody.file("etc/passwd", "umbra-vm:x:987:987::/:/bin/false\n");
    said(&one, Grade::Note, &["all as one user: /etc/subuid and /etc/subgid give it no range", usermod]);
    let others = one.file("etc/subuid", "jane:100000:65536\n").file("etc/subgid", "jane:165536:10\n");
    said(&others, Grade::Note, &["usermod --add-subuids 165546-231081 --add-subgids 165546-231081 umbra-vm`"]);
    let uids = others.file("etc/subuid", "umbra-vm:200000:8\numbra-vm:100000:65536\n");
    said(
        &uids,
        Grade::Note,
        &["all as one user: the ranges of umbra-vm", "no number in common: give it the same range"],
    );
    let all = uids.file("etc/subgid", "umbra-vm:0:65536\n");
    said(&all, Grade::Note, &["etc/subgid:1: \"umbra-vm:0:65536\" is no range of users: write umbra-vm:FIRST:COUNT"]);
    said(&all.file("etc/subgid", "umbra-vm:100000:300000\n"), Grade::Good, &["each as another (65544 from 100000 on)"]);
}

#[test]
fn whether_root_s_vms_have_namespaces_is_said() {
    let found = |namespaces| own_namespaces(Caller { namespaces, ..ROOT });
    assert!(found(None).is_none() && found(Some(Ok(()))).unwrap().grade == Grade::Good);
    // A mount namespace cannot be made in a thread that has no rights.
    let refused = std::thread::spawn(|| {
        // SAFETY: the raw call changes the user of this thread alone.
        let _ = unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) };
        namespaces::available()
    });
    let refused = refused.join().unwrap();
    let finding = found(Some(refused)).unwrap();
    assert!(finding.grade == Grade::Note && text(&finding).contains("(unshare): EPERM"), "{finding:?}");
    assert!(text(&finding).contains("CAP_SYS_ADMIN"), "{finding:?}");
    let found = |pid_namespaces| own_pid_namespaces(Caller { pid_namespaces, ..ROOT });
    assert!(found(None).is_none() && found(Some(Ok(()))).unwrap().grade == Grade::Good);
    let finding = found(Some(refused)).unwrap();
    assert!(finding.grade == Grade::Note && text(&finding).contains("see the host's other processes"), "{finding:?}");
}

#[test]
fn whether_vms_have_bounds_is_said() {
    let said = |tree: &Tree, grade, words: &[&str]| {
        let finding = control_group(&tree.root());
        let text = text(&finding);
        assert!(finding.grade == grade && words.iter().all(|word| text.contains(word)), "{finding:?}");
    };
    let tree = Tree::new();
    said(&tree, Grade::Note, &["no control groups of version 2"]);
    let tree = tree
        .file("proc/self/cgroup", "4:memory:/x\n0::/user.slice/session-1.scope\n")
        .file("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n")
        .file("sys/fs/cgroup/cgroup.controllers", "hugetlb pids\n");
    said(&tree, Grade::Note, &["have no controller memory", "`cgroup_no_v1=all`"]);
    let tree = tree.file("sys/fs/cgroup/cgroup.controllers", "memory pids\n");
    said(&tree, Grade::Note, &["which is in /user.slice/session-1.scope", "-p Delegate=yes"]);
}

#[test]
fn kvm_in_software_is_told_from_kvm_in_hardware() {
    let tree = Tree::new().file("dev/kvm", "").file("proc/cpuinfo", "flags : fpu\n").file("sys/module/kvm_pvm/x", "");
    let finding = kvm(&tree.root());
    assert_eq!(finding.grade, Grade::Note);
    assert!(finding.what.contains("KVM in software (kvm_pvm)"), "{}", finding.what);
    let amd = Tree::new().file("dev/kvm", "").file("proc/cpuinfo", "flags : svm\n");
    assert!(kvm(&amd.root()).what.contains("SVM"));
}

#[test]
fn modules_are_found_loaded_built_in_or_on_disk() {
    let dep = "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n";
    let tree = Tree::new().file("lib/modules/6.12.1-test/modules.dep", dep);
    assert!(vfio_pci(&tree.root()).what.contains("`umbra bind` loads it"));
    assert!(matches!(module(&tree.root(), "vfio"), Module::Absent), "a dependency's line is no module's own");
    let built_in = Tree::new().file("lib/modules/6.12.1-test/modules.builtin", "kernel/drivers/net/tun.ko\n");
    assert!(matches!(module(&built_in.root(), "tun"), Module::Loaded));
}

#[test]
fn an_iommu_that_was_asked_for_is_the_firmware_s_to_mend() {
    let tree = Tree::new().file("proc/cmdline", "quiet intel_iommu=on iommu=pt");
    assert!(iommu_remedy(&tree.root()).contains("asks for it already"));
    let amd = Tree::new().file("proc/cpuinfo", "vendor_id : AuthenticAMD\n");
    assert!(iommu_remedy(&amd.root()).contains("add `iommu=pt`"));
}
