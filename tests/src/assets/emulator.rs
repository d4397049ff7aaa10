//! QEMU for an emulated test host: the installed program with two faults of its nested virtualisation mended. Both are in
//! QEMU 10.0 at least; either let one of two demonstrations of a few dozen crashes stand still.
//!
//! - Of all processors, also of those that know no `FERR#`, each `XRSTOR` and `FXRSTOR` (so: each switch of tasks) takes
//!   `IGNNE#` back for the *first* virtual CPU (`cpu_clear_ignne` in `target/i386/tcg/system/fpu_helper.c`), by a read and a
//!   write of that CPU's `hflags2` in another thread, with no lock. What the first CPU changes in between is lost: its
//!   `VMRUN` and `#VMEXIT` keep there whether nested paging and interrupts are on. Seen: a `#VMEXIT` after which nested
//!   paging stayed on, so that the hypervisor's own state was stored for the guest's. Only a guest that writes to port 0xf0
//!   sets `IGNNE#`; none of this century does, so the clearing is left out.
//! - When a hypervisor has an interrupt injected (`EVENTINJ`), `VMRUN` (`helper_vmrun` in
//!   `target/i386/tcg/system/svm_helper.c`) notes the vector in the virtual CPU's `exception_index`, delivers it, and leaves
//!   the note behind. If another thread asks that CPU to leave its loop before the guest exits (a memory region changes, as
//!   when a BAR is switched on), the loop takes the note for an exception under way and delivers the same vector once more,
//!   even to a guest that has its interrupts switched off. A Linux guest that gets its timer interrupt a second time while
//!   it holds the lock of its timers waits for that lock for ever. The note is left out.
//!
//! The bench therefore runs a copy of the program in which these two instructions are no-operations. Where one is not found
//! exactly once (another QEMU, another compiler), it stays as it is.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use object::{File, Object, ObjectSection, ObjectSymbol};
use umbra_guest_images::cache::Cache;
use umbra_guest_images::files;

use super::AssetError;

/// Counts the changes of [`MENDS`], so that the cache holds the copy that is meant.
const REVISION: u32 = 2;

/// An instruction to be left out.
struct Mend {
    /// The function that it is in.
    function: &'static str,
    /// It and what follows, as x86-64 code; `None` stands for any byte of a field's offset.
    code: &'static [Option<u8>],
    /// A no-operation of its length (Intel SDM, `NOP`).
    nothing: &'static [u8],
}

const MENDS: [Mend; 2] = [
    // env->hflags2 &= ~HF2_IGNNE_MASK
    Mend {
        function: "cpu_clear_ignne",
        code: &[Some(0x81), Some(0xa0), None, None, Some(0), Some(0), Some(0x7f), Some(0xff), Some(0xff), Some(0xff)],
        nothing: &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
    },
    // SVM_EVTINJ_TYPE_INTR: exception_index = vector; then exception_is_int = 0, exception_next_eip = -1
    Mend {
        function: "helper_vmrun",
        #[rustfmt::skip]
        code: &[
            Some(0x89), Some(0xb3), None, None, Some(0xff), Some(0xff), // mov %esi, -off(%rbx)
            Some(0xc7), Some(0x83), None, None, Some(0), Some(0), Some(0), Some(0), Some(0), Some(0), // movl $0, off(%rbx)
            Some(0x48), Some(0xc7), Some(0x83), None, None, Some(0), Some(0), // movq $-1, off(%rbx)
            Some(0xff), Some(0xff), Some(0xff), Some(0xff),
        ],
        nothing: &[0x66, 0x0f, 0x1f, 0x44, 0, 0],
    },
];

/// The program to emulate with: a mended copy of `qemu` in the cache, or `qemu` itself.
pub(super) fn mended(qemu: &Path, cache: &Cache) -> Result<PathBuf, AssetError> {
    let name = qemu.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let key = format!("{}-{REVISION}", cache.digest(qemu)?);
    // Beside no program of that name: whether it can be mended is found out once.
    let dir = cache.dir("emulators", &key, |dir| {
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

/// `program` without the instructions of [`MENDS`], as far as they are where they are expected.
fn mend(mut program: Vec<u8>) -> Option<Vec<u8>> {
    let places: Vec<_> = {
        let file = File::parse(&*program).ok()?;
        MENDS.iter().filter_map(|mend| Some((mend.place(&file, &program)?, mend.nothing))).collect()
    };
    for (at, nothing) in &places {
        program[*at..at + nothing.len()].copy_from_slice(nothing);
    }
    (!places.is_empty()).then_some(program)
}

impl Mend {
    /// Where in `program` the instruction is.
    fn place(&self, file: &File<'_>, program: &[u8]) -> Option<usize> {
        let function = file.dynamic_symbols().find(|symbol| symbol.name() == Ok(self.function))?;
        let section = file.section_by_index(function.section_index()?).ok()?;
        let (offset, _) = section.file_range()?;
        let start = usize::try_from(function.address() - section.address() + offset).ok()?;
        let code = program.get(start..start.checked_add(usize::try_from(function.size()).ok()?)?)?;
        self.place_in(code).map(|at| start + at)
    }

    /// Where in the function's code the instruction is.
    fn place_in(&self, code: &[u8]) -> Option<usize> {
        let fits = |(byte, wanted): (&u8, &Option<u8>)| wanted.is_none_or(|wanted| wanted == *byte);
        let mut places =
            code.windows(self.code.len()).enumerate().filter(|(_, window)| window.iter().zip(self.code).all(fits));
        let (at, _) = places.next()?;
        places.next().is_none().then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in Debian's QEMU 10.0.2, between two bytes of others.
    const CODES: [&[u8]; 2] = [
        &[0x90, 0x81, 0xa0, 0x74, 0x2c, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0x90],
        &[
            0x90, 0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff, 0xc7, 0x83, 0xe4, 0x33, 0, 0, 0, 0, 0, 0, 0x48, 0xc7, 0x83, 0xe8,
            0x33, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x90,
        ],
    ];

    #[test]
    fn an_instruction_is_found_where_it_stands_once() {
        for (mend, code) in MENDS.iter().zip(CODES) {
            assert_eq!(mend.place_in(code), Some(1));
            assert_eq!(mend.place_in(&[code, code].concat()), None);
            assert_eq!(mend.place_in(&code[2..]), None);
            let mut mended = code.to_vec();
            mended[1..=mend.nothing.len()].copy_from_slice(mend.nothing);
            assert_eq!(mend.place_in(&mended), None, "the second time there is nothing to mend");
        }
    }

    #[test]
    fn what_is_no_qemu_is_left_alone() {
        assert_eq!(mend(b"no program".to_vec()), None);
        let this = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(mend(this), None);
    }
}
