//! One PCI function: whether a driver VM can have it, and what a crash of its driver means for it.

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use super::{Finding, Root, host, list, storage};
use crate::base::pci_address::Bdf;
use crate::host::files::VFIO;
use crate::host::reset::ResetMethod;
use crate::host::sysfs::HostDevice;

/// Looks at `device`.
pub fn findings(root: &Root, device: &HostDevice) -> Vec<Finding> {
    let mut findings = vec![identity(root, device), group(root, device), binding(root, device)];
    findings.extend(in_use(device));
    findings.extend(disks_in_use(root, device));
    findings.push(reset(device));
    findings
}

fn identity(root: &Root, device: &HostDevice) -> Finding {
    let check = "device";
    let class = device.class().unwrap_or_default();
    let what = format!("{} {}", list::kind(class), list::name(root, device));
    /// Class of PCI bridges, subclass 04.
    const PCI_BRIDGE: u32 = 0x06_04;
    if class >> 8 == PCI_BRIDGE {
        return Finding::missing(
            check,
            format!("{what}: a bridge cannot be given to a VM"),
            "name the device behind it",
        );
    }
    if let Some(unserved) = device.unserved() {
        let what = format!("{what}: it {}", unserved.why());
        // A guest's driver may have it.
        let remedy = format!("`umbra bind --passthrough {}`, if it is for a guest", device.bdf());
        if unserved.may_be_passed_through() {
            return Finding::note(check, what).with_remedy(remedy);
        }
        return Finding::missing(check, what, "`iommu_platform=on` of the device, in the host of this VM");
    }
    match list::kind(class) {
        kind if list::is_shadowed(kind) => Finding::good(check, what),
        _ => Finding::note(
            check,
            format!(
                "{what}: Umbra shadows network cards, sound cards and storage controllers; this one can be given to a guest \
                 (`passthrough`), whose own driver's crash is then its own"
            ),
        ),
    }
}

fn group(root: &Root, device: &HostDevice) -> Finding {
    let check = "IOMMU group";
    let Some(group) = device.group() else {
        return Finding::missing(check, "none: its DMA could not be confined to a VM", host::iommu_remedy(root));
    };
    let others: Vec<Bdf> =
        device.group_members().unwrap_or_default().into_iter().filter(|bdf| *bdf != device.bdf()).collect();
    if others.is_empty() {
        return Finding::good(check, format!("{group}, of its own"));
    }
    let blockers = device.group_obstacles().unwrap_or_default();
    let names: Vec<_> = others.iter().map(ToString::to_string).collect();
    if blockers.is_empty() {
        let what = format!(
            "{group}, shared with {}: one VM alone can have the group; no driver of the host is in the way",
            names.join(", ")
        );
        return Finding::good(check, what);
    }
    let in_the_way: Vec<_> = blockers.iter().map(|(bdf, driver)| format!("{bdf} ({driver})")).collect();
    Finding::missing(
        check,
        format!("{group}: a group passes through as a whole, and the host uses {} of it", in_the_way.join(", ")),
        format!("{}, or put the card into another slot", bind_all(device)),
    )
}

/// The command that takes the card, and what is in the way of its group's passing through.
fn bind_all(device: &HostDevice) -> String {
    let others = device.group_obstacles().unwrap_or_default();
    let all: Vec<_> = [device.bdf()].into_iter().chain(others.into_iter().map(|(bdf, _)| bdf)).collect();
    format!("`umbra bind {}`", all.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
}

fn binding(root: &Root, device: &HostDevice) -> Finding {
    let check = "binding";
    let remedy = bind_all(device);
    match device.driver() {
        Some(driver) if device.is_bound_to_vfio() => match not_ours(root, device) {
            Some(file) => Finding::missing(
                check,
                format!("held by {driver}, and {file} is not this user's"),
                format!("`sudo umbra bind --for $USER {}`, or run as root", device.bdf()),
            ),
            None => Finding::good(check, format!("held by {driver}, ready for a VM")),
        },
        Some(driver) => Finding::missing(check, format!("held by the host's driver {driver}"), remedy),
        None => Finding::missing(check, "no driver holds it", remedy),
    }
}

/// The file of its group, if this user may not open it.
fn not_ours(root: &Root, device: &HostDevice) -> Option<String> {
    let file = format!("{VFIO}/{}", device.group()?);
    let wanted = AccessFlags::R_OK | AccessFlags::W_OK;
    (access(&root.join(file.trim_start_matches('/')), wanted) == Err(Errno::EACCES)).then_some(file)
}

/// What the host would lose.
fn in_use(device: &HostDevice) -> Option<Finding> {
    let interface = list::interface_up(device)?;
    let what = format!("the host uses its interface {interface}, and loses it when a driver VM takes the card");
    Some(Finding::note("in use", what).with_remedy(format!("`ip link set {interface} down` once it can be spared")))
}

/// What the host would lose for good: `umbra bind` refuses to take it.
fn disks_in_use(root: &Root, device: &HostDevice) -> Option<Finding> {
    let uses = storage::in_use(root, device);
    let what = format!("the host uses disks of it: {}", uses.join(", "));
    let remedy = "unmount them (`umount`, `swapoff`), or leave this controller to the host";
    (!uses.is_empty()).then(|| Finding::missing("in use", what, remedy))
}

/// What becomes of the device between two lives of its driver.
fn reset(device: &HostDevice) -> Finding {
    let check = "reset";
    let reset = device.reset();
    let words: Vec<_> = reset.methods().iter().map(|method| method.word()).collect();
    let what = match words.as_slice() {
        [] => reset.describe(),
        words => format!("{}: {}", words.join(", then "), reset.describe()),
    };
    match reset.best() {
        None | Some(ResetMethod::Pm) => Finding::note(check, what),
        Some(_) => Finding::good(check, what),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;
    use crate::host::sysfs::tests::FakeBus;

    fn of<'a>(findings: &'a [Finding], check: &str) -> &'a Finding {
        findings.iter().find(|finding| finding.check == check).unwrap()
    }

    #[test]
    fn a_bound_card_of_its_own_group_is_ready() {
        let bus = FakeBus::new();
        let nic = bus.add("0000:01:00.0", Some(3), Some("vfio-pci"));
        std::fs::write(nic.directory().join("reset_method"), "pm flr").unwrap();
        let findings = findings(&Root::default(), &nic);
        assert!(findings.iter().all(|finding| finding.grade == Grade::Good), "{findings:#?}");
        assert!(of(&findings, "reset").what.starts_with("flr, then pm: function-level reset"));
    }

    #[test]
    fn a_card_in_the_host_s_hands_is_told_what_frees_it() {
        let bus = FakeBus::new();
        let nic = bus.add("0000:01:00.0", Some(3), Some("e1000e"));
        bus.add("0000:01:00.1", Some(3), Some("snd_hda_intel"));
        let net = nic.directory().join("net/eth0");
        std::fs::create_dir_all(&net).unwrap();
        std::fs::write(net.join("flags"), "0x1003").unwrap();
        let findings = findings(&Root::default(), &nic);
        assert_eq!(super::super::missing(&findings), 2, "{findings:#?}");
        assert_eq!(of(&findings, "binding").remedy.as_deref(), Some("`umbra bind 0000:01:00.0 0000:01:00.1`"));
        assert!(of(&findings, "IOMMU group").what.contains("0000:01:00.1 (snd_hda_intel)"));
        assert!(of(&findings, "in use").what.contains("eth0"));
        let reset = of(&findings, "reset");
        assert_eq!(reset.grade, Grade::Note);
        assert!(reset.what.contains("may write to the memory of its own new driver VM"), "{}", reset.what);
    }

    #[test]
    fn a_card_of_two_functions_is_told_what_keeps_its_slot_from_a_reset() {
        let bus = FakeBus::new();
        let nic = bus.add_behind("0000:00:1c.0", "0000:01:00.0", Some(3), Some("vfio-pci"));
        std::fs::write(nic.directory().join("reset_method"), "pm").unwrap();
        let other = bus.add_behind("0000:00:1c.0", "0000:01:00.1", Some(3), None);
        let without = reset(&nic);
        assert!(without.grade == Grade::Note && without.what.contains("0000:01:00.1 is not bound"), "{without:?}");
        std::os::unix::fs::symlink(bus.0.path().join("drivers/vfio-pci"), other.directory().join("driver")).unwrap();
        let with = reset(&nic);
        assert!(with.grade == Grade::Good && with.what.starts_with("hot, then pm: "), "{with:?}");
    }

    #[test]
    fn without_an_iommu_the_group_is_what_is_missing() {
        let bus = FakeBus::new();
        let findings = findings(&Root::default(), &bus.add("0000:02:00.0", None, None));
        assert!(of(&findings, "IOMMU group").remedy.as_ref().unwrap().contains("iommu=pt"));
    }
}
