//! The host as a whole: KVM, IOMMU, drivers of the kernel, limits, memory.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};

use super::{Finding, Root};
use crate::base::cgroup::Tree;
use crate::base::error::chain;
use crate::base::namespaces;
use crate::base::pid_namespace::PidNamespaces;
use crate::base::vm_users::{OF_VMS, SUBGID, SUBUID, VmUsers, unused_range};
use crate::config::MemorySize;
use crate::host::seccomp::filters_system_calls;

/// Locked memory that a driver VM needs, in bytes: its own by default (128 MiB), and what VFIO locks besides.
const LOCKED: u64 = (128 + 16) << 20;

/// Who asks, and what the kernel allows it.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Root is not bound by limits.
    pub root: bool,
    /// Locked memory, bytes.
    pub locked: u64,
    /// The kernel filters system calls.
    pub seccomp: bool,
    /// Version of Landlock that the kernel has; `None`: it has none, or was started without it.
    pub landlock: Option<u32>,
    /// Root's processes of VMs can have namespaces of their own; `None`: not asked, who asks is not root.
    pub namespaces: Option<Result<(), namespaces::Error>>,
    /// The same of PID namespaces.
    pub pid_namespaces: Option<Result<(), namespaces::Error>>,
}

impl Caller {
    /// This process.
    pub fn this() -> Self {
        let (locked, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((u64::MAX, u64::MAX));
        let root = nix::unistd::geteuid().is_root();
        Self {
            root,
            locked,
            seccomp: filters_system_calls(),
            landlock: landlock(),
            namespaces: root.then(namespaces::available),
            pid_namespaces: root.then(|| PidNamespaces::find().map(drop)),
        }
    }
}

/// The kernel's version of Landlock (landlock_create_ruleset(2)).
fn landlock() -> Option<u32> {
    /// `LANDLOCK_CREATE_RULESET_VERSION`.
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call takes no structure and makes nothing.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, VERSION) };
    u32::try_from(version).ok()
}

/// What the kernel has to confine the processes of VMs with.
fn confinement(caller: Caller) -> Finding {
    if !caller.seccomp {
        return Finding::missing(
            "confinement",
            "the kernel filters no system calls (seccomp), and no machine is started without",
            "a kernel with CONFIG_SECCOMP_FILTER, or `confine = \"off\"` in the machine file",
        );
    }
    match caller.landlock {
        Some(version) => Finding::good(
            "confinement",
            format!(
                "processes of VMs lose their system calls (seccomp) and the file system (Landlock, version {version})"
            ),
        ),
        None => Finding::note(
            "confinement",
            "processes of VMs lose their system calls (seccomp); the kernel has no Landlock, which would take the file \
             system from them a second time",
        )
        .with_remedy("a kernel from 5.13 on with `landlock` in `lsm=`"),
    }
}

/// Whose the processes of VMs are. Who is not root starts them as itself.
fn user_of_vms(root: &Root, caller: Caller) -> Option<Finding> {
    const CHECK: &str = "user of VMs";
    if !caller.root {
        return None;
    }
    let root = root.join("");
    let (first, last) = unused_range(&root);
    let add_range = format!("usermod --add-subuids {first}-{last} --add-subgids {first}-{last} {OF_VMS}");
    let add_range = format!("`touch {SUBUID} {SUBGID} && {add_range}`");
    let Some(users) = VmUsers::find(&root) else {
        let what = format!("processes of VMs that root starts stay root's, without its capabilities: no user {OF_VMS}");
        let add_user = format!("`useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {OF_VMS}`");
        return Some(Finding::note(CHECK, what).with_remedy(format!("{add_user}, then {add_range}")));
    };
    let as_one = format!("processes of VMs that root starts go on as {OF_VMS}, all as one user");
    Some(match users.range() {
        Ok([]) => {
            Finding::note(CHECK, format!("{as_one}: {SUBUID} and {SUBGID} give it no range")).with_remedy(add_range)
        }
        Ok(range) => {
            let count: usize = range.iter().map(ExactSizeIterator::len).sum();
            let from = range.iter().map(|range| range.start).min().unwrap_or_default();
            let what = format!("processes of VMs that root starts go on as users of {OF_VMS}'s range, each as another");
            Finding::good(CHECK, format!("{what} ({count} from {from} on)"))
        }
        Err(error) => Finding::note(CHECK, format!("{as_one}: {}", chain(error))),
    })
}

/// What processes of VMs find of the host by names. Who is not root starts them without namespaces.
fn own_namespaces(caller: Caller) -> Option<Finding> {
    const CHECK: &str = "namespaces";
    caller.namespaces.map(|available| match available {
        Ok(()) => Finding::good(CHECK, "processes of VMs that root starts have an empty root folder and no network"),
        Err(error) => Finding::note(
            CHECK,
            format!("processes of VMs that root starts keep the host's root folder and network: {}", chain(&error)),
        )
        .with_remedy("CAP_SYS_ADMIN, and no filter of unshare(2), setns(2) and mount(2), for who starts the machine"),
    })
}

/// Whether processes of VMs see others.
fn own_pid_namespaces(caller: Caller) -> Option<Finding> {
    const CHECK: &str = "PID namespaces";
    caller.pid_namespaces.map(|available| match available {
        Ok(()) => Finding::good(CHECK, "processes of VMs that root starts see no other process"),
        Err(error) => {
            let what = format!("processes of VMs that root starts see the host's other processes: {}", chain(&error));
            Finding::note(CHECK, what)
                .with_remedy("CAP_SYS_ADMIN, and no filter of unshare(2) and setns(2), for who starts the machine")
        }
    })
}

/// Whether VMs that are started from here, in whatever group this process is, have bounds of memory and processor time.
fn control_group(root: &Root) -> Finding {
    const CHECK: &str = "control group";
    let note = |why: &str, remedy: &str| {
        let what = format!("VMs that are started here have no bounds of memory and processor time: {why}");
        Finding::note(CHECK, what).with_remedy(remedy)
    };
    let Some(tree) = Tree::find(&root.join("")) else {
        return note(
            "no control groups of version 2",
            "`mount -t cgroup2 none /sys/fs/cgroup`, or a host with systemd",
        );
    };
    let has = tree.controllers_of("/".as_ref());
    let lacks: Vec<_> = ["memory", "pids"].into_iter().filter(|name| !has.iter().any(|has| has == name)).collect();
    if !lacks.is_empty() {
        let why = format!("control groups of version 2 have no controller {}", lacks.join(", "));
        return note(&why, "`cgroup_no_v1=all` on the kernel's command line, and no `cgroup_disable=memory`");
    }
    match tree.delegated() {
        Ok(group) => Finding::good(CHECK, format!("VMs that are started here have bounds, below {}", group.display())),
        Err(error) => note(
            &chain(&error),
            "start the machine as a service (`systemctl start umbra@NAME`), or by `systemd-run --scope -p Delegate=yes umbra run ...` \
             (without root: `--user --scope`)",
        ),
    }
}

/// Looks at the host.
pub fn findings(root: &Root, caller: Caller) -> Vec<Finding> {
    let mut findings = vec![
        kernel(root),
        kvm(root),
        iommu(root),
        vfio_pci(root),
        tun(root),
        locked_memory(caller),
        huge_pages(root),
        confinement(caller),
        control_group(root),
    ];
    findings.extend(user_of_vms(root, caller));
    findings.extend(own_namespaces(caller));
    findings.extend(own_pid_namespaces(caller));
    findings
}

fn kernel(root: &Root) -> Finding {
    let release = release(root);
    match version(&release) {
        Some(version) if version < (5, 15) => Finding::note(
            "kernel",
            format!(
                "{release}; before 5.15 the kernel does not say by which method it resets a device, before 6.1 it \
                     does not back memory by huge pages on demand"
            ),
        ),
        _ => Finding::good("kernel", release),
    }
}

/// The running kernel's release.
fn release(root: &Root) -> String {
    root.read("proc/sys/kernel/osrelease").map_or_else(|| "of unknown release".into(), |text| text.trim().into())
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// What the processor has for virtual machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Processor {
    Intel,
    Amd,
    /// Neither VT-x nor SVM is shown.
    Without,
}

fn processor(root: &Root) -> Processor {
    let info = root.read("proc/cpuinfo").unwrap_or_default();
    let mut words = info.lines().filter(|line| line.starts_with("flags")).flat_map(str::split_whitespace);
    match words.find(|word| ["vmx", "svm"].contains(word)) {
        Some("vmx") => Processor::Intel,
        Some(_) => Processor::Amd,
        None => Processor::Without,
    }
}

fn kvm(root: &Root) -> Finding {
    let path = root.join("dev/kvm");
    let processor = processor(root);
    match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(_) => match processor {
            Processor::Intel => Finding::good("KVM", "/dev/kvm opens; the processor has VT-x"),
            Processor::Amd => Finding::good("KVM", "/dev/kvm opens; the processor has SVM"),
            Processor::Without => Finding::note(
                "KVM",
                format!(
                    "/dev/kvm opens, but the processor shows neither VT-x nor SVM: this is KVM in software{}. VMs work \
                     and are slow, a stock kernel takes minutes to boot",
                    software_kvm(root)
                ),
            )
            .with_remedy(
                "on hardware: switch virtualisation on in the firmware; in a VM: nested virtualisation in its host",
            ),
        },
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Finding::missing(
            "KVM",
            "/dev/kvm is there, and this user may not open it",
            "`sudo usermod -aG kvm $USER` and log in again, or run as root",
        ),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let remedy = match processor {
                Processor::Intel => "`modprobe kvm_intel`",
                Processor::Amd => "`modprobe kvm_amd`",
                Processor::Without => {
                    "switch virtualisation (VT-x, SVM) on in the firmware, or in a VM nested virtualisation in its host; \
                     then `modprobe kvm_intel` or `modprobe kvm_amd`"
                }
            };
            Finding::missing("KVM", "/dev/kvm is not there", remedy)
        }
        Err(error) => {
            Finding::missing("KVM", format!("/dev/kvm does not open: {error}"), "`dmesg | grep -i kvm` says why")
        }
    }
}

/// The module behind a KVM without hardware, in brackets.
fn software_kvm(root: &Root) -> String {
    let modules = std::fs::read_dir(root.join("sys/module")).into_iter().flatten().flatten();
    let mut names = modules.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.find(|name| name.starts_with("kvm_")).map(|name| format!(" ({name})")).unwrap_or_default()
}

fn iommu(root: &Root) -> Finding {
    let count = |path| std::fs::read_dir(root.join(path)).map_or(0, Iterator::count);
    let groups = count("sys/kernel/iommu_groups");
    if groups > 0 {
        let kind = std::fs::read_dir(root.join("sys/class/iommu")).ok().and_then(|mut entries| entries.next()?.ok());
        let kind = kind.map(|entry| entry.file_name().to_string_lossy().into_owned()).unwrap_or_default();
        let kind = if kind.starts_with("dmar") {
            "Intel VT-d, "
        } else if kind.starts_with("ivhd") {
            "AMD-Vi, "
        } else {
            ""
        };
        let many = if groups == 1 { "1 group".into() } else { format!("{groups} groups") };
        return Finding::good("IOMMU", format!("on ({kind}{many})"));
    }
    let what = "off or not there: no device can be given to a VM, its DMA could not be confined";
    Finding::missing("IOMMU", what, iommu_remedy(root))
}

/// How an IOMMU is switched on here.
pub(crate) fn iommu_remedy(root: &Root) -> String {
    let cpu = root.read("proc/cpuinfo").unwrap_or_default();
    let words = if cpu.contains("AuthenticAMD") { "iommu=pt" } else { "intel_iommu=on iommu=pt" };
    let line = root.read("proc/cmdline").unwrap_or_default();
    let given = words.split(' ').all(|word| line.split_whitespace().any(|have| have == word));
    if given {
        return "the kernel's command line asks for it already: switch VT-d or AMD-Vi on in the firmware's setup (in a VM: \
                give it a virtual IOMMU)"
            .into();
    }
    let with_grub = "`GRUB_CMDLINE_LINUX` in /etc/default/grub, then `update-grub`";
    format!(
        "switch VT-d or AMD-Vi on in the firmware's setup and add `{words}` to the kernel's command line ({with_grub}); reboot"
    )
}

/// Whether a module is there.
enum Module {
    Loaded,
    Loadable,
    Absent,
    /// There is no list of this kernel's modules.
    Unknown,
}

fn module(root: &Root, name: &str) -> Module {
    if root.has(&format!("sys/module/{}", name.replace('-', "_"))) {
        return Module::Loaded;
    }
    let dir = format!("lib/modules/{}", release(root));
    let lists = [root.read(&format!("{dir}/modules.builtin")), root.read(&format!("{dir}/modules.dep"))];
    let is = |line: &str| {
        let path = line.split(':').next().unwrap_or(line);
        let file = Path::new(path).file_name().map(|file| file.to_string_lossy().into_owned()).unwrap_or_default();
        file.split('.').next().unwrap_or_default().replace('-', "_") == name.replace('-', "_")
    };
    match &lists {
        [None, None] => Module::Unknown,
        [Some(builtin), _] if builtin.lines().any(is) => Module::Loaded,
        [_, Some(loadable)] if loadable.lines().any(is) => Module::Loadable,
        _ => Module::Absent,
    }
}

fn vfio_pci(root: &Root) -> Finding {
    if root.has("sys/bus/pci/drivers/vfio-pci") {
        return Finding::good("vfio-pci", "the driver is there");
    }
    match module(root, "vfio-pci") {
        Module::Loaded => Finding::good("vfio-pci", "the driver is there"),
        Module::Loadable => Finding::good("vfio-pci", "the module is there; `umbra bind` loads it"),
        Module::Absent => Finding::missing(
            "vfio-pci",
            "this kernel has no vfio-pci, which hands devices to VMs",
            "boot a kernel with CONFIG_VFIO_PCI (Debian: `apt install linux-image-amd64`)",
        ),
        Module::Unknown => Finding::missing(
            "vfio-pci",
            format!("the driver is not there, and /lib/modules/{} is missing", release(root)),
            "boot a kernel with CONFIG_VFIO_PCI and its modules installed (Debian: `apt install linux-image-amd64`)",
        ),
    }
}

fn tun(root: &Root) -> Finding {
    match (root.has("dev/net/tun"), module(root, "tun")) {
        (true, _) => Finding::good("TAP", "/dev/net/tun is there: guests can have interfaces on the host"),
        (false, Module::Absent | Module::Unknown) => Finding::note(
            "TAP",
            "no /dev/net/tun and no module `tun`: guests cannot have interfaces on the host (`tap = ...`); NICs in driver \
             VMs do not need it",
        ),
        (false, _) => Finding::note("TAP", "no /dev/net/tun: needed only for guests with `tap = ...`")
            .with_remedy("`modprobe tun`"),
    }
}

fn locked_memory(caller: Caller) -> Finding {
    let check = "locked memory";
    if caller.root {
        return Finding::good(check, "not limited (root)");
    }
    match caller.locked {
        u64::MAX => Finding::good(check, "not limited"),
        limit if limit >= LOCKED => Finding::good(
            check,
            format!("{} may be locked; each driver VM needs its memory and 16M", MemorySize(limit)),
        ),
        limit => Finding::missing(
            check,
            format!(
                "{} may be locked; a VM with a device locks all of its memory, a driver VM {}",
                MemorySize(limit),
                MemorySize(LOCKED)
            ),
            "run as root; or `LimitMEMLOCK=infinity` in the systemd unit; or `* - memlock unlimited` in \
             /etc/security/limits.conf and log in again",
        ),
    }
}

fn huge_pages(root: &Root) -> Finding {
    let check = "huge pages";
    match root.read("sys/kernel/mm/transparent_hugepage/shmem_enabled") {
        None => {
            Finding::note(check, "this kernel has no transparent huge pages: VMs run somewhat slower, nothing is lost")
        }
        Some(text) if text.contains("[deny]") => {
            Finding::note(check, "denied for shared memory: VMs run somewhat slower, nothing is lost").with_remedy(
                "`echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled` (VMs then get them on demand)",
            )
        }
        Some(_) => Finding::good(check, "transparent ones on demand; none need to be reserved"),
    }
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
