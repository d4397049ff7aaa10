//! What a bench is made of: QEMU, busybox, a distribution kernel, the workspace's programs, and the images built from
//! them. Found or fetched once, kept by content in the user's cache outside the clone.
//!
//! Says what it installs before it does so.

mod apt;
mod changed;
mod debian;
mod emulator;
mod initramfs;
mod programs;
mod song;
mod sound;
mod unpacked;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use umbra_guest_images::cache::Cache;
use umbra_guest_images::files::FileError;
use umbra_guest_images::image::{Image, ImageError, Recipe};
use umbra_guest_images::initramfs::InitramfsError;
use umbra_guest_images::kernel::{Kernel, KernelError};

use crate::bench::{Model, has_nested_kvm};
use crate::wav::WavError;
pub use song::{PIECES_INSIDE, Song};

/// Names a kernel package to use instead of the distribution's newest 6.12.
pub const KERNEL_VARIABLE: &str = "UMBRA_KERNEL_DEB";
/// Names another QEMU than the installed one; it is run as it is.
pub const QEMU_VARIABLE: &str = "UMBRA_QEMU";
/// Names the folder with `umbra`, `umbra-agent` and `umbra-probe` when it is not that of the running program.
pub const PROGRAMS_VARIABLE: &str = "UMBRA_BIN_DIR";

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const BUSYBOX: &str = "/bin/busybox";
const PROGRAMS: [&str; 4] = ["umbra", "umbra-agent", "umbra-probe", "umbra-sound"];

/// Tells the user what is being done.
pub type Say<'a> = &'a dyn Fn(&str);

/// Why something is not there.
#[derive(Debug, thiserror::Error)]
pub enum AssetError {
    /// Packages are missing and only root may install them.
    #[error(
        "these packages are needed: {packages}; install them (`sudo apt-get install {packages}`) or run `sudo make setup`"
    )]
    NotRoot {
        /// Their names.
        packages: String,
    },
    /// `apt-get` failed.
    #[error("`apt-get {arguments}` failed:\n{what}")]
    Apt {
        /// Its arguments.
        arguments: String,
        /// Its last words.
        what: String,
    },
    /// No kernel package.
    #[error("no kernel package in this system's archive; name one: {KERNEL_VARIABLE}=linux-image-*.deb")]
    NoKernelPackage,
    /// No mirror.
    #[error("the sources of apt name no mirror of this release; add its backports suite by hand")]
    NoMirror,
    /// The workspace's programs are not built.
    #[error("{0} is not built; run `make build`, or name the folder with the programs: {PROGRAMS_VARIABLE}=DIR")]
    NotBuilt(PathBuf),
    /// QEMU is too old for a model.
    #[error(
        "this QEMU ({version}) has no model {model}; QEMU 8 or newer has (on Debian 12: \
        `apt-get install -t bookworm-backports qemu-system-x86`)"
    )]
    OldQemu {
        /// The model.
        model: Model,
        /// QEMU's major version.
        version: u32,
    },
    /// QEMU is not there.
    #[error("{QEMU} cannot be run; `make setup` installs it")]
    NoQemu,
    /// A model whose Linux driver is not known here.
    #[error(
        "the bench does not know which driver the model {0} needs; it knows the NICs e1000e, e1000, igb, rtl8139, \
        pcnet, virtio-net-pci, the sound cards hda, es1370, ac97, and the disk controllers nvme, ich9-ahci, virtio-blk-pci, \
        virtio-scsi-pci, megasas, mptsas1068, pvscsi, lsi53c895a, am53c974, sdhci-pci, qemu-xhci"
    )]
    UnknownModel(Model),
    /// A program that makes an asset.
    #[error("{command} failed: {what}")]
    Program {
        /// The program with its arguments.
        command: String,
        /// What it said.
        what: String,
    },
    /// A song that is none.
    #[error(transparent)]
    Wav(#[from] WavError),
    /// A file operation.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file of the cache.
    #[error(transparent)]
    File(#[from] FileError),
    /// The kernel package cannot be used.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// An initramfs cannot be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// A driver VM image cannot be made.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl AssetError {
    fn file(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { operation, path: path.into(), source }
    }
}

/// Everything a bench needs, ready.
#[derive(Debug)]
pub struct Assets {
    cache: Cache,
    qemu: PathBuf,
    package: PathBuf,
    kernel: PathBuf,
    vmlinux: PathBuf,
    host_initramfs: PathBuf,
    guest_initramfs: PathBuf,
    sound: PathBuf,
    programs: PathBuf,
    out: PathBuf,
}

impl Assets {
    /// Finds, fetches or builds all of it. The second time takes a moment.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub fn prepare(say: Say<'_>) -> Result<Self, AssetError> {
        apt::install_missing(say)?;
        let cache = Cache::of_user();
        let qemu = match std::env::var_os(QEMU_VARIABLE) {
            Some(named) => named.into(),
            None if has_nested_kvm() => QEMU.into(),
            None => emulator::mended(Path::new(QEMU), &cache)?,
        };
        let out = target_dir().join("bench");
        let programs = strip_programs(&out.join("programs"), built)?;
        let package = kernel_package(say)?;
        let kernel = Kernel::from_debs(std::slice::from_ref(&package), &cache)?;
        let vmlinux = kernel.vmlinux(&cache)?;
        let probe = programs.join("umbra-probe");
        let recipe = initramfs::Recipe { kernel: &kernel, busybox: Path::new(BUSYBOX), probe: &probe, cache: &cache };
        let (host_initramfs, guest_initramfs) = (recipe.host()?, recipe.guest()?);
        let sound = sound::programs(&cache)?;
        let kernel = kernel.image.clone();
        Ok(Self { cache, qemu, package, kernel, vmlinux, host_initramfs, guest_initramfs, sound, programs, out })
    }

    /// QEMU, mended where it emulates.
    pub fn qemu(&self) -> &Path {
        &self.qemu
    }

    /// The kernel of the test host: a bzImage.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The kernel package that everything is made from.
    pub fn package(&self) -> &Path {
        &self.package
    }

    /// The test host's initramfs.
    pub fn host_initramfs(&self) -> &Path {
        &self.host_initramfs
    }

    /// `umbra-probe`.
    pub fn probe(&self) -> PathBuf {
        self.programs.join("umbra-probe")
    }

    /// Where benches have their folders: `target/bench`.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// An archive for guests and test hosts that play: mpg123, alsa-utils and their libraries.
    pub fn sound_programs(&self) -> &Path {
        &self.sound
    }

    /// An archive for guests with the sound server PulseAudio and its player.
    ///
    /// # Errors
    /// It could not be made.
    pub fn sound_server(&self) -> Result<PathBuf, AssetError> {
        sound::server(&self.cache)
    }

    /// An archive for guests with the database SQLite, and what makes and checks file systems.
    ///
    /// # Errors
    /// It could not be made.
    pub fn database(&self) -> Result<PathBuf, AssetError> {
        programs::database(&self.cache)
    }

    /// An archive for guests with the database PostgreSQL, a user `postgres`, and what makes and checks file systems.
    ///
    /// # Errors
    /// Its packages cannot be had, or it could not be made.
    pub fn postgresql(&self, say: Say<'_>) -> Result<PathBuf, AssetError> {
        unpacked::postgresql(&self.cache, say)
    }

    /// An archive for guests with the load generator fio.
    ///
    /// # Errors
    /// As [`Self::postgresql`].
    pub fn fio(&self, say: Say<'_>) -> Result<PathBuf, AssetError> {
        unpacked::fio(&self.cache, say)
    }

    /// A file system with Debian, systemd and dpkg, whose init takes a test host over ([`crate::bench::BenchSpec::root`]).
    ///
    /// # Errors
    /// Its packages cannot be had, or who runs this is not root.
    pub fn debian(&self, say: Say<'_>) -> Result<PathBuf, AssetError> {
        debian::root(&self.cache, say)
    }

    /// `seconds` of a song at `rate` Hz.
    ///
    /// # Errors
    /// It could not be encoded.
    pub fn song(&self, rate: u32, seconds: u32) -> Result<Song, AssetError> {
        song::make(&self.cache, rate, seconds)
    }

    /// A song at `rate` Hz in pieces, which goes on for as long as it is fed; a round of it has about `seconds`.
    ///
    /// # Errors
    /// It could not be encoded.
    pub fn song_in_pieces(&self, rate: u32, seconds: u32) -> Result<Song, AssetError> {
        song::make_in_pieces(&self.cache, rate, seconds)
    }

    /// What every bench finds in its shared folder, and under which name.
    pub fn shared(&self) -> Vec<(PathBuf, &'static str)> {
        let mut all: Vec<_> = PROGRAMS.iter().map(|&name| (self.programs.join(name), name)).collect();
        all.push((self.vmlinux.clone(), "vmlinux"));
        all.push((self.kernel.clone(), "bzImage"));
        all.push((self.guest_initramfs.clone(), "guest.cpio"));
        all
    }

    /// A driver VM image for a model of NIC or sound card, by its driver's name.
    ///
    /// # Errors
    /// The kernel has no such driver, or the agent is not built.
    pub fn driver_image(&self, model: &Model) -> Result<PathBuf, AssetError> {
        self.image_for(std::slice::from_ref(model))
    }

    /// As [`Self::driver_image`], with the drivers of all these models.
    ///
    /// # Errors
    /// As there.
    pub fn image_for(&self, models: &[Model]) -> Result<PathBuf, AssetError> {
        let driver = |model: &Model| driver_of(model).ok_or_else(|| AssetError::UnknownModel(model.clone()));
        let mut drivers = models.iter().map(driver).collect::<Result<Vec<_>, _>>()?;
        drivers.dedup();
        self.image_of(&drivers, &self.programs, &drivers.join("+"))
    }

    /// Another build: the folder that its programs are copied to, and a driver VM image with its agent, `label` in their names.
    ///
    /// # Errors
    /// A program is not in `from`, or as [`Self::driver_image`].
    pub fn other_build(&self, from: &Path, label: &str, model: &Model) -> Result<(PathBuf, PathBuf), AssetError> {
        let there = |name: &str| {
            let path = from.join(name);
            if path.is_file() { Ok(path) } else { Err(AssetError::NotBuilt(path)) }
        };
        let programs = strip_programs(&self.out.join("builds").join(label), there)?;
        let driver = driver_of(model).ok_or_else(|| AssetError::UnknownModel(model.clone()))?;
        let image = self.image_of(&[driver], &programs, &format!("{driver}-{label}"))?;
        Ok((programs, image))
    }

    fn image_of(&self, drivers: &[&str], programs: &Path, name: &str) -> Result<PathBuf, AssetError> {
        let recipe = Recipe {
            kernel: Kernel::from_debs(std::slice::from_ref(&self.package), &self.cache)?,
            drivers: drivers.iter().map(|&driver| driver.into()).collect(),
            devices: Vec::new(),
            agent: programs.join("umbra-agent"),
            sound: Some(programs.join("umbra-sound")),
            firmware: Vec::new(),
        };
        let dir = self.out.join("images").join(name);
        recipe.build(&dir, &self.cache).map(|_: Image| dir).map_err(Into::into)
    }

    /// A copy of the driver VM image `image` whose boot waits for `seconds` before its agent starts.
    ///
    /// # Errors
    /// The image is not whole, or the copy could not be written.
    pub fn slow_image(&self, image: &Path, seconds: u32) -> Result<PathBuf, AssetError> {
        let name = image.file_name().unwrap_or_default().to_string_lossy();
        let dir = self.out.join("images").join(format!("{name}-after-{seconds}-s"));
        changed::slow(image, &self.programs.join("umbra-agent"), &dir, seconds)
    }

    /// A copy of the driver VM image `image` that attacks as the campaign `seed` has it ([`crate::hostile`]).
    ///
    /// # Errors
    /// As [`Self::slow_image`].
    pub fn hostile_image(&self, image: &Path, seed: u64) -> Result<PathBuf, AssetError> {
        let name = image.file_name().unwrap_or_default().to_string_lossy();
        let dir = self.out.join("images").join(format!("{name}-hostile"));
        changed::hostile(image, (&self.programs.join("umbra-agent"), &self.probe()), &dir, seed)
    }

    /// QEMU 7's emulation now and then trips over code that the test host's kernel patches while two CPUs run.
    pub fn unsteady_smp(&self) -> bool {
        qemu_major().is_some_and(|version| version < 8)
    }

    /// This QEMU has all of these models.
    ///
    /// # Errors
    /// [`AssetError::OldQemu`].
    pub fn check_models(&self, models: &[Model]) -> Result<(), AssetError> {
        let version = qemu_major().ok_or(AssetError::NoQemu)?;
        match models.iter().find(|model| model.needs_qemu_8()) {
            Some(model) if version < 8 => Err(AssetError::OldQemu { model: model.clone(), version }),
            _ => Ok(()),
        }
    }
}

/// The Linux driver of a model of NIC, sound card or disk controller.
pub fn driver_of(model: &Model) -> Option<&'static str> {
    Some(match model.name() {
        "e1000e" => "e1000e",
        "igb" => "igb",
        "rtl8139" => "8139cp",
        "pcnet" => "pcnet32",
        "virtio-net-pci" => "virtio_net",
        "intel-hda" | "ich9-intel-hda" => "snd_hda_intel",
        "ES1370" => "snd_ens1370",
        "AC97" => "snd_intel8x0",
        "nvme" => "nvme",
        "ich9-ahci" => "ahci",
        "virtio-blk-pci" => "virtio_blk",
        "virtio-scsi-pci" => "virtio_scsi",
        "megasas" | "megasas-gen2" => "megaraid_sas",
        "mptsas1068" => "mptsas",
        "pvscsi" => "vmw_pvscsi",
        "lsi53c895a" => "sym53c8xx",
        "am53c974" => "am53c974",
        "sdhci-pci" => "sdhci_pci",
        "qemu-xhci" => "xhci_pci",
        name if name.starts_with("e1000") => "e1000",
        _ => return None,
    })
}

/// QEMU's major version, if it can be run.
fn qemu_major() -> Option<u32> {
    let output = Command::new(QEMU).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1)?;
    version.split('.').next()?.parse().ok()
}

/// The workspace's `target` folder: that of the running program, else one below the working directory.
pub fn target_dir() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    let above = exe.ancestors().find(|path| path.file_name().is_some_and(|name| name == "target"));
    above.map_or_else(|| "target".into(), Path::to_path_buf)
}

fn built(name: &str) -> Result<PathBuf, AssetError> {
    if let Some(dir) = std::env::var_os(PROGRAMS_VARIABLE) {
        let path = Path::new(&dir).join(name);
        return if path.is_file() { Ok(path) } else { Err(AssetError::NotBuilt(path)) };
    }
    let exe = std::env::current_exe().unwrap_or_default();
    // Beside the program, or for a test (`deps/...`) one folder up.
    let near = exe.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    near.ok_or_else(|| AssetError::NotBuilt(name.into()))
}

/// Copies the programs without debug information: the test host pages them through a slow channel.
fn strip_programs(dir: &Path, built: impl Fn(&str) -> Result<PathBuf, AssetError>) -> Result<PathBuf, AssetError> {
    fs::create_dir_all(dir).map_err(|e| AssetError::file("make", dir, e))?;
    for name in PROGRAMS {
        let (from, to) = (built(name)?, dir.join(name));
        // Beside each copy it says of what it is one: the same place may have had another program.
        let (of, source) = (dir.join(format!("{name}.of")), source_of(&from)?);
        if to.is_file() && fs::read_to_string(&of).is_ok_and(|of| of == source) {
            continue;
        }
        let part = dir.join(format!("{name}.{}", std::process::id()));
        let strip = Command::new("strip").arg("-o").arg(&part).arg(&from).status();
        if !strip.is_ok_and(|status| status.success()) {
            fs::copy(&from, &part).map_err(|e| AssetError::file("copy", &from, e))?;
        }
        let _ = fs::remove_file(&of);
        fs::rename(&part, &to).map_err(|e| AssetError::file("write", &to, e))?;
        fs::write(&of, source).map_err(|e| AssetError::file("write", &of, e))?;
    }
    Ok(dir.into())
}

/// What tells the program at `path` from any other: where it is, how long, and when it was written.
fn source_of(path: &Path) -> Result<String, AssetError> {
    let read = || {
        let metadata = fs::metadata(path)?;
        Ok::<_, io::Error>((path.canonicalize()?, metadata.len(), metadata.modified()?))
    };
    read().map(|source| format!("{source:?}")).map_err(|e| AssetError::file("read", path, e))
}

/// The kernel package: named, kept from last time, or downloaded.
fn kernel_package(say: Say<'_>) -> Result<PathBuf, AssetError> {
    if let Some(path) = std::env::var_os(KERNEL_VARIABLE) {
        return Ok(path.into());
    }
    let dir = cache_dir().join("kernels");
    fs::create_dir_all(&dir).map_err(|e| AssetError::file("make", &dir, e))?;
    let entries = fs::read_dir(&dir).map_err(|e| AssetError::file("list", &dir, e))?;
    let mut kept: Vec<_> =
        entries.flatten().map(|e| e.path()).filter(|path| path.extension().is_some_and(|e| e == "deb")).collect();
    kept.sort();
    kept.pop().map_or_else(|| apt::download_kernel(&dir, say), Ok)
}

/// The same folder as [`Cache::of_user`].
pub(crate) fn cache_dir() -> PathBuf {
    let from = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("UMBRA_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|dir| dir.join("umbra")))
        .or_else(|| from("HOME").map(|dir| dir.join(".cache/umbra")))
        .unwrap_or_else(|| "/var/cache/umbra".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_made_again_of_another_program_though_that_is_older() {
        let dir = tempfile::tempdir().unwrap();
        for build in ["older", "newer"] {
            fs::create_dir(dir.path().join(build)).unwrap();
            for name in PROGRAMS {
                fs::write(dir.path().join(build).join(name), build).unwrap();
            }
        }
        for build in ["newer", "older", "older"] {
            let copies =
                strip_programs(&dir.path().join("copies"), |name| Ok(dir.path().join(build).join(name))).unwrap();
            for name in PROGRAMS {
                assert_eq!(fs::read_to_string(copies.join(name)).unwrap(), build);
            }
        }
    }
}
