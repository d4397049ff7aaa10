//! Opens Debian packages (deb(5)): an `ar` archive whose member `data.tar.*` holds the files.
//!
//! Files are streamed, never held whole; nothing is written outside the destination folder, whatever the package says.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::files::{FileError, context};

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

/// Unpacks into `dest` the files whose path in the package (without leading `./`) is `wanted`; returns how many.
///
/// # Errors
/// When the package is none or damaged, or `dest` cannot be written.
pub fn extract(package: &Path, dest: &Path, wanted: impl Fn(&str) -> bool) -> Result<usize, DebError> {
    let file = File::open(package).map_err(context("open", package))?;
    let mut archive = ar::Archive::new(BufReader::new(file));
    while let Some(entry) = archive.next_entry() {
        let entry = entry.map_err(|_| DebError::NoPackage(package.into()))?;
        let member = String::from_utf8_lossy(entry.header().identifier()).trim_end_matches('/').to_owned();
        if !member.starts_with("data.tar") {
            continue;
        }
        let data: Box<dyn Read> = match member.as_str() {
            "data.tar" => Box::new(entry),
            "data.tar.gz" => Box::new(flate2::read::MultiGzDecoder::new(entry)),
            "data.tar.xz" => Box::new(liblzma::read::XzDecoder::new_multi_decoder(entry)),
            "data.tar.zst" => Box::new(
                zstd::stream::read::Decoder::new(entry)
                    .map_err(|source| DebError::Damaged { package: package.into(), source })?,
            ),
            _ => return Err(DebError::Compression { package: package.into(), member }),
        };
        return extract_tar(data, package, dest, &wanted);
    }
    Err(DebError::NoPackage(package.into()))
}

fn extract_tar(data: impl Read, package: &Path, dest: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<usize, DebError> {
    let damaged = |source| DebError::Damaged { package: package.into(), source };
    let mut tar = tar::Archive::new(data);
    let mut count = 0;
    for entry in tar.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let path = entry.path().map_err(damaged)?.into_owned();
        let name = path.to_string_lossy().trim_start_matches("./").to_owned();
        if entry.header().entry_type().is_dir() || !wanted(&name) {
            continue;
        }
        // `unpack_in` refuses paths and links that lead out of `dest` (and then says `false`).
        let target = dest.join(&name);
        if entry.unpack_in(dest).map_err(|e| context("unpack to", &target)(plain(e)))? {
            count += 1;
        }
    }
    Ok(count)
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
    use super::*;

    /// Writes a package with these files.
    pub(crate) fn package(path: &Path, files: &[(&str, &[u8])], compression: &str) {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, data) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            let name_bytes = name.as_bytes();
            header.as_old_mut().name[..name_bytes.len()].copy_from_slice(name_bytes);
            header.set_cksum();
            tar.append(&header, *data).unwrap();
        }
        let data = tar.into_inner().unwrap();
        let packed = match compression {
            ".xz" => liblzma::encode_all(&data[..], 1).unwrap(),
            ".zst" => zstd::encode_all(&data[..], 1).unwrap(),
            _ => data,
        };
        let mut deb = ar::Builder::new(File::create(path).unwrap());
        for (name, bytes) in [("debian-binary".into(), &b"2.0\n"[..]), (format!("data.tar{compression}"), &packed)] {
            deb.append(&ar::Header::new(name.into_bytes(), bytes.len() as u64), bytes).unwrap();
        }
    }

    #[test]
    fn chosen_files_come_out() {
        let dir = tempfile::tempdir().unwrap();
        for compression in ["", ".xz", ".zst"] {
            let deb = dir.path().join("x.deb");
            let dest = dir.path().join(format!("out{compression}"));
            std::fs::create_dir(&dest).unwrap();
            package(&deb, &[("./boot/vmlinuz-1", b"kernel"), ("./usr/doc", b"doc")], compression);
            assert_eq!(extract(&deb, &dest, |name| name.starts_with("boot/")).unwrap(), 1);
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
        assert_eq!(extract(&deb, &dest, |_| true).unwrap(), 0);
        assert!(!dir.path().join("evil").exists());
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let deb = dir.path().join("x.deb");
        std::fs::write(&deb, "hello").unwrap();
        assert!(matches!(extract(&deb, dir.path(), |_| true), Err(DebError::NoPackage(_))));
        package(&deb, &[("./boot/x", &[7; 100_000])], ".xz");
        let whole = std::fs::read(&deb).unwrap();
        std::fs::write(&deb, &whole[..whole.len() - 40]).unwrap();
        assert!(matches!(extract(&deb, dir.path(), |_| true), Err(DebError::Damaged { .. } | DebError::File(_))));
    }
}
