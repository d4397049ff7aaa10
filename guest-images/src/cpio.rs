//! Writes a cpio archive in the "newc" format that the kernel unpacks as an initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The same entries give the same bytes: owner is root, times are 0, inode numbers count from 1. The caller gives
//! the entries in order, each folder before what is in it.

use std::io::{self, Write};

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A folder.
    Dir,
    /// A regular file and what is in it.
    File(&'a [u8]),
    /// A symbolic link and where it points.
    Symlink(&'a str),
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// A newc archive that is being written.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    inode: u32,
    written: u64,
}

const MAGIC: &str = "070701";
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

impl<W: Write> Writer<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0, written: 0 }
    }

    /// Adds `path` (relative to the root, no leading slash) with the permission bits `mode`.
    ///
    /// # Errors
    /// When writing fails, or a file has 4 GiB or more, which the format cannot hold.
    pub fn add(&mut self, path: &str, mode: u32, kind: &Kind<'_>) -> io::Result<()> {
        self.inode += 1;
        let (mode, data, (major, minor)) = match *kind {
            Kind::Dir => (S_IFDIR | mode, &[][..], (0, 0)),
            Kind::File(data) => (S_IFREG | mode, data, (0, 0)),
            Kind::Symlink(target) => (S_IFLNK | 0o777, target.as_bytes(), (0, 0)),
            Kind::CharDevice { major, minor } => (S_IFCHR | mode, &[][..], (major, minor)),
        };
        let links = if *kind == Kind::Dir { 2 } else { 1 };
        self.entry(path, self.inode, mode, links, data, (major, minor))
    }

    /// Ends the archive and gives the writer back.
    ///
    /// # Errors
    /// When writing fails.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, 0, 1, &[], (0, 0))?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        path: &str,
        inode: u32,
        mode: u32,
        links: u32,
        data: &[u8],
        (major, minor): (u32, u32),
    ) -> io::Result<()> {
        let too_large = |_| io::Error::other(format!("{path}: too large for an initramfs (4 GiB or more)"));
        let size = u32::try_from(data.len()).map_err(too_large)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_large)?;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        let mut header = String::from(MAGIC);
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.write(header.as_bytes())?;
        self.write(path.as_bytes())?;
        self.write(&[0])?;
        self.pad()?;
        self.write(data)?;
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self) -> io::Result<()> {
        const ZEROS: [u8; 3] = [0; 3];
        let missing = usize::try_from(self.written.wrapping_neg() % 4).unwrap_or(0);
        self.write(&ZEROS[..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.add("dev", 0o755, &Kind::Dir).unwrap();
        writer.add("dev/console", 0o600, &Kind::CharDevice { major: 5, minor: 1 }).unwrap();
        writer.add("init", 0o755, &Kind::File(b"#!/bin/sh\n")).unwrap();
        writer.add("link", 0o777, &Kind::Symlink("init")).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn headers_and_padding_are_as_the_format_says() {
        let bytes = archive();
        assert_eq!(bytes.len() % 4, 0);
        let first = std::str::from_utf8(&bytes[..116]).unwrap();
        assert_eq!(&first[..6], "070701");
        assert_eq!(&first[14..22], "000041ed"); // S_IFDIR | 0755
        assert_eq!(&first[94..102], "00000004"); // "dev" and its NUL
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn the_same_entries_give_the_same_bytes() {
        assert_eq!(archive(), archive());
    }
}
