//! What the image of a disk's controller needs beside its driver: the drivers of the disks behind it, which no PCI modalias names, and
//! parameters that a driver VM wants.

use std::path::Path;

use super::ModuleEntry;
use crate::modules::ModuleTree;

/// Folders of a module tree with drivers of controllers, and the drivers of what is behind them. They are loaded before the controller's,
/// so that it finds them.
const CONTROLLERS: [(&str, &[&str]); 9] = [
    ("kernel/drivers/nvme/host", &[]),
    ("kernel/drivers/block", &[]),
    ("kernel/drivers/ata", &["sd_mod"]),
    ("kernel/drivers/scsi", &["sd_mod"]),
    ("kernel/drivers/message", &["sd_mod"]),
    ("kernel/drivers/ufs", &["sd_mod"]),
    ("kernel/drivers/usb/host", &["sd_mod", "usb_storage", "uas"]),
    ("kernel/drivers/usb/storage", &["sd_mod"]),
    ("kernel/drivers/mmc/host", &["mmc_block"]),
];

/// Disks of virtio: beginnings of the modalias of their PCI functions, which name the transport's driver alone.
const VIRTIO: [(&str, &str); 4] = [
    ("pci:v00001AF4d00001001", "virtio_blk"),
    ("pci:v00001AF4d00001042", "virtio_blk"),
    ("pci:v00001AF4d00001004", "virtio_scsi"),
    ("pci:v00001AF4d00001048", "virtio_scsi"),
];

/// Module, parameters. `usb_storage` waits a second before it asks a disk anything, for which the agent waits already. `nvme_core` shows a
/// namespace as a path and a device above it, unless it is told that there is one path.
const PARAMETERS: [(&str, &str); 2] = [("usb_storage", "delay_use=0"), ("nvme_core", "multipath=N")];

/// The driver of a virtio disk by its PCI modalias.
pub(super) fn virtio_driver(modalias: &str) -> Option<&'static str> {
    VIRTIO.iter().find(|(function, _)| modalias.starts_with(function)).map(|(_, driver)| *driver)
}

/// The drivers of what is behind the controllers that `drivers` drive, as far as the kernel has them; none if one of them drives no
/// controller of disks.
pub(super) fn drivers_behind(tree: &ModuleTree, drivers: &[String]) -> Option<Vec<String>> {
    let is_transport = |driver: &&String| driver.replace('-', "_") != "virtio_pci";
    let mut behind: Vec<String> = Vec::new();
    for driver in drivers.iter().filter(is_transport) {
        let folder = tree.path_of(driver).and_then(Path::parent)?;
        let (_, needed) = CONTROLLERS.iter().find(|(controllers, _)| folder.starts_with(controllers))?;
        behind.extend(needed.iter().filter(|name| tree.has(name)).map(|name| (*name).to_owned()));
    }
    behind.sort();
    behind.dedup();
    (!drivers.is_empty()).then_some(behind)
}

/// Parameters of those of `modules` that have some: a line for each, as `usb_storage delay_use=0`.
pub(super) fn parameters(modules: &[ModuleEntry]) -> String {
    let given = PARAMETERS.iter().filter(|(name, _)| modules.iter().any(|module| module.name == *name));
    given.map(|(name, parameters)| format!("{name} {parameters}\n")).collect()
}
