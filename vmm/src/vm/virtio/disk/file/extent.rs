//! What is done to an extent of a file or block device without data: letting go of it, and filling it with zeroes.
//!
//! The kernel keeps the page cache in step with these calls. Where the file system cannot do one it says so, before anything is done.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};

nix::ioctl_write_ptr_bad!(
    /// `BLKDISCARD` (`linux/fs.h`): start and length in bytes. Its number has no size in it.
    block_discard,
    nix::request_code_none!(0x12, 119),
    [u64; 2]
);

/// Bytes of the hole that is tried behind the end of a file: a page.
const BEYOND: u64 = 4096;

/// Most zeroes written at a time, in bytes.
const ZEROES: usize = 1 << 20;

/// Whether a file of `size` bytes can have holes: asked for one behind its end, where there is nothing.
pub(super) fn can_punch(file: &File, size: u64) -> bool {
    punch(file, size.next_multiple_of(BEYOND), BEYOND).is_ok()
}

/// Whether the block device with this number takes discards, as the kernel says; a partition has the queue of its disk.
pub(super) fn can_discard(device: u64) -> bool {
    let folder = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    let places = ["queue", "../queue"].map(|queue| format!("{folder}/{queue}/discard_max_bytes"));
    let most = places.iter().find_map(|path| std::fs::read_to_string(path).ok());
    // Where nothing can be read, the first discard shows it.
    most.is_none_or(|most| most.trim() != "0")
}

/// Lets go of an extent of a file: reads as zeroes then.
pub(super) fn punch(file: &File, position: u64, length: u64) -> io::Result<()> {
    allocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE, position, length)
}

/// Tells a block device that an extent is not needed.
pub(super) fn discard(device: &File, position: u64, length: u64) -> io::Result<()> {
    let extent = [position, length];
    // SAFETY: the kernel reads two numbers, which live through the call.
    unsafe { block_discard(device.as_raw_fd(), &raw const extent) }?;
    Ok(())
}

/// Fills an extent with zeroes, by the cheapest way that there is; with `unmap` without keeping room for them.
pub(super) fn zeroes(file: &File, position: u64, length: u64, unmap: bool) -> io::Result<()> {
    let ways: &[FallocateFlags] = if unmap {
        &[FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE]
    } else {
        &[FallocateFlags::FALLOC_FL_ZERO_RANGE]
    };
    for way in ways {
        match allocate(file, *way, position, length) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            result => return result,
        }
    }
    write(file, position, length)
}

fn allocate(file: &File, how: FallocateFlags, position: u64, length: u64) -> io::Result<()> {
    let number = |bytes: u64| i64::try_from(bytes).map_err(|_| io::Error::from(ErrorKind::InvalidInput));
    fallocate(file, how | FallocateFlags::FALLOC_FL_KEEP_SIZE, number(position)?, number(length)?)?;
    Ok(())
}

fn write(file: &File, position: u64, length: u64) -> io::Result<()> {
    let zeroes = vec![0; usize::try_from(length).map_or(ZEROES, |length| length.min(ZEROES))];
    let end = position.saturating_add(length);
    for at in (position..end).step_by(ZEROES) {
        let part = usize::try_from(end - at).map_or(ZEROES, |left| left.min(ZEROES));
        file.write_all_at(&zeroes[..part], at)?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ops::Range;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const SIZE: usize = 4 << 20;

    /// A file without a hole.
    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; SIZE], 0).unwrap();
        file.sync_all().unwrap();
        file
    }

    /// Whether exactly this extent reads as zeroes.
    fn is_zero_between(file: &File, extent: Range<usize>) -> bool {
        let mut bytes = vec![0; SIZE];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes.iter().enumerate().all(|(at, byte)| (*byte == 0) == extent.contains(&at))
    }

    #[test]
    fn a_hole_is_zero_and_takes_no_room() {
        let file = file();
        let before = file.metadata().unwrap().blocks();
        match punch(&file, 1 << 20, 2 << 20) {
            // Not every file system can.
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported),
            Ok(()) => assert!(is_zero_between(&file, 1 << 20..3 << 20) && file.metadata().unwrap().blocks() < before),
        }
        assert_eq!(file.metadata().unwrap().len(), SIZE as u64);
    }

    #[test]
    fn whether_holes_can_be_had_is_found_out_without_a_change() {
        let (file, size) = (file(), SIZE as u64);
        assert_eq!(can_punch(&file, size), punch(&file, 0, 4096).is_ok());
        assert_eq!(file.metadata().unwrap().len(), size);
        let not_writable = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        assert!(!can_punch(&not_writable, size));
        assert!(can_discard(u64::MAX), "no such device: nobody says that it cannot");
    }

    #[test]
    fn zeroes_are_written_where_nothing_else_helps() {
        for unmap in [false, true] {
            let file = file();
            zeroes(&file, 512, SIZE as u64 - 1024, unmap).unwrap();
            assert!(is_zero_between(&file, 512..SIZE - 512));
        }
        let file = file();
        write(&file, 512, SIZE as u64 - 1024).unwrap();
        assert!(is_zero_between(&file, 512..SIZE - 512));
        assert_eq!(file.metadata().unwrap().len(), SIZE as u64);
    }
}
