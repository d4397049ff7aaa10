//! A driver VM image: a folder with `vmlinux`, `initramfs.cpio` and `manifest.json`.
//!
//! Made from a [`Recipe`] in one step: the folder is complete or it is not there. A recipe whose image exists already
//! (by the digests of all that goes in) is not built again. The agent is `/init`; the modules of the NIC's driver and
//! those of the link to the host are listed apart ([`DRIVERS_LIST`], [`MODULES_LIST`](crate::initramfs::MODULES_LIST)),
//! so that the agent can load them side by side; [`PARAMETERS`] has parameters of some of them.

mod disks;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cache::{Cache, sha256};
use crate::decompress::decompress_any;
use crate::elf::without_symbols;
use crate::files::{self, FileError, context};
use crate::initramfs::{AddedModule, Initramfs, InitramfsError};
use crate::kernel::{Kernel, KernelError};
use crate::modules::ModulesError;

/// Paths of the device's driver modules in load order, in the initramfs.
pub const DRIVERS_LIST: &str = "etc/umbra/drivers";
/// Parameters of modules, in the initramfs: a line for each that has some, its name first.
pub const PARAMETERS: &str = "etc/umbra/parameters";

/// File names in an image folder.
const VMLINUX: &str = "vmlinux";
const INITRAMFS: &str = "initramfs.cpio";
const MANIFEST: &str = "manifest.json";
/// Changed when what is built from the same recipe changes, and when an agent of before would not understand the host:
/// an image with another number is refused.
pub const FORMAT: u32 = 4;
/// Largest firmware file that is taken, unpacked.
const MAX_FIRMWARE: usize = 256 << 20;

/// What every driver VM needs to talk to the host and to forward frames.
const BASE_MODULES: [&str; 7] =
    ["virtio_pci", "virtio_console", "virtio_net", "sch_ingress", "cls_matchall", "act_mirred", "bridge"];
/// What the driver VM of a sound card or of disks needs instead: samples and records travel over console ports.
const PORT_BASE_MODULES: [&str; 2] = ["virtio_pci", "virtio_console"];
/// The core of ALSA: a driver that depends on it drives a sound card.
const SOUND_CORE: &str = "snd";
/// The core of HDA: a driver that depends on it finds codecs behind its controller.
const HDA_CORE: &str = "snd_hda_codec";
/// Where the agent looks for the sound service.
const SOUND_SERVICE: &str = "bin/umbra-sound";
/// Taken where the kernel has them. The first two report a panic to the host (`pvpanic` before Linux 5.13); `vmgenid` (from Linux 5.18
/// on) reseeds the random number generator of a VM that was restored from a snapshot.
const OPTIONAL_MODULES: [&str; 3] = ["pvpanic_mmio", "pvpanic", "vmgenid"];

/// What a driver VM image is to be made of.
#[derive(Debug)]
pub struct Recipe {
    /// The kernel.
    pub kernel: Kernel,
    /// Driver modules by name.
    pub drivers: Vec<String>,
    /// Devices, for whose modalias the drivers are looked up.
    pub devices: Vec<Device>,
    /// The agent's binary.
    pub agent: PathBuf,
    /// The sound service's binary; needed for sound cards alone.
    pub sound: Option<PathBuf>,
    /// Firmware folders besides the kernel's own.
    pub firmware: Vec<PathBuf>,
}

/// A device that an image is to drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// What the user called it, as `0000:01:00.0`.
    pub name: String,
    /// Its modalias, as in sysfs.
    pub modalias: String,
}

/// `manifest.json`: what is in an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Form of this file.
    pub format: u32,
    /// Digest of all that the image was made of.
    pub recipe: String,
    /// Kernel release.
    pub kernel: String,
    /// Drivers of the device, built-in ones included.
    pub drivers: Vec<String>,
    /// Devices that the drivers were looked up for.
    pub devices: Vec<Device>,
    /// What was asked for besides them, where the kernel was the system's own: the image is built again when that changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub follows: Option<Follows>,
    /// Modules in the image: the drivers' in load order, then those of the link.
    pub modules: Vec<ModuleEntry>,
    /// Firmware files in the image.
    pub firmware: Vec<String>,
    /// Firmware that the drivers name but that was not found; drivers often do without.
    pub firmware_missing: Vec<String>,
    /// The kernel.
    pub vmlinux: FileEntry,
    /// The initramfs.
    pub initramfs: FileEntry,
}

/// What an image that follows the system's kernel was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Follows {
    /// Driver modules by name.
    pub drivers: Vec<String>,
    /// Firmware folders, searched in order.
    pub firmware: Vec<PathBuf>,
}

/// A module in an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleEntry {
    /// Its name.
    pub name: String,
    /// Size, bytes.
    pub size: u64,
}

/// A file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Size, bytes.
    pub size: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// An image on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The kernel.
    pub vmlinux: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// What is in it.
    pub manifest: Manifest,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The kernel cannot be used.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A module cannot be had.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The initramfs cannot be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// No driver for a device.
    #[error(
        "kernel {release} has no driver for {device} (modalias {modalias}); use another kernel (--kernel-deb) or name \
         the driver (--driver)"
    )]
    NoDriver {
        /// The device.
        device: String,
        /// Its modalias.
        modalias: String,
        /// The kernel's release.
        release: String,
    },
    /// A sound card without its service.
    #[error(
        "{0} drives a sound card, which needs the sound service: build it (`make sound`) or name it with --sound-service"
    )]
    NoSoundService(String),
    /// The folder is something else.
    #[error("{} exists and is no driver VM image; name another folder, or remove it", .0.display())]
    NotAnImage(PathBuf),
    /// There is none.
    #[error("there is no driver VM image {}; build it: `umbra image --pci ADDRESS -o {}`", .0.display(), .0.display())]
    Missing(PathBuf),
    /// The image cannot be used.
    #[error("the driver VM image {} cannot be used: {what}; build it again with `umbra image`", dir.display())]
    Broken {
        /// The image folder.
        dir: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl Image {
    /// Opens an image and checks that its files are there and whole (by size).
    ///
    /// # Errors
    /// When it is missing or broken; the message says what to do.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        let broken = |what: String| ImageError::Broken { dir: dir.into(), what };
        if !dir.is_dir() {
            return Err(ImageError::Missing(dir.into()));
        }
        let text = fs::read(dir.join(MANIFEST)).map_err(|e| broken(format!("{MANIFEST}: {e}")))?;
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| broken(format!("{MANIFEST}: {e}")))?;
        if manifest.format != FORMAT {
            return Err(broken(format!(
                "it is of another version of Umbra (format {}, this one needs {FORMAT})",
                manifest.format
            )));
        }
        for (name, entry) in [(VMLINUX, &manifest.vmlinux), (INITRAMFS, &manifest.initramfs)] {
            let size = fs::metadata(dir.join(name)).map_err(|e| broken(format!("{name}: {e}")))?.len();
            if size != entry.size {
                return Err(broken(format!("{name} has {size} bytes instead of {}", entry.size)));
            }
        }
        Ok(Self { vmlinux: dir.join(VMLINUX), initramfs: dir.join(INITRAMFS), manifest })
    }
}

/// Whether an alias is of codecs behind an HDA controller, which no PCI modalias names: vendor and model, revision, and 01 for the
/// controller's own driver; 02 is of drivers for a system on a chip. Their modules are many since Linux 6.17, one a family of models.
fn is_hda_codec(alias: &str) -> bool {
    alias.starts_with("hdaudio:") && !alias.contains("a02")
}

impl Recipe {
    /// Builds the image at `dir`, or returns the one there if it is of this very recipe.
    ///
    /// # Errors
    /// When something is missing or damaged or the disk is full; `dir` is then as it was.
    pub fn build(&self, dir: &Path, cache: &Cache) -> Result<Image, ImageError> {
        let existing = Image::open(dir);
        let empty = || fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
        if existing.is_err() && fs::symlink_metadata(dir).is_ok() && !dir.join(MANIFEST).is_file() && !empty() {
            return Err(ImageError::NotAnImage(dir.into()));
        }
        let (initramfs, mut manifest) = self.initramfs()?;
        let vmlinux = self.kernel.vmlinux(cache)?;
        let archive = initramfs.to_bytes()?;
        manifest.initramfs = FileEntry { size: archive.len() as u64, sha256: sha256(&archive) };
        let size = fs::metadata(&vmlinux).map_err(context("read", &vmlinux))?.len();
        manifest.vmlinux = FileEntry { size, sha256: cache.digest(&vmlinux)? };
        manifest.recipe = sha256(format!("{manifest:?}").as_bytes());
        if let Ok(image) = existing
            && image.manifest == manifest
        {
            return Ok(image);
        }
        files::replace_dir(dir, |new| {
            fs::copy(&vmlinux, new.join(VMLINUX)).map_err(context("write", &dir.join(VMLINUX)))?;
            files::write_atomically(&new.join(INITRAMFS), &archive)?;
            let text = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
            files::write_atomically(&new.join(MANIFEST), &text)?;
            Ok::<_, ImageError>(())
        })?;
        Image::open(dir)
    }

    /// The drivers: those named, and those that match the devices.
    fn resolve_drivers(&self) -> Result<Vec<String>, ImageError> {
        let tree = &self.kernel.modules;
        let mut drivers = self.drivers.clone();
        for device in &self.devices {
            let found = tree.drivers_for(&device.modalias);
            if found.is_empty() {
                return Err(ImageError::NoDriver {
                    device: device.name.clone(),
                    modalias: device.modalias.clone(),
                    release: tree.release().into(),
                });
            }
            drivers.extend(found.into_iter().map(|driver| driver.name));
            drivers.extend(disks::virtio_driver(&device.modalias).map(Into::into));
        }
        let mut seen = std::collections::BTreeSet::new();
        drivers.retain(|driver| seen.insert(driver.replace('-', "_")));
        Ok(drivers)
    }

    fn initramfs(&self) -> Result<(Initramfs, Manifest), ImageError> {
        let tree = &self.kernel.modules;
        let drivers = self.resolve_drivers()?;
        let needed = tree.load_order(&drivers)?;
        let is_sound = needed.iter().any(|name| name == SOUND_CORE);
        let behind = disks::drivers_behind(tree, &drivers);
        let has_ports = is_sound || behind.is_some();
        let mut base: Vec<&str> = if has_ports { PORT_BASE_MODULES.to_vec() } else { BASE_MODULES.to_vec() };
        base.extend(OPTIONAL_MODULES.iter().filter(|name| tree.has(name)));
        let mut initramfs = Initramfs::new();
        initramfs.add_file("init", 0o755, without_symbols(files::read(&self.agent)?));
        if is_sound {
            self.add_sound_service(&mut initramfs, &drivers)?;
        }
        let mut first = Vec::new();
        if needed.iter().any(|name| name == HDA_CORE) {
            // Before the controller's driver, so that it finds them.
            first.extend(tree.with_alias(is_hda_codec));
        }
        first.extend(behind.unwrap_or_default());
        first.extend(drivers.iter().cloned());
        let driver_modules = initramfs.add_modules_to(DRIVERS_LIST, tree, &first)?;
        let base_modules = initramfs.add_modules(tree, &base)?;
        let mut modules = driver_modules.clone();
        modules.extend(base_modules.into_iter().filter(|m| !driver_modules.contains(m)));
        let modules: Vec<_> = modules.into_iter().map(|m| ModuleEntry { name: m.name, size: m.size }).collect();
        initramfs.add_file(PARAMETERS, 0o644, disks::parameters(&modules));
        let (firmware, firmware_missing) = self.add_firmware(&mut initramfs, &driver_modules)?;
        let nothing_yet = FileEntry { size: 0, sha256: String::new() };
        let manifest = Manifest {
            format: FORMAT,
            recipe: String::new(),
            kernel: tree.release().into(),
            drivers,
            devices: self.devices.clone(),
            follows: self
                .kernel
                .installed
                .then(|| Follows { drivers: self.drivers.clone(), firmware: self.firmware.clone() }),
            modules,
            firmware,
            firmware_missing,
            vmlinux: nothing_yet.clone(),
            initramfs: nothing_yet,
        };
        Ok((initramfs, manifest))
    }

    fn add_sound_service(&self, initramfs: &mut Initramfs, drivers: &[String]) -> Result<(), ImageError> {
        let Some(service) = &self.sound else { return Err(ImageError::NoSoundService(drivers.join(", "))) };
        initramfs.add_file(SOUND_SERVICE, 0o755, without_symbols(files::read(service)?));
        Ok(initramfs.add_libraries(service)?)
    }

    /// Adds the firmware that the modules name; returns what was found and what was not.
    fn add_firmware(
        &self,
        initramfs: &mut Initramfs,
        modules: &[AddedModule],
    ) -> Result<(Vec<String>, Vec<String>), ImageError> {
        let (mut found, mut missing) = (Vec::new(), Vec::new());
        for name in modules.iter().flat_map(|module| &module.firmware) {
            match self.find_firmware(name) {
                Some(path) => {
                    let contents = decompress_firmware(&path)?;
                    initramfs.add_file(&format!("lib/firmware/{name}"), 0o644, contents);
                    found.push(name.clone());
                }
                None => missing.push(name.clone()),
            }
        }
        Ok((found, missing))
    }

    fn find_firmware(&self, name: &str) -> Option<PathBuf> {
        let safe = Path::new(name).components().all(|c| matches!(c, std::path::Component::Normal(_)));
        let release = self.kernel.modules.release();
        let places = [format!("updates/{release}"), "updates".into(), release.into(), String::new()];
        self.firmware
            .iter()
            .chain(&self.kernel.firmware)
            .filter(|_| safe)
            .flat_map(|root| places.iter().map(move |place| root.join(place)))
            .flat_map(|dir| ["", ".xz", ".zst"].map(|extension| dir.join(format!("{name}{extension}"))))
            .find(|path| path.is_file())
    }
}

/// Firmware with a packed file's extension is unpacked; any other is taken as it is, whatever its first bytes are.
fn decompress_firmware(path: &Path) -> Result<Vec<u8>, ImageError> {
    let bytes = files::read_up_to(path, MAX_FIRMWARE)?;
    if !path.extension().is_some_and(|e| e == "xz" || e == "zst") {
        return Ok(bytes);
    }
    decompress_any(bytes, MAX_FIRMWARE)
        .map_err(|source| ModulesError::Damaged { path: path.into(), source: Some(source) }.into())
}
