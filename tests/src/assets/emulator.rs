//! QEMU for an emulated test host: the installed program with one fault of its nested virtualisation mended.
//!
//! When a hypervisor has an interrupt injected (`EVENTINJ`), QEMU's `VMRUN` (`helper_vmrun` in
//! `target/i386/tcg/system/svm_helper.c`, 10.0 at least) notes the vector in the virtual CPU's `exception_index`, delivers
//! it, and leaves the note behind. If another thread asks that CPU to leave its loop before the guest exits (a memory
//! region changes, as when a BAR is switched on), the loop takes the note for an exception under way and delivers the
//! same vector once more, even to a guest that has its interrupts switched off. A Linux guest that gets its timer
//! interrupt a second time while it holds the lock of its timers waits for that lock for ever: seen in one of two
//! demonstrations of a few dozen crashes, never since the note is gone.
//!
//! The bench therefore runs a copy of the program in which that one store is replaced by a no-operation. Where the place is
//! not found exactly once (another QEMU, another compiler), it runs the program as it is.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection, ObjectSymbol};
use umbra_guest_images::cache::Cache;
use umbra_guest_images::files;

use super::AssetError;

/// The function with the fault.
const FUNCTION: &str = "helper_vmrun";

/// The statements for `SVM_EVTINJ_TYPE_INTR`, as x86-64 code: `exception_index = vector`, `exception_is_int = 0`,
/// `exception_next_eip = -1`. `None` stands for any byte of a field's offset.
#[rustfmt::skip]
const STORES: [Option<u8>; 27] = [
    Some(0x89), Some(0xb3), None, None, Some(0xff), Some(0xff), // mov %esi, -off(%rbx)
    Some(0xc7), Some(0x83), None, None, Some(0), Some(0), Some(0), Some(0), Some(0), Some(0), // movl $0, off(%rbx)
    Some(0x48), Some(0xc7), Some(0x83), None, None, Some(0), Some(0), // movq $-1, off(%rbx)
    Some(0xff), Some(0xff), Some(0xff), Some(0xff),
];

/// A no-operation as long as the first of [`STORES`] (Intel SDM, `NOP`).
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The program to emulate with: a mended copy of `qemu` in the cache, or `qemu` itself.
pub(super) fn mended(qemu: &Path, cache: &Cache) -> Result<PathBuf, AssetError> {
    let name = qemu.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Beside no program of that name: whether it can be mended is found out once.
    let dir = cache.dir("emulators", &cache.digest(qemu)?, |dir| {
        let program = std::fs::read(qemu).map_err(|e| AssetError::file("read", qemu, e))?;
        let Some(mended) = mend(program) else { return Ok(()) };
        let copy = dir.join(&name);
        files::write_atomically(&copy, &mended)?;
        let runs = Permissions::from_mode(0o755);
        std::fs::set_permissions(&copy, runs).map_err(|e| AssetError::file("make executable", &copy, e))
    })?;
    let copy = dir.join(&name);
    Ok(if copy.is_file() { copy } else { qemu.into() })
}

/// `program` without the store, if it is where it is expected.
fn mend(mut program: Vec<u8>) -> Option<Vec<u8>> {
    let at = place(&program)?;
    program[at..at + NOTHING.len()].copy_from_slice(&NOTHING);
    Some(program)
}

/// Where in the file the store is.
fn place(program: &[u8]) -> Option<usize> {
    let file = object::File::parse(program).ok()?;
    let function = file.dynamic_symbols().find(|symbol| symbol.name() == Ok(FUNCTION))?;
    let section = file.section_by_index(function.section_index()?).ok()?;
    let (offset, _) = section.file_range()?;
    let start = usize::try_from(function.address() - section.address() + offset).ok()?;
    let code = program.get(start..start.checked_add(usize::try_from(function.size()).ok()?)?)?;
    store_in(code).map(|at| start + at)
}

/// Where in the function's code the store is.
fn store_in(code: &[u8]) -> Option<usize> {
    let fits = |(byte, wanted): (&u8, Option<u8>)| wanted.is_none_or(|wanted| wanted == *byte);
    let mut places = code.windows(STORES.len()).enumerate().filter(|(_, window)| window.iter().zip(STORES).all(fits));
    let (at, _) = places.next()?;
    places.next().is_none().then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in Debian's QEMU 10.0.2.
    const CODE: [u8; 29] = [
        0x90, 0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff, 0xc7, 0x83, 0xe4, 0x33, 0, 0, 0, 0, 0, 0, 0x48, 0xc7, 0x83, 0xe8,
        0x33, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x90,
    ];

    #[test]
    fn the_store_is_found_where_it_stands_once() {
        assert_eq!(store_in(&CODE), Some(1));
        assert_eq!(store_in(&[CODE, CODE].concat()), None);
        assert_eq!(store_in(&CODE[2..]), None);
        let mut mended = CODE;
        mended[1..7].copy_from_slice(&NOTHING);
        assert_eq!(store_in(&mended), None, "the second time there is nothing to mend");
    }

    #[test]
    fn what_is_no_qemu_is_left_alone() {
        assert_eq!(mend(b"no program".to_vec()), None);
        let this = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(mend(this), None);
    }
}
