//! A machine against this host, without starting anything: all that would keep it from running, in one list, each with what mends it
//! (`umbra doctor MACHINE.toml`, `umbra run --check --host`). The start itself stops at the first ([`super::preflight`]).

use serde::Serialize;
use umbra_guest_images::image::Image;

use super::groups::{Groups, Use};
use super::preflight::{Host, PreflightError, check_locked_memory, file_errors};
use crate::base::cgroup::Tree;
use crate::base::error::chain;
use crate::base::pci_address::Bdf;
use crate::config::{Cgroup, Driver, Guest, Machine, MemorySize, Standby};
use crate::host::HostDevice;
use crate::host::doctor::{Finding, Root, device};

/// What was found of a part of the machine.
#[derive(Debug, Serialize)]
pub struct Section {
    /// The part, as `[driver.nic0]`.
    pub of: String,
    /// What was looked at.
    pub findings: Vec<Finding>,
}

/// Looks at all that `machine` needs of `host`, whose other files are below `root`.
pub fn sections(machine: &Machine, host: &Host, root: &Root) -> Vec<Section> {
    let mut groups = Groups::default();
    let mut sections = Vec::new();
    for (name, guest) in &machine.guest {
        let mut findings = files(name, guest);
        findings.extend(guest.net.iter().filter_map(|net| Some(tap(root, net.tap.as_ref()?))));
        for address in &guest.passthrough {
            findings.extend(function(address, (host, root), (&mut groups, Use::Passthrough(name.clone()))));
        }
        if !guest.passthrough.is_empty() {
            findings.extend(locked_memory(name, guest.memory));
        }
        sections.push(Section { of: format!("[guest.{name}]"), findings });
    }
    for (name, driver) in &machine.driver {
        let mut findings = vec![image(driver)];
        let disks = machine.serves_disks(name);
        let spare = driver.spare.iter().map(|spare| (spare, Use::Spare(name.clone())));
        for (address, of) in [(&driver.device, Use::Device(name.clone()))].into_iter().chain(spare) {
            let unserved = |disks| unserved(address, disks, host);
            let mut function = function(address, (host, root), (&mut groups, of));
            // What no driver VM can serve is told by what it is for.
            function.retain(|finding| finding.check != "device" || unserved(false).is_none());
            findings.extend(unserved(disks).into_iter().chain(function));
        }
        findings.extend(locked_memory(name, driver.memory_or_default()));
        sections.push(Section { of: format!("[driver.{name}]"), findings });
    }
    let of_all = [memory(root, machine)].into_iter().chain(control_group(root, machine)).collect();
    sections.push(Section { of: "The machine".into(), findings: of_all });
    sections
}

/// What cannot be read or written of a guest's files.
fn files(name: &str, guest: &Guest) -> Vec<Finding> {
    let missing = file_errors(name, guest).into_iter().map(|error| {
        let remedy = match &error {
            PreflightError::Folder { folder, .. } => format!("`mkdir -p {}`", folder.display()),
            _ => "put it there, or name another one in the machine file".into(),
        };
        Finding::missing("files", chain(&error), remedy)
    });
    let missing: Vec<_> = missing.collect();
    if missing.is_empty() {
        vec![Finding::good("files", "kernel, initial RAM disks and disks can be opened")]
    } else {
        missing
    }
}

fn tap(root: &Root, name: &str) -> Finding {
    let interface = root.join(&format!("sys/class/net/{name}"));
    if interface.join("tun_flags").exists() {
        return Finding::good("TAP", format!("{name} is there"));
    }
    if interface.exists() {
        let what = format!("{name} is an interface of the host, and no TAP");
        return Finding::missing("TAP", what, "name a TAP in the machine file: it is made if it does not exist");
    }
    let make = format!("`ip tuntap add dev {name} mode tap user $USER && ip link set {name} up`");
    if nix::unistd::geteuid().is_root() {
        let what = format!("{name} is not there: it is made when the guest starts, and is in no bridge then");
        return Finding::note("TAP", what).with_remedy(make);
    }
    Finding::missing("TAP", format!("{name} is not there, and only root may make it"), make)
}

fn image(driver: &Driver) -> Finding {
    match Image::open(&driver.image) {
        Ok(image) => Finding::good("image", format!("{}, kernel {}", driver.image.display(), image.manifest.kernel)),
        Err(error) => {
            let remedy = format!("`umbra image --pci {} -o {}`", driver.device, driver.image.display());
            Finding::missing("image", chain(&error), remedy)
        }
    }
}

/// Why no driver VM, of `disks` or not, can serve the function.
fn unserved(address: &str, disks: bool, host: &Host) -> Option<Finding> {
    let why = HostDevice::find_below(&host.pci, address.parse().ok()?).ok()?.unserved_as(disks)?;
    Some(Finding::missing("driver VM", format!("{address} {}", why.why()), "name another device in the machine file"))
}

/// What `umbra doctor` says of the function, and whether its group is another's of this machine.
fn function(address: &str, (host, root): (&Host, &Root), (groups, of): (&mut Groups, Use)) -> Vec<Finding> {
    let found = address.parse::<Bdf>().map_err(|error| error.to_string());
    let found = found.and_then(|bdf| HostDevice::find_below(&host.pci, bdf).map_err(|error| error.to_string()));
    let device = match found {
        Ok(device) => device,
        Err(why) => return vec![Finding::missing("device", why, "`umbra doctor` lists the cards of this host")],
    };
    let mut findings = device::findings(root, &device);
    findings.extend(
        groups.claim(&device, of).err().map(|error| {
            Finding::missing("IOMMU group", chain(&error), "another slot for one of them, or another card")
        }),
    );
    findings
}

fn locked_memory(name: &str, needed: MemorySize) -> Option<Finding> {
    let error: PreflightError = check_locked_memory(name, needed).err()?;
    Some(Finding::missing(
        "locked memory",
        chain(&error),
        "`LimitMEMLOCK=infinity` in the unit, or `ulimit -l unlimited`",
    ))
}

/// Memory that is taken at once and for good: of each VM with a device, and of what waits beside it.
fn memory(root: &Root, machine: &Machine) -> Finding {
    let of_driver = |driver: &Driver| {
        let waiting = match driver.standby {
            _ if driver.spare.is_some() => 1,
            Standby::Warm => driver.standbys,
            Standby::Snapshot | Standby::Cold => 0,
        };
        driver.memory_or_default().0 * (1 + u64::from(waiting))
    };
    let passed = machine.guest.values().filter(|guest| !guest.passthrough.is_empty()).map(|guest| guest.memory.0);
    let pinned: u64 = machine.driver.values().map(of_driver).chain(passed).sum();
    let others = machine.guest.values().filter(|guest| guest.passthrough.is_empty()).map(|guest| guest.memory.0);
    let most: u64 = pinned + others.sum::<u64>();
    let size = |bytes| MemorySize(bytes).to_string();
    let Some(available) = available(root) else {
        return Finding::note("memory", format!("up to {} are needed; the host does not say what is free", size(most)));
    };
    let what = format!("{} for driver VMs and guests with a device, up to {} in all", size(pinned), size(most));
    if pinned > available {
        let remedy = "a smaller `memory`, or `standby = \"snapshot\"`, with which nothing waits in memory";
        return Finding::missing("memory", format!("{what}; {} are available", size(available)), remedy);
    }
    if most > available {
        let what = format!("{what}; {} are available: guests that use all of theirs would run short", size(available));
        return Finding::note("memory", what);
    }
    Finding::good("memory", format!("{what}; {} are available", size(available)))
}

/// Whether the control group that the machine names is there.
fn control_group(root: &Root, machine: &Machine) -> Option<Finding> {
    const CHECK: &str = "control group";
    let Cgroup::In(path) = &machine.cgroup else { return None };
    let Some(tree) = Tree::find(&root.join("")) else {
        let what = "the host has no control groups of version 2: VMs will have no bounds";
        return Some(
            Finding::note(CHECK, what).with_remedy("`mount -t cgroup2 none /sys/fs/cgroup`, or remove `cgroup`"),
        );
    };
    let (dir, controllers) = (tree.group(path), tree.controllers_of(path));
    let make = format!(
        "`mkdir -p {0}`, and before it `echo +memory +pids +cpu > .../cgroup.subtree_control` in each group above it",
        dir.display()
    );
    Some(match &controllers[..] {
        [] => {
            let what = format!("{} is not there, or has no controllers: VMs will have no bounds", path.display());
            Finding::note(CHECK, what).with_remedy(make)
        }
        some => Finding::good(CHECK, format!("{} has {}", path.display(), some.join(", "))),
    })
}

/// Bytes that can be had without swapping, in whole MiB.
fn available(root: &Root) -> Option<u64> {
    let text = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10 << 20)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::host::doctor::Grade;
    use crate::host::sysfs::tests::FakeBus;

    fn machine(text: &str) -> Machine {
        Machine::parse(text, "/m/m.toml".as_ref()).unwrap()
    }

    /// The findings of these grades, as `section: check: what`.
    fn found(sections: &[Section], grade: Grade) -> Vec<String> {
        let of = |section: &Section| {
            let found = section.findings.iter().filter(|finding| finding.grade == grade);
            found.map(|it| format!("{}: {}: {}", section.of, it.check, it.what)).collect::<Vec<_>>()
        };
        sections.iter().flat_map(of).collect()
    }

    #[test]
    fn everything_that_is_missing_is_in_one_list() {
        let bus = FakeBus::new();
        bus.add("0000:01:00.0", Some(1), Some("vfio-pci"));
        bus.add("0000:01:00.1", Some(1), Some("vfio-pci"));
        let host = Host { pci: bus.0.path().into(), ..Host::default() };
        let root = Root::at(bus.0.path().join("root"));
        std::fs::create_dir_all(root.join("proc")).unwrap();
        std::fs::write(root.join("proc/meminfo"), "MemTotal: 9 kB\nMemAvailable:     307200 kB\n").unwrap();
        std::fs::create_dir_all(root.join("sys/class/net/eth0")).unwrap();
        let machine = machine(
            "[guest.web]\nkernel = \"no-kernel\"\ndisk = [{ path = \"no-disk\" }]\n\
             net = [{ tap = \"eth0\" }, { driver = \"nic0\" }, { driver = \"nic1\" }]\n\
             [driver.nic0]\ndevice = \"0000:01:00.0\"\nstandbys = 2\nimage = \"no-image\"\n\
             [driver.nic1]\ndevice = \"0000:01:00.1\"\nspare = \"0000:09:00.0\"\nimage = \"no-image\"\n",
        );
        let sections = sections(&machine, &host, &root);
        let missing = found(&sections, Grade::Missing);
        for words in [
            "[guest.web]: files: web: cannot read the kernel /m/no-kernel: No such file",
            "[guest.web]: files: web: cannot open the disk /m/no-disk: No such file",
            "[guest.web]: TAP: eth0 is an interface of the host, and no TAP",
            "[driver.nic0]: image: there is no driver VM image /m/no-image",
            "[driver.nic1]: IOMMU group: the device 0000:01:00.0 of [driver.nic0] and the device 0000:01:00.1 of [driver.nic1] are both",
            "[driver.nic1]: device: no PCI device 0000:09:00.0",
            "The machine: memory: 640M for driver VMs and guests with a device, up to 1152M in all; 300M are available",
        ] {
            assert_eq!(missing.iter().filter(|what| what.starts_with(words)).count(), 1, "{words}: {missing:#?}");
        }
        assert!(
            sections.iter().flat_map(|it| &it.findings).all(|it| it.grade != Grade::Missing || it.remedy.is_some())
        );
    }

    #[test]
    fn what_no_driver_vm_can_serve_is_said_once() {
        let bus = FakeBus::new();
        let card = bus.add("0000:01:00.0", Some(1), Some("vfio-pci"));
        std::fs::write(card.directory().join("class"), "0x028000").unwrap();
        let host = Host { pci: bus.0.path().into(), ..Host::default() };
        let text = "[guest.web]\nkernel = \"k\"\nnet = [{ driver = \"nic0\" }]\n\
                    [driver.nic0]\ndevice = \"0000:01:00.0\"\nimage = \"i\"\n";
        let sections = sections(&machine(text), &host, &Root::at(bus.0.path().into()));
        let all = sections.iter().flat_map(|section| &section.findings);
        let said: Vec<_> = all.filter(|finding| finding.what.contains("is a Wi-Fi card")).collect();
        assert!(said.len() == 1 && said[0].grade == Grade::Missing, "{said:#?}");
    }

    #[test]
    fn a_device_of_disks_is_looked_at_as_any_other_but_for_what_usb_cannot_do() {
        let bus = FakeBus::new();
        let device = bus.add("0000:01:00.0", Some(1), Some("vfio-pci"));
        let host = Host { pci: bus.0.path().into(), ..Host::default() };
        let text = "[guest.web]\nkernel = \"k\"\ndisk = [{ driver = \"disk0\" }]\n\
                    [driver.disk0]\ndevice = \"0000:01:00.0\"\nimage = \"i\"\n";
        let said = |class: &str| {
            std::fs::write(device.directory().join("class"), class).unwrap();
            let sections = sections(&machine(text), &host, &Root::at(bus.0.path().into()));
            let all = sections.into_iter().flat_map(|section| section.findings);
            let device = all.filter(|finding| ["device", "driver VM"].contains(&finding.check));
            device.map(|finding| (finding.grade, finding.what)).collect::<Vec<_>>()
        };
        assert_eq!(said("0x0c0330"), [], "a USB controller");
        assert!(matches!(&said("0x010802")[..], [(Grade::Good, what)] if what.contains("storage")));
        assert!(matches!(&said("0x060400")[..], [(Grade::Missing, what)] if what.contains("a bridge cannot")));
    }

    #[test]
    fn a_control_group_that_is_named_is_looked_for() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::at(host.path().into());
        let file = |path: &str, text: &str| {
            let path = host.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let named = machine("cgroup = \"/umbra\"\n[guest.web]\nkernel = \"k\"\n");
        let grade = |machine: &Machine| control_group(&root, machine).map(|finding| finding.grade);
        assert_eq!(grade(&machine("[guest.web]\nkernel = \"k\"\n")), None);
        assert_eq!(grade(&named), Some(Grade::Note));
        file("proc/self/cgroup", "0::/\n");
        file("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
        file("sys/fs/cgroup/cgroup.controllers", "memory pids\n");
        assert_eq!(grade(&named), Some(Grade::Note));
        file("sys/fs/cgroup/umbra/cgroup.controllers", "memory pids\n");
        assert_eq!(grade(&named), Some(Grade::Good));
    }

    #[test]
    fn what_is_there_is_good() {
        let bus = FakeBus::new();
        let root = Root::at(bus.0.path().into());
        let file = |path: &str, text: &str| {
            let path = bus.0.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        file("sys/class/net/tap0/tun_flags", "0x1002");
        file("proc/meminfo", "MemAvailable: 4194304 kB\n");
        let kernel = bus.0.path().join("kernel");
        std::fs::write(&kernel, "x").unwrap();
        let text = format!("[guest.web]\nkernel = \"{}\"\nnet = [{{ tap = \"tap0\" }}]\n", kernel.display());
        let sections = sections(&machine(&text), &Host::default(), &root);
        assert_eq!(found(&sections, Grade::Good).len(), 3, "{sections:#?}");
        assert!(found(&sections, Grade::Missing).is_empty() && found(&sections, Grade::Note).is_empty());
    }
}
