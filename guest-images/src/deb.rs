//! Opens Debian packages (deb(5)): an `ar` archive whose member `data.tar.*` holds the files.
//!
//! A package may be anybody's. Invariants: files are streamed, never held whole; nothing is written outside the destination
//! folder, and no link in it leads out of it, whatever the package says; what is read, written and kept in memory meanwhile is
//! bounded.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::decompress::xz_stream;
use crate::files::{FileError, context};

/// Most that a package may be.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Bytes of `data.tar`, unpacked.
    bytes: u64,
    /// Files and links that are taken from it.
    files: usize,
}

/// A kernel with modules and debug information has some 6 GiB, all firmware that there is has 2; a kernel has 5,000 modules, and
/// there are as many files of firmware.
const LIMITS: Limits = Limits { bytes: 16 << 30, files: 100_000 };

/// Most bytes of headers before a file, a long name among them, which is held in memory. Paths have 4 KiB at most.
const MAX_HEADERS: u64 = 1 << 20;

/// Bytes of an `ar` archive's magic number, and of a member's header.
const AR_MAGIC: &[u8; 8] = b"!<arch>\n";
const AR_HEADER: usize = 60;

/// Why a package gives no files.
#[derive(Debug, thiserror::Error)]
pub enum DebError {
    /// The package cannot be read, or a file cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not an `ar` archive, or one without `data.tar`.
    #[error("{} is no Debian package (it has no data.tar)", .0.display())]
    NoPackage(PathBuf),
    /// `data.tar` has a compression that is not known.
    #[error("{}: its {member} has a compression that is not supported (xz, zst and gz are)", package.display())]
    Compression {
        /// The package.
        package: PathBuf,
        /// The member's name.
        member: String,
    },
    /// It is more than any kernel, or says so.
    #[error(
        "{} holds more than a kernel has: {} GiB unpacked, or {} files",
        .0.display(), LIMITS.bytes >> 30, LIMITS.files
    )]
    TooLarge(PathBuf),
    /// The archive inside is damaged.
    #[error("{} is damaged or cut short; fetch it again", package.display())]
    Damaged {
        /// The package.
        package: PathBuf,
        /// The decoder's word.
        #[source]
        source: io::Error,
    },
}

/// Unpacks into `dest` the files of `packages` whose path in the package (without leading `./`) is `wanted`; returns how many.
/// Links that lead out of `dest`, or nowhere, are left out.
///
/// # Errors
/// When a package is none, damaged or absurdly large, or `dest` cannot be written.
pub fn extract(packages: &[PathBuf], dest: &Path, wanted: impl Fn(&str) -> bool) -> Result<usize, DebError> {
    extract_within(packages, dest, &wanted, LIMITS)
}

fn extract_within(
    packages: &[PathBuf],
    dest: &Path,
    wanted: &dyn Fn(&str) -> bool,
    limits: Limits,
) -> Result<usize, DebError> {
    let mut count = 0;
    for package in packages {
        count += extract_one(package, dest, wanted, limits)?;
    }
    // Last of all: from here on nothing changes any more.
    remove_links_out_of(dest)?;
    Ok(count)
}

fn extract_one(package: &Path, dest: &Path, wanted: &dyn Fn(&str) -> bool, limits: Limits) -> Result<usize, DebError> {
    let damaged = |source| DebError::Damaged { package: package.into(), source };
    let file = File::open(package).map_err(context("open", package))?;
    let (member, entry) = data_member(BufReader::new(file)).map_err(|_| DebError::NoPackage(package.into()))?;
    let data: Box<dyn Read> = match member.as_str() {
        "data.tar" => Box::new(entry),
        "data.tar.gz" => Box::new(flate2::read::MultiGzDecoder::new(entry)),
        "data.tar.xz" => Box::new(liblzma::read::XzDecoder::new_stream(entry, xz_stream().map_err(damaged)?)),
        // By default its window is bounded (128 MiB).
        "data.tar.zst" => Box::new(zstd::stream::read::Decoder::new(entry).map_err(damaged)?),
        _ => return Err(DebError::Compression { package: package.into(), member }),
    };
    extract_tar(data, package, dest, (wanted, limits))
}

/// Name and bytes of the member `data.tar.*`. Names are short in a package, so that none has to be looked up.
fn data_member(mut archive: BufReader<File>) -> io::Result<(String, impl Read)> {
    let mut magic = [0; AR_MAGIC.len()];
    archive.read_exact(&mut magic)?;
    if magic != *AR_MAGIC {
        return Err(ErrorKind::InvalidData.into());
    }
    loop {
        let mut header = [0; AR_HEADER];
        archive.read_exact(&mut header)?;
        let text = |part: &[u8]| String::from_utf8_lossy(part).trim_end().to_owned();
        let (name, size) = (text(&header[..16]), text(&header[48..58]).parse::<u32>());
        let size = size.map_err(|_| io::Error::from(ErrorKind::InvalidData))?;
        let name = name.trim_end_matches('/');
        if name.starts_with("data.tar") {
            return Ok((name.into(), archive.take(size.into())));
        }
        // Members begin at even places.
        archive.seek_relative((i64::from(size) + 1) & !1)?;
    }
}

fn extract_tar(
    data: impl Read,
    package: &Path,
    dest: &Path,
    (wanted, limits): (&dyn Fn(&str) -> bool, Limits),
) -> Result<usize, DebError> {
    let allowance = Rc::new(Allowance { now: Cell::new(MAX_HEADERS), left: Cell::new(limits.bytes) });
    let too_large = || DebError::TooLarge(package.into());
    let damaged = |source: io::Error| {
        if allowance.is_over() { too_large() } else { DebError::Damaged { package: package.into(), source } }
    };
    let mut tar = tar::Archive::new(Bounded { data, allowance: Rc::clone(&allowance) });
    let mut count = 0;
    for entry in tar.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let kind = entry.header().entry_type();
        // What is behind a file is read when the next one is looked for. A sparse file is longer than what is there of it.
        let stored = if kind.is_gnu_sparse() { entry.header().entry_size().map_err(damaged)? } else { entry.size() };
        allowance.now.set(stored.saturating_add(MAX_HEADERS));
        let path = entry.path().map_err(damaged)?.into_owned();
        let name = path.to_string_lossy().trim_start_matches("./").to_owned();
        // No devices, which a package does not have, nor sparse files, which may be of any length.
        let is_file = kind.is_file() || kind.is_contiguous() || kind.is_symlink() || kind.is_hard_link();
        if !is_file || !wanted(&name) {
            continue;
        }
        if count == limits.files {
            return Err(too_large());
        }
        // `unpack_in` refuses paths and hard links that lead out of `dest` (and then says `false`).
        let target = dest.join(&name);
        let unpacked = entry.unpack_in(dest);
        if allowance.is_over() {
            return Err(too_large());
        }
        if unpacked.map_err(|e| context("unpack to", &target)(plain(e)))? {
            count += 1;
        }
    }
    Ok(count)
}

/// Removes the symbolic links below `dest` through which a reader would come out of it, or nowhere.
fn remove_links_out_of(dest: &Path) -> Result<(), FileError> {
    let root = fs::canonicalize(dest).map_err(context("read", dest))?;
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(context("list", &folder))? {
            let entry = entry.map_err(context("list", &folder))?;
            let (path, kind) = (entry.path(), entry.file_type().map_err(context("read", &folder))?);
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_symlink() && !fs::canonicalize(&path).is_ok_and(|to| to.starts_with(&root)) {
                tracing::debug!(link = %path.display(), "left out: it leads out of the package");
                fs::remove_file(&path).map_err(context("remove", &path))?;
            }
        }
    }
    Ok(())
}

/// How much may still be read.
struct Allowance {
    /// Until the next file.
    now: Cell<u64>,
    /// In all.
    left: Cell<u64>,
}

impl Allowance {
    fn most(&self) -> u64 {
        self.now.get().min(self.left.get())
    }

    /// More was asked for.
    fn is_over(&self) -> bool {
        self.most() == 0
    }
}

/// A stream that ends with an error where its allowance does.
struct Bounded<R> {
    data: R,
    allowance: Rc<Allowance>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.allowance.most()).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 && !buffer.is_empty() {
            return Err(io::Error::other("more than is allowed"));
        }
        let length = self.data.read(&mut buffer[..most])?;
        let Allowance { now, left } = &*self.allowance;
        now.set(now.get() - length as u64);
        left.set(left.get() - length as u64);
        Ok(length)
    }
}

/// `tar` wraps a full disk three times, each time with the whole path; the kind says it all.
fn plain(error: io::Error) -> io::Error {
    match error.kind() {
        kind @ (io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => kind.into(),
        _ => error,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::slice::from_ref;

    use super::*;

    /// Writes a package with these files.
    pub(crate) fn package(path: &Path, files: &[(&str, &[u8])], compression: &str) {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, data) in files {
            append(&mut tar, tar::EntryType::Regular, name, data);
        }
        pack(path, &tar.into_inner().unwrap(), compression);
    }

    fn append(tar: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, name: &str, data: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        tar.append(&header, data).unwrap();
    }

    fn append_link(tar: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, name: &str, target: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        tar.append(&header, io::empty()).unwrap();
    }

    /// Writes a package with the archive `data`.
    fn pack(path: &Path, data: &[u8], compression: &str) {
        let packed = match compression {
            ".gz" => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                io::Write::write_all(&mut encoder, data).unwrap();
                encoder.finish().unwrap()
            }
            ".xz" => liblzma::encode_all(data, 1).unwrap(),
            ".zst" => zstd::encode_all(data, 1).unwrap(),
            _ => data.to_vec(),
        };
        let mut deb = ar::Builder::new(File::create(path).unwrap());
        for (name, bytes) in [("debian-binary".into(), &b"2.0\n!"[..]), (format!("data.tar{compression}"), &packed)] {
            deb.append(&ar::Header::new(name.into_bytes(), bytes.len() as u64), bytes).unwrap();
        }
    }

    #[test]
    fn chosen_files_come_out() {
        let dir = tempfile::tempdir().unwrap();
        for compression in ["", ".gz", ".xz", ".zst"] {
            let deb = dir.path().join("x.deb");
            let dest = dir.path().join(format!("out{compression}"));
            std::fs::create_dir(&dest).unwrap();
            package(&deb, &[("./boot/vmlinuz-1", b"kernel"), ("./usr/doc", b"doc")], compression);
            assert_eq!(extract(&[deb], &dest, |name| name.starts_with("boot/")).unwrap(), 1);
            assert_eq!(std::fs::read(dest.join("boot/vmlinuz-1")).unwrap(), b"kernel");
            assert!(!dest.join("usr").exists());
        }
    }

    #[test]
    fn nothing_leaves_the_destination() {
        let dir = tempfile::tempdir().unwrap();
        let deb = dir.path().join("x.deb");
        let dest = dir.path().join("a/b");
        std::fs::create_dir_all(&dest).unwrap();
        package(&deb, &[("../../evil", b"x")], "");
        assert_eq!(extract(&[deb], &dest, |_| true).unwrap(), 0);
        assert!(!dir.path().join("evil").exists());
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let deb = dir.path().join("x.deb");
        std::fs::write(&deb, "hello").unwrap();
        assert!(matches!(extract(from_ref(&deb), dir.path(), |_| true), Err(DebError::NoPackage(_))));
        package(&deb, &[("./boot/x", &[7; 100_000])], ".xz");
        let whole = std::fs::read(&deb).unwrap();
        std::fs::write(&deb, &whole[..whole.len() - 40]).unwrap();
        let outcome = extract(&[deb], dir.path(), |_| true);
        assert!(matches!(outcome, Err(DebError::Damaged { .. } | DebError::File(_))), "{outcome:?}");
    }

    #[test]
    fn no_link_leads_a_reader_out() {
        use tar::EntryType::{Link, Regular, Symlink};
        let dir = tempfile::tempdir().unwrap();
        let (deb, dest) = (dir.path().join("x.deb"), dir.path().join("a/b"));
        fs::create_dir_all(&dest).unwrap();
        fs::write(dir.path().join("secret"), "of the host").unwrap();
        let secret = dir.path().join("secret");
        let mut tar = tar::Builder::new(Vec::new());
        append(&mut tar, Regular, "./lib/firmware/good", b"mine");
        for (name, target) in [
            ("./lib/firmware/kept", "good"),
            ("./lib/kept", "firmware/../firmware/kept"),
            ("./lib/absolute", secret.to_str().unwrap()),
            ("./lib/up", "../../../secret"),
            ("./lib/nowhere", "later"),
            ("./lib/circle", "circle"),
            // Up by way of a link that is one folder higher than it looks.
            ("./lib/firmware/here", ".."),
            ("./lib/by-way", "firmware/here/../../../../secret"),
            ("./lib/twice", "by-way"),
            ("./lib/deep/er/good", "../../firmware/good"),
        ] {
            append_link(&mut tar, Symlink, name, target);
        }
        // The same link at another depth, and a hard link to what a link leads to.
        append_link(&mut tar, Link, "./moved", "lib/deep/er/good");
        pack(&deb, &tar.into_inner().unwrap(), ".xz");
        extract(from_ref(&deb), &dest, |_| true).unwrap();
        let read = |name: &str| fs::read_to_string(dest.join(name)).ok();
        for kept in ["lib/firmware/kept", "lib/kept", "lib/deep/er/good"] {
            assert_eq!(read(kept).as_deref(), Some("mine"), "{kept}");
        }
        for gone in ["absolute", "up", "nowhere", "circle", "by-way", "twice", "../moved"] {
            assert!(fs::symlink_metadata(dest.join("lib").join(gone)).is_err(), "{gone}");
        }
        // A file that goes through a link is none of the package's.
        let mut tar = tar::Builder::new(Vec::new());
        append_link(&mut tar, Symlink, "./lib/out", dir.path().to_str().unwrap());
        append(&mut tar, Regular, "./lib/out/written", b"x");
        pack(&deb, &tar.into_inner().unwrap(), "");
        assert!(extract(&[deb], &dest, |_| true).is_err());
        assert!(!dir.path().join("written").exists());
    }

    #[test]
    fn a_package_without_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let deb = dir.path().join("x.deb");
        let limits = Limits { bytes: 4 << 20, files: 10 };
        let extract = |files: &[(&str, &[u8])]| {
            let dest = tempfile::tempdir().unwrap();
            package(&deb, files, ".xz");
            extract_within(from_ref(&deb), dest.path(), &|name| name.starts_with("boot"), limits)
        };
        let bomb = vec![0; 4 << 20];
        assert!(matches!(extract(&[("boot/a", &bomb)]), Err(DebError::TooLarge(_))));
        assert!(matches!(extract(&[("doc", &bomb)]), Err(DebError::TooLarge(_))), "what is not wanted is read as well");
        let names: Vec<String> = (0..11).map(|n| format!("boot/{n}")).collect();
        let files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"x"[..])).collect();
        assert!(matches!(extract(&files), Err(DebError::TooLarge(_))));
        assert_eq!(extract(&files[..10]).unwrap(), 10);
    }

    #[test]
    fn a_name_without_end_is_not_held() {
        let dir = tempfile::tempdir().unwrap();
        let deb = dir.path().join("x.deb");
        for before in [&[][..], &["boot/a", "boot/b"]] {
            let mut tar = tar::Builder::new(Vec::new());
            before.iter().for_each(|name| append(&mut tar, tar::EntryType::Regular, name, b"x"));
            append(&mut tar, tar::EntryType::GNULongName, "././@LongLink", &vec![b'a'; 2 << 20]);
            append(&mut tar, tar::EntryType::Regular, "boot/x", b"x");
            pack(&deb, &tar.into_inner().unwrap(), ".zst");
            let outcome = extract(from_ref(&deb), dir.path(), |name| name != "boot/a");
            assert!(matches!(outcome, Err(DebError::TooLarge(_))), "behind {before:?}: {outcome:?}");
        }
    }
}
