//! Archives with programs of the distribution and what they need, put behind any initramfs.

use std::path::{Path, PathBuf};

use umbra_guest_images::cache::{Cache, sha256};
use umbra_guest_images::initramfs::Initramfs;

use super::AssetError;

/// A database.
const SQLITE: &str = "/usr/bin/sqlite3";
/// What makes a file system to put a database on, and what checks it.
pub(super) const FILE_SYSTEM: [&str; 2] = ["/sbin/mke2fs", "/sbin/e2fsck"];

/// The archive with the database.
pub(super) fn database(cache: &Cache) -> Result<PathBuf, AssetError> {
    archive_of(cache, ("database", include_str!("programs.rs")), &[FILE_SYSTEM[0], FILE_SYSTEM[1], SQLITE], |_| Ok(()))
}

/// The archive `name` with `programs`, their libraries and what `rest` adds, made again when a program is another, or `recipe`, the source
/// that says how it is made.
pub(super) fn archive_of(
    cache: &Cache,
    (name, recipe): (&str, &str),
    programs: &[&str],
    rest: impl FnOnce(&mut Initramfs) -> Result<(), AssetError>,
) -> Result<PathBuf, AssetError> {
    let mut made_of = vec![recipe.to_owned()];
    for program in programs {
        made_of.push(cache.digest(Path::new(program))?);
    }
    let key = format!("{name}-{}.cpio", &sha256(made_of.join("\n").as_bytes())[..24]);
    cache.file("initramfs", &key, || {
        let mut archive = Initramfs::new();
        for program in programs {
            archive.add_program(Path::new(program))?;
        }
        rest(&mut archive)?;
        Ok(archive.to_bytes()?)
    })
}
