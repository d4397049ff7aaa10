//! Where a kernel comes from: Debian packages, an unpacked folder, or the running system. Gives the bzImage, the module
//! tree and the folders in which firmware may lie.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{Cache, sha256};
use crate::deb::{self, DebError};
use crate::files::{self, FileError, context};
use crate::modules::{ModuleTree, ModulesError};
use crate::vmlinux::{self, VmlinuxError};

/// A kernel: image and modules.
#[derive(Debug)]
pub struct Kernel {
    /// The bzImage (or vmlinux).
    pub image: PathBuf,
    /// Its modules.
    pub modules: ModuleTree,
    /// Folders as `/lib/firmware`, searched in order.
    pub firmware: Vec<PathBuf>,
    /// It is installed in this system: an image of it follows the system's kernel.
    pub installed: bool,
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A package cannot be opened.
    #[error(transparent)]
    Deb(#[from] DebError),
    /// The modules cannot be used.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The kernel image cannot be unpacked.
    #[error("{} cannot be used as a kernel", path.display())]
    Vmlinux {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: VmlinuxError,
    },
    /// There is no kernel image.
    #[error(
        "no kernel image in {place}: looked for boot/vmlinuz-{release} and {modules}/vmlinuz (a package of modules \
         alone? give the package with the kernel image as well)"
    )]
    NoImage {
        /// Where it was looked for.
        place: String,
        /// Of which release.
        release: String,
        /// The module folder.
        modules: String,
    },
    /// There are no modules.
    #[error("no modules in {place}: looked for lib/modules/RELEASE and usr/lib/modules/RELEASE")]
    NoModules {
        /// Where they were looked for.
        place: String,
    },
    /// There is more than one kernel.
    #[error("{place} holds several kernels ({}); give a folder or package with one", releases.join(", "))]
    Several {
        /// Where.
        place: String,
        /// Their releases.
        releases: Vec<String>,
    },
    /// A kernel's files are not installed.
    #[error("kernel {release} has no modules in {place}; install its package, or name a kernel package (--kernel-deb)")]
    NotInstalled {
        /// As `uname -r` says it.
        release: String,
        /// Where they were looked for.
        place: String,
    },
}

/// Where unpacked packages are in the cache. In `packages`, where they were before, links may lead anywhere.
const UNPACKED: &str = "packages-2";
/// Module folders below a root; the second is where merged-/usr packages have them.
const MODULE_ROOTS: [&str; 2] = ["lib/modules", "usr/lib/modules"];
const FIRMWARE_ROOTS: [&str; 2] = ["lib/firmware", "usr/lib/firmware"];

impl Kernel {
    /// The kernel in one or more Debian packages (image and modules may be packaged apart). Unpacked once, by content.
    ///
    /// # Errors
    /// When a package is damaged or they hold no kernel, no modules or several.
    pub fn from_debs(packages: &[PathBuf], cache: &Cache) -> Result<Self, KernelError> {
        let digests = packages.iter().map(|p| cache.digest(p)).collect::<Result<Vec<_>, _>>()?;
        let key = if let [one] = &digests[..] { one.clone() } else { sha256(digests.concat().as_bytes()) };
        let root = cache.dir(UNPACKED, &key, |dest| {
            for package in packages {
                tracing::info!(package = %package.display(), "unpacking");
            }
            deb::extract(packages, dest, is_kernel_file)?;
            Ok::<_, KernelError>(())
        })?;
        let names: Vec<_> = packages.iter().map(|p| p.display().to_string()).collect();
        Self::in_root(&root, &names.join(", "), cache)
    }

    /// The kernel in an unpacked folder (`boot/vmlinuz-*`, `lib/modules/*`).
    ///
    /// # Errors
    /// When it holds no kernel, no modules or several.
    pub fn from_dir(root: &Path, cache: &Cache) -> Result<Self, KernelError> {
        Self::in_root(root, &root.display().to_string(), cache)
    }

    /// The kernel of `release` that is installed below `root`; the running one if none is named.
    ///
    /// # Errors
    /// When its image or modules are not installed.
    pub fn installed(root: &Path, release: Option<&str>, cache: &Cache) -> Result<Self, KernelError> {
        let release = match release {
            Some(release) => release.to_owned(),
            None => files::read_text(Path::new("/proc/sys/kernel/osrelease"))?.trim().to_owned(),
        };
        let place = root.join(MODULE_ROOTS[0]);
        let modules = place.join(&release);
        let is_name = !release.contains('/') && !release.starts_with('.') && !release.is_empty();
        if !is_name || !modules.is_dir() {
            return Err(KernelError::NotInstalled { release, place: place.display().to_string() });
        }
        let kernel = Self::of_release(root, &modules, &root.display().to_string(), cache)?;
        Ok(Self { installed: true, ..kernel })
    }

    fn in_root(root: &Path, place: &str, cache: &Cache) -> Result<Self, KernelError> {
        let mut found: Vec<PathBuf> = Vec::new();
        let mut dirs = MODULE_ROOTS.map(|dir| root.join(dir)).to_vec();
        // Where /usr is merged, the first leads to the second.
        dirs.dedup_by_key(|dir| fs::canonicalize(dir).ok());
        for dir in dirs {
            if let Ok(entries) = fs::read_dir(&dir) {
                for entry in entries {
                    found.push(entry.map_err(context("list", &dir))?.path());
                }
            }
        }
        found.sort();
        match &found[..] {
            [modules] => Self::of_release(root, modules, place, cache),
            [] => Err(KernelError::NoModules { place: place.into() }),
            several => {
                let releases = several.iter().map(|p| file_name(p)).collect();
                Err(KernelError::Several { place: place.into(), releases })
            }
        }
    }

    fn of_release(root: &Path, modules: &Path, place: &str, cache: &Cache) -> Result<Self, KernelError> {
        let release = file_name(modules);
        let candidates = [root.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")];
        let Some(image) = candidates.into_iter().find(|path| path.is_file()) else {
            let modules = modules.strip_prefix(root).unwrap_or(modules).display().to_string();
            return Err(KernelError::NoImage { place: place.into(), release, modules });
        };
        let firmware = FIRMWARE_ROOTS.map(|dir| root.join(dir)).into_iter().filter(|d| d.is_dir()).collect();
        Ok(Self { image, modules: ModuleTree::open(modules, cache)?, firmware, installed: false })
    }

    /// The unpacked kernel, in the cache.
    ///
    /// # Errors
    /// When the image is damaged or no kernel.
    pub fn vmlinux(&self, cache: &Cache) -> Result<PathBuf, KernelError> {
        cached_vmlinux(&self.image, cache)
    }
}

/// Unpacks the kernel at `image` into the cache, once.
///
/// # Errors
/// When it is damaged or no kernel.
pub fn cached_vmlinux(image: &Path, cache: &Cache) -> Result<PathBuf, KernelError> {
    let key = cache.digest(image)?;
    cache.file("vmlinux", &key, || {
        let bytes = files::read(image)?;
        let vmlinux = vmlinux::unpack(&bytes).map_err(|source| KernelError::Vmlinux { path: image.into(), source })?;
        Ok(vmlinux.into_owned())
    })
}

/// What is taken from a package: kernel images, modules and firmware; no documentation, headers or debug symbols.
fn is_kernel_file(name: &str) -> bool {
    let name = name.strip_prefix("usr/").unwrap_or(name);
    name.starts_with("boot/vmlinuz") || name.starts_with("lib/modules/") || name.starts_with("lib/firmware/")
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::tests::package;
    use crate::elf;
    use crate::modinfo::tests::module;

    #[test]
    fn image_and_modules_may_come_in_two_packages() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        let (image, modules) = (dir.path().join("image.deb"), dir.path().join("modules.deb"));
        package(&image, &[("./boot/vmlinuz-6.1.0", &elf::tests::kernel(b"1"))], ".xz");
        package(
            &modules,
            &[
                ("./usr/lib/modules/6.1.0/modules.order", b"kernel/a.ko\n"),
                ("./usr/lib/modules/6.1.0/kernel/a.ko", &module(&["depends="])),
            ],
            ".zst",
        );
        let error = Kernel::from_debs(std::slice::from_ref(&image), &cache).unwrap_err();
        assert!(matches!(error, KernelError::NoModules { .. }), "{error}");
        let error = Kernel::from_debs(std::slice::from_ref(&modules), &cache).unwrap_err();
        assert!(matches!(error, KernelError::NoImage { .. }), "{error}");
        let kernel = Kernel::from_debs(&[image, modules], &cache).unwrap();
        assert_eq!(kernel.modules.load_order(&["a"]).unwrap(), ["a"]);
        assert_eq!(fs::read(kernel.vmlinux(&cache).unwrap()).unwrap(), elf::tests::kernel(b"1"));
    }

    #[test]
    fn an_installed_kernel_is_found_by_its_release() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        for release in ["6.1", "6.2"] {
            let modules = dir.path().join("lib/modules").join(release);
            fs::create_dir_all(modules.join("kernel")).unwrap();
            fs::write(modules.join("modules.order"), "").unwrap();
            fs::write(modules.join("vmlinuz"), elf::tests::kernel(b"1")).unwrap();
        }
        let kernel = Kernel::installed(dir.path(), Some("6.2"), &cache).unwrap();
        assert_eq!((kernel.modules.release(), kernel.installed), ("6.2", true));
        for release in ["6.3", "", "..", "6.2/kernel"] {
            let error = Kernel::installed(dir.path(), Some(release), &cache).unwrap_err();
            assert!(matches!(error, KernelError::NotInstalled { .. }), "{release}: {error}");
        }
    }

    #[test]
    fn a_root_whose_lib_is_a_link_to_usr_lib_holds_one_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let modules = dir.path().join("usr/lib/modules/6.1");
        fs::create_dir_all(modules.join("kernel")).unwrap();
        std::os::unix::fs::symlink("usr/lib", dir.path().join("lib")).unwrap();
        fs::write(modules.join("modules.order"), "").unwrap();
        fs::write(modules.join("vmlinuz"), elf::tests::kernel(b"1")).unwrap();
        let kernel = Kernel::from_dir(dir.path(), &Cache::at(dir.path().join("cache"))).unwrap();
        assert_eq!(kernel.modules.release(), "6.1");
    }

    #[test]
    fn several_kernels_are_named() {
        let dir = tempfile::tempdir().unwrap();
        for release in ["6.1", "6.2"] {
            fs::create_dir_all(dir.path().join("lib/modules").join(release)).unwrap();
        }
        let error = Kernel::from_dir(dir.path(), &Cache::at(dir.path())).unwrap_err().to_string();
        assert!(error.contains("(6.1, 6.2)"), "{error}");
    }
}
