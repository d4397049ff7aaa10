//! Image formats that would be corrupted as a raw disk, by their magic numbers.
//!
//! A guest can write such a number to the beginning of its raw disk. Its disk is then refused at the next start, which harms nobody
//! else; to read an image as whatever it claims to be would not be so harmless, and is not done.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of the beginning and of the end in which a magic number is looked for.
const LOOKED_AT: usize = 512;

/// A magic number and where it is.
struct Magic {
    /// From the beginning of the image; in a [`AT_END`] from that of its last 512 bytes.
    offset: usize,
    bytes: &'static [u8],
    name: &'static str,
}

const fn magic(offset: usize, bytes: &'static [u8], name: &'static str) -> Magic {
    Magic { offset, bytes, name }
}

/// At the beginning.
const AT_BEGINNING: [Magic; 12] = [
    magic(0, b"QFI\xFB\0\0\0\x01", "qcow"),
    magic(0, b"QFI\xFB", "qcow2"),
    magic(0, b"QED\0", "QED"),
    magic(0, b"KDMV", "VMDK"),
    magic(0, b"COWD", "VMDK"),
    magic(0, b"# Disk DescriptorFile", "VMDK (its description; the data are in other files)"),
    magic(0, b"vhdxfile", "VHDX"),
    magic(0, b"conectix", "VHD"),
    magic(64, b"\x7F\x10\xDA\xBE", "VDI"),
    magic(0, b"WithoutFreeSpace", "Parallels"),
    magic(0, b"WithouFreSpacExt", "Parallels"),
    magic(0, b"Bochs Virtual HD Image", "Bochs"),
];

/// In the last 512 bytes: a fixed VHD is raw but for these, and the guest would take them for part of its disk.
const AT_END: [Magic; 2] = [magic(0, b"conectix", "VHD"), magic(0, b"koly", "DMG")];

/// The format of an image of `size` bytes, if it is one of these.
///
/// # Errors
/// It cannot be read.
pub(super) fn find(file: &File, size: u64) -> io::Result<Option<&'static str>> {
    let (mut beginning, mut end) = ([0; LOOKED_AT], [0; LOOKED_AT]);
    read(file, &mut beginning, 0)?;
    if let Some(at) = size.checked_sub(LOOKED_AT as u64) {
        read(file, &mut end, at)?;
    }
    let in_bytes = |bytes: &[u8; LOOKED_AT], table: &[Magic]| {
        let has = |magic: &&Magic| bytes[magic.offset..].starts_with(magic.bytes);
        table.iter().find(has).map(|magic| magic.name)
    };
    Ok(in_bytes(&beginning, &AT_BEGINNING).or_else(|| in_bytes(&end, &AT_END)))
}

/// Reads what there is.
fn read(file: &File, into: &mut [u8], mut at: u64) -> io::Result<()> {
    let mut rest = into;
    while !rest.is_empty() {
        let length = file.read_at(rest, at)?;
        if length == 0 {
            break;
        }
        at += length as u64;
        rest = &mut rest[length..];
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> Option<&'static str> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        find(&file, bytes.len() as u64).unwrap()
    }

    #[test]
    fn each_format_is_known_by_its_magic() {
        for Magic { offset, bytes, name } in AT_BEGINNING {
            let mut image = vec![0; 4096];
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
            assert_eq!(of(&image), Some(name));
            image.rotate_right(1);
            assert_eq!(of(&image), None);
        }
        for Magic { bytes, name, .. } in AT_END {
            let mut image = vec![0; 4096];
            image[3584..3584 + bytes.len()].copy_from_slice(bytes);
            assert_eq!(of(&image), Some(name));
        }
    }

    #[test]
    fn raw_disks_are_of_no_format() {
        let mut with_partitions = vec![0; 1024];
        with_partitions[510..512].copy_from_slice(&[0x55, 0xAA]);
        for raw in [&b""[..], b"QFI", &[0; 100], &[0xFF; 512], &with_partitions] {
            assert_eq!(of(raw), None);
        }
    }
}
