//! A small tree made by the test itself, with and without `depmod`'s files, and the real package where
//! `UMBRA_TEST_KERNEL_DEB` names one.

use std::fs;
use std::io::Write;

use super::*;
use crate::modinfo::tests::module;

const NIC: &str = "pci:v00008086d000010D3sv00008086sd0000A01Fbc02sc00i00";

fn packed(extension: &str, data: &[u8]) -> Vec<u8> {
    match extension {
        ".xz" => liblzma::encode_all(data, 1).unwrap(),
        ".zst" => zstd::encode_all(data, 1).unwrap(),
        ".gz" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        _ => data.to_vec(),
    }
}

/// nic needs phy-lib (softly: realtek) and, through it, fixed (built in); broken needs what is not there.
fn tree(dir: &Path) -> PathBuf {
    let tree = dir.join("6.1.0-test");
    let files: [(&str, &str, &[&str]); 5] = [
        (
            "kernel/net/nic.ko",
            ".xz",
            &[
                "alias=pci:v00008086d000010D3sv*sd*bc*sc*i*",
                "depends=phy-lib",
                "softdep=pre: realtek gone post: late",
                "firmware=nic/a.bin",
                "firmware=nic/b.bin",
            ],
        ),
        ("kernel/net/phy-lib.ko", ".zst", &["depends=fixed"]),
        ("kernel/net/realtek.ko", ".gz", &["depends=phy-lib"]),
        ("kernel/net/late.ko", "", &["depends=nic"]),
        ("kernel/net/broken.ko", "", &["depends=nowhere"]),
    ];
    for (path, extension, info) in files {
        let path = tree.join(format!("{path}{extension}"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, packed(extension, &module(info))).unwrap();
    }
    fs::write(tree.join("modules.builtin"), "kernel/drivers/fixed.ko\nkernel/drivers/virtio-pci.ko\n").unwrap();
    fs::write(tree.join("modules.builtin.modinfo"), b"virtio_pci.alias=pci:v00001AF4d*sv*\0fixed.license=GPL\0")
        .unwrap();
    fs::write(tree.join("modules.order"), "").unwrap();
    tree
}

fn depmod_files(tree: &Path) {
    fs::write(
        tree.join("modules.dep"),
        "kernel/net/nic.ko.xz: kernel/net/phy-lib.ko.zst\nkernel/net/phy-lib.ko.zst:\n\
         kernel/net/realtek.ko.gz: kernel/net/phy-lib.ko.zst\nkernel/net/late.ko: kernel/net/nic.ko.xz kernel/net/phy-lib.ko.zst\n",
    )
    .unwrap();
    fs::write(tree.join("modules.alias"), "# comment\nalias pci:v00008086d000010D3sv*sd*bc*sc*i* nic\n").unwrap();
    fs::write(tree.join("modules.softdep"), "softdep nic pre: realtek gone post: late\n").unwrap();
}

fn expect_nic(tree: &ModuleTree) {
    assert_eq!(tree.release(), "6.1.0-test");
    assert_eq!(tree.drivers_for(NIC), [DriverName { name: "nic".into(), builtin: false }]);
    assert_eq!(tree.load_order(&["nic"]).unwrap(), ["phy_lib", "realtek", "nic", "late"]);
    assert_eq!(ModuleTree::firmware_of(&tree.read("nic").unwrap()), ["nic/a.bin", "nic/b.bin"]);
}

#[test]
fn a_tree_without_depmod_files_is_asked_module_by_module() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("cache"));
    let place = tree(dir.path());
    expect_nic(&ModuleTree::open(&place, &cache).unwrap());
    expect_nic(&ModuleTree::open(&place, &cache).unwrap()); // from the cache
}

#[test]
fn a_tree_with_depmod_files_says_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let place = tree(dir.path());
    depmod_files(&place);
    expect_nic(&ModuleTree::open(&place, &Cache::at(dir.path().join("cache"))).unwrap());
    assert!(!dir.path().join("cache").exists());
}

#[test]
fn a_module_elsewhere_is_none_of_the_tree() {
    let dir = tempfile::tempdir().unwrap();
    let place = tree(dir.path());
    let secret = dir.path().join("secret.ko");
    fs::write(&secret, "of the host").unwrap();
    fs::write(
        place.join("modules.dep"),
        format!("{}:\n../secret.ko:\nkernel/../../secret.ko:\nkernel/net/late.ko:\n", secret.display()),
    )
    .unwrap();
    let tree = ModuleTree::open(&place, &Cache::at(dir.path().join("cache"))).unwrap();
    assert!(!tree.has("secret") && tree.has("late"));
}

#[test]
fn built_in_drivers_are_found_and_need_no_loading() {
    let dir = tempfile::tempdir().unwrap();
    let tree = ModuleTree::open(&tree(dir.path()), &Cache::at(dir.path().join("cache"))).unwrap();
    let virtio = DriverName { name: "virtio_pci".into(), builtin: true };
    assert_eq!(tree.drivers_for("pci:v00001AF4d00001041sv0"), [virtio]);
    assert_eq!(tree.load_order(&["virtio-pci"]).unwrap(), Vec::<String>::new());
}

#[test]
fn a_missing_module_is_named_with_who_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let tree = ModuleTree::open(&tree(dir.path()), &Cache::at(dir.path().join("cache"))).unwrap();
    let error = tree.load_order(&["broken"]).unwrap_err().to_string();
    assert_eq!(error, "kernel 6.1.0-test has no module \"nowhere\", which broken depends on");
    let error = tree.load_order(&["zz9"]).unwrap_err().to_string();
    assert_eq!(error, "kernel 6.1.0-test has no module \"zz9\"");
}

#[test]
fn damage_and_foreign_folders_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("cache"));
    assert!(matches!(ModuleTree::open(dir.path(), &cache), Err(ModulesError::NoTree(_))));
    let place = tree(dir.path());
    fs::write(place.join("kernel/net/late.ko"), "no module").unwrap();
    let error = ModuleTree::open(&place, &cache).unwrap_err().to_string();
    assert!(error.ends_with("late.ko is damaged"), "{error}");
}

#[test]
#[ignore = "needs UMBRA_TEST_KERNEL_DEB, a kernel package; the bench builds images from one in every run"]
fn the_real_package_gives_its_drivers() {
    let deb = std::env::var_os("UMBRA_TEST_KERNEL_DEB").expect("UMBRA_TEST_KERNEL_DEB names a kernel package");
    let kernel = crate::kernel::Kernel::from_debs(&[deb.into()], &Cache::of_user()).unwrap();
    let tree = &kernel.modules;
    assert!(tree.drivers_for(NIC).contains(&DriverName { name: "e1000e".into(), builtin: false }));
    let realtek = tree.drivers_for("pci:v000010ECd00008139sv00001AF4sd00001100bc02sc00i00");
    assert_eq!(realtek.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["8139cp", "8139too"]);
    assert_eq!(tree.load_order(&["virtio_net"]).unwrap(), ["failover", "net_failover", "virtio_net"]);
    let order = tree.load_order(&["snd_hda_intel", "igb"]).unwrap();
    assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), order.len());
}
