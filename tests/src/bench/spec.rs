//! What a test host is to be: the one struct that scenarios, the command line and the documentation share.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A QEMU device model. Any name that QEMU knows is accepted; those listed in [`Model::is_conventional`] go on the
/// root bus, the others each behind a PCI Express root port, so that each has an IOMMU group of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Model(pub String);

/// Models without a PCI Express capability: a root port would not show them the slot they expect.
const CONVENTIONAL: [&str; 15] = [
    "rtl8139",
    "e1000",
    "e1000-82544gc",
    "e1000-82545em",
    "pcnet",
    "ne2k_pci",
    "i82550",
    "i82551",
    "i82557b",
    "tulip",
    "ES1370",
    "AC97",
    "lsi53c895a",
    "am53c974",
    "sdhci-pci",
];

impl Model {
    /// The model sits on the root bus.
    pub fn is_conventional(&self) -> bool {
        CONVENTIONAL.contains(&self.name())
    }

    /// QEMU's name for it; sound cards may be given in lower case.
    pub fn name(&self) -> &str {
        match self.0.as_str() {
            "es1370" => "ES1370",
            "ac97" => "AC97",
            "hda" => "intel-hda",
            other => other,
        }
    }

    /// QEMU 7.2 (Debian 12) does not have it.
    pub fn needs_qemu_8(&self) -> bool {
        self.0 == "igb"
    }
}

impl From<&str> for Model {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl std::fmt::Display for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A disk controller with one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Storage {
    /// `nvme`, `virtio-blk-pci`, or another model that takes `drive=`; or a controller of [`Self::disk_model`].
    pub model: Model,
    /// Size of the disk, bytes, if it is an empty file of the bench's folder.
    pub bytes: u64,
    /// The socket of the NBD server that has its content instead: [`crate::lossy_disk::LossyDisk::socket`].
    pub nbd: Option<PathBuf>,
    /// It says that it has no volatile cache, so that no driver sends a flush; not every model can (`nvme` cannot).
    pub hides_cache: bool,
}

impl Storage {
    /// An empty disk of the bench's folder behind this model.
    pub fn empty(model: &str, bytes: u64) -> Self {
        Self { model: model.into(), bytes, nbd: None, hides_cache: false }
    }

    /// The model of the disk behind a controller that has none of its own: its name, and the bus of controller `id` that it goes on.
    pub fn disk_model(&self, id: &str) -> Option<(&'static str, String)> {
        let (disk, bus) = match self.model.name() {
            "ich9-ahci" => ("ide-hd", ".0"),
            "virtio-scsi-pci" | "megasas" | "megasas-gen2" | "mptsas1068" | "pvscsi" | "lsi53c895a" | "am53c974" => {
                ("scsi-hd", ".0")
            }
            "sdhci-pci" => ("sd-card", ""),
            "qemu-xhci" => ("usb-storage", ".0"),
            _ => return None,
        };
        Some((disk, if bus.is_empty() { String::new() } else { format!(",bus={id}{bus}") }))
    }
}

/// How QEMU runs the test host's code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM where `/proc/cpuinfo` has `vmx` or `svm`, else emulation: the mere presence of `/dev/kvm` is no sign.
    #[default]
    Auto,
    /// KVM.
    Kvm,
    /// Emulation.
    Tcg,
}

/// A test host to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BenchSpec {
    /// Names its folder: logs, captures and the shared folder are kept there until the next bench of that name.
    pub name: String,
    /// NICs, in order: `NIC0`, `NIC1`, ... in scripts.
    pub nics: Vec<Model>,
    /// Each NIC behind a root port has a second function beside it, in its IOMMU group and on no network; `NIC0` is the
    /// first.
    pub second_function: bool,
    /// All NICs are on the network of the first; else each has its own.
    pub one_wire: bool,
    /// Sound cards, in order: `SND0`, ...
    pub sound: Vec<Model>,
    /// Frames a second of what they play together, in `sound.wav`; what is played at another rate is resampled.
    pub wav_rate: u32,
    /// Disks, in order: `DISK0`, ...
    pub storage: Vec<Storage>,
    /// CPUs of the test host.
    pub cpus: u8,
    /// Memory of the test host, MiB.
    pub memory_mib: u32,
    /// Emulation or KVM.
    pub accel: Accel,
    /// Keep a capture of each NIC's wire, `nicN.pcap`; the first so many bytes of each frame.
    pub capture: Option<u32>,
    /// A file system whose init takes the test host over ([`crate::assets::Assets::debian`]); what is written to it is gone with the
    /// test host.
    pub root: Option<PathBuf>,
    /// A reset of the test host boots it again ([`super::Bench::reboot`]), on the disk of [`Self::root`] as it was left; else it ends the
    /// emulator, and so does a panic.
    pub reboots: bool,
    /// Added to the test host's kernel command line.
    pub cmdline: String,
    /// Files copied into the shared folder, `/share` in the test host.
    pub files: Vec<PathBuf>,
    /// Longest time in which its console may print nothing while it boots, as on the reference machine ([`super::patience`]).
    pub boot_silence: Duration,
    /// Give the terminal to a shell in the test host.
    pub shell: bool,
    /// No other test host runs beside it, a braked one neither: what it plays is judged sample by sample.
    pub alone: bool,
}

impl BenchSpec {
    /// A test host called `name` with one `e1000e`.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            nics: vec!["e1000e".into()],
            second_function: false,
            one_wire: false,
            sound: Vec::new(),
            wav_rate: 48_000,
            storage: Vec::new(),
            cpus: 2,
            memory_mib: 3072,
            accel: Accel::Auto,
            capture: Some(128),
            root: None,
            reboots: false,
            cmdline: String::new(),
            files: Vec::new(),
            boot_silence: Duration::from_secs(15),
            shell: false,
            alone: false,
        }
    }

    /// With these NICs instead.
    #[must_use]
    pub fn nics(mut self, models: &[&str]) -> Self {
        self.nics = models.iter().map(|&name| name.into()).collect();
        self
    }

    /// With these sound cards.
    #[must_use]
    pub fn sound(mut self, models: &[&str]) -> Self {
        self.sound = models.iter().map(|&name| name.into()).collect();
        self
    }
}
