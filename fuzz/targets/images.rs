//! Files of kernels and packages: whatever they hold, unpacking ends, within its limit, with a result or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_guest_images::modules::ModuleTree;
use umbra_guest_images::{deb, decompress, elf, vmlinux};

/// Largest result of unpacking that is allowed here.
const LIMIT: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 5 {
        0 => drop(vmlinux::unpack(data)),
        1 => {
            let stripped = elf::without_symbols(data.to_vec());
            assert!(stripped.len() <= data.len());
        }
        2 => {
            if let Ok(unpacked) = decompress::decompress_any(data.to_vec(), LIMIT) {
                assert!(unpacked.len() <= LIMIT.max(data.len()));
            }
        }
        3 => drop(ModuleTree::firmware_of(data)),
        _ => {
            let Ok(folder) = tempfile::tempdir() else { return };
            let (package, out) = (folder.path().join("a.deb"), folder.path().join("out"));
            if std::fs::write(&package, data).is_ok() && std::fs::create_dir(&out).is_ok() {
                let _ = deb::extract(&[package], &out, |_| true);
                let entries = std::fs::read_dir(folder.path()).map_or(0, Iterator::count);
                assert_eq!(entries, 2, "something was unpacked beside its folder");
            }
        }
    }
});
