//! The initramfs archives of the test host and of guests, made once for the same contents.

use std::path::{Path, PathBuf};

use umbra_guest_images::cache::{Cache, sha256};
use umbra_guest_images::initramfs::{Initramfs, InitramfsError};
use umbra_guest_images::kernel::Kernel;
use umbra_guest_images::modinfo::Modinfo;
use umbra_guest_images::modules::ModuleTree;

use super::AssetError;

/// In the test host: what its init loads, and what scripts may want. Those that the kernel lacks are left out.
const HOST_MODULES: &[&str] = &[
    "9p",
    "9pnet_virtio",
    "kvm_amd",
    "kvm_intel",
    "vfio_iommu_type1",
    "vfio_pci",
    "tun",
    "bridge",
    "veth",
    "vhost_net",
    "aer_inject",
    "e1000",
    "e1000e",
    "igb",
    "8139cp",
    "pcnet32",
    "virtio_net",
    "virtio_blk",
    "nvme",
    "ahci",
    "sd_mod",
    "ext4",
    "crc32c_generic",
    "loop",
    "configfs",
    "null_blk",
    "snd_ens1370",
    "snd_intel8x0",
    "snd_hda_intel",
    "snd_hda_codec_generic",
];

/// In guests: virtio, NICs, sound cards and disk controllers for when one is passed straight through, the power button, and what a guest
/// joins networks by.
const GUEST_MODULES: &[&str] = &[
    "virtio_net",
    "virtio_blk",
    "virtio_rng",
    "virtio_console",
    "virtio_snd",
    "e1000",
    "e1000e",
    "igb",
    "8139cp",
    "nvme",
    "ahci",
    "sd_mod",
    "ext4",
    "crc32c_generic",
    "button",
    "evdev",
    "bridge",
    "veth",
    "snd_ens1370",
    "snd_intel8x0",
    "snd_hda_intel",
    "snd_hda_codec_generic",
];

/// What an archive is made of.
pub(super) struct Recipe<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) busybox: &'a Path,
    pub(super) probe: &'a Path,
    pub(super) cache: &'a Cache,
}

impl Recipe<'_> {
    /// The test host's.
    pub(super) fn host(&self) -> Result<PathBuf, AssetError> {
        let files =
            [("init", 0o755, include_str!("host-init.sh")), ("etc/umbra/bench.sh", 0o644, include_str!("bench.sh"))];
        self.make("test-host", HOST_MODULES, &files)
    }

    /// A guest's.
    pub(super) fn guest(&self) -> Result<PathBuf, AssetError> {
        let files = [
            ("init", 0o755, include_str!("guest-init.sh")),
            ("bin/await", 0o755, include_str!("guest-await.sh")),
            ("bin/dhcp-bound", 0o755, include_str!("dhcp-bound.sh")),
        ];
        self.make("guest", GUEST_MODULES, &files)
    }

    fn make(&self, kind: &str, modules: &[&str], files: &[(&str, u32, &str)]) -> Result<PathBuf, AssetError> {
        let made_of = [
            kind,
            self.kernel.modules.release(),
            &self.cache.digest(&self.kernel.image)?,
            &self.cache.digest(self.busybox)?,
            &self.cache.digest(self.probe)?,
            &modules.join(" "),
            &files.iter().map(|(name, _, text)| format!("{name}\n{text}")).collect::<String>(),
        ];
        let key = format!("{kind}-{}.cpio", &sha256(made_of.join("\n").as_bytes())[..24]);
        self.cache.file("initramfs", &key, || self.build(modules, files))
    }

    fn build(&self, modules: &[&str], files: &[(&str, u32, &str)]) -> Result<Vec<u8>, AssetError> {
        let tree = &self.kernel.modules;
        let mut archive = Initramfs::new();
        archive.add_busybox(self.busybox)?;
        archive.add_host_file(self.probe, "bin/umbra-probe")?;
        let names: Vec<_> = modules.iter().filter(|name| tree.has(name)).collect();
        archive.add_modules(tree, &names)?;
        self.index(&mut archive, &names)?;
        for (name, mode, text) in files {
            archive.add_file(name, *mode, *text);
        }
        Ok(archive.to_bytes()?)
    }

    /// What `modprobe` reads: dependencies, and aliases of devices.
    fn index(&self, archive: &mut Initramfs, names: &[&&str]) -> Result<(), InitramfsError> {
        let tree = &self.kernel.modules;
        let (mut dependencies, mut aliases) = (String::new(), String::new());
        for name in tree.load_order(names)? {
            let mut needs = tree.load_order(&[&name])?;
            // The last to be loaded comes first; soft dependencies behind the module itself are none of modprobe's.
            needs.truncate(needs.iter().position(|n| *n == name).unwrap_or(0));
            needs.reverse();
            let files: Vec<_> = needs.iter().map(|n| format!("{n}.ko")).collect();
            dependencies.push_str(&format!("{name}.ko: {}\n", files.join(" ")));
            aliases.push_str(&alias_lines(tree, &name)?);
        }
        let dir = format!("lib/modules/{}", tree.release());
        archive.add_file(&format!("{dir}/modules.dep"), 0o644, dependencies);
        archive.add_file(&format!("{dir}/modules.alias"), 0o644, aliases);
        Ok(())
    }
}

fn alias_lines(tree: &ModuleTree, name: &str) -> Result<String, InitramfsError> {
    let info = Modinfo::of_module(&tree.read(name)?);
    let lines = info.iter().flat_map(|info| info.all("alias")).map(|alias| format!("alias {alias} {name}\n"));
    Ok(lines.collect())
}
