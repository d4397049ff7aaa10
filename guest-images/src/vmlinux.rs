//! Unpacks the ELF kernel (`vmlinux`) from a bzImage (Linux boot protocol 2.08 and later, `payload_offset` and
//! `payload_length` of the setup header). A file that is an ELF image already is taken as it is.
//!
//! The payload is a compressed stream with the unpacked size in its last four bytes; the result must have exactly
//! that size and be an ELF image. What follows the ELF segments (relocations) is left in place; loaders ignore it.

use std::borrow::Cow;

use crate::decompress::{DecompressError, Format, decompress};
use crate::elf;

/// Largest kernel that is accepted, unpacked: a debug build with KASAN has about half of it.
const MAX_VMLINUX: usize = 1 << 30;
/// Oldest boot protocol whose header names the payload.
const MIN_BOOT_PROTOCOL: u16 = 0x0208;

/// Offsets in the setup header (Documentation/arch/x86/boot.rst).
const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const BOOT_PROTOCOL: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Why a file gives no kernel.
#[derive(Debug, thiserror::Error)]
pub enum VmlinuxError {
    /// Neither bzImage nor ELF.
    #[error("this is no kernel: neither a bzImage nor an ELF image (vmlinux)")]
    NoKernel,
    /// Boot protocol before 2.08 (Linux 2.6.26).
    #[error("the bzImage has boot protocol {major}.{minor:02}; 2.08 or later is needed")]
    TooOld {
        /// Major number.
        major: u8,
        /// Minor number.
        minor: u8,
    },
    /// The header points outside the file.
    #[error("the bzImage is cut short: its payload ends at byte {end}, the file at {length}")]
    CutShort {
        /// Where the payload should end.
        end: u64,
        /// Where the file ends.
        length: usize,
    },
    /// No known compression.
    #[error("the bzImage's payload starts with unknown bytes {0:02x?}")]
    UnknownCompression(Vec<u8>),
    /// Decompression failed.
    #[error("cannot unpack the bzImage's payload")]
    Decompress(#[from] DecompressError),
    /// The result is not what the payload's end says.
    #[error("the unpacked kernel has {actual} bytes, its header says {expected}")]
    WrongSize {
        /// Bytes unpacked.
        actual: usize,
        /// Bytes announced.
        expected: usize,
    },
    /// An ELF file, or a bzImage's payload, that is something else.
    #[error("this is no x86-64 kernel (an ELF executable at a fixed address, as vmlinux)")]
    NotX86Kernel,
}

/// Returns the ELF kernel that `kernel` is or holds.
///
/// # Errors
/// When `kernel` is neither, or damaged.
pub fn unpack(kernel: &[u8]) -> Result<Cow<'_, [u8]>, VmlinuxError> {
    if elf::is_elf(kernel) {
        return if elf::is_kernel(kernel) { Ok(Cow::Borrowed(kernel)) } else { Err(VmlinuxError::NotX86Kernel) };
    }
    let payload = payload(kernel)?;
    if elf::is_kernel(payload) {
        return Ok(Cow::Borrowed(payload)); // CONFIG_KERNEL_UNCOMPRESSED
    }
    let format = Format::detect(payload)
        .ok_or_else(|| VmlinuxError::UnknownCompression(payload.iter().take(4).copied().collect()))?;
    let (stream, size) = payload.split_last_chunk::<4>().ok_or(VmlinuxError::NotX86Kernel)?;
    let expected = u32::from_le_bytes(*size) as usize;
    // gzip's own trailer is that size, so it belongs to the stream; the others have it appended.
    let stream = if format == Format::Gzip { payload } else { stream };
    let vmlinux = decompress(format, stream, expected.min(MAX_VMLINUX))?;
    if vmlinux.len() != expected {
        return Err(VmlinuxError::WrongSize { actual: vmlinux.len(), expected });
    }
    if !elf::is_kernel(&vmlinux) {
        return Err(VmlinuxError::NotX86Kernel);
    }
    Ok(Cow::Owned(vmlinux))
}

/// The compressed part of a bzImage.
fn payload(image: &[u8]) -> Result<&[u8], VmlinuxError> {
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS") {
        return Err(VmlinuxError::NoKernel);
    }
    let protocol = u16::from_le_bytes(bytes_at(image, BOOT_PROTOCOL)?);
    if protocol < MIN_BOOT_PROTOCOL {
        let [minor, major] = protocol.to_le_bytes();
        return Err(VmlinuxError::TooOld { major, minor });
    }
    let [setup_sects] = bytes_at(image, SETUP_SECTS)?;
    let setup_sects = if setup_sects == 0 { 4 } else { u64::from(setup_sects) }; // 0 means 4, for old loaders
    let start = (setup_sects + 1) * 512 + u64::from(u32::from_le_bytes(bytes_at(image, PAYLOAD_OFFSET)?));
    let end = start + u64::from(u32::from_le_bytes(bytes_at(image, PAYLOAD_LENGTH)?));
    let cut = VmlinuxError::CutShort { end, length: image.len() };
    let (Ok(start), Ok(end)) = (usize::try_from(start), usize::try_from(end)) else { return Err(cut) };
    image.get(start..end).ok_or(cut)
}

fn bytes_at<const N: usize>(image: &[u8], offset: usize) -> Result<[u8; N], VmlinuxError> {
    image.get(offset..).and_then(|rest| rest.first_chunk::<N>()).copied().ok_or(VmlinuxError::NoKernel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bz_image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 2 * 512 + 16];
        image[SETUP_SECTS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[BOOT_PROTOCOL..BOOT_PROTOCOL + 2].copy_from_slice(&0x020fu16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&[0; 100]);
        image
    }

    fn kernel() -> Vec<u8> {
        let contents: Vec<u8> = (0..50_000u32).flat_map(|n| (n / 3).to_le_bytes()).collect();
        elf::tests::kernel(&contents)
    }

    fn zstd_image(kernel: &[u8], size: u32) -> Vec<u8> {
        let mut payload = zstd::encode_all(kernel, 1).unwrap();
        payload.extend_from_slice(&size.to_le_bytes());
        bz_image(&payload)
    }

    #[test]
    fn zstd_with_its_size_behind_it() {
        let kernel = kernel();
        let image = zstd_image(&kernel, u32::try_from(kernel.len()).unwrap());
        assert_eq!(unpack(&image).unwrap(), &kernel[..]);
    }

    #[test]
    fn gzip_whose_trailer_is_the_size() {
        use std::io::Write;
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&kernel()).unwrap();
        assert_eq!(unpack(&bz_image(&encoder.finish().unwrap())).unwrap(), &kernel()[..]);
    }

    #[test]
    fn an_elf_image_is_taken_as_it_is() {
        assert!(matches!(unpack(&kernel()).unwrap(), Cow::Borrowed(_)));
    }

    #[test]
    fn a_wrong_size_is_named() {
        let kernel = kernel();
        let more = u32::try_from(kernel.len()).unwrap() + 1;
        assert!(matches!(unpack(&zstd_image(&kernel, more)), Err(VmlinuxError::WrongSize { .. })));
        assert!(matches!(unpack(&zstd_image(&kernel, more - 2)), Err(VmlinuxError::Decompress(_))));
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        assert!(matches!(unpack(b"#!/bin/sh\n"), Err(VmlinuxError::NoKernel)));
        let program = std::fs::read("/proc/self/exe").unwrap();
        assert!(matches!(unpack(&program), Err(VmlinuxError::NotX86Kernel)));
        let mut cut = bz_image(&[0; 4096]);
        cut.truncate(1200);
        assert!(matches!(unpack(&cut), Err(VmlinuxError::CutShort { .. })));
    }

    proptest! {
        #[test]
        fn no_header_panics(mut image in proptest::collection::vec(any::<u8>(), 0x260..0x800)) {
            image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
            let _ = unpack(&image);
        }
    }
}
