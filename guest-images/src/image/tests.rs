//! Images built from a small kernel folder made by the test itself.

use super::*;
use crate::modinfo::tests::module;

const NIC: &str = "pci:v00008086d000010D3sv*sd*bc*sc*i*";

fn kernel_dir(root: &Path) {
    let tree = root.join("lib/modules/6.1.0");
    fs::create_dir_all(tree.join("kernel")).unwrap();
    fs::create_dir_all(root.join("boot")).unwrap();
    fs::create_dir_all(root.join("lib/firmware/nic")).unwrap();
    fs::write(root.join("boot/vmlinuz-6.1.0"), crate::elf::tests::kernel(b"1")).unwrap();
    fs::write(root.join("lib/firmware/nic/a.bin.xz"), liblzma::encode_all(&b"firmware"[..], 1).unwrap()).unwrap();
    fs::write(tree.join("modules.order"), "").unwrap();
    fs::write(tree.join("modules.builtin"), "kernel/virtio_pci.ko\nkernel/virtio_console.ko\n").unwrap();
    let alias = format!("alias={NIC}");
    let nic = ["depends=lib", &alias, "firmware=nic/a.bin", "firmware=nic/gone.bin", "firmware=../../../etc/passwd"];
    fs::write(tree.join("kernel/nic.ko"), module(&nic)).unwrap();
    for name in ["lib", "virtio_net", "sch_ingress", "cls_matchall", "act_mirred", "bridge", "pvpanic", "vmgenid"] {
        fs::write(tree.join(format!("kernel/{name}.ko")), module(&["depends="])).unwrap();
    }
}

/// Adds drivers of disks and their controllers: path below `kernel`, what they depend on.
fn add_disk_drivers(root: &Path) {
    let kernel = root.join("lib/modules/6.1.0/kernel");
    let drivers = [
        ("drivers/nvme/host/nvme", "nvme-core"),
        ("drivers/nvme/host/nvme-core", ""),
        ("drivers/ata/ahci", "scsi_mod"),
        ("drivers/scsi/scsi_mod", ""),
        ("drivers/scsi/sd_mod", "scsi_mod"),
        ("drivers/usb/host/xhci-pci", ""),
        ("drivers/usb/storage/usb-storage", "scsi_mod"),
        ("drivers/usb/storage/uas", "usb-storage"),
        ("drivers/mmc/host/sdhci-pci", "mmc_core"),
        ("drivers/mmc/core/mmc_core", ""),
        ("drivers/mmc/core/mmc_block", "mmc_core"),
        ("drivers/block/virtio_blk", ""),
    ];
    for (path, depends) in drivers {
        let path = kernel.join(format!("{path}.ko"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, module(&[&format!("depends={depends}")])).unwrap();
    }
}

fn recipe(dir: &Path) -> (Recipe, Cache) {
    let root = dir.join("root");
    kernel_dir(&root);
    fs::write(dir.join("agent"), "agent").unwrap();
    let cache = Cache::at(dir.join("cache"));
    let kernel = Kernel::from_dir(&root, &cache).unwrap();
    let device = Device { name: "0000:01:00.0".into(), modalias: NIC.replace('*', "0") };
    let recipe = Recipe {
        kernel,
        drivers: vec![],
        devices: vec![device],
        agent: dir.join("agent"),
        sound: None,
        firmware: vec![],
    };
    (recipe, cache)
}

#[test]
fn a_device_gets_its_driver_with_dependencies_and_firmware() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, cache) = recipe(dir.path());
    let image = recipe.build(&dir.path().join("out"), &cache).unwrap();
    let manifest = &image.manifest;
    assert_eq!(manifest.drivers, ["nic"]);
    let names: Vec<_> = manifest.modules.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names[..3], ["lib", "nic", "virtio_net"]);
    assert!(names.contains(&"pvpanic") && names.contains(&"vmgenid") && !names.contains(&"virtio_pci"));
    assert_eq!(manifest.firmware, ["nic/a.bin"]);
    assert_eq!(manifest.firmware_missing, ["nic/gone.bin", "../../../etc/passwd"]);
    let archive = fs::read(&image.initramfs).unwrap();
    assert_eq!(sha256(&archive), manifest.initramfs.sha256);
    let holds = |text: &str| archive.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(holds("/lib/modules/6.1.0/lib.ko\n/lib/modules/6.1.0/nic.ko\n"));
    assert!(holds("lib/firmware/nic/a.bin\0") && holds("firmware"));
}

#[test]
fn the_same_recipe_is_not_built_twice_and_a_changed_one_is() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let (recipe, cache) = recipe(dir.path());
    let out = dir.path().join("out");
    let inode = || fs::metadata(&out).unwrap().ino();
    recipe.build(&out, &cache).unwrap();
    let first = inode();
    recipe.build(&out, &cache).unwrap();
    assert_eq!(inode(), first);
    fs::write(&recipe.agent, "another agent").unwrap();
    recipe.build(&out, &cache).unwrap();
    assert_ne!(inode(), first);
}

#[test]
fn a_foreign_folder_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, cache) = recipe(dir.path());
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.txt"), "").unwrap();
    assert!(matches!(recipe.build(&out, &cache), Err(ImageError::NotAnImage(_))));
    assert!(out.join("thesis.txt").exists());
}

#[test]
fn a_device_without_driver_and_a_broken_image_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, cache) = recipe(dir.path());
    let out = dir.path().join("out");
    let image = recipe.build(&out, &cache).unwrap();
    fs::write(image.vmlinux, "short").unwrap();
    let error = Image::open(&out).unwrap_err().to_string();
    assert!(error.contains("vmlinux has 5 bytes") && error.contains("build it again"), "{error}");
    recipe.build(&out, &cache).unwrap(); // a broken image is replaced
    recipe.devices[0].modalias = "pci:v00001234".into();
    assert!(matches!(recipe.build(&out, &cache), Err(ImageError::NoDriver { .. })));
}

#[test]
fn a_controller_of_disks_gets_the_drivers_of_what_is_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    add_disk_drivers(&dir.path().join("root"));
    let (mut recipe, cache) = recipe(dir.path());
    recipe.devices.clear();
    let expected: [(&[&str], &[&str], &str); 6] = [
        (&["nvme"], &["nvme_core", "nvme"], "nvme_core multipath=N\n"),
        (&["ahci"], &["scsi_mod", "sd_mod", "ahci"], ""),
        (&["xhci-pci"], &["scsi_mod", "sd_mod", "usb_storage", "uas", "xhci_pci"], "usb_storage delay_use=0\n"),
        (&["sdhci-pci"], &["mmc_core", "mmc_block", "sdhci_pci"], ""),
        (&["virtio_pci", "virtio_blk"], &["virtio_blk"], ""),
        (&["ahci", "nvme"], &["scsi_mod", "sd_mod", "ahci", "nvme_core", "nvme"], "nvme_core multipath=N\n"),
    ];
    for (drivers, modules, parameters) in expected {
        recipe.drivers = drivers.iter().map(|driver| (*driver).to_owned()).collect();
        let image = recipe.build(&dir.path().join("out"), &cache).unwrap();
        let names: Vec<_> = image.manifest.modules.iter().map(|module| &module.name[..]).collect();
        let (of_drivers, of_link) = names.split_at(modules.len());
        assert_eq!(of_drivers, modules, "{drivers:?}");
        assert_eq!(of_link, ["pvpanic", "vmgenid"], "no module of a network");
        let archive = fs::read(&image.initramfs).unwrap();
        let text = format!("{PARAMETERS}\0");
        let name = archive.windows(text.len()).position(|w| w == text.as_bytes()).expect("there are parameters");
        assert!(
            archive[name + text.len()..][..64].windows(parameters.len().max(1)).any(|w| w == parameters.as_bytes())
                || parameters.is_empty()
        );
    }
    // One that is there for something else makes it no image for disks.
    recipe.drivers = vec!["nic".into(), "xhci-pci".into()];
    let image = recipe.build(&dir.path().join("out"), &cache).unwrap();
    assert!(image.manifest.modules.iter().any(|module| module.name == "bridge"));
    assert!(!image.manifest.modules.iter().any(|module| module.name == "usb_storage"));
}

#[test]
fn a_virtio_disk_gets_the_driver_behind_its_transport() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    add_disk_drivers(&root);
    let (mut recipe, cache) = recipe(dir.path());
    let info = b"virtio_pci.alias=pci:v00001AF4d*sv*sd*bc*sc*i*\0";
    fs::write(root.join("lib/modules/6.1.0/modules.builtin.modinfo"), info).unwrap();
    recipe.kernel = Kernel::from_dir(&root, &cache).unwrap();
    recipe.devices[0].modalias = "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00".into();
    let image = recipe.build(&dir.path().join("out"), &cache).unwrap();
    assert_eq!(image.manifest.drivers, ["virtio_pci", "virtio_blk"]);
    assert_eq!(image.manifest.modules[0].name, "virtio_blk");
}

#[test]
fn an_image_of_the_system_s_kernel_says_what_it_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, cache) = recipe(dir.path());
    let out = dir.path().join("out");
    assert_eq!(recipe.build(&out, &cache).unwrap().manifest.follows, None, "the kernel is of a folder");
    recipe.kernel = Kernel::installed(&dir.path().join("root"), Some("6.1.0"), &cache).unwrap();
    recipe.drivers = vec!["lib".into()];
    recipe.firmware = vec!["/lib/firmware".into()];
    recipe.build(&out, &cache).unwrap();
    let follows = Follows { drivers: vec!["lib".into()], firmware: vec!["/lib/firmware".into()] };
    assert_eq!(Image::open(&out).unwrap().manifest.follows, Some(follows), "not the drivers that were looked up");
}

/// As Linux 6.17 has them: a module for each family of codecs, and what they share.
#[test]
fn a_sound_card_gets_every_driver_of_a_codec_with_what_it_needs() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, cache) = recipe(dir.path());
    let tree = dir.path().join("root/lib/modules/6.1.0");
    let dep = "\
        kernel/sound/core/snd.ko:\n\
        kernel/sound/hda/common/snd-hda-codec.ko: kernel/sound/core/snd.ko\n\
        kernel/sound/hda/controllers/snd-hda-intel.ko: kernel/sound/hda/common/snd-hda-codec.ko kernel/sound/core/snd.ko\n\
        kernel/sound/hda/codecs/realtek/snd-hda-codec-alc269.ko: kernel/sound/hda/codecs/realtek/snd-hda-codec-realtek-lib.ko\n\
        kernel/sound/hda/codecs/realtek/snd-hda-codec-realtek-lib.ko:\n\
        kernel/sound/hda/codecs/hdmi/snd-hda-codec-nvhdmi.ko:\n\
        kernel/sound/hda/codecs/side-codecs/snd-hda-scodec.ko:\n\
        kernel/sound/soc/codecs/snd-soc-hdac-hdmi.ko:\n";
    for path in dep.lines().filter_map(|line| line.split(':').next()) {
        fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
        fs::write(tree.join(path), module(&["depends="])).unwrap();
    }
    fs::write(tree.join("modules.dep"), dep).unwrap();
    let aliases = "\
        alias hdaudio:v10EC0269r*a01* snd_hda_codec_alc269\n\
        alias hdaudio:v10DE0040r*a01* snd_hda_codec_nvhdmi\n\
        alias hdaudio:v80862809r*a02* snd_soc_hdac_hdmi\n";
    fs::write(tree.join("modules.alias"), aliases).unwrap();
    fs::write(tree.join("modules.softdep"), "softdep snd_hda_codec_alc269 post: snd-hda-scodec\n").unwrap();
    recipe.kernel = Kernel::from_dir(&dir.path().join("root"), &cache).unwrap();
    recipe.sound = Some(dir.path().join("root/boot/vmlinuz-6.1.0"));
    (recipe.devices, recipe.drivers) = (vec![], vec!["snd_hda_intel".into()]);
    let manifest = recipe.build(&dir.path().join("out"), &cache).unwrap().manifest;
    let names: Vec<_> = manifest.modules.iter().map(|m| m.name.as_str()).collect();
    let codecs = ["snd_hda_codec_realtek_lib", "snd_hda_codec_alc269", "snd_hda_scodec", "snd_hda_codec_nvhdmi", "snd"];
    assert_eq!(names, [&codecs[..], &["snd_hda_codec", "snd_hda_intel"]].concat());
}
