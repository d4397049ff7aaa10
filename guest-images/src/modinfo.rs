//! Reads the `.modinfo` section of a kernel module (a 64-bit little-endian ELF file): `key=value` strings, each ended
//! by a NUL. Everything is bounds-checked; a file that is no module gives `None`, never a panic.

use crate::elf;

/// The strings of a module's `.modinfo` section, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Modinfo(Vec<(String, String)>);

impl Modinfo {
    /// Reads a module's own information; `None` when `elf` is no kernel module.
    pub fn of_module(elf: &[u8]) -> Option<Self> {
        elf::section(elf, b".modinfo").map(Self::of_section)
    }

    /// Reads NUL-ended `key=value` strings (also the form of `modules.builtin.modinfo`).
    pub fn of_section(bytes: &[u8]) -> Self {
        let strings = bytes.split(|&b| b == 0).filter_map(|s| std::str::from_utf8(s).ok());
        Self(strings.filter_map(|s| s.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect())
    }

    /// All values of `key`.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// All pairs, in order.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::elf::{E_SHENTSIZE, E_SHNUM, E_SHOFF, E_SHSTRNDX, SH_OFFSET, SH_SIZE};
    use proptest::prelude::*;

    /// A module file with nothing in it but the given information.
    pub(crate) fn module(info: &[&str]) -> Vec<u8> {
        let modinfo: Vec<u8> = info.iter().flat_map(|s| s.bytes().chain([0])).collect();
        let names = b"\0.shstrtab\0.modinfo\0";
        let mut elf = vec![0u8; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let names_at = elf.len() as u64;
        elf.extend_from_slice(names);
        let info_at = elf.len() as u64;
        elf.extend_from_slice(&modinfo);
        let table = elf.len() as u64;
        for (name, offset, size) in
            [(0u32, 0u64, 0u64), (1, names_at, names.len() as u64), (11, info_at, modinfo.len() as u64)]
        {
            let mut header = [0u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[SH_OFFSET..SH_OFFSET + 8].copy_from_slice(&offset.to_le_bytes());
            header[SH_SIZE..SH_SIZE + 8].copy_from_slice(&size.to_le_bytes());
            elf.extend_from_slice(&header);
        }
        elf[E_SHOFF..E_SHOFF + 8].copy_from_slice(&table.to_le_bytes());
        elf[E_SHENTSIZE..E_SHENTSIZE + 2].copy_from_slice(&64u16.to_le_bytes());
        elf[E_SHNUM..E_SHNUM + 2].copy_from_slice(&3u16.to_le_bytes());
        elf[E_SHSTRNDX..E_SHSTRNDX + 2].copy_from_slice(&1u16.to_le_bytes());
        elf
    }

    #[test]
    fn keys_may_repeat_and_values_may_hold_equal_signs() {
        let info = Modinfo::of_module(&module(&["alias=pci:a", "alias=pci:b", "parm=x:y=z"])).unwrap();
        assert_eq!(info.all("alias").collect::<Vec<_>>(), ["pci:a", "pci:b"]);
        assert_eq!(info.all("parm").collect::<Vec<_>>(), ["x:y=z"]);
    }

    #[test]
    fn what_is_no_module_is_none() {
        assert_eq!(Modinfo::of_module(b"\x7fELF\x02\x01"), None);
        assert_eq!(Modinfo::of_module(b""), None);
    }

    proptest! {
        #[test]
        fn damaged_modules_do_not_panic(place in 0usize..300, value: u8, cut in 0usize..400) {
            let mut elf = module(&["depends=a,b", "name=c"]);
            if let Some(byte) = elf.get_mut(place) { *byte = value; }
            elf.truncate(cut);
            let _ = Modinfo::of_module(&elf);
        }
    }
}
