//! As much of ELF as images need (System V ABI, chapters 4 and 5; 64 bits, little-endian): sections by name, whether a
//! file is an x86-64 kernel, and a program without its symbols. Every offset that a file states is checked.

/// Offsets in the ELF header.
const E_TYPE: usize = 0x10;
const E_MACHINE: usize = 0x12;
const E_PHOFF: usize = 0x20;
pub(crate) const E_SHOFF: usize = 0x28;
const E_PHENTSIZE: usize = 0x36;
const E_PHNUM: usize = 0x38;
pub(crate) const E_SHENTSIZE: usize = 0x3a;
pub(crate) const E_SHNUM: usize = 0x3c;
pub(crate) const E_SHSTRNDX: usize = 0x3e;
const HEADER: usize = 64;
/// Offsets in a section header and in a program header.
pub(crate) const SH_OFFSET: usize = 0x18;
pub(crate) const SH_SIZE: usize = 0x20;
const P_OFFSET: usize = 0x08;
const P_FILESZ: usize = 0x20;

const MAGIC: &[u8] = b"\x7fELF";
const MAGIC_64_LE: &[u8] = b"\x7fELF\x02\x01";
const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;

/// Whether the file is ELF at all.
pub(crate) fn is_elf(file: &[u8]) -> bool {
    file.starts_with(MAGIC)
}

/// Whether the file has the form of an unpacked x86-64 kernel: a 64-bit executable at a fixed address.
pub(crate) fn is_kernel(file: &[u8]) -> bool {
    file.starts_with(MAGIC_64_LE) && u16_at(file, E_TYPE) == Some(ET_EXEC) && u16_at(file, E_MACHINE) == Some(EM_X86_64)
}

/// The contents of the section `name`.
pub(crate) fn section<'a>(file: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    if !file.starts_with(MAGIC_64_LE) {
        return None;
    }
    let table = usize::try_from(u64_at(file, E_SHOFF)?).ok()?;
    let entry_size = usize::from(u16_at(file, E_SHENTSIZE)?);
    let count = usize::from(u16_at(file, E_SHNUM)?);
    let header = |index: usize| file.get(table.checked_add(index.checked_mul(entry_size)?)?..);
    let contents = |header: &[u8]| {
        let start = usize::try_from(u64_at(header, SH_OFFSET)?).ok()?;
        let size = usize::try_from(u64_at(header, SH_SIZE)?).ok()?;
        file.get(start..start.checked_add(size)?)
    };
    let names = contents(header(usize::from(u16_at(file, E_SHSTRNDX)?))?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let found = names.get(u32_at(header, 0)? as usize..)?;
        (found.starts_with(name) && found.get(name.len()) == Some(&0)).then(|| contents(header))?
    })
}

/// A program without what only debuggers read: section headers, symbols and debug information, which lie behind
/// everything that is loaded. Any other file comes back as it is.
pub fn without_symbols(mut program: Vec<u8>) -> Vec<u8> {
    if let Some(end) = end_of_segments(&program) {
        program.truncate(end);
        program[E_SHOFF..E_SHOFF + 8].fill(0);
        program[E_SHNUM..E_SHSTRNDX + 2].fill(0);
    }
    program
}

/// Where the last program segment ends in the file.
fn end_of_segments(file: &[u8]) -> Option<usize> {
    if !file.starts_with(MAGIC_64_LE) {
        return None;
    }
    let table = usize::try_from(u64_at(file, E_PHOFF)?).ok()?;
    let entry_size = usize::from(u16_at(file, E_PHENTSIZE)?);
    let count = usize::from(u16_at(file, E_PHNUM)?);
    let mut end = table.checked_add(entry_size.checked_mul(count)?)?.max(HEADER);
    for index in 0..count {
        let header = file.get(table + index * entry_size..)?;
        let segment = u64_at(header, P_OFFSET)?.checked_add(u64_at(header, P_FILESZ)?)?;
        end = end.max(usize::try_from(segment).ok()?);
    }
    (count > 0 && end <= file.len()).then_some(end)
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The shortest file that has the form of a kernel, and `contents` behind its header.
    pub(crate) fn kernel(contents: &[u8]) -> Vec<u8> {
        let mut file = vec![0; HEADER];
        file[..6].copy_from_slice(MAGIC_64_LE);
        file[E_TYPE..E_TYPE + 2].copy_from_slice(&ET_EXEC.to_le_bytes());
        file[E_MACHINE..E_MACHINE + 2].copy_from_slice(&EM_X86_64.to_le_bytes());
        file.extend_from_slice(contents);
        file
    }

    #[test]
    fn this_very_program_runs_without_its_symbols() {
        let dir = tempfile::tempdir().unwrap();
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let trimmed = without_symbols(whole.clone());
        assert!(trimmed.len() < whole.len());
        let program = dir.path().join("program");
        std::fs::write(&program, trimmed).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let output = std::process::Command::new(program).arg("--list").output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("without_its_symbols"));
    }

    #[test]
    fn other_files_are_left_as_they_are() {
        assert_eq!(without_symbols(b"#!/bin/sh\n".to_vec()), b"#!/bin/sh\n");
        assert_eq!(without_symbols(MAGIC_64_LE.to_vec()), MAGIC_64_LE);
        assert!(!is_kernel(MAGIC_64_LE) && is_kernel(&kernel(b"")));
    }

    proptest! {
        #[test]
        fn damaged_programs_do_not_panic(offset: u64, size: u64, count: u16, entry in 0u16..100) {
            let mut file = kernel(&[0xff; 200]);
            file[E_PHOFF..E_PHOFF + 8].copy_from_slice(&(offset % 300).to_le_bytes());
            file[E_PHNUM..E_PHNUM + 2].copy_from_slice(&count.to_le_bytes());
            file[E_PHENTSIZE..E_PHENTSIZE + 2].copy_from_slice(&entry.to_le_bytes());
            file[100..108].copy_from_slice(&size.to_le_bytes());
            let _ = without_symbols(file);
        }
    }
}
