//! The build id of this program: what the linker digests of it (`.note.gnu.build-id`), as two builds that differ in anything have
//! two. It costs a look at some loaded bytes, where a checksum of the file reads tens of megabytes.
//!
//! Source: the ELF gABI, "Note Section"; `ld --build-id`.

use std::ffi::c_void;
use std::slice;

use libc::{c_int, dl_phdr_info, size_t};

/// Type of the note, and its owner.
const NT_GNU_BUILD_ID: u32 = 3;
const OWNER: &[u8] = b"GNU\0";
/// Bytes of a note's head: lengths of owner and description, type.
const HEAD: usize = 12;

/// The build id; `None`: the program was linked without one.
pub fn build_id() -> Option<Vec<u8>> {
    let mut found: Option<Vec<u8>> = None;
    // SAFETY: `look` is called with the pointer given here, while this call lasts, and with nothing else.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut found).cast()) };
    found
}

/// Looks at the first object, which is the program itself, and asks to be called no more.
extern "C" fn look(info: *mut dl_phdr_info, _: size_t, found: *mut c_void) -> c_int {
    // SAFETY: `dl_iterate_phdr` gives a valid description of an object, for this call, and the pointer that `build_id` gave it.
    let (info, found) = unsafe { (&*info, &mut *found.cast::<Option<Vec<u8>>>()) };
    // SAFETY: the table has that many entries, and stays as long as the program is loaded.
    let headers = unsafe { slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    for header in headers.iter().filter(|header| header.p_type == libc::PT_NOTE) {
        let Ok(length) = usize::try_from(header.p_memsz) else { continue };
        let start = (info.dlpi_addr + header.p_vaddr) as *const u8;
        // SAFETY: the segment is loaded there with that length, is not written to, and stays as long as the program is loaded.
        *found = found.take().or_else(|| in_notes(unsafe { slice::from_raw_parts(start, length) }));
    }
    1
}

/// The build id among `notes`.
fn in_notes(mut notes: &[u8]) -> Option<Vec<u8>> {
    let word = |bytes: &[u8]| bytes.try_into().map(u32::from_ne_bytes).ok();
    let padded = |length: u32| usize::try_from(length).ok()?.checked_next_multiple_of(4);
    loop {
        let (head, rest) = notes.split_at_checked(HEAD)?;
        let (owner_length, length, kind) = (word(&head[..4])?, word(&head[4..8])?, word(&head[8..])?);
        let (owner, rest) = rest.split_at_checked(padded(owner_length)?)?;
        let id = rest.get(..usize::try_from(length).ok()?)?;
        if kind == NT_GNU_BUILD_ID && owner == OWNER && !id.is_empty() {
            return Some(id.to_vec());
        }
        notes = rest.get(padded(length)?..)?;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn note(owner: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_ne_bytes();
        let mut note = [length(owner), length(description), kind.to_ne_bytes()].concat();
        for part in [owner, description] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    #[test]
    fn the_build_id_is_found_among_other_notes() {
        let (other, same_kind) = (note(b"GNU\0", 1, &[1; 16]), note(b"Umbra\0", 3, b"abc"));
        let id = note(OWNER, NT_GNU_BUILD_ID, &[7; 20]);
        assert_eq!(in_notes(&[other.clone(), same_kind.clone(), id.clone()].concat()), Some(vec![7; 20]));
        assert_eq!(in_notes(&[other, same_kind].concat()), None);
        for cut in 0..id.len() {
            assert_eq!(in_notes(&id[..cut]), None, "{cut}");
        }
        assert_eq!(in_notes(&note(OWNER, NT_GNU_BUILD_ID, b"")), None);
        assert_eq!(in_notes(&[0xff; 64]), None);
    }

    #[test]
    fn this_program_has_one() {
        let id = build_id().unwrap();
        assert!(id.len() >= 16, "{id:?}");
        assert_eq!(build_id().unwrap(), id);
    }
}
