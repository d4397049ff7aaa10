//! Archives with programs of packages that are unpacked and not installed: with Debian's PostgreSQL comes a server that this system is
//! not to run, with fio whatever it can be told to measure.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use umbra_guest_images::cache::{Cache, sha256};
use umbra_guest_images::initramfs::Initramfs;

use super::programs::{FILE_SYSTEM, archive_of};
use super::sound::run;
use super::{AssetError, Say, apt};

/// How the archives are made.
const RECIPE: &str = include_str!("unpacked.rs");
/// Unpacks the packages in `$2` to the folder `$1`.
pub(super) const UNPACK: &str = include_str!("unpack.sh");

/// What finds the libraries of the unpacked programs.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// The database server's packages, and below its version's folder of programs those that are used.
const POSTGRESQL: [&str; 1] = ["postgresql"];
const POSTGRESQL_PROGRAMS: [&str; 6] = ["initdb", "pg_amcheck", "pg_checksums", "pg_ctl", "postgres", "psql"];
/// Where it has a folder for each of its versions.
const POSTGRESQL_LIBRARIES: &str = "usr/lib/postgresql";
const POSTGRESQL_SHARE: &str = "usr/share/postgresql";
/// Its library for just-in-time compilation brings a compiler of 100 MB, and the server does without.
const JIT: &str = "llvmjit";

/// The package of the load generator, and the program.
const FIO: [&str; 1] = ["fio"];
const FIO_PROGRAM: &str = "/usr/bin/fio";

/// The archive with PostgreSQL, a user for it, and what makes and checks file systems.
pub(super) fn postgresql(cache: &Cache, say: Say<'_>) -> Result<PathBuf, AssetError> {
    archive(cache, "postgresql", &POSTGRESQL, &FILE_SYSTEM, say, |unpacked, archive| {
        let version = unpacked.only_entry(POSTGRESQL_LIBRARIES)?;
        let (programs, libraries) = (format!("{version}/bin"), format!("{version}/lib"));
        for program in POSTGRESQL_PROGRAMS {
            unpacked.add_program(archive, &format!("/{programs}/{program}"))?;
        }
        for library in unpacked.entries(&libraries)? {
            if library.ends_with(".so") && !library.contains(JIT) {
                unpacked.add_program(archive, &format!("/{libraries}/{library}"))?;
            }
        }
        archive.add_host_dir(&unpacked.root.join(POSTGRESQL_SHARE), POSTGRESQL_SHARE)?;
        archive.add_file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\npostgres:x:100:100::/tmp:/bin/sh\n");
        archive.add_file("etc/group", 0o644, "root:x:0:\npostgres:x:100:\n");
        Ok(())
    })
}

/// The archive with fio.
pub(super) fn fio(cache: &Cache, say: Say<'_>) -> Result<PathBuf, AssetError> {
    archive(cache, "fio", &FIO, &[], say, |unpacked, archive| unpacked.add_program(archive, FIO_PROGRAM))
}

/// The archive `name` with what `fill` takes of `packages` and of all that they need, and with `programs` of this system.
fn archive(
    cache: &Cache,
    name: &str,
    packages: &[&str],
    programs: &[&str],
    say: Say<'_>,
    fill: impl FnOnce(&Unpacked, &mut Initramfs) -> Result<(), AssetError>,
) -> Result<PathBuf, AssetError> {
    let recipe = sha256([RECIPE, UNPACK].concat().as_bytes());
    archive_of(cache, (name, &recipe), programs, |archive| {
        let dir = tempfile::tempdir().map_err(|e| AssetError::file("make a folder in", &std::env::temp_dir(), e))?;
        say(&format!("downloading the package {name} and what it needs"));
        let files = apt::download_all(packages, dir.path(), say)?;
        let root = dir.path().join("root");
        run(Command::new("sh").args(["-c", UNPACK, "unpack.sh"]).args([&root, &files]))?;
        fill(&Unpacked { root }, archive)
    })
}

/// A folder with unpacked packages.
struct Unpacked {
    root: PathBuf,
}

impl Unpacked {
    /// Names in its folder `dir`.
    fn entries(&self, dir: &str) -> Result<Vec<String>, AssetError> {
        let dir = self.root.join(dir);
        let entries = fs::read_dir(&dir).map_err(|e| AssetError::file("list", &dir, e))?;
        Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    }

    /// The path of the one entry of its folder `dir`.
    fn only_entry(&self, dir: &str) -> Result<String, AssetError> {
        let entries = self.entries(dir)?;
        match &entries[..] {
            [only] => Ok(format!("{dir}/{only}")),
            _ => {
                let what = std::io::Error::other(format!("{} entries in place of one", entries.len()));
                Err(AssetError::file("use", &self.root.join(dir), what))
            }
        }
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside.trim_start_matches('/'))
    }

    /// Adds a program or library, and the libraries that it needs: those of the same packages, whatever this system has.
    fn add_program(&self, archive: &mut Initramfs, path: &str) -> Result<(), AssetError> {
        archive.add_host_file(&self.path(path), path)?;
        archive.add_host_file(&self.path(LOADER), LOADER)?;
        // With the folder as its root, its loader finds what it will find in a guest.
        let mut list = if nix::unistd::geteuid().is_root() {
            Command::new("chroot")
        } else {
            let mut unshare = Command::new("unshare");
            unshare.args(["--map-root-user", "chroot"]);
            unshare
        };
        let listed = run(list.arg(&self.root).args([LOADER, "--list", path]))?;
        for library in libraries(&listed) {
            archive.add_host_file(&self.path(library), library)?;
        }
        Ok(())
    }
}

/// The libraries that the loader has listed.
fn libraries(listed: &str) -> impl Iterator<Item = &str> {
    let places = listed.lines().filter_map(|line| line.split_once(" => "));
    places.filter_map(|(_, place)| place.split_whitespace().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_s_list_is_read() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibz.so.1 => /usr/lib/x86_64-linux-gnu/libz.so.1 (0x00007f1)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n";
        assert_eq!(libraries(listed).collect::<Vec<_>>(), ["/usr/lib/x86_64-linux-gnu/libz.so.1"]);
        assert_eq!(libraries("\tstatically linked\n").count(), 0);
    }
}
