//! The host's functions that a driver VM could have: network cards, sound cards, storage controllers.

use std::fs;

use serde::Serialize;

use super::{Root, storage};
use crate::base::pci_address::Bdf;
use crate::host::sysfs::HostDevice;

/// A network card, a sound card or a storage controller.
#[derive(Clone, Debug, Serialize)]
pub struct Card {
    /// Its address.
    pub device: String,
    /// `network`, `sound` or `storage`.
    pub kind: &'static str,
    /// The driver that holds it.
    pub driver: Option<String>,
    /// IOMMU group.
    pub group: Option<u32>,
    /// Reset methods, best first.
    pub resets: Vec<&'static str>,
    /// A network interface of it that is up.
    pub interface_up: Option<String>,
    /// Disks of it that the host uses, with how.
    pub disks_in_use: Vec<String>,
    /// Maker and model, or their numbers.
    pub name: String,
    /// Whether a driver VM can have it without further steps.
    pub ready: bool,
    /// Why not, or the next step.
    pub next: String,
}

/// All of them, by address.
pub fn cards(root: &Root) -> Vec<Card> {
    let bus = root.join("sys/bus/pci");
    let entries = fs::read_dir(bus.join("devices")).into_iter().flatten().flatten();
    let mut addresses: Vec<Bdf> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    addresses.sort_unstable();
    let devices = addresses.into_iter().filter_map(|bdf| HostDevice::find_below(&bus, bdf).ok());
    devices.filter_map(|device| card(root, &device)).collect()
}

fn card(root: &Root, device: &HostDevice) -> Option<Card> {
    let kind = kind(device.class().ok()?);
    if !is_shadowed(kind) {
        return None;
    }
    let problem = device.check_ready().err();
    let unserved = device.unserved();
    let interface_up = interface_up(device);
    let disks_in_use = storage::in_use(root, device);
    let next = match (&problem, &interface_up) {
        _ if unserved.is_some() => format!("cannot be served yet (`umbra doctor {}`)", device.bdf()),
        (None, _) => "ready for a driver VM".into(),
        _ if device.group().is_none() => "needs an IOMMU".into(),
        (_, Some(interface)) => format!("the host uses it ({interface})"),
        _ if !disks_in_use.is_empty() => format!("the host uses it ({})", disks_in_use.join(", ")),
        _ => format!("`umbra doctor {}` says what is missing", device.bdf()),
    };
    Some(Card {
        device: device.bdf().to_string(),
        kind,
        driver: device.driver(),
        group: device.group(),
        resets: device.reset().methods().iter().map(|method| method.word()).collect(),
        interface_up,
        disks_in_use,
        name: name(root, device),
        ready: problem.is_none() && unserved.is_none(),
        next,
    })
}

/// Whether Umbra has a shadow for functions of this kind.
pub(crate) fn is_shadowed(kind: &str) -> bool {
    ["network", "sound", "storage"].contains(&kind)
}

/// What a class code (24 bits) says, in a word.
pub(crate) fn kind(class: u32) -> &'static str {
    match class >> 8 {
        0x02_00..=0x02_FF => "network",
        // Audio device, HD Audio.
        0x04_01 | 0x04_03 => "sound",
        // With SD host controllers.
        0x01_00..=0x01_FF | 0x08_05 => "storage",
        0x03_00..=0x03_FF => "display",
        0x06_00..=0x06_FF => "bridge",
        0x0C_03 => "USB",
        _ => "other",
    }
}

/// Maker and model out of the PCI ID database where the host has one, else the numbers.
pub(crate) fn name(root: &Root, device: &HostDevice) -> String {
    let (vendor, model) = (device.vendor().unwrap_or_default(), device.device().unwrap_or_default());
    let numbers = format!("{vendor:04x}:{model:04x}");
    let files = ["usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids"];
    let text = files.iter().find_map(|file| fs::read(root.join(file)).ok()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    match look_up(&text, &format!("{vendor:04x}"), &format!("{model:04x}")) {
        Some(name) => format!("{name} ({numbers})"),
        None => numbers,
    }
}

/// Finds a vendor's line (`8086  Intel Corporation`) and below it the model's (`<tab>10d3  82574L ...`).
fn look_up(text: &str, vendor: &str, model: &str) -> Option<String> {
    let mut lines = text.lines().skip_while(|line| !line.starts_with(vendor));
    let maker = lines.next()?.strip_prefix(vendor)?.trim();
    let own = lines.take_while(|line| line.starts_with(['\t', '#']) || line.is_empty());
    let model = own.filter_map(|line| line.strip_prefix('\t')?.strip_prefix(model)).next();
    Some(match model {
        Some(model) => format!("{maker} {}", model.trim()),
        None => maker.to_owned(),
    })
}

/// A network interface of the function that is up, if any.
pub(crate) fn interface_up(device: &HostDevice) -> Option<String> {
    /// `IFF_UP` of `netdevice(7)`.
    const UP: u32 = 1;
    let interfaces = fs::read_dir(device.directory().join("net")).ok()?.flatten();
    interfaces.map(|entry| (entry.path(), entry.file_name())).find_map(|(path, name)| {
        let flags = fs::read_to_string(path.join("flags")).ok()?;
        let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).ok()?;
        (flags & UP != 0).then(|| name.to_string_lossy().into_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sysfs::tests::FakeBus;

    #[test]
    fn cards_and_controllers_are_listed_by_address() {
        let dir = tempfile::tempdir().unwrap();
        let classes = [
            ("0000:05:00.0", "0x040300"),
            ("0000:01:00.0", "0x020000"),
            ("0000:00:1f.2", "0x010601"),
            ("0000:02:00.0", "0x030000"),
            ("0000:06:00.0", "0x028000"),
        ];
        for (bdf, class) in classes {
            let device = dir.path().join("sys/bus/pci/devices").join(bdf);
            fs::create_dir_all(&device).unwrap();
            fs::write(device.join("class"), class).unwrap();
            fs::write(device.join("vendor"), "0x8086").unwrap();
            fs::write(device.join("device"), "0x10d3").unwrap();
        }
        let cards = cards(&Root::at(dir.path().into()));
        let seen: Vec<_> = cards.iter().map(|card| (card.device.as_str(), card.kind, card.next.as_str())).collect();
        let listed = ["0000:00:1f.2", "0000:01:00.0", "0000:05:00.0"].into_iter().zip(["storage", "network", "sound"]);
        let wireless = ("0000:06:00.0", "network", "cannot be served yet (`umbra doctor 0000:06:00.0`)");
        let listed = listed.map(|(bdf, kind)| (bdf, kind, "needs an IOMMU")).chain([wireless]);
        assert_eq!(seen, listed.collect::<Vec<_>>());
        assert!(!cards[0].ready);
    }

    #[test]
    fn names_come_from_the_database() {
        let text = "# list\n8086  Intel Corporation\n\t10d2  Other\n\t10d3  82574L Gigabit\n\t\t1043 8369  Board\n8087  Next\n\t10d4  No\n";
        assert_eq!(look_up(text, "8086", "10d3").unwrap(), "Intel Corporation 82574L Gigabit");
        assert_eq!(look_up(text, "8086", "10d4").unwrap(), "Intel Corporation");
        assert_eq!(look_up(text, "1234", "10d3"), None);
    }

    #[test]
    fn an_interface_that_is_up_is_in_use() {
        let bus = FakeBus::new();
        let nic = bus.add("0000:01:00.0", Some(1), None);
        assert_eq!(interface_up(&nic), None);
        for (name, flags) in [("eth0", "0x1002\n"), ("eth1", "0x1003\n")] {
            let net = nic.directory().join("net").join(name);
            fs::create_dir_all(&net).unwrap();
            fs::write(net.join("flags"), flags).unwrap();
        }
        assert_eq!(interface_up(&nic).as_deref(), Some("eth1"));
    }
}
